"""`recalibrate`: against float64 moments of all that norms were given, and against torch's own."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

import evenkeel
from evenkeel.errors import ConfigError, SurgeryError
from evenkeel.kernels.reference import Reference
from evenkeel.surgery.caring.measuring import corrected
from evenkeel.view import logical_view

from .nets import state

SIZES = (5, 2, 9, 4)


class Twice(nn.Module):
    """A norm called twice in one forward, which torch.fx could not follow either."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > -1e30:
            x = self.norm(x).relu()
        return self.norm(self.conv(x) * 2 + 1)


def images(net: str) -> list[Tensor]:
    shape = {"1d": (3, 11), "3d": (3, 3, 4, 5)}.get(net, (3, 8, 8))
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, *shape, generator=generator) * (1 + i) + i for i, n in enumerate(SIZES)]


def built(net: str) -> nn.Module:
    torch.manual_seed(0)
    if net == "1d":
        layers = [
            nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
            nn.Linear(54, 5), evenkeel.BatchNorm1d(5), nn.Sigmoid(),
            nn.BatchNorm1d(5, affine=False),
        ]  # fmt: skip
    elif net == "3d":
        layers = [nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), nn.ReLU(), evenkeel.BatchNorm3d(4)]
    elif net == "twice":
        layers = [nn.Conv2d(3, 4, 3), Twice(), nn.BatchNorm2d(4)]
    else:
        layers = [
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=None), nn.ReLU(), nn.Dropout2d(0.5),
            nn.Conv2d(6, 4, 3), evenkeel.BatchNorm2d(4), nn.LeakyReLU(),
            evenkeel.PerActivationBatchNorm((4, 4, 4)), nn.Conv2d(4, 4, 1),
            evenkeel.Norm("n c h w -> h w", h=4, w=4), nn.SyncBatchNorm(4), nn.Flatten(),
            nn.Linear(64, 5), evenkeel.Norm("n c -> c", c=5, affine=None), nn.LayerNorm(5),
        ]  # fmt: skip
    return nn.Sequential(*layers)


NETS = ("1d", "2d", "3d", "twice")


