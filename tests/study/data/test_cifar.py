"""CIFAR-10 in all its forms, and archives that try something."""

import gzip
import io
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenkeel.errors import FormatError
from evenkeel.study.data import Dataset, cifar, load

from .makers import (
    BINARY,
    CLASSES,
    PYTHON,
    Python2Pickle,
    binary_files,
    python_files,
    rows,
    tar_gz,
    write,
)

BIN, PY = "cifar-10-batches-bin", "cifar-10-batches-py"


def _put(folder: Path, raw: bytes, name: str = "cifar-10-binary.tar.gz") -> Path:
    return write(folder, {name: raw})


def _forms(folder: Path) -> dict[str, Path]:
    """One data set in every form that can be read."""
    binary, python = binary_files(), python_files()
    unpacked = gzip.decompress(tar_gz(binary, BIN))
    return {
        "binary folder": write(folder / "a", binary),
        "below": write(folder / "b" / BIN, binary).parent,
        "binary archive": _put(folder / "c", tar_gz(binary, BIN)),
        "python folder": write(folder / "d", python),
        "python below": write(folder / "e" / PY, python).parent,
        "python archive": _put(folder / "f", tar_gz(python, PY), "cifar-10-python.tar.gz"),
        "unpacked by a browser": _put(folder / "g", unpacked, "cifar-10-binary.tar"),
        "unpacked but not renamed": _put(folder / "h", unpacked),
        "dots before the names": _put(folder / "i", tar_gz(binary, f"./{BIN}")),
    }


def test_all_forms_give_one_data_set(tmp_path: Path) -> None:
    data = {name: load("cifar10", folder) for name, folder in _forms(tmp_path).items()}
    assert {d.fingerprint for d in data.values()} == {data["below"].fingerprint}
    assert {d.classes for d in data.values()} == {tuple(CLASSES)}
    one = data["binary archive"]
    assert one.shape == (3, 32, 32)
    assert (len(one.train), len(one.test)) == (10, 2)
    pixels, labels = rows(2, seed=5)
    assert np.array_equal(one.test.images.numpy().reshape(2, -1), pixels)
    assert one.test.labels.tolist() == labels.tolist()
    assert "is not the whole CIFAR-10: 10 training and 2 test images" in one.notes[0]


def test_nothing_is_unpacked_to_disk(tmp_path: Path) -> None:
    folder = _put(tmp_path, tar_gz(python_files(), PY), "cifar-10-python.tar.gz")
    load("cifar10", folder)
    assert [p.name for p in tmp_path.rglob("*")] == ["cifar-10-python.tar.gz"]


def test_red_green_and_blue_are_planes(tmp_path: Path) -> None:
    record = bytes([3]) + b"\x01" * 1024 + b"\x02" * 1024 + b"\x03" * 1023 + b"\x09"
    data = load("cifar10", write(tmp_path, dict.fromkeys(BINARY, record)))
    assert data.train.images[0, :, 0, 0].tolist() == [1, 2, 3]
    assert data.train.images[0, 2, 31, 31] == 9
    assert data.train.labels.tolist() == [3] * 5


def test_other_classes_are_taken_from_the_file(tmp_path: Path) -> None:
    names = [f"kind {i}" for i in range(10)]
    write(tmp_path / "a", binary_files() | {"batches.meta.txt": "\n".join(names).encode()})
    write(tmp_path / "b", python_files() | {"batches.meta": Python2Pickle().meta(names)})
    for folder in ("a", "b"):
        data = load("cifar10", tmp_path / folder)
        assert data.classes == tuple(names)
        assert data.notes == ()
    for name in ("batches.meta", "batches.meta.txt"):
        (tmp_path / ("a" if "txt" in name else "b") / name).unlink()
    assert load("cifar10", tmp_path / "a").classes == tuple(CLASSES)
    assert load("cifar10", tmp_path / "b").classes == tuple(CLASSES)


