"""Arms and plans: checked when made, equal when they mean the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from evenkeel.errors import ConfigError
from evenkeel.study.arms import Arm, Data, Plan, check_keys

PLAIN = Arm("plain")
NORMED = Arm("normed", placement="before-activation")


def plan(*arms: Arm, **changes) -> Plan:
    return Plan("test", arms or (PLAIN, NORMED), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement": "before-activaton"}, r"did you mean 'before-activation'\?"),
        ({"placement": "nowhere"}, "unknown placement 'nowhere'; choose one of none, before"),
        ({"model": "standart"}, r"unknown model 'standart' \(did you mean 'standard'\?\)"),
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
        ({"layers": "convs"}, r"unknown layers 'convs'"),
        ({"statistics": "spacial"}, r"did you mean 'spatial'\?"),
        ({"statistics": "n c h w -> q"}, "axis 'q' on the right"),
        ({"dense_statistics": "n c ->x"}, "axis 'x' on the right"),
        ({"every": 0}, "every is 0; give 1 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": -0.1}, "learning_rate is -0.1; give 0 or more"),
        ({"learning_rate": "fast"}, "learning_rate must be float but is 'fast'"),
        ({"affine": 1}, "affine must be bool but is 1"),
        ({"batch_size": True}, "batch_size must be int but is True"),
        ({"batch_size": 2.5}, "batch_size must be int but is 2.5"),
        ({"options": [1]}, "options must be"),
    ],
)
def test_a_wrong_field_is_named_with_its_arm(changes, message):
    with pytest.raises(ConfigError, match=f"arm 'mine': .*{message}"):
        Arm("mine", **changes)


def test_the_name_is_no_part_of_the_recipe():
    assert replace(NORMED, name="other").recipe() == NORMED.recipe()


def test_settings_of_norms_do_not_matter_without_norms():
    other = replace(PLAIN, statistics="layer", every=2, affine=False, eps=1.0)
    assert other.recipe() == PLAIN.recipe()
    assert replace(NORMED, affine=False).recipe() != NORMED.recipe()


def test_difference_names_both_values():
    assert NORMED.difference(PLAIN) == {"placement": ("before-activation", "none")}
    assert PLAIN.difference(replace(PLAIN, name="x")) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ()}, "has no arms"),
        ({"arms": (PLAIN, PLAIN)}, "has two arms named 'plain'"),
        ({"baseline": "plan"}, r"baseline 'plan' of study 'test' is no arm \(did you mean"),
        ({"seeds": 0}, "seeds is 0; give 1 or more"),
        ({"points": 0}, "points is 0; give 1 or more"),
    ],
)
def test_a_wrong_plan_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Plan(**{"name": "test", "arms": (PLAIN, NORMED), **changes})


def test_unknown_data_is_refused():
    with pytest.raises(ConfigError, match=r"unknown data 'mnits' \(did you mean 'mnist'\?\)"):
        Data("mnits")


def test_trials_go_seed_by_seed():
    names = [(arm.name, seed) for arm, seed in plan(seeds=2).trials]
    assert names == [("plain", 0), ("normed", 0), ("plain", 1), ("normed", 1)]


def test_the_key_holds_what_decides_the_outcome_and_nothing_else():
    base = plan()
    key = base.key(NORMED)
    same = [
        base.on(seeds=9),
        base.on(target=0.5),
        base.on(name="other"),
        base.on(arms=(NORMED,), baseline="normed"),
        base.on(data=Data(folder="/elsewhere")),
    ]
    assert {each.key(NORMED) for each in same} == {key}
    other = [
        base.on(steps=1),
        base.on(points=3),
        base.on(curve_limit=7),
        base.on(data=Data(binary=True)),
        base.on(data=Data("mnist")),
        base.on(context={"version": "2"}),
        base.on(context={"data": "f00"}),
    ]
    keys = [each.key(NORMED) for each in other]
    assert len({key, *keys}) == len(keys) + 1


def test_an_edit_of_the_users_network_changes_the_keys_of_its_arms_alone():
    own = Arm("own", model="nets:small")
    before = plan(PLAIN, own, context={"nets:small": "1"})
    after = plan(PLAIN, own, context={"nets:small": "2"})
    assert before.key(PLAIN) == after.key(PLAIN)
    assert before.key(own) != after.key(own)


def test_a_plan_survives_json():
    original = plan(
        replace(PLAIN, options={"momentum": 0.9}),
        NORMED,
        data=Data("idx", folder="/data", binary=True),
        context={"version": "1"},
    )
    again = Plan.from_json(original.to_json())
    assert again == original
    assert [again.key(arm) for arm in again.arms] == [original.key(a) for a in original.arms]


class TestAdapted:
    def test_nothing_given_changes_nothing(self):
        assert plan().adapted() == plan()

    def test_data_and_folder(self, tmp_path: Path):
        adapted = plan(data=Data(binary=True)).adapted(data="mnist", folder=tmp_path)
        assert adapted.data == Data("mnist", str(tmp_path), binary=True)

    def test_another_data_set_forgets_the_folder(self):
        assert plan(data=Data("mnist", "/m")).adapted(data="digits").data.folder is None

    def test_steps_scale_the_arms_that_have_their_own(self):
        arms = (PLAIN, replace(NORMED, steps=1000))
        adapted = plan(*arms, steps=400).adapted(steps=100)
        assert [adapted.steps_of(arm) for arm in adapted.arms] == [100, 250]

    def test_a_users_network_makes_arms_equal_that_differ_in_activation(self):
        sigmoid = Arm("sigmoid", activation="sigmoid")
        adapted = plan(PLAIN, sigmoid, NORMED, baseline="sigmoid").adapted(model="nets:small")
        assert [arm.name for arm in adapted.arms] == ["plain", "normed"]
        assert adapted.baseline == "plain"


def test_unknown_keys_are_named_with_what_was_meant():
    with pytest.raises(ConfigError, match=r"it has an unknown key 'placment' \(did you mean"):
        check_keys(["placment"], Arm, "it")
