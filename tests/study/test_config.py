"""Studies from TOML files."""

from __future__ import annotations

import pytest

from evenkeel.errors import ConfigError
from evenkeel.study.config import load_plan

GOOD = """
seeds = 3
steps = 50
target = 0.9
baseline = "plain"

[data]
name = "mnist"
folder = "here"
binary = true

[defaults]
model = "lenet5"
learning_rate = 0.1
options = { momentum = 0.9 }

[[arm]]
name = "plain"

[[arm]]
name = "normed"
placement = ["before-activation", "after-activation"]
batch_size = [16, 32]
"""


def written(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_a_whole_file(tmp_path):
    plan = load_plan(written(tmp_path, GOOD))
    assert (plan.name, plan.seeds, plan.steps, plan.target) == ("mine", 3, 50, 0.9)
    assert (plan.data.name, plan.data.folder, plan.data.binary) == ("mnist", "here", True)
    assert [arm.name for arm in plan.arms] == [
        "plain",
        "normed, placement before-activation, batch_size 16",
        "normed, placement before-activation, batch_size 32",
        "normed, placement after-activation, batch_size 16",
        "normed, placement after-activation, batch_size 32",
    ]
    assert {arm.model for arm in plan.arms} == {"lenet5"}
    assert plan.arms[4].batch_size == 32
    assert plan.arms[4].options == {"momentum": 0.9}


def test_the_data_set_may_be_a_word(tmp_path):
    plan = load_plan(written(tmp_path, 'data = "digits"\n[[arm]]\nname = "plain"'))
    assert plan.data.name == "digits"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = ", "is not valid TOML"),
        ("seed = 3\n[[arm]]\nname = 'a'", r"unknown key 'seed' \(did you mean 'seeds'\?\)"),
        ("[data]\nfile = 'x'\n[[arm]]\nname = 'a'", r"\[data\] of .* unknown key 'file'"),
        ("[defaults]\nlr = 0.1\n[[arm]]\nname = 'a'", r"\[defaults\] of .* unknown key 'lr'"),
        ("[[arm]]\nname = 'a'\nplace = 'none'", r"unknown key 'place' \(did you mean"),
        ("[[arm]]\nmodel = 'standard'", r"every \[\[arm\]\] needs a name"),
        ("arm = 3", r"begins with \[\[arm\]\]"),
        ("defaults = 3\n[[arm]]\nname = 'a'", r"\[defaults\] must be a table but is 3"),
        ("[[arm]]\nname = 'a'\n[[arm]]\nname = 'a'", "two arms named 'a'"),
        ("seeds = 'many'\n[[arm]]\nname = 'a'", "seeds must be int but is 'many'"),
        ("name = 'x'", "has no arms"),
        ("arms = []\n[[arm]]\nname = 'a'", "unknown key 'arms'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_plan(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file"):
        load_plan(tmp_path / "none.toml")
