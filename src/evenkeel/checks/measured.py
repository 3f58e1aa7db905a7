"""The gap between training and inference, measured on the user's data: where it starts, how large.

Three passes over the batches: with running statistics; with each batch's own; and with running
statistics that were estimated from the second pass. Dropout is off in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import first_line
from ..surgery.examples import call, tensors_in
from .facts import NormFacts
from .given import samples_in
from .measure import Gap, Moments, floor_of, gap, merged, moments

__all__ = ["Measured", "Subject", "measured"]


class _Local(nn.modules.batchnorm._BatchNorm):
    """A SyncBatchNorm that asks no other process."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any rank will do."""


class Subject:
    """A copy of a network that may be run in any way: afterwards it is as it was.

    Attributes:
        model: the copy.
        norms: facts of its norms by path.
        modules: by path, its batch norms that have statistics and, in training, use the batch's.
    """

    def __init__(self, model: nn.Module, norms: dict[str, NormFacts], trains: bool) -> None:
        self.model, self.norms = model, norms
        for module in model.modules():
            if type(module) is nn.SyncBatchNorm:
                module.__class__ = _Local  # type: ignore[assignment]
        self.modules = {
            path: model.get_submodule(path)
            for path, facts in norms.items()
            if facts.remembers and not facts.fixed and (facts.training or not trains)
        }
        tensor = next((t for t in [*model.parameters(), *model.buffers()]), None)
        self._device = torch.device("cpu") if tensor is None else tensor.device

    def ready(self, inputs: Any) -> Any:
        """The inputs on the network's device."""
        return pytree.tree_map_only(Tensor, lambda t: t.to(self._device), inputs)

    def fresh(self, inputs: Any, *, learns: bool = False) -> Any:
        """Copies of the inputs, for a network may overwrite them."""

        def copied(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            own = t.detach().clone()
            return own.requires_grad_() if learns and own.is_floating_point() else own

        return pytree.tree_map(copied, inputs)

    @contextmanager
    def as_eval(self) -> Iterator[None]:
        """The whole network in inference mode."""
        with self._unchanged():
            self.model.eval()
            yield

    @contextmanager
    def as_train(self, as_given: bool) -> Iterator[None]:
        """The network as it trains: as it was given if it was in training, else by ``train()``."""
        with self._unchanged():
            if not as_given:
                self.model.train()
            yield

    @contextmanager
    def by_batch(self) -> Iterator[None]:
        """Inference, but norms use the statistics of the batch that they get."""
        with self._unchanged():
            self.model.eval()
            for module in self.modules.values():
                module.train()
            yield

    @contextmanager
    def with_statistics(self, found: dict[str, Moments]) -> Iterator[None]:
        """Inference with other running statistics."""
        with self._unchanged(), torch.no_grad():
            self.model.eval()
            for path, (n, mean, m2) in found.items():
                module: Any = self.modules[path]
                kept, var = module.running_mean, module.running_var
                kept.copy_(mean.reshape(kept.shape))
                var.copy_((m2 / max(n - 1, 1)).reshape(var.shape))
            yield

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        flags = [(module, module.training) for module in self.model.modules()]
        held = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag
            with torch.no_grad():
                for buffer, value in held:
                    if buffer.shape == value.shape:
                        buffer.copy_(value)

    @contextmanager
    def watching(self) -> Iterator[dict[str, list[Moments]]]:
        """Moments of every input of every norm, meanwhile, in the order of the calls."""
        found: dict[str, list[Moments]] = {}

        def watch(path: str) -> Any:
            def note(_: nn.Module, args: Any, kwargs: Any) -> None:
                x = next((t for t in pytree.tree_leaves((args, kwargs))), None)
                seen = moments(self.norms[path], x) if isinstance(x, Tensor) else None
                if seen is not None:
                    found.setdefault(path, []).append(seen)

            return note

        hooks = [
            module.register_forward_pre_hook(watch(path), with_kwargs=True)
            for path, module in self.modules.items()
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class Measured:
    """What the data showed.

    Attributes:
        samples: how many there were.
        own: the gap of each norm, the norms before it using the data's statistics; in the order of
            the calls.
        at_inference: the same with all norms on running statistics.
        difference: of the network's output, with its running statistics and with those of the data,
            relative to how the latter varies; None if it gives no floating tensor.
        changed: the share of answers (the largest of each sample's outputs) that differ; None for
            outputs that are no answers.
    """

    samples: int
    own: dict[str, Gap]
    at_inference: dict[str, Gap]
    difference: float | None
    changed: float | None

    @property
    def limit(self) -> float:
        """The gap from which on a norm's statistics do not fit: far above chance."""
        return max(0.5, 4 * floor_of(self.samples))

    @property
    def start(self) -> str | None:
        """The first norm whose own statistics do not fit."""
        return next((path for path, g in self.own.items() if g.size > self.limit), None)


def measured(subject: Subject, batches: Sequence[Any]) -> Measured | str:
    """The gap on the batches, or why it cannot be measured."""
    try:
        with subject.as_eval(), subject.watching() as seen:
            kept = _outputs(subject, batches)
        with subject.by_batch(), subject.watching() as by_batch:
            done = _outputs(subject, batches, may_fail=True)
        if all(output is None for output in done):
            return (
                "no batch can be run with its own statistics; give batches of two samples or more"
            )
        found = {path: merged(parts) for path, parts in by_batch.items()}
        with subject.with_statistics(found):
            wanted = _outputs(subject, batches)
    except Exception as error:
        return f"the network cannot run the data ({first_line(error)})"
    pairs = [(a, b) for a, b in zip(kept, wanted, strict=True) if a is not None and b is not None]
    difference, changed = _apart(pairs)
    own = {path: gap(subject.norms[path], m) for path, m in found.items()}
    late = {path: gap(subject.norms[path], merged(parts)) for path, parts in seen.items()}
    return Measured(
        sum(samples_in(batch) for batch in batches),
        {path: g for path, g in own.items() if g is not None},
        {path: g for path, g in late.items() if g is not None},
        difference,
        changed,
    )


def _outputs(
    subject: Subject, batches: Sequence[Any], may_fail: bool = False
) -> list[Tensor | None]:
    """The first floating tensor that the network gives for each batch."""
    found: list[Tensor | None] = []
    with torch.no_grad():
        for batch in batches:
            try:
                output = call(subject.model, subject.fresh(batch))
            except ValueError:
                if not may_fail:
                    raise
                found.append(None)
                continue
            first = next((t for t in tensors_in(output) if t.is_floating_point()), None)
            found.append(None if first is None else first.detach().to("cpu", torch.float32))
    return found


def _apart(pairs: list[tuple[Tensor, Tensor]]) -> tuple[float | None, float | None]:
    """The difference relative to the second's deviation over samples, and the share of answers."""
    pairs = [(a, b) for a, b in pairs if a.dim() > 0 and a.numel() > 0]
    if not pairs or len({a.shape[1:] for a, _ in pairs}) > 1:
        return None, None
    a, b = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
    wrong = float((a - b).square().mean())
    varies = float((b - b.mean(0)).square().mean())
    changed = None
    if a.dim() > 1 and a.shape[1] > 1:
        changed = float((a.argmax(1) != b.argmax(1)).double().mean())
    if not math.isfinite(wrong):
        return math.inf, changed
    return math.sqrt(wrong / max(varies, 1e-300)), changed
