"""Finding what follows a batch norm: an activation, or an add and an activation.

A match is a norm that is called once, at one place, and whose output goes to that one activation or
sum and nowhere else. What looks like one and cannot be proved is left, with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from ...nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..fused import MODULES, Activation, activation_called, activation_of
from ..graph import overwrites
from .blocks import Blocks, has_hooks
from .own_forward import is_sequential
from .written import written_pairs

__all__ = ["OURS", "Match", "find", "find_written"]

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
"""Torch's classes and what takes their place."""

_KNOWN_NORMS = (*OURS, *OURS.values())
_SUMS = (operator.add, operator.iadd, torch.add)
_FRESH = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    *_KNOWN_NORMS,
)  # fmt: skip
"""Classes that leave their input as it is, give a tensor of their own and draw no numbers."""


@dataclass(frozen=True)
class Match:
    """A norm and what it takes over.

    ``block`` is the path of the module whose forward shows it, ``norm`` the norm's path. There,
    ``call`` calls the norm, or the first of ``chain``: modules inside of each other that end in the
    norm. ``add`` is the sum, if there is one, and ``act`` the activation.
    """

    block: str
    norm: str
    chain: tuple[str, ...]
    call: fx.Node
    add: fx.Node | None
    act: fx.Node
    activation: Activation


@dataclass(frozen=True)
class _Found:
    """The norm behind a value, or why it can take nothing over."""

    module: nn.Module
    chain: tuple[nn.Module, ...]
    problem: str | None


def find(blocks: Blocks) -> tuple[list[Match], dict[str, str]]:
    """All matches, and for each norm that is followed by an activation but stays alone, why."""
    matches: list[Match] = []
    reasons: dict[str, str] = {}
    for block, graph in blocks.graphs.items():
        for act in graph.nodes:
            activation = activation_called(act, blocks.called(block, act))
            value = _argument(act)
            if activation is None or value is None:
                continue
            problem = _activation_problem(blocks, block, act)
            add = value if _is_sum(value) else None
            for call in _candidates(blocks, block, value):
                found = _norm_of(blocks, block, call)
                why = problem or found.problem or _place_problem(blocks, block, call, found, add)
                if why is None:
                    why = _only_used_by(value, act)
                norm = blocks.paths[found.module]
                if why is not None:
                    reasons[norm] = why
                    continue
                chain = tuple(blocks.paths[module] for module in found.chain)
                matches.append(Match(block, norm, chain, call, add, act, activation))
                break
    matched = {match.norm for match in matches}
    return matches, {norm: why for norm, why in reasons.items() if norm not in matched}


def find_written(blocks: Blocks) -> Iterator[tuple[nn.Module, nn.Module, Activation]]:
    """Norms and activations of modules without a graph whose text shows them as a pair."""
    for path in blocks.unread:
        block = blocks.model.get_submodule(path)
        for names in written_pairs(block):
            act, norm = (block._modules.get(name) for name in names)
            if act is None or norm is None or type(norm) not in _KNOWN_NORMS:
                continue
            activation = activation_of(act)
            alone = all(
                blocks.unsure.get(module) == [path]
                and not blocks.calls_of(module)
                and not has_hooks(module)
                and "forward" not in vars(module)
                for module in (act, norm)
            )
            if activation is not None and alone and getattr(norm, "activation", None) is None:
                yield norm, act, activation


def _argument(node: fx.Node) -> fx.Node | None:
    """The first input of a node if it is a value."""
    value = node.args[0] if node.args else node.kwargs.get("input")
    return value if isinstance(value, fx.Node) else None


def _activation_problem(blocks: Blocks, block: str, act: fx.Node) -> str | None:
    module = blocks.called(block, act)
    if module is None:
        return None
    path = blocks.paths[module]
    if "forward" in vars(module):
        return f"the forward of '{path}' behind it was replaced on the object"
    if has_hooks(module):
        return f"'{path}' behind it has hooks, which would see something else"
    return None


def _is_sum(node: fx.Node) -> bool:
    """True for the sum of two different values."""
    called = node.op == "call_function" and node.target in _SUMS
    if not called and not (node.op == "call_method" and node.target in ("add", "add_")):
        return False
    if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1 or set(node.kwargs) - {"alpha"}:
        return False
    return all(isinstance(arg, fx.Node) for arg in node.args) and node.args[0] != node.args[1]


def _candidates(blocks: Blocks, block: str, value: fx.Node) -> list[fx.Node]:
    """The calls of norms behind a value, the best to take the rest over first.

    Of two summands that are norms, that is the one which the block itself calls, for a norm at the
    end of a Sequential must have its residual passed through; else the one that comes later.
    """
    if not _is_sum(value):
        return [value] if _ends_in_norm(blocks, block, value) else []
    order = {node: place for place, node in enumerate(value.graph.nodes)}
    summands = [arg for arg in value.args if isinstance(arg, fx.Node)]
    if value.target in (operator.iadd, "add_"):
        summands = summands[:1]  # the other way round the sum overwrites what others may hold
    found = [arg for arg in summands if _ends_in_norm(blocks, block, arg)]
    return sorted(found, key=lambda n: (len(_norm_of(blocks, block, n).chain), -order[n]))


