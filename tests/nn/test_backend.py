"""The setting ``backend`` of a norm: who computes it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import evenkeel.nn as ours
from evenkeel.errors import BackendError, ConfigError
from evenkeel.kernels import select
from evenkeel.kernels.reference import Reference

X = torch.linspace(-3, 5, 4 * 3 * 2 * 2).reshape(4, 3, 2, 2)
NORMS = {
    "BatchNorm1d": (lambda: ours.BatchNorm1d(3), X[..., 0]),
    "BatchNorm2d": (lambda: ours.BatchNorm2d(3), X),
    "BatchNorm3d": (lambda: ours.BatchNorm3d(3), X[..., None]),
    "Norm": (lambda: ours.Norm("n c h w -> h w", h=2, w=2), X),
    "Norm like layer norm": (lambda: ours.Norm("n c h w -> n", "c h w", c=3, h=2, w=2), X),
    "PerActivationBatchNorm": (lambda: ours.PerActivationBatchNorm((3, 2, 2)), X),
}


class Spy(Reference):
    """Counts what it computes; forward in training ends in `apply` too."""

    calls = 0

    def apply(self, *given, **named):
        Spy.calls += 1
        return super().apply(*given, **named)


@pytest.fixture(autouse=True)
def spy(monkeypatch):
    """A backend that is asked for by name."""
    monkeypatch.setitem(select._PLACES, "spy", f"{__name__}:Spy")
    monkeypatch.setattr(Spy, "calls", 0)
    yield
    select.load.cache_clear()


@pytest.fixture(params=NORMS)
def normed(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    build, x = NORMS[request.param]
    return build(), x


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_the_backend_that_is_set_computes(normed, training):
    module, x = normed
    module.train(training)
    wanted = copy.deepcopy(module)(x)
    assert (module.backend, Spy.calls) == ("auto", 0)
    module.backend = "spy"
    torch.testing.assert_close(module(x), wanted)
    assert Spy.calls >= 1


RESIDUALS = {"alike": X, "wider": X.double(), "smaller": torch.ones(3, 1, 1)}


@pytest.mark.parametrize("residual", RESIDUALS.values(), ids=RESIDUALS)
def test_with_a_residual_of_any_kind_too(residual):
    module = ours.BatchNorm2d(3)
    module.activation, module.backend = "relu", "spy"
    wanted = torch.relu(nn.BatchNorm2d(3)(X) + residual)
    torch.testing.assert_close(module(X, residual), wanted)
    assert Spy.calls == 1


def test_it_is_a_setting_that_is_shown_and_copied_and_in_no_state_dict(normed):
    module, x = normed
    plain, names = repr(module), list(module.state_dict())
    assert "backend" not in plain
    module.backend = "spy"
    assert repr(module).count(", backend='spy'") == 1
    assert repr(module).replace(", backend='spy'", "") == plain
    assert list(module.state_dict()) == names
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.backend == "spy"
        before = Spy.calls
        other(x)
        assert Spy.calls > before


@pytest.mark.parametrize("name", ["Norm", "PerActivationBatchNorm"])
def test_our_own_constructors_take_it(name):
    module = NORMS[name][0]()
    module.backend = "spy"
    rebuilt = eval(repr(module), vars(ours))
    assert rebuilt.backend == "spy"
    assert repr(rebuilt) == repr(module)
    kind, given = type(module), module.shape if name != "Norm" else "n c h w -> h w"
    sizes = {"h": 2, "w": 2} if name == "Norm" else {}
    with pytest.raises(ConfigError, match=r"unknown backend 'spi' \(did you mean 'spy'\?\); cho"):
        kind(given, backend="spi", **sizes)


def test_an_unknown_name_that_was_set_is_told_at_the_call():
    module = ours.BatchNorm2d(3)
    module.backend = "spi"
    with pytest.raises(BackendError, match="no backend 'spi'; choose 'auto' or one of native"):
        module(X)
    assert int(module.num_batches_tracked) == 0


def test_torch_compile_takes_it_in_one_graph():
    torch._dynamo.reset()
    module = ours.BatchNorm2d(3)
    module.backend = "spy"
    wanted = copy.deepcopy(module)(X)
    assert Spy.calls == 1
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), wanted)
    assert Spy.calls == 2