def test_a_python_archive_with_other_sums_has_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "_SIZES", {"training": 10, "test": 2})
    notes = load("cifar10", write(tmp_path / "a", python_files())).notes
    assert "the checksum of data_batch_1, data_batch_2" in notes[0]
    assert load("cifar10", write(tmp_path / "b", binary_files())).notes == ()


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"needs cifar-10-binary.tar.gz or .* found nothing"):
        load("cifar10", tmp_path)
    with pytest.raises(FormatError, match="this is a file; give the folder"):
        load("cifar10", _put(tmp_path, b"x") / "cifar-10-binary.tar.gz")
    files = binary_files()
    del files["data_batch_4.bin"], files["test_batch.bin"]
    with pytest.raises(FormatError, match=r"has no data_batch_4.bin, test_batch.bin; fetch"):
        load("cifar10", _put(tmp_path, tar_gz(files, BIN)))
    with pytest.raises(FormatError, match=r"found data_batch_1.bin, data_batch_2.bin"):
        load("cifar10", write(tmp_path / BIN, {n: files[n] for n in BINARY[:2]}))


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "has 0 bytes, which is no multiple of 3,073"),
        (b"\0" * 3072, "at byte 0: has 3,072 bytes, which is no multiple"),
        (b"\0" * 3073 + b"x", "at byte 3,073: has 3,074 bytes"),
        (b"\0" * 3073 + b"\x0a" * 3073, "at byte 3,073: label 10, wanted 0 to 9"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_binary_batches(tmp_path: Path, raw: bytes, match: str, packed: bool) -> None:
    files = binary_files() | {"data_batch_3.bin": raw}
    folder = _put(tmp_path, tar_gz(files, BIN)) if packed else write(tmp_path, files)
    with pytest.raises(FormatError, match=match) as caught:
        load("cifar10", folder)
    assert "data_batch_3.bin" in str(caught.value)


def _python(**changes: object) -> bytes:
    pixels, labels = rows(2, seed=9)
    content = {"data": pixels, "labels": labels.tolist()} | changes
    return pickle.dumps({k: v for k, v in content.items() if v is not None}, 4)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (pickle.dumps([1]), "is no dictionary with 'data' and 'labels'"),
        (_python(labels=None), "is no dictionary with 'data' and 'labels'"),
        (_python(data=[1, 2]), r"'data' is list, wanted an array of shape \(n, 3072\)"),
        (_python(data=np.zeros((2, 3071), np.uint8)), r"an array of shape \(2, 3071\), wanted"),
        (_python(data=np.zeros((0, 3072), np.uint8), labels=[]), r"shape \(0, 3072\), wanted"),
        (_python(data=np.zeros((2, 3072), np.float32)), "elements of type 'f4', wanted unsigned"),
        (_python(labels=[1]), "'labels' is 1, wanted a list of 2"),
        (_python(labels="ab"), "'labels' is str, wanted a list of 2"),
        (_python(labels=[1, 10]), "label 1 is 10, wanted 0 to 9"),
        (_python(labels=[-1, 1]), "label 0 is -1, wanted"),
        (_python(labels=[True, 1]), "label 0 is bool, wanted"),
        (_python()[:-9], "damaged pickle"),
    ],
)
def test_damaged_python_batches(tmp_path: Path, raw: bytes, match: str) -> None:
    with pytest.raises(FormatError, match=match) as caught:
        load("cifar10", write(tmp_path, python_files() | {"data_batch_2": raw}))
    assert "data_batch_2" in str(caught.value)


@pytest.mark.parametrize("form", ["binary", "python"])
def test_lists_of_classes_that_are_none(tmp_path: Path, form: str) -> None:
    if form == "binary":
        files = binary_files() | {"batches.meta.txt": b"cat\ndog\n"}
    else:
        files = python_files() | {"batches.meta": Python2Pickle().meta(["cat", "dog"])}
    with pytest.raises(FormatError, match=r"batches.meta.*: names 2 classes, wanted 10"):
        load("cifar10", write(tmp_path, files))


class _Attack:
    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self._command,)


@pytest.mark.parametrize("victim", ["data_batch_5", "batches.meta"])
def test_a_pickle_that_runs_a_command(tmp_path: Path, victim: str) -> None:
    mark = tmp_path / "mark"
    files = python_files() | {victim: pickle.dumps(_Attack(f"touch {mark}"), 2)}
    folder = _put(tmp_path, tar_gz(files, PY), "cifar-10-python.tar.gz")
    with pytest.raises(FormatError, match=rf"{victim} at byte \d+: the name '\w+.system' is forb"):
        load("cifar10", folder)
    assert not mark.exists()


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    ("member", "match"),
    [
        (_member("/etc/passwd"), "member '/etc/passwd' points outside of the archive"),
        (_member(f"{BIN}/../../x"), "points outside of the archive"),
        (_member("..", tarfile.DIRTYPE), "member '..' points outside"),
        (_member(f"{BIN}/a", tarfile.SYMTYPE, "/etc/passwd"), "member '.*/a' is no plain file"),
        (_member(f"{BIN}/test_batch.bin", tarfile.SYMTYPE, "b"), "is no plain file"),
        (_member(f"{BIN}/a", tarfile.LNKTYPE, f"{BIN}/b"), "is no plain file"),
        (_member(f"{BIN}/a", tarfile.CHRTYPE), "is no plain file"),
        (_member(f"{BIN}/a", tarfile.FIFOTYPE), "is no plain file"),
        (_member(f"{BIN}/test_batch.bin"), "test_batch.bin at byte 0: has 0 bytes"),
    ],
)
def test_archives_that_try_something(tmp_path: Path, member: tarfile.TarInfo, match: str) -> None:
    with pytest.raises(FormatError, match=match):
        load("cifar10", _put(tmp_path, tar_gz(binary_files(), BIN, [member])))


