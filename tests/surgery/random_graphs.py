"""Random small networks, as odd as the operations allow.

Lines are added to a forward one after the other, run on an example, and forgotten if they do not
run. The code is what a failing test shows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from .random_lines import KINDS, NORMS
from .random_writer import Network, Writer

__all__ = ["KINDS", "NORMS", "Case", "cases", "numbered"]

SHAPES = ((4, 6, 6), (2, 5, 7), (4, 9), (6,), (2, 4, 5, 4))
"""Of one sample: images, sequences, rows, volumes."""
OFTEN = ("block", "block", "passage", "passage", "passage", "fork", "branches", "norm", "conv")


@dataclass(frozen=True)
class Case:
    """A network in float64, and what is to be known of it.

    ``norms`` are the names of its norm modules, ``functions`` is how many norms are functions,
    ``again`` the names of those that are called more than once, ``marks`` what its lines are.
    """

    model: nn.Module
    shapes: tuple[tuple[int, ...], ...]
    norms: frozenset[str]
    again: frozenset[str]
    functions: int
    marks: tuple[str, ...]

    def inputs(self, n: int, seed: int, spread: float = 1.0, more: int = 0) -> tuple[Tensor, ...]:
        """A batch of n for every input, images being larger by ``more``."""
        generator = torch.Generator().manual_seed(seed)
        shapes = ((n, s[0], *(size + more for size in s[1:])) for s in self.shapes)
        made = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        return tuple(x * spread for x in made)


def network(seeds: Sequence[int]) -> Case:
    """The network of these numbers: the first is that of its inputs, each other that of a line."""
    random = Random(seeds[0])
    generator = torch.Generator().manual_seed(seeds[0])
    shape = random.choice((*SHAPES[:1] * 3, *SHAPES))
    shapes = (shape,) if random.randrange(10) else (shape, shape)
    names = ("x", "y")[: len(shapes)]
    values = {
        name: torch.randn(2, *s, generator=generator, dtype=torch.float64)
        for name, s in zip(names, shapes, strict=True)
    }
    w = Writer(random, Network().eval(), values, generator)
    for seed in seeds[1:]:
        w.random = Random(seed)
        w.generator.manual_seed(seed)
        kind = w.one(*KINDS, *OFTEN)
        try:
            KINDS[kind](w)
        except LookupError:
            continue  # it has no place here
        w.marks.append(kind)
    return finished(w, names, shapes)


def cases(lines: int = 12) -> st.SearchStrategy[Case]:
    """Networks of a few lines; one that fails loses its lines one by one."""
    return st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=lines + 1).map(network)


def numbered(number: int, lines: int = 12) -> Case:
    """The network of that number."""
    random = Random(number)
    return network([random.randrange(2**32) for _ in range(random.randint(3, lines + 1))])


def finished(w: Writer, names: Sequence[str], shapes: tuple[tuple[int, ...], ...]) -> Case:
    """The network, all that no line reads being its output."""
    ends = [name for name in w.values if name not in w.read]
    last = next(reversed(w.values))
    if not ends or w.chance(10):
        ends = [last]
    if len(ends) == 1:
        output = ends[0]
    else:
        output = f"torch.cat([{', '.join(f'{name}.flatten(1)' for name in ends)}], 1)"
    body = "\n".join(f"    {line}" for line in (*w.lines, f"return {output}"))
    code = f"def forward(self, {', '.join(names)}):\n{body}"
    made: dict[str, Any] = {"torch": torch, "F": F}
    exec(code, made)
    kind = type("Written", (Network,), {"forward": made["forward"], "code": code})
    model = kind()
    model.__dict__.update(copy.deepcopy(w.holder).__dict__)
    called = [name for name in w.norms for line in w.lines if f"self.{name}(" in line]
    twice = frozenset(name for name in called if called.count(name) > 1)
    return Case(model, shapes, frozenset(w.norms), twice, w.functions, tuple(w.marks))
