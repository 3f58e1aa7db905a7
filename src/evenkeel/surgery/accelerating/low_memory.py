"""What a network's norms hand on is computed again in backward: hooks that say where it runs.

`evenkeel.recompute` does the work, inside a region. A network's call becomes such a region by two
hooks on the outermost module. They are functions of this file, so that copies and pickles have them
too, and they hold nothing: one network may run in several threads.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ...errors import ConfigError, meant
from ...recompute import recomputing
from ..draws import gpus_of
from ..examples import call

__all__ = ["check", "install", "is_installed", "kept_bytes", "kept_on", "uninstall"]

MEMORY = ("full", "low")


class _Calls(threading.local):
    """The calls that a thread is in: the module, the frame that calls its hooks, its region."""

    def __init__(self) -> None:
        self.open: list[tuple[int, int, recomputing]] = []


_CALLS = _Calls()


def check(memory: str) -> None:
    """Checks what was asked for, before anything is done.

    Raises:
        ConfigError: neither 'full' nor 'low'.
    """
    if memory not in MEMORY:
        raise ConfigError(
            f"unknown memory {memory!r}{meant(str(memory), MEMORY)}; choose {' or '.join(MEMORY)}"
        )


def install(model: nn.Module, before: Callable[[Any], None] | None = None) -> None:
    """Makes every call of the network a region of `recomputing`; does another edit before."""
    if before is not None:
        before(model)
    model.register_forward_pre_hook(_enter, prepend=True)
    model.register_forward_hook(_leave, always_call=True)


def uninstall(model: nn.Module) -> None:
    """Takes the two hooks away, and no others."""
    for hooks, own in ((model._forward_pre_hooks, _enter), (model._forward_hooks, _leave)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
    for key in set(model._forward_hooks_always_called) - set(model._forward_hooks):
        del model._forward_hooks_always_called[key]


def is_installed(model: nn.Module) -> bool:
    """True if the network's own calls are such regions; the modules in it are not asked."""
    return any(hook is _enter for hook in model._forward_pre_hooks.values())


T = TypeVar("T")


def kept_bytes(run: Callable[[], T], model: nn.Module) -> tuple[T, int]:
    """What ``run`` returns, and how many bytes it keeps for backward.

    Counted are the storages that autograd saves, each once, without those of the network's
    parameters and buffers, which are there anyway.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    # The tensors are held until the end, else a freed storage's address could be counted again.
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.detach())
        return kept[-1]

    with saved_tensors_hooks(pack, lambda t: t):
        result = run()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return result, sum(size for address, size in storages.items() if address not in own)


def kept_on(model: nn.Module, example: Any) -> int:
    """How many bytes the network keeps for backward when a copy of it trains on the example."""
    own = copy.deepcopy(model).train()
    if is_installed(model) and not is_installed(own):
        install(own)  # torch copies an fx.GraphModule without its hooks
    with torch.random.fork_rng(gpus_of(own)), torch.enable_grad():
        return kept_bytes(lambda: call(own, example), own)[1]


def _enter(module: nn.Module, _: Any) -> None:
    if torch.compiler.is_compiling():
        return
    _leave_interrupted()
    region = recomputing()
    region.__enter__()
    _CALLS.open.append((id(module), id(sys._getframe(1)), region))


def _leave(module: nn.Module, *_: Any) -> None:
    # A call that failed before the first hook was reached has nothing to leave.
    if torch.compiler.is_compiling() or all(key != id(module) for key, *_ in _CALLS.open):
        return
    ended = None
    while ended != id(module):
        ended, _frame, region = _CALLS.open.pop()
        region.__exit__()


def _leave_interrupted() -> None:
    """Ends the regions of calls that are over: torch calls no hook behind a KeyboardInterrupt."""
    if not _CALLS.open:
        return
    running: set[int] = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        running.add(id(frame))
        frame = frame.f_back
    while _CALLS.open and _CALLS.open[-1][1] not in running:
        _CALLS.open.pop()[-1].__exit__()
