"""Where norms stand: rules on what is called before and behind them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import fx, nn

from ...surgery.accelerating.blocks import has_hooks
from ...surgery.graph import module_of
from ..facts import NormFacts
from ..measure import Moments, shift_between
from ..observe import Observation
from ..walk import (
    before,
    channels_are_second,
    kind,
    layer_bias,
    nodes_of,
    norm_calls,
    path_of,
    shown,
    source,
    target,
)
from .base import Found

__all__ = [
    "Redundant",
    "bias_before_norm",
    "dropout_before_norm",
    "fixed_size",
    "norm_after_norm",
    "norm_on_logits",
    "redundant_biases",
    "reused",
]

_ENOUGH = 32
"""Values per owner from which on the variances of two runs are compared."""
_SHIFTED = 1.3
"""How much dropout may change a variance: at inference the norm then gives 0.88 of what it gave."""
_APART = 0.5
_KNOWN_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


@dataclass(frozen=True)
class Redundant:
    """A bias that a norm subtracts again.

    ``layer`` is a path, ``name`` for sentences. ``safe`` if the norm's running mean can take it in:
    then nothing changes but its absence.
    """

    layer: str
    name: str
    norm: str
    size: int
    largest: float
    safe: bool


def redundant_biases(seen: Observation) -> Iterator[Redundant]:
    """Every layer whose bias goes into one norm and nowhere else, at every call."""
    if seen.trains is None:
        return
    calls: dict[Any, list[fx.Node]] = {}
    for node in seen.trains.nodes:
        if kind(node) == "layer" and layer_bias(node) is not None:
            key = node.target if node.op == "call_module" else node
            calls.setdefault(key, []).append(node)
    for nodes in calls.values():
        norms = [_subtracting(seen, node) for node in nodes]
        if all(norm is not None for norm in norms):
            first, bias = nodes[0], layer_bias(nodes[0])
            norm = norms[0] or ""
            yield Redundant(
                target(first),
                shown(first),
                norm,
                getattr(bias, "numel", int)(),
                _largest(bias),
                _is_absorbed_safely(seen, nodes, norm),
            )


def bias_before_norm(seen: Observation) -> Iterator[Found]:
    """A bias whose layer's output goes straight into a norm that subtracts its mean."""
    for found in redundant_biases(seen):
        message = (
            f"{found.size} biases of {found.name}, the largest {found.largest:.3g}, are "
            f"subtracted again by {found.norm or 'the norm behind it'}"
        )
        yield Found(found.layer, found.size, message, fixable=found.safe)


def norm_on_logits(seen: Observation) -> Iterator[Found]:
    """A batch norm on a layer's output that is, but for softmax, the network's."""
    outputs = [node for node in nodes_of(seen.infers) if node.op == "output"]
    values = [value for output in outputs for value in output.all_input_nodes]
    for value in values:
        if len(values) > 1 and len(value.meta.get("shape", ())) > 2:
            continue  # maps of several scales are features
        passing = ("shape", "answer", "dropout", "pooling")
        node = value if kind(value) not in passing else source(value, passing)
        if node is None or not _is_batch_norm(seen, node, plain=True):
            continue
        layer = source(node)
        if layer is not None and kind(layer) == "layer":
            count = _owners(seen, node)
            yield Found(
                target(node),
                count,
                f"the network's {count} outputs are those of {shown(layer)}, normalized",
            )


def norm_after_norm(seen: Observation) -> Iterator[Found]:
    """A batch norm on what another batch norm gives, with nothing that computes between them."""
    for node in nodes_of(seen.trains):
        if not _is_batch_norm(seen, node):
            continue
        way = list(before(node, ("shape", "dropout")))
        first = way[-1] if way else None
        if first is None or not _is_batch_norm(seen, first, plain=True):
            continue
        if any(len(each.users) > 1 for each in way):
            continue  # what else uses it makes the second norm a branch
        shapes = first.meta.get("shape"), node.meta.get("input")
        if None in shapes or shapes[0] == shapes[1]:
            count = _owners(seen, node)
            yield Found(
                target(node), count, f"normalizes {count} channels that {shown(first)} just did"
            )


def dropout_before_norm(seen: Observation) -> Iterator[Found]:
    """An active dropout on the way into a batch norm; measured where there is a run."""
    told: set[str] = set()
    for node in nodes_of(seen.trains):
        if not _is_batch_norm(seen, node) or target(node) in told:
            continue
        way = list(before(node, ("shape", "activation", "layer", "pooling", "dropout")))
        rates = [(place, _rate(n)) for place, n in enumerate(way) if kind(n) == "dropout"]
        active = [(place, rate) for place, rate in rates if 0 < rate < 1]
        if not active:
            continue
        told.add(target(node))
        place, rate = active[0]
        is_direct = all(kind(n) != "layer" for n in way[:place])
        ratio = _variance_ratio(seen, node)
        if ratio is None:
            severity = "warning" if is_direct and rate >= 0.2 else "note"
            factor = 1 / (1 - rate)
            text = f"variance in training about {factor:.2f} times that of inference, by its rate"
        else:
            severity = "warning" if max(ratio, 1 / ratio) >= _SHIFTED else "note"
            factor = ratio
            text = f"variance in training {ratio:.2f} times that of inference, measured"
        where = "straight before it" if is_direct else "before the layer before it"
        message = f"{shown(way[place])} drops {rate:g} {where}: {text}"
        yield Found(target(node), factor, message, severity)


