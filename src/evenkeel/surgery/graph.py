"""A network as a graph: what its layers, activations, poolings and norms are, and their shapes."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ..errors import SurgeryError
from ..nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Norm

__all__ = ["is_activation", "is_addition", "is_layer", "is_norm", "is_pooling", "shape_of", "trace"]

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, Norm)
OWN_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d, Norm)

_ACTIVATIONS: dict[str, tuple[type[nn.Module], ...]] = {
    "module": (
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU,
        nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
        nn.Softplus, nn.Softsign, nn.LogSigmoid,
    ),
}  # fmt: skip
_ACTIVATION_NAMES = {
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "elu", "elu_", "selu", "selu_",
    "celu", "gelu", "silu", "mish", "sigmoid", "sigmoid_", "tanh", "tanh_", "hardswish",
    "hardsigmoid", "hardtanh", "softplus", "softsign", "logsigmoid", "rrelu",
}  # fmt: skip
_POOLINGS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


class _Tracer(fx.Tracer):
    """fx's tracer with our norms as leaves, like torch's own modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, OWN_NORMS) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """A traced deep copy of the model, every node with its output's shape for the example.

    Raises:
        SurgeryError: torch.fx cannot trace the model, or the model cannot run the example.
    """
    own = copy.deepcopy(model)
    try:
        graph = _Tracer().trace(own)
    except Exception as error:
        raise SurgeryError(
            f"{type(model).__name__} cannot be traced by torch.fx ({_first_line(error)}); rewrite "
            "the control flow that depends on tensor values, or move it into a module of torch.nn"
        ) from error
    traced = fx.GraphModule(own, graph, type(model).__name__)
    modes = {name: module.training for name, module in traced.named_modules()}
    traced.eval()
    try:
        with torch.no_grad():
            ShapeProp(traced).propagate(example)
    except Exception as error:
        raise SurgeryError(
            f"{type(model).__name__} cannot run an input of shape {tuple(example.shape)}: "
            f"{_first_line(error)}"
        ) from error
    for name, module in traced.named_modules():
        module.training = modes[name]
    return traced


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's output."""
    meta = node.meta.get("tensor_meta")
    if meta is None or not hasattr(meta, "shape"):
        raise SurgeryError(f"'{node.name}' gives no single tensor, so no norm can follow it")
    return tuple(meta.shape)


def module_of(node: fx.Node) -> nn.Module | None:
    """The module that the node calls, or None."""
    if node.op != "call_module":
        return None
    owner = node.graph.owning_module
    return None if owner is None else owner.get_submodule(str(node.target))


def is_layer(node: fx.Node) -> bool:
    """A convolution, transposed or not, or a dense layer."""
    return isinstance(module_of(node), LAYERS)


def is_norm(node: fx.Node) -> bool:
    """Any normalization, ours or torch's."""
    return isinstance(module_of(node), NORMS)


def is_activation(node: fx.Node) -> bool:
    """A non-linearity: a module, a function or a method."""
    return isinstance(module_of(node), _ACTIVATIONS["module"]) or _called(node) in _ACTIVATION_NAMES


def is_pooling(node: fx.Node) -> bool:
    """A pooling: a module or a function."""
    name = _called(node)
    return isinstance(module_of(node), _POOLINGS) or ("pool" in name and "_pool" in name)


def is_addition(node: fx.Node) -> bool:
    """The sum of two tensors."""
    functions: tuple[Callable[..., Any], ...] = (operator.add, operator.iadd, torch.add)
    tensors = [argument for argument in node.args if isinstance(argument, fx.Node)]
    return len(tensors) == 2 and (node.target in functions or _called(node) in ("add", "add_"))


def _called(node: fx.Node) -> str:
    """The bare name of the function or method that the node calls."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", ""))
    return ""


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
