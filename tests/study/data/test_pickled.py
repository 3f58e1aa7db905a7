"""Pickles that are read and never run."""

import contextlib
import hashlib
import os
import pickle
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenkeel.errors import FormatError
from evenkeel.study.data.pickled import PickledArray, read

from .makers import CLASSES, Python2Pickle, rows


def test_the_list_of_classes_is_byte_for_byte_the_real_one() -> None:
    raw = Python2Pickle().meta()
    # So the way that these tests write pickles is the way of those who made CIFAR-10.
    assert hashlib.md5(raw).hexdigest() == "5ff9c542aee3614f3951f8cda6e48888"
    names = [name.encode() for name in CLASSES]
    expected = {"num_cases_per_batch": 10_000, "label_names": names, "num_vis": 3072}
    assert read("batches.meta", raw) == expected


def test_a_batch_of_python_2() -> None:
    pixels, labels = rows(3, seed=0)
    raw = Python2Pickle().batch(pixels, labels.tolist())
    content = read("batch", raw)
    assert content["batch_label"] == b"training batch 1 of 5"
    assert content["labels"] == labels.tolist()
    assert np.array_equal(content["data"].value, pixels)
    # The real reader agrees, so the bytes are a true pickle.
    assert np.array_equal(pickle.loads(raw, encoding="bytes")[b"data"], pixels)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_python_3(protocol: int, order: str) -> None:
    pixels = np.asarray(rows(300, seed=1)[0], order=order)
    nest = {"data": pixels, "more": [1, -1, 70_000, 2**40, None, True, False, (1,), (), "ä", b"x"]}
    content = read("batch", pickle.dumps(nest, protocol))
    assert np.array_equal(content["data"].value, pixels)
    assert content["more"] == nest["more"]


def test_old_and_new_names_of_numpy() -> None:
    raw = pickle.dumps(np.arange(6, dtype=np.uint8), 2)
    assert b"numpy._core.multiarray" in raw
    old = raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert read("x", old).value.tolist() == list(range(6))


