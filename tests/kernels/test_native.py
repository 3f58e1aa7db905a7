"""The native backend: the contract, for every instruction set that this processor runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from evenkeel.errors import BackendError
from evenkeel.kernels import select
from evenkeel.kernels.contract import Activation, Affine
from evenkeel.kernels.reference import Reference
from evenkeel.view import view_of

from .contract import Contract

if not os.environ.get("CI"):  # there they must be built
    pytest.importorskip("evenkeel._native", reason="the native kernels are not built")
from evenkeel import _native as native
from evenkeel.kernels.native import Native


@pytest.mark.usefixtures("instructions")
class TestNative(Contract):
    name = "native"


NATIVE, PLAIN = Native(), Reference()
RELU = Activation("relu")
SHAPES = {
    "one channel, large": (2, 1, 301, 299),
    "three channels": (5, 3, 97, 61),
    "many rows": (4099, 5),
    "more channels than values": (9, 517, 3, 1),
    "one place each": (131, 67, 1, 1),
    "sequence": (3, 7, 4001),
    "small images, slab by slab": (37, 301, 7, 5),
    "small images, rows dealt": (211, 97, 4, 4),
}


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variances_of_few_rows(dtype) -> None:
    """Where one tile is nearly all, and sums of one row after another are off by most."""
    x = (torch.randn(72, 20_000, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    moments = NATIVE.stats(x, view_of(x.shape, x.stride(), (1,)))
    wanted = x.double().var(0, correction=0) * 72
    assert float(((moments.m2 - wanted) / wanted).abs().max()) <= 5e-7  # the bound is 1e-6


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_however_the_work_is_divided(threads, shape, last) -> None:
    """Threads over owners, over rows or over parts of rows."""
    torch.manual_seed(0)
    x, dy = torch.randn(2, *shape) * 3 + 100
    if last:
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    view = view_of(x.shape, x.stride(), (1,))
    weight, bias = torch.randn(2, *view.kept_sizes, dtype=torch.float64)
    y, mean, var = NATIVE.forward_training(x, view, weight, bias, 1e-5, RELU, None)
    wanted, wanted_mean, wanted_var = PLAIN.forward_training(
        x, view, weight, bias, 1e-5, RELU, None
    )
    close = torch.testing.assert_close
    close(mean, wanted_mean, rtol=1e-8, atol=1e-8)
    close(var, wanted_var, rtol=1e-6, atol=0)
    close(y, wanted, rtol=1e-5, atol=1e-5)
    affine = Affine(mean, (var + 1e-5).rsqrt(), weight, bias)
    dx, _, sums = NATIVE.backward(dy, x, view, affine, RELU, None, True)
    dx_wanted, _, sums_wanted = PLAIN.backward(dy, x, view, affine, RELU, None, True)
    near_kink = (y == 0) != (wanted == 0)
    close(dx.masked_fill(near_kink, 0), dx_wanted.masked_fill(near_kink, 0), rtol=1e-4, atol=1e-4)
    for got, want in zip(sums, sums_wanted, strict=True):
        close(got, want, rtol=1e-5, atol=1e-5 * float(dy.abs().sum() / dy.shape[1]))
    again = NATIVE.forward_training(x, view, weight, bias, 1e-5, RELU, None)
    assert torch.equal(again[0], y), "the same threads gave other bits"


@pytest.fixture
def streaming() -> Iterator[None]:
    native.set_stream_from(0)
    yield
    native.set_stream_from(-1)


@pytest.mark.usefixtures("streaming", "instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("n", "places"), [(2, 35), (2, 49), (2, 196), (2, 64), (18, 35), (25, 49)])
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_stores_past_the_cache(last, n, places, dtype) -> None:
    """They need whole aligned vectors; the ends of a run have neither."""
    torch.manual_seed(0)
    x, dy, residual = torch.randn(3, n, 48, places).to(dtype)
    if last:
        x, dy, residual = (t.mT.contiguous().mT for t in (x, dy, residual))
    view = view_of(x.shape, x.stride(), (1,))
    close = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}
    tolerance = {"rtol": close[dtype], "atol": close[dtype]}
    y, mean, var = NATIVE.forward_training(x, view, None, None, 1e-5, RELU, residual)
    wanted, *_ = PLAIN.forward_training(x, view, None, None, 1e-5, RELU, residual)
    torch.testing.assert_close(y, wanted, **tolerance)
    affine = Affine(mean, (var + 1e-5).rsqrt())
    got = NATIVE.backward(dy, x, view, affine, RELU, residual, True)
    want = PLAIN.backward(dy, x, view, affine, RELU, residual, True)
    for mine, other in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


NANS = {"all ones": 2**63 - 1, "all ones, negative": -1, "the usual one": 0x7FF8 << 48}


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("name", Affine._fields)
@pytest.mark.parametrize("bits", NANS.values(), ids=NANS)
def test_nan_in_a_parameter_reaches_bfloat16(bits, name, last) -> None:
    """Whatever its bits are: rounding to the upper half must not carry them away."""
    x, dy = torch.randn(2, 3, 40, 7, 5).bfloat16()
    if last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    view = view_of(x.shape, x.stride(), (1,))
    given = dict(zip(Affine._fields, torch.rand(4, 40, dtype=torch.float64) + 0.5, strict=True))
    given[name][1] = torch.tensor(bits).view(torch.float64)
    affine = Affine(**given)
    y = NATIVE.apply(x, view, affine, RELU, None)
    dx, *_ = NATIVE.backward(dy, x, view, affine, Activation(), None, True)
    for got, reaches in ((y, True), (dx, name != "bias")):
        wanted = torch.zeros_like(got, dtype=torch.bool)
        wanted[:, 1] = reaches
        assert torch.equal(got.isnan(), wanted)


def test_variance_where_the_mean_is_a_thousand_deviations_away() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8, 31, 29) + 1000
    for t in (x, x.contiguous(memory_format=torch.channels_last)):
        view = view_of(t.shape, t.stride(), (1,))
        got, wanted = NATIVE.stats(t, view), PLAIN.stats(t, view)
        torch.testing.assert_close(got.m2, wanted.m2, rtol=1e-6, atol=0)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="does not run 'mmx' kernels"):
        native.use("mmx")


def test_what_it_says_of_itself() -> None:
    text = NATIVE.describe()
    assert native.instructions() in text
    assert "libgomp" in text or "libomp" in text or "own threads" in text


def test_without_the_kernels_the_reference_runs_and_a_wish_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "evenkeel._native", None)
    monkeypatch.delattr("evenkeel._native")
    for cached in (select.load, select._missing):
        cached.cache_clear()
    view = view_of((2, 3, 4, 5), (60, 20, 5, 1), (1,))
    choice = select.choose("auto", view, torch.float32, torch.device("cpu"))
    assert choice.name == "reference"
    assert "not built" in choice.reason
    with pytest.raises(BackendError, match=r"install evenkeel where a C\+\+ compiler"):
        select.choose("native", view, torch.float32, torch.device("cpu"))
    for cached in (select.load, select._missing):
        cached.cache_clear()
