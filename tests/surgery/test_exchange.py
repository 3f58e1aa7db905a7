"""`exchange`: another class, the same numbers, and every reason to leave a norm as it is."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import evenkeel
from evenkeel.errors import SurgeryError
from evenkeel.surgery.exchange import exchange
from evenkeel.surgery.exchanging.kinds import WAS_KIND, base_of
from evenkeel.surgery.freeze import is_frozen

from .cnns import ZOO, images
from .cnns import built as cnn
from .nets import randomized, state

SHAPES = {1: (6, 3, 9), 2: (6, 3, 7, 6), 3: (6, 3, 4, 5, 4)}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TORCHS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
OURS = {1: evenkeel.BatchNorm1d, 2: evenkeel.BatchNorm2d, 3: evenkeel.BatchNorm3d}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-3},
]


def net(dims: int = 2, kind: Any = None, **settings: Any) -> nn.Module:
    """Convolutions with two norms, one of them with all the settings."""
    torch.manual_seed(0)
    kind = kind or TORCHS[dims]
    conv = CONVS[dims]
    layers = [conv(3, 6, 2), kind(6, **settings), nn.ReLU(), conv(6, 4, 2), kind(4), nn.Tanh()]
    return randomized(nn.Sequential(*layers))


def batch(dims: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(SHAPES[dims], generator=torch.Generator().manual_seed(seed)) + 1


def deep(dims: int = 2) -> nn.Module:
    """A norm behind a dense layer too."""
    torch.manual_seed(0)
    body = [*net(dims), nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5)]
    model = nn.Sequential(*body)
    model(batch(dims))
    return randomized(model)


def inference(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


class WithReLU(nn.BatchNorm2d):
    """A user's norm with an activation, as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class AnyRank(nn.modules.batchnorm._BatchNorm):
    """What mmengine and Lightning make of a SyncBatchNorm."""

    def _check_input_dim(self, input: Tensor) -> None:
        return


class Lenient(nn.BatchNorm2d):
    """A user's norm for images and for sequences."""

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() in (3, 4)


