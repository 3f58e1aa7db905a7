"""Torch's batch norms in any CNN, and what follows them, swapped for ours; and back again.

The network stays what it is: the same objects with the same names, parameters, buffers, hooks and
attributes. What is swapped is swapped by changing an object's class, which holds no state:

- A norm gets our class of the same name; parameters and buffers are the same objects, so optimizers
  and state dicts do not notice. ``activation`` on it says what it has taken over.
- An activation that norms have taken over everywhere hands its input on, of a class made for it.
- A module whose forward calls functions or adds gets a class made for it, whose forward is the
  rewritten graph of its own forward, all modules in it being leaves. Only that one module is
  rewritten, not the network around it and not the modules in it. A traced copy of the whole
  network would lose its class and the hooks of every container.

So a network that cannot be traced as a whole is treated module by module without further ado, and
`restore` only gives every object the class that it had. See `remade` for why it is the class.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import fx, nn

from ..errors import SurgeryError
from .blocks import Blocks
from .comparing import Difference, compare
from .graph import copied, module_of
from .matching import OURS, Activation, Match, find, find_written
from .own_forward import is_sequential
from .remade import Remade, recipe, remake, unmake

__all__ = ["Accelerated", "accelerate", "restore"]

_HAND_ON = """\
def forward(self, input):
    return input
"""
_WITH_RESIDUAL = """\
def forward(self, input, residual=None):
    modules = list(self)
    for module in modules[:-1]:
        input = module(input)
    return modules[-1](input, residual)
"""
_WAS = "_was_before_acceleration"
"""The attribute that holds the class that a norm had. Made classes know it themselves."""


@dataclass(frozen=True)
class Accelerated:
    """What was swapped, what was left and why, and the largest differences on the example.

    ``output`` is the largest difference of outputs and running statistics, ``gradient`` that of the
    gradients of parameters and inputs, in training and inference; ``budget`` is what was allowed,
    relative to the largest value of the tensor. All three are None without an example.
    """

    swapped: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]
    output: Difference | None
    gradient: Difference | None
    budget: float | None

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} norms swapped, {len(self.left)} left as they are"]
        lines += [f"  {name}: {what}" for name, what in self.swapped]
        lines += [f"  {name}: {reason}" for name, reason in self.left]
        if self.output is None or self.gradient is None or self.budget is None:
            return "\n".join([*lines, "  not compared, for there was no example"])
        lines.append(f"  largest output difference {self.output}")
        lines.append(f"  largest gradient difference {self.gradient}")
        lines.append(f"  budget {self.budget:.0e} relative")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


M = TypeVar("M", bound=nn.Module)

_Edit = Callable[[Any], None]
_Taken = tuple[Activation, bool]
"""What a norm takes over: the activation, and whether a sum comes before it."""


@dataclass
class _Plan:
    """What to do to which module, by path."""

    edits: dict[str, _Edit] = field(default_factory=dict)
    swapped: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)


def accelerate(model: M, example: Any = None, *, inplace: bool = False) -> tuple[M, Accelerated]:
    """The network with torch's batch norms swapped for ours, and what was done.

    A norm takes over the activation behind it (ReLU, ReLU6, LeakyReLU, SiLU), or the sum and the
    activation, whether they are modules, functions, methods or in place, if its output goes nowhere
    else. State dicts keep their keys, every module its name, class (or a subclass of it), hooks and
    attributes, every parameter its identity. A forward that is rewritten keeps the path that it
    takes now: a setting that it asks for, such as ``self.stride``, is read once.

    Convert to SyncBatchNorm before: torch builds its norms anew, without what ours have taken over,
    so ours refuse.

    Args:
        model: any network.
        example: an input, a tuple of inputs or a dict of inputs by name. With one, both networks
            run it in training and in inference and are compared, which takes copies of the network.
        inplace: True to edit the given network instead of a copy.

    Returns:
        the network and the report.

    Raises:
        SurgeryError: the network is accelerated already, cannot be copied, cannot run the example,
            or would compute something else. It is as it was before.
    """
    _refuse_accelerated(model)
    plan = _planned(copied(model))
    own = copied(model)
    _carry_out(own, plan)
    output = gradient = budget = None
    if example is not None:
        output, gradient, budget = compare(model, own, example)
    if inplace:
        _carry_out(model, plan)
        own = model
    report = Accelerated(tuple(plan.swapped), tuple(plan.left), output, gradient, budget)
    return own, report


def restore(model: M, *, inplace: bool = False) -> M:
    """The network as it was before `accelerate`, with the weights that it has now.

    Args:
        model: an accelerated network; any other comes back as it is.
        inplace: True to restore the given network instead of a copy.

    Raises:
        SurgeryError: the network cannot be copied.
    """
    own = model if inplace else copied(model)
    modules = list(own.modules())
    for module in modules:
        if isinstance(module, fx.GraphModule):
            _graph_as_before(module)
    for module in modules:
        _undo(module)
    return own


def _refuse_accelerated(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, Remade) or _WAS in vars(module):
            raise SurgeryError(
                f"{type(model).__name__} is accelerated already (see '{path}'); give the network "
                "that evenkeel.restore makes of it"
            )


def _carry_out(model: nn.Module, plan: _Plan) -> None:
    """Does all edits, or none."""
    done: list[nn.Module] = []
    graphs = [(m, m.graph) for m in model.modules() if isinstance(m, fx.GraphModule)]
    try:
        for path, edit in plan.edits.items():
            done.append(model.get_submodule(path))
            edit(done[-1])
    except BaseException:
        for module in reversed(done):
            _undo(module)
        for block, graph in graphs:
            block.graph = graph
        raise


def _undo(module: nn.Module) -> None:
    """Makes one module what it was, but for a GraphModule's graph."""
    unmake(module)
    was = vars(module).pop(_WAS, None)
    if was is not None:
        module.__class__ = was
        vars(module).pop("activation", None)


