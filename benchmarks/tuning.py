"""Which sizes the Triton kernels should divide their work by, on the GPU at hand.

    python benchmarks/tuning.py [--net resnet50] [--batch 256] [--dtype bfloat16]
                                [--size NAME ...] [--seconds 0.05] [--out FILE]

Each size of `evenkeel.kernels.triton.planning.Limits` is changed alone, to each of a few others,
and all are timed in turn with the sizes as they are, on every batch norm of the network. What is
printed is the time in theirs: below 1 is faster. Nothing is changed: a size that pays goes into
`Limits` by hand, with the file of these numbers beside it, so that the same call still gives the
same bits everywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402 - behind the path

from evenkeel.bench.machine import machine  # noqa: E402
from evenkeel.bench.ops import ALLOWED, DTYPES, LAYOUTS, Case, cases  # noqa: E402
from evenkeel.bench.shapes import TAILS  # noqa: E402
from evenkeel.bench.timing import clock_on, geometric_mean, interleaved  # noqa: E402
from evenkeel.errors import EvenkeelError  # noqa: E402
from evenkeel.files import whole  # noqa: E402
from evenkeel.kernels.contract import Activation, Affine, Sums  # noqa: E402
from evenkeel.kernels.select import load  # noqa: E402
from evenkeel.kernels.triton import Triton  # noqa: E402
from evenkeel.kernels.triton.planning import LIMITS, Limits, plan  # noqa: E402
from evenkeel.view import view_of  # noqa: E402

OTHERS: dict[str, tuple[Any, ...]] = {
    "tile": (2048, 8192),
    "resident": (4096, 8192, 32768),
    "least": (4096, 16384, 32768),
    "programs": ((768, 1024), (3072, 1024), (1536, 512), (1536, 2048)),
    "fused": (16, 32, 128),
    "line": (64, 256),
    "lanes": (8, 32),
}
"""What each size is tried at."""
NOW = "as they are"

Pass = Callable[[], object]


class Norm:
    """One batch norm's tensors, its forward and its backward by any limits."""

    def __init__(self, case: Case, verbs: Triton) -> None:
        dtype, tail = DTYPES[case.dtype], TAILS[case.place.tail]
        self.calls, self.act = verbs.calls, Activation(tail.activation or "none")
        random = torch.Generator(case.device).manual_seed(0)
        shape = {"size": case.shape, "generator": random, "device": case.device}
        self.x, self.dy, self.residual = (
            torch.randn(**shape).to(dtype).contiguous(memory_format=LAYOUTS[case.layout])
            for _ in range(3)
        )
        if not tail.residual:
            self.residual = None
        self.y, self.dx = verbs.like(self.x), verbs.like(self.x)
        self.dresidual = verbs.dresidual(self.residual, self.act)
        view = view_of(self.x.shape, self.x.stride(), (1,))
        assert view is not None  # noqa: S101 - it is dense
        self.view, owners = view, case.place.channels
        vectors = torch.ones(8, owners, device=case.device)
        self.mean, self.invstd, *self.running, self.weight, self.bias, one, two = vectors
        self.sums = Sums(one, two)
        self.bits: dict[int, torch.Tensor] = {}

    def passes(self, limits: Limits) -> dict[str, Pass]:
        """Forward and backward, divided by those limits."""
        p, own = plan(self.view, self.x.itemsize, True, limits), (self.weight, self.bias)
        bits = None
        if self.residual is not None and self.act.has_bit:
            bits = self.bits.setdefault(p.bits, self.x.new_empty(p.bits, dtype=torch.uint8))
        statistics = (self.mean, None, self.invstd, *self.running)
        known = Affine(self.mean, self.invstd, *own)
        added = self.residual if bits is None else None

        def forward() -> None:
            self.calls.train(
                self.x, p, self.residual, self.y, statistics, own, 1e-5, 0.1, self.act, bits
            )

        def backward() -> None:
            self.calls.backward(
                *(self.dy, self.x, p, added, self.dx, self.dresidual, known, self.sums),
                *(self.act, True, bits),
            )

        return {"forward": forward, "backward": backward}

    def results(self) -> list[torch.Tensor]:
        """What the two passes have written, as it is now."""
        found = (self.y, self.dx, self.dresidual, self.mean, self.invstd, *self.sums)
        return [t.double() for t in found if t is not None]


