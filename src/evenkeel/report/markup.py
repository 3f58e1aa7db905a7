"""Pieces of HTML, escaped: prose with its signs and spaces set right, tables, commands."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

__all__ = ["Cell", "Column", "Table", "escape", "prose", "script_data", "table"]

_COMMAND = re.compile(r"evenkeel (?:study|report) --\S.*$", re.DOTALL)  # ends the sentence
_OPTION = re.compile(r"--\S+(?: [^-\s]\S*)?")
_EXPONENT = re.compile(r"\b(\d\.\d+)e([+-]\d+)\b")  # as this package writes small numbers
_SUPERSCRIPTS = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)
_NARROW = "\u202f"
_FIXED = "\u00a0"


@dataclass(frozen=True)
class Cell:
    """What a table's cell says, what to sort it by, and one of '', 'muted', 'trouble', 'strong'.

    ``note`` is a second line in small; ``detail`` long text, such as an error, that opens on
    demand.
    """

    text: str
    sort: float | None = None
    kind: str = ""
    note: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Column:
    """A column's heading, and whether its cells are numbers."""

    name: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table of plain values; the first column names its row.

    Attributes:
        key: the table's name in links, unique on the page.
        caption: what it holds.
        sortable: whether the reader may sort it.
    """

    key: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    sortable: bool = False


def prose(text: str) -> str:
    """A sentence for the page: escaped, signs and spaces set, a command at its end to copy."""
    found = _COMMAND.search(text)
    if found is None:
        return _set(text)
    words = _OPTION.sub(r'<span class="whole">\g<0></span>', escape(found[0]))
    return f'{_set(text[: found.start()])}<code class="command">{words}</code>'


def _set(text: str) -> str:
    """Escaped text in which a number stays on the line of its unit, and negative is a minus."""
    text = re.sub(r"(?<=\d) %", f"{_NARROW}%", text)
    text = _EXPONENT.sub(_power, text)
    text = re.sub(r"(?<=\w) - (?=\d)", f"{_FIXED}\u2212{_FIXED}", text)
    text = re.sub(r"(?<=\d) \* (?=\w)", f"{_FIXED}\u00d7{_FIXED}", text)
    text = re.sub(r"\bp ([=<]) (?=\d)", rf"p{_FIXED}\1{_FIXED}", text)
    text = re.sub(r"(^|(?<=[\s(]))-(?=\d)", "\u2212", text)
    text = re.sub(r"(?<=\d) (?=points?\b|times\b|seeds?\b|steps?\b)", _FIXED, text)
    return escape(text)


def _power(found: re.Match[str]) -> str:
    """4.8e-07 as 4.8 times a power of ten."""
    digits = str(int(found[2])).translate(_SUPERSCRIPTS)
    return f"{found[1]}{_NARROW}\u00d7{_NARROW}10{digits}"


def table(content: Table) -> str:
    """A table in a region of its own that scrolls by touch and by keyboard."""
    name = f"{content.key}-caption"
    head = "".join(
        f'<th scope="col"{" class=number" if column.numeric else ""}>{_set(column.name)}</th>'
        for column in content.columns
    )
    body = "\n".join(_row(content.columns, row) for row in content.rows)
    kind = ' class="sortable"' if content.sortable else ""
    return (
        f'<p class="caption" id="{name}">{prose(content.caption)}</p>\n'
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}">\n'
        f'<table id="{content.key}" aria-labelledby="{name}"{kind}>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _row(columns: Sequence[Column], cells: Sequence[Cell]) -> str:
    parts: list[str] = []
    for place, (column, cell) in enumerate(zip(columns, cells, strict=True)):
        kinds = [kind for kind in ("number" if column.numeric else "", cell.kind) if kind]
        attributes = f' class="{" ".join(kinds)}"' if kinds else ""
        if cell.sort is not None:
            attributes += f' data-sort="{cell.sort:.9g}"'
        text = _set(cell.text)
        if cell.note:
            text += f"<small>{_set(cell.note)}</small>"
        if cell.detail:
            detail = escape(cell.detail)
            text = f"<details><summary>{text}</summary><pre>{detail}</pre></details>"
        if place == 0:
            parts.append(f'<th scope="row"{attributes}>{text}</th>')
        else:
            parts.append(f"<td{attributes}>{text}</td>")
    return f"<tr>{''.join(parts)}</tr>"


def script_data(key: str, value: Any) -> str:
    """Values for the page's script, in a block that no text in them can end."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="{key}">{text}</script>'
