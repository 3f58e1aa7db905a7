"""Where norms go: the places of each placement in a network's graph, and those that are meant.

A place is a value of the graph and those of its users that get it normalized. It is called by its
anchor: the layer, activation or pooling that the norm goes behind, or before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

from ...errors import ConfigError, SurgeryError, meant
from ..graph import (
    is_activation,
    is_layer,
    is_norm,
    is_pooling,
    module_of,
    name_of,
    overwrites,
    rank_expected,
    shape_of,
)

__all__ = [
    "LAYER_KINDS",
    "PLACEMENTS",
    "Left",
    "Place",
    "Where",
    "check_channels",
    "hand_over",
    "places",
]

PLACEMENTS = {
    "before-activation": "on the output of each conv or dense layer but the last",
    "after-activation": "on the output of each activation",
    "on-input": "on the input of each conv or dense layer, the first one's included",
    "after-pooling": "on the output of each pooling",
    "after-addition": "on the input of each activation, so on the sum in a residual block",
}
LAYER_KINDS = ("all", "conv", "dense")

Where = str | Sequence[str] | Callable[[str, nn.Module | None], bool] | None
"""Some places: the name of a module or a node, or of a module that holds them, several of these, or
a function of the anchor's name and module (None for a function); None for all."""

Left = list[tuple[str, str]]
"""Names of what was left as it is, each with the reason."""


class Place(NamedTuple):
    """A value to normalize.

    Attributes:
        value: the node that gives it.
        users: those that get it normalized; None for all.
    """

    value: fx.Node
    users: tuple[fx.Node, ...] | None = None

    @property
    def anchor(self) -> fx.Node:
        """The node that the place is called by."""
        return self.value if self.users is None else self.users[0]

    @property
    def readers(self) -> tuple[fx.Node, ...]:
        """The nodes that will read the norm's output."""
        return tuple(self.value.users) if self.users is None else self.users

    @property
    def kind(self) -> str:
        """'dense' for (n, c) values, 'conv' for all others."""
        return "dense" if len(shape_of(self.value)) == 2 else "conv"

    @property
    def base(self) -> str:
        """What a norm here is called if it has no name of its own."""
        return name_of(self.anchor) + ("_norm" if self.users is None else "_input_norm")

    def __str__(self) -> str:
        if self.users is None:
            return f"output of {name_of(self.value)}"
        return f"input of {', '.join(name_of(user) for user in self.users)}"


def places(
    traced: fx.GraphModule,
    placement: str,
    *,
    layers: str = "all",
    every: int = 1,
    where: Where = None,
    logits: bool = False,
) -> tuple[list[Place], Left]:
    """The places of a network in the order of its graph, and those left because of a norm there.

    Args:
        traced: the network's graph, with shapes.
        placement, layers, every, where, logits: as in `introduce`.

    Raises:
        ConfigError: an unknown placement or kind of layers, or ``every`` under 1.
        SurgeryError: there is no such place, the channels of a layer cannot be told for sure, or
            the network has norms already and ``where`` does not say which places are meant.
    """
    _check_choices(placement, layers, every)
    kind = type(traced).__name__
    if where is None:
        _refuse_norms(traced, kind)
    check_channels(traced)
    with_logits, found = (
        [p for p in _all(traced, placement, also) if layers == "all" or p.kind == layers]
        for also in (True, logits)
    )
    if not found:
        raise SurgeryError(
            f"{kind} has no place for '{placement}' on {layers} layers; "
            f"'{placement}' goes {PLACEMENTS[placement]}"
        )
    if where is None:
        return found[::every], []
    wish = f"'{placement}' on {layers} layers"
    if callable(where):
        free, left = _by_function(found, where, kind, wish)
    else:
        words = [where] if isinstance(where, str) else where
        free, left = _by_name(traced, found, words, wish, with_logits)
    return free[::every], left


