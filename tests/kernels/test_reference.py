"""The reference backend: the contract, and what only the reference promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evenkeel.kernels.contract import Activation, Affine, accumulation_dtype
from evenkeel.kernels.reference import Reference, activate, activation_gradient
from evenkeel.view import View, logical_view

from .contract import Contract

ACTIVATIONS = {
    "none": (Activation(), lambda z: z),
    "relu": (Activation("relu"), F.relu),
    "leaky_relu": (Activation("leaky_relu", 0.2), lambda z: F.leaky_relu(z, 0.2)),
    "relu6": (Activation("relu6"), F.relu6),
    "silu": (Activation("silu"), F.silu),
}


class TestReference(Contract):
    name = "reference"


@pytest.mark.parametrize(("act", "torchs"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_are_torchs_everywhere(act: Activation, torchs) -> None:
    """Also at the kinks, at NaN and at the infinities; values and gradients.

    relu6 of NaN aside: there torch's own gradient is 0 or 1, as the length of the tensor has it.
    Ours is 1, like relu's.
    """
    special = [0.0, -0.0, 6.0, torch.nan, torch.inf, -torch.inf, 1e-300, -1e-300]
    z = torch.cat([torch.tensor(special).double(), torch.linspace(-9, 9, 181).double()])
    z.requires_grad_()
    dy = torch.linspace(-2, 3, len(z)).double()
    wanted = torchs(z)
    (gradient,) = torch.autograd.grad(wanted, z, dy)
    assert torch.equal(activate(z, act).nan_to_num(7), wanted.nan_to_num(7))
    mine = activation_gradient(dy, z.detach(), act)
    if act.name == "relu6":
        assert mine[3] == dy[3]
        gradient[3] = dy[3]
    close = torch.testing.assert_close
    close(mine, gradient, rtol=1e-14, atol=1e-15, equal_nan=True)
    with pytest.raises(AssertionError):
        close(mine + 1e-9, gradient, rtol=1e-14, atol=1e-15, equal_nan=True)


def test_an_unknown_activation_is_our_own_mistake() -> None:
    for call in (
        lambda: activate(torch.ones(1), Activation("tanh")),
        lambda: activation_gradient(torch.ones(1), torch.ones(1), Activation("tanh")),
    ):
        with pytest.raises(AssertionError, match="tanh"):
            call()


@pytest.mark.parametrize("kept", [(1,), (1, 2), (0, 1), ()], ids=str)
def test_torch_can_differentiate_through_it(kept: tuple[int, ...]) -> None:
    """Second derivatives are had this way, so nothing may be written in place."""
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    view = logical_view(x.shape, kept)
    reference = Reference()

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        n, mean, m2 = reference.stats(x, view)
        affine = Affine(mean, (m2 / n + 1e-5).rsqrt(), weight)
        return reference.apply(x, view, affine, Activation("silu"), x)

    weight = torch.randn(view.kept_sizes, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, (x, weight))
    assert torch.autograd.gradgradcheck(forward, (x, weight))


def test_float32_is_the_float64_result_rounded_once() -> None:
    x = torch.randn(8, 3, 9, 9)
    view = logical_view(x.shape, (1,))
    affine = Affine(*(torch.rand(view.kept_sizes).double() for _ in range(4)))
    wide = Reference().apply(x.double(), view, affine, Activation("silu"), x.double())
    narrow = Reference().apply(x, view, affine, Activation("silu"), x)
    assert torch.equal(narrow, wide.float())


def test_it_refuses_nothing() -> None:
    six = View((2, 3, 4, 5, 6, 7), (0, 1, 2, 3, 4, 5), (0, 2, 4))
    assert Reference().refuses(six, torch.float16, torch.device("meta")) is None


@pytest.mark.parametrize(
    ("dtype", "device", "wanted"),
    [
        (torch.float16, "cpu", torch.float64),
        (torch.float32, "cpu", torch.float64),
        (torch.float32, "cuda", torch.float32),
        (torch.bfloat16, "cuda", torch.float32),
        (torch.float64, "cuda", torch.float64),
    ],
)
def test_where_statistics_are_accumulated(dtype, device: str, wanted) -> None:
    assert accumulation_dtype(dtype, torch.device(device)) == wanted
