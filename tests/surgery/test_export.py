"""A network as a file: each format read back, what is refused, nothing half written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import evenkeel
from evenkeel.errors import ConfigError, ShapeError, SurgeryError
from evenkeel.nn.folded import BorderedConv2d, ScaleShift
from evenkeel.surgery import export as exporting
from evenkeel.surgery.export import Exported, check_target, export, largest_difference
from evenkeel.surgery.exporting import programs

from .nets import images, randomized, state

PROGRAMS = (".pt2", ".onnx")
FORMATS = (*PROGRAMS, ".safetensors")


class Net(nn.Module):
    """A norm that can be folded, one that cannot, and a sum."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.bn1 = norm(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn2 = norm(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = torch.sigmoid(self.conv2(x) + x)
        return self.fc(torch.tanh(self.bn2(x)).mean((2, 3)))


class Several(nn.Module):
    """Two inputs with a batch, one without; outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(3, 4)

    def forward(self, image: Tensor, facts: Tensor, weight: Tensor) -> dict[str, Tensor]:
        found = self.conv(image).mean((2, 3)) + self.fc(facts)
        return {"found": found * weight, "largest": found.argmax(1)}


def net(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return randomized(Net(norm)).eval()


def folded(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return evenkeel.fold(net(norm), images())[0]


def run(path: Path, *inputs: Tensor, **named: Tensor) -> Any:
    """What a file computes, by the library that people load it with."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(*inputs, **named)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = named or dict(zip((i.name for i in session.get_inputs()), inputs, strict=True))
    outputs = session.run(None, {name: t.numpy() for name, t in given.items()})
    return torch.from_numpy(outputs[0]) if len(outputs) == 1 else outputs


