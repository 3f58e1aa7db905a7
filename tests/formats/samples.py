"""Texts of .cfg files that have every layer, and .weights files for them."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from evenkeel.formats.darknet import Network, cfg, load

NET = "[net]\nchannels={}\nheight={}\nwidth={}\n"


def text(image: Sequence[int], *sections: str) -> str:
    """A .cfg: 'name key=value key=value' for each section behind [net]."""
    lines = [NET.format(*image)]
    for section in sections:
        name, *options = section.split()
        lines += [f"[{name}]", *options, ""]
    return "\n".join(lines)


def weights_for(
    source: str, *, revision: int = 0, seed: int = 0, transposed: bool = False
) -> bytes:
    """Random numbers for a .cfg, as many as it asks for; variances are positive."""
    network = Network(cfg.parse(source))
    from evenkeel.formats.darknet.weights import runs

    rng = np.random.default_rng(seed)
    header = struct.pack("<iiiQ", 0, 2, revision, 64000)
    if transposed:
        header = struct.pack("<iiii", 1001, 0, 0, 64000)
    parts = [header]
    for run in runs(network, biases=revision >= 5, transposed=transposed):
        values = rng.standard_normal(run.tensor.numel()) * 0.5
        if run.name == "rolling_variance":
            values = rng.uniform(0.05, 2, run.tensor.numel())
        parts.append(values.astype("<f4").tobytes())
    return b"".join(parts)


def written(folder: Path, source: str, data: bytes) -> tuple[Path, Path]:
    """Both files."""
    paths = folder / "net.cfg", folder / "net.weights"
    paths[0].write_text(source)
    paths[1].write_bytes(data)
    return paths


def loaded(folder: Path, source: str, data: bytes, **options: object) -> Network:
    """The network of a text and bytes."""
    return load(*written(folder, source, data), **options)  # type: ignore[arg-type]


def image(*shape: int, seed: int = 1) -> torch.Tensor:
    """A batch of two random images."""
    return torch.rand((2, *shape), generator=torch.Generator().manual_seed(seed))


VECTORS = ("gamma", "beta", "moving_mean", "moving_variance")


def old_keras_file(path: Path) -> np.ndarray:
    """An .h5 as Keras 2 wrote them: lists of nodes, an axis in a list, names that end in ':0'.

    Beside it an .npy with two images; what the model makes of them is returned.
    """
    import h5py

    layers = [
        ("InputLayer", {"name": "in", "batch_input_shape": [None, 4, 4, 2]}, []),
        ("Conv2D", {"name": "conv", "filters": 3, "kernel_size": [1, 1], "strides": [1, 1],
                    "padding": "valid", "data_format": "channels_last", "dilation_rate": [1, 1],
                    "activation": "linear", "use_bias": False}, [[["in", 0, 0, {}]]]),
        ("BatchNormalization", {"name": "bn", "axis": [3], "momentum": 0.99, "epsilon": 0.001,
                                "center": True, "scale": True}, [[["conv", 0, 0, {}]]]),
        ("LeakyReLU", {"name": "act", "alpha": 0.1}, [[["bn", 0, 0, {}]]]),
        ("Add", {"name": "sum"}, [[["act", 0, 0, {}], ["act", 0, 0, {}]]]),
    ]  # fmt: skip
    config = {
        "name": "model", "input_layers": [["in", 0, 0]], "output_layers": [["sum", 0, 0]],
        "layers": [
            {"class_name": kind, "name": own["name"], "config": own, "inbound_nodes": nodes}
            for kind, own, nodes in layers
        ],
    }  # fmt: skip
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(1, 1, 2, 3)).astype("f4")
    vectors = rng.uniform(0.5, 1, (4, 3)).astype("f4")
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Model", "config": config})
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [b"in", b"conv", b"bn", b"act", b"sum"]
        names = {"conv": ["conv/kernel:0"], "in": [], "act": [], "sum": [],
                 "bn": [f"bn/{n}:0" for n in VECTORS]}  # fmt: skip
        for layer, held in names.items():
            inner = group.create_group(layer)
            inner.attrs["weight_names"] = [name.encode() for name in held]
            for name, values in zip(held, [kernel] if layer == "conv" else vectors, strict=False):
                inner[name] = values
    x = rng.uniform(-1, 1, (2, 4, 4, 2)).astype("f4")
    z = x @ kernel[0, 0]
    gamma, beta, mean, var = vectors
    y = (z - mean) / np.sqrt(var + 0.001) * gamma + beta
    np.save(path.with_suffix(".npy"), x)
    return 2 * np.where(y > 0, y, 0.1 * y)
