"""What stays of norms that nothing takes in: one operation each, with what comes behind it."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from ...nn.folded import ScaleShift
from ..fused import Activation, activation_called
from ..graph import add_module, module_of
from .expanding import is_map
from .in_place import written_over
from .maps import Map
from .pushing import Move
from .values import real_users, shape_seen

__all__ = ["activation_behind", "added_to", "settle"]


def settle(graph: fx.GraphModule, moves: list[Move], dtypes: dict[str, torch.dtype]) -> None:
    """Makes a `ScaleShift` of every map that is left, the sum and activation behind it included.

    Args:
        graph: changed in place.
        moves: what was folded; anchors that go are changed for what takes their place.
        dtypes: the network's own type of each tensor; gets those of the new modules, for which
            half precision is not enough.
    """
    taken = set[str]()
    for node in [n for n in graph.graph.nodes if is_map(n)]:
        chain, residual, activation = _chain(node, written_over(graph))
        module = _module(node, activation)
        name = _place(graph, node, module, taken)
        own = dtypes.get(node.meta["source"], torch.float32)
        for key, _ in module.named_buffers():
            dtypes[f"{name}.{key}"] = torch.promote_types(own, torch.float32)
        arguments = (node.all_input_nodes[0],) if residual is None else (node.args[0], residual)
        with graph.graph.inserting_before(chain[-1]):
            new = graph.graph.call_module(name, arguments)
        new.meta = {key: chain[-1].meta.get(key) for key in ("seen", "means", "tensor_meta")}
        chain[-1].replace_all_uses_with(new)
        for old in reversed(chain):
            graph.graph.erase_node(old)
            for move in moves:
                move.moor(old, [new])


def _chain(
    node: fx.Node, shared: set[fx.Node]
) -> tuple[list[fx.Node], fx.Node | None, Activation | None]:
    """The map's node and those behind it that one operation does, what is added, the activation."""
    chain = [node]
    if node.all_input_nodes[0] in shared:  # it would be computed later than it was
        return chain, None, None
    residual = added_to(node)
    if residual in shared:
        residual = None
    if residual is not None:
        chain += real_users(node)
    activation = activation_behind(chain[-1])
    if activation is not None:
        chain += real_users(chain[-1])
    return chain, residual, activation


def _module(node: fx.Node, activation: Activation | None) -> ScaleShift:
    like: Tensor = node.meta["like"]
    dtype = torch.promote_types(like.dtype, torch.float32)
    scale, shift, center = (t.to(like.device, dtype) for t in _parts(node))
    return ScaleShift(scale, shift, center, activation)


def _place(graph: fx.GraphModule, node: fx.Node, module: ScaleShift, taken: set[str]) -> str:
    """Puts the module where the norm was, if it is not taken; returns its name."""
    name = str(node.meta["norm"])
    read = {str(n.target).rpartition(".")[0] for n in graph.graph.nodes if n.op == "get_attr"}
    if name in dict(graph.named_modules()) and name not in taken | read:
        graph.set_submodule(name, module)
    else:  # a function, or a norm that is used more than once
        name = add_module(graph, name.replace(".", "_"), module)
    taken.add(name)
    return name


def _parts(node: fx.Node) -> tuple[Tensor, ...]:
    """Scale, shift and center, as vectors if they are one for each channel of the second axis."""
    shape = shape_seen(node)
    map: Map = node.meta["map"]
    if node.meta["center"] is not None:
        center, scale, shift = node.meta["center"]
    else:
        scale, shift, center = map.scale, map.shift, torch.zeros_like(map.shift)
    parts = (scale, shift, center)
    axes = {a for t in parts for a, size in enumerate(t.shape) if size > 1}
    if len(shape) > 1 and axes <= {1}:
        return tuple(t.expand(1, shape[1], *[1] * (len(shape) - 2)).reshape(-1) for t in parts)
    whole = [max(t.shape[axis] for t in parts) for axis in range(1, len(shape))]
    return tuple(t.expand(1, *whole)[0].contiguous() for t in parts)


def added_to(node: fx.Node) -> fx.Node | None:
    """What is added to the value and nothing else, if that is a plain sum."""
    users = real_users(node)
    if len(users) != 1 or len(node.users) != 1:
        return None
    (user,) = users
    plain = user.op == "call_function" and user.target in (operator.add, operator.iadd, torch.add)
    if not plain or len(user.args) != 2 or user.kwargs:
        return None
    others = [argument for argument in user.args if argument is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    same = shape_seen(others[0]) == shape_seen(node) == shape_seen(user)
    return others[0] if same else None


def activation_behind(node: fx.Node) -> Activation | None:
    """The activation that is the one user of the value, if the fused operation has it."""
    users = real_users(node)
    if len(users) != 1 or len(node.users) != 1:
        return None
    (user,) = users
    module = module_of(user)
    if module is not None and (module._forward_hooks or module._forward_pre_hooks):
        return None
    return activation_called(user, module)
