"""IDX files: golden bytes, a folder of hostile ones, random damage, and the real MNIST."""

import gzip
import os
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenkeel.errors import FormatError
from evenkeel.study.data import Dataset, load
from evenkeel.study.data.idx import FILES, read

from .makers import idx, idx_files, write

REPOSITORY = Path(__file__).resolve().parents[3]
MNIST = Path(os.environ.get("EVENKEEL_MNIST") or REPOSITORY.parent / "shared" / "data" / "mnist")
GOLDEN = bytes.fromhex("00000803 00000002 00000001 00000003 0102fd 0405ff")


def _file(folder: Path, raw: bytes, packed: bool = False) -> Path:
    path = folder / "some.idx"
    path.write_bytes(gzip.compress(raw, mtime=0) if packed else raw)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_golden_bytes(tmp_path: Path, packed: bool) -> None:
    values = read(_file(tmp_path, GOLDEN, packed), 3).values
    assert values.tolist() == [[[1, 2, 253]], [[4, 5, 255]]]


HOSTILE = {
    "empty": (b"", 3, "0 bytes are no IDX file"),
    "short magic": (GOLDEN[:3], 3, "3 bytes are no IDX file"),
    "a web page": (b"<html>", 3, "at byte 0: begins with 3c 68 74 6d; an IDX file begins with"),
    "floats": (idx((2,), b"\0" * 8, code=13), 1, "at byte 2: holds float32; only unsigned"),
    "unknown type": (idx((2,), b"\0\0", code=0x42), 1, "holds unknown type 0x42"),
    "labels as images": (idx((6,), b"\0" * 6), 3, "at byte 3: has 1 dimensions, wanted 3"),
    "images as labels": (GOLDEN, 1, r"has 3 dimensions, wanted 1 \(n for labels\)"),
    "255 dimensions": (b"\0\0\x08\xff" + b"\1" * 1020, 3, "has 255 dimensions"),
    "cut in the header": (GOLDEN[:9], 3, "at byte 9: ends inside the header of 16 bytes"),
    "no images": (idx((0, 4, 4), b""), 3, "at byte 4: declares 0 x 4 x 4 values; no size may"),
    "no columns": (idx((1, 4, 0), b""), 3, "at byte 12: declares 1 x 4 x 0"),
    "4 billion images": (idx((2**32 - 1, 1, 1), b"x"), 3, "declares 4294967295 x 1 x 1"),
    "more than 2**64": (idx((2**32 - 1,) * 3, b"x"), 3, "the most is 4,294,967,296"),
    "one byte less": (GOLDEN[:-1], 3, "declares 2 x 1 x 3 values, so 22 bytes, but the file"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path: Path, name: str, packed: bool) -> None:
    raw, dims, match = HOSTILE[name]
    if name == "one byte less" and packed:
        match = "at byte 21: ends here, 1 bytes too early"
    path = _file(tmp_path, raw, packed)
    with pytest.raises(FormatError, match=match) as caught:
        read(path, dims)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("packed", "match"), [(False, "but the file has 23"), (True, "at byte 22: bytes follow the 2")]
)
def test_trailing_bytes(tmp_path: Path, packed: bool, match: str) -> None:
    with pytest.raises(FormatError, match=match):
        read(_file(tmp_path, GOLDEN + b"\0", packed), 3)


def test_gzip_that_is_cut_off(tmp_path: Path) -> None:
    path = _file(tmp_path, GOLDEN, packed=True)
    for length in (2, 11, 20, path.stat().st_size - 1):
        path.write_bytes(gzip.compress(GOLDEN, mtime=0)[:length])
        with pytest.raises(FormatError, match="damaged gzip file"):
            read(path, 3)


def test_gzip_with_a_wrong_checksum_or_garbage_behind(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(GOLDEN, mtime=0))
    packed[-5] ^= 1  # the last byte of the CRC
    (tmp_path / "crc").write_bytes(packed)
    with pytest.raises(FormatError, match=r"damaged gzip file \(CRC check failed"):
        read(tmp_path / "crc", 3)
    (tmp_path / "tail").write_bytes(gzip.compress(GOLDEN, mtime=0) + b"garbage")
    with pytest.raises(FormatError, match="damaged gzip file"):
        read(tmp_path / "tail", 3)


