"""`exchange` for norms with other statistics (groups, layers, patterns), and its failures."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import evenkeel
from evenkeel.errors import ConfigError, PatternError, SurgeryError
from evenkeel.surgery import exchange as verb
from evenkeel.surgery.exchange import exchange
from evenkeel.surgery.exchanging import edits as exchanging
from evenkeel.surgery.exchanging import patterned
from evenkeel.surgery.exchanging.patterned import group_count

from .nets import randomized, state
from .test_exchange import SHAPES, TORCHS, batch, deep, inference, net, types

ACTIVATIONS = {1: "n c l -> c l", 2: "n c h w -> c h w", 3: "n c d h w -> c d h w"}


class TestGroupNorms:
    def test_gamma_and_beta_are_the_same_objects(self):
        model = deep()
        new, report = exchange(model, "group", inplace=True, example=batch())
        assert [(m.num_groups, m.num_channels) for m in (new[1], new[4], new[8])] == [
            (3, 6), (2, 4), (1, 5),
        ]  # fmt: skip
        assert types(new).count(nn.GroupNorm) == 3
        assert not report.same
        assert report.difference is None
        assert report.notes == (
            "the function changes in '1', '4', '8', and running statistics are lost; train on",
        )

    def test_computes_what_torch_does_with_them(self):
        model = nn.Sequential(randomized(nn.BatchNorm2d(6, eps=1e-3)))
        x = torch.randn(4, 6, 5, 5)
        for to, groups in (("group", 3), ("layer", 1), ("instance", 6)):
            new, _ = exchange(model, to, example=x)
            wanted = F.group_norm(x, groups, model[0].weight, model[0].bias, 1e-3)
            torch.testing.assert_close(new(x), wanted)
            assert list(new.state_dict()) == ["0.weight", "0.bias"]

    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_built_in_one_go_it_is_the_same(self, dims):
        instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]
        for affine in (True, False):
            model = net(dims, affine=affine)
            for to, built in (
                ("group", nn.GroupNorm(3, 6, affine=affine)),
                ("layer", nn.GroupNorm(1, 6, affine=affine)),
                ("instance", instance(6, affine=affine)),
            ):
                new, _ = exchange(model, to)
                assert (type(new[1]), repr(new[1])) == (type(built), repr(built))
                assert set(vars(new[1])) == set(vars(built))
                assert new(batch(dims)).isfinite().all()

    @given(st.integers(1, 2048), st.none() | st.integers(0, 64))
    def test_the_default_count(self, channels, places):
        count = group_count("norm", channels, None, places)

        def good(groups: int) -> bool:
            each = channels // groups
            enough = places is None or each * max(places, 1) >= 16
            return channels % groups == 0 and each >= 2 and enough

        assert count <= 32
        assert good(count) or count == 1
        assert not any(good(groups) for groups in range(count + 1, 33))
        assert channels < 64 or channels % 32 or (places or 0) < 8 or count == 32

    def test_vectors_have_groups_of_sixteen(self):
        """By two channels a group, which are enough for images, all values would be +-1."""
        layers = [nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(64, 64), nn.BatchNorm1d(64))
        for example in (batch(), None):
            new, report = exchange(model, "group", example=example)
            assert [new[1].num_groups, new[5].num_groups] == [32, 4]
            assert len(report.notes) == 1
        with pytest.raises(SurgeryError, match=r"on \(n, c\) each sample has one value in each of"):
            exchange(model, "group", groups=64, where="5")
        new, _ = exchange(model, "n (g c) -> n g", where="5")
        assert repr(new[5]).startswith("Norm('n (g c) -> n g', affine='(g c)', g=4, c=16")

    def test_the_count_is_given(self):
        new, _ = exchange(net(), "group", groups=2)
        assert [new[1].num_groups, new[4].num_groups] == [2, 2]
        new, _ = exchange(net(), "group", groups=lambda channels: channels // 2)
        assert [new[1].num_groups, new[4].num_groups] == [3, 2]

    @pytest.mark.parametrize("groups", [4, 0, -2, lambda channels: 5, 1.0])
    def test_a_count_that_does_not_divide(self, groups):
        model = net()
        before = state(model)
        with pytest.raises(ConfigError, match=r"groups=.* does not divide the 6 channels of '1'"):
            exchange(model, "group", groups=groups, inplace=True)
        assert state(model) == before

    def test_a_vector_is_not_erased(self):
        """The norm of one value is zero, whatever the value was."""
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
        message = r"on \(6, 4, 1, 1\) each sample has one value in each of 4 groups, and the norm"
        with pytest.raises(SurgeryError, match=f"'2': {message}.*; give fewer groups"):
            exchange(model, "group", groups=4, example=batch())
        for to in ("instance", "n c h w -> n c"):
            with pytest.raises(SurgeryError, match="one value"):
                exchange(model, to, example=batch())
        _, report = exchange(model, "group", groups=2, example=batch())
        assert "2: on (6, 4, 1, 1) a group has two values, whose norms are +-1" in report.notes
        _, report = exchange(model, "group", groups=1, example=batch())
        assert len(report.notes) == 1

    def test_instances_of_what(self):
        """torch takes (n, c) for one sample of c channels, and normalizes something else."""
        with pytest.raises(SurgeryError, match="the rank of its input is not known"):
            exchange(nn.Sequential(nn.BatchNorm1d(4)), "instance")
        with pytest.raises(SurgeryError, match=r"on \(n, c\) each sample has one value in each of"):
            exchange(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)), "instance")
        with pytest.raises(SurgeryError, match="no instance norm for inputs of 6 dimensions"):
            exchange(nn.SyncBatchNorm(3), "instance", example=torch.rand(2, 3, 1, 1, 2, 2))


class TestPatterns:
    @pytest.mark.parametrize("dims", [1, 2, 3])
    @pytest.mark.parametrize("affine", [True, False])
    def test_per_activation_is_the_same_in_inference(self, dims, affine):
        model = net(dims, affine=affine).train()
        model[1].num_batches_tracked.fill_(7)
        new, report = exchange(model, ACTIVATIONS[dims], example=batch(dims))
        assert report.same
        assert report.difference <= report.budget * report.scale
        torch.testing.assert_close(inference(new, batch(dims, 2)), inference(model, batch(dims, 2)))
        shape = new[1].running_mean.shape
        assert tuple(shape) == (6, *(size - 1 for size in SHAPES[dims][2:]))
        assert new[1].num_batches_tracked == model[1].num_batches_tracked == 7
        assert not torch.allclose(new(batch(dims)), model(batch(dims)))

    def test_settings_are_kept(self):
        model = net(momentum=None, eps=1e-3).train()
        model[1].eval()
        model[1].bias.requires_grad_(False)
        new, report = exchange(model, "n c h w -> c h w", example=batch())
        assert (new[1].momentum, new[1].eps, new[1].training) == (None, 1e-3, False)
        assert (new[1].weight.requires_grad, new[1].bias.requires_grad) == (True, False)
        assert report.exchanged[0][2] == "evenkeel.Norm('n c h w -> c h w', c=6, h=6, w=5)"
        other = pickle.loads(pickle.dumps(copy.deepcopy(new)))
        assert torch.equal(other.eval()(batch()), new.eval()(batch()))

    def test_partly_owned_places(self):
        new, report = exchange(net(), "n c h w -> c w", example=batch())
        assert report.same
        assert tuple(new[1].running_var.shape) == (6, 5)
        assert report.difference <= report.budget * report.scale

    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_spatial_needs_no_example(self, dims):
        model = net(dims)
        new, report = exchange(model, "n c ... -> c", inplace=True)
        assert report.same
        assert repr(new[1]).startswith("Norm('n c ... -> c', c=6")
        assert type(exchange(new, "torch", example=batch(dims))[0][1]) is TORCHS[dims]

    def test_mixed_networks(self):
        new, report = exchange(deep(), "n c h w -> c h w", example=batch())
        assert [path for path, *_ in report.exchanged] == ["1", "4"]
        assert report.left[0][0] == "8"
        assert report.left[0][1].startswith("'n c h w -> c h w' describes 4 dimensions but got 2")
        assert type(new[8]) is nn.BatchNorm1d
        assert report.same
        _, report = exchange(deep(), "n c h w -> c")
        assert report.left == (
            ("8", "'n c h w -> c' describes 4 dimensions and its inputs have 2"),
        )

    def test_new_statistics_are_said_to_be_new(self):
        model = net()
        model[1].num_batches_tracked.fill_(7)
        new, report = exchange(model, "n c h w -> h w", example=batch())
        assert model[1].num_batches_tracked == 7
        assert new[1].running_mean.count_nonzero() == 0
        assert new[1].running_var.eq(1).all()
        assert new[1].num_batches_tracked == 0
        assert torch.equal(new[1].weight, model[1].weight)
        assert report.notes == (
            "the function changes in '1', '4', for other values share a statistic; train on",
            "the memory is new (mean 0, variance 1) in '1', '4'; give calibrate=, or use "
            "evenkeel.recalibrate before inference",
        )

    @pytest.mark.parametrize("inplace", [True, False])
    def test_calibrated(self, inplace):
        data = [batch(seed=seed) for seed in range(4)]
        model = net()
        twin = exchange(model, "n c h w -> h w", example=batch())[0]
        evenkeel.recalibrate(twin, data)
        new, report = exchange(
            model, "n c h w -> h w", example=batch(), calibrate=data, inplace=inplace
        )
        assert report.notes[-1] == "2 norms calibrated on 4 batches"
        assert torch.equal(new[1].running_var, twin[1].running_var)
        _, report = exchange(net(), "n c h w -> c", calibrate=data)
        assert report.notes == ("calibrate= was not needed, for the statistics are carried",)

    def test_norms_in_eval_mode_are_calibrated_too(self):
        model = net().train()
        model[1].eval()
        new, report = exchange(model, "n c h w -> h w", example=batch(), calibrate=[batch()])
        assert report.notes[-1] == "2 norms calibrated on 1 batches"
        assert new[1].running_mean.count_nonzero() > 0

    def test_split_channels(self):
        model = nn.Sequential(randomized(nn.BatchNorm2d(6, eps=1e-3)))
        x = torch.randn(4, 6, 5, 5)
        for text in ("n (g c) h w -> n g", "n (g c) ... -> n g"):
            new, _ = exchange(model, text, groups=2, inplace=False)
            wanted = F.group_norm(x, 2, model[0].weight, model[0].bias, 1e-3)
            torch.testing.assert_close(new(x), wanted)
        new, report = exchange(model, "n (g c) h w -> g c", example=x)
        assert report.same
        assert tuple(new[0].running_mean.shape) == (3, 2)
        new, report = exchange(model, "n (c g) h w -> g", example=x, calibrate=[x], groups=2)
        assert tuple(new[0].running_mean.shape) == (2,)
        assert torch.equal(new[0].weight, model[0].weight)

    def test_without_running_statistics(self):
        model = net(track_running_stats=False)
        new, report = exchange(model, "n c h w -> c", example=batch(), where="1")
        assert report.same
        assert new[1].running_mean is None
        new, report = exchange(model, "n c h w -> c h w", example=batch(), where="1")
        assert not report.same
        assert [note for note in report.notes if "memory" in note] == []

    def test_images_of_two_sizes(self):
        class Pyramid(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm2d(3)

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(x).mean((2, 3)) + self.norm(F.max_pool2d(x, 2)).mean((2, 3))

        with pytest.raises(SurgeryError, match=r"\(6, 3, 3, 3\) and \(6, 3, 7, 6\), and .* fixes"):
            exchange(Pyramid(), "n c h w -> c h w", example=batch())
        assert exchange(Pyramid(), "n c h w -> c", example=batch())[1].same

    def test_what_the_example_does_not_reach(self):
        model = net()
        model.spare = nn.Identity()
        model.spare.norm = nn.BatchNorm2d(3)
        _, report = exchange(model, "n c h w -> c h w", example=batch())
        reason = "the example does not reach it, so the size of h, w is not known"
        assert report.left == (("spare.norm", reason),)
        _, report = exchange(model, "evenkeel", example=batch())
        assert report.notes == ("the example does not reach 'spare.norm'",)

    def test_what_is_so_already(self):
        new, _ = exchange(net(), "n c h w -> c h w", example=batch())
        again, report = exchange(new, "n c h w -> c h w", example=batch())
        assert (types(again), report.exchanged) == (types(new), ())
        with pytest.raises(
            SurgeryError, match=r"Norm\('n c h w -> c h w'\), whose numbers are not"
        ):
            exchange(new, "n c h w -> c")

    @given(st.data())
    def test_any_owners_that_hold_the_channels(self, data):
        """Inference is the same if every channel is an owner; and only then is it claimed."""
        places = "dhw"[: data.draw(st.integers(0, 3), "places")]
        owned = [name for name in places if data.draw(st.booleans(), name)]
        channels = data.draw(st.integers(1, 4), "channels")
        by_channel = data.draw(st.booleans(), "by channel") or not owned
        owners = " ".join(["c", *owned] if by_channel else owned)
        text = f"{' '.join(['n', 'c', *places])} -> {owners}"
        shape = (3, channels, *(data.draw(st.integers(1, 3), f"size of {p}") for p in places))
        kind = TORCHS[max(1, len(places))]
        settings = {"affine": data.draw(st.booleans(), "affine")}
        model = nn.Sequential(randomized(kind(channels, **settings)))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        new, report = exchange(model, text, example=x)
        assert report.same == by_channel
        if by_channel:
            torch.testing.assert_close(inference(new, x), inference(model, x))
            assert new[0].running_mean.numel() == channels * math.prod(
                size for name, size in zip(places, shape[2:], strict=True) if name in owned
            )
        for name in ("weight", "bias") if settings["affine"] else ():
            values = getattr(new[0], name).reshape(channels, -1)
            assert torch.equal(values, getattr(model[0], name)[:, None].expand_as(values))


class TestUndone:
    def fails(self, model: nn.Module, message: str, *args: Any, **kwargs: Any) -> None:
        """The call fails in place, and nothing about the network is other than before."""
        before, places = state(model), {n: vars(m).copy() for n, m in model.named_modules()}
        with pytest.raises((SurgeryError, RuntimeError), match=message):
            exchange(model, *args, inplace=True, **kwargs)
        assert state(model) == before
        for name, module in model.named_modules():
            assert list(vars(module)) == list(places[name])
            assert all(vars(module)[key] is value for key, value in places[name].items())

    @pytest.mark.parametrize("to", ["sync", "evenkeel", "frozen", "group", "n c h w -> c h w"])
    def test_the_second_norm_fails(self, monkeypatch, to):
        calls: list[Any] = []

        def breaks(function: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                calls.append(function)
                if len(calls) == 2:
                    function(*args, **kwargs)
                    raise RuntimeError("on purpose")
                return function(*args, **kwargs)

            return run

        module = exchanging if to in ("sync", "evenkeel", "frozen") else patterned
        name = "freeze" if to == "frozen" else "become"
        monkeypatch.setattr(module, name, breaks(getattr(module, name)))
        model = net().train()
        model[1].eval()
        self.fails(model, "on purpose", to, example=batch())
        assert len(calls) == 2

    def test_thawing_fails(self, monkeypatch):
        model = net()
        evenkeel.freeze(model, affine=True)

        def thaw(norm: nn.Module) -> None:
            evenkeel.unfreeze(norm)
            raise RuntimeError("on purpose")

        monkeypatch.setattr(exchanging, "unfreeze", thaw)
        self.fails(model, "on purpose", "batch")
        assert not model[1].weight.requires_grad

    def test_calibration_fails(self):
        data = [batch(), torch.full(SHAPES[2], float("nan"))]
        self.fails(net(), "not finite", "n c h w -> h w", example=batch(), calibrate=data)

    def test_numbers_that_are_lost_are_found_out(self, monkeypatch):
        def spoils(vector: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return spread(vector, *args, **kwargs).roll(1, 0)

        spread = patterned._spread
        monkeypatch.setattr(patterned, "_spread", spoils)
        self.fails(net(), "'1' would lose its numbers", "n c h w -> c h w", example=batch())

    def test_outputs_that_change_are_found_out(self):
        class Asks(nn.Module):
            """Its forward depends on the class of its norm."""

            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm2d(3)

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(x) * (2 if isinstance(self.norm, nn.BatchNorm2d) else 3)

        message = "the outputs in inference would change by .* asks for the class of its norms"
        self.fails(Asks(), message, "sync", example=batch())

    def test_the_comparison_can_fail(self):
        a, b = [torch.ones(3)], [torch.tensor([1.0, 1.0, 1.1])]
        assert verb._apart(a, a) == (0.0, 1.0)
        assert verb._apart(a, b)[0] == pytest.approx(0.1)
        assert verb._apart(a, [torch.ones(1, 3)])[0] == float("inf")
        assert verb._apart(a, [torch.tensor([1.0, 1.0, float("nan")])])[0] == float("inf")
        nan = [torch.tensor([1.0, float("nan"), float("inf")])]
        assert verb._apart(nan, nan) == (0.0, 1.0)


class TestMistakes:
    @pytest.mark.parametrize(
        ("to", "options", "kind", "message"),
        [
            ("grup", {}, ConfigError, r"unknown to='grup' \(did you mean 'group'\?\); choose one"),
            ("n c h w > c", {}, ConfigError, "or a pattern such as"),
            ("sync", {"groups": 2}, ConfigError, "groups=2 is for to='group', but to is 'sync'"),
            ("n c h w -> c", {"groups": 2}, ConfigError, "does not split the channels"),
            ("group", {"calibrate": []}, ConfigError, "calibrate= is for patterns with new"),
            ("n c h w -> n", {"calibrate": []}, ConfigError, "has no running statistics"),
            ("n c h w -> c h w", {}, ConfigError, "over h, w, whose sizes only an example tells"),
            ("n ... -> n", {}, PatternError, "does not name the channels"),
            ("n -> ", {}, PatternError, "does not name the channels"),
            ("n c (h w) -> c h", {}, PatternError, "splits h w; only the channels"),
            ("n (a b c) h w -> n a", {}, PatternError, "splits a b c; only the channels"),
            ("n c ... -> c ...", {}, PatternError, r"has statistics over '\.\.\.'"),
            ("n c h w -> d", {}, PatternError, "'d' on the right"),
            ("sync", {"where": "7"}, SurgeryError, "'7' is no module of it"),
            ("sync", {"example": torch.rand(2, 5)}, SurgeryError, "cannot run the example in inf"),
        ],
    )  # fmt: skip
    def test_said_before_anything_is_done(self, to, options, kind, message):
        model = net()
        before = state(model)
        with pytest.raises(kind, match=message):
            exchange(model, to, inplace=True, **options)
        assert state(model) == before

    def test_nothing_to_exchange(self):
        with pytest.raises(SurgeryError, match=r"Linear has no batch norm to exchange for 'sync'$"):
            exchange(nn.Linear(2, 2), "sync")

    def test_accelerated_networks(self):
        quick, _ = evenkeel.accelerate(net())
        with pytest.raises(SurgeryError, match=r"is accelerated \(see '1'\); .* evenkeel.restore"):
            exchange(quick, "sync")
        synced, _ = exchange(evenkeel.restore(quick), "sync")
        assert types(synced).count(nn.SyncBatchNorm) == 2

    def test_sharded_networks(self):
        class FSDPModule(nn.Module):
            """Stands for torch's, which is put among the bases of a sharded module's class."""

        class FSDPConv(FSDPModule, nn.Sequential):
            pass

        with pytest.raises(SurgeryError, match=r"holds FSDPConv \(see '0'\)"):
            exchange(nn.Sequential(FSDPConv(nn.BatchNorm2d(3))), "frozen")

    def test_distributed_networks(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            model = nn.Sequential(nn.parallel.DistributedDataParallel(net()))
            message = r"DistributedDataParallel \(see '0'\), .*; exchange the network inside"
            for inplace in (True, False):
                with pytest.raises(SurgeryError, match=message):
                    exchange(model, "sync", inplace=inplace)
            synced, report = exchange(net().train(), "sync")
            assert any("does not train while torch.distributed runs" in n for n in report.notes)
            with pytest.raises(ValueError, match="expected input tensor to be on GPU"):
                synced(batch())
        finally:
            dist.destroy_process_group()


class Loud(nn.Module):
    """Makes rounding large."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 1e3).sin()


