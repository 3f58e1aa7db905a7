"""Running a study: prepared, resumed, killed, stopped, with workers that die."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from evenkeel.errors import EvenkeelError, FormatError, SurgeryError
from evenkeel.study.arms import Arm, Data
from evenkeel.study.pool import Progress
from evenkeel.study.run import Started, prepare, run
from evenkeel.study.store import FILE, Store
from evenkeel.study.trial import Trial, run_trial

from .helpers import CPU, tiny_plan

TOML = """
seeds = 3
steps = 100
points = 4
[[arm]]
name = "plain"
[[arm]]
name = "normed"
placement = "before-activation"
"""


def trials_of(events) -> list[Trial]:
    return [event for event in events if isinstance(event, Trial)]


class TestPrepare:
    def test_it_times_every_arm_and_fixes_the_context(self):
        seen = []
        prepared = prepare(tiny_plan(), CPU, seen.append)
        assert seen == ["plain", "normed"]
        assert set(prepared.estimate.seconds) == {"plain", "normed"}
        assert all(seconds > 0 for seconds in prepared.estimate.seconds.values())
        assert set(prepared.plan.context) == {"version", "data"}
        jobs = prepared.plan.trials
        assert prepared.estimate.total(jobs, 1) > prepared.estimate.total(jobs, 2)
        assert prepared.estimate.total([], 2) == 0

    @pytest.mark.parametrize(
        ("arm", "message"),
        [
            (Arm("big", batch_size=9999), "arm 'big': a batch of 9999 is more than the 1347"),
            (Arm("odd", optimizer="SGDD"), "arm 'odd': torch.optim has no optimizer 'SGDD'"),
            (Arm("paper", "paper", placement="after-pooling"), "'paper': .*no place for 'after-p"),
            (
                Arm("rank", placement="before-activation", statistics="n c l -> c"),
                "arm 'rank': 'n c l -> c' describes 3 dimensions but got 4",
            ),
            (
                Arm("one", placement="before-activation", batch_size=1),
                "arm 'one': 'n c ... -> c' on .1, 64. averages over n=1: one value per owner",
            ),
        ],
    )
    def test_an_arm_that_cannot_train_is_named_before_anything_runs(self, arm, message):
        with pytest.raises(EvenkeelError, match=message):
            prepare(tiny_plan(Arm("plain"), arm), CPU)

    def test_data_that_is_not_there(self, tmp_path):
        with pytest.raises(FormatError, match="train-images"):
            prepare(tiny_plan(data=Data("mnist", str(tmp_path))), CPU)

    def test_a_users_network_that_does_not_fit_the_data(self, tmp_path, monkeypatch):
        (tmp_path / "misfit.py").write_text(
            "from torch import nn\nnet = lambda: nn.Sequential(nn.Flatten(), nn.Linear(99, 10))\n"
        )
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SurgeryError, match=r"arm 'own': .*cannot run an input of shape"):
            prepare(tiny_plan(Arm("own", "misfit:net")), CPU)


def test_workers_give_the_very_trials_of_one_process(tmp_path):
    prepared = prepare(tiny_plan(), CPU)
    events = list(run(prepared, tmp_path, workers=2))
    assert isinstance(events[0], Started)
    assert len(events[0].jobs) == 4
    assert any(isinstance(event, Progress) for event in events)
    plan = prepared.plan
    arms = {arm.name: arm for arm in plan.arms}
    for trial in trials_of(events):
        alone = run_trial(plan, arms[trial.arm], trial.seed, prepared.dataset, CPU)
        bare = {"seconds": 0.0, "provenance": {}}
        assert replace(trial, **bare) == replace(alone, **bare)
    with Store(tmp_path) as store:
        assert len(store.trials(plan)) == 4
    assert [type(event) for event in run(prepared, tmp_path, workers=2)] == [Started]


def test_more_seeds_run_only_what_is_new(tmp_path):
    list(run(prepare(tiny_plan(seeds=1), CPU), tmp_path, workers=1))
    events = trials_of(run(prepare(tiny_plan(seeds=2), CPU), tmp_path, workers=1))
    assert [(t.arm, t.seed) for t in events] == [("plain", 1), ("normed", 1)]


class TestTrouble:
    """A network that breaks in the worker, but not while the study is prepared."""

    @pytest.fixture
    def own(self, tmp_path, monkeypatch):
        def write(what: str) -> Arm:
            (tmp_path / "trouble.py").write_text(
                "import os, multiprocessing\nfrom pathlib import Path\nfrom torch import nn\n"
                "def net(classes):\n"
                "    if multiprocessing.parent_process() is not None:\n"
                f"        {what}\n"
                "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
            )
            return Arm("own", "trouble:net")

        monkeypatch.chdir(tmp_path)
        yield write
        sys.modules.pop("trouble", None)

    def test_a_failed_trial_is_recorded_and_the_others_go_on(self, own, tmp_path):
        arm = own("raise RuntimeError('no luck today')")
        prepared = prepare(tiny_plan(Arm("plain"), arm), CPU)
        trials = trials_of(run(prepared, tmp_path / "run", workers=1))
        assert [(t.arm, t.status) for t in trials] == [("plain", "ok"), ("own", "failed")] * 2
        assert "no luck today" in trials[1].error
        assert trials[1].final is None
        with Store(tmp_path / "run") as store:
            assert [t.status for t in store.trials(prepared.plan)].count("failed") == 2

    def test_failed_trials_run_again_when_asked(self, own, tmp_path):
        arm = own("Path('mended').exists() or 1 / 0")
        prepared = prepare(tiny_plan(arm, seeds=1), CPU)
        assert trials_of(run(prepared, tmp_path / "run", 1))[0].status == "failed"
        assert trials_of(run(prepared, tmp_path / "run", 1)) == []
        (tmp_path / "mended").touch()
        again = trials_of(run(prepared, tmp_path / "run", 1, retry_failed=True))
        assert [t.status for t in again] == ["ok"]

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_worker_that_dies_takes_one_trial_with_it(self, own, tmp_path, workers):
        arm = own("os.kill(os.getpid(), 9)")
        prepared = prepare(tiny_plan(arm, Arm("plain"), seeds=workers), CPU)
        trials = trials_of(run(prepared, tmp_path / "run", workers))
        ends = sorted((t.arm, t.status) for t in trials)
        assert ends == [("own", "failed")] * workers + [("plain", "ok")] * workers
        errors = {t.error for t in trials if t.arm == "own"}
        assert errors == {
            "the worker process ended with signal 9; the system may have run out of memory"
        }


def rows(folder: Path) -> dict[tuple[str, int], str]:
    """The trials in a run's file, as they stand there."""
    if not (folder / FILE).is_file():
        return {}
    with closing(sqlite3.connect(f"file:{folder / FILE}?mode=ro", uri=True)) as db:
        try:
            return {(key, seed): text for key, seed, text in db.execute(
                "select key, seed, json from trial")}  # fmt: skip
        except sqlite3.OperationalError:
            return {}


