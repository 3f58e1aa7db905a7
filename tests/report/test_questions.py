"""Which arms bear on which question: pairs that differ in one thing alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evenkeel.report.questions import QUESTIONS, differing_in
from evenkeel.study.arms import Arm, Plan
from evenkeel.study.config import load_plan
from evenkeel.study.presets import PRESETS

from .planted import AFTER, BEFORE, NONE, plan_of

BY_NUMBER = {question.number: question for question in QUESTIONS}
WITHOUT_ARMS = {4, 5}  # 4 is computed, 5 is about every arm with norms

CLAIMED = {
    "quick": {1, 2, 3, 6, 7, 8, 9, 10},
    "placement": {1, 3, 7, 8},
    "modes": {1, 2, 6, 10},
    "paper": set(),
    "batch-size": {6, 9},
    "learning-rate": {1},
    "residual": {1, 8},
}


def found(plan: Plan, number: int) -> set[tuple[str, str]]:
    return {(c.a.name, c.b.name) for c in BY_NUMBER[number].contrasts(plan)}


def test_there_are_the_ten_questions_in_order():
    assert [question.number for question in QUESTIONS] == list(range(1, 11))
    assert all(question.text.endswith("?") for question in QUESTIONS)
    assert all(question.background.endswith(".") for question in QUESTIONS)


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_has_arms_for_its_questions(name):
    plan = PRESETS[name]()
    answered = {q.number for q in QUESTIONS if q.contrasts(plan)}
    assert answered == CLAIMED[name]
    assert any(arm.has_norm and arm.statistics != "layer" for arm in plan.arms)  # question 5


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: str(q.number))
def test_the_preset_that_a_question_recommends_answers_it(question):
    if question.number in WITHOUT_ARMS:
        assert question.contrasts(PRESETS["quick"]()) == []
    else:
        assert question.contrasts(PRESETS[question.preset]())


@pytest.mark.parametrize("name", PRESETS)
def test_contrasts_differ_in_one_field_alone(name):
    plan = PRESETS[name]()
    fields = {
        1: {"placement"}, 2: {"statistics", "dense_statistics"}, 3: {"placement"},
        6: {"statistics"}, 7: {"input_norm"}, 8: {"every", "layers", "placement"},
        9: {"statistics", "placement"}, 10: {"affine"},
    }  # fmt: skip
    for question in QUESTIONS:
        contrasts = question.contrasts(plan)
        for c in contrasts:
            assert len(set(c.a.difference(c.b)) - {"steps"}) == 1, (c.a.name, c.b.name)
            assert set(c.a.difference(c.b)) - {"steps"} <= fields[question.number]
            assert plan.steps_of(c.a) == plan.steps_of(c.b)
            assert c.a_words
            assert c.b_words
            assert c.a_words != c.b_words
        pairs = [(c.a.name, c.b.name) for c in contrasts]
        assert len(pairs) == len(set(pairs))
        assert not {(b, a) for a, b in pairs} & set(pairs)


class TestQuick:
    PLAN = PRESETS["quick"]()

    @pytest.mark.parametrize(
        ("number", "pairs"),
        [
            (1, {("before activation", "after activation"), ("sigmoid, before", "sigmoid, after")}),
            (2, {("before activation", "per activation"),
                 ("before activation", "dense per activation")}),
            (3, {("before activation", "on input of layers")}),
            (7, {("before activation", "before activation, raw input"),
                 ("no norm", "no norm, raw input")}),
            (8, {("before activation", "every other layer"),
                 ("before activation", "convolutions only"),
                 ("before activation", "dense layers only"),
                 ("before activation", "after pooling")}),
            (9, {("before activation, batch 2", "layer norm, batch 2"),
                 ("before activation, batch 2", "no norm, batch 2"),
                 ("before activation", "layer norm"), ("before activation", "no norm")}),
            (10, {("before activation", "no gamma and beta"),
                  ("sigmoid, before", "sigmoid, no gamma and beta")}),
        ],
    )  # fmt: skip
    def test_exactly_these(self, number, pairs):
        assert found(self.PLAN, number) == pairs

    def test_small_batches_come_first_and_inputs_with_norms(self):
        batches = [c.a.batch_size for c in BY_NUMBER[9].contrasts(self.PLAN)]
        assert batches == [2, 2, 32, 32]
        first = BY_NUMBER[7].contrasts(self.PLAN)[0]
        assert first.a.has_norm
        assert first.a_words == "batch norm on normalized input"


class TestDifferingIn:
    def test_order_is_first_then_second_value(self):
        plan = plan_of(NONE, BEFORE, AFTER)
        pairs = differing_in(plan, "placement", "before-activation", "after-activation")
        assert pairs == [(BEFORE, AFTER)]
        assert differing_in(plan, "placement", "on-input", "after-pooling") == []

    def test_other_budgets_are_no_contrast(self):
        longer = replace(AFTER, steps=200)
        assert differing_in(plan_of(BEFORE, longer), "placement", *placements()) == []
        both = plan_of(replace(BEFORE, steps=200), longer)
        assert len(differing_in(both, "placement", *placements())) == 1
        said = plan_of(replace(BEFORE, steps=100), AFTER)  # 100 is the plan's own
        assert len(differing_in(said, "placement", *placements())) == 1

    @pytest.mark.parametrize(
        "change",
        [{"learning_rate": 0.5}, {"activation": "sigmoid"}, {"batch_size": 2}, {"model": "paper"},
         {"options": {"momentum": 0.5}}, {"eps": 1e-3}, {"bn_momentum": 0.5}, {"affine": False},
         {"every": 2}, {"weight_decay": 0.1}, {"input_norm": False}, {"decay_norm": True}],
    )  # fmt: skip
    def test_a_second_difference_is_no_contrast(self, change):
        other = replace(AFTER, **change)
        assert differing_in(plan_of(BEFORE, other), "placement", *placements()) == []
        both = plan_of(replace(BEFORE, **change), other)
        assert len(differing_in(both, "placement", *placements())) == 1

    @pytest.mark.parametrize(
        "change", [{"affine": False}, {"eps": 1e-3}, {"statistics": "layer"}, {"every": 2}]
    )
    def test_settings_of_norms_against_an_arm_without_any(self, change):
        """They count unless they are the usual ones, or the arm without norms says the same."""
        unusual = replace(BEFORE, **change)
        sought = ("placement", "before-activation", "none")
        assert differing_in(plan_of(NONE, BEFORE), *sought) == [(BEFORE, NONE)]
        assert differing_in(plan_of(NONE, unusual), *sought) == []
        same = replace(NONE, **change)
        assert differing_in(plan_of(same, unusual), *sought) == [(unusual, same)]

    def test_none_and_the_default_are_told_apart(self):
        dense = replace(BEFORE, name="dense", dense_statistics="per-activation")
        plan = plan_of(NONE, BEFORE, dense)
        assert found(plan, 2) == {("before", "dense")}


def placements() -> tuple[str, str]:
    return "before-activation", "after-activation"


class TestPlansOfTheUsers:
    def test_a_toml_file(self, tmp_path):
        (tmp_path / "mine.toml").write_text(
            """
            seeds = 3
            steps = 50
            baseline = "plain"

            [defaults]
            model = "lenet5"
            eps = 1e-3

            [[arm]]
            name = "plain"

            [[arm]]
            name = "normed"
            placement = ["before-activation", "after-activation", "on-input"]
            affine = [true, false]

            [[arm]]
            name = "longer"
            placement = "after-pooling"
            steps = 500
            """
        )
        plan = load_plan(tmp_path / "mine.toml")
        name = "normed, placement {}, affine {}".format
        assert found(plan, 1) == {
            (name("before-activation", affine), name("after-activation", affine))
            for affine in (True, False)
        }
        assert found(plan, 3) == {
            (name("before-activation", affine), name("on-input", affine))
            for affine in (True, False)
        }
        assert found(plan, 10) == {
            (name(place, True), name(place, False))
            for place in ("before-activation", "after-activation", "on-input")
        }
        assert found(plan, 8) == set()
        assert found(plan, 9) == set()  # one batch size

    def test_batches_with_a_rate_that_does_not_scale_are_not_compared(self):
        """Question 9 keeps the rate per sample, or the rate would be what differs."""

        def arms(size, rate):
            changes = {"batch_size": size, "learning_rate": rate}
            return (
                replace(NONE, name=f"plain {size}", **changes),
                replace(BEFORE, name=f"before {size}", **changes),
            )

        plan = plan_of(*arms(32, 0.32), *arms(2, 0.02), *arms(8, 0.32))
        assert found(plan, 9) == {("before 2", "plain 2"), ("before 32", "plain 32")}
        assert [c.a.batch_size for c in BY_NUMBER[9].contrasts(plan)] == [2, 32]

    def test_only_batch_norm_is_asked_how_small_a_batch_it_stands(self):
        layer = {"statistics": "layer", "dense_statistics": "layer"}
        small = {"batch_size": 2, "learning_rate": NONE.learning_rate / 16}
        arms = [replace(arm, name=f"{arm.name} 32", **layer) for arm in (NONE, BEFORE)]
        arms += [replace(arm, name=f"{arm.name} 2", **layer, **small) for arm in (NONE, BEFORE)]
        plan = plan_of(*arms)
        assert len(differing_in(plan, "placement", "before-activation", "none")) == 2
        assert found(plan, 9) == set()

    def test_a_study_of_one_arm_has_no_contrasts(self):
        plan = plan_of(Arm("only", placement="before-activation"))
        assert all(question.contrasts(plan) == [] for question in QUESTIONS)
