"""Forward and backward of one batch norm, with what follows it, on every side.

The sides: ours; torch's own ops one by one, in place where that is allowed; the same through
torch.compile; and a copy of the tensor, which is what the memory can do. All take the same inputs
in the same layout and return the output and all gradients as fresh tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import batch_norm
from .checked import Checked, checked
from .results import OURS, Row, row_of
from .shapes import SIMPLE_TAILS, TAILS, Place, distinct
from .timing import Measure, clock_on, interleaved

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "Case",
    "Inputs",
    "builders_of",
    "cases",
    "estimate",
    "floor_bytes",
    "run",
]

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LARGEST = 1 << 30
"""Bytes of one tensor; a case holds about ten of them."""

# Sides round at different places: in bfloat16 eager rounds before the sum with the shortcut, so
# more values end on the other side of the ReLU. These are the largest relative distances (in the
# Euclidean norm) that such rounding explains; more is a wrong result, which nobody may be timed on.
ALLOWED = {"float32": 1e-2, "bfloat16": 1e-1}

Side = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A place in a network, with the batch, the layout and the dtype it is run in."""

    place: Place
    batch: int
    layout: str
    dtype: str
    counts: dict[str, int]
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Such as 64x56x56 bn+relu."""
        place = self.place
        return f"{place.channels}x{place.height}x{place.width} {place.tail}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The tensor's shape."""
        return self.batch, self.place.channels, self.place.height, self.place.width

    @property
    def bytes(self) -> int:
        """The tensor's size."""
        batch, channels, height, width = self.shape
        return batch * channels * height * width * DTYPES[self.dtype].itemsize


def cases(
    *,
    batch: int,
    layouts: Sequence[str],
    dtypes: Sequence[str],
    network: str = "all",
    quick: bool = False,
    every_tail: bool = False,
    device: str = "cpu",
) -> tuple[list[Case], list[str]]:
    """What will be run, and what will not, with the reason.

    Args:
        batch: images.
        layouts, dtypes: names from `LAYOUTS` and `DTYPES`.
        network: whose batch norms, or all.
        quick: only the dozen of `evenkeel.bench.shapes.QUICK`.
        every_tail: each shape alone, with ReLU and with a sum and ReLU, not only with what follows
            it in a network. Those that no network has count for none.
        device: cpu or cuda. On CUDA our Triton kernels are timed, and cuDNN under our backend.

    Raises:
        ConfigError: no such network.
    """
    found = distinct(network, quick=quick)
    if every_tail:
        more = [place._replace(tail=tail) for place in found for tail in SIMPLE_TAILS]
        found = {place: {} for place in more} | found
    if device != "cpu":  # what is used there comes first, for time there is short
        layouts, dtypes = layouts[::-1], dtypes[::-1]
    every = [
        Case(place, batch, layout, dtype, counts, device)
        for layout in layouts
        for dtype in dtypes
        for place, counts in found.items()
    ]
    left_out = [
        f"{case.name} in {case.dtype}: its tensor has {case.bytes / 2**30:.1f} GiB, more than "
        f"{LARGEST / 2**30:.0f}; use a smaller --batch"
        for case in every
        if case.bytes > LARGEST
    ]
    return [case for case in every if case.bytes <= LARGEST], list(dict.fromkeys(left_out))


def estimate(chosen: Sequence[Case], seconds: float, compiles: bool) -> float:
    """About how many seconds the cases take; a guess from two cores of a server, or a GPU."""
    total = 0.0
    for case in chosen:
        speed = 1.0 if case.device == "cpu" else 100.0
        once = (3 if compiles else 2) * 0.4e-9 * case.bytes / speed  # all sides
        inputs = 6e-9 * case.bytes / speed
        total += max(seconds, 7 * once) + 6 * once + inputs + 0.3 + 5.0 * compiles
    return total


