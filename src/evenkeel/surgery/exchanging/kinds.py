"""What kind of batch norm a module is, how many axes its input has, and why it is left alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Norm, PerActivationBatchNorm
from ..accelerating.blocks import Blocks
from ..batch_norms import Where, batch_norms
from ..freeze import is_frozen
from ..graph import ACTIVATIONS, POOLINGS, copied, is_activation

__all__ = [
    "OURS",
    "TORCHS",
    "WAS_KIND",
    "Seen",
    "base_of",
    "candidates",
    "channels_of",
    "computes_a_norm",
    "is_bare_frozen",
    "is_spatial",
    "kind_of",
    "name_of_kind",
    "problem_of",
]

TORCHS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
OURS: dict[int, type[nn.Module]] = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}
WAS_KIND = "_kind_before_exchange"
"""The attribute of a SyncBatchNorm that holds the class that it was, and that class's settings."""

_DIMS: dict[Any, int] = {kind: n for table in (TORCHS, OURS) for n, kind in table.items()}
_ANY = nn.modules.batchnorm._BatchNorm
_KNOWN = {*_DIMS, _ANY, nn.SyncBatchNorm, Norm, PerActivationBatchNorm}
_RANKS = {2: 1, 3: 1, 4: 2, 5: 3}
_PARAMETERS = {"weight", "bias"}
_BUFFERS = {"running_mean", "running_var", "num_batches_tracked"}
_HARMLESS = {
    "__module__", "__qualname__", "__doc__", "__init__", "__annotations__", "__annotate__",
    "__annotate_func__", "__annotations_cache__", "__constants__", "__parameters__",
    "__firstlineno__", "__static_attributes__", "__orig_bases__", "__dict__", "__weakref__",
    "_check_input_dim",
}  # fmt: skip
_KEEPS_RANK = (nn.Identity, nn.Linear, nn.modules.dropout._DropoutNd, _ANY, *ACTIVATIONS)


def candidates(
    model: nn.Module, where: Where
) -> tuple[list[tuple[str, Any]], list[tuple[str, str]]]:
    """The batch norms by path in the network's order, and others with the reason.

    These are those of `batch_norms`, those without running statistics, and frozen ones of other
    libraries, whose weight and bias are buffers.

    Raises:
        SurgeryError: ``where`` names what has no norm.
    """
    norms, others = batch_norms(model, where)
    inside = dict(model.named_modules())
    left: list[tuple[str, str]] = []
    for title, reason in others:
        norm: Any = inside.get(title, model)
        forgets = isinstance(norm, _ANY | Norm) and getattr(norm, "running_mean", 0) is None
        lazy = isinstance(norm, nn.modules.lazy.LazyModuleMixin)
        if is_bare_frozen(norm) and not computes_a_norm(norm):
            reason = f"it is a {type(norm).__name__}, which computes something else than a norm"
        elif is_bare_frozen(norm) or (forgets and not lazy):
            norms["" if norm is model else title] = norm
            continue
        left.append((title, reason))
    places = list(inside)
    return sorted(norms.items(), key=lambda item: places.index(item[0])), left


def kind_of(norm: nn.Module) -> type[nn.Module]:
    """The class, that before freezing if the norm is frozen."""
    return norm.thawed if is_frozen(norm) else type(norm)  # type: ignore[return-value]


def base_of(kind: Any) -> Any:
    """The known class that a class does the same as, or None if it may do more.

    A subclass with its own ``__init__`` does the same; one with its own ``_check_input_dim`` too,
    but takes inputs of any rank.
    """
    any_rank = False
    for step in kind.__mro__:
        if step in _KNOWN:
            return _ANY if any_rank and step in _DIMS else step
        if set(vars(step)) - _HARMLESS:
            return None
        any_rank = any_rank or "_check_input_dim" in vars(step)
    return None


