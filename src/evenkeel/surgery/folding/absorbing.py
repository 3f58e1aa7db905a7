"""Linear layers take a map in: behind them into their outputs, before them into their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ...nn.folded import BORDERED
from ..graph import module_of, name_of
from .maps import Map
from .values import shape_seen

__all__ = ["LAYERS", "absorb_before", "absorb_behind", "folded_weights", "is_layer", "why_not"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Embedding, *_CONVS, *_TRANSPOSED)
"""Classes that do what their name says and nothing else; a subclass may do more."""
_EXACT = (*LAYERS, *BORDERED.values())


def folded_weights(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, axis: int = 0
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer that also does ``scale * y + shift`` on its output.

    ::

        W'[o] = scale[o] * W[o]        b'[o] = scale[o] * b[o] + shift[o]

    Args:
        weight: of the layer, the output channels on ``axis``.
        bias: (o,) or None for zero.
        scale, shift: (o,), best in float64.

    Returns:
        weight and bias in the weight's dtype, computed in float64.
    """
    shape = [1] * weight.dim()
    shape[axis] = -1
    wide = weight.double() * scale.double().reshape(shape)
    start = torch.zeros_like(scale, dtype=torch.float64) if bias is None else bias.double()
    folded_bias = start * scale.double() + shift.double()
    return wide.to(weight.dtype), folded_bias.to(weight.dtype)


def is_layer(node: fx.Node) -> bool:
    """True if the node calls a layer that may take a map in."""
    return isinstance(module_of(node), nn.Linear | nn.Embedding | nn.modules.conv._ConvNd)


def why_not(node: fx.Node, map: Map, *, behind: bool) -> str | None:
    """Why the layer cannot take the map in, or None.

    Args:
        node: the layer's call.
        map: on its output, or on its input.
        behind: True for its output.
    """
    layer: Any = module_of(node)
    if type(layer) not in _EXACT:
        return f"'{node.target}' is a {type(layer).__name__}, which may do more than its base"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return f"'{node.target}' has hooks, which may change what it computes"
    if _uses(node, layer) > 1:
        return f"'{node.target}' is used more than once"
    value = node if behind else node.all_input_nodes[0]
    shape, axis = shape_seen(value), _axis(layer, value)
    if axis is None:
        return f"channels are not the second axis of what '{name_of(value)}' gives"
    if not behind and (isinstance(layer, nn.Embedding) or len(node.args) + len(node.kwargs) > 1):
        return f"'{node.target}' takes more than values to multiply with its weight"
    odd = map.axes() - {axis}
    if odd:
        return (
            f"it has more than one scale or shift for each channel of '{node.target}', which are "
            f"axis {axis} of {shape}"
        )
    if behind and isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return f"'{node.target}' changes its rows as it reads them (max_norm)"
    return None


def _axis(layer: Any, value: fx.Node) -> int | None:
    """The axis of the layer's channels in its input or output."""
    rank = len(shape_seen(value))
    if isinstance(layer, nn.modules.conv._ConvNd):
        return 1 if rank == 2 + len(layer.kernel_size) else None
    return rank - 1 if rank > 1 else None


def _uses(node: fx.Node, layer: nn.Module) -> int:
    """How often the network calls the layer, under any name, or reads one of its weights."""
    owned = {
        id(t) for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None
    }
    root: Any = node.graph.owning_module
    count = 0
    for other in node.graph.nodes:
        if other.op == "call_module":
            count += module_of(other) is layer
        elif other.op == "get_attr":
            count += id(_attribute(root, str(other.target))) in owned
    return count


def _attribute(root: Any, path: str) -> Any:
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


