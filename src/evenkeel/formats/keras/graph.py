"""A model's config as calls of layers, in an order in which they can be run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from ...errors import FormatError

__all__ = ["Call", "Graph", "Value", "graph_of"]

Value = tuple[str, int]
"""What a layer gives when it is called for the n-th time."""


@dataclass(frozen=True)
class Call:
    """One use of a layer.

    Attributes:
        value: what it gives.
        sources: what it takes.
        number: a plain number among what it takes, and its place there: of ``3 - x`` 3 and 0.
    """

    value: Value
    sources: tuple[Value, ...]
    number: tuple[float, int] | None = None


@dataclass(frozen=True)
class Graph:
    """A model.

    Attributes:
        layers: class_name and config of each layer, by name.
        calls: in their order; inputs have no sources.
        inputs, outputs: of the model.
    """

    layers: dict[str, tuple[str, dict[str, Any]]]
    calls: tuple[Call, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


def graph_of(model: Mapping[str, Any]) -> Graph:
    """The layers and calls of a Sequential or Functional model's config.

    Raises:
        FormatError: it is of another kind, or does not hang together.
    """
    kind, config = model.get("class_name"), model.get("config")
    entries = config.get("layers") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(entries, list) or not entries:
        raise FormatError(f"its {kind} has no list of layers; only Sequential and "
                          "Functional models say what they are made of")  # fmt: skip
    try:
        layers = {_name(entry): (_kind(entry), dict(entry["config"])) for entry in entries}
        if len(layers) < len(entries):
            raise FormatError("two of its layers have the same name")
        if kind == "Sequential":
            return _chain(layers, config)
        if kind not in ("Functional", "Model"):
            raise FormatError(
                f"a {kind} is a class of somebody's own, which the file does not hold; "
                "build it as a Functional model"
            )
        calls = {call.value: call for entry in entries for call in _calls(entry)}
        inputs = tuple(_ends(config["input_layers"]))
        outputs = tuple(_ends(config["output_layers"]))
    except FormatError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise FormatError(f"its config cannot be understood ({error!r})") from error
    for value in inputs:
        calls[value] = Call(value, ())
    return Graph(layers, tuple(_sorted(calls)), inputs, outputs)


def _kind(entry: Mapping[str, Any]) -> str:
    """A layer's class, which must be Keras's own: others may have its name."""
    kind = str(entry["class_name"])
    module, registered = entry.get("module", "keras"), entry.get("registered_name")
    own = str(module).split(".")[0] in ("keras", "tf_keras", "tensorflow")
    if not own or ">" in str(registered):
        raise FormatError(
            f"layer '{_name(entry)}' is a {kind} of somebody's own, which the file does not hold"
        )
    if ".ops." in str(module) and kind not in _OPERATORS:
        raise FormatError(f"layer '{_name(entry)}' ({kind}): this operation is not supported")
    return kind


_OPERATORS: Final = (
    "Add", "Concatenate", "Maximum", "Minimum", "Multiply", "Softmax", "Subtract",
)  # fmt: skip
"""Operations that compute what the layers of these names do."""


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry.get("name") or entry["config"]["name"])


def _chain(layers: dict[str, tuple[str, dict[str, Any]]], config: Mapping[str, Any]) -> Graph:
    shape = config.get("build_input_shape")
    if next(iter(layers.values()))[0] != "InputLayer":
        first = next(iter(layers.values()))[1]
        shape = first.get("batch_input_shape") or first.get("batch_shape") or shape
        layers = {"": ("InputLayer", {"batch_shape": shape}), **layers}
    names = list(layers)
    calls = [Call((names[0], 0), ())]
    calls += [Call((name, 0), ((before, 0),)) for before, name in pairwise(names)]
    return Graph(layers, tuple(calls), ((names[0], 0),), ((names[-1], 0),))


def _calls(entry: Mapping[str, Any]) -> Iterator[Call]:
    for number, node in enumerate(entry["inbound_nodes"]):
        value = _name(entry), number
        if isinstance(node, Mapping):  # Keras 3
            taken = list(_taken(node["args"])) + list(_taken(node["kwargs"]))
        else:
            taken = [(str(layer), int(at)) for layer, at, *_ in node]
            taken += [n for source in node for n in _taken(list(source[3:]))]
        sources = tuple(one for one in taken if isinstance(one, tuple))
        numbers = [(one, at) for at, one in enumerate(taken) if not isinstance(one, tuple)]
        if len(numbers) > 1:
            raise ValueError(f"'{value[0]}' is called with {[one for one, _ in numbers]}")
        if sources:
            yield Call(value, sources, numbers[0] if numbers else None)


def _taken(given: Any) -> Iterator[Value | float]:
    """Every Keras tensor and number among a call's arguments; None and False are left out."""
    if isinstance(given, Mapping) and given.get("class_name") == "__keras_tensor__":
        layer, number, place = given["config"]["keras_history"]
        if place:
            raise ValueError(f"the layer {layer} gives several values")
        yield str(layer), int(number)
    elif isinstance(given, Mapping):
        for value in given.values():
            yield from _taken(value)
    elif isinstance(given, list | tuple):
        for value in given:
            yield from _taken(value)
    elif given is not None and given is not False:
        yield float(given)


def _ends(given: Any) -> Iterator[Value]:
    """Inputs or outputs: one of them, or a list."""
    if given and isinstance(given[0], str):
        given = [given]
    for layer, number, *_ in given:
        yield str(layer), int(number)


def _sorted(calls: dict[Value, Call]) -> Iterator[Call]:
    """The calls, each behind its sources."""
    done: set[Value] = set()
    waiting = list(calls.values())
    while waiting:
        ready = [call for call in waiting if done.issuperset(call.sources)]
        if not ready:
            raise FormatError(f"'{waiting[0].value[0]}' waits for what nothing gives")
        yield from ready
        done.update(call.value for call in ready)
        waiting = [call for call in waiting if call.value not in done]
