"""The truth that backends are compared with: rows to try, their tensors, the right answers.

All of it is numpy in extended precision, on the logical shape, with the paper's chain of
derivatives: nothing but names comes from evenkeel.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from evenkeel.kernels.contract import Activation, Affine, accumulation_dtype
from evenkeel.view import View, view_of

EPS = 1e-5
Array = np.ndarray


@dataclass(frozen=True)
class Tolerance:
    """``rounding``: of the result to its dtype, once. ``inner``: of the arithmetic before."""

    rounding: float
    inner: float


TOLERANCES = {
    torch.float64: Tolerance(2**-53, 1e-13),
    torch.float32: Tolerance(2**-24, 2e-6),
    torch.bfloat16: Tolerance(2**-8, 2e-6),
    torch.float16: Tolerance(2**-11, 2e-6),
}
"""One table for all backends. Half dtypes are computed in float32: only the result is rounded."""

VARIANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
"""The relative error that a variance may have where |mean| / std is 1000 or less."""


@dataclass(frozen=True)
class Row:
    """A tensor to try, and why: ``order`` is its memory's, slowest first; ``kept`` the owners."""

    why: str
    shape: tuple[int, ...]
    order: str
    kept: str
    mean: float = 0.0
    std: float = 1.0
    special: str = ""

    @property
    def axes(self) -> str:
        return {2: "nc", 3: "ncl", 4: "nchw", 5: "ncdhw"}[len(self.shape)]

    @property
    def owners(self) -> tuple[int, ...]:
        return tuple(self.axes.index(name) for name in self.kept)

    @property
    def reduced(self) -> tuple[int, ...]:
        return tuple(d for d in range(len(self.shape)) if d not in self.owners)


ROWS = (
    Row("spatial, NCHW", (4, 3, 5, 7), "nchw", "c"),
    Row("spatial, NHWC", (4, 3, 5, 7), "nhwc", "c"),
    Row("spatial, batch innermost", (4, 3, 5, 7), "chwn", "c"),
    Row("prime sizes, NCHW", (5, 13, 11, 7), "nchw", "c"),
    Row("prime sizes, NHWC", (5, 13, 11, 7), "nhwc", "c"),
    Row("one channel", (5, 1, 4, 3), "nchw", "c"),
    Row("one sample", (1, 4, 5, 3), "nchw", "c"),
    Row("places of size one", (17, 5, 1, 1), "nchw", "c"),
    Row("dense layer", (19, 7), "nc", "c"),
    Row("a sequence", (3, 5, 23), "ncl", "c"),
    Row("a volume, channels last", (2, 3, 2, 3, 5), "ndhwc", "c"),
    Row("two values per owner", (2, 6, 1, 1), "nchw", "c"),
    Row("a long row, not a multiple of a vector", (2, 2, 1, 1031), "nchw", "c"),
    Row("many channels, few values", (2, 257, 1, 1), "nchw", "c"),
    Row("larger than a tile, NCHW", (2, 3, 61, 59), "nchw", "c"),
    Row("larger than a tile, NHWC", (2, 3, 61, 59), "nhwc", "c"),
    Row("small images of many channels", (5, 211, 3, 2), "nchw", "c"),
    Row("per activation", (5, 3, 4, 2), "nchw", "chw"),
    Row("per activation, owners not in memory order", (5, 3, 4, 2), "nhwc", "chw"),
    Row("per location, NCHW", (5, 3, 4, 2), "nchw", "hw"),
    Row("per location, NHWC: values in two runs", (5, 3, 4, 2), "nhwc", "hw"),
    Row("all values in one", (5, 3, 4, 2), "nchw", ""),
    Row("layer norm", (5, 3, 4, 2), "nchw", "n"),
    Row("k1 > 1: instance norm, NHWC", (5, 3, 4, 2), "nhwc", "nc"),
    Row("k1 > 1: every place of every sample", (5, 3, 4, 2), "nchw", "nhw"),
    Row("k1 > 1: groups, NHWC", (2, 4, 3, 5, 2), "nhwcd", "nc"),
    Row("mean 1000, std 1", (4, 3, 5, 7), "nchw", "c", mean=1e3),
    Row("mean 1000, std 1, NHWC", (4, 3, 5, 7), "nhwc", "c", mean=1e3),
    Row("mean 1000, std 0.01", (3, 2, 2, 2), "nchw", "c", mean=1e3, std=0.01),
    Row("values whose squares overflow half", (4, 3, 5, 7), "nchw", "c", std=1e3),
    Row("a constant channel", (4, 3, 5, 7), "nchw", "c", special="constant"),
    Row("values at the kinks", (4, 3, 5, 7), "nchw", "c", special="kinks"),
    Row("a NaN in one owner", (4, 3, 5, 7), "nchw", "c", special="nan"),
    Row("an infinity in one owner, NHWC", (4, 3, 5, 7), "nhwc", "c", special="inf"),
    Row("an infinity, small images of many channels", (6, 101, 3, 4), "nchw", "c", special="inf"),
    Row("six numbers: a kernel may refuse it", (3, 2, 4, 5), "nchw", "cw"),
)


