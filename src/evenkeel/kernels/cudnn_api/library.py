"""One copy of cuDNN for the process, found once, and its statuses as errors.

It is looked for in this order; the first that is there is taken, and no other tried:

1. the copy that is mapped already, which in a CUDA build of torch is torch's own. A second copy
   would mix its own entry points with the sub-libraries of the first, so it is never opened;
2. ``EVENKEEL_CUDNN``: the path of libcudnn.so.9, or of the folder that has it;
3. ``nvidia/cudnn/lib`` on ``sys.path``, where the wheels nvidia-cudnn-cu12 and -cu13 put it;
4. the loader's own path (``ldconfig``, ``LD_LIBRARY_PATH``).

libcudnn.so.9 is only a shim: a call opens the sub-libraries, and where one is missing cuDNN aborts
the process. So they are opened before anything is called.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any, Final

from ...errors import BackendError
from .values import RESULTS, SIGNATURES, STATUS

__all__ = ["SWITCH", "CudnnError", "Library", "library", "mapped", "missing"]

SWITCH: Final = "EVENKEEL_CUDNN"
_SHIM: Final = "libcudnn.so.9"
_PARTS: Final = ("libcudnn_graph.so.9", "libcudnn_ops.so.9")
_MAJOR: Final = 9
_REMEDIES: Final = {
    1000: "cuDNN cannot work here; see that the driver and a GPU are there (nvidia-smi)",
    2000: "the parameters do not fit together",
    3000: "cuDNN has no kernel for this; try another mode, layout or dtype",
    4000: "this is a fault inside cuDNN, or it found no memory",
    5000: "it may come from an earlier kernel; run again with CUDA_LAUNCH_BLOCKING=1",
}


class CudnnError(BackendError):
    """A call that cuDNN answered with an error.

    Attributes:
        function: the name of the C function.
        status: the number that it returned.
        name: the status as the header calls it.
    """

    def __init__(self, function: str, status: int, text: str, about: str) -> None:
        self.function, self.status = function, status
        self.name = STATUS.get(status, "a status that its header of 9.28 does not have")
        said = f": {text}" if text else ""
        remedy = _REMEDIES.get(status // 1000 * 1000, "")
        super().__init__(
            f"{function} failed with {self.name} ({status}){said} [{about}]"
            + (f"; {remedy}" if remedy else "")
        )
        self._given = (function, status, text, about)

    def __reduce__(self) -> tuple[type[CudnnError], tuple[str, int, str, str]]:
        return CudnnError, self._given


class Library:
    """An open cuDNN with its prototypes declared.

    Attributes:
        path: where it lies.
        version: as a tuple, such as (9, 28, 0).
    """

    def __init__(self, dll: Any, path: str) -> None:
        self.path = path
        self._functions: dict[str, Any] = {}
        for name, arguments in SIGNATURES.items():
            function = getattr(dll, name, None)
            if function is None:
                raise BackendError(
                    f"cuDNN in {path} has no {name}; evenkeel needs a cuDNN 9 that still has the "
                    "batch-norm calls, such as 9.28"
                )
            function.argtypes = arguments
            function.restype = RESULTS.get(name, ctypes.c_int)
            self._functions[name] = function
        self.number = int(self._functions["cudnnGetVersion"]())
        self.version = (self.number // 10000, self.number // 100 % 100, self.number % 100)
        if self.version[0] != _MAJOR:
            raise BackendError(
                f"cuDNN in {path} says that its version is {self.number}; evenkeel's binding is "
                f"for version {_MAJOR}"
            )

    def __str__(self) -> str:
        return f"cuDNN {'.'.join(map(str, self.version))}"

    def call(self, name: str, *arguments: Any, about: str = "") -> None:
        """Calls a function that returns a status.

        Raises:
            CudnnError: the status is not CUDNN_STATUS_SUCCESS.
        """
        status = self._functions[name](*arguments)
        if status != 0:
            facts = f"{self}; {about}" if about else str(self)
            raise CudnnError(name, status, self.last_error(), facts)

    def last_error(self) -> str:
        """What cuDNN last said about an error in this thread; often nothing."""
        memory = ctypes.create_string_buffer(2048)
        self._functions["cudnnGetLastErrorString"](memory, len(memory))
        return " ".join(memory.value.decode(errors="replace").split())

    def text_of(self, status: int) -> str:
        """cuDNN's own name for a status."""
        return str(self._functions["cudnnGetErrorString"](status).decode())


def library() -> Library:
    """The process's cuDNN, opened at the first call.

    Raises:
        BackendError: there is none, or it cannot be used; the message says where it was looked for.
    """
    found = _search()
    if isinstance(found, str):
        raise BackendError(found)
    return found


def missing() -> str | None:
    """Why there is no cuDNN, or None if there is."""
    found = _search()
    return found if isinstance(found, str) else None


@cache
def _search() -> Library | str:
    try:
        return _opened()
    except BackendError as error:
        return str(error)


def _opened() -> Library:
    if sys.platform != "linux":
        raise BackendError(f"cuDNN is looked for on Linux only, and this is {sys.platform}")
    theirs, place = _torchs(), _place()
    try:
        _check_parts(place)
        dll = ctypes.CDLL(place)
    except OSError as error:
        raise BackendError(
            f"cuDNN 9 cannot be opened ({error}); install a CUDA build of torch or the wheel "
            f"nvidia-cudnn-cu12 or -cu13, or set {SWITCH} to the folder of {_SHIM}"
        ) from error
    opened = Library(dll, mapped() or place)
    if theirs not in (None, opened.number):
        raise BackendError(
            f"{opened} in {opened.path} is not the one that torch uses, {theirs}; two copies must "
            f"not be mixed: unset {SWITCH}, or install the one that torch wants"
        )
    return opened


def _torchs() -> int | None:
    """The version of the cuDNN that torch is built with, if it is."""
    import torch  # a CUDA build maps its cuDNN now

    try:
        version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    except RuntimeError as error:  # torch finds that its own does not fit
        raise BackendError(f"torch cannot use its cuDNN: {error}") from error
    return version


def _place() -> str:
    """What to open. There is no second try: what was opened stays, and would be mixed with it."""
    there, wish = mapped(), os.environ.get(SWITCH)
    if wish:
        asked = Path(wish) / _SHIM if Path(wish).is_dir() else Path(wish)
        if not asked.exists():
            raise BackendError(f"{SWITCH} is {wish}, but there is no {asked}")
        if there is not None and not os.path.samefile(there, asked):
            raise BackendError(
                f"{SWITCH} is {wish}, but this process has {there} open already, and a second copy "
                f"would be mixed with it; unset {SWITCH}"
            )
        return str(asked)
    if there is not None:
        return there
    for entry in sys.path:
        candidate = Path(entry or ".").resolve() / "nvidia" / "cudnn" / "lib" / _SHIM
        if candidate.exists():
            return str(candidate)
    return _SHIM


def mapped() -> str | None:
    """The file of the libcudnn.so.9 that this process has open, or None."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, _, name = line.partition("/")
        if f"/{name}".rpartition("/")[2].startswith(_SHIM):
            return f"/{name}".removesuffix(" (deleted)")
    return None


def _check_parts(shim: str) -> None:
    """Opens the sub-libraries: beside the shim, where it looks first, or by the loader.

    Opening the shim alone is harmless, but calling it without them ends the process.

    Raises:
        OSError: one cannot be opened.
    """
    for part in _PARTS:
        beside = Path(shim).resolve().parent / part
        ctypes.CDLL(str(beside) if beside.exists() else part)
