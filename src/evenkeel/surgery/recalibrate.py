"""Running statistics replaced by those of the data: exact ones, all or none, and back again.

What training leaves in ``running_mean`` and ``running_var`` is an average of the last few dozen
batches, of the weights that there were then. After weights were averaged, pruned, quantized or
moved to other data it is nobody's statistics any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, SurgeryError
from ..kernels.contract import Moments
from .batch_norms import Where, batch_norms, unwrapped
from .caring.measuring import Batches, Meter, by_batch, call_order, held, merged, only
from .caring.together import Together
from .freeze import is_frozen
from .graph import copied

__all__ = ["Change", "Recalibrated", "recalibrate", "recalibrated"]

Propagate = Literal["batch", "population"]
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

_Before = tuple[tuple[Any, dict[str, Tensor]], ...]
"""Each norm and what its buffers held."""


@dataclass(frozen=True)
class Change:
    """What has become of one norm.

    Attributes:
        norm: its path.
        values: how many values each of its statistics is taken of.
        batches: how many calls brought them.
        mean_moved: the largest difference of a mean before and after, in standard deviations
            ``sqrt(running_var + eps)`` after; None if a statistic was not finite before.
        variance_times: by what ``running_var + eps`` was multiplied, the least and the most; None
            as above.
    """

    norm: str
    values: int
    batches: int
    mean_moved: float | None
    variance_times: tuple[float, float] | None

    def __str__(self) -> str:
        text = f"{self.norm}: {self.values:,} values"
        if self.mean_moved is None or self.variance_times is None:
            return f"{text}, its statistics were not finite before"
        least, most = self.variance_times
        moved = f"mean moved by up to {self.mean_moved:.2g} deviations"
        return f"{text}, {moved}, variance times {least:.3g} to {most:.3g}"


@dataclass(frozen=True)
class Recalibrated:
    """Which norms have new statistics, which were left and why.

    Attributes:
        changes: one for each norm that has new statistics.
        left: the other norms, with the reason.
        batches: how many batches there were, of all processes.
        processes: how many processes shared them.
        propagate: what the norms normalized with while others were measured.
        variance: the kind in ``running_var``, as everywhere in torch.
        model: the network with the new statistics.
    """

    changes: tuple[Change, ...]
    left: tuple[tuple[str, str], ...]
    batches: int
    processes: int
    propagate: Propagate
    variance: Literal["unbiased"]
    model: nn.Module = field(repr=False, compare=False)
    _before: _Before = field(repr=False, compare=False)

    def undo(self) -> None:
        """Gives every norm the statistics that it had before, whatever it has now."""
        _write(self._before)

    def __str__(self) -> str:
        of = f" of {self.processes} processes" if self.processes > 1 else ""
        lines = [
            f"{len(self.changes)} norms recalibrated on {self.batches} batches{of}, "
            f"{len(self.left)} left as they are"
        ]
        lines += [f"  {change}" for change in self.changes]
        lines += [f"  {name} stays: {reason}" for name, reason in self.left]
        whose = "each batch" if self.propagate == "batch" else "all batches"
        lines.append(
            f"  variances are {self.variance}; on the way norms used the statistics of {whose}"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, without the network."""
        return {
            "changes": [asdict(change) for change in self.changes],
            "left": self.left,
            "batches": self.batches,
            "processes": self.processes,
            "propagate": self.propagate,
            "variance": self.variance,
        }