class _Calls:
    """Pickles as a call of anything."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._parts = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self._parts


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_calls_are_refused_and_not_made(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    attacks = {
        f"{os.system.__module__}.system": _Calls(os.system, f"touch {mark}"),
        "eval": _Calls(eval, f"open({str(mark)!r}, 'w')"),
        "exec": _Calls(exec, f"open({str(mark)!r}, 'w')"),
        "getattr": _Calls(getattr, 1, "real"),
    }
    for name, attack in attacks.items():
        with pytest.raises(FormatError, match=rf"batch at byte \d+: the name '.*{name}' is forb"):
            read("batch", pickle.dumps({"data": attack}, protocol))
    assert not mark.exists()


def _array(shape: bytes = b"K\x02\x85", kind: bytes = b"u1", values: bytes = b"U\x02ab") -> bytes:
    """A pickled array in the old way, with parts to replace."""
    head = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    kind = b"cnumpy\ndtype\nU" + bytes([len(kind)]) + kind + b"K\x00K\x01\x87R"
    return b"\x80\x02" + head + b"(K\x01" + shape + kind + b"\x89" + values + b"tb."


HOSTILE = {
    "empty": (b"", "damaged pickle"),
    "text": (b"hello", "at byte 0: memo 101 was never stored"),
    "protocol 0": (b"cos\nsystem\n(S'true'\ntR.", "at byte 0: the name 'os.system' is forbidden"),
    "instance": (b"(S'true'\nios\nsystem\n.", "opcode STRING is not allowed"),
    "inst": (b"(ios\nsystem\n.", "at byte 1: opcode INST is not allowed"),
    "object": (b"\x80\x02(cos\nsystem\no.", "'os.system' is forbidden"),
    "new": (b"\x80\x02cnumpy\nndarray\n)\x81.", "opcode NEWOBJ is not allowed"),
    "persistent": (b"\x80\x02K\x01Q.", "opcode BINPERSID is not allowed"),
    "extension": (b"\x80\x02\x82\x01.", "opcode EXT1 is not allowed"),
    "buffer": (b"\x80\x05\x97.", "opcode NEXT_BUFFER is not allowed"),
    "stacked name": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "at byte 14: the name 'os.system'"),
    "dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.view\x93.", "'numpy.ndarray.view' is"),
    "name of numbers": (b"\x80\x04K\x01K\x02\x93.", "a name that is not text"),
    "loader": (b"\x80\x02cnumpy\nload\nU\x01x\x85R.", "the name 'numpy.load' is forbidden"),
    "call of a call": (b"\x80\x02K\x01)R.", "at byte 5: calls a int"),
    "call of the array type": (b"\x80\x02cnumpy\nndarray\n(K\x01tR.", "unexpected arguments"),
    "decode": (b"\x80\x02c_codecs\nencode\n(X\x01\0\0\0xU\x03hextR.", "unexpected arguments"),
    "objects": (_array(kind=b"O8"), "elements of type 'O8', wanted unsigned bytes"),
    "floats": (_array(kind=b"f8"), "elements of type 'f8'"),
    "giant array": (_array(shape=b"J\xff\xff\xff\x7f\x85"), "an array of 2147483647 over 2 bytes"),
    "negative": (_array(shape=b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86"), "an array of -1 x -2"),
    "too flat": (_array(shape=b"(K\x01K\x01K\x01K\x01K\x02t"), "at most 4 sizes"),
    "no shape": (_array(shape=b"]"), "whose shape is no tuple"),
    "no sizes": (_array(shape=b"N\x85"), "a NoneType where a whole number belongs"),
    "no bytes": (_array(values=b"]"), "an array of Bytes over a list, wanted bytes"),
    "state of a list": (b"\x80\x02]Nb.", "sets the state of a list"),
    "long text": (b"\x80\x02T\xff\xff\xff\x7fab.", "damaged pickle .* after this opcode"),
    "very long bytes": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fab.", "damaged pickle"),
    "long bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"ab.", "damaged pickle"),
    "never stored": (b"\x80\x02h\x05.", "memo 5 was never stored"),
    "underflow": (b"\x80\x02\x86.", "a value is missing on the stack"),
    "below the mark": (b"\x80\x02]K\x01(a.", "a value is missing on the stack"),
    "no mark": (b"\x80\x02]e.", "a mark is missing on the stack"),
    "appends to a number": (b"\x80\x02K\x01K\x01a.", "appends to a int"),
    "odd items": (b"\x80\x02}(K\x01u.", "sets 1 values in a dict"),
    "number as key": (b"\x80\x02}K\x01K\x01s.", "a int as a key"),
    "left over": (b"\x80\x02K\x01K\x02.", "values are left over"),
    "trailing": (b"\x80\x02K\x01.x", "at byte 5: 1 bytes follow the end of the pickle"),
    "no end": (b"\x80\x02K\x01", "damaged pickle"),
    "no latin-1": (
        b"\x80\x02c_codecs\nencode\n(X\x03\0\0\0\xe2\x82\xacX\x06\0\0\0latin1tR.",
        "latin",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(name: str) -> None:
    raw, match = HOSTILE[name]
    with pytest.raises(FormatError, match=match):
        read(name, raw)


def test_the_array_that_the_hostile_ones_are_made_from_is_good() -> None:
    assert read("good", _array()).value.tolist() == [97, 98]


def test_a_giant_memo_index_allocates_nothing() -> None:
    tracemalloc.start()
    try:
        assert read("memo", b"\x80\x02K\x01r\xff\xff\xff\x7f.") == 1
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_too_many_opcodes() -> None:
    with pytest.raises(FormatError, match="more than 1,000,000 opcodes"):
        read("long", b"\x80\x02" + b"]" * 1_000_001 + b".")


def test_nests_of_nests_end() -> None:
    twice = (b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(1, 200))
    doubled = b"\x80\x02K\x01" + b"".join(twice)
    read("doubled", doubled + b".")  # 2**199 leaves if anybody walked them
    with pytest.raises(FormatError, match="a tuple as a key"):
        read("key", b"\x80\x02}" + doubled[2:] + b"K\x01s.")
    itself = read("itself", b"\x80\x02]q\x01h\x01a.")
    assert itself[0] is itself


def test_numpy_is_never_called() -> None:
    blank = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    blank += b"J\xff\xff\xff\x7f\x85U\x01b\x87R."
    array = read("blank", blank)
    assert isinstance(array, PickledArray)
    assert array.value is None


def _modules() -> set[str]:
    """What is imported, but for the codecs that Python looks up by itself."""
    return {name for name in sys.modules if not name.startswith("encodings.")}


@settings(max_examples=300)
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), max_size=4),
    cut=st.none() | st.integers(0, 400),
    protocol=st.sampled_from([0, 2, 4, 5]),
)
def test_random_damage(flips, cut, protocol) -> None:
    before = _modules()
    if protocol:
        nest = {"data": np.arange(40, dtype=np.uint8), "labels": [1, 2], "name": "x" * 20}
        raw = bytearray(pickle.dumps(nest, protocol))
    else:
        raw = bytearray(Python2Pickle().meta())
    for at, bit in flips:
        raw[at % len(raw)] ^= 1 << bit
    with contextlib.suppress(FormatError):
        read("damaged", bytes(raw[:cut]))
    assert _modules() == before


@given(st.binary(max_size=60))
def test_random_bytes(raw: bytes) -> None:
    with contextlib.suppress(FormatError):
        read("random", raw)
