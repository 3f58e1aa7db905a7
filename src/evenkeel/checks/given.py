"""What a user gives besides the network: batches of data and an optimizer, as plain facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from ..errors import ConfigError
from ..surgery.examples import tensors_in

__all__ = ["MOST_BATCHES", "Data", "Decay", "batches_of", "decays_of", "doubled", "samples_in"]

MOST_BATCHES: Final = 16
"""How many batches of a loader are looked at; give it shuffled."""
_MOST_BYTES: Final = 2**28


@dataclass(frozen=True, eq=False)
class Data:
    """Batches of the user's, and how large batches are.

    Attributes:
        inputs: of each batch, what goes into the network.
        typical: samples in a batch, of the first.
        smallest: samples in the smallest batch that training will see, the last one perhaps.
    """

    inputs: tuple[Any, ...]
    typical: int
    smallest: int

    @property
    def samples(self) -> int:
        """How many there are in all batches."""
        return sum(samples_in(batch) for batch in self.inputs)


@dataclass(frozen=True)
class Decay:
    """What an optimizer does with a norm's gamma and beta.

    Attributes:
        held: how many of them it has; ``of`` says of how many that learn.
        weight_decay: the largest of their groups.
        rate: that group's learning rate.
    """

    held: int
    of: int
    weight_decay: float
    rate: float


def batches_of(data: Any, example: Any) -> Data:
    """The first batches of data, without their labels.

    A batch is a tensor, a tuple or list whose first entries are the inputs (as many as a tuple
    ``example`` has, else one), or a dict, of which the keys of a dict ``example`` are taken.

    Raises:
        ConfigError: there is no batch, or one that is none of these.
    """
    if isinstance(data, Tensor | str | bytes) or not isinstance(data, Iterable):
        data = [data]
    inputs: list[Any] = []
    size = 0
    for batch in data:
        inputs.append(_inputs(batch, example))
        size += sum(t.nbytes for t in tensors_in(inputs[-1]))
        if len(inputs) == MOST_BATCHES or size >= _MOST_BYTES:
            break
    if not inputs:
        raise ConfigError("data gives no batch; give tensors, a DataLoader or a list of batches")
    counts = [samples_in(batch) for batch in inputs]
    smallest = min(counts)
    if isinstance(data, DataLoader) and data.batch_size is not None and not data.drop_last:
        held = data.sampler if isinstance(data.sampler, Sized) else ()
        smallest = min(smallest, len(held) % data.batch_size or smallest)
    return Data(tuple(inputs), counts[0], smallest)


def samples_in(example: Any) -> int:
    """How many samples an input has: the first size of its first tensor."""
    shapes = [t.shape for t in tensors_in(example) if t.dim() > 0]
    return int(shapes[0][0]) if shapes else 0


def doubled(example: Any) -> Any:
    """An input of one sample as one of two, for training needs two; any other as it is."""
    tensors = tensors_in(example)
    if not tensors or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return example
    return pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]), example)


def decays_of(
    optimizer: torch.optim.Optimizer, norms: Iterable[tuple[str, nn.Module]]
) -> dict[str, Decay]:
    """What the optimizer does with each norm that has a gamma or beta which learns."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found: dict[str, Decay] = {}
    for path, module in norms:
        learning = [p for p in module.parameters(recurse=False) if p.requires_grad]
        held = [groups[id(p)] for p in learning if id(p) in groups]
        if not learning:
            continue
        worst = max(held, key=lambda g: float(g.get("weight_decay") or 0.0), default={})
        found[path] = Decay(
            len(held),
            len(learning),
            float(worst.get("weight_decay") or 0.0),
            float(worst.get("lr") or 0.0),
        )
    return found


def _inputs(batch: Any, example: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        keys = example if isinstance(example, Mapping) else batch
        return {key: batch[key] for key in keys}
    if isinstance(batch, list | tuple) and batch:
        if isinstance(example, tuple):
            return tuple(batch[: len(example)])
        if isinstance(batch[0], Tensor):
            return batch[0]
        if isinstance(batch[0], Mapping | tuple | list):
            return _inputs(batch[0], example)
    raise ConfigError(
        f"data gives a batch of type {type(batch).__name__}; give tensors, tuples that begin with "
        "the input, or dicts of inputs by name"
    )
