"""The way of a map to the layers that take it in: first looked for as a whole, then gone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..graph import module_of, name_of
from .absorbing import absorb_before, absorb_behind, is_layer, why_not
from .commuting import Stuck, backward, forward
from .expanding import is_map
from .in_place import called, check_writers, is_fresh, spare, written_over
from .maps import Map
from .operations import kind_of
from .values import real_users

__all__ = ["Move", "push"]


@dataclass
class Move:
    """A norm that was folded.

    Args:
        norm: its name.
        into: the layers, or the other norms, that took it in.
        through: what its map passed on the way.
        direction: 'backward' into what is before it, or 'forward'.
        anchors: nodes behind which the network has its old values.
    """

    norm: str
    into: list[str] = field(default_factory=list)
    through: list[str] = field(default_factory=list)
    direction: str = "backward"
    anchors: list[fx.Node] = field(default_factory=list)

    def moor(self, old: fx.Node, new: list[fx.Node]) -> None:
        """Puts other nodes in the place of one that goes."""
        if old in self.anchors:
            self.anchors = [a for a in self.anchors if a is not old] + new


@dataclass
class _Way:
    """Where a map would go: the layers and maps that take it, and the nodes whose values change."""

    origin: fx.Node
    layers: list[tuple[fx.Node, Map]] = field(default_factory=list)
    maps: list[tuple[fx.Node, Map]] = field(default_factory=list)
    passed: list[fx.Node] = field(default_factory=list)

    def copy(self) -> _Way:
        return _Way(self.origin, list(self.layers), list(self.maps), list(self.passed))

    def taken(self) -> list[fx.Node]:
        return [node for node, _ in (*self.layers, *self.maps)]


def push(graph: fx.GraphModule) -> tuple[list[Move], dict[str, str]]:
    """Folds every map of the graph that can be, in place.

    Backward ways cost nothing at inference and come first. Returns what was folded, and why each
    other norm stays: a reason for each direction.
    """
    shared = written_over(graph)
    moves: list[Move] = []
    reasons: dict[fx.Node, dict[str, str]] = {}
    moved = True
    while moved:
        moved = False
        for where, find, go in _DIRECTIONS:
            for node in [n for n in graph.graph.nodes if is_map(n)]:
                try:
                    check_writers(node, shared)
                    way = find(node, shared)
                    _check_finite(graph, way)
                except Stuck as reason:
                    reasons.setdefault(node, {})[where] = str(reason)
                else:
                    go(node, way, moves)
                    shared, moved = written_over(graph), True
        if moved:
            reasons.clear()
    return moves, {node.meta["norm"]: _why(found) for node, found in reasons.items()}


# Backward


def _way_back(node: fx.Node, shared: set[fx.Node]) -> _Way:
    way = _Way(node)
    if node in shared and not is_fresh(node):
        raise Stuck("its output is written over in place while others use it")
    _pull(node.all_input_nodes[0], node.meta["map"], way, shared)
    return way


def _pull(value: fx.Node, map: Map, way: _Way, shared: set[fx.Node]) -> None:
    """Looks for a way to have the map done before the value is there."""
    if map.is_identity:
        return
    users = real_users(value)
    if len(users) > 1:
        names = sorted({called(user) for user in users if user not in (way.origin, *way.passed)})
        raise Stuck(f"the output of '{name_of(value)}' is also used by {_others(names)}")
    if value in shared:
        raise Stuck(f"'{name_of(value)}' is written over in place while others use it")
    if is_layer(value):
        reason = why_not(value, map, behind=True)
        if reason is not None:
            raise Stuck(reason)
        way.layers.append((value, map))
        return
    if is_map(value):
        way.maps.append((value, _fitting(value, map)))
        return
    way.passed.append(value)
    pairs = backward(value, map)
    if kind_of(value) == "added":
        _pull_sum(value, pairs, way, shared)
        return
    for source, own in pairs:
        parent = value.all_input_nodes[0]
        if kind_of(value) == "moved" and parent is not source:  # a piece of a value that was cut
            twins = [u for u in parent.users if u is not value and u.args == value.args]
            if twins:
                raise Stuck(f"'{name_of(twins[0])}' is the same piece of '{name_of(parent)}'")
            way.passed.append(parent)
        _pull(source, own, way, shared)


def _pull_sum(node: fx.Node, pairs: Any, way: _Way, shared: set[fx.Node]) -> None:
    """s (u + v) + t = (s u + t) + s v: either side may take the shift."""
    (first, with_shift), (second, without) = pairs
    trial = way.copy()
    try:
        _pull(first, with_shift, trial, shared)
        _pull(second, without, trial, shared)
    except Stuck:
        trial = way.copy()
        _pull(first, without, trial, shared)
        _pull(second, with_shift, trial, shared)
    way.layers, way.maps, way.passed = trial.layers, trial.maps, trial.passed


def _go_back(node: fx.Node, way: _Way, moves: list[Move]) -> None:
    value = node.all_input_nodes[0]
    move = Move(node.meta["norm"], through=[name_of(n) for n in way.passed], anchors=[value])
    for layer, map in way.layers:
        absorb_behind(layer, map)
        move.into.append(name_of(layer))
    for other, map in way.maps:
        other.meta["map"] = map.after(other.meta["map"])
        other.meta["center"] = None
        move.into.append(other.meta["norm"])
    for changed in (*way.passed, *way.taken()):
        changed.meta["means"] = None
    value.meta["means"] = node.meta["means"]
    _remove(node, value, [value], moves)
    moves.append(move)


# Forward


def _way_forward(node: fx.Node, shared: set[fx.Node]) -> _Way:
    way = _Way(node)
    _hand_on(node, node.meta["map"], way, shared)
    return way


def _hand_on(value: fx.Node, map: Map, way: _Way, shared: set[fx.Node]) -> None:
    """Looks for a way to have the map done by everything that uses the value."""
    if value in shared:
        raise Stuck(f"'{called(value)}' is written over in place while others use it")
    for user in real_users(value):
        if is_layer(user):
            reason = why_not(user, map, behind=False)
            if reason is not None:
                raise Stuck(reason)
            if user in way.taken():
                raise Stuck(f"'{name_of(user)}' gets it in two ways")
            way.layers.append((user, map))
        elif is_map(user):
            way.maps.append((user, _fitting(user, map)))
        else:
            if user in way.passed:
                raise Stuck(f"'{name_of(user)}' gets it in two ways")
            way.passed.append(user)
            for reached, own in forward(user, value, map):
                if reached is not user:
                    way.passed.append(reached)
                _hand_on(reached, own, way, shared)


def _go_forward(node: fx.Node, way: _Way, moves: list[Move]) -> None:
    value = node.all_input_nodes[0]
    move = Move(node.meta["norm"], direction="forward", anchors=way.taken())
    move.through = [name_of(n) for n in way.passed]
    for layer, map in way.layers:
        absorb_before(layer, map)
        move.into.append(name_of(layer))
    for other, map in way.maps:
        other.meta["map"] = other.meta["map"].after(map)
        other.meta["center"] = None
        move.into.append(other.meta["norm"])
    for changed in way.passed:
        changed.meta["means"] = None
    _remove(node, value, way.taken(), moves)
    moves.append(move)


# Both


def _fitting(node: fx.Node, map: Map) -> Map:
    """The map, if a norm that may have to stay can take it in: it must not fix the image's size."""
    odd = map.axes() - node.meta["map"].axes() - {1}
    if odd:
        raise Stuck(f"it varies along axis {min(odd)}, along which '{node.meta['norm']}' does not")
    return map


_DIRECTIONS = (
    ("before it", _way_back, _go_back),
    ("behind it", _way_forward, _go_forward),
)


def _why(found: dict[str, str]) -> str:
    return "; ".join(f"{where}: {reason}" for where, reason in found.items())


def _check_finite(graph: fx.GraphModule, way: _Way) -> None:
    """A weight that its type cannot hold is no weight: float16 ends at 65504."""
    for node, map in way.layers:
        layer: Any = module_of(node)
        limit = graph.meta["limits"].get(str(node.target), torch.finfo(layer.weight.dtype).max)
        weight = float(layer.weight.detach().abs().max()) if layer.weight.numel() else 0.0
        scale, shift = (float(t.abs().max()) if t.numel() else 0.0 for t in (map.scale, map.shift))
        if not weight * scale < limit or not shift < limit:
            raise Stuck(f"the weights of '{node.target}' would be too large for their type")


def _remove(node: fx.Node, value: fx.Node, anchors: list[fx.Node], moves: list[Move]) -> None:
    """Takes the map's node out; its users get the value before it."""
    for move in moves:
        move.moor(node, anchors)
    spare(node)
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def _others(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
