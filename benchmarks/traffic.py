"""How far a batch norm is from the memory it needs: the same traffic by torch's own copy and add.

    python benchmarks/traffic.py [--seconds 1] [--batch 32]

Forward reads x and writes y, which is a copy; backward reads dy and x and writes dx, which is an
add. A shortcut makes an add of forward too, and with a ReLU behind it writes one more tensor. The
traffic's outputs are new tensors, as a norm's are, and its side takes turns with the others: so it
finds the caches as they do, which the copy of `evenkeel bench ops`, made many times in a row, does
not. A norm in channels_last has to read its inputs twice, for which the first line below shows the
price: reading a tensor takes about half as long as copying it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from evenkeel import allocator
from evenkeel.bench.ops import Inputs, cases, eager, inputs_of, ours
from evenkeel.bench.shapes import TAILS
from evenkeel.bench.timing import geometric_mean, interleaved

LARGE = 16e6
"""Bytes of a tensor that no cache keeps for long."""


def main() -> None:
    """Prints a line for each case, then geometric means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each case")
    parser.add_argument("--batch", type=int, default=32, help="images")
    given = parser.parse_args()
    if not 0 < given.seconds < float("inf"):
        parser.error(f"--seconds is {given.seconds}; give a time above 0")
    if given.batch < 2:
        parser.error(f"--batch is {given.batch}; at least 2 are needed")
    chosen, left_out = cases(
        batch=given.batch, layouts=("nchw", "channels_last"), dtypes=("float32",), quick=True
    )
    for case in left_out:
        print(f"left out: {case}")
    if not chosen:
        parser.error(f"--batch is {given.batch}, too large for every case")
    minutes = (len(chosen) * 2 * given.seconds + 5) / 60
    print(f"{len(chosen)} cases in float32, batch {given.batch}, about {minutes:.1f} minutes")
    allocator.keep_blocks()
    bandwidth()
    over: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    print(f"{'milliseconds':<42}{'traffic':>8}{'ours':>8}{'eager':>8}   over the traffic")
    for case in chosen:
        inputs, tail = inputs_of(case), case.place.tail
        sides = {
            "traffic": traffic(inputs, tail),
            "ours": ours(inputs, tail),
            "eager": eager(inputs, tail),
        }
        found = interleaved(sides, seconds=given.seconds, most=1000)
        times = "".join(f"{1e3 * samples.measure.median:8.2f}" for samples in found.values())
        mine, theirs = (found[name].over(found["traffic"]).median for name in ("ours", "eager"))
        name = f"{case.name} {case.layout}, {case.bytes / 1e6:.1f} MB"
        print(f"{name:<42}{times}   {mine:.2f} and {theirs:.2f}")
        size = "above" if case.bytes > LARGE else "up to"
        over[f"{case.layout}, {size} {LARGE / 1e6:.0f} MB"].append((mine, theirs))
    for name, ratios in sorted(over.items()):
        mine, theirs = (geometric_mean(column) for column in zip(*ratios, strict=True))
        print(f"{name}: ours {mine:.2f}, eager {theirs:.2f} times the traffic, {len(ratios)} cases")


def bandwidth() -> None:
    """Prints what the memory gives to a sum, which reads, and to a copy, which writes too."""
    x = torch.ones(25_000_000)
    y = torch.empty_like(x)
    found = interleaved({"sum": x.sum, "copy": lambda: y.copy_(x)}, seconds=1.0)
    read, copied = (4e-9 * x.numel() / found[name].measure.median for name in ("sum", "copy"))
    print(f"reading {read:.1f} GB/s, copying {2 * copied:.1f} GB/s, reads and writes together")


def traffic(given: Inputs, tail: str) -> Callable[[], tuple[Tensor, ...]]:
    """The reads and writes of a norm and its backward, and no other arithmetic than sums."""
    x, dy = given.x.detach(), given.dy
    residual = None if given.residual is None else given.residual.detach()
    activation, _ = TAILS[tail]

    def side() -> tuple[Tensor, ...]:
        if residual is None:
            return x.clone(), x + dy
        made = x + residual, x + dy
        return made if activation is None else (*made, torch.zeros_like(x))

    return side


if __name__ == "__main__":
    main()
