"""Launches of the kernels, without what Triton finds out anew each time.

``kernel[grid](...)`` looks at the type and the alignment of every argument and finds the compiled
kernel by them: 30 to 40 us, and a norm on a small tensor has no more than that in all. What is
launched here differs from one call to the next in addresses and in a few floats alone, so after the
first launch of a kind the compiled kernel is called itself, with addresses, in 10 us. That is
Triton's own way too: its tutorials call what they have compiled beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from .planning import Plan

__all__ = ["Launcher"]

_ALIGNED = 16
"""Bytes. Triton compiles a kernel of its own for addresses that are no multiple of it."""


class Launcher:
    """Launches kernels of one module, on the current device and stream.

    Args:
        kernels: the module.
        is_interpreted: True where its kernels run in Triton's interpreter.
    """

    def __init__(self, kernels: ModuleType, is_interpreted: bool) -> None:
        self._kernels = kernels
        self.is_interpreted = is_interpreted

    def __call__(
        self,
        name: str,
        p: Plan,
        splits: int,
        tensors: Sequence[Tensor | None],
        *floats: float,
        **constants: Any,
    ) -> None:
        """One launch of ``p.groups`` by ``splits`` programs.

        Args:
            name: the kernel's.
            p: how the work is divided; its numbers follow the floats.
            tensors: the kernel's first arguments, None for what is not there.
            floats: its next.
            constants: what is compiled in besides the plan's, in the kernel's order.
        """
        addresses: list[int | None] = []
        kind: list[Any] = [name, splits, *constants.values()]
        together = 0
        for t in tensors:
            if t is None:
                addresses.append(None)
                kind.append(None)
            else:
                address = t.data_ptr()
                together |= address
                addresses.append(address)
                kind.append(t.dtype)
        is_aligned = together % _ALIGNED == 0
        first = tensors[0]
        assert first is not None  # noqa: S101 - every kernel reads something
        key = (first.get_device(), *kind)
        known = p.launches.get(key)
        if known is not None and is_aligned:
            run, behind = known
            run(*addresses, *floats, *behind)
            return
        plans = {"COLUMNS": p.columns, "A": p.a, "B": p.b, "UNIT": p.unit, "WIDE": p.wide}
        grid = (p.groups, splits, 1)
        compiled = getattr(self._kernels, name)[grid](
            *(*tensors, *map(float, floats), *p.numbers),
            **(plans | constants),
            num_warps=p.warps,
            enable_fp_fusion=True,
        )
        if is_aligned and not self.is_interpreted:
            p.launches[key] = compiled[grid], (*p.numbers, *plans.values(), *constants.values())
