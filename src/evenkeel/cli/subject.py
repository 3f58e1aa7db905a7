"""The network that a command is given: a file or a factory, its weights, and an example."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, FormatError, ShapeError, first_line, meant
from .network import (
    is_foreign,
    is_state_dict,
    note,
    open_foreign,
    open_network,
    random_inputs,
    shape_of,
)
from .options import DTYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["Given", "Subject"]


@dataclass(frozen=True)
class Subject:
    """A network, an example of what it is given, and what a file of it is to say."""

    network: nn.Module
    example: Any
    about: dict[str, Any]


@dataclass(frozen=True)
class Given:
    """What the command line says of a network; options that do not go together are refused.

    Attributes:
        network: package.module:factory, a file of 'evenkeel train', of Darknet's or of Keras's.
        weights, classes, model, convention: as the options say.
        inputs, dtypes, example: of the example.
        any_batch: the example is to be a batch.
    """

    network: str
    weights: Path | None
    classes: int | None
    model: str | None
    convention: str | None
    inputs: list[str]
    dtypes: list[str]
    example: Path | None
    any_batch: bool = True

    def __post_init__(self) -> None:
        self._check()
        _ = self.shapes, self.kinds  # which say what is wrong with them before any work

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the inputs."""
        return [shape_of(text) for text in self.inputs]

    @property
    def kinds(self) -> list[str]:
        """The type of each input."""
        return _dtypes(self.dtypes, len(self.inputs))

    @property
    def is_trained(self) -> bool:
        """It is a file of 'evenkeel train'."""
        return not is_foreign(self.network) and Path(self.network).is_file()

    @property
    def sources(self) -> list[Path]:
        """The files that it is made of."""
        return [Path(self.network), *([self.weights] if self.weights else [])]

    def numbers(self) -> str:
        """What the network is run on, for people."""
        if self.example is not None:
            return f"the inputs in {self.example}"
        if not self.shapes:
            what = "trained on" if self.is_trained else "made for"
            return f"random images of the size that it was {what}"
        pairs = zip(self.shapes, self.kinds, strict=True)
        return "random " + " and ".join(f"{'x'.join(map(str, s))} {kind}" for s, kind in pairs)

    def open(self, where: torch.device) -> Subject:
        """The network with its weights, and the example, which it can run."""
        given = None if self.example is None else _read(self.example)
        if given is None and self.shapes:
            given = random_inputs(self.shapes, self.kinds)
        if self.is_trained:
            subject = self._trained(given, where)
        elif is_foreign(self.network):
            subject = self._foreign(given, where)
        else:
            subject = self._made(given, where)
        _try(self.network, subject, self.example)
        return subject

    def _check(self) -> None:
        network, trained = self.network, self.is_trained
        if Path(network).suffix == ".weights":
            raise ConfigError(f"{network} has numbers alone; give its .cfg, and it as --weights")
        if not trained and not is_foreign(network) and ":" not in network:
            raise FormatError(
                f"{network}: {_missing(Path(network))}; give what 'evenkeel train' wrote, "
                "package.module:factory, a Darknet .cfg or a Keras file"
            )
        if trained and (self.weights is not None or self.classes is not None):
            raise ConfigError(
                f"{network} has weights and classes; leave out --weights and --classes"
            )
        if not trained and self.model is not None:
            raise ConfigError(
                "--model is for a file of 'evenkeel train'; the network is named already"
            )
        if is_foreign(network) and self.classes is not None:
            raise ConfigError(f"{network} says how many classes it has; leave out --classes")
        if self.example is not None and (self.inputs or self.dtypes):
            raise ConfigError(f"{self.example} has shapes and types; leave out --input and --dtype")
        if ":" in network and not trained and not self.inputs and self.example is None:
            raise ConfigError(
                "what is done is proved on an input; give its shape, --input 1,3,224,224 say, or "
                "--example"
            )

    def _trained(self, given: Any, where: torch.device) -> Subject:
        """A network of 'evenkeel train'."""
        path = Path(self.network)
        network, card = open_network(path, where, self.model)
        given = self._images(card.shape) if given is None else given
        if tuple(getattr(given, "shape", ()))[1:] != card.shape:
            raise ConfigError(
                f"{path} was trained on images of {card.shape}; give one input like them"
            )
        about = {
            "network": card.training.arm.model,
            "classes": list(card.classes),
            "images": {
                "binary": card.training.data.binary,
                "shift": card.shift,
                "scale": card.scale,
            },
        }
        return Subject(network, given.to(where), about)

    def _foreign(self, given: Any, where: torch.device) -> Subject:
        """A network of Darknet's files, or of Keras's."""
        network, shape = open_foreign(Path(self.network), self.weights, self.convention)
        if self.weights is not None and is_state_dict(self.weights):
            _load(network, self.weights)
        if given is None:  # between 0 and 1, as images are
            given = self._images(shape).sigmoid()
        about = {"network": Path(self.network).name}
        return Subject(network.to(where), given.to(where), about)

    def _images(self, shape: tuple[int, ...]) -> Any:
        return random_inputs([(8 if self.any_batch else 1, *shape)])

    def _made(self, given: Any, where: torch.device) -> Subject:
        """The network of a factory, with the weights in it."""
        import torch
        from torch.utils import _pytree as pytree

        from ..study.models import build

        first: Tensor = pytree.tree_leaves(given)[0]
        shape: Any = tuple(first.shape[1:])
        network = build(self.network, shape, self.classes or 10, "relu", 0)
        about = {"network": self.network}
        if self.weights is not None:
            _load(network, self.weights)
            about["weights"] = self.weights.name
        example = pytree.tree_map_only(torch.Tensor, lambda t: t.to(where), given)
        return Subject(network.to(where), example, about)


