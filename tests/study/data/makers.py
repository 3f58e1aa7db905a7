"""Small data sets written byte by byte, good ones that the tests then damage."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship"]
CLASSES += ["truck"]
PIXELS = 3072
BINARY = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
PYTHON = tuple(name.removesuffix(".bin") for name in BINARY)


def idx(shape: tuple[int, ...], values: bytes, code: int = 8) -> bytes:
    """An IDX file: two zeros, type, rank, big-endian sizes, values."""
    return bytes([0, 0, code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values


def idx_files(train: int = 6, test: int = 3, size: int = 4) -> dict[str, bytes]:
    """Four files whose pixels count up and whose labels are 0, 1, 2, 0, 1, 2 ..."""
    files = {}
    for part, count in (("train", train), ("t10k", test)):
        pixels = bytes(i % 251 for i in range(count * size * size))
        files[f"{part}-images-idx3-ubyte"] = idx((count, size, size), pixels)
        files[f"{part}-labels-idx1-ubyte"] = idx((count,), bytes(i % 3 for i in range(count)))
    return files


def write(folder: Path, files: dict[str, bytes], packed: bool = False) -> Path:
    """Writes files into a folder, each packed by gzip or as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(raw, mtime=0) if packed else raw)
    return folder


def rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images as rows of 3072 bytes, and labels."""
    random = np.random.RandomState(seed)
    pixels = random.randint(0, 256, (count, PIXELS)).astype(np.uint8)
    return pixels, random.randint(0, 10, count).astype(np.uint8)


def binary_files(count: int = 2) -> dict[str, bytes]:
    """The binary form of CIFAR-10 with ``count`` images a batch."""
    files = {}
    for seed, name in enumerate(BINARY):
        pixels, labels = rows(count, seed)
        files[name] = np.concatenate([labels[:, None], pixels], axis=1).tobytes()
    return files | {"batches.meta.txt": "\n".join([*CLASSES, "", ""]).encode()}


class Python2Pickle:
    """Writes pickles as Python 2 did: protocol 2, byte strings, a memo entry for each value."""

    def __init__(self) -> None:
        self._memo = 0

    def put(self) -> bytes:
        self._memo += 1
        return b"q" + bytes([self._memo])

    def text(self, value: str, memo: bool = True) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode() + (self.put() if memo else b"")

    def batch(self, pixels: np.ndarray, labels: Iterable[int]) -> bytes:
        """A batch: label, labels, data and file names, in the order of the real ones."""
        count = len(pixels)
        out = b"\x80\x02}" + self.put() + b"("
        out += self.text("batch_label") + self.text("training batch 1 of 5")
        out += self.text("labels") + b"]" + self.put() + b"("
        out += b"".join(b"K" + bytes([label]) for label in labels) + b"e"
        out += self.text("data") + b"cnumpy.core.multiarray\n_reconstruct\n" + self.put()
        out += b"cnumpy\nndarray\n" + self.put() + b"K\x00\x85" + self.put()
        out += self.text("b") + b"\x87" + self.put() + b"R" + self.put()
        shape = b"K" + bytes([count]) + b"M" + struct.pack("<H", PIXELS) + b"\x86"
        out += b"(K\x01" + shape + self.put() + b"cnumpy\ndtype\n" + self.put()
        out += self.text("u1") + b"K\x00K\x01\x87" + self.put() + b"R" + self.put()
        out += b"(K\x03" + self.text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
        out += self.put() + b"b\x89T" + struct.pack("<i", pixels.size) + pixels.tobytes()
        out += self.put() + b"t" + self.put() + b"b" + self.text("filenames") + b"]" + self.put()
        out += b"(" + b"".join(self.text(f"x_{i}.png") for i in range(count)) + b"eu."
        return out

    def meta(self, classes: Iterable[str] = CLASSES) -> bytes:
        """The list of classes."""
        out = b"\x80\x02}" + self.put() + b"("
        out += self.text("num_cases_per_batch") + b"M\x10'"
        out += self.text("label_names") + b"]" + self.put() + b"("
        out += b"".join(self.text(name) for name in classes)
        return out + b"e" + self.text("num_vis") + b"M\x00\x0cu."


def python_files(count: int = 2) -> dict[str, bytes]:
    """The Python form of the same images as `binary_files`."""
    files = {}
    for seed, name in enumerate(PYTHON):
        pixels, labels = rows(count, seed)
        files[name] = Python2Pickle().batch(pixels, labels.tolist())
    return files | {"batches.meta": Python2Pickle().meta()}


def tar_gz(files: dict[str, bytes], folder: str, extra: Iterable[tarfile.TarInfo] = ()) -> bytes:
    """A .tar.gz with a folder, ``extra`` members without content, and the files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as archive:
        root = tarfile.TarInfo(folder)
        root.type = tarfile.DIRTYPE
        archive.addfile(root)
        for member in extra:
            archive.addfile(member)
        for name, raw in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return out.getvalue()
