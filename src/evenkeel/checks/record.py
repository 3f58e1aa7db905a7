"""A run of a network, written down as a torch.fx graph; or a trace where there is nothing to run.

A recorded run needs no tracing: it shows what any network did, whichever way its forward went, and
with what. Norms, layers, activations, poolings and dropouts are nodes of their own, and so is every
function of torch's outside of them.
"""

from __future__ import annotations

import inspect
import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..surgery.examples import call, tensors_in
from .facts import is_norm_module
from .walk import is_layer_module

__all__ = ["NormInput", "recorded", "traced"]

NormInput = Callable[[str, Tensor], Any]
"""Called with a norm's path and its input; what it gives is kept as the node's ``meta['seen']``."""

_READS = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "equal"}
_CHANGES = {"__setitem__", "copy_"}


def recorded(model: nn.Module, example: Any, seen: NormInput) -> tuple[fx.Graph, Any]:
    """The graph of one run of the model, and its output.

    Nodes have ``meta``: 'place' (the path of the module around), 'shape' of the output, 'input'
    (the shape of the first input), 'training', and for norms 'checkpointed' and 'seen'. The graph
    tells what was called and what went where; it cannot be run.

    Raises:
        whatever the model raises; the graph so far is then in the exception's ``graph``.
    """
    recorder = _Recorder(model, seen)
    try:
        with recorder.watching(), recorder:
            recorder.given(example)
            output = call(model, example)
    except Exception as error:
        error.graph = recorder.graph  # type: ignore[attr-defined]
        raise
    recorder.result(output)
    return recorder.graph, output


def traced(model: nn.Module) -> fx.Graph:
    """The graph of the model in the mode that it is in, without shapes.

    Raises:
        whatever torch.fx raises where it cannot trace.
    """
    graph = _Tracer().trace(model)
    owners = _owners(model)
    graph.owning_module = model  # type: ignore[assignment]
    for node in graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}))
        node.meta["place"] = stack[-1] if stack else ""
        if node.op == "call_module":
            node.meta["training"] = model.get_submodule(str(node.target)).training
            node.meta["place"] = str(node.target)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _held(model, n))
            _describe(node, node.target, args, kwargs)
            for value in node.all_input_nodes:
                held = owners["names"].get(str(value.target)) if value.op == "get_attr" else None
                if held is not None and node.target is F.batch_norm:
                    node.meta["path"] = held
    return graph


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


