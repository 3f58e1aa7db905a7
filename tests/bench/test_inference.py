"""Folded inference: the networks, and that no side is timed on wrong numbers."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from evenkeel import allocator
from evenkeel.bench import architectures, inference
from evenkeel.bench.architectures import ARCHITECTURES, build, example
from evenkeel.bench.inference import Plan, plans
from evenkeel.bench.results import Results, Row, losses, over_best
from evenkeel.bench.tables import sentences, tables
from evenkeel.bench.timing import Measure, Ratio
from evenkeel.errors import ConfigError, SurgeryError
from evenkeel.surgery import fold as surgery

from .rounds import time_once

BOTH = ("nchw", "channels_last")
TINY = Plan("vgg", 32, 0.125, 2, ("nchw",))
NORMS = {
    "vgg": 8, "resnet18": 20, "mobilenetv2": 52, "densenet": 53, "efficientnet": 49, "preact": 17,
    "inception": 57, "seresnet": 20, "shufflenet": 56, "unet": 18, "dcgan": 4,
}  # fmt: skip


def measured(plan: Plan = TINY) -> list[Row]:
    return list(inference.run([plan], seconds=0, compiles=False))


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


class TestNetworks:
    @pytest.mark.parametrize("size", [32, 96])
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_shapes_and_norms(self, name, size):
        model = build(name, size=size, width=0.125)
        shape = {"unet": (10, size, size), "dcgan": (3, size, size)}.get(name, (10,))
        with torch.no_grad():
            one, two = model(example(name, 2, size)), model(example(name, 2, size, seed=5))
        assert one.shape == (2, *shape)
        assert one.isfinite().all()
        assert (one - two).abs().max() > 0.01 * one.abs().max()
        assert len(norms(model)) == NORMS[name]
        assert not any(module.training for module in model.modules())

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_every_norm_changes_what_it_gets(self, name):
        for norm in norms(build(name, width=0.125)):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            shift = norm.bias - norm.running_mean * scale
            assert (scale - 1).abs().max() > 0.1
            assert shift.abs().max() > 0.1

    def test_their_statistics_are_those_of_data(self):
        """Behind a norm with the right statistics values have its weight and bias as moments."""
        model = build("unet", width=0.125)
        first = model.down[0][0]
        with torch.no_grad():
            found = first[1](first[0](example("unet", 8, 32, seed=1))).transpose(0, 1).flatten(1)
        torch.testing.assert_close(found.mean(1), first[1].bias, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(found.std(1), first[1].weight, atol=1e-3, rtol=1e-3)

    @pytest.mark.parametrize("name", ["resnet18", "shufflenet"])
    def test_the_same_every_time_and_no_random_numbers_used(self, name):
        before = torch.random.get_rng_state()
        one, two = (build(name, width=0.125).state_dict() for _ in range(2))
        assert torch.equal(before, torch.random.get_rng_state())
        assert all(torch.equal(one[key], two[key]) for key in one)

    def test_unknown(self):
        with pytest.raises(ConfigError, match=r"'u-net' \(did you mean 'unet'\?\); choose one of"):
            build("u-net")


class TestPlans:
    def test_all_and_quick(self):
        every, quick = plans(layouts=BOTH), plans(layouts=BOTH, quick=True)
        assert len(every) == len(quick) == 2 * 11
        assert {(plan.size, plan.width) for plan in every} == {(96, 1.0)}
        assert {(plan.size, plan.width) for plan in quick} == {(32, 0.5)}
        assert every[0].name == "vgg 96px x1"
        assert len({plan.name for plan in every}) == len(every)
        assert inference.estimate(every, 1.0, True) > inference.estimate(quick, 1.0, False) > 22

    def test_one(self):
        (plan,) = plans(layouts=("nchw",), batch=3, network="dcgan")
        assert (plan.net, plan.batch, plan.layouts) == ("dcgan", 3, ("nchw",))
        with pytest.raises(ConfigError, match="unknown network 'lenet'"):
            plans(layouts=BOTH, network="lenet")


class Twice(nn.Module):
    """One convolution called twice with a norm behind each call, which torch's fold gets wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.one, self.two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.two(self.conv(self.one(self.conv(self.first(x))).relu()))


