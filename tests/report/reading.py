"""Reads a page as plain data: its elements, tables, links, scripts and visible text."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "path", "rect", "circle"}


@dataclass
class Element:
    """One element with its attributes and what is in it."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text in it, spaces joined."""
        pieces = [c if isinstance(c, str) else c.text for c in self.children]
        return " ".join("".join(pieces).split())

    @property
    def raw(self) -> str:
        """The text directly in it, as it is: a script."""
        return "".join(c for c in self.children if isinstance(c, str))

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """Every element below with this tag and these attributes (class_ for class)."""
        wanted = {key.strip("_").replace("_", "-"): value for key, value in attributes.items()}
        found: list[Element] = []
        for child in self.children:
            if isinstance(child, str):
                continue
            own = {key: child.attributes.get(key) or "" for key in wanted}
            right = all(value in (own[k], *own[k].split()) for k, value in wanted.items())
            if tag in ("", child.tag) and right:
                found.append(child)
            found += child.all(tag, **attributes)
        return found

    def one(self, tag: str = "", **attributes: str) -> Element:
        """The only such element."""
        found = self.all(tag, **attributes)
        assert len(found) == 1, (tag, attributes, len(found))
        return found[0]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("")
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(page: str) -> Element:
    """The page as a tree; a tag that is not closed, or closed wrongly, is an error."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert [each.tag for each in reader.open] == [""]
    return reader.root


def rows(table: Element) -> list[list[str]]:
    """The texts of a table's body, the second line of a cell behind a bar."""
    found = []
    for row in table.one("tbody").all("tr"):
        cells = []
        for cell in (c for c in row.children if isinstance(c, Element)):
            small = cell.all("small")
            note = small[0].text if small else ""
            text = cell.text.removesuffix(note) if note else cell.text
            cells.append(f"{text.strip()}|{note}" if note else text)
        found.append(cells)
    return found