@dataclass(frozen=True)
class Variant:
    """What surrounds the norm."""

    has_weight: bool
    has_bias: bool
    has_residual: bool
    act: Activation


VARIANTS = (
    Variant(False, False, False, Activation()),
    Variant(True, True, False, Activation("relu")),
    Variant(True, True, True, Activation("leaky_relu", 0.1)),
    Variant(True, False, True, Activation("relu6")),
    Variant(False, True, False, Activation("silu")),
    Variant(False, False, True, Activation()),
)


@dataclass(frozen=True)
class Subject:
    """The tensors of a row: as numpy in extended precision, and as torch in the row's layout."""

    row: Row
    dtype: torch.dtype
    device: torch.device
    x: Array
    dy: Array
    residual: Array
    weight: Array
    bias: Array
    mean: Array
    var: Array

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.dtype]

    @property
    def count(self) -> int:
        return int(np.prod([self.row.shape[d] for d in self.row.reduced]))

    @property
    def accumulation(self) -> torch.dtype:
        return accumulation_dtype(self.dtype, self.device)

    @property
    def invstd(self) -> Array:
        return 1 / np.sqrt(self.var + EPS)

    @property
    def condition(self) -> Array:
        """How far x in units of std moves if the mean is off by one rounding of the arithmetic."""
        eps = 2.0**-53 if self.dtype == torch.float64 else 2.0**-24
        return 2 * eps * np.abs(self.mean) * self.invstd

    @property
    def view(self) -> View:
        x = self.tensor(self.x)
        view = view_of(x.shape, x.stride(), self.row.owners)
        assert view is not None
        return view

    def tensor(self, values: Array) -> Tensor:
        """``values`` in the row's dtype and layout."""
        places = [self.row.axes.index(name) for name in self.row.order]
        laid_out = np.ascontiguousarray(values.transpose(places), np.float64)
        back = [places.index(d) for d in range(len(places))]
        return torch.from_numpy(laid_out).to(self.device, self.dtype).permute(back)

    def vector(self, values: Array) -> Tensor:
        """Values per owner (with the reduced dimensions of size 1), in memory order."""
        places = [self.row.axes.index(name) for name in self.row.order]
        in_memory = np.ascontiguousarray(values.transpose(places), np.float64)
        shape = self.view.kept_sizes
        return torch.from_numpy(in_memory).to(self.device, self.accumulation).reshape(shape)

    def affine(self, variant: Variant) -> Affine:
        return Affine(
            self.vector(self.mean),
            self.vector(self.invstd),
            self.vector(self.weight) if variant.has_weight else None,
            self.vector(self.bias) if variant.has_bias else None,
        )

    def added(self, variant: Variant) -> Tensor | None:
        return self.tensor(self.residual) if variant.has_residual else None


@dataclass(frozen=True)
class Truth:
    """What a norm should give, and the size of the terms, to which errors are relative."""

    z: Array
    y: Array
    y_scale: Array
    dz: Array
    sum_dz: Array
    sum_dz_scale: Array
    sum_dz_xhat: Array
    sum_dz_xhat_scale: Array
    dx_training: Array
    dx_inference: Array
    dx_scale: Array


