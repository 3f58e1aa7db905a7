"""A figure on the page: its legend and controls, the room to draw in, its words and its table."""

from __future__ import annotations

from .markup import escape, prose, script_data, table
from .plots import Entry, Figure

__all__ = ["frame"]

_DASHES = {
    "solid": "none",
    "dash": "6 3",
    "dot": "2 2.5",
    "dashdot": "6 2.5 1.5 2.5",
    "longdash": "10 3",
}
_SHAPES = {
    "circle": "M18 6a4 4 0 1 1-8 0a4 4 0 1 1 8 0Z",
    "square": "M10.5 2.5h7v7h-7Z",
    "diamond": "M14 1l5 5l-5 5l-5-5Z",
    "triangle-up": "M14 2l4.5 8h-9Z",
    "triangle-down": "M14 10l4.5-8h-9Z",
    "pentagon": "M14 1.5l4.8 3.5l-1.8 5.5h-6l-1.8-5.5Z",
    "x": "M10 3.5l1.5-1.5l2.5 2.5l2.5-2.5l1.5 1.5l-2.5 2.5l2.5 2.5l-1.5 1.5l-2.5-2.5l-2.5 2.5"
    "l-1.5-1.5l2.5-2.5Z",
    "x-thin": "M10 2l8 8M18 2l-8 8",
}
_FEW = 8  # a legend with more lines than this folds those that are not shown at first


def frame(figure: Figure) -> str:
    """The figure's part of the page; without data, the sentence that says what would give it."""
    key = figure.key
    heading = f'<h3 id="{key}-title">{escape(figure.title)}</h3>'
    if figure.spec is None or figure.table is None:
        missing = f'<p class="missing">{prose(figure.missing)}</p>'
        return f'<div class="figure" id="{key}">\n{heading}\n{missing}\n</div>'
    spec = figure.spec
    heights = f"--height:{spec['height']}px;--narrow-height:{spec['narrow_height']}px"
    return (
        f'<figure class="figure" id="{key}" aria-labelledby="{key}-title">\n{heading}\n'
        f"{_legend(figure)}{_controls(figure)}"
        f'<div class="plot" role="img" aria-label="{escape(figure.label)}" '
        f'data-spec="{key}-spec" style="{heights}"></div>\n'
        f"<figcaption>{prose(figure.caption)}</figcaption>\n"
        f"<details><summary>The same numbers as a table</summary>\n{table(figure.table)}\n"
        f"</details>\n{script_data(f'{key}-spec', spec)}\n</figure>"
    )


def _legend(figure: Figure) -> str:
    """What the lines are; where they can be shown and hidden, a check box for each."""
    entries = figure.legend
    if not entries:
        return ""
    if entries[0].place is None:
        items = "".join(f"<li>{_swatch(each)}{escape(each.name)}</li>" for each in entries)
        return f'<ul class="legend" aria-label="Legend">{items}</ul>\n'
    at_once = [each for each in entries if each.shown or len(entries) <= _FEW]
    folded = [each for each in entries if each not in at_once]
    content = f'<div class="legend">{"".join(map(_box, at_once))}</div>'
    if folded:
        content += (
            f"<details><summary>{len(folded)} more</summary>"
            f'<div class="legend">{"".join(map(_box, folded))}</div></details>'
        )
    return f'<fieldset class="controls"><legend>Arms to show</legend>{content}</fieldset>\n'


def _box(entry: Entry) -> str:
    checked = " checked" if entry.shown else ""
    return (
        f'<label><input type="checkbox" autocomplete="off" data-show="{entry.place}"{checked}>'
        f"{_swatch(entry)}<span>{escape(entry.name)}</span></label>"
    )


def _swatch(entry: Entry) -> str:
    """A piece of the line, or the mark, or both, as the figure draws them."""
    style = entry.style
    symbol = style.symbol.removesuffix("-open")
    parts: list[str] = []
    if entry.shape != "mark":
        dash = _DASHES[style.dash]
        parts.append(f'<path d="M0 6H28" stroke-width="2" stroke-dasharray="{dash}"/>')
    if entry.shape != "line":
        hollow = symbol != style.symbol or symbol == "x-thin"
        fill = "none" if hollow else "currentColor"
        parts.append(f'<path d="{_SHAPES[symbol]}" fill="{fill}" stroke-width="1.5"/>')
    return (
        f'<svg class="swatch" style="color:var(--{style.colour.removeprefix("@")})" width="28" '
        'height="12" viewBox="0 0 28 12" stroke="currentColor" fill="none" aria-hidden="true" '
        f'focusable="false">{"".join(parts)}</svg>'
    )


def _controls(figure: Figure) -> str:
    spec = figure.spec or {}
    parts: list[str] = []
    for key, words in (
        ("log", "Steps on a logarithmic axis"),
        ("stretch", "Accuracy stretched towards 100\u202f% (logarithm of the error)"),
    ):
        if key in spec:
            checked = " checked" if spec[key]["on"] else ""
            parts.append(
                f'<label><input type="checkbox" autocomplete="off" data-switch="{key}"{checked}>'
                f"<span>{words}</span></label>"
            )
    for side, chosen in enumerate(spec.get("chosen", ())):
        options = "".join(
            f'<option value="{place}"{" selected" if place == chosen else ""}>'
            f"{escape(choice['name'])}</option>"
            for place, choice in enumerate(spec["choices"])
        )
        words = ("First panel", "Second panel")[side]
        parts.append(
            f'<label class="pick"><span>{words}</span> <select autocomplete="off" '
            f'data-side="{side}">{options}</select></label>'
        )
    return f'<div class="controls">{"".join(parts)}</div>\n' if parts else ""
