"""Pairs that the text of a class proves: ``self.relu(self.norm(x))``, and neither anywhere else.

Whatever path such a class takes, and however often, its norm's output goes to its activation and
nowhere else. That serves forwards that torch.fx cannot follow, if both are modules.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections import Counter
from functools import lru_cache
from types import ModuleType
from typing import Any

from torch import nn

__all__ = ["written_pairs"]

_ALL_CHILDREN = {
    "children", "modules", "named_children", "named_modules", "get_submodule", "_modules",
}  # fmt: skip


def written_pairs(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """The attributes of each activation and norm that are written as a pair and only once.

    Construction does not count. A class whose source cannot be read, or that also reaches its
    modules in a way other than by name, has no such pairs.
    """
    kind: Any = type(module)
    return _pairs(kind) if "forward" not in vars(module) else ()


@lru_cache(maxsize=1024)
def _pairs(kind: Any) -> tuple[tuple[str, str], ...]:
    seen: Counter[str] = Counter()
    pairs: list[tuple[str, str]] = []
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, SyntaxError, TypeError):
            return ()
        for method in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
            if method.name == "__init__":
                continue
            for node in ast.walk(method):
                if isinstance(node, ast.Attribute) and not _of_library(node, base):
                    seen[node.attr] += 1
                elif isinstance(node, ast.Call):
                    pairs += _pair(node)
                    if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "vars"):
                        return ()
    if _ALL_CHILDREN & set(seen):
        return ()
    return tuple(pair for pair in pairs if seen[pair[0]] == seen[pair[1]] == 1)


def _of_library(node: ast.Attribute, kind: type) -> bool:
    """True for ``F.relu``: an attribute of a module of Python's, not of a network."""
    name = node.value.id if isinstance(node.value, ast.Name) else ""
    return isinstance(getattr(sys.modules.get(kind.__module__), name, None), ModuleType)


def _pair(outer: ast.Call) -> list[tuple[str, str]]:
    """The names of ``self.activation(self.norm(x))``."""
    act = _attribute(outer)
    norm = _attribute(outer.args[0]) if act and outer.args else None
    return [(act, norm)] if act and norm else []


def _attribute(node: ast.AST) -> str | None:
    """``name`` of a call ``self.name(x)`` with one argument."""
    if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords:
        return None
    function = node.func
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
        return None
    return function.attr if function.value.id == "self" else None
