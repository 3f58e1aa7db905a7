"""Patterns: which axes of a tensor own a statistic.

``'n c h w -> c'`` reads: of the axes n, c, h, w, each c has its own mean and variance, and all
other axes are averaged. The left side names every axis of the logical shape (never of memory), the
first one being the batch. ``(g c)`` splits one dimension into two axes and ``...`` stands for any
number of axes. A second pattern, of the same words, names the axes that gamma and beta have.

This module knows text and shapes only: no tensors, no modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from .errors import PatternError, ShapeError

__all__ = ["DEFAULT", "Bound", "Groups", "NormSpec", "parse"]

Groups = tuple[tuple[str, ...], ...]
"""Dimensions in order, each the tuple of axes that it is made of."""

DEFAULT: Final = "<owners without the batch>"
"""The affine pattern that is meant when none is given."""

ELLIPSIS: Final = "..."
_WORD = re.compile(r"\s*(\.\.\.|[A-Za-z_][A-Za-z0-9_]*|[()])")


@dataclass(frozen=True)
class Bound:
    """A spec that has met a shape: every axis has a size.

    ``shape`` is the input's shape with each ``(g c)`` split in two; ``kept`` are the dimensions of
    that shape that own a statistic, and ``affine`` those that gamma and beta have. ``stat_shape``
    and ``affine_shape`` are the shapes of the statistics and of gamma and beta as users see them.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    kept: tuple[int, ...]
    stat_shape: tuple[int, ...]
    affine: tuple[int, ...]
    affine_shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many values share one mean and one variance."""
        return _product(s for d, s in enumerate(self.shape) if d not in self.kept)

    @property
    def averaged(self) -> tuple[str, ...]:
        """The axes that are averaged, with their sizes, as text."""
        return tuple(
            f"dimension {d}={s}" if n.startswith(ELLIPSIS) else f"{n}={s}"
            for d, (n, s) in enumerate(zip(self.names, self.shape, strict=True))
            if d not in self.kept
        )


@dataclass(frozen=True)
class NormSpec:
    """A parsed pattern. Two spellings of one meaning compare equal.

    Attributes:
        axes: the dimensions of the input, each a tuple of axis names, ``('...',)`` among them.
        owners: the dimensions of the statistics.
        affine: the dimensions of gamma and beta, or None for a norm that has neither.
    """

    axes: Groups
    owners: Groups
    affine: Groups | None

    @property
    def batch(self) -> tuple[str, ...]:
        """The axes of the first dimension."""
        return self.axes[0]

    @property
    def averages_batch(self) -> bool:
        """True for a *batch* norm: it must remember running statistics for inference."""
        return not set(self.batch) & set(_flat(self.owners))

    @property
    def affine_is_owners(self) -> bool:
        """True if gamma and beta have exactly the axes of the statistics."""
        return self.affine is not None and _flat(self.affine) == _flat(self.owners)

    @property
    def fixed(self) -> tuple[str, ...]:
        """The axes whose size must be known when the module is built, in the pattern's order."""
        wanted = set(_flat(self.owners)) if self.averages_batch else set()
        wanted |= set(_flat(self.affine or ()))
        return tuple(name for name in _flat(self.axes) if name in wanted)

    def __str__(self) -> str:
        return f"{_text(self.axes)} -> {_text(self.owners)}".rstrip()

    @property
    def affine_text(self) -> str | None:
        """The affine pattern as text, or None."""
        return None if self.affine is None else _text(self.affine)

    def shape_of(self, groups: Groups, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of a vector over ``groups``, given the size of every axis in it."""
        return tuple(_product(sizes[name] for name in group) for group in groups)

    def check_names(self, sizes: Mapping[str, int]) -> None:
        """Refuses a size for an axis that the pattern does not have.

        Raises:
            PatternError: there is one.
        """
        names = _flat(self.axes)
        for name, size in sizes.items():
            if name not in names:
                raise PatternError(f"{name}={size} is given but '{self}' has no axis '{name}'")

    def bind(self, shape: Sequence[int], sizes: Mapping[str, int] | None = None) -> Bound:
        """Gives every axis its size from an input shape.

        Args:
            shape: the input's shape, in the pattern's order.
            sizes: sizes that the caller insists on; needed for all but one axis of each ``(...)``.

        Raises:
            PatternError: a size is given for an axis that the pattern does not have.
            ShapeError: the rank or a size does not fit.
        """
        known = dict(sizes or {})
        self.check_names(known)
        names: list[str] = []
        flat: list[int] = []
        for group, dims in self._pair_up(shape):
            if group == (ELLIPSIS,):
                names += [f"{ELLIPSIS}{i}" for i in range(len(dims))]
                flat += dims
            else:
                names += group
                flat += self._split(group, dims[0], known, shape)
        table = dict(zip(names, flat, strict=True))
        kept = _places(self.owners, names)
        affine = _places(self.affine or (), names)
        return Bound(
            names=tuple(names),
            shape=tuple(flat),
            kept=kept,
            stat_shape=_merged(self.owners, table),
            affine=affine,
            affine_shape=_merged(self.affine or (), table),
        )

    def _pair_up(self, shape: Sequence[int]) -> Iterator[tuple[tuple[str, ...], list[int]]]:
        """Pairs each dimension of the pattern with the sizes that it covers."""
        has_ellipsis = (ELLIPSIS,) in self.axes
        plain = len(self.axes) - has_ellipsis
        if len(shape) < plain or (len(shape) > plain and not has_ellipsis):
            wanted = f"at least {plain}" if has_ellipsis else str(plain)
            raise ShapeError(
                f"'{self}' describes {wanted} dimensions but got {len(shape)} in {tuple(shape)}; "
                "write one name per dimension, or '...' for any number"
            )
        at = 0
        for group in self.axes:
            covered = len(shape) - plain if group == (ELLIPSIS,) else 1
            yield group, list(shape[at : at + covered])
            at += covered

    def _split(
        self, group: tuple[str, ...], size: int, known: Mapping[str, int], shape: Sequence[int]
    ) -> list[int]:
        """The sizes of the axes of one dimension."""
        missing = [name for name in group if name not in known]
        product = _product(known[name] for name in group if name in known)
        if len(missing) > 1:
            raise ShapeError(
                f"'{self}' splits a dimension of size {size} into ({' '.join(group)}); "
                f"give the size of all but one, for example {missing[0]}=..."
            )
        if missing and product and size % product == 0:
            rest = size // product
        elif not missing and product == size:
            rest = 1
        else:
            raise ShapeError(self._misfit(group, size, known, shape))
        return [known.get(name, rest) for name in group]

    def _misfit(
        self, group: tuple[str, ...], size: int, known: Mapping[str, int], shape: Sequence[int]
    ) -> str:
        given = ", ".join(f"{name}={known[name]}" for name in group if name in known)
        text = f"'{self}' was built for {given} but got {tuple(shape)}"
        if len(group) > 1:
            return f"{text}: {size} does not split into ({' '.join(group)})"
        if set(group) & set(_flat(self.owners)) - set(_flat(self.axes[:2])):
            text += "; a norm that owns places fixes the image size"
        return text


@lru_cache(maxsize=1024)
def parse(pattern: str, affine: str | None = DEFAULT) -> NormSpec:
    """Reads ``'axes -> owners'`` and the pattern of gamma and beta.

    Args:
        pattern: for example ``'n c ... -> c'``, ``'n c h w -> c h w'``, ``'n (g c) h w -> n g'``.
        affine: axes of gamma and beta, for example ``'c'`` or ``'(g c)'``; None for neither; left
            out, the owners without the batch axis.

    Raises:
        PatternError: the text does not describe a normalization.
    """
    left, arrow, right = pattern.partition("->")
    if not arrow:
        raise PatternError(f"'{pattern}' has no '->'; write 'axes -> owners', as in 'n c h w -> c'")
    axes = _groups(left, pattern, "left")
    if not axes or axes[0] == (ELLIPSIS,):
        raise PatternError(f"'{pattern}' must begin with the batch axis, as in 'n c ... -> c'")
    owners = _subset(right, axes, pattern, "right")
    if set(_flat(owners)) == set(_flat(axes)):
        raise PatternError(f"'{pattern}' keeps every axis, so each mean would be of one value")
    if affine is None:
        return NormSpec(axes, owners, None)
    if affine == DEFAULT:
        batch = set(axes[0])
        trimmed = (tuple(name for name in group if name not in batch) for group in owners)
        return NormSpec(axes, owners, tuple(group for group in trimmed if group))
    spec_affine = _subset(affine, axes, pattern, "affine pattern")
    shared = set(_flat(spec_affine)) & set(axes[0])
    if shared:
        raise PatternError(
            f"affine '{affine}' of '{pattern}' has the batch axis '{min(shared)}'; gamma and beta "
            "are shared by all samples"
        )
    return NormSpec(axes, owners, spec_affine)


def _groups(text: str, pattern: str, side: str) -> Groups:
    """Reads names, parentheses and an ellipsis; each name may stand once."""
    groups: list[tuple[str, ...]] = []
    inside: list[str] | None = None
    at = 0
    text = text.rstrip()
    while at < len(text):
        match = _WORD.match(text, at)
        if match is None:
            bad = text[at:].split()[0]
            raise PatternError(
                f"'{bad}' on the {side} of '{pattern}' is neither a name, '(', ')' nor '...'"
            )
        at = match.end()
        word = match.group(1)
        if word == "(":
            if inside is not None:
                raise PatternError(f"'{pattern}' has parentheses inside parentheses; use one level")
            inside = []
        elif word == ")":
            if not inside:
                raise PatternError(f"'{pattern}' has a ')' that closes nothing, or an empty '()'")
            groups.append(tuple(inside))
            inside = None
        elif inside is not None:
            if word == ELLIPSIS:
                raise PatternError(f"'{pattern}' has '...' inside parentheses; write it outside")
            inside.append(word)
        else:
            groups.append((word,))
    if inside is not None:
        raise PatternError(f"'{pattern}' has a '(' that is never closed")
    flat = _flat(tuple(groups))
    for name in flat:
        if flat.count(name) > 1:
            raise PatternError(f"axis '{name}' stands twice on the {side} of '{pattern}'")
    return tuple(groups)


def _subset(text: str, axes: Groups, pattern: str, side: str) -> Groups:
    """Reads the axes of a vector: some of the input's, in the input's order."""
    groups = _groups(text, pattern, side)
    order = _flat(axes)
    for name in _flat(groups):
        if name not in order:
            raise PatternError(
                f"axis '{name}' on the {side} of '{pattern}' is not on the left "
                f"({', '.join(order)})"
            )
    places = [order.index(name) for name in _flat(groups)]
    if places != sorted(places):
        wanted = " ".join(order[i] for i in sorted(places))
        raise PatternError(
            f"the {side} of '{pattern}' changes the order of the axes; write '{wanted}'"
        )
    return groups


def _product(sizes: Iterable[int]) -> int:
    # math.prod would do, but torch.compile cannot follow it over symbolic sizes.
    product = 1
    for size in sizes:
        product *= size
    return product


def _flat(groups: Groups) -> tuple[str, ...]:
    return tuple(name for group in groups for name in group)


def _text(groups: Groups) -> str:
    return " ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" for g in groups)


def _places(groups: Groups, names: Sequence[str]) -> tuple[int, ...]:
    """The positions of the axes of ``groups`` among ``names``, the ellipsis spread out."""
    wanted = set(_flat(groups))
    spread = ELLIPSIS in wanted
    return tuple(
        i for i, n in enumerate(names) if n in wanted or (spread and n.startswith(ELLIPSIS))
    )


def _merged(groups: Groups, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape over ``groups``: one size per dimension, the ellipsis spread out."""
    shape: list[int] = []
    for group in groups:
        if group == (ELLIPSIS,):
            shape += [s for name, s in sizes.items() if name.startswith(ELLIPSIS)]
        else:
            shape.append(_product(sizes[name] for name in group))
    return tuple(shape)