@pytest.mark.parametrize("packed", [False, True])
def test_a_lying_header_allocates_nothing(tmp_path: Path, packed: bool) -> None:
    path = _file(tmp_path, idx((2**16, 2**8, 2**8), b"x" * 100), packed)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="but the file"):
            read(path, 3)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read(tmp_path, 3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", ["", "MNIST/raw"])
def test_four_files_make_a_data_set(tmp_path: Path, packed: bool, below: str) -> None:
    write(tmp_path / below, idx_files(), packed)
    data = load("idx", tmp_path)
    assert data.shape == (1, 4, 4)
    assert data.classes == ("0", "1", "2")
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.test.images.flatten().tolist() == list(range(48))
    assert data.notes == ()


def test_names_with_a_dot_and_mixed_packing(tmp_path: Path) -> None:
    files = idx_files()
    for i, (name, raw) in enumerate(files.items()):
        write(tmp_path, {name.replace("-idx", ".idx"): raw}, packed=i % 2 == 0)
    assert len(load("idx", tmp_path).train) == 6


def test_missing_files_are_named_with_what_is_there(tmp_path: Path) -> None:
    files = idx_files()
    del files["t10k-labels-idx1-ubyte"]
    write(tmp_path, files)
    with pytest.raises(FormatError, match="needs train-images-idx3-ubyte, train-") as caught:
        load("mnist", tmp_path)
    text = str(caught.value)
    assert all(name in text for name in FILES.values())
    assert "in this folder or its MNIST/raw" in text
    assert text.endswith("found t10k-images-idx3-ubyte, " + ", ".join(sorted(files)[1:]))
    with pytest.raises(FormatError, match="found nothing there"):
        load("mnist", write(tmp_path / "empty", {}))
    with pytest.raises(FormatError, match="No such file"):
        load("mnist", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "raw", "match"),
    [
        ("train-labels-idx1-ubyte", idx((5,), b"\0" * 5), "has 5 labels for the 6 images of"),
        ("t10k-images-idx3-ubyte", idx((3, 4, 5), b"\0" * 60), r"images of \(4, 5\) pixels, but"),
        ("t10k-labels-idx1-ubyte", idx((3,), b"\1\2\3"), r"at byte 10: label 3, .* 0 to 2"),
    ],
)
def test_files_that_do_not_belong_together(
    tmp_path: Path, name: str, raw: bytes, match: str
) -> None:
    write(tmp_path, idx_files() | {name: raw})
    with pytest.raises(FormatError, match=match):
        load("idx", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_a_label_above_nine(tmp_path: Path, name: str) -> None:
    write(tmp_path, idx_files() | {"t10k-labels-idx1-ubyte": idx((3,), b"\1\2\x0a")})
    with pytest.raises(FormatError, match=f"at byte 10: label 10, but '{name}' has the classes 0"):
        load(name, tmp_path)


def test_another_mnist_is_loaded_with_a_note(tmp_path: Path) -> None:
    data = load("mnist", write(tmp_path, idx_files()))
    assert len(data.notes) == 1
    assert "does not hold the canonical MNIST: the checksum of train-images" in data.notes[0]
    assert load("fashion-mnist", tmp_path).classes[-1] == "ankle boot"


def _whole_or_refused(folder: Path) -> None:
    try:
        data = load("idx", folder)
    except FormatError:
        return
    assert isinstance(data, Dataset)
    assert len(data.train.images) == len(data.train.labels) > 0
    assert int(data.test.labels.max()) < len(data.classes)


@settings(max_examples=150)
@given(
    victim=st.sampled_from(sorted(FILES.values())),
    packed=st.booleans(),
    cut=st.none() | st.integers(0, 200),
    flips=st.lists(st.tuples(st.integers(0, 199), st.integers(0, 7)), max_size=3),
)
def test_random_damage(tmp_path_factory, victim, packed, cut, flips) -> None:
    folder = write(tmp_path_factory.mktemp("idx"), idx_files(), packed)
    path = folder / (f"{victim}.gz" if packed else victim)
    raw = bytearray(path.read_bytes())
    for at, bit in flips:
        raw[at % len(raw)] ^= 1 << bit
    path.write_bytes(raw[:cut])
    _whole_or_refused(folder)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3), st.booleans())
def test_random_headers(tmp_path_factory, sizes: list[int], packed: bool) -> None:
    files = idx_files()
    raw = files["train-images-idx3-ubyte"]
    files["train-images-idx3-ubyte"] = raw[:4] + struct.pack(">3I", *sizes) + raw[16:]
    _whole_or_refused(write(tmp_path_factory.mktemp("idx"), files, packed))


@pytest.mark.skipif(not MNIST.is_dir(), reason="no MNIST here; set EVENKEEL_MNIST to its folder")
def test_the_real_mnist() -> None:
    data = load("mnist", MNIST)
    assert data.notes == ()
    assert data.shape == (1, 28, 28)
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert data.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.test.labels.bincount()[7] == 1028
    assert data.fingerprint == "e0130f111822ed58"
    mean = data.train.images.to(torch.float64).mean() / data.white
    assert mean.item() == pytest.approx(0.1307, abs=1e-4)
    assert "holds files of MNIST" in load("fashion-mnist", MNIST).notes[0]
