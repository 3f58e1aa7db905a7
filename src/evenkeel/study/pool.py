"""Worker processes that run trials: one trial at a time each, on one torch thread each.

A worker ends when its parent does, however that ends, so kill -9 leaves nothing running behind. A
worker that dies takes one trial with it, which is reported as failed, and is replaced.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import torch

from ..allocator import keep_blocks
from ..errors import EvenkeelError
from .arms import Arm, Plan
from .data import load
from .trial import Trial, run_trial

__all__ = ["Pool", "Progress", "get_ready"]

Job = tuple[Arm, int]
"""An arm and a seed."""


@dataclass(frozen=True)
class Progress:
    """A sign of life: the arm's trial with this seed has reached this step."""

    arm: str
    seed: int
    step: int


def get_ready() -> None:
    """Begins, in the background, what takes seconds before the first worker can start.

    No worker is a fork of this process, for one that has used torch can hang. On Linux they are
    forks of one that has only imported it, once for all; macOS's own libraries do not survive even
    that.
    """
    if sys.platform == "linux":
        from multiprocessing.forkserver import ensure_running, set_forkserver_preload

        set_forkserver_preload([__name__, "torch._dynamo"])  # optimizers import the latter
        with _without_interrupts():
            ensure_running()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C is the parent's business; a child inherits a signal that is ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


class _Worker:
    """A process, the pipe to it, and the job that it has."""

    def __init__(self, plan: Plan, device: str) -> None:
        context: Any = get_context("forkserver" if sys.platform == "linux" else "spawn")
        mine, theirs = context.Pipe()
        self.pipe: Connection = mine
        self.job: Job | None = None
        args = (theirs, plan, device, dict(os.environ))
        self.process = context.Process(target=_serve, args=args, daemon=True)
        get_ready()
        with _without_interrupts():
            self.process.start()
        theirs.close()

    def give(self, job: Job | None) -> None:
        self.job = job
        if job is not None:
            self.pipe.send(job)

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


class Pool:
    """Runs trials on several processes; a context manager that stops them on the way out."""

    def __init__(self, plan: Plan, device: torch.device, workers: int) -> None:
        self._plan, self._device, self._count = plan, str(device), workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def run(self, jobs: Sequence[Job]) -> Iterator[Trial | Progress]:
        """Yields each trial as it finishes, with signs of life in between."""
        waiting = deque(jobs)
        for _ in range(min(self._count, len(jobs))):
            self._workers.append(_Worker(self._plan, self._device))
            self._workers[-1].give(waiting.popleft())
        while busy := {w.pipe: w for w in self._workers if w.job is not None}:
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                try:
                    message = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    message = self._bury(worker)
                if isinstance(message, Trial):
                    alive = worker if worker in self._workers else self._workers[-1]
                    alive.give(waiting.popleft() if waiting else None)
                yield message

    def _bury(self, worker: _Worker) -> Trial:
        """Replaces a worker that died; its trial has failed."""
        worker.process.join()
        code, job = worker.process.exitcode, worker.job
        self._workers.remove(worker)
        self._workers.append(_Worker(self._plan, self._device))
        if job is None:
            raise AssertionError("an idle worker sends nothing")
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        hint = "; the system may have run out of memory" if code == -signal.SIGKILL else ""
        return _failed(self._plan, job, f"the worker process ended with {how}{hint}")


def _serve(pipe: Connection, plan: Plan, device: str, environment: dict[str, str]) -> None:
    """The worker's life: take a job, send back the trial."""
    os.environ.clear()  # it may be that of an earlier study in the same process
    os.environ.update(environment)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    keep_blocks()
    dataset = load(plan.data.name, plan.data.path, image_size=plan.data.image_size)
    while True:
        try:
            arm, seed = pipe.recv()
        except EOFError:
            return

        def tell(step: int, arm: Arm = arm, seed: int = seed) -> None:
            pipe.send(Progress(arm.name, seed, step))

        try:
            trial = run_trial(plan, arm, seed, dataset, torch.device(device), tell)
        except Exception as error:
            text = str(error) if isinstance(error, EvenkeelError) else traceback.format_exc()
            trial = _failed(plan, (arm, seed), text)
        pipe.send(trial)


def _failed(plan: Plan, job: Job, error: str) -> Trial:
    arm, seed = job
    return Trial(plan.key(arm), arm.name, seed, "failed", error=error)


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
