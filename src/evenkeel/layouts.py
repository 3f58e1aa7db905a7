"""Tensors without gaps, and in the memory order of another: copied only where they have to be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .view import View, view_of

__all__ = ["aligned", "as_saved", "dense", "like_empty"]


@lru_cache(maxsize=4096)
def _view(shape: tuple[int, ...], strides: tuple[int, ...], kept: tuple[int, ...]) -> View | None:
    return view_of(shape, strides, kept)


def dense(x: Tensor, kept: Sequence[int]) -> tuple[Tensor, View]:
    """x without gaps or overlaps, copied only if it has any, and its view."""
    kept = tuple(kept)
    view = _view(x.shape, x.stride(), kept)
    if view is None:
        x = x.clone()
        view = _view(x.shape, x.stride(), kept)
    assert view is not None  # noqa: S101 - a clone is dense
    return x, view


def aligned(t: Tensor, x: Tensor, view: View) -> Tensor:
    """``t`` in the layout of x, copied only if it has another one."""
    if t.stride() == x.stride() or _view(t.shape, t.stride(), tuple(sorted(view.kept))) == view:
        return t
    return torch.empty_like(x, dtype=t.dtype).copy_(t)


def as_saved(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A tensor saved for backward in the layout that it had, copied only if it has another.

    Hooks on saved tensors may give it back in another one, as `torch.autograd.graph.save_on_cpu`
    does with pinned memory.
    """
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def like_empty(t: Tensor, x: Tensor) -> Tensor:
    """``t`` with exactly the strides that ``empty_like(x)`` has, as the fake kernels promise.

    And no view: behind a norm comes a ReLU that may work in place, which autograd forbids on views.
    """
    differs = [a != b for a, b in zip(t.stride(), x.stride(), strict=True)]
    if not any(differs):
        return t.data
    if all(size == 1 for size, unlike in zip(x.shape, differs, strict=True) if unlike):
        return t.as_strided(x.shape, x.stride()).data  # of a size of one, the stride means nothing
    return torch.empty_like(x, dtype=t.dtype).copy_(t)
