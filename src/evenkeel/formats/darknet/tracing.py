"""A network of torch's as a network of Darknet's.

The forward is traced by torch.fx. Each convolution, dense layer or pooling becomes a section, which
takes the norm and the activation behind it if nobody else sees what is between. Darknet's layers
take what the one before them gives; where that is another, a [route] goes before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ...errors import SurgeryError, first_line
from .cfg import Section
from .network import Network
from .nodes import FUNCTIONS, MODULES
from .writer import Layer, Writer, activation_of

__all__ = ["as_network", "in_inference"]


def as_network(model: nn.Module, example: Tensor, convention: str) -> Network:
    """The network as Darknet's, computing the same, to be written.

    Args:
        model: a network of convolutions, dense layers, batch norms, poolings, sums and
            concatenations; it is not changed.
        example: a batch of images.
        convention: for `Network`.

    Raises:
        SurgeryError: what it does has no layer in Darknet; which part, and why.
    """
    image = tuple(example.shape[1:])
    if len(image) != 3:
        raise SurgeryError(f"Darknet takes images, (n, c, h, w), but the example is {image}")
    try:
        with in_inference(model), torch.no_grad():
            root = nn.Sequential(model) if isinstance(model, tuple(MODULES)) else model
            traced = fx.GraphModule(root, _Tracer().trace(root))
            ShapeProp(traced).propagate(example.clone())
    except Exception as error:
        raise SurgeryError(f"the network cannot be traced ({first_line(error)})") from error
    layers = _write(Writer(traced), traced.graph)
    sizes = dict(zip(("height", "width", "channels"), (*image[1:], image[0]), strict=True))
    net = Section("net", {"batch": "1", **{k: str(v) for k, v in sizes.items()}})
    made = [
        Section(layer.name, {k: str(v) for k, v in layer.options.items()}, f"layer {index}")
        for index, layer in enumerate(layers)
    ]
    with torch.random.fork_rng(devices=[]):
        network = Network([net, *made], convention)
    for layer, module in zip(layers, network.layers, strict=True):
        _fill(layer, module)
    return network.eval()


@contextmanager
def in_inference(model: nn.Module) -> Iterator[None]:
    """Every module in inference mode meanwhile, and then as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def _fill(layer: Layer, module: nn.Module) -> None:
    """Gives a Darknet layer its numbers."""
    if layer.weight is None:
        return
    parts: dict[str, Any] = dict(module.named_children())
    target = parts["conv"] if "conv" in parts else parts["linear"]
    target.weight.copy_(layer.weight)
    if layer.norm is None:
        bias = 0.0 if layer.bias is None else layer.bias
        target.bias.copy_(torch.as_tensor(bias))
        return
    source, norm = layer.norm, parts["norm"]
    norm.eps = source.eps
    for name, value in (*source.named_parameters(), *source.named_buffers()):
        getattr(norm, name).copy_(value)
    if layer.bias is not None:  # which Darknet's normalized layers do not have
        norm.running_mean.sub_(layer.bias)


class _Tracer(fx.Tracer):
    """Takes the modules that are known here whole, subclasses of torch's too."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, tuple(MODULES)) or super().is_leaf_module(module, name)


def _write(writer: Writer, graph: fx.Graph) -> list[Layer]:
    """The layers of a whole graph."""
    for node in graph.nodes:
        if node in writer.place or node in writer.taken or node.op == "get_attr":
            continue
        if node.op == "placeholder":
            if writer.place and not node.users:
                continue  # an option that the forward leaves at its default
            if writer.place:
                raise writer.refusal(node, "Darknet's networks take one input")
            if sum(map(_is_tensor, node.users)) > 1:  # to reach back to it, it must be a layer's
                writer.layers.append(Layer("activation", {"activation": "linear"}))
            writer.name(node)
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise writer.refusal(node, "Darknet's networks give one output")
            writer.goes_behind(node.args[0])
        elif _is_tensor(node):  # a size is asked for to flatten, and seen in what comes out
            _one(writer, node)
    return writer.layers


def _is_tensor(node: fx.Node) -> bool:
    return "tensor_meta" in node.meta and hasattr(node.meta["tensor_meta"], "shape")


def _writes_over(writer: Writer, node: fx.Node) -> bool:
    """Whether an operation writes over what it takes."""
    target, module = node.target, writer.module(node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.kwargs.get("inplace", False) or any(value is True for value in node.args[1:]):
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name == "iadd" or (name.endswith("_") and not name.endswith("__"))


def _one(writer: Writer, node: fx.Node) -> None:
    """The layer of one operation."""
    module = writer.module(node)
    if _writes_over(writer, node) and len(writer.source(node).users) > 1:
        raise writer.refusal(node, "it writes over a value that others use, before or behind it")
    kinds = [] if module is None else [k for k in MODULES if isinstance(module, k)]
    if kinds:
        MODULES[kinds[0]](writer, node, module)
    elif module is None and node.target in FUNCTIONS:
        FUNCTIONS[node.target](writer, node, None)
    elif (name := activation_of(writer, node)) is not None:
        writer.goes_behind(writer.source(node))
        writer.layers.append(Layer("activation", {"activation": name}))
        writer.name(node)
    else:
        raise writer.refusal(node, "Darknet has no layer for it")