def _missing(path: Path) -> str:
    return "is a folder, not a file" if path.is_dir() else "there is no such file"


def _dtypes(names: list[str] | None, inputs: int) -> list[str]:
    """A type for each input."""
    names = names or ["float32"]
    for name in names:
        if name not in DTYPES:
            raise ConfigError(
                f"unknown --dtype '{name}'{meant(name, DTYPES)}; choose {', '.join(DTYPES)}"
            )
    if len(names) not in (1, inputs):
        raise ConfigError(
            f"--dtype is given {len(names)} times and --input {inputs}; give one type for all "
            "inputs, or one for each"
        )
    return names * inputs if len(names) == 1 else names


def _read(path: Path) -> Any:
    """The inputs in a file: one, or several by name.

    Raises:
        FormatError: it cannot be read, or holds something else.
    """
    import numpy as np
    import torch
    from safetensors.torch import load_file

    if not path.is_file():
        raise FormatError(f"{path}: {_missing(path)}")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if path.suffix == ".safetensors":
            found = load_file(path)
            return found if len(found) > 1 else next(iter(found.values()))
    except Exception as error:
        raise FormatError(
            f"{path}: there are no inputs in it that can be read ({first_line(error)})"
        ) from error
    raise FormatError(f"{path}: inputs are read from .npy and .safetensors; save them so")


def _load(network: nn.Module, path: Path) -> None:
    """Puts the weights in, all of them: what is missing would be folded as if it were right.

    Raises:
        FormatError: the weights are not those of the network.
    """
    from ..checks.weights import as_checkpoint, load_into

    loaded = load_into(network, as_checkpoint(path))
    lacking = [f"{norm}.{name}" for norm, names in loaded.missing.items() for name in names]
    own = network.state_dict()
    extra = [n for n in loaded.checkpoint.state if n not in own and "num_batches" not in n]
    for names, says in (
        (lacking, "it has no {}, and a norm is nothing without its statistics"),
        (extra, "it has {}, which the network does not have; it is of another network"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise FormatError(f"{path}: {says.format(', '.join(names[:3]) + more)}")
    if loaded.checkpoint.averaged is not None:
        note(f"{path} has averaged weights (EMA or SWA) too; those were not taken")


def _try(name: str, subject: Subject, example: Path | None) -> None:
    """Runs the example once: what does not fit is the user's mistake, and told as such.

    Raises:
        ShapeError: the network cannot run it.
    """
    import torch

    from ..surgery.examples import call, tensors_in
    from ..surgery.exporting.programs import reason

    try:
        with torch.no_grad():
            call(subject.network.eval(), subject.example)
    except Exception as error:
        shapes = " and ".join("x".join(map(str, t.shape)) for t in tensors_in(subject.example))
        what = f"random inputs of {shapes}" if example is None else f"{example}, of {shapes}"
        raise ShapeError(f"{name} cannot run {what}: {reason(error)}") from error