class _Found(NamedTuple):
    """What one process has measured: moments and calls of each norm, by its name."""

    norms: dict[str, tuple[Moments, int]]
    batches: int


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    steps: int | None = None,
    where: Where = None,
    propagate: Propagate = "batch",
    inplace: bool = True,
    group: Any = None,
) -> Recalibrated:
    """Replaces running statistics by those of all the data that the loader gives.

    ::

        running_mean = sum(x) / n        running_var = sum((x - running_mean)^2) / (n - 1)

    over all n values of all batches, merged exactly in float64 (Chan et al. 1979), so that batches
    of any sizes count by their values. ``num_batches_tracked`` becomes the number of calls behind
    it, which is what a norm with ``momentum=None`` needs to go on from there. Nothing else changes:
    no mode, hook, other buffer or random number; on any error the statistics are as before too.

    While it runs the network is in inference mode (dropout off) but for its norms:

    - ``propagate='batch'``: each normalizes each batch by that batch's statistics, as in training,
      where the layers behind it learned what to expect. One pass. Batches should be as in training:
      as large, and shuffled.
    - ``propagate='population'``: each normalizes by the final statistics of the norms before it, so
      that they are exactly those of the data at inference, whatever the batches. A pass for each
      norm, each as far as that norm, so ``loader`` must give the same data every time.

    Norms left alone are in the report: frozen ones, those in eval mode while the network trains,
    those without running statistics.

    Args:
        model: any network with batch norms of torch's, SyncBatchNorm, evenkeel's or subclasses.
        loader: gives tensors, tuples or lists that begin with one, or dicts of arguments.
        forward: ``forward(model, batch)`` for batches of any other kind.
        steps: at most so many batches; None for all, which must end.
        where: a norm's path, the path of a module that holds norms, several of these, or a
            function ``where(path, norm) -> bool``; None for all.
        propagate: see above.
        inplace: False to leave the network as it is; the report's ``model`` is then a copy.
        group: processes of torch.distributed that share the data; None for all if it runs, so that
            each must call this; False for this one alone. All get the same bits.

    Returns:
        the report, whose ``undo()`` puts the old statistics back.

    Raises:
        SurgeryError: there is nothing to recalibrate, a norm was not reached, a value is not finite
            or a batch does not fit. Errors of the network and the loader come through as they are.

    Reference: Ioffe & Szegedy 2015, algorithm 2, steps 7 to 12.
    """
    if propagate not in ("batch", "population"):
        raise ConfigError(f"propagate must be 'batch' or 'population' but is {propagate!r}")
    if steps is not None and steps < 1:
        raise ConfigError(f"steps must be 1 or more but is {steps}; leave it out for all batches")
    if propagate == "population" and isinstance(loader, Iterator):
        raise ConfigError(
            f"propagate='population' reads the data once for each norm, but a "
            f"{type(loader).__name__} can be read only once; give a list or a DataLoader"
        )
    own = model if inplace else copied(model)
    inner = unwrapped(own)
    norms, left = _sorted_out(inner, where)
    meters = [Meter(path, norm) for path, norm in norms.items()]
    together = Together(group)
    batches = Batches(inner, loader, forward, steps)
    with held(inner, meters):
        measure = _all_at_once if propagate == "batch" else _one_by_one
        found = measure(meters, batches, together)
    after = _statistics(meters, found)
    before = tuple((norm, _held_by(norm)) for norm, _ in after)
    changes = tuple(_change(m, found, new) for m, (_, new) in zip(meters, after, strict=True))
    _write(after)
    return Recalibrated(
        changes, tuple(left), found.batches, together.size, propagate, "unbiased", own, before
    )


@contextmanager
def recalibrated(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    steps: int | None = None,
    where: Where = None,
    propagate: Propagate = "batch",
    group: Any = None,
) -> Iterator[Recalibrated]:
    """The network with the statistics of other data for a while::

        with evenkeel.recalibrated(model, loader):
            test(model)

    Behind it, whatever happens, each norm has the statistics that it had before.

    Args:
        model, loader, forward, steps, where, propagate, group: as in `recalibrate`.
    """
    report = recalibrate(
        model, loader, forward=forward, steps=steps, where=where, propagate=propagate, group=group
    )
    try:
        yield report
    finally:
        report.undo()


def _sorted_out(model: nn.Module, where: Where) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The norms to recalibrate by path, and those to leave with the reason."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise SurgeryError(f"'{name}' has no size yet; run the network once before")
    norms, left = batch_norms(model, where)
    for path, norm in list(norms.items()):
        problem = None
        if is_frozen(norm):
            problem = "it is frozen"
        elif not norm.track_running_stats:
            problem = "track_running_stats is False"
        elif where is None and model.training and not norm.training:
            problem = "it is in eval mode while the network trains; where= would take it"
        if problem is not None:
            del norms[path]
            left.append((path, problem))
    if not norms:
        reasons = "".join(f"; '{path}': {reason}" for path, reason in left)
        raise SurgeryError(f"{type(model).__name__} has no batch norm to recalibrate{reasons}")
    return norms, left


def _all_at_once(meters: list[Meter], batches: Batches, together: Together) -> _Found:
    def measure() -> _Found:
        count = by_batch(meters, batches)
        return _Found({m.name: (merged([m.total]), m.calls) for m in meters}, count)

    return _joined(together.gather(measure))


