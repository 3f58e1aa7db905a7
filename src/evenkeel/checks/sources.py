"""Where findings are in the user's own source, and what is told there to be ignored.

A module belongs to the innermost module around it (or itself) whose class is not torch's or ours.
In the source of that class ``# evenkeel: ignore[EK101]`` silences the module that is made on the
same line; behind ``class`` or on a line of its own it silences all modules of the class.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import fx, nn

from ..errors import ConfigError, meant
from ..surgery.accelerating.remade import Remade
from ..surgery.freeze import FrozenNorm

__all__ = ["Place", "Sources", "codes_in", "project_ignores"]

_COMMENT = re.compile(r"#\s*evenkeel:\s*ignore(?:\[([^\]]*)\])?")
_FOREIGN = ("torch.", "evenkeel.")
_EVERY = "*"


@dataclass(frozen=True)
class Place:
    """Where a module is made, and the codes that are silenced there ('*' for all)."""

    file: str | None = None
    line: int | None = None
    ignored: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Source:
    """What the source of one class says.

    ``lines`` and ``codes`` are by attribute: where it is made, and what is ignored on that line.
    """

    file: str
    first: int
    lines: dict[str, int] = field(default_factory=dict)
    codes: dict[str, frozenset[str]] = field(default_factory=dict)
    everywhere: frozenset[str] = frozenset()


class Sources:
    """Finds the place of each module of a network.

    Args:
        model: the network.
        origin: what made it, a function or class, for modules that no class of the user's holds.
    """

    def __init__(self, model: nn.Module, origin: Any = None) -> None:
        self._model = model
        self._origin = None if origin is None else _source_of(origin)

    def place(self, path: str) -> Place:
        """The place of the module at a path; an empty one where there is no source to read."""
        owner, attribute = self._owner(path)
        source = self._origin if owner is None else _source_of(owner)
        if source is None:
            return Place()
        codes = source.everywhere | source.codes.get(attribute, frozenset())
        return Place(source.file, source.lines.get(attribute, source.first), codes)

    def _owner(self, path: str) -> tuple[type | None, str]:
        """The user's class around a module, and the attribute that leads from it to the module."""
        parts = path.split(".") if path else []
        for length in range(len(parts), -1, -1):
            try:
                module = self._model.get_submodule(".".join(parts[:length]))
            except AttributeError:
                continue  # a function, or a part of one
            kind = type(module)
            if isinstance(module, FrozenNorm):
                kind = module.thawed
            if issubclass(kind, Remade):
                kind = kind.recipe.original
            if not isinstance(module, fx.GraphModule) and not _is_foreign(kind):
                return kind, parts[length] if length < len(parts) else ""
        return None, ""


def codes_in(given: Iterable[str], known: Iterable[str], where: str) -> frozenset[str]:
    """The codes, checked.

    Raises:
        ConfigError: one of them is none; ``where`` tells the place it stands in.
    """
    if isinstance(given, str):
        given = [given]
    codes = frozenset(str(code).strip() for code in given)
    choices = sorted(known)
    for code in sorted(codes):
        if code not in choices:
            raise ConfigError(
                f"{where} has the unknown code '{code}'{meant(code, choices)}; codes are "
                f"{choices[0]} to {choices[-1]}"
            )
    return codes


def project_ignores(known: Iterable[str], start: Path | None = None) -> frozenset[str]:
    """The codes under ``[tool.evenkeel] ignore`` of the nearest pyproject.toml, upwards.

    Raises:
        ConfigError: the file cannot be read, or names an unknown code.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        path = folder / "pyproject.toml"
        if not path.is_file():
            continue
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        given = found.get("tool", {}).get("evenkeel", {}).get("ignore", [])
        if not isinstance(given, list) or not all(isinstance(code, str) for code in given):
            raise ConfigError(
                f'{path}: [tool.evenkeel] ignore is {given!r}; write ignore = ["EK101"]'
            )
        return codes_in(given, known, str(path))
    return frozenset()


def _is_foreign(kind: type) -> bool:
    return f"{kind.__module__}.".startswith(_FOREIGN)


@lru_cache(maxsize=256)
def _source_of(thing: Any) -> _Source | None:
    """What the source of a class or function says, or None if there is none to read."""
    try:
        thing = inspect.unwrap(thing)
        text, first = inspect.getsourcelines(thing)
        file = inspect.getsourcefile(thing)
        body = textwrap.dedent("".join(text))
        tree = ast.parse(body)
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if file is None:
        return None
    first = max(first, 1)
    made = _made(tree)
    lines = {name: first + node.lineno - 1 for name, node in reversed(made)}
    codes: dict[str, frozenset[str]] = {}
    everywhere: frozenset[str] = frozenset()
    for line, told in _comments(body):
        names = [name for name, node in made if _covers(node, line)]
        for name in names:
            codes[name] = codes.get(name, frozenset()) | told
        if not names:
            everywhere |= told
    return _Source(file, first, lines, codes, everywhere)


def _made(tree: ast.Module) -> list[tuple[str, ast.stmt]]:
    """The statements that make an attribute of self, with its name."""
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            inner = [t for target in targets for t in ast.walk(target)]
            found += [
                (t.attr, node)
                for t in inner
                if isinstance(t, ast.Attribute)
                and isinstance(t.value, ast.Name)
                and t.value.id == "self"
            ]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value
            named = isinstance(call.func, ast.Attribute) and call.func.attr in (
                "add_module",
                "register_module",
            )
            if named and call.args and isinstance(call.args[0], ast.Constant):
                found.append((str(call.args[0].value), node))
    return found


def _covers(node: ast.stmt, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _comments(body: str) -> list[tuple[int, frozenset[str]]]:
    """The lines with a comment that tells what to ignore, and what."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(body).readline):
        match = _COMMENT.match(token.string) if token.type == tokenize.COMMENT else None
        if match is not None:
            codes = match.group(1)
            names = [_EVERY] if codes is None else [c.strip() for c in codes.split(",")]
            found.append((token.start[0], frozenset(name for name in names if name)))
    return found
