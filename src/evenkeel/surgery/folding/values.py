"""What every node of a graph gave for the example: shapes, and values that are no tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..examples import cloned, tensors_in

__all__ = ["evaluate", "is_shape_only", "real_users", "record", "shape_seen"]

_SHAPE_METHODS = {"size", "dim", "ndimension", "numel", "stride", "is_floating_point"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "layout"}


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["seen"] = pytree.tree_map(
            lambda v: v.to("meta") if isinstance(v, Tensor) else v, result
        )
        return result


def record(graph: fx.GraphModule, inputs: tuple[Any, ...]) -> Any:
    """Runs the inputs and notes at each node what it gave; returns what the network gives."""
    with torch.no_grad():
        return _Recorder(graph).run(*cloned(inputs))


def shape_seen(node: fx.Node) -> tuple[int, ...]:
    """The shape of what the node gave; () for what is no tensor."""
    seen = node.meta.get("seen")
    return tuple(seen.shape) if isinstance(seen, Tensor) else ()


def is_shape_only(node: fx.Node) -> bool:
    """True if the node asks for a shape or type, which no map changes."""
    if node.op == "call_method":
        return str(node.target) in _SHAPE_METHODS
    return (
        node.op == "call_function"
        and node.target is getattr
        and (node.args[1] in _SHAPE_ATTRIBUTES)
    )


def real_users(node: fx.Node) -> list[fx.Node]:
    """Those that use the node's values, in order."""
    return [user for user in node.users if not is_shape_only(user)]


def evaluate(node: fx.Node, source: fx.Node, value: Tensor) -> Any:
    """What the node would give if ``source`` were that value, all else as in the example.

    Raises:
        ValueError: it uses other tensors.
    """

    def given(argument: fx.Node) -> Any:
        if argument is source:
            return value
        seen = argument.meta["seen"]
        if tensors_in(seen):
            raise ValueError(f"it also depends on '{argument.name}'")
        return seen

    args, kwargs = fx.map_arg((node.args, node.kwargs), given)
    with torch.no_grad():
        if node.op == "call_module":
            root: Any = node.graph.owning_module
            return root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        target: Any = node.target
        return target(*args, **kwargs)
