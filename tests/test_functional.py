"""`batch_norm` against torch's own, and fused against unfused."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evenkeel.errors import ConfigError, ShapeError
from evenkeel.functional import batch_norm

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALVES)
CLOSE = {
    # of the result, rounded once; of the arithmetic before, relative to the largest value
    torch.float64: (2**-52, 1e-13),
    torch.float32: (2**-24, 1e-6),
    torch.bfloat16: (2**-8, 1e-6),
    torch.float16: (2**-11, 1e-6),
}


def close(got: Tensor, wanted: Tensor, what: str = "") -> None:
    """``got`` is the float64 ``wanted``, rounded once to its own dtype."""
    rtol, atol = CLOSE[got.dtype]
    finite = wanted[wanted.isfinite()].double().abs()
    scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
    torch.testing.assert_close(
        *(got.double(), wanted.double()),
        rtol=rtol,
        atol=atol * scale,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


class Call:
    """One set of arguments, for us and for torch; fresh leaves and buffers for each."""

    def __init__(
        self,
        x: Tensor,
        *,
        params: torch.dtype | None = None,
        weight: bool = True,
        bias: bool = True,
        running: bool = True,
        training: bool = True,
        momentum: float | Tensor = 0.1,
        eps: float = 1e-5,
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        channels, dtype = x.shape[1], params or x.dtype

        def draw(wanted: bool) -> Tensor | None:
            value = torch.randn(channels, generator=generator, dtype=torch.float64)
            return value.to(dtype) if wanted else None

        self.x = x
        self.weight, self.bias, self.running_mean = draw(weight), draw(bias), draw(running)
        var = draw(running)
        self.running_var = None if var is None else var.abs() + 0.5
        self.training, self.momentum, self.eps = training, momentum, eps

    def run(self, function: Callable, *, exact: bool = False) -> dict[str, Tensor | None]:
        """y, the buffers and the gradients by name; ``exact`` does all of it in float64."""

        def fresh(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().clone().to(torch.float64 if exact else t.dtype)

        x, weight, bias = fresh(self.x), fresh(self.weight), fresh(self.bias)
        for leaf in (x, weight, bias):
            if leaf is not None:
                leaf.requires_grad_()
        buffers = [fresh(self.running_mean), fresh(self.running_var)]
        y = function(self, x, *buffers, weight, bias)
        dy = torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(self.x.dtype)
        y.backward(dy.to(y.dtype))
        return {
            "y": y.detach(),
            "running_mean": buffers[0],
            "running_var": buffers[1],
            "dx": x.grad,
            "dweight": None if weight is None else weight.grad,
            "dbias": None if bias is None else bias.grad,
        }

    def ours(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options = {"training": self.training, "momentum": self.momentum, "eps": self.eps}
        return batch_norm(x, weight, bias, mean, var, **options)

    def torchs(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        momentum = float(self.momentum)
        return F.batch_norm(x, mean, var, weight, bias, self.training, momentum, self.eps)


def agree(call: Call, ours: Callable = Call.ours) -> None:
    """Every result has torch's dtype and the value that torch gives in float64, rounded once.

    Not the value that torch gives in half precision: there it rounds the statistics too.
    """
    got, same = call.run(ours), call.run(Call.torchs)
    exact = call.run(Call.torchs, exact=True)
    for name, wanted in exact.items():
        mine, theirs = got[name], same[name]
        if wanted is None:
            assert mine is None, name
        else:
            assert mine is not None, name
            assert theirs is not None, name
            assert mine.dtype == theirs.dtype, name
            close(mine, wanted, name)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 0.5).to(dtype)


SHAPES = [
    (7, 3),
    (4, 3, 9),
    (2, 3, 5, 7),
    (2, 3, 3, 2, 4),
    (1, 3, 2, 2),
    (2, 1, 2, 1),
    (2, 64, 1, 1),
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_torch(shape: tuple, dtype: torch.dtype, training: bool) -> None:
    agree(Call(randn(*shape, dtype=dtype), training=training))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_agrees_for_half_input_and_float_weights(dtype: torch.dtype, training: bool) -> None:
    call = Call(randn(4, 3, 5, 7, dtype=dtype), params=torch.float32, training=training)
    agree(call)
    assert call.run(Call.ours)["y"].dtype == dtype
    assert call.run(Call.ours)["dweight"].dtype == torch.float32


@pytest.mark.parametrize("present", list(itertools.product([True, False], repeat=3)), ids=str)
def test_agrees_whatever_is_left_out(present: tuple[bool, bool, bool]) -> None:
    weight, bias, running = present
    agree(Call(randn(4, 3, 5, 7), weight=weight, bias=bias, running=running))
    if running:
        agree(Call(randn(4, 3, 5, 7), weight=weight, bias=bias, training=False))


@pytest.mark.parametrize("momentum", [0.0, 1.0, 0.3, -1.2, torch.tensor(0.25)], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.6])
def test_agrees_for_every_momentum_and_eps(momentum: float | Tensor, eps: float) -> None:
    agree(Call(randn(4, 3, 5, 7), momentum=momentum, eps=eps))
    agree(Call(randn(4, 3, 5, 7), momentum=momentum, eps=eps, training=False))


def test_momentum_zero_and_one_are_exact() -> None:
    x, kept = randn(4, 3, 5), torch.full((3,), 0.1, dtype=torch.float64)
    mean, var = kept.clone(), kept.clone()
    batch_norm(x, running_mean=mean, running_var=var, training=True, momentum=0.0)
    assert torch.equal(mean, kept)
    assert torch.equal(var, kept)
    batch_norm(x, running_mean=mean, running_var=var, training=True, momentum=1.0)
    torch.testing.assert_close(mean, x.mean((0, 2)), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(var, x.var((0, 2)), rtol=1e-14, atol=0)


def test_agrees_in_channels_last() -> None:
    for dtype in DTYPES:
        x = randn(4, 3, 5, 7, dtype=dtype).contiguous(memory_format=torch.channels_last)
        agree(Call(x))
        agree(Call(x, training=False))
        assert batch_norm(x, training=True).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 3), (2, 3, 0)], ids=str)
def test_agrees_on_empty_batches(shape: tuple, training: bool) -> None:
    """Nothing is remembered, and parameters get gradients of zero, not None."""
    call = Call(randn(*shape), training=training)
    agree(call)
    got = call.run(Call.ours)
    assert torch.equal(got["running_mean"], call.running_mean)
    assert not got["dweight"].any()


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_on_nan_and_infinity(bad: float, dtype: torch.dtype, training: bool) -> None:
    x = randn(4, 3, 5, dtype=dtype)
    x[1, 1, 2] = bad
    call = Call(x, training=training)
    agree(call)
    y = call.run(Call.ours)["y"]
    assert y[:, [0, 2]].isfinite().all()  # the other channels do not notice
    assert not y[:, 1].isfinite().all()


def test_agrees_on_a_constant_channel() -> None:
    x = torch.full((4, 3, 5), 0.1, dtype=torch.float64)
    agree(Call(x))
    y = batch_norm(x.float(), bias=torch.arange(3.0), training=True)
    torch.testing.assert_close(y, torch.arange(3.0)[:, None].expand_as(y), atol=1e-6, rtol=0)


def test_one_running_buffer_is_refused_as_in_torch() -> None:
    x, one = randn(4, 3, 5), torch.ones(3, dtype=torch.float64)
    for mean, var, training in ((one, None, True), (None, one, True), (one, None, False)):
        with pytest.raises((ValueError, RuntimeError), match="running_"):
            F.batch_norm(x, mean, var, training=training)
        with pytest.raises(ShapeError, match="got one of running_mean and running_var; pass both"):
            batch_norm(x, running_mean=mean, running_var=var, training=training)
    assert torch.equal(one, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_gives_torchs_dtypes(dtype: torch.dtype) -> None:
    x = randn(4, 3, 5, 5, dtype=torch.float32)
    weight, kernel = torch.ones(3), torch.randn(3, 3, 1, 1)
    with torch.autocast("cpu", dtype):
        for given in (x, x.to(dtype), F.conv2d(x, kernel)):
            mine = batch_norm(given, weight, weight, training=True)
            torchs = F.batch_norm(given, None, None, weight, weight, training=True)
            assert mine.dtype == torchs.dtype
            torch.testing.assert_close(mine, torchs)


ACTIVATIONS: dict[str, tuple] = {
    "none": (None, lambda z: z),
    "relu": ("relu", F.relu),
    "leaky_relu": ("leaky_relu", F.leaky_relu),
    "leaky_relu 0.2": (("leaky_relu", 0.2), lambda z: F.leaky_relu(z, 0.2)),
    "relu6": ("relu6", F.relu6),
    "silu": ("silu", F.silu),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(("name", "function"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_fused_is_unfused(
    name: str | tuple | None, function: Callable, with_residual: bool, training: bool
) -> None:
    """Values and all gradients, in float64 against torch's chain of three."""
    outcomes = []
    for fused in (True, False):
        x, residual = randn(4, 3, 5, 7), randn(4, 3, 5, 7, seed=1)
        weight, bias = randn(3, seed=2), randn(3, seed=3)
        leaves = [x, weight, bias, residual] if with_residual else [x, weight, bias]
        for leaf in leaves:
            leaf.requires_grad_()
        mean, var = torch.zeros(3).double(), torch.ones(3).double() * 3
        if fused:
            y = batch_norm(
                *(x, weight, bias, mean, var),
                training=training,
                activation=name,
                residual=residual if with_residual else None,
            )
        else:
            z = F.batch_norm(x, mean, var, weight, bias, training)
            y = function(z + residual if with_residual else z)
        dy = torch.linspace(-1, 2, y.numel()).reshape(y.shape).double()
        outcomes.append([y.detach(), mean, var, *torch.autograd.grad(y, leaves, dy)])
    for got, wanted in zip(*outcomes, strict=True):
        close(got, wanted)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_fused_rounds_once(dtype: torch.dtype) -> None:
    """In half precision fusing is better than torch's chain: it is the float64 result, rounded."""
    x, residual = randn(4, 3, 5, 7, dtype=dtype), randn(4, 3, 5, 7, dtype=dtype, seed=1)
    exact = F.silu(F.batch_norm(x.double(), None, None, training=True) + residual.double())
    y = batch_norm(x, training=True, activation="silu", residual=residual)
    chain = F.silu(F.batch_norm(x, None, None, training=True) + residual)
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=1e-6)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(chain.double(), exact, rtol=rounding, atol=1e-6)


