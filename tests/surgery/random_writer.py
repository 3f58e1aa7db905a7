"""A network's forward, written line after line, as a person would write it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 12
"""The longest axis that a value may have."""


class Network(nn.Module):
    """Holds the modules of a network whose forward is written elsewhere."""

    code = ""

    def extra_repr(self) -> str:
        return self.code


@dataclass
class Writer:
    """A network so far: its lines, and what each name holds for an example."""

    random: Random
    holder: Network
    values: dict[str, Tensor]
    generator: torch.Generator
    lines: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    calls: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    functions: int = 0
    marks: list[str] = field(default_factory=list)
    names: int = 0
    wanted: str | None = None

    def one(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def chance(self, percent: int) -> bool:
        return self.random.randrange(100) < percent

    def pick(self, fits: Callable[[Tensor], bool] = lambda value: True) -> str:
        """The name of a value that fits, most likely a late one.

        Raises:
            LookupError: there is none.
        """
        if self.wanted is not None:
            name = self.latest if self.wanted == "the latest" else self.wanted
            if not fits(self.values[name]):
                raise LookupError
            return name
        found = [name for name, value in reversed(self.values.items()) if fits(value)]
        if not found:
            raise LookupError
        return found[min(self.one(*[0] * 8, 1, 2, 3), len(found) - 1)]

    @contextmanager
    def reading(self, name: str = "the latest") -> Iterator[None]:
        """Lines read this value, or what the line before gave, and no other."""
        self.wanted = name
        try:
            yield
        finally:
            self.wanted = None

    @property
    def latest(self) -> str:
        return next(reversed(self.values))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def fresh(self) -> str:
        self.names += 1
        return f"v{self.names}"

    def add(self, kind: str, module: nn.Module) -> str:
        """Gives the network a module; returns how it is called."""
        name = f"{kind}{len(list(self.holder.children())) + 1}"
        self.holder.add_module(name, module.double().eval())
        return name

    def tensor(self, *shape: int, learned: bool = True) -> str:
        """Gives the network a tensor of its own; returns how it is read."""
        name = f"t{len(self.holder._parameters) + len(self.holder._buffers) + 1}"
        made = self.numbers(*shape) / math.sqrt(max(1, math.prod(shape[1:])))
        if learned:
            self.holder.register_parameter(name, nn.Parameter(made))
        else:
            self.holder.register_buffer(name, made)
        return f"self.{name}"

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    @torch.no_grad()
    def write(self, line: str, uses: Sequence[str], gives: Sequence[str]) -> None:
        """Adds the line if it runs and gives values of a sane size.

        Raises:
            LookupError: it does not.
        """
        known: dict[str, Any] = {**self.values, "self": self.holder, "torch": torch, "F": F}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                exec(line, known)
        except (RuntimeError, ValueError, IndexError, TypeError, Warning) as error:
            raise LookupError from error
        for name in gives:
            value = known[name]
            sane = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == 2
            if not sane or not 0 < max(value.shape[1:]) <= LARGEST or not value.numel():
                raise LookupError
            if not bool(value.isfinite().all()) or float(value.abs().max()) > 1e4:
                raise LookupError
        self.values |= {name: known[name] for name in gives}
        self.read.update(uses)
        self.lines.append(line)

    def say(self, template: str, *uses: str) -> str:
        """Writes ``v7 = ...`` with ``{0}``, ``{1}`` for the names used; returns ``v7``."""
        name = self.fresh()
        self.write(f"{name} = " + template.format(*uses), uses, [name])
        return name

    def call(self, kind: str, module: nn.Module, value: str) -> str:
        """Writes a call of a new module."""
        name = self.add(kind, module)
        try:
            self.say(f"self.{name}({{0}})", value)
        except LookupError:
            delattr(self.holder, name)
            raise
        self.calls.append((name, self.shape(value)))
        return name
