"""Statistics for norms that are put into a trained network, so that it computes what it did.

With the mean and variance of what goes into a norm, over all the data, a norm with::

    weight = sqrt(running_var + eps)        bias = running_mean

hands on at inference what it is given. The running variance is the unbiased one, torch's kind, but
any would do here. A layer's bias b that the norm subtracts again can go: then ``running_mean`` is
less by b, and ``bias`` stays.

All norms are measured in one pass over the network as it was, for with every norm handing on what
it is given, that is what each of them will see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ...errors import ConfigError, SurgeryError
from ...kernels.contract import Moments
from ...nn import Norm
from ..caring.measuring import Batches, Meter, held, merged, moments_of
from ..comparing import EXACT_BUDGET, WORSE, Difference, apart, magnitude
from ..examples import call, cloned, tensors_in, widened
from ..graph import copied

__all__ = [
    "BUDGET",
    "Data",
    "Forward",
    "Measured",
    "Proof",
    "Values",
    "measure",
    "owned",
    "prove",
    "settle",
]

BUDGET = 1e-5
"""The largest difference allowed, relative to the largest output (float32 rounding is 6e-8)."""

_KEPT = 8
"""How many batches of a loader that can be read only once are kept for the proof."""

Forward = Callable[[nn.Module, Any], Any] | None
"""How to run the network on a batch, where calling it with the batch's first part is not right."""


class Data:
    """The batches to calibrate with, as new tensors each time, for networks may overwrite theirs.

    A loader that can be read only once is read once; the second time its first batches come again.

    Args:
        given: one tensor, or an iterable of batches.

    Raises:
        ConfigError: it is neither.
    """

    def __init__(self, given: Tensor | Iterable[Any]) -> None:
        if not hasattr(given, "__iter__") and not hasattr(given, "__getitem__"):
            raise ConfigError(
                f"calibrate is of type {type(given).__name__}; give a batch as a tensor, or a "
                "loader or list of batches"
            )
        self._loader = [given] if isinstance(given, Tensor) else given
        self._kept: list[Any] | None = [] if isinstance(given, Iterator) else None
        self._times = 0

    def __iter__(self) -> Iterator[Any]:
        self._times += 1
        if self._kept is not None and self._times > 1:
            yield from map(cloned, self._kept)
            return
        for batch in self._loader:
            if self._kept is not None and len(self._kept) < _KEPT:
                self._kept.append(cloned(batch))
            yield cloned(batch)


class Measured(NamedTuple):
    """What goes into each norm, by the norm's name: moments and calls; and how many batches."""

    norms: dict[str, tuple[Moments, int]]
    batches: int


class Values(NamedTuple):
    """What to write into a norm, in float64.

    Attributes:
        mean, var: of what goes into it, while the layer before it had its bias.
        bias: what was dropped of that layer, per owner; 0 for nothing.
        calls: how many calls brought values.
    """

    mean: Tensor
    var: Tensor
    bias: Tensor
    calls: int


class Proof(NamedTuple):
    """How far two networks are apart.

    Attributes:
        difference: the largest difference of an output, relative to the largest value in it.
        budget: the relative difference that was allowed.
        exact: if the difference is above the budget, the relative one in double precision.
    """

    difference: Difference
    budget: float
    exact: float | None


class _Watch(nn.Module):
    """Stands where a norm will be: measures what it is given, and hands it on as it is."""

    def __init__(self, name: str, norm: nn.Module) -> None:
        super().__init__()
        self.meter = Meter(name, norm)
        self.found: list[Moments] = []

    def forward(self, x: Tensor) -> Tensor:
        self.found.append(self.meter.take((x,), {}))
        return x


