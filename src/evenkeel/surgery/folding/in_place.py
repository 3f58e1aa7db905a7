"""Values that are written over in place, and what becomes of that where a map goes."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch.nn.functional as F
from torch import fx

from ..graph import add_module, module_of, name_of, overwrites
from .absorbing import is_layer
from .commuting import Stuck
from .expanding import is_map
from .operations import kind_of
from .values import real_users

__all__ = ["called", "check_writers", "is_fresh", "spare", "written_over"]

_OUT_OF_PLACE: dict[Any, Any] = {
    F.relu_: F.relu,
    F.leaky_relu_: F.leaky_relu,
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    operator.isub: operator.sub,
    operator.itruediv: operator.truediv,
}


def written_over(graph: fx.GraphModule) -> set[fx.Node]:
    """Values that are written over in place while they, or views of them, have other users."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        target = node.all_input_nodes[0] if overwrites(node) and node.all_input_nodes else None
        if target is None:
            continue
        root = target
        while _may_view(root):
            root = root.all_input_nodes[0]
        family = [root]
        for member in family:
            family += [user for user in member.users if _may_view(user) and user is not node]
        members = set(family)
        users = {u for m in family for u in real_users(m)} - members - {node}
        if users or node.target is operator.setitem or len(real_users(target)) > 1:
            found |= members
    return found


def is_fresh(node: fx.Node) -> bool:
    """True if a layer made the map's input for it alone: to write over it means what it meant."""
    (value,) = node.all_input_nodes
    return is_layer(value) and len(real_users(value)) == 1


def check_writers(node: fx.Node, shared: set[fx.Node]) -> None:
    """What is written over is the norm's own output; without the norm it is somebody else's.

    Raises:
        Stuck: it cannot be done out of place.
    """
    value = node.all_input_nodes[0]
    if value in shared:
        raise Stuck(f"'{called(value)}' is written over in place while others use it")
    for writer in () if is_fresh(node) else _writers(node):
        function = writer.op == "call_function" and not writer.kwargs.get("inplace")
        if function and writer.target not in _OUT_OF_PLACE:
            raise Stuck(f"'{name_of(writer)}' writes over its output in place")


def spare(node: fx.Node) -> None:
    """Has what writes over the map's output done out of place, for the map goes."""
    for writer in () if is_fresh(node) else _writers(node):
        _out_of_place(writer)


def called(node: fx.Node) -> str:
    """What to call a node in a reason: the norm that it was, or its own name."""
    return str(node.meta["norm"]) if is_map(node) else name_of(node)


def _writers(node: fx.Node) -> list[fx.Node]:
    """Those that write over the node's output in place, or over a view of it."""
    family = [node]
    for member in family:
        family += [user for user in member.users if _may_view(user)]
    return [
        user
        for member in family
        for user in member.users
        if overwrites(user) and user.all_input_nodes[0] is member
    ]


def _out_of_place(node: fx.Node) -> None:
    module: Any = module_of(node)
    if module is not None and getattr(module, "inplace", False):
        own = copy.copy(module)  # the same module may be called elsewhere, where it must write
        own.inplace = False
        root: Any = node.graph.owning_module
        node.target = add_module(root, node.name, own)
    elif node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    elif node.op == "call_method" and overwrites(node):
        node.target = str(node.target)[:-1]
    elif node.op == "call_function" and overwrites(node):
        node.target = _OUT_OF_PLACE[node.target]


def _may_view(node: fx.Node) -> bool:
    return kind_of(node) in ("moved", "same") and bool(node.all_input_nodes)
