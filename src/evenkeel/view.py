"""Views: a tensor's memory as kept, reduced, kept, reduced, ...

Sort the axes by stride, merge neighbours of one role, and the memory of nearly every norm becomes
four numbers ``(k1, r1, k2, r2)``: NCHW spatial is ``(1, n, c, hw)``, NHWC spatial is
``(1, nhw, c, 1)``, per activation is ``(1, n, chw, 1)``. Kernels are written for the four numbers;
the few patterns that need more (one owner set of 16 in each layout) stay with the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["View", "logical_view", "view_of"]


@dataclass(frozen=True)
class View:
    """How the memory of a dense tensor divides into kept and reduced runs.

    ``sizes`` alternates kept, reduced, kept, reduced, ..., always an even number of entries and at
    least four; a role that is absent has size 1. ``order`` lists the tensor's dimensions by falling
    stride, and ``kept`` those of them that own a statistic, in the same order.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def is_four(self) -> bool:
        """True if four numbers suffice, so that every kernel can run it."""
        return len(self.sizes) == 4

    @property
    def kept_sizes(self) -> tuple[int, ...]:
        """The shape of a statistic, in memory order."""
        return self.sizes[0::2]

    @property
    def reduced_dims(self) -> tuple[int, ...]:
        """Which entries of ``sizes`` are averaged."""
        return tuple(range(1, len(self.sizes), 2))

    @property
    def count(self) -> int:
        """How many values share one mean and one variance."""
        count = 1
        for size in self.sizes[1::2]:
            count *= size
        return count

    def fold(self, x: Tensor) -> Tensor:
        """``x`` as a tensor of shape ``sizes``; no copy if x has this view's layout."""
        return x.permute(self.order).reshape(self.sizes)

    def unfold(self, folded: Tensor, like: Tensor) -> Tensor:
        """The inverse of `fold`: a tensor of shape ``sizes`` in the shape of ``like``."""
        permuted = folded.reshape([like.shape[d] for d in self.order])
        back = [0] * len(self.order)
        for place, dim in enumerate(self.order):
            back[dim] = place
        return permuted.permute(back)

    def fold_vector(self, vector: Tensor, shape: Sequence[int]) -> Tensor:
        """A per-owner vector in the order of the dimensions, put into memory order.

        Args:
            vector: as many values as there are owners.
            shape: the input's shape.
        """
        ascending = sorted(self.kept)
        if self.kept == tuple(ascending):
            return vector.reshape(self.kept_sizes)
        placed = vector.reshape([shape[d] for d in ascending])
        return placed.permute([ascending.index(d) for d in self.kept]).reshape(self.kept_sizes)

    def unfold_vector(self, vector: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `fold_vector`, contiguous, with a dimension per owner of the input."""
        ascending = sorted(self.kept)
        placed = vector.reshape([shape[d] for d in self.kept])
        if self.kept == tuple(ascending):
            return placed
        return placed.permute([self.kept.index(d) for d in ascending]).contiguous()


def view_of(shape: Sequence[int], strides: Sequence[int], kept: Sequence[int]) -> View | None:
    """The view of a memory layout, or None if the layout has gaps or overlaps (copy it first).

    Args:
        shape, strides: of the tensor, in elements.
        kept: the dimensions that own a statistic.
    """
    # The stride of a dimension of size 1 means nothing, so such dimensions go first, as they come.
    ones = [d for d, size in enumerate(shape) if size == 1]
    rest = [d for d, size in enumerate(shape) if size != 1]
    rest.sort(key=lambda d: -strides[d])
    order = ones + rest
    if not _is_dense(rest, shape, strides):
        return None
    return _merge(order, shape, kept)


def logical_view(shape: Sequence[int], kept: Sequence[int]) -> View:
    """The view of a contiguous tensor; it never looks at strides, so any tensor may be folded."""
    return _merge(range(len(shape)), shape, kept)


def _merge(order: Sequence[int], shape: Sequence[int], kept: Sequence[int]) -> View:
    """Merges neighbours of one role into runs."""
    sizes = [1, 1]
    role = 0
    for d in order:
        if shape[d] == 1:
            continue
        is_reduced = int(d not in kept)
        if role == 1 and not is_reduced:
            sizes += [1, 1]
        role = is_reduced
        sizes[role - 2] *= shape[d]
    while len(sizes) < 4:
        sizes = [1, 1, *sizes]
    return View(tuple(sizes), tuple(order), tuple(d for d in order if d in kept))


def _is_dense(order: Sequence[int], shape: Sequence[int], strides: Sequence[int]) -> bool:
    """True if the memory in this order has neither gaps nor overlaps."""
    if 0 in shape:
        return True
    expected = 1
    for d in reversed(order):
        if strides[d] != expected:
            return False
        expected *= shape[d]
    return True