def _one_by_one(meters: list[Meter], batches: Batches, together: Together) -> _Found:
    def order() -> tuple[list[str], _Found]:
        met, count = call_order(meters, batches)
        first = {m.name: (merged([m.total]), m.calls) for m in met[:1]}
        return [m.name for m in met], _Found(first, count)

    def measure() -> _Found:
        only(meter, batches)
        return _Found({meter.name: (merged([meter.total]), meter.calls)}, 0)

    given = together.gather(order)
    orders = [names for names, _ in given if names]
    if any(names != orders[0] for names in orders):
        raise SurgeryError("processes call the norms in different orders; use propagate='batch'")
    total = sum(found.batches for _, found in given)
    parts = [found for _, found in given if found.norms]
    found = _joined(parts) if parts else _Found({}, 0)
    by_name = {meter.name: meter for meter in meters}
    _refuse_unreached(meters, set(orders[0]) if orders else set(), total)
    for name in orders[0]:
        meter = by_name[name]
        if name not in found.norms:
            found.norms.update(_joined(together.gather(measure)).norms)
        moments, _ = found.norms[name]
        _refuse_too_few(name, moments)
        meter.use(moments, 1)
    return _Found(found.norms, total)


def _joined(parts: list[_Found]) -> _Found:
    """What all processes have measured, joined in the order of their ranks."""
    first = parts[0].norms
    if any(part.norms.keys() != first.keys() for part in parts):
        raise SurgeryError(
            "processes have different norms to recalibrate; give each the same model"
        )
    norms = {
        name: (
            merged(part.norms[name][0] for part in parts),
            sum(part.norms[name][1] for part in parts),
        )
        for name in first
    }
    return _Found(norms, sum(part.batches for part in parts))


def _statistics(meters: list[Meter], found: _Found) -> _Before:
    """What to write into each norm.

    Raises:
        SurgeryError: a norm has no values, or none that its buffers can hold.
    """
    reached = {name for name, (_, calls) in found.norms.items() if calls}
    _refuse_unreached(meters, reached, found.batches)
    after: list[tuple[Any, dict[str, Tensor]]] = []
    for meter in meters:
        moments, calls = found.norms[meter.name]
        _refuse_too_few(meter.name, moments)
        new = {
            "running_mean": moments.mean,
            "running_var": moments.m2 / (moments.n - 1),
            "num_batches_tracked": torch.tensor(calls),
        }
        for name, buffer in (("running_mean", meter.mean), ("running_var", meter.var)):
            if not bool(new[name].to(buffer.dtype).isfinite().all()):
                raise SurgeryError(
                    f"'{meter.name}' keeps its {name} as {buffer.dtype}, which cannot hold "
                    f"{float(new[name].abs().max()):.3g}; convert the network to float32 before"
                )
        after.append((meter.norm, new))
    return tuple(after)


def _refuse_unreached(meters: list[Meter], reached: set[str], batches: int) -> None:
    if batches == 0:
        raise SurgeryError("the loader gave no batch, so there are no statistics to take")
    missed = [meter.name for meter in meters if meter.name not in reached]
    if missed:
        more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
        raise SurgeryError(
            f"none of {batches} batches gave a value to {', '.join(missed[:3])}{more}; leave out "
            "what inference does not use by where=, or give a forward= that reaches it"
        )


def _refuse_too_few(name: str, moments: Moments) -> None:
    if moments.n < 2:
        raise SurgeryError(
            f"'{name}' was given {moments.n} value per statistic in all, which has no variance; "
            "give more data"
        )


def _change(meter: Meter, found: _Found, new: dict[str, Tensor]) -> Change:
    norm, (moments, calls) = meter.norm, found.norms[meter.name]
    old_mean, old_var = (t.double().cpu() for t in (norm.running_mean, norm.running_var))
    var = new["running_var"] + norm.eps
    moved, times = (moments.mean - old_mean).abs() / var.sqrt(), var / (old_var + norm.eps)
    if not bool((moved.isfinite() & times.isfinite()).all()):
        return Change(meter.name, moments.n, calls, None, None)
    extent = (float(times.min()), float(times.max()))
    return Change(meter.name, moments.n, calls, float(moved.max()), extent)


def _held_by(norm: Any) -> dict[str, Tensor]:
    buffers = {name: getattr(norm, name) for name in _BUFFERS}
    return {name: buffer.clone() for name, buffer in buffers.items() if buffer is not None}


@torch.no_grad()
def _write(values: _Before) -> None:
    """Writes into all buffers, or into none."""
    done: list[tuple[Tensor, Tensor]] = []
    try:
        for norm, new in values:
            for name in _BUFFERS:
                buffer = getattr(norm, name)
                if buffer is not None and name in new:
                    done.append((buffer, buffer.clone()))
                    buffer.copy_(new[name])
    except BaseException:
        for buffer, value in done:
            buffer.copy_(value)
        raise
