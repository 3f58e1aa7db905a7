"""How a map passes the operations that are no layers: which, under what condition, and as what.

Every rule is an equation between the operation ``f`` and maps ``m`` of its input and ``m'`` of its
output: ``f(m(x)) = m'(f(x))``. Forward looks for m' given m, backward for m given m'.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...errors import first_line
from ..graph import module_of, name_of
from .maps import Map, squeezed
from .operations import SIZED, kind_of
from .values import evaluate, shape_seen

__all__ = ["Stuck", "backward", "forward"]


class Stuck(Exception):  # noqa: N818 (an answer, not an error)
    """A map cannot pass; says why."""


def source_of(node: fx.Node) -> fx.Node:
    """The value that a node with one input works on."""
    value = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(value, fx.Node):
        raise Stuck(f"'{name_of(node)}' is called in a way that is not understood")
    return value


def forward(node: fx.Node, source: fx.Node, map: Map) -> list[tuple[fx.Node, Map]]:
    """The maps on the node's output that stand for a map on one of its inputs.

    An operation with several outputs has one for each that is used.

    Raises:
        Stuck: there is none.
    """
    kind = kind_of(node)
    if kind == "joined":
        return [(node, _join(node, source, map))]
    if kind == "added":
        _terms(node)
        if bool((map.scale != 1).any()):
            raise Stuck(f"'{name_of(node)}' adds something to it, which must not be scaled")
        return [(node, map)]
    if kind is None or source_of(node) is not source:
        raise Stuck(_odd(node))
    if kind == "moved":
        return _move(node, source, map)
    return [(node, _FORWARD[kind](node, source, map))]


def backward(node: fx.Node, map: Map) -> list[tuple[fx.Node, Map]]:
    """The maps on the node's inputs that stand for a map on its output.

    Raises:
        Stuck: there are none.
    """
    kind = kind_of(node)
    if kind == "joined":
        return _cut(node, map)
    if kind == "added":
        first, second = _terms(node)
        return [(first, map), (second, Map(map.scale, torch.zeros_like(map.shift)))]
    if kind is None:
        raise Stuck(_odd(node))
    if kind == "moved":
        return [_move_back(node, map)]
    source = source_of(node)
    return [(source, _BACKWARD[kind](node, source, map))]


def _odd(node: fx.Node) -> str:
    if node.op == "output":
        return "it is an output of the network"
    if node.op == "placeholder":
        return f"'{node.name}' is an input of the network"
    module = module_of(node)
    what = "a function" if module is None else type(module).__name__
    return f"nothing is known of how a scale and shift pass '{name_of(node)}' ({what})"


# One input, one output


def _same(node: fx.Node, source: fx.Node, map: Map) -> Map:
    return map


def _homogeneous(node: fx.Node, source: fx.Node, map: Map) -> Map:
    """relu(s x) = s relu(x) for s >= 0."""
    if map.shifts:
        raise Stuck(f"it has a shift, which does not pass '{name_of(node)}'")
    return _rising(node, map)


def _rising(node: fx.Node, map: Map) -> Map:
    below = int((map.scale < 0).sum())
    if below:
        raise Stuck(
            f"{below} of its {map.scale.numel()} scales are negative, and those do not pass "
            f"'{name_of(node)}'"
        )
    return map


def _maximum(node: fx.Node, source: fx.Node, map: Map) -> Map:
    """max(s x + t) = s max(x) + t for s >= 0."""
    _check_rank(node, source)
    if len(shape_seen(node)) != len(shape_seen(source)):
        raise Stuck(f"'{name_of(node)}' gives more than the largest values")
    _even(node, map, range(2, len(shape_seen(source))))
    return _rising(node, map)


def _average(node: fx.Node, source: fx.Node, map: Map) -> Map:
    """Sums with weights: they commute with a scale, and with a shift if the weights sum to 1."""
    _check_rank(node, source)
    shape = shape_seen(source)
    _even(node, map, range(2, len(shape)))
    ones = torch.ones(1, 1, *shape[2:], dtype=torch.float64)
    found, zero = (_tried(node, source, t) for t in (ones, torch.zeros_like(ones)))
    if tuple(found.shape[:2]) != (1, 1) or bool((zero != 0).any()):
        raise Stuck(f"'{name_of(node)}' puts in values of its own")
    if map.shifts and float((found - 1).abs().max()) > 1e-12:
        raise Stuck(f"it has a shift, and '{name_of(node)}' pads with zeros, which have none")
    by_size = len(node.all_input_nodes) > 1 and node.target not in SIZED
    if map.shifts and (by_size or _has_own_divisor(node)):
        raise Stuck(f"it has a shift, and '{name_of(node)}' may not sum to 1 for another size")
    return map


def _has_own_divisor(node: fx.Node) -> bool:
    module = module_of(node)
    if module is not None:
        return getattr(module, "divisor_override", None) is not None
    pools = node.target in (F.avg_pool2d, F.avg_pool3d)
    return pools and (len(node.args) > 6 or node.kwargs.get("divisor_override") is not None)


def _check_rank(node: fx.Node, source: fx.Node) -> None:
    """Without a batch axis, torch's poolings take the first axis for the channels."""
    module = module_of(node)
    kind = type(module).__name__ if module is not None else getattr(node.target, "__name__", "")
    places = [int(letter) for letter in kind if letter.isdigit()]
    if places and len(shape_seen(source)) != 2 + places[0]:
        raise Stuck(f"'{name_of(node)}' takes the second axis for a place and not for channels")


