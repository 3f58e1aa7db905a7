"""The backend that norms run on where one was asked for by name: checked, given, taken back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BackendError, ConfigError
from ...kernels import select
from ...view import logical_view

__all__ = ["check", "check_norms", "give", "is_given", "take_back"]

_WAS = "_backend_before_acceleration"
"""The attribute that holds the backend which a norm had of its own, None if it had none."""

_TYPICAL = logical_view((2, 3, 4, 5), (1,))


def check(backend: str, memory: str) -> None:
    """Checks what was asked for, before anything is done.

    Raises:
        ConfigError: there is no backend of that name, or it keeps what memory='low' gives up.
        BackendError: it is not installed.
    """
    select.check(backend)
    if backend == "auto":
        return
    if memory == "low" and backend != "native":
        raise ConfigError(
            "memory='low' is for norms on the native kernels, on the CPU, but got "
            f"backend='{backend}'; give memory='full', or leave the backend out"
        )
    select.load(backend)


def check_norms(backend: str, model: nn.Module, paths: Iterable[str]) -> None:
    """That the backend runs where the norms are, and in their dtype; 'auto' runs everywhere.

    Raises:
        BackendError: it does not.
    """
    if backend == "auto":
        return
    fallback = _tensor_of(model)
    seen: set[tuple[torch.device, torch.dtype]] = set()
    for path in paths:
        t = _tensor_of(model.get_submodule(path))
        t = fallback if t is None else t
        if t is None or (t.device, t.dtype) in seen:
            continue
        seen.add((t.device, t.dtype))
        reason = select.load(backend).refuses(_TYPICAL, t.dtype, t.device)
        if reason is not None:
            raise BackendError(
                f"backend='{backend}' cannot run '{path}', which is on {t.device} in {t.dtype}: "
                f"{reason}; nothing was changed; move the network, or name another backend"
            )


def give(norm: Any, backend: str) -> None:
    """Sets the backend of one norm of ours, unless it is 'auto'."""
    if backend != "auto":
        vars(norm)[_WAS] = vars(norm).get("backend")
        norm.backend = backend


def take_back(norm: nn.Module) -> None:
    """Gives a norm the backend that it had before `give`; any other is left as it is."""
    if is_given(norm):
        own, before = vars(norm), vars(norm).pop(_WAS)
        own.pop("backend", None)
        if before is not None:
            own["backend"] = before


def is_given(module: nn.Module) -> bool:
    """True if `give` has set the backend of this one module."""
    return _WAS in vars(module)


def _tensor_of(module: nn.Module) -> Tensor | None:
    """A floating tensor of the module, which says where it runs and in what."""
    tensors = (*module.parameters(), *module.buffers())
    return next((t for t in tensors if t.is_floating_point()), None)
