"""Reading a recorded or traced graph: what a node is, what stands before it and behind it."""

from __future__ import annotations

from collections.abc import Container, Iterator

from torch import fx, nn

from ..surgery.graph import (
    LAYERS,
    is_activation,
    is_layer,
    is_norm,
    is_pooling,
    module_of,
    rank_expected,
)
from .facts import is_norm_module

__all__ = [
    "before",
    "channels_are_second",
    "is_layer_module",
    "kind",
    "layer_bias",
    "nodes_of",
    "norm_calls",
    "path_of",
    "shown",
    "source",
    "target",
]

_SHAPE = {
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "permute", "transpose",
    "movedim", "contiguous", "squeeze", "unsqueeze", "to", "float", "double", "half", "bfloat16",
    "type", "clone", "detach", "ravel", "swapaxes", "swapdims", "expand",
}  # fmt: skip
_SHAPE_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten)
_ANSWERS = {"softmax", "log_softmax", "sigmoid", "logsigmoid"}
_ANSWER_MODULES = (nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid, nn.Softmax2d)


def is_layer_module(module: nn.Module) -> bool:
    """A convolution or dense layer of torch's, or a subclass."""
    return isinstance(module, LAYERS)


def kind(node: fx.Node) -> str:
    """What a node does.

    One of norm, layer, dropout, shape (values stay as they are), answer (softmax and sigmoid),
    activation, pooling, input, output, other.
    """
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    module, name = module_of(node), _name(node)
    if path_of(node) is not None or is_norm(node) or (module and is_norm_module(module)):
        return "norm"
    if is_layer(node):
        return "layer"
    if isinstance(module, nn.modules.dropout._DropoutNd) or "dropout" in name:
        return "dropout"
    if isinstance(module, _SHAPE_MODULES) or name in _SHAPE:
        return "shape"
    if isinstance(module, _ANSWER_MODULES) or name in _ANSWERS:
        return "answer"
    if is_activation(node):
        return "activation"
    return "pooling" if is_pooling(node) else "other"


def path_of(node: fx.Node) -> str | None:
    """The path of the norm that a node calls, as a module or by a function; None for others."""
    module = module_of(node)
    if module is not None:
        return str(node.target) if is_norm_module(module) else None
    return node.meta.get("path")


def nodes_of(graph: fx.Graph | None) -> list[fx.Node]:
    """The nodes of a graph in their order; none of none."""
    return [] if graph is None else list(graph.nodes)


def norm_calls(graph: fx.Graph | None) -> dict[str, list[fx.Node]]:
    """Every call of each norm that is a module, in their order."""
    calls: dict[str, list[fx.Node]] = {}
    for node in nodes_of(graph):
        path = path_of(node)
        if path is not None:
            calls.setdefault(path, []).append(node)
    return calls


def source(node: fx.Node, passing: Container[str] = ("shape",)) -> fx.Node | None:
    """What gives a node its first input, found backwards past nodes of the given kinds."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        if kind(node) not in passing or len(node.all_input_nodes) != 1:
            return node
    return None


def before(node: fx.Node, passing: Container[str]) -> Iterator[fx.Node]:
    """The nodes on the way back from a node, as long as they are of the given kinds.

    Only ways with one input each are followed; the first node of another kind is the last given.
    """
    while len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
        yield node
        if kind(node) not in passing:
            return


def target(node: fx.Node) -> str:
    """The path of the module that a node calls, or of the one that calls a function."""
    if node.op == "call_module" or path_of(node) is not None:
        return path_of(node) or str(node.target)
    return str(node.meta.get("place", ""))


def shown(node: fx.Node) -> str:
    """What to call a node in a sentence."""
    path = target(node) or "the network"
    if node.op == "call_module" or path_of(node) is not None:
        return path
    return f"{_name(node) or node.name} in {path}"


def layer_bias(node: fx.Node) -> object | None:
    """The bias that a layer adds, or None."""
    module = module_of(node)
    return node.meta.get("bias") if module is None else getattr(module, "bias", None)


def channels_are_second(node: fx.Node) -> bool:
    """True if a layer's bias is one number for each entry of its output's second axis."""
    shape = node.meta.get("shape")
    if shape is not None:
        return len(shape) == rank_expected(node)
    return rank_expected(node) > 2  # a dense layer may have any rank


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""
