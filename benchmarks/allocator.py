"""What glibc's settings do to training steps: time, page faults, memory; one process for each case.

    python benchmarks/allocator.py [--rounds 3] [--steps 8] [--threads 1] [CASE ...]

A case is a network, or 'wide', one convolution at 224 x 224 with blocks of 196 MiB. Sides are run
in turn, round after round; each number is the median over rounds, of medians over steps. CPU time
is the process's own, user and system; it says more than the clock where others compute too.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from evenkeel import allocator

MMAP_MAX, TRIM_THRESHOLD, TOP_PAD, ARENA_MAX = -4, -1, -2, -8  # <malloc.h>
HUGE = "glibc.malloc.hugetlb=1"

# By side: what mallopt is told, the environment, and whether another thread trains.
SIDES: dict[str, tuple[dict[int, int] | str, dict[str, str], bool]] = {
    "default": ({}, {}, False),
    "keep_blocks()": ("keep", {}, False),
    "the environment": ({}, allocator.KEEP, False),
    "M_MMAP_MAX alone": ({MMAP_MAX: 0}, {}, False),
    "M_TRIM_THRESHOLD alone": ({TRIM_THRESHOLD: -1}, {}, False),
    "both, no M_TOP_PAD": ({MMAP_MAX: 0, TRIM_THRESHOLD: -1}, {}, False),
    "huge pages": ({}, {"GLIBC_TUNABLES": HUGE}, False),
    "huge pages, environment": ({}, allocator.KEEP | {"GLIBC_TUNABLES": HUGE}, False),
    "thread: default": ({}, {}, True),
    "thread: keep_blocks()": ("keep", {}, True),
    "thread: both, no M_TOP_PAD": ({MMAP_MAX: 0, TRIM_THRESHOLD: -1}, {}, True),
    "thread: M_ARENA_MAX too": ({MMAP_MAX: 0, TRIM_THRESHOLD: -1, ARENA_MAX: 1}, {}, True),
}
CASES = ("mnist", "resnet18", "efficientnet", "wide")
WARM_UP = 4


def main() -> None:
    """Runs all sides of each case and prints a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    for name, value in (("rounds", 3), ("steps", 8), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(one(given.cases[0], given.side, given.steps, given.threads)))
        return
    for case in given.cases or CASES:
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(given.rounds):
            for side, results in found.items():
                results.append(in_process(case, side, given.steps, given.threads))
        print(f"\n{case:28}{'ms':>9}{'CPU ms':>9}{'faults':>10}{'peak MiB':>10}")
        for side, results in found.items():
            m = {key: statistics.median(r[key] for r in results) for key in results[0]}
            print(f"{side:28}{m['ms']:9.1f}{m['cpu']:9.1f}{m['faults']:10,.0f}{m['peak']:10,.0f}")


def in_process(case: str, side: str, steps: int, threads: int) -> dict[str, float]:
    """The numbers of one side, from a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUN"))}
    options = ["--side", side, "--steps", str(steps), "--threads", str(threads)]
    done = subprocess.run(  # noqa: S603
        [sys.executable, __file__, case, *options],
        env=clean | SIDES[side][1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


def one(case: str, side: str, steps: int, threads: int) -> dict[str, float]:
    """Medians of a step's milliseconds and CPU milliseconds, its page faults, the peak memory."""
    settings, _, in_thread = SIDES[side]
    if settings == "keep":
        assert allocator.keep_blocks().at_run_time  # noqa: S101
    elif isinstance(settings, dict):
        libc = ctypes.CDLL("libc.so.6")
        for key, value in settings.items():
            assert libc.mallopt(key, value) == 1  # noqa: S101
    found: dict[str, float] = {}

    def run() -> None:
        step = step_of(case, threads)
        for _ in range(WARM_UP):
            step()
        wall, cpu = [], []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(steps):
            started = time.perf_counter(), time.process_time()
            step()
            wall.append(time.perf_counter() - started[0])
            cpu.append(time.process_time() - started[1])
        used = resource.getrusage(resource.RUSAGE_SELF)
        found["ms"], found["cpu"] = (1e3 * statistics.median(v) for v in (wall, cpu))
        found["faults"] = (used.ru_minflt - before) / steps
        found["peak"] = used.ru_maxrss / 1024

    if in_thread:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    return found


def step_of(case: str, threads: int) -> Callable[[], object]:
    """One training step of the case, accelerated, as a function."""
    import torch
    from torch import nn

    from evenkeel import accelerate
    from evenkeel.bench import nets
    from evenkeel.bench.steps import Step

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, labels = torch.randn(32, 3, 96, 96), torch.randint(0, 10, (32,))
    net: nn.Module
    if case == "mnist":
        images, labels = torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))
        net = nn.Sequential(
            *(nn.Conv2d(1, 20, 5), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(20, 50, 5), nn.BatchNorm2d(50), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(800, 500), nn.BatchNorm1d(500), nn.ReLU()),
            nn.Linear(500, 10),
        )
    elif case == "wide":
        images, labels = torch.randn(16, 3, 224, 224), torch.randint(0, 10, (16,))
        conv, norm = nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64)
        tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
        net = nn.Sequential(conv, norm, nn.ReLU(), *tail)
    else:
        net = nets.build(case, size=96)
    return Step(accelerate(net, allocator="default")[0], images, labels, "float32")


if __name__ == "__main__":
    main()