def _even(node: fx.Node, map: Map, axes: Any) -> None:
    odd = sorted(map.axes() & set(axes))
    if odd:
        raise Stuck(f"it varies along axis {odd[0]}, where '{name_of(node)}' mixes values")


def _reduced(node: fx.Node, source: fx.Node) -> tuple[list[int], bool]:
    """The axes that a mean or maximum takes together, and whether they stay with size 1."""
    rank = len(shape_seen(source))
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dims = [dim] if isinstance(dim, int) else dim
    if not isinstance(dims, tuple | list) or not dims or not all(isinstance(d, int) for d in dims):
        raise Stuck(f"'{name_of(node)}' takes the batch axis in")
    axes = sorted(d % rank for d in dims if isinstance(d, int))
    if axes[0] == 0:
        raise Stuck(f"'{name_of(node)}' takes the batch axis in")
    return axes, len(shape_seen(node)) == rank


def _mean(node: fx.Node, source: fx.Node, map: Map) -> Map:
    axes, stay = _reduced(node, source)
    _even(node, map, axes)
    return map if stay else _each(map, lambda t: t.squeeze(axes))


def _mean_back(node: fx.Node, source: fx.Node, map: Map) -> Map:
    axes, stay = _reduced(node, source)

    def spread(t: Tensor) -> Tensor:
        for axis in axes:
            t = t.unsqueeze(axis)
        return t

    return map if stay else _each(map, spread)


def _amax(node: fx.Node, source: fx.Node, map: Map) -> Map:
    return _mean(node, source, _rising(node, map))


def _amax_back(node: fx.Node, source: fx.Node, map: Map) -> Map:
    return _mean_back(node, source, _rising(node, map))


Rule = Callable[[fx.Node, fx.Node, Map], Map]
_FORWARD: dict[str, Rule] = {
    "same": _same, "homogeneous": _homogeneous, "maximum": _maximum, "average": _average,
    "mean": _mean, "amax": _amax,
}  # fmt: skip
_BACKWARD: dict[str, Rule] = {**_FORWARD, "mean": _mean_back, "amax": _amax_back}


# Operations that move values


def _move(node: fx.Node, source: fx.Node, map: Map) -> list[tuple[fx.Node, Map]]:
    """What is moved with the values is the map: the operation itself says where to."""
    shape = shape_seen(source)
    wide = (t.expand(shape).contiguous() for t in (map.scale, map.shift))
    moved = [_tried(node, source, t) for t in wide]
    if isinstance(moved[0], Tensor):
        return [(node, _of_sample(node, shape, *moved))]
    found = []
    for user in node.users:
        at = user.args[1] if user.target is operator.getitem else None
        if not isinstance(at, int):
            raise Stuck(f"'{name_of(user)}' takes several outputs of '{name_of(node)}' together")
        found.append((user, _of_sample(user, shape, *(part[at] for part in moved))))
    return found


def _tried(node: fx.Node, source: fx.Node, value: Tensor) -> Any:
    try:
        return evaluate(node, source, value)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        raise Stuck(f"'{name_of(node)}' cannot be followed: {first_line(error)}") from error


