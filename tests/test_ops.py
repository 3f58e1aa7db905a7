"""The two registered ops: their schemas, fake kernels, derivatives and compilation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from evenkeel.functional import batch_norm, normalize
from evenkeel.nn import BatchNorm2d
from evenkeel.ops import norm_backward, norm_op

EPS = 1e-5
CONFIGS = {
    # what -> (dims kept, weight, bias, residual, from the batch, activation, slope)
    "plain": ([1], False, False, False, True, "none", 0.0),
    "affine": ([1], True, True, False, True, "none", 0.0),
    "inference": ([1], True, True, False, False, "none", 0.0),
    "weight alone, relu": ([1], True, False, False, True, "relu", 0.0),
    "bias alone, relu6": ([1], False, True, False, True, "relu6", 0.0),
    "residual": ([1], True, True, True, True, "none", 0.0),
    "residual, leaky relu": ([1], True, True, True, True, "leaky_relu", 0.1),
    "residual, silu, inference": ([1], True, True, True, False, "silu", 0.0),
    "per activation": ([1, 2, 3], True, True, False, True, "silu", 0.0),
    "per location": ([2, 3], True, True, False, True, "none", 0.0),
    "instance": ([0, 1], True, True, False, True, "relu", 0.0),
    "six numbers": ([1, 3], True, True, True, True, "relu", 0.0),
    "everything in one": ([], True, True, False, True, "none", 0.0),
}


def forward_args(config: tuple, dtype: torch.dtype = torch.float64, grad: bool = True) -> list:
    """Arguments of `norm_op` for a (3, 4, 2, 5) input."""
    kept, has_weight, has_bias, has_residual, from_batch, activation, slope = config
    generator = torch.Generator().manual_seed(3)
    shape = (3, 4, 2, 5)
    owners = [shape[d] for d in kept]

    def draw(size: list[int] | tuple[int, ...], needed: bool = True) -> Tensor | None:
        if not needed:
            return None
        t = torch.randn(size, generator=generator, dtype=torch.float64)
        return t.to(dtype).requires_grad_(grad)

    stats = [torch.randn(owners, generator=generator), torch.rand(owners, generator=generator) + 1]
    return [
        draw(shape),
        draw(owners, has_weight),
        draw(owners, has_bias),
        draw(shape, has_residual),
        *([None, None] if from_batch else [s.double() for s in stats]),
        *(kept, EPS, activation, slope, "reference"),
    ]


def backward_args(config: tuple, dtype: torch.dtype = torch.float64, grad: bool = True) -> list:
    x, weight, bias, residual, mean, var, *rest = forward_args(config, dtype, grad)
    from_batch = mean is None
    if from_batch:
        _, mean, var, _ = norm_op(x.detach(), None, None, None, None, None, *rest)
    dy = torch.randn_like(x).requires_grad_(grad)
    return [dy, x, weight, bias, residual, None, mean, var, from_batch, *rest]


def differentiable(op: Callable, args: list) -> tuple[Callable, list[Tensor]]:
    """The op as a function of those arguments that need a gradient."""
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(args)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        out = op(*filled)
        return tuple(t for t in out if t.requires_grad)

    return call, [args[i] for i in places]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_opcheck_forward(config: tuple) -> None:
    torch.library.opcheck(norm_op, tuple(forward_args(config, torch.float32)))
    torch.library.opcheck(norm_op, tuple(forward_args(config, torch.bfloat16, grad=False)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_opcheck_backward(config: tuple) -> None:
    torch.library.opcheck(norm_backward, tuple(backward_args(config)))
    torch.library.opcheck(norm_backward, tuple(backward_args(config, torch.bfloat16, grad=False)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradcheck(config: tuple) -> None:
    call, tensors = differentiable(norm_op, forward_args(config))
    assert torch.autograd.gradcheck(call, tensors, fast_mode=False)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradgradcheck(config: tuple) -> None:
    call, tensors = differentiable(norm_op, forward_args(config))
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


def test_statistics_taken_for_constants_fail_gradcheck() -> None:
    """The classic mistake, so that the check is known to see it."""
    *tensors, _, _, _ = forward_args(CONFIGS["affine"])[:6]
    rest = forward_args(CONFIGS["affine"])[6:]

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean = x.detach().mean((0, 2, 3))
        var = x.detach().var((0, 2, 3), unbiased=False)
        return norm_op(x, weight, bias, None, mean, var, *rest)[0]

    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(forward, tensors)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Spatial batch norm in torch's elementary operations."""
    centred = x - x.mean((0, 2, 3), keepdim=True)
    var = centred.square().mean((0, 2, 3), keepdim=True)
    return centred / (var + EPS).sqrt() * weight[:, None, None]


