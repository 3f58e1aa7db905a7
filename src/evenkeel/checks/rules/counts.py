"""How many values there are to average: per owner, per process."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..observe import Observation
from ..walk import path_of
from .base import Found

__all__ = ["one_value", "small_batch", "sync_on_cpu", "two_values"]

_SMALL = 8
"""Group norm's paper, table 2: ResNet-50's error rises by 1.2 points at 8 images, 11 at 2."""


def one_value(seen: Observation) -> Iterator[Found]:
    """Owners that get one value in training: its variance is zero, and torch refuses."""
    yield from _few(seen, 1, "one value", "error")


def two_values(seen: Observation) -> Iterator[Found]:
    """Owners that get two values in training: whatever they are, the norm gives +1 and -1."""
    yield from _few(seen, 2, "two values", "warning")


def small_batch(seen: Observation) -> Iterator[Found]:
    """Batches of few samples in each process."""
    if seen.data is None:
        return
    norms = [f for f in seen.batch_norms if f.training == seen.training]
    world = _processes()
    alone = [f for f in norms if not f.sync or world == 1]
    size = seen.data.typical
    if alone and size < _SMALL:
        each = "" if world == 1 else f" in each of {world} processes"
        message = f"batches of {size} samples{each}, for {len(alone)} batch norms"
        yield Found("", size, message)


def sync_on_cpu(seen: Observation) -> Iterator[Found]:
    """A SyncBatchNorm whose network is on the CPU."""
    for facts in seen.batch_norms:
        if not facts.sync or facts.device != "cpu":
            continue
        size = 0 if facts.mean is None else facts.mean.numel()
        if _is_distributed():
            severity, text = "error", "training raises, for torch.distributed is initialized"
        elif torch.cuda.is_available():
            severity, text = "note", "move the network to a GPU before it trains"
        else:
            severity, text = (
                "warning",
                "there is no GPU here, so it is a plain batch norm or raises",
            )
        yield Found(facts.path, size, f"{size} channels on the CPU: {text}", severity)


def _few(seen: Observation, count: int, words: str, severity: str) -> Iterator[Found]:
    """Norms that get so many values per owner from the smallest batch known."""
    graph, told = seen.calls, set[str]()
    run = max(seen.samples or 0, 2)
    known = seen.data.smallest if seen.data is not None else (seen.samples or 0)
    for node in () if graph is None else graph.nodes:
        path = path_of(node)
        facts = None if path is None else seen.norms.get(path)
        shape = node.meta.get("input")
        if facts is None or path in told or shape is None or not facts.batch:
            continue
        if not node.meta.get("training", False):
            continue
        bound = facts.bound(tuple(shape))
        if bound is None or bound.count * known != count * run:
            continue
        told.add(facts.path)
        if seen.data is not None:
            how, grade = f"from a batch of {known}", severity
        else:
            how = f"from the example's {known} sample{'' if known == 1 else 's'}"
            grade = severity if count == 1 and known > 1 else "note"
        axes = ", ".join(axis.partition("=")[0] for axis in bound.averaged)
        yield Found(facts.path, count, f"{words} per owner {how} (averaged: {axes})", grade)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _processes() -> int:
    return torch.distributed.get_world_size() if _is_distributed() else 1