def is_bare_frozen(module: Any) -> bool:
    """True for a frozen norm as torchvision and detectron2 have it: all four are buffers."""
    is_script = hasattr(module, "original_name")  # TorchScript's word for a class
    if is_script or isinstance(module, _ANY | Norm) or module._parameters or module._modules:
        return False
    buffers = dict(module._buffers)
    if set(buffers) - _BUFFERS != _PARAMETERS or hasattr(module, "momentum"):
        return False
    four = [buffers.get(n) for n in ("running_mean", "running_var", "weight", "bias")]
    vectors = [t for t in four if isinstance(t, Tensor) and t.dim() == 1]
    if len(vectors) < 4 or not isinstance(getattr(module, "eps", None), float):
        return False
    return len({len(t) for t in vectors}) == 1


def computes_a_norm(module: Any) -> bool:
    """True if it does with its buffers what a batch norm does, tried on numbers."""
    own = copied(module).double().eval()
    generator = torch.Generator().manual_seed(0)
    for places in ((3, 3), (3,), (2, 3, 3)):
        x = torch.randn(2, len(own.weight), *places, generator=generator, dtype=torch.float64)
        x = x.to(own.weight.device)
        try:
            with torch.no_grad():
                y = own(x)
        except Exception:  # noqa: S112 - it takes another rank
            continue
        state = (own.weight, own.bias, own.running_mean, own.running_var)
        # Not F's: torch 2.11 refuses there the epsilon 0 of torchvision's detectors.
        wanted = torch.batch_norm(x, *state, False, 0.0, own.eps, False)
        apart = (y - wanted).abs().max()
        return bool(y.shape == x.shape and apart <= 1e-6 * wanted.abs().max())
    return False


def problem_of(norm: Any) -> str | None:
    """Why a norm that is not frozen cannot become another, or None."""
    if hasattr(norm, "parametrizations"):
        return "it has parametrizations, which are a class of their own"
    if "forward" in vars(norm):
        return "its forward was replaced on the object"
    if is_bare_frozen(norm):
        return None
    kind = kind_of(norm)
    base = base_of(kind)
    if base is None:
        near = next((k for k in kind.__mro__ if k in _KNOWN), _ANY)
        return f"it is a {kind.__name__}, which may do more than {name_of_kind(near)}"
    if getattr(norm, "activation", None) is not None:
        return f"it also does {norm.activation!r}, which would be lost"
    held = {*norm._parameters, *norm._buffers, *norm._modules} - _PARAMETERS - _BUFFERS
    return f"it also holds '{min(held)}', which would be lost" if held else None


def is_spatial(norm: Any) -> bool:
    """True if there is one statistic, one gamma and one beta for each channel."""
    if not isinstance(norm, Norm):
        return True
    spec = norm.spec
    channel = spec.axes[1:2]
    is_name = len(channel) == 1 and len(channel[0]) == 1 and channel[0] != ("...",)
    return is_name and spec.owners == channel and spec.affine in (None, channel)


def channels_of(norm: Any) -> int:
    """How many channels a spatial norm has."""
    if isinstance(norm, Norm):
        return int(norm.sizes[norm.spec.owners[0][0]])
    return int(norm.weight.shape[0] if is_bare_frozen(norm) else norm.num_features)


def name_of_kind(kind: Any) -> str:
    """A class as users write it."""
    name = str(kind.__name__)
    if kind in OURS.values() or kind in (Norm, PerActivationBatchNorm):
        return f"evenkeel.{name}"
    return f"torch.nn.{name}" if getattr(nn, name, None) is kind else name