class TestSides:
    @pytest.fixture(autouse=True)
    def _once(self, monkeypatch):
        time_once(monkeypatch)

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2", "shufflenet", "unet", "dcgan"])
    def test_all_compute_the_same(self, name):
        (row,) = measured(Plan(name, 32, 0.125, 1, ("nchw",)))
        assert row.absent == {}
        assert set(row.sides) == {"eval", "fx", "freeze", "evenkeel"}
        assert set(row.ratios) == {"eval", "fx", "freeze"}
        assert row.difference < 1e-4  # eval itself is off by 1e-5 where float64 is the truth
        assert row.left["eval"] == NORMS[name]
        assert row.left["evenkeel"] <= min(row.left["fx"], row.left["freeze"])

    def test_a_row_for_each_layout(self):
        rows = measured(replace(TINY, layouts=BOTH))
        assert [row.group for row in rows] == [(layout, "float32") for layout in BOTH]
        assert [row.absent for row in rows] == [{}, {}]

    def test_compiled(self, monkeypatch):
        given = []
        monkeypatch.setattr(torch, "compile", lambda model, **options: given.append(options))
        sides = inference.sides_of(TINY, "nchw", True)
        assert sides["compile"]().left is None
        assert given[0]["options"] == {"freezing": True}
        assert "compile" not in inference.sides_of(TINY, "nchw", False)

    def test_layout_and_mode(self, monkeypatch):
        seen = []

        class Model(nn.Module):
            def forward(self, x):
                seen.append((x, torch.is_inference_mode_enabled()))
                return x

        def fold(model, images, **options):
            assert not model.training
            weight = next(model.parameters())
            assert weight.is_contiguous(memory_format=torch.channels_last)
            assert images.is_contiguous(memory_format=torch.channels_last)
            return Model(), type("Report", (), {"left": ()})

        monkeypatch.setattr(surgery, "fold", fold)
        side = inference.sides_of(TINY, "channels_last", False)["evenkeel"]()
        assert (side().shape, side.left) == ((2, 3, 32, 32), 0)
        assert seen[0][1]
        assert seen[0][0].is_contiguous(memory_format=torch.channels_last)

    def test_torchs_wrong_fold_is_not_timed(self, monkeypatch):
        monkeypatch.setitem(architectures._OWN, "twice", lambda size, width: Twice())
        monkeypatch.setattr(architectures, "ARCHITECTURES", ("twice",))
        (row,) = measured(replace(TINY, net="twice"))
        assert "its numbers are off by" in row.absent["fx"]
        assert set(row.sides) == {"eval", "freeze", "evenkeel"}
        assert row.best_peer != "fx"

    def test_neither_is_ours(self, monkeypatch):
        def fold(model, images, **options):
            next(model.parameters()).data.mul_(1.1)
            return model, type("Report", (), {"left": ()})

        monkeypatch.setattr(surgery, "fold", fold)
        (row,) = measured()
        assert "its numbers are off by" in row.absent["evenkeel"]
        assert row.difference > 0.01
        assert set(row.sides) == {"eval", "fx", "freeze"}
        assert (row.ratios, row.over_best) == ({}, None)

    def test_one_that_knows_its_example_by_heart_is_not_timed(self, monkeypatch):
        def fused(model, images):
            with torch.no_grad():
                output = model(images)
            return lambda x: output, 0

        monkeypatch.setattr(inference, "_fused", fused)
        (row,) = measured()
        assert "its numbers are off by" in row.absent["fx"]

    @pytest.mark.parametrize(
        ("output", "text"), [(torch.full((2, 10), torch.nan), "nan"), (torch.ones(20), "inf")]
    )
    def test_no_numbers_and_another_shape(self, monkeypatch, output, text):
        monkeypatch.setattr(inference, "_fused", lambda model, images: (lambda x: output, 0))
        (row,) = measured()
        assert f"off by {text}" in row.absent["fx"]

    def test_one_that_fails_is_named(self, monkeypatch):
        def fold(model, images, **options):
            raise SurgeryError("no graph")

        monkeypatch.setattr(surgery, "fold", fold)
        (row,) = measured()
        assert row.absent == {"evenkeel": "SurgeryError: no graph"}
        assert "evenkeel" not in row.left

    def test_nothing_to_compare_with(self, monkeypatch):
        def broken(model, images):
            raise MemoryError("too large")

        monkeypatch.setattr(inference, "_as_it_is", broken)
        (row,) = measured()
        assert row.sides == {}
        assert row.absent.pop("eval") == "MemoryError: too large"
        assert len(row.absent) == 3
        assert all("nothing to compare with" in reason for reason in row.absent.values())


def row(name="resnet18 96px x1", layout="nchw", left=None, **times) -> Row:
    sides = {side: Measure(time, time, time) for side, time in times.items()}
    ratios = {
        peer: Ratio(*[times["evenkeel"] / times[peer]] * 3)
        for peer in times
        if peer != "evenkeel" and "evenkeel" in times
    }
    return Row(name, layout, "float32", sides, ratios, left=left or {})


def results(*rows: Row) -> Results:
    return Results("fold", "s", {}, {"cores": 2}, rows=list(rows), finished=True)


EVERY = {"eval": 4.0, "fx": 2.0, "freeze": 1.0, "compile": 8.0, "evenkeel": 2.0}
LEFT = {"eval": 20, "fx": 3, "freeze": 4, "evenkeel": 1}


