"""Whole training steps: forward, cross entropy, backward, SGD, on every side.

A side is a way to run the network in a layout: eager, through torch.compile, without its batch
norms (`bare`, what batch norm costs at all), accelerated by us, and if asked for, accelerated with
low memory and eager once more. All layouts of a network are timed in the same rounds, so that the
best of one side can be compared with the best of another.

On a GPU ours runs on the Triton kernels, and with torch.compile there are two sides more: ours
compiled, and the network without norms compiled, so that each has its own to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import nets
from .checked import Checked, checked, rows_of
from .ops import DTYPES, LAYOUTS
from .results import AGAIN, BARE_COMPILED, LOW, OURS, OURS_COMPILED, PEERS, Row
from .timing import clock_on

__all__ = ["COMPILING", "Plan", "Step", "estimate", "plans", "run", "sides_of"]

CLASSES = 10
STEPS_COMPARED = 3
COMPILING = 60.0
"""About how many seconds torch.compile takes for one net."""
GPU = 330
"""About how many times as fast as two cores of a server a GPU is: ResNet-50 at 0.1 s a step."""
PROVED_ON = 16
"""Images that `accelerate` compares networks on where there may be hundreds in a batch."""

# After three steps of training two correct sides differ by what rounding has grown to.
ALLOWED = {"float32": 1e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Plan:
    """A network, its images, and what it is run in."""

    net: str
    size: int
    width: float
    batch: int
    layouts: tuple[str, ...]
    dtype: str
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Such as resnet18 32px."""
        return f"{self.net} {self.size}px"

    @property
    def guess(self) -> float:
        """About how many seconds one step takes on two cores of a server, or on a GPU."""
        alone = 0.4 * self.width**2 * float((self.size / 32) ** 1.2) * self.batch / 32
        return alone if self.device == "cpu" else alone / GPU

    def compiled(self, compiles: bool) -> int:
        """How many sides go through torch.compile."""
        return (1 if self.device == "cpu" else 3) * compiles


def plans(
    *,
    batch: int,
    layouts: Sequence[str],
    dtypes: Sequence[str],
    network: str = "all",
    quick: bool = False,
    size: int | None = None,
    device: str = "cpu",
) -> list[Plan]:
    """What will be run: every net on images of 32x32 and 96x96; quick: of half the width on 32x32.

    Args:
        batch: images.
        layouts, dtypes: names from `evenkeel.bench.ops`.
        network: a name from `evenkeel.bench.nets`, or all, which are those of its `NETS`.
        quick: nets of half the width.
        size: of the images, in place of 32 and 96.
        device: cpu or cuda.

    Raises:
        ConfigError: no such network.
    """
    names = list(nets.NETS) if network == "all" else [network]
    for name in names:
        if name not in nets.NETS | nets.LARGE:
            nets.build(name)  # which says what there is
    sizes = (size,) if size is not None else (32,) if quick else (32, 96)
    return [
        Plan(name, each, 0.5 if quick else 1.0, batch, tuple(layouts), dtype, device)
        for dtype in dtypes
        for each in sizes
        for name in names
    ]


def estimate(
    chosen: Sequence[Plan], seconds: float, compiles: bool, asked: Collection[str] = ()
) -> float:
    """About how many seconds the plans take; a guess from two cores of a server, or a GPU."""
    total = 0.0
    for plan in chosen:
        sides = (3 + plan.compiled(compiles) + len(asked)) * len(plan.layouts)
        total += max(seconds, 7 * plan.guess * sides) + 8 * plan.guess * sides
        total += COMPILING * plan.compiled(compiles) * len(plan.layouts)
    return total


class Step:
    """One network with its optimizer; a call is one training step and returns the loss."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, dtype: str) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.autocast = DTYPES[dtype] != torch.float32
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)

    def forward(self) -> Tensor:
        """The loss, with its graph."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.model(self.images)
        return F.cross_entropy(output.float(), self.labels)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()


def batch_of(plan: Plan, layout: str) -> tuple[Tensor, Tensor]:
    """Random images and labels, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(plan.batch, 3, plan.size, plan.size, generator=generator)
    labels = torch.randint(0, CLASSES, (plan.batch,), generator=generator)
    laid_out = images.to(plan.device).contiguous(memory_format=LAYOUTS[layout])
    return laid_out, labels.to(plan.device)


def sides_of(
    plan: Plan, layout: str, compiles: bool, asked: Collection[str] = ()
) -> dict[str, Callable[[], Step]]:
    """What builds each side of a plan in one layout; of LOW and AGAIN those that are asked for.

    All sides but `bare` start from the same weights.
    """
    images, labels = batch_of(plan, layout)

    def model(norm: bool = True) -> nn.Module:
        built = nets.build(plan.net, size=plan.size, width=plan.width, classes=CLASSES, norm=norm)
        built.to(plan.device, memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
        return built

    def ours(memory: str = "full") -> nn.Module:
        return _accelerated(model(), images, memory)

    def step(network: Any) -> Step:
        return Step(network, images, labels, plan.dtype)

    sides: dict[str, Callable[[], Step]] = {
        "bare": lambda: step(model(norm=False)),
        "eager": lambda: step(model()),
        OURS: lambda: step(ours()),
    }
    if LOW in asked:
        sides[LOW] = lambda: step(ours("low"))
    if AGAIN in asked:
        sides[AGAIN] = sides["eager"]
    if compiles:
        sides["compile"] = lambda: step(torch.compile(model(), dynamic=False))
    if compiles and plan.device != "cpu":
        sides[OURS_COMPILED] = lambda: step(torch.compile(ours(), dynamic=False))
        sides[BARE_COMPILED] = lambda: step(torch.compile(model(norm=False), dynamic=False))
    return sides


def run(
    chosen: Sequence[Plan], *, seconds: float, compiles: bool, asked: Collection[str] = ()
) -> Iterator[Row]:
    """Measures net by net; yields one row for each layout.

    Args:
        chosen: what to run.
        seconds: the budget of one net's rounds, all layouts and sides together.
        compiles: True to run torch.compile too.
        asked: LOW, to run ours with low memory too; AGAIN, eager once more.
    """
    for plan in chosen:
        found = {layout: _checked(plan, layout, compiles, asked) for layout in plan.layouts}
        clock = clock_on(plan.device)
        yield from rows_of(plan.name, plan.dtype, found, seconds=seconds, clock=clock)
        if compiles:
            torch._dynamo.reset()


def _checked(plan: Plan, layout: str, compiles: bool, asked: Collection[str]) -> Checked:
    """Compares what each side has learned with what eager has."""
    truth: float | None = None

    def off(name: str, side: Step) -> float:
        nonlocal truth
        loss = [float(side()) for _ in range(STEPS_COMPARED)][-1]
        if name not in (OURS, OURS_COMPILED, LOW, AGAIN, *PEERS):
            return 0.0
        truth = loss if truth is None else truth
        return abs(loss - truth) / max(abs(truth), 1e-30)

    return checked(sides_of(plan, layout, compiles, asked), off, ALLOWED[plan.dtype])


def _accelerated(model: nn.Module, example: Tensor, memory: str) -> nn.Module:
    from ..surgery.accelerate import accelerate

    # All sides have the allocator that the command has chosen.
    chosen: dict[str, Any] = {"allocator": "default", "memory": memory}
    if example.device.type != "cpu":
        example, chosen["backend"] = example[:PROVED_ON], "triton"
    return accelerate(model, example, **chosen)[0]
