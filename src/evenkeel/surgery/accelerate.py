"""Torch's batch norms in any CNN, and what follows them, swapped for ours; and back again.

The network stays what it is: the same objects with the same names, parameters, buffers, hooks and
attributes. What is swapped is swapped by changing an object's class, which holds no state:

- A norm gets our class of the same name; parameters and buffers are the same objects, so optimizers
  and state dicts do not notice. ``activation`` on it says what it has taken over, ``backend`` who
  computes it if that was asked for by name.
- An activation that norms have taken over everywhere hands its input on, of a class made for it.
- A module whose forward calls functions or adds gets a class made for it, whose forward is the
  rewritten graph of its own forward, all modules in it being leaves. Only that one module is
  rewritten, not the network around it and not the modules in it. A traced copy of the whole
  network would lose its class and the hooks of every container.

So a network that cannot be traced as a whole is treated module by module without further ado, and
`restore` only gives every object the class that it had. See `remade` for why it is the class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import fx, nn

from ..allocator import check as check_allocator
from ..allocator import keep_blocks, status
from ..errors import SurgeryError
from .accelerating.backends import check as check_backend
from .accelerating.backends import check_norms, give, is_given, take_back
from .accelerating.blocks import Blocks
from .accelerating.layout import Layout, convert, convert_back, is_laid_out, lay_out
from .accelerating.layout import check as check_layout
from .accelerating.low_memory import check as check_memory
from .accelerating.low_memory import install, is_installed, kept_on, uninstall
from .accelerating.matching import OURS, Match, find, find_written
from .accelerating.own_forward import is_sequential
from .accelerating.remade import Remade, recipe, remake, unmake
from .accelerating.rewriting import WAS, graph_as_before, rewriting
from .comparing import Difference, compare
from .freeze import is_frozen, kind_like
from .fused import Activation
from .graph import copied

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


@dataclass(frozen=True)
class Accelerated:
    """What was swapped, what was left and why, and the largest differences on the example.

    ``output`` is the largest difference of outputs and running statistics, ``gradient`` that of the
    gradients of parameters and inputs, in training and inference; ``budget`` is what was allowed,
    relative to the largest value of the tensor. All three are None without an example.

    ``layout`` is what became of the weights' layout, None if that was not asked for; ``allocator``
    says that this call has set the process's allocator, None if it did not; ``memory`` is 'low' if
    backward computes activations again, else 'full'. ``kept`` is how many bytes are kept for
    backward when the network trains on the example, then and now; None unless memory is low.
    ``backend`` is who computes the swapped norms: 'auto', or the name that was asked for.
    """

    swapped: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]
    output: Difference | None
    gradient: Difference | None
    budget: float | None
    layout: Layout | None = None
    allocator: str | None = None
    memory: str = "full"
    kept: tuple[int, int] | None = None
    backend: str = "auto"

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} norms swapped, {len(self.left)} left as they are"]
        lines += [f"  {name}: {what}" for name, what in self.swapped]
        lines += [f"  {name}: {reason}" for name, reason in self.left]
        lines += [f"  backend: {self.backend}"] if self.backend != "auto" else []
        lines += [f"  {self.layout}"] if self.layout else []
        lines += [f"  allocator: {self.allocator}"] if self.allocator else []
        if self.memory == "low":
            lines.append("  low memory: backward computes what norms have handed on again")
        if self.kept is not None:
            before, now = (f"{size / 1e6:.3g} MB" for size in self.kept)
            lines.append(f"  training on the example keeps {now} for backward, {before} before")
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
    """What to do to which module, by path, and the backend that norms are to run on."""

    backend: str = "auto"
    edits: dict[str, _Edit] = field(default_factory=dict)
    swapped: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)


def accelerate(
    model: M,
    example: Any = None,
    *,
    inplace: bool = False,
    memory_format: torch.memory_format | str = "keep",
    seconds: float = 4.0,
    allocator: str = "keep",
    memory: str = "full",
    backend: str = "auto",
) -> tuple[M, Accelerated]:
    """The network with torch's batch norms swapped for ours, and what was done.

    A norm takes over the activation behind it (ReLU, ReLU6, LeakyReLU, SiLU), or the sum and the
    activation, whether they are modules, functions, methods or in place, if its output goes nowhere
    else. State dicts keep their keys, every module its name, class (or a subclass of it), hooks and
    attributes, every parameter its identity. A forward that is rewritten keeps the path that it
    takes now: a setting that it asks for, such as ``self.stride``, is read once.

    Convert to SyncBatchNorm before: torch builds its norms anew, without what ours have taken over,
    so ours refuse.

    The weights of convolutions can be laid out in channels_last, where training is faster on many
    machines; inputs may come as before. They stay the same parameters, so that optimizers and state
    dicts do not notice. Outputs keep their values but for rounding, not their strides, and a
    dropout with the same seed drops other values, for torch draws in the order of memory.

    Args:
        model: any network.
        example: an input, a tuple of inputs or a dict of inputs by name. With one, both networks
            run it in training and in inference and are compared, which takes copies of the network.
        inplace: True to edit the given network instead of a copy.
        memory_format: 'keep' leaves the layout of the weights; torch.channels_last (for weights of
            five dimensions channels_last_3d) or torch.contiguous_format sets it; 'auto' times
            training steps on the example in both and changes it where that pays by more than the
            noise.
        seconds: about how long 'auto' may measure, at most.
        allocator: 'keep' makes glibc keep large blocks in this process, see `evenkeel.allocator`,
            if the network is on the CPU and the user has not set up an allocator by other means;
            'default' leaves it as it is.
        memory: 'low' keeps for backward what goes into a norm, but not what comes out of it and
            into the next layer: backward computes that again, in the same bits, whenever the
            network itself is called. A training step takes a little longer. 'full' keeps both.
        backend: 'auto' for the native kernels, on the CPU; or a name, for all swapped norms and
            those that are ours already: 'triton' on an NVIDIA GPU, not yet seen on one. Else see
            `evenkeel.kernels.select.backends`.

    Returns:
        the network and the report.

    Raises:
        ConfigError: an unknown memory_format, allocator, memory or backend, 'auto' without an
            example, or memory='low' with a backend that has no part in it.
        BackendError: the named backend is not installed, or does not run where the network is.
        SurgeryError: the network is accelerated already, is on CUDA without a named backend, cannot
            be copied, cannot run the example, or would compute something else. It is as it was
            before.
    """
    check_layout(memory_format, example, seconds)
    check_allocator(allocator)
    check_memory(memory)
    check_backend(backend, memory)
    _refuse_accelerated(model)
    if backend == "auto":
        _refuse_cuda(model)
    plan = _planned(copied(model), backend)
    check_norms(backend, model, [path for path, _ in plan.swapped])
    if memory == "low":
        plan.edits[""] = partial(install, before=plan.edits.get(""))
    own = copied(model)
    _carry_out(own, plan)
    output = gradient = budget = kept = None
    if example is not None:
        output, gradient, budget = compare(model, own, example)
        kept = (kept_on(model, example), kept_on(own, example)) if memory == "low" else None
    said = _keep_blocks(model) if allocator == "keep" else None
    layout = lay_out(own, memory_format, example, seconds)
    if inplace:
        _carry_out_in_place(model, plan, layout)
        own = model
    done = (tuple(plan.swapped), tuple(plan.left))
    return own, Accelerated(*done, output, gradient, budget, layout, said, memory, kept, backend)


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
            graph_as_before(module)
    for module in modules:
        _undo(module)
    convert_back(own)
    return own


def _refuse_accelerated(model: nn.Module) -> None:
    for path, module in model.named_modules():
        changed = WAS in vars(module) or is_laid_out(module) or is_installed(module)
        if isinstance(module, Remade) or changed or is_given(module):
            raise SurgeryError(
                f"{type(model).__name__} is accelerated already (see '{path}'); give the network "
                "that evenkeel.restore makes of it"
            )


def _refuse_cuda(model: nn.Module) -> None:
    """There our norms would run in single operations of torch's, slower than torch's own norm."""
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_cuda:
            raise SurgeryError(
                f"{type(model).__name__} is on CUDA (see '{name}'), where evenkeel has no kernels "
                "yet that were measured to be faster than torch's; accelerate a network for the "
                "CPU, or name a backend: backend='triton', not yet seen on a GPU"
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


def _carry_out_in_place(model: nn.Module, plan: _Plan, layout: Layout | None) -> None:
    if layout is not None and layout.changed:
        convert(model, layout.chosen)
    try:
        _carry_out(model, plan)
    except BaseException:
        convert_back(model)
        raise


def _keep_blocks(model: nn.Module) -> str | None:
    """What the report says of the allocator: something only if this is the call that set it."""
    on_cpu = any(t.device.type == "cpu" for t in (*model.parameters(), *model.buffers()))
    if not on_cpu or status().keeps:
        return None
    found = keep_blocks()
    return f"{found.text}; evenkeel.allocator.default_blocks() undoes it" if found.keeps else None


def _undo(module: nn.Module) -> None:
    """Makes one module what it was, but for a GraphModule's graph."""
    uninstall(module)
    unmake(module)
    take_back(module)
    was = vars(module).pop(WAS, None)
    if was is not None:
        module.__class__ = kind_like(module, was)
        vars(module).pop("activation", None)


def _planned(model: nn.Module, backend: str) -> _Plan:
    """All that can be done; ``model`` is a scratch copy."""
    blocks, plan = Blocks(model), _Plan(backend)
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
        plan.edits[block_path] = rewriting(blocks, block_path, found, passing)
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
        if kind in OURS or what is not None or plan.backend != "auto":
            ours, act = OURS.get(kind, kind), None if what is None else what[0]
            plan.edits[path] = partial(_swap, ours=ours, activation=act, backend=plan.backend)
            plan.swapped.append((path, _said(kind, what)))
        if path in reasons:
            plan.left.append((path, f"swapped alone: {reasons[path]}"))


def _swap_problem(norm: nn.Module) -> str | None:
    kind = type(norm)
    if is_frozen(norm):
        return "it is frozen; unfreeze it, accelerate, freeze it again"
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


def _swap(norm: Any, ours: type[nn.Module], activation: Activation | None, backend: str) -> None:
    give(norm, backend)
    if ours is type(norm) and activation is None:
        return  # ours already, with a setting that may be the user's own
    vars(norm)[WAS] = type(norm)
    norm.__class__ = ours
    if activation is not None:
        norm.activation = activation
