"""Whole training steps: forward, cross entropy, backward, SGD, on every side.

A side is a way to run the network in a layout: eager, through torch.compile, without its batch
norms (`bare`, what batch norm costs at all), accelerated by us, and if asked for, accelerated with
low memory and eager once more. All layouts of a network are timed in the same rounds, so that the
best of one side can be compared with the best of another.
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
from .results import AGAIN, LOW, OURS, PEERS, Row

__all__ = ["COMPILING", "Plan", "Step", "estimate", "plans", "run", "sides_of"]

CLASSES = 10
STEPS_COMPARED = 3
COMPILING = 60.0
"""About how many seconds torch.compile takes for one net."""

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

    @property
    def name(self) -> str:
        """Such as resnet18 32px."""
        return f"{self.net} {self.size}px"

    @property
    def guess(self) -> float:
        """About how many seconds one step takes on two cores of a server."""
        return 0.4 * self.width**2 * float((self.size / 32) ** 1.2) * self.batch / 32


def plans(
    *,
    batch: int,
    layouts: Sequence[str],
    dtypes: Sequence[str],
    network: str = "all",
    quick: bool = False,
) -> list[Plan]:
    """What will be run: every net on images of 32x32 and 96x96; quick: of half the width on 32x32.

    Raises:
        ConfigError: no such network.
    """
    names = list(nets.NETS) if network == "all" else [network]
    for name in names:
        if name not in nets.NETS:
            nets.build(name)  # which says what there is
    return [
        Plan(name, size, 0.5 if quick else 1.0, batch, tuple(layouts), dtype)
        for dtype in dtypes
        for size in ((32,) if quick else (32, 96))
        for name in names
    ]


def estimate(
    chosen: Sequence[Plan], seconds: float, compiles: bool, asked: Collection[str] = ()
) -> float:
    """About how many seconds the plans take; a guess from two cores of a server."""
    total = 0.0
    for plan in chosen:
        sides = (3 + compiles + len(asked)) * len(plan.layouts)
        total += max(seconds, 7 * plan.guess * sides) + 8 * plan.guess * sides
        total += COMPILING * compiles * len(plan.layouts)
    return total


class Step:
    """One network with its optimizer; a call is one training step and returns the loss."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, dtype: str) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.autocast = DTYPES[dtype] != torch.float32
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)

    def forward(self) -> Tensor:
        """The loss, with its graph."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
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
    return images.contiguous(memory_format=LAYOUTS[layout]), labels


def sides_of(
    plan: Plan, layout: str, compiles: bool, asked: Collection[str] = ()
) -> dict[str, Callable[[], Step]]:
    """What builds each side of a plan in one layout; of LOW and AGAIN those that are asked for.

    All sides but `bare` start from the same weights.
    """
    images, labels = batch_of(plan, layout)

    def model(norm: bool = True) -> nn.Module:
        built = nets.build(plan.net, size=plan.size, width=plan.width, classes=CLASSES, norm=norm)
        built.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
        return built

    def step(network: Any) -> Step:
        return Step(network, images, labels, plan.dtype)

    sides: dict[str, Callable[[], Step]] = {
        "bare": lambda: step(model(norm=False)),
        "eager": lambda: step(model()),
        OURS: lambda: step(_accelerated(model(), images, "full")),
    }
    if LOW in asked:
        sides[LOW] = lambda: step(_accelerated(model(), images, "low"))
    if AGAIN in asked:
        sides[AGAIN] = sides["eager"]
    if compiles:
        sides["compile"] = lambda: step(torch.compile(model(), dynamic=False))
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
        yield from rows_of(plan.name, plan.dtype, found, seconds=seconds)
        if compiles:
            torch._dynamo.reset()


def _checked(plan: Plan, layout: str, compiles: bool, asked: Collection[str]) -> Checked:
    """Compares what each side has learned with what eager has."""
    truth: float | None = None

    def off(name: str, side: Step) -> float:
        nonlocal truth
        loss = [float(side()) for _ in range(STEPS_COMPARED)][-1]
        if name not in (OURS, LOW, AGAIN, *PEERS):
            return 0.0
        truth = loss if truth is None else truth
        return abs(loss - truth) / max(abs(truth), 1e-30)

    return checked(sides_of(plan, layout, compiles, asked), off, ALLOWED[plan.dtype])


def _accelerated(model: nn.Module, example: Tensor, memory: str) -> nn.Module:
    from ..surgery.accelerate import accelerate

    # All sides have the allocator that the command has chosen.
    return accelerate(model, example, allocator="default", memory=memory)[0]