class Inputs(NamedTuple):
    """The tensors of a case; x, weight, bias and residual want gradients."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    mean: Tensor
    var: Tensor
    dy: Tensor

    @property
    def sources(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]


def inputs_of(case: Case) -> Inputs:
    """Random inputs, the same ones every time; parameters and running statistics in float32."""
    device = torch.device(case.device)
    generator = torch.Generator(device).manual_seed(0)

    def tensor() -> Tensor:
        empty = torch.empty(
            case.shape,
            dtype=DTYPES[case.dtype],
            device=device,
            memory_format=LAYOUTS[case.layout],
        )
        return empty.normal_(generator=generator)

    channels = case.place.channels
    weight = torch.empty(channels, device=device).uniform_(0.5, 1.5, generator=generator)
    bias = torch.empty(channels, device=device).normal_(0, 0.1, generator=generator)
    residual = tensor().requires_grad_() if TAILS[case.place.tail].residual else None
    x = tensor().requires_grad_()
    running = (torch.zeros(channels, device=device), torch.ones(channels, device=device))
    own = weight.requires_grad_(), bias.requires_grad_()
    return Inputs(x, *own, residual, *running, tensor())


def ours(given: Inputs, tail: str, backend: str = "auto") -> Side:
    """One call of `evenkeel.batch_norm`, and its backward."""
    activation, _ = TAILS[tail]

    def forward() -> Tensor:
        return batch_norm(
            given.x,
            given.weight,
            given.bias,
            given.mean,
            given.var,
            training=True,
            activation=activation,
            residual=given.residual,
            backend=backend,
        )

    return _with_backward(forward, given)


def eager(given: Inputs, tail: str) -> Side:
    """Torch's ops one by one; sum and activation work in place on the norm's output."""
    return _with_backward(lambda: _torch_forward(given, tail), given)


def compiled(given: Inputs, tail: str) -> Side:
    """The same through torch.compile, for exactly this shape."""
    forward = torch.compile(lambda: _torch_forward(given, tail), dynamic=False)
    return _with_backward(forward, given)


def _torch_forward(given: Inputs, tail: str) -> Tensor:
    activation, _ = TAILS[tail]
    y = F.batch_norm(given.x, given.mean, given.var, given.weight, given.bias, training=True)
    if given.residual is not None:
        y = y.add_(given.residual)
    if activation == "relu":
        return y.relu_()
    return F.relu6(y, inplace=True) if activation == "relu6" else y


def _with_backward(forward: Callable[[], Tensor], given: Inputs) -> Side:
    """Output and gradients. Nothing accumulates into ``.grad``, which would be a pass more."""

    def side() -> tuple[Tensor, ...]:
        y = forward()
        return y.detach(), *torch.autograd.grad(y, given.sources, given.dy)

    return side


def copy(given: Inputs) -> Callable[[], Tensor]:
    """The tensor copied into one that is already there: one read, one write."""
    source = given.x.detach()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def floor_bytes(case: Case, streams: bool = False) -> float:
    """The least that must move between memory and core, forward and backward.

    Forward reads x (and the shortcut) and writes y; backward reads dy and x and writes dx. The sign
    of a ReLU can be told from x, but behind a sum only from one bit for each value, written and
    read. The shortcut's gradient is dy where nothing follows the sum, else it is written too.

    Args:
        case: what is normalized.
        streams: True where nothing that is read stays near for the second time, as on a GPU whose
            caches the tensor exceeds: x is read twice forward, and dy (or the shortcut's gradient
            in its place) and x twice backward.
    """
    activation, residual = TAILS[case.place.tail]
    passes = 5 + residual + 3 * streams
    if not (residual and activation):
        return float(passes * case.bytes)
    values = case.bytes / DTYPES[case.dtype].itemsize
    return (passes + 1) * case.bytes + 2 * values / 8


def _streams(case: Case) -> bool:
    if case.device == "cpu":
        return False
    return case.bytes > int(torch.cuda.get_device_properties(case.device).L2_cache_size)


def run(chosen: Sequence[Case], *, seconds: float, compiles: bool) -> Iterator[Row]:
    """Measures case by case; a side that fails or is wrong is left out of its row, with the reason.

    Args:
        chosen: what to run.
        seconds: the budget of one case's rounds.
        compiles: True to run torch.compile too.
    """
    for case in chosen:
        yield _measured(case, seconds, compiles)
        torch._dynamo.reset()


def _measured(case: Case, seconds: float, compiles: bool) -> Row:
    given = inputs_of(case)
    found = _checked(case, given, compiles)
    sides = {"copy": copy(given), **found.sides}
    samples = interleaved(sides, seconds=seconds, clock=clock_on(case.device))
    row = row_of(
        case.name, case.layout, case.dtype, samples,
        counts=case.counts, absent=found.absent, difference=found.difference,
    )  # fmt: skip
    bandwidth = 2 * case.bytes / row.sides["copy"].median
    floor = floor_bytes(case, _streams(case)) / bandwidth
    return replace(row, sides={**row.sides, "floor": Measure(floor, floor, floor)})


def builders_of(case: Case, compiles: bool) -> dict[str, Callable[[Inputs, str], Side]]:
    """What makes each side; eager, which the others are compared with, is the first."""
    found: dict[str, Callable[[Inputs, str], Side]] = {"eager": eager}
    if case.device == "cpu":
        found[OURS] = ours
    else:
        found |= {OURS: partial(ours, backend="triton"), "cudnn": partial(ours, backend="cudnn")}
    return found | ({"compile": compiled} if compiles else {})


def _checked(case: Case, given: Inputs, compiles: bool) -> Checked:
    """Compares output and gradients with eager's."""
    builders = builders_of(case, compiles)
    truth: tuple[Tensor, ...] | None = None

    def off(name: str, side: Side) -> float:
        nonlocal truth
        found = side()
        truth = truth or found
        return _distance(found, truth)

    sides = {name: partial(build, given, case.place.tail) for name, build in builders.items()}
    return checked(sides, off, ALLOWED[case.dtype])


def _distance(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative distance among output and gradients; not a number counts as infinite."""

    def norm(t: Tensor) -> float:
        return float(torch.linalg.vector_norm(t, dtype=torch.float32))

    off = [
        norm(a - b) / max(norm(b), 1e-30) if a.shape == b.shape else float("inf")
        for a, b in zip(found, truth, strict=True)
    ]
    return max(x if x == x else float("inf") for x in off)
