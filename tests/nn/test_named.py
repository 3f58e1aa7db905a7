"""`BatchNorm1d/2d/3d`: torch's classes in every respect but the arithmetic."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn

import evenkeel.nn as ours
from evenkeel.errors import ShapeError, SurgeryError

PAIRS = {
    1: (ours.BatchNorm1d, nn.BatchNorm1d, (5, 3, 4)),
    2: (ours.BatchNorm2d, nn.BatchNorm2d, (5, 3, 4, 2)),
    3: (ours.BatchNorm3d, nn.BatchNorm3d, (5, 3, 2, 2, 3)),
}
BIAS = [{"bias": True}, {"bias": False}]
if "bias" not in inspect.signature(nn.BatchNorm2d).parameters:  # in torch 2.11 it is not
    BIAS = [{}]
OPTIONS = [
    {"eps": eps, "momentum": momentum, "affine": affine, "track_running_stats": track, **bias}
    for (eps, momentum), affine, track, bias in itertools.product(
        [(1e-5, 0.1), (1e-2, None), (1e-3, 0.7)], [True, False], [True, False], BIAS
    )
]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def batch(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1


def pair(rank: int, options: dict) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's with the same, uneven weights."""
    mine, theirs, _ = PAIRS[rank]
    modules = mine(3, **options).double(), theirs(3, **options).double()
    for module in modules:
        for i, parameter in enumerate(module.parameters()):
            parameter.data = torch.linspace(0.5, 2 + i, 3).double()
    return modules


def same_state(a: nn.Module, b: nn.Module) -> None:
    states = a.state_dict(), b.state_dict()
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert value.dtype == states[1][name].dtype
        torch.testing.assert_close(value, states[1][name], **EXACT, msg=name)


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(map(str, o.values())))
@pytest.mark.parametrize("rank", PAIRS)
def test_a_life_of_training_and_inference(rank: int, options: dict) -> None:
    """Train, infer, train on, freeze in the middle: outputs, gradients and memory agree."""
    shape = PAIRS[rank][2]
    modules = pair(rank, options)
    for step, training in enumerate([True, True, False, True, False, True]):
        results = []
        for module in modules:
            module.train(training)
            x = batch(shape, step).requires_grad_()
            y = module(x)
            y.pow(2).sum().backward()
            results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
        same_state(*modules)


@pytest.mark.parametrize("rank", PAIRS)
def test_it_is_torchs_class(rank: int) -> None:
    mine, theirs, _ = PAIRS[rank]
    module = mine(3)
    assert isinstance(module, theirs)
    assert mine.__init__ is theirs.__init__
    assert [n for n, _ in module.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("options", OPTIONS[:8], ids=lambda o: " ".join(map(str, o.values())))
@pytest.mark.parametrize("rank", PAIRS)
def test_state_dicts_go_both_ways(rank: int, options: dict) -> None:
    mine, theirs = pair(rank, options)
    x = batch(PAIRS[rank][2], 0)
    for source, target in ((mine, theirs), (theirs, mine)):
        source(x)
        target.load_state_dict(source.state_dict(), strict=True)
        same_state(source, target)
        torch.testing.assert_close(source.eval()(x), target.eval()(x), **EXACT)
        source.train()
        target.train()


def test_old_state_dicts_without_a_count_still_load() -> None:
    old = nn.BatchNorm2d(3).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1  # as torch wrote them before 0.4.1
    module = ours.BatchNorm2d(3)
    module.load_state_dict(old, strict=True)
    assert int(module.num_batches_tracked) == 0


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[5], OPTIONS[10], OPTIONS[-1]], ids=str)
@pytest.mark.parametrize("rank", PAIRS)
def test_copies_are_equal_and_apart(rank: int, options: dict) -> None:
    module, _ = pair(rank, options)
    x = batch(PAIRS[rank][2], 0)
    module(x)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    rebuilt = eval(repr(module), {type(module).__name__: type(module)}).double()
    rebuilt.load_state_dict(module.state_dict())
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
        rebuilt,
    ]
    before = bits(module)
    for other in copies:
        assert type(other) is type(module)
        assert repr(other) == repr(module)
        same_state(other, module)
        other(x * 2)  # trains the copy
        assert all(torch.equal(value, before[name]) for name, value in bits(module).items())


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    ("leaky_relu", 0.3): nn.LeakyReLU(0.3),
    "silu": nn.SiLU(),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=str)
