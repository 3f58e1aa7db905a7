"""A module with another forward: the same object, of a subclass made for it.

Surgery that must keep a network's class, names, attributes, hooks and optimizers cannot build a new
module. It changes the class of the one at hand, as torch's parametrizations do, to a subclass that
has nothing but another ``forward``. An instance attribute named ``forward`` would be shorter, but
torch.fx and pickle do not see it. A GraphModule in the module's place would be another object of
another class, and would lose attributes and hooks.

Such a class cannot be imported, so its instances are pickled and copied by a `Recipe`.
"""

from __future__ import annotations

import linecache
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import CodeType, ModuleType
from typing import Any, ClassVar, SupportsIndex

from torch import nn

__all__ = ["Recipe", "Remade", "recipe", "remake", "unmake"]


@dataclass(frozen=True)
class Library:
    """A module of Python's, by name, for such modules cannot be pickled."""

    name: str


@dataclass(frozen=True)
class Recipe:
    """All that makes the subclass: the class before, and a function ``forward``.

    ``source`` is its text, ``names`` what the text refers to.
    """

    original: type[nn.Module]
    source: str
    names: tuple[tuple[str, Any], ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        return self


class Remade:
    """Base of the classes made here."""

    recipe: ClassVar[Recipe]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A module of the class before.

        ``type(block)(64, 128)`` and a slice of a Sequential build new modules, to which this
        forward is foreign.
        """
        return cls.recipe.original(*args, **kwargs)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        state: Any = super().__reduce_ex__(max(int(protocol), 2))
        return (_reborn, (self.recipe,), *state[2:])


def recipe(original: type[nn.Module], source: str, names: Mapping[str, Any]) -> Recipe:
    """The recipe for a subclass of ``original``; of ``names``, only those are kept that are used.

    Args:
        original: the class to come back to.
        source: the text of a function named ``forward``.
        names: the globals that the text may refer to.
    """
    used = _names_in(compile(source, "<forward>", "exec"))
    kept = {
        name: Library(value.__name__) if isinstance(value, ModuleType) else value
        for name, value in names.items()
        if name in used
    }
    return Recipe(original, source, tuple(kept.items()))


def remake(module: nn.Module, recipe: Recipe) -> None:
    """Gives the module the recipe's forward, in place."""
    module.__class__ = _class_of(recipe)


def unmake(module: nn.Module) -> None:
    """Gives a remade module the class that it had, in place; any other is left as it is."""
    made = type(module)
    if issubclass(made, Remade):
        module.__class__ = made.recipe.original


def _names_in(code: CodeType) -> set[str]:
    inner = [_names_in(const) for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*inner)


def _reborn(recipe: Recipe) -> nn.Module:
    """An empty module for pickle and copy to fill."""
    module = recipe.original.__new__(recipe.original)
    remake(module, recipe)
    return module


@lru_cache(maxsize=4096)
def _class_of(recipe: Recipe) -> type[nn.Module]:
    """The subclass: blocks that are alike share it, as they shared the class before."""
    original = recipe.original
    file = f"<evenkeel {original.__qualname__} {hash(recipe.source):x}>"
    lines = recipe.source.splitlines(keepends=True)
    linecache.cache[file] = (len(recipe.source), None, lines, file)  # for tracebacks
    names = {
        name: import_module(value.name) if isinstance(value, Library) else value
        for name, value in recipe.names
    }
    exec(compile(recipe.source, file, "exec"), names)  # noqa: S102 - torch.fx wrote the text
    forward = names["forward"]
    forward.__doc__ = original.forward.__doc__
    made = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "forward": forward,
        "recipe": recipe,
    }
    return type(original.__name__, (Remade, original), made)
