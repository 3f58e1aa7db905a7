"""The layout of an accelerated network's weights: set, measured, proved, given back."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import evenkeel
from evenkeel import allocator
from evenkeel.errors import ConfigError, SurgeryError
from evenkeel.surgery import accelerate as accelerate_module
from evenkeel.surgery.accelerating import layout as layout_module
from evenkeel.surgery.accelerating.layout import Layout, choose, convert, convert_back
from evenkeel.surgery.comparing import compare_layouts

from .cnns import ZOO, built, images
from .nets import state

LAST = torch.channels_last


def strides(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: p.stride() for name, p in model.named_parameters()}


def same(model: nn.Module, other: nn.Module) -> None:
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


def lies_last(t: torch.Tensor) -> bool:
    """Its strides are those that torch gives a new tensor in channels_last."""
    kind = LAST if t.dim() == 4 else torch.channels_last_3d
    return t.stride() == torch.empty(t.shape, memory_format=kind).stride()


def everything(model: nn.Module) -> object:
    """Bits, flags, hooks, memory layout and private attributes."""
    private = {name: sorted(vars(module)) for name, module in model.named_modules()}
    return state(model), strides(model), private


class Flattens(nn.Module):
    """A head that views what a convolution gives: only contiguous memory allows that."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 36, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.bn(self.conv(x))
        return self.head(h.view(len(h), -1))


