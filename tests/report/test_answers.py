"""The answers: what is said of planted outcomes, and what is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evenkeel.report import numbers
from evenkeel.report.answers import answers, best_of, four_ways
from evenkeel.report.numbers import corrected
from evenkeel.report.questions import QUESTIONS
from evenkeel.study.arms import Arm, Data
from evenkeel.study.presets import PRESETS, preset

from .planted import (
    AFTER,
    BEFORE,
    NONE,
    assert_readable,
    failed,
    made,
    plan_of,
    study,
)

PLAN = plan_of(NONE, BEFORE, AFTER, seeds=8)
LOW = [0.90, 0.91, 0.92, 0.90, 0.93, 0.91, 0.90, 0.92]
HIGH = [value + 0.05 + shift / 1000 for value, shift in zip(LOW, range(-4, 4), strict=True)]
NEAR = [value + shift / 1000 for value, shift in zip(LOW, (1, -1, 0, 1, -1, 0, 1, -1), strict=True)]
VAGUE = [value + shift / 100 for value, shift in zip(LOW, (3, -2, 1, -3, 4, 0, 2, -1), strict=True)]


def first(plan, trials):
    """The answer to question 1: before against after."""
    return answers(plan, trials)[0]


@pytest.mark.parametrize(
    ("before", "after", "verdict", "inside", "said"),
    [
        (HIGH, LOW, "answered", "better", "ends 5.0 points above batch norm after it (95 % interv"),
        (LOW, HIGH, "answered", "worse", "ends 5.0 points below batch norm after it (95 % interv"),
        (NEAR, LOW, "answered", "alike", "ends within half a point of batch norm after it (95 % "),
        (VAGUE, LOW, "cannot tell", "unclear", "after it: this study cannot tell which ends high"),
        (LOW, LOW, "answered", "identical", "and batch norm after it give the same numbers in ev"),
    ],
)
def test_planted_outcomes(before, after, verdict, inside, said):
    found = first(PLAN, study(PLAN, {"before": before, "after": after}))
    assert (found.number, found.question) == (1, "Before or after the non-linearity?")
    assert (found.verdict, found.evidence[0].verdict) == (verdict, inside)
    assert found.sentence.startswith("Batch norm before the activation ")
    assert said in found.sentence
    assert found.sentence == found.evidence[0].sentence
    assert (found.next_step != "") == (verdict == "cannot tell")


def test_speed_alone_is_an_answer():
    trials = study(
        PLAN,
        {"before": VAGUE, "after": LOW},
        {"before": [10, 20, 10, 20, 10, 10, 20, 20], "after": [40] * 8},
    )
    found = first(PLAN, trials)
    assert (found.verdict, found.evidence[0].verdict) == ("answered", "faster")
    assert "cannot tell which ends higher" in found.sentence
    assert "but batch norm before the activation reaches 90 % 2.8 times sooner" in found.sentence
    assert found.next_step == ""


def test_the_numbers_in_the_sentence_are_the_evidence_s():
    found = first(PLAN, study(PLAN, {"before": HIGH, "after": LOW})).evidence[0].comparison
    assert found.accuracy.mean == pytest.approx(np.subtract(HIGH, LOW).mean())
    assert (found.a, found.b, found.seeds) == ("before", "after", 8)


def test_a_questions_comparisons_are_one_family():
    per_location = replace(BEFORE, name="location", statistics="per-location")
    layer = replace(BEFORE, name="layer", statistics="layer")
    plan = plan_of(NONE, BEFORE, per_location, layer, seeds=8)
    trials = study(plan, {"before": HIGH, "location": LOW, "layer": VAGUE})
    found = answers(plan, trials)[5]
    assert [e.comparison.b for e in found.evidence] == ["location", "layer"]
    raw = [e.comparison.p for e in found.evidence]
    speeds = [e.comparison.speed_p for e in found.evidence]
    wanted = corrected([*raw, *speeds])[:2]
    assert [e.comparison.p_corrected for e in found.evidence] == pytest.approx(wanted)


def test_two_activations_are_named():
    sigmoids = [replace(arm, name=f"s {arm.name}", activation="sigmoid") for arm in (BEFORE, AFTER)]
    plan = plan_of(NONE, BEFORE, AFTER, *sigmoids, seeds=8)
    finals = {"before": HIGH, "after": LOW, "s before": LOW, "s after": HIGH}
    found = first(plan, study(plan, finals))
    starts = [e.sentence.split(",")[0] for e in found.evidence]
    assert starts == ["With ReLU", "With sigmoid"]
    assert [e.verdict for e in found.evidence] == ["better", "worse"]


class TestWhereNothingCanBeSaid:
    def test_no_arms_for_it(self):
        plan = plan_of(NONE, BEFORE)
        found = first(plan, study(plan, {"plain": LOW[:4], "before": HIGH[:4]}))
        assert found.verdict == "cannot tell"
        assert found.sentence == "This study has no arms that differ in this alone."
        assert found.next_step == "Run: evenkeel study --preset placement"
        assert found.evidence == ()

    def test_one_seed_only(self):
        found = first(PLAN, study(PLAN, {"before": HIGH[:1], "after": LOW[:1]}))
        assert found.verdict == "cannot tell"
        assert found.sentence == (
            "This study has arms that differ in this alone, but no two finished seeds of both."
        )
        assert found.next_step == "More finished trials of these arms."

    def test_all_failed(self):
        trials = [failed(PLAN, arm.name, seed) for arm, seed in PLAN.trials]
        for found in answers(PLAN, trials):
            assert found.verdict == ("exact" if found.number == 4 else "cannot tell")
            assert found.evidence == ()
            assert_readable(found.sentence)

    def test_failed_trials_leave_their_seeds_out(self):
        trials = study(PLAN, {"before": HIGH, "after": LOW})
        trials[9] = failed(PLAN, "after", 1)
        assert first(PLAN, trials).evidence[0].comparison.seeds == 7


class TestNextStep:
    UNCLEAR = study(PLAN, {"before": VAGUE, "after": LOW})

    def test_a_study_of_the_users_says_how_many_seeds(self):
        found = first(PLAN, self.UNCLEAR)
        comparison = found.evidence[0].comparison
        assert comparison.family == 2  # accuracy and speed
        assert comparison.accuracy.mean == pytest.approx(np.subtract(VAGUE, LOW).mean())
        seeds = comparison.seeds_to_tell()
        assert 8 < seeds <= 500
        assert found.next_step == f"About {seeds} seeds would show a difference of this size."

    @pytest.mark.parametrize(
        ("name", "recommended"), [("quick", "placement"), ("placement", "placement")]
    )
    def test_a_preset_names_the_command(self, name, recommended):
        plan = replace(preset(name), steps=100, points=6, seeds=8)
        finals = {"before activation": VAGUE, "after activation": LOW}
        found = first(plan, study(plan, finals))
        assert found.verdict == "cannot tell"
        assert f": evenkeel study --preset {recommended} --seeds " in found.next_step

    def test_the_command_keeps_data_and_network(self):
        arms = [replace(arm, model="nets.mine:small") for arm in (NONE, BEFORE)]
        plan = plan_of(*arms, data=Data("mnist", "/data/my files"))
        found = first(plan, [])
        assert found.next_step == (
            "Run: evenkeel study --preset placement --data mnist --data-dir '/data/my files' "
            "--model nets.mine:small"
        )

    def test_the_command_keeps_the_size_of_pictures(self):
        plan = plan_of(NONE, BEFORE, data=Data("folder", "/pictures", image_size=24))
        assert first(plan, []).next_step == (
            "Run: evenkeel study --preset placement --data folder --data-dir /pictures "
            "--image-size 24"
        )

    def test_at_least_one_seed_more_than_there_are(self):
        needed = int(first(PLAN, self.UNCLEAR).next_step.split()[1])
        plan = replace(PLAN, seeds=needed + 5)
        assert first(plan, self.UNCLEAR).next_step.startswith(f"About {needed + 6} seeds would")

    def test_too_small_to_ever_show(self):
        tiny = [low + shift / 100 for low, shift in zip(LOW, (3, -3) * 4, strict=True)]
        tiny[0] += 0.0004
        found = first(PLAN, study(PLAN, {"before": tiny, "after": LOW}))
        assert found.verdict == "cannot tell"
        assert "no affordable number of seeds" in found.next_step


# Question 5: skipping and folding


def ways(running=0.96, batch=0.95, skipped=0.4, folded=0.96, left=0, **fold):
    names = ["conv1", "conv2", "fc1"]
    reason = "its input comes from 'act1', which is not a conv or dense layer"
    return {
        "running": running, "batch": batch, "skipped": skipped, "folded": folded,
        "fold": {
            "folded": [[f"{n}_norm", n] for n in names[left:]],
            "left": [[f"{n}_norm", reason] for n in names[:left]],
            "difference": 3.0e-6, "scale": 8.0, "budget": 1e-5,
        } | fold,
    }  # fmt: skip


def inferred(*outcomes, arm="before", plan=PLAN):
    return [made(plan, arm, seed, inference=each) for seed, each in enumerate(outcomes)]


def fifth(trials, plan=PLAN):
    return answers(plan, trials)[4]


class TestInference:
    def test_skipping_breaks_and_folding_does_not(self):
        trials = inferred(
            ways(0.96, skipped=0.40, difference=3e-6, scale=8.0),
            ways(0.94, skipped=0.50, folded=0.94, difference=5e-6, scale=20.0),
            ways(0.95, skipped=0.42, folded=0.95, difference=2e-6, scale=4.0),
        )
        found = fifth(trials)
        assert found.verdict == "answered"
        assert found.next_step == ""
        assert found.sentence.startswith(
            "No: without its norms 'before' goes from 95.0 % to 44.0 %, a loss of 51.0 points (95 "
            "% interval 44.0 to 56.0, p = 0.005). With 3 of 3 norms folded into the layers "
            "around them it is exactly as accurate in every trial; the largest difference of a "
            "logit is 5.0e-06, 5.0e-07 of the largest logit."
        )
        assert found.inference.running.mean == pytest.approx(0.95)
        assert found.inference.batch.mean == pytest.approx(0.95)
        assert found.inference.skipped.mean == pytest.approx(0.44)
        assert found.inference.same

    def test_a_fold_that_changes_an_accuracy_says_which(self):
        found = fifth(inferred(ways(), ways(0.97, skipped=0.5, folded=0.95)))
        assert "folded into the layers around them it is 95.5 %; the" in found.sentence
        assert not found.inference.same

    def test_norms_that_stay_are_counted(self):
        found = fifth(inferred(ways(left=1), ways(left=1, skipped=0.5)))
        assert "With 2 of 3 norms folded" in found.sentence
        assert (found.inference.folded_norms, found.inference.left_norms) == (2, 1)
        assert found.inference.left_reason.startswith("its input comes from 'act1'")

    def test_norms_that_all_stay_prove_nothing_about_folding(self):
        found = fifth(inferred(ways(left=3), ways(left=3, skipped=0.5)))
        assert found.sentence.endswith(f"). Its norms do not fold: {found.inference.left_reason}.")
        assert "logit" not in found.sentence

    def test_a_drop_that_chance_explains_is_no_answer(self):
        found = fifth(inferred(ways(skipped=0.95), ways(skipped=0.97), ways(skipped=0.955)))
        assert found.verdict == "cannot tell"
        assert found.sentence.startswith("This study cannot tell: without its norms 'before' goes")
        assert found.next_step == "More seeds would tell."

    def test_skipping_that_helps_is_not_called_a_loss(self):
        better = [ways(0.5 + i / 1000, skipped=0.9, folded=0.5 + i / 1000) for i in range(6)]
        found = fifth(inferred(*better))
        assert found.verdict == "answered"
        assert found.sentence.startswith(
            "Here it did no harm: without its norms 'before' goes from"
        )
        assert "a gain of 39.8 points (95 % interval 39.6 to 39.9, p < 0.001)" in found.sentence

    def test_a_bound_of_zero_is_a_bound(self):
        """Of two seeds the interval is the range, here from no loss at all."""
        found = fifth(inferred(ways(0.9, skipped=0.9), ways(0.9, skipped=0.5)))
        assert "a loss of 20.0 points (95 % interval 0.0 to 40.0, p = 0.50)" in found.sentence

    @pytest.mark.parametrize("trials", [[], inferred(ways()), [made(PLAN, "before", 0)]])
    def test_too_little_to_say(self, trials):
        found = fifth(trials)
        assert found.verdict == "cannot tell"
        assert found.sentence == "This study has no trained batch norm to skip, or too few seeds."
        assert found.next_step == "Run: evenkeel study --preset quick"

    def test_logits_of_zero_are_no_division(self):
        found = fifth(inferred(ways(difference=0.0, scale=0.0), ways(skipped=0.5, scale=0.0)))
        assert found.inference.relative == pytest.approx(3e-6)

    def test_the_best_arm_is_one_that_folds_if_there_is_one(self):
        trials = [
            *inferred(ways(0.99, left=3), ways(0.99, left=3), arm="after"),
            *inferred(ways(0.95), ways(0.95)),
        ]
        assert best_of(PLAN, trials).arm == "before"
        assert best_of(PLAN, trials[:2]).arm == "after"
        assert best_of(PLAN, []) is None
        assert [w.arm for w in four_ways(PLAN, trials)] == ["before", "after"]

    def test_norms_without_memory_are_not_asked(self):
        layer = Arm("layer", placement="before-activation", statistics="layer")
        plan = plan_of(NONE, layer)
        assert four_ways(plan, inferred(ways(), ways(), arm="layer", plan=plan)) == []

    def test_only_trials_with_a_measurement_count(self):
        trials = [*inferred(ways(), ways(skipped=0.5)), failed(PLAN, "before", 2)]
        trials.append(made(PLAN, "before", 3, 0.1, status="diverged"))
        assert four_ways(PLAN, trials)[0].skipped.mean == pytest.approx(0.45)


# All of them


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("outcome", ["clear", "noise", "alike", "some", "empty"])
def test_every_answer_to_every_study_can_be_read(name, outcome, monkeypatch):
    monkeypatch.setattr(numbers, "RESAMPLES", 20)
    plan = replace(preset(name), seeds=3, steps=100, points=6)
    rng = np.random.default_rng(0)
    trials = []
    for place, arm in enumerate(plan.arms):
        if outcome == "empty":
            break
        for seed in range(1 if outcome == "some" and place % 2 else 3):
            final = {"clear": 0.4 + place / 60 + seed / 1000, "alike": 0.9}.get(outcome)
            final = rng.uniform(0.8, 0.9) if final is None else final
            more = {"inference": ways()} if arm.has_norm else {}
            reach = None if place % 3 == 1 else 10 * (1 + place % 4)
            trials.append(made(plan, arm, seed, final, reach=reach, **more))
    found = answers(plan, trials)
    assert [a.number for a in found] == list(range(1, 11))
    for answer, question in zip(found, QUESTIONS, strict=True):
        assert answer.verdict in ("answered", "exact", "cannot tell")
        assert (answer.next_step != "") == (answer.verdict == "cannot tell")
        assert answer.background == question.background
        assert_readable(answer.sentence)
        for evidence in answer.evidence:
            assert_readable(evidence.sentence)
        assert answer.next_step == "" or answer.next_step[0].isupper()
