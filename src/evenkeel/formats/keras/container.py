"""Keras's files: the config, and each layer's arrays in their order. Nothing in them is run.

A .keras file is a zip with config.json and model.weights.h5; an .h5 file has the config among its
attributes. What HDF5 could fetch from elsewhere (external links and storage, virtual datasets) is
refused, and so is what would unpack to more than the file can hold.
"""

from __future__ import annotations

import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError, FormatError, first_line

__all__ = ["Arrays", "Saved", "Weights", "read"]

Arrays = list[NDArray[Any]]
Weights = dict[tuple[str, ...], Arrays]

_LARGEST_CONFIG: Final = 2**26
_DAMAGES: Final = (
    OSError, LookupError, ValueError, TypeError, AttributeError, EOFError, RuntimeError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip
"""What the libraries raise for files that are not what they seem."""
_LAYERS: Final = ("layers", "_layer_checkpoint_dependencies")
"""Where a model's layers are; files of Keras 2.13 have the second name."""
_MOST_UNPACKED: Final = 20
"""Times its own size that a compressed file may unpack to."""


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    Attributes:
        name: of the file, for messages.
        config: of the model: its class_name and config.
        weights: arrays by the names of a layer and of the models around it, outermost first.
        is_old: Keras 2 wrote it.
    """

    name: str
    config: dict[str, Any]
    weights: Weights
    is_old: bool


def read(path: Path) -> Saved:
    """The config and the arrays of a file that Keras wrote.

    Raises:
        FormatError: it is no such file, is damaged, or holds weights alone.
        ConfigError: h5py is not installed.
    """
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise FormatError(f"{path}: {what}; give a .keras or .h5 file")
    if find_spec("h5py") is None:
        raise ConfigError("reading Keras's files needs h5py; run: pip install 'evenkeel[keras]'")
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        return _read_h5(path)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    except _DAMAGES as error:
        raise FormatError(
            f"{path}: it is no file of Keras's, or a damaged one ({first_line(error)}); save the "
            "model again, model.save('x.keras')"
        ) from error


def _read_zip(path: Path) -> Saved:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        if not {"config.json", "model.weights.h5"} <= names:
            raise FormatError(
                "a .keras file holds config.json and model.weights.h5, this one "
                f"{', '.join(sorted(names)[:4]) or 'nothing'}"
            )
        room = _MOST_UNPACKED * path.stat().st_size + 2**16
        for name, most in (("config.json", _LARGEST_CONFIG), ("model.weights.h5", room)):
            size = archive.getinfo(name).file_size
            if size > most:
                raise FormatError(f"{name} would be {size:,} bytes, which cannot be right")
        config = _parsed(archive.read("config.json"))
        data = archive.read("model.weights.h5")
        about = json.loads(archive.read("metadata.json")) if "metadata.json" in names else {}
    with _opened(io.BytesIO(data), len(data)) as file:
        weights: Weights = {}
        _collect(file.group(""), (), config, weights, file)
    return Saved(str(path), config, weights, _is_old(about.get("keras_version")))


def _read_h5(path: Path) -> Saved:
    with _opened(path, path.stat().st_size) as file:
        root = file.group("")
        if "model_config" not in root.attrs:
            raise FormatError("it holds weights alone; save the whole model, model.save('x.keras')")
        config = _parsed(root.attrs["model_config"])
        groups = file.group("model_weights")
        weights: Weights = {}
        for layer in _names(groups.attrs, "layer_names"):
            names = _names(file.group(f"model_weights/{layer}").attrs, "weight_names")
            weights[layer,] = [file.array(f"model_weights/{layer}/{name}") for name in names]
        version = root.attrs.get("keras_version")
    return Saved(str(path), config, weights, _is_old(version))


def _names(attributes: Any, key: str) -> list[str]:
    """A list among a group's attributes, which is in numbered parts where it is long."""
    parts = [attributes[key]] if key in attributes else []
    while key not in attributes and f"{key}{len(parts)}" in attributes:
        parts.append(attributes[f"{key}{len(parts)}"])
    if not parts:
        raise FormatError(f"its attribute '{key}' is missing")
    return [_text(name) for part in parts for name in part]


def _is_old(version: Any) -> bool:
    return version is not None and _text(version).startswith(("1.", "2."))


def _parsed(text: bytes | str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its config is no JSON ({first_line(error)})") from error
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
        raise FormatError("its config describes no model")
    return found


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class _File:
    """An open HDF5 file of which only what is in the file itself is read."""

    def __init__(self, h5: Any, size: int) -> None:
        self.h5, self.left = h5, _MOST_UNPACKED * size + 2**16
        self.seen: set[int] = set()

    def group(self, path: str) -> Any:
        """A group by its path from the root, through no link to elsewhere."""
        import h5py

        found = self.h5
        for name in filter(None, path.split("/")):
            if not isinstance(found.get(name, getlink=True), h5py.HardLink):
                raise FormatError(f"'{path}' lies in another file or place")
            found = found[name]
        return found

    def once(self, path: str) -> Any:
        """A group that nothing else has been."""
        import h5py

        found = self.group(path)
        address = int(h5py.h5o.get_info(found.id).addr)
        if address in self.seen:
            raise FormatError(f"'{path}' is in the file in two places; it is damaged")
        self.seen.add(address)
        return found

    def array(self, path: str) -> NDArray[Any]:
        """The values of a dataset."""
        found = self.group(path)
        if getattr(found, "dtype", None) is None or found.dtype.kind not in "fiu":
            raise FormatError(f"'{path}' holds no numbers")
        if found.external or found.is_virtual:
            raise FormatError(f"the numbers of '{path}' lie in another file")
        self.left -= found.nbytes
        if self.left < 0:
            raise FormatError("its arrays would be larger than the file; it is damaged")
        values: NDArray[Any] = np.asarray(found[()])
        return values


@contextmanager
def _opened(source: Any, size: int) -> Iterator[_File]:
    import h5py

    with h5py.File(source, "r") as h5:
        yield _File(h5, size)


def _collect(
    group: Any,
    around: tuple[str, ...],
    model: Mapping[str, Any],
    weights: Weights,
    file: _File,
) -> None:
    """The arrays of a model's layers, and of the models among them."""
    found = next((key for key in _LAYERS if key in group), None)
    if found is None:
        return  # what misses its arrays will say so
    entries = _entries(model)
    for key in file.group(f"{group.name}/{found}"):
        layer = file.once(f"{group.name}/{found}/{key}")
        held = file.group(f"{layer.name}/vars")
        inner = entries.get(key, {})
        name = held.attrs.get("name", inner.get("name", key))
        path = (*around, _text(name))
        weights[path] = [file.array(f"{held.name}/{place}") for place in sorted(held, key=int)]
        _collect(layer, path, inner, weights, file)


def _entries(model: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """A model's layers by their keys among the weights: the class in snake case, numbered.

    Until Keras 3.6 nothing else said which layer the weights are of.
    """
    found: dict[str, Mapping[str, Any]] = {}
    counts: dict[str, int] = {}
    config = model.get("config")
    for entry in config.get("layers", ()) if isinstance(config, Mapping) else ():
        kind = re.sub(r"\W+", "", str(entry["class_name"]))
        kind = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind)
        kind = re.sub("([a-z])([A-Z])", r"\1_\2", kind).lower()
        number = counts.get(kind, 0)
        counts[kind] = number + 1
        name = entry.get("name") or entry["config"]["name"]
        found[f"{kind}_{number}" if number else kind] = {**entry, "name": name}
    return found
