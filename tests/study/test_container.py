"""The file below a trained network: whole or not at all, and never trusted."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from evenkeel.errors import FormatError, StudyError
from evenkeel.study.container import read, write

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(7)}
CONFIG = {"rate": 0.1, "names": ["a", "\u00e9"], "none": None, "deep": {"x": [1, 2.5, True]}}


@pytest.fixture
def path(tmp_path):
    target = tmp_path / "m"
    write(target, "model", CONFIG, TENSORS)
    return target


@pytest.fixture
def good(path):
    return path.read_bytes()


class TestRoundTrip:
    def test_config_and_tensors(self, path):
        config, tensors = read(path, "model")
        assert config == CONFIG
        assert tensors.keys() == TENSORS.keys()
        assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())

    def test_equal_contents_give_equal_bytes(self, path, good):
        turned = dict(reversed(TENSORS.items()))
        write(path, "model", dict(reversed(CONFIG.items())), turned)
        assert path.read_bytes() == good

    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool]
    )
    def test_types(self, tmp_path, dtype):
        value = torch.tensor([[0, 1], [1, 0]]).to(dtype)
        write(tmp_path / "m", "training", {}, {"x": value})
        assert torch.equal(read(tmp_path / "m", "training")[1]["x"], value)

    def test_strided_and_shared_tensors(self, tmp_path):
        base = torch.arange(12.0).reshape(3, 4)
        tensors = {"a": base.t(), "b": base, "c": base[1:], "d": torch.tensor(2), "e": base[:0]}
        write(tmp_path / "m", "model", {}, tensors)
        _, found = read(tmp_path / "m", "model")
        assert all(torch.equal(found[name], value) for name, value in tensors.items())

    def test_no_tensors(self, tmp_path):
        write(tmp_path / "m", "model", {}, {})
        assert read(tmp_path / "m", "model") == ({}, {})

    def test_what_is_read_does_not_hang_on_the_file(self, path, good):
        _, tensors = read(path, "model")
        path.write_bytes(bytes(len(good)))
        assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())

    def test_what_is_read_can_be_written_to(self, path):
        _, tensors = read(path, "model")
        tensors["weight"].add_(1)
        assert torch.equal(read(path, "model")[1]["weight"], TENSORS["weight"])


class TestDamage:
    def test_any_flipped_bit_is_noticed(self, path, good):
        for at in range(8 * len(good)):
            raw = bytearray(good)
            raw[at // 8] ^= 1 << at % 8
            path.write_bytes(raw)
            with pytest.raises(FormatError, match="m: "):
                read(path, "model")

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_a_file_that_is_cut_off(self, path, good, data):
        path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
        with pytest.raises(FormatError, match="is no safetensors file that can be read"):
            read(path, "model")

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(tail=st.binary(min_size=1, max_size=20))
    def test_bytes_behind_the_end(self, path, good, tail):
        path.write_bytes(good + tail)
        with pytest.raises(FormatError, match="is no safetensors file that can be read"):
            read(path, "model")

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(raw=st.binary(max_size=200))
    def test_garbage(self, path, raw):
        path.write_bytes(raw)
        with pytest.raises(FormatError, match="is no safetensors file that can be read"):
            read(path, "model")

    def test_a_header_that_declares_terabytes(self, path):
        path.write_bytes((2**42).to_bytes(8, "little") + b"{}")
        with pytest.raises(FormatError, match="is no safetensors file that can be read"):
            read(path, "model")


class TestForeign:
    def test_no_file_and_a_folder(self, tmp_path):
        with pytest.raises(FormatError, match="nothing: there is no such file"):
            read(tmp_path / "nothing", "model")
        with pytest.raises(FormatError, match="is not a file"):
            read(tmp_path, "model")

    def test_of_another_program(self, path):
        save_file({"w": torch.ones(2)}, path, {"format": "pt"})
        with pytest.raises(FormatError, match="was not written by evenkeel: its metadata has no"):
            read(path, "model")
        save_file({"w": torch.ones(2)}, path)
        with pytest.raises(FormatError, match="was not written by evenkeel"):
            read(path, "model")

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("", "its config is no JSON that can be read"),
            ("{", "its config is no JSON that can be read"),
            ("[" * 100_000, "its config is no JSON that can be read"),
            ('{"format": 1e999}', "1e999 is too large a number"),
            ('{"format": NaN}', "NaN is no number"),
            ('{"format": ' + "9" * 5000 + "}", "its config is no JSON that can be read"),
            ("[]", "does not say which format it has"),
            ("{}", "does not say which format it has"),
            ('{"format": true}', "does not say which format it has"),
            ('{"format": 0}', "is not laid out as format 1 is"),
            ('{"format": 1}', "is not laid out as format 1 is"),
            ('{"format": 2}', r"was written by a newer evenkeel \(format 2, this one knows 1\)"),
            ('{"format":1,"kind":"model","sha256":"","config":3}', "is not laid out as format 1"),
            ('{"format":1,"kind":[],"sha256":"","config":{}}', "holds something unknown, not a tr"),
            ('{"format":1,"kind":"model","sha256":7,"config":{}}', "do not match its checksum"),
        ],
    )
    def test_a_config_that_is_none(self, path, text, match):
        save_file({"w": torch.ones(2)}, path, {"evenkeel": text})
        with pytest.raises(FormatError, match=match):
            read(path, "model")

    def test_of_the_other_kind(self, path):
        with pytest.raises(FormatError, match="holds a trained network, not a training that is no"):
            read(path, "training")


class TestWriting:
    @pytest.mark.parametrize("name", ["fsync", "replace"])
    def test_a_full_disk_leaves_the_old_file(self, path, good, monkeypatch, name):
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        if name == "fsync":
            monkeypatch.setattr(os, "fsync", full)
        else:
            monkeypatch.setattr("pathlib.Path.replace", full)
        with pytest.raises(
            StudyError, match=r"cannot be written \(No space left on device\); free"
        ):
            write(path, "model", {}, {})
        assert path.read_bytes() == good
        assert os.listdir(path.parent) == [path.name]

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
    def test_a_device_that_is_full(self, tmp_path):
        part = tmp_path / f".m.{os.getpid()}.part"
        part.symlink_to("/dev/full")
        with pytest.raises(StudyError, match="No space left on device"):
            write(tmp_path / "m", "model", CONFIG, TENSORS)
        assert os.listdir(tmp_path) == []

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(StudyError, match=r"cannot be written \(No such file"):
            write(tmp_path / "no" / "m", "model", {}, {})
        (tmp_path / "file").touch()
        with pytest.raises(StudyError, match=r"cannot be written \(Not a directory"):
            write(tmp_path / "file" / "m", "model", {}, {})
