"""The example that a network is run on: an input, a tuple of inputs or a dict of inputs by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["arguments", "call", "cloned", "mapped", "tensors_in", "widened"]


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a network is called with the example."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def call(model: Any, example: Any) -> Any:
    """What the network gives for the example."""
    args, kwargs = arguments(example)
    return model(*args, **kwargs)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def mapped(change: Callable[[Tensor], Tensor], example: Any) -> Any:
    """The example with each floating tensor in it changed."""
    return pytree.tree_map_only(
        Tensor, lambda t: change(t) if t.is_floating_point() else t, example
    )


def cloned(example: Any) -> Any:
    """Copies of the tensors: some networks write over their inputs."""
    return pytree.tree_map_only(Tensor, Tensor.clone, example)


def widened(example: Any) -> Any:
    """The example in double precision."""
    return mapped(Tensor.double, example)