def _ends_in_norm(blocks: Blocks, block: str, node: fx.Node) -> bool:
    return type(_norm_of(blocks, block, node).module) in _KNOWN_NORMS


def _norm_of(blocks: Blocks, block: str, call: fx.Node) -> _Found:
    """The norm whose output a call gives, through the ends of the modules that it calls."""
    module = blocks.called(block, call)
    if module is None:
        return _Found(blocks.model, (), "it is no module")
    chain: list[nn.Module] = []
    while type(module) not in _KNOWN_NORMS:
        inner = blocks.result_of(module)
        if inner is None or inner in chain:
            return _Found(module, (), "it is no norm")
        chain.append(module)
        module = inner
    return _Found(module, tuple(chain), _norm_problem(blocks, (*chain, module)))


def _norm_problem(blocks: Blocks, modules: Iterable[nn.Module]) -> str | None:
    """Why a norm, or a module that ends in it, must give what it gives."""
    for module in modules:
        path = blocks.paths[module]
        if module in blocks.unsure:
            return f"'{path}' may be called by a forward that cannot be followed"
        if len(blocks.calls_of(module)) > 1:
            return f"'{path}' is called at more than one place"
        if has_hooks(module):
            return f"'{path}' has hooks, which would see something else"
        if "forward" in vars(module):
            return f"the forward of '{path}' was replaced on the object"
        if getattr(module, "activation", None) is not None and type(module) in _KNOWN_NORMS:
            return f"'{path}' has an activation already"
    return None


def _place_problem(
    blocks: Blocks, block: str, call: fx.Node, found: _Found, add: fx.Node | None
) -> str | None:
    """Why the norm cannot take over what is behind it there, or None."""
    if found.chain and isinstance(blocks.model.get_submodule(block), fx.GraphModule):
        return f"it is inside of '{blocks.paths[found.chain[0]]}', which a GraphModule calls"
    problem = _only_used_by(call, add) if add is not None else None
    if problem is not None or add is None:
        return problem
    if len(call.args) != 1 or call.kwargs:
        return "it is called with more than its input"
    for module in found.chain:
        if not is_sequential(module):
            return f"it is inside of '{blocks.paths[module]}', which takes no residual"
    if not _may_move(blocks, block, call, found, add):
        return f"'{add.name}' comes later, and its input may have changed by then"
    (other,) = (arg for arg in add.args if isinstance(arg, fx.Node) and arg is not call)
    if any(_overwrites(blocks, block, user) for user in other.users if user is not add):
        return f"'{other.name}' is overwritten, and the norm's backward needs it as it was"
    return None


def _overwrites(blocks: Blocks, block: str, node: fx.Node) -> bool:
    """True if a node may change its first input in place."""
    module = blocks.called(block, node)
    if module is None:
        return overwrites(node)
    return not _leaves_input(module) and _changes_in_place(module)


def _changes_in_place(module: nn.Module) -> bool:
    """True if anything in a module says that it works in place."""
    return any(getattr(inner, "inplace", False) for inner in module.modules())


def _only_used_by(value: fx.Node, user: fx.Node) -> str | None:
    others = [node.name for node in value.users if node is not user]
    if not others:
        return None
    what = "the sum" if _is_sum(value) else "its output"
    return f"{what} is also used by {', '.join(others)}"


def _may_move(blocks: Blocks, block: str, call: fx.Node, found: _Found, add: fx.Node) -> bool:
    """True if the call can wait until the sum: nothing on the way changes its input."""
    nodes = list(add.graph.nodes)
    between = nodes[nodes.index(call) + 1 : nodes.index(add)]
    source = _argument(call)
    if not between or source is None:
        return not between
    if not found.chain and type(blocks.called(block, source)) in _FRESH:
        return len(source.users) == 1
    if found.chain and not _draws_nothing(found.chain[0]):
        return False
    first = [] if not found.chain else [found.chain[0]]
    passed = [blocks.called(block, node) for node in between]
    return all(module is not None and _leaves_input(module) for module in (*first, *passed))


def _draws_nothing(module: nn.Module) -> bool:
    """True if a module and all in it are known to give the same at any time."""
    known = (*_FRESH, *MODULES, nn.Identity, nn.Flatten)
    return all(is_sequential(inner) or type(inner) in known for inner in module.modules())


def _leaves_input(module: nn.Module) -> bool:
    """True if a module is known not to change its input in place."""
    if is_sequential(module):
        for inner in module.children():
            if not _leaves_input(inner):
                return False
            if type(inner) in _FRESH:
                return True
        return True
    if type(module) in MODULES:
        return not getattr(module, "inplace", False)
    return type(module) in (*_FRESH, nn.Identity)
