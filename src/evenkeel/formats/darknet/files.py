"""Reading a network from Darknet's files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np
import torch

from ...errors import FormatError
from . import cfg as grammar
from .network import Network, convention_named
from .weights import Header, Numbers, Run, read_header, runs, set_numbers

__all__ = ["load", "runs_of"]

_MOST: Final = 2**31
"""Weights of a network: the largest of Darknet's have a tenth of it."""


def load(
    cfg: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    *,
    convention: str = "darknet-gpu",
    partial: bool = False,
) -> Network:
    """A network from Darknet's files, with torch's own layers in it.

    The files do not say which build of Darknet they are of, and builds differ in the norms: all put
    epsilon 1e-5 inside the root, but pjreddie's on a CPU, ``darknet-cpu``, computes
    ``(x - mean) / (sqrt(var) + 1e-6)``. That one's variances become ``(sqrt(var) + 1e-6)^2 - eps``,
    which is the same function; the others' stay as stored, to the bit. More training takes the
    weight of the new value from the convention (0.01; 0.1 of ``alexeyab-cpu``), and torch's biased
    variance to normalize with, where some builds divide by m - 1.

    Args:
        cfg: the .cfg file.
        weights: the .weights file; without it the weights are Darknet's initial ones.
        convention: ``darknet-cpu``, ``darknet-gpu``, ``darknet-cudnn``, ``alexeyab-cpu``,
            ``alexeyab-gpu`` or ``alexeyab-cudnn``.
        partial: the file may end between two layers, as darknet53.conv.74 does; the others
            keep their initial weights.

    Returns:
        In inference mode if there are weights, else in training mode.

    Raises:
        FormatError: a file that is not what it should be, or does not fit the other.
        ConfigError: an unknown convention.
    """
    cfg = Path(cfg)
    chosen = convention_named(convention)
    sections = grammar.read(cfg)
    with torch.device("meta"):  # so that the sizes are known before there is any memory for them
        planned = Network(sections, convention)
    wanted = sum(parameter.numel() for parameter in planned.parameters())
    if wanted > _MOST:
        raise FormatError(f"{cfg}: it asks for {wanted:,} weights, more than {_MOST:,}")
    if weights is None:
        return Network(sections, convention)
    weights = Path(weights)
    try:
        if not weights.is_file():
            what = "it is a folder" if weights.is_dir() else "there is no such file"
            raise FormatError(f"{weights}: {what}")
        with weights.open("rb") as file:
            header = read_header(file.read(20), str(weights))
        count, odd = divmod(weights.stat().st_size - header.size, 4)
    except OSError as error:
        raise FormatError(f"{weights}: it cannot be read ({error.strerror or error})") from error
    if odd:
        raise FormatError(f"{weights}: it ends within a number, {odd} bytes too many or missing")
    biases = _has_biases(planned, header, count)
    _check_count(runs_of(planned, header, biases), count, partial, str(weights), str(cfg))
    numbers: Numbers = np.fromfile(weights, "<f4", offset=header.size)
    with torch.random.fork_rng(devices=[]):
        network = Network(sections, convention)
    at = 0
    for run in runs_of(network, header, biases):
        if at == len(numbers):
            break
        set_numbers(run, numbers[at : at + run.tensor.numel()], chosen, str(weights))
        at += run.tensor.numel()
    network.header = header
    return network.eval()


def runs_of(network: Network, header: Header, biases: bool) -> list[Run]:
    """All numbers of a network, in the order of a file with this header."""
    return list(runs(network, biases=biases, transposed=header.transposed))


def _has_biases(network: Network, header: Header, count: int) -> bool:
    """Whether [batchnorm] layers have a beta in a file: whichever fits, else what wrote it says."""
    sizes = [sum(run.tensor.numel() for run in runs_of(network, header, b)) for b in (False, True)]
    return count == sizes[1] if count in sizes else header.revision >= 5


def _check_count(found: list[Run], count: int, partial: bool, weights: str, cfg: str) -> None:
    """A file of the right size, or one that ends between two layers if that is allowed.

    Raises:
        FormatError: it is neither.
    """
    ends: dict[int, int] = {}
    total = 0
    for run in found:
        total += run.tensor.numel()
        ends[run.layer] = total
    layers = [layer for layer, end in ends.items() if end == count]
    if count == total or (partial and layers):
        return
    text = f"{weights}: it holds {count:,} numbers, but {cfg} asks for {total:,}"
    if layers:
        raise FormatError(
            f"{text}; it ends with layer {layers[0]}: with partial=True the others keep their "
            "initial weights"
        )
    what = "is it whole, and of this .cfg?" if count < total else "is it of another .cfg?"
    raise FormatError(f"{text}; {what}")
