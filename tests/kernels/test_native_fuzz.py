"""The native kernels on tensors of any shape, strides and offset, against torch in float64.

Torch has one batch norm, over the rows of a matrix when the input has two dimensions. Every pattern
is that of some matrix, with the owners for columns, so torch's own is the truth for all of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evenkeel import normalize
from evenkeel.errors import BackendError, ShapeError

from .truth import KINKS, TOLERANCES

if not os.environ.get("CI"):  # there they must be built
    pytest.importorskip("evenkeel._native", reason="the native kernels are not built")
from evenkeel import _native as native

EPS = 1e-4
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "relu", ("leaky_relu", 0.2), "relu6", "silu")
PATTERNS = {
    "n c -> c": (1,),
    "n c l -> c": (1,),
    "n c l -> c l": (1, 2),
    "n c h w -> c": (1,),
    "n c h w -> c h w": (1, 2, 3),
    "n c h w -> h w": (2, 3),
    "n c h w -> c w": (1, 3),
    "n c d h w -> c": (1,),
    "n c d h w -> c d h w": (1, 2, 3, 4),
    "n c d h w -> d h w": (2, 3, 4),
}
SIZES = (1, 2, 3, 5, 7, 8, 11, 13, 16, 17, 31, 33, 61)
MOST = 6000


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory: order of the dimensions, steps, expanded ones, first element."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    expanded: tuple[int, ...]
    offset: int

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, values: torch.Generator) -> Tensor:
        """Random values of the dtype, laid out so."""
        sizes = [1 if d in self.expanded else shape[d] * self.steps[d] for d in self.order]
        memory = torch.randn(self.offset + math.prod(sizes), generator=values, dtype=torch.float64)
        laid_out = memory.to(dtype)[self.offset :].view(sizes)
        t = laid_out.permute([self.order.index(d) for d in range(len(shape))])
        for d, step in enumerate(self.steps):
            t = t[(slice(None),) * d + (slice(None, None, step),)]
        return t.expand(shape)


@st.composite
def layouts(draw: st.DrawFn, dims: int) -> Layout:
    """Dense ones more often than others."""
    orders = [st.just(tuple(range(dims))), st.just((0, *range(2, dims), 1))]
    steps, expanded = (1,) * dims, ()
    if draw(st.booleans()):
        orders.append(st.permutations(range(dims)).map(tuple))
        steps = draw(st.tuples(*[st.sampled_from([1, 1, 1, 2, 3])] * dims))
        expanded = tuple(draw(st.lists(st.integers(0, dims - 1), max_size=1)))
    return Layout(draw(st.one_of(orders)), steps, expanded, draw(st.integers(0, 5)))


@dataclass(frozen=True)
class Case:
    """A call, but for its values."""

    pattern: str
    shape: tuple[int, ...]
    layouts: tuple[Layout, ...]  # of x, dy, residual
    dtype: torch.dtype
    parameters: torch.dtype
    act: str | tuple[str, float] | None
    has_residual: bool
    has_weight: bool
    has_bias: bool
    training: bool
    mean: float
    instructions: str
    threads: int
    seed: int

    @property
    def owners(self) -> tuple[int, ...]:
        return PATTERNS[self.pattern]

    @property
    def own_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[d] for d in self.owners)

    @property
    def count(self) -> int:
        return math.prod(s for d, s in enumerate(self.shape) if d not in self.owners)


def available() -> list[str]:
    """The instruction sets of this processor; the best is in use again afterwards."""
    found = []
    for name in ("baseline", "avx2", "avx512"):
        try:
            native.use(name)
        except ValueError:
            continue
        found.append(name)
    native.use("best")
    return found


INSTRUCTIONS = available()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    pattern = draw(st.sampled_from(list(PATTERNS)))
    dims = len(pattern.split("->")[0].split())
    shape: list[int] = []
    for _ in range(dims):
        left = MOST // math.prod(shape)
        shape.append(draw(st.sampled_from([s for s in SIZES if s <= left])))
    if draw(st.integers(0, 9)) == 0:
        shape[draw(st.integers(0, dims - 1))] = 0
    dtype = draw(st.sampled_from(DTYPES))
    return Case(
        pattern=pattern,
        shape=tuple(draw(st.permutations(shape))),
        layouts=tuple(draw(layouts(dims)) for _ in range(3)),
        dtype=dtype,
        parameters=draw(st.sampled_from([torch.float32, torch.float64, dtype])),
        act=draw(st.sampled_from(ACTIVATIONS)),
        has_residual=draw(st.booleans()),
        has_weight=draw(st.booleans()),
        has_bias=draw(st.booleans()),
        training=draw(st.sampled_from([True, True, False])),
        mean=draw(st.sampled_from([0.0, 0.0, 3.0, -30.0])),
        instructions=draw(st.sampled_from(INSTRUCTIONS)),
        threads=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 999)),
    )


@dataclass
class Values:
    """A call's tensors; `double` has the same numbers in float64."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        given = (self.x, self.weight, self.bias, self.residual)
        return [t.requires_grad_() for t in given if t is not None]

    def double(self) -> Values:
        return Values(*(None if t is None else t.detach().double() for t in vars(self).values()))