def check_channels(traced: fx.GraphModule) -> None:
    """Refuses a network whose channels cannot be told for sure.

    Raises:
        SurgeryError: a layer gives values whose second axis is not its channels.
    """
    for node in traced.graph.nodes:
        if is_layer(node) and len(shape_of(node)) != rank_expected(node):
            raise SurgeryError(
                f"'{name_of(node)}' of {type(traced).__name__} gives values of shape "
                f"{shape_of(node)}, whose second axis is not its channels; {rank_expected(node)} "
                "axes, batch first, are expected"
            )


def hand_over(place: Place, path: str) -> fx.Node:
    """Calls the module of that path on the value of a place, and hands its output to the readers.

    What an activation in place writes is seen by all that read its input later. Behind a norm it
    writes into the norm's output, so those are given what it gives.

    Args:
        place: as `places` found it; what was put in since is reckoned with.
        path: of a module of the network.

    Returns:
        the new node.
    """
    graph, users = place.value.graph, place.users or ()
    value = _input(users[0]) if users else place.value
    order = {node: number for number, node in enumerate(graph.nodes)}
    later = [(user, _later_readers(value, user, order)) for user in users if overwrites(user)]
    readers = users or tuple(value.users)
    # A user's place is just before it, for the value may be written over until then.
    point = graph.inserting_before(min(users, key=order.__getitem__)) if users else None
    with point or graph.inserting_after(value):
        node = graph.call_module(path, (value,))
    node.meta["tensor_meta"] = value.meta["tensor_meta"]
    for reader in readers:
        reader.replace_input_with(value, node)
    for user, others in later:
        for reader, alias in others:
            reader.replace_input_with(alias, user)
    return node


def _later_readers(
    value: fx.Node, user: fx.Node, order: dict[fx.Node, int]
) -> list[tuple[fx.Node, fx.Node]]:
    """Who reads what the user has overwritten, each with the name that it reads it by."""
    while _hands_on(value):
        value = value.all_input_nodes[0]
    names, found = [value], []
    for name in names:
        for reader in name.users:
            if order[reader] > order[user]:
                found.append((reader, name))
            elif _hands_on(reader) and reader.all_input_nodes[0] is name and reader is not user:
                names.append(reader)
    return found


def _hands_on(node: fx.Node) -> bool:
    """True if the node's output is the tensor that goes into it first."""
    return isinstance(module_of(node), nn.Identity) or overwrites(node)


def _check_choices(placement: str, layers: str, every: int) -> None:
    for what, chosen, choices in (
        ("placement", placement, PLACEMENTS),
        ("layers", layers, LAYER_KINDS),
    ):
        if chosen not in choices:
            raise ConfigError(f"unknown {what} '{chosen}'; choose one of {', '.join(choices)}")
    if every < 1:
        raise ConfigError(f"every is {every}; give 1 for every place, 2 for every other one")


def _refuse_norms(traced: fx.GraphModule, kind: str) -> None:
    found = [name_of(node) for node in traced.graph.nodes if is_norm(node)]
    if found:
        raise SurgeryError(
            f"{kind} has norms already ({', '.join(found[:3])}); give the network "
            "without them, so that placements can be compared, or say by where= which places are "
            "to have one"
        )


def _all(traced: fx.GraphModule, placement: str, logits: bool) -> list[Place]:
    nodes = list(traced.graph.nodes)
    layers = [node for node in nodes if is_layer(node)]
    hidden: set[fx.Node] = set()  # what some layer comes behind; the rest are logits
    for node in reversed(nodes):
        if any(is_layer(user) or user in hidden for user in node.users):
            hidden.add(node)
    inner = [node for node in nodes if node in hidden] if layers and not logits else nodes
    of: dict[str, Callable[[], list[Place]]] = {
        "before-activation": lambda: [Place(node) for node in inner if is_layer(node)],
        "after-activation": lambda: [Place(node) for node in inner if is_activation(node)],
        "on-input": lambda: [Place(_input(node), (node,)) for node in layers],
        "after-pooling": lambda: [Place(node) for node in inner if is_pooling(node)],
        "after-addition": lambda: [Place(_input(n), (n,)) for n in inner if is_activation(n)],
    }
    return of[placement]()


