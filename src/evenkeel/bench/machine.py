"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import __version__, allocator

__all__ = ["machine"]

_TUNES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def machine() -> dict[str, Any]:
    """The machine and the software, as plain data; nothing in it names a person or a host."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cpu_family": _cpu_field("cpu family"),
        "cpu_model": _cpu_field("model"),
        "cores": os.cpu_count(),
        "caches": caches(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "features": _features(),
        "memory_gib": _memory(),
        "load": _load(),
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()).strip(),
        "huge_pages": _read(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "allocator": allocator.status().setting,
        "allocator_variables": _tuned(os.environ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "evenkeel": __version__,
        "threads": torch.get_num_threads(),
        "gpu": _gpu(),
    }


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "triton": _triton(),
    }


def _triton() -> str | None:
    """Its version, by any name under which it is installed."""
    if find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "of unknown version"


def caches() -> dict[str, str]:
    """The caches of the first core, such as {'L1 data': '48K', 'L2': '1024K'}; perhaps empty."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(folder / name) for name in ("level", "type", "size"))
        if level and size:
            which = "" if kind in (None, "Unified") else f" {kind.lower()}"
            found[f"L{level}{which}"] = size
    return found


def _tuned(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(_TUNES)}


def _cpu_field(name: str) -> str | None:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _features() -> list[str]:
    """Those of the CPU's instruction sets that matter here."""
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
    flags = (_cpu_field("flags") or _cpu_field("Features") or "").split()
    return [name for name in wanted if name in flags]


def _memory() -> float | None:
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemTotal:"):
            return round(int(line.split()[1]) / 2**20, 1)
    return None


def _load() -> float | None:
    """How many processes wanted a core during the last minute; above 0 somebody else was there."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
