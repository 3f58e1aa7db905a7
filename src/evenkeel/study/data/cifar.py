"""CIFAR-10 from the binary or the Python archive, packed or not; nothing is unpacked to disk.

Both forms have five training files and one test file, each of any number of images: planes of
1024 red, green and blue bytes, and a label from 0 to 9. The binary form puts the label before the
pixels; the Python form is a pickle, which `pickled` reads without running it.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, NamedTuple

import numpy as np
import torch

from ...errors import FormatError
from .base import Dataset, Split, found_in, refuse
from .catalog import CIFAR10, CIFAR10_ARCHIVE, CIFAR10_PYTHON_MD5
from .pickled import PickledArray
from .pickled import read as read_pickle

__all__ = ["load"]

_PIXELS: Final = 3 * 32 * 32
_MOST_FILE: Final = 64 * 2**20
_MOST_ARCHIVE: Final = 512 * 2**20
_MOST_MEMBERS: Final = 1000
_TRAIN: Final = tuple(f"data_batch_{i}" for i in range(1, 6))
_TEST: Final = "test_batch"
_SIZES: Final = {"training": 50_000, "test": 10_000}


class _Form(NamedTuple):
    """One of the two forms: what its folder, archive, batches and list of classes are called."""

    folder: str
    archive: str
    suffix: str
    classes: str

    @property
    def batches(self) -> tuple[str, ...]:
        return tuple(name + self.suffix for name in (*_TRAIN, _TEST))


_BINARY: Final = _Form("cifar-10-batches-bin", CIFAR10_ARCHIVE.name, ".bin", "batches.meta.txt")
_PYTHON: Final = _Form("cifar-10-batches-py", "cifar-10-python.tar.gz", "", "batches.meta")


class _File(NamedTuple):
    """A file of the data set: its bare name, what to call it in an error, and its bytes."""

    name: str
    where: str
    raw: bytes


class _Batch(NamedTuple):
    images: np.ndarray
    labels: np.ndarray
    md5: str


def load(folder: Path) -> Dataset:
    """Reads CIFAR-10 from a folder that has one of its archives, or what was in it.

    Where both forms are present the binary one is read.

    Raises:
        FormatError: a file is missing, damaged, or not what it should be.
    """
    path, form = _find(folder)
    batches: dict[str, _Batch] = {}
    classes: tuple[str, ...] = CIFAR10
    packed = path.is_file()
    for file in _archived(path, form) if packed else _extracted(path, form):
        if file.name in batches:
            raise refuse(file.where, "stands in the archive twice")
        if file.name == form.classes:
            classes = _classes(file, form)
        else:
            batches[file.name] = _batch(file, form)
    missing = [name for name in form.batches if name not in batches]
    if missing:
        raise refuse(path, f"has no {', '.join(missing)}; fetch it again")
    *train, test = (batches[name] for name in form.batches)
    notes = _notes(path, form, batches) if classes == CIFAR10 else ()
    return Dataset("cifar10", _join(train), _join([test]), classes, notes=notes)


def _find(folder: Path) -> tuple[Path, _Form]:
    """The folder of the batches, or the archive, and its form."""
    for form in (_BINARY, _PYTHON):
        for place in (folder, folder / form.folder):
            if all((place / name).is_file() for name in form.batches):
                return place, form
    for form in (_BINARY, _PYTHON):
        for name in (form.archive, form.archive.removesuffix(".gz")):
            if (folder / name).is_file():
                return folder / name, form
    raise refuse(
        folder,
        f"'cifar10' needs {_BINARY.archive} or {_PYTHON.archive} in this folder, or the files of "
        f"{_BINARY.folder} ({_BINARY.batches[0]} ...) or {_PYTHON.folder}; {found_in(folder)}",
    )


def _extracted(folder: Path, form: _Form) -> Iterator[_File]:
    for name in (*form.batches, form.classes):
        path = folder / name
        if name == form.classes and not path.is_file():
            continue
        try:
            size = path.stat().st_size
            _check_size(str(path), size)
            raw = path.read_bytes()
        except OSError as error:
            raise refuse(path, f"cannot be read ({error.strerror or error})") from error
        yield _File(name, str(path), raw)


def _check_size(where: str, size: int) -> None:
    if size > _MOST_FILE:
        raise refuse(where, f"has {size:,} bytes; a CIFAR-10 file has {_MOST_FILE:,} at most")


class _Bounded:
    """A stream that gives up after more bytes than any CIFAR-10 archive has."""

    def __init__(self, stream: BinaryIO, where: Path) -> None:
        self._stream = stream
        self._where = where
        self._left = _MOST_ARCHIVE

    def read(self, size: int) -> bytes:
        """Reads up to ``size`` bytes."""
        data = self._stream.read(min(size, 2**20))
        self._left -= len(data)
        if self._left < 0:
            raise refuse(self._where, f"unpacks to more than {_MOST_ARCHIVE:,} bytes")
        return data


def _archived(path: Path, form: _Form) -> Iterator[_File]:
    """The files in an archive, in the archive's order, read once from front to back."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = _Bounded(gzip.GzipFile(fileobj=raw) if packed else raw, path)  # type: ignore[arg-type]
            with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
                for count, member in enumerate(tar):
                    if count >= _MOST_MEMBERS:
                        raise refuse(path, f"has more than {_MOST_MEMBERS} members")
                    file = _member(tar, member, path, form)
                    if file is not None:
                        yield file
            while stream.read(2**20):
                pass  # gzip checks its sum only at the end
    except FormatError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise refuse(path, f"damaged archive ({error}); fetch it again") from error
    except OSError as error:
        raise refuse(path, f"cannot be read ({error.strerror or error})") from error


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path, form: _Form) -> _File | None:
    """Reads a member if it is one of ours; refuses an archive that tries something."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise refuse(path, f"member '{member.name}' points outside of the archive", member.offset)
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        raise refuse(path, f"member '{member.name}' is no plain file", member.offset)
    if name.name not in (*form.batches, form.classes):
        return None
    where = f"{path}:{member.name}"
    _check_size(where, member.size)
    stream = tar.extractfile(member)
    raw = b"" if stream is None else stream.read()
    if len(raw) != member.size:
        raise refuse(where, f"ends after {len(raw):,} of {member.size:,} bytes")
    return _File(name.name, where, raw)


def _batch(file: _File, form: _Form) -> _Batch:
    images, labels = (_read_binary if form is _BINARY else _read_python)(file)
    return _Batch(images, labels, hashlib.md5(file.raw, usedforsecurity=False).hexdigest())


def _read_binary(file: _File) -> tuple[np.ndarray, np.ndarray]:
    count, rest = divmod(len(file.raw), 1 + _PIXELS)
    if rest or not count:
        raise refuse(
            file.where,
            f"has {len(file.raw):,} bytes, which is no multiple of {1 + _PIXELS:,}, a label and "
            "its image; fetch it again",
            at=count * (1 + _PIXELS),
        )
    rows = np.frombuffer(file.raw, np.uint8).reshape(count, 1 + _PIXELS)
    labels = rows[:, 0]
    wrong = np.flatnonzero(labels >= len(CIFAR10))
    if len(wrong):
        at = int(wrong[0])
        raise refuse(file.where, f"label {int(labels[at])}, wanted 0 to 9", at=at * (1 + _PIXELS))
    return rows[:, 1:], labels


def _read_python(file: _File) -> tuple[np.ndarray, np.ndarray]:
    content = read_pickle(file.where, file.raw)
    if not isinstance(content, dict) or not {"data", "labels"} <= content.keys():
        raise refuse(file.where, "is no dictionary with 'data' and 'labels'")
    data, labels = content["data"], content["labels"]
    images = data.value if isinstance(data, PickledArray) else None
    if images is None or images.ndim != 2 or images.shape[1] != _PIXELS or not len(images):
        found = type(data).__name__ if images is None else f"an array of shape {images.shape}"
        raise refuse(file.where, f"'data' is {found}, wanted an array of shape (n, {_PIXELS})")
    if not isinstance(labels, list) or len(labels) != len(images):
        found = f"{len(labels):,}" if isinstance(labels, list) else type(labels).__name__
        raise refuse(file.where, f"'labels' is {found}, wanted a list of {len(images):,}")
    for index, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < len(CIFAR10):
            found = str(label) if type(label) is int else type(label).__name__
            raise refuse(file.where, f"label {index} is {found[:20]}, wanted 0 to 9")
    return images, np.array(labels, np.uint8)


def _classes(file: _File, form: _Form) -> tuple[str, ...]:
    """The names of the ten classes."""
    if form is _BINARY:
        lines = file.raw.decode("latin-1").split("\n")
        names: list[object] = [line.strip() for line in lines if line.strip()]
    else:
        content = read_pickle(file.where, file.raw)
        found = content.get("label_names") if isinstance(content, dict) else None
        names = list(found) if isinstance(found, list) else []
    texts = [n.decode("latin-1") if isinstance(n, bytes) else n for n in names]
    good = tuple(text for text in texts if isinstance(text, str))
    if len(good) != len(CIFAR10) or len(names) != len(CIFAR10):
        raise refuse(file.where, f"names {len(names)} classes, wanted {len(CIFAR10)}")
    return good


def _join(batches: list[_Batch]) -> Split:
    images = np.concatenate([batch.images for batch in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([batch.labels for batch in batches]).astype(np.int64)
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _notes(path: Path, form: _Form, batches: dict[str, _Batch]) -> tuple[str, ...]:
    """Tells if this is not the canonical CIFAR-10, as far as can be told."""
    *train, test = (len(batches[name].labels) for name in form.batches)
    counts = {"training": sum(train), "test": test}
    if counts != _SIZES:
        return (
            f"{path} is not the whole CIFAR-10: {counts['training']:,} training and "
            f"{counts['test']:,} test images instead of 50,000 and 10,000",
        )
    if form is _PYTHON:
        other = [name for name, md5 in CIFAR10_PYTHON_MD5.items() if batches[name].md5 != md5]
        if other:
            return (f"{path}: the checksum of {', '.join(other)} is not that of CIFAR-10",)
    return ()
