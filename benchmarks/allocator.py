"""What glibc's settings do to training steps: time, page faults, memory.

    python benchmarks/allocator.py [--steps 20] [--threads 1] [--side SIDE ...]
        [--against SIDE] [CASE ...]

A case is a network, or 'wide', one convolution at 224 x 224 with blocks of 196 MiB. Each side is
run against one of them, two processes that take a step in turn; times are medians over steps, the
ratio is the median of those of neighbouring steps. CPU time is the process's own, user and system;
it says more than the clock where others compute too.
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
from collections.abc import Callable, Sequence

from evenkeel import allocator

MMAP_MAX, TRIM_THRESHOLD, TOP_PAD, ARENA_MAX = -4, -1, -2, -8  # <malloc.h>
HUGE = "glibc.malloc.hugetlb=1"

# By side: what mallopt is told, the environment, and whether another thread trains.
SIDES: dict[str, tuple[dict[int, int] | str, dict[str, str], bool]] = {
    "default": ({}, {}, False),
    "keep_blocks()": ("keep", {}, False),
    "kept, small pages": ({MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: 1 << 26}, {}, False),
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

Row = dict[str, float]


def main() -> None:
    """Runs the sides of each case and prints a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", action="append", choices=SIDES, metavar="SIDE")
    parser.add_argument("--against", default="default", choices=SIDES, metavar="SIDE")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.cases[0], given.side[0], given.threads)
        return
    from evenkeel.bench.nets import NETS

    known = dict.fromkeys((*CASES, *NETS))
    for case in given.cases:
        if case not in known:
            parser.error(f"no case '{case}'; choose from {', '.join(known)}")
    if given.steps < 1:
        parser.error(f"--steps is {given.steps}; at least 1 is needed")
    for case in given.cases or CASES:
        columns = f"{'ms':>9}{'ratio':>7}{'CPU ms':>9}{'ratio':>7}{'faults':>10}{'peak MiB':>10}"
        print(f"\n{case:28}{columns}")
        for side in given.side or SIDES:
            rows = in_turn(case, (given.against, side), given.steps, given.threads)
            m = {key: statistics.median(row[key] for row in rows[1]) for key in rows[1][0]}
            ratio = {
                key: statistics.median(
                    own[key] / other[key] for other, own in zip(*rows, strict=True)
                )
                for key in ("ms", "cpu")
            }
            times = "".join(f"{m[key]:9.1f}{ratio[key]:7.2f}" for key in ratio)
            print(f"{side:28}{times}{m['faults']:10,.0f}{m['peak']:10,.0f}", flush=True)


def in_turn(case: str, sides: Sequence[str], steps: int, threads: int) -> list[list[Row]]:
    """The steps of each side, which take turns; each in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUN"))}
    command = [sys.executable, __file__, case, "--serve", "--threads", str(threads), "--side"]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(  # noqa: S603
            [*command, side], env=clean | SIDES[side][1], stdin=pipe, stdout=pipe, text=True
        )
        for side in sides
    ]
    found: list[list[Row]] = [[] for _ in sides]
    for step in range(WARM_UP + steps):
        for process, rows in zip(processes, found, strict=True):
            assert process.stdin is not None  # noqa: S101
            assert process.stdout is not None  # noqa: S101
            process.stdin.write("step\n")
            process.stdin.flush()
            row = json.loads(process.stdout.readline())
            if step >= WARM_UP:
                rows.append(row)
    for process in processes:
        process.communicate()
    return found


def serve(case: str, side: str, threads: int) -> None:
    """Takes a step for each line of the input, and writes what it took."""
    settings, _, in_thread = SIDES[side]
    if settings == "keep":
        assert allocator.keep_blocks().at_run_time  # noqa: S101
    elif isinstance(settings, dict):
        libc = ctypes.CDLL("libc.so.6")
        for key, value in settings.items():
            assert libc.mallopt(key, value) == 1  # noqa: S101

    def run() -> None:
        step = step_of(case, threads)
        for _ in sys.stdin:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            started = time.perf_counter(), time.process_time()
            step()
            ms, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
            used = resource.getrusage(resource.RUSAGE_SELF)
            row = {"ms": 1e3 * ms, "cpu": 1e3 * cpu, "peak": used.ru_maxrss / 1024}
            print(json.dumps(row | {"faults": used.ru_minflt - before}), flush=True)

    if in_thread:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()


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
