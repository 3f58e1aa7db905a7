"""A network as a graph: what its layers, activations, poolings and norms are, and their shapes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import operator
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils import _pytree as pytree

from ..errors import SurgeryError, first_line
from ..nn import Norm
from ..nn.folded import BORDERED, ScaleShift
from ..nn.packed import Packed
from .examples import arguments, cloned

__all__ = [
    "ACTIVATIONS",
    "LAYERS",
    "NORMS",
    "POOLINGS",
    "add_module",
    "copied",
    "inputs_of",
    "is_activation",
    "is_layer",
    "is_norm",
    "is_pooling",
    "module_of",
    "name_of",
    "overwrites",
    "rank_expected",
    "shape_of",
    "trace",
]

M = TypeVar("M", bound=nn.Module)

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, Norm)

_LAYER_NAMES = {
    "linear", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip
_NORM_NAMES = {"batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"}
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
    nn.Softplus, nn.Softsign, nn.LogSigmoid,
)  # fmt: skip
_ACTIVATION_NAMES = {
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "elu", "elu_", "selu", "selu_",
    "celu", "celu_", "gelu", "silu", "mish", "sigmoid", "sigmoid_", "tanh", "tanh_", "hardswish",
    "hardsigmoid", "hardtanh", "hardtanh_", "softplus", "softsign", "log_sigmoid", "rrelu",
    "rrelu_",
}  # fmt: skip
POOLINGS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)
_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


_IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor,
    operator.ilshift, operator.irshift, operator.iconcat, operator.setitem,
}  # fmt: skip


class _Tracer(fx.Tracer):
    """fx's tracer with every norm as a leaf, subclasses of torch's and what folding leaves too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_ours = isinstance(m, (*NORMS, ScaleShift, *BORDERED.values()))
        return is_ours or super().is_leaf_module(m, module_qualified_name)


def copied(model: M) -> M:
    """A deep copy, for every edit is made on one.

    Raises:
        SurgeryError: the model holds something that cannot be copied.
    """
    try:
        own = copy.deepcopy(model)
    except Exception as error:
        raise SurgeryError(
            f"{type(model).__name__} cannot be copied, so it is not edited: {first_line(error)}"
        ) from error
    packed = any(isinstance(module, Packed) for module in own.modules())
    if packed and isinstance(own, fx.GraphModule):
        from .folding.packing import unpack  # which imports this file

        unpack(own)
    return own


def inputs_of(traced: fx.GraphModule, example: Any) -> tuple[Any, ...]:
    """The inputs in the order in which the graph takes them.

    Args:
        traced: the graph.
        example: an input, a tuple of inputs or a dict of inputs by name.

    Raises:
        SurgeryError: a name is that of no input.
    """
    if not isinstance(example, Mapping):
        return arguments(example)[0]
    names = [str(node.target) for node in traced.graph.nodes if node.op == "placeholder"]
    unknown = sorted(set(example) - set(names))
    given = [name for name in names if name in example]
    if unknown or given != names[: len(given)]:
        raise SurgeryError(
            f"the example has {', '.join(map(str, example))}, but the network takes "
            f"{', '.join(names)}; give the first ones by these names"
        )
    return tuple(example[name] for name in given)


