"""What it takes to make one norm what was asked for, or why it is left."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ...nn import Norm
from ...pattern import NormSpec
from ..freeze import freeze, is_frozen, unfreeze
from .becoming import Already, Edit, become, edit_of, said
from .kinds import (
    OURS,
    TORCHS,
    WAS_KIND,
    Seen,
    base_of,
    channels_of,
    is_bare_frozen,
    is_spatial,
    kind_of,
    name_of_kind,
    problem_of,
)
from .patterned import GroupCount, grouped, patterned

__all__ = ["edit_for"]


def edit_for(
    to: str | NormSpec, path: str, norm: Any, seen: Seen, groups: GroupCount
) -> Edit | str:
    """What it takes, or why the norm is left: `Already` if there is nothing to do.

    Raises:
        ConfigError: ``groups`` does not divide the channels.
    """
    if is_frozen(norm):
        return _thawed(to, path, norm, seen)
    if to == "frozen":
        return _frozen(path, norm, seen)
    problem = problem_of(norm)
    if problem is not None:
        return problem
    if is_bare_frozen(norm) and to not in ("torch", "batch"):
        return "it is frozen; exchange it for 'batch' first"
    if isinstance(to, NormSpec):
        return patterned(to, path, norm, seen, groups)
    base, already = base_of(kind_of(norm)), Already(f"it is {said(norm)} already")
    if (to == "batch" and base is not nn.SyncBatchNorm and not is_bare_frozen(norm)) or (
        to == "evenkeel" and isinstance(norm, Norm)
    ):
        return already
    if not is_spatial(norm):
        return f"it is {said(norm)}, whose numbers are not per channel"
    if to in ("torch", "evenkeel", "batch", "sync"):
        kind = _batch_kind(to, path, norm, seen)
        if isinstance(kind, str):
            return kind
        if kind is base and (kind is type(norm) or to != "torch"):
            return already
        return edit_of(path, norm, name_of_kind(kind), partial(_to_batch, norm, kind))
    return grouped(to, path, norm, seen, groups)


def _thawed(to: str | NormSpec, path: str, norm: Any, seen: Seen) -> Edit | str:
    """A norm that `freeze` has frozen."""
    if to == "frozen":
        return Already("it is frozen already")
    if to not in ("torch", "batch"):
        return "it is frozen; exchange it for 'batch' first"
    kind: Any = kind_of(norm)
    base = base_of(kind)
    if (to == "torch" and kind not in TORCHS.values()) or base is nn.SyncBatchNorm:
        if not is_spatial(norm):
            return f"it is {said(norm)}, whose numbers are not per channel"
        kind = problem_of(norm) or _batch_kind(to, path, norm, seen)
        if isinstance(kind, str):
            return kind

    def run() -> None:
        unfreeze(norm)
        if type(norm) is not kind:
            _to_batch(norm, kind)

    return edit_of(path, norm, name_of_kind(kind), run)


def _frozen(path: str, norm: Any, seen: Seen) -> Edit | str:
    if hasattr(norm, "parametrizations"):
        return "it has parametrizations, which are a class of their own"
    if not is_bare_frozen(norm):
        if norm.running_mean is None or norm.running_var is None:
            return "it has no running statistics, and uses those of each batch"
        return edit_of(path, norm, f"frozen {said(norm)}", partial(_freeze, norm))
    kind = _batch_kind("batch", path, norm, seen)
    if isinstance(kind, str):
        return kind

    def run() -> None:
        _to_batch(norm, kind)
        freeze(norm, affine=True)

    return edit_of(path, norm, f"frozen {name_of_kind(kind)}", run)


def _freeze(norm: Any) -> None:
    freeze(norm)


def _batch_kind(to: str, path: str, norm: Any, seen: Seen) -> Any:
    """The class to become, or why there is none."""
    if to == "sync":
        return nn.SyncBatchNorm
    if to == "batch" and WAS_KIND in vars(norm):
        return vars(norm)[WAS_KIND][0]
    dims = seen.dims(path, norm)
    return dims if isinstance(dims, str) else (OURS if to == "evenkeel" else TORCHS)[dims]


def _to_batch(norm: Any, kind: Any) -> None:
    """Any norm per channel to any class of the batch norms, with all that it holds."""
    settings: dict[str, Any] = {
        "num_features": channels_of(norm),
        "eps": norm.eps,
        "momentum": getattr(norm, "momentum", 0.1),
        "affine": norm.weight is not None,
        "track_running_stats": getattr(norm, "track_running_stats", True),
    }
    was, before = vars(norm).get(WAS_KIND, (None, {}))
    parameters, buffers = dict(norm._parameters), dict(norm._buffers)
    if kind is nn.SyncBatchNorm:
        own = {name: vars(norm)[name] for name in ("spec", "sizes", "shape") if name in vars(norm)}
        settings |= {"process_group": None, WAS_KIND: (type(norm), own)}
    elif was is kind:
        settings |= before
    if is_bare_frozen(norm):
        parameters = {name: nn.Parameter(buffers.pop(name)) for name in ("weight", "bias")}
        count = torch.tensor(0, dtype=torch.long, device=norm.running_mean.device)
        buffers.setdefault("num_batches_tracked", count)
    if issubclass(kind, Norm):
        del settings["num_features"], settings["affine"]
    become(norm, kind, settings, parameters, buffers)
