"""Does the folded network compute the same? At every norm, and at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...errors import SurgeryError
from ..comparing import apart, magnitude
from ..examples import cloned, tensors_in
from .pushing import Move

__all__ = ["drawn_like", "largest_apart", "outputs", "per_norm"]


class _Keeper(fx.Interpreter):
    """Keeps what the wanted nodes give, and nothing else longer than it is used."""

    def __init__(self, graph: fx.GraphModule, wanted: Iterable[str]) -> None:
        super().__init__(graph)
        self.wanted, self.kept = set(wanted), dict[str, Any]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            # What is written over in place later was another value here.
            self.kept[n.name] = cloned(result)
        return result


def per_norm(
    original: fx.GraphModule, folded: fx.GraphModule, moves: list[Move], inputs: tuple[Any, ...]
) -> list[float]:
    """For each folded norm the largest relative difference where the networks meet behind it.

    Args:
        original, folded: graphs in one precision.
        moves: what was folded, with the nodes behind which values are the old ones.
        inputs: of both.
    """
    places = [_meetings(move) for move in moves]
    pairs = {pair for place in places for pair in place}
    with torch.no_grad():
        new = _Keeper(folded, {name for name, _ in pairs})
        new.run(*cloned(inputs))
        old = _Keeper(original, {name for _, name in pairs})
        old.run(*cloned(inputs))
    found = {(a, b): relative(*largest_apart(old.kept[b], new.kept[a])) for a, b in pairs}
    return [max((found[pair] for pair in place), default=0.0) for place in places]


def _meetings(move: Move) -> set[tuple[str, str]]:
    """The nearest nodes behind the norm that have a value of the original, each with its name."""
    found, seen, queue = set(), set(move.anchors), list(move.anchors)
    for node in queue:
        if node.meta.get("means") is not None:
            found.add((node.name, str(node.meta["means"])))
            continue
        fresh = [user for user in node.users if user not in seen]
        seen.update(fresh)
        queue += fresh
    return found


def outputs(network: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The floating tensors that a network gives.

    Raises:
        SurgeryError: there are none, or they have no values.
    """
    with torch.no_grad():
        given = tensors_in(network(*cloned(inputs)))
    found = [t for t in given if t.is_floating_point()]
    if not any(t.numel() for t in found):
        raise SurgeryError("the example gives no output to compare; give a batch of real inputs")
    return found


def largest_apart(old: Any, new: Any) -> tuple[float, float]:
    """The largest difference of any value, and the largest old value.

    Where only one of two values is NaN or infinite, the difference is infinite.
    """
    far, scale = 0.0, 0.0
    for a, b in zip(pytree.tree_leaves(old), pytree.tree_leaves(new), strict=True):
        if not isinstance(a, Tensor) or a.numel() == 0:
            continue
        if a.shape != b.shape:
            return float("inf"), scale
        own = a.cpu()
        far, scale = max(far, apart(own, b.cpu())), max(scale, magnitude(own))
    return far, scale


def relative(apart: float, scale: float) -> float:
    """The difference relative to the largest value."""
    return 0.0 if apart == 0 else apart / max(scale, 1e-300)


def drawn_like(example: Any, seed: int = 0) -> Any:
    """Random inputs with the mean and deviation that each channel of the example has."""
    generator = torch.Generator().manual_seed(seed)

    def draw(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.numel() == 0:
            return t
        axes = [axis for axis in range(t.dim()) if axis != 1 or t.dim() == 1]
        wide = t.cpu().double()
        mean = wide.mean(axes, keepdim=True)
        deviation = (wide - mean).square().mean(axes, keepdim=True).sqrt()
        deviation = torch.where(deviation > 0, deviation, 1.0)
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        return (noise * deviation + mean).to(t)

    return pytree.tree_map(draw, example)