class TestShown:
    def test_the_best_of_torch(self):
        rows = [row(**EVERY), row("b", eval=1.0, fx=2.0, evenkeel=0.5), row("c", eval=1.0)]
        assert rows[0].over_best.median == 2
        assert rows[2].over_best is None
        assert over_best(rows) == pytest.approx(1)
        assert over_best(rows[2:]) is None
        assert [(loss.name, loss.peer) for loss in losses(rows)] == [(rows[0].name, "freeze")]

    def test_file(self):
        found = results(row(left=LEFT, **EVERY))
        text = found.to_json()
        assert Results.from_json(text) == found
        data = json.loads(text)
        assert data["summary"]["over_best"] == {"nchw float32": 2.0}
        assert data["rows"][0]["left"] == LEFT

    def test_a_file_from_before_there_were_folds(self):
        data = json.loads(results(row(**EVERY)).to_json())
        del data["rows"][0]["left"]
        assert Results.from_json(json.dumps(data)).rows[0].left == {}

    def test_table(self):
        console = Console(file=io.StringIO(), width=80)
        found = results(row("efficientnet 96px x8", left=LEFT, **EVERY), row("b", eval=1.0))
        for table in tables(found):
            console.print(table)
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        assert lines[1].split() == [
            "case", "eval", "fx", "freeze", "compile", "ours", "ours/best", "left",
        ]  # fmt: skip
        assert lines[2].split() == [
            "efficientnet", "96px", "x8", "4000", "2000", "1000", "8000", "2000", "2.00",
            "1", "of", "20",
        ]  # fmt: skip
        assert lines[3].split() == ["b", "1000", *["-"] * 6]

    def test_sentences(self):
        plain = row("b", eval=1.0, fx=2.0, evenkeel=0.5, left={"eval": 5, "fx": 5, "evenkeel": 0})
        said = list(sentences(results(row(left=LEFT, **EVERY), plain)))
        assert "nchw float32: ours / eval is 0.50 (geometric mean of 2 cases)" in said
        assert "nchw float32: ours / the best of torch is 1.00 (geometric mean of 2 cases)" in said
        assert "nchw float32: norms left: fx 8 of 25, freeze 4 of 20, ours 1 of 25" in said
        assert said[-2:] == [
            "ours is slower than the best peer in 1 of 2 cases:",
            "  resnet18 96px x1, nchw float32: 2.000 x freeze",
        ]

    def test_nothing_folded_anywhere(self):
        said = list(sentences(results(row(eval=1.0))))
        assert said == []


class TestCommand:
    @pytest.fixture(autouse=True)
    def _as_before(self, monkeypatch):
        for key in allocator.variables(os.environ):
            monkeypatch.delenv(key)
        threads = torch.get_num_threads()
        yield
        torch.set_num_threads(threads)
        allocator.default_blocks()

    def test_end_to_end(self, command, tmp_path, monkeypatch):
        def tiny(**given):
            seen.append(given)
            return [replace(TINY, layouts=tuple(given["layouts"]))]

        seen = []
        monkeypatch.setattr(inference, "plans", tiny)
        words = ("--net", "vgg", "--batch", "2", "--layout", "channels_last", "--quick")
        more = ("--seconds", "0.01", "--threads", "1", "--allocator", "default")
        code, out, err = command("bench", "fold", *words, *more, "--out", "found.json")
        assert (code, err) == (0, "")
        said = " ".join(out.split())
        assert "inference of 1 network, folded; batch 2, about" in said
        assert "torch.compile is left out; --compile brings it in" in said
        assert "channels_last float32, ms" in said
        assert "ours / the best of torch is" in said
        assert seen == [{"layouts": ["channels_last"], "batch": 2, "network": "vgg", "quick": True}]
        found = Results.from_json((tmp_path / "found.json").read_text())
        assert (found.kind, found.unit, found.finished) == ("fold", "s", True)
        assert found.settings["compiles"] is False
        assert found.machine["threads"] == 1

    def test_announced_without_running(self, command, monkeypatch):
        monkeypatch.setattr(inference, "run", None)
        code, out, _ = command("bench", "fold", "--dry-run", "--compile")
        assert code == 0
        assert "inference of 11 networks, folded; batch 1 and 8, about" in " ".join(out.split())
        assert "torch.compile is left out" not in out

    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (("--net", "unett"), "unknown network 'unett' (did you mean 'unet'?)"),
            (("--layout", "nhwc"), "unknown layout 'nhwc'"),
            (("--batch", "0"), "Invalid value for '--batch'"),
        ],
    )
    def test_mistakes(self, command, words, text):
        code, _, err = command("bench", "fold", *words, "--dry-run")
        assert code == 2
        assert text in " ".join(err.split())

    def test_help_names_every_network(self, command):
        code, out, _ = command("bench", "fold", "--help")
        assert code == 0
        assert all(name in out for name in ARCHITECTURES)