@torch.no_grad()
def absorb_behind(node: fx.Node, map: Map) -> None:
    """Makes the layer compute ``scale * y + shift`` where it computed y."""
    layer: Any = module_of(node)
    if isinstance(layer, nn.Embedding):
        scale, shift = map.vectors(map.scale.dim() - 1, layer.embedding_dim)
        weight = _wide(layer.weight) * scale + shift
        layer.padding_idx = None  # no row is special any more
        _write(layer, weight=weight)
        return
    is_conv = isinstance(layer, nn.modules.conv._ConvNd)
    channels = layer.out_channels if is_conv else layer.out_features
    scale, shift = map.vectors(1 if is_conv else map.scale.dim() - 1, channels)
    if not is_conv or not layer.transposed:
        weight, bias = folded_weights(_wide(layer.weight), _bias(layer), scale, shift)
    else:  # (in, out / groups, ...): the outputs of a group lie behind the inputs of that group
        rows = scale.reshape(layer.groups, 1, -1, *[1] * (layer.weight.dim() - 2))
        weight = (_by_group(layer) * rows).reshape(layer.weight.shape)
        bias = _bias(layer) * scale + shift
    if getattr(layer, "border", None) is not None:
        at = [1] * layer.border.dim()
        at[int(layer.transposed)] = -1
        layer.border = (_wide(layer.border) * scale.reshape(at)).to(layer.border)
    _write(layer, weight=weight, bias=bias)


@torch.no_grad()
def absorb_before(node: fx.Node, map: Map) -> None:
    """Makes the layer compute of x what it computed of ``scale * x + shift``."""
    layer: Any = module_of(node)
    if isinstance(layer, nn.Linear):
        scale, shift = map.vectors(map.scale.dim() - 1, layer.in_features)
        weight = _wide(layer.weight)
        _write(layer, weight=weight * scale, bias=_bias(layer) + weight @ shift)
        return
    scale, shift = map.vectors(1, layer.in_channels)
    outer = [1] * (layer.weight.dim() - 2)
    parts = _by_group(layer)
    if layer.transposed:  # (groups, in / groups, out / groups, ...)
        s, t = (v.reshape(layer.groups, -1, 1, *outer) for v in (scale, shift))
    else:  # (groups, out / groups, in / groups, ...)
        s, t = (v.reshape(layer.groups, 1, -1, *outer) for v in (scale, shift))
    weight = (parts * s).reshape(layer.weight.shape)
    summed = (parts * t).sum(1 if layer.transposed else 2)  # (groups, out / groups, ...)
    kernel = summed.reshape(layer.out_channels, *layer.weight.shape[2:])
    if layer.transposed:
        bias = _bias(layer)
        border = kernel[None] if map.shifts else None
    else:
        bias = _bias(layer) + kernel.flatten(1).sum(1)
        border = kernel[:, None] if map.shifts and _pads_with_zeros(layer) else None
    if border is not None:
        if type(layer) in BORDERED:
            layer.__class__ = BORDERED[type(layer)]
            layer.register_buffer("border", torch.zeros_like(border).to(layer.weight))
        layer.border = (_wide(layer.border) + border).to(layer.border)
    _write(layer, weight=weight, bias=bias)


def _pads_with_zeros(layer: Any) -> bool:
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    return layer.padding == "same" or any(layer.padding)


def _by_group(layer: Any) -> Tensor:
    """The weight with the groups as an axis of their own, in front."""
    return _wide(layer.weight).reshape(layer.groups, -1, *layer.weight.shape[1:])


def _bias(layer: Any) -> Tensor:
    if layer.bias is not None:
        return _wide(layer.bias)
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return torch.zeros(outputs, dtype=torch.float64)


def _wide(t: Tensor) -> Tensor:
    """In float64, on the CPU: other devices may not have that type."""
    return t.detach().cpu().double()


def _write(layer: Any, **tensors: Tensor) -> None:
    """New parameters, of the layer's type; what was tied to the old ones keeps those."""
    for name, tensor in tensors.items():
        old = layer.weight
        setattr(layer, name, nn.Parameter(tensor.to(old), requires_grad=old.requires_grad))
