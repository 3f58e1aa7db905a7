"""One trial: what it measures, that it repeats, and how it ends badly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from evenkeel.errors import SurgeryError
from evenkeel.study import inference
from evenkeel.study.arms import Arm
from evenkeel.study.data import load
from evenkeel.study.trial import Trial, run_trial
from evenkeel.surgery.introduce import PLACEMENTS

from .helpers import CPU, tiny_dataset, tiny_plan

NORMED = Arm("normed", placement="before-activation")
DIGITS = load("digits")


def trial(arm=NORMED, seed=0, dataset=DIGITS, **changes) -> Trial:
    return run_trial(tiny_plan(arm, **changes), arm, seed, dataset, CPU)


def outcome(t: Trial):
    return replace(t, seconds=0.0, provenance={})


def test_the_same_seed_gives_the_same_trial_and_another_one_does_not():
    first = trial()
    torch.manual_seed(99)
    assert outcome(trial()) == outcome(first)
    assert outcome(trial(seed=1)) != outcome(first)


def test_the_curve():
    t = trial(steps=20, points=5)
    assert t.steps == (1, 4, 8, 13, 20)  # early points are closer
    assert len(t.accuracy) == len(t.train_loss) == len(t.percentiles) == 5
    assert t.status == "ok"
    assert t.train_loss[-1] < t.train_loss[0]
    assert all(low <= middle <= high for low, middle, high in t.percentiles)


def test_the_curve_may_use_fewer_test_images_than_the_end():
    t = trial(steps=20, points=2, curve_limit=10)
    assert all(10 * a == pytest.approx(round(10 * a)) for a in t.accuracy)
    assert t.final is not None
    assert 450 * t.final == pytest.approx(round(450 * t.final))


def test_steps_to_a_target():
    t = Trial("k", "a", 0, "ok", steps=(1, 5, 9), accuracy=(0.1, 0.5, 0.4))
    assert [t.steps_to(x) for x in (0.1, 0.45, 0.5, 0.6)] == [1, 5, 5, None]


def test_four_ways_of_inference():
    t = trial(steps=60)
    ways = t.inference
    assert ways["running"] == t.final
    assert ways["folded"] == ways["running"]
    assert ways["skipped"] < ways["running"] - 0.05
    assert len(ways["fold"]["folded"]) == 3
    assert 0 < ways["fold"]["difference"] < 1e-5 * ways["fold"]["scale"]


def test_a_refused_fold_is_told_and_the_training_counts(monkeypatch):
    whole = trial()

    def refuse(network, example):
        raise SurgeryError("folding changed the output by 1 where 0 is allowed")

    monkeypatch.setattr(inference, "fold", refuse)
    t = trial()
    assert (t.status, t.inference) == ("ok", {})
    assert (t.final, t.accuracy) == (whole.final, whole.accuracy)
    assert t.error == "inference, folded: folding changed the output by 1 where 0 is allowed"


def test_an_arm_without_norms_has_no_four_ways():
    assert trial(Arm("plain")).inference == {}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("statistics", ["spatial", "per-activation", "per-location", "layer"])
def test_every_placement_with_every_statistic_trains(placement, statistics):
    t = trial(replace(NORMED, placement=placement, statistics=statistics))
    assert t.status == "ok"
    assert t.inference["folded"] == t.inference["running"]


def test_both_modes_are_one_on_dense_layers():
    arm = replace(NORMED, dense_statistics="per-activation")
    mine, theirs = outcome(trial(arm)), outcome(trial())
    ways = {k: v for k, v in mine.inference.items() if k != "fold"}
    assert ways == {k: v for k, v in theirs.inference.items() if k != "fold"}
    assert replace(mine, key="", inference={}) == replace(theirs, key="", inference={})


def test_a_diverged_trial_is_recorded_with_what_it_reached():
    t = trial(Arm("wild", learning_rate=1e20), steps=30, points=4)
    assert t.status == "diverged"
    assert t.final is not None
    assert t.final < 0.2
    assert not math.isfinite(t.train_loss[-1])
    assert t.provenance["steps_done"] == t.steps[-1] < 30


def test_a_trial_survives_json_not_a_number_included():
    t = trial(Arm("wild", learning_rate=1e20), steps=30)
    again = Trial.from_json(t.to_json())
    assert "NaN" not in t.to_json()
    assert again.to_json() == t.to_json()
    good = trial()
    assert Trial.from_json(good.to_json()).to_json() == good.to_json()


def test_batches_of_two_train():
    t = trial(replace(NORMED, batch_size=2))
    assert t.status == "ok"


def test_progress_is_told_at_the_points():
    seen = []
    arm = NORMED
    run_trial(tiny_plan(arm), arm, 0, DIGITS, CPU, seen.append)
    assert seen == [1, 3, 6]


def test_provenance():
    p = trial().provenance
    assert p["torch"] == torch.__version__
    assert p["data"] == DIGITS.fingerprint
    assert p["device"].startswith("cpu")


def test_networks_of_users_that_draw_numbers_repeat(tmp_path, monkeypatch):
    (tmp_path / "dropping.py").write_text(
        "from torch import nn\n"
        "def net(classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5),\n"
        "                         nn.Linear(32, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    arm = Arm("own", model="dropping:net", placement="before-activation")
    data = tiny_dataset()
    assert outcome(trial(arm, dataset=data)) == outcome(trial(arm, dataset=data))