def test_a_file_that_stands_twice(tmp_path: Path) -> None:
    files = binary_files()
    raw = gzip.decompress(tar_gz(files, BIN)).rstrip(b"\0")
    raw += b"\0" * (-len(raw) % 512) + gzip.decompress(tar_gz(files, "again"))
    with pytest.raises(FormatError, match=r"again/data_batch_1.bin: stands in the archive twice"):
        load("cifar10", _put(tmp_path, gzip.compress(raw)))


def test_too_many_members(tmp_path: Path) -> None:
    many = [_member(f"m{i}") for i in range(1001)]
    with pytest.raises(FormatError, match="has more than 1000 members"):
        load("cifar10", _put(tmp_path, tar_gz(binary_files(), BIN, many)))


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = _member(name, kind)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (_header(f"{BIN}/test_batch.bin", 2**43), "has 8,796,093,022,208 bytes; a CIFAR-10 file"),
        (_header("././@LongLink", 2**40, tarfile.GNUTYPE_LONGNAME), "damaged archive|has no data"),
        (_header(f"{BIN}/test_batch.bin", 2**20) + b"x" * 1024, "damaged archive|ends after"),
    ],
)
def test_sizes_that_only_the_header_has(tmp_path: Path, raw: bytes, match: str) -> None:
    folder = _put(tmp_path, gzip.compress(raw))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=match):
            load("cifar10", folder)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "_MOST_ARCHIVE", 2**20)
    raw = gzip.compress(_header("filler", 2**23) + b"\0" * 2**23)
    with pytest.raises(FormatError, match="unpacks to more than 1,048,576 bytes"):
        load("cifar10", _put(tmp_path, raw))


def test_an_archive_that_is_cut_off_or_changed(tmp_path: Path) -> None:
    whole = tar_gz(binary_files(), BIN)
    for length in (0, 1, 5, 20, 1000, len(whole) - 4):
        with pytest.raises(FormatError, match=r"damaged archive|has no data_batch_1"):
            load("cifar10", _put(tmp_path, whole[:length]))
    changed = bytearray(whole)
    changed[-6] ^= 1
    with pytest.raises(FormatError, match=r"damaged archive \(CRC check failed"):
        load("cifar10", _put(tmp_path, bytes(changed)))
    with pytest.raises(FormatError, match=r"damaged archive .*; fetch it again"):
        load("cifar10", _put(tmp_path, b"<html>" * 1000))


@settings(max_examples=80)
@given(
    form=st.sampled_from(["binary", "python", "tar", "tar.gz"]),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), max_size=3),
    cut=st.none() | st.floats(0, 1),
)
def test_random_damage(tmp_path_factory, form, flips, cut) -> None:
    folder = tmp_path_factory.mktemp("cifar")
    if form in ("binary", "python"):
        victim = "data_batch_2" + (".bin" if form == "binary" else "")
        path = write(folder, binary_files(1) if form == "binary" else python_files(1)) / victim
        raw = bytearray(path.read_bytes())
    else:
        whole = tar_gz(binary_files(1), BIN)
        raw = bytearray(whole if form == "tar.gz" else gzip.decompress(whole))
        path = folder / "cifar-10-binary.tar.gz"
    for at, bit in flips:
        raw[at % min(len(raw), 4000)] ^= 1 << bit
    path.write_bytes(raw[: None if cut is None else int(cut * len(raw))])
    try:
        data = load("cifar10", folder)
    except FormatError:
        return
    assert isinstance(data, Dataset)
    assert data.shape == (3, 32, 32)
    assert (len(data.train), len(data.test)) == (5, 1)


def test_the_tars_of_these_tests_are_good() -> None:
    with tarfile.open(fileobj=io.BytesIO(tar_gz(python_files(), PY))) as archive:
        assert archive.getnames() == [PY, *(f"{PY}/{name}" for name in (*PYTHON, "batches.meta"))]
