"""A traced network whose packed convolutions are looked at once per call, and not each by itself.

On a small image a convolution takes 0.1 ms, of which checks and calls in Python are a fifth. Here
the first call of an input's shape goes the ordinary way; then the network's code is written once
more with each packed convolution as the function that it was computed by. That is run from then on,
where nobody follows what is done, until a weight, a setting, a module or the shape is another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.nn.modules.module import _has_any_global_hook

from ..direct import PLAIN
from .packed import Packed, is_open
from .ways import RunWith, Way

__all__ = ["PlannedGraph", "as_kind"]


class _Forward(NamedTuple):
    """The graph's forward with functions for packed convolutions."""

    code: CodeType
    names: dict[str, Any]
    """The forward's globals."""
    functions: dict[str, str]
    """Path of a convolution to the name of its function among them."""


class _Link(NamedTuple):
    """A module where the graph looks it up."""

    siblings: dict[str, nn.Module | None]
    name: str
    module: nn.Module | None


class _Plan:
    """How inputs of given shapes are computed. It does not travel with copies and pickles."""

    def __init__(self, graph: nn.Module, forward: _Forward, args: tuple[Tensor, ...]) -> None:
        self.forward = forward
        self.inputs = [(x.shape, x.dtype) for x in args]
        self.links: dict[str, _Link] = {}
        self.bound: list[tuple[Packed, Way]] = []
        functions = {}
        for path, name in forward.functions.items():
            conv = self._linked(graph, path)
            way = conv._way if isinstance(conv, Packed) else None
            if way is not None and conv.is_current(way):
                self.bound.append((conv, way))
                functions[name] = _guarded(conv, way)
            else:
                functions[name] = conv  # which does what it did in the call before
        probed = [way for _, way in self.bound if way.probe is not None]
        # numpy puts them together in a fifth of torch's time
        self.probes: Any = [np.asarray(way.probe) for way in probed]
        self.values = b"".join(np.asarray(way.values).tobytes() for way in probed)
        self.run = FunctionType(forward.code, {**forward.names, **functions})

    def applies(self, args: tuple[Any, ...]) -> bool:
        return (
            [(x.shape, x.dtype) for x in args] == self.inputs
            and all(link.siblings.get(link.name) is link.module for link in self.links.values())
            and all(_is_as_it_was(conv, way) for conv, way in self.bound)
            and (not self.probes or np.concatenate(self.probes).tobytes() == self.values)
        )

    def _linked(self, graph: nn.Module, path: str) -> Any:
        """The module, noted with all that it is in."""
        module: Any = graph
        names = path.split(".")
        for depth, name in enumerate(names, 1):
            link = _Link(module._modules, name, module._modules.get(name))
            self.links[".".join(names[:depth])] = link
            module = link.module
        return module

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class PlannedGraph(fx.GraphModule):
    """A `torch.fx.GraphModule` that is called by a plan; made by `as_kind`."""

    _plan: _Plan | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not self._may_plan(args):
            return super().__call__(*args, **kwargs)
        plan = self._plan
        if plan is not None and plan.applies(args):
            return plan.run(self, *args)
        y = super().__call__(*args)
        self._plan = self._planned(args, plan)
        return y

    def recompile(self) -> Any:
        self._plan = None  # the graph may be another
        return super().recompile()

    def __reduce__(self) -> tuple[Any, ...]:
        return _read, super().__reduce__()

    def _may_plan(self, args: tuple[Any, ...]) -> bool:
        """True if every input is a tensor on the CPU, and no gradient or operation recorded."""
        return (
            not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and bool(args)
            and all(type(x) in PLAIN for x in args)
            and is_open(args[0])
            and all(x.is_cpu and x.layout is torch.strided for x in args)
            and "forward" not in self.__dict__
            and self._compiled_call_impl is None
            and not (self._forward_hooks or self._forward_pre_hooks or _has_any_global_hook())  # type: ignore[no-untyped-call]
        )

    def _planned(self, args: tuple[Tensor, ...], old: _Plan | None) -> _Plan | None:
        forward = _written(self) if old is None else old.forward
        return None if forward is None else _Plan(self, forward, args)


def as_kind(graph: fx.GraphModule, kind: type[fx.GraphModule]) -> None:
    """Makes the graph one of that class, in place: `PlannedGraph` or `torch.fx.GraphModule`."""

    class GraphModuleImpl(kind):  # type: ignore[misc, valid-type]
        """Each graph has a class of its own, as torch makes it, for its code is the class's."""

    GraphModuleImpl.__name__ = type(graph).__name__
    graph.__dict__.pop("_plan", None)
    graph.__class__ = GraphModuleImpl
    graph.recompile()


def _read(function: Callable[..., fx.GraphModule], given: tuple[Any, ...]) -> fx.GraphModule:
    """Unpickles."""
    graph = function(*given)
    as_kind(graph, PlannedGraph)
    return graph


def _written(graph: fx.GraphModule) -> _Forward | None:
    """The graph's code with functions for packed convolutions; None if it cannot be written."""
    if type(graph.graph._codegen) is not CodeGen:
        return None  # inputs and outputs are taken apart by more than the code
    own = copy.deepcopy(graph.graph)
    stands: dict[Any, str] = {}
    for node in list(own.nodes):
        is_call = node.op == "call_module"
        if is_call and isinstance(graph.get_submodule(str(node.target)), Packed):
            stand = _stand_in(f"packed_{len(stands)}")
            stands[stand] = str(node.target)
            with own.inserting_after(node):
                new = own.call_function(stand, (*node.args, *node.kwargs.values()))
            node.replace_all_uses_with(new)
            own.erase_node(node)
    if not stands:
        return None
    forward: Any = type(fx.GraphModule(graph, own)).forward
    known = {id(value): name for name, value in forward.__globals__.items()}
    functions = {path: known[id(stand)] for stand, path in stands.items()}
    return _Forward(forward.__code__, forward.__globals__, functions)


def _stand_in(name: str) -> Callable[[], None]:
    """A function of that name, to be found again among the globals of generated code."""

    def function() -> None:
        raise NotImplementedError(name)

    function.__name__, function.__module__ = name, "evenkeel"
    return function


def _is_as_it_was(conv: Packed, way: Way) -> bool:
    """True if the convolution may be passed over; the weight's values are not looked at."""
    return (
        not (conv._forward_hooks or conv._forward_pre_hooks)
        and "forward" not in conv.__dict__
        and conv.is_current(way)
    )


def _is_single(t: Tensor) -> bool:
    return type(t) in PLAIN and t.dtype is torch.float32


def _guarded(conv: Packed, way: Way) -> RunWith:
    """The way, for inputs that it was found for; others may come where shapes depend on values."""
    run, shape, adds = way.run, way.shape, way.adds

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        fits = type(x) in PLAIN and x.shape == shape and x.dtype is torch.float32
        fits = fits and x.layout is torch.strided
        if fits and (residual is None or (adds and _is_single(residual))):
            return run(x, residual)
        y: Tensor = conv(x, residual)
        return y

    return call