def norms_of(model: nn.Module) -> dict[str, Any]:
    kinds = (nn.modules.batchnorm._BatchNorm, evenkeel.Norm)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def seen(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, list[np.ndarray]]:
    """All that every norm is given, in float64, while the model runs as it is."""
    found: dict[str, list[np.ndarray]] = {}
    handles = []
    for name, norm in norms_of(model).items():
        note = found.setdefault(name, []).append
        hook = lambda _, args, note=note: note(args[0].double().numpy().copy())  # noqa: E731
        handles.append(norm.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return found


def moments(values: list[np.ndarray], norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of all values at once, by NumPy."""
    owned = (1,) if not isinstance(norm, evenkeel.Norm) else {
        "n c h w -> c h w": (1, 2, 3), "n c h w -> h w": (2, 3), "n c -> c": (1,)
    }[str(norm.spec)]  # fmt: skip
    everything = np.concatenate(values)
    axes = tuple(axis for axis in range(everything.ndim) if axis not in owned)
    return everything.mean(axes), everything.var(axes, ddof=1)


def as_in_training(model: nn.Module) -> nn.Module:
    """A copy in which norms train and nothing else does, by torch's own means."""
    own = copy.deepcopy(model).eval()
    for norm in norms_of(own).values():
        norm.train()
    return own


def close(norm: Any, values: list[np.ndarray], rtol: float) -> None:
    mean, var = moments(values, norm)
    atol = rtol * float(np.sqrt(var).max())
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=rtol, atol=atol)
    np.testing.assert_allclose(norm.running_var.numpy(), var, rtol=rtol)


def randoms() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()


class TestStatistics:
    @pytest.mark.parametrize("net", NETS)
    @pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
    def test_those_of_all_values_while_batches_normalize_themselves(self, net, dtype, rtol):
        model, data = built(net).to(dtype), [x.to(dtype) for x in images(net)]
        values = seen(as_in_training(model), data)
        report = evenkeel.recalibrate(model, data)
        for name, norm in norms_of(model).items():
            close(norm, values[name], rtol)
            assert int(norm.num_batches_tracked) == len(values[name])
        counts = {
            name: sum(v.size for v in values[name]) // norm.running_mean.numel()
            for name, norm in norms_of(model).items()
        }
        assert {change.norm: change.values for change in report.changes} == counts
        assert (report.batches, report.processes, report.variance) == (4, 1, "unbiased")

    @pytest.mark.parametrize("net", ["1d", "2d", "3d"])
    @pytest.mark.parametrize("of_one", [False, True], ids=["batches", "batches of one"])
    def test_those_that_inference_sees(self, net, of_one):
        """The definition: run in inference, every norm is given what its statistics say."""
        model, data = built(net).double(), [x.double() for x in images(net)]
        data = [one for x in data for one in x.split(1)] if of_one else data
        evenkeel.recalibrate(model, data, propagate="population")
        values = seen(copy.deepcopy(model).eval(), data)
        for name, norm in norms_of(model).items():
            close(norm, values[name], 1e-11)
            assert int(norm.num_batches_tracked) == len(data)

    def test_batches_of_two_show_why_there_are_two_ways(self):
        """A norm that sees two values gives 1 and -1 in training, and not so at inference."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
        data = list((torch.randn(400, 3) ** 3).double().split(2))
        values = seen(as_in_training(model), data)
        evenkeel.recalibrate(model, data)
        close(model[2], values["2"], 1e-11)
        by_batch = model[2].running_var.clone()
        evenkeel.recalibrate(model, data, propagate="population")
        close(model[2], seen(copy.deepcopy(model).eval(), data)["2"], 1e-11)
        assert (by_batch / model[2].running_var - 1).abs().max() > 0.1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_mean_a_hundred_thousand_deviations_away(self, dtype):
        """E[x^2] - E[x]^2 in float32 would be off by thousands of times the variance."""
        data = [x.to(dtype) * 0.01 + 1000 for x in torch.randn(7, 64, 3, generator=seeded())]
        norm = nn.BatchNorm1d(3, dtype=dtype)
        evenkeel.recalibrate(norm, data)
        everything = torch.cat(data).double().numpy()
        np.testing.assert_allclose(norm.running_var.numpy(), everything.var(0, ddof=1), rtol=1e-7)
        np.testing.assert_allclose(norm.running_mean.numpy(), everything.mean(0), rtol=6e-8)

    @pytest.mark.parametrize("layout", ["NCHW", "NHWC", "strided"])
    def test_moments_of_devices_without_wide_sums(self, layout):
        """What runs where the backend's statistics are float32, tried on the CPU."""
        x = torch.randn(6, 5, 4, 4, generator=seeded()) * 0.01 + 1000
        x = {"NCHW": x, "NHWC": x.permute(0, 2, 3, 1), "strided": x}[layout]
        owner = 3 if layout == "NHWC" else 1
        view = logical_view(x.shape, (owner,))
        near = Reference().stats(x, view).mean.float()
        n, mean, m2 = corrected(x, view, near)
        wide = np.moveaxis(x.double().numpy(), owner, 0).reshape(5, -1)
        np.testing.assert_allclose(mean.flatten().numpy(), wide.mean(1), rtol=1e-12)
        np.testing.assert_allclose(m2.flatten().numpy() / n, wide.var(1), rtol=1e-6)

    @pytest.mark.gpu
    @pytest.mark.parametrize("propagate", ["batch", "population"])
    def test_on_a_gpu(self, propagate):
        data = list(torch.randn(7, 64, 3, 4, 4, generator=seeded()) * 0.01 + 1000)
        norm = nn.BatchNorm2d(3).cuda()
        evenkeel.recalibrate(norm, data, propagate=propagate)
        everything = torch.cat(data).double().numpy()
        var = everything.var((0, 2, 3), ddof=1)
        np.testing.assert_allclose(norm.running_var.cpu().numpy(), var, rtol=1e-6)
        mean = norm.running_mean.cpu().numpy()
        np.testing.assert_allclose(mean, everything.mean((0, 2, 3)), rtol=6e-8)

    @given(st.lists(st.integers(1, 20), min_size=1, max_size=12))
    def test_how_the_data_is_cut_does_not_matter(self, sizes):
        x = torch.randn(sum(sizes) + 2, 3, generator=seeded()).double() * 5 + 2
        cut, whole = (nn.BatchNorm1d(3, dtype=torch.float64) for _ in range(2))
        evenkeel.recalibrate(cut, x.split([*sizes, 2]), propagate="population")
        evenkeel.recalibrate(whole, [x])
        torch.testing.assert_close(cut.running_mean, whole.running_mean, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(cut.running_var, whole.running_var, rtol=1e-13, atol=0)

    def test_batches_without_samples_count_for_nothing(self):
        data = [torch.zeros(0, 3), *torch.randn(2, 8, 3, generator=seeded()), torch.zeros(0, 3)]
        norm, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        evenkeel.recalibrate(norm, data)
        evenkeel.recalibrate(other, data[1:3])
        assert torch.equal(norm.running_var, other.running_var)
        assert int(norm.num_batches_tracked) == 2

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        data = [x.to(dtype) for x in torch.randn(5, 64, 3, generator=seeded()) * 2 + 30]
        norm = nn.BatchNorm1d(3, dtype=dtype)
        evenkeel.recalibrate(norm, data)
        everything = torch.cat(data).double()
        assert torch.equal(norm.running_mean, everything.mean(0).to(dtype))
        assert torch.equal(norm.running_var, everything.var(0).to(dtype))

    def test_statistics_that_were_not_finite_are_repaired(self):
        model = built("2d")
        model[1].running_mean.fill_(float("nan"))
        model[1].running_var.fill_(float("inf"))
        values = seen(as_in_training(model), images("2d"))
        report = evenkeel.recalibrate(model, images("2d"))
        close(model[1], values["1"], 1e-5)
        assert (report.changes[0].mean_moved, report.changes[0].variance_times) == (None, None)
        assert "1: 720 values, its statistics were not finite before" in str(report)
        report.undo()
        assert model[1].running_mean.isnan().all()


class TestAgainstTorch:
    @pytest.mark.parametrize("propagate", ["batch", "population"])
    def test_update_bn_on_batches_of_one_size(self, propagate):
        """Means agree. Variances do not: their average forgets how far the means are apart."""
        torch.manual_seed(0)
        layers = [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)).double()
        data = [x.double() + i for i, x in enumerate(torch.randn(6, 8, 3, 8, 8))]
        theirs = copy.deepcopy(model)
        update_bn(data, theirs)
        evenkeel.recalibrate(model, data, propagate=propagate)
        for place in (0, 2, 5) if propagate == "batch" else (0,):
            mine, other = model[place], theirs[place]
            torch.testing.assert_close(
                mine.running_mean, other.running_mean, rtol=1e-11, atol=1e-12
            )
            assert int(mine.num_batches_tracked) == int(other.num_batches_tracked) == 6
        # The law of total variance, for the norm on the data itself.
        m, k = 8 * 8 * 8, 6
        means = torch.stack([x.mean((0, 2, 3)) for x in data])
        total = theirs[0].running_var * k * (m - 1) + m * (k - 1) * means.var(0)
        torch.testing.assert_close(model[0].running_var, total / (k * m - 1), rtol=1e-11, atol=0)

    def test_momentum_none_goes_on_from_there(self):
        """The next batch weighs one part in k + 1."""
        data = list(torch.randn(4, 16, 3, generator=seeded()))
        norm = nn.BatchNorm1d(3, momentum=None)
        evenkeel.recalibrate(norm, data[:3])
        before = norm.running_mean.clone()
        norm.train()(data[3])
        wanted = (3 * before + data[3].mean(0)) / 4
        torch.testing.assert_close(norm.running_mean, wanted)
        assert norm.momentum is None

    def test_averaged_weights(self):
        model = AveragedModel(built("2d"))
        for seed in (1, 2):
            torch.manual_seed(seed)
            model.update_parameters(nn.Sequential(*[copy.deepcopy(m) for m in built("2d")]))
        values = seen(as_in_training(model), images("2d"))
        evenkeel.recalibrate(model, images("2d"))
        close(model.module[1], values["module.1"], 1e-5)

    @pytest.mark.parametrize("how", ["torch.compile", "compile()", "a part"])
    def test_compiled_networks(self, how):
        """What is compiled already would not see hooks."""
        torch._dynamo.reset()
        plain, model = built("2d"), built("2d")
        if how == "torch.compile":
            model = torch.compile(model, backend="eager")
        elif how == "compile()":
            model.compile(backend="eager")
        else:
            model[1] = torch.compile(model[1], backend="eager")
        with torch.no_grad():
            for x in images("2d"):
                model.eval()(x)
        evenkeel.recalibrate(model.train(), images("2d"))
        evenkeel.recalibrate(plain, images("2d"))
        mine = {name.replace("_orig_mod.", ""): v for name, v in model.state_dict().items()}
        for name, value in plain.state_dict().items():
            assert torch.equal(mine[name], value), name

    def test_accelerated_networks(self):
        layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)]
        model = nn.Sequential(*layers, nn.BatchNorm2d(4), nn.ReLU())
        quick, _ = evenkeel.accelerate(model)
        assert quick[1].activation == "relu"
        evenkeel.recalibrate(quick, images("2d"))
        evenkeel.recalibrate(model, images("2d"))
        for mine, other in zip(quick.buffers(), model.buffers(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


class TestBatches:
    def recalibrated(self, data: Any, **how: Any) -> Tensor:
        model = built("2d")
        evenkeel.recalibrate(model, data, **how)
        return model[5].running_mean

    @pytest.mark.parametrize("kind", ["tuples", "lists", "dicts", "dict and label", "generator"])
    def test_what_a_loader_gives(self, kind):
        plain = images("2d")
        labels = torch.zeros(9)
        data = {
            "tuples": [(x, labels) for x in plain],
            "lists": [[x, labels] for x in plain],
            "dicts": [{"input": x} for x in plain],
            "dict and label": [({"input": x}, labels) for x in plain],
            "generator": (x for x in plain),
        }[kind]
        assert torch.equal(self.recalibrated(data), self.recalibrated(plain))

    def test_an_adapter(self):
        data = [{"picture": x.numpy(), "name": "seven"} for x in images("2d")]
        forward = lambda model, batch: model(torch.from_numpy(batch["picture"]))  # noqa: E731
        found = self.recalibrated(data, forward=forward)
        assert torch.equal(found, self.recalibrated(images("2d")))

    @pytest.mark.parametrize("propagate", ["batch", "population"])
    def test_data_loader_and_its_random_numbers(self, propagate):
        """Shuffled from torch's own generator, which goes on as if nothing had been drawn."""
        loader = DataLoader(TensorDataset(torch.cat(images("2d"))), batch_size=6, shuffle=True)
        torch.manual_seed(3)
        before = randoms()
        first = self.recalibrated(loader, propagate=propagate)
        torch.manual_seed(3)
        assert randoms() == before
        assert torch.equal(first, self.recalibrated(loader, propagate=propagate))

    def test_random_numbers_go_on_as_before(self):
        def noisy():
            for x in images("2d"):
                yield x + torch.randn(1) + random.random() + float(np.random.rand())

        model = built("2d")
        before = randoms()
        evenkeel.recalibrate(model, noisy())
        assert randoms() == before

    def test_at_most_so_many(self):
        taken: list[int] = []

        def endless():
            while True:
                taken.append(1)
                yield images("2d")[0]

        report = evenkeel.recalibrate(built("2d"), endless(), steps=3)
        assert (report.batches, len(taken)) == (3, 3)
        assert evenkeel.recalibrate(built("2d"), images("2d"), steps=99).batches == 4

    def test_each_norm_costs_a_pass_and_no_more(self):
        passes, ran = [], []

        class Data:
            def __iter__(self):
                passes.append(1)
                return iter(images("1d"))

        model = built("1d")
        for place in (5, 7, 8):
            model[place].register_forward_hook(lambda *_, place=place: ran.append(place))
        evenkeel.recalibrate(model, Data(), propagate="population")
        assert len(passes) == len(norms_of(model)) == 3
        # The first pass finds the order. The others end at the second norm, 6, and at the third, 8.
        assert [ran.count(place) for place in (5, 7, 8)] == [12, 8, 4]

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([], "the loader gave no batch"),
            ([3], "batch 1 is of type int, which holds no input that Sequential could be called"),
            ([()], "batch 1 is of type tuple"),
            ([{"x": torch.zeros(1)}], "batch 1 is a dict of x, which Sequential does not take .mi"),
            ([torch.zeros(4, 3, 8, 8), torch.full((4, 3, 8, 8), torch.nan)],
             "the input of '1' has a value that is not finite in batch 2"),
            ([torch.full((4, 3, 8, 8), torch.inf)], "'1' has a value that is not finite in batch"),
            ([torch.zeros(4, 3, 8, 8), torch.zeros(1, 3, 8, 8)],
             "'7' gets one value per statistic in batch 2, .*drop_last=True"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_used(self, data, message):
        model = built("2d")
        before = state(model)
        with pytest.raises(SurgeryError, match=message):
            evenkeel.recalibrate(model, data)
        assert state(model) == before

    def test_how_it_cannot_be_asked_for(self):
        model, data = built("2d"), images("2d")
        with pytest.raises(
            ConfigError, match="propagate must be 'batch' or 'population' but is 'b"
        ):
            evenkeel.recalibrate(model, data, propagate="both")
        with pytest.raises(ConfigError, match="steps must be 1 or more but is 0"):
            evenkeel.recalibrate(model, data, steps=0)
        with pytest.raises(ConfigError, match="a generator can be read only once; give a list"):
            evenkeel.recalibrate(model, (x for x in data), propagate="population")

    def test_a_sample_alone_has_no_variance(self):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
        with pytest.raises(SurgeryError, match="'0' was given 1 value per statistic in all"):
            evenkeel.recalibrate(model, [torch.zeros(1, 3)], propagate="population")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


Failing = Callable[[nn.Module], tuple[Iterable[Any], dict[str, Any], str]]


def loader_that_breaks(model: nn.Module) -> tuple[Iterable[Any], dict[str, Any], str]:
    class Data:
        def __iter__(self):
            yield from images("2d")[:2]
            raise OSError("the disk is gone")

    return Data(), {}, "the disk is gone"


def stopped(model: nn.Module) -> tuple[Iterable[Any], dict[str, Any], str]:
    class Data:
        def __iter__(self):
            yield from images("2d")[:3]
            raise KeyboardInterrupt("Ctrl-C")

    return Data(), {}, "Ctrl-C"


def network_that_breaks(model: nn.Module) -> tuple[Iterable[Any], dict[str, Any], str]:
    return [*images("2d"), torch.zeros(2, 3, 5, 5)], {}, "built for h=4, w=4|Kernel size|size"


def not_a_number(model: nn.Module) -> tuple[Iterable[Any], dict[str, Any], str]:
    return [*images("2d"), torch.full((4, 3, 8, 8), torch.nan)], {}, "not finite in batch 5"


def never_reached(model: nn.Module) -> tuple[Iterable[Any], dict[str, Any], str]:
    forward = lambda model, x: model[:6](x)  # noqa: E731
    return images("2d"), {"forward": forward}, "none of 4 batches gave a value to 7, 9, 10 and 1 mo"


def adapter_that_breaks(model: nn.Module) -> tuple[Iterable[Any], dict[str, Any], str]:
    def forward(model: nn.Module, x: Tensor) -> None:
        model(x)
        random.random()
        torch.randn(3)
        raise LookupError("no such picture")

    return images("2d"), {"forward": forward}, "no such picture"


class Counting(nn.Module):
    """Changes its buffers in each forward, in both ways that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.mean((0, 2, 3))
        return x


class TestAllOrNothing:
    def mixed(self) -> nn.Module:
        """Some parts in eval mode, hooks, gradients, buffers of its own."""
        model = nn.Sequential(Counting(), *built("2d")).train()
        model[4].eval()
        model[2].register_forward_hook(lambda *_: None)
        model[2].register_forward_pre_hook(lambda *_: None, with_kwargs=False)
        model[2].running_mean.fill_(float("nan"))
        model(images("2d")[0]).sum().backward()
        return model

    @pytest.mark.parametrize("propagate", ["batch", "population"])
    @pytest.mark.parametrize(
        "failing",
        [loader_that_breaks, stopped, network_that_breaks, not_a_number, never_reached,
         adapter_that_breaks],
    )  # fmt: skip
    def test_every_bit_is_as_before(self, failing: Failing, propagate):
        model = self.mixed()
        data, how, message = failing(model)
        if failing is never_reached:
            how["forward"] = lambda model, x: model[:7](x)
            message = message.replace("7, 9, 10", "8, 10, 11")
        before = (state(model), randoms())
        hooks = [dict(m._forward_pre_hooks_with_kwargs) for m in model.modules()]
        with pytest.raises(BaseException, match=message):
            evenkeel.recalibrate(model, data, propagate=propagate, **how)
        assert (state(model), randoms()) == before
        assert [dict(m._forward_pre_hooks_with_kwargs) for m in model.modules()] == hooks
        evenkeel.recalibrate(model, images("2d"), propagate=propagate)

    @pytest.mark.parametrize("propagate", ["batch", "population"])
    def test_nothing_but_the_statistics_changes(self, propagate):
        model = self.mixed()
        before = state(model)
        evenkeel.recalibrate(model, images("2d"), propagate=propagate)
        after = state(model)
        changed = {key for key in before if before[key] != after[key]}
        wanted = {
            f"{name}.{key} value"
            for name in norms_of(model)
            for key in ("running_mean", "running_var", "num_batches_tracked")
        }
        # The settings of a norm do not change, and its buffers are the tensors that they were.
        assert changed == wanted
        assert all(before[key][0] == after[key][0] for key in wanted)
        assert set(after) == set(before)

    def test_a_buffer_that_cannot_be_written(self):
        """The first norm is written by then."""
        model = built("2d")
        model[5].running_var = torch.ones(1).expand(4)
        before = state(model)
        with pytest.raises(RuntimeError, match="single memory location"):
            evenkeel.recalibrate(model, images("2d"))
        assert state(model) == before

    def test_a_variance_that_the_buffer_cannot_hold(self):
        norm = nn.BatchNorm1d(2, dtype=torch.float16)
        before = state(norm)
        data = [torch.tensor([[6e4, 1.0], [-6e4, 2.0]], dtype=torch.float16)]
        message = "'BatchNorm1d' keeps its running_var as torch.float16, which cannot hold 7.2e.09"
        with pytest.raises(SurgeryError, match=message):
            evenkeel.recalibrate(norm, data)
        assert state(norm) == before

    def test_a_copy_if_wanted(self):
        model = built("2d")
        before = state(model)
        report = evenkeel.recalibrate(model, images("2d"), inplace=False)
        assert state(model) == before
        assert report.model is not model
        assert int(report.model[1].num_batches_tracked) == 4
        assert evenkeel.recalibrate(model, images("2d")).model is model


class TestUndo:
    def test_every_bit_comes_back(self):
        model = built("2d")
        model(images("2d")[0])
        before = state(model)
        report = evenkeel.recalibrate(model, images("2d"))
        assert state(model) != before
        model(images("2d")[1])
        report.undo()
        assert state(model) == before
        report.undo()
        assert state(model) == before

    def test_for_a_while(self):
        model = built("2d").eval()
        before, plain = state(model), model(images("2d")[0])
        with evenkeel.recalibrated(model, images("2d"), propagate="population") as report:
            assert report.propagate == "population"
            assert not torch.allclose(model(images("2d")[0]), plain)
        assert state(model) == before
        assert torch.equal(model(images("2d")[0]), plain)

    def test_whatever_happens(self):
        model = built("2d")
        before = state(model)
        with (
            pytest.raises(ZeroDivisionError, match="in the middle"),
            evenkeel.recalibrated(model, images("2d")),
        ):
            raise ZeroDivisionError("in the middle")
        assert state(model) == before


class TestLeft:
    def test_norms_that_stay_are_named(self):
        class FrozenBatchNorm2d(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("running_mean", torch.zeros(4))

            def forward(self, x: Tensor) -> Tensor:
                return x

        off = nn.BatchNorm2d(4)
        off.track_running_stats = False
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval(),
            nn.BatchNorm2d(4, track_running_stats=False), off, FrozenBatchNorm2d(),
            nn.InstanceNorm2d(4, track_running_stats=True), nn.GroupNorm(2, 4),
        )  # fmt: skip
        evenkeel.freeze(model, "2")
        before = model.state_dict() | {k: v.clone() for k, v in model.state_dict().items()}
        report = evenkeel.recalibrate(model, images("2d"))
        assert [change.norm for change in report.changes] == ["1"]
        assert dict(report.left) == {
            "2": "it is frozen",
            "3": "it is in eval mode while the network trains; where= would take it",
            "4": "it has no running statistics, and uses those of each batch",
            "5": "track_running_stats is False",
            "6": "it is a FrozenBatchNorm2d, which is no batch norm of torch's or evenkeel's",
            "7": "every sample has statistics of its own",
        }
        after = model.state_dict()
        changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
        assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}

    def test_a_frozen_norm_normalizes_by_what_it_has(self):
        model = built("2d")
        evenkeel.freeze(model, "1")
        twin = as_in_training(model)
        evenkeel.recalibrate(model, images("2d"))
        close(model[5], seen(twin, images("2d"))["5"], 1e-5)

    @pytest.mark.parametrize("where", ["1", ["1"], lambda path, norm: path == "1"])
    def test_only_some(self, where):
        model = built("2d").train()
        model[1].eval()  # asked for by name, it is taken all the same
        report = evenkeel.recalibrate(model, images("2d"), where=where)
        assert [change.norm for change in report.changes] == ["1"]
        assert int(model[5].num_batches_tracked) == 0

    def test_a_whole_network_in_eval_mode(self):
        report = evenkeel.recalibrate(built("2d").eval(), images("2d"))
        assert len(report.changes) == 6

    def test_a_name_that_is_none(self):
        model = nn.Sequential()
        model.add_module("stem", built("1d"))
        with pytest.raises(SurgeryError, match=r"'sten' is no module of it \(did you mean 'stem'"):
            evenkeel.recalibrate(model, images("1d"), where="sten")
        with pytest.raises(SurgeryError, match=r"'stem.0' has no batch norm in it"):
            evenkeel.recalibrate(model, images("1d"), where=["stem.1", "stem.0"])

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (nn.Sequential(nn.Linear(3, 3)), "Sequential has no batch norm to recalibrate"),
            (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)),
             "no batch norm to recalibrate; '0': it has no running statistics, and uses those"),
            (nn.Sequential(nn.LazyBatchNorm1d()), "'0.weight' has no size yet; run the network on"),
        ],
    )  # fmt: skip
    def test_nothing_to_do(self, model, message):
        with pytest.raises(SurgeryError, match=message):
            evenkeel.recalibrate(model, [torch.zeros(4, 3)])

    def test_channels_that_are_not_second(self):
        class Last(nn.BatchNorm1d):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.transpose(1, 2)).transpose(1, 2)

        message = r"'0' has statistics of shape \(3,\), but those of 'n c ... -> c' .* have \(7,\)"
        with pytest.raises(SurgeryError, match=message):
            evenkeel.recalibrate(nn.Sequential(Last(3)), [torch.zeros(4, 7, 3)])

    def test_a_norm_that_is_given_no_floats(self):
        forward = lambda model, x: model[0](x.long())  # noqa: E731
        with pytest.raises(SurgeryError, match=r"'0' was given torch\.int64 where a floating"):
            evenkeel.recalibrate(
                nn.Sequential(nn.BatchNorm1d(3)), [torch.zeros(4, 3)], forward=forward
            )

    def test_a_norm_given_its_input_by_name(self):
        model, data = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(2, 8, 3, generator=seeded())
        evenkeel.recalibrate(model, data, forward=lambda model, x: model[0](input=x))
        torch.testing.assert_close(model[0].running_mean, data.mean((0, 1)))


class TestPopulation:
    def test_a_norm_called_twice(self):
        model = built("twice")
        before = state(model)
        with pytest.raises(SurgeryError, match=r"'1.norm' is called twice in one forward"):
            evenkeel.recalibrate(model, images("twice"), propagate="population")
        assert state(model) == before

    def test_an_order_that_changes(self):
        def forward(model: nn.Module, x: Tensor) -> None:
            first, second = (0, 1) if len(x) > 4 else (1, 0)
            model[second](model[first](x))

        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
        data = [torch.randn(n, 3, generator=seeded()) for n in SIZES]
        with pytest.raises(SurgeryError, match="batch 2 calls the norms in another order"):
            evenkeel.recalibrate(model, data, forward=forward, propagate="population")
        assert evenkeel.recalibrate(model, data, forward=forward).batches == 4

    def test_a_norm_that_only_some_batches_reach(self):
        def forward(model: nn.Module, x: Tensor) -> None:
            model[0](x) if len(x) > 4 else model[1](model[0](x))

        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).double()
        data = [torch.randn(n, 3, generator=seeded()).double() for n in SIZES]
        report = evenkeel.recalibrate(model, data, forward=forward, propagate="population")
        assert [(c.values, c.batches) for c in report.changes] == [(20, 4), (6, 2)]
        small = torch.cat([model[0].eval()(x) for x in data if len(x) <= 4])
        torch.testing.assert_close(model[1].running_var, small.var(0), rtol=1e-11, atol=0)


class TestReport:
    def test_says_how_far_statistics_moved(self):
        x = torch.tensor([[1.0, 0.0], [3.0, 10.0]])  # means 2 and 5, unbiased variances 2 and 50
        norm = nn.BatchNorm1d(2, eps=0.25)
        report = evenkeel.recalibrate(norm, [x])
        (change,) = report.changes
        assert change.mean_moved == pytest.approx(2 / 2.25**0.5)
        assert change.variance_times == pytest.approx((2.25 / 1.25, 50.25 / 1.25))
        assert str(report) == (
            "1 norms recalibrated on 1 batches, 0 left as they are\n"
            "  BatchNorm1d: 2 values, mean moved by up to 1.3 deviations, variance times 1.8 to 40."
            "2\n  variances are unbiased; on the way norms used the statistics of each batch"
        )

    def test_as_plain_values(self):
        model = built("2d")
        evenkeel.freeze(model, "5")
        report = evenkeel.recalibrate(model, images("2d"), propagate="population")
        plain = json.loads(json.dumps(report.to_dict()))
        assert plain["propagate"] == "population"
        assert plain["left"] == [["5", "it is frozen"]]
        assert [change["norm"] for change in plain["changes"]] == ["1", "7", "9", "10", "13"]
        assert "5 stays: it is frozen" in str(report)
        assert "the statistics of all batches" in str(report)
        assert "running_mean" not in repr(report)
