"""The one module's forward that norms have changed, as text or as a GraphModule's graph."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from ..graph import module_of
from .blocks import Blocks
from .matching import Match
from .remade import Remade, recipe, remake

__all__ = ["WAS", "graph_as_before", "rewriting"]

WAS = "_was_before_acceleration"
"""The attribute that holds the class that a norm had. Made classes know it themselves."""


def rewriting(
    blocks: Blocks, path: str, matches: list[Match], passing: list[nn.Module]
) -> Callable[[Any], None]:
    """The edit that gives a module the forward in which norms have taken over."""
    graph = blocks.graphs[path]
    for match in matches:
        call, add, act = match.call, match.add, match.act
        if add is not None:
            residual = next(arg for arg in add.args if arg is not call)
            with graph.inserting_before(add):
                both = graph.create_node("call_module", call.target, (call.args[0], residual))
            add.replace_all_uses_with(both)
            graph.erase_node(add)
            graph.erase_node(call)
        if blocks.called(path, act) not in passing:
            act.replace_all_uses_with(act.all_input_nodes[0])
            graph.erase_node(act)
    graph.lint()
    block = blocks.model.get_submodule(path)
    if isinstance(block, fx.GraphModule):
        return partial(_regraph, graph=graph)
    code = graph.python_code("self")
    return partial(remake, recipe=recipe(type(block), code.src, code.globals))


def _regraph(block: fx.GraphModule, graph: fx.Graph) -> None:
    # A GraphModule writes its forward anew from its graph when it is copied, so the graph changes.
    block.graph = copy.deepcopy(graph)


def graph_as_before(block: fx.GraphModule) -> None:
    """Writes what norms have taken over into the graph again.

    A GraphModule that is copied or pickled forgets all that it does not call, so there is no place
    to keep the graph that it had.
    """
    for node in list(block.graph.nodes):
        norm: Any = module_of(node)
        activation = getattr(norm, "activation", None)
        if norm is None or WAS not in vars(norm) or activation is None:
            continue
        users = list(node.users)
        handed_on = any(isinstance(module_of(user), Remade) for user in users)
        value = node
        if len(node.args) > 1:
            node.args, residual = node.args[:1], node.args[1]
            with block.graph.inserting_after(value):
                value = block.graph.call_function(operator.add, (node, residual))
        if not handed_on:
            name, *slope = activation if isinstance(activation, tuple) else (activation,)
            with block.graph.inserting_after(value):
                value = block.graph.call_function(getattr(F, name), (value, *slope))
        for user in users:
            user.replace_input_with(node, value)
    block.recompile()