@pytest.mark.parametrize("weight_needs_grad", [True, False])
def test_derivatives_up_to_the_third(weight_needs_grad: bool) -> None:
    """Each derivative of a cube, taken of the derivative before: dy depends on x here."""
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, dtype=torch.float64, requires_grad=weight_needs_grad)
    sources = [x, weight] if weight_needs_grad else [x]
    results = []
    for forward in (plain_norm, lambda x, weight: batch_norm(x, weight, training=True)):
        value, found = forward(x, weight).pow(3).sum(), []
        for _ in range(3):
            gradients = torch.autograd.grad(value, sources, create_graph=True)
            found += [g.detach() for g in gradients]
            value = sum(g.square().sum() for g in gradients)
        results.append(found)
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_second_derivative_by_a_weight_alone() -> None:
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    weight = torch.rand(2, dtype=torch.float64, requires_grad=True)
    found = []
    for forward in (plain_norm, lambda x, weight: batch_norm(x, weight, training=True)):
        (g,) = torch.autograd.grad(forward(x, weight).pow(3).sum(), weight, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), weight, create_graph=True)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "residual"])
def test_gradients_of_one_input_alone(needed: str) -> None:
    args = forward_args(CONFIGS["residual, leaky relu"])
    place = ["x", "weight", "bias", "residual"].index(needed)
    full = torch.autograd.grad(norm_op(*args)[0].square().sum(), args[:4])
    args[:4] = [a.detach().requires_grad_(i == place) for i, a in enumerate(args[:4])]
    (alone,) = torch.autograd.grad(norm_op(*args)[0].square().sum(), args[place])
    assert torch.equal(alone, full[place])


def test_statistics_are_the_batchs_and_have_no_gradient() -> None:
    args = forward_args(CONFIGS["per location"])
    _, mean, var, _ = norm_op(*args)
    x = args[0].detach()
    torch.testing.assert_close(mean, x.mean((0, 1)), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(var, x.var((0, 1), unbiased=False), rtol=1e-13, atol=0)
    assert not mean.requires_grad
    assert not var.requires_grad
    _, mean, var, _ = norm_op(*forward_args(CONFIGS["inference"]))
    assert mean.numel() == var.numel() == 0


def compiled(function: Callable, **options: object) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_compile_in_one_graph(training: bool, dynamic: bool) -> None:
    """fullgraph=True raises on any graph break."""

    def step(x: Tensor, w: Tensor, b: Tensor, rm: Tensor, rv: Tensor) -> Tensor:
        y = batch_norm(
            *(x, w, b, rm, rv),
            training=training,
            activation="relu",
            residual=x,
        )
        return y * 2

    fast = compiled(step, dynamic=dynamic)
    for shape in [(4, 3, 5, 6), (2, 3, 7, 5)]:
        outcomes = []
        for function in (step, fast):
            tensors = [torch.linspace(-1, 3, 3 * k + 3)[-3:] for k in range(1, 5)]
            x = torch.linspace(-2, 2, shape[0] * shape[1] * shape[2] * shape[3]).reshape(shape)
            leaves = [t.clone().requires_grad_() for t in (x, *tensors[:2])]
            running = [t.clone().abs() for t in tensors[2:]]
            y = function(*leaves, *running)
            y.square().sum().backward()
            outcomes.append([y.detach(), *running, *(leaf.grad for leaf in leaves)])
        for wanted, got in zip(*outcomes, strict=True):
            atol = 1e-6 * float(wanted.abs().max())  # terms of that size cancel in dx
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=atol)


def test_compile_dynamic_does_not_recompile() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    function = torch.compile(
        lambda x: batch_norm(x, training=True), fullgraph=True, dynamic=True, backend=count
    )
    for size in (4, 5, 6, 9):
        function(torch.randn(size, 3, size + 1, 7))
    assert len(graphs) == 1
    assert any(node.target is torch.ops.evenkeel.norm.default for node in graphs[0].graph.nodes)


@pytest.mark.parametrize(
    "pattern", ["n c ... -> c", "n c h w -> c h w", "n (g c) h w -> g", "n (g c) h w -> n g"]
)
def test_compile_of_patterns_as_text(pattern: str) -> None:
    def function(x: Tensor) -> Tensor:
        sizes = {"g": 2} if "g" in pattern else None
        return normalize(x, pattern, affine=None, sizes=sizes, activation="relu")

    x = torch.randn(4, 6, 2, 3)
    torch.testing.assert_close(compiled(function)(x), function(x))
    torch.testing.assert_close(compiled(function, dynamic=True)(x), function(x))


def test_compile_of_a_model_keeps_its_memory() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4), nn.ReLU(), BatchNorm2d(4))

    eager, other = build(), build()
    fast = compiled(other)
    for _ in range(3):
        x = torch.randn(4, 3, 6, 6)
        torch.testing.assert_close(fast(x), eager(x))
    for (name, wanted), got in zip(
        eager.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(got, wanted, msg=name)
    assert int(other[1].num_batches_tracked) == 3


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor_runs_it_too() -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 3, 5, 6, requires_grad=True)
    function = torch.compile(lambda x: batch_norm(x * 2, training=True).relu(), fullgraph=True)
    y = function(x)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    (wanted,) = torch.autograd.grad(batch_norm(x * 2, training=True).relu().square().sum(), x)
    torch.testing.assert_close(got, wanted)
