"""One norm becomes another: the same object, of another class, with what it keeps.

The object stays, as in `accelerate` and `freeze`, so that its name, its hooks, every place where it
stands and every reference to it stay. Parameters and buffers stay the same objects where their
shapes allow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...errors import SurgeryError
from ...nn import Norm
from ..freeze import is_frozen
from .kinds import WAS_KIND, kind_of, name_of_kind

__all__ = ["Already", "Edit", "Undo", "become", "edit_of", "said", "settings_of"]

_SETTINGS = {
    "num_features", "eps", "momentum", "affine", "track_running_stats", "process_group", "spec",
    "sizes", "shape", "activation", WAS_KIND,
}  # fmt: skip


class Already(str):
    """A reason to leave a norm that is what was asked for."""


@dataclass(frozen=True)
class Edit:
    """What is to become of one norm.

    Attributes:
        path: where it stands first.
        was, becomes: classes, as users write them.
        run: does it.
        same: the norm computes the same in inference.
        fresh: its memory is new and has seen nothing.
        note: what else the user should know.
    """

    path: str
    norm: Any
    was: str
    becomes: str
    run: Callable[[], None]
    same: bool = True
    fresh: bool = False
    note: str | None = None


class Undo:
    """Everything about some norms, to put it back: classes, attributes, which parameters learn."""

    def __init__(self, norms: Iterable[Any]) -> None:
        self._was = [
            (norm, type(norm), dict(vars(norm)), [(p, p.requires_grad) for p in norm.parameters()])
            for norm in norms
        ]

    def __call__(self) -> None:
        for norm, kind, attributes, flags in self._was:
            norm.__class__ = kind
            vars(norm).clear()
            vars(norm).update(attributes)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def check_carried(self, edits: Iterable[Edit]) -> None:
        """That each norm which computes the same has the numbers that it had.

        Raises:
            SurgeryError: one has not.
        """
        before = {id(norm): attributes for norm, _, attributes, _ in self._was}
        for edit in (edit for edit in edits if edit.same):
            norm, was = edit.norm, before[id(edit.norm)]
            held = {**was["_parameters"], **was["_buffers"]}
            right = norm.eps == was["eps"]
            for name in ("weight", "bias", "running_mean", "running_var"):
                right = right and _repeats(getattr(norm, name), held.get(name))
            if not right:
                raise SurgeryError(
                    f"'{edit.path}' would lose its numbers on the way to {edit.becomes}; nothing "
                    "was changed; please report this"
                )


def _repeats(new: Tensor | None, old: Tensor | None) -> bool:
    """True if ``new`` has each value of ``old``, channel by channel, once or repeated."""
    if new is None or old is None or new is old:
        return new is old
    if new.dtype != old.dtype or new.device != old.device or new.numel() % old.numel():
        return False
    table = new.detach().reshape(len(old), -1).nan_to_num()
    return bool((table == old.detach().reshape(-1, 1).nan_to_num()).all())


def edit_of(path: str, norm: Any, becomes: str, run: Callable[[], None], **more: Any) -> Edit:
    """An `Edit` that says by itself what the norm was."""
    return Edit(path, norm, said(norm), becomes, run, **more)


def said(norm: Any) -> str:
    """What a norm is, as users write it."""
    if type(norm) is Norm:
        return f"evenkeel.Norm('{norm.spec}')"
    return ("frozen " if is_frozen(norm) else "") + name_of_kind(kind_of(norm))


def become(
    norm: Any,
    kind: type[nn.Module],
    settings: dict[str, Any],
    parameters: dict[str, Any],
    buffers: dict[str, Any],
) -> None:
    """Gives the object another class and that class's attributes; mode, hooks and others stay."""
    kept = {name: value for name, value in vars(norm).items() if name not in _SETTINGS}
    kept |= {**settings, "_parameters": parameters, "_buffers": buffers}
    norm.__class__ = kind
    vars(norm).clear()
    vars(norm).update(kept)


def settings_of(fresh: nn.Module) -> dict[str, Any]:
    """What the constructor has set on a new module, but for what every module has."""
    return {name: value for name, value in vars(fresh).items() if name not in vars(nn.Module())}
