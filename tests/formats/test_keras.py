"""Keras's models compute in torch what they do in Keras; bad files are refused, nothing is run."""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import evenkeel
from evenkeel.errors import ConfigError, FormatError
from evenkeel.formats import keras as own
from evenkeel.formats.keras import container

from .samples import old_keras_file

h5py = pytest.importorskip("h5py")
os.environ.setdefault("KERAS_BACKEND", "torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    keras = pytest.importorskip("keras")
    L = keras.layers

pytestmark = pytest.mark.filterwarnings("ignore")  # of Keras's own, which are not ours to mend


def model_of(build: Callable[[Any], Any], *shape: int, seed: int = 0) -> Any:
    """A Functional model with random numbers in it; variances are positive."""
    given = keras.Input(shape)
    return stirred(keras.Model(given, build(given)), seed)


def stirred(model: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "seed" in weight.path:
            continue
        positive = "variance" in weight.path
        values = rng.uniform(0.2, 2, weight.shape) if positive else rng.normal(0, 0.5, weight.shape)
        weight.assign(values)
    return model


ENDS = ("keras", "h5")


def compare(folder: Path, model: Any, *, ends=ENDS, first=False) -> own.Network:
    """Both files' networks against the model itself, on two images."""
    shape = model.input_shape[1:]
    x = np.random.default_rng(1).uniform(-1, 1, (2, *shape)).astype(np.float32)
    wanted = model(x, training=False)
    wanted = wanted if isinstance(wanted, list | tuple) else [wanted]
    given = torch.from_numpy(x)
    if len(shape) == 3 and not first:
        given = given.permute(0, 3, 1, 2)
    for end in ends:
        model.save(folder / f"model.{end}")
        network = own.load(folder / f"model.{end}")
        assert not network.training
        assert network.shape == tuple(given.shape[1:])
        with torch.no_grad():
            found = network(given)
        found = found if isinstance(found, tuple) else (found,)
        for y, z in zip(found, wanted, strict=True):
            y = y.permute(0, 2, 3, 1) if y.dim() == 4 and not first else y
            z = z.detach().numpy()
            np.testing.assert_allclose(y.numpy(), z, rtol=1e-4, atol=1e-5 * max(1, abs(z).max()))
    return network


LAYERS: dict[str, Callable[[Any], Any]] = {
    "same, stride 2": lambda x: L.Conv2D(5, 3, strides=2, padding="same", activation="relu")(x),
    "same, even": lambda x: L.Conv2D(5, (2, 4), padding="same", use_bias=False)(x),
    "dilated": lambda x: L.Conv2D(4, 3, dilation_rate=2, padding="same", activation="elu")(x),
    "groups": lambda x: L.Conv2D(8, 3, groups=4, activation="tanh")(x),
    "depthwise": lambda x: L.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2)(x),
    "separable": lambda x: L.SeparableConv2D(6, 3, padding="same", activation="silu")(x),
    "transposed": lambda x: L.Conv2DTranspose(3, 3, strides=2, padding="same")(x),
    "transposed, valid": lambda x: L.Conv2DTranspose(3, (4, 2), strides=2, activation="relu")(x),
    "dense": lambda x: L.Dense(4, activation="softmax")(L.Flatten()(x)),
    "dense on images": lambda x: L.Dense(4, activation="softmax")(x),
    "norm": lambda x: L.BatchNormalization(epsilon=0.01, momentum=0.9)(x),
    "norm without gamma": lambda x: L.BatchNormalization(scale=False)(x),
    "norm without beta": lambda x: L.BatchNormalization(center=False)(x),
    "norm of rows": lambda x: L.BatchNormalization(axis=1)(x),
    "norm of columns": lambda x: L.BatchNormalization(axis=2)(x),
    "norm of vectors": lambda x: L.BatchNormalization()(L.Flatten()(x)),
    "pool": lambda x: L.MaxPooling2D()(x),
    "pool, same": lambda x: L.MaxPooling2D(3, strides=2, padding="same")(x),
    "pool, same, small": lambda x: L.MaxPooling2D(2, strides=1, padding="same")(x),
    "mean": lambda x: L.AveragePooling2D(3, strides=2)(x),
    "mean, same": lambda x: L.AveragePooling2D(3, strides=1, padding="same")(x),
    "mean, same, odd": lambda x: L.AveragePooling2D(2, strides=1, padding="same")(x),
    "global": lambda x: L.GlobalAveragePooling2D()(x),
    "global, kept": lambda x: L.GlobalMaxPooling2D(keepdims=True)(x),
    "relu6": lambda x: L.ReLU(6.0)(L.Rescaling(10.0, offset=-1)(x)),
    "relu to 2": lambda x: L.ReLU(2.0)(L.Rescaling(10.0)(x)),
    "leaky": lambda x: L.LeakyReLU(0.2)(x),
    "sloped": lambda x: L.ReLU(negative_slope=0.1)(x),
    "softmax": lambda x: L.Softmax()(x),
    "softmax of rows": lambda x: L.Softmax(axis=1)(x),
    "activations": lambda x: L.Concatenate()(
        [L.Activation(name)(x) for name in (
            "elu", "gelu", "hard_sigmoid", "hard_silu", "mish", "relu6", "selu", "sigmoid", "silu",
            "softplus", "softsign", "tanh", "leaky_relu",
        )]
    ),
    "layer as activation": lambda x: L.Conv2D(3, 1, activation=L.LeakyReLU(0.3))(x),
    "merges": lambda x: L.Subtract()([
        L.Average()([x, L.Multiply()([x, x]), L.Maximum()([x, x])]), L.Minimum()([x, x])
    ]),
    "squeeze and excite": lambda x: L.Multiply()(
        [x, L.Conv2D(4, 1, activation="sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(x))]
    ),
    "numbers": lambda x: (2.0 - x) * 3.0 + 1.0,
    "rows joined": lambda x: L.Concatenate(axis=1)([x, x]),
    "padded": lambda x: L.ZeroPadding2D(((1, 2), (0, 3)))(x),
    "cropped": lambda x: L.Cropping2D(((1, 2), (0, 3)))(x),
    "larger": lambda x: L.UpSampling2D((2, 3))(x),
    "larger, bilinear": lambda x: L.UpSampling2D(2, interpolation="bilinear")(x),
    "flatten": lambda x: L.Flatten()(x),
    "reshape": lambda x: L.Reshape((4, -1, 3))(x),
    "reshape to vectors": lambda x: L.Reshape((-1,))(x),
    "vectors to images": lambda x: L.Reshape((3, 4, 2))(L.Dense(24)(L.Flatten()(x))),
    "permute": lambda x: L.Permute((3, 1, 2))(x),
    "dropout": lambda x: L.SpatialDropout2D(0.3)(L.Dropout(0.3)(x)),
    "normalization": lambda x: L.Normalization(mean=[1.0, 2, 3, 4], variance=[1.0, 4, 9, 16])(x),
    "learned normalization": lambda x: L.Normalization()(x),
    "two outputs": lambda x: [L.Conv2D(2, 1)(x), L.GlobalAveragePooling2D()(x)],
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers(tmp_path, name):
    compare(tmp_path, model_of(LAYERS[name], 7, 6, 4))


FIRST = {
    "conv": lambda x: L.Conv2D(5, 3, strides=2, padding="same", activation="softmax")(x),
    "norm": lambda x: L.BatchNormalization(axis=1)(x),
    "norm of columns": lambda x: L.BatchNormalization()(x),
    "flatten": lambda x: L.Dense(3)(L.Flatten()(L.MaxPooling2D()(x))),
    "nested": lambda x: keras.Sequential([keras.Input((4, 7, 6)), L.Conv2D(4, 3)])(x),
    "global": lambda x: L.GlobalAveragePooling2D()(x),
    "joined": lambda x: L.Concatenate(axis=1)([x, L.Conv2D(2, 1)(x)]),
}


@pytest.mark.parametrize("name", FIRST)
def test_channels_first(tmp_path, name):
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        if name.startswith("norm"):  # which has no format of its own: a convolution says it
            model = model_of(lambda x: FIRST[name](L.Conv2D(4, 1)(x)), 4, 7, 6)
        else:
            model = model_of(FIRST[name], 4, 7, 6)
        compare(tmp_path, model, first=True, ends=ENDS[: 1 + (name != "nested")])
    finally:
        keras.config.set_image_data_format(before)


def test_norms_are_torchs(tmp_path):
    model = model_of(
        lambda x: L.BatchNormalization(axis=1)(L.BatchNormalization(momentum=0.97)(x)), 5, 6, 3
    )
    network = compare(tmp_path, model)
    channels, rows = (m for m in network.layers.values() if list(m.parameters()))
    assert type(channels) is nn.BatchNorm2d
    assert (channels.eps, channels.momentum) == (1e-3, 0.03)
    assert isinstance(rows, evenkeel.Norm)
    kept = [w for w in model.weights if w.path.endswith("moving_variance")]
    assert np.array_equal(channels.running_var.numpy(), np.asarray(kept[0]))


@pytest.mark.parametrize(
    ("name", "options"),
    [("MobileNetV2", {"alpha": 0.35}), ("MobileNetV3Small", {}), ("DenseNet121", {})],
)
def test_keras_own_networks(tmp_path, name, options):
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(32, 32, 3), classes=5, **options
    )
    network = compare(tmp_path, stirred(model), ends=("keras",))
    x = torch.rand(2, 3, 32, 32)
    folded, report = evenkeel.fold(network, x)
    assert len(report.folded) > 25
    torch.testing.assert_close(folded(x), network(x), rtol=1e-3, atol=1e-5)


class TestModels:
    def test_sequential(self, tmp_path):
        layers = [L.Conv2D(4, 3), L.BatchNormalization(), L.ReLU(), L.Flatten(), L.Dense(3)]
        compare(tmp_path, stirred(keras.Sequential([keras.Input((6, 6, 2)), *layers])))
        late = keras.Sequential([L.Conv2D(2, 1, name="a-b"), L.Flatten(), L.Dense(2, name="keys")])
        late.build((None, 4, 4, 1))
        compare(tmp_path, stirred(late))

    def test_models_in_models(self, tmp_path):
        def build(x):
            inner = keras.Sequential(
                [keras.Input((6, 6, 2)), L.Conv2D(4, 3), L.BatchNormalization()], name="inner"
            )
            outer = keras.Input((6, 6, 2))
            around = keras.Model(outer, L.ReLU()(inner(outer)), name="around")
            return L.Dense(3)(L.Flatten()(around(x)))

        compare(tmp_path, model_of(build, 6, 6, 2), ends=("keras",))

    def test_a_layer_that_is_called_twice(self, tmp_path):
        def build(x):
            conv = L.Conv2D(2, 3, padding="same")
            return conv(conv(x))

        network = compare(tmp_path, model_of(build, 6, 6, 2))
        assert len(network.layers) == 1

    def test_it_trains_and_checks(self, tmp_path):
        model = model_of(lambda x: L.Flatten()(L.BatchNormalization()(L.Conv2D(4, 3)(x))), 6, 6, 2)
        network = compare(tmp_path, model).train()
        network(torch.rand(4, 2, 6, 6)).square().sum().backward()
        assert all(p.grad is not None for p in network.parameters())
        assert evenkeel.check(network, torch.rand(4, 2, 6, 6)).errors == ()


def test_mean_with_more_padding_behind_than_before(tmp_path):
    """As TensorFlow and JAX have it, padding does not count; Keras on torch repeats the edge."""
    model = model_of(lambda x: L.AveragePooling2D(3, strides=2, padding="same")(x), 6, 6, 1)
    model.save(tmp_path / "m.keras")
    x = torch.rand(1, 1, 6, 6)
    found = own.load(tmp_path / "m.keras")(x)[0, 0]
    wanted = [[x[0, 0, i : i + 3, j : j + 3].mean() for j in (0, 2, 4)] for i in (0, 2, 4)]
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_files_of_keras_2(tmp_path):
    wanted = old_keras_file(tmp_path / "old.h5")
    x = torch.from_numpy(np.load(tmp_path / "old.npy"))
    found = own.load(tmp_path / "old.h5")(x.permute(0, 3, 1, 2))
    np.testing.assert_allclose(found.detach().permute(0, 2, 3, 1), wanted, rtol=1e-4, atol=1e-5)


def swish(x):
    return x * 2


def twice(x: Any) -> Any:
    add = type((x + 1.0)._keras_history.operation)()
    return add(add(x, 1.0), 2.0)


@keras.saving.register_keras_serializable("mine")
class ReLU(L.Layer):
    """Not Keras's."""

    def call(self, x):
        return keras.ops.relu(x) * 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda x: L.LayerNormalization()(x), "(LayerNormalization): this kind of layer is not"),
        (lambda x: L.Lambda(lambda v: v * 2)(x), "(Lambda): this kind of layer is not supported"),
        (lambda x: L.Reshape((2, 2, 2, -1))(x), "neither vectors nor images"),
        (lambda x: L.ReLU(threshold=1.0)(x), "a threshold, or a slope with a maximum"),
        (lambda x: L.Conv2DTranspose(2, 3, strides=2, output_padding=1)(x), "output_padding and"),
        (lambda x: L.UpSampling2D(2, interpolation="bicubic")(x), "interpolation='bicubic'"),
        (lambda x: L.Activation("log_softmax")(x), "the activation 'log_softmax' is not supported"),
        (lambda x: keras.ops.clip(x, 0.0, 1.0), "(Clip): this operation is not supported"),
        (lambda x: x**2.0, "(Power): this operation is not supported"),
        (lambda x: L.Softmax(axis=(1, 2))(x), "softmax over several axes"),
        (lambda x: L.ReLU(0.0)(x), "max_value=0.0 is not supported"),
        (lambda x: L.Normalization(axis=1)(x), "axis=1 is not the channels'"),
        (lambda x: L.Rescaling([[1.0]] * 8)(x), "are not one for each channel"),
        (lambda x: L.Activation(swish)(x), "'swish' is a function of somebody's own"),
        (lambda x: ReLU()(x), "is a ReLU of somebody's own"),
        (lambda x: keras.ops.average(x, axis=1), "(Average): this operation"),
        (lambda x: twice(x), "is called twice, with unlike values"),
    ],
)
def test_layers_that_are_refused(tmp_path, build, message):
    model_of(build, 8, 8, 4).save(tmp_path / "m.keras")
    with pytest.raises(FormatError, match=re.escape(message)):
        own.load(tmp_path / "m.keras")