def measure(
    traced: fx.GraphModule, names: Sequence[str], data: Iterable[Any], forward: Forward
) -> Measured:
    """Moments of what goes into the norms, each norm handing on what it is given.

    Args:
        traced: the network with the norms in it; left as it is if this returns.
        names: of the norms; each has running statistics.
        data: batches.
        forward: see `Forward`.

    Raises:
        SurgeryError: a value is not finite, there are too few, or a batch does not fit.
    """
    norms = {name: traced.get_submodule(name) for name in names}
    watches = {name: _Watch(name, norm) for name, norm in norms.items()}
    for name, watch in watches.items():
        traced.set_submodule(name, watch)
    count = 0
    with held(traced, []):
        for count in Batches(traced, data, forward, None).run():
            _refuse_not_finite(watches, count)
    for name, norm in norms.items():
        traced.set_submodule(name, norm)
    if count == 0:
        raise SurgeryError("calibrate= gave no batch, so there are no statistics to take")
    found = {n: (merged([w.meter.total]), w.meter.calls) for n, w in watches.items()}
    for name, (moments, _) in found.items():
        if moments.n < 2:
            raise SurgeryError(
                f"'{name}' was given {moments.n} values per statistic by {count} batches, and two "
                "are the least that have a variance; give more data"
            )
    return Measured(found, count)


def _refuse_not_finite(watches: Mapping[str, _Watch], number: int) -> None:
    sums: list[tuple[str, Tensor]] = []
    for name, watch in watches.items():
        sums += [(name, (mean.sum() + m2.sum()).cpu()) for _, mean, m2 in watch.found]
        watch.found.clear()
    wrong = next((name for name, value in sums if not bool(value.isfinite())), None)
    if wrong is not None:
        raise SurgeryError(
            f"what goes into '{wrong}' has a value that is not finite in batch {number}; look for "
            "NaN and infinity in the data and the weights"
        )


