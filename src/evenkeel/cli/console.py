"""What all commands share: the console, the way errors look, the device, spans of time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from ..errors import ConfigError, StudyError

if TYPE_CHECKING:
    import torch

__all__ = ["complain", "console", "device_named", "duration", "write_atomically"]

console = Console(highlight=False)


def complain(text: str) -> None:
    """Prints an error on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]error:[/] {escape(text)}"
    )


def device_named(name: str) -> torch.device:
    """'auto' is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device '{name}'; choose auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device '{name}' was asked for but torch {torch.__version__} finds no CUDA here; "
            "use --device cpu"
        )
    return device


def duration(seconds: float) -> str:
    """A span of time for people: '8 s', '2 min 5 s', '1 h 20 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def write_atomically(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        StudyError: the disk is full or the folder cannot be written; the old file is still there.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StudyError(f"{path} cannot be written: {error.strerror or error}") from error