def _of_sample(node: fx.Node, shape: tuple[int, ...], scale: Tensor, shift: Tensor) -> Map:
    """The map of one sample, if all samples have the same."""
    found = Map(squeezed(scale), squeezed(shift))
    if scale.dim() == 0 or scale.shape[0] != shape[0] or 0 in found.axes():
        raise Stuck(f"'{name_of(node)}' mixes the batch axis with others")
    return found


def _move_back(node: fx.Node, map: Map) -> tuple[fx.Node, Map]:
    """The values are numbered, the numbers moved, and the map written where they came from."""
    outer, at = node, 0
    source = source_of(node)
    if node.target is operator.getitem and not isinstance(source.meta["seen"], Tensor):
        outer, place = source, node.args[1]
        if not isinstance(place, int) or kind_of(outer) != "moved":
            raise Stuck(_odd(outer))
        source, at = source_of(outer), place
    shape = shape_seen(source)
    numbers = torch.arange(_count(shape), dtype=torch.float64).reshape(shape)
    moved = _tried(outer, source, numbers)
    pieces = [moved] if isinstance(moved, Tensor) else list(moved)
    own = pieces.pop(at).long()
    parts = []
    for t, start in ((map.scale, 1.0), (map.shift, 0.0)):
        values = torch.full((_count(shape),), start, dtype=torch.float64)
        spread = t.expand(shape_seen(node))
        values[own.flatten()] = spread.flatten()
        others = [values[piece.long()] == start for piece in pieces]
        if not torch.equal(values[own], spread) or not all(bool(o.all()) for o in others):
            raise Stuck(f"'{name_of(outer)}' gives some values more than once")
        parts.append(values.reshape(shape))
    if shape_seen(node)[:1] != shape[:1]:
        raise Stuck(f"'{name_of(outer)}' mixes the batch axis with others")
    return source, _of_sample(outer, shape, *parts)


# Several inputs


def _terms(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    first, second = (*node.args, *(node.kwargs.get(n) for n in ("input", "other")), None, None)[:2]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        raise Stuck(f"'{name_of(node)}' adds a number")
    if first is second or "alpha" in node.kwargs or len(node.args) > 2:
        raise Stuck(f"'{name_of(node)}' is no plain sum of two values")
    if not shape_seen(first) == shape_seen(second) == shape_seen(node):
        raise Stuck(f"'{name_of(node)}' broadcasts")
    return first, second


def _parts(node: fx.Node) -> tuple[list[fx.Node], int]:
    """The values that are joined, and the axis."""
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(parts, tuple | list) or not all(isinstance(p, fx.Node) for p in parts):
        raise Stuck(f"'{name_of(node)}' is called in a way that is not understood")
    rank = len(shape_seen(node))
    if not isinstance(dim, int) or dim % rank == 0:
        raise Stuck(f"'{name_of(node)}' joins along the batch axis")
    return list(parts), dim % rank


def _join(node: fx.Node, source: fx.Node, map: Map) -> Map:
    parts, axis = _parts(node)
    scales, shifts = [], []
    for part in parts:
        shape = (1, *shape_seen(part)[1:])
        own = part is source
        scales.append(map.scale.expand(shape) if own else torch.ones(shape, dtype=torch.float64))
        shifts.append(map.shift.expand(shape) if own else torch.zeros(shape, dtype=torch.float64))
    return Map(squeezed(torch.cat(scales, axis)), squeezed(torch.cat(shifts, axis)))


def _cut(node: fx.Node, map: Map) -> list[tuple[fx.Node, Map]]:
    parts, axis = _parts(node)
    if len(set(parts)) < len(parts):
        raise Stuck(f"'{name_of(node)}' joins a value with itself")
    sizes = [shape_seen(part)[axis] for part in parts]
    shape = (1, *shape_seen(node)[1:])
    scales, shifts = (torch.split(t.expand(shape), sizes, axis) for t in (map.scale, map.shift))
    pairs = zip(scales, shifts, strict=True)
    maps = [Map(squeezed(scale), squeezed(shift)) for scale, shift in pairs]
    return [(p, m) for p, m in zip(parts, maps, strict=True) if not m.is_identity]


def _each(map: Map, change: Callable[[Tensor], Tensor]) -> Map:
    return Map(change(map.scale), change(map.shift))


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
