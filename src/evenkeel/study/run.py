"""Running a study: check every arm, estimate, run what is not done yet, keep each result.

The order is seed by seed, so that a study stopped half way still compares all of its arms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from .. import __version__
from ..errors import ConfigError, EvenkeelError, SurgeryError
from .arms import Arm, Plan
from .data import Dataset, load
from .models import source_fingerprint
from .pool import Pool, Progress
from .store import Store, locked
from .train import Feeder, evaluate, make_network, make_optimizer, train
from .trial import Trial

__all__ = ["Estimate", "Prepared", "Started", "prepare", "run"]

_TIMED_STEPS = 8
_START_UP = 4.0
"""Seconds until a worker has imported torch and loaded the data."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one trial of each arm, by the arm's name."""

    seconds: dict[str, float]

    def total(self, jobs: list[tuple[Arm, int]], workers: int) -> float:
        """Seconds that the jobs take on so many workers."""
        if not jobs:
            return 0.0
        return sum(self.seconds[arm.name] for arm, _ in jobs) / workers + _START_UP


@dataclass(frozen=True)
class Prepared:
    """A plan that is known to work: its data is loaded and each of its networks has run."""

    plan: Plan
    dataset: Dataset
    device: torch.device
    estimate: Estimate
    left_out: tuple[str, ...] = ()


def prepare(
    plan: Plan,
    device: torch.device,
    watch: Callable[[str], None] = lambda name: None,
    *,
    leave_out: bool = False,
) -> Prepared:
    """Loads the data, tries every arm for a few steps, and times them.

    Args:
        plan: the arms; the version, the data and users' networks are noted in its context.
        device: where the trials will run.
        watch: told the name of each arm before it is tried.
        leave_out: drop arms whose norms have no place in their network, the baseline excepted,
            and say so in ``left_out``; for presets on a network that they were not made for.

    Raises:
        ConfigError, SurgeryError, FormatError: an arm or the data is not usable; which, and why.
    """
    dataset = load(plan.data.name, plan.data.path, image_size=plan.data.image_size)
    context = {"version": __version__, "data": dataset.fingerprint}
    context |= {arm.model: source_fingerprint(arm.model) for arm in plan.arms if ":" in arm.model}
    plan = plan.on(context=context)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers
    try:
        seconds: dict[str, float] = {}
        left_out: list[str] = []
        for arm in plan.arms:
            watch(arm.name)
            try:
                seconds[arm.name] = _try_arm(plan, arm, dataset, device)
            except SurgeryError as error:
                if not leave_out or arm.name == plan.baseline:
                    raise
                left_out.append(str(error))
    finally:
        torch.set_num_threads(threads)
    plan = plan.on(arms=tuple(arm for arm in plan.arms if arm.name in seconds))
    return Prepared(plan, dataset, device, Estimate(seconds), tuple(left_out))


def _try_arm(plan: Plan, arm: Arm, dataset: Dataset, device: torch.device) -> float:
    """Seconds that one trial of the arm would take."""
    try:
        feeder = Feeder(dataset, plan.data, arm.input_norm, device)
        network = make_network(arm, feeder, len(dataset.classes), seed=0)
        optimizer = make_optimizer(network, arm)
        batches = feeder.batches(arm.batch_size, seed=0)
        marks: list[float] = []
        train(
            network,
            optimizer,
            batches,
            range(_TIMED_STEPS),
            lambda step, loss: marks.append(time.perf_counter()),
        )
        network.eval()
        started = time.perf_counter()
        tested = min(plan.curve_limit, len(dataset.test.labels))
        evaluate(network, feeder.test(min(tested, 200)))
        score = (time.perf_counter() - started) * tested / min(tested, 200)
    except EvenkeelError as error:
        raise type(error)(f"arm '{arm.name}': {error}") from error
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"arm '{arm.name}' cannot train on {dataset.name} images of shape "
            f"{tuple(feeder.example().shape[1:])}: {type(error).__name__}: {first}"
        ) from error
    # The first step warms caches up; the median of the others is the pace.
    gaps = sorted(b - a for a, b in pairwise(marks))
    final = score * len(dataset.test.labels) / tested
    ways = 5 if arm.has_norm else 1
    return gaps[len(gaps) // 2] * plan.steps_of(arm) + score * plan.points + final * ways


@dataclass(frozen=True)
class Started:
    """What a run is about to do: the trials that are not done yet."""

    jobs: list[tuple[Arm, int]]


def run(
    prepared: Prepared, folder: Path, workers: int, *, retry_failed: bool = False
) -> Iterator[Started | Trial | Progress]:
    """Runs the trials that are not in the folder yet; yields each one behind its commit.

    Stopping the iteration, by Ctrl-C or close, stops the workers; what was yielded is kept.
    """
    plan = prepared.plan
    with locked(folder), Store(folder, create=True) as store:
        store.set_plan(plan)
        if retry_failed:
            store.forget_failed()
        jobs = store.missing(plan)
        yield Started(jobs)
        with Pool(plan, prepared.device, workers) as pool:
            for event in pool.run(jobs):
                if isinstance(event, Trial):
                    store.add(event)
                yield event