@np.errstate(invalid="ignore")
def truth(s: Subject, variant: Variant) -> Truth:
    """The formulas as they stand in the paper, in extended precision."""
    m, over = s.count, s.row.reduced
    weight = s.weight if variant.has_weight else np.ones_like(s.weight)
    bias = s.bias if variant.has_bias else np.zeros_like(s.bias)
    residual = s.residual if variant.has_residual else np.zeros_like(s.x)
    centred, invstd = s.x - s.mean, s.invstd
    xhat = centred * invstd
    z = weight * xhat + bias + residual
    dz = s.dy * slope(z, variant.act)
    dxhat = dz * weight
    dvar = _sum(dxhat * centred, over) * -0.5 * invstd**3
    dmean = -_sum(dxhat, over) * invstd + dvar * _sum(-2 * centred, over) / m
    blur = np.maximum(1, np.abs(weight)) * s.condition / s.tolerance.inner
    rough = np.abs(s.dy) + np.abs(xhat) * _sum(np.abs(s.dy * xhat), over) / m
    return Truth(
        z=z,
        y=activated(z, variant.act),
        y_scale=np.abs(weight * xhat) + blur + np.abs(bias) + np.abs(residual),
        dz=dz,
        sum_dz=_sum(dz, over),
        sum_dz_scale=_sum(np.abs(s.dy), over) * (1 + blur),
        sum_dz_xhat=_sum(dz * xhat, over),
        sum_dz_xhat_scale=_sum(np.abs(s.dy) * np.abs(xhat), over) * (1 + blur)
        + _sum(np.abs(s.dy), over) * blur,
        dx_training=dxhat * invstd + dvar * 2 * centred / m + dmean / m,
        dx_inference=dxhat * invstd,
        dx_scale=np.abs(weight) * invstd * (rough + _sum(np.abs(s.dy), over) / m) * (1 + blur),
    )


def _sum(values: Array, over: tuple[int, ...]) -> Array:
    return values.sum(axis=over, keepdims=True)


def activated(z: Array, act: Activation) -> Array:
    """The activation, spelled out."""
    if act.name == "relu":
        return np.where(z < 0, 0, z)
    if act.name == "leaky_relu":
        return np.where(z < 0, act.slope * z, z)
    if act.name == "relu6":
        return np.where(z < 0, 0, np.where(z > 6, 6, z))
    return z / (1 + np.exp(-z)) if act.name == "silu" else z


def slope(z: Array, act: Activation) -> Array:
    """The activation's derivative; at kinks and for NaN what torch takes it to be."""
    if act.name == "relu":
        return np.where(z <= 0, 0, np.ones_like(z))
    if act.name == "leaky_relu":
        return np.where(z > 0, np.ones_like(z), act.slope)
    if act.name == "relu6":
        return np.where((z <= 0) | (z >= 6), 0, np.ones_like(z))
    if act.name == "silu":
        sigmoid = 1 / (1 + np.exp(-z))
        return sigmoid + z * sigmoid * (1 - sigmoid)
    return np.ones_like(z)


KINKS = {"relu": (0,), "leaky_relu": (0,), "relu6": (0, 6)}


@cache
def subject(row: Row, dtype: torch.dtype, device: torch.device) -> Subject:
    """The row's tensors, from the first seed that puts no value unclearly near a kink."""
    for seed in itertools.count():
        candidate = _draw(row, dtype, device, seed)
        if row.special or all(_is_clear(candidate, variant) for variant in VARIANTS):
            return candidate
    raise AssertionError


def _draw(row: Row, dtype: torch.dtype, device: torch.device, seed: int) -> Subject:
    rng = np.random.default_rng(seed)

    def rounded(values: Array) -> Array:
        exact = torch.from_numpy(values).to(dtype).double().numpy()
        return exact.astype(np.longdouble)

    per_owner = [s if d in row.owners else 1 for d, s in enumerate(row.shape)]
    centres = row.mean * rng.uniform(1, 1.5, per_owner)
    x = rng.normal(centres, row.std, row.shape)
    bias = rng.normal(size=per_owner)
    if row.special == "constant":
        x[:, 0] = 0.1
    elif row.special == "kinks":  # x is its own mean, so z is the bias: on a kink, exactly
        x[:] = 2
        bias.flat[:3] = 0, 6, 1
    elif row.special:
        x[1, 0, 2, 3] = {"nan": np.nan, "inf": np.inf}[row.special]
    x = rounded(x)
    with np.errstate(invalid="ignore"):
        mean = x.mean(axis=row.reduced, keepdims=True)
        var = ((x - mean) ** 2).mean(axis=row.reduced, keepdims=True)
    residual = np.zeros(row.shape) if row.special == "kinks" else rng.normal(size=row.shape)
    return Subject(
        *(row, dtype, device, x),
        dy=rounded(rng.normal(size=row.shape)),
        residual=rounded(residual),
        weight=rng.normal(1, 1, per_owner).astype(np.float32).astype(np.longdouble),
        bias=bias.astype(np.float32).astype(np.longdouble),
        mean=mean,
        var=var,
    )


def _is_clear(s: Subject, variant: Variant) -> bool:
    z = truth(s, variant).z
    margin = 3e-5 + 2 * float(np.max(np.abs(s.weight) * s.condition))
    return all(np.min(np.abs(z - kink)) > margin for kink in KINKS.get(variant.act.name, ()))