def test_a_residual_of_another_dtype_leaves_y_like_x() -> None:
    x, residual = randn(4, 3, 5, dtype=torch.bfloat16), randn(4, 3, 5, dtype=torch.float32)
    residual.requires_grad_()
    y = batch_norm(x, training=True, residual=residual, activation="relu")
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert residual.grad is not None
    assert residual.grad.dtype == torch.float32


@pytest.mark.parametrize("with_activation", [None, "relu"])
def test_the_residual_is_not_written_to(with_activation: str | None) -> None:
    x, residual = randn(4, 3, 5), randn(4, 3, 5, seed=1)
    before = residual.clone()
    batch_norm(x, training=True, residual=residual, activation=with_activation)
    assert torch.equal(residual, before)


REFUSED: dict[str, tuple] = {
    "channels": (
        {"weight": torch.ones(4)},
        ShapeError,
        r"weight of 'n c \.\.\. -> c' must have shape \(3,\) for an input of \(4, 3, 5\) but has",
    ),
    "two-dimensional bias": ({"bias": torch.ones(1, 3)}, ShapeError, r"bias of .* but has \(1, 3"),
    "running": (
        {"running_mean": torch.ones(5), "running_var": torch.ones(5)},
        ShapeError,
        r"running_mean of .* must have shape \(3,\)",
    ),
    "residual": (
        {"residual": torch.ones(4, 1, 5)},
        ShapeError,
        r"residual of .* must have shape \(4, 3, 5\) .* but has \(4, 1, 5\)",
    ),
    "integers": ({"x": torch.ones(4, 3).int()}, ShapeError, "floating tensor but got torch.int32"),
    "complex": ({"x": torch.ones(4, 3) * 1j}, ShapeError, "floating tensor but got torch.complex"),
    "a vector": ({"x": torch.ones(4)}, ShapeError, r"at least 2 dimensions but got 1 in \(4,\)"),
    "activation": (
        {"activation": "tanh"},
        ConfigError,
        "unknown activation 'tanh'; choose one of none, relu, leaky_relu, relu6, silu",
    ),
    "slope": ({"activation": ("relu", 0.3)}, ConfigError, "'relu' takes no slope but got 0.3"),
    "eps": ({"eps": -1e-5}, ConfigError, r"eps must be 0 or more but is -1e-05"),
    "eps of NaN": ({"eps": float("nan")}, ConfigError, r"eps must be 0 or more but is nan"),
    "nothing to infer with": (
        {"training": False},
        ShapeError,
        r"'n c \.\.\. -> c' in inference needs running_mean and running_var; pass training=True",
    ),
    "one value": (
        {"x": torch.ones(1, 3)},
        ShapeError,
        r"'n c \.\.\. -> c' on \(1, 3\) averages over n=1: one value per owner, whose variance is",
    ),
    "one value, image": (
        {"x": torch.ones(1, 3, 1, 1)},
        ShapeError,
        r"averages over n=1, dimension 2=1, dimension 3=1: .* use a larger batch \(drop_last=True",
    ),
}


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_what_and_why(changes: dict, error: type, words: str) -> None:
    options = {"x": torch.ones(4, 3, 5), "training": True} | changes
    with pytest.raises(error, match=words):
        batch_norm(options.pop("x"), **options)


