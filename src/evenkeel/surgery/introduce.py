"""Putting batch norm into a network that has none, at any place that people ask about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ConfigError, PatternError, ShapeError, SurgeryError
from ..nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Norm, PerActivationBatchNorm
from ..pattern import DEFAULT, parse
from .graph import (
    add_module,
    is_activation,
    is_layer,
    is_norm,
    is_pooling,
    module_of,
    name_of,
    rank_expected,
    shape_of,
    trace,
)

__all__ = ["LAYER_KINDS", "PLACEMENTS", "STATISTICS", "Introduced", "introduce"]

PLACEMENTS = {
    "before-activation": "on the output of each conv or dense layer but the last",
    "after-activation": "on the output of each activation",
    "on-input": "on the input of each conv or dense layer, the first one's included",
    "after-pooling": "on the output of each pooling",
    "after-addition": "on the input of each activation, so on the sum in a residual block",
}
STATISTICS = {
    "spatial": "one mean and variance per channel (cuDNN SPATIAL)",
    "per-activation": "one per activation, over the batch alone (cuDNN PER_ACTIVATION)",
    "per-location": "one per pixel, over the batch and the channels",
    "layer": "one per sample, over everything else (layer norm)",
}
LAYER_KINDS = ("all", "conv", "dense")

_NAMES = {2: "n c", 3: "n c l", 4: "n c h w", 5: "n c d h w"}
_SPATIAL = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}


@dataclass(frozen=True)
class Introduced:
    """What was done: each norm with its place, and the biases that it made redundant."""

    norms: tuple[tuple[str, str], ...]
    dropped_biases: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.norms)} norms introduced"]
        lines += [f"  {name}: {what}" for name, what in self.norms]
        if self.dropped_biases:
            lines.append(f"  redundant biases dropped: {', '.join(self.dropped_biases)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def introduce(
    model: nn.Module,
    example: Tensor,
    placement: str = "before-activation",
    *,
    statistics: str = "spatial",
    dense_statistics: str | None = None,
    layers: str = "all",
    every: int = 1,
    affine: bool = True,
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> tuple[fx.GraphModule, Introduced]:
    """A copy of the network with fresh norms in it; the given model is not touched.

    A bias of a layer whose output goes straight into a norm that subtracts it is dropped. No norm
    goes behind the last layer of any branch, whose output is the logits.

    Args:
        model: a network without norms that torch.fx can trace.
        example: an input batch; only its shape matters.
        placement: one of `PLACEMENTS`.
        statistics: one of `STATISTICS`, or a pattern such as ``'n c h w -> c w'``.
        dense_statistics: the same for (n, c) values; by default 'spatial', or 'layer' with 'layer'.
        layers: 'all', 'conv' or 'dense': where norms may go.
        every: 1 for every place, 2 for every other one, beginning with the first.
        affine: False for norms without gamma and beta.
        eps, momentum: of the norms.

    Raises:
        ConfigError: an unknown placement, statistics or kind of layers, or ``every`` under 1.
        SurgeryError: the model has norms already, cannot be traced, has layers whose channels are
            not the second axis, or has no such place.
    """
    _check_choices(placement, layers, every)
    traced = trace(model, example)
    _check_network(traced, type(model).__name__)
    places = [p for p in _places(traced, placement) if layers in ("all", _kind(p[0]))][::every]
    if not places:
        raise SurgeryError(
            f"{type(model).__name__} has no place for '{placement}' on {layers} layers; "
            f"'{placement}' goes {PLACEMENTS[placement]}"
        )
    dense = dense_statistics or ("layer" if statistics == "layer" else "spatial")
    norms: list[tuple[str, str]] = []
    for value, user in places:
        shape = shape_of(value)
        chosen = statistics if len(shape) > 2 else dense
        norm = _build(chosen, shape, affine, eps, momentum)
        wide = torch.promote_types(value.meta["tensor_meta"].dtype, torch.float32)
        norm.to(example.device, wide).train(traced.training)
        name = _insert(traced, value, user, norm)
        norms.append((name, f"{norm} on the {_role(value, user)}"))
    dropped = _drop_biases(traced)
    traced.graph.lint()
    traced.recompile()
    return traced, Introduced(tuple(norms), dropped)


def _check_choices(placement: str, layers: str, every: int) -> None:
    for what, chosen, choices in (
        ("placement", placement, PLACEMENTS),
        ("layers", layers, LAYER_KINDS),
    ):
        if chosen not in choices:
            raise ConfigError(f"unknown {what} '{chosen}'; choose one of {', '.join(choices)}")
    if every < 1:
        raise ConfigError(f"every is {every}; give 1 for every place, 2 for every other one")


def _check_network(traced: fx.GraphModule, kind: str) -> None:
    """Refuses a network whose places or channels cannot be told for sure."""
    found = [name_of(node) for node in traced.graph.nodes if is_norm(node)]
    if found:
        raise SurgeryError(
            f"{kind} has norms already ({', '.join(found[:3])}); give the network "
            "without them, so that placements can be compared"
        )
    for node in traced.graph.nodes:
        if is_layer(node) and len(shape_of(node)) != rank_expected(node):
            raise SurgeryError(
                f"'{name_of(node)}' of {kind} gives values of shape {shape_of(node)}, whose second "
                f"axis is not its channels; {rank_expected(node)} axes, batch first, are expected"
            )


Place = tuple[fx.Node, fx.Node | None]
"""The value to normalize, and the one user that gets it normalized (None: all of them)."""


def _places(traced: fx.GraphModule, placement: str) -> Sequence[Place]:
    nodes = list(traced.graph.nodes)
    layers = [node for node in nodes if is_layer(node)]
    hidden: set[fx.Node] = set()  # what some layer comes behind; the rest are logits
    for node in reversed(nodes):
        if any(is_layer(user) or user in hidden for user in node.users):
            hidden.add(node)
    inner = [node for node in nodes if node in hidden] if layers else nodes
    of: dict[str, Callable[[], list[Place]]] = {
        "before-activation": lambda: [(node, None) for node in inner if is_layer(node)],
        "after-activation": lambda: [(node, None) for node in inner if is_activation(node)],
        "on-input": lambda: [(_input(node), node) for node in layers],
        "after-pooling": lambda: [(node, None) for node in inner if is_pooling(node)],
        "after-addition": lambda: [(_input(n), n) for n in inner if is_activation(n)],
    }
    return of[placement]()


def _input(node: fx.Node) -> fx.Node:
    value = node.args[0] if node.args else next(iter(node.kwargs.values()))
    if not isinstance(value, fx.Node):
        raise SurgeryError(f"the input of '{node.name}' is not a value of the graph")
    return value


def _kind(value: fx.Node) -> str:
    return "dense" if len(shape_of(value)) == 2 else "conv"


def _role(value: fx.Node, user: fx.Node | None) -> str:
    return f"output of {name_of(value)}" if user is None else f"input of {name_of(user)}"


def _insert(traced: fx.GraphModule, value: fx.Node, user: fx.Node | None, norm: nn.Module) -> str:
    """Adds the module behind ``value`` and hands its output to the user or to all users."""
    anchor = value if user is None else user
    base = name_of(anchor) + ("_norm" if user is None else "_input_norm")
    name = add_module(traced, base, norm)
    users = list(value.users) if user is None else [user]
    with traced.graph.inserting_after(value):
        node = traced.graph.call_module(name, (value,))
    node.meta["tensor_meta"] = value.meta["tensor_meta"]
    for each in users:
        each.replace_input_with(value, node)
    return name


def _drop_biases(traced: fx.GraphModule) -> tuple[str, ...]:
    """Drops each bias that norms subtract again at every call of its layer."""
    calls: dict[str, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module" and is_layer(node):
            calls.setdefault(str(node.target), []).append(node)
        elif node.op == "get_attr":  # a weight or a bias that is used in another way, too
            calls.setdefault(str(node.target).rpartition(".")[0], []).append(node)
    dropped: list[str] = []
    for name, nodes in calls.items():
        layer = traced.get_submodule(name)
        if layer._parameters.get("bias") is not None and all(map(_bias_is_subtracted, nodes)):
            layer.register_parameter("bias", None)
            dropped.append(name)
    return tuple(dropped)


def _bias_is_subtracted(value: fx.Node) -> bool:
    """True if the value goes into one norm and nothing else, and that has a mean per channel."""
    users = list(value.users)
    norm = module_of(users[0]) if len(users) == 1 and is_norm(users[0]) else None
    if norm is None or not is_layer(value):
        return False
    if not isinstance(norm, Norm):
        return True
    return set(norm.spec.axes[1]) <= {name for group in norm.spec.owners for name in group}


def _build(
    statistics: str, shape: tuple[int, ...], affine: bool, eps: float, momentum: float
) -> nn.Module:
    """A fresh norm for a value of that shape."""
    rank = len(shape)
    if rank not in _NAMES:
        raise SurgeryError(f"a value of shape {shape} has no batch and channel axes to normalize")
    axes = _NAMES[rank]
    pattern, affine_axes = statistics, DEFAULT
    if statistics == "spatial":
        return _SPATIAL[rank](shape[1], eps, momentum, affine)
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
