"""The shortest way through the norm: it computes what the op computes, and keeps less."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import evenkeel
from evenkeel import direct
from evenkeel.errors import ShapeError
from evenkeel.pattern import parse

native = pytest.importorskip("evenkeel._native", reason="the native kernels are not built")
SPATIAL = parse("n c ... -> c")
TAILS = ["relu", ("leaky_relu", 0.2), "relu6", "silu", None]
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 3e-2}
LAYOUTS = {
    "runs of 49": ((5, 6, 7, 7), None),
    "runs of 35 and their parts": ((1, 3, 5, 7), None),
    "one channel": ((2, 1, 67, 61), None),
    "runs of 64": ((3, 4, 8, 8), None),
    "channels last": ((3, 32, 9, 5), torch.channels_last),
    "channels last, 24 of them": ((9, 24, 23, 21), torch.channels_last),
    "channels last, 5 of them": ((7, 5, 31, 29), torch.channels_last),
    "dense": ((33, 1100), None),
    "sequence": ((4, 3, 19), None),
}


@pytest.fixture(params=[False, True], ids=["", "streaming"])
def streaming(request: pytest.FixtureRequest) -> Iterator[None]:
    native.set_stream_from(0 if request.param else -1)
    yield
    native.set_stream_from(-1)


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call so far went the shortest way."""
    calls: list[bool] = []
    original = direct.cpu.batch_norm

    def spy(*arguments):
        y = original(*arguments)
        calls.append(y is not None)
        return y

    monkeypatch.setattr(direct.cpu, "batch_norm", spy)
    return calls


def tensors(layout: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shape, memory = LAYOUTS[layout]
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(shape).to(dtype) for _ in range(3))
    if memory is not None:
        x, residual, dy = (t.contiguous(memory_format=memory) for t in (x, residual, dy))
    single = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.randn(shape[1], dtype=single), torch.randn(shape[1], dtype=single) + 1
    return {"x": x * 2 + 3, "residual": residual * 2, "dy": dy, "weight": weight, "bias": bias}


def run(given: dict[str, torch.Tensor], training: bool, activation, backend: str):
    """y, the gradients and the running statistics; the reference computes in float64."""
    wide = torch.float64 if backend == "reference" else None
    leaves = {
        name: t.to(wide or t.dtype, copy=True).requires_grad_()
        for name, t in given.items()
        if name != "dy"
    }
    channels = len(given["weight"])
    running = torch.zeros(2, channels, dtype=given["weight"].dtype)
    running[1] = 1
    inputs = [leaves[name] for name in ("x", "weight", "bias")]
    y = evenkeel.batch_norm(
        *inputs,
        *running,
        training=training,
        activation=activation,
        residual=leaves["residual"],
        backend=backend,
    )
    wanted = torch.autograd.grad(y, list(leaves.values()), given["dy"].to(y.dtype))
    return [y.detach(), *wanted, *running]


@pytest.mark.usefixtures("instructions", "streaming", "threads")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_bits_in_place_of_the_residual(layout, dtype, taken) -> None:
    given = tensors(layout, dtype)
    for activation, training in itertools.product(TAILS, [True, False]):
        got = run(given, training, activation, "auto")
        assert taken.pop()
        wanted = run(given, training, activation, "reference")
        # At a kink the gradient jumps: places within rounding of one are left out.
        pre = run(given, training, None, "reference")[0]
        kinks = (pre.abs() < 0.03) | ((pre - 6).abs() < 0.05) if activation else pre.isnan()
        if dtype != torch.bfloat16 or activation in ("silu", None):
            kinks = kinks & False
        for index, (mine, other) in enumerate(zip(got, wanted, strict=True)):
            if index in (1, 2):  # dx and the residual's gradient
                mine, other = mine.masked_fill(kinks, 0), other.masked_fill(kinks, 0)
            scale = float(other.abs().max()) or 1.0
            assert float((mine.double() - other).abs().max()) <= TOLERANCES[dtype] * scale


@pytest.mark.parametrize("activation", TAILS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["runs of 35 and their parts", "channels last, 5 of them"])
def test_second_derivatives_from_the_bits(layout, training, activation, taken) -> None:
    shape, memory = LAYOUTS[layout]
    torch.manual_seed(0)
    x, residual = torch.randn(2, 3, *shape[1:2], 2, 3, dtype=torch.float64)
    x, residual = x.requires_grad_(), residual.requires_grad_()
    if memory is not None:
        x, residual = (t.detach().contiguous(memory_format=memory) for t in (x, residual))
        x, residual = x.requires_grad_(), residual.requires_grad_()
    weight, bias = torch.randn(2, shape[1], dtype=torch.float64)
    running = torch.randn(shape[1]), torch.rand(shape[1]) + 0.5

    def norm(*inputs):
        x, weight, bias, residual = inputs
        return evenkeel.batch_norm(
            *(x, weight, bias, *(r.clone() for r in running)),
            training=training,
            activation=activation,
            residual=residual,
        )

    inputs = (x, weight.requires_grad_(), bias.requires_grad_(), residual)
    assert torch.autograd.gradcheck(norm, inputs)
    assert torch.autograd.gradgradcheck(norm, inputs)
    assert all(taken)


