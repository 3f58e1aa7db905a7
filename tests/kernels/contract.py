"""The contract that every backend must pass, in the tolerances of `truth.TOLERANCES`.

A backend's test file says only who it is::

    class TestMine(Contract):
        name = "mine"
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from evenkeel.kernels.contract import Activation, Affine, Backend, Moments, Sums, accumulation_dtype
from evenkeel.kernels.select import load
from evenkeel.view import view_of

from .truth import EPS, ROWS, TOLERANCES, VARIANCE, VARIANTS, Array, Row, Subject, subject, truth


def numbers(t: Tensor) -> Array:
    return t.detach().cpu().double().numpy().astype(np.longdouble)


def assert_near(name: str, got: Array, wanted: Array, allowed: Array) -> None:
    """``|got - wanted| <= allowed`` everywhere; NaN where, and only where, NaN is wanted."""
    assert got.shape == wanted.shape, f"{name}: shape {got.shape}, not {wanted.shape}"
    got_nan, wanted_nan = np.isnan(got), np.isnan(wanted)
    assert (got_nan == wanted_nan).all(), f"{name}: NaN at {np.argwhere(got_nan != wanted_nan)[:3]}"
    finite = np.isfinite(wanted)
    same = got[~finite & ~wanted_nan] == wanted[~finite & ~wanted_nan]
    assert same.all(), f"{name}: an infinity is missing"
    error = np.where(finite, np.abs(np.where(finite, got - wanted, 0)), 0)
    over = error > np.where(finite, allowed, 0)
    if over.any():
        at = np.unravel_index(np.argmax(np.where(over, error, 0)), error.shape)
        raise AssertionError(
            f"{name}: {int(over.sum())} of {over.size} values are off, most of all at "
            f"{tuple(int(i) for i in at)}: got {got[at]:.9g}, wanted {wanted[at]:.9g}, "
            f"allowed {np.broadcast_to(allowed, error.shape)[at]:.3g}"
        )


def assert_tensor(name: str, s: Subject, got: Tensor, wanted: Array, scale: Array) -> None:
    """Like x in shape, dtype, device and layout, and near what is wanted."""
    assert got.dtype == s.dtype, f"{name}: {got.dtype}, not {s.dtype}"
    assert got.device.type == s.device.type, name
    layout = view_of(got.shape, got.stride(), s.row.owners)
    assert layout is not None, f"{name}: has gaps"
    assert layout.sizes == s.view.sizes, f"{name}: another layout than x, strides {got.stride()}"
    tiny = float(torch.finfo(s.dtype).smallest_normal * torch.finfo(s.dtype).eps)
    with np.errstate(invalid="ignore"):
        allowed = s.tolerance.rounding * np.abs(wanted) + s.tolerance.inner * scale + tiny
    assert_near(name, numbers(got), wanted, allowed)


def assert_vector(name: str, s: Subject, got: Tensor, wanted: Array, allowed: Array) -> None:
    """One value per owner in memory order, in the accumulation dtype, near what is wanted."""
    assert got.dtype == s.accumulation, f"{name}: {got.dtype}, not {s.accumulation}"
    assert tuple(got.shape) == s.view.kept_sizes, f"{name}: shape {tuple(got.shape)}"
    limits = numbers(s.vector(np.broadcast_to(allowed, wanted.shape)))
    assert_near(name, numbers(got), numbers(s.vector(wanted)), limits)


def assert_moments(s: Subject, got: Moments, *, merged: bool = False) -> None:
    """The count, the mean within a little of std, the variance within 1e-6 of itself.

    ``blur`` is the rounding of the mean as it is stored. The variance may suffer by its square, or,
    where means of parts were rounded before they were compared, by its product with std.
    """
    n = s.count
    assert got.n == n, f"n is {got.n}, not {n}"
    with np.errstate(invalid="ignore"):
        std = np.sqrt(s.var)
        blur = 2 * float(torch.finfo(s.accumulation).eps) * np.abs(s.mean)
        assert_vector("mean", s, got.mean, s.mean, VARIANCE[s.dtype] * std + blur)
        extra = blur * (blur + std) if merged else blur**2
        assert_vector("m2", s, got.m2, n * s.var, n * (VARIANCE[s.dtype] * s.var + extra))
    assert not (got.m2 < 0).any(), "a variance is negative"


def check_stats(backend: Backend, s: Subject) -> None:
    assert_moments(s, backend.stats(s.tensor(s.x), s.view))


def check_merge(backend: Backend, s: Subject) -> None:
    """Parts of one, some, none and the rest of the values are as good as all at once."""
    shape = (*(s.row.shape[d] for d in s.row.owners), s.count)
    values = np.moveaxis(s.x, s.row.owners, range(len(s.row.owners))).reshape(shape)
    per_owner = [size if d in s.row.owners else 1 for d, size in enumerate(s.row.shape)]

    def part(start: int, stop: int) -> Moments:
        piece = values[..., start:stop]
        if start == stop:
            zero = s.vector(np.zeros(per_owner))
            return Moments(0, zero, zero.clone())
        with np.errstate(invalid="ignore"):
            mean = piece.mean(axis=-1, keepdims=True)
            m2 = ((piece - mean) ** 2).sum(axis=-1)
        return Moments(
            stop - start, s.vector(mean.reshape(per_owner)), s.vector(m2.reshape(per_owner))
        )

    third = max(1, s.count // 3)
    for cuts in ([0, 1, 1, third, s.count], [0, 0, 0, s.count], [0, third, s.count, s.count]):
        parts = [part(a, b) for a, b in itertools.pairwise(cuts)]
        if not s.row.special:  # NaN parts have NaN moments, however they are merged
            assert_moments(s, backend.merge(parts), merged=True)
    whole = part(0, s.count)
    alone = backend.merge([whole])
    assert alone.n == whole.n
    assert torch.equal(alone.m2.nan_to_num(), whole.m2.nan_to_num())


def check_apply(backend: Backend, s: Subject) -> None:
    for variant in VARIANTS:
        want = truth(s, variant)
        got = backend.apply(s.tensor(s.x), s.view, s.affine(variant), variant.act, s.added(variant))
        assert_tensor(f"y of {variant}", s, got, want.y, want.y_scale)


def check_backward_reduce(backend: Backend, s: Subject) -> None:
    for variant in VARIANTS:
        want = truth(s, variant)
        x, dy = s.tensor(s.x), s.tensor(s.dy)
        got = backend.backward_reduce(
            dy, x, s.view, s.affine(variant), variant.act, s.added(variant)
        )
        inner = s.tolerance.inner
        assert_vector(f"dz of {variant}", s, got.dz, want.sum_dz, inner * want.sum_dz_scale)
        assert_vector(
            *(f"dz_xhat of {variant}", s, got.dz_xhat, want.sum_dz_xhat),
            inner * want.sum_dz_xhat_scale,
        )


def check_backward_dx(backend: Backend, s: Subject) -> None:
    for variant in VARIANTS:
        want = truth(s, variant)
        sums = Sums(s.vector(want.sum_dz), s.vector(want.sum_dz_xhat))
        for given, wanted in ((sums, want.dx_training), (None, want.dx_inference)):
            x, dy, residual = s.tensor(s.x), s.tensor(s.dy), s.added(variant)
            dx, dresidual = backend.backward_dx(
                dy, x, s.view, s.affine(variant), variant.act, residual, given
            )
            mode = "inference" if given is None else "training"
            assert_tensor(f"dx in {mode} of {variant}", s, dx, wanted, want.dx_scale)
            assert (dresidual is None) == (residual is None)
            if dresidual is not None:
                assert_tensor(f"d_residual of {variant}", s, dresidual, want.dz, np.abs(s.dy))


def check_forward_training(backend: Backend, s: Subject) -> None:
    """The fused call is as good as the verbs; y may be off by what the mean may be off."""
    for variant in VARIANTS:
        want, affine = truth(s, variant), s.affine(variant)
        weight = np.abs(s.weight) if variant.has_weight else np.ones_like(s.weight)
        scale = want.y_scale + weight * (VARIANCE[s.dtype] / s.tolerance.inner)
        y, mean, var = backend.forward_training(
            *(s.tensor(s.x), s.view, affine.weight, affine.bias, EPS),
            *(variant.act, s.added(variant)),
        )
        assert_tensor(f"y of {variant}", s, y, want.y, scale)
        assert_moments(s, Moments(s.count, mean, var * s.count))


def check_backward(backend: Backend, s: Subject) -> None:
    """So is this one."""
    for variant in VARIANTS:
        want, inner = truth(s, variant), s.tolerance.inner
        for from_batch, wanted in ((True, want.dx_training), (False, want.dx_inference)):
            x, dy, residual = s.tensor(s.x), s.tensor(s.dy), s.added(variant)
            dx, dresidual, sums = backend.backward(
                dy, x, s.view, s.affine(variant), variant.act, residual, from_batch
            )
            assert_tensor(f"dx of {variant}", s, dx, wanted, want.dx_scale)
            assert_vector("dz", s, sums.dz, want.sum_dz, inner * want.sum_dz_scale)
            if residual is not None:
                assert dresidual is not None
                assert_tensor(f"d_residual of {variant}", s, dresidual, want.dz, np.abs(s.dy))


def check_side_effects(backend: Backend, s: Subject) -> None:
    """Nothing that was handed in is written to, and the same call gives the same bits."""
    variant = VARIANTS[2]
    affine, act, view = s.affine(variant), variant.act, s.view
    x, dy, residual = s.tensor(s.x), s.tensor(s.dy), s.tensor(s.residual)
    given = [x, dy, residual, *(t for t in affine if t is not None)]
    before = [t.clone() for t in given]

    def everything() -> list[Tensor]:
        moments = backend.stats(x, view)
        sums = backend.backward_reduce(dy, x, view, affine, act, residual)
        kept = [moments.mean, moments.m2, *sums]
        fresh = [t.clone() for t in kept]
        dx, dresidual = backend.backward_dx(dy, x, view, affine, act, residual, sums)
        merged = backend.merge([moments, moments])
        y = backend.apply(x, view, affine, act, residual)
        assert dresidual is not None
        for t, old in zip(kept, fresh, strict=True):
            assert _same_bits(t, old), "an input was written to"
        return [*kept, merged.mean, merged.m2, y, dx, dresidual]

    for first, second in zip(everything(), everything(), strict=True):
        assert _same_bits(first, second), "two calls differ"
    for t, old in zip(given, before, strict=True):
        assert _same_bits(t, old), "an input was written to"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def check_empty(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    """An empty batch gives an empty result, sums of zero, and no error."""
    x = torch.empty(0, 3, 5, 7, dtype=dtype, device=device)
    view = view_of(x.shape, x.stride(), [1])
    assert view is not None
    vector = torch.ones(view.kept_sizes, dtype=accumulation_dtype(dtype, device), device=device)
    affine, act = Affine(vector, vector, vector, vector), Activation("relu")
    moments = backend.stats(x, view)
    assert moments.n == 0
    assert moments.m2.shape == view.kept_sizes
    assert backend.apply(x, view, affine, act, x).shape == x.shape
    sums = backend.backward_reduce(x, x, view, affine, act, x)
    assert not sums.dz.any()
    assert not sums.dz_xhat.any()
    dx, dresidual = backend.backward_dx(x, x, view, affine, act, x, sums)
    assert dresidual is not None
    assert dx.shape == dresidual.shape == x.shape


CHECKS: tuple[Callable[[Backend, Subject], None], ...] = (
    *(check_stats, check_merge, check_apply, check_backward_reduce, check_backward_dx),
    *(check_forward_training, check_backward, check_side_effects),
)


def refusal(backend: Backend, s: Subject) -> str | None:
    """Why the backend need not run this; float32 in four numbers it must run."""
    reason = backend.refuses(s.view, s.dtype, s.device)
    if reason is not None:
        assert reason.strip(), "a refusal without a reason"
        must = s.dtype == torch.float32 and s.view.is_four
        assert not must, f"refuses what every backend must run: {reason}"
    return reason


class Contract:
    """Every check on every row in every dtype. A skip says in whose words and why."""

    name: str
    device = torch.device("cpu")

    @pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: str(d).removeprefix("torch."))
    @pytest.mark.parametrize("row", ROWS, ids=lambda row: row.why)
    @pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
    def test_row(
        self, check: Callable[[Backend, Subject], None], row: Row, dtype: torch.dtype
    ) -> None:
        backend, s = load(self.name), subject(row, dtype, self.device)
        reason = refusal(backend, s)
        if reason is not None:
            pytest.skip(f"{self.name} refuses: {reason}")
        check(backend, s)

    @pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: str(d).removeprefix("torch."))
    def test_empty_batch(self, dtype: torch.dtype) -> None:
        view = view_of((0, 3, 5, 7), (105, 35, 7, 1), [1])
        assert view is not None
        reason = load(self.name).refuses(view, dtype, self.device)
        if reason is not None:
            pytest.skip(f"{self.name} refuses: {reason}")
        check_empty(load(self.name), dtype, self.device)

    def test_name(self) -> None:
        assert load(self.name).name == self.name