def test_a_refused_batch_is_not_remembered() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(ShapeError, match="one value per owner"):
        batch_norm(torch.ones(1, 3), None, None, mean, var, training=True)
    assert not mean.any()
    assert bool((var == 1).all())


def test_eps_zero_is_the_bare_formula() -> None:
    """Torch refuses it in training; cuDNN and a moved Darknet epsilon need it."""
    x = randn(4, 3, 5)
    wanted = (x - x.mean((0, 2), keepdim=True)) / x.std((0, 2), unbiased=False, keepdim=True)
    close(batch_norm(x, training=True, eps=0.0), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_comparison_can_fail(dtype: torch.dtype) -> None:
    wanted = torch.tensor([1.0, 2.0], dtype=dtype)
    close(wanted, wanted.double())
    last_digit = torch.tensor([1 + torch.finfo(dtype).eps, 2.0], dtype=torch.float64).to(dtype)
    for wrong in (wanted + 1e-2, torch.tensor([1, torch.nan], dtype=dtype), wanted[:1]):
        with pytest.raises(AssertionError):
            close(wrong, wanted.double())
    if dtype in HALVES:
        with pytest.raises(AssertionError):
            close(last_digit, wanted.double())


def test_the_agreement_can_fail() -> None:
    """A biased running variance, the difference between torch and ONNX, is noticed."""

    def biased(call: Call, x: Tensor, mean: Tensor, var: Tensor, *params: Tensor) -> Tensor:
        var.mul_(0.9).add_(x.detach().var((0, 2), unbiased=False), alpha=0.1)
        return Call.ours(call, x, mean, var.clone(), *params)

    with pytest.raises(AssertionError, match="running_var"):
        agree(Call(randn(4, 3, 5)), biased)
