"""Convolutions of a folded network with their weights in the kernel's order, activations taken in.

A packed convolution gives channels last. Values that are asked for their memory, as ``view`` does,
and the network's outputs are made contiguous again.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...nn.folded import ScaleShift
from ...nn.packed import KINDS, Packed, pack_module, unpacked
from ...nn.planned import PlannedGraph, as_kind
from ..fused import Activation
from ..graph import NORMS, add_module, module_of
from .in_place import written_over
from .leaving import activation_behind, added_to

__all__ = ["pack", "unpack"]

_KEPT = ("seen", "means", "tensor_meta")
_MARK = "restores layout"

_OF_MEMORY = {
    "view", "view_as", "as_strided", "as_strided_", "stride", "is_contiguous", "data_ptr",
    "storage", "untyped_storage", "storage_offset", "set_", "resize_", "resize_as_", "numpy",
    "tolist", "dim_order",
}  # fmt: skip
"""Methods and functions whose answer, or whether there is one, depends on the order in memory."""


def pack(graph: fx.GraphModule) -> None:
    """Packs every convolution of a folded graph, in place; see `evenkeel.nn.packed`.

    Only those of `evenkeel.nn.packed.KINDS` themselves, called once and without hooks. The
    activation that is the only user of an output is taken in, and its node goes. Convolutions keep
    their names and state. The graph becomes an `evenkeel.nn.planned.PlannedGraph`.
    """
    calls = Counter(id(module_of(node)) for node in graph.graph.nodes)
    plain = [node for node in graph.graph.nodes if _is_plain(node, calls)]
    loose = _loose(graph, set(plain))
    asked = [
        (node, use)
        for use in graph.graph.nodes
        for node in use.all_input_nodes
        if node in loose and _asks_memory(use, node)
    ]
    shared = written_over(graph)
    if any(node in shared for node, _ in asked):
        return  # a copy would not be written over
    for node, use in asked:
        _restore(graph, node, use)
    for node in plain:
        conv: Any = module_of(node)
        pack_module(conv, _absorbed(node, shared))
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    if plain:
        as_kind(graph, PlannedGraph)


def unpack(graph: fx.GraphModule) -> None:
    """Undoes `pack`, in place: ordinary convolutions, with their activations behind them."""
    for node in list(graph.graph.nodes):
        if node.meta.get(_MARK):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
            continue
        module = module_of(node)
        if not isinstance(module, Packed):
            continue
        conv, activation = unpacked(module)
        graph.set_submodule(str(node.target), conv)
        if len(node.args) > 1:
            value, residual = node.args
            node.args = (value,)
            node = _follow(node, "call_function", operator.add, (residual,))
        if activation is not None:
            name = add_module(graph, f"{node.name}_activation", activation)
            _follow(node, "call_module", name)
    graph.graph.lint()
    as_kind(graph, fx.GraphModule)


def _follow(node: fx.Node, op: str, target: Any, others: tuple[Any, ...] = ()) -> fx.Node:
    """Puts an operation between a value and its users."""
    with node.graph.inserting_after(node):
        new = node.graph.create_node(op, target)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    new.args = (node, *others)
    return new


def _is_plain(node: fx.Node, calls: Counter[int]) -> bool:
    conv: Any = module_of(node)
    if type(conv) not in KINDS or len(node.args) + len(node.kwargs) != 1:
        return False
    hooks = (
        conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks
    )  # fmt: skip
    return calls[id(conv)] == 1 and not any(hooks) and "forward" not in vars(conv)


def _loose(graph: fx.GraphModule, packed: set[fx.Node]) -> set[fx.Node]:
    """Values that may come channels last where the network made them contiguous."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node in packed or (
            any(n in found for n in node.all_input_nodes)
            and not isinstance(module_of(node), nn.Linear)
            and node.target not in ("contiguous", "output")
        ):
            found.add(node)
    return found


def _asks_memory(use: fx.Node, value: fx.Node) -> bool:
    if use.op == "output":
        return True
    module = module_of(use)
    if module is not None:
        own = isinstance(module, (ScaleShift, *NORMS))
        return not own and type(module).__module__.partition(".")[0] not in ("torch", "evenkeel")
    name = str(use.target if use.op == "call_method" else getattr(use.target, "__name__", ""))
    if name in ("view", "view_as"):
        return not _splits(use, value)
    if name in _OF_MEMORY:
        return True
    if use.op == "call_method":
        return False
    if use.target is getattr:
        return use.args[1] not in ("shape", "ndim", "dtype", "device", "requires_grad", "layout")
    return not _is_torchs(use.target)


def _is_torchs(function: Any) -> bool:
    owner = getattr(function, "__module__", None) or ""
    return owner.partition(".")[0] in ("torch", "_operator", "operator", "builtins", "math") or any(
        getattr(place, getattr(function, "__name__", ""), None) is function
        for place in (torch, F, operator)
    )


def _splits(use: fx.Node, value: fx.Node) -> bool:
    """True if a view only splits axes before the last two: that goes in any order in memory."""
    before, after = value.meta.get("seen"), use.meta.get("seen")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    sizes = iter(after.shape)
    for size in before.shape:  # each axis is some axes of the view, one after another
        product = 1
        for part in sizes:
            product *= part
            if product >= size:
                break
        if product != size:
            return False
    return after.dim() > before.dim() and before.shape[-2:] == after.shape[-2:]


def _restore(graph: fx.GraphModule, node: fx.Node, use: fx.Node) -> None:
    """Makes the value contiguous for one user."""
    if not isinstance(node.meta.get("seen"), Tensor):
        return
    with graph.graph.inserting_before(use):
        new = graph.graph.call_method("contiguous", (node,))
    new.meta = {key: node.meta.get(key) for key in _KEPT} | {_MARK: True}
    use.replace_input_with(node, new)


def _absorbed(node: fx.Node, shared: set[fx.Node]) -> Activation | None:
    """The sum and the activation behind a convolution go, for it does them; the activation."""
    residual = None if node.all_input_nodes[0] in shared else added_to(node)
    if residual is not None and residual not in shared:
        (total,) = node.users
        total.prepend(node)  # where both are there
        node.args, node.kwargs = (*node.all_input_nodes, residual), {}
        _take_place(node, total)
    activation = activation_behind(node)
    if activation is not None:
        _take_place(node, next(iter(node.users)))
    return activation


def _take_place(node: fx.Node, other: fx.Node) -> None:
    """Takes the place of its one user, which goes."""
    for key in _KEPT:
        if key in other.meta:
            node.meta[key] = other.meta[key]
    other.replace_all_uses_with(node)
    other.graph.erase_node(other)
