"""Each norm of a graph as a map, and what it does besides as nodes of their own."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...functional import activation_of
from ...nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Norm, PerActivationBatchNorm
from ..graph import NORMS, is_norm, module_of, name_of
from .maps import Map, map_of_norm, per_channel, squeezed
from .values import shape_seen

__all__ = ["expand", "is_map", "mapped"]

_TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OURS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
_KNOWN = (*_TORCHS, *_OURS, Norm, PerActivationBatchNorm)
"""Classes that do what their name says and nothing else; a subclass may do more."""


def mapped(x: Tensor) -> Tensor:
    """Stands in a graph for a map, which is in the node's meta; never runs."""
    raise NotImplementedError


def is_map(node: fx.Node) -> bool:
    """True if the node stands for a map."""
    return node.op == "call_function" and node.target is mapped


def expand(graph: fx.GraphModule) -> dict[str, str]:
    """Turns every norm that is a fixed map in inference into a map, and says why others are not.

    A map's node has in its meta ``map``; ``center``, the same with a mean to subtract first;
    ``norm``, its name; ``like``, its mean, and ``source``, that one's path; and ``means``, the name
    of the node of the original network that has its value, if there is one.
    """
    left: dict[str, str] = {}
    for node in list(graph.graph.nodes):
        if not is_norm(node):
            continue
        try:
            _expand(node)
        except _NoMap as reason:
            left[titled(node)] = str(reason)
    return left


class _NoMap(Exception):  # noqa: N818 (an answer, not an error)
    """The norm is no fixed map."""


def titled(node: fx.Node) -> str:
    """The norm's name: its path, also where its forward was followed into; else the node's."""
    if node.op == "call_function":
        for path, kind in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
            if isinstance(kind, type) and issubclass(kind, NORMS):
                return str(path)
    return name_of(node)


def _expand(node: fx.Node) -> None:
    module: Any = module_of(node)
    shape = shape_seen(node)
    residual, activation = None, None
    if module is None:
        value, parts, like, source = _of_function(node, shape)
    else:
        reason = _not_a_map(module)
        if reason is not None:
            raise _NoMap(reason.replace("{}", str(node.target)))
        given = [*node.args, *node.kwargs.values()]
        first, residual = (*given, None)[:2]
        if not isinstance(first, fx.Node) or len(given) > 2:
            raise _NoMap("it is called in a way that is not understood")
        value = first
        parts, like = map_of_norm(module, shape), module.running_mean
        source = f"{node.target}.running_mean"
        activation = getattr(module, "activation", None)
    center, scale, shift = parts
    if not all(bool(t.isfinite().all()) for t in parts):
        raise _NoMap("its statistics or parameters give scales or shifts that are not finite")
    graph, name = node.graph, titled(node)
    with graph.inserting_before(node):
        last = graph.call_function(mapped, (value,))
        last.meta = dict(node.meta) | {
            "map": Map(squeezed(scale), squeezed(shift - center * scale)),
            "center": (center, scale, shift),
            "norm": name,
            "like": like,
            "source": source,
            "means": node.name if residual is None and activation is None else None,
        }
        if isinstance(residual, fx.Node):
            last = _then(node, operator.add, (last, residual))
        if activation is not None:
            last = _then(node, *_activation(activation, last))
    if not is_map(last):
        last.meta["means"] = node.name
    node.replace_all_uses_with(last)
    graph.erase_node(node)


def _then(node: fx.Node, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
    new = node.graph.call_function(function, args)
    new.meta = dict(node.meta) | {"means": None}
    return new


def _activation(activation: Any, value: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    act = activation_of(activation)
    if act.name == "leaky_relu":
        return F.leaky_relu, (value, act.slope)
    return {"relu": F.relu, "relu6": F.relu6, "silu": F.silu}[act.name], (value,)


def _not_a_map(norm: Any) -> str | None:
    """Why the norm is no fixed map in inference, or None."""
    if isinstance(norm, Norm):
        if not norm.spec.averages_batch or len(norm.spec.axes[0]) > 1:
            return "each sample has its own statistics"
    elif not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return "each sample has its own statistics"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if type(norm) not in _KNOWN:
        return f"'{{}}' is a {type(norm).__name__}, which may do more than its base"
    if norm._forward_hooks or norm._forward_pre_hooks:
        return "'{}' has hooks, which may change what it computes"
    return None


_ARGUMENTS = (
    "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
)  # fmt: skip


def _of_function(node: fx.Node, shape: tuple[int, ...]) -> tuple[fx.Node, Any, Tensor, str]:
    """The value and map of a ``F.batch_norm``, its mean and that one's path."""
    if node.target is not F.batch_norm:
        raise _NoMap(f"it is '{node.target.__name__}', which has no fixed map")  # type: ignore[union-attr]
    given: dict[str, Any] = {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    if given.get("training", False):
        raise _NoMap("it uses the statistics of each batch (training=True)")
    tensors = []
    for name in _ARGUMENTS[1:5]:
        tensor = given.get(name)
        if isinstance(tensor, fx.Node):
            if tensor.op != "get_attr":
                raise _NoMap(f"its {name} is computed by '{tensor.name}'")
            tensor = operator.attrgetter(str(tensor.target))(node.graph.owning_module)
        tensors.append(tensor)
    if tensors[0] is None or tensors[1] is None:
        raise _NoMap("it has no running statistics")
    parts = per_channel(tensors, given.get("eps", 1e-5), len(shape))
    return given["input"], parts, tensors[0], str(given["running_mean"].target)
