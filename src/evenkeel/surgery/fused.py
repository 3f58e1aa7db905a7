"""The activations that a norm's operation can do: as modules, functions and methods of torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = ["MODULES", "Activation", "activation_called", "activation_of"]

Activation = str | tuple[str, float]

MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.LeakyReLU: "leaky_relu",
}
"""Exact classes: a subclass may do more."""

_FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
}
_METHODS = {"relu": "relu", "relu_": "relu"}


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module is, if it is one of these."""
    name = MODULES.get(type(module))
    if name == "leaky_relu":
        return name, float(getattr(module, "negative_slope", 0.01))
    return name


def activation_called(node: fx.Node, module: nn.Module | None) -> Activation | None:
    """The activation that a node computes, by the module that it calls or without one."""
    if module is not None:
        return activation_of(module)
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    if node.op != "call_function":
        return None
    name = _FUNCTIONS.get(node.target)
    if name == "leaky_relu":
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return (name, float(slope)) if isinstance(slope, int | float) else None
    return name
