"""The figures: the numbers are the report's, Plotly accepts them, gaps say what would help."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import pytest

from evenkeel.report.build import Report
from evenkeel.report.figures import figures
from evenkeel.report.plots import COLOURS, Figure, Style, label, numbers_axis, stretch, styles
from evenkeel.report.tables import WAYS
from evenkeel.report.wording import percent
from evenkeel.study.presets import PRESETS, preset

from .synthetic import BEFORE, PLAIN, SIGMOID, SIGMOID_BEFORE, Level, plan_of, report_of

KEYS = ["curves", "finals", "bands", "rates", "batches", "inference"]


def figure(report: Report, key: str) -> Figure:
    return next(each for each in figures(report) if each.key == key)


def spec(report: Report, key: str) -> dict[str, Any]:
    found = figure(report, key).spec
    assert found is not None
    return found


def painted(value: Any) -> Any:
    """A spec with a colour for each name, as the page's script looks them up."""
    if isinstance(value, dict):
        return {key: painted(each) for key, each in value.items()}
    if isinstance(value, list):
        return [painted(each) for each in value]
    if isinstance(value, str) and re.fullmatch(r"@[a-z]+\d?(/\d+)?", value):
        return "#123456"
    return value


@pytest.mark.parametrize(
    "study", ["whole", "hostile", "unfinished", "failed", "one_arm", "no_norms", "empty"]
)
class TestEveryStudy:
    def test_every_figure_is_there_in_order(self, study, request):
        found = figures(request.getfixturevalue(study))
        assert [each.key for each in found] == KEYS

    def test_a_figure_has_numbers_or_a_preset_that_would_give_them(self, study, request):
        for each in figures(request.getfixturevalue(study)):
            if each.spec is None:
                assert each.table is None
                named = re.search(r"evenkeel study --preset ([a-z-]+)$", each.missing)
                assert named is not None
                assert named[1] in PRESETS
            else:
                assert each.table is not None
                assert each.table.rows
                assert each.caption.endswith(".")
                assert each.label
                assert not each.missing

    def test_plotly_accepts_them(self, study, request):
        for each in figures(request.getfixturevalue(study)):
            if each.spec is not None:
                drawn = painted(each.spec)
                built = go.Figure(drawn["data"], drawn["layout"])
                built.update_layout(drawn.get("narrow", {}))

    def test_they_are_valid_json(self, study, request):
        for each in figures(request.getfixturevalue(study)):
            json.dumps(each.spec, allow_nan=False)


class TestCurves:
    def test_numbers_are_the_reports(self, whole):
        lines = [t for t in spec(whole, "curves")["data"] if "text" in t]
        assert [tuple(t["y"]) for t in lines] == [curve.mean for curve in whole.curves]
        assert [tuple(t["x"]) for t in lines] == [curve.steps for curve in whole.curves]
        edges = [t for t in spec(whole, "curves")["data"] if t["line"]["width"] == 0]
        assert [tuple(t["y"]) for t in edges[::2]] == [curve.low for curve in whole.curves]
        assert [tuple(t["y"]) for t in edges[1::2]] == [curve.high for curve in whole.curves]

    def test_highlights_are_shown_and_others_wait(self, whole):
        found = figure(whole, "curves")
        assert {e.name for e in found.legend if e.shown} == set(whole.highlights)
        assert {e.name for e in found.legend} == {curve.arm for curve in whole.curves}
        shown = {e.place for e in found.legend if e.shown}
        for trace in found.spec["data"]:
            if isinstance(trace["meta"], int):
                assert trace["visible"] == (True if trace["meta"] in shown else "legendonly")

    def test_without_highlights_the_first_arm_is_shown(self, whole):
        legend = figure(replace(whole, highlights=()), "curves").legend
        assert [e.shown for e in legend] == [True] + [False] * (len(legend) - 1)

    @pytest.mark.parametrize(("budget", "log"), [(None, False), (200, False), (1000, True)])
    def test_budgets_far_apart_need_a_logarithmic_axis(self, budget, log):
        other = replace(BEFORE, steps=budget)
        report = replace(report_of(PLAIN, other), highlights=("plain", "before"))
        assert spec(report, "curves")["log"]["on"] is log

    def test_the_table_has_every_point(self, whole):
        rows = figure(whole, "curves").table.rows
        assert len(rows) == sum(len(curve.steps) for curve in whole.curves)
        curve = whole.curves[1]
        own = [row for row in rows if row[0].text == curve.arm]
        assert [row[1].text for row in own] == [str(step) for step in curve.steps]
        assert [row[2].text for row in own] == [percent(mean, 2) for mean in curve.mean]


