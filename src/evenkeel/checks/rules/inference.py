"""What is called in training and in inference, and in which mode."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from ..observe import Observation
from ..walk import before, kind, nodes_of, norm_calls, path_of, shown, target
from .base import Found

__all__ = [
    "batch_statistics_at_inference",
    "eval_in_training",
    "frozen_but_moving",
    "never_called",
    "skipped_at_inference",
    "training_in_eval",
]


def never_called(seen: Observation) -> Iterator[Found]:
    """A batch norm that is held and that no forward calls."""
    called = norm_calls(seen.trains).keys() | norm_calls(seen.infers).keys()
    for path, facts in seen.norms.items():
        if facts.batch and not facts.fixed and path not in called:
            size = 0 if facts.mean is None else facts.mean.numel()
            message = f"{size} channels, called neither in training nor in inference"
            yield Found(path, size, message)


def skipped_at_inference(seen: Observation) -> Iterator[Found]:
    """A batch norm that is called in one mode alone, though the layers around it are in both."""
    trains, infers = norm_calls(seen.trains), norm_calls(seen.infers)
    for calls, others, graph, modes in (
        (trains, infers, seen.infers, ("training", "inference")),
        (infers, trains, seen.trains, ("inference", "training")),
    ):
        there = {node.target for node in nodes_of(graph) if node.op == "call_module"}
        for path, nodes in calls.items():
            facts = seen.norms.get(path)
            if path in others or facts is None or not facts.batch:
                continue
            around = [n for node in nodes for n in _layers_around(node) if n.target in there]
            if around:
                yield Found(
                    path,
                    len(nodes),
                    f"called in {modes[0]} and not in {modes[1]}, though {shown(around[0])} is",
                )


def batch_statistics_at_inference(seen: Observation) -> Iterator[Found]:
    """A batch norm that normalizes with the batch it is given, in inference too."""
    told: set[str] = set()
    for node in nodes_of(seen.infers):
        path = path_of(node)
        facts = None if path is None else seen.norms.get(path)
        name = shown(node)
        if kind(node) != "norm" or name in told:
            continue
        by_batch = bool(node.meta.get("training", False))
        why = "it is called with training=True"
        if facts is not None:
            has_none = facts.mean is None or facts.var is None
            by_batch = facts.batch and not facts.unread and (has_none or by_batch)
            why = "it keeps no running statistics" if has_none else "eval() leaves it in training"
        elif getattr(node.target, "__name__", "") != "batch_norm":
            continue
        if not by_batch:
            continue
        told.add(name)
        shape = node.meta.get("input") or (0,)
        yield Found(target(node), shape[0], f"{why}, so an answer depends on the batch it comes in")


def eval_in_training(seen: Observation) -> Iterator[Found]:
    """A batch norm in eval mode in a network that trains."""
    if not seen.training:
        return
    for facts in seen.batch_norms:
        learns = bool(facts.learns)
        if not facts.training and facts.remembers and (learns or not facts.fixed):
            rest = "gamma and beta learn all the same" if learns else "gamma and beta do not learn"
            count = facts.count or 0
            yield Found(
                facts.path,
                count,
                f"keeps the statistics of {count} batches while the network trains; {rest}",
                "warning" if learns and not facts.fixed else "note",
            )


def training_in_eval(seen: Observation) -> Iterator[Found]:
    """A batch norm in training mode in a network in eval mode."""
    if seen.training:
        return
    for facts in seen.batch_norms:
        if facts.training and facts.remembers:
            momentum = 0.0 if facts.momentum is None else facts.momentum
            moves = f", each of which moves them by {momentum:g}" if facts.tracks else ""
            message = f"normalizes with the statistics of the batches it gets{moves}"
            yield Found(facts.path, momentum, message)


def frozen_but_moving(seen: Observation) -> Iterator[Found]:
    """Gamma and beta take no gradient, but a forward in training still moves the statistics."""
    if not seen.training:
        return
    for facts in seen.batch_norms:
        if facts.learns is False and facts.moves and facts.momentum != 0:
            momentum = facts.momentum
            shown = "1/n" if momentum is None else f"{momentum:g}"
            yield Found(
                facts.path,
                momentum or 0.0,
                f"gamma and beta are frozen, and every batch moves the statistics by {shown}",
            )


def _layers_around(node: fx.Node) -> Iterator[fx.Node]:
    """The layers straight before and behind a norm, past what has no weights."""
    passing = ("shape", "activation", "pooling", "dropout", "norm", "other")
    for each in before(node, passing):
        if kind(each) == "layer":
            yield each
    way, seen = list(node.users), set[fx.Node]()
    while way:
        user = way.pop()
        if user in seen:
            continue
        seen.add(user)
        if kind(user) == "layer":
            yield user
        elif kind(user) in passing:
            way += user.users
