"""Writing a network for Darknet: its own, or one of torch's."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ...errors import ConfigError, SurgeryError
from ...files import whole
from . import cfg as grammar
from .files import load, runs_of
from .network import Network, convention_named
from .tracing import as_network, in_inference
from .weights import numbers_of

__all__ = ["Saved", "save"]

_BUDGET: Final = 1e-5
"""Of the largest output: the difference that rounding may make."""


@dataclass(frozen=True)
class Saved:
    """What was written, and how it compares with the network.

    Attributes:
        cfg, weights, bytes: the files, and the size of the weights.
        layers: how many sections there are behind [net].
        convention: the build of Darknet that they are for.
        difference, scale: the largest difference of an output to the network's on the example, and
            the largest output; None without an example.
        budget: the relative difference that was allowed.
    """

    cfg: str
    weights: str
    bytes: int
    layers: int
    convention: str
    difference: float | None
    scale: float | None
    budget: float = _BUDGET

    def __str__(self) -> str:
        text = f"{self.cfg} and {self.weights}: {self.layers} layers, {self.bytes:,} bytes"
        if self.difference is None or self.scale is None:
            return f"{text}, for {self.convention}"
        return (
            f"{text}, for {self.convention}\nRead again: largest output difference "
            f"{self.difference:.1e} of {self.scale:.3g} (budget {self.budget:.0e} relative)"
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"format": ".cfg", **asdict(self)}


def save(
    network: nn.Module,
    cfg: str | os.PathLike[str],
    weights: str | os.PathLike[str],
    example: Tensor | None = None,
    *,
    convention: str | None = None,
) -> Saved:
    """Writes a network as Darknet's .cfg and .weights, proved on an example.

    What `load` gave is written as it was read: weights that have not changed come back to the bit,
    but for the variances of ``darknet-cpu``, which are rounded once on the way. Any other network
    of torch's is traced and becomes sections. There a bias in front of a norm goes into its mean,
    and a norm that stands alone goes behind a convolution of one weight of 1 a channel. The files
    are read again and must give the network's output: ``max|y' - y| <= 1e-5 max|y|``.

    Args:
        network: in inference mode or not; it is not changed.
        cfg, weights: the files; old ones are replaced once both are written.
        example: a batch of images, (n, c, h, w); needed for all but Darknet's own networks.
        convention: the build of Darknet that will run it, as for `load`; by default the
            network's own, or ``darknet-gpu``, whose formula is that of all but ``darknet-cpu``.

    Raises:
        SurgeryError: what the network does has no layer in Darknet, or the files would compute
            something else; nothing is written.
        ConfigError: no example, an unknown convention, or a file that cannot be written.
    """
    cfg, weights = Path(cfg), Path(weights)
    if cfg == weights:
        raise ConfigError(f"{cfg}: .cfg and .weights are two files; give each its own name")
    own = network.convention if isinstance(network, Network) else "darknet-gpu"
    chosen = convention_named(convention or own).name
    if isinstance(network, Network):
        made = network
    elif example is None:
        raise ConfigError("give an example, a batch of images: the network's sizes follow from it")
    else:
        made = as_network(network, example, chosen)
    difference: tuple[float, float] | tuple[None, None] = (None, None)
    with whole(cfg, ConfigError) as first, whole(weights, ConfigError) as second:
        _write(made, first, second, chosen)
        size = second.stat().st_size
        again = load(first, second, convention=chosen)
        if example is not None:
            difference = _compared(network, again, example)
    return Saved(str(cfg), str(weights), size, len(made.layers), chosen, *difference)


def _write(network: Network, cfg: Path, weights: Path, name: str) -> None:
    convention = convention_named(name)
    biases = name.startswith("alexeyab")
    for run in runs_of(network, network.header, True):
        alone = network.sections[run.layer + 1].name == "batchnorm" and run.name == "biases"
        if alone and not biases and bool(run.tensor.any()):
            raise ConfigError(
                f"layer {run.layer}, [batchnorm], has a beta, which pjreddie's Darknet does not "
                "store; choose the convention alexeyab-gpu, or fold the norm"
            )
    cfg.write_text(grammar.text_of(network.sections), encoding="utf-8")
    with weights.open("wb") as file:
        file.write(network.header.to_bytes())
        for run in runs_of(network, network.header, biases):
            numbers_of(run, convention).astype("<f4", copy=False).tofile(file)


def _compared(network: nn.Module, again: nn.Module, example: Tensor) -> tuple[float, float]:
    """The largest difference of an output, and the largest output.

    Raises:
        SurgeryError: they are not the same network.
    """
    with in_inference(network), torch.no_grad():
        y, z = _flat(network(example)), _flat(again(example.detach().cpu().float()))
    if y.shape != z.shape:
        raise SurgeryError(f"Darknet's network gives {z.shape[1]} values, not {y.shape[1]}")
    difference, scale = float((y - z).abs().max()), float(y.abs().max())
    if not difference <= _BUDGET * scale:
        raise SurgeryError(
            f"Darknet's network would differ by {difference:.2e} where {_BUDGET * scale:.2e} is "
            "allowed; nothing was written"
        )
    return difference, scale


def _flat(output: Any) -> Tensor:
    parts = output if isinstance(output, tuple) else (output,)
    return torch.cat([part.detach().cpu().double().flatten(1) for part in parts], 1)
