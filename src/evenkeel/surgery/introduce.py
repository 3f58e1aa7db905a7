"""Putting batch norm into a network that has none, at any place that people ask about.

A network that is trained already stays itself if there is data to calibrate with: see `calibrate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..errors import ConfigError, PatternError, ShapeError, SurgeryError
from ..nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Norm, PerActivationBatchNorm
from ..pattern import DEFAULT, parse
from .examples import tensors_in
from .graph import add_module, copied, is_layer, module_of, shape_of, trace
from .introducing.calibrate import Data, Forward, Measured, Values, measure, owned, prove, settle
from .introducing.places import LAYER_KINDS, PLACEMENTS, Left, Place, Where, hand_over, places

__all__ = [
    "LAYER_KINDS",
    "PLACEMENTS",
    "STATISTICS",
    "Introduced",
    "Slot",
    "finished",
    "insert",
    "introduce",
    "spatial",
]

STATISTICS = {
    "spatial": "one mean and variance per channel (cuDNN SPATIAL)",
    "per-activation": "one per activation, over the batch alone (cuDNN PER_ACTIVATION)",
    "per-location": "one per pixel, over the batch and the channels",
    "layer": "one per sample, over everything else (layer norm)",
}

_NAMES = {2: "n c", 3: "n c l", 4: "n c h w", 5: "n c d h w"}
_SPATIAL = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}


@dataclass(frozen=True)
class Introduced:
    """What was done, and the proof that the network computes what it did.

    Attributes:
        norms: each norm with its place.
        dropped_biases: layers whose bias the norm behind them makes redundant.
        left: what was asked for and has no norm, with the reason.
        batches: how many batches the statistics are of; None without calibration.
        difference, scale: in inference, the largest difference between the two networks' outputs,
            relative to the largest value of its output, and that value; None if the norms are
            fresh, for then they change what is computed.
        budget: the relative difference that was allowed; None as above.
        exact: the relative difference in double precision, taken if ``difference`` is above the
            budget for the network's own rounding alone.
        placeholders: the running statistics are those of nothing.
    """

    norms: tuple[tuple[str, str], ...]
    dropped_biases: tuple[str, ...]
    left: tuple[tuple[str, str], ...] = ()
    batches: int | None = None
    difference: float | None = None
    scale: float | None = None
    budget: float | None = None
    exact: float | None = None
    placeholders: bool = False

    def __str__(self) -> str:
        lines = [f"{len(self.norms)} norms introduced"]
        lines += [f"  {name}: {what}" for name, what in self.norms]
        if self.dropped_biases:
            lines.append(f"  redundant biases dropped: {', '.join(self.dropped_biases)}")
        lines += [f"  nothing at {name}: {reason}" for name, reason in self.left]
        if self.batches is not None:
            lines.append(f"  statistics are those of {self.batches} batches")
        if self.placeholders:
            lines.append(
                "  running statistics are placeholders: give calibrate= to have real ones, or train"
                " and then recalibrate"
            )
        if self.difference is not None:
            lines.append(
                f"  largest output difference {self.difference:.2e} of {self.scale:.3g} "
                f"(budget {self.budget:.0e} relative)"
            )
        if self.exact is not None:
            lines.append(
                f"  that is the network's own rounding: in double precision it is {self.exact:.0e}"
                " relative"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def introduce(
    model: nn.Module,
    example: Any,
    placement: str = "before-activation",
    *,
    pattern: str | None = None,
    statistics: str | None = None,
    dense_statistics: str | None = None,
    layers: str = "all",
    every: int = 1,
    where: Where = None,
    calibrate: Tensor | Iterable[Any] | None = None,
    forward: Forward = None,
    logits: bool = False,
    affine: bool = True,
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> tuple[fx.GraphModule, Introduced]:
    """A copy of the network with norms in it; the given model is not touched.

    A bias of a layer whose output goes straight into a norm that subtracts it is dropped. No norm
    goes behind the last layer of any branch, whose output is the logits, unless ``logits`` asks.

    Without ``calibrate`` the norms are fresh ones: mean 0, variance 1, gamma 1, beta 0, for a
    network that is yet to be trained. With it a trained network computes in inference what it did::

        running_mean = m - b                      gamma = sqrt(running_var + eps)
        running_var = sum((x - m)^2) / (n - 1)    beta = m

    with m = sum(x) / n over all n values of all batches, merged exactly in float64 (Chan et al.
    1979), and b the dropped bias. That is proved on the example and on the batches; the copy trains
    on from there.

    Args:
        model: a network that torch.fx can trace, without norms, or with ``where``.
        example: an input, a tuple of inputs or a dict of inputs by name; without ``calibrate`` only
            shapes matter.
        placement: one of `PLACEMENTS`.
        pattern: such as ``'n c h w -> c w'``, for values of as many axes as it has.
        statistics: one of `STATISTICS`, or a pattern; 'spatial' if both are left out.
        dense_statistics: the same for (n, c) values; by default 'spatial', or 'layer' with 'layer'.
        layers: 'all', 'conv' or 'dense': where norms may go.
        every: 1 for every place, 2 for every other one, beginning with the first.
        where: the layer, activation or pooling that a norm goes behind or before: its name, the
            name of a module that holds it, several of these, or ``where(name, module) -> bool``,
            the module None for a function. In a network that has norms, it says what is to have one
            too; a place beside a norm is left.
        calibrate: a tensor or a loader of batches: tensors, tuples or lists that begin with one, or
            dicts of arguments. A loader is read twice; what can be read once only, such as a
            generator, is, and the proof then takes its first 8 batches.
        forward: ``forward(model, batch)`` for batches of any other kind.
        logits: True for norms behind the last layers too.
        affine: False for norms without gamma and beta.
        eps, momentum: of the norms.

    Raises:
        ConfigError: an unknown placement, statistics or kind of layers, ``every`` under 1, options
            that contradict each other, or norms that cannot hand on what they are given (without
            gamma and beta, or without running statistics) with ``calibrate``.
        ShapeError: a batch has another image size than norms that own places.
        SurgeryError: the model has norms already, cannot be traced, has layers whose channels are
            not the second axis, or has no such place; the data does not fit, or the copy's outputs
            differ. Errors of the network and the loader come through as they are.
    """
    wide, dense = _statistics(pattern, statistics, dense_statistics)
    if calibrate is not None and not affine:
        raise ConfigError(
            "calibrate= keeps what the network computes by gamma and beta; leave out affine=False"
        )
    if calibrate is None and forward is not None:
        raise ConfigError("forward= runs the batches of calibrate=, but there are none; give both")
    data = None if calibrate is None else Data(calibrate)
    traced = trace(model, example)
    found, left = places(traced, placement, layers=layers, every=every, where=where, logits=logits)
    slots: list[Slot] = []
    for place in found:
        shape = shape_of(place.value)
        chosen = wide if len(shape) > 2 else dense
        norm = _build(chosen, shape, affine, eps, momentum)
        if calibrate is not None and norm.running_mean is None:
            raise ConfigError(
                f"calibrate= cannot keep what the network computes with statistics '{chosen}': "
                "each sample is normalized by its own; choose statistics over the batch"
            )
        slots.append(insert(traced, place, norm, example))
    return finished(model, traced, example, slots, left, data, forward)


def _statistics(pattern: str | None, statistics: str | None, dense: str | None) -> tuple[str, str]:
    """What is asked for, for images and for dense values."""
    if pattern is not None and statistics not in (None, pattern):
        raise ConfigError(
            f"pattern='{pattern}' and statistics='{statistics}' contradict each other; give one"
        )
    if pattern is not None and "->" not in pattern:
        raise ConfigError(
            f"pattern='{pattern}' has no '->'; write one such as 'n c h w -> c', or give "
            "statistics= a name"
        )
    chosen = pattern or statistics or "spatial"
    if dense is None:
        dense = "layer" if chosen == "layer" else "spatial"
        if _is_for_dense(chosen):
            dense = chosen
    return chosen, dense


def _is_for_dense(chosen: str) -> bool:
    try:
        axes = parse(chosen).axes
    except PatternError:
        return False  # a name, or a pattern that is refused where it is used
    return len(axes) == 2 and ("...",) not in axes


class Slot(NamedTuple):
    """A norm that was put in: its name, its node, and its place in words."""

    name: str
    node: fx.Node
    place: str


def insert(
    traced: fx.GraphModule, place: Place, norm: nn.Module, example: Any, name: str | None = None
) -> Slot:
    """Adds the norm to the network, and hands its output to the users of the place.

    The norm gets the mode of the network, the device of the example and the values' type, but
    float32 at least. Its name is ``name``, or made of the place's.
    """
    said, dtype = str(place), place.value.meta["tensor_meta"].dtype
    home = next(t.device for t in tensors_in(example))
    norm.to(home, torch.promote_types(dtype, torch.float32)).train(traced.training)
    path = add_module(traced, name or place.base, norm)
    return Slot(path, hand_over(place, path), said)


def finished(
    model: nn.Module,
    traced: fx.GraphModule,
    example: Any,
    slots: Sequence[Slot],
    left: Left,
    data: Data | None,
    forward: Forward,
    *,
    identity: bool = False,
) -> tuple[fx.GraphModule, Introduced]:
    """The network with its new norms set, their redundant biases gone, and the proof.

    Args:
        model: the network as it was.
        traced: its copy with the norms of ``slots``; it is edited.
        example, left, forward: as in `introduce`.
        data: to calibrate with; None for none.
        identity: without data, norms that hand on what they are given, with statistics of nothing.

    Raises:
        SurgeryError: the data does not fit, or the networks differ.
    """
    traced.graph.lint()
    traced.recompile()
    measured = Measured({}, 0)
    if data is not None:
        measured = measure(traced, [slot.name for slot in slots], data, forward)
    biases = _drop_biases(traced, {slot.node for slot in slots})
    norms = tuple((s.name, f"{traced.get_submodule(s.name)} on the {s.place}") for s in slots)
    dropped = tuple(biases)
    if data is None and not identity:
        return traced, Introduced(norms, dropped, tuple(left))
    values = {slot.name: _values(slot, measured, biases) for slot in slots}
    settle(traced, values)
    proof = prove(copied(model), traced, example, () if data is None else data, forward, values)
    return traced, Introduced(
        norms,
        dropped,
        tuple(left),
        None if data is None else measured.batches,
        proof.difference.absolute,
        proof.difference.scale,
        proof.budget,
        proof.exact,
        placeholders=data is None,
    )


def _values(slot: Slot, measured: Measured, biases: dict[str, Tensor]) -> Values:
    """What to write into a norm: what was measured, or mean 0 and variance 1."""
    norm: Any = module_of(slot.node)
    before = slot.node.all_input_nodes[0]
    nothing = torch.zeros(norm.running_mean.shape, dtype=torch.float64)
    bias = biases.get(str(before.target)) if before.op == "call_module" else None
    shift = nothing if bias is None else owned(norm, bias, shape_of(before))
    if slot.name not in measured.norms:
        return Values(nothing, nothing + 1, shift, 0)
    moments, calls = measured.norms[slot.name]
    return Values(moments.mean, moments.m2 / (moments.n - 1), shift, calls)


def _drop_biases(traced: fx.GraphModule, norms: set[fx.Node]) -> dict[str, Tensor]:
    """Drops each bias that new norms subtract again at every call of its layer; says by layer."""
    calls: dict[str, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module" and is_layer(node):
            calls.setdefault(str(node.target), []).append(node)
        elif node.op == "get_attr":  # a weight or a bias that is used in another way, too
            calls.setdefault(str(node.target).rpartition(".")[0], []).append(node)
    dropped: dict[str, Tensor] = {}
    for name, nodes in calls.items():
        layer = traced.get_submodule(name)
        bias = layer._parameters.get("bias")
        if bias is None or layer._forward_hooks:  # a hook may make of the output what it likes
            continue
        if all(_bias_is_subtracted(node, norms) for node in nodes):
            layer.register_parameter("bias", None)
            dropped[name] = bias
    return dropped


def _bias_is_subtracted(value: fx.Node, norms: set[fx.Node]) -> bool:
    """True if the value goes into one of the norms and nothing else, by a mean per channel."""
    users = list(value.users)
    norm = module_of(users[0]) if len(users) == 1 and users[0] in norms else None
    if norm is None or not is_layer(value):
        return False
    if not isinstance(norm, Norm):
        return True
    return set(norm.spec.axes[1]) <= {name for group in norm.spec.owners for name in group}


def spatial(shape: tuple[int, ...], eps: float, momentum: float, affine: bool = True) -> nn.Module:
    """A fresh norm with one mean and variance per channel, of torch's class for the rank.

    Raises:
        SurgeryError: the shape has no channels.
    """
    if len(shape) not in _SPATIAL:
        raise SurgeryError(f"a value of shape {shape} has no batch and channel axes to normalize")
    return _SPATIAL[len(shape)](shape[1], eps, momentum, affine)


def _build(
    statistics: str, shape: tuple[int, ...], affine: bool, eps: float, momentum: float
) -> nn.Module:
    """A fresh norm for a value of that shape."""
    fresh = spatial(shape, eps, momentum, affine)
    if statistics == "spatial":
        return fresh
    rank, axes = len(shape), _NAMES[len(shape)]
    pattern, affine_axes = statistics, DEFAULT
    if statistics == "per-activation":
        return PerActivationBatchNorm(shape[1:], eps, momentum, affine)
    if statistics == "per-location" and rank > 2:
        pattern = f"{axes} -> {axes[4:]}"
    elif statistics == "layer":
        pattern, affine_axes = f"{axes} -> n", "c"
    elif "->" not in statistics:
        names = ", ".join(STATISTICS)
        raise ConfigError(
            f"unknown statistics '{statistics}' for a value of shape {shape}; choose one of "
            f"{names}, or write a pattern such as 'n c h w -> c'"
        )
    chosen = affine_axes if affine else None
    try:
        bound = parse(pattern, chosen).bind(shape)
        sizes: dict[str, Any] = dict(zip(bound.names, bound.shape, strict=True))
        fixed = {name: sizes[name] for name in parse(pattern, chosen).fixed if name in sizes}
        return Norm(pattern, chosen, eps=eps, momentum=momentum, **fixed)
    except (PatternError, ShapeError) as error:
        raise ConfigError(f"{error} (asked for on a value of shape {shape})") from error
