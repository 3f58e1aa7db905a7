"""The contract can fail: each backend here has one mistake, and the contract must name it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from evenkeel.kernels.contract import Activation, Moments, Sums
from evenkeel.kernels.reference import Reference

from .contract import CHECKS, check_empty, refusal
from .truth import ROWS, subject

CPU = torch.device("cpu")
NONE = Activation()


class AddsToDx(Reference):
    def backward_dx(self, *args):
        dx, dresidual = super().backward_dx(*args)
        return dx + 1e-2, dresidual


class OneWrongValueInDx(Reference):
    def backward_dx(self, *args):
        dx, dresidual = super().backward_dx(*args)
        dx[-1, -1] *= 1.0001
        return dx, dresidual


class NormalizesWithUnbiased(Reference):
    def stats(self, x, view):
        n, mean, m2 = super().stats(x, view)
        return Moments(n, mean, m2 * n / (n - 1))


class MeanOfSquaresMinusSquareOfMean(Reference):
    def stats(self, x, view):
        wide = view.fold(x).to(self.width(x))
        mean, square = wide.mean(view.reduced_dims), wide.square().mean(view.reduced_dims)
        m2 = (square - mean.square()).clamp(min=0) * view.count
        return Moments(view.count, mean.double(), m2.double())

    def width(self, x):
        return torch.promote_types(x.dtype, torch.float32)


class StatisticsInTheInputsDtype(Reference):
    def stats(self, x, view):
        n, mean, m2 = super().stats(x, view)
        return Moments(n, mean.to(x.dtype).double(), m2.to(x.dtype).double())


class NegativeVariance(Reference):
    def stats(self, x, view):
        n, mean, m2 = super().stats(x, view)
        return Moments(n, mean, m2 - 1e-12)


class VectorsInTheWrongOrder(Reference):
    def stats(self, x, view):
        n, *vectors = super().stats(x, view)
        return Moments(
            n, *(view.unfold_vector(v, x.shape).reshape(view.kept_sizes) for v in vectors)
        )


class MergesWithoutTheDistanceOfMeans(Reference):
    def merge(self, parts):
        n, mean, _ = super().merge(parts)
        return Moments(n, mean, sum(part.m2 for part in parts))


class AveragesMeansUnweighted(Reference):
    def merge(self, parts):
        n, _, m2 = super().merge(parts)
        full = [part.mean for part in parts if part.n]
        return Moments(n, sum(full) / len(full), m2)


class CountsOnlyTheFirstPart(Reference):
    def merge(self, parts):
        _, mean, m2 = super().merge(parts)
        return Moments(parts[0].n, mean, m2)


class ForgetsTheBias(Reference):
    def apply(self, x, view, affine, act, residual):
        return super().apply(x, view, affine._replace(bias=None), act, residual)


class IgnoresTheResidual(Reference):
    def apply(self, x, view, affine, act, residual):
        return super().apply(x, view, affine, act, None)


class AddsTheResidualAfterTheActivation(Reference):
    def apply(self, x, view, affine, act, residual):
        y = super().apply(x, view, affine, act, None)
        return y if residual is None else y + residual


class ContiguousOutput(Reference):
    def apply(self, *args):
        return super().apply(*args).contiguous()


class WideOutput(Reference):
    def apply(self, *args):
        return super().apply(*args).double()


class ReluDropsNaN(Reference):
    def apply(self, x, view, affine, act, residual):
        if act.name != "relu":
            return super().apply(x, view, affine, act, residual)
        z = super().apply(x, view, affine, NONE, residual)
        return torch.where(z > 0, z, 0)


class ReluMaskFromX(Reference):
    """The mask of x instead of the mask of the value before the activation."""

    def backward_dx(self, dy, x, view, affine, act, residual, sums):
        if act.name == "relu":
            dy, act = torch.where(x > 0, dy, 0), NONE
        return super().backward_dx(dy, x, view, affine, act, residual, sums)


class ReluMaskIgnoresTheResidual(Reference):
    def backward_reduce(self, dy, x, view, affine, act, residual):
        return super().backward_reduce(dy, x, view, affine, act, None)


class ReluPassesAtZero(Reference):
    def backward_reduce(self, dy, x, view, affine, act, residual):
        if act.name == "relu":
            z = super().apply(x, view, affine, NONE, residual)
            dy, act = torch.where(z < 0, 0, dy), NONE
        return super().backward_reduce(dy, x, view, affine, act, residual)


class Relu6WithoutTheUpperKink(Reference):
    def backward_dx(self, dy, x, view, affine, act, residual, sums):
        act = Activation("relu") if act.name == "relu6" else act
        return super().backward_dx(dy, x, view, affine, act, residual, sums)


class OneSlopeForAll(Reference):
    def apply(self, x, view, affine, act, residual):
        act = Activation(act.name, 0.01) if act.name == "leaky_relu" else act
        return super().apply(x, view, affine, act, residual)


class SumsBeforeTheActivation(Reference):
    def backward_reduce(self, dy, x, view, affine, act, residual):
        return super().backward_reduce(dy, x, view, affine, NONE, residual)


class WeightGradientOfX(Reference):
    def backward_reduce(self, dy, x, view, affine, act, residual):
        plain = affine._replace(mean=torch.zeros_like(affine.mean))
        sums = super().backward_reduce(dy, x, view, affine, act, residual)
        return Sums(sums.dz, super().backward_reduce(dy, x, view, plain, NONE, None).dz_xhat)


class StatisticsAreConstants(Reference):
    def backward_dx(self, dy, x, view, affine, act, residual, sums):
        return super().backward_dx(dy, x, view, affine, act, residual, None)


class StatisticsAreNeverConstants(Reference):
    def backward_dx(self, dy, x, view, affine, act, residual, sums):
        sums = sums or self.backward_reduce(dy, x, view, affine, act, residual)
        return super().backward_dx(dy, x, view, affine, act, residual, sums)


class ForgetsTheWeightInDx(Reference):
    def backward_dx(self, dy, x, view, affine, act, residual, sums):
        _, dresidual = super().backward_dx(dy, x, view, affine, act, residual, sums)
        plain = affine._replace(weight=None)
        return super().backward_dx(dy, x, view, plain, act, residual, sums)[0], dresidual


class ResidualGetsDy(Reference):
    def backward_dx(self, dy, x, view, affine, act, residual, sums):
        dx, dresidual = super().backward_dx(dy, x, view, affine, act, residual, sums)
        return dx, None if dresidual is None else dy.clone()


class WritesIntoDy(Reference):
    def backward_dx(self, dy, *args):
        result = super().backward_dx(dy, *args)
        dy.mul_(0.5)
        return result


class WritesIntoTheMoments(Reference):
    def merge(self, parts):
        parts[0].m2.add_(1)
        return super().merge(parts)


class AnotherResultEachTime(Reference):
    calls = 0

    def backward_reduce(self, *args):
        self.calls += 1
        sums = super().backward_reduce(*args)
        return Sums(sums.dz * (1 + self.calls * 1e-15), sums.dz_xhat)


class RefusesEverything(Reference):
    def refuses(self, view, dtype, device):
        return "it is Sunday"


class MeansOfNothing(Reference):
    def backward_reduce(self, *args):
        sums = super().backward_reduce(*args)
        return Sums(sums.dz / args[2].count * args[2].count, sums.dz_xhat)


BROKEN: list[tuple[type[Reference], str, torch.dtype]] = [
    # who, the check that must see it, in which dtype
    (AddsToDx, "backward_dx", torch.float32),
    (AddsToDx, "backward_dx", torch.bfloat16),
    (OneWrongValueInDx, "backward_dx", torch.float32),
    (NormalizesWithUnbiased, "stats", torch.float32),
    (MeanOfSquaresMinusSquareOfMean, "stats", torch.float32),
    (MeanOfSquaresMinusSquareOfMean, "stats", torch.float64),
    (MeanOfSquaresMinusSquareOfMean, "stats", torch.float16),
    (StatisticsInTheInputsDtype, "stats", torch.float16),
    (NegativeVariance, "stats", torch.float32),
    (VectorsInTheWrongOrder, "stats", torch.float32),
    (MergesWithoutTheDistanceOfMeans, "merge", torch.float32),
    (AveragesMeansUnweighted, "merge", torch.float32),
    (CountsOnlyTheFirstPart, "merge", torch.float32),
    (ForgetsTheBias, "apply", torch.float32),
    (IgnoresTheResidual, "apply", torch.float32),
    (AddsTheResidualAfterTheActivation, "apply", torch.float32),
    (ContiguousOutput, "apply", torch.float32),
    (WideOutput, "apply", torch.float16),
    (ReluDropsNaN, "apply", torch.float32),
    (OneSlopeForAll, "apply", torch.float32),
    (ReluMaskFromX, "backward_dx", torch.float32),
    (ReluMaskIgnoresTheResidual, "backward_reduce", torch.float32),
    (ReluPassesAtZero, "backward_reduce", torch.float32),
    (Relu6WithoutTheUpperKink, "backward_dx", torch.float32),
    (SumsBeforeTheActivation, "backward_reduce", torch.float32),
    (WeightGradientOfX, "backward_reduce", torch.float32),
    (StatisticsAreConstants, "backward_dx", torch.float32),
    (StatisticsAreNeverConstants, "backward_dx", torch.float32),
    (ForgetsTheWeightInDx, "backward_dx", torch.float32),
    (ResidualGetsDy, "backward_dx", torch.float32),
    (WritesIntoDy, "side_effects", torch.float32),
    (WritesIntoTheMoments, "side_effects", torch.float32),
    (AnotherResultEachTime, "side_effects", torch.float32),
    (RefusesEverything, "refusal", torch.float32),
]


def complaints(backend: Reference, dtype: torch.dtype, only: str = "") -> set[str]:
    """The checks that fail on some row."""
    found = set()
    checks: tuple[Callable, ...] = (refusal, *CHECKS)
    for check in checks:
        name = check.__name__.removeprefix("check_")
        if only and name != only:
            continue
        for row in ROWS:
            try:
                check(backend, subject(row, dtype, CPU))
            except AssertionError:
                found.add(name)
                break
    return found


@pytest.mark.parametrize(
    ("kind", "check", "dtype"),
    BROKEN,
    ids=[f"{kind.__name__}-{str(dtype).removeprefix('torch.')}" for kind, _, dtype in BROKEN],
)
def test_each_mistake_is_seen(kind: type[Reference], check: str, dtype: torch.dtype) -> None:
    assert complaints(kind(), dtype, check) == {check}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_sound_backend_has_no_complaints(dtype: torch.dtype) -> None:
    assert complaints(Reference(), dtype) == set()


@pytest.mark.parametrize(
    ("kind", "checks"),
    [
        (AddsToDx, {"backward_dx", "backward"}),
        (MergesWithoutTheDistanceOfMeans, {"merge"}),
        (ForgetsTheBias, {"apply", "forward_training"}),
        (RefusesEverything, {"refusal"}),
    ],
)
def test_a_mistake_is_blamed_on_its_verb_and_what_is_made_of_it(
    kind: type[Reference], checks: set[str]
) -> None:
    assert complaints(kind(), torch.float32) == checks


def test_a_mean_of_nothing_is_seen() -> None:
    check_empty(Reference(), torch.float32, CPU)
    with pytest.raises(AssertionError):
        check_empty(MeansOfNothing(), torch.float32, CPU)
