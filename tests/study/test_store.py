"""The store: whole rows or none, and clear words for every way a file can be wrong."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from evenkeel.errors import StudyError
from evenkeel.study.store import FILE, Store, locked
from evenkeel.study.trial import Trial

from .helpers import tiny_plan

PLAN = tiny_plan()


def trial_of(index=0, seed=0, status="ok", **changes) -> Trial:
    arm = PLAN.arms[index]
    return Trial(PLAN.key(arm), arm.name, seed, status, final=0.5, **changes)


def test_what_is_added_is_there_when_opened_again(tmp_path):
    with Store(tmp_path, create=True) as store:
        store.set_plan(PLAN)
        store.add(trial_of(0))
        store.add(trial_of(1, seed=1))
    with Store(tmp_path) as store:
        assert store.plan() == PLAN
        assert store.trials(PLAN) == [trial_of(0), trial_of(1, seed=1)]
        left = [(arm.name, seed) for arm, seed in store.missing(PLAN)]
    assert left == [("normed", 0), ("plain", 1)]


def test_a_finished_trial_is_never_replaced(tmp_path):
    with Store(tmp_path, create=True) as store:
        store.add(trial_of())
        store.add(replace(trial_of(), final=0.9))
        assert [t.final for t in store.trials(PLAN)] == [0.5]


def test_a_new_plan_keeps_the_trials_and_finds_its_own(tmp_path):
    with Store(tmp_path, create=True) as store:
        store.add(trial_of())
        renamed = PLAN.on(arms=(replace(PLAN.arms[0], name="other name"),), baseline="other name")
        assert [t.arm for t in store.trials(renamed)] == ["other name"]
        assert store.trials(PLAN.on(steps=99)) == []
        assert len(store.missing(PLAN.on(steps=99))) == 4
        assert store.trials(PLAN) == [trial_of()]


def test_equal_recipes_under_two_names_run_once(tmp_path):
    twins = tiny_plan(PLAN.arms[0], replace(PLAN.arms[0], name="twin"), seeds=1)
    with Store(tmp_path, create=True) as store:
        assert [arm.name for arm, _ in store.missing(twins)] == ["plain"]


def test_failed_trials_can_be_forgotten(tmp_path):
    with Store(tmp_path, create=True) as store:
        store.add(trial_of(0, status="failed", error="it broke"))
        store.add(trial_of(1))
        assert store.forget_failed() == 1
        assert [t.arm for t in store.trials(PLAN)] == ["normed"]


def test_no_study_there(tmp_path):
    with pytest.raises(StudyError, match=r"there is no study in .*; start one with"):
        Store(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be made"):
        Store(tmp_path / "file" / "run", create=True)


def filled(tmp_path):
    with Store(tmp_path, create=True) as store:
        store.set_plan(PLAN)
        for seed in range(200):
            store.add(trial_of(seed=seed, error="x" * 500))
    return tmp_path / FILE


@pytest.mark.parametrize("at", [0, 20, 100, 4096, 20_000])
def test_a_damaged_file_is_named_and_left_alone(tmp_path, at):
    path = filled(tmp_path)
    content = bytearray(path.read_bytes())
    content[at : at + 3000] = b"\xff" * 3000
    path.write_bytes(content)
    with pytest.raises(StudyError, match=r"study\.sqlite (is damaged|belongs|cannot|holds)"):
        read_all(tmp_path)
    assert path.read_bytes() == content


def read_all(folder):
    with Store(folder) as store:
        return store.trials(store.plan().on(seeds=200))


def test_a_flipped_digit_is_noticed(tmp_path):
    path = filled(tmp_path)
    content = path.read_bytes()
    assert len(read_all(tmp_path)) == 200
    path.write_bytes(content.replace(b'"final": 0.5', b'"final": 0.9', 1))
    with pytest.raises(StudyError, match=r"is damaged .the trial 'plain', seed .*, was altered"):
        read_all(tmp_path)


def test_a_plan_that_cannot_be_read(tmp_path):
    path = filled(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"curve_limit"', b'"kurve_limit"'))
    with pytest.raises(StudyError, match=r"is damaged .its plan cannot be read"):
        read_all(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    path = filled(tmp_path)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(StudyError, match=r"damaged|cannot be used"):
        Store(tmp_path)


def test_another_programs_file(tmp_path):
    (tmp_path / FILE).write_text("these are my notes, not a database at all " * 50)
    with pytest.raises(StudyError, match=r"is damaged .*not a database"):
        Store(tmp_path)
    (tmp_path / FILE).unlink()
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("create table songs (title)")
    other.close()
    with pytest.raises(StudyError, match="belongs to another program"):
        Store(tmp_path)


def test_a_newer_format(tmp_path):
    path = filled(tmp_path)
    with sqlite3.connect(path) as db:
        db.execute("pragma user_version = 7")
    db.close()
    with pytest.raises(StudyError, match=r"written by a newer evenkeel \(format 7, this one knows"):
        Store(tmp_path)


def test_a_full_disk_loses_nothing(tmp_path):
    with Store(tmp_path, create=True) as store:
        store.set_plan(PLAN)
        store.add(trial_of())
        (pages,) = store._db.execute("pragma page_count").fetchone()
        store._db.execute(f"pragma max_page_count = {pages}")  # SQLite's own full disk
        with pytest.raises(StudyError, match=r"full; free some space .* every finished trial is"):
            store.add(trial_of(1, error="x" * 100_000))
        assert store.trials(PLAN) == [trial_of()]
    with Store(tmp_path) as store:
        assert store.trials(PLAN) == [trial_of()]


class TestLock:
    def test_one_study_at_a_time(self, tmp_path):
        with (
            locked(tmp_path),
            pytest.raises(StudyError, match="another process is running"),
            locked(tmp_path),
        ):
            pass
        with locked(tmp_path):
            pass

    def test_it_is_freed_when_its_holder_is_killed(self, tmp_path):
        program = (
            "import sys, time; from pathlib import Path; from evenkeel.study.store import locked\n"
            f"with locked(Path({str(tmp_path)!r})):\n    print('held', flush=True); time.sleep(60)"
        )
        holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StudyError, match="another process"), locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        holder.stdout.close()
        with locked(tmp_path):
            pass
