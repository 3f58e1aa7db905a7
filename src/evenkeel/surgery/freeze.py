"""Batch norms that use their running statistics and keep them, whatever mode the network is in.

A norm is frozen by changing its class, as `accelerate` does it, to a subclass made for it: the same
object with the same name, parameters, buffers, hooks and state dict. The subclass has nothing but a
``training`` that is always False. So each kind of norm, a fused activation or a user's own subclass
too, does what it does in inference. `torch.nn.Module.train` is not overridden: what it sets is kept
where it always was, and counts again when the norm is unfrozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar, SupportsIndex

from torch import nn

from ..errors import SurgeryError
from .batch_norms import Where, batch_norms, titled, unwrapped

__all__ = ["FreezeReport", "FrozenNorm", "freeze", "is_frozen", "kind_like", "unfreeze"]

_AFFINE_WAS = "_affine_was_before_freezing"
"""The attribute that holds requires_grad of weight and bias, where they were frozen too."""


class FrozenNorm:
    """Base of the classes made here."""

    thawed: ClassVar[type[nn.Module]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A norm of the class before: ``type(norm)(64)`` builds a new norm, which is not frozen.

        Without arguments it is an empty one, as classes with a copy of their own ask for.
        """
        return cls.thawed(*args, **kwargs) if args or kwargs else object.__new__(cls)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        state: Any = super().__reduce_ex__(max(int(protocol), 2))
        return (_reborn, (self.thawed,), *state[2:])

    @property
    def training(self) -> bool:
        """False. What is set is kept for the time when the norm is unfrozen."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        vars(self)["training"] = mode

    def reset_running_stats(self) -> None:
        """Nothing: torch's ``update_bn`` resets every norm and then fills those that train."""

    @property
    def qconfig(self) -> Any:
        """A setting of torch's quantization.

        Torch asks for it when it builds another norm in this one's place, SyncBatchNorm above all,
        and that one would not be frozen.

        Raises:
            SurgeryError: there is none.
        """
        if "qconfig" not in vars(self):
            raise SurgeryError(
                f"a frozen {type(self).__name__} cannot be converted, for the new norm would not "
                "be frozen; use evenkeel.unfreeze, convert, then freeze again"
            )
        return vars(self)["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        vars(self)["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        del vars(self)["qconfig"]

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[misc]
        return f"{text}, frozen" + (" with gamma and beta" if _AFFINE_WAS in vars(self) else "")


@dataclass(frozen=True)
class FreezeReport:
    """Which norms were frozen or unfrozen, and which were left and why.

    ``action`` is 'frozen' or 'unfrozen'; ``affine`` says that gamma and beta were frozen too.
    """

    action: str
    norms: tuple[str, ...]
    left: tuple[tuple[str, str], ...] = ()
    affine: bool = False

    def __str__(self) -> str:
        also = ", gamma and beta too" if self.affine else ""
        lines = [f"{len(self.norms)} norms {self.action}{also}, {len(self.left)} left as they are"]
        lines += [f"  {name}" for name in self.norms]
        return "\n".join([*lines, *(f"  {name} stays: {reason}" for name, reason in self.left)])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def freeze(model: nn.Module, where: Where = None, *, affine: bool = False) -> FreezeReport:
    """Makes batch norms use their running statistics and keep them, in training too, for good.

    ::

        y = (x - running_mean) / sqrt(running_var + eps) * weight + bias        in both modes

    It is done in place, and lasts: through ``train()``, ``apply``, copies, pickles, `update_bn`
    and `recalibrate`. State dicts are the same as before, ``load_state_dict`` fills a frozen norm
    like any other, and its repr says ``frozen``. Gradients flow through it; gamma and beta go on
    learning unless ``affine`` says otherwise. A norm that is frozen already stays so.

    Args:
        model: any network with batch norms of torch's, SyncBatchNorm, evenkeel's or subclasses.
        where: a norm's path, the path of a module that holds norms, several of these, or a
            function ``where(path, norm) -> bool``; None for all.
        affine: True to turn off ``requires_grad`` of gamma and beta too.

    Returns:
        the report.

    Raises:
        SurgeryError: there is no batch norm that could be frozen. The network is as before.
    """
    model = unwrapped(model)
    norms, left = batch_norms(model, where)
    for path in [path for path, norm in norms.items() if hasattr(norm, "parametrizations")]:
        del norms[path]
        left.append((path, "it has parametrizations, which are a class of their own"))
    if not norms:
        reasons = "".join(f"; '{path}': {reason}" for path, reason in left)
        raise SurgeryError(f"{type(model).__name__} has no batch norm to freeze{reasons}")
    done: list[tuple[Any, type[nn.Module], tuple[bool, ...] | None]] = []
    try:
        for path, norm in norms.items():
            done.append((norm, type(norm), vars(norm).get(_AFFINE_WAS)))
            _freeze(path, norm, affine)
    except BaseException:
        for norm, kind, was in done:
            if affine and was is None:
                _give_back_gradients(norm)
            _become(norm, kind)
        raise
    names = tuple(titled(path, norm) for path, norm in norms.items())
    return FreezeReport("frozen", names, tuple(left), affine)


def unfreeze(model: nn.Module, where: Where = None) -> FreezeReport:
    """Gives frozen norms the class, the mode and the ``requires_grad`` that they had, in place.

    The mode is the one that ``train()`` and ``eval()`` have asked for meanwhile. Norms that are not
    frozen stay as they are.

    Args:
        model, where: as in `freeze`.

    Raises:
        SurgeryError: ``where`` names what has no norm.
    """
    norms, _ = batch_norms(unwrapped(model), where)
    names = tuple(titled(path, norm) for path, norm in norms.items() if is_frozen(norm))
    for norm in norms.values():
        if is_frozen(norm):
            _give_back_gradients(norm)
            _become(norm, norm.thawed)
    return FreezeReport("unfrozen", names)


def is_frozen(module: nn.Module) -> bool:
    """True for a norm that `freeze` has frozen."""
    return isinstance(module, FrozenNorm)


def kind_like(norm: nn.Module, kind: Any) -> type[nn.Module]:
    """The class ``kind``, frozen if the norm is."""
    return _class_of(kind) if is_frozen(norm) else kind


def _freeze(path: str, norm: Any, affine: bool) -> None:
    if not is_frozen(norm):
        try:
            kind: Any = type(norm)
            _become(norm, _class_of(kind))
        except TypeError as error:
            raise SurgeryError(
                f"'{titled(path, norm)}' cannot be frozen, for the class of a "
                f"{type(norm).__name__} cannot be changed ({error}); nothing was changed"
            ) from error
    if affine and _AFFINE_WAS not in vars(norm):
        parameters = _parameters(norm)
        vars(norm)[_AFFINE_WAS] = tuple(p.requires_grad for p in parameters)
        for parameter in parameters:
            parameter.requires_grad_(False)


def _become(norm: Any, kind: Any) -> None:
    """Changes the class, and says so to torch.compile: torch 2.11 looks at the dict alone.

    There code that was compiled for the one class would go on running for the other.
    """
    norm.__class__ = kind
    vars(norm)["_became"] = True
    del vars(norm)["_became"]


def _give_back_gradients(norm: Any) -> None:
    for parameter, flag in zip(_parameters(norm), vars(norm).pop(_AFFINE_WAS, ()), strict=False):
        parameter.requires_grad_(flag)


def _parameters(norm: Any) -> Sequence[nn.Parameter]:
    return [p for p in (norm.weight, norm.bias) if p is not None]


def _reborn(kind: Any) -> nn.Module:
    """An empty norm for pickle and copy to fill."""
    norm: nn.Module = kind.__new__(kind)
    norm.__class__ = _class_of(kind)
    return norm


@lru_cache(maxsize=4096)
def _class_of(kind: Any) -> type[nn.Module]:
    """The frozen subclass of a class of norms."""
    made = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "thawed": kind,
    }
    return type(kind.__name__, (FrozenNorm, kind), made)
