"""glibc's allocator, told at run time to keep large blocks.

By default glibc gives large blocks back to the system when they are freed. A training step frees
all of its activations, so every fresh tensor takes its pages from the system again, zeroed, at a
fault for every 4 KiB; on large activations that costs more than the arithmetic. `keep_blocks` makes
glibc keep them, for the whole process, by ``mallopt``:

- ``M_MMAP_MAX = 0``: no block is a mapping of its own, which a free would undo.
- ``M_TRIM_THRESHOLD = -1``: the heap's end is not given back. Without either of the two the other
  one is of no use.
- ``M_TOP_PAD = 64 MiB``: heaps of threads other than the main one are not given back when empty.

Where Linux gives huge pages to programs that ask for them, `keep_blocks` asks: it makes the heap as
large at once as half of the machine's memory, of which nothing is taken before it is used, and
marks what is new in it by ``madvise``. That saves walks through page tables, a few percent of a
training step.

What is kept stays with the process until it ends or `default_blocks` is called. ``M_ARENA_MAX`` is
left alone, for threads would wait for each other in one arena. So blocks above 64 MiB that another
thread than the main one asks for go back still: they do not fit into a heap of its arena.

The environment variable ``EVENKEEL_ALLOCATOR=default`` turns `keep_blocks` off; ``keep`` is as good
as none.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError, meant

__all__ = [
    "KEEP",
    "SETTINGS",
    "SWITCH",
    "Status",
    "check",
    "default_blocks",
    "keep_blocks",
    "status",
    "variables",
]

SWITCH = "EVENKEEL_ALLOCATOR"
SETTINGS = ("keep", "default")
KEEP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""The same as environment variables, which glibc reads when a process starts."""

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # <malloc.h>
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 1 << 26}
# glibc's thresholds move up with the blocks that are freed, as far as this, but not once mallopt
# has set one. So the way back leads to where they end in a process that has freed large blocks.
_FARTHEST = 1 << 25 if ctypes.sizeof(ctypes.c_long) == 8 else 1 << 19
_DEFAULT = {
    _MMAP_MAX: 1 << 16,
    _MMAP_THRESHOLD: _FARTHEST,
    _TRIM_THRESHOLD: 2 * _FARTHEST,
    _TOP_PAD: 1 << 17,
}

_HUGE, _NOT_HUGE = 14, 15  # MADV_HUGEPAGE, MADV_NOHUGEPAGE
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


@dataclass(frozen=True)
class Status:
    """What the allocator of this process does with large blocks, and why.

    ``setting`` is 'keep'; 'default', glibc's own; 'own', set up by the user by other means; or
    'system', an allocator that is not glibc's. ``text`` is a sentence about it. ``at_run_time`` is
    True if `keep_blocks` has set it.
    """

    setting: str
    text: str
    at_run_time: bool = False

    @property
    def keeps(self) -> bool:
        """True if large blocks stay with the process."""
        return self.setting == "keep"


_lock = threading.Lock()
_is_kept = False
_huge_from: int | None = None
"""Where the part of the heap begins that has huge pages; None without one."""


def keep_blocks() -> Status:
    """Makes glibc keep large blocks in this process from now on; again, it changes nothing.

    They lie on huge pages where Linux gives these to programs that ask, unless the process's
    memory is limited, the system promises no more than it has, or another thread than the main
    one calls.

    It does nothing where the allocator is not glibc's, where ``MALLOC_`` variables or
    ``GLIBC_TUNABLES`` for malloc are set, and with ``EVENKEEL_ALLOCATOR=default``; the text of
    what it returns says so.

    Returns:
        what is in force now.

    Raises:
        ConfigError: ``EVENKEEL_ALLOCATOR`` is neither 'keep' nor 'default'.
    """
    global _is_kept, _huge_from
    with _lock:
        found = _status()
        libc = _glibc()
        if found.setting != "default" or _switch() == "default" or libc is None:
            return found
        if not _set(libc, _KEPT):
            _set(libc, _DEFAULT)
            return Status("default", "glibc's default, for its mallopt refuses another setting")
        _is_kept = True
        _huge_from = _on_huge_pages(libc)
        return _status()


