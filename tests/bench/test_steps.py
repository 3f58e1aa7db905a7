"""Training steps and their memory, on networks too small to be worth timing."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from evenkeel.bench import memory, steps
from evenkeel.bench.results import AGAIN, BARE_COMPILED, LOW, OURS, OURS_COMPILED
from evenkeel.bench.steps import Plan, Step, plans
from evenkeel.errors import ConfigError

from .rounds import time_once

BOTH = ("nchw", "channels_last")
TINY = Plan("resnet18", 32, 0.125, 2, BOTH, "float32")


@pytest.fixture
def accelerated(monkeypatch):
    """An accelerate that hands back what it gets."""

    def install(function) -> None:
        monkeypatch.setitem(
            sys.modules, "evenkeel.surgery.accelerate", SimpleNamespace(accelerate=function)
        )

    install(lambda model, example, **_: (model, None))
    return install


class TestPlans:
    def test_all_and_quick(self):
        every = plans(batch=32, layouts=BOTH, dtypes=["float32", "bfloat16"])
        assert len(every) == 5 * 2 * 2
        assert {plan.size for plan in every} == {32, 96}
        quick = plans(batch=32, layouts=BOTH, dtypes=["float32"], quick=True)
        assert [plan.name for plan in quick][:2] == ["vgg 32px", "resnet18 32px"]
        assert steps.estimate(every, 1.0, True) > steps.estimate(quick, 1.0, False) > 5
        assert memory.estimate(every, True) > memory.estimate(quick, False) > 0

    def test_one_that_is_no_part_of_all(self):
        given = {"batch": 256, "layouts": ("nchw",), "dtypes": ["bfloat16"]}
        (plan,) = plans(**given, network="resnet50", size=224, device="cuda")
        assert (plan.name, plan.width, plan.device) == ("resnet50 224px", 1.0, "cuda")
        assert {each.size for each in plans(**given, network="resnet50")} == {32, 96}
        assert "resnet50" not in {each.net for each in plans(**given)}
        quick = plans(**given, quick=True, size=64)
        assert {(each.size, each.width, each.device) for each in quick} == {(64, 0.5, "cpu")}

    def test_a_gpu_is_guessed_to_be_faster_and_compiles_three_sides(self):
        there = replace(TINY, net="resnet50", size=224, width=1.0, batch=256, device="cuda")
        assert 0.08 < there.guess < 0.12
        compiling = steps.estimate([there], 20, True) - steps.estimate([there], 20, False)
        assert compiling == pytest.approx(2 * 3 * steps.COMPILING, rel=0.05)
        here = steps.estimate([TINY], 20, True) - steps.estimate([TINY], 20, False)
        assert here == pytest.approx(2 * steps.COMPILING, rel=0.05)

    def test_unknown(self):
        with pytest.raises(ConfigError, match="unknown network 'lenet'"):
            plans(batch=2, layouts=BOTH, dtypes=["float32"], network="lenet")


class TestSteps:
    @pytest.fixture(autouse=True)
    def _once(self, monkeypatch):
        time_once(monkeypatch)

    def test_a_step_trains(self):
        sides = steps.sides_of(TINY, "nchw", False)
        step = sides["eager"]()
        before = [p.detach().clone() for p in step.model.parameters()]
        losses = [float(step()) for _ in range(20)]
        assert losses[-1] < losses[0]
        after = step.model.parameters()
        assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_rows(self, accelerated, dtype):
        plan = Plan("vgg", 32, 0.125, 2, BOTH, dtype)
        rows = list(steps.run([plan], seconds=0, compiles=False))
        assert [row.group for row in rows] == [(layout, dtype) for layout in BOTH]
        for row in rows:
            assert set(row.sides) == {"bare", "eager", "evenkeel"}
            assert (row.absent, row.difference) == ({}, 0)
            assert set(row.ratios) == {"eager"}

    def test_sides_that_are_asked_for(self):
        plan = Plan("vgg", 32, 0.125, 2, ("nchw",), "float32")
        (row,) = steps.run([plan], seconds=0, compiles=False, asked=(LOW, AGAIN))
        assert set(row.sides) == {"bare", "eager", "evenkeel", "low memory", "eager again"}
        assert "eager again" not in row.ratios
        counted = memory.run([plan], compiles=False)
        sides = {name: side.median for name, side in next(iter(counted)).sides.items()}
        assert sides["low memory"] < 0.75 * min(sides["eager"], sides["evenkeel"])
        assert steps.estimate([plan], 1.0, False, (LOW,)) > steps.estimate([plan], 1.0, False)

    def test_accelerate_gets_model_and_example_in_their_layout(self, accelerated):
        seen = []

        def accelerate(model, example, **options):
            assert options["allocator"] == "default"
            seen.append(example)
            assert next(model.parameters()).is_contiguous(memory_format=torch.channels_last)
            return model, None

        accelerated(accelerate)
        sides = steps.sides_of(TINY, "channels_last", False)
        sides["evenkeel"]()
        assert seen[0].shape == (2, 3, 32, 32)
        assert seen[0].is_contiguous(memory_format=torch.channels_last)

    def test_the_clock_is_that_of_the_device(self, accelerated, monkeypatch):
        asked, told = [], []

        def clock_on(device):
            asked.append(device)
            return lambda: told.append(1) or float(len(told))

        monkeypatch.setattr(steps, "clock_on", clock_on)
        list(steps.run([replace(TINY, layouts=("nchw",))], seconds=0, compiles=False))
        assert asked == ["cpu"]
        assert len(told) >= 3 * 4

    def test_sides_on_a_gpu(self, accelerated, monkeypatch):
        """On a device without memory in its place."""
        monkeypatch.setattr(torch, "compile", lambda model, **_: ("compiled", model))
        monkeypatch.setattr(steps, "Step", lambda model, *_: model)
        seen = []

        def accelerate(model, example, **options):
            seen.append((example, options))
            return "accelerated", None

        accelerated(accelerate)
        plan = replace(TINY, batch=40, device="meta", dtype="bfloat16")
        sides = steps.sides_of(plan, "channels_last", True)
        built = {name: side() for name, side in sides.items()}
        assert built[OURS] == "accelerated"
        assert built[OURS_COMPILED] == ("compiled", "accelerated")
        assert built[BARE_COMPILED][0] == built["compile"][0] == "compiled"
        for network, norms in ((built["compile"][1], 20), (built[BARE_COMPILED][1], 0)):
            assert {p.device.type for p in network.parameters()} == {"meta"}
            assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == norms
        for example, options in seen:
            assert (example.device.type, example.shape[0]) == ("meta", steps.PROVED_ON)
            assert example.is_contiguous(memory_format=torch.channels_last)
            wanted = {"allocator": "default", "memory": "full", "backend": "triton"}
            assert options == wanted
        assert len(seen) == 2
        assert {OURS_COMPILED, BARE_COMPILED}.isdisjoint(steps.sides_of(TINY, "nchw", True))

    def test_ours_compiled_must_learn_what_eager_has(self, accelerated, monkeypatch):
        right = steps.sides_of

        def more(*given):
            sides = right(*given)
            other = nn.Sequential(sides["eager"]().model, nn.Linear(10, 10))
            wrong = Step(other, *steps.batch_of(given[0], "nchw"), "float32")
            return sides | {OURS_COMPILED: lambda: wrong, BARE_COMPILED: lambda: wrong}

        monkeypatch.setattr(steps, "sides_of", more)
        (row,) = steps.run([replace(TINY, layouts=("nchw",))], seconds=0, compiles=False)
        assert "its numbers are off by" in row.absent[OURS_COMPILED]
        assert BARE_COMPILED in row.sides

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_every_side_on_a_gpu_learns_what_eager_has(self, dtype):
        plan = Plan("resnet50", 64, 0.25, 24, BOTH, dtype, "cuda")
        rows = list(steps.run([plan], seconds=0, compiles=True, asked=(AGAIN,)))
        assert [row.layout for row in rows] == list(BOTH)
        for row in rows:
            assert row.absent == {}
            compiled = {"compile", OURS_COMPILED, BARE_COMPILED}
            assert set(row.sides) == {"bare", "eager", OURS, AGAIN} | compiled

    def test_without_accelerate(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "evenkeel.surgery.accelerate", None)
        assert "compile" in steps.sides_of(TINY, "nchw", True)
        (row,) = steps.run([replace(TINY, layouts=("nchw",))], seconds=0, compiles=False)
        assert set(row.sides) == {"bare", "eager"}
        assert "ImportError" in row.absent["evenkeel"] or "NotFound" in row.absent["evenkeel"]

    def test_one_that_learns_something_else_is_left_out(self, accelerated):
        accelerated(lambda model, example, **_: (nn.Sequential(model, nn.Linear(10, 10)), None))
        (row,) = steps.run([Plan("vgg", 32, 0.125, 2, ("nchw",), "float32")], seconds=0,
                           compiles=False)  # fmt: skip
        assert "evenkeel" not in row.sides
        assert "its numbers are off by" in row.absent["evenkeel"]
        assert row.difference > 0.01

    def test_one_that_fails_is_left_out(self, accelerated):
        def breaks(model, example, **_):
            raise RuntimeError("no graph")

        accelerated(breaks)
        rows = [*steps.run([TINY], seconds=0, compiles=False), *memory.run([TINY], compiles=False)]
        assert [row.absent["evenkeel"] for row in rows] == ["RuntimeError: no graph"] * 4


class TestMemory:
    def step(self, model: nn.Module, *shape: int) -> Step:
        return Step(model, torch.randn(*shape), torch.zeros(shape[0], dtype=torch.long), "float32")

    def test_storages_count_once_and_parameters_never(self):
        """ReLU keeps its output, which is the dense layer's input: one storage."""
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        images, hidden = 5 * 8 * 4, 5 * 16 * 4
        log_softmax, labels, weight_of_all = 5 * 4 * 4, 5 * 8, 4
        found = memory.saved_bytes(self.step(model, 5, 8))
        assert found == images + hidden + log_softmax + labels + weight_of_all

    def test_a_norm_costs_a_tensor(self, accelerated):
        (row,) = memory.run([Plan("vgg", 32, 0.125, 2, ("nchw",), "float32")], compiles=False)
        assert row.sides["eager"].median > row.sides["bare"].median
        assert row.ratios["eager"].median == 1
        assert set(row.sides) == {"bare", "eager", "evenkeel", "low memory"}

    def test_what_is_freed_meanwhile_is_no_double(self):
        class Forgetful(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                for _ in range(3):
                    ctx.save_for_backward(torch.zeros_like(x))
                return x.clone()

            @staticmethod
            def backward(ctx, dy):
                return dy

        class Net(nn.Linear):
            def forward(self, x):
                return Forgetful.apply(super().forward(x))

        plain = memory.saved_bytes(self.step(nn.Linear(8, 4), 5, 8))
        assert memory.saved_bytes(self.step(Net(8, 4), 5, 8)) == plain + 5 * 4 * 4