class Renamed(nn.BatchNorm2d):
    """A user's norm with a constructor of its own and nothing else."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)
        self.label = "mine"


class FrozenBatchNorm2d(nn.Module):
    """As torchvision and detectron2 write it."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        generator = torch.Generator().manual_seed(0)
        for name in ("weight", "bias", "running_mean"):
            self.register_buffer(name, torch.randn(channels, generator=generator))
        self.register_buffer("running_var", torch.rand(channels, generator=generator) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        shape = (1, -1, 1, 1)
        return x * scale.reshape(shape) + shift.reshape(shape)


class NotQuiteFrozen(FrozenBatchNorm2d):
    """Looks the same and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
class TestRoundTrips:
    @pytest.mark.parametrize("start", [TORCHS, OURS], ids=["torch", "evenkeel"])
    def test_sync_and_back(self, dims, settings, start):
        model = net(dims, start[dims], **settings)
        synced, there = exchange(model, "sync", example=batch(dims))
        assert types(synced).count(nn.SyncBatchNorm) == 2
        same_state(synced, model)
        back, again = exchange(synced, "batch", example=batch(dims))
        assert types(back) == types(model)
        same_state(back, model)
        for module, other in zip(model.modules(), back.modules(), strict=True):
            plain = [vars(m).keys() for m in (module, other)]
            assert plain[0] == plain[1]
        for name in ("eps", "momentum", "affine", "track_running_stats", "num_features"):
            assert getattr(back[1], name) == getattr(synced[1], name) == getattr(model[1], name)
        for report in (there, again):
            assert (report.same, report.left) == (True, ())
            assert report.difference <= 1e-6 * report.scale

    def test_evenkeel_and_back(self, dims, settings):
        model = net(dims, **settings).train()
        ours, report = exchange(model, "evenkeel", example=batch(dims))
        assert types(ours).count(OURS[dims]) == 2
        same_state(ours, model)
        assert report.difference <= 1e-6 * report.scale
        back, _ = exchange(ours, "torch", example=batch(dims))
        assert types(back) == types(model)
        outputs = [m.train()(batch(dims)) for m in (model, ours, back)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(outputs[2], outputs[0])

    def test_sync_trains_as_batch_does(self, dims, settings):
        model = net(dims, **settings).train()
        synced, _ = exchange(model, "sync")
        assert torch.equal(synced(batch(dims)), model(batch(dims)))
        same_state(synced, model)

    def test_built_in_one_go_it_is_the_same(self, dims, settings):
        """What is exchanged has every attribute that the class's constructor sets."""
        for to, kind in (("sync", nn.SyncBatchNorm), ("evenkeel", OURS[dims])):
            new, _ = exchange(net(dims, **settings), to)
            built = vars(kind(6, **settings))
            assert {k for k in vars(new[1]) if k != WAS_KIND} == set(built)
            assert list(new[1]._buffers) == list(built["_buffers"])


class TestTheRightClass:
    def stranger(self, dims: int) -> nn.Module:
        """SyncBatchNorm that never was anything else."""
        model = net(dims, nn.SyncBatchNorm)
        return nn.Sequential(nn.Sequential(*model[:3]), nn.Sequential(*model[3:]))

    @pytest.mark.parametrize("dims", [1, 2, 3])
    @pytest.mark.parametrize("to", ["torch", "batch"])
    def test_by_the_layers_around(self, dims, to):
        back, report = exchange(self.stranger(dims), to)
        assert types(back).count(TORCHS[dims]) == 2
        assert report.difference is None
        assert "not compared" in str(report)

    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_by_the_example(self, dims):
        model = nn.Sequential(randomized(nn.SyncBatchNorm(3)), nn.Flatten())
        back, _ = exchange(model, "evenkeel", example=batch(dims))
        assert type(back[0]) is OURS[dims]

    def test_of_two_axes(self):
        back, _ = exchange(nn.Sequential(nn.SyncBatchNorm(3)), "torch", example=torch.randn(4, 3))
        assert type(back[0]) is nn.BatchNorm1d
        behind = nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.Dropout(), nn.SyncBatchNorm(3))
        assert type(exchange(behind, "torch")[0][3]) is nn.BatchNorm1d

    def test_by_pools_other_norms_and_functions(self):
        class Block(nn.Module):
            def __init__(self, after: nn.Module) -> None:
                super().__init__()
                self.norm, self.after = nn.SyncBatchNorm(4), after

            def forward(self, x: Tensor) -> Tensor:
                return self.after(F.relu(self.norm(x)))

        for after, kind in [
            (nn.MaxPool3d(2), nn.BatchNorm3d),
            (nn.BatchNorm2d(4), nn.BatchNorm2d),
            (nn.ConvTranspose1d(4, 2, 3), nn.BatchNorm1d),
            (evenkeel.BatchNorm3d(4), nn.BatchNorm3d),
        ]:
            back, _ = exchange(Block(after), "torch", where="norm")
            assert type(back.norm) is kind

    @pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Upsample(scale_factor=2), nn.Flatten()])
    def test_never_guessed(self, layer):
        model = nn.Sequential(nn.SyncBatchNorm(4), layer)
        before = state(model)
        message = "'0': the rank of its input is not known: .* give an example that reaches it"
        with pytest.raises(SurgeryError, match=message):
            exchange(model, "torch", inplace=True)
        assert state(model) == before

    def test_never_guessed_where_layers_disagree(self):
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.SyncBatchNorm(3)
                self.a, self.b = nn.Conv1d(3, 3, 1), nn.Conv2d(3, 3, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.a(self.norm(x)) + self.b(self.norm(x))

        with pytest.raises(SurgeryError, match="layers around it take inputs of different ranks"):
            exchange(Odd(), "torch")

    def test_two_ranks_in_one_example(self):
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.SyncBatchNorm(3)

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(x).sum((2, 3)) + self.norm(x.sum((2, 3)))

        with pytest.raises(SurgeryError, match="brings it inputs of 2 and 4 dimensions"):
            exchange(Both(), "torch", example=batch())
        with pytest.raises(SurgeryError, match="torch has no batch norm for inputs of 6 dim"):
            exchange(nn.SyncBatchNorm(3), "torch", example=torch.rand(2, 3, 1, 1, 2, 2))

    def test_a_class_of_any_rank(self):
        model = nn.Sequential(nn.Conv3d(3, 4, 2), randomized(AnyRank(4)))
        back, report = exchange(model, "torch", example=batch(3))
        assert type(back[1]) is nn.BatchNorm3d
        assert report.exchanged == (("1", "AnyRank", "torch.nn.BatchNorm3d"),)
        synced, _ = exchange(model, "sync")
        assert type(exchange(synced, "batch")[0][1]) is AnyRank

    def test_a_class_that_takes_more_ranks_than_it_says(self):
        model = nn.Sequential(randomized(Lenient(3)))
        for dims in (1, 2):
            assert type(exchange(model, "evenkeel", example=batch(dims))[0][0]) is OURS[dims]
        with pytest.raises(SurgeryError, match="the rank of its input is not known"):
            exchange(model, "torch")
        back, _ = exchange(exchange(model, "sync")[0], "batch")
        assert type(back[0]) is Lenient

    def test_patterns_say_it_themselves(self):
        pairs = [
            (evenkeel.Norm("n c -> c", c=4), nn.BatchNorm1d),
            (evenkeel.PerActivationBatchNorm(4), nn.BatchNorm1d),
            (evenkeel.Norm("b ch y x -> ch", ch=4), nn.BatchNorm2d),
            (evenkeel.Norm("n c d h w -> c", c=4, affine=None), nn.BatchNorm3d),
        ]
        for norm, kind in pairs:
            back, _ = exchange(randomized(norm), "torch")
            assert type(back) is kind
            assert (back.num_features, back.affine) == (4, norm.weight is not None)
            same_state(back, norm)
            synced, _ = exchange(norm, "sync")
            again, _ = exchange(synced, "batch")
            assert (type(again), repr(again)) == (type(norm), repr(norm))

    def test_settings_changed_meanwhile_stay_changed(self):
        synced, _ = exchange(evenkeel.Norm("n c h w -> c", c=4), "sync")
        synced.momentum, synced.eps = 0.5, 1e-2
        back, _ = exchange(pickle.loads(pickle.dumps(copy.deepcopy(synced))), "batch")
        assert repr(back) == "Norm('n c h w -> c', c=4, eps=0.01, momentum=0.5)"


@pytest.mark.parametrize("name", ZOO)
class TestWholeNetworks:
    def test_there_and_back(self, name):
        model = randomized(cnn(name))
        count = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        for to in ("sync", "frozen", "evenkeel"):
            new, report = exchange(model, to, example=images())
            assert len(report.exchanged) == count
            assert report.difference <= 1e-6 * report.scale
            back, _ = exchange(new, "torch", example=images())
            assert types(back) == types(model)
            same_state(back, model)

    def test_never_the_wrong_class(self, name):
        """What is forgotten is found by the layers around, or left; the example finds all."""
        model = cnn(name)
        synced, _ = exchange(model, "sync")
        for module in synced.modules():
            vars(module).pop(WAS_KIND, None)
        back, report = exchange(synced, "torch", example=images())
        assert (types(back), report.left) == (types(model), ())
        try:
            back, report = exchange(synced, "torch")
        except SurgeryError:  # not one is known
            assert name == "densenet"
            return
        for kind, right in zip(types(back), types(model), strict=True):
            assert kind in (right, nn.SyncBatchNorm)
        assert types(back).count(nn.SyncBatchNorm) == len(report.left)
        assert len(report.left) <= 2

    def test_per_activation(self, name):
        model = randomized(cnn(name))
        text = "n c d h w -> c d h w" if name == "volumes" else "n c h w -> c h w"
        _, report = exchange(model, text, example=images())
        assert report.same
        assert report.difference <= 1e-6 * report.scale
        assert len(report.left) == (name in ("vgg", "volumes"))


class TestFrozen:
    def test_there_and_back(self):
        model = deep().train()
        frozen, report = exchange(model, "frozen", example=batch())
        assert [is_frozen(frozen[i]) for i in (1, 4, 8)] == [True] * 3
        assert report.exchanged[2] == ("8", "torch.nn.BatchNorm1d", "frozen torch.nn.BatchNorm1d")
        for to in ("batch", "torch"):
            back, _ = exchange(frozen, to, example=batch())
            assert types(back) == types(model)
            same_state(back, model)
            assert all(module.training for module in back.modules())

    def test_a_frozen_subclass_comes_back_as_itself(self):
        frozen, _ = exchange(nn.Sequential(randomized(WithReLU(3))), "frozen", example=batch())
        assert type(exchange(frozen, "batch", example=batch())[0][0]) is WithReLU
        with pytest.raises(SurgeryError, match="'0': it is a WithReLU, which may do more"):
            exchange(frozen, "torch")

    def test_frozen_sync_and_frozen_ours(self):
        synced, _ = exchange(net(), "sync")
        frozen, _ = exchange(synced, "frozen")
        assert types(exchange(frozen, "batch")[0]) == types(net())
        ours, _ = exchange(exchange(net(), "evenkeel")[0], "frozen")
        assert types(exchange(ours, "torch")[0]) == types(net())
        assert type(exchange(ours, "batch")[0][1]) is evenkeel.BatchNorm2d

    @pytest.mark.parametrize("to", ["sync", "evenkeel", "group", "n c ... -> c"])
    def test_nothing_thaws_unasked(self, to):
        for model in (exchange(net(), "frozen")[0], nn.Sequential(FrozenBatchNorm2d(3))):
            with pytest.raises(SurgeryError, match="it is frozen; exchange it for 'batch' first"):
                exchange(model, to)

    def test_those_of_other_libraries(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 2), FrozenBatchNorm2d(4, eps=1e-3))
        frozen, report = exchange(model, "frozen", example=batch())
        assert report.exchanged == (("1", "FrozenBatchNorm2d", "frozen torch.nn.BatchNorm2d"),)
        assert report.difference <= 1e-6 * report.scale
        assert (frozen[1].eps, frozen[1].weight.requires_grad) == (1e-3, False)
        frozen.load_state_dict(model.state_dict(), strict=False)
        frozen.train()(batch())
        assert frozen[1].num_batches_tracked == 0
        evenkeel.unfreeze(frozen)
        assert all(p.requires_grad for p in frozen.parameters())
        back, _ = exchange(model, "batch", example=batch())
        assert type(back[1]) is nn.BatchNorm2d
        assert back[1].weight.requires_grad
        torch.testing.assert_close(inference(back, batch()), inference(model, batch()))

    def test_what_only_looks_like_one(self):
        with pytest.raises(SurgeryError, match="NotQuiteFrozen, which computes something else"):
            exchange(nn.Sequential(NotQuiteFrozen(3)), "frozen")


