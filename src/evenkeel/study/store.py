"""The study's memory: one SQLite file, one committed row for each finished trial.

A row is written whole or not at all, and is never changed. A second process cannot run the same
study at the same time: a lock that the operating system frees when its holder dies says so.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import StudyError
from .arms import Arm, Plan
from .trial import Trial

__all__ = ["FILE", "Store", "locked"]

FILE = "study.sqlite"
_APPLICATION = 0x45564B4C  # "EVKL", so that another program's database is not taken for ours
_VERSION = 1
_SCHEMA = """
create table plan (id integer primary key check (id = 1), json text not null);
create table trial (
    key text not null, seed integer not null, arm text not null, status text not null,
    json text not null, digest text not null, primary key (key, seed)
);
"""


class Store:
    """The trials of a run's folder.

    Raises:
        StudyError: the file is damaged, is not a study, is of a newer version, or cannot be
            written; what was in it is still there.
    """

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        self.path = folder / FILE
        if create:
            _make(folder)
        elif not self.path.is_file():
            raise StudyError(f"there is no study in {folder}; start one with 'evenkeel study'")
        with self._explained():
            self._db = sqlite3.connect(self.path, timeout=30.0, isolation_level=None)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise

    def _open(self) -> None:
        (application,) = self._db.execute("pragma application_id").fetchone()
        (version,) = self._db.execute("pragma user_version").fetchone()
        (tables,) = self._db.execute("select count(*) from sqlite_master").fetchone()
        if tables == 0:
            self._db.executescript(
                f"begin immediate; {_SCHEMA} pragma application_id = {_APPLICATION}; "
                f"pragma user_version = {_VERSION}; commit;"
            )
            return
        if application != _APPLICATION:
            raise StudyError(f"{self.path} belongs to another program; choose another folder")
        if version > _VERSION:
            raise StudyError(
                f"{self.path} was written by a newer evenkeel (format {version}, this one knows "
                f"{_VERSION}); upgrade evenkeel"
            )
        (health,) = self._db.execute("pragma quick_check(1)").fetchone()
        if health != "ok":
            raise sqlite3.DatabaseError(health)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def set_plan(self, plan: Plan) -> None:
        """Remembers the plan that the run follows now; trials of earlier plans stay."""
        with self._explained():
            self._db.execute(
                "insert or replace into plan values (1, ?)",
                (plan.to_json(),),
            )

    def plan(self) -> Plan:
        """The plan of the run."""
        with self._explained():
            row = self._db.execute("select json from plan").fetchone()
        if row is None:
            raise StudyError(f"{self.path} holds no plan; start the study again")
        try:
            return Plan.from_json(row[0])
        except (ValueError, TypeError, KeyError) as error:
            raise StudyError(self._damaged(f"its plan cannot be read: {error}")) from error

    def add(self, trial: Trial) -> None:
        """Commits a finished trial; one that is there already stays as it is."""
        text = trial.to_json()
        with self._explained():
            self._db.execute(
                "insert into trial values (?, ?, ?, ?, ?, ?) on conflict (key, seed) do nothing",
                (trial.key, trial.seed, trial.arm, trial.status, text, _digest(text)),
            )

    def forget_failed(self) -> int:
        """Removes the trials that failed, to try them again; returns how many."""
        with self._explained():
            return self._db.execute("delete from trial where status = 'failed'").rowcount

    def missing(self, plan: Plan) -> list[tuple[Arm, int]]:
        """The trials of a plan that are not finished yet, in its order, equal recipes once."""
        with self._explained():
            seen = set(self._db.execute("select key, seed from trial"))
        jobs: list[tuple[Arm, int]] = []
        for arm, seed in plan.trials:
            if (plan.key(arm), seed) not in seen:
                seen.add((plan.key(arm), seed))
                jobs.append((arm, seed))
        return jobs

    def trials(self, plan: Plan) -> list[Trial]:
        """The finished trials of a plan, in its order, under the arms' present names."""
        with self._explained():
            rows = {
                (key, seed): (text, digest)
                for key, seed, text, digest in self._db.execute(
                    "select key, seed, json, digest from trial"
                )
            }
        found: list[Trial] = []
        for arm, seed in plan.trials:
            text, digest = rows.get((plan.key(arm), seed), (None, None))
            if text is None:
                continue
            if _digest(text) != digest:
                raise StudyError(self._damaged(f"the trial '{arm.name}', seed {seed}, was altered"))
            found.append(replace(Trial.from_json(text), arm=arm.name))
        return found

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StudyError(
                f"{self.path} cannot be used: {error}; free some space or check the rights, then "
                "run the same command again: every finished trial is kept"
            ) from error
        except sqlite3.DatabaseError as error:
            raise StudyError(self._damaged(str(error))) from error

    def _damaged(self, how: str) -> str:
        return (
            f"{self.path} is damaged ({how}); nothing was changed: restore it from a copy, or move "
            "it away and run the same command to start anew"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder for one running study; freed by the system however the process ends.

    Raises:
        StudyError: another process runs a study there.
    """
    _make(folder)
    lock = sqlite3.connect(folder / "lock", timeout=0.2, isolation_level=None)
    try:
        try:
            lock.execute("begin exclusive")
        except sqlite3.OperationalError as error:
            raise StudyError(
                f"another process is running the study in {folder} ({error}); wait for it, or "
                "choose another folder with --out"
            ) from error
        yield
    finally:
        lock.close()


def _digest(text: str) -> str:
    """What a row is checked by: SQLite notices broken pages, not a flipped digit."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"the folder {folder} cannot be made: {error.strerror}") from error
