"""`freeze`: in training a frozen norm does what torch's does in inference, and goes on doing so."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import evenkeel
from evenkeel.errors import SurgeryError
from evenkeel.surgery import freeze as freezing
from evenkeel.surgery.freeze import FrozenNorm, is_frozen

from .cnns import built as cnn
from .cnns import images
from .nets import randomized, state


class WithReLU(nn.BatchNorm2d):
    """A user's norm that does more than its base, and asks whether it trains."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x)) * (2 if self.training else 1)


class CopiesItself(nn.BatchNorm2d):
    """A user's norm that is copied in a way of its own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesItself:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(vars(self), memo))
        return new


def with_activation() -> nn.Module:
    norm = evenkeel.BatchNorm2d(4)
    norm.activation = "relu"
    return norm


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "torch 1d": (lambda: nn.BatchNorm1d(4), (8, 4)),
    "torch 1d of three axes": (lambda: nn.BatchNorm1d(4, momentum=None), (8, 4, 5)),
    "torch 2d": (lambda: nn.BatchNorm2d(4), (8, 4, 5, 5)),
    "torch 3d": (lambda: nn.BatchNorm3d(4, affine=False), (8, 4, 2, 3, 3)),
    "sync": (lambda: nn.SyncBatchNorm(4), (8, 4, 5, 5)),
    "ours 1d": (lambda: evenkeel.BatchNorm1d(4), (8, 4)),
    "ours 2d": (lambda: evenkeel.BatchNorm2d(4, momentum=None), (8, 4, 5, 5)),
    "ours 3d": (lambda: evenkeel.BatchNorm3d(4), (8, 4, 2, 3, 3)),
    "ours with activation": (with_activation, (8, 4, 5, 5)),
    "per activation": (lambda: evenkeel.PerActivationBatchNorm((4, 5, 5)), (8, 4, 5, 5)),
    "pattern": (lambda: evenkeel.Norm("n c h w -> h w", h=5, w=5), (8, 4, 5, 5)),
    "subclass": (lambda: WithReLU(4), (8, 4, 5, 5)),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A frozen norm in training, its twin in inference, and an input."""
    make, shape = NORMS[name]
    twin = randomized(nn.Sequential(make())).eval()
    frozen = copy.deepcopy(twin)
    evenkeel.freeze(frozen)
    return frozen.train(), twin, torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 1


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, the gradients of input, gamma and beta, and the memory behind."""
    x = x.clone().requires_grad_()
    y = model(x)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad((y * y.detach().cos()).sum(), leaves)
    return [y.detach(), *gradients, *model.buffers()]


def same(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    for mine, other in zip(run(a, x), run(b, x), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", NORMS)
class TestEachKind:
    def test_trains_as_inference_runs(self, name):
        frozen, twin, x = pair(name)
        before = [t.clone() for t in frozen.buffers()]
        same(frozen, twin, x)
        for buffer, value in zip(frozen.buffers(), before, strict=True):
            assert torch.equal(buffer, value)
        assert isinstance(frozen[0], type(twin[0]))
        assert type(frozen[0]).__name__ == type(twin[0]).__name__

    def test_lasts(self, name):
        frozen, twin, x = pair(name)
        frozen.eval().train()
        frozen.train(False).train(True)
        frozen.apply(lambda module: module.train())
        frozen[0].training = True
        frozen.requires_grad_(True)
        assert (frozen.training, frozen[0].training) == (True, False)
        same(frozen, twin, x)

    def test_is_copied_and_pickled(self, name):
        frozen, twin, x = pair(name)
        saved = io.BytesIO()
        torch.save(frozen, saved)
        saved.seek(0)
        copies = [
            copy.copy(frozen),
            copy.deepcopy(frozen),
            torch.load(saved, weights_only=False),
            *[pickle.loads(pickle.dumps(frozen, protocol)) for protocol in (0, 2, 5)],
            copy.deepcopy(pickle.loads(pickle.dumps(frozen))),
        ]
        for other in copies:
            assert type(other[0]) is type(frozen[0])
            same(other.train(), twin, x)
        evenkeel.unfreeze(copies[1])
        assert type(copies[1][0]) is type(twin[0])
        assert copies[1][0].training

    def test_state_dicts_go_both_ways(self, name):
        frozen, twin, x = pair(name)
        assert list(frozen.state_dict()) == list(twin.state_dict())
        fresh = nn.Sequential(NORMS[name][0]()).eval()
        evenkeel.freeze(other := copy.deepcopy(fresh))
        other.load_state_dict(frozen.state_dict(), strict=True)
        fresh.load_state_dict(frozen.state_dict(), strict=True)
        same(other.train(), fresh, x)
        same(fresh, twin, x)

    def test_says_so(self, name):
        frozen, twin, _ = pair(name)
        assert repr(frozen).count("frozen") == 1
        text = repr(frozen[0]).replace(", frozen", "")
        assert text == repr(twin[0])

    def test_thaws_exactly(self, name):
        model = randomized(nn.Sequential(NORMS[name][0]()))
        if model[0].weight is not None:
            model[0].bias.requires_grad_(False)
        for mode in (True, False):
            model.train(mode)
            before = state(model)
            evenkeel.freeze(model, affine=True)
            assert not any(p.requires_grad for p in model.parameters())
            assert "frozen with gamma and beta" in repr(model)
            report = evenkeel.unfreeze(model)
            assert report.norms == ("0",)
            assert state(model) == before
            if model[0].weight is not None:
                assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (True, False)
            assert not [key for key in vars(model[0]) if "freez" in key]

    def test_learns_again_when_thawed(self, name):
        frozen, twin, x = pair(name)
        frozen.eval()
        evenkeel.unfreeze(frozen)
        assert not frozen[0].training  # eval() was the last word
        same(frozen.train(), twin.train(), x)
        assert frozen[0].num_batches_tracked == 1


class TestWholeNetworks:
    def test_beside_norms_that_train(self):
        model = cnn("resnet").train()
        names = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
        report = evenkeel.freeze(model, names[0])
        assert (report.action, report.norms, report.left) == ("frozen", (names[0],), ())
        model(images())
        counts = {name: int(model.get_submodule(name).num_batches_tracked) for name in names}
        assert counts == {name: int(name != names[0]) for name in names}

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiled_in_one_graph(self, backend):
        torch._dynamo.reset()
        frozen, twin, x = pair("torch 2d")
        compiled = torch.compile(frozen, backend=backend, fullgraph=True)
        same(compiled, twin, x)
        compiled.eval().train()
        same(compiled, twin, x)
        evenkeel.unfreeze(compiled)
        compiled(x)
        assert frozen[0].num_batches_tracked == 1
        evenkeel.freeze(compiled)
        compiled(x)
        assert frozen[0].num_batches_tracked == 1

    @pytest.mark.parametrize("strict", [True, False])
    def test_exported_in_training_as_in_inference(self, strict):
        frozen, twin, x = pair("torch 2d")
        program = torch.export.export(frozen, (x,), strict=strict)
        assert torch.equal(program.module()(x), twin(x))
        assert torch.equal(frozen[0].running_mean, twin[0].running_mean)

    def test_update_bn_passes_over_it(self):
        """Torch resets every norm and then fills those that train."""
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
        randomized(model)
        before = [t.clone() for t in model[0].buffers()]
        evenkeel.freeze(model, "0")
        update_bn(torch.randn(4, 8, 3), model)
        for buffer, value in zip(model[0].buffers(), before, strict=True):
            assert torch.equal(buffer, value)
        assert model[1].num_batches_tracked == 4

    def test_a_new_norm_of_its_class_is_not_frozen(self):
        norm = nn.BatchNorm2d(4)
        evenkeel.freeze(norm)
        new = type(norm)(8, momentum=0.3)
        assert type(new) is nn.BatchNorm2d
        assert (new.num_features, new.momentum, new.training) == (8, 0.3, True)

    def test_a_class_that_copies_itself(self):
        norm = randomized(CopiesItself(4))
        evenkeel.freeze(norm)
        other = copy.deepcopy(norm).train()
        assert is_frozen(other)
        assert not other.training
        assert torch.equal(other.running_mean, norm.running_mean)

    def test_torch_cannot_put_another_norm_in_its_place(self):
        model = nn.Sequential(nn.BatchNorm2d(4))
        evenkeel.freeze(model)
        message = "a frozen BatchNorm2d cannot be converted, .* use evenkeel.unfreeze, convert"
        with pytest.raises(SurgeryError, match=message):
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model[0].qconfig = None
        assert model[0].qconfig is None
        del model[0].qconfig
        evenkeel.unfreeze(model)
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        evenkeel.freeze(synced)
        assert isinstance(synced[0], FrozenNorm)

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_no_script_that_would_train(self):
        frozen, _, _ = pair("torch 2d")
        with pytest.raises(SurgeryError, match="a frozen BatchNorm2d cannot be converted"):
            torch.jit.script(frozen)

    def test_frozen_twice_is_frozen_once(self):
        model = nn.Sequential(nn.BatchNorm2d(4))
        evenkeel.freeze(model)
        kind = type(model[0])
        evenkeel.freeze(model, affine=True)
        evenkeel.freeze(model, affine=True)
        assert type(model[0]) is kind
        assert repr(model).count("frozen") == 1
        assert not model[0].weight.requires_grad
        evenkeel.unfreeze(model)
        assert type(model[0]) is nn.BatchNorm2d
        assert model[0].weight.requires_grad
        assert evenkeel.unfreeze(model).norms == ()


class TestOtherSurgery:
    def net(self) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)]
        return randomized(nn.Sequential(*layers, nn.BatchNorm2d(4), nn.ReLU()))

    def x(self) -> Tensor:
        return torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))

    def test_accelerate_leaves_it_and_says_so(self):
        model = self.net()
        evenkeel.freeze(model, "1")
        quick, report = evenkeel.accelerate(model, self.x())
        assert report.swapped == (("4", "BatchNorm2d with relu"),)
        assert report.left == (("1", "it is frozen; unfreeze it, accelerate, freeze it again"),)
        quick.train()(self.x())
        assert torch.equal(quick[1].running_mean, model[1].running_mean)
        assert not torch.equal(quick[4].running_mean, model[4].running_mean)
        back = evenkeel.restore(quick)
        assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]

    def test_an_accelerated_norm_is_frozen_with_its_activation(self):
        model = self.net().eval()
        quick, _ = evenkeel.accelerate(model)
        evenkeel.freeze(quick)
        assert quick[1].activation == "relu"
        torch.testing.assert_close(quick.train()(self.x()), model(self.x()))
        with pytest.raises(SurgeryError, match="accelerated already"):
            evenkeel.accelerate(quick)

    @pytest.mark.parametrize("first", ["restore", "unfreeze"])
    def test_undone_in_any_order(self, first):
        model = self.net()
        before = [type(m) for m in model.modules()]
        quick, _ = evenkeel.accelerate(model)
        evenkeel.freeze(quick, affine=True)
        if first == "restore":
            quick = evenkeel.restore(quick)
            assert is_frozen(quick[1])
            assert isinstance(quick[1], nn.BatchNorm2d)
            assert not isinstance(quick[1], evenkeel.BatchNorm2d)
            torch.testing.assert_close(quick.train()(self.x()), model.eval()(self.x()))
            evenkeel.unfreeze(quick)
        else:
            evenkeel.unfreeze(quick)
            quick = evenkeel.restore(quick)
        assert [type(m) for m in quick.modules()] == before
        assert all(p.requires_grad for p in quick.parameters())

    def test_folded_like_any_other(self):
        model = self.net()
        evenkeel.freeze(model)
        folded, report = evenkeel.fold(model, self.x())
        assert [one.norm for one in report.folded] == ["1", "4"]
        torch.testing.assert_close(folded(self.x()), model(self.x()), rtol=1e-4, atol=1e-5)
        assert is_frozen(model[1])


class TestMistakes:
    def test_norms_that_cannot_be_frozen_are_named(self):
        parametrized = nn.BatchNorm1d(3)
        nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
        off = nn.BatchNorm1d(3, track_running_stats=False)
        model = nn.Sequential(nn.BatchNorm1d(3), off, parametrized, nn.LazyBatchNorm1d())
        report = evenkeel.freeze(model)
        assert str(report) == (
            "1 norms frozen, 3 left as they are\n"
            "  0\n"
            "  1 stays: it has no running statistics, and uses those of each batch\n"
            "  3 stays: it has not seen an input yet; run the network once\n"
            "  2 stays: it has parametrizations, which are a class of their own"
        )
        plain = json.loads(json.dumps(report.to_dict()))
        assert (plain["action"], plain["norms"], plain["affine"]) == ("frozen", ["0"], False)
        assert "gamma and beta too" in str(evenkeel.freeze(model, affine=True))

    @pytest.mark.parametrize(
        ("model", "where", "message"),
        [
            (nn.Linear(3, 3), None, "Linear has no batch norm to freeze"),
            (nn.BatchNorm1d(3, track_running_stats=False), None,
             "BatchNorm1d has no batch norm to freeze; 'BatchNorm1d': it has no running statistic"),
            (nn.Sequential(nn.BatchNorm1d(3)), "1", "'1' is no module of it"),
            (nn.Sequential(nn.BatchNorm1d(3)), lambda path, norm: False, "no batch norm to freeze"),
        ],
    )  # fmt: skip
    def test_nothing_to_freeze(self, model, where, message):
        before = state(model)
        with pytest.raises(SurgeryError, match=message):
            evenkeel.freeze(model, where)
        assert state(model) == before

    def test_nothing_of_that_name_to_thaw(self):
        with pytest.raises(SurgeryError, match="'bn' is no module of it"):
            evenkeel.unfreeze(nn.Sequential(nn.BatchNorm1d(3)), "bn")

    @pytest.mark.parametrize("affine", [False, True])
    def test_all_or_nothing(self, monkeypatch, affine):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm1d(3))
        evenkeel.freeze(model, "0")
        before, flags = state(model), [p.requires_grad for p in model.parameters()]
        make = freezing._class_of

        def fails(kind: type[nn.Module]) -> type[nn.Module]:
            return int if kind is nn.BatchNorm1d else make(kind)

        monkeypatch.setattr(freezing, "_class_of", fails)
        message = "'2' cannot be frozen, for the class of a BatchNorm1d cannot be changed"
        with pytest.raises(SurgeryError, match=message):
            evenkeel.freeze(model, affine=affine)
        assert state(model) == before
        assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (None, ("stem.1", "body.1", "body.3")),
        ("body", ("body.1", "body.3")),
        ("body.1", ("body.1",)),
        (["stem", "body.3"], ("stem.1", "body.3")),
        (lambda path, norm: norm.num_features == 5, ("body.1", "body.3")),
        ("again", ("stem.1",)),
    ],
)
def test_which_norms(where, names):
    model = nn.Module()
    model.stem = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.body = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.BatchNorm1d(5)
    )
    model.body_too = nn.BatchNorm1d(9, track_running_stats=False)
    model.again = model.stem[1]  # one norm at two places
    assert evenkeel.freeze(model, where).norms == names
    frozen = tuple(name for name, module in model.named_modules() if is_frozen(module))
    assert frozen == names
    assert evenkeel.unfreeze(model, where).norms == names
