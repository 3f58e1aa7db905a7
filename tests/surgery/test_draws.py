"""Random numbers fall on the same values in every layout."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evenkeel.surgery.draws import SameDraws

OPS = {
    "dropout": lambda t: F.dropout(t, 0.5),
    "dropout in place": lambda t: F.dropout(t.clone(), 0.5, inplace=True),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "bernoulli_": lambda t: torch.empty_like(t).bernoulli_(0.3),
    "exponential_": lambda t: t.clone().exponential_(),
    "alpha_dropout": lambda t: F.alpha_dropout(t, 0.5, training=True),
}
SAME_ANYWAY = {
    "dropout2d": lambda t: F.dropout2d(t, 0.5),
    "rrelu": lambda t: F.rrelu(t, training=True),
    "normal": lambda t: torch.normal(t, 1.0),
    "fractional pooling": lambda t: F.fractional_max_pool2d(t, 2, output_size=2),
    "no random numbers": lambda t: t.relu(),
}


def both(op, context) -> list[Tensor]:
    """The op on the same values in both layouts."""
    x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(1))
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        with context:
            found.append(op(x.to(memory_format=layout)))
    return found


@pytest.mark.parametrize("name", [*OPS, *SAME_ANYWAY])
def test_the_same_in_both(name):
    op = (OPS | SAME_ANYWAY)[name]
    first, second = both(op, SameDraws())
    assert torch.equal(first, second)
    alone, _ = both(op, nullcontext())
    assert torch.equal(first, alone)


@pytest.mark.parametrize("name", OPS)
def test_they_differ_without(name):
    """Torch draws in the order of memory, and what it gives lies as its input does."""
    first, second = both(OPS[name], nullcontext())
    assert not torch.equal(first, second)
    _, found = both(OPS[name], SameDraws())
    assert found.stride() == second.stride()


def test_gradients_too():
    gradients = []

    def op(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = F.rrelu(F.dropout(x, 0.5), training=True)
        y.square().sum().backward()
        gradients.append(x.grad)
        return y

    both(op, SameDraws())
    assert torch.equal(*gradients)


def test_what_an_op_writes_beside_its_result_is_written():
    x = torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last)
    noise = torch.zeros_like(x)
    with SameDraws():
        y = torch.ops.aten.rrelu_with_noise(x, noise, 0.1, 0.3, True)
    assert ((noise >= 0.1) & (noise <= 1.0)).all()
    torch.testing.assert_close(y, x * noise)