def test_models_that_are_refused(tmp_path):
    given = keras.Input((None, None, 3))
    keras.Model(given, L.Conv2D(2, 3)(given)).save(tmp_path / "m.keras")
    with pytest.raises(FormatError, match="does not say how large images are"):
        own.load(tmp_path / "m.keras")
    one, other = keras.Input((4, 4, 3)), keras.Input((4, 4, 3))
    keras.Model([one, other], L.Add()([one, other])).save(tmp_path / "m.keras")
    with pytest.raises(FormatError, match="a model of 2 inputs is not supported"):
        own.load(tmp_path / "m.keras")

    class Mine(keras.Model):
        def call(self, x):
            return x

    mine = Mine()
    mine.build((None, 3))
    mine.save(tmp_path / "m.keras")
    with pytest.raises(FormatError, match="only Sequential and Functional models say"):
        own.load(tmp_path / "m.keras")


@pytest.fixture
def parts(tmp_path) -> tuple[dict[str, Any], bytes]:
    """The config and weights of a small file, to be spoiled."""
    model_of(
        lambda x: L.BatchNormalization(name="bn")(L.Conv2D(3, 1, name="conv")(x)), 4, 4, 2
    ).save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        return json.loads(archive.read("config.json")), archive.read("model.weights.h5")


