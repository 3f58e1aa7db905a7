"""Removing batch norms for inference, with a proof.

In inference a batch norm is the map ``s * x + t`` per owner of a statistic, with
``s = weight / sqrt(var + eps)`` and ``t = bias - mean * s``. Maps are pushed through the graph
until a linear layer takes them in: the one before (``W' = s W``, ``b' = s b + t``) or those
behind (``W' = W s``, ``b' = b + W t``). What nothing takes in becomes one scale and shift.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..errors import SurgeryError
from ..nn import Norm
from .accelerate import restore
from .examples import widened
from .exchanging.kinds import computes_a_norm, is_bare_frozen
from .folding.absorbing import folded_weights
from .folding.expanding import expand
from .folding.functions import layers_of_functions
from .folding.leaving import settle
from .folding.packing import pack as packed
from .folding.proof import drawn_like, largest_apart, outputs, per_norm, relative
from .folding.pushing import Move, push
from .folding.report import Folded, FoldReport
from .folding.values import record
from .freeze import unfreeze
from .graph import NORMS, inputs_of, trace

__all__ = ["FoldReport", "Folded", "fold", "folded_weights", "skip_norms"]

BUDGET = 1e-5
"""The largest difference allowed, relative to the largest output (float32 rounding is 6e-8)."""

EXACT_BUDGET = 1e-9
"""The same in double precision, at every norm and at the end."""

WORSE = 10.0
"""How much farther from the exact outputs than the original's own rounding a fold may be."""

DEAD = 1e-12
"""A variance below this is that of a channel that always had the same value."""


def fold(
    model: nn.Module, example: Any, *, pack: bool = False
) -> tuple[fx.GraphModule, FoldReport]:
    """A copy of the network in eval mode with every norm folded that algebra can remove.

    The work is done in double precision and compared with the network as it was, at every folded
    norm and at the outputs, on the example and on random inputs with the same mean and deviation
    per channel; then in the network's own precision at the outputs. There is no way to go without.

    Args:
        model: a network that torch.fx can trace; it is not touched.
        example: an input, a tuple of inputs or a dict of inputs by name.
        pack: True to have the weights of 2-D convolutions also in the order in which the CPU's
            kernels read them, and the sums and activations behind them done in one call: faster
            in float32 on a CPU, for the memory of those weights once more. State dict, pickles
            and exports are those of ordinary convolutions.

    Returns:
        The folded network, in the model's types and on its device, and a `FoldReport`.

    Raises:
        SurgeryError: the model cannot be traced, or the folded copy's outputs differ by more than
            the budget.
    """
    original = restore(model).eval()  # an accelerated norm does more than a norm
    unfreeze(original)  # in inference it is a norm like any other
    _bake(original)
    _recognize(original)
    named = (original.named_parameters, original.named_buffers)
    dtypes = {name: t.dtype for find in named for name, t in find(remove_duplicate=False)}
    traced, inputs, is_wide = _traced(original, example)
    reference = copy.deepcopy(traced)
    notes = _odd_variances(original)
    moves, left = _folded(traced, inputs, dtypes)
    differences, exact = _check_algebra(reference, traced, moves, inputs, is_wide)
    if is_wide:
        notes += _narrow(traced, dtypes)
    if pack:
        packed(traced)
    given = inputs_of(traced, example)
    exacts = (reference, inputs) if is_wide else None
    difference, scale, budget = _check_rounding(original, traced, given, exacts)
    folded = tuple(
        Folded(m.norm, tuple(m.into), tuple(m.through), m.direction, d)
        for m, d in zip(moves, differences, strict=True)
    )
    whole = exact if is_wide else None
    return traced, FoldReport(folded, left, difference, scale, budget, whole, tuple(notes))


def skip_norms(model: nn.Module) -> nn.Module:
    """A copy of the network whose norms do nothing: the mistake of leaving out BN at inference."""
    own = restore(model)
    for name, module in list(own.named_modules(remove_duplicate=False)):
        if isinstance(module, NORMS):
            own.set_submodule(name, nn.Identity())
    return own


def _bake(model: nn.Module) -> None:
    """Weights that are computed anew at every call (weight norm) as plain parameters.

    Torch's own ``remove_parametrizations`` takes the property from a class that copies share.
    """
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        names = list(module._modules["parametrizations"]._modules)  # type: ignore[union-attr]
        with torch.no_grad():
            values = {name: getattr(module, name).clone() for name in names}
        kind = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
        module.__class__ = kind
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value))


