"""Which backend runs a call, and why: a pure function of the call.

``'auto'`` takes the first of `backends` that is for the tensor's device and can run the call: on
the CPU the native kernels, else the reference. On other devices `evenkeel.functional` leaves
spatial batch norm to torch and does not ask here. What is not for the device is not even loaded. A
backend asked for by name runs wherever it can: Triton on the CPU too, in its interpreter, where
``TRITON_INTERPRET=1`` was set before it was loaded.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import NamedTuple, cast

import torch

from ..errors import BackendError, ConfigError, meant
from ..view import View
from .contract import Backend

__all__ = ["ON_GPU", "Choice", "backends", "check", "choose", "load"]

_PLACES = {
    "native": "evenkeel.kernels.native:Native",
    "triton": "evenkeel.kernels.triton:Triton",
    "cudnn": "evenkeel.kernels.cudnn:Cudnn",
    "reference": "evenkeel.kernels.reference:Reference",
}
"""Every backend, best first, as module:class. A module is imported when it is first chosen."""

_DEVICES = {"native": "cpu"}
"""The device on which ``'auto'`` takes a backend, for those that it does not take on all."""

ON_GPU = ("triton", "cudnn")
"""For CUDA tensors, but not taken by ``'auto'``: not yet seen on a GPU."""


class Choice(NamedTuple):
    """The backend's name and the reason that it was taken."""

    name: str
    reason: str


def backends() -> tuple[str, ...]:
    """The names that ``backend=`` takes, besides ``'auto'``."""
    return tuple(_PLACES)


def check(name: str) -> None:
    """Checks a name as a setting; nothing is loaded.

    Raises:
        ConfigError: it is neither 'auto' nor one of `backends`.
    """
    if name not in ("auto", *_PLACES):
        raise ConfigError(
            f"unknown backend {name!r}{meant(str(name), _PLACES)}; choose 'auto' or one of "
            f"{', '.join(_PLACES)}"
        )


@cache
def load(name: str) -> Backend:
    """The backend of that name.

    Raises:
        BackendError: there is none, or it is not installed.
    """
    if name not in _PLACES:
        raise BackendError(
            f"there is no backend '{name}'; choose 'auto' or one of {', '.join(_PLACES)}"
        )
    module, _, attribute = _PLACES[name].partition(":")
    return cast(Backend, getattr(import_module(module), attribute)())


@cache
def _missing(name: str) -> str | None:
    """Why a backend is not installed, or None if it is."""
    try:
        load(name)
    except BackendError as error:
        return str(error)
    return None


def choose(wish: str, view: View, dtype: torch.dtype, device: torch.device) -> Choice:
    """The first backend that can run the call, or the one that was wished for.

    A wish that cannot be met is an error, never a silent fallback.

    Raises:
        BackendError: the wish is unknown or cannot run this call.
    """
    if wish != "auto":
        reason = load(wish).refuses(view, dtype, device)
        if reason is not None:
            raise BackendError(
                f"'{wish}' was asked for by name but cannot run this call: {reason}; "
                "use backend='auto'"
            )
        return Choice(wish, "asked for by name")
    passed: list[str] = []
    for name in _PLACES:
        if name in ON_GPU:
            passed.append(f"{name}: it is taken only if asked for by name")
            continue
        wanted = _DEVICES.get(name, device.type)
        if device.type != wanted:
            passed.append(f"{name}: it is taken on {wanted}, not on {device.type}")
            continue
        reason = _missing(name) or load(name).refuses(view, dtype, device)
        if reason is None:
            return Choice(name, "; ".join(passed) or "the first that runs here")
        passed.append(f"{name}: {reason}")
    raise AssertionError("the reference backend runs everything")
