"""Inference of folded networks, on every side.

The sides: the network as it is in eval mode; folded by us; folded by torch, which has three ways of
its own: `torch.fx.experimental.optimization.fuse`, `torch.jit.freeze` with
`torch.jit.optimize_for_inference`, and if asked for, torch.compile with its weights frozen. Each
has a copy of the same network. All layouts of a network are timed in the same rounds, so that the
best of one side can be compared with the best of another.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import architectures
from .checked import Checked, checked, rows_of
from .ops import LAYOUTS
from .results import OURS, Row
from .steps import COMPILING

__all__ = ["BATCHES", "Plan", "Side", "estimate", "plans", "run", "sides_of"]

BATCHES = (1, 8)
PREPARING = 3.0
"""About how many seconds all sides of one layout take to fold and trace, torch.compile apart."""

IN_A_ROW = 20e-3
"""Seconds of calls in a row that make one sample: a network that serves is called again and again,
and what the call before left in the caches is its own."""

# Weights are rounded once more where a fold is right; where it is wrong outputs are off by 0.1 and
# more. Relative, in the Euclidean norm.
ALLOWED = 1e-3


Maker = Callable[[nn.Module, Tensor], tuple[Callable[[Tensor], Any], int | None]]
"""Network and example to what runs it, and how many norms that still has."""


@dataclass(frozen=True)
class Plan:
    """A network and its images."""

    net: str
    size: int
    width: float
    batch: int
    layouts: tuple[str, ...]

    @property
    def name(self) -> str:
        """Such as resnet18 96px x8."""
        return f"{self.net} {self.size}px x{self.batch}"

    @property
    def guess(self) -> float:
        """About how many seconds one call takes on two cores of a server."""
        return 2e-3 + 4e-3 * self.width**2 * float((self.size / 32) ** 1.2) * self.batch


@dataclass(frozen=True)
class Side:
    """One way to run the network; a call is one forward pass.

    ``left`` is how many norms it still has; None where its graph cannot be asked.
    """

    model: Callable[[Tensor], Any]
    left: int | None
    images: Tensor

    def __call__(self) -> Any:
        with torch.inference_mode():
            return self.model(self.images)


def plans(
    *,
    layouts: Sequence[str],
    batch: int | None = None,
    network: str = "all",
    quick: bool = False,
) -> list[Plan]:
    """What will be run: every net on images of 96x96; quick: of half the width on 32x32.

    Args:
        layouts: names from `evenkeel.bench.ops.LAYOUTS`.
        batch: images; None for `BATCHES`.
        network: one, or all.
        quick: see above.

    Raises:
        ConfigError: no such network.
    """
    names = list(architectures.ARCHITECTURES) if network == "all" else [network]
    for name in names:
        if name not in architectures.ARCHITECTURES:
            architectures.build(name)  # which says what there is
    size, width = (32, 0.5) if quick else (96, 1.0)
    batches = BATCHES if batch is None else (batch,)
    return [Plan(name, size, width, n, tuple(layouts)) for n in batches for name in names]


def estimate(chosen: Sequence[Plan], seconds: float, compiles: bool) -> float:
    """About how many seconds the plans take; a guess from two cores of a server."""
    total = 0.0
    for plan in chosen:
        sides = (4 + compiles) * len(plan.layouts)
        sample = max(plan.guess, IN_A_ROW)
        total += max(seconds, 7 * sample * sides) + 8 * plan.guess * sides
        total += (PREPARING + COMPILING * compiles) * len(plan.layouts)
    return total


def sides_of(plan: Plan, layout: str, compiles: bool) -> dict[str, Callable[[], Side]]:
    """What builds each side of a plan in one layout; all start from the same weights."""
    traced, images = _images(plan, layout, 0), _images(plan, layout, 2)
    built = architectures.build(plan.net, size=plan.size, width=plan.width)
    built.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]

    def side(function: Maker) -> Side:
        model, left = function(copy.deepcopy(built), traced)
        return Side(model, left, images)

    functions: dict[str, Maker] = {"eval": _as_it_is, "fx": _fused, "freeze": _frozen}
    if compiles:
        functions["compile"] = _compiled
    functions[OURS] = _folded
    return {name: partial(side, function) for name, function in functions.items()}


def run(chosen: Sequence[Plan], *, seconds: float, compiles: bool) -> Iterator[Row]:
    """Measures net by net; yields one row for each layout.

    Args:
        chosen: what to run.
        seconds: the budget of one net's rounds, all layouts and sides together.
        compiles: True to run torch.compile too.
    """
    for plan in chosen:
        found = {layout: _checked(plan, layout, compiles) for layout in plan.layouts}
        yield from rows_of(plan.name, "float32", found, seconds=seconds, shortest=IN_A_ROW)
        if compiles:
            torch._dynamo.reset()


def _checked(plan: Plan, layout: str, compiles: bool) -> Checked:
    """Compares on images that no side has seen while it was made."""
    truth: Tensor | None = None
    left: dict[str, int] = {}

    def off(name: str, side: Side) -> float:
        nonlocal truth
        output = side()
        truth = output if name == "eval" else truth
        far = _distance(output, truth)
        if side.left is not None:
            left[name] = side.left
        return far

    return replace(checked(sides_of(plan, layout, compiles), off, ALLOWED), left=left)


def _distance(output: Tensor, truth: Tensor | None) -> float:
    """How far an output is from that of the network as it is, relative, in the Euclidean norm."""
    if truth is None:
        raise RuntimeError("the network as it is gives nothing to compare with")
    if output.shape != truth.shape:
        return float("inf")
    return float((output - truth).norm() / truth.norm())


def _images(plan: Plan, layout: str, seed: int) -> Tensor:
    images = architectures.example(plan.net, plan.batch, plan.size, seed)
    return images.contiguous(memory_format=LAYOUTS[layout])


def _as_it_is(model: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    return model, _norms(model)


def _fused(model: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    with _without_warnings():
        from torch.fx.experimental.optimization import fuse

        fused = fuse(model)
    return fused, _norms(fused)


def _frozen(model: nn.Module, images: Tensor) -> tuple[Any, int]:
    with _without_warnings():
        traced = torch.jit.trace(model, images, check_trace=False)  # type: ignore[no-untyped-call]
        frozen: Any = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
    return frozen, len(frozen.graph.findAllNodes("aten::batch_norm", True))


def _compiled(model: nn.Module, images: Tensor) -> tuple[Any, None]:
    return torch.compile(model, dynamic=False, options={"freezing": True}), None


def _folded(model: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    from ..surgery.fold import fold

    folded, report = fold(model, images, pack=True)
    return folded, len(report.left)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """For torch's folds: both need torch.jit, which is deprecated and says so at every step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
