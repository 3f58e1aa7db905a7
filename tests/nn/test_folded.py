"""The scale and shift that folding leaves, by the kernels and without them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.autograd import forward_ad

from evenkeel.nn.folded import ScaleShift

from .packing import ACTIVATIONS, LAYOUTS


def random_one(channels=12, activation=None):
    return ScaleShift(*torch.randn(3, channels), activation).eval()


def formula(own, x):
    scale, shift, center = (
        t.double().view(-1, *[1] * (x.dim() - 2)) for t in (own.scale, own.shift, own.center)
    )
    return ACTIVATIONS[own.activation]((x.double() - center) * scale + shift).to(x.dtype)


@torch.no_grad()
def assert_right(own, x):
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3}.get(x.dtype, 1e-5)
    torch.testing.assert_close(own(x), formula(own, x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_is_its_formula(activation, layout, dtype):
    own = random_one(activation=activation)
    for shape in ((4, 12, 5, 7), (1, 12, 1, 1), (9, 12, 2, 2), (4, 12, 5, 7)):
        assert_right(own, torch.randn(shape).to(dtype).contiguous(memory_format=layout))
    assert_right(own, torch.randn(4, 12, 10, 7).to(dtype)[:, :, ::2])


def test_inputs_of_other_ranks():
    own = random_one()
    for shape in ((16, 12), (4, 12, 9), (2, 12, 3, 3, 3), (0, 12, 4, 4)):
        assert_right(own, torch.randn(shape))


def test_whatever_is_changed_is_seen():
    own, x = random_one(), torch.randn(4, 12, 5, 7)
    assert_right(own, x)
    own.scale.data.mul_(-2)
    assert_right(own, x)
    own.shift = torch.randn(24)[::2]
    assert_right(own, x)
    own.activation = "relu"
    assert_right(own, x)
    own.center = torch.randn(13)
    with pytest.raises((RuntimeError, ValueError), match="12"):
        assert_right(own, x)


def test_a_wrong_number_is_seen():
    own, x = random_one(), torch.randn(4, 12, 5, 7)
    wrong = copy.deepcopy(own)
    wrong.shift[3] += 1e-3
    with pytest.raises(AssertionError), torch.no_grad():
        torch.testing.assert_close(wrong(x), formula(own, x), rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_after_a_call():
    own, x = random_one(activation="relu6"), torch.randn(4, 12, 5, 7)
    assert_right(own, x)
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert_right(other, x)
        assert other.state_dict().keys() == own.state_dict().keys()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_derivatives_of_both_modes():
    own, x = random_one(activation="relu"), torch.randn(4, 12, 5, 7)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x.double(), torch.ones_like(x).double())
        tangent = forward_ad.unpack_dual(copy.deepcopy(own).double()(dual)).tangent
    x = x.double().requires_grad_()
    y = copy.deepcopy(own).double()(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(tangent, gradient)