def tried(sizes: list[str]) -> Iterator[tuple[str, Limits]]:
    """The limits as they are, and with one size changed."""
    yield NOW, LIMITS
    for name in sizes:
        for value in OTHERS[name]:
            yield f"{name} {value}", replace(LIMITS, **{name: value})


def agree(norm: Norm, ways: dict[str, dict[str, Pass]], allowed: float) -> None:
    """Raises RuntimeError if a way computes something else than the sizes as they are."""
    wanted: list[torch.Tensor] = []
    for name, passes in ways.items():
        for run in passes.values():
            run()
        found = norm.results()
        wanted = wanted or found
        for got, right in zip(found, wanted, strict=True):
            off = float((got - right).norm() / right.norm().clamp_min(1e-30))
            if not off <= allowed:
                raise RuntimeError(f"with {name} a result is {off:.1e} away from what it should be")


def timed(case: Case, verbs: Triton, sizes: list[str], seconds: float) -> list[dict[str, Any]]:
    """A row for each pass: the median time of each limits, those that divide alike but once."""
    norm = Norm(case, verbs)
    plans = {name: plan(norm.view, norm.x.itemsize, True, limits) for name, limits in tried(sizes)}
    ways = {
        name: norm.passes(limits)
        for name, limits in tried(sizes)
        if name == NOW or plans[name] != plans[NOW]
    }
    agree(norm, ways, ALLOWED[case.dtype])
    rows = []
    for which in ("forward", "backward"):
        sides = {name: passes[which] for name, passes in ways.items()}
        taken = interleaved(sides, seconds=seconds * len(sides), clock=clock_on(case.device))
        rows.append(
            {
                "case": case.name, "layout": case.layout, "dtype": case.dtype, "pass": which,
                "seconds": taken[NOW].measure.median,
                "ratios": {name: s.over(taken[NOW]).median for name, s in taken.items()},
            }
        )  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]], names: list[str]) -> Iterator[str]:
    """Geometric means for each layout and pass; a size that changes nothing there counts as 1."""
    columns: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        columns[f"{row['layout']} {row['pass']}"].append(row)
    yield f"{'':22}" + "".join(f"{title:>24}" for title in columns)
    for name in names:
        ratios = [[row["ratios"].get(name, 1.0) for row in column] for column in columns.values()]
        cells = (f"{geometric_mean(r):.3f} ({min(r):.2f} to {max(r):.2f})" for r in ratios)
        yield f"{name:22}" + "".join(f"{cell:>24}" for cell in cells)


def main() -> int:
    """Times all cases, shows the table, and writes the file after every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    parser.add_argument("--size", choices=OTHERS, action="append", help="only these sizes")
    parser.add_argument("--seconds", type=float, default=0.05, help="for each of a case's sides")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no CUDA device here", file=sys.stderr)
        return 2
    if not (given.seconds > 0 and math.isfinite(given.seconds)) or given.batch < 2:
        parser.error("--seconds must be more than 0, and --batch 2 or more")
    if given.out is not None and not given.out.parent.is_dir():
        parser.error(f"--out {given.out}: there is no folder {given.out.parent}; make it first")
    layouts, sizes = given.layout or list(LAYOUTS), given.size or list(OTHERS)
    try:
        verbs = load("triton")
        chosen, left_out = cases(
            batch=given.batch, layouts=layouts, dtypes=[given.dtype], network=given.net,
            device=given.device,
        )  # fmt: skip
    except EvenkeelError as error:
        parser.error(str(error))
    assert isinstance(verbs, Triton)  # noqa: S101 - it is called so
    names = [name for name, _ in tried(sizes)]
    print(f"{len(chosen)} batch norms, {len(names)} sets of sizes", *left_out, sep="\n", flush=True)
    file = {"kind": "tuning", "machine": machine(), "limits": asdict(LIMITS), "rows": []}
    start = time.monotonic()
    for number, case in enumerate(chosen, 1):
        file["rows"] += timed(case, verbs, sizes, given.seconds)
        if given.out is not None:
            with whole(given.out, EvenkeelError) as part:
                part.write_text(json.dumps(file, indent=1), encoding="utf-8")
        spent = time.monotonic() - start
        print(f"{number}/{len(chosen)} {case.layout} {case.name}, {spent:.0f} s", flush=True)
    print(*table(file["rows"], names), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
