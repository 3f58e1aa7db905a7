"""The clock: all sides in turn, in one process, until the time is spent.

A machine's speed drifts while it is measured. So one sample of every side is a round, and sides are
compared within their rounds only. A side's neighbours leave the caches in some state; who goes
first, and in which direction, changes from round to round.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

__all__ = [
    "Measure",
    "Ratio",
    "Samples",
    "clock_on",
    "geometric_mean",
    "interleaved",
    "order",
    "page_faults",
]

WARM_UP = 3
SETTLED = 64
"""Page faults of a whole round, at most, for the allocator to count as settled."""
MOST_SETTLING = 12
SHORTEST = 1e-3
"""Seconds that one sample takes at least: shorter calls are timed many at once."""
MOST_CALLS = 10_000
ALIKE = 4
"""Sides up to this many times as fast as each other are called equally often for a sample. The
first call finds what another side left in the caches, and that has to weigh the same for all."""


@dataclass(frozen=True)
class Measure:
    """A side's median and quartiles, in seconds or bytes for one call."""

    median: float
    low: float
    high: float
    rounds: int = 1
    calls: int = 1
    faults: float | None = None


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of one side over another, round by round."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Samples:
    """One side: the seconds of one call in each round, and the page faults of one call.

    ``calls`` is how many calls made one sample; ``faults`` is None where nobody counts them.
    """

    seconds: tuple[float, ...]
    calls: int = 1
    faults: float | None = None

    @property
    def measure(self) -> Measure:
        """Median and quartiles."""
        low, median, high = _quartiles(self.seconds)
        return Measure(median, low, high, len(self.seconds), self.calls, self.faults)

    def over(self, other: Samples) -> Ratio:
        """This side's time over the other's, each round by itself; below 1 is faster."""
        ratios = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        low, median, high = _quartiles(ratios)
        return Ratio(median, low, high)


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    least: int = 7,
    most: int = 60,
    shortest: float = SHORTEST,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """Times all sides in turn.

    Args:
        sides: what to call, by name.
        seconds: the budget for all rounds together; warming up is not counted.
        least, most: rounds, whatever the budget says.
        shortest: seconds that one sample takes at least.
        clock: tells the time in seconds, such as `clock_on` gives.
    """
    calls = _warmed(sides, seconds, shortest, clock)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    faults = dict.fromkeys(sides, 0)
    counted = page_faults() is not None
    collected = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would land in the sample of whoever is unlucky
    try:
        end = clock() + seconds
        for number in range(most):
            if number >= least and clock() >= end:
                break
            for name in order(list(sides), number):
                side, count = sides[name], calls[name]
                before = page_faults() or 0
                start = clock()
                for _ in range(count):
                    side()
                taken[name].append((clock() - start) / count)
                faults[name] += (page_faults() or 0) - before
    finally:
        if collected:
            gc.enable()
    return {
        name: Samples(
            tuple(taken[name]),
            calls[name],
            faults[name] / (calls[name] * len(taken[name])) if counted else None,
        )
        for name in sides
    }


def clock_on(device: str) -> Callable[[], float]:
    """The clock for what runs on 'cpu' or 'cuda'."""
    return time.perf_counter if device == "cpu" else _done


def _done() -> float:
    """The time when the GPU has done all that it was given."""
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def order(names: list[str], number: int) -> list[str]:
    """Who comes when in a round.

    What a side leaves in the caches and in the heap is the next one's to find. So everyone comes
    first equally often and follows each of the others equally often: a Williams square (1949), once
    forwards and once backwards.
    """
    turn, shift = divmod(number, len(names))
    zigzag = (-(place // 2) if place % 2 == 0 else (place + 1) // 2 for place in range(len(names)))
    row = [names[(place + shift) % len(names)] for place in zigzag]
    return row[::-1] if turn % 2 else row


def geometric_mean(ratios: Iterable[float]) -> float:
    """The geometric mean, the fair one for ratios: swapping the sides gives its inverse."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))


def page_faults() -> int | None:
    """How many pages this process has had to ask the system for; None where that is not told."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _warmed(
    sides: Mapping[str, Callable[[], object]],
    seconds: float,
    shortest: float,
    clock: Callable[[], float],
) -> dict[str, int]:
    """Runs the sides a few times; returns how many calls of each make a sample long enough.

    An allocator that keeps its memory needs some rounds until it has got all it will ever need, so
    rounds go on while they fault, for half of the time there is at most.
    """
    once: dict[str, float] = {}
    end = math.inf
    for number in range(MOST_SETTLING):
        before = page_faults() or 0
        for name, side in sides.items():
            start = clock()
            side()
            once[name] = min(clock() - start, once.get(name, math.inf))
        if number + 1 == WARM_UP:  # what a first call compiles is not on the budget
            end = clock() + seconds / 2
        is_settled = (page_faults() or 0) - before <= SETTLED
        if number + 1 >= WARM_UP and (is_settled or clock() >= end):
            break
    return {name: _calls(time, once.values(), shortest) for name, time in once.items()}


def _calls(time: float, times: Iterable[float], shortest: float) -> int:
    fastest = min(other for other in times if other * ALIKE >= time)
    return min(MOST_CALLS, max(1, math.ceil(shortest / max(fastest, 1e-9))))


def _quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    values = list(values)
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
