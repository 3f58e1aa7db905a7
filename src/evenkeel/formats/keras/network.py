"""A Keras model as a module of torch's, and `load`, which reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ...errors import FormatError, meant
from .builders import ARITHMETIC, BUILDERS
from .container import Weights, read
from .graph import Graph, Value, graph_of
from .places import Place, Shape

__all__ = ["Network", "load"]


_MISTAKES: Final = (
    LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError,
    AssertionError,
)  # fmt: skip


class Network(nn.Module):
    """A Sequential or Functional model with torch's own layers in it.

    Images are (N, c, h, w), whichever way Keras has them; so are outputs that are images. Vectors
    keep Keras's order: where it flattens images it counts places before channels, and so does this.

    Attributes:
        layers: the modules, by Keras's names where those can be names of modules.
        shape: of what one sample is, as torch has it: (c, h, w) or (n,).
        outputs: how many there are; a tuple is given if it is more than one.

    Raises:
        FormatError: a layer that is not supported, or weights that do not fit.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Weights,
        around: tuple[str, ...] = (),
        given: Shape | None = None,
        first: bool = False,
        old: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self._names: dict[str, str] = {}
        seen: dict[str, tuple[list[Shape], Any, Shape]] = {}
        shapes: dict[Value, Shape] = {}
        if len(graph.inputs) != 1:
            raise FormatError(f"a model of {len(graph.inputs)} inputs is not supported")
        (self._input,) = graph.inputs
        self._calls: list[tuple[Value, str, tuple[Value, ...]]] = []
        for call in graph.calls:
            layer = call.value[0]
            kind, config = graph.layers[layer]
            if call.value == self._input:
                shapes[call.value] = given or _input_shape(layer, config)
                continue
            before = [shapes[source] for source in call.sources]
            if layer in seen:
                if seen[layer][:2] != (before, call.number):
                    raise FormatError(f"layer '{layer}' is called twice, with unlike values")
            else:
                path = (*around, layer)
                config = {**config, "number": call.number}
                module, gives = _built(path, kind, config, before, weights, first, old)
                self._names[layer] = self._added(layer, module)
                seen[layer] = before, call.number, gives
            shapes[call.value] = seen[layer][2]
            self._calls.append((call.value, self._names[layer], call.sources))
        self._outputs = list(graph.outputs)
        self.result = [shapes[value] for value in self._outputs]
        self.shape = _as_torch(shapes[self._input], first)
        self.outputs = len(self._outputs)

    def forward(self, x: Tensor) -> Any:
        """The outputs for a batch."""
        values = {self._input: x}
        for value, name, sources in self._calls:
            values[value] = self.layers[name](*(values[source] for source in sources))
        found = tuple(values[value] for value in self._outputs)
        return found[0] if len(found) == 1 else found

    def _added(self, layer: str, module: nn.Module) -> str:
        name = re.sub(r"\W", "_", layer) or "layer"
        while name in self.layers or hasattr(nn.ModuleDict, name):
            name += "_"
        self.layers[name] = module
        return name


def load(path: str | os.PathLike[str]) -> Network:
    """A network from a .keras file of Keras 3, or an .h5 file of Keras 2 or 3.

    A batch norm keeps its epsilon; its momentum, the weight of the old value, becomes torch's, that
    of the new one; its variance stays as stored, which in Keras 3 is the biased one. A norm of
    another axis than the channels' becomes `evenkeel.Norm`. Keras itself is not needed, h5py is
    (``pip install 'evenkeel[keras]'``); nothing in the file is run.

    Args:
        path: the file.

    Returns:
        The network in inference mode, in float32.

    Raises:
        FormatError: it is no such file, or the model has layers that are not supported.
        ConfigError: h5py is not installed.
    """
    saved = read(Path(path))
    try:
        graph = graph_of(saved.config)
        first = _channels_first(saved.config)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            network = Network(graph, saved.weights, first=first, old=saved.is_old)
    except FormatError as error:
        raise FormatError(f"{saved.name}: {error}") from error
    except _MISTAKES as error:
        raise FormatError(f"{saved.name}: its config cannot be understood ({error!r})") from error
    return network.eval()


def _built(
    path: tuple[str, ...],
    kind: str,
    config: Mapping[str, Any],
    before: list[Shape],
    weights: Weights,
    first: bool,
    old: bool,
) -> tuple[nn.Module, Shape]:
    """One layer's module, or that of a model among the layers."""
    if kind in ("Sequential", "Functional", "Model"):
        inner = graph_of({"class_name": kind, "config": config})
        if weights.get(path):
            raise FormatError(
                f"the model '{path[-1]}' is among the layers of an .h5 file, whose weights do not "
                "say which layers they are of; save it as .keras"
            )
        nested = Network(inner, weights, path, before[0], first, old)
        if nested.outputs != 1:
            raise FormatError(f"the model '{path[-1]}' among the layers gives several values")
        return nested, nested.result[0]
    place = Place(path[-1], kind, config, before, first, list(weights.get(path, ())), old)
    if config["number"] is not None and kind not in ARITHMETIC:
        raise place.error(f"a call with the number {config['number'][0]} is not supported")
    if kind not in BUILDERS:
        raise place.error(f"this kind of layer is not supported{meant(kind, BUILDERS)}")
    module, shape = BUILDERS[kind](place)
    if place.arrays:
        raise place.error(f"it has {len(place.arrays)} arrays more than its config asks for")
    return module, shape


def _input_shape(layer: str, config: Mapping[str, Any]) -> Shape:
    shape = config.get("batch_shape") or config.get("batch_input_shape")
    if not shape or any(type(size) is not int or size < 1 for size in shape[1:]):
        raise FormatError(
            f"input '{layer}' has the shape {shape}, which does not say how large images are; "
            "give the model a fixed input shape"
        )
    return tuple(shape[1:])


def _channels_first(model: Mapping[str, Any]) -> bool:
    """Whether the images of a model, and of those among its layers, have their channels first.

    Raises:
        FormatError: some of them have and some have not.
    """
    found, waiting = set(), [model]
    while waiting:
        config = waiting.pop().get("config")
        if isinstance(config, Mapping):
            found |= {str(config["data_format"])} if config.get("data_format") else set()
            layers = config.get("layers")
            waiting += [one for one in layers if isinstance(one, Mapping)] if layers else []
    if len(found) > 1:
        raise FormatError("some of its layers have channels first and some have them last")
    return found == {"channels_first"}


def _as_torch(shape: Shape, first: bool) -> Shape:
    return shape if first or len(shape) != 3 else (shape[2], *shape[:2])