def _input(node: fx.Node) -> fx.Node:
    value: Any = node.args[0] if node.args else next(iter(node.kwargs.values()))
    if not isinstance(value, fx.Node):
        raise SurgeryError(f"the input of '{node.name}' is not a value of the graph")
    return value


def _without_norms(chosen: Sequence[Place]) -> tuple[list[Place], Left]:
    """Those that are neither right behind a norm nor right before one, and the others."""
    free: list[Place] = []
    left: Left = []
    for place in chosen:
        beside = [node for node in (place.value, *place.readers) if is_norm(node)]
        if beside:
            left.append((name_of(place.anchor), f"the norm '{name_of(beside[0])}' is there"))
        else:
            free.append(place)
    return free, left


def _by_function(
    found: list[Place], where: Callable[[str, nn.Module | None], bool], kind: str, wish: str
) -> tuple[list[Place], Left]:
    """The places that the function is true for and that have no norm."""
    chosen = [p for p in found if where(name_of(p.anchor), module_of(p.anchor))]
    free, left = _without_norms(chosen)
    if free:
        return free, left
    if left:
        raise SurgeryError(
            f"where= chose places of {kind} that all have a norm already ({_reasons(left)})"
        )
    raise SurgeryError(
        f"where= chose none of the places of {kind} for {wish}; they are {_anchors(found)}"
    )


def _by_name(
    traced: fx.GraphModule,
    found: list[Place],
    words: Sequence[str],
    wish: str,
    with_logits: list[Place],
) -> tuple[list[Place], Left]:
    """The places that the words name; each word must name one that has no norm."""
    free: list[Place] = []
    left: Left = []
    for word in words:
        of_word = [place for place in found if _is_in(place.anchor, word)]
        if not of_word:
            is_logits = any(_is_in(place.anchor, word) for place in with_logits)
            raise SurgeryError(_no_place(traced, found, word, wish, is_logits))
        of_word, beside = _without_norms(of_word)
        if not of_word:
            raise SurgeryError(
                f"where='{word}': every place there has a norm already ({_reasons(beside)}); "
                "leave it out"
            )
        free += of_word
        left += beside
    if not free:
        raise SurgeryError("where= is empty; name a place, or leave it out for all")
    return [place for place in found if place in free], list(dict.fromkeys(left))


def _is_in(node: fx.Node, word: str) -> bool:
    """True if the node is what the word names, or is called inside of the module of that name."""
    around = [str(path) for path in node.meta.get("nn_module_stack", {})]
    return any(
        name == word or name.startswith(f"{word}.") for name in (name_of(node), node.name, *around)
    )


def _no_place(
    traced: fx.GraphModule, found: list[Place], word: str, wish: str, is_logits: bool
) -> str:
    kind = type(traced).__name__
    if is_logits:
        return (
            f"where='{word}': '{word}' gives the logits of {kind}, which have no norm unless "
            f"logits=True; places for {wish} are {_anchors(found)}"
        )
    names = [name_of(node) for node in traced.graph.nodes if node.op != "output"]
    if any(_is_in(node, word) for node in traced.graph.nodes if node.op != "output"):
        close = meant(word, [name_of(p.anchor) for p in found])
        return f"where='{word}': '{word}' of {kind} is no place{close} for {wish}; places are " + (
            _anchors(found)
        )
    return (
        f"where='{word}': {kind} has no module and no node '{word}'{meant(word, names)}; places "
        f"for {wish} are {_anchors(found)}"
    )


def _reasons(left: Left) -> str:
    return "; ".join(f"'{name}': {reason}" for name, reason in left[:3])


def _anchors(found: list[Place]) -> str:
    names = [name_of(place.anchor) for place in found]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