def kept_bytes(activation, residual: bool) -> dict[torch.dtype, int]:
    """The bytes that the norm's backward keeps, by type."""
    kept: dict[torch.dtype, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.dtype] = kept.get(t.dtype, 0) + t.numel() * t.element_size()
        return t

    x, added = torch.randn(2, 4, 8, 16, 16, requires_grad=True).unbind()
    with saved_tensors_hooks(pack, lambda t: t):
        evenkeel.batch_norm(
            x, training=True, activation=activation, residual=added if residual else None
        )
    return kept


def test_what_is_kept() -> None:
    whole = 4 * 8 * 16 * 16 * 4
    assert kept_bytes("relu", residual=False) == {torch.float32: whole}
    assert kept_bytes(None, residual=True) == {torch.float32: whole}
    assert kept_bytes("silu", residual=True) == {torch.float32: 2 * whole}
    kept = kept_bytes("relu", residual=True)
    assert kept.pop(torch.float32) == whole
    assert kept[torch.uint8] <= whole // 32 * 17 // 16  # a bit a value, and a vector more a run


NAMES = ("x", "weight", "bias", "residual")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "silu", None])
@pytest.mark.parametrize(
    "wanted", [c for n in range(1, 5) for c in itertools.combinations(NAMES, n)], ids=str
)
def test_only_the_gradients_that_are_asked_for(wanted, activation, training) -> None:
    given = tensors("runs of 49", torch.float64)
    given = {name: t.double() for name, t in given.items()}
    dy = given.pop("dy")
    running = torch.zeros(6), torch.ones(6)

    def gradients(needed):
        leaves = {n: t.clone().requires_grad_(n in needed) for n, t in given.items()}
        y = evenkeel.batch_norm(
            *(leaves["x"], leaves["weight"], leaves["bias"], *(r.clone() for r in running)),
            training=training,
            activation=activation,
            residual=leaves["residual"],
        )
        y.backward(dy)
        return {name: leaf.grad for name, leaf in leaves.items()}

    everything, some = gradients(NAMES), gradients(wanted)
    assert {name for name, gradient in some.items() if gradient is not None} == set(wanted)
    for name in wanted:
        torch.testing.assert_close(some[name], everything[name], rtol=1e-12, atol=1e-12)


def test_a_layout_unlike_the_gradients(taken) -> None:
    """Gradients come as they come: expanded, or in another layout."""
    x = torch.randn(4, 8, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = torch.randn(4, 8, 5, 5)
    y = evenkeel.batch_norm(x, training=True, activation="relu")
    (y * weights).sum().backward()
    got, x.grad = x.grad, None
    y = evenkeel.batch_norm(x, training=True, activation="relu", backend="reference")
    (y * weights).sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-5)
    y = evenkeel.batch_norm(x, training=True)
    y.sum().backward()
    assert taken == [True, True]


def test_what_goes_the_other_way(taken) -> None:
    """Types that the kernels do not read, few values, and all that is wrong."""
    x = torch.randn(4, 3, 5, 5)
    evenkeel.batch_norm(x.bfloat16(), torch.ones(3).bfloat16(), training=True)
    evenkeel.batch_norm(x, torch.ones(3), torch.ones(3).double(), training=True)
    evenkeel.batch_norm(x[:2, :, :1, :1], training=True)
    evenkeel.batch_norm(x, residual=x.double(), training=True)
    with pytest.raises(ShapeError, match="weight of"):
        evenkeel.batch_norm(x, torch.ones(4), training=True)
    assert taken == [False] * 5


def test_the_statistics_that_inference_used_are_those_of_its_backward() -> None:
    """Training in between moves the running statistics, not what the graph was made with."""
    x = torch.randn(8, 3, 4, 4, requires_grad=True)
    running = torch.zeros(3), torch.ones(3)
    y = evenkeel.batch_norm(x, None, None, *running, training=False)
    evenkeel.batch_norm(torch.randn(8, 3, 4, 4) * 9, None, None, *running, training=True)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, (1 + 1e-5) ** -0.5))


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_a_default_device_elsewhere(backend: str) -> None:
    """What a call makes for itself is where its tensors are."""
    torch.manual_seed(7)
    x, residual, dy = torch.randn(3, 6, 5, 4, 4)
    x.requires_grad_()

    def both() -> tuple[torch.Tensor, ...]:
        given = {"activation": "relu", "residual": residual, "backend": backend}
        mean, var = torch.zeros(5, device="cpu"), torch.ones(5, device="cpu")
        y = evenkeel.batch_norm(x, None, None, mean, var, training=True, **given)
        dx = torch.autograd.grad(y, x, dy)[0]
        return y, dx, evenkeel.batch_norm(x, None, None, mean, var, training=False, **given)

    expected = both()
    with torch.device("meta"):
        got = both()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_tensor_that_outlives_its_transform() -> None:
    """Torch hides the memory of what escapes from torch.func, and its own ops find it again."""
    escaped = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        escaped.append(x * 2)
        return x.square().sum()

    x = torch.randn(4, 3, 5, 5)
    torch.func.grad(loss)(x)
    expected = evenkeel.batch_norm(x * 2, training=True)
    with torch.no_grad():
        torch.testing.assert_close(evenkeel.batch_norm(escaped[0], training=True), expected)
