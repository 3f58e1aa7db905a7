"""Tensors of any strides: expanded, sliced, transposed; values, strides and copies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from evenkeel.functional import batch_norm, normalize
from evenkeel.kernels.reference import Reference
from evenkeel.ops import norm_backward, norm_op
from evenkeel.view import View, view_of

EPS = 1e-5
BASE = torch.randn(6, 8, 4, 10, generator=torch.Generator().manual_seed(1))
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "batch and channel exchanged": lambda t: t.transpose(0, 1),
    "height and width exchanged": lambda t: t.transpose(2, 3),
    "reversed": lambda t: t.permute(3, 2, 1, 0),
    "some channels": lambda t: t[:, 2:5],
    "every second column": lambda t: t[..., ::2],
    "every second channel, channels_last": lambda t: t.contiguous(
        memory_format=torch.channels_last
    )[:, ::2],
    "samples expanded": lambda t: t[:1].expand(5, -1, -1, -1),
    "places expanded": lambda t: t[..., :1, :1].expand(-1, -1, 3, 3),
    "one value expanded": lambda t: t[:1, :1, :1, :1].expand(2, 3, 4, 5),
    "windows that overlap": lambda t: t.flatten()[:40].as_strided((3, 4, 5, 2), (3, 2, 1, 1)),
    "one channel": lambda t: t[:, :1],
    "one place, channels_last": lambda t: t[..., :1, :1].contiguous(
        memory_format=torch.channels_last
    ),
    "sizes of one with odd strides": lambda t: t.flatten()[:30].as_strided(
        (5, 6, 1, 1), (6, 1, 77, 3)
    ),
    "a volume, channels_last_3d": lambda t: t.reshape(6, 8, 2, 2, 10).contiguous(
        memory_format=torch.channels_last_3d
    ),
    "a sequence, channels last": lambda t: t.flatten(2).transpose(1, 2).contiguous().mT,
    "dense": lambda t: t.flatten(1)[:, :7].contiguous(),
    "dense, transposed": lambda t: t.flatten(1)[:, :7].contiguous().mT,
    "empty": lambda t: t[:0],
    "empty, channels_last": lambda t: t.contiguous(memory_format=torch.channels_last)[:0],
    "no places": lambda t: t[..., :0],
}
PATTERNS = {4: ["n c ... -> c", "n c h w -> c h w", "n c h w -> h w", "n c h w -> n w"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_change_nothing_but_strides(layout: Callable, dtype: torch.dtype) -> None:
    """The same values as from a contiguous copy, in x's own strides where x is dense."""
    x = layout(BASE.to(dtype))
    for pattern in PATTERNS.get(x.dim(), ["n c ... -> c"]):
        results = []
        for given in (x, x.contiguous()):
            leaf = given.detach().requires_grad_()
            y = normalize(leaf, pattern, affine=None, activation="silu", residual=given)
            dy = torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(dtype)
            (dx,) = torch.autograd.grad(y, leaf, dy)
            results.append((y.detach(), dx))
            assert _strides(y) == _strides(dx) == _strides(torch.empty_like(given))
        for got, wanted in zip(*results, strict=True):
            rounding = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(got, wanted, rtol=rounding, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_fake_kernels_know_the_strides(layout: Callable) -> None:
    x = layout(BASE)
    owners = torch.ones(x.shape[1])
    rest = ([1], EPS, "relu", 0.0, "reference")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(norm_op, (x, owners, None, x, None, None, *rest), test_utils=tests)
    args = (x.flip(0), x, owners, None, x, None, owners, owners, True, *rest)
    torch.library.opcheck(norm_backward, args, test_utils=tests)


@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "one channel", "one place, channels_last"]
)
def test_results_of_a_backend_are_not_copied(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size of one may have any stride: fitting it to x's needs no second tensor."""
    made = []

    class Spy(Reference):
        def apply(self, *args):
            made.append(super().apply(*args))
            return made[-1]

    monkeypatch.setattr("evenkeel.ops.load", lambda _: Spy())
    x = LAYOUTS[layout](BASE).clone()
    y, _, _, _ = norm_op(x, None, None, None, None, None, [1], EPS, "none", 0.0, "reference")
    assert y.stride() == x.stride()
    assert y.data_ptr() == made[0].data_ptr()


def _strides(t: Tensor) -> list[int]:
    """Of a size of one, the stride means nothing."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded, as sum() gives it": lambda t: torch.tensor(2.0).expand(t.shape),
    "expanded over the batch": lambda t: t[:1].expand(t.shape),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every second value": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "transposed": lambda t: t.mT.contiguous().mT,
}


@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("layout", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_of_any_layout(layout: Callable, x_format: torch.memory_format) -> None:
    x = BASE.clone(memory_format=x_format).requires_grad_()
    dy = layout(BASE.flip(0))
    y = batch_norm(x, training=True, activation="relu", residual=BASE)
    (got,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (wanted,) = torch.autograd.grad(y, x, dy.contiguous(memory_format=x_format))
    assert torch.equal(got, wanted)
    assert got.stride() == x.stride()


class Strict(Reference):
    """A kernel's assumptions, checked: every tensor has the layout that the view was made from."""

    def check(self, view: View, *tensors: Tensor | None) -> None:
        for t in tensors:
            if t is not None:
                assert view_of(t.shape, t.stride(), view.kept) == view

    def stats(self, x, view):
        self.check(view, x)
        return super().stats(x, view)

    def apply(self, x, view, affine, act, residual):
        self.check(view, x, residual)
        return super().apply(x, view, affine, act, residual)

    def backward_reduce(self, dy, x, view, affine, act, residual):
        self.check(view, dy, x, residual)
        return super().backward_reduce(dy, x, view, affine, act, residual)

    def backward_dx(self, dy, x, view, affine, act, residual, sums):
        self.check(view, dy, x, residual)
        return super().backward_dx(dy, x, view, affine, act, residual, sums)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_backends_see_dense_tensors_of_one_layout(
    layout: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenkeel.ops.load", lambda _: Strict())
    x = layout(BASE).detach()
    kept = [1, x.dim() - 1]
    for residual in (x, x.contiguous(), x.mT.contiguous().mT):
        leaf = x.detach().requires_grad_()
        y = norm_op(leaf, None, None, residual, None, None, kept, EPS, "relu", 0.0, "reference")[0]
        for dy in (torch.ones(()).expand(x.shape), x.mT.contiguous().mT, x.contiguous()):
            y.backward(dy, retain_graph=True)


def test_another_layout_would_be_seen() -> None:
    view = view_of(BASE.shape, BASE.stride(), [1])
    assert view is not None
    Strict().check(view, BASE, None)
    with pytest.raises(AssertionError):
        Strict().check(view, BASE.contiguous(memory_format=torch.channels_last))


def test_the_gradient_of_a_sum_is_zero() -> None:
    """dy from sum() is expanded, and a batch norm's output always sums to the same."""
    x = BASE.clone().requires_grad_()
    batch_norm(x, torch.rand(8), torch.rand(8), training=True).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) < 1e-6