def _planned(model: nn.Module) -> _Plan:
    """All that can be done; ``model`` is a scratch copy."""
    blocks, plan = Blocks(model), _Plan()
    matches, reasons = find(blocks)
    passing = _taken_over(blocks, matches)
    rewritten: dict[str, list[Match]] = {}
    taken: dict[str, _Taken] = {}
    for match in matches:
        act = blocks.called(match.block, match.act)
        stays = act is not None and act in passing
        block = model.get_submodule(match.block)
        if not stays and is_sequential(block):
            reasons[match.norm] = f"'{blocks.paths[act or block]}' is also used behind others"
            continue
        taken[match.norm] = (match.activation, match.add is not None)
        if match.add is not None or not stays:
            rewritten.setdefault(match.block, []).append(match)
        if match.add is not None:
            for path in match.chain:
                was = type(model.get_submodule(path))
                plan.edits[path] = partial(remake, recipe=recipe(was, _WITH_RESIDUAL, {}))
    for norm, act, activation in find_written(blocks):
        taken[blocks.paths[norm]] = (activation, False)
        passing.append(act)
    for act in passing:
        was = type(act)
        plan.edits[blocks.paths[act]] = partial(remake, recipe=recipe(was, _HAND_ON, {}))
    for block_path, found in rewritten.items():
        plan.edits[block_path] = _rewriting(blocks, block_path, found, passing)
    _plan_norms(blocks, plan, taken, reasons)
    return plan


def _taken_over(blocks: Blocks, matches: list[Match]) -> list[nn.Module]:
    """The activation modules of which every call is behind a norm that does their work."""
    nodes = {match.act for match in matches}
    acts = [blocks.called(match.block, match.act) for match in matches]
    return [
        act
        for act in dict.fromkeys(acts)
        if act is not None
        and act not in blocks.unsure
        and all(node in nodes for _, node in blocks.calls_of(act))
    ]


