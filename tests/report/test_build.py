"""The report as numbers: complete, plain, and never in the way of a study that is not done."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from evenkeel.report import numbers
from evenkeel.report.build import build
from evenkeel.report.numbers import Interval
from evenkeel.study.arms import Arm, Data
from evenkeel.study.presets import PRESETS, preset

from .planted import AFTER, BEFORE, NONE, STEPS, assert_readable, failed, made, plan_of, study

SIGMOID = replace(NONE, name="sigmoid", activation="sigmoid")
SIGMOID_BEFORE = replace(BEFORE, name="sigmoid, before", activation="sigmoid")


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(numbers, "RESAMPLES", 50)


def rates(arm: Arm, *values: float) -> list[Arm]:
    return [replace(arm, name=f"{arm.name}, lr {v}", learning_rate=v) for v in values]


def everything(plan, seeds=2):
    return [made(plan, arm, seed) for seed in range(seeds) for arm in plan.arms]


class TestPlainValues:
    def test_all_of_a_report_is_json_without_nan(self):
        plan = plan_of(seeds=3)
        trials = study(plan, {"plain": [0.9, 0.91, 0.92], "before": [0.95, 0.96, 0.97]})
        trials[0] = replace(trials[0], train_loss=(1.0, math.nan), final=0.5, status="diverged")
        trials[4] = replace(trials[4], percentiles=((math.nan, math.inf, 1.0),) * len(STEPS))
        trials.append(failed(plan, "after", 0))
        plain = build(plan, trials).to_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
        assert plain["rows"][0]["loss"] is None
        assert None in plain["bands"][-1]["low"]
        assert plain["rows"][-1]["status"] == "failed"
        assert plain["arms"][1]["against"]["accuracy"]["mean"] == pytest.approx(0.55 / 3)
        assert plain["answers"][3]["backward"]["parameters_moved"] is False
        assert plain["recipes"]["plain"]["steps"] == 100
        assert "placement" in plain["recipes"]["plain"]
        assert "eps" not in plain["recipes"]["plain"]

    def test_head_and_counts(self):
        plan = plan_of(seeds=5, baseline="before", data=Data("mnist"))
        report = build(plan, everything(plan))
        assert (report.name, report.data, report.baseline) == ("made", "mnist", "before")
        assert (report.seeds, report.steps, report.target) == (5, 100, 0.9)
        assert (report.finished, report.planned) == (6, 15)
        assert [arm.name for arm in report.arms] == ["plain", "before", "after"]
        assert list(report.recipes) == ["plain", "before", "after"]

    def test_rows_are_the_trials(self):
        plan = plan_of()
        trials = [made(plan, "plain", 0, 0.93, reach=60), failed(plan, "before", 3)]
        first, second = build(plan, trials).rows
        assert (first.arm, first.seed, first.status, first.accuracy) == ("plain", 0, "ok", 0.93)
        assert (first.steps_to_target, first.seconds, first.error) == (60, 1.5, "")
        assert first.loss == trials[0].train_loss[-1]
        assert (second.arm, second.status, second.accuracy) == ("before", "failed", None)
        assert (second.steps_to_target, second.loss) == (None, None)
        assert "no luck" in second.error


class TestLead:
    def test_it_is_batch_norm_against_none_under_the_baselines_settings(self):
        plan = plan_of(SIGMOID_BEFORE, SIGMOID, BEFORE, NONE, baseline="plain")
        finals = {"plain": [0.9, 0.91], "before": [0.95, 0.97], "sigmoid": [0.1, 0.1],
                  "sigmoid, before": [0.9, 0.8]}  # fmt: skip
        lead = build(plan, study(plan, finals)).lead
        assert (lead.comparison.a, lead.comparison.b) == ("before", "plain")
        assert lead.sentence.startswith("Batch norm before the activation against the same net wit")
        assert_readable(lead.sentence)

    def test_another_pair_will_do(self):
        plan = plan_of(SIGMOID_BEFORE, SIGMOID, AFTER, baseline="after")
        found = build(plan, study(plan, {"sigmoid": [0.1, 0.2], "sigmoid, before": [0.9, 0.8]}))
        assert found.lead.comparison.a == "sigmoid, before"

    @pytest.mark.parametrize("arms", [(NONE, AFTER), (BEFORE, AFTER), (NONE, SIGMOID_BEFORE)])
    def test_without_such_a_pair_there_is_none(self, arms):
        plan = plan_of(*arms)
        assert build(plan, everything(plan)).lead is None

    def test_one_seed_is_no_lead(self):
        plan = plan_of(NONE, BEFORE)
        assert build(plan, everything(plan, seeds=1)).lead is None


class TestLines:
    def test_rates_of_equal_arms_make_a_line(self):
        arms = [*rates(NONE, 0.1, 0.5, 0.2), *rates(BEFORE, 0.2, 0.1), AFTER]
        plan = plan_of(*arms)
        trials = [
            made(plan, arm, seed, arm.learning_rate + seed / 10, status=status)
            for arm in arms
            for seed, status in ((0, "ok"), (1, "diverged" if arm.learning_rate == 0.5 else "ok"))
        ]
        plain, before = build(plan, trials).rates
        assert (plain.label, before.label) == ("plain", "before")
        assert [(value, count) for value, _, count in plain.points] == [
            (0.1, 0),
            (0.2, 0),
            (0.5, 1),
        ]
        assert [i.mean for _, i, _ in plain.points] == pytest.approx([0.15, 0.25, 0.55])
        assert [value for value, _, _ in before.points] == [0.1, 0.2]

    def test_a_point_needs_a_trial_and_a_line_two_points(self):
        plan = plan_of(*rates(NONE, 0.1, 0.5))
        assert build(plan, [made(plan, "plain, lr 0.1", 0)]).rates == ()
        trials = [made(plan, "plain, lr 0.1", 0), failed(plan, "plain, lr 0.5", 0)]
        assert build(plan, trials).rates == ()
        trials.append(made(plan, "plain, lr 0.5", 1, 0.8))
        (line,) = build(plan, trials).rates
        assert line.points[1] == (0.5, Interval(0.8), 0)

    def test_other_steps_are_another_line(self):
        long = replace(NONE, name="long", learning_rate=0.7, steps=500)
        plan = plan_of(NONE, long)
        assert build(plan, everything(plan)).rates == ()
        plan = plan_of(NONE, replace(long, steps=100))  # the plan's own number
        assert len(build(plan, everything(plan)).rates) == 1

    def test_batches_go_with_their_rates_and_steps(self):
        def at(size: int, rate: float) -> Arm:
            changes = {"batch_size": size, "learning_rate": rate, "steps": 6400 // size}
            return replace(BEFORE, name=f"before, batch {size}", **changes)

        plan = plan_of(at(32, 0.32), at(2, 0.02), at(8, 0.08), at(64, 0.32))
        report = build(plan, everything(plan))
        (line,) = report.batches
        assert line.label == "before"
        assert [value for value, _, _ in line.points] == [2, 8, 32]

    @pytest.mark.parametrize(
        ("names", "label"),
        [
            (("plain", "plain, lr 0.2"), "plain"),
            (("plain, lr 0.02", "plain, lr 0.05"), "plain"),
            (("sigmoid, before", "sigmoid, before, lr 0.2"), "sigmoid, before"),
            (("fast", "slow"), "fast"),
        ],
    )
    def test_labels(self, names, label):
        arms = [replace(NONE, name=n, learning_rate=0.1 + i) for i, n in enumerate(names)]
        plan = plan_of(*arms)
        assert build(plan, everything(plan)).rates[0].label == label


class TestBands:
    def test_they_are_means_over_seeds(self):
        plan = plan_of()
        (band,) = build(plan, [made(plan, "before", 0), made(plan, "before", 1)]).bands
        assert (band.arm, band.steps) == ("before", STEPS)
        assert band.low == pytest.approx([-step / 10 for step in STEPS])
        assert band.middle == (0.0,) * len(STEPS)
        assert band.high == pytest.approx([step / 5 + 0.5 for step in STEPS])

    def test_only_of_trials_that_ended_well(self):
        plan = plan_of()
        trials = [
            made(plan, "plain", 0, status="diverged"),
            made(plan, "before", 0, percentiles=()),
            made(plan, "after", 0),
            failed(plan, "after", 1),
        ]
        report = build(plan, trials)
        assert [band.arm for band in report.bands] == ["after"]
        assert [curve.arm for curve in report.curves] == ["before", "after"]

    def test_the_pair_side_by_side(self):
        sigmoids = plan_of(NONE, BEFORE, SIGMOID, SIGMOID_BEFORE)
        assert build(sigmoids, everything(sigmoids)).pair == ("sigmoid", "sigmoid, before")
        plain = plan_of(NONE, AFTER, BEFORE)
        assert build(plain, everything(plain)).pair == ("plain", "before")
        without = plan_of(NONE, AFTER)
        assert build(without, everything(without)).pair == ("plain", "after")
        alone = plan_of(BEFORE, AFTER)
        assert build(alone, everything(alone)).pair is None
        undone = [made(plain, "plain", 0), made(plain, "after", 0)]
        assert build(plain, undone).pair == ("plain", "after")
        assert build(plain, undone[:1]).pair is None


class TestHighlights:
    def test_the_baseline_and_its_other_placements(self):
        layer = replace(BEFORE, name="layer", statistics="layer")
        plan = plan_of(layer, NONE, BEFORE, SIGMOID, AFTER, baseline="plain")
        assert build(plan, []).highlights == ("plain", "before", "after")
        assert build(plan_of(layer, NONE, baseline="layer"), []).highlights == ("layer",)

    def test_no_more_than_six(self):
        for name in PRESETS:
            plan = preset(name)
            shown = build(plan, []).highlights
            assert plan.baseline in shown
            assert len(shown) <= 6


class TestProvenance:
    def test_versions_are_counted(self):
        plan = plan_of()
        trials = [
            made(plan, "plain", 0),
            made(plan, "plain", 1, provenance={"torch": "2.14", "when": "2026-01-02T23:00:00Z"}),
            made(plan, "plain", 2, provenance={"torch": "2.13", "when": "2026-01-03T00:00:00Z"}),
            made(plan, "plain", 3, provenance={"unknown": 1}),
            failed(plan, "before", 0),
        ]
        assert set(build(plan, trials).provenance) == {
            ("torch", "2.13", 2), ("torch", "2.14", 1), ("day", "2026-01-02", 2),
            ("day", "2026-01-03", 1),
        }  # fmt: skip


class TestStudiesThatAreNotDone:
    @pytest.mark.parametrize("name", PRESETS)
    def test_no_trials(self, name):
        plan = preset(name)
        report = build(plan, [])
        assert (report.finished, report.planned) == (0, len(plan.arms) * plan.seeds)
        assert (report.lead, report.best, report.pair) == (None, None, None)
        assert report.curves == report.bands == report.rows == report.provenance == ()
        assert report.rates == report.batches == report.inference == ()
        assert [arm.accuracy for arm in report.arms] == [None] * len(plan.arms)
        assert {a.verdict for a in report.answers} == {"exact", "cannot tell"}
        json.dumps(report.to_dict(), allow_nan=False)

    def test_any_first_trials_of_a_study(self):
        plan = replace(preset("quick"), steps=100, points=len(STEPS), seeds=2)
        jobs = plan.trials
        for done in (1, 2, len(plan.arms), len(plan.arms) + 1, len(plan.arms) + 3, len(jobs)):
            trials = [
                failed(plan, arm.name, seed)
                if at % 7 == 3
                else made(plan, arm, seed, 0.9 + at / 1e4)
                for at, (arm, seed) in enumerate(jobs[:done])
            ]
            report = build(plan, trials)
            assert report.finished == len(report.rows) == done
            json.dumps(report.to_dict(), allow_nan=False)
            for answer in report.answers:
                assert_readable(answer.sentence)

    def test_only_failed_trials(self):
        plan = plan_of(seeds=1)
        report = build(plan, [failed(plan, arm.name, 0) for arm in plan.arms])
        assert [arm.failed for arm in report.arms] == [1, 1, 1]
        assert report.curves == report.bands == ()
        json.dumps(report.to_dict(), allow_nan=False)