def reused(seen: Observation) -> Iterator[Found]:
    """One batch norm that a forward calls at several places."""
    for path, nodes in norm_calls(seen.trains).items():
        facts = seen.norms.get(path)
        if facts is None or not facts.batch or len(nodes) < 2:
            continue
        parts = [n.meta.get("seen") for n in nodes]
        known = [m for m in parts if isinstance(m, Moments) and m.n >= _ENOUGH]
        if len(known) == len(nodes):
            apart = max(shift_between(known[0], other) for other in known[1:])
            severity = "warning" if apart > _APART else "note"
            text = f"what it sees there is up to {apart:.2f} deviations apart"
        else:
            layers = {shown(s) for n in nodes if (s := source(n)) is not None}
            severity = "warning" if len(layers) > 1 else "note"
            text = f"behind {', '.join(sorted(layers)) or 'the input'}"
        yield Found(path, len(nodes), f"called {len(nodes)} times in one forward; {text}", severity)


def fixed_size(seen: Observation) -> Iterator[Found]:
    """Statistics for every place of an image: a pattern that says so, or a norm behind flatten."""
    for path, facts in seen.norms.items():
        spec = facts.spec
        if facts.batch and spec is not None and len(spec.axes) > 2:
            owned = {name for group in spec.owners for name in group} - set(spec.axes[1])
            places = [facts.sizes[name] for name in facts.sizes if name in owned]
            if places:
                yield _fixed(path, places, f"'{spec}'")
    for node in nodes_of(seen.trains):
        given = node.all_input_nodes[0] if node.all_input_nodes else None
        if not _is_batch_norm(seen, node) or given is None or kind(given) != "shape":
            continue
        whole, flat = given.meta.get("input"), node.meta.get("input")
        if not whole or not flat or not len(flat) == 2 < len(whole):
            continue
        if flat[1] == _product(whole[1:]) and _product(whole[2:]) > 1:
            yield _fixed(target(node), list(whole[2:]), "a norm behind flatten")


def _fixed(path: str, places: list[int], what: str) -> Found:
    size = "x".join(map(str, places))
    message = f"{what} has statistics for each of {_product(places)} places, so images stay {size}"
    return Found(path, _product(places), message)


def _facts(seen: Observation, node: fx.Node) -> NormFacts | None:
    return seen.norms.get(path_of(node) or "") if path_of(node) is not None else None


def _is_batch_norm(seen: Observation, node: fx.Node, plain: bool = False) -> bool:
    """A batch norm, as a module or F.batch_norm; ``plain`` if it must do nothing more."""
    facts = _facts(seen, node)
    if facts is not None:
        return facts.batch and (facts.plain or not plain)
    return kind(node) == "norm" and getattr(node.target, "__name__", "") == "batch_norm"


def _subtracting(seen: Observation, node: fx.Node) -> str | None:
    """The norm that takes a layer's output, alone, and subtracts a mean for each channel."""
    users = list(node.users)
    if len(users) != 1 or kind(users[0]) != "norm" or not channels_are_second(node):
        return None
    norm = users[0]
    if norm.all_input_nodes[0] is not node:
        return None
    facts = _facts(seen, norm)
    if facts is None:
        return "" if _is_batch_norm(seen, norm) else None
    if facts.spec is None:
        return None
    owned = {name for group in facts.spec.owners for name in group}
    return facts.path if set(facts.spec.axes[1]) <= owned else None


def _is_absorbed_safely(seen: Observation, nodes: list[fx.Node], path: str) -> bool:
    """True if the running mean can take the bias: both are called once, and are what they say."""
    facts, layer = seen.norms.get(path), module_of(nodes[0])
    graphs = (seen.trains, seen.infers)
    if facts is None or layer is None or len(nodes) != 1 or None in graphs or not seen.ran:
        return False
    norm: Any = seen.trains.owning_module.get_submodule(path)  # type: ignore[union-attr]
    for graph in graphs:
        called = [n for n in nodes_of(graph) if n.target == nodes[0].target]
        norms = norm_calls(graph).get(path, []) if graph is not None else []
        if len(called) != 1 or len(norms) != 1 or list(called[0].users) != norms:
            return False
    bias = layer.bias
    holders = [
        p
        for p in seen.trains.owning_module.named_parameters(remove_duplicate=False)  # type: ignore[union-attr]
        if p[1] is bias
    ]
    return (
        facts.plain
        and facts.spec is not None
        and len(facts.spec.axes[1]) == 1
        and facts.remembers
        and type(layer) in _KNOWN_LAYERS
        and len(holders) == 1
        and not (has_hooks(layer) or has_hooks(norm))
    )


def _owners(seen: Observation, node: fx.Node) -> int:
    facts = _facts(seen, node)
    for vector in () if facts is None else (facts.mean, facts.weight):
        if vector is not None:
            return vector.numel()
    shape = node.meta.get("shape") or (0, 0)
    return int(shape[1])


def _rate(node: fx.Node) -> float:
    """The share that a dropout drops in the run that the graph is of; 0 if it is off."""
    module = module_of(node)
    rate = node.meta.get("p", 0.0) if module is None else getattr(module, "p", 0.0)
    return float(rate) if node.meta.get("training", True) else 0.0


def _variance_ratio(seen: Observation, node: fx.Node) -> float | None:
    """The median over owners of a norm's variance with dropout, over the one without."""
    noisy, quiet = node.meta.get("seen"), seen.quiet.get(str(node.target))
    if not isinstance(noisy, Moments) or quiet is None or min(noisy.n, quiet.n) < _ENOUGH:
        return None
    pairs = zip(noisy.m2.tolist(), quiet.m2.tolist(), strict=True)
    ratios = [a / b for a, b in pairs if a > 0 and b > 0]
    return median(ratios) if ratios else None


def _largest(bias: Any) -> float:
    return float(bias.detach().abs().max()) if bias.numel() and not bias.is_meta else 0.0


def _product(sizes: Any) -> int:
    product = 1
    for size in sizes:
        product *= int(size)
    return product