def said(path: Path) -> dict[str, Any]:
    """What the file's metadata says."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        return json.loads(metadata["evenkeel.fold"])
    if path.suffix == ".onnx":
        (found,) = onnx.load(path).metadata_props
        assert found.key == "evenkeel.fold"
        return json.loads(found.value)
    extra = {"evenkeel.fold": ""}
    torch.export.load(path, extra_files=extra)
    return json.loads(extra["evenkeel.fold"])


pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")


class TestRoundTrip:
    @pytest.mark.parametrize("first", [1, 3])
    @pytest.mark.parametrize("suffix", PROGRAMS)
    def test_programs_take_any_batch(self, tmp_path, suffix, first):
        own, path = folded(), tmp_path / f"net{suffix}"
        report = export(own, images(first), path)
        for size in (1, 2, 3, 5):
            x = images(size, seed=size)
            torch.testing.assert_close(run(path, x), own(x), rtol=1e-5, atol=1e-6)
        assert (report.path, report.format, report.batch) == (str(path), suffix, "any")
        assert report.bytes == path.stat().st_size
        assert report.difference <= report.budget * report.scale
        assert report.budget == {".pt2": 1e-5, ".onnx": 1e-4}[suffix]

    def test_weights(self, tmp_path):
        own, path = folded(), tmp_path / "net.safetensors"
        report = export(own, images(), path)
        again = evenkeel.fold(randomized(Net(), seed=5).eval(), images())[0]
        again.load_state_dict(load_file(path))
        assert torch.equal(again(images()), own(images()))
        assert (report.batch, report.opset, report.difference) == (None, None, None)
        assert "the same bits, read back by safetensors" in str(report)

    @pytest.mark.parametrize("suffix", PROGRAMS)
    @pytest.mark.parametrize("form", ["tuple", "dict", "dict in another order"])
    def test_several_inputs_and_outputs(self, tmp_path, suffix, form):
        torch.manual_seed(0)
        own, path = Several().eval(), tmp_path / f"net{suffix}"
        inputs = (images(3), torch.randn(3, 3), torch.randn(4))
        named = dict(zip(("image", "facts", "weight"), inputs, strict=True))
        turned = dict(reversed(named.items()))
        export(own, {"tuple": inputs, "dict": named}.get(form, turned), path)
        more = {**named, "image": images(7), "facts": torch.randn(7, 3)}
        given = (tuple(more.values()), {}) if form == "tuple" else ((), more)
        found = run(path, *given[0], **given[1])
        values = [*found.values()] if isinstance(found, dict) else map(torch.from_numpy, found)
        for value, wanted in zip(values, own(**more).values(), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
        assert [i["name"] for i in said(path)["inputs"]] == ["image", "facts", "weight"]
        assert [i["shape"] for i in said(path)["inputs"]] == [[3, 1, 8, 8], [3, 3], [4]]

    @pytest.mark.parametrize("suffix", PROGRAMS)
    @pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.2)])
    def test_norms_of_evenkeel_become_plain_operations(self, tmp_path, suffix, activation):
        own, path = net(evenkeel.BatchNorm2d), tmp_path / f"net{suffix}"
        own.bn2.activation = activation
        own.bn1 = randomized(evenkeel.PerActivationBatchNorm((6, 8, 8))).eval()
        export(own, images(), path)
        x = images(4, seed=1)
        torch.testing.assert_close(run(path, x), own(x), rtol=1e-4, atol=1e-5)
        if suffix == ".pt2":
            program = torch.export.load(path)
            assert not any("evenkeel" in str(node.target) for node in program.graph.nodes)

    def test_norms_with_the_statistics_of_the_batch(self, tmp_path):
        own = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), evenkeel.Norm("n c h w -> n", "c", c=4))
        export(own.eval(), images(2), tmp_path / "net.onnx")
        x = images(3, seed=1)
        torch.testing.assert_close(run(tmp_path / "net.onnx", x), own(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("suffix", PROGRAMS)
    def test_what_folding_leaves(self, tmp_path, suffix):
        """A convolution that knows its border; a scale and shift with a sum and a ReLU."""

        class Leaves(Net):
            def forward(self, x: Tensor) -> Tensor:
                x = self.conv2(self.bn1(torch.tanh(self.conv1(x))))
                return self.fc(F.relu(self.bn2(x.sigmoid()) + x).mean((2, 3)))

        torch.manual_seed(0)
        own, report = evenkeel.fold(randomized(Leaves()).eval(), images())
        assert type(own.conv2) is BorderedConv2d
        assert [norm for norm, _ in report.left] == ["bn2"]
        assert type(own.bn2) is ScaleShift
        export(own, images(), tmp_path / f"net{suffix}")
        x = images(4, seed=1)
        torch.testing.assert_close(run(tmp_path / f"net{suffix}", x), own(x), rtol=1e-4, atol=1e-5)

    def test_no_batch_normalization_is_left_where_no_norm_is(self, tmp_path):
        export(folded(), images(), tmp_path / "net.onnx")
        kinds = {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}
        assert "Conv" in kinds
        assert "BatchNormalization" not in kinds

    def test_the_network_stays_as_it_is(self, tmp_path):
        own = folded().train()
        before = state(own)
        for suffix in FORMATS:
            export(own, images(), tmp_path / f"net{suffix}")
        assert state(own) == before


class TestMetadata:
    @pytest.mark.parametrize("suffix", FORMATS)
    def test_what_folded_from_what(self, tmp_path, suffix):
        path = tmp_path / f"net{suffix}"
        own, report = evenkeel.fold(net(), images())
        export(own, images(), path, about={"network": "a:b", "fold": report.to_dict()})
        found = said(path)
        assert found["evenkeel"] == evenkeel.__version__
        assert found["inputs"] == [{"name": "x", "shape": [6, 1, 8, 8], "dtype": "float32"}]
        assert found["network"] == "a:b"
        assert [one["norm"] for one in found["fold"]["folded"]] == ["bn1"]

    @pytest.mark.parametrize("suffix", PROGRAMS)
    def test_neither_paths_nor_the_example(self, tmp_path, suffix):
        own, x = folded(), images()
        export(own, x, tmp_path / f"secret{suffix}")
        content = (tmp_path / f"secret{suffix}").read_bytes()
        assert x.numpy().tobytes()[:64] not in content
        for word in (b"site-packages", str(tmp_path).encode(), b"test_export", b"secret"):
            assert word not in content
        assert own.conv1.weight.detach().numpy().tobytes() in content  # such bytes would be seen


class TestFixedBatch:
    @pytest.mark.parametrize("suffix", PROGRAMS)
    def test_one_batch_size_alone(self, tmp_path, suffix):
        path = tmp_path / f"net{suffix}"
        report = export(folded(), images(3), path, dynamic_batch=False)
        assert report.batch == 3
        assert "batches of 3 alone" in str(report)
        assert run(path, images(3)).shape == (3, 5)
        with pytest.raises(Exception, match=r"shape|dimension|INVALID_ARGUMENT"):
            run(path, images(4))

    def test_a_network_that_fixes_the_batch(self, tmp_path):
        class Fixed(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.reshape(3, -1).relu()

        path = tmp_path / "net.pt2"
        with pytest.raises(SurgeryError, match=r"one batch size alone.*--fixed-batch"):
            export(Fixed(), images(3), path)
        assert not path.exists()
        assert export(Fixed(), images(3), path, dynamic_batch=False).batch == 3

    def test_no_batch_at_all(self, tmp_path):
        with pytest.raises(ShapeError, match="no tensor with a batch axis"):
            export(nn.ReLU(), torch.tensor(1.0), tmp_path / "net.pt2")


class TestOpset:
    def test_the_one_that_is_asked_for(self, tmp_path):
        path = tmp_path / "net.onnx"
        assert export(folded(), images(), path, opset=18).opset == 18
        assert onnx.load(path).opset_import[0].version == 18

    def test_one_that_cannot_be_had(self, tmp_path):
        with pytest.raises(SurgeryError, match=r"opset 7 was asked for.*in opset \d+"):
            export(folded(), images(), tmp_path / "net.onnx", opset=7)
        assert not any(tmp_path.iterdir())


class TestProof:
    """Every comparison fails where it should, and then nothing is written."""

    @pytest.mark.parametrize("suffix", PROGRAMS)
    def test_a_file_that_computes_something_else(self, tmp_path, monkeypatch, suffix):
        own, path = folded(), tmp_path / f"net{suffix}"
        path.write_text("the old one")
        other = folded()
        with torch.no_grad():
            other.fc.bias[0] += 1e-3
        wrong = programs.program_of(other, images(), True)
        monkeypatch.setattr(exporting, "program_of", lambda *_: wrong)
        with pytest.raises(SurgeryError, match=r"differs from the network by 1\.0\de-03"):
            export(own, images(), path)
        assert path.read_text() == "the old one"
        assert [p.name for p in tmp_path.iterdir()] == [path.name]

    @pytest.mark.parametrize("suffix", PROGRAMS)
    def test_a_file_that_is_wrong_at_another_batch_size(self, tmp_path, monkeypatch, suffix):
        class Halves(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * (2 if len(x) == 3 else 3)

        shape = {0: torch.export.Dim("batch")}
        wrong = torch.export.export(nn.Threshold(-1e9, 0), (images(3),), dynamic_shapes=(shape,))
        monkeypatch.setattr(exporting, "program_of", lambda *_: wrong)
        own = nn.Hardtanh(-1e9, 1e9)
        export(own, images(3), tmp_path / f"right{suffix}")
        own.forward = lambda x: x * (1 if len(x) == 3 else 2)  # type: ignore[method-assign]
        with pytest.raises(SurgeryError, match="run with a batch of 1, differs"):
            export(own, images(3), tmp_path / f"net{suffix}")

    def test_weights_that_are_not_read_as_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "safetensors.torch.load_file",
            lambda path: {n: -t for n, t in folded().state_dict().items()},
        )
        with pytest.raises(SurgeryError, match="not what it wrote"):
            export(folded(), images(), tmp_path / "net.safetensors")
        assert not any(tmp_path.iterdir())

    def test_a_norm_that_onnx_brings_in(self, tmp_path):
        class Hidden(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.batch_norm(x.sigmoid(), torch.zeros(1), torch.ones(1))

        with pytest.raises(SurgeryError, match="has a BatchNormalization, but the network has no"):
            export(Hidden(), images(), tmp_path / "net.onnx")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_not_finite(self, tmp_path, value):
        own = folded()
        with torch.no_grad():
            own.fc.bias.fill_(value)
        with pytest.raises(SurgeryError, match="not finite"):
            export(own, images(), tmp_path / "net.pt2")

    def test_a_network_that_draws_numbers(self, tmp_path):
        class Draws(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x + torch.rand_like(x)

        with pytest.raises(SurgeryError, match="differs from the network"):
            export(Draws(), images(), tmp_path / "net.pt2")

    def test_the_largest_difference(self):
        a, b = torch.tensor([1.0, -4.0]), torch.tensor([100.0])
        assert largest_difference([a, b], [a, b]) == (0.0, 4.0)
        assert largest_difference([a, b], [a, b + 1]) == (1.0, 100.0)
        assert largest_difference([a, b], [a - 0.5, b + 1]) == (0.5, 4.0)
        difference, scale = largest_difference([a, b], [a, b * torch.nan])
        assert np.isnan(difference)
        assert not difference <= 1e-4 * scale
        assert largest_difference([a, 0 * b], [a + 1, 0 * b + 1e-9])[1] == 0.0
        with pytest.raises(SurgeryError, match=r"outputs of \[\(1,\)\], the network of \[\(2,\)\]"):
            largest_difference([a], [b])
        with pytest.raises(SurgeryError, match="the file gives outputs of"):
            largest_difference([a, b], [a])
        with pytest.raises(SurgeryError, match="no output to compare"):
            largest_difference([a[:0]], [a[:0]])


class TestAllOrNothing:
    @pytest.mark.parametrize("suffix", FORMATS)
    @pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
    def test_interrupted(self, tmp_path, monkeypatch, suffix, kind):
        def stop(number: int) -> None:
            assert any(path.name.endswith(".part") for path in tmp_path.iterdir())
            raise kind(28, "No space left on device")

        path = tmp_path / f"net{suffix}"
        path.write_text("the old one")
        monkeypatch.setattr("os.fsync", stop)
        own = nn.Conv2d(1, 2, 3)
        wanted = KeyboardInterrupt if kind is KeyboardInterrupt else ConfigError
        with pytest.raises(wanted, match="No space left on device"):
            export(own, images(), path)
        assert path.read_text() == "the old one"
        assert [p.name for p in tmp_path.iterdir()] == [path.name]

    @pytest.mark.parametrize("suffix", FORMATS)
    def test_a_folder_that_is_not_there(self, tmp_path, suffix):
        with pytest.raises(ConfigError, match=r"cannot be written: No such file or directory"):
            export(nn.Conv2d(1, 2, 3), images(), tmp_path / "no" / f"net{suffix}")

    def test_what_torch_cannot_export(self, tmp_path):
        class Decides(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x if x.sum().item() > 0 else -x

        with pytest.raises(SurgeryError, match=r"torch\.export cannot export the folded network: "):
            export(Decides(), images(), tmp_path / "net.pt2")

    def test_what_onnxruntime_cannot_run(self, tmp_path):
        with pytest.raises(
            SurgeryError, match=r"cannot be loaded again: .*; convert the network to float32 first"
        ) as error:
            export(nn.Conv2d(1, 2, 3).double(), images().double(), tmp_path / "net.onnx")
        assert ".part" not in str(error.value)
        assert not any(tmp_path.iterdir())

    def test_state_that_is_no_tensor(self, tmp_path):
        class Keeps(nn.Conv2d):
            def get_extra_state(self) -> str:
                return "text"

        with pytest.raises(ConfigError, match="keeps '_extra_state', of type str"):
            export(Keeps(1, 2, 3), images(), tmp_path / "net.safetensors")

    @pytest.mark.parametrize("suffix", PROGRAMS)
    def test_nobody_hears_of_it(self, tmp_path, capfd, recwarn, suffix):
        export(folded(), images(), tmp_path / f"net{suffix}")
        assert capfd.readouterr() == ("", "")
        assert not recwarn.list


class TestPackages:
    @pytest.mark.parametrize("package", ["onnx", "onnxscript"])
    def test_one_that_is_missing(self, tmp_path, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            ConfigError, match=rf"takes {package}, not installed.*pip install 'evenkeel\[onnx\]'"
        ):
            export(nn.ReLU(), images(), tmp_path / "net.onnx")
        export(nn.ReLU(), images(), tmp_path / "net.pt2")

    def test_without_onnxruntime(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        report = export(folded(), images(2), tmp_path / "net.onnx")
        assert report.read_by == f"onnx.reference {onnx.__version__}"
        wrong = programs.program_of(nn.Conv2d(1, 5, 8).eval(), images(2), True)
        monkeypatch.setattr(exporting, "program_of", lambda *_: wrong)
        with pytest.raises(SurgeryError, match="outputs of"):
            export(folded(), images(2), tmp_path / "net.onnx")

    @pytest.mark.parametrize(
        ("name", "opset", "message"),
        [
            ("net.onxx", None, r"written as '\.onxx' \(did you mean '\.onnx'\?\); choose \.pt2"),
            ("net.pth", None, r"choose \.pt2, \.onnx, \.safetensors"),
            ("net", None, "a name without suffix"),
            ("net.pt2", 18, r"an opset belongs to \.onnx"),
        ],
    )
    def test_formats_that_there_are_not(self, name, opset, message):
        with pytest.raises(ConfigError, match=message):
            check_target(name, opset)

    def test_the_report_as_values(self):
        report = Exported("a.onnx", ".onnx", 1_234_567, "any", 20, "ort 1", 1e-7, 2.0, 1e-4)
        assert str(report) == (
            "a.onnx (1.2 MB, opset 20, any batch size): run by ort 1, largest output difference "
            "1.00e-07 of 2 (budget 1e-04 relative)"
        )
        assert json.loads(json.dumps(report.to_dict()))["bytes"] == 1_234_567
