"""What all commands share: the console, how errors look, the device, new files, time spans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from ..errors import ConfigError, StudyError
from ..files import whole

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_free",
    "check_place",
    "complain",
    "console",
    "device_named",
    "duration",
    "write_atomically",
]

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
        if device.type != "cuda" or torch.cuda.is_available():
            torch.zeros(1, device=device).item()  # torch knows names that it was not built for
            return device
    except Exception:
        raise ConfigError(f"unknown device '{name}'; choose auto, cpu or cuda") from None
    raise ConfigError(
        f"device '{name}' was asked for but torch {torch.__version__} finds no CUDA here; "
        "use --device cpu"
    )


def check_place(out: Path) -> None:
    """Refuses what cannot be a new file, before the work and not behind it.

    Raises:
        ConfigError: it is a folder, or its folder is missing.
    """
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file in it")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it first")


def check_free(out: Path, overwrite: bool) -> None:
    """Refuses a file that is there already, unless it is to be replaced.

    Raises:
        ConfigError: it is there.
    """
    if out.exists() and not overwrite:
        raise ConfigError(
            f"{out} is there already; replace it with --overwrite, or choose another --out"
        )


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
    with whole(path, StudyError) as part:
        part.write_text(text, encoding="utf-8")
