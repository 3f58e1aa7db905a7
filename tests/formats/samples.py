"""Texts of .cfg files that have every layer, and .weights files for them."""

from __future__ import annotations

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
