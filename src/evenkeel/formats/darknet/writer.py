"""The sections that a traced network becomes, one behind the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ...errors import SurgeryError
from . import modules as own

__all__ = ["Layer", "Norm", "Writer", "activation_of"]

Norm = nn.BatchNorm1d | nn.BatchNorm2d

_ACTIVE: Final = ("connected", "convolutional", "shortcut")
"""Sections that have an activation of their own."""


@dataclass
class Layer:
    """A section on its way, and the modules whose numbers it has."""

    name: str
    options: dict[str, Any]
    weight: Tensor | None = None
    bias: Tensor | None = None
    norm: Norm | None = None


class Writer:
    """Collects layers, and knows which of them gives what a node of the graph does."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced = traced
        self.layers: list[Layer] = []
        self.place: dict[fx.Node, int] = {}
        """The layer whose output a node is; -1 is the image."""
        self.channels: dict[int, int] = {}
        """What Darknet takes for channels: of flattened images those before."""
        self.taken: set[fx.Node] = set()
        """What is within a layer, and nobody else's."""

    def refusal(self, node: fx.Node, why: str) -> SurgeryError:
        """An error that says which node, and what stands in the way."""
        what = node.target
        if node.op == "call_module":
            what = f"{node.target} ({type(self.module(node)).__name__})"
        elif callable(what):
            what = getattr(what, "__name__", what)
        return SurgeryError(f"'{node.name}', {what}, cannot be written for Darknet: {why}")

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        if node.op != "call_module":
            return None
        return self.traced.get_submodule(str(node.target))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of what a node gives."""
        meta = node.meta.get("tensor_meta")
        if meta is None or not hasattr(meta, "shape"):
            raise self.refusal(node, "it gives no tensor")
        return tuple(meta.shape)

    def source(self, node: fx.Node) -> fx.Node:
        """The value that an operation takes first."""
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node):
            raise self.refusal(node, "it does not take the value of a layer first")
        return source

    def add(
        self, node: fx.Node, source: fx.Node, layer: Layer, before: Layer | None = None
    ) -> None:
        """A layer that takes one value, and the norm and activation behind it."""
        self.goes_behind(source)
        self.layers += [layer] if before is None else [before, layer]
        end = self._norm_behind(node, layer) if layer.weight is not None else node
        self.name(self.activation_behind(end, layer))

    def name(self, node: fx.Node) -> None:
        """The node is what the last layer gives."""
        self.place[node] = len(self.layers) - 1
        self.channels[self.place[node]] = self.shape(node)[1]

    def goes_behind(self, source: fx.Node) -> None:
        """Puts a [route] first if the last layer gives something else than is taken."""
        place = self.placed(source)
        if place == len(self.layers) - 1:
            return
        if place < 0:
            raise self.refusal(source, "Darknet's layers cannot reach back to the image")
        self.layers.append(Layer("route", {"layers": place}))

    def placed(self, source: Any) -> int:
        """The layer that gives a value."""
        if not isinstance(source, fx.Node) or source not in self.place:
            raise SurgeryError(
                f"{source} is no value of a layer; Darknet's layers take nothing else"
            )
        return self.place[source]

    def check_norm(self, node: fx.Node, norm: Norm) -> None:
        """Refuses a norm without running statistics."""
        if norm.running_var is None or norm.running_mean is None:
            raise self.refusal(node, "it has no running statistics, which Darknet normalizes with")

    def _norm_behind(self, node: fx.Node, layer: Layer) -> fx.Node:
        after = _only_user(node)
        norm = self.module(after) if after is not None else None
        if after is None or not isinstance(norm, Norm):
            return node
        self.check_norm(after, norm)
        layer.norm = norm
        layer.options = {"batch_normalize": 1, **layer.options}
        self.taken.add(node)
        return after

    def activation_behind(self, node: fx.Node, layer: Layer) -> fx.Node:
        """Gives the layer the activation behind a node; what the layer's output is then."""
        after = _only_user(node)
        name = activation_of(self, after) if after is not None else None
        if layer.name in _ACTIVE:
            layer.options["activation"] = name or "linear"
            if name is not None and after is not None:
                self.taken.add(node)
                return after
        return node


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def activation_of(writer: Writer, node: fx.Node) -> str | None:
    """Darknet's name of an activation, or None."""
    module = writer.module(node)
    if module is not None:
        for kind, name in _ACTIVATIONS.items():
            if type(module) is kind:
                return name
        return _by_slope(module)
    if node.target in (F.leaky_relu, F.elu):
        is_elu = node.target is F.elu
        number: Any = node.kwargs.get("alpha" if is_elu else "negative_slope", None)
        number = node.args[1] if len(node.args) > 1 else number
        number = (1.0 if is_elu else 0.01) if number is None else number
        return _by_slope(nn.ELU(number) if is_elu else nn.LeakyReLU(number))
    return _ACTIVATION_CALLS.get(node.target)


def _by_slope(module: nn.Module) -> str | None:
    if isinstance(module, nn.LeakyReLU):
        return {0.1: "leaky", 0.01: "relie"}.get(module.negative_slope)
    if isinstance(module, nn.ELU) and module.alpha == 1:
        return "elu"
    if isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (-1, 1):
        return "hardtan"
    return None


_ACTIVATIONS: Final[dict[type[nn.Module], str]] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Sigmoid: "logistic", nn.Tanh: "tanh",
    nn.SiLU: "swish", nn.Mish: "mish", own.Loggy: "loggy", own.Lhtan: "lhtan", own.Plse: "plse",
    own.Ramp: "ramp", own.Selu: "selu", own.Stair: "stair",
}  # fmt: skip
_ACTIVATION_CALLS: Final[dict[Any, str]] = {
    F.relu: "relu", torch.relu: "relu", "relu": "relu", "relu_": "relu", torch.relu_: "relu",
    F.relu6: "relu6", torch.sigmoid: "logistic", F.sigmoid: "logistic", "sigmoid": "logistic",
    torch.tanh: "tanh", F.tanh: "tanh", "tanh": "tanh", F.silu: "swish", F.mish: "mish",
}  # fmt: skip