def owned(norm: nn.Module, bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A layer's bias in the shape of the statistics of the norm behind it, in float64.

    Args:
        norm: owns the channels.
        bias: (c,).
        shape: of the values between the two, channels second.
    """
    wide = bias.detach().double()
    if not isinstance(norm, Norm):
        return wide.cpu()
    spread = wide.reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)
    return moments_of(spread.contiguous(), norm.spec, norm.sizes).mean.cpu()


@torch.no_grad()
def settle(network: nn.Module, values: Mapping[str, Values]) -> None:
    """Writes statistics, gamma and beta, so that each norm hands on ``x + bias``.

    Gamma and beta follow from the statistics as they are stored, so that rounding these costs
    nothing.

    Raises:
        SurgeryError: a norm cannot hold a value.
    """
    for name, (mean, var, bias, calls) in values.items():
        norm: Any = network.get_submodule(name)
        norm.running_mean.copy_(mean - bias)
        norm.running_var.copy_(var)
        norm.num_batches_tracked.fill_(calls)
        stored_mean, stored_var = norm.running_mean.cpu(), norm.running_var.cpu()
        norm.weight.copy_((stored_var.double() + norm.eps).sqrt())
        norm.bias.copy_(stored_mean.double() + bias)
        if not bool((stored_mean.isfinite() & stored_var.isfinite()).all()):
            raise SurgeryError(
                f"'{name}' keeps its statistics as {norm.running_var.dtype}, which cannot hold a "
                f"variance of {float(var.max()):.3g}; scale the data, or convert the network to "
                "float64 before"
            )


def prove(
    original: nn.Module,
    changed: fx.GraphModule,
    example: Any,
    data: Iterable[Any],
    forward: Forward,
    values: Mapping[str, Values],
) -> Proof:
    """Compares two networks in inference, on the example and on each batch.

    A difference above the budget is computed once more in float64, the norms with their values in
    float64 too. It passes if it vanishes there and was not much larger than the original's own
    rounding.

    Args:
        original, changed: the networks; both stay as they are.
        example: an input, a tuple of inputs or a dict of inputs by name.
        data, forward: batches, and how to run them.
        values: of the changed network's norms.

    Raises:
        SurgeryError: the networks differ, or give nothing to compare.
    """
    worst, exact = Proof(Difference(0.0, 0.0, "nothing"), BUDGET, None), 0.0
    in_double = cache(partial(_in_double, original, changed, values))
    with held(original, []), held(changed, []):
        for case, batch, run in _cases(example, data, forward):
            before, after = (_outputs(model, batch, run, case) for model in (original, changed))
            difference = _largest(before, after, case)
            is_double = all(t.dtype == torch.float64 for t in before)
            budget = EXACT_BUDGET if is_double else BUDGET
            if difference.relative >= worst.difference.relative:
                worst = Proof(difference, budget, worst.exact)
            if difference.relative <= budget:
                continue
            wide = None if is_double else _doubled(in_double(), batch, run)
            if wide is None or not _is_rounding(*wide, before, after):
                raise SurgeryError(
                    f"the norms would change what the network computes by {difference}, where "
                    f"{budget:.0e} of that is allowed; nothing was changed; the usual causes are "
                    "an operation in place whose input is read by another name later, and a "
                    "forward that takes another path at every call"
                )
            exact = max(exact, _largest(*wide, case).relative)
            worst = worst._replace(exact=exact)
    return worst


_Run = Callable[[nn.Module, Any], None]


def _cases(example: Any, data: Iterable[Any], forward: Forward) -> Iterator[tuple[str, Any, _Run]]:
    """The example and each batch: what to call it, itself, and how to run a network on it."""

    def run(model: nn.Module, batch: Any) -> None:
        for _ in Batches(model, [batch], forward, None).run():
            pass

    yield "the example", example, call
    for number, batch in enumerate(data, start=1):
        yield f"batch {number}", batch, run


def _outputs(model: nn.Module, batch: Any, run: _Run, case: str) -> list[Tensor]:
    """All floating tensors that the network gives, whatever is then made of them."""
    found: list[Any] = []
    handle = model.register_forward_hook(lambda _, args, result: found.append(result))
    try:
        run(model, cloned(batch))
    finally:
        handle.remove()
    floating = [t for t in tensors_in(found) if t.is_floating_point() and t.numel() > 0]
    if not floating:
        raise SurgeryError(
            f"the network gives no floating tensor to compare for {case}; give real inputs, and a "
            "forward= that calls the network"
        )
    return floating


def _in_double(
    original: nn.Module, changed: fx.GraphModule, values: Mapping[str, Values]
) -> tuple[nn.Module, nn.Module]:
    """Copies of both networks in float64, the norms with values that were never rounded."""
    wide, other = copied(original).double(), copied(changed).double()
    settle(other, values)
    return wide, other


def _doubled(
    networks: tuple[nn.Module, nn.Module], batch: Any, run: _Run
) -> tuple[list[Tensor], list[Tensor]] | None:
    """The outputs of both networks in float64, or None if one insists on less."""
    wide = widened(batch)
    try:
        first, second = (_outputs(model, wide, run, "double precision") for model in networks)
    except RuntimeError:  # something in it insists on single precision
        return None
    return first, second


def _is_rounding(
    exact: list[Tensor], other: list[Tensor], before: list[Tensor], after: list[Tensor]
) -> bool:
    """True if nothing but the precision makes the difference."""
    if _largest(exact, other, "").relative > EXACT_BUDGET:
        return False
    own, new = _largest(exact, before, ""), _largest(exact, after, "")
    return new.relative <= WORSE * own.relative + BUDGET


def _largest(before: list[Tensor], after: list[Tensor], case: str) -> Difference:
    """The largest relative difference of an output."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return Difference(float("inf"), 0.0, f"the shapes of outputs for {case}")
    found = [
        Difference(apart(a, b), magnitude(a), f"output {place} for {case}")
        for place, (a, b) in enumerate(zip(before, after, strict=True))
    ]
    return max(found, key=lambda d: d.relative)