def packed(path: Path, config: object, weights: bytes, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        text = config if isinstance(config, str) else json.dumps(config)
        archive.writestr("config.json", text)
        archive.writestr("model.weights.h5", weights)
        for name, data in more.items():
            archive.writestr(name, data)
    return path


def spoiled(weights: bytes, change: Callable[[Any], None]) -> bytes:
    file = BytesIO(weights)
    with h5py.File(file, "r+") as h5:
        change(h5)
    return file.getvalue()


def replace_kernel(h5: Any, values: object) -> None:
    del h5["layers/conv2d/vars/0"]
    h5["layers/conv2d/vars/0"] = values


def cycle(h5: Any) -> None:
    h5["layers/conv2d/layers"] = h5["layers"]


def not_a_number(h5: Any) -> None:
    h5["layers/conv2d/vars/x"] = np.zeros(3)


def elsewhere(h5: Any) -> None:
    del h5["layers/conv2d/vars/0"]
    h5["layers/conv2d/vars/0"] = h5py.ExternalLink("/etc/passwd", "/")


def stored_elsewhere(h5: Any) -> None:
    del h5["layers/conv2d/vars/0"]
    h5["layers/conv2d/vars"].create_dataset(
        "0", (1, 1, 2, 3), "f4", external=[("/etc/passwd", 0, 24)]
    )


def bomb(h5: Any) -> None:
    del h5["layers/conv2d/vars/0"]
    h5["layers/conv2d/vars"].create_dataset(
        "0", (10**6, 10**4), "f4", chunks=(1000, 1000), compression="gzip"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: replace_kernel(h, np.zeros((1, 1, 3, 3))), r"its kernel is \(1, 1, 3, 3\), but"),
        (lambda h: replace_kernel(h, np.array([b"x"])), "holds no numbers"),
        (elsewhere, "lies in another file or place"),
        (cycle, "in two places"),
        (not_a_number, "it is no file of Keras's"),
        (lambda h: replace_kernel(h, np.zeros(())), r"its kernel is \(\)"),
        (stored_elsewhere, "lie in another file"),
        (bomb, "larger than the file"),
        (lambda h: h.__delitem__("layers/conv2d/vars/1"), "its bias is missing"),
        (lambda h: h.__setitem__("layers/conv2d/vars/2", np.zeros(3)), "1 arrays more than"),
        (lambda h: h.__delitem__("layers"), "its kernel is missing"),
        (lambda h: h["layers/batch_normalization/vars/3"].__setitem__(0, -1.0), "values below 0"),
    ],
)
def test_bad_weights(tmp_path, parts, change, message):
    config, weights = parts
    path = packed(tmp_path / "bad.keras", config, spoiled(weights, change))
    with pytest.raises(FormatError, match=message):
        own.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "{", "its config is no JSON"),
        (lambda c: "[" * 100_000, "its config is no JSON"),
        (lambda c: [1], "its config describes no model"),
        (lambda c: {**c, "class_name": "Mine"}, "a Mine is a class of somebody's own"),
        (lambda c: {"class_name": "Functional", "config": {"layers": [1]}}, "it is no file of"),
        (lambda c: {**c, "config": {**c["config"], "input_layers": 3}}, "cannot be understood"),
        (lambda c: {"class_name": "Functional", "config": {"layers": []}}, "has no list of layers"),
    ],
)
def test_bad_configs(tmp_path, parts, change, message):
    config, weights = parts
    with pytest.raises(FormatError, match=message):
        own.load(packed(tmp_path / "bad.keras", change(config), weights))


