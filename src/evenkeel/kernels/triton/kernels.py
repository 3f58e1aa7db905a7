"""The kernels.

A program owns a tile of ``A x B`` values and walks along its owners' values, ``A`` steps at a time.

- *Rows*: the fast run is averaged (NCHW). The program has one owner; a step is a unit, ``B`` values
  that lie together, and units are counted on over the gaps between the owner's runs.
- *Columns*: the fast run owns (NHWC, dense layers, per activation). The program has ``B``
  neighbouring owners; a step is one of their rows.

So a program's part of a per-owner vector is one number, or one row ``(1, B)``. What several
programs find out about an owner, its splits, lies in ``parts``, one row for each. Sums are reduced
in a fixed order, without atomics.

Statistics are of ``x - pivot``, the pivot being the owner's first value: the two are near each
other, so that nothing is lost where the mean is far from zero, and the mean is had in two parts.
Each lane merges a few values at a time, whose sums are taken about the mean of those before, and at
first about its first value (Chan et al. 1979); lanes, and then splits, are merged at once:
``m2 = sum(m2_i + n_i * (mean_i - mean)^2)``. A tile that holds all of an owner's values is read
once and has its mean first, then the squares of what is left.

Behind a sum a bit for each value says whether its gradient passes the activation, so that backward
does not read the residual. An owner's bits are whole bytes in rows, a step's are in columns.

Pointers to vectors may be float64, as on the CPU, where the interpreter runs. Arithmetic is
float32. The arguments from ``count`` on are `planning.Plan.numbers`, and mean what it says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    activate,
    before_activation,
    finite,
    first_byte,
    gradient_before,
    merged_moments,
    owners_of,
    pivot_of,
    store_bits,
    store_parts,
    store_statistics,
    store_sum,
    summed,
    sums_about,
    tile,
    total,
    vector,
)

__all__ = [
    "apply",
    "backward_dx",
    "backward_reduce",
    "backward_resident",
    "forward_resident",
    "merge_moments",
    "merge_sums",
    "moments",
]

TILES = tl.constexpr(4)
"""So many values of each lane are merged at once. One by one, each would take ten instructions and
not seven, and an H200 has time for fourteen while it reads a bfloat16."""

_SIZES = ["across", "run", "jump", "block", "magic", "shift", "length", "per", "splits", "count"]
"""Numbers that differ from layer to layer: one compiled kernel serves them all."""


@triton.jit(do_not_specialize=_SIZES)
def moments(
    x, parts,
    count, splits, across, run, jump, block, magic, shift, length, per,
    COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of each split, the mean about the pivot and m2, into ``parts``."""
    group, split = tl.program_id(0), tl.program_id(1)
    owners, real, base, lanes = owners_of(group, across, run, block, COLUMNS, B, UNIT, WIDE)
    pivot = pivot_of(x, base, lanes, real, UNIT, COLUMNS)
    start = split * per
    stop = tl.minimum(start + per, length)
    half: tl.constexpr = (A + 1) // 2
    stride: tl.constexpr = half * TILES
    places, exist = tile(
        start, stop, base, lanes, run, jump, magic, shift, COLUMNS, half, UNIT, WIDE
    )
    mean = finite(tl.load(x + places, exist, 0).to(tl.float32)) - pivot
    m2 = tl.full((half, B), 0, tl.float32)
    whole = start + (stop - start) // stride * stride
    for step in range(start, whole, stride):
        beside, m2 = sums_about(
            x, pivot, mean, m2, step, stop, base, lanes, run, jump, magic, shift,
            COLUMNS, half, UNIT, WIDE, TILES, False,
        )  # fmt: skip
        apart = beside * (1.0 / (TILES * ((step - start) // stride + 1)))
        mean += apart
        m2 -= beside * apart
    rows = tl.arange(0, half)[:, None]
    counts = (stop - start) // half + (rows < (stop - start) % half).to(tl.int32)
    counts = counts.to(tl.float32)
    if whole < stop:
        beside, m2 = sums_about(
            x, pivot, mean, m2, whole, stop, base, lanes, run, jump, magic, shift,
            COLUMNS, half, UNIT, WIDE, TILES, True,
        )  # fmt: skip
        apart = beside / tl.maximum(counts, 1.0)
        mean += apart
        m2 -= beside * apart
    values: tl.constexpr = 1 if COLUMNS else B
    together = total(mean * counts, COLUMNS) / ((stop - start) * values).to(tl.float32)
    apart = mean - together
    store_parts(parts, together, total(m2 + counts * apart * apart, COLUMNS), owners, real, count)


@triton.jit(do_not_specialize=_SIZES)
def merge_moments(
    x, parts, mean, m2, var, invstd, running_mean, running_var, eps, momentum,
    count, splits, across, run, jump, block, magic, shift, length, per,
    COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Each owner's mean, and m2 or else all that `store_statistics` does, from its splits'."""
    group = tl.program_id(0)
    owners, real, base, lanes = owners_of(group, across, run, block, COLUMNS, B, UNIT, WIDE)
    pivot = pivot_of(x, base, lanes, real, UNIT, COLUMNS)
    values: tl.constexpr = 1 if COLUMNS else B
    apart, square = merged_moments(
        parts, owners, real, count, splits, per, length, COLUMNS, values, PARTS
    )
    if m2 is not None:
        store_sum(mean, pivot, apart, owners, real)
        tl.store(m2 + owners, square, real)
    else:
        store_statistics(
            mean, var, invstd, running_mean, running_var, eps, momentum,
            pivot, apart, square, length * values, owners, real,
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def apply(
    x, residual, y, bits, parts, mean, var, invstd, running_mean, running_var, weight, bias,
    eps, momentum, slope,
    count, splits, across, run, jump, block, magic, shift, length, per,
    COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    PARTS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """y. With ``parts``, the statistics are merged from them, and stored; else they are given.

    It begins where the statistics ended: what those read last is still in cache.
    """
    group = tl.num_programs(0) - 1 - tl.program_id(0)
    split = tl.num_programs(1) - 1 - tl.program_id(1)
    owners, real, base, lanes = owners_of(group, across, run, block, COLUMNS, B, UNIT, WIDE)
    if parts is None:
        centre = vector(mean, owners, real, 0.0)
        if invstd is None:
            scale = tl.rsqrt(vector(var, owners, real, 1.0) + eps)
        else:
            scale = vector(invstd, owners, real, 1.0)
    else:
        pivot = pivot_of(x, base, lanes, real, UNIT, COLUMNS)
        values: tl.constexpr = 1 if COLUMNS else B
        apart, square = merged_moments(
            parts, owners, real, count, splits, per, length, COLUMNS, values, PARTS
        )
        if split == 0:
            store_statistics(
                mean, var, invstd, running_mean, running_var, eps, momentum,
                pivot, apart, square, length * values, owners, real,
            )  # fmt: skip
        centre = pivot + apart
        scale = tl.rsqrt(square / (length * values).to(tl.float32) + eps)
    scale *= vector(weight, owners, real, 1.0)
    offset = vector(bias, owners, real, 0.0)
    start = split * per
    stop = tl.minimum(start + per, length)
    first = first_byte(group, across, run, length, COLUMNS, B, UNIT, WIDE)
    for step in range(start, stop, A):
        places, exist = tile(
            step, stop, base, lanes, run, jump, magic, shift, COLUMNS, A, UNIT, WIDE
        )
        value = tl.load(x + places, exist, 0).to(tl.float32)
        z = before_activation(value - centre, scale, offset, residual, places, exist)
        tl.store(y + places, activate(z, slope, ACT), exist)
        if bits is not None:
            store_bits(
                bits, z, step, stop, first, group, across, run, COLUMNS, A, B, UNIT, WIDE, ACT
            )


@triton.jit(do_not_specialize=_SIZES)
def forward_resident(
    x, residual, y, bits, mean, var, invstd, running_mean, running_var, weight, bias,
    eps, momentum, slope,
    count, splits, across, run, jump, block, magic, shift, length, per,
    COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """y and the statistics; x is read once, for all of an owner's values fit in the tile."""
    group = tl.program_id(0)
    owners, real, base, lanes = owners_of(group, across, run, block, COLUMNS, B, UNIT, WIDE)
    pivot = pivot_of(x, base, lanes, real, UNIT, COLUMNS)
    places, exist = tile(0, length, base, lanes, run, jump, magic, shift, COLUMNS, A, UNIT, WIDE)
    value = tl.load(x + places, exist, 0).to(tl.float32)
    values: tl.constexpr = 1 if COLUMNS else B
    n = (length * values).to(tl.float32)
    apart = total(tl.where(exist, value - pivot, 0), COLUMNS) / n
    centred = tl.where(exist, value - pivot - apart, 0)
    square = total(centred * centred, COLUMNS)
    store_statistics(
        mean, var, invstd, running_mean, running_var, eps, momentum,
        pivot, apart, square, length * values, owners, real,
    )  # fmt: skip
    scale = tl.rsqrt(square / n + eps) * vector(weight, owners, real, 1.0)
    offset = vector(bias, owners, real, 0.0)
    z = before_activation(value - (pivot + apart), scale, offset, residual, places, exist)
    tl.store(y + places, activate(z, slope, ACT), exist)
    if bits is not None:
        first = first_byte(group, across, run, length, COLUMNS, B, UNIT, WIDE)
        store_bits(bits, z, 0, length, first, group, across, run, COLUMNS, A, B, UNIT, WIDE, ACT)


@triton.jit(do_not_specialize=_SIZES)
def backward_reduce(
    dy, x, residual, bits, dx, dresidual, parts, mean, invstd, weight, bias, slope,
    count, splits, across, run, jump, block, magic, shift, length, per,
    COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """Of each split, the two sums, into ``parts``; and dx at once if asked for.

    For that the statistics must be constants: it does not wait for the sums.
    """
    group, split = tl.program_id(0), tl.program_id(1)
    owners, real, base, lanes = owners_of(group, across, run, block, COLUMNS, B, UNIT, WIDE)
    centre = vector(mean, owners, real, 0.0)
    inverse = vector(invstd, owners, real, 1.0)
    scale = inverse * vector(weight, owners, real, 1.0)
    offset = vector(bias, owners, real, 0.0)
    one = tl.full((A, B), 0, tl.float32)
    two = tl.full((A, B), 0, tl.float32)
    start = split * per
    stop = tl.minimum(start + per, length)
    first = first_byte(group, across, run, length, COLUMNS, B, UNIT, WIDE)
    for step in range(start, stop, A):
        places, exist = tile(
            step, stop, base, lanes, run, jump, magic, shift, COLUMNS, A, UNIT, WIDE
        )
        centred = tl.load(x + places, exist, 0).to(tl.float32) - centre
        dz = gradient_before(
            dy, centred, scale, offset, residual, bits, slope, places, exist,
            step, stop, first, group, across, run, lanes, COLUMNS, A, B, UNIT, WIDE, ACT,
        )  # fmt: skip
        one += dz
        two += dz * centred
        if dx is not None:
            tl.store(dx + places, dz * scale, exist)
        if dresidual is not None:
            tl.store(dresidual + places, dz, exist)
    two = total(two, COLUMNS) * inverse
    store_parts(parts, total(one, COLUMNS), two, owners, real, count)


@triton.jit(do_not_specialize=_SIZES)
def merge_sums(
    parts, sum_dz, sum_dz_xhat,
    count, splits, across, run, jump, block, magic, shift, length, per,
    COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Each owner's two sums, from its splits'."""
    owners, real, _, _ = owners_of(tl.program_id(0), across, run, 0, COLUMNS, B, UNIT, False)
    one, two = summed(parts, owners, real, count, splits, COLUMNS, PARTS)
    tl.store(sum_dz + owners, one, real)
    tl.store(sum_dz_xhat + owners, two, real)


@triton.jit(do_not_specialize=_SIZES)
def backward_dx(
    dy, x, residual, bits, dx, dresidual, parts, mean, invstd, weight, bias,
    sum_dz, sum_dz_xhat, slope,
    count, splits, across, run, jump, block, magic, shift, length, per,
    COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    PARTS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """dx. With ``parts``, the sums are merged from them, and stored; else they are given, or None.

    It begins where the sums ended: what those read last is still in cache.
    """
    group = tl.num_programs(0) - 1 - tl.program_id(0)
    split = tl.num_programs(1) - 1 - tl.program_id(1)
    owners, real, base, lanes = owners_of(group, across, run, block, COLUMNS, B, UNIT, WIDE)
    if parts is None:
        one = vector(sum_dz, owners, real, 0.0)
        two = vector(sum_dz_xhat, owners, real, 0.0)
    else:
        one, two = summed(parts, owners, real, count, splits, COLUMNS, PARTS)
        if split == 0:
            tl.store(sum_dz + owners, one, real)
            tl.store(sum_dz_xhat + owners, two, real)
    values: tl.constexpr = 1 if COLUMNS else B
    n = (length * values).to(tl.float32)
    centre = vector(mean, owners, real, 0.0)
    inverse = vector(invstd, owners, real, 1.0)
    scale = inverse * vector(weight, owners, real, 1.0)
    offset = vector(bias, owners, real, 0.0)
    start = split * per
    stop = tl.minimum(start + per, length)
    first = first_byte(group, across, run, length, COLUMNS, B, UNIT, WIDE)
    for step in range(start, stop, A):
        places, exist = tile(
            step, stop, base, lanes, run, jump, magic, shift, COLUMNS, A, UNIT, WIDE
        )
        value = tl.load(x + places, exist, 0).to(tl.float32)
        centred = value - centre
        dz = gradient_before(
            dy, centred, scale, offset, residual, bits, slope, places, exist,
            step, stop, first, group, across, run, lanes, COLUMNS, A, B, UNIT, WIDE, ACT,
        )  # fmt: skip
        if dresidual is not None:
            tl.store(dresidual + places, dz, exist)
        if sum_dz is not None:
            dz -= one / n + centred * (inverse * (two / n))
        tl.store(dx + places, dz * scale, exist)


@triton.jit(do_not_specialize=_SIZES)
def backward_resident(
    dy, x, residual, bits, dx, dresidual, mean, invstd, weight, bias, sum_dz, sum_dz_xhat, slope,
    count, splits, across, run, jump, block, magic, shift, length, per,
    COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    ACT: tl.constexpr, FROM_BATCH: tl.constexpr,
):  # fmt: skip
    """dx and the two sums; x and dy are read once, for they fit in the tile."""
    group = tl.program_id(0)
    owners, real, base, lanes = owners_of(group, across, run, block, COLUMNS, B, UNIT, WIDE)
    places, exist = tile(0, length, base, lanes, run, jump, magic, shift, COLUMNS, A, UNIT, WIDE)
    inverse = vector(invstd, owners, real, 1.0)
    scale = inverse * vector(weight, owners, real, 1.0)
    offset = vector(bias, owners, real, 0.0)
    centred = tl.load(x + places, exist, 0).to(tl.float32) - vector(mean, owners, real, 0.0)
    first = first_byte(group, across, run, length, COLUMNS, B, UNIT, WIDE)
    dz = gradient_before(
        dy, centred, scale, offset, residual, bits, slope, places, exist,
        0, length, first, group, across, run, lanes, COLUMNS, A, B, UNIT, WIDE, ACT,
    )  # fmt: skip
    one = total(dz, COLUMNS)
    two = total(dz * centred, COLUMNS) * inverse
    tl.store(sum_dz + owners, one, real)
    tl.store(sum_dz_xhat + owners, two, real)
    if dresidual is not None:
        tl.store(dresidual + places, dz, exist)
    if FROM_BATCH:
        values: tl.constexpr = 1 if COLUMNS else B
        n = (length * values).to(tl.float32)
        dz -= one / n + centred * (inverse * (two / n))
    tl.store(dx + places, dz * scale, exist)
