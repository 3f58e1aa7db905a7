"""The short way to the Triton kernels, in Triton's interpreter: what it computes, what it takes."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from evenkeel import normalize
from evenkeel.direct import gpu
from evenkeel.errors import ShapeError
from evenkeel.ops import norm_op

from .test_triton import WAYS, _fast, planning  # noqa: F401 - loads the kernels, interpreted

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NCHW, NHWC = torch.contiguous_format, torch.channels_last
ACTS = (None, "relu", ("leaky_relu", 0.3), "relu6", "silu")
PATTERNS = ("n c h w -> c", "n c h w -> c h w", "n c h w -> h w")
TOLERANCES = {F32: 2e-5, BF16: 2e-2, F16: 3e-3}
DEALT = [
    (way, layout, (F32, BF16, F16)[k % 3], ACTS[k % 5], PATTERNS[k % 4 % 3], k % 2 == 0)
    for k, (way, layout) in enumerate(itertools.product([*WAYS, *WAYS], [NCHW, NHWC]))
]


@pytest.fixture
def divided(monkeypatch):
    """Makes later calls divide their work that way."""
    gpu._plan.cache_clear()
    yield lambda way: monkeypatch.setattr(planning, "LIMITS", WAYS[way])
    gpu._plan.cache_clear()


@pytest.fixture
def ways(monkeypatch):
    """How many calls have gone the short way."""
    taken = []
    original = gpu._forward
    monkeypatch.setattr(gpu, "_forward", lambda *given: taken.append(1) or original(*given))
    return taken


def tensors(shape, layout, dtype, pattern, seed=0):
    random = torch.Generator().manual_seed(seed)
    x, dy, residual = (
        torch.randn(shape, generator=random).to(dtype).contiguous(memory_format=layout)
        for _ in range(3)
    )
    owners = pattern.split("->")[1].split()
    own = [size for axis, size in zip("nchw", shape, strict=True) if axis in owners]
    weight, bias, mean = (torch.randn(own, generator=random) for _ in range(3))
    var = torch.rand(own, generator=random) + 0.5
    given = [t.requires_grad_() for t in (x, weight, bias, residual)]
    return given, dy, {"running_mean": mean, "running_var": var}


def run(backend, dtype, given, dy, running, pattern, act, adds, training):
    """y, gradients, running statistics, all in float64."""
    x, weight, bias, residual = [t.detach().to(dtype).requires_grad_() for t in given]
    wide = F32 if dtype != torch.float64 else dtype
    weight, bias = (t.detach().to(wide).requires_grad_() for t in (weight, bias))
    running = {name: t.to(wide, copy=True) for name, t in running.items()}
    options = {"weight": weight, "bias": bias, "residual": residual if adds else None}
    y = normalize(
        *(x, pattern),
        **(options | running),
        activation=act,
        training=training,
        momentum=0.3,
        eps=1e-3,
        backend=backend,
    )
    sources = (x, weight, bias, residual) if adds else (x, weight, bias)
    found = (y, *torch.autograd.grad(y, sources, dy.to(dtype)), *running.values())
    assert all(t.dtype == (dtype if t.dim() == 4 else wide) for t in found)
    return [t.detach().double() for t in found]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("way", "layout", "dtype", "act", "pattern", "adds"), DEALT)
def test_it_computes_what_the_reference_does(
    way, layout, dtype, act, pattern, adds, training, divided, ways
) -> None:
    divided(way)
    given, dy, running = tensors((6, 5, 4, 3), layout, dtype, pattern)
    mine = run("triton", dtype, given, dy, running, pattern, act, adds, training)
    is_reordered = pattern == PATTERNS[1] and layout == NHWC
    assert bool(ways) is not is_reordered  # owners in another order than their vectors
    exact = run("reference", torch.float64, given, dy, running, pattern, act, adds, training)
    for got, wanted in zip(mine, exact, strict=True):
        off = (got - wanted).abs() > TOLERANCES[dtype] * (1 + wanted.abs().max())
        assert int(off.sum()) <= off.numel() // 50  # a value at a kink may take the other side
    moved = not torch.equal(mine[-1], running["running_var"].double())
    assert moved is training


KEPT = {
    "runs of 49": ((3, 3, 7, 7), NCHW, 3 * 19),  # 147 bits of each owner, in whole bytes
    "runs of 6": ((4, 3, 2, 3), NCHW, 3 * 3),
    "runs of 4": ((5, 3, 2, 2), NCHW, 3 * 3),
    "runs of 64": ((4, 3, 8, 8), NCHW, 3 * 32),
    "runs of 2": ((2, 3, 1, 2), NCHW, 3),
    "8 channels": ((3, 8, 3, 5), NHWC, 45),
    "40 channels": ((2, 40, 2, 3), NHWC, 60),
    "128 channels": ((2, 128, 1, 5), NHWC, 160),
    "9 channels": ((3, 9, 3, 5), NHWC, 90),
    "3 channels": ((3, 3, 3, 5), NHWC, 45),
    "one channel": ((3, 1, 3, 5), NHWC, 6),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("shape", "layout", "size"), KEPT.values(), ids=KEPT)
def test_behind_a_sum_a_bit_for_each_value_is_kept(shape, layout, size, way, divided) -> None:
    """In place of the residual, whose decisions it has."""
    divided(way)
    for place, (act, training) in enumerate(itertools.product(ACTS[1:4], [True, False])):
        given, dy, running = tensors(shape, layout, F32, PATTERNS[0], seed=place)
        residual = given[3]
        with torch.no_grad():
            residual.mul_(4)  # so that bits and signs of x have little in common
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: None):
            normalize(given[0], PATTERNS[0], residual=residual, activation=act, backend="triton")
        assert [(t.dtype, t.numel()) for t in kept if t is not given[0]] == [(torch.uint8, size)]
        found = [
            run(name, dtype, given, dy, running, PATTERNS[0], act, True, training)
            for name, dtype in (("triton", F32), ("reference", torch.float64))
        ]
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-4)


def test_running_statistics_that_are_used_may_move_before_backward(ways) -> None:
    given, dy, running = tensors((4, 3, 4, 4), NCHW, F32, PATTERNS[0])
    x, weight, bias, _ = given
    options = {"weight": weight, "bias": bias, "training": False}
    y = normalize(x, PATTERNS[0], **options, **running, backend="triton")
    (wanted,) = torch.autograd.grad(
        normalize(x, PATTERNS[0], **options, **running, backend="reference"), x, dy
    )
    running["running_var"].fill_(100.0)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], wanted, rtol=1e-5, atol=1e-5)
    assert len(ways) == 1


@pytest.mark.parametrize("act", ACTS)
def test_a_second_derivative_is_the_ops(act, ways) -> None:
    given, dy, _ = tensors((4, 3, 4, 4), NCHW, F32, PATTERNS[0])
    x, weight, bias, residual = given
    found = []
    for name in ("triton", "reference"):
        options = {"weight": weight, "bias": bias, "residual": residual, "activation": act}
        y = normalize(x, PATTERNS[0], **options, backend=name)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), (x, weight)))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert len(ways) == 1


@pytest.mark.parametrize("layout", [NCHW, NHWC])
@pytest.mark.parametrize("act", ["relu", ("leaky_relu", 0.3), "relu6", "silu"])
def test_the_op_keeps_bits_too(act, layout, ways) -> None:
    """In a compiled graph, of sizes that are known and of such that are not; twice derived too."""
    given, dy, _ = tensors((4, 9, 3, 4), layout, F32, PATTERNS[0])
    has_bits = act != "silu"

    def step(x, weight, bias, residual, backend="triton"):
        options = {"weight": weight, "bias": bias, "residual": residual}
        return normalize(x, PATTERNS[0], **options, activation=act, backend=backend)

    wanted = torch.autograd.grad(step(*given, backend="reference"), given, dy)
    for dynamic in (False, True):
        torch._dynamo.reset()
        kept = []
        keep = partial(lambda kept, t: kept.append(t) or t, kept)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)(*given)
        assert any(t.dtype == torch.uint8 for t in kept) is has_bits
        assert any(t.data_ptr() == given[3].data_ptr() for t in kept) is not has_bits
        for got, right in zip(torch.autograd.grad(y, given, dy), wanted, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
    assert not ways
    name, slope = act if isinstance(act, tuple) else (act, 0.0)
    x, weight, bias, residual = given
    arguments = (x, weight, bias, residual, None, None, [1], 1e-5, name, slope, "triton")
    torch.library.opcheck(norm_op, arguments)
    second = []
    for backend in ("triton", "reference"):
        y = norm_op(*arguments[:-1], backend)[0]
        first = torch.autograd.grad(y, given, dy, create_graph=True)
        second.append(torch.autograd.grad(sum(t.square().sum() for t in first), (x, weight)))
    for got, right in zip(*second, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_gradients_of_some_alone(ways) -> None:
    given, dy, _ = tensors((4, 3, 4, 4), NCHW, F32, PATTERNS[0])
    x, weight, bias, residual = given
    for sources in ((weight,), (residual,), (x, bias)):
        for t in given:
            t.requires_grad_(any(t is source for source in sources))
        found = []
        for name in ("triton", "reference"):
            options = {"weight": weight, "bias": bias, "residual": residual}
            y = normalize(x, PATTERNS[0], **options, backend=name)
            found.append(torch.autograd.grad(y, sources, dy))
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert len(ways) == 3


NOT_TAKEN = {
    "gaps": lambda x, o: (x[:, :, ::2], o),
    "a momentum that is a tensor": lambda x, o: (x, o | {"momentum": torch.tensor(0.5).double()}),
    "weights in half precision": lambda x, o: (
        x,
        o | {"weight": torch.ones(3).half(), "bias": torch.zeros(3).half()},
    ),
    "over x": lambda x, o: (x.clone(), o | {"inplace": True}),
    "another layout of the residual": lambda x, o: (
        x,
        o | {"residual": x.contiguous(memory_format=NHWC)},
    ),
}


@pytest.mark.parametrize("change", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_what_it_does_not_take_goes_by_the_op(change, ways) -> None:
    found = []
    for name in ("triton", "reference"):
        x = torch.randn(4, 3, 6, 4, generator=torch.Generator().manual_seed(0))
        running = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
        x, options = change(x, running)
        with torch.no_grad():
            y = normalize(x, PATTERNS[0], **options, backend=name)
        found.append((y, *running.values()))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert not ways


def test_wrong_shapes_are_told_of_before_anything_changes(ways) -> None:
    x, mean = torch.randn(4, 3, 6, 4), torch.zeros(3)
    with pytest.raises(ShapeError, match=r"weight of 'n c h w -> c' must have shape \(3,\)"):
        normalize(
            *(x, PATTERNS[0]),
            weight=torch.ones(4),
            running_mean=mean,
            running_var=torch.ones(3),
            backend="triton",
        )
    running = {"running_mean": mean, "running_var": torch.ones(3)}
    with pytest.raises(ShapeError, match="one value"):
        normalize(torch.randn(1, 3, 1, 1), PATTERNS[0], **running, backend="triton")
    assert not ways
    assert torch.equal(mean, torch.zeros(3))