@dataclass
class Seen:
    """What is known of the inputs of norms: from the example, or from the layers around them.

    Attributes:
        model: the network; it is copied when its forwards are read.
        shapes: the shapes that each norm was given, by its path; None without an example.
    """

    model: nn.Module
    shapes: Mapping[str, set[tuple[int, ...]]] | None = None
    _blocks: Blocks | None = field(default=None, repr=False)

    def shapes_of(self, path: str) -> set[tuple[int, ...]]:
        """The shapes that the example brings to a norm."""
        return set() if self.shapes is None else self.shapes.get(path, set())

    def fewest_places(self, path: str, norm: Any) -> tuple[int | None, str]:
        """How many places the norm's smallest input has, None if not known, and a text for it."""
        shapes = self.shapes_of(path)
        if shapes:
            smallest = min(sorted(shapes), key=lambda shape: math.prod(shape[2:]))
            return math.prod(smallest[2:]), f"on {smallest}"
        return (1, "on (n, c)") if self.rank(path, norm) == 2 else (None, "")

    def ties(self, norm: nn.Module) -> bool:
        """True if a parameter of the norm is another module's too."""
        own = {id(parameter) for parameter in norm.parameters()}
        held = [id(p) for m in self.model.modules() for p in m._parameters.values()]
        return any(held.count(which) > 1 for which in own)

    def rank(self, path: str, norm: Any) -> int | str:
        """How many axes the norm's input has, or why that is not known."""
        ranks = {len(shape) for shape in self.shapes_of(path)}
        if len(ranks) > 1:
            text = " and ".join(map(str, sorted(ranks)))
            return f"the example brings it inputs of {text} dimensions"
        if ranks:
            return ranks.pop()
        dims = _own_dims(norm)
        if dims in (2, 3):
            return dims + 2
        around = self._around(path)
        if len(around) == 1:
            return around.pop()
        if len(around) > 1:
            return "the layers around it take inputs of different ranks"
        why = "has no example" if self.shapes is None else "does not reach it with its example"
        return (
            f"the rank of its input is not known: evenkeel {why}, and no layer around it tells; "
            "give an example that reaches it"
        )

    def dims(self, path: str, norm: Any) -> int | str:
        """1, 2 or 3 as in BatchNorm1d, 2d, 3d, or why that is not known."""
        own = _DIMS.get(base_of(kind_of(norm)))
        if own is not None:
            return own
        was = _own_dims(norm)
        if was is not None and not self.shapes_of(path):
            return was
        rank = self.rank(path, norm)
        if isinstance(rank, str):
            return rank
        return _RANKS.get(rank, f"torch has no batch norm for inputs of {rank} dimensions")

    def _around(self, path: str) -> set[int]:
        """The ranks that the layers next to the norm speak for."""
        if self._blocks is None:
            self._blocks = Blocks(copied(self.model))
        blocks = self._blocks
        norm = blocks.model.get_submodule(path)
        found: set[int] = set()
        for block, node in blocks.calls_of(norm):
            todo, done = [node], {node}
            while todo:
                for other, is_before in _next_to(todo.pop()):
                    if other in done:
                        continue
                    done.add(other)
                    module = blocks.called(block, other)
                    rank = 2 if is_before and _flattens(other, module) else _rank_at(module)
                    if rank is not None:
                        found.add(rank)
                    elif _keeps_rank(other, module):
                        todo.append(other)
        return found


def _own_dims(norm: Any) -> int | None:
    """What the norm itself says: its class, the class that it was, its pattern, its name."""
    kind = vars(norm).get(WAS_KIND, (kind_of(norm), {}))[0]
    dims = _DIMS.get(base_of(kind))
    if dims is not None:
        return dims
    if isinstance(norm, Norm):
        axes = norm.spec.axes
        return None if ("...",) in axes else _RANKS.get(len(axes))
    named = re.search(r"([123])d$", kind.__name__) if is_bare_frozen(norm) else None
    return int(named[1]) if named else None


def _next_to(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """What feeds a node by its first argument alone, True, and what it feeds so, False."""
    yield from ((other, True) for other in node.all_input_nodes[:1])
    yield from ((user, False) for user in node.users if user.all_input_nodes[:1] == [node])


def _rank_at(module: Any) -> int | None:
    """The rank of the batches that a layer takes and gives, where its class says it."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return 2 + len(module.kernel_size)
    if isinstance(module, POOLINGS):
        named = re.search(r"([123])d$", type(module).__name__)
        return 2 + int(named[1]) if named else None
    dims = _DIMS.get(base_of(kind_of(module))) if isinstance(module, _ANY) else None
    return None if dims is None or dims == 1 else 2 + dims


def _flattens(node: fx.Node, module: Any) -> bool:
    """True if the node makes (n, ...) one vector for each sample."""
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    is_flatten = node.target is torch.flatten or (node.op, node.target) == (
        "call_method",
        "flatten",
    )
    return is_flatten and (node.args[1:] == (1,) or node.kwargs == {"start_dim": 1})


def _keeps_rank(node: fx.Node, module: Any) -> bool:
    return isinstance(module, _KEEPS_RANK) or (module is None and is_activation(node))
