"""Do two networks compute the same? Outputs, running statistics and gradients, in both modes."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SurgeryError, first_line
from ..nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Norm
from .draws import SameDraws, gpus_of
from .examples import call, mapped, tensors_in, widened

__all__ = [
    "BUDGET",
    "EXACT_BUDGET",
    "Difference",
    "apart",
    "compare",
    "compare_layouts",
    "magnitude",
]

BUDGET = 1e-4
"""The largest difference of a value relative to the largest of its tensor, in single precision.

Measured on small networks of fifteen kinds, fresh and trained: outputs differ by up to 2e-6,
gradients by up to 7e-5, but by 4e-2 behind thirty layers, where rounding decides which side of
zero a ReLU is on. So what is above the budget is computed again in double precision.
"""
EXACT_BUDGET = 1e-9
"""The same in double precision, where those networks differ by up to 2e-13."""

WORSE = 10.0
"""How much farther from the exact value than the original rounding may bring the new network."""

SMALL = 1e-2
"""A gradient this far below the network's largest is judged by that: it may be rounding alone, as
that of a bias in front of a batch norm is, whose true value is zero."""

Values = dict[str, Tensor]
"""Tensors by name: 'inference: output 0', 'training: gradient of conv.weight'."""


@dataclass(frozen=True)
class Difference:
    """The largest difference between two networks: how large, of what largest value, and where."""

    absolute: float
    scale: float
    where: str

    @property
    def relative(self) -> float:
        """The difference relative to the largest value."""
        return 0.0 if self.absolute == 0 else self.absolute / max(self.scale, 1e-300)

    def __str__(self) -> str:
        return f"{self.absolute:.1e} of {self.scale:.3g} in {self.where}"


def compare(
    original: nn.Module, changed: nn.Module, example: Any
) -> tuple[Difference, Difference, float]:
    """The largest difference of outputs and running statistics, that of gradients, and the budget.

    Copies of both run the example in training and in inference, with equal random numbers. A
    difference above the budget is computed once more in float64. It passes if it vanishes there and
    was not much larger than the original's own rounding.

    Args:
        original, changed: the networks; both stay as they are.
        example: an input, a tuple of inputs or a dict of inputs by name.

    Raises:
        SurgeryError: the networks differ, or cannot run the example.
    """
    before = _values(original, example)
    try:
        after = _values(changed, example)
    except SurgeryError as error:
        raise SurgeryError(
            f"the network would no longer run, and nothing was changed: {error.__cause__}; leave "
            "the module that it comes from as it is, and accelerate the others one by one"
        ) from error
    differences = _largest(before, after)
    exact = all(value.dtype == torch.float64 for value in before.values())
    budget = EXACT_BUDGET if exact else BUDGET
    worst = max(differences, key=lambda d: d.relative)
    if worst.relative <= budget:
        return *differences, budget
    if not exact and _is_rounding(before, after, original, changed, example):
        return *differences, budget
    raise SurgeryError(
        f"the network would change by {worst}, where {budget:.0e} of that is allowed; nothing was "
        "changed; the usual causes are a forward that takes another path at every call and random "
        "numbers that are not torch's; leave the example out to go without the proof"
    )


def compare_layouts(model: nn.Module, other: nn.Module, example: Any) -> Difference:
    """The largest difference between a network and itself in another layout, in double precision.

    Layouts round differently, and behind many layers that decides which side of zero a ReLU is on:
    torch's own gradients differ by up to 1e-1 then. So gradients are compared in double precision
    alone, outputs and running statistics in single precision too. A network that insists on single
    precision is held to the budgets of `compare`. Random numbers fall on the same values in both.

    Args:
        model, other: the networks; both stay as they are.
        example: an input, a tuple of inputs or a dict of inputs by name.

    Raises:
        SurgeryError: the networks differ, or cannot run the example.
    """
    with SameDraws():  # type: ignore[no-untyped-call]
        output, _ = _largest(_values(model, example), _values(other, example))
        try:
            wide = widened(example)
            exact, found = _values(_in_double(model), wide), _values(_in_double(other), wide)
        except (RuntimeError, SurgeryError):  # something in it insists on single precision
            return max(compare(model, other, example)[:2], key=lambda d: d.relative)
    worst = max(_largest(exact, found), key=lambda d: d.relative)
    for difference, budget in ((output, BUDGET), (worst, EXACT_BUDGET)):
        if difference.relative > budget:
            raise SurgeryError(
                f"the network would change by {difference}, where {budget:.0e} of that is allowed"
            )
    return worst


def _is_rounding(
    before: Values, after: Values, original: nn.Module, changed: nn.Module, example: Any
) -> bool:
    """True if nothing but the precision makes the difference."""
    try:
        wide = widened(example)
        exact, other = _values(_in_double(original), wide), _values(_in_double(changed), wide)
    except (RuntimeError, SurgeryError):  # something in it insists on single precision
        return False
    if max(d.relative for d in _largest(exact, other)) > EXACT_BUDGET:
        return False
    own, new = _largest(exact, before), _largest(exact, after)
    return all(n.relative <= WORSE * o.relative + BUDGET for o, n in zip(own, new, strict=True))


def _in_double(model: nn.Module) -> nn.Module:
    """A copy in double precision, its norms on whatever runs that: not every backend does.

    So it tells whether the network is the right one. Whether a backend computes it well is told by
    how far the values in the network's own precision are from these.
    """
    own = copy.deepcopy(model).double()
    for module in own.modules():
        if isinstance(module, BatchNorm1d | BatchNorm2d | BatchNorm3d | Norm):
            module.backend = "auto"
    return own


def _values(model: nn.Module, example: Any) -> Values:
    """All that the network computes for the example, in both modes."""
    own = copy.deepcopy(model)
    values: Values = {}
    with torch.random.fork_rng(gpus_of(own)):
        for training in (True, False):
            mode = "training" if training else "inference"
            torch.manual_seed(0)
            try:
                found = _run(own.train(training), example)
            except Exception as error:
                raise SurgeryError(
                    f"{type(model).__name__} cannot run the example in {mode}: "
                    f"{first_line(error)}; give an input, a tuple of inputs or a dict of inputs by "
                    "name, of two samples or more"
                ) from error
            values |= {f"{name} in {mode}": value for name, value in found.items()}
    return values


def _run(model: nn.Module, example: Any) -> Values:
    leaves: list[Tensor] = []

    def fresh(t: Tensor) -> Tensor:
        leaves.append(t.detach().clone().requires_grad_())
        return leaves[-1].clone()  # what is no leaf may be overwritten by the network

    with torch.enable_grad():
        result = call(model, mapped(fresh, example))
    outputs = [t for t in tensors_in(result) if t.is_floating_point() and t.numel() > 0]
    if not outputs:
        raise SurgeryError("it gives no floating tensor to compare")
    values = {f"output {place}": t.detach().clone() for place, t in enumerate(outputs)}
    values |= {name: t.clone() for name, t in model.named_buffers() if t.is_floating_point()}
    named: Values = {f"gradient of {n}": p for n, p in model.named_parameters() if p.requires_grad}
    named |= {f"gradient of input {place}": leaf for place, leaf in enumerate(leaves)}
    roots = [t for t in outputs if t.requires_grad]
    if roots and named:
        weights = [_cotangent(t) for t in roots]
        found = torch.autograd.grad(roots, list(named.values()), weights, allow_unused=True)
        pairs = zip(named, found, strict=True)
        values |= {name: gradient for name, gradient in pairs if gradient is not None}
    return values


def _cotangent(t: Tensor) -> Tensor:
    """Weights of the outputs in the loss: equal ones would hide what a norm subtracts."""
    steps = torch.arange(t.numel(), device=t.device, dtype=torch.float64)
    return (steps * 0.7).sin().reshape(t.shape).to(t.dtype)


def _largest(before: Values, after: Values) -> tuple[Difference, Difference]:
    """The largest relative difference of all but gradients, and of gradients."""
    if set(before) != set(after):
        raise SurgeryError(
            f"the network would no longer give {', '.join(sorted(set(before) ^ set(after))[:3])}; "
            "nothing was changed"
        )
    kinds: tuple[list[Difference], list[Difference]] = ([], [])
    gradients = [n for n in before if n.startswith("gradient")]
    floor = SMALL * max((_size(before[n]) for n in gradients), default=0.0)
    for name, value in before.items():
        is_gradient = name.startswith("gradient")
        scale = max(_size(value), floor if is_gradient else _deviation(name, before))
        kinds[is_gradient].append(Difference(apart(value, after[name]), scale, name))
    none = Difference(0.0, 0.0, "nothing")
    first, second = (max(kind, key=lambda d: d.relative, default=none) for kind in kinds)
    return first, second


def _deviation(name: str, values: Values) -> float:
    """What a running mean is measured by where it is zero but for rounding: the deviation."""
    kin = name.replace("running_mean", "running_var")
    return 0.0 if kin == name or kin not in values else math.sqrt(_size(values[kin]))


def _size(t: Tensor) -> float:
    return float(t.detach().double().abs().nan_to_num().max()) if t.numel() else 0.0


def magnitude(t: Tensor) -> float:
    """The largest finite value."""
    return float(t.detach().double().abs().nan_to_num(0.0, 0.0).max()) if t.numel() else 0.0


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite if only one of two values is NaN or infinite."""
    if a.shape != b.shape:
        return float("inf")
    wide, other = a.detach().double(), b.detach().double()
    same = (wide == other) | (wide.isnan() & other.isnan())
    far = (wide - other).abs().nan_to_num(nan=float("inf"))
    return float(torch.where(same, 0.0, far).max()) if a.numel() else 0.0
