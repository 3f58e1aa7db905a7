"""A network's new file: torch's and ONNX's formats, or Darknet's pair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import ConfigError, meant
from .console import check_free, check_place
from .network import is_cfg

if TYPE_CHECKING:
    from torch import nn

    from ..formats.darknet import Saved
    from ..surgery.export import Exported

__all__ = ["FORMATS", "check_out", "write_out"]

FORMATS: Final = (
    ".pt2 (torch.export), .onnx, .cfg (Darknet's, and .weights beside it), or .safetensors for the "
    "weights alone."
)

_SUFFIXES: Final = (".pt2", ".onnx", ".cfg", ".safetensors")


def check_out(out: Path, opset: int | None, overwrite: bool, sources: list[Path]) -> None:
    """Refuses a file that cannot be written before the work, not behind it.

    Raises:
        ConfigError: an unknown format, no folder, a file that is there already or is read.
    """
    from ..surgery.export import check_target

    check_place(out)
    if out.suffix.lower() not in _SUFFIXES:
        raise ConfigError(
            f"{out}: a network is not written as '{out.suffix}'{meant(out.suffix, _SUFFIXES)}; "
            f"choose {', '.join(_SUFFIXES)}"
        )
    if is_cfg(str(out)):
        if opset is not None:
            raise ConfigError("--opset is ONNX's; leave it out, or write .onnx")
    else:
        check_target(out, opset)
    for path in _files(out):
        if path.exists() and any(s.exists() and path.samefile(s) for s in sources):
            raise ConfigError(f"{path} is what the network is made of; choose another --out")
        check_free(path, overwrite)


def write_out(
    network: nn.Module,
    example: Any,
    out: Path,
    *,
    dynamic_batch: bool,
    opset: int | None,
    about: dict[str, Any],
    convention: str | None,
    source: nn.Module,
) -> Exported | Saved:
    """Writes a network, reads it back and compares; ``source`` is what it was made of."""
    if not is_cfg(str(out)):
        from ..surgery.export import export

        return export(network, example, out, dynamic_batch=dynamic_batch, opset=opset, about=about)
    from ..formats import darknet

    cfg, weights = _files(out)
    like = source if isinstance(source, darknet.Network) else None
    return darknet.save(network, cfg, weights, example, convention=convention, like=like)


def _files(out: Path) -> list[Path]:
    return [out, out.with_suffix(".weights")] if is_cfg(str(out)) else [out]
