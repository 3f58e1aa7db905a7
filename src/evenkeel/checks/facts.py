"""What a network's norms are, read once from their attributes: plain data for the rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Norm
from ..nn import norm as own_norms
from ..pattern import Bound, NormSpec, parse
from ..surgery.freeze import is_frozen
from ..surgery.graph import NORMS

__all__ = ["NormFacts", "is_batch_norm", "is_norm_module", "norms_of"]

_SPATIAL = parse("n c ... -> c")
_INSTANCE = parse("n c ... -> n c")
_OWN_FORWARDS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.SyncBatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    Norm,
)


@dataclass(frozen=True, eq=False)
class NormFacts:
    """One norm as it was given; the tensors are copies in float64 on the CPU, flat.

    Attributes:
        path, kind: where it is, and the name of its class.
        batch: True for a batch norm, which needs running statistics for inference.
        spec: its pattern, or None if that cannot be told.
        sizes: of the pattern's axes, where the module has been given them.
        eps, momentum: None where there is none.
        training, tracks: the module's flags.
        weight, bias: gamma and beta, or None.
        mean, var: running statistics, or None.
        count: num_batches_tracked, or None.
        dtype, device: of the running variance, or of gamma.
        learns: whether gamma or beta takes gradients; None if it has neither.
        plain: False if the class may do more than its base, or an activation as well.
        sync: True for a SyncBatchNorm.
        fixed: True if it never uses a batch's statistics: frozen for good, or of such a class.
        unread: True if the values cannot be read: lazy, or on the meta device.
    """

    path: str
    kind: str
    batch: bool
    spec: NormSpec | None
    sizes: dict[str, int]
    eps: float | None
    momentum: float | None
    training: bool
    tracks: bool
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    count: int | None
    dtype: torch.dtype | None
    device: str
    learns: bool | None
    plain: bool
    sync: bool
    fixed: bool
    unread: bool

    @property
    def never_updated(self) -> bool:
        """True if mean and variance are what every norm starts with: 0 and 1."""
        if self.mean is None or self.var is None:
            return False
        return bool((self.mean == 0).all() and (self.var == 1).all())

    @property
    def remembers(self) -> bool:
        """True if there are running statistics that can be read."""
        return self.batch and self.mean is not None and self.var is not None

    @property
    def moves(self) -> bool:
        """True if a forward of the module, in the mode that it is in, changes the statistics."""
        return self.training and self.tracks and self.remembers

    def bound(self, shape: tuple[int, ...]) -> Bound | None:
        """The pattern with the sizes of an input, or None if they do not fit."""
        if self.spec is None:
            return None
        try:
            return self.spec.bind(shape, self.sizes)
        except ValueError:
            return None


def is_norm_module(module: nn.Module) -> bool:
    """Any norm of torch's or ours, their subclasses, and what has a batch norm's statistics."""
    return isinstance(module, NORMS) or _has_statistics(module)


def is_batch_norm(module: nn.Module) -> bool:
    """True for a norm that averages the batch axis."""
    if isinstance(module, Norm):
        return module.spec.averages_batch
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or _has_statistics(module)


def norms_of(model: nn.Module) -> dict[str, NormFacts]:
    """The facts of every norm by path, in the order of registration."""
    return {path: _facts(path, module) for path, module in _norms(model)}


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if is_norm_module(module):
            yield path, module


def _has_statistics(module: nn.Module) -> bool:
    """A class of the user's, or FrozenBatchNorm2d of torchvision."""
    if isinstance(module, NORMS):
        return False
    held = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return all(isinstance(value, Tensor) for value in held)


def _facts(path: str, module: nn.Module) -> NormFacts:
    given: Any = module
    held = {
        name: _tensor(module, name) for name in ("weight", "bias", "running_mean", "running_var")
    }
    first = next((t for t in (held["running_var"], held["weight"]) if t is not None), None)
    unread = any(torch.nn.parameter.is_lazy(t) or t.is_meta for t in held.values() if t is not None)
    read = {name: None if unread else _copied(t) for name, t in held.items()}
    affine = [t for t in (held["weight"], held["bias"]) if isinstance(t, nn.Parameter)]
    count = _tensor(module, "num_batches_tracked")
    momentum, eps = getattr(module, "momentum", None), getattr(module, "eps", None)
    return NormFacts(
        path=path,
        kind=type(module).__name__,
        batch=is_batch_norm(module),
        spec=_spec(module),
        sizes=dict(given.sizes) if isinstance(module, Norm) else {},
        eps=float(eps) if isinstance(eps, int | float) else None,
        momentum=float(momentum) if isinstance(momentum, int | float) else None,
        training=module.training,
        tracks=bool(getattr(module, "track_running_stats", False)),
        weight=read["weight"],
        bias=read["bias"],
        mean=read["running_mean"],
        var=read["running_var"],
        count=None if count is None or unread else int(count),
        dtype=None if first is None else first.dtype,
        device="cpu" if first is None else first.device.type,
        learns=any(p.requires_grad for p in affine) if affine else None,
        plain=_is_plain(module),
        sync=isinstance(module, nn.SyncBatchNorm),
        fixed=is_frozen(module) or not isinstance(module, NORMS),
        unread=unread,
    )


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    value = getattr(module, name, None)
    return value if isinstance(value, Tensor) else None


def _copied(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().to("cpu", torch.float64, copy=True).flatten()


def _spec(module: nn.Module) -> NormSpec | None:
    if isinstance(module, Norm):
        return module.spec
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return _INSTANCE
    if isinstance(module, nn.modules.batchnorm._BatchNorm) or _has_statistics(module):
        return _SPATIAL
    return None


def _is_plain(module: nn.Module) -> bool:
    """True if a norm is all that it does."""
    forward: Any = getattr(type(module), "forward", None)
    known = forward in [getattr(kind, "forward", None) for kind in _OWN_FORWARDS]
    named = getattr(forward, "__module__", "").startswith(own_norms.__name__.rpartition(".")[0])
    return (known or named) and getattr(module, "activation", None) is None
