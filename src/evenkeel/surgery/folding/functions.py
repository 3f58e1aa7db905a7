"""Layers that are written as functions, as modules: those have weights to write to."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..graph import add_module

__all__ = ["layers_of_functions"]

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = (
    "input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation",
)  # fmt: skip
_KINDS: dict[Any, tuple[Any, tuple[str, ...]]] = {
    F.linear: (nn.Linear, ("input", "weight", "bias")),
    F.conv1d: (nn.Conv1d, _CONV),
    F.conv2d: (nn.Conv2d, _CONV),
    F.conv3d: (nn.Conv3d, _CONV),
    torch.conv1d: (nn.Conv1d, _CONV),
    torch.conv2d: (nn.Conv2d, _CONV),
    torch.conv3d: (nn.Conv3d, _CONV),
    F.conv_transpose1d: (nn.ConvTranspose1d, _TRANSPOSED),
    F.conv_transpose2d: (nn.ConvTranspose2d, _TRANSPOSED),
    F.conv_transpose3d: (nn.ConvTranspose3d, _TRANSPOSED),
}


def layers_of_functions(graph: fx.GraphModule, dtypes: dict[str, torch.dtype]) -> None:
    """Makes a module of each linear function whose weights belong to it alone, in place.

    Args:
        graph: of inference.
        dtypes: the type of each parameter; gets those of the new modules.
    """
    reads = Counter(str(n.target) for n in graph.graph.nodes if n.op == "get_attr")
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in _KINDS:
            continue
        kind, names = _KINDS[node.target]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        value, tensors = given.pop("input", None), [given.pop(n, None) for n in ("weight", "bias")]
        if not isinstance(value, fx.Node) or any(isinstance(v, fx.Node) for v in given.values()):
            continue
        if not all(_is_own(graph, t, reads) for t in tensors) or tensors[0] is None:
            continue
        weight, bias = (None if t is None else _read(graph, t) for t in tensors)
        layer = _built(kind, weight, bias, given)
        with graph.graph.inserting_before(node):
            name = add_module(graph, node.name, layer)
            new = graph.graph.call_module(name, (value,))
        new.meta = dict(node.meta)
        for key, source in zip(("weight", "bias"), tensors, strict=True):
            if source is not None and str(source.target) in dtypes:
                dtypes[f"{name}.{key}"] = dtypes[str(source.target)]
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def _is_own(graph: fx.GraphModule, source: Any, reads: Counter[str]) -> bool:
    """True if it is nothing, or a tensor of the network that is read here alone."""
    if source is None:
        return True
    if not isinstance(source, fx.Node) or source.op != "get_attr" or len(source.users) > 1:
        return False
    owner = graph.get_submodule(str(source.target).rpartition(".")[0])
    calls = any(
        n.op == "call_module" and graph.get_submodule(str(n.target)) is owner
        for n in graph.graph.nodes
    )
    return reads[str(source.target)] == 1 and not calls and isinstance(_read(graph, source), Tensor)


def _read(graph: fx.GraphModule, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(graph)


def _built(kind: Any, weight: Any, bias: Any, options: dict[str, Any]) -> nn.Module:
    sizes = weight.shape
    if kind is nn.Linear:
        layer: Any = nn.Linear(sizes[1], sizes[0], bias is not None, device="meta")
    else:
        groups = options.get("groups", 1)
        outer, inner = (
            (sizes[1] * groups, sizes[0])
            if kind in _BACKWARDS
            else (
                sizes[0],
                sizes[1] * groups,
            )
        )
        layer = kind(
            inner, outer, tuple(sizes[2:]), bias=bias is not None, device="meta", **options
        )
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    own: nn.Module = layer.eval()
    return own


_BACKWARDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