def values_of(c: Case) -> Values:
    random = torch.Generator().manual_seed(c.seed)
    x, dy, residual = (layout.tensor(c.shape, c.dtype, random) for layout in c.layouts)
    own = [
        torch.randn(c.own_shape, generator=random, dtype=torch.float64).to(c.parameters)
        for _ in range(3)
    ]
    x = x.add_(c.mean) if not any(x.stride(d) == 0 for d in range(x.dim())) else x
    return Values(
        *(x, dy),
        residual if c.has_residual else None,
        own[0] if c.has_weight else None,
        own[1] if c.has_bias else None,
        own[2] + c.mean,
        own[2].square() + 0.5,
    )


def by_torch(c: Case, v: Values) -> tuple[Tensor, Tensor, Tensor]:
    """y, what is before the activation, and the normalized x, by torch's batch norm of a matrix."""
    reduced = [d for d in range(len(c.shape)) if d not in c.owners]
    order = [*reduced, *c.owners]
    matrix = v.x.permute(order).reshape(c.count, -1)
    running = (v.running_mean.view(-1), v.running_var.view(-1))
    affine = [None if t is None else t.reshape(-1) for t in (v.weight, v.bias)]

    def restored(m: Tensor) -> Tensor:
        return m.view([c.shape[d] for d in order]).permute([order.index(d) for d in range(x_dims)])

    x_dims = len(c.shape)
    plain = F.batch_norm(matrix, *(t.clone() for t in running), None, None, c.training, 0.0, EPS)
    z = restored(F.batch_norm(matrix, *running, *affine, c.training, 0.3, EPS))
    z = z if v.residual is None else z + v.residual
    name, *slope = (c.act,) if isinstance(c.act, str) else c.act or ("none",)
    functions = {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}
    y = F.leaky_relu(z, *slope) if name == "leaky_relu" else functions[name](z)
    return y, z, restored(plain)


def ours(c: Case, v: Values) -> Tensor:
    """By the native backend, or by the automatic choice where six numbers are too many for it."""
    options = {"weight": v.weight, "bias": v.bias, "residual": v.residual, "activation": c.act}
    running = {"running_mean": v.running_mean, "running_var": v.running_var}
    options |= {"training": c.training, "momentum": 0.3, "eps": EPS}
    try:
        y = normalize(v.x, c.pattern, **options, **running, backend="native")
    except BackendError as error:
        if "runs of axes, not four" not in str(error):
            raise
        event("reference")
        return normalize(v.x, c.pattern, **options, **running)
    event("native")
    return y


def near(name: str, got: Tensor, wanted: Tensor, scale: Tensor | float, dtype: torch.dtype) -> None:
    """Within one rounding to ``got``'s dtype and that of the arithmetic in ``dtype``."""
    assert got.shape == wanted.shape, name
    info, inner = torch.finfo(got.dtype), TOLERANCES[dtype].inner
    allowed = TOLERANCES[got.dtype].rounding * wanted.abs() + inner * scale
    allowed = allowed + info.smallest_normal * info.eps
    error = (got.detach().double() - wanted).abs()
    assert bool((error <= allowed).all()), f"{name}: off by {float((error - allowed).max())} more"