class TestFinals:
    def test_numbers_are_the_reports(self, whole):
        dots = spec(whole, "finals")["data"][-1]
        assert dots["x"] == [arm.accuracy.mean for arm in whole.arms]
        spans = spec(whole, "finals")["data"][-2]
        ends = [v for arm in whole.arms for v in (arm.accuracy.low, arm.accuracy.high, None)]
        assert spans["x"] == ends

    def test_the_baseline_is_marked(self, whole):
        found = spec(whole, "finals")
        symbols = found["data"][-1]["marker"]["symbol"]
        place = [arm.name for arm in whole.arms].index(whole.baseline)
        assert [n for n, symbol in enumerate(symbols) if symbol == "square"] == [place]
        assert found["layout"]["yaxis"]["ticktext"][place] == f"<b>{whole.baseline}</b>"
        assert set(found["data"][0]["x"]) == {whole.arms[place].accuracy.mean}

    def test_filled_dots_are_those_known_to_differ(self, whole):
        symbols = spec(whole, "finals")["data"][-1]["marker"]["symbol"]
        for arm, symbol in zip(whole.arms, symbols, strict=True):
            if arm.against is not None:
                known = arm.against.p_corrected < 0.05
                assert symbol == ("circle" if known else "circle-open")
        assert {"circle", "circle-open"} <= set(symbols)

    def test_diverged_trials_are_told(self, whole):
        place = [arm.name for arm in whole.arms].index("plain, lr 0.2")
        text = spec(whole, "finals")["data"][-1]["text"][place]
        assert text.endswith("4 of 4 trials diverged")

    def test_far_apart_means_a_stretched_axis(self):
        near = {"plain": Level(0.97), "before": Level(0.98)}
        assert spec(report_of(PLAIN, BEFORE), "finals")["stretch"]["on"] is False
        assert spec(report_of(PLAIN, BEFORE, levels=near), "finals")["stretch"]["on"] is False
        far = {"plain": Level(0.5), "before": Level(0.98)}
        assert spec(report_of(PLAIN, BEFORE, levels=far), "finals")["stretch"]["on"] is True


class TestBands:
    def test_a_sigmoid_pair_is_preferred(self, whole):
        assert whole.pair == ("sigmoid", "sigmoid, before")
        found = spec(whole, "bands")
        names = [found["choices"][place]["name"] for place in found["chosen"]]
        assert tuple(names) == whole.pair

    def test_else_the_baseline_and_its_twin(self):
        assert report_of(PLAIN, BEFORE).pair == ("plain", "before")
        late = replace(SIGMOID_BEFORE, name="sigmoid, after", placement="after-activation")
        assert report_of(PLAIN, SIGMOID, late).pair == ("sigmoid", "sigmoid, after")

    def test_panels_share_their_axes(self, whole):
        layout = spec(whole, "bands")["layout"]
        assert (layout["xaxis2"]["matches"], layout["yaxis2"]["matches"]) == ("x", "y")

    def test_numbers_are_the_reports(self, whole):
        found = spec(whole, "bands")
        for band, choice in zip(whole.bands, found["choices"], strict=True):
            assert choice["name"] == band.arm
            assert tuple(choice["x"]) == band.steps
            for key in ("low", "middle", "high"):
                assert tuple(choice[key]) == getattr(band, key)
        for side, place in enumerate(found["chosen"]):
            traces = found["data"][3 * side : 3 * side + 3]
            choice = found["choices"][place]
            assert [t["y"] for t in traces] == [choice["low"], choice["high"], choice["middle"]]

    def test_one_band_is_one_panel(self, one_arm):
        found = spec(one_arm, "bands")
        assert one_arm.pair is None
        assert len(found["data"]) == 3
        assert "xaxis2" not in found["layout"]