class TestWhatIsLeft:
    def test_a_subclass_that_does_more(self):
        """Torch's own conversion drops the activation and says nothing."""
        model = nn.Sequential(WithReLU(3), nn.BatchNorm2d(3)).eval()
        dropped = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
        assert not torch.equal(dropped(batch()), model(batch()))
        for to in ("sync", "evenkeel", "torch", "group", "n c h w -> c"):
            new, report = exchange(model, to, example=batch())
            reason = "it is a WithReLU, which may do more than torch.nn.BatchNorm2d"
            assert ("0", reason) in report.left
            assert type(new[0]) is WithReLU
            with pytest.raises(SurgeryError, match=f"'0': {reason}"):
                exchange(model, to, where="0", example=batch())

    def test_an_activation_of_ours(self):
        norm = evenkeel.BatchNorm2d(3)
        norm.activation = "relu"
        with pytest.raises(SurgeryError, match="it also does 'relu', which would be lost"):
            exchange(nn.Sequential(norm), "sync")

    def test_what_is_more_than_a_norm(self):
        replaced, holding, pruned = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        replaced.forward = lambda x: x
        holding.drop = nn.Dropout()
        prune.l1_unstructured(pruned, "weight", 1)
        parametrized = nn.BatchNorm1d(3)
        nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
        norms = [replaced, holding, pruned, parametrized, nn.LazyBatchNorm1d(), nn.BatchNorm1d(3)]
        _, report = exchange(nn.Sequential(*norms), "sync", inplace=True)
        assert dict(report.left) == {
            "0": "its forward was replaced on the object",
            "1": "it also holds 'drop', which would be lost",
            "2": "it also holds 'weight_mask', which would be lost",
            "3": "it has parametrizations, which are a class of their own",
            "4": "it has not seen an input yet; run the network once",
        }
        _, report = exchange(nn.Sequential(parametrized, nn.BatchNorm1d(3)), "frozen")
        assert [path for path, _ in report.left] == ["0"]

    def test_what_is_so_already(self):
        for to, kind in (
            ("torch", nn.BatchNorm2d),
            ("batch", nn.BatchNorm2d),
            ("sync", nn.SyncBatchNorm),
            ("evenkeel", evenkeel.BatchNorm2d),
        ):
            new, report = exchange(net(2, kind), to)
            assert report.exchanged == ()
            assert all("already" in reason for _, reason in report.left)
            assert str(report).startswith(f"0 norms exchanged for '{to}', 2 left as they are\n")
            assert types(new) == types(net(2, kind))
        frozen, _ = exchange(net(), "frozen")
        assert exchange(frozen, "frozen")[1].left[0] == ("1", "it is frozen already")

    def test_a_subclass_with_nothing_new(self):
        assert base_of(Renamed) is nn.BatchNorm2d
        model = nn.Sequential(randomized(Renamed(3)))
        synced, _ = exchange(model, "sync", example=batch())
        back, _ = exchange(synced, "batch", example=batch())
        assert (type(back[0]), back[0].label, back[0].eps) == (Renamed, "mine", 1e-3)
        assert type(exchange(synced, "torch")[0][0]) is nn.BatchNorm2d
        assert type(exchange(model, "torch")[0][0]) is nn.BatchNorm2d

    def test_norms_of_other_owners(self):
        model = nn.Sequential(evenkeel.PerActivationBatchNorm((3, 7, 6)))
        message = "it is evenkeel.PerActivationBatchNorm, whose numbers are not per channel"
        for to in ("torch", "sync", "group", "n c h w -> c"):
            with pytest.raises(SurgeryError, match=message):
                exchange(model, to, example=batch())
        frozen, _ = exchange(model, "frozen")
        with pytest.raises(SurgeryError, match="whose numbers are not per channel"):
            exchange(frozen, "torch")
        assert exchange(model, "evenkeel")[1].exchanged == ()
