"""Darknet's .weights: a header and float32 numbers without names, in the order of the layers.

Source: src/parser.c of pjreddie/darknet and AlexeyAB/darknet, load_weights_upto and
save_weights_upto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...conventions import Convention, inside_epsilon
from ...errors import FormatError

if TYPE_CHECKING:
    from .network import Network

__all__ = [
    "Header",
    "Run",
    "numbers_of",
    "read_header",
    "runs",
    "scale_and_variance",
    "set_numbers",
]

Numbers = NDArray[np.float32]
Norm = nn.BatchNorm1d | nn.BatchNorm2d


@dataclass(frozen=True)
class Header:
    """The first bytes of the file.

    Attributes:
        major, minor, revision: 0.2.0 is pjreddie's, 0.2.5 AlexeyAB's.
        seen: images that training has seen.
    """

    major: int = 0
    minor: int = 2
    revision: int = 0
    seen: int = 0

    @property
    def _layout(self) -> str:
        wide = self.major * 10 + self.minor >= 2 and not self.transposed
        return "<iiiQ" if wide else "<iiii"

    @property
    def transposed(self) -> bool:
        """Dense weights are stored as (inputs, outputs); so old programs did."""
        return self.major > 1000 or self.minor > 1000

    @property
    def size(self) -> int:
        """In bytes."""
        return struct.calcsize(self._layout)

    def to_bytes(self) -> bytes:
        """As it stands in the file."""
        return struct.pack(self._layout, self.major, self.minor, self.revision, self.seen)


def read_header(data: bytes, name: str) -> Header:
    """The header that a file begins with.

    Args:
        data: the first 20 bytes, or all that there are.
        name: of the file, for messages.

    Raises:
        FormatError: it is too short.
    """
    if len(data) >= 16:
        header = Header(*struct.unpack_from("<iii", data))
        if len(data) >= header.size:
            return Header(*struct.unpack_from(header._layout, data))
    raise FormatError(f"{name}: {len(data)} bytes are no .weights file, whose header alone is 16")


@dataclass(frozen=True, eq=False)
class Run:
    """Numbers that lie together in the file, and the tensor that has them here.

    Attributes:
        layer: number of the layer.
        tensor: a parameter or a buffer.
        name: Darknet's.
        turned: the file has the transpose of the tensor as a matrix of outputs and inputs.
        norm: the norm that the tensor belongs to, if to one.
    """

    layer: int
    tensor: Tensor
    name: str
    turned: bool = False
    norm: Norm | None = None


def runs(network: Network, *, biases: bool, transposed: bool) -> Iterator[Run]:
    """All numbers of a network in the file's order.

    Args:
        network: whose tensors they are.
        biases: [batchnorm] layers have beta in the file, as AlexeyAB's program writes it.
        transposed: dense weights are stored as (inputs, outputs).
    """
    for index, (section, module) in enumerate(
        zip(network.sections[1:], network.layers, strict=True)
    ):
        parts: Mapping[str, Any] = dict(module.named_children())
        norm: Norm | None = parts.get("norm")
        if isinstance(module, Norm):
            yield from (run for run in _vectors(index, module) if biases or run.name != "biases")
        elif section.name == "convolutional":
            yield from _vectors(index, norm) if norm else _bias(index, parts["conv"])
            turned = bool(section.integer("flipped", 0))
            yield Run(index, parts["conv"].weight, "weights", turned)
        elif section.name == "connected":
            first, *others = _vectors(index, norm) if norm else _bias(index, parts["linear"])
            yield first
            yield Run(index, parts["linear"].weight, "weights", transposed)
            yield from others


def _bias(index: int, layer: Any) -> list[Run]:
    return [Run(index, layer.bias, "biases")]


def _vectors(index: int, norm: Norm) -> list[Run]:
    return [
        Run(index, norm.get_parameter("bias"), "biases", norm=norm),
        Run(index, norm.get_parameter("weight"), "scales", norm=norm),
        Run(index, norm.get_buffer("running_mean"), "rolling_mean", norm=norm),
        Run(index, norm.get_buffer("running_var"), "rolling_variance", norm=norm),
    ]


@torch.no_grad()
def set_numbers(run: Run, numbers: Numbers, convention: Convention, where: str) -> None:
    """Gives a tensor its numbers, and a variance that fits the epsilon inside the root.

    Raises:
        FormatError: a variance below 0, or one that is no number.
    """
    found = torch.from_numpy(numbers.astype(np.float32, copy=True))
    if run.name == "rolling_variance":
        if not bool((found >= 0).all()):
            raise FormatError(
                f"{where}: layer {run.layer} has variances below 0; is it of another .cfg?"
            )
        if run.norm is not None and convention.eps_place == "outside":
            wide, eps = inside_epsilon(found.double(), convention.eps or 0.0, 1e-5)
            run.norm.eps, found = eps, wide.float()
    if run.turned:
        found = found.reshape(-1, len(run.tensor)).T
    run.tensor.copy_(found.reshape(run.tensor.shape))


@torch.no_grad()
def numbers_of(run: Run, convention: Convention) -> Numbers:
    """The numbers of a tensor as the file has them."""
    values = run.tensor.detach().cpu()
    if run.norm is not None and run.name in ("scales", "rolling_variance"):
        scale, variance = scale_and_variance(run.norm, convention)
        values = scale if run.name == "scales" else variance
    if run.turned:
        values = values.flatten(1).T
    found: Numbers = values.float().contiguous().numpy().ravel()
    return found


def scale_and_variance(norm: Norm, convention: Convention) -> tuple[Tensor, Tensor]:
    """gamma and the variance with which Darknet computes what the norm does.

    With the convention's epsilon e that is ``var + eps - e`` for an epsilon inside the root, and
    ``(sqrt(var + eps) - e)^2`` for one outside. A channel whose variance would fall below 0 gets 0,
    and a gamma that makes up for it. In float64, float32 where nothing has to change.
    """
    gamma, var = norm.get_parameter("weight").detach().cpu(), norm.get_buffer("running_var").cpu()
    eps, theirs = norm.eps, convention.eps or 0.0
    if convention.eps_place == "inside" and eps == theirs:
        return gamma, var
    square = var.double() + eps
    if convention.eps_place == "inside":
        wanted, least = square - theirs, theirs**0.5
    else:
        wanted, least = (square.sqrt() - theirs).clamp(min=0) ** 2, theirs
    small = square.sqrt() < least
    scaled = torch.where(small, gamma.double() * least / square.sqrt(), gamma.double())
    return scaled, wanted.clamp(min=0)