def trace(model: nn.Module, example: Any, *, inference: bool = False) -> fx.GraphModule:
    """A traced deep copy of the model, every node with its output's shape for the example.

    The graph serves training and inference: a functional dropout that asks for ``self.training``
    becomes a module, for torch.fx writes the flag into the graph as it finds it.

    Args:
        model: the network.
        example: an input batch, a tuple of inputs or a dict of inputs by name.
        inference: the graph need not train, so what the network does in training is nobody's
            concern.

    Raises:
        SurgeryError: the model cannot be copied or traced by torch.fx, or not rightly; does
            something else in training than in inference outside of its modules; or cannot run the
            example.
    """
    kind = type(model).__name__
    modes = {name: module.training for name, module in model.named_modules()}
    traced = _in_inference(model, kind) if inference else _traced(copied(model).eval(), kind)
    if not inference:
        _serve_both_modes(traced, _traced(copied(model).train(), kind), kind)
    traced.eval()
    own = copied(model).eval()
    inputs = inputs_of(traced, example)
    try:
        quiet = contextlib.redirect_stderr(io.StringIO())  # ShapeProp prints what it also raises
        with torch.no_grad(), torch.random.fork_rng(()), quiet:
            found, wanted = (_run(run, inputs) for run in (ShapeProp(traced).propagate, own))
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in inputs if isinstance(t, Tensor))
        raise SurgeryError(
            f"{kind} cannot run an input of shape {shapes}: {first_line(error)}"
        ) from error
    if not all(map(_alike, *map(pytree.tree_leaves, (found, wanted)))):
        raise SurgeryError(
            f"what torch.fx sees of {kind} does something else than {kind}; the usual cause is a "
            "value that is written over in place under another name (v = x; v += y)"
        )
    for name, module in traced.named_modules():
        module.training = modes.get(name, modes[""])
    return traced


def _run(network: Any, inputs: tuple[Any, ...]) -> Any:
    """On copies, for some networks write over their inputs, and with the same random numbers."""
    torch.manual_seed(0)
    return network(*cloned(inputs))


def _alike(a: Any, b: Any) -> bool:
    """True if equal but for the little that the same operations may round differently."""
    if not isinstance(a, Tensor) or not a.is_floating_point() or a.numel() == 0:
        return True
    allowed = 64 * torch.finfo(a.dtype).eps * float(b.detach().abs().nan_to_num().max())
    return torch.allclose(a.double(), b.double(), 0.0, allowed, equal_nan=True)


class _Follower(_Tracer):
    """Goes into the forward of a batch norm's subclass, which may do more than its base."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) and not _is_odd(m)


def _is_odd(module: nn.Module) -> bool:
    own = type(module).__module__.partition(".")[0] in ("torch", "evenkeel")
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and not own


def _in_inference(model: nn.Module, kind: str) -> fx.GraphModule:
    """The graph in eval mode, subclasses of batch norm as what they do if that can be traced."""
    own = copied(model).eval()
    odd = [module for module in own.modules() if _is_odd(module)]
    for module in odd:  # its check of the rank would ask a stand-in
        vars(module)["_check_input_dim"] = lambda input: None
    try:
        return _traced(own, kind, _Follower())
    except SurgeryError:
        if not odd:
            raise
        return _traced(copied(model).eval(), kind)
    finally:
        for module in odd:
            del vars(module)["_check_input_dim"]


def _traced(own: nn.Module, kind: str, tracer: _Tracer | None = None) -> fx.GraphModule:
    """The model with its graph in the mode that it is in."""
    try:
        graph = (tracer or _Tracer()).trace(own)
        for node in graph.nodes:
            if isinstance(node.type, str):  # an annotation unread, with which nothing pickles
                node.type = None
        return fx.GraphModule(own, graph, kind)
    except Exception as error:
        raise SurgeryError(
            f"{kind} cannot be traced by torch.fx ({first_line(error)}); rewrite "
            "the control flow that depends on tensor values, or move it into a module of torch.nn"
        ) from error


def _serve_both_modes(traced: fx.GraphModule, training: fx.GraphModule, kind: str) -> None:
    """Makes the graph of inference right for training too, by the graph of training."""
    pairs = zip(traced.graph.nodes, training.graph.nodes, strict=False)
    for node, other in [(a, b) for a, b in pairs if not _same(a, b)]:
        dropout = _DROPOUTS.get(node.target)
        if dropout is None or not _same(node, other, training=None):
            raise SurgeryError(
                f"{kind} does something else in training than in inference, or at every call "
                f"(first at '{other.name}'), and a traced network has one forward; move what asks "
                "for self.training or draws numbers into a module of torch.nn, such as nn.Dropout"
            )
        settings = {key: value for key, value in node.kwargs.items() if key != "training"}
        with traced.graph.inserting_before(node):
            name = add_module(traced, node.name, dropout(**settings))
            node.replace_all_uses_with(traced.graph.call_module(name, node.args))
        traced.graph.erase_node(node)
    traced.recompile()


def _same(a: fx.Node, b: fx.Node, **changes: None) -> bool:
    """True if two nodes of two graphs do the same, some arguments changed in both."""
    first, second = (f"{n.op} {n.target} {n.args} {n.kwargs | changes}" for n in (a, b))
    if first == second and a.op == "get_attr":
        values = [operator.attrgetter(str(n.target))(n.graph.owning_module) for n in (a, b)]
        return not isinstance(values[0], Tensor) or torch.equal(values[0], values[1])
    return first == second


def add_module(traced: fx.GraphModule, base: str, module: nn.Module) -> str:
    """Adds the module under the base name, or the base name and a number; returns which."""
    name, taken = base, {name for name, _ in traced.named_modules(remove_duplicate=False)}
    for number in range(2, len(taken) + 3):
        if name not in taken:
            break
        name = f"{base}{number}"
    traced.add_submodule(name, module)
    return name


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's output."""
    meta = node.meta.get("tensor_meta")
    if meta is None or not hasattr(meta, "shape"):
        raise SurgeryError(f"'{node.name}' gives no single tensor, so no norm can follow it")
    return tuple(meta.shape)


