"""Networks of Darknet's files compute what Darknet does, and bad files are refused."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import evenkeel
from evenkeel.errors import ConfigError, FormatError
from evenkeel.formats import darknet

from . import oracle
from .samples import image, loaded, text, weights_for, written

CLASSIFIER = text(
    (2, 9, 11),
    "convolutional batch_normalize=1 filters=6 size=3 pad=1 activation=leaky",
    "maxpool size=2 stride=2",
    "convolutional batch_normalize=1 filters=8 size=3 stride=2 pad=1 groups=2 activation=elu",
    "dropout probability=.3",
    "maxpool size=2 stride=1",
    "connected batch_normalize=1 output=7 activation=relu",
    "connected output=5 activation=linear",
    "softmax temperature=2",
    "cost type=sse",
)
DETECTOR = text(
    (3, 8, 8),
    "convolutional batch_normalize=1 filters=4 size=3 pad=1 activation=leaky",
    "convolutional batch_normalize=1 filters=8 size=3 stride=2 pad=1 activation=selu",
    "shortcut from=-1 activation=relu",
    "convolutional filters=8 size=1 activation=linear",
    "shortcut from=1 activation=leaky",
    "route layers=-1 groups=2 group_id=1",
    "upsample stride=2 scale=.5",
    "route layers=-1,0",
    "reorg stride=2",
    "batchnorm",
    "convolutional filters=14 size=1 activation=linear",
    "yolo mask=0,1 classes=2 num=3 scale_x_y=1.2",
    "route layers=4",
    "convolutional filters=7 size=1 activation=linear",
    "yolo mask=2 classes=2 num=3",
)
OTHERS = text(
    (4, 12, 12),
    "crop crop_height=8 crop_width=10",
    "convolutional filters=8 size=2 padding=1 stride=2 activation=tanh",
    "maxpool size=3 stride=2",
    "upsample stride=-1",
    "reorg stride=2 reverse=1",
    "activation activation=ramp",
    "convolutional batch_normalize=1 filters=8 size=3 stride=3 activation=logistic flipped=1",
    "avgpool",
    "convolutional filters=8 activation=relu",
    "scale_channels from=-3 activation=loggy",
    "sam from=6",
    "convolutional filters=14 size=1 activation=linear",
    "region num=2 classes=2 softmax=1",
)


def expected(source: str, data: bytes, x: torch.Tensor, outside: bool) -> list[np.ndarray]:
    """The oracle's last layer, and every head before it, for a batch."""
    names = [name for name, _ in oracle.sections(source)[1:]]
    wanted = [i for i, name in enumerate(names) if name in ("yolo", "region")]
    wanted = sorted({*wanted, len(names) - 1})
    each = [oracle.run(source, data, one.numpy(), outside=outside) for one in x]
    return [np.stack([layers[i].ravel() for layers in each]) for i in wanted]


