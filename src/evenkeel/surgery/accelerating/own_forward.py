"""What one module's own forward does with its children, as a graph, or why that cannot be known.

torch.fx runs the forward once on stand-ins and writes down what is called. That is the whole truth
only if the forward takes the same path for every input, in both modes, and has no effect but its
result. What stand-ins cannot show is read from the source of every function that ran.
"""

from __future__ import annotations

import ast
import copy
import inspect
import operator
import os
import random
import sys
import textwrap
from collections.abc import Callable
from functools import lru_cache
from types import CodeType
from typing import Any, cast

import torch
from torch import fx, nn

from ...errors import first_line

__all__ = ["has_forward", "is_sequential", "own_forward"]

_KIND_TESTS = {"isinstance", "issubclass", "type", "hasattr", "callable", "id", "getattr"}
_EFFECTS = {"print", "setattr", "delattr", "exec", "eval"}
_MODE_TESTS = {"is_grad_enabled", "is_autocast_enabled", "is_in_onnx_export", "is_tracing"}
_CHANGES = {"append", "extend", "insert", "pop", "update", "setdefault", "clear", "add_", "copy_"}
_TORCH = os.path.dirname(torch.__file__) + os.sep
_PYTHON = os.path.dirname(os.__file__) + os.sep


class _Value(fx.Proxy):
    """A stand-in that writes ``x += y`` down as what it is; torch.fx takes it for ``x + y``."""


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior"):
    setattr(_Value, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Every module that is called is a leaf."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


def has_forward(module: nn.Module) -> bool:
    """False for a ModuleList and other containers that are never called."""
    return getattr(type(module), "forward", None) is not nn.Module.forward


def is_sequential(module: nn.Module) -> bool:
    """True for a Sequential, of a subclass too if it has Sequential's forward."""
    own = getattr(type(module), "forward", None)
    return own is nn.Sequential.forward and "forward" not in vars(module)


def own_forward(module: nn.Module) -> fx.Graph | str:
    """The graph of the module's forward with all modules in it as leaves, or why there is none.

    Every node's target is a path below the module. A boolean argument that follows
    ``self.training`` reads it in the graph, too.

    Args:
        module: of a scratch copy, for a forward that is traced may leave stand-ins behind.
    """
    if isinstance(module, fx.GraphModule):
        return copy.deepcopy(module.graph)
    reason = _odd_class(module)
    if reason is not None:
        return reason
    ran: set[CodeType] = set()
    drawn = _random_state()
    mode = module.training
    try:
        graphs = [_traced(module.train(training), ran) for training in (True, False)]
    except Exception as error:
        return f"torch.fx cannot trace its forward: {first_line(error)}"
    finally:
        module.train(mode)
    if _random_state() != drawn:
        return "its forward draws random numbers"
    for code in ran:
        found = _doubt(code)
        if found is not None:
            return found
    return _joined(*graphs)


def _odd_class(module: nn.Module) -> str | None:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    if hasattr(kind.forward, "__wrapped__"):
        return "its forward is decorated"
    for name in ("__reduce__", "__reduce_ex__", "__deepcopy__", "__copy__", "__call__"):
        if getattr(kind, name, None) is not getattr(nn.Module, name, None):
            return f"its class has a {name} of its own"
    return None


def _random_state() -> tuple[Any, ...]:
    return random.getstate(), torch.random.get_rng_state().numpy().tobytes()


def _traced(module: nn.Module, ran: set[CodeType]) -> fx.Graph:
    """The graph in the mode that the module is in; the code of every function goes to ``ran``."""
    before = sys.getprofile()
    own = cast(Any, type(module).forward).__code__
    start = (own.co_filename, own.co_firstlineno)  # torch.fx may have changed the code otherwise

    def note(frame: Any, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if _is_library(code) and not code.co_filename.endswith("checkpoint.py"):
            return
        # What torch and Python call for purposes of their own is no part of the forward.
        if (code.co_filename, code.co_firstlineno) == start or not _is_library(frame.f_back.f_code):
            ran.add(code)

    tracer = _Tracer()
    sys.setprofile(note)
    try:
        graph = tracer.trace(module)
    finally:
        sys.setprofile(before)
    return graph


def _is_library(code: CodeType) -> bool:
    """True for torch's and Python's own functions, and for those here."""
    file = code.co_filename
    if file.startswith((_TORCH, "<frozen")) or file == __file__:
        return True
    return file.startswith(_PYTHON) and "site-packages" not in file


@lru_cache(maxsize=4096)
def _doubt(code: CodeType) -> str | None:
    """Why a function may do something else at another call, or more than its result; or None."""
    if _is_library(code):
        return "it works by checkpoints"
    if code.co_name in _PARTS:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, SyntaxError, TypeError):
        return f"the source of '{code.co_name}' cannot be read"
    for node in ast.walk(tree):
        what = _doubtful(node)
        if what is not None:
            return f"'{code.co_name}' {what}: {ast.unparse(node).splitlines()[0]}"
    return None


_PARTS = {"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"}
"""Code that stands in the source of the function around it, which ran too."""


def _doubtful(node: ast.AST) -> str | None:
    if isinstance(node, ast.With | ast.AsyncWith):
        return "works in a context"
    if isinstance(node, ast.Try | ast.Global | ast.Nonlocal):
        return "may do something else at another call"
    if isinstance(node, ast.Compare) and any(isinstance(o, ast.Is | ast.IsNot) for o in node.ops):
        return None if _of_self(node.left) else "asks what it was given"
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
        targets = getattr(node, "targets", None) or [cast(Any, node).target]
        inside = [t for target in targets for t in ast.walk(target)]
        if any(isinstance(t, ast.Attribute | ast.Subscript) and _of_self(t) for t in inside):
            return "changes its module"
    if isinstance(node, ast.Call):
        return _doubtful_call(node)
    return None


def _doubtful_call(node: ast.Call) -> str | None:
    called = node.func
    if isinstance(called, ast.Name) and called.id in _EFFECTS:
        return "does more than give its result"
    if isinstance(called, ast.Name) and called.id in _KIND_TESTS:
        return None if node.args and _of_self(node.args[0]) else "asks what it was given"
    if isinstance(called, ast.Attribute):
        if called.attr in _MODE_TESTS:
            return "asks for a mode of torch"
        if called.attr in _CHANGES and isinstance(called.value, ast.Attribute):
            return "changes its module" if _of_self(called.value) else None
    return None


def _of_self(node: ast.AST) -> bool:
    """True for ``self`` and whatever hangs on it: what it is does not depend on the input."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "self"


def _joined(training: fx.Graph, inference: fx.Graph) -> fx.Graph | str:
    """One graph for both modes, or why there is none."""
    differs = "its forward does something else in training than in inference"
    if any(str(node.target).startswith("_tensor_constant") for node in training.nodes):
        return "its forward makes tensors of its own"
    pairs = list(zip(training.nodes, inference.nodes, strict=False))
    if len(training.nodes) != len(inference.nodes):
        return differs
    for node, other in pairs:
        if (node.op, node.target, str(node.type)) != (other.op, other.target, str(other.type)):
            return differs
        merged = _merged(node, other)
        if merged is None:
            return differs
        node.args, node.kwargs = merged
    return training


def _merged(node: fx.Node, other: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments for both modes; a flag that is True in training alone becomes a look-up."""
    flags: list[fx.Node] = []

    def merge(a: Any, b: Any) -> Any:
        if a is True and b is False:
            if not flags:
                with node.graph.inserting_before(node):
                    flags.append(node.graph.create_node("get_attr", "training"))
            return flags[0]
        if repr(a) != repr(b):
            raise LookupError
        return a

    try:
        args = tuple(merge(a, b) for a, b in zip(node.args, other.args, strict=True))
        if list(node.kwargs) != list(other.kwargs):
            return None
        kwargs = {key: merge(value, other.kwargs[key]) for key, value in node.kwargs.items()}
    except (LookupError, ValueError):
        return None
    return args, kwargs
