"""IDX files, the format of MNIST: strict, and no header is believed before the file agrees.

An IDX file is two zero bytes, a type code (8 for unsigned bytes), the number of dimensions, one
big-endian 32-bit size for each of them, and the values, last dimension fastest.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import numpy as np
import torch

from .base import Dataset, Split, found_in, refuse
from .catalog import DIGITS, FASHION, MNIST_MD5

__all__ = ["FILES", "load_fashion", "load_idx", "load_mnist", "read"]

FILES: Final = {
    "train-images": "train-images-idx3-ubyte",
    "train-labels": "train-labels-idx1-ubyte",
    "t10k-images": "t10k-images-idx3-ubyte",
    "t10k-labels": "t10k-labels-idx1-ubyte",
}
"""What each of the four files is called, with or without .gz."""

_UBYTE: Final = 0x08
_TYPES: Final = {9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
_GZIP: Final = b"\x1f\x8b"
_DEFLATE_BEST: Final = 1032  # no deflate stream grows by more than this factor
_MOST_BYTES: Final = 2**32
_CHUNK: Final = 2**20


class Idx(NamedTuple):
    """The values of one IDX file, and the MD5 of the unpacked file."""

    path: Path
    values: np.ndarray
    md5: str


def load_mnist(folder: Path) -> Dataset:
    """MNIST from the folder or its ``MNIST/raw``; a note tells if it is not the canonical one."""
    files = _read_all(folder, ("", "MNIST/raw"), "mnist")
    other = [FILES[k] for k, md5 in MNIST_MD5.items() if files[k].md5 != md5]
    notes: tuple[str, ...] = ()
    if other:
        notes = (
            f"{files['train-images'].path.parent} does not hold the canonical MNIST: the checksum "
            f"of {', '.join(other)} differs",
        )
    return _dataset("mnist", files, DIGITS, notes)


def load_fashion(folder: Path) -> Dataset:
    """Fashion-MNIST from the folder or its ``FashionMNIST/raw``."""
    files = _read_all(folder, ("", "FashionMNIST/raw"), "fashion-mnist")
    notes: tuple[str, ...] = ()
    if any(files[k].md5 == md5 for k, md5 in MNIST_MD5.items()):
        notes = (f"{files['train-images'].path.parent} holds files of MNIST, not Fashion-MNIST",)
    return _dataset("fashion-mnist", files, FASHION, notes)


def load_idx(folder: Path) -> Dataset:
    """Any four IDX files with the usual names; the classes are the labels of the training set."""
    files = _read_all(folder, ("", "MNIST/raw", "FashionMNIST/raw"), "idx")
    count = int(files["train-labels"].values.max()) + 1
    return _dataset("idx", files, tuple(str(label) for label in range(count)), ())


def read(path: Path, dims: int) -> Idx:
    """Reads one IDX file of unsigned bytes, plain or packed by gzip.

    Args:
        path: the file; how it is packed is told by its first bytes, not by its name.
        dims: the number of dimensions that it must have.

    Raises:
        FormatError: the file is not what it should be, or cannot be read.
    """
    try:
        with path.open("rb") as raw:
            stored = path.stat().st_size
            packed = raw.read(2) == _GZIP
            raw.seek(0)
            if not packed:
                return _parse(path, raw, dims, stored, exact=True)
            with gzip.GzipFile(fileobj=raw) as stream:
                return _parse(path, stream, dims, stored * _DEFLATE_BEST, exact=False)  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise refuse(path, f"damaged gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise refuse(path, f"cannot be read ({error.strerror or error})") from error


def _parse(path: Path, stream: BinaryIO, dims: int, room: int, exact: bool) -> Idx:
    """Reads header and values; ``room`` is how many bytes the file has, or can have at most."""
    head = stream.read(4)
    _check_magic(path, head, dims)
    sizes_raw = stream.read(4 * dims)
    if len(sizes_raw) < 4 * dims:
        found = 4 + len(sizes_raw)
        raise refuse(path, f"ends inside the header of {4 + 4 * dims} bytes", at=found)
    shape = struct.unpack(f">{dims}I", sizes_raw)
    text = " x ".join(str(size) for size in shape)
    if 0 in shape:
        raise refuse(path, f"declares {text} values; no size may be 0", at=4 + 4 * shape.index(0))
    count = math.prod(shape)
    start = 4 + 4 * dims
    if count > _MOST_BYTES:
        raise refuse(path, f"declares {text} = {count:,} bytes; the most is {_MOST_BYTES:,}", at=4)
    if start + count > room or (exact and start + count < room):
        has = f"has {room:,}" if exact else f"cannot unpack to more than {room:,}"
        raise refuse(
            path, f"declares {text} values, so {start + count:,} bytes, but the file {has}", at=4
        )
    values = _take(path, stream, start, count)
    if stream.read(1):
        raise refuse(
            path, f"bytes follow the {text} values that the header declares", start + count
        )
    digest = hashlib.md5(head + sizes_raw, usedforsecurity=False)
    digest.update(values)
    return Idx(path, np.frombuffer(values, np.uint8).reshape(shape), digest.hexdigest())


def _check_magic(path: Path, head: bytes, dims: int) -> None:
    if len(head) < 4:
        raise refuse(path, f"{len(head)} bytes are no IDX file; its header alone has more", at=0)
    if head[:2] != b"\0\0":
        raise refuse(path, f"begins with {head[:4].hex(' ')}; an IDX file begins with 00 00", at=0)
    if head[2] != _UBYTE:
        found = _TYPES.get(head[2], f"unknown type 0x{head[2]:02x}")
        raise refuse(path, f"holds {found}; only unsigned bytes (0x08) can be read", at=2)
    if head[3] != dims:
        want = "n, h, w for images" if dims == 3 else "n for labels"
        raise refuse(path, f"has {head[3]} dimensions, wanted {dims} ({want})", at=3)


def _take(path: Path, stream: BinaryIO, start: int, count: int) -> bytearray:
    """Reads ``count`` bytes, growing with what is really there."""
    values = bytearray()
    while len(values) < count:
        chunk = stream.read(min(_CHUNK, count - len(values)))
        if not chunk:
            end = start + len(values)
            raise refuse(path, f"ends here, {count - len(values):,} bytes too early", at=end)
        values += chunk
    return values


def _read_all(folder: Path, places: Iterable[str], name: str) -> dict[str, Idx]:
    """Finds and reads the four files, and checks each pair against each other."""
    paths = _find(folder, tuple(places), name)
    files = {key: read(path, 3 if key.endswith("images") else 1) for key, path in paths.items()}
    for part in ("train", "t10k"):
        images, labels = files[f"{part}-images"], files[f"{part}-labels"]
        if len(images.values) != len(labels.values):
            raise refuse(
                labels.path,
                f"has {len(labels.values):,} labels for the {len(images.values):,} images of "
                f"{images.path.name}; the two files do not belong together",
                at=4,
            )
    train, test = files["train-images"], files["t10k-images"]
    if train.values.shape[1:] != test.values.shape[1:]:
        raise refuse(
            test.path,
            f"has images of {test.values.shape[1:]} pixels, but those of {train.path.name} have "
            f"{train.values.shape[1:]}",
            at=8,
        )
    return files


def _find(folder: Path, places: tuple[str, ...], name: str) -> dict[str, Path]:
    """The paths of the four files, all from one of the places below the folder."""
    for place in places:
        paths = {key: _existing(folder / place, file) for key, file in FILES.items()}
        whole = {key: path for key, path in paths.items() if path is not None}
        if len(whole) == len(FILES):
            return whole
    below = "".join(f" or its {place}" for place in places if place)
    raise refuse(
        folder,
        f"'{name}' needs {', '.join(FILES.values())} (each plain or .gz) in this folder{below}; "
        f"{found_in(folder)}",
    )


def _existing(folder: Path, file: str) -> Path | None:
    """The plain file, else the packed one; some write a dot before idx."""
    for stem in (file, file.replace("-idx", ".idx")):
        for path in (folder / stem, folder / f"{stem}.gz"):
            if path.is_file():
                return path
    return None


def _dataset(
    name: str, files: dict[str, Idx], classes: tuple[str, ...], notes: tuple[str, ...]
) -> Dataset:
    splits = []
    for part in ("train", "t10k"):
        labels = files[f"{part}-labels"]
        high = np.flatnonzero(labels.values >= len(classes))
        if len(high):
            at = int(high[0])
            raise refuse(
                labels.path,
                f"label {int(labels.values[at])}, but '{name}' has the classes 0 to "
                f"{len(classes) - 1}",
                at=8 + at,
            )
        images = torch.from_numpy(files[f"{part}-images"].values).unsqueeze(1)
        splits.append(Split(images, torch.from_numpy(labels.values.astype(np.int64))))
    return Dataset(name, splits[0], splits[1], classes, notes=notes)
