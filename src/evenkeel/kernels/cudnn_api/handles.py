"""Handles: one for each thread and device, on the stream that torch uses now.

cuDNN is safe in threads that share no handle. Autograd runs backward in threads of its own, so a
handle that a dead thread has left is given to the next one. None is destroyed: that waits for the
device, which at exit may be gone.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_void_p

import torch

from .library import Library

__all__ = ["Handle", "Pool", "ready"]


class Handle:
    """A cudnnHandle_t and the stream it was last given."""

    def __init__(self, library: Library) -> None:
        made = c_void_p()
        library.call("cudnnCreate", byref(made))
        self.pointer = made.value
        self._library = library
        self._stream: int | None = None

    def use(self, stream: int) -> None:
        """Puts the calls that follow on a stream; if it is the last one, nothing is called."""
        if stream != self._stream:
            self._library.call("cudnnSetStream", self.pointer, stream)
            self._stream = stream


class Pool:
    """The handles of all threads of this process."""

    def __init__(self) -> None:
        self._free: dict[int, deque[Handle]] = defaultdict(deque)
        self._local = threading.local()

    def handle(self, library: Library, device: int) -> Handle:
        """This thread's handle of a device, made if it has none."""
        own: _Own | None = getattr(self._local, "own", None)
        if own is None:
            own = self._local.own = _Own(self._free)
        found = own.handles.get(device)
        if found is None:
            try:
                found = self._free[device].popleft()
            except IndexError:
                found = Handle(library)
            own.handles[device] = found
        return found


class _Own:
    """What one thread holds; when the thread ends, it goes to those that are free."""

    def __init__(self, free: dict[int, deque[Handle]]) -> None:
        self.handles: dict[int, Handle] = {}
        self._free = free

    def __del__(self) -> None:
        for device, handle in self.handles.items():
            self._free[device].append(handle)


_pool = Pool()


def _forget() -> None:
    """A child has none of its parent's handles, and cannot use them either."""
    global _pool
    _pool = Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def ready(library: Library, device: torch.device) -> Iterator[int | None]:
    """A handle on torch's current stream, with the device made current meanwhile."""
    with torch.cuda.device(device):
        handle = _pool.handle(library, torch.cuda.current_device())
        handle.use(torch.cuda.current_stream().cuda_stream)
        yield handle.pointer