class Narrow(nn.Module):
    """Takes one precision and no other."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("single precision only")
        return x


class TestReports:
    def test_says_all(self):
        model = nn.Sequential(*net(), nn.InstanceNorm2d(4, track_running_stats=True))
        _, report = exchange(model, "sync", example=batch())
        assert str(report) == (
            "2 norms exchanged for 'sync', 1 left as they are\n"
            "  1: torch.nn.BatchNorm2d -> torch.nn.SyncBatchNorm\n"
            "  4: torch.nn.BatchNorm2d -> torch.nn.SyncBatchNorm\n"
            "  6 stays: every sample has statistics of its own\n"
            "  the network is on the CPU, where SyncBatchNorm does not train while "
            "torch.distributed runs\n"
            f"  largest output difference in inference 0.0e+00 of {report.scale:.3g} "
            "(budget 1e-06 relative)"
        )
        plain = json.loads(json.dumps(report.to_dict()))
        assert (plain["to"], plain["same"], plain["difference"]) == ("sync", True, 0.0)
        assert plain["exchanged"][0] == ["1", "torch.nn.BatchNorm2d", "torch.nn.SyncBatchNorm"]

    def test_says_that_a_group_of_processes_is_lost(self):
        model = net(2, nn.SyncBatchNorm)
        model[1].process_group = "some of them"
        _, report = exchange(model, "torch")
        assert "the process groups of SyncBatchNorm are not kept" in report.notes

    def test_rounding_is_judged_in_double_precision(self):
        model = net().append(Loud())
        new, report = exchange(model, "evenkeel", example=batch())
        rounding, scale = verb._apart(*([inference(m, batch())] for m in (model, new)))
        assert rounding > verb.BUDGET * scale
        assert report.budget == verb.EXACT_BUDGET
        assert report.difference <= report.budget * report.scale
        model.append(Narrow())
        with pytest.raises(SurgeryError, match=r"would change by .* leave the example out"):
            exchange(model, "evenkeel", example=batch())
        assert exchange(model, "evenkeel")[1].exchanged
