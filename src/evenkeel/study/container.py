"""One safetensors file with a config that is checked: written whole or not at all, never trusted.

The config is JSON under the key ``evenkeel`` of the file's metadata::

    {"format": 1, "kind": "model", "sha256": "...", "config": {...}}

The checksum covers the config and every tensor, so that a flipped bit in a weight is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..errors import FormatError, StudyError, first_line
from ..files import whole
from ..surgery.exporting.programs import KEY as FOLDED

__all__ = ["KINDS", "read", "write"]

KINDS: Final = {"model": "a trained network", "training": "a training that is not finished"}
_KEY: Final = "evenkeel"
_FORMAT: Final = 1
_REFUSED: Final = (
    "cannot be written ({}); free some space or check the rights; what was there before is still "
    "there"
)


def write(path: Path, kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes the file whole or not at all; equal contents give equal bytes.

    Raises:
        StudyError: the disk is full or the folder cannot be written; the old file is still there.
    """
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    body = {"format": _FORMAT, "kind": kind, "config": config}
    body["sha256"] = _digest(body, own)
    with whole(path, StudyError, _REFUSED) as part:
        part.write_bytes(to_bytes(own, {_KEY: _canonical(body)}))


def read(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a file of this kind, all on the CPU.

    Raises:
        FormatError: the file is missing, damaged, of another program, of a newer version, or of
            another kind; which file, and why.
    """
    try:
        if not path.is_file():
            raise FormatError(
                f"{path}: " + ("is not a file" if path.exists() else "there is no such file")
            )
        with safe_open(path, framework="pt", device="cpu") as file:
            text = _text(path, file.metadata())
            body = _checked_body(path, text, kind)
            # Cloned, because the tensors are views of the mapped file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"{path}: is no safetensors file that can be read ({first_line(error)})"
        ) from error
    # The text, too, must be as we write it: 1E-05 for 1e-05 is a flipped bit all the same.
    said = _canonical(body)
    if body.pop("sha256") != _digest(body, tensors) or text != said:
        raise FormatError(
            f"{path}: is damaged: its contents do not match its checksum; take another copy, or "
            "train again"
        )
    return body["config"], tensors


def _text(path: Path, metadata: Mapping[str, str] | None) -> str:
    metadata = metadata or {}
    text = metadata.get(_KEY)
    if FOLDED in metadata:
        raise FormatError(
            f"{path}: holds weights alone, as 'evenkeel fold' and export write them; give what "
            "'evenkeel train' wrote, or fold its network in Python and load them: "
            "folded.load_state_dict(safetensors.torch.load_file(path))"
        )
    if text is None:
        raise FormatError(
            f"{path}: was not written by evenkeel: its metadata has no '{_KEY}'; give a file that "
            "'evenkeel train' wrote"
        )
    return text


def _checked_body(path: Path, text: str, kind: str) -> dict[str, Any]:
    """The parsed text, known to be of our format and of the wanted kind."""
    try:
        body = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: its config is no JSON that can be read ({error})") from error
    if not isinstance(body, dict) or type(body.get("format")) is not int:
        raise FormatError(f"{path}: its config does not say which format it has")
    if body["format"] > _FORMAT:
        raise FormatError(
            f"{path}: was written by a newer evenkeel (format {body['format']}, this one knows "
            f"{_FORMAT}); upgrade evenkeel"
        )
    wanted = {"format", "kind", "sha256", "config"}
    if body["format"] < 1 or set(body) != wanted or not isinstance(body["config"], dict):
        raise FormatError(f"{path}: its config is not laid out as format {_FORMAT} is")
    if body["kind"] != kind:
        found = KINDS.get(str(body["kind"]), "something unknown")
        hint = "; go on with it by --resume" if body["kind"] == "training" else ""
        raise FormatError(f"{path}: holds {found}, not {KINDS[kind]}{hint}")
    return body


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the config and of every tensor: its name, type, shape and bytes."""
    digest = hashlib.sha256(_canonical(body).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
