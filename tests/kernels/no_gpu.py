"""A driver for Triton that launches nothing: kernels are compiled for an H200 without one."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget


class Launch(NamedTuple):
    """Which kernel, how many programs, and the arguments as Triton's launcher gets them."""

    name: str
    grid: tuple[int, int, int]
    arguments: tuple[object, ...]


class Driver:
    """Notes what would be launched, in ``launches``, and the machine code, in ``images``."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.images: dict[str, list[bytes]] = {}
        self.utils = SimpleNamespace(
            load_binary=self._load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, *rest: object) -> None:
            # stream, function, packed metadata, metadata of the launch, two hooks
            self.launches.append(Launch(metadata.name, (x, y, z), rest[6:]))

        return launch

    def _load(self, name: str, image: bytes, shared: int, device: int) -> tuple[int, ...]:
        self.images.setdefault(name, []).append(image)
        return 1, 2, 0, 0, 1024


class Resources(NamedTuple):
    """What a compiled kernel takes of each thread: registers, and bytes that found none."""

    registers: int
    spilled: int
    widest: int
    """Bits of its widest load."""
    loop: int
    """Instructions of its longest loop that loads anything."""


def resources(image: bytes, folder: Path) -> Resources:
    """Read off the machine code by NVIDIA's tool, which comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(image)

    def told(*options: str) -> str:
        command = [tool, *options, file]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage, code = told("--dump-resource-usage"), told("--dump-sass")
    loads = re.findall(r"LDG\.E\S*", code)
    widths = [int(bits) for load in loads for bits in re.findall(r"\.(?:U|S)?(\d+)$", load)]
    found = (re.search(rf"{word}:(\d+)", usage) for word in ("REG", "STACK"))
    numbers = (int(match[1]) for match in found if match)
    return Resources(*numbers, max([32, *widths]), max([0, *map(len, _loops(code))]))


def _loops(code: str) -> Iterator[list[str]]:
    """The instructions from where each jump back leads to that jump, if any of them loads."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", code, re.MULTILINE)
    known = [(int(address, 16), text) for address, text in lines]
    for address, text in known:
        jump = re.search(r"BRA(?:\.\w+)*\s+(?:\S+,\s*)?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            body = [t for place, t in known if int(jump[1], 16) <= place <= address]
            if any("LDG" in t for t in body):
                yield body
