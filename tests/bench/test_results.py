"""Results: the file, and what follows from the rows."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from evenkeel.bench.results import (
    Loss,
    Results,
    best_of_layouts,
    geometric_means,
    losses,
    row_of,
    totals,
)
from evenkeel.bench.shapes import places
from evenkeel.bench.tables import sentences, tables
from evenkeel.bench.timing import Samples
from evenkeel.errors import FormatError


def row(name="a", layout="nchw", dtype="float32", **options):
    """A row from a time, or a list of one time for each round, of every side."""
    sides = {key: options.pop(key) for key in list(options) if key in (*SIDES, *MORE)}
    samples = {
        side: Samples(tuple(t) if isinstance(t, list) else (t,) * 4, faults=2.0)
        for side, t in sides.items()
    }
    return row_of(name, layout, dtype, samples, **options)


SIDES = ("copy", "floor", "bare", "eager", "compile", "evenkeel")
MORE = ("evenkeel compiled", "bare compiled", "eager again")


def results(*rows, **options) -> Results:
    given = {"kind": "ops", "unit": "s", "settings": {"batch": 2}, "machine": {"cores": 2}}
    return Results(**given | options, rows=list(rows))


class TestFile:
    def test_round_trip(self):
        first = results(
            row(eager=2.0, evenkeel=[1.0, 2.0, 3.0, 4.0], counts={"vgg16": 1}, difference=1e-7),
            row("b", dtype="bfloat16", eager=1.0, absent={"evenkeel": "no"}),
            left_out=["c: too large"],
            finished=True,
        )
        assert Results.from_json(first.to_json()) == first

    def test_conclusions_are_in_it(self):
        data = json.loads(results(row(eager=2.0, evenkeel=4.0)).to_json())
        assert data["schema"] == 1
        assert data["finished"] is False
        assert data["summary"]["geometric_means"] == {"nchw float32": {"eager": 2.0}}
        (loss,) = data["summary"]["losses"]
        assert (loss["peer"], loss["ratio"], loss["is_clear"]) == ("eager", 2.0, True)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 1, "rows": 3}'])
    def test_other_files(self, text):
        with pytest.raises(FormatError, match="no result file"):
            Results.from_json(text)

    def test_another_schema(self):
        text = results().to_json().replace('"schema": 1', '"schema": 9')
        with pytest.raises(FormatError, match="has schema 9, this version reads 1"):
            Results.from_json(text)


class TestConclusions:
    def test_ratios_and_means(self):
        rows = [
            row(eager=2.0, compile=8.0, evenkeel=1.0),
            row("b", eager=1.0, evenkeel=2.0),
            row("c", eager=1.0),
        ]
        assert rows[0].ratios["compile"].median == 0.125
        assert rows[2].ratios == {}
        assert geometric_means(rows) == pytest.approx({"eager": 1.0, "compile": 0.125})

    def test_losses_are_against_the_best_peer_worst_first(self):
        rows = [
            row("won", eager=2.0, compile=3.0, evenkeel=1.0),
            row("lost", eager=2.0, compile=1.0, evenkeel=1.5),
            row("unclear", eager=1.0, evenkeel=[0.5, 0.9, 1.2, 5.0]),
            row("alone", evenkeel=1.0),
            row("copy is no peer", copy=0.1, bare=0.1, eager=2.0, evenkeel=1.0),
        ]
        assert losses(rows) == [
            Loss("lost", "nchw", "float32", "compile", 1.5, True),
            Loss("unclear", "nchw", "float32", "eager", pytest.approx(1.05), False),
        ]

    def test_totals_of_whole_networks_only(self):
        def rows(*left_out):
            return [
                row(str(place), eager=2.0, evenkeel=1.0, counts={"vgg16": count})
                for place, count in places("vgg16").items()
                if place.height not in left_out
            ]

        assert totals(rows()) == {"vgg16": {"eager": 26.0, "evenkeel": 13.0}}
        assert totals(rows(224)) == {}
        assert totals([*rows(224), row(counts={"vgg16": 2}, eager=1.0)]) == {"vgg16": {"eager": 24}}

    def test_best_of_layouts(self):
        rows = [
            row(eager=3.0, evenkeel=2.0),
            row(layout="channels_last", eager=2.5, compile=2.0, evenkeel=1.0),
            row("alone", eager=1.0, evenkeel=1.0),
        ]
        ((name, dtype, (theirs, peer), ours),) = best_of_layouts(rows)
        assert (name, dtype, peer) == ("a", "float32", "compile")
        assert theirs is ours is rows[1]


class TestShown:
    def shown(self, found: Results) -> str:
        console = Console(file=io.StringIO(), width=80)
        for table in tables(found):
            console.print(table)
        return console.file.getvalue()

    def test_tables_fit_80_columns_with_every_side(self):
        every = dict.fromkeys([side for side in SIDES if side != "bare"], 1.2345)
        text = self.shown(results(row("1024x112x112 bn+add+relu", **every), row("b", eager=1.0)))
        lines = text.splitlines()
        assert lines[0].strip() == "nchw float32, ms"
        assert max(map(len, lines)) <= 80
        assert lines[2].split() == [
            "1024x112x112", "bn+add+relu", *["1234"] * 4, "1.00", "100%",
        ]  # fmt: skip
        assert lines[3].split() == ["b", "-", "1000", "-", "-", "-", "-"]

    def test_a_table_for_each_layout_and_dtype(self):
        found = results(row(eager=1.0), row(layout="channels_last", eager=2.0), row("b", eager=3.0))
        text = self.shown(found)
        assert text.index("nchw float32") < text.index("b ") < text.index("channels_last float32")

    def test_bytes(self):
        text = self.shown(results(row(eager=2e6, evenkeel=1e6), kind="memory", unit="bytes"))
        assert "float32, MB" in text
        assert text.split()[-4:] == ["a", "2.00", "1.00", "0.50"]

    def test_sentences(self):
        found = results(
            row(eager=2.0, evenkeel=4.0),
            row(layout="channels_last", eager=1.0, evenkeel=0.5, absent={"compile": "no g++"}),
            row("b", layout="channels_last", eager=1.0, absent={"compile": "no g++"}),
            left_out=["c: too large"],
        )
        assert list(sentences(found)) == [
            "nchw float32: ours / eager is 2.00 (geometric mean of 1 case)",
            "nchw float32: page faults of a call, median: eager 2, ours 2",
            "channels_last float32: ours / eager is 0.50 (geometric mean of 1 case)",
            "channels_last float32: page faults of a call, median: eager 2, ours 2",
            "a float32, best layouts: eager channels_last 1000 ms, ours channels_last 500 ms, "
            "ratio 0.50",
            "ours is slower than the best peer in 1 of 2 cases:",
            "  a, nchw float32: 2.000 x eager",
            "compile is missing on a channels_last float32 and 1 more: no g++",
            "left out: c: too large",
            "stopped before the end",
        ]

    def test_what_is_compiled_is_compared_with_what_is_compiled(self):
        times = {"bare compiled": 1.0, "compile": 3.0, "evenkeel compiled": 1.5, "evenkeel": 2.0}
        one = row(bare=1.6, eager=4.0, **times)
        assert set(one.ratios) == {"eager", "compile"}
        assert losses([one]) == []
        found = [s for s in sentences(results(one, kind="steps")) if " / " in s]
        of = "(geometric mean of 1 case)"
        assert found == [
            f"nchw float32: {text} {of}"
            for text in (
                *("ours / eager is 0.50", "ours / compile is 0.67"),
                *("eager / no norm is 2.50", "ours / no norm is 1.25"),
                *("compile / no norm compiled is 3.00", "ours compiled / no norm compiled is 1.50"),
                "ours compiled / compile is 0.50",
            )
        ]

    def test_every_side_of_steps_on_a_gpu_fits_80_columns(self):
        sides = ("bare", "eager", "compile", "evenkeel", *MORE)
        one = row("resnet50 224px", **dict.fromkeys(sides, 0.1234))
        text = self.shown(results(one, kind="steps"))
        assert max(map(len, text.splitlines())) <= 80
        assert text.count("0.1234") == 0
        assert text.split()[-8:] == [*["123"] * 7, "1.00"]
        for name in ("bare c", "again", "compile", "ours c", "ours/eager"):
            assert f" {name}" in text

    def test_nothing_lost_and_nothing_compared(self):
        won = list(sentences(results(row(eager=2.0, evenkeel=1.0), finished=True)))
        assert won[-1] == "ours is slower than the best peer in 0 of 1 case"
        assert list(sentences(results(finished=True))) == []
