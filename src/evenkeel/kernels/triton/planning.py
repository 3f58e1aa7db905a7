"""How a call's memory is divided among programs: a pure function of the view and the element size.

No search and no device is asked, so that the same call gives the same bits on every GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import gcd
from typing import Any

from ...view import View

__all__ = ["LIMITS", "MOST", "Limits", "Plan", "divisor", "plan"]

MOST = 2**30
"""Steps that an owner may have: `divisor` is exact below that."""


@dataclass(frozen=True)
class Limits:
    """The sizes that were chosen, for a GPU of about 130 multiprocessors.

    Attributes:
        tile: values in the registers of a program that walks, a power of two.
        resident: values of a tensor that a program may keep, of x alone or of x and dy. Compiled
            for compute capability 9.0, twice as many spill in the forward kernel.
        least: values that a program should have, or splitting does not pay.
        programs: how many to aim for, in rows and in columns. Compiled for compute capability 9.0,
            two to eight of them fit on a multiprocessor at once, and with these numbers the last
            round of programs is nearly full. In columns all of a tensor's programs may have parts
            of the same owners, so fewer are better to merge.
        fused: up to so many splits are merged by every program that needs the result; more, by a
            kernel of their own.
        line: bytes of a row that a program takes at a time.
        lanes: values a thread, twice as many in a resident tile.
        wide: from so many values on offsets have 64 bits.
    """

    tile: int = 4096
    resident: int = 16384
    least: int = 8192
    programs: tuple[int, int] = (1536, 1024)
    fused: int = 64
    line: int = 128
    lanes: int = 16
    wide: int = 2**31


LIMITS = Limits()


@dataclass(frozen=True)
class Plan:
    """One call's division; see `kernels` for steps, units and the two schedules.

    ``groups`` by ``splits`` programs walk, ``a`` steps by ``b`` values at a time. ``launches`` is
    what `launching` has found out about them. ``sizes`` are, in the order in which every kernel
    takes them behind ``owners`` and ``splits``:

    - ``across``: groups along k2.
    - ``run``: the fast run, in units of ``unit`` values.
    - ``jump``: units from one run of an owner to the next; ``block``: from one of k1 to the next.
    - ``magic``, ``shift``: to divide by ``run``, see `divisor`.
    - ``length``: steps of an owner; ``per``: those of a split.
    """

    columns: bool
    groups: int
    splits: int
    a: int
    b: int
    unit: int
    wide: bool
    resident: bool
    fused: bool
    owners: int
    sizes: tuple[int, ...]
    warps: int
    launches: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The whole numbers that a kernel takes."""
        return (self.owners, self.splits, *self.sizes)

    @cached_property
    def parts(self) -> int:
        """A power of two, splits or more."""
        return _power(self.splits)

    @cached_property
    def bits(self) -> int:
        """Bytes that a bit for each value takes: whole ones for each owner, or for each step.

        Where each lies depends on the layout alone, not on how the work is divided.
        """
        across, run, *_, length, _ = self.sizes
        if self.columns:
            return self.groups // across * length * -(-run * self.unit // 8)
        return self.owners * -(-length * self.b // 8)

    @cached_property
    def merging(self) -> Plan:
        """The same, divided for the kernels that only merge: few owners for each of them."""
        if not self.columns:
            return replace(self, warps=_warps(self.parts, 16), launches={})
        b = min(self.b, 8)
        warps = _warps(self.parts * b, 16)
        across = -(-self.sizes[1] * self.unit // b)
        groups = self.groups // self.sizes[0] * across
        sizes = (across, *self.sizes[1:])
        return replace(self, groups=groups, b=b, sizes=sizes, warps=warps, launches={})


@lru_cache(maxsize=4096)
def plan(view: View, itemsize: int, keeps: bool = False, limits: Limits = LIMITS) -> Plan:
    """The division of a view of four numbers, none of them zero.

    Args:
        itemsize: of the input, in bytes.
        keeps: whether a program that keeps what it has read will not have to read it again.
        limits: other sizes, for tests.
    """
    k1, r1, k2, r2 = view.sizes
    columns = r2 == 1
    width = k2 if columns else r2
    unit = gcd(width, 8)
    run = width // unit
    if columns:
        b = min(_power(k2), max(8, limits.line // itemsize))  # whole bytes of bits
        across, jump, length = -(-k2 // b), run, r1
    else:
        b = unit
        across, jump, length = k2, k2 * run, r1 * run
    groups = k1 * across
    least = 1 if columns else 8 // b  # so that a tile's bits are whole bytes
    a = max(least, _power(length))
    resident = keeps and a * b <= limits.resident
    if not resident:
        a = max(least, min(a, limits.tile // b))
    splits = 1 if resident else _splits(groups, length, a, b, columns, limits)
    per = -(-length // (splits * a)) * a
    splits = -(-length // per)
    return Plan(
        columns=columns,
        groups=groups,
        splits=splits,
        a=a,
        b=b,
        unit=unit,
        wide=k1 * r1 * k2 * r2 >= limits.wide,
        resident=resident,
        fused=splits <= limits.fused,
        owners=k1 * k2,
        sizes=(across, run, jump, r1 * jump, *divisor(run), length, per),
        warps=_warps(a * b, limits.lanes * 2, 32) if resident else _warps(a * b, limits.lanes),
    )


def divisor(run: int) -> tuple[int, int]:
    """``(magic, shift)`` such that ``n // run == n * magic >> shift`` for 0 <= n < 2^30.

    With ``2^l >= run``, ``magic = ceil(2^(30 + l) / run)`` is less than ``2^31`` (Granlund and
    Montgomery 1994, theorem 4.2), so that both factors have 32 bits and the product 64.
    """
    shift = 30 + (run - 1).bit_length()
    return -(-(1 << shift) // run), shift


def _splits(groups: int, length: int, a: int, b: int, columns: bool, limits: Limits) -> int:
    wanted = -(-limits.programs[columns] // groups)
    return max(1, min(wanted, length * b // limits.least, -(-length // a)))


def _warps(values: int, lanes: int, most: int = 16) -> int:
    return min(most, max(1, _power(values) // (32 * lanes)))


def _power(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()
