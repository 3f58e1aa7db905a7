"""Removing batch norms for inference: merge each into the conv or dense layer before it.

In inference a batch norm is the map ``s * x + t`` per channel with ``s = weight / sqrt(var + eps)``
and ``t = bias - mean * s``; a linear layer before it absorbs the map: ``W' = s * W`` and
``b' = s * b + t``. Done in float64, and proved on the spot by comparing outputs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import SurgeryError
from ..nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Norm, PerActivationBatchNorm
from .accelerate import restore
from .freeze import unfreeze
from .graph import (
    LAYERS,
    NORMS,
    is_norm,
    module_of,
    name_of,
    rank_expected,
    shape_of,
    trace,
)

__all__ = ["FoldReport", "fold", "folded_weights", "skip_norms"]

BUDGET = 1e-5
"""The largest difference allowed, relative to the largest output (float32 rounding is 6e-8)."""


@dataclass(frozen=True)
class FoldReport:
    """What was folded, what was left and why, and the proof.

    ``difference`` is the largest difference between the two networks' outputs on the example,
    ``scale`` the largest output, ``budget`` the relative difference that was allowed.
    """

    folded: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]
    difference: float
    scale: float
    budget: float

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} norms folded, {len(self.left)} left"]
        lines += [f"  {norm} into {layer}" for norm, layer in self.folded]
        lines += [f"  {norm} stays: {reason}" for norm, reason in self.left]
        lines.append(
            f"  largest output difference {self.difference:.2e} of {self.scale:.3g} "
            f"(budget {self.budget:.0e} relative)"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


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


def fold(model: nn.Module, example: Tensor) -> tuple[fx.GraphModule, FoldReport]:
    """A copy of the network in eval mode with every norm folded that can be.

    Raises:
        SurgeryError: the model cannot be traced, or the folded copy's outputs differ by more than
            the budget; the given model is untouched in any case.
    """
    original = restore(model).eval()  # an accelerated norm does more than a norm
    unfreeze(original)  # in inference it is a norm like any other
    traced = trace(original, example, inference=True)
    folded: list[tuple[str, str]] = []
    left: dict[str, str] = {}  # a norm called twice is one norm
    for node in list(traced.graph.nodes):
        if not is_norm(node):
            continue
        reason = _refusal(node)
        if reason is not None:
            left.setdefault(name_of(node), reason)
            continue
        before = node.all_input_nodes[0]
        _absorb(before, node)
        folded.append((str(node.target), str(before.target)))
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    difference, scale = _compare(original, traced, example)
    if not difference <= BUDGET * scale:
        raise SurgeryError(
            f"folding changed the output by {difference:.2e} where {BUDGET * scale:.2e} is "
            "allowed; nothing was changed; the usual causes are a running mean far above the "
            "deviation and half precision (fold in float32, then convert)"
        )
    return traced, FoldReport(tuple(folded), tuple(left.items()), difference, scale, BUDGET)


def skip_norms(model: nn.Module) -> nn.Module:
    """A copy of the network whose norms do nothing: the mistake of leaving out BN at inference."""
    own = restore(model)
    for name, module in list(own.named_modules(remove_duplicate=False)):
        if isinstance(module, NORMS):
            own.set_submodule(name, nn.Identity())
    return own


_KNOWN = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    BatchNorm1d, BatchNorm2d, BatchNorm3d, Norm, PerActivationBatchNorm,
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
"""Classes that do what their name says and nothing else; a subclass may do more."""


def _refusal(node: fx.Node) -> str | None:
    """Why the norm cannot be folded into what is before it, or None."""
    norm, value = module_of(node), node.all_input_nodes[0]
    if norm is None:
        return "it is a function, not a module"
    reason = _not_a_map(norm, shape_of(value))
    if reason is not None:
        return reason
    layer = module_of(value)
    if not isinstance(layer, LAYERS):
        return f"its input comes from '{name_of(value)}', which is not a conv or dense layer"
    if len(value.users) > 1:
        others = sorted(name_of(user) for user in value.users if user is not node)
        return f"the output of '{value.target}' is also used by {', '.join(others)}"
    for called, module in ((value, layer), (node, norm)):
        if type(module) not in _KNOWN:
            return (
                f"'{called.target}' is a {type(module).__name__}, which may do more than its base"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            return f"'{called.target}' has hooks, which may change what it computes"
        if _uses(called) > 1:
            return f"'{called.target}' is used more than once"
    if len(shape_of(value)) != rank_expected(value):
        return f"channels are not the second axis of what '{value.target}' gives"
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1:
        return f"'{value.target}' is a transposed convolution with groups"
    return None


def _not_a_map(norm: nn.Module, shape: tuple[int, ...]) -> str | None:
    """Why the norm is no fixed map of each channel in inference, or None."""
    if isinstance(norm, Norm):
        if not norm.spec.averages_batch:
            return "each sample has its own statistics"
        bound = norm.spec.bind(shape, norm.sizes)
        if len(norm.spec.axes[1]) > 1 or {*bound.kept, *bound.affine} - {1}:
            return "its scale and shift are not one number for each channel"
    elif not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return "each sample has its own statistics"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if getattr(norm, "activation", None) is not None:
        return f"it also does '{norm.activation}'"
    return None


def _uses(node: fx.Node) -> int:
    """How often the network calls the node's module or reads one of its weights."""
    name = str(node.target)
    return sum(
        (other.op == "call_module" and other.target == name)
        or (other.op == "get_attr" and str(other.target).startswith(f"{name}."))
        for other in node.graph.nodes
    )


def _absorb(value: fx.Node, node: fx.Node) -> None:
    """Puts the norm's map into the weights of the layer."""
    layer: Any = module_of(value)
    norm: Any = module_of(node)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    axis = int(isinstance(layer, nn.modules.conv._ConvTransposeNd))
    channels = layer.weight.shape[axis]
    scale, shift = scale.expand(channels), shift.expand(channels)
    with torch.no_grad():
        weight, bias = folded_weights(layer.weight, layer.bias, scale, shift, axis)
    layer.weight = nn.Parameter(weight)
    layer.bias = nn.Parameter(bias)


def _compare(a: nn.Module, b: nn.Module, example: Tensor) -> tuple[float, float]:
    """The largest difference of two networks' outputs, and the largest output."""
    with torch.no_grad():
        first, second = a(example), b(example)
    if not isinstance(first, Tensor):
        raise SurgeryError(f"the network gives {type(first).__name__}, not one tensor, to compare")
    if first.numel() == 0:
        raise SurgeryError("the example gives no output to compare; give a batch of real inputs")
    return float((first - second).abs().max()), float(first.abs().max())