def default_blocks() -> Status:
    """Undoes `keep_blocks` and gives what is free back to the system; else it changes nothing.

    glibc's thresholds, which grow with the blocks that a process frees, are set to the farthest
    they go: blocks above 32 MiB go back at every free, and the heap's end above 64 MiB. Huge pages
    are asked for no longer.

    Returns:
        what is in force now.

    Raises:
        ConfigError: ``EVENKEEL_ALLOCATOR`` is neither 'keep' nor 'default'; it is undone all the
            same.
    """
    global _is_kept, _huge_from
    with _lock:
        libc = _glibc()
        if _is_kept and libc is not None:
            _set(libc, _DEFAULT)
            libc.malloc_trim(0)
            if _huge_from is not None:
                _advise(libc, _huge_from, _end_of_heap(libc), _NOT_HUGE)
            _is_kept, _huge_from = False, None
        return _status()


def status() -> Status:
    """What is in force now; changes nothing.

    Raises:
        ConfigError: ``EVENKEEL_ALLOCATOR`` is neither 'keep' nor 'default'.
    """
    with _lock:
        return _status()


def check(wish: str) -> None:
    """Checks the name of a setting that is asked for: 'keep' or 'default'.

    Raises:
        ConfigError: it is neither.
    """
    if wish not in SETTINGS:
        raise ConfigError(
            f"unknown allocator '{wish}'{meant(wish, SETTINGS)}; choose {' or '.join(SETTINGS)}"
        )


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of the variables that set up glibc's allocator."""
    return {
        key: value
        for key, value in environment.items()
        if key.startswith("MALLOC_") or (key == "GLIBC_TUNABLES" and "glibc.malloc" in value)
    }


def _status() -> Status:
    switch = _switch()
    if _glibc() is None:
        preloaded = os.environ.get("LD_PRELOAD")
        what = f" but that of LD_PRELOAD={preloaded}" if preloaded else ""
        return Status("system", f"not glibc's{what}, so there is nothing to set")
    if _is_kept:
        text = "glibc keeps large blocks, set at run time"
        text += "" if _huge_from is None else ", on huge pages"
        return Status("keep", text, at_run_time=True)
    own = variables(os.environ)
    if own == KEEP:
        return Status("keep", "glibc keeps large blocks, set by the environment")
    if own:
        return Status("own", f"set up by you, in the environment ({', '.join(sorted(own))})")
    text = "glibc's default"
    if switch == "default":
        text += f", as {SWITCH}=default asks"
    return Status("default", text)


def _switch() -> str:
    wish = os.environ.get(SWITCH) or "keep"
    if wish not in SETTINGS:
        raise ConfigError(
            f"unknown {SWITCH}={wish}{meant(wish, SETTINGS)}; choose {' or '.join(SETTINGS)}"
        )
    return wish


def _glibc() -> ctypes.CDLL | None:
    """glibc, if it is its allocator that this process uses."""
    try:
        libc, process = ctypes.CDLL("libc.so.6"), ctypes.CDLL(None)
        libc.gnu_get_libc_version, libc.mallopt, libc.malloc_trim  # noqa: B018 - are they there?
        # What torch takes its memory from. An allocator that was preloaded has one of its own.
        used, own = (ctypes.cast(lib.posix_memalign, ctypes.c_void_p) for lib in (process, libc))
    except (OSError, AttributeError, TypeError):  # Windows has no library of the process
        return None
    return libc if used.value == own.value else None


def _set(libc: ctypes.CDLL, values: Mapping[int, int]) -> bool:
    taken = [libc.mallopt(key, value) == 1 for key, value in values.items()]
    return all(taken)


def _on_huge_pages(libc: ctypes.CDLL) -> int | None:
    """Makes the heap large, asks for huge pages there, and says from where; None if it did not."""
    if not _huge_pages_can_be_asked_for():
        return None
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    start = _end_of_heap(libc)
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    libc.free(libc.malloc(ctypes.c_size_t(size)))  # the heap's end is not given back any more
    return start if _advise(libc, start, _end_of_heap(libc), _HUGE) else None


def _huge_pages_can_be_asked_for() -> bool:
    import resource

    limits = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return False
    # Where the system promises no more than it has, all of the heap would count as taken.
    return "[madvise]" in _read(_HUGE_PAGES) and _read(_OVERCOMMIT).strip() in ("0", "1")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _end_of_heap(libc: ctypes.CDLL) -> int:
    libc.sbrk.restype = ctypes.c_void_p
    return int(libc.sbrk(ctypes.c_long(0)))


def _advise(libc: ctypes.CDLL, start: int, end: int, advice: int) -> bool:
    """True if there is something between the two, and the system takes the advice."""
    given = (ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
    return end > start and libc.madvise(*given) == 0
