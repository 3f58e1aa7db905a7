"""`Norm` and `PerActivationBatchNorm`: any pattern as a module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from evenkeel.errors import PatternError, ShapeError
from evenkeel.functional import normalize
from evenkeel.nn import Norm, PerActivationBatchNorm

SHAPE = (5, 6, 3, 4)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def batch(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1


MODULES = {
    "spatial": (Norm, ("n c ... -> c",), {"c": 6}),
    "no affine": (Norm, ("n c ... -> c", None), {"c": 6, "eps": 0.01}),
    "per location": (Norm, ("n c h w -> h w",), {"h": 3, "w": 4, "momentum": None}),
    "affine of channels": (Norm, ("n c h w -> h w", "c"), {"h": 3, "w": 4, "c": 6}),
    "no memory": (Norm, ("n c h w -> c",), {"c": 6, "track_running_stats": False}),
    "all in one": (Norm, ("n c h w ->",), {}),
    "scalar affine": (Norm, ("n c h w -> c", ""), {"c": 6}),
    "layer": (Norm, ("n c h w -> n", "c h w"), {"c": 6, "h": 3, "w": 4}),
    "layer, scalar affine": (Norm, ("n c h w -> n",), {}),
    "instance": (Norm, ("n c ... -> n c",), {"c": 6}),
    "group": (Norm, ("n (g c) h w -> n g", "(g c)"), {"g": 2, "c": 3}),
    "group, plain": (Norm, ("n (g c) h w -> n g", None), {"g": 3}),
    "batch norm of groups": (Norm, ("n (g c) h w -> g",), {"g": 3}),
    "merged owners": (Norm, ("n (g c) h w -> (g c) h",), {"g": 3, "c": 2, "h": 3}),
    "size of an averaged axis": (Norm, ("n c h w -> c",), {"c": 6, "w": 4}),
    "per activation": (PerActivationBatchNorm, ((6, 3, 4),), {}),
    "per activation, options": (
        *(PerActivationBatchNorm, ((6, 3, 4),)),
        {"eps": 0.1, "momentum": None, "affine": False, "track_running_stats": True},
    ),
}


def build(name: str) -> nn.Module:
    kind, args, options = MODULES[name]
    module = kind(*args, **options).double()
    for i, parameter in enumerate(module.parameters()):
        size = parameter.numel()
        parameter.data = torch.linspace(0.5, 2 + i, size).double().reshape(parameter.shape)
    return module


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    now = module.state_dict()
    return list(now) == list(before) and all(torch.equal(now[k], before[k]) for k in before)


@pytest.mark.parametrize("name", MODULES)
def test_it_is_the_function_with_a_memory(name: str) -> None:
    """Three batches of training and one of inference, by hand."""
    module = build(name)
    spec = module.spec
    shape = spec.bind(SHAPE, module.sizes).stat_shape
    mean, var = torch.zeros(shape).double(), torch.ones(shape).double()
    remembers = spec.averages_batch and module.track_running_stats
    assert ("running_mean" in module.state_dict()) is remembers
    options = {"weight": module.weight, "bias": module.bias, "eps": module.eps}
    options |= {"sizes": module.sizes}
    for step in range(3):
        momentum = 1 / (step + 1) if module.momentum is None else module.momentum
        memory = {"running_mean": mean, "running_var": var, "momentum": momentum}
        wanted = normalize(batch(step), spec, **options, **(memory if remembers else {}))
        assert torch.equal(module(batch(step)), wanted)
    if remembers:
        torch.testing.assert_close(module.running_mean, mean, **EXACT)
        torch.testing.assert_close(module.running_var, var, **EXACT)
        assert int(module.num_batches_tracked) == 3
    before = bits(module.eval())
    y = module(batch(3))
    if remembers:
        memory = {"running_mean": mean, "running_var": var}
        wanted = normalize(batch(3), spec, training=False, **options, **memory)
    else:
        wanted = normalize(batch(3), spec, **options)
    torch.testing.assert_close(y, wanted, **EXACT)
    assert unchanged(module, before)


@pytest.mark.parametrize("name", MODULES)
def test_copies_are_equal_and_apart(name: str) -> None:
    module = build(name)
    module(batch())
    names = {"Norm": Norm, "PerActivationBatchNorm": PerActivationBatchNorm}
    rebuilt = eval(repr(module), names).double()
    assert rebuilt.spec == module.spec
    rebuilt.load_state_dict(module.state_dict(), strict=True)
    before = bits(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), rebuilt):
        assert type(other) is type(module)
        assert repr(other) == repr(module)
        assert unchanged(other, before)
        assert torch.equal(other(batch(1)), copy.deepcopy(module)(batch(1)))
        assert unchanged(module, before)


def test_repr_is_short_and_complete() -> None:
    assert repr(build("spatial")) == "Norm('n c ... -> c', c=6, eps=1e-05, momentum=0.1)"
    assert repr(build("layer, scalar affine")) == "Norm('n c h w -> n', eps=1e-05)"
    assert repr(build("no affine")) == (
        "Norm('n c ... -> c', affine=None, c=6, eps=0.01, momentum=0.1)"
    )
    assert repr(build("no memory")) == (
        "Norm('n c h w -> c', c=6, eps=1e-05, momentum=0.1, track_running_stats=False)"
    )
    assert repr(build("per activation, options")) == (
        "PerActivationBatchNorm((6, 3, 4), eps=0.1, momentum=None, affine=False)"
    )


def trained(mine: nn.Module, theirs: nn.Module, shape: tuple[int, ...]) -> None:
    """Both through two batches and an inference: outputs and gradients agree."""
    for step, training in enumerate([True, True, False]):
        results = []
        for module in (mine.train(training), theirs.train(training)):
            x = batch(step, shape).requires_grad_()
            y = module(x)
            y.pow(3).sum().backward()
            results.append([y.detach(), x.grad, *(p.grad.flatten() for p in module.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_spatial_pattern_is_torchs_batch_norm(momentum: float | None) -> None:
    mine = Norm("n c ... -> c", c=6, momentum=momentum).double()
    theirs = nn.BatchNorm2d(6, momentum=momentum).double()
    trained(mine, theirs, SHAPE)
    fresh = nn.BatchNorm2d(6).double()
    fresh.load_state_dict(mine.state_dict(), strict=True)
    again = Norm("n c ... -> c", c=6).double()
    again.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(again.eval()(batch()), fresh.eval()(batch()), **EXACT)


def test_per_activation_is_torchs_batch_norm_of_the_flattened() -> None:
    class Flattened(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1)).reshape(x.shape)

    mine, theirs = PerActivationBatchNorm((6, 3, 4)).double(), Flattened(72).double()
    trained(mine, theirs, SHAPE)
    for name, value in mine.state_dict().items():
        torch.testing.assert_close(value.flatten(), theirs.state_dict()[name].flatten(), **EXACT)


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 3, 4), (6, 2, 3, 4)], ids=str)
def test_per_activation_of_every_rank(shape: tuple[int, ...]) -> None:
    module = PerActivationBatchNorm(shape).double()
    assert module.weight is not None
    assert module.weight.shape == shape
    x = batch(0, (7, *shape))
    wanted = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(module(x), wanted, **EXACT)
    assert PerActivationBatchNorm(6).shape == PerActivationBatchNorm((6,)).shape


def test_layer_group_and_instance_are_torchs() -> None:
    layer = Norm("n c h w -> n", affine="c h w", c=6, h=3, w=4).double()
    trained(layer, nn.LayerNorm((6, 3, 4)).double(), SHAPE)
    group = Norm("n (g c) h w -> n g", affine="(g c)", g=2, c=3).double()
    trained(group, nn.GroupNorm(2, 6).double(), SHAPE)
    group.load_state_dict(nn.GroupNorm(2, 6).state_dict(), strict=True)
    instance = Norm("n c ... -> n c", c=6).double()
    trained(instance, nn.InstanceNorm2d(6, affine=True).double(), SHAPE)


def test_reset_forgets_and_starts_again() -> None:
    module = build("spatial")
    module(batch())
    module.reset_running_stats()
    assert not module.running_mean.any()
    assert bool((module.running_var == 1).all())
    assert int(module.num_batches_tracked) == 0
    assert float(module.weight.detach().min()) == 0.5
    module.reset_parameters()
    assert bool((module.weight == 1).all())
    assert not module.bias.any()
    for name in ("layer", "no memory", "no affine", "group, plain"):
        build(name).reset_parameters()


def test_dtype_and_device_go_to_every_tensor() -> None:
    module = Norm("n c ... -> c", c=6, dtype=torch.float64, device="meta")
    for name, value in module.state_dict().items():
        assert value.device.type == "meta", name
        assert value.dtype == (torch.long if name == "num_batches_tracked" else torch.float64)
    module = PerActivationBatchNorm((6, 3), dtype=torch.float16, device="meta")
    assert module.running_var.dtype == torch.float16
    assert module.bias.device.type == "meta"


REFUSED = {
    "not a norm": (("n c",), {}, PatternError, "has no '->'"),
    "no size": (("n c ... -> c",), {}, PatternError, r"needs the size of c; pass c=\.\.\."),
    "no sizes": (
        *(("n c h w -> c h w",), {"h": 3}, PatternError),
        r"'n c h w -> c h w' needs the size of c, w; pass c=\.\.\., w=\.\.\.",
    ),
    "affine size": (("n (g c) h w -> n g", "(g c)"), {"g": 2}, PatternError, "the size of c;"),
    "another axis": (("n c ... -> c",), {"c": 3, "d": 4}, PatternError, "has no axis 'd'"),
    "ellipsis": (("n ... -> ...",), {}, PatternError, r"over '\.\.\.', whose sizes cannot be giv"),
    "affine of the batch": (("n c -> c", "n"), {"c": 3}, PatternError, "has the batch axis 'n'"),
}


@pytest.mark.parametrize(("args", "options", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_constructions(args: tuple, options: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        Norm(*args, **options)


@pytest.mark.parametrize("shape", [(), (1, 2, 3, 4, 5)], ids=str)
def test_per_activation_takes_one_to_four_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"with 1 to 4 axes but got \(.*; use Norm with a pattern"):
        PerActivationBatchNorm(shape)


@pytest.mark.parametrize(
    ("name", "x", "words"),
    [
        (
            "per activation",
            batch(0, (5, 6, 4, 4)),
            r"was built for h=3 but got \(5, 6, 4, 4\); a n",
        ),
        ("per activation", batch(0, (1, 6, 3, 4)), "averages over n=1: one value per owner"),
        ("spatial", batch(0, (5, 7, 3)), r"was built for c=6 but got \(5, 7, 3\)"),
        ("no affine", batch(0, (5, 7, 3)), r"was built for c=6 but got \(5, 7, 3\)"),
        ("group", batch(0, (5, 8, 3, 4)), r"g=2, c=3 but got .*: 8 does not split into \(g c\)"),
        ("size of an averaged axis", batch(0, (5, 6, 3, 3)), "was built for w=4"),
        ("instance", batch(0, (5, 6, 1, 1)), "one value per owner"),
    ],
)
def test_a_refused_batch_changes_nothing(name: str, x: Tensor, words: str) -> None:
    module = build(name)
    module(batch())
    before = bits(module)
    with pytest.raises(ShapeError, match=words):
        module(x)
    assert unchanged(module, before)


def test_a_batch_norm_of_one_sample_infers() -> None:
    """The count matters in training only."""
    module = build("per activation")
    module(batch())
    assert module.eval()(batch(1, (1, 6, 3, 4))).shape == (1, 6, 3, 4)


def test_the_comparison_can_fail() -> None:
    with pytest.raises(AssertionError):
        trained(Norm("n c ... -> c", c=6, eps=1e-3).double(), nn.BatchNorm2d(6).double(), SHAPE)