def clear(c: Case, dy: Tensor, z: Tensor, terms: Tensor) -> Tensor:
    """dy, zero where z is too near to a kink to tell its side."""
    name = c.act[0] if isinstance(c.act, tuple) else c.act
    for kink in KINKS.get(name or "none", ()):
        unclear = (z - kink).abs() <= 8 * TOLERANCES[c.dtype].inner * (1 + terms)
        dy = dy.masked_fill(unclear, 0)
    return dy


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    native.use("best")


@settings(max_examples=200)
@given(cases())
def test_any_tensor_is_as_torchs_in_float64(c: Case) -> None:
    """y, the running statistics, and the gradients of x, gamma, beta and the residual."""
    native.use(c.instructions)
    torch.set_num_threads(c.threads)
    mine = values_of(c)
    if c.training and c.count == 1:
        with pytest.raises(ShapeError, match="one value per owner"):
            ours(c, mine)
        return
    theirs, leaves = mine.double(), mine.leaves
    got = ours(c, mine)
    assert (got.dtype, got.shape) == (c.dtype, c.shape)
    if got.numel() == 0:
        assert all(not g.any() for g in torch.autograd.grad(got.sum(), leaves))
        assert torch.equal(mine.running_mean.double(), theirs.running_mean)
        return
    double_leaves = theirs.leaves
    wanted, z, xhat = by_torch(c, theirs)
    spread = [1 if d not in c.owners else s for d, s in enumerate(c.shape)]
    weight = theirs.weight.detach().view(spread) if theirs.weight is not None else torch.ones(())
    terms = (weight * xhat).abs().detach() + (z.detach() - weight * xhat.detach()).abs()
    far = float((abs(c.mean) + 6) / EPS**0.5) * 1e-9  # the mean's own rounding, at worst
    near("y", got, wanted.detach(), terms + weight.abs() + far, c.dtype)
    for name in ("running_mean", "running_var"):
        remembered, right = getattr(mine, name), getattr(theirs, name)
        near(name, remembered, right, right.abs() + abs(c.mean) + 1, c.dtype)
    given_dy = clear(c, theirs.dy, z, terms)
    dy = mine.dy if torch.equal(given_dy, theirs.dy) else given_dy.to(c.dtype)
    gradients = torch.autograd.grad(got, leaves, dy)
    right = torch.autograd.grad(wanted, double_leaves, given_dy)
    assert len(gradients) == len(right)
    near_gradients(c, gradients, right, given_dy, xhat.detach(), weight, theirs)


def near_gradients(
    c: Case,
    got: tuple[Tensor, ...],
    wanted: tuple[Tensor, ...],
    dy: Tensor,
    xhat: Tensor,
    weight: Tensor,
    v: Values,
) -> None:
    """Each relative to the size of the terms that it is a sum of."""
    over = [d for d in range(len(c.shape)) if d not in c.owners]
    one, two = (t.abs().sum(over, keepdim=True) for t in (dy, dy * xhat))
    spread = list(one.shape)
    x = v.x.detach()
    var = x.var(over, correction=0, keepdim=True)
    if not c.training:
        var = v.running_var.view(spread)
    scale = weight.abs() * (var + EPS).rsqrt()
    dx_scale = dy.abs() + (one + xhat.abs() * (two + one)) / c.count
    scales = {"x": scale * dx_scale * 2}
    if v.weight is not None:
        scales["weight"] = (two + one).view(c.own_shape)
    if v.bias is not None:
        scales["bias"] = one.view(c.own_shape)
    if v.residual is not None:
        scales["residual"] = dy.abs()
    for mine, right, (name, size) in zip(got, wanted, scales.items(), strict=True):
        near(f"gradient of {name}", mine, right, 2 * size, c.dtype)


@settings(max_examples=60)
@given(cases(), st.integers(1, 40))
def test_where_a_tensor_begins_changes_no_bit(c: Case, shift: int) -> None:
    """The allocator decides on addresses, and must not decide on results."""
    native.use(c.instructions)
    torch.set_num_threads(c.threads)
    if c.training and c.count == 1:
        return
    results = []
    for offset in (0, shift):
        memory = torch.empty(math.prod(c.shape) + offset, dtype=c.dtype)
        v = values_of(c)
        moved = torch.empty_like(v.x)
        v.x = memory[offset:].as_strided(moved.shape, moved.stride(), offset).copy_(v.x)
        leaves = v.leaves
        y = ours(c, v)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, v.dy)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
