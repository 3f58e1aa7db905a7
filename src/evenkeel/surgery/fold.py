"""Removing batch norms for inference: merge each into the conv or dense layer before it.

In inference a batch norm is the map ``s * x + t`` per channel with ``s = weight / sqrt(var + eps)``
and ``t = bias - mean * s``; a linear layer before it absorbs the map: ``W' = s * W`` and
``b' = s * b + t``. Done in float64, and proved on the spot by comparing outputs.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import SurgeryError
from ..nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Norm
from .graph import NORMS, is_layer, is_norm, module_of, shape_of, trace

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
    original = copy.deepcopy(model).eval()
    traced = trace(original, example)
    folded: list[tuple[str, str]] = []
    left: list[tuple[str, str]] = []
    for node in list(traced.graph.nodes):
        if not is_norm(node):
            continue
        reason = _refusal(node)
        if reason is not None:
            left.append((str(node.target), reason))
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
            "allowed; nothing was changed; the usual cause is a tiny running variance"
        )
    return traced, FoldReport(tuple(folded), tuple(left), difference, scale, BUDGET)


def skip_norms(model: nn.Module) -> nn.Module:
    """A copy of the network whose norms do nothing: the mistake of leaving out BN at inference."""
    own = copy.deepcopy(model)
    for name, module in list(own.named_modules()):
        if isinstance(module, NORMS):
            own.set_submodule(name, nn.Identity())
    return own


_KNOWN = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm1d, BatchNorm2d, BatchNorm3d,
)  # fmt: skip
"""Classes whose forward is batch norm and nothing else; a subclass may do more."""


def _refusal(node: fx.Node) -> str | None:
    """Why the norm cannot be folded into what is before it, or None."""
    value = node.all_input_nodes[0]
    reason = _not_a_map(module_of(node), shape_of(value))
    if reason is not None:
        return reason
    if not is_layer(value):
        return f"its input comes from '{value.name}', which is not a conv or dense layer"
    layer = module_of(value)
    if len(value.users) > 1:
        others = sorted(user.name for user in value.users if user is not node)
        return f"the output of '{value.target}' is also used by {', '.join(others)}"
    for called in (value, node):
        if _calls(called) > 1:
            return f"'{called.target}' is called more than once"
    if isinstance(layer, nn.Linear) and len(shape_of(value)) != 2:
        return (
            f"'{value.target}' gives {len(shape_of(value))}-D values, so channels are not its last"
        )
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1:
        return f"'{value.target}' is a transposed convolution with groups"
    return None


def _not_a_map(norm: nn.Module | None, shape: tuple[int, ...]) -> str | None:
    """Why the norm is no fixed map of each channel in inference, or None."""
    if isinstance(norm, Norm):
        if not norm.spec.averages_batch:
            return "each sample has its own statistics"
        if norm.spec.bind(shape, norm.sizes).kept != (1,) or (
            norm.spec.affine is not None and not norm.spec.affine_is_owners
        ):
            return "its scale and shift differ from place to place, a layer's weights do not"
    elif not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return "each sample has its own statistics"
    elif type(norm) not in _KNOWN:
        return f"{type(norm).__name__} may do more than batch norm"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    return None


def _calls(node: fx.Node) -> int:
    return sum(n.op == "call_module" and n.target == node.target for n in node.graph.nodes)


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
    return float((first - second).abs().max()), float(first.abs().max())