def test_files_of_keras_before_3_6(tmp_path):
    """They do not say which layer arrays are of: classes are numbered in the config's order."""

    def build(x):
        side = L.Conv2D(4, 1, name="b")(x)
        inner = keras.Sequential([keras.Input((4, 4, 4)), L.Conv2D(4, 1, name="a")], name="in")
        return L.Add()([side, inner(L.ReLU()(L.Conv2D(4, 1, name="c")(x)))])

    model = model_of(build, 4, 4, 2)
    compare(tmp_path, model, ends=("keras",))
    x = torch.rand(2, 2, 4, 4)
    wanted = own.load(tmp_path / "model.keras")(x)
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        config, weights = archive.read("config.json"), archive.read("model.weights.h5")

    def forget(h5: Any) -> None:
        h5.visititems(lambda _, group: group.attrs.pop("name", None) and None)

    path = packed(tmp_path / "old.keras", config.decode(), spoiled(weights, forget))
    torch.testing.assert_close(own.load(path)(x), wanted)


@pytest.mark.parametrize("noise", [(None, 1, 1, 1), (None, 1, 1, 4), (None, 6, 1, None)])
def test_dropout_that_is_shared(tmp_path, noise):
    model = model_of(lambda x: L.Dropout(0.4, noise_shape=noise)(x), 6, 5, 4)
    network = compare(tmp_path, model).train()
    y = network(torch.ones(500, 4, 6, 5)).permute(0, 2, 3, 1)
    assert sorted(set(y.flatten().tolist())) == pytest.approx([0, 1 / 0.6])
    assert float((y == 0).float().mean()) == pytest.approx(0.4, abs=0.1)
    for axis, size in enumerate(noise):
        assert bool((y == y.narrow(axis, 0, 1)).all()) == (size == 1)


