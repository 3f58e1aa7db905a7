"""Random numbers: whose they are, and the same on the same values in every memory layout.

Torch fills a tensor with random numbers in the order of its memory. So dropout with the same seed
drops other values in channels_last than in contiguous memory, and two such networks cannot be
compared. In `SameDraws` every random op is given contiguous tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["SameDraws", "gpus_of"]


def gpus_of(model: nn.Module) -> list[int]:
    """The GPUs on which the network may draw, for torch.random.fork_rng."""
    tensors = (*model.parameters(), *model.buffers())
    return sorted({t.device.index for t in tensors if t.is_cuda and t.device.index is not None})


class SameDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which random ops draw in the order of the axes, whatever lies how."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls the op; a random one on contiguous tensors."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        swapped: list[tuple[Tensor, Tensor]] = []

        def plain(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.is_contiguous():
                return value
            swapped.append((value, value.contiguous()))
            return swapped[-1][1]

        result = func(*pytree.tree_map(plain, args), **pytree.tree_map(plain, kwargs))
        for place, argument in enumerate(func._schema.arguments[: len(args)]):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for given, used in swapped:
                    if given is args[place]:
                        given.copy_(used)
        return pytree.tree_map(_as_before(swapped), result)


def _as_before(swapped: list[tuple[Tensor, Tensor]]) -> Callable[[Any], Any]:
    """Gives what an op gave the strides that it would have had without us."""

    def put(value: Any) -> Any:
        for given, used in swapped:
            if value is used:
                return given
            if isinstance(value, Tensor) and value.shape == given.shape:
                return torch.empty_like(given, dtype=value.dtype).copy_(value)
        return value

    return put