class AsksForStrides(nn.Module):
    """A network that computes something else in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.bn(self.conv(x))
        return h + 1 if h.stride(1) == 1 else h


class TestSet:
    @pytest.mark.parametrize("name", ZOO)
    def test_same_parameters_and_numbers(self, name):
        model = built(name)
        before, values = everything(model), copy.deepcopy(model.state_dict())
        own, report = evenkeel.accelerate(model, images(), memory_format=LAST)
        assert everything(model) == before
        assert all(lies_last(p) for p in own.parameters() if p.dim() in (4, 5))
        assert list(own.state_dict()) == list(values)
        assert all(torch.equal(own.state_dict()[key], values[key]) for key in values)
        assert (report.layout.chosen, report.layout.changed) == ("channels_last", True)
        assert report.layout.difference.relative < 1e-9
        wide = images().double()
        wanted, found = copy.deepcopy(model).double(), copy.deepcopy(own).double()
        for module in (*wanted.modules(), *found.modules()):
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # it would drop other values, see draws
        for mode in (True, False):
            if mode and name == "functional":
                continue  # it has a dropout of its own
            y = wanted.train(mode)(wide)
            other = found.train(mode)(wide)
            torch.testing.assert_close(other, y, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize(
        ("conv", "shape"),
        [
            (nn.Conv2d(1, 20, 5), (4, 1, 28, 28)),
            (nn.Conv2d(3, 16, 3), (4, 3, 9, 9)),
            (nn.Conv2d(16, 16, 3, groups=16), (4, 16, 9, 9)),
            (nn.Conv2d(16, 32, 1), (4, 16, 9, 9)),
            (nn.ConvTranspose2d(16, 8, 3), (4, 16, 9, 9)),
            (nn.Conv3d(3, 8, 3), (2, 3, 9, 9, 9)),
        ],
        ids=["one channel", "images", "depthwise", "1x1", "transposed", "3d"],
    )
    def test_the_first_convolution_takes_images_as_they_come(self, conv, shape):
        own = copy.deepcopy(conv)
        x = torch.randn(shape)
        assert x.is_contiguous()
        wanted = own(x)
        convert(own, "channels_last")
        assert lies_last(own(x))
        torch.testing.assert_close(own(x), wanted, rtol=1e-4, atol=1e-5)

    def test_all_that_follows_is_in_channels_last(self):
        own, _ = evenkeel.accelerate(built("resnet"), memory_format=LAST)
        found = {}
        for name, module in own.named_modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.register_forward_hook(
                    lambda module, given, y, name=name: found.update({name: lies_last(y)})
                )
        own(images())
        assert len(found) > 8
        assert all(found.values())

    def test_in_place_for_an_optimizer_at_hand(self):
        torch.set_default_dtype(torch.float64)
        try:
            models = [built("resnet") for _ in range(2)]
            x = images().double()
        finally:
            torch.set_default_dtype(torch.float32)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in models]

        def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            for _ in range(3):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()

        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer)
        owned = list(map(id, models[0].parameters()))
        evenkeel.accelerate(models[0], x, inplace=True, memory_format=LAST)
        assert list(map(id, models[0].parameters())) == owned
        assert all(p.grad.stride() == p.stride() for p in models[0].parameters())
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer)
        for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)

    def test_contiguous_is_a_layout_too(self):
        model = built("vgg").to(memory_format=LAST)
        kept, report = evenkeel.accelerate(model)
        assert report.layout is None
        assert strides(kept) == strides(model)
        own, report = evenkeel.accelerate(model, memory_format=torch.contiguous_format)
        assert (report.layout.chosen, report.layout.changed) == ("contiguous", True)
        assert report.layout.difference is None
        assert all(p.is_contiguous() for p in own.parameters())
        assert strides(evenkeel.restore(own)) == strides(model)

    def test_what_lies_so_already_is_not_touched(self):
        model = built("vgg").to(memory_format=LAST)
        own, report = evenkeel.accelerate(model, images(), memory_format=LAST)
        assert str(report.layout) == "weights still channels_last: as asked"
        assert strides(evenkeel.restore(own)) == strides(model)

    def test_tied_weights_stay_tied(self):
        model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        model.append(nn.Conv2d(3, 3, 3, padding=1))
        model[2].weight = model[0].weight
        own, _ = evenkeel.accelerate(model, images(), memory_format=LAST)
        assert own[2].weight is own[0].weight
        assert lies_last(own[0].weight)

    def test_a_weight_that_shares_its_storage_stays(self):
        flat = torch.randn(2 * 81)
        convs = [nn.Conv2d(3, 3, 3) for _ in range(2)]
        for place, conv in enumerate(convs):
            conv.weight = nn.Parameter(flat[81 * place : 81 * (place + 1)].view(3, 3, 3, 3))
        model = nn.Sequential(*convs, nn.Conv2d(3, 4, 3))
        convert(model, "channels_last")
        assert [lies_last(conv.weight) for conv in model] == [False, False, True]
        flat.zero_()
        assert convs[1].weight.abs().max() == 0


class TestBack:
    @pytest.mark.parametrize("name", ZOO)
    def test_strides_and_classes(self, name):
        model = built(name)
        before = everything(model)
        evenkeel.accelerate(model, inplace=True, memory_format=LAST)
        model(images()).sum().backward()
        evenkeel.restore(model, inplace=True)
        now = everything(model)
        assert now[1:] == before[1:]
        assert all(p.grad.stride() == p.stride() for p in model.parameters() if p.grad is not None)

    @pytest.mark.parametrize("name", ["vgg", "resnet", "branches"])
    def test_of_copies_pickles_and_graphs(self, name):
        model = built(name)
        own, _ = evenkeel.accelerate(model, memory_format=LAST)
        for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
            assert strides(other) == strides(own) != strides(model)
            assert strides(evenkeel.restore(other)) == strides(model)
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        graph, _ = evenkeel.introduce(plain, images())
        quick, _ = evenkeel.accelerate(graph, images(), memory_format=LAST)
        assert strides(quick) != strides(graph)
        assert strides(evenkeel.restore(copy.deepcopy(quick))) == strides(graph)

    def test_checkpoints_go_both_ways(self):
        model, other = built("resnet"), built("resnet")
        own, _ = evenkeel.accelerate(model, memory_format=LAST)
        with torch.no_grad():
            for p in own.parameters():
                p.add_(torch.randn(p.shape))
        laid = strides(own)
        other.load_state_dict(own.state_dict(), strict=True)
        assert strides(other) == strides(model)
        same(own, other)
        own.load_state_dict(model.state_dict(), strict=True)
        assert strides(own) == laid
        same(own, model)

    def test_a_laid_out_network_is_not_accelerated_again(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3))
        own, report = evenkeel.accelerate(model, memory_format=LAST)
        assert report.swapped == ()
        with pytest.raises(SurgeryError, match="accelerated already"):
            evenkeel.accelerate(own)
        evenkeel.accelerate(evenkeel.restore(own))


class TestRefused:
    @pytest.mark.parametrize(
        ("wish", "text"),
        [
            ({"memory_format": "nhwc"}, "unknown memory_format 'nhwc'; choose 'keep', 'auto'"),
            ({"memory_format": torch.channels_last_3d}, "unknown memory_format torch.channels_la"),
            ({"memory_format": "auto"}, "times training steps and needs an example"),
            ({"seconds": 0}, "seconds must be above 0 to measure layouts, got 0"),
            ({"allocator": "kep"}, "unknown allocator 'kep'"),
        ],
    )
    def test_mistakes(self, wish, text):
        model = built("vgg")
        before = everything(model)
        with pytest.raises(ConfigError, match=text):
            evenkeel.accelerate(model, inplace=True, **wish)
        assert everything(model) == before

    @pytest.mark.parametrize("inplace", [True, False])
    def test_a_view_that_needs_the_old_layout(self, inplace):
        model = Flattens()
        before = everything(model)
        with pytest.raises(SurgeryError, match=r"in channels_last: view size .*write reshape in"):
            evenkeel.accelerate(model, images(), inplace=inplace, memory_format=LAST)
        assert everything(model) == before

    @pytest.mark.parametrize(
        ("conv", "is_unsafe"),
        [
            (nn.Conv2d(3, 8, 1, 2), True),
            (nn.Conv2d(16, 8, 1, (1, 2), groups=4), True),
            (nn.Conv2d(8, 8, 1, 2), False),
            (nn.Conv2d(3, 8, 1), False),
            (nn.Conv2d(3, 8, (1, 3), 2), False),
        ],
    )
    def test_a_gradient_that_torch_writes_outside_of_its_memory(self, conv, is_unsafe, monkeypatch):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        model = nn.Sequential(conv, nn.BatchNorm2d(8))
        assert (layout_module._unsafe(model) is not None) == is_unsafe
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        assert layout_module._unsafe(model) is None

    def test_a_network_that_torch_cannot_train_so(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        model = nn.Sequential(nn.Conv2d(3, 8, 1, 2), nn.BatchNorm2d(8), nn.ReLU())
        before = everything(model)
        with pytest.raises(SurgeryError, match=r"channels_last: on AVX2 .* gradient of '0', a 1x1"):
            evenkeel.accelerate(model, images(), inplace=True, memory_format=LAST)
        assert everything(model) == before
        own, report = evenkeel.accelerate(model, images(), memory_format="auto")
        assert not report.layout.changed
        assert report.layout.reason.startswith("on AVX2 torch writes outside")
        assert own[0].weight.is_contiguous()
        own, report = evenkeel.accelerate(model, images(), memory_format=torch.contiguous_format)
        assert report.layout.reason == "as asked"

    def test_another_result(self):
        model = AsksForStrides()
        before = everything(model)
        with pytest.raises(SurgeryError, match="in channels_last: the network would change by 1"):
            evenkeel.accelerate(model, images(), inplace=True, memory_format=LAST)
        assert everything(model) == before

    def test_auto_keeps_what_another_layout_would_break(self, monkeypatch):
        _, report = evenkeel.accelerate(Flattens(), images(), memory_format="auto", seconds=1)
        assert not report.layout.changed
        assert report.layout.reason.startswith("it could not be measured: view size is not")
        monkeypatch.setattr(layout_module, "_step", steps(0.02, 0.01))
        own, report = evenkeel.accelerate(AsksForStrides(), images(), memory_format="auto")
        assert not report.layout.changed
        assert "channels_last does not fit the network: the network would ch" in str(report.layout)
        assert own.conv.weight.is_contiguous()

    @pytest.mark.parametrize("accident", ["_format", "_swap"])
    def test_an_accident_on_the_way_changes_nothing(self, accident, monkeypatch):
        model = built("resnet")
        model(images()).sum().backward()
        before = everything(model)
        module = {"_format": layout_module, "_swap": accelerate_module}[accident]
        right, calls = getattr(module, accident), []

        def fails_late(thing, *rest, **named):
            """In the network itself, behind some of its weights or norms; copies are done first."""
            own = {id(t) for t in (*model.parameters(), *model.modules())}
            if own & {id(thing), *map(id, rest)}:
                calls.append(1)
                if len(calls) == 3:
                    raise MemoryError("no memory")
            return right(thing, *rest, **named)

        monkeypatch.setattr(module, accident, fails_late)
        with pytest.raises(MemoryError):
            evenkeel.accelerate(model, inplace=True, memory_format=LAST)
        assert len(calls) == 3
        assert everything(model) == before

    def test_the_proof_sees_another_network(self):
        model = built("vgg")
        other = copy.deepcopy(model)
        with torch.no_grad():
            next(other.parameters()).mul_(1 + 1e-6)
        with pytest.raises(SurgeryError, match="where 1e-09 of that is allowed"):
            compare_layouts(model, other, images())


def steps(contiguous: float, last: float, noise: float = 0.0):
    """A stand-in for the clocked step: its seconds by the layout of the weights."""
    jitter = itertools.cycle([1.0, 1 + noise, 1 - noise, 1 + noise, 1 - noise, 1.0, 1.0])

    def step(model, example, *, waits):
        weight = next(p for p in model.parameters() if p.dim() == 4)
        return (last if lies_last(weight) else contiguous) * next(jitter)

    return step


class TestChoice:
    @pytest.mark.parametrize(
        ("seconds", "noise", "changes", "says"),
        [
            ((1.0, 0.8), 0.0, True, "weights now channels_last: it saves 20 % of a step; a train"),
            ((1.0, 0.8), 0.05, True, "it saves 2"),
            ((1.0, 0.99), 0.0, False, "channels_last would save 1 % of a step, no more than the"),
            ((1.0, 0.9), 0.3, False, "no more than the noise"),
            ((1.0, 1.2), 0.0, False, "channels_last would take 20 % longer"),
        ],
    )
    def test_only_where_it_pays(self, seconds, noise, changes, says, monkeypatch):
        monkeypatch.setattr(layout_module, "_step", steps(*seconds, noise))
        model = built("resnet")
        own, report = evenkeel.accelerate(model, images(), memory_format="auto")
        assert report.layout.changed is changes
        assert says in str(report.layout)
        assert says in str(report)
        assert (strides(own) != strides(model)) is changes
        assert report.layout.contiguous == pytest.approx(seconds[0], rel=noise + 1e-9)
        assert report.layout.channels_last == pytest.approx(seconds[1], rel=noise + 1e-9)
        assert (report.layout.difference is not None) is changes
        found = json.loads(json.dumps(report.to_dict()))
        assert found["layout"]["changed"] is changes

    def test_from_channels_last_the_other_way(self, monkeypatch):
        monkeypatch.setattr(layout_module, "_step", steps(0.5, 1.0))
        model = built("vgg").to(memory_format=LAST)
        own, report = evenkeel.accelerate(model, images(), memory_format="auto")
        assert "weights now contiguous: it saves 50 % of a step" in str(report)
        assert all(p.is_contiguous() for p in own.parameters())

    def test_weights_that_have_no_layout(self):
        layout = choose(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), 1.0)
        assert layout == Layout("contiguous", False, "no weights of four or five dimensions")

    @pytest.mark.parametrize(
        ("one", "budget", "rounds"), [(0.01, 4.0, 50), (0.1, 2.1, 9), (1.0, 4.0, 0), (9, 4, 0)]
    )
    def test_the_time_is_bounded(self, one, budget, rounds, monkeypatch):
        """Two steps a round, and one round to warm up, within the budget; one round at least."""
        now = [0.0]

        def step(model, example, *, waits):
            now[0] += one
            return one

        monkeypatch.setattr(layout_module, "_step", step)
        monkeypatch.setattr(layout_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
        layout = choose(built("vgg"), images(), budget)
        assert layout.rounds == rounds
        assert now[0] <= max(budget, 2 * one) + 1e-9
        if not rounds:
            assert "no time to measure 3 rounds in 4 s; give more seconds" in str(layout)
            assert layout.contiguous is None

    def test_sides_take_turns_with_equal_random_numbers(self, monkeypatch):
        calls = []

        def step(model, example, *, waits):
            weight = next(p for p in model.parameters() if p.dim() == 4)
            calls.append((lies_last(weight), model.training, torch.rand(()).item()))
            return 1.0

        monkeypatch.setattr(layout_module, "_step", step)
        choose(built("vgg").eval(), images(), 4.0)
        firsts, seconds = calls[::2], calls[1::2]
        assert len(firsts) == len(seconds) == 51
        assert [first[0] for first in firsts] == [place % 2 == 1 for place in range(51)]
        assert all(a[0] is not b[0] and a[2] == b[2] for a, b in zip(firsts, seconds, strict=True))
        assert all(training for _, training, _ in calls)
        assert len({drawn for *_, drawn in firsts}) == 51

    def test_a_step_is_forward_and_backward(self):
        model = built("resnet")
        given = {"x": images().requires_grad_(False)}
        assert layout_module._step(model, given, waits=False) > 0
        wanted = built("resnet")
        wanted(images()).mean().backward()
        for mine, other in zip(model.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("name", ["resnet", "branches", "asks for training", "volumes"])
    def test_measuring_leaves_everything(self, name, training, monkeypatch):
        monkeypatch.setattr(layout_module, "MOST_ROUNDS", 3)
        model = built(name).train(training)
        next(model.children()).train(not training)
        model(images()).sum().backward()
        before, drawn = everything(model), torch.get_rng_state()
        gradients = [p.grad.clone() for p in model.parameters()]
        layout = choose(model, images(), 600.0)
        assert layout.rounds == 3, layout
        assert everything(model) == before
        assert torch.equal(torch.get_rng_state(), drawn)
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            assert torch.equal(p.grad, gradient)

    def test_measured_in_earnest(self, monkeypatch):
        monkeypatch.setattr(layout_module, "MOST_ROUNDS", 4)
        model = built("mobilenet")
        own, report = evenkeel.accelerate(model, images(16), memory_format="auto", seconds=600)
        layout = report.layout
        assert layout.rounds == 4
        assert layout.contiguous > 0
        assert layout.channels_last > 0
        assert "ms in channels_last (medians of" in str(report)
        assert (strides(own) != strides(model)) is layout.changed


def test_converting_back_what_was_never_converted():
    model = built("vgg")
    before = everything(model)
    convert_back(model)
    assert everything(model) == before


class TestAllocator:
    @pytest.fixture(autouse=True)
    def _as_before(self, monkeypatch):
        for key in allocator.variables(os.environ):
            monkeypatch.delenv(key)
        monkeypatch.delenv(allocator.SWITCH, raising=False)
        allocator.default_blocks()
        yield
        allocator.default_blocks()

    @pytest.mark.skipif(allocator.status().setting == "system", reason="there is no glibc here")
    def test_the_report_says_it_once(self):
        _, report = evenkeel.accelerate(built("vgg"))
        assert "  allocator: glibc keeps large blocks, set at run time" in str(report)
        assert "evenkeel.allocator.default_blocks() undoes it" in str(report)
        assert allocator.status().keeps
        _, report = evenkeel.accelerate(built("vgg"))
        assert report.allocator is None
        assert allocator.status().keeps

    def test_left_as_it_is(self, monkeypatch):
        before = allocator.status()
        _, report = evenkeel.accelerate(built("vgg"), allocator="default")
        assert (report.allocator, allocator.status()) == (None, before)
        _, report = evenkeel.accelerate(built("vgg").to("meta"))
        assert (report.allocator, allocator.status()) == (None, before)
        monkeypatch.setenv(allocator.SWITCH, "default")
        _, report = evenkeel.accelerate(built("vgg"))
        assert report.allocator is None
        assert not allocator.status().keeps