def test_hard_sigmoid_of_keras_2(tmp_path):
    model_of(lambda x: L.Activation("hard_sigmoid")(x), 2, 2, 1).save(tmp_path / "m.h5")
    for version, wanted in (("3.15.0", 2 / 3), ("2.15.0", 0.7)):
        with h5py.File(tmp_path / "m.h5", "r+") as file:
            file.attrs["keras_version"] = version
        y = own.load(tmp_path / "m.h5")(torch.ones(1, 1, 2, 2))
        torch.testing.assert_close(y, torch.full((1, 1, 2, 2), wanted))


def test_models_in_h5_files_and_long_lists(tmp_path):
    def build(x):
        return keras.Sequential([keras.Input((4, 4, 2)), L.Conv2D(4, 1)], name="inner")(x)

    model_of(build, 4, 4, 2).save(tmp_path / "m.h5")
    with pytest.raises(FormatError, match=r"'inner' is among the layers of an \.h5 file"):
        own.load(tmp_path / "m.h5")
    wanted = old_keras_file(tmp_path / "old.h5")
    with h5py.File(tmp_path / "old.h5", "r+") as file:
        names = file["model_weights"].attrs.pop("layer_names")
        file["model_weights"].attrs["layer_names0"] = names[:2]
        file["model_weights"].attrs["layer_names1"] = names[2:]
    x = torch.from_numpy(np.load(tmp_path / "old.npy")).permute(0, 3, 1, 2)
    found = own.load(tmp_path / "old.h5")(x).detach().permute(0, 2, 3, 1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_nothing_is_made_before_its_arrays_are_seen(tmp_path):
    layers = [
        {"class_name": "InputLayer", "config": {"name": "i", "batch_shape": [None, 10**12]}},
        {"class_name": "BatchNormalization", "config": {"name": "b", "scale": False}},
    ]
    config = {"class_name": "Sequential", "config": {"layers": layers}}
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.create_group("layers")
    path = packed(tmp_path / "m.keras", config, (tmp_path / "w.h5").read_bytes())
    with pytest.raises(FormatError, match="its beta is missing among the weights"):
        own.load(path)


def test_bad_settings(tmp_path, parts):
    config, weights = parts
    layers = config["config"]["layers"]
    for at, key, value, message in [
        (1, "filters", 10**12, "its kernel is"),
        (1, "filters", "x", "cannot be understood"),
        (1, "padding", "causal", "padding='causal' is not supported"),
        (1, "strides", [0, 1], r"strides=\[0, 1\] is no size"),
        (1, "kernel_size", [9, 9], "its kernel is"),
        (1, "groups", 5, "groups=5 do not divide"),
        (1, "data_format", "channels_first", "its kernel is"),
        (2, "axis", 0, "."),
        (2, "axis", 7, "axis 7 of 4"),
        (2, "renorm", True, "batch renormalization is not supported"),
        (2, "momentum", 3, "decay must be between 0 and 1"),
        (1, "groups", 0, "cannot be understood"),
        (1, "filters", float("inf"), "cannot be understood"),
    ]:
        before = layers[at]["config"].get(key)
        layers[at]["config"][key] = value
        with pytest.raises((FormatError, ConfigError), match=message):
            own.load(packed(tmp_path / "bad.keras", config, weights))
        layers[at]["config"][key] = before
    layers[2]["inbound_nodes"][0]["args"][0]["config"]["keras_history"][0] = "nobody"
    with pytest.raises(FormatError, match="'bn' waits for what nothing gives"):
        own.load(packed(tmp_path / "bad.keras", config, weights))


def test_bad_places(tmp_path, monkeypatch):
    with pytest.raises(FormatError, match=r"there is no such file; give a \.keras or \.h5 file"):
        own.load(tmp_path / "none.keras")
    with pytest.raises(FormatError, match="it is a folder"):
        own.load(tmp_path)
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(FormatError, match="it is no file of Keras's"):
        own.load(tmp_path / "text.h5")
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("readme", "x")
    with pytest.raises(FormatError, match=r"holds config\.json and .*, this one readme"):
        own.load(tmp_path / "other.keras")
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        file["x"] = [1.0]
    with pytest.raises(FormatError, match="it holds weights alone; save the whole model"):
        own.load(tmp_path / "weights.h5")
    monkeypatch.setattr(container, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'evenkeel\[keras\]'"):
        own.load(tmp_path / "weights.h5")


def test_large_entries_are_not_unpacked(tmp_path, parts):
    config, weights = parts
    path = packed(tmp_path / "bomb.keras", config, weights + b"\0" * 10**7)
    with pytest.raises(FormatError, match="which cannot be right"):
        own.load(path)
