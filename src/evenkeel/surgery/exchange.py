"""Batch norms of a network exchanged for others: torch's, evenkeel's, sync, frozen, group, ..."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError, PatternError, SurgeryError, first_line, meant
from ..pattern import NormSpec, parse
from .accelerating.backends import is_given
from .accelerating.layout import is_laid_out
from .accelerating.low_memory import is_installed
from .accelerating.remade import Remade
from .accelerating.rewriting import WAS
from .batch_norms import Where, titled, unwrapped
from .comparing import apart, magnitude
from .draws import gpus_of
from .examples import call, cloned, tensors_in, widened
from .exchanging.becoming import Already, Edit, Undo
from .exchanging.edits import edit_for
from .exchanging.kinds import Seen, candidates
from .graph import copied
from .recalibrate import recalibrate

__all__ = ["BUDGET", "EXACT_BUDGET", "ExchangeReport", "exchange"]

BUDGET = 1e-6
"""The largest difference of an output in inference, relative to the largest; if rounding makes it
larger, double precision decides."""
EXACT_BUDGET = 1e-9
"""The same in double precision."""

TARGETS = ("torch", "evenkeel", "sync", "batch", "frozen", "group", "layer", "instance")
_SHARDED = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}

M = TypeVar("M", bound=nn.Module)
Shapes = dict[str, set[tuple[int, ...]]]


@dataclass(frozen=True)
class ExchangeReport:
    """Which norms were exchanged, which were left and why, and the proof.

    Attributes:
        to: what was asked for.
        exchanged: path, class before and class after of each.
        left: the other norms, with the reason.
        same: all norms compute in inference what they did.
        difference, scale: the largest difference of an output in inference on the example, and the
            largest output; None if it was not compared.
        budget: the difference that was allowed, relative to the scale; None as above.
        notes: what else the user should know.
    """

    to: str
    exchanged: tuple[tuple[str, str, str], ...]
    left: tuple[tuple[str, str], ...]
    same: bool
    difference: float | None = None
    scale: float | None = None
    budget: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        count = len(self.exchanged)
        lines = [f"{count} norms exchanged for '{self.to}', {len(self.left)} left as they are"]
        lines += [f"  {path}: {was} -> {becomes}" for path, was, becomes in self.exchanged]
        lines += [f"  {path} stays: {reason}" for path, reason in self.left]
        lines += [f"  {note}" for note in self.notes]
        if self.difference is not None and self.scale is not None and self.budget is not None:
            lines.append(
                f"  largest output difference in inference {self.difference:.1e} of "
                f"{self.scale:.3g} (budget {self.budget:.0e} relative)"
            )
        elif self.same and count:
            lines.append("  outputs were not compared, for there was no example")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def exchange(
    model: M,
    to: str,
    *,
    where: Where = None,
    example: Any = None,
    calibrate: Iterable[Any] | None = None,
    groups: int | Callable[[int], int] | None = None,
    inplace: bool = False,
) -> tuple[M, ExchangeReport]:
    """The network with its batch norms exchanged for others, and what was done.

    ``to`` is one of these, or a pattern:

    - ``'torch'``: torch.nn.BatchNorm1d, 2d or 3d, from evenkeel's, sync and frozen ones.
    - ``'evenkeel'``: evenkeel.BatchNorm1d, 2d or 3d.
    - ``'sync'``: torch.nn.SyncBatchNorm, which remembers the class that it was.
    - ``'batch'``: from sync and frozen back to the class that it was.
    - ``'frozen'``: see `evenkeel.freeze`; frozen norms of other libraries (weight, bias and
      statistics all buffers) become torch's, frozen.
    - ``'group'``, ``'layer'``, ``'instance'``: torch.nn.GroupNorm, the same with one group, and
      torch.nn.InstanceNorm, with the gamma and beta that there are.
    - ``'n c h w -> c h w'`` or any other pattern: `evenkeel.Norm`. Dimension 1 are the channels.
      Gamma and beta are per owner if every channel is one, else per channel.

    All but the norms that own the batch axis, and patterns whose owners are not the channels or
    more, compute in inference what was computed before::

        y = (x - running_mean) / sqrt(running_var + eps) * weight + bias

    A norm is exchanged by changing its class: the same object with its name, places, hooks, mode
    and attributes. Its parameters and buffers are the same objects too, unless a pattern asks for
    another shape. Which class is right is never guessed: it is the class before, or the rank of the
    example's inputs, or that of the layers around the norm, or the norm is left.

    Args:
        model: any network with batch norms of torch's, SyncBatchNorm, evenkeel's, or frozen ones.
        to: see above.
        where: a norm's path, the path of a module that holds norms, several of these, or a
            function ``where(path, norm) -> bool``; None for all.
        example: an input, a tuple of inputs or a dict of inputs by name. With one, outputs in
            inference are compared if they must be the same. Patterns that own places need it.
        calibrate: batches for `evenkeel.recalibrate`, for patterns whose statistics are new.
        groups: how many groups 'group' and patterns such as 'n (g c) h w -> n g' have, or a
            function of the number of channels; None for the most up to 32 with two channels and,
            where the number of places is known, 16 values each.
        inplace: True to edit the given network instead of a copy.

    Returns:
        the network and the report.

    Raises:
        ConfigError: an unknown ``to``, ``groups`` that do not divide, or an argument that ``to``
            does not take or needs.
        PatternError: the pattern is no normalization, or does not name the channels.
        SurgeryError: there is nothing to exchange, or the network is accelerated or distributed, or
            cannot run the example, or would compute something else. It is as it was before.
    """
    target = _target(to, example, calibrate, groups)
    _refuse(model)
    own = model if inplace else copied(model)
    inner = unwrapped(own)
    norms, left = candidates(inner, where)
    original = None if example is None else copied(inner)
    shapes, before = (None, []) if original is None else _run(original, example, norms)
    seen = Seen(inner, shapes)
    edits: list[Edit] = []
    settled = False
    for path, norm in norms:
        found = edit_for(target, path, norm, seen, groups)
        if isinstance(found, Edit):
            edits.append(found)
        else:
            left.append((titled(path, norm), str(found)))
            settled = settled or isinstance(found, Already)
    if not edits and not settled:
        reasons = "".join(f"; '{path}': {reason}" for path, reason in left)
        kind = type(inner).__name__
        raise SurgeryError(f"{kind} has no batch norm to exchange for '{to}'{reasons}")
    done = tuple((titled(edit.path, edit.norm), edit.was, edit.becomes) for edit in edits)
    same = all(edit.same for edit in edits)
    compared: tuple[float, float, float] | None = None
    undo = Undo([edit.norm for edit in edits])
    try:
        notes = _carry_out(inner, target, edits, undo, calibrate)
        if original is not None and same and edits:
            compared = _proof(original, inner, example, before)
    except BaseException:
        undo()
        raise
    unseen = [edit.path for edit in edits if edit.same and not seen.shapes_of(edit.path)]
    if original is not None and unseen:
        notes.append(f"the example does not reach {_listed(unseen)}")
    difference, scale, budget = compared or (None, None, None)
    more = (same, difference, scale, budget, tuple(notes))
    return own, ExchangeReport(to, done, tuple(left), *more)


def _target(to: str, example: Any, calibrate: Any, groups: Any) -> str | NormSpec:
    """What is wished for, if the arguments go together."""
    if "->" not in to:
        if to not in TARGETS:
            raise ConfigError(
                f"unknown to='{to}'{meant(to, TARGETS)}; choose one of {', '.join(TARGETS)}, or a "
                "pattern such as 'n c h w -> c h w'"
            )
        if groups is not None and to != "group":
            raise ConfigError(f"groups={groups!r} is for to='group', but to is '{to}'")
        if calibrate is not None:
            raise ConfigError(
                f"calibrate= is for patterns with new running statistics, but to is '{to}'"
            )
        return to
    spec = parse(to)
    if len(spec.axes) < 2 or spec.axes[1] == ("...",):
        raise PatternError(
            f"'{to}' does not name the channels, to which gamma and beta belong; name dimension 1, "
            "as in 'n c ... -> c'"
        )
    split = [group for group in (spec.axes[0], *spec.axes[2:]) if len(group) > 1]
    if split or len(spec.axes[1]) > 2:
        raise PatternError(
            f"'{to}' splits {' '.join((split or [spec.axes[1]])[0])}; only the channels can be "
            "split here, and in two, as in 'n (g c) h w -> n g'"
        )
    if groups is not None and len(spec.axes[1]) == 1:
        raise ConfigError(f"groups={groups!r} is given, but '{to}' does not split the channels")
    if calibrate is not None and not spec.averages_batch:
        raise ConfigError(f"calibrate= is given, but '{to}' has no running statistics")
    places = [name for name in spec.fixed if name not in spec.axes[1]]
    if "..." in places:
        raise PatternError(f"'{to}' has statistics over '...'; name the axes, as in 'n c h w -> w'")
    if places and example is None:
        raise ConfigError(
            f"'{to}' has statistics over {', '.join(places)}, whose sizes only an example tells; "
            "pass example="
        )
    return spec


def _refuse(model: nn.Module) -> None:
    kind = type(model).__name__
    for path, module in model.named_modules():
        if {step.__name__ for step in type(module).__mro__} & _SHARDED:
            raise SurgeryError(
                f"{kind} holds {type(module).__name__} (see '{path}'), which has taken down every "
                "parameter and buffer; exchange the network inside and wrap the result"
            )
        changed = WAS in vars(module) or is_laid_out(module) or is_installed(module)
        if isinstance(module, Remade) or changed or is_given(module):
            raise SurgeryError(
                f"{kind} is accelerated (see '{path}'); exchange the norms of the network that "
                "evenkeel.restore makes of it, then accelerate the result"
            )


def _carry_out(
    model: nn.Module,
    target: str | NormSpec,
    edits: list[Edit],
    undo: Undo,
    calibrate: Iterable[Any] | None,
) -> list[str]:
    """Does all edits and gives the notes for the report."""
    flags = [list(edit.norm.parameters()) for edit in edits]
    groups = [getattr(edit.norm, "process_group", None) for edit in edits]
    for edit in edits:
        edit.run()
    undo.check_carried(edits)
    notes = [edit.note for edit in edits if edit.note]
    notes += _notes_on_function(target, edits)
    renewed = [
        edit.path
        for edit, old in zip(edits, flags, strict=True)
        if any(all(p is not q for q in old) for p in edit.norm.parameters())
    ]
    if renewed:
        notes.append(
            f"gamma and beta are new parameters in {_listed(renewed)}; build the optimizer anew"
        )
    if any(group is not None for group in groups):
        notes.append("the process groups of SyncBatchNorm are not kept")
    if target == "sync" and _on_cpu(edits):
        notes.append(
            "the network is on the CPU, where SyncBatchNorm does not train while "
            "torch.distributed runs"
        )
    return notes + _notes_on_memory(model, edits, calibrate)


def _notes_on_memory(
    model: nn.Module, edits: list[Edit], calibrate: Iterable[Any] | None
) -> list[str]:
    """Fills memories that are new, if there are batches to fill them with."""
    fresh = {edit.norm: edit.path for edit in edits if edit.fresh}
    if not fresh:
        needless = "calibrate= was not needed, for the statistics are carried"
        return [] if calibrate is None else [needless]
    if calibrate is not None:
        found = recalibrate(model, calibrate, where=lambda path, norm: norm in fresh)
        return [f"{len(found.changes)} norms calibrated on {found.batches} batches"]
    return [
        f"the memory is new (mean 0, variance 1) in {_listed(list(fresh.values()))}; give "
        "calibrate=, or use evenkeel.recalibrate before inference"
    ]


def _notes_on_function(target: str | NormSpec, edits: list[Edit]) -> list[str]:
    other = [edit.path for edit in edits if not edit.same]
    if not other:
        return []
    lost = isinstance(target, str) or not target.averages_batch
    what = "and running statistics are lost" if lost else "for other values share a statistic"
    return [f"the function changes in {_listed(other)}, {what}; train on"]


def _listed(paths: list[str]) -> str:
    shown = ", ".join(f"'{path}'" for path in paths[:3])
    return shown if len(paths) <= 3 else f"{shown} and {len(paths) - 3} more"


def _on_cpu(edits: list[Edit]) -> bool:
    return any(
        tensor.device.type == "cpu"
        for edit in edits
        for tensor in (*edit.norm.parameters(), *edit.norm.buffers())
    )


def _run(
    model: nn.Module, example: Any, norms: Iterable[tuple[str, Any]] = ()
) -> tuple[Shapes, list[Tensor]]:
    """The shapes that norms are given in inference, and the floating outputs."""
    own = copy.deepcopy(model).eval()
    shapes: Shapes = {}
    for path, _ in norms:
        seen = shapes.setdefault(path, set())

        def note(_: Any, args: Any, kwargs: Any, seen: set[Any] = seen) -> None:
            x = args[0] if args else kwargs["input" if "input" in kwargs else "x"]
            seen.add(tuple(x.shape))

        own.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad(), torch.random.fork_rng(gpus_of(own)):
        torch.manual_seed(0)
        try:
            result = call(own, cloned(example))
        except Exception as error:
            raise SurgeryError(
                f"{type(model).__name__} cannot run the example in inference: "
                f"{first_line(error)}; give an input, a tuple of inputs or a dict of inputs by name"
            ) from error
    return shapes, [t for t in tensors_in(result) if t.is_floating_point() and t.numel() > 0]


def _proof(
    original: nn.Module, changed: nn.Module, example: Any, before: list[Tensor]
) -> tuple[float, float, float]:
    """The largest difference of outputs in inference, the largest output, and the budget.

    Raises:
        SurgeryError: the difference is above the budget, in double precision too.
    """
    difference, scale = _apart(before, _run(changed, example)[1])
    if difference <= BUDGET * scale:
        return difference, scale, BUDGET
    wide = widened(example)
    try:
        exact = _run(copy.deepcopy(original).double(), wide)[1]
        other = _run(copy.deepcopy(changed).double(), wide)[1]
        exactly, size = _apart(exact, other)
    except SurgeryError:  # something in it insists on single precision
        exactly, size = difference, scale
    if exactly <= EXACT_BUDGET * size:
        return exactly, size, EXACT_BUDGET
    raise SurgeryError(
        f"the outputs in inference would change by {difference:.1e} of {scale:.3g}, where "
        f"{BUDGET:.0e} of that is allowed; nothing was changed; the usual cause is a forward that "
        "asks for the class of its norms; leave the example out to go without the proof"
    )


def _apart(before: list[Tensor], after: list[Tensor]) -> tuple[float, float]:
    """The largest difference, infinite if one of two values alone is not finite; and the scale."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return float("inf"), 0.0
    worst = max(map(apart, before, after), default=0.0)
    return worst, max(map(magnitude, before), default=0.0)