def outputs(network: nn.Module, x: torch.Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        found = network(x)
    found = found if isinstance(found, tuple) else (found,)
    return [y.flatten(1).double().numpy() for y in found]


@pytest.mark.parametrize("convention", ["darknet-cpu", "darknet-gpu", "alexeyab-cpu"])
@pytest.mark.parametrize("source", [CLASSIFIER, DETECTOR, OTHERS], ids=["cl", "det", "others"])
def test_every_layer_computes_what_darknet_does(tmp_path, source, convention):
    data = weights_for(source, revision=5 if convention.startswith("alexeyab") else 0)
    network = loaded(tmp_path, source, data, convention=convention)
    x = image(*network.image)
    wanted = expected(source, data, x, convention == "darknet-cpu")
    found = outputs(network, x)
    assert len(found) == len(wanted) == (2 if source is DETECTOR else 1)
    for y, z in zip(found, wanted, strict=True):
        np.testing.assert_allclose(y, z, rtol=2e-5, atol=2e-5)


def test_the_oracle_can_tell_the_conventions_apart(tmp_path):
    data = weights_for(CLASSIFIER)
    x = image(2, 9, 11)
    network = loaded(tmp_path, CLASSIFIER, data, convention="darknet-gpu")
    network.layers[0].norm.eps = 1e-3
    (found,), (wanted,) = outputs(network, x), expected(CLASSIFIER, data, x, False)
    assert np.abs(found - wanted).max() > 1e-4


@pytest.mark.parametrize("name", sorted(oracle.ACTIVATIONS))
def test_activations(tmp_path, name):
    source = text((1, 1, 41), f"activation activation={name}")
    network = loaded(tmp_path, source, weights_for(source))
    x = torch.linspace(-7.03, 6.97, 41).reshape(1, 1, 1, 41)
    wanted = [oracle.ACTIVATIONS[name](float(value)) for value in x.ravel()]
    np.testing.assert_allclose(outputs(network, x)[0][0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("x", [(6, 4, 4), (2, 8, 8), (3, 2, 2), (5, 8, 8)])
def test_sums_of_unequal_layers(tmp_path, x):
    """[shortcut] adds the channels and places that both have."""
    c, h, _ = x
    source = text(
        (2, 8, 8),
        f"convolutional filters={c} size=1 stride={8 // h} activation=linear",
        "route layers=-1",
        "upsample stride=1",
        f"convolutional filters=4 size=1 stride={max(h // 4, 1)} activation=linear",
        f"upsample stride={4 // h or 1}",
        "shortcut from=0 activation=relu",
    )
    data = weights_for(source)
    given = image(2, 8, 8)
    found = outputs(loaded(tmp_path, source, data), given)[0]
    np.testing.assert_allclose(found, expected(source, data, given, False)[0], atol=1e-5)


def test_what_the_darknet_program_computed(darknets_files):
    """A network that Darknet trained on MNIST, with its outputs for test images."""
    mnist = Path(os.environ.get("EVENKEEL_MNIST") or darknets_files.parent / "mnist")
    packed = mnist / "t10k-images-idx3-ubyte.gz"
    if not packed.is_file():
        pytest.skip("MNIST's test images are not here")
    pixels = np.frombuffer(gzip.decompress(packed.read_bytes()), np.uint8, offset=16)
    x = torch.from_numpy(pixels.astype(np.float32) / 255).reshape(-1, 1, 28, 28)[:256]
    network = darknet.load(
        darknets_files / "mnist.cfg", darknets_files / "mnist.weights", convention="darknet-cpu"
    )
    wanted = np.fromfile(darknets_files / "mnist.output.f32", "<f4").reshape(256, 10)
    np.testing.assert_allclose(outputs(network, x)[0], wanted, atol=2e-6)
    other = darknet.load(darknets_files / "mnist.cfg", darknets_files / "mnist.weights")
    assert np.abs(outputs(other, x)[0] - wanted).max() > 1e-4  # the place of epsilon is seen


def test_what_the_darknet_program_computed_with_heads(darknets_files):
    """Shortcut, groups, upsample, route, reorg and yolo, by the Darknet program itself."""
    network = darknet.load(
        darknets_files / "heads.cfg", darknets_files / "heads.weights", convention="darknet-cpu"
    )
    x = np.fromfile(darknets_files / "heads.input.f32", "<f4").reshape(1, 3, 64, 64)
    wanted = np.fromfile(darknets_files / "heads.output.f32", "<f4").reshape(1, -1)
    np.testing.assert_allclose(outputs(network, torch.from_numpy(x))[0], wanted, atol=2e-5)


def test_files_of_old_programs_have_dense_weights_turned(tmp_path):
    data = weights_for(CLASSIFIER, transposed=True)
    network = loaded(tmp_path, CLASSIFIER, data)
    x = image(2, 9, 11)
    np.testing.assert_allclose(
        outputs(network, x)[0], expected(CLASSIFIER, data, x, False)[0], atol=1e-5
    )
    assert network.header.seen == 64000


def test_norms_are_torchs_with_darknets_settings(tmp_path):
    data = weights_for(CLASSIFIER)
    network = loaded(tmp_path, CLASSIFIER, data)
    assert not network.training
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert [(n.momentum, n.eps) for n in norms] == [(0.01, 1e-5)] * 3
    slow = loaded(tmp_path, CLASSIFIER, data, convention="alexeyab-cpu")
    norms = [m for m in slow.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert [n.momentum for n in norms] == [0.1, 0.1, 0.05]


def test_without_weights_it_can_be_trained(tmp_path):
    path, _ = written(tmp_path, CLASSIFIER, b"")
    torch.manual_seed(0)
    network = darknet.load(path)
    assert network.training
    first = network.layers[0].conv
    assert first.bias is None
    assert float(first.weight.detach().std()) == pytest.approx((2 / (9 * 2)) ** 0.5, rel=0.2)
    network(image(2, 9, 11)).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert evenkeel.check(network, image(2, 9, 11)).errors == ()


def test_loading_draws_no_random_numbers(tmp_path):
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    loaded(tmp_path, CLASSIFIER, weights_for(CLASSIFIER))
    torch.manual_seed(3)
    loaded(tmp_path, CLASSIFIER, (tmp_path / "net.weights").read_bytes())
    assert torch.equal(torch.rand(4), wanted)


def test_a_file_of_the_first_layers(tmp_path):
    """As darknet53.conv.74 is: the others keep their initial weights."""
    data = weights_for(CLASSIFIER)
    short = data[: 20 + 4 * (4 * 6 + 6 * 2 * 9)]
    with pytest.raises(FormatError, match=r"holds 132 numbers.*ends with layer 0: with partial"):
        loaded(tmp_path, CLASSIFIER, short)
    whole, part = (loaded(tmp_path, CLASSIFIER, d, partial=True) for d in (data, short))
    assert torch.equal(whole.layers[0].conv.weight, part.layers[0].conv.weight)
    assert torch.equal(part.layers[2].norm.running_var, torch.ones(8))
    with pytest.raises(FormatError, match=r"is it whole, and of this \.cfg"):
        loaded(tmp_path, CLASSIFIER, short[:-8], partial=True)


@pytest.mark.parametrize(
    ("change", "text_of_error"),
    [
        (lambda d: d[:10], "10 bytes are no .weights file"),
        (lambda d: d[:-3], "it ends within a number"),
        (lambda d: d + b"\0" * 8, r"holds 954 numbers, but .* asks for 952; is it of another"),
        (lambda d: d[:20], "holds 0 numbers"),
        (lambda d: d[:92] + struct.pack("<f", -1.0) + d[96:], "layer 0 has variances below 0"),
        (lambda d: d[:92] + struct.pack("<f", float("nan")) + d[96:], "layer 0 has variances"),
    ],
    ids=["header", "torn", "long", "empty", "negative", "nan"],
)
def test_bad_weights(tmp_path, change, text_of_error):
    with pytest.raises(FormatError, match=text_of_error):
        loaded(tmp_path, CLASSIFIER, change(weights_for(CLASSIFIER)))


def test_a_boundless_network_takes_no_memory(tmp_path):
    """A .cfg may say anything; the weights' size is looked at first."""
    source = text((3, 8, 8), "convolutional filters=1000000 size=1001 pad=1 activation=relu")
    with pytest.raises(
        FormatError, match=r"it asks for 3,\d{3},\d{3},\d{3},\d{3} weights, more than"
    ):
        loaded(tmp_path, source, weights_for(CLASSIFIER))
    with pytest.raises(FormatError, match="weights, more than"):
        darknet.load(tmp_path / "net.cfg")


@pytest.mark.parametrize(
    ("sections", "text_of_error"),
    [
        (["lstm output=4"], r"line 6 \[lstm\]: this kind of layer is not supported; known are"),
        (["convolutional activation=rleu"], r"activation=rleu \(did you mean 'relu'\?\)"),
        (["convolutional filters=0"], "filters=0, but it must be 1 or more"),
        (["convolutional filters=many"], "filters=many is no whole number"),
        (["convolutional filters=4 groups=3"], "groups=3 do not divide 2 input channels"),
        (["convolutional size=9"], "it makes 1x0x0 of 2x8x8; the image is too small"),
        (["convolutional antialiasing=1"], "antialiasing=1 is not supported"),
        (["convolutional dontload=1"], "dontload=1 is not supported"),
        (["convolutional dilation=2 size=3"], "must be padded by half"),
        (["shortcut from=-1"], "there is no layer -1 before layer 0"),
        (["shortcut"], "it must say from="),
        (["route"], "it must say layers="),
        (["avgpool", "upsample", "shortcut from=0 alpha=2"], "cannot be added"),
        (
            ["maxpool", "maxpool stride=2", "upsample stride=3", "shortcut from=0"],
            "cannot be added",
        ),
        (["maxpool stride=2 size=2", "upsample", "route layers=0,1"], "do not fit together"),
        (["maxpool", "route layers=0 groups=3 group_id=1"], "group 1 of 3 cannot be had"),
        (["maxpool", "scale_channels"], "it must say from= with one layer"),
        (["maxpool stride=2 size=2", "scale_channels from=0", "maxpool", "reorg stride=3"], "fit"),
        (["upsample stride=0"], "makes no image"),
        (["dropout probability=2"], "is not between 0 and 1"),
        (["crop crop_height=9 crop_width=1"], "cannot be cropped"),
        (["softmax groups=3"], "do not fit 2x8x8"),
        (["yolo classes=2"], "takes 7 channels but is given 2"),
        (["region classes=2"], "takes 7 channels but is given 2"),
        (["shortcut from=x"], "from=x is no list of whole numbers"),
    ],
)
def test_bad_layers(tmp_path, sections, text_of_error):
    path, _ = written(tmp_path, text((2, 8, 8), *sections), b"")
    with pytest.raises(FormatError, match=text_of_error):
        darknet.load(path)


def test_bad_places(tmp_path):
    path, _ = written(tmp_path, CLASSIFIER, weights_for(CLASSIFIER))
    with pytest.raises(FormatError, match=r"none\.weights: there is no such file"):
        darknet.load(path, tmp_path / "none.weights")
    with pytest.raises(FormatError, match="it is a folder"):
        darknet.load(tmp_path)
    with pytest.raises(FormatError, match="it is a folder"):
        darknet.load(path, tmp_path)
    with pytest.raises(ConfigError, match=r"'darknet-cup' is no build of Darknet \(did you mean"):
        darknet.load(path, convention="darknet-cup")
    with pytest.raises(FormatError, match="cannot be read"):
        darknet.load(tmp_path / ("x" * 300))
    with pytest.raises(FormatError, match="cannot be read"):
        darknet.load(path, tmp_path / ("x" * 300))


def test_text_that_is_not_ascii(tmp_path):
    """A byte order mark, and a comment in whatever somebody's editor writes."""
    text = "\ufeff" + CLASSIFIER + "\n# gr\xfc\xdfe"
    (tmp_path / "a.cfg").write_bytes(text.encode("utf-8"))
    (tmp_path / "b.cfg").write_bytes(text[1:].encode("latin-1"))
    assert [len(darknet.load(tmp_path / name).layers) for name in ("a.cfg", "b.cfg")] == [9, 9]


FLAT = text(
    (3, 8, 6),
    "convolutional filters=4 size=3 pad=1 activation=leaky",
    "avgpool",
    "connected output=5 activation=relu",
    "connected output=4 activation=logistic",
    "scale_channels from=0",
    "avgpool",
    "shortcut from=3",
    "route layers=3,1",
    "reorg stride=1",
    "upsample stride=2",
    "connected output=4 activation=linear",
    "upsample stride=2",
    "route layers=-2",
    "shortcut from=1",
    "crop crop_height=1 crop_width=1 noadjust=1",
)


def test_flat_values_are_images_of_one_place(tmp_path):
    data, x = weights_for(FLAT), image(3, 8, 6)
    network = loaded(tmp_path, FLAT, data)
    (y,), (z,) = outputs(network, x), expected(FLAT, data, x, False)
    np.testing.assert_allclose(y, z, rtol=2e-5, atol=2e-5)
    evenkeel.fold(network, x)


@pytest.mark.parametrize(
    ("sections", "convention", "message"),
    [
        (["convolutional filters=2 stride=2"], "darknet-cpu", "a mistake of its own"),
        (["maxpool", "maxpool size=2 stride=2", "shortcut from=0"], "alexeyab-gpu", "by its place"),
        (["maxpool", "shortcut from=0 beta=2"], "alexeyab-gpu", "does not know alpha and beta"),
        (["softmax spatial=1"], "darknet-cpu", "spatial=1 is for a GPU"),
        (["softmax spatial=1 temperature=2"], "darknet-gpu", "spatial=1 is for a GPU"),
    ],
)  # fmt: skip
def test_what_differs_between_programs(tmp_path, sections, convention, message):
    path, _ = written(tmp_path, text((2, 8, 8), *sections), b"")
    with pytest.raises(FormatError, match=message):
        darknet.load(path, convention=convention)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (["convolutional filters=99999999999999999999"], "more than Darknet can count"),
        (["convolutional filters=" + "9" * 5000], "more than Darknet can count"),
        (["connected output=2147483646"], "weights, more than"),
        (["maxpool", *["route layers=-1,-1,-1,-1"] * 50, "convolutional"], "more values than"),
        (["maxpool", "route layers=" + "0," * 5000 + "0"], "no list of whole numbers"),
        (["rnn output=3"], "this kind of layer"),
    ],
)
def test_numbers_beyond_reason(tmp_path, sections, message):
    source = text((2, 8, 8), *sections)
    path, weights = written(tmp_path, source, weights_for(CLASSIFIER))
    for given in (None, weights):
        with pytest.raises(FormatError, match=message):
            darknet.load(path, given)


def test_it_folds_and_accelerates(tmp_path):
    network = loaded(tmp_path, DETECTOR, weights_for(DETECTOR))
    x = image(3, 8, 8)
    folded, report = evenkeel.fold(network, x)
    assert len(report.folded) == 3
    quick, _ = evenkeel.accelerate(network, x)
    for other in (folded, quick):
        for y, z in zip(outputs(other, x), outputs(network, x), strict=True):
            np.testing.assert_allclose(y, z, atol=1e-5)
