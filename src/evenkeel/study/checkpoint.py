"""A trained network in one safetensors file: its tensors, and in the config all that rebuilds it.

There is no code in the file and no pickle. A network of the user's own is kept by its name, and is
imported only for somebody who gives that name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, fx, nn

from .. import __version__
from ..errors import ConfigError, FormatError, first_line
from ..surgery.graph import NORMS
from . import container
from .arms import Arm, Data
from .data import Dataset
from .inputs import Inputs
from .models import build, source_fingerprint
from .train import Feeder, network_for
from .training import Training

__all__ = ["Card", "Epoch", "card_of", "load", "rebuild", "restore", "save", "tensors_of"]

_MOST_VALUES: Final = 2**22
"""Of one image: 2048 x 2048 gray pixels. A file that says more would fill the memory."""


class Epoch(NamedTuple):
    """What one pass over the training images ended with.

    Attributes:
        train_loss: mean cross-entropy of the pass's batches, each before its step.
        loss, accuracy: on all test images behind the pass.
    """

    train_loss: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Card:
    """What a file says about the network in it.

    Attributes:
        training: how the network was built and trained.
        shape: (c, h, w) of an image.
        classes: the name of each output.
        shift, scale: of each channel: the network sees ``(value - shift) * scale`` of values in
            [0, 1]; None for the values themselves.
        data: fingerprint of the data set.
        source: fingerprint of the file with the user's own network; empty for a built-in one.
        history: what each epoch ended with.
        version: of evenkeel.
    """

    training: Training
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    shift: tuple[float, ...] | None
    scale: tuple[float, ...] | None
    data: str
    source: str = ""
    history: tuple[Epoch, ...] = ()
    version: str = __version__

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or any(type(size) is not int or size < 1 for size in self.shape):
            raise ConfigError(f"an image has the shape (c, h, w), not {self.shape}")
        if math.prod(self.shape) > _MOST_VALUES:
            raise ConfigError(
                f"images of shape {self.shape} have more than {_MOST_VALUES:,} values; make them "
                "smaller"
            )
        if not self.classes or not all(isinstance(name, str) for name in self.classes):
            raise ConfigError("there must be classes, each with a name")
        if len(set(self.classes)) < len(self.classes):
            raise ConfigError("two classes have the same name")
        for key in ("data", "source", "version"):
            if not isinstance(getattr(self, key), str):
                raise ConfigError(f"{key} must be text but is {getattr(self, key)!r}")
        for key in ("shift", "scale"):
            values = getattr(self, key)
            if (values is None) != (self.shift is None):
                raise ConfigError("there must be shift and scale, or neither")
            if values is not None and (len(values) != self.shape[0] or not _are_numbers(values)):
                raise ConfigError(f"{key} must have a number for each of {self.shape[0]} channels")
        if not all(_are_numbers(epoch) for epoch in self.history):
            raise ConfigError("an epoch must have three numbers")

    @property
    def inputs(self) -> Inputs:
        """What turns the bytes of images into the network's numbers."""
        return Inputs.of_numbers(self.training.data.binary, self.shift, self.scale)

    def to_dict(self) -> dict[str, Any]:
        """The card as plain values, read back by `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Card:
        """The card that `to_dict` gave.

        Raises:
            ConfigError, TypeError, ValueError, KeyError: it is not one.
        """
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            odd = ", ".join(sorted(names.symmetric_difference(values))[:4])
            raise ConfigError(f"keys are missing or unknown: {odd}")
        own = dict(values)
        training = dict(own.pop("training"))
        arm, data = Arm(**training.pop("arm")), Data(**training.pop("data"))
        history = tuple(Epoch(*epoch) for epoch in own.pop("history"))
        for key in ("shape", "classes", "shift", "scale"):
            own[key] = None if own[key] is None else tuple(own[key])
        return cls(training=Training(arm, data, **training), history=history, **own)


def card_of(training: Training, dataset: Dataset, feeder: Feeder) -> Card:
    """The card of a network that is about to be trained."""
    model = training.arm.model
    shift, scale = feeder.inputs.numbers or (None, None)
    return Card(
        training,
        dataset.shape,
        dataset.classes,
        shift,
        scale,
        dataset.fingerprint,
        source_fingerprint(model) if ":" in model else "",
    )


def save(path: Path, network: nn.Module, card: Card) -> None:
    """Writes the network and its card whole or not at all.

    Raises:
        ConfigError: the network keeps something that is not a tensor.
        StudyError: the file cannot be written; the old one is still there.
    """
    container.write(path, "model", card.to_dict(), tensors_of(network))


def load(
    path: Path, device: torch.device, *, model: str | None = None
) -> tuple[fx.GraphModule, Card]:
    """The network, in inference mode on the device, and its card.

    Args:
        path: a file that `save` wrote.
        device: where the network goes.
        model: ``package.module:factory`` if the network is the user's own. The file names that
            code but it is imported only if the same name is given here.

    Raises:
        FormatError: the file is not what it should be; which file, and why. Nothing is loaded.
        ConfigError: the network is the user's own, and not the one that was named.
    """
    config, tensors = container.read(path, "model")
    card = card_from(path, config)
    network = rebuild(path, card, tensors, model)
    restore(path, network, tensors)
    return network.eval().to(device), card


def card_from(path: Path, config: Mapping[str, Any]) -> Card:
    """The card in a file's config.

    Raises:
        FormatError: there is none that can be used.
    """
    try:
        return Card.from_dict(config)
    except (ConfigError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else error
        raise FormatError(f"{path}: its config cannot be used ({reason})") from error


def rebuild(
    path: Path, card: Card, tensors: Mapping[str, Tensor], model: str | None
) -> fx.GraphModule:
    """The network that a card describes, on the CPU, with its initial weights.

    Raises:
        FormatError: it cannot be built, or is larger than what the file holds.
        ConfigError: it is the user's own, and ``model`` does not name it.
    """
    arm, seed = card.training.arm, card.training.seed
    own = ":" in arm.model
    if (own or model is not None) and model != arm.model:
        said = f"--model {model} was given" if model else f"say --model {arm.model} if you trust it"
        raise ConfigError(
            f"{path} holds the weights of '{arm.model}'"
            + (f", whose code is not in the file; {said}" if own else f", but {said}")
        )
    classes = len(card.classes)
    try:
        if not own:  # on the meta device, where nothing is allocated
            with torch.device("meta"):
                plain = build(arm.model, card.shape, classes, arm.activation, seed)
            wanted = sum(value.numel() for value in plain.state_dict().values())
            held = sum(value.numel() for value in tensors.values())
            if wanted > held:
                raise FormatError(
                    f"{path}: the network that it describes has {wanted:,} weights, but only "
                    f"{held:,} are in it"
                )
        return network_for(arm, torch.zeros(2, *card.shape), classes, seed)[0]
    except (FormatError, ConfigError) as error:
        if isinstance(error, FormatError) or own:
            raise
        raise FormatError(f"{path}: its config cannot be used ({error})") from error
    except Exception as error:  # a config can ask torch for anything that has the right types
        raise FormatError(f"{path}: its network cannot be built ({first_line(error)})") from error


def restore(path: Path, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives the network its tensors, all of them or none.

    Raises:
        FormatError: a tensor is missing, is too many, or has the wrong shape, type or values.
    """
    own = tensors_of(network)
    if missing := own.keys() - tensors.keys():
        raise FormatError(f"{path}: has no tensor '{min(missing)}', which its network needs")
    if extra := tensors.keys() - own.keys():
        raise FormatError(f"{path}: has a tensor '{min(extra)}', which its network does not need")
    for name, value in own.items():
        given = tensors[name]
        if given.shape != value.shape or given.dtype != value.dtype:
            raise FormatError(
                f"{path}: tensor '{name}' must be {value.dtype} {tuple(value.shape)} but is "
                f"{given.dtype} {tuple(given.shape)}"
            )
    for name in _numeric(network):
        if not bool(torch.isfinite(tensors[name]).all()):
            raise FormatError(f"{path}: tensor '{name}' has a value that is not finite")
        if name.endswith("running_var") and bool((tensors[name] < 0).any()):
            raise FormatError(f"{path}: tensor '{name}' has a variance below zero")
    network.load_state_dict(dict(tensors))


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers by name.

    Raises:
        ConfigError: the network keeps something that is not a tensor.
    """
    state = network.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"the network keeps '{name}', of type {type(value).__name__}, which is not a "
                "tensor and cannot be saved; keep it as a buffer"
            )
    return state


def _numeric(network: nn.Module) -> list[str]:
    """The tensors that must be finite: weights, and the running statistics of norms."""
    norms = (name for name, module in network.named_modules() if isinstance(module, NORMS))
    state = network.state_dict()
    running = [f"{n}.{key}" for n in norms for key in ("running_mean", "running_var")]
    return [n for n in (*dict(network.named_parameters()), *running) if n in state]


def _are_numbers(values: Any) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
