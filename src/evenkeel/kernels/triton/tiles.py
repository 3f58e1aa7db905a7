"""The parts that kernels are made of: owners, tiles, sums over a tile, what surrounds the norm."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.standard import _sum_combine as _add


@triton.jit
def total(values, COLUMNS: tl.constexpr):
    """Per owner, the sum over the tile."""
    if COLUMNS:
        return tl.reduce(values, 0, _add, keep_dims=True)
    else:
        return tl.reduce(tl.reduce(values, 1, _add), 0, _add)


@triton.jit
def owners_of(
    group, across, run, block,
    COLUMNS: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A group's owners, which of them exist, the unit that their values begin at, and its lanes."""
    outer = group // across
    inner = group % across
    far = outer.to(tl.int64) if WIDE else outer
    lanes = tl.arange(0, B)[None, :]
    if COLUMNS:
        lanes += inner * B
        owners = outer * (run * UNIT) + lanes
        return owners, lanes < run * UNIT, far * block, lanes
    else:
        near = inner.to(tl.int64) if WIDE else inner
        return group, group >= 0, far * block + near * run, lanes


@triton.jit
def tile(
    step, stop, base, lanes, run, jump, magic, shift,
    COLUMNS: tl.constexpr, A: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where the values of the steps from ``step`` on lie, and which of them exist."""
    steps = step + tl.arange(0, A)[:, None]
    exist = steps < stop
    if COLUMNS:
        far = steps.to(tl.int64) if WIDE else steps
        return (base + far * jump) * UNIT + lanes, exist & (lanes < run * UNIT)
    else:
        # steps // run, for any steps below 2^30
        runs = ((steps.to(tl.int64) * magic) >> shift).to(tl.int32)
        far = runs.to(tl.int64) if WIDE else runs
        return (base + far * jump + (steps - runs * run)) * UNIT + lanes, exist & (lanes >= 0)


@triton.jit
def pivot_of(x, base, lanes, exist, UNIT: tl.constexpr, COLUMNS: tl.constexpr):
    """Each owner's first value, or zero where that is not finite."""
    places = base * UNIT + lanes if COLUMNS else base * UNIT
    return finite(tl.load(x + places, exist, 0).to(tl.float32))


@triton.jit
def finite(values):
    """Zero for what is not finite."""
    return tl.where(tl.abs(values) < float("inf"), values, 0.0)


@triton.jit
def sums_about(
    x, pivot, mean, m2, step, stop, base, lanes, run, jump, magic, shift,
    COLUMNS: tl.constexpr, A: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    TILES: tl.constexpr, PARTLY: tl.constexpr,
):  # fmt: skip
    """Of ``TILES`` tiles, each lane's sum about its ``mean``, and ``m2`` with the squares added.

    The mean is about the pivot, or a float32 would lose what is small beside it. Values of 16 bits
    have nothing that is so small. Without ``PARTLY`` all steps exist.
    """
    exact: tl.constexpr = x.dtype.element_ty == tl.float32
    beside = tl.full(m2.shape, 0, tl.float32)
    for number in tl.static_range(TILES):
        at = step + number * A
        places, exist = tile(at, stop, base, lanes, run, jump, magic, shift, COLUMNS, A, UNIT, WIDE)
        if PARTLY:
            value = tl.load(x + places, exist, 0).to(tl.float32)
        elif COLUMNS:
            value = tl.load(x + places, lanes < run * UNIT, 0).to(tl.float32)
        else:
            value = tl.load(x + places).to(tl.float32)
        centred = value - pivot - mean if exact else value - (pivot + mean)
        if PARTLY:
            centred = tl.where(exist, centred, 0)
        beside += centred
        m2 += centred * centred
    return beside, m2


@triton.jit
def vector(pointer, owners, exist, default: tl.constexpr):
    """A value for each owner, or the default where there is no such vector."""
    if pointer is None:
        return default
    else:
        return tl.load(pointer + owners, exist, 0).to(tl.float32)


@triton.jit
def activate(z, slope, ACT: tl.constexpr):
    """The activation of z."""
    if ACT == "relu":
        return tl.where(z < 0, 0.0, z)
    elif ACT == "leaky_relu":
        return tl.where(z > 0, z, z * slope)
    elif ACT == "relu6":
        return tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACT == "silu":
        return z / (1 + tl.exp(-z))
    else:
        return z


@triton.jit
def activation_gradient(dy, z, slope, ACT: tl.constexpr):
    """With torch's choices at kinks and NaN, as `reference.activation_gradient` has them."""
    if ACT == "relu":
        return tl.where(z <= 0, 0.0, dy)
    elif ACT == "leaky_relu":
        return tl.where(z > 0, dy, dy * slope)
    elif ACT == "relu6":
        return tl.where((z <= 0) | (z >= 6), 0.0, dy)
    elif ACT == "silu":
        s = 1 / (1 + tl.exp(-z))
        return dy * (s * (1 + z * (1 - s)))
    else:
        return dy


@triton.jit
def passing(z, ACT: tl.constexpr):
    """1 where `activation_gradient` is dy, else 0, for those that have one other value."""
    if ACT == "leaky_relu":
        return tl.where(z > 0, 1, 0)
    elif ACT == "relu6":
        return tl.where((z <= 0) | (z >= 6), 0, 1)
    else:
        return tl.where(z <= 0, 0, 1)


@triton.jit
def first_byte(
    group, across, run, length,
    COLUMNS: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where the bits of a program's owner begin, or in columns those of its first step."""
    outer = group // across if COLUMNS else group
    far = outer.to(tl.int64) if WIDE else outer
    if COLUMNS:
        return far * length * ((run * UNIT + 7) // 8) + group % across * ((B + 7) // 8)
    else:
        return far * ((length * B + 7) // 8)


@triton.jit
def bytes_of(
    step, stop, first, group, across, run,
    A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """In columns, where the bytes of the steps' bits lie, and which of them exist."""
    size: tl.constexpr = (B + 7) // 8
    row = (run * UNIT + 7) // 8
    steps = step + tl.arange(0, A)[:, None]
    near = tl.arange(0, size)[None, :]
    far = steps.to(tl.int64) if WIDE else steps
    return first + far * row + near, (steps < stop) & (group % across * size + near < row)


@triton.jit
def store_bits(
    pointer, z, step, stop, first, group, across, run,
    COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """A bit for each value of the tile, set where the gradient passes."""
    bits = passing(z, ACT)
    if COLUMNS:
        lanes: tl.constexpr = 8 if B >= 8 else B
        places, exist = bytes_of(step, stop, first, group, across, run, A, B, UNIT, WIDE)
        apart = tl.reshape(bits, (A, B // lanes, lanes))
        packed = tl.reduce(apart << tl.arange(0, lanes)[None, None, :], 2, _add)
    else:
        near = tl.arange(0, A * B // 8)
        places, exist = first + step * B // 8 + near, near * 8 < (stop - step) * B
        apart = tl.reshape(bits, (A * B // 8, 8))
        packed = tl.reduce(apart << tl.arange(0, 8)[None, :], 1, _add)
    tl.store(pointer + places, packed.to(tl.uint8), exist)


@triton.jit
def load_bits(
    pointer, step, stop, first, group, across, run, lanes,
    COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What `store_bits` has stored."""
    if COLUMNS:
        places, exist = bytes_of(step, stop, first, group, across, run, A, B, UNIT, WIDE)
        packed = tl.load(pointer + places, exist, 0).to(tl.int32)
        shifts = tl.arange(0, 8 if B >= 8 else B)[None, None, :]
        return tl.reshape(packed[:, :, None] >> shifts & 1, (A, B))
    else:
        steps = step + tl.arange(0, A)[:, None]
        packed = tl.load(pointer + first + steps * B // 8, steps < stop, 0).to(tl.int32)
        return packed >> (steps * B % 8 + lanes) & 1


@triton.jit
def before_activation(centred, scale, bias, residual, places, exist):
    """The value before the activation."""
    z = centred * scale + bias
    if residual is not None:
        z += tl.load(residual + places, exist, 0).to(tl.float32)
    return z


@triton.jit
def gradient_before(
    dy, centred, scale, offset, residual, bits, slope, places, exist,
    step, stop, first, group, across, run, lanes,
    COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation, by ``bits`` if there are any; 0 where no value is."""
    given = tl.load(dy + places, exist, 0).to(tl.float32)
    if ACT == "none":
        return given
    elif bits is not None:
        passed = load_bits(
            bits, step, stop, first, group, across, run, lanes, COLUMNS, A, B, UNIT, WIDE
        )
        return tl.where(passed != 0, given, given * slope if ACT == "leaky_relu" else 0.0)
    else:
        z = before_activation(centred, scale, offset, residual, places, exist)
        return activation_gradient(given, z, slope, ACT)


@triton.jit
def store_sum(pointer, one, two, owners, real):
    """``one + two``, in the precision of where it goes."""
    wide = pointer.dtype.element_ty
    tl.store(pointer + owners, one.to(wide) + two.to(wide), real)


@triton.jit
def store_statistics(
    mean, var, invstd, running_mean, running_var, eps, momentum,
    pivot, apart, square, count, owners, real,
):  # fmt: skip
    """Mean, biased variance and invstd of owners; and what is remembered moves, if anything is."""
    variance = square / count.to(tl.float32)
    store_sum(mean, pivot, apart, owners, real)
    if var is not None:
        tl.store(var + owners, variance, real)
    if invstd is not None:
        tl.store(invstd + owners, tl.rsqrt(variance + eps), real)
    if running_mean is not None:
        store_moved(running_mean, pivot + apart, momentum, owners, real)
        store_moved(running_var, square / (count - 1).to(tl.float32), momentum, owners, real)


@triton.jit
def store_moved(running, new, momentum, owners, real):
    """``(1 - momentum) * running + momentum * new``."""
    old = tl.load(running + owners, real, 0).to(tl.float32)
    tl.store(running + owners, old * (1 - momentum) + new * momentum, real)


@triton.jit
def store_parts(parts, one, two, owners, real, count):
    """A split's row of each of the two halves of ``parts``."""
    places = parts + tl.program_id(1).to(tl.int64) * count + owners
    tl.store(places, one, real)
    tl.store(places + tl.num_programs(1).to(tl.int64) * count, two, real)


@triton.jit
def merged_moments(
    parts, owners, exist, count, splits, per, length,
    COLUMNS: tl.constexpr, VALUES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Mean (about the pivot) and m2 of owners, from their splits'; ``PARTS`` is splits or more."""
    split = tl.arange(0, PARTS)[:, None]
    there = (split < splits) & exist if COLUMNS else split < splits
    places = parts + split.to(tl.int64) * count + owners
    means = tl.load(places, there, 0)
    m2s = tl.load(places + splits.to(tl.int64) * count, there, 0)
    steps = tl.where(split < splits, tl.minimum(length - split * per, per), 0)
    counts = (steps * VALUES).to(tl.float32)
    mean = total(means * counts, COLUMNS) / (length * VALUES).to(tl.float32)
    apart = tl.where(there, means - mean, 0)
    return mean, total(m2s + counts * apart * apart, COLUMNS)


@triton.jit
def summed(parts, owners, exist, count, splits, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """The two sums of owners, from their splits'."""
    split = tl.arange(0, PARTS)[:, None]
    there = (split < splits) & exist if COLUMNS else split < splits
    places = parts + split.to(tl.int64) * count + owners
    one = tl.load(places, there, 0)
    two = tl.load(places + splits.to(tl.int64) * count, there, 0)
    return total(one, COLUMNS), total(two, COLUMNS)