@pytest.mark.parametrize("added", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("rank", PAIRS)
def test_activation_and_residual(rank: int, added: bool, activation, training: bool) -> None:
    mine, theirs = (m.train(training) for m in pair(rank, OPTIONS[0]))
    mine.activation = activation
    act = ACTIVATIONS.get(activation, nn.Identity())
    given = [batch(PAIRS[rank][2], seed).requires_grad_() for seed in range(2)]
    y = mine(*given[: 1 + added])
    z = theirs(given[0])
    wanted = act(z + given[1] if added else z)
    torch.testing.assert_close(y, wanted, **EXACT)
    sources = given[: 1 + added]
    for got, exact in zip(
        torch.autograd.grad(y.square().sum(), [*sources, *mine.parameters()]),
        torch.autograd.grad(wanted.square().sum(), [*sources, *theirs.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)
    same_state(mine, theirs)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=str)
@pytest.mark.parametrize(
    "residual",
    [torch.ones(3, 1, 1), torch.ones(5, 3, 4, 2), torch.ones(2, 5, 3, 4, 2), torch.tensor(1.0)],
    ids=["broadcast", "other dtype", "larger", "scalar"],
)
def test_a_residual_that_converts_is_added_as_torch_adds(residual: Tensor, activation) -> None:
    mine, theirs = pair(2, OPTIONS[0])
    mine.activation = activation
    x = batch(PAIRS[2][2], 0)
    wanted = ACTIVATIONS.get(activation, nn.Identity())(theirs(x) + residual)
    torch.testing.assert_close(mine(x, residual), wanted, **EXACT)
    same_state(mine, theirs)


def test_the_activation_is_a_setting_that_is_shown_and_copied() -> None:
    plain, module = ours.BatchNorm2d(3), ours.BatchNorm2d(3)
    assert plain.activation is None
    module.activation = ("leaky_relu", 0.2)
    assert repr(module) == repr(plain)[:-1] + ", activation=('leaky_relu', 0.2))"
    assert list(module.state_dict()) == list(plain.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.activation == ("leaky_relu", 0.2)


def test_an_activation_is_not_lost_in_conversion() -> None:
    model = nn.Sequential(ours.BatchNorm2d(3))
    model[0].activation = "relu"
    with pytest.raises(SurgeryError, match=r"BatchNorm2d that also does 'relu' cannot be convert"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model[0].qconfig = "asked for"
    assert model[0].qconfig == copy.deepcopy(model)[0].qconfig == "asked for"
    del model[0].qconfig
    model[0].activation = None
    assert not hasattr(model[0], "qconfig")
    with pytest.raises(KeyError):
        del model[0].qconfig


def test_sync_batch_norm_conversion_accepts_it() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), ours.BatchNorm2d(3, eps=0.01, momentum=None))
    model(torch.randn(2, 1, 4, 4))
    before = bits(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[1]) is nn.SyncBatchNorm
    assert converted[1].eps == 0.01
    assert converted[1].momentum is None
    assert all(torch.equal(value, before[name]) for name, value in bits(converted).items())


REFUSED = {
    "one value per channel": (2, torch.ones(1, 3, 1, 1), ShapeError, "one value per owner"),
    "one value per channel, dense": (1, torch.ones(1, 3), ShapeError, "averages over n=1: one val"),
    "other channels": (2, torch.ones(4, 5, 2, 2), ShapeError, r"weight of .* must have shape \(5,"),
    "rank 3 for 2d": (2, torch.ones(4, 3, 2), ValueError, "expected 4D input"),
    "rank 4 for 1d": (1, torch.ones(4, 3, 2, 2), ValueError, "expected 2D or 3D input"),
    "rank 4 for 3d": (3, torch.ones(4, 3, 2, 2), ValueError, "expected 5D input"),
    "integers": (
        2,
        torch.ones(4, 3, 2, 2).int(),
        ShapeError,
        "a floating tensor but got torch.int",
    ),
}


@pytest.mark.parametrize(("rank", "x", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_a_refused_batch_changes_nothing(rank: int, x: Tensor, error: type, words: str) -> None:
    """Not even the count of batches, which torch has already raised when it refuses."""
    for momentum in (0.1, None):
        module = PAIRS[rank][0](3, momentum=momentum)
        module(batch(PAIRS[rank][2], 0).float())
        before = bits(module)
        with pytest.raises(error, match=words):
            module(x)
        for name, value in bits(module).items():
            assert torch.equal(value, before[name]), name
        assert int(module.num_batches_tracked) == 1


def test_the_count_of_a_refused_batch_is_where_we_differ() -> None:
    theirs = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        theirs(torch.ones(1, 3, 1, 1))
    assert int(theirs.num_batches_tracked) == 1


def test_momentum_none_is_the_plain_average() -> None:
    module = ours.BatchNorm1d(3, momentum=None).double()
    batches = [batch((5, 3), seed) for seed in range(4)]
    for x in batches:
        module(x)
    torch.testing.assert_close(
        module.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0), **EXACT
    )
    torch.testing.assert_close(
        module.running_var, torch.stack([x.var(0) for x in batches]).mean(0), **EXACT
    )


def changed(module: nn.Module, change: str) -> nn.Module:
    """What people do to a batch norm after it is built."""
    if change == "no count":
        module.num_batches_tracked = None
    elif change == "no count, no momentum":
        module.num_batches_tracked, module.momentum = None, None
    elif change == "no buffers":
        module.running_mean = module.running_var = None
    elif change == "tracking switched off":
        module.track_running_stats = False
    elif change == "momentum of zero":
        module.momentum = 0.0
    elif change == "frozen weights":
        module.requires_grad_(False)
    elif change == "weight removed":
        module.weight = None
    return module


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    "change",
    [
        *("no count", "no count, no momentum", "no buffers", "tracking switched off"),
        *("momentum of zero", "frozen weights", "weight removed"),
    ],
)
def test_changed_modules_agree_too(change: str, training: bool) -> None:
    modules = [changed(m, change).train(training) for m in pair(2, OPTIONS[0])]
    for step in range(2):
        x = batch(PAIRS[2][2], step)
        torch.testing.assert_close(modules[0](x), modules[1](x), **EXACT)
        same_state(*modules)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_modules_and_half_inputs(dtype: torch.dtype) -> None:
    x = batch((5, 3, 4, 2), 0).to(dtype)
    for whole in (True, False):
        module = ours.BatchNorm2d(3)
        module = module.to(dtype) if whole else module
        torchs = copy.deepcopy(module)
        torchs.__class__ = nn.BatchNorm2d
        y = module(x)
        assert y.dtype == torchs(x).dtype == dtype
        for name, value in module.state_dict().items():
            assert value.dtype == torchs.state_dict()[name].dtype
        exact = nn.BatchNorm2d(3).double()(x.double())  # torch rounds half statistics as well
        rounding = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=1e-6)


def test_two_batches_may_pass_before_one_backward() -> None:
    """The memory moves in place, and no gradient may depend on it."""
    module = ours.BatchNorm2d(3).double()
    x = [batch((5, 3, 4, 2), seed).requires_grad_() for seed in range(2)]
    alone = [torch.autograd.grad(module(t).pow(3).sum(), t)[0] for t in x]
    both = torch.autograd.grad(sum(module(t).pow(3).sum() for t in x), x)
    for wanted, got in zip(alone, both, strict=True):
        assert torch.equal(got, wanted)


def test_the_comparison_can_fail() -> None:
    mine, theirs = pair(2, OPTIONS[0])
    mine(batch((5, 3, 4, 2), 0))
    with pytest.raises(AssertionError, match="running_mean"):
        same_state(mine, theirs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_relu_behind_the_norm_may_work_in_place(training, layout):
    """The commonest idiom of all."""
    x = torch.randn(4, 3, 5, 5).to(memory_format=layout)
    gradients = []
    for norm in (ours.BatchNorm2d(3), torch.nn.BatchNorm2d(3)):
        leaf = x.clone().requires_grad_()
        y = torch.nn.Sequential(norm, torch.nn.ReLU(inplace=True)).train(training)(leaf)
        y.square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
