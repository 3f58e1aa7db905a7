"""Random patterns with shapes that they fit, for property tests."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

_NAMES = ("n", "c", "h", "w", "t", "a", "b")


@dataclass(frozen=True)
class Case:
    """A pattern and a shape, and the same pattern in full for einops, which spells '...' out.

    ``sizes`` are all axes' sizes and ``given`` those that the shape alone does not tell.
    """

    text: str
    left: str
    right: str
    shape: tuple[int, ...]
    sizes: dict[str, int]
    given: dict[str, int]
    owners: tuple[str, ...]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A pattern of two to five dimensions, some of them split, perhaps with an ellipsis."""
    dims, sizes = _dimensions(draw)
    names = [name for dim in dims for name in dim]
    spread = draw(st.sampled_from([0, 1, 2]))  # dimensions that '...' stands for, if it is there
    hidden = tuple(f"e{i}" for i in range(spread))
    has_ellipsis = draw(st.booleans())
    if has_ellipsis:
        sizes |= {name: draw(st.integers(1, 3)) for name in hidden}
        at = draw(st.integers(1, len(dims)))
        owns_hidden = draw(st.booleans())
    kept = draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names)))
    owners = [name for name, keeps in zip(names, kept, strict=True) if keeps]
    if len(owners) == len(names):
        owners = owners[1:]
    left = [_dim(dim) for dim in dims]
    in_full = list(left)
    right = list(owners)
    right_in_full = list(owners)
    shape = [_size(dim, sizes) for dim in dims]
    if has_ellipsis:
        left.insert(at, "...")
        in_full[at:at] = hidden
        shape[at:at] = [sizes[name] for name in hidden]
        if owns_hidden:
            before = {name for dim in dims[:at] for name in dim}
            place = sum(name in before for name in owners)
            right.insert(place, "...")
            right_in_full[place:place] = hidden
    return Case(
        text=f"{' '.join(left)} -> {' '.join(right)}",
        left=" ".join(in_full),
        right=" ".join(right_in_full),
        shape=tuple(shape),
        sizes=sizes,
        given={name: sizes[name] for dim in dims for name in dim[1:]},
        owners=tuple(right_in_full),
    )


def _dimensions(draw: st.DrawFn) -> tuple[list[tuple[str, ...]], dict[str, int]]:
    names = iter(_NAMES)
    dims: list[tuple[str, ...]] = [(next(names),)]
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.sampled_from([1, 1, 2]))
        dims.append(tuple(next(names) for _ in range(count)))
    return dims, {name: draw(st.integers(1, 4)) for dim in dims for name in dim}


def _dim(dim: tuple[str, ...]) -> str:
    return dim[0] if len(dim) == 1 else f"({' '.join(dim)})"


def _size(dim: tuple[str, ...], sizes: dict[str, int]) -> int:
    product = 1
    for name in dim:
        product *= sizes[name]
    return product
