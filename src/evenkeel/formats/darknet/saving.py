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
from .cfg import Section
from .files import load, runs_of
from .network import Network, convention_named
from .places import ALEXEYABS
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
        difference, scale: the largest difference of an output to the network's, and the largest
            output.
        budget: the relative difference that was allowed.
    """

    cfg: str
    weights: str
    bytes: int
    layers: int
    convention: str
    difference: float
    scale: float
    budget: float = _BUDGET

    def __str__(self) -> str:
        text = f"{self.cfg} and {self.weights}: {self.layers} layers, {self.bytes:,} bytes"
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
    like: Network | None = None,
) -> Saved:
    """Writes a network as Darknet's .cfg and .weights, proved on an example.

    What `load` gave is written as it was read: weights that have not changed come back to the bit,
    but for the variances of ``darknet-cpu``, which are rounded once on the way. Any other network
    of torch's is traced and becomes sections. There a bias in front of a norm goes into its mean,
    and a norm that stands alone goes behind a convolution of one weight of 1 a channel. The files
    are read again and must give the network's output, on the example and on a random one:
    ``max|y' - y| <= 1e-5 max|y|``.

    Args:
        network: in inference mode or not; it is not changed.
        cfg, weights: the files; old ones are replaced once both are written.
        example: a batch of images, (n, c, h, w); needed for all but Darknet's own networks.
        convention: the build of Darknet that will run it, as for `load`; by default the
            network's own, or ``darknet-gpu``, whose formula is that of all but ``darknet-cpu``.
        like: what `load` gave, where the network is that with its norms folded: its sections and
            all their options stay, without the norms.

    Raises:
        SurgeryError: what the network does has no layer in Darknet, or the files would compute
            something else; nothing is written.
        ConfigError: no example, an unknown convention, or a file that cannot be written.
    """
    cfg, weights = Path(cfg), Path(weights)
    if cfg == weights:
        raise ConfigError(f"{cfg}: .cfg and .weights are two files; give each its own name")
    source = network if isinstance(network, Network) else like
    chosen = convention_named(convention or (source.convention if source else "darknet-gpu")).name
    if example is None and source is None:
        raise ConfigError("give an example, a batch of images: the network's sizes follow from it")
    if example is None and source is not None:
        example = torch.rand(1, *source.image)
    assert example is not None  # noqa: S101 - it was given, or made
    _check(network, example)
    if isinstance(network, Network):
        made = network
    else:
        kept = None if like is None else _without_norms(like, network, chosen)
        made = kept or as_network(network, example, chosen)
    with torch.device("meta"):  # what this build does not take is told of the user's own file
        Network(made.sections, chosen)
    with whole(cfg, ConfigError) as first, whole(weights, ConfigError) as second:
        _write(made, first, second, chosen)
        size = second.stat().st_size
        again = load(first, second, convention=chosen)
        generator = torch.Generator().manual_seed(0)
        other = torch.rand(example.shape, generator=generator).to(example)
        found = max(_compared(network, again, x) for x in (example, other))
    return Saved(str(cfg), str(weights), size, len(made.layers), chosen, *found)


def _check(network: nn.Module, example: Tensor) -> None:
    if not len(example):
        raise ConfigError("the example has no image; give a batch with one or more")
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        if value.dtype in (torch.float16, torch.bfloat16):
            raise SurgeryError(
                f"{name} is in {str(value.dtype).removeprefix('torch.')}, and Darknet computes in "
                "float32; give network.float()"
            )
        if name.endswith("running_var") and not bool((value >= 0).all()):
            raise SurgeryError(f"{name} has values below 0, or that are no numbers")


def _without_norms(like: Network, model: nn.Module, convention: str) -> Network | None:
    """A Darknet network with the numbers of its folded copy, if only norms are gone; else None."""
    names = dict(model.named_modules())
    sections = [like.sections[0]]
    for index, section in enumerate(like.sections[1:]):
        options = dict(section.options)
        if section.name != "batchnorm" and f"layers.{index}.norm" not in names:
            for key in ("batch_normalize", "cbn"):
                options.pop(key, None)
        sections.append(Section(section.name, options, section.where))
    with torch.random.fork_rng(devices=[]):
        made = Network(sections, convention)
    try:
        made.load_state_dict(model.state_dict())
    except RuntimeError:  # what was folded went elsewhere
        return None
    for name, module in made.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eps = getattr(names.get(name), "eps", module.eps)
    made.header = like.header
    return made.eval()


def _write(network: Network, cfg: Path, weights: Path, name: str) -> None:
    convention = convention_named(name)
    biases = name.startswith("alexeyab")
    for index, section in enumerate(network.sections[1:]):
        if section.options.get("activation") in ALEXEYABS and not biases:
            raise ConfigError(
                f"layer {index}, [{section.name}], has {section.options['activation']}, which only "
                "AlexeyAB's Darknet knows; choose the convention alexeyab-gpu"
            )
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
        given = example.detach().clone()  # a network may write over what it is given
        y, z = _flat(network(given)), _flat(again(example.detach().cpu().float()))
    if y.shape != z.shape:
        raise SurgeryError(f"Darknet's network gives {z.shape[1]} values, not {y.shape[1]}")
    difference, scale = float((y - z).abs().max()), float(y.abs().max())
    if not scale:
        raise SurgeryError("the network gives nothing but zeros, by which nothing is proved")
    if not difference <= _BUDGET * scale:
        raise SurgeryError(
            f"Darknet's network would differ by {difference:.2e} where {_BUDGET * scale:.2e} is "
            "allowed; nothing was written"
        )
    return difference, scale


def _flat(output: Any) -> Tensor:
    parts = output if isinstance(output, tuple) else (output,)
    return torch.cat([part.detach().cpu().double().flatten(1) for part in parts], 1)
