"""Which rule each operation follows: tables of modules, functions and methods of torch."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..graph import module_of

__all__ = ["SIZED", "kind_of"]


def _names(**kinds: str) -> dict[str, str]:
    return {name: kind for kind, names in kinds.items() for name in names.split()}


_METHODS = _names(
    same="contiguous clone detach",
    moved="view reshape flatten unflatten permute transpose t squeeze unsqueeze movedim moveaxis "
    "swapaxes swapdims chunk split unbind narrow select flip roll __getitem__",
    homogeneous="relu relu_",
    mean="mean",
    amax="amax",
    added="add add_",
)
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
                     F.feature_alpha_dropout, torch.dropout), "dropout"),
    **dict.fromkeys((torch.clone, torch.detach), "same"),
    **dict.fromkeys((torch.reshape, torch.flatten, torch.unflatten, torch.permute, torch.transpose,
                     torch.t, torch.squeeze, torch.unsqueeze, torch.movedim, torch.moveaxis,
                     torch.swapaxes, torch.swapdims, torch.chunk, torch.split, torch.unbind,
                     torch.narrow, torch.select, torch.flip, torch.roll, torch.channel_shuffle,
                     F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle,
                     operator.getitem), "moved"),
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, F.leaky_relu, F.leaky_relu_,
                     F.prelu, torch.prelu),
                    "homogeneous"),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, torch.avg_pool1d,
                     F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
                     torch.adaptive_avg_pool1d, F.interpolate, F.pad), "average"),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d,
                     torch.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
                     F.adaptive_max_pool3d), "maximum"),
    torch.mean: "mean",
    torch.amax: "amax",
    torch.cat: "joined",
    torch.concat: "joined",
    torch.add: "added",
    operator.add: "added",
    operator.iadd: "added",
}  # fmt: skip
_MODULES: dict[Any, str] = {
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
                     nn.AlphaDropout, nn.FeatureAlphaDropout), "same"),
    **dict.fromkeys((nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle,
                     nn.ChannelShuffle), "moved"),
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU, nn.PReLU), "homogeneous"),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
                     nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Upsample,
                     nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad1d, nn.ZeroPad2d,
                     nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
                     nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
                     nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
                     nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), "average"),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d,
                     nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), "maximum"),
}  # fmt: skip
"""Exact classes: a subclass may do more."""


SIZED = {F.interpolate, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d}
"""Functions to which the graph may hand a size without changing what they do to a constant."""


def kind_of(node: fx.Node) -> str | None:
    """Which rule the node follows; None if there is none for it."""
    module = module_of(node)
    if module is not None:
        hooked = module._forward_hooks or module._forward_pre_hooks
        return None if hooked else _MODULES.get(type(module))
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    kind = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if kind != "dropout":
        return kind
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    return None if training else "same"