class TestSensitivity:
    def test_numbers_are_the_reports(self, whole):
        dots = [t for t in spec(whole, "rates")["data"] if t["mode"] == "lines+markers"]
        assert len(dots) == len(whole.rates) == 2
        for line, trace in zip(whole.rates, dots, strict=True):
            assert trace["x"] == pytest.approx([0.02, 0.2], rel=0.01)
            assert [value for value, _, _ in line.points] == [0.02, 0.2]
            assert "learning rate 0.2" in trace["text"][1]
            assert trace["y"] == [i.mean for _, i, _ in line.points]

    def test_the_axis_is_logarithmic_with_the_values_as_ticks(self, whole):
        found = spec(whole, "rates")["layout"]["xaxis"]
        assert (found["type"], found["ticktext"]) == ("log", ["0.02", "0.2"])

    def test_diverged_trials_are_crossed(self, whole):
        crosses = [
            t for t in spec(whole, "rates")["data"] if t.get("marker", {}).get("symbol") == "x-thin"
        ]
        assert [t["x"] for t in crosses] == [pytest.approx([0.2], rel=0.01), []]
        assert "diverged" in figure(whole, "rates").legend[-1].name

    def test_batch_sizes(self, whole):
        (line,) = whole.batches
        found = figure(whole, "batches")
        assert found.spec["layout"]["xaxis"]["ticktext"] == ["2", "32"]
        assert [row[1].text for row in found.table.rows] == ["2", "32"]
        assert [row[2].text for row in found.table.rows] == [
            percent(i.mean, 2) for _, i, _ in line.points
        ]

    def test_crowded_values_get_fewer_ticks(self):
        values = [0.001 * 1.2**n for n in range(40)]
        ticks = numbers_axis("learning rate", values)["tickvals"]
        assert ticks[0] == values[0]
        assert 6 <= len(ticks) <= 12

    def test_a_rate_of_zero_has_no_logarithm(self):
        assert "type" not in numbers_axis("learning rate", [0.0, 0.1])


class TestInference:
    def test_numbers_are_the_reports(self, whole):
        traces = spec(whole, "inference")["data"]
        for n, (way, _) in enumerate(WAYS):
            expected = [getattr(each, way).mean for each in whole.inference]
            assert traces[2 * n + 1]["x"] == expected

    def test_the_table_says_what_folds_and_why_not(self, whole):
        rows = {row[0].text: row for row in figure(whole, "inference").table.rows}
        assert [cell.text for cell in rows["before"][5:]] == [
            "3", "0", "3.2e-06", "4.0e-07", "\u2013",
        ]  # fmt: skip
        assert rows["after"][6].text == "3"
        assert rows["after"][-1].text == "its input comes from 'relu1'"


class TestShared:
    def test_styles_differ(self):
        found = styles([str(n) for n in range(5 * COLOURS)])
        assert len({(s.colour, s.dash) for s in found.values()}) == 5 * COLOURS
        assert all(isinstance(s, Style) for s in found.values())

    @pytest.mark.parametrize(
        ("name", "shown"),
        [
            ("plain", "plain"),
            ("<b>&", "&lt;b&gt;&amp;"),
            ("$x$", "&#36;x&#36;"),
            ("n" * 40, "n" * 33 + "\u2026"),
        ],
    )
    def test_labels_have_no_markup_and_an_end(self, name, shown):
        assert label(name) == shown

    def test_a_stretched_axis_ends_before_a_perfect_score(self):
        assert stretch("x", [1.0, 0.99, 0.9], on=True)["floor"] == pytest.approx(0.005)
        assert stretch("x", [1.0], on=True)["floor"] > 0

    def test_presets_have_the_figures_that_sentences_promise(self):
        def of(name: str) -> Report:
            plan = preset(name)
            return report_of(*plan.arms, seeds=2, baseline=plan.baseline)

        assert figure(of("learning-rate"), "rates").spec is not None
        assert figure(of("batch-size"), "batches").spec is not None
        assert of("paper").pair == ("no norm, lr 0.1", "batch norm, lr 0.1")

    def test_the_factory_makes_equal_trials(self):
        plan = plan_of(PLAIN, BEFORE, seeds=2)
        assert (
            report_of(PLAIN, BEFORE, seeds=2).to_dict()
            == report_of(PLAIN, BEFORE, seeds=2).to_dict()
        )
        assert len(plan.trials) == 4