class _Recorder(TorchFunctionMode):
    """Writes down calls of modules by hooks, and of functions as a mode of torch."""

    def __init__(self, model: nn.Module, seen: NormInput) -> None:
        super().__init__()
        self.graph = fx.Graph(model)  # type: ignore[arg-type]
        self._model, self._seen = model, seen
        self._paths = {module: path for path, module in model.named_modules()}
        self._owners = _owners(model)["ids"]
        self._made: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self._stack: list[tuple[nn.Module, bool]] = []
        self._meta: list[dict[str, Any]] = []
        self._is_measuring = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not (self._is_inside or self._is_measuring):
            self._note(func, args, kwargs or {}, result)
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on all modules, for the time of a run."""
        hooks = []
        try:
            for module in self._paths:
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                hooks.append(
                    module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
                )
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def given(self, example: Any) -> None:
        """The network's inputs."""
        for place, value in enumerate(tensors_in(example)):
            self._make(self.graph.placeholder(f"input_{place}"), [value])

    def result(self, output: Any) -> None:
        """The network's outputs."""
        self.graph.output(tuple(self._nodes(output)))

    @property
    def _is_inside(self) -> bool:
        return bool(self._stack) and self._stack[-1][1]

    @property
    def _place(self) -> str:
        return self._paths[self._stack[-1][0]] if self._stack else ""

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        inside = self._is_inside
        meta: dict[str, Any] = {}
        if not inside:
            meta["nodes"] = self._nodes((args, kwargs))
            meta["input"], meta["training"] = _shape((args, kwargs)), module.training
            if is_norm_module(module):
                meta |= self._norm_call(self._paths[module], module.training, (args, kwargs))
        self._meta.append(meta)
        self._stack.append((module, inside or _is_leaf(module)))

    def _norm_call(self, path: str, training: bool, given: Any) -> dict[str, Any]:
        x = next(iter(tensors_in(given)), None)
        self._is_measuring = True
        try:
            seen = None if x is None else self._seen(path, x)
        finally:
            self._is_measuring = False
        return {"training": training, "checkpointed": _is_in_checkpoint(), "seen": seen}

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._stack.pop()
        meta = self._meta.pop()
        if self._is_inside or "nodes" not in meta:
            return
        path, inputs = self._paths[module], meta.pop("nodes")
        outputs = tensors_in(output)
        # What some code inside gave that no function of torch's showed is the module's own doing.
        unknown = [t for t in outputs if self._node(t) is None]
        if _is_leaf(module) or (unknown and inputs):
            node = self.graph.create_node(
                "call_module", path, tuple(inputs), name=None if path else "network"
            )
            node.meta |= meta | {"place": path}
            self._make(node, outputs if _is_leaf(module) else unknown)

    def _note(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        name = getattr(func, "__name__", "")
        outputs = tensors_in(result)
        if name in _CHANGES and args and isinstance(args[0], Tensor):
            outputs = [args[0]]
        inputs = self._nodes((args, kwargs))
        if not inputs or not (outputs or name in _READS):
            return
        path = self._owner(args, kwargs) if func is F.batch_norm else None
        if path is not None:
            node = self.graph.create_node("call_module", path, tuple(inputs))
            node.meta["place"] = path
        else:
            node = self.graph.create_node("call_function", func, tuple(inputs))
            node.meta["place"] = self._place
        node.meta["input"] = _shape((args, kwargs))
        _describe(node, func, args, kwargs)
        if func is F.batch_norm:
            x = kwargs["input"] if "input" in kwargs else args[0]
            training = bool(node.meta.get("training", False))
            node.meta |= self._norm_call(path or "", training, x)
        self._make(node, outputs)

    def _owner(self, args: Any, kwargs: Mapping[str, Any]) -> str | None:
        """The norm whose statistics or weights a function was given."""
        given = tensors_in((args, kwargs))
        return next((self._owners[id(t)] for t in given if id(t) in self._owners), None)

    def _make(self, node: fx.Node, outputs: list[Tensor]) -> None:
        if outputs:
            node.meta["shape"] = tuple(outputs[0].shape)
        for value in outputs:
            self._made[id(value)] = (weakref.ref(value), node)

    def _node(self, value: Tensor) -> fx.Node | None:
        known = self._made.get(id(value))
        return known[1] if known is not None and known[0]() is value else None

    def _nodes(self, values: Any) -> list[fx.Node]:
        """What made the tensors in the values, each once."""
        found = map(self._node, tensors_in(values))
        return list(dict.fromkeys(node for node in found if node is not None))


def _is_leaf(module: nn.Module) -> bool:
    """Norms, layers and the like, of torch's or the user's; and all of torch's without children."""
    if is_norm_module(module):
        return True
    if is_layer_module(module):
        return not any(is_norm_module(inner) for inner in module.modules())
    is_torchs = type(module).__module__.startswith("torch.nn.")
    return is_torchs and not module._modules and not isinstance(module, nn.Sequential)


def _shape(values: Any) -> tuple[int, ...] | None:
    """The shape of the first tensor."""
    return next((tuple(t.shape) for t in tensors_in(values)), None)


def _owners(model: nn.Module) -> dict[str, dict[Any, str]]:
    """The norm that each buffer and weight of norms belongs to: by identity and by name."""
    ids: dict[Any, str] = {}
    names: dict[Any, str] = {}
    for path, module in model.named_modules():
        if is_norm_module(module):
            held = [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]
            for name, value in held:
                ids[id(value)] = path
                names[f"{path}.{name}" if path else name] = path
    return {"ids": ids, "names": names}


def _describe(node: fx.Node, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Keeps the settings of a function that rules ask for."""
    name = getattr(func, "__name__", "")
    if name.startswith(("conv", "linear")):
        bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
        node.meta["bias"] = bias if isinstance(bias, Tensor) else None
    elif func is F.batch_norm or "dropout" in name:
        try:
            bound = inspect.signature(func).bind(*args, **kwargs)
        except (TypeError, ValueError):
            return
        bound.apply_defaults()
        for key in ("p", "training"):
            value = bound.arguments.get(key)
            if isinstance(value, bool | int | float):
                node.meta[key] = value


def _held(model: nn.Module, node: fx.Node) -> Any:
    """The tensor that a node reads from the model, or the node."""
    return operator.attrgetter(str(node.target))(model) if node.op == "get_attr" else node


def _is_in_checkpoint() -> bool:
    """True if torch.utils.checkpoint is running the code that asks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.replace("\\", "/").endswith("torch/utils/checkpoint.py"):
            return True
        frame = frame.f_back
    return False
