"""Putting batch norms back into a network that they were folded into, to train it further."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, fx, nn

from ..errors import ConfigError, SurgeryError, meant
from .graph import is_layer, name_of, shape_of, trace
from .introduce import Introduced, finished, insert, spatial
from .introducing.calibrate import Data, Forward
from .introducing.places import Left, Place, check_channels, places

__all__ = ["unfold"]


class _Entry(Protocol):
    """One norm of a fold's report."""

    @property
    def norm(self) -> str: ...
    @property
    def into(self) -> Sequence[str]: ...
    @property
    def direction(self) -> str: ...


class _Report(Protocol):
    @property
    def folded(self) -> Sequence[_Entry]: ...


class _Wanted(NamedTuple):
    """A norm's path, the layers that it is to stand behind, or before if it was folded forward."""

    norm: str
    layers: tuple[str, ...]
    before: bool


def unfold(
    model: nn.Module,
    example: Any,
    norms: _Report | Mapping[str, str] | None = None,
    *,
    calibrate: Tensor | Iterable[Any] | None = None,
    forward: Forward = None,
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> tuple[fx.GraphModule, Introduced]:
    """A copy of a folded network with batch norms behind its layers again, which computes the same.

    With ``calibrate`` norms have the statistics of the data, as in `introduce`. Without, those of
    nothing, and hand on what they are given in inference::

        running_mean = -b       running_var = 1       gamma = sqrt(1 + eps)       beta = 0

    with b the layer's bias, which is dropped in both cases: so the copy has the parameters that the
    network had before it was folded, and loads its state dict. In training it normalizes by the
    batch and is another network until gamma and beta have learned; with ``calibrate`` it is close
    to the same from the start.

    Args:
        model: a folded network, in the mode that the copy will have.
        example: an input, a tuple of inputs or a dict of inputs by name.
        norms: the report of the fold, or the path of each norm with the path of its layer; None for
            a norm behind each conv or dense layer but the logits, with names made of the layers'.
        calibrate, forward, eps, momentum: as in `introduce`.

    Returns:
        the copy, and the report. A norm that was folded into several layers stands where their
        values meet, and one that was folded into a layer behind it on that layer's input; if there
        is no such place it is left, with the reason.

    Raises:
        ConfigError: ``forward`` without ``calibrate``.
        SurgeryError: the model cannot be traced, has no such layer or something else where a norm
            is to be, the data does not fit, or the copy's outputs differ.
    """
    if calibrate is None and forward is not None:
        raise ConfigError("forward= runs the batches of calibrate=, but there are none; give both")
    data = None if calibrate is None else Data(calibrate)
    traced = trace(model, example)
    found: Sequence[tuple[str | None, Place]]
    if norms is None:
        free, left = places(traced, "before-activation", where=lambda name, module: True)
        found = [(None, place) for place in free]
    else:
        found, left = _places(traced, _wanted(norms))
    slots = []
    for name, place in found:
        if name is not None:
            _make_room(traced, name)
        norm = spatial(shape_of(place.value), eps, momentum)
        slots.append(insert(traced, place, norm, example, name))
    return finished(model, traced, example, slots, left, data, forward, identity=True)


def _wanted(norms: _Report | Mapping[str, str]) -> list[_Wanted]:
    if isinstance(norms, Mapping):
        return [_Wanted(norm, (layer,), False) for norm, layer in norms.items()]
    return [_Wanted(e.norm, tuple(e.into), e.direction == "forward") for e in norms.folded]


def _places(traced: fx.GraphModule, wanted: list[_Wanted]) -> tuple[list[tuple[str, Place]], Left]:
    """The place of each norm, and the norms that have none with the reason."""
    check_channels(traced)
    found: list[tuple[str, Place]] = []
    left: Left = []
    for norm, layers, before in wanted:
        nodes = [_call(traced, norm, layer) for layer in layers]
        odd = [name_of(node) for node in nodes if not is_layer(node)]
        place = None if odd or not nodes else _shared_input(nodes) if before else _meeting(nodes)
        if place is not None:
            found.append((norm, place))
        elif not nodes:
            left.append((norm, "it did nothing when it was folded"))
        elif odd:
            left.append((norm, f"'{odd[0]}', which it was folded into, is no conv or dense layer"))
        else:
            left.append((norm, f"{', '.join(layers)} have no place in common"))
    if not found:
        reasons = "".join(f"; '{name}': {reason}" for name, reason in left)
        raise SurgeryError(f"there is no norm to put back into {type(traced).__name__}{reasons}")
    return found, left


def _call(traced: fx.GraphModule, norm: str, layer: str) -> fx.Node:
    """The one call of what the norm was folded into."""
    nodes: list[fx.Node] = [node for node in traced.graph.nodes if node.op != "output"]
    calls = [node for node in nodes if layer in (name_of(node), node.name)]
    if len(calls) == 1:
        return calls[0]
    kind = type(traced).__name__
    if calls:
        raise SurgeryError(
            f"'{layer}' of {kind} is called {len(calls)} times, so '{norm}' cannot be behind it"
        )
    close = meant(layer, [name_of(node) for node in nodes if is_layer(node)])
    raise SurgeryError(
        f"{kind} has no conv or dense layer '{layer}'{close} for '{norm}'; give the network that "
        "was folded, or the names that its layers have"
    )


def _shared_input(layers: list[fx.Node]) -> Place | None:
    """The input of all the layers, or None if they have several."""
    values = {layer.all_input_nodes[0] for layer in layers}
    return Place(values.pop(), tuple(layers)) if len(values) == 1 else None


def _meeting(layers: list[fx.Node]) -> Place | None:
    """The first value that all the layers' values have come together in, or None."""
    ways = [_way(layer) for layer in layers]
    for node in ways[0]:
        if all(node in way for way in ways[1:]):
            return Place(node)
    return None


def _way(node: fx.Node) -> list[fx.Node]:
    """The node, and those behind it as far as each value has one user."""
    way = [node]
    while len(way[-1].users) == 1:
        way.append(next(iter(way[-1].users)))
    return [node for node in way if node.op != "output"]


def _make_room(traced: fx.GraphModule, path: str) -> None:
    """Takes away the nn.Identity that some folds leave in a norm's place.

    Raises:
        SurgeryError: something else is there.
    """
    modules = dict(traced.named_modules(remove_duplicate=False))
    if path not in modules:
        return
    if type(modules[path]) is not nn.Identity:
        raise SurgeryError(
            f"'{path}' of {type(traced).__name__} is a {type(modules[path]).__name__}, so no norm "
            "can have its name; give the norm another by norms={'name': 'layer'}"
        )
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and node.target == path:
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)
    traced.delete_submodule(path)