def module_of(node: fx.Node) -> nn.Module | None:
    """The module that the node calls, or None."""
    if node.op != "call_module":
        return None
    owner = node.graph.owning_module
    return None if owner is None else owner.get_submodule(str(node.target))


def is_layer(node: fx.Node) -> bool:
    """A convolution, transposed or not, or a dense layer: a module or a function."""
    return isinstance(module_of(node), LAYERS) or _called(node) in _LAYER_NAMES


def rank_expected(node: fx.Node) -> int:
    """How many axes the output of a layer has if its input is a batch with channels second."""
    module = module_of(node)
    if isinstance(module, nn.modules.conv._ConvNd):
        return 2 + len(module.kernel_size)
    digits = [int(letter) for letter in _called(node) if letter.isdigit()]
    return 2 + sum(digits)


def is_norm(node: fx.Node) -> bool:
    """Any normalization, ours or torch's: a module or a function."""
    return isinstance(module_of(node), NORMS) or _called(node) in _NORM_NAMES


def is_activation(node: fx.Node) -> bool:
    """A non-linearity: a module, a function or a method."""
    return isinstance(module_of(node), ACTIVATIONS) or _called(node) in _ACTIVATION_NAMES


def is_pooling(node: fx.Node) -> bool:
    """A pooling: a module or a function."""
    return isinstance(module_of(node), POOLINGS) or "_pool" in _called(node)


def overwrites(node: fx.Node) -> bool:
    """True if the node works in place: ``nn.ReLU(inplace=True)``, ``F.relu_(x)``, ``x += y``."""
    if node.kwargs.get("inplace") or getattr(module_of(node), "inplace", False):
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    name = _called(node)
    in_place = node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    given = dict(zip(_parameters(node.target), node.args, strict=False))
    return in_place or "out" in node.kwargs or bool(given.get("inplace"))


@lru_cache(maxsize=1024)
def _parameters(function: Any) -> tuple[str, ...]:
    """The names of a function's parameters; none of a method's or a builtin's."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def name_of(node: fx.Node) -> str:
    """What to call a node in a report: the module's name, or the node's own."""
    return str(node.target) if node.op == "call_module" else node.name


def _called(node: fx.Node) -> str:
    """The bare name of the function or method that the node calls."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", ""))
    return ""