def _recognize(model: nn.Module) -> None:
    """Frozen norms as torchvision and detectron2 have them, as norms."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and is_bare_frozen(module) and computes_a_norm(module):
            norm = Norm("n c ... -> c", c=len(module.weight), eps=module.eps)
            norm.load_state_dict(module.state_dict(), strict=False)
            like: Any = module.weight
            model.set_submodule(path, norm.to(like.device, like.dtype).eval())


def _traced(model: nn.Module, example: Any) -> tuple[fx.GraphModule, tuple[Any, ...], bool]:
    """The network in double precision if it runs in it, with the inputs and whether it does."""
    try:
        wide = copy.deepcopy(model).double()
        inputs = widened(example)
        traced = trace(wide, inputs, inference=True)
        return traced, inputs_of(traced, inputs), True
    except (SurgeryError, RuntimeError, TypeError):  # something in it insists on its precision
        traced = trace(model, example, inference=True)
        return traced, inputs_of(traced, example), False


def _folded(
    traced: fx.GraphModule, inputs: tuple[Any, ...], dtypes: dict[str, torch.dtype]
) -> tuple[list[Move], tuple[tuple[str, str], ...]]:
    """Folds what can be, in place; what was done, and what stays with the reasons."""
    record(traced, inputs)
    for node in traced.graph.nodes:
        node.meta["means"] = node.name
    layers_of_functions(traced, dtypes)
    traced.meta["limits"] = {
        name.removesuffix(".weight"): torch.finfo(dtype).max
        for name, dtype in dtypes.items()
        if name.endswith(".weight") and dtype.is_floating_point
    }
    left = expand(traced)
    moves, reasons = push(traced)
    for node in [n for n in traced.graph.nodes if n.op == "get_attr" and not n.users]:
        traced.graph.erase_node(node)
    settle(traced, moves, dtypes)
    for norm, why in reasons.items():
        left.setdefault(norm, why)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return moves, tuple(left.items())


def _check_algebra(
    reference: fx.GraphModule,
    folded: fx.GraphModule,
    moves: list[Move],
    inputs: tuple[Any, ...],
    is_wide: bool,
) -> tuple[list[float], float]:
    """The differences at each norm and at the end, on the example and on random inputs like it."""
    budget = EXACT_BUDGET if is_wide else BUDGET
    worst, end = [0.0] * len(moves), 0.0
    for given in (inputs, drawn_like(inputs)):
        found = per_norm(reference, folded, moves, given)
        worst = [max(pair) for pair in zip(worst, found, strict=True)]
        apart = largest_apart(outputs(reference, given), outputs(folded, given))
        end = max(end, relative(*apart))
    for move, difference in zip(moves, worst, strict=True):
        if not difference <= budget:
            raise SurgeryError(
                f"folding '{move.norm}' into {', '.join(move.into)} changed what comes behind it "
                f"by {difference:.1e} of the largest value, where {budget:.0e} is allowed; nothing "
                "was changed; please report it with the network"
            )
    if not end <= budget:
        raise SurgeryError(
            f"folding changed the output by {end:.1e} of the largest, where {budget:.0e} is "
            "allowed; nothing was changed; please report it with the network"
        )
    return worst, end


def _narrow(traced: fx.GraphModule, dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Gives every tensor the type that it had, and says what was too small for it."""
    flushed: list[str] = []
    for owner, module in traced.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or tensor.dtype != torch.float64:
                continue
            path = f"{owner}.{name}" if owner else name
            dtype = dtypes.get(path) or dtypes.get(f"{owner}.weight") or torch.float32
            with torch.no_grad():
                narrow = tensor.to(dtype)
                tiny = (narrow != 0) & (narrow.abs() < torch.finfo(dtype).tiny)
                if dtype in (torch.float32, torch.bfloat16) and bool(tiny.any()):
                    narrow = torch.where(tiny, torch.zeros_like(narrow), narrow)
                    flushed.append(f"{int(tiny.sum())} subnormal numbers of {path} are now 0")
            if isinstance(tensor, nn.Parameter):
                narrow = nn.Parameter(narrow, requires_grad=tensor.requires_grad)
            setattr(module, name, narrow)
    return flushed


def _check_rounding(
    original: nn.Module,
    folded: fx.GraphModule,
    inputs: tuple[Any, ...],
    exact: tuple[fx.GraphModule, tuple[Any, ...]] | None,
) -> tuple[float, float, float]:
    """The largest difference in the network's own precision, the largest output, the budget."""
    found = []
    for seed in (None, 1):
        given = inputs if seed is None else drawn_like(inputs, seed)
        old, new = outputs(original, given), outputs(folded, given)
        apart, scale = largest_apart(old, new)
        budget = BUDGET
        if not apart <= BUDGET * scale and exact is not None:
            own = relative(largest_apart(outputs(exact[0], widened(given)), old)[0], scale)
            budget += WORSE * own
        if not apart <= budget * scale:
            raise SurgeryError(
                f"folding changed the output by {apart:.2e} where {budget * scale:.2e} is "
                "allowed; nothing was changed; the usual causes are a running mean far above the "
                "deviation and half precision (fold in float32, then convert)"
            )
        found.append((apart, scale, budget))
    return max(found, key=lambda one: relative(one[0], one[1]))


def _odd_variances(model: nn.Module) -> list[str]:
    """Channels that never varied: their scale is that of eps, and tells nothing about the data."""
    notes = []
    for path, module in model.named_modules():
        var: Any = getattr(module, "running_var", None)
        eps: Any = getattr(module, "eps", None)
        if not isinstance(var, Tensor) or not isinstance(eps, float) or not var.numel():
            continue
        dead = int((var < DEAD).sum())
        if dead:
            largest = float((var.double().min().clamp_min(0) + eps).rsqrt())
            notes.append(
                f"{path}: {dead} of {var.numel()} variances are below {DEAD:.0e}, so x is scaled "
                f"by up to {largest:.0f} there"
            )
    return notes