def _plan_norms(
    blocks: Blocks, plan: _Plan, taken: dict[str, _Taken], reasons: dict[str, str]
) -> None:
    for module, path in blocks.paths.items():
        kind = type(module)
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            if path in blocks.unread and blocks.reaches_norms(module):
                reason = f"its own forward stays: {blocks.unread[path]}"
                plan.left.append((path or kind.__name__, reason))
            continue
        what = taken.get(path)
        problem = _swap_problem(module)
        if problem is not None:
            plan.left.append((path, problem))
            continue
        if kind in OURS or what is not None:
            activation = None if what is None else what[0]
            plan.edits[path] = partial(_swap, ours=OURS.get(kind, kind), activation=activation)
            plan.swapped.append((path, _said(kind, what)))
        if path in reasons:
            plan.left.append((path, f"swapped alone: {reasons[path]}"))


def _swap_problem(norm: nn.Module) -> str | None:
    kind = type(norm)
    if hasattr(norm, "parametrizations"):
        return "it has parametrizations"
    if kind not in OURS and kind not in OURS.values():
        return f"it is a {kind.__name__}, which may do more than its base"
    if "forward" in vars(norm):
        return "its forward was replaced on the object"
    return None


def _said(kind: type[nn.Module], taken: _Taken | None) -> str:
    if taken is None:
        return kind.__name__
    act, adds = taken
    name = f"{act[0]} of slope {act[1]:g}" if isinstance(act, tuple) else act
    return f"{kind.__name__} with {'add and ' if adds else ''}{name}"


def _swap(norm: Any, ours: type[nn.Module], activation: Activation | None) -> None:
    vars(norm)[_WAS] = type(norm)
    norm.__class__ = ours
    if activation is not None:
        norm.activation = activation


def _rewriting(blocks: Blocks, path: str, matches: list[Match], passing: list[nn.Module]) -> _Edit:
    """The edit that gives a module the forward in which norms have taken over."""
    graph = blocks.graphs[path]
    for match in matches:
        call, add, act = match.call, match.add, match.act
        if add is not None:
            residual = next(arg for arg in add.args if arg is not call)
            with graph.inserting_before(add):
                both = graph.create_node("call_module", call.target, (call.args[0], residual))
            add.replace_all_uses_with(both)
            graph.erase_node(add)
            graph.erase_node(call)
        if blocks.called(path, act) not in passing:
            act.replace_all_uses_with(act.all_input_nodes[0])
            graph.erase_node(act)
    graph.lint()
    block = blocks.model.get_submodule(path)
    if isinstance(block, fx.GraphModule):
        return partial(_regraph, graph=graph)
    code = graph.python_code("self")
    return partial(remake, recipe=recipe(type(block), code.src, code.globals))


def _regraph(block: fx.GraphModule, graph: fx.Graph) -> None:
    # A GraphModule writes its forward anew from its graph when it is copied, so the graph changes.
    block.graph = copy.deepcopy(graph)


def _graph_as_before(block: fx.GraphModule) -> None:
    """Writes what norms have taken over into the graph again.

    A GraphModule that is copied or pickled forgets all that it does not call, so there is no place
    to keep the graph that it had.
    """
    for node in list(block.graph.nodes):
        norm: Any = module_of(node)
        activation = getattr(norm, "activation", None)
        if norm is None or _WAS not in vars(norm) or activation is None:
            continue
        users = list(node.users)
        handed_on = any(isinstance(module_of(user), Remade) for user in users)
        value = node
        if len(node.args) > 1:
            node.args, residual = node.args[:1], node.args[1]
            with block.graph.inserting_after(value):
                value = block.graph.call_function(operator.add, (node, residual))
        if not handed_on:
            name, *slope = activation if isinstance(activation, tuple) else (activation,)
            with block.graph.inserting_after(value):
                value = block.graph.call_function(getattr(F, name), (value, *slope))
        for user in users:
            user.replace_input_with(node, value)
    block.recompile()