class Study:
    """The study command on a file of our own: in a process group of its own, then here."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        config = folder / "study.toml"
        config.write_text(TOML)
        self.words = ["study", "--config", config, "--out", self.run, "--workers", "2"]

    def start(self) -> None:
        line = [sys.executable, "-c", "from evenkeel.cli import main; main()", *self.words]
        self.process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while len(rows(self.run)) < 2:  # pytest's own limit ends it
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)

    def end(self) -> None:
        """So that a test that fails leaves nothing to those behind it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def wait_until_gone(group: int) -> None:
    """Fails if a process of the group is still there after ten seconds."""
    deadline = time.monotonic() + 10
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, "workers outlived the study"
        time.sleep(0.05)


@pytest.fixture
def study(tmp_path):
    """Started, and two trials far."""
    study = Study(tmp_path)
    try:
        study.start()
        yield study
    finally:
        study.end()


def test_kill_9_loses_nothing_and_repeats_nothing(command, study):
    process = study.process
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = rows(study.run)
    wait_until_gone(process.pid)  # the workers follow their parent
    code, out, _ = command(*study.words)
    assert code == 0
    found = rows(study.run)
    assert len(found) == 6
    assert kept.items() <= found.items()
    assert f"{len(kept)} of them done" in out


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(command, study):
    process = study.process
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everyone
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Stopped;" in out
    assert "Run the same command again" in out
    assert "Traceback" not in out + err
    wait_until_gone(process.pid)
    kept = rows(study.run)
    assert 2 <= len(kept) < 6
    assert command(*study.words)[0] == 0
    assert kept.items() <= rows(study.run).items()
    assert len(rows(study.run)) == 6
