"""`evenkeel.cudnn` against torch, on the reference arithmetic and through the binding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evenkeel import cudnn
from evenkeel.cudnn import BatchNormMode, BatchNormOps
from evenkeel.errors import ConfigError, ShapeError

PER_ACTIVATION, SPATIAL, PERSISTENT = BatchNormMode
BN, ACTIVATION, ADD_ACTIVATION = BatchNormOps
EXACT = {"rtol": 1e-12, "atol": 1e-12}
EPS, FACTOR = 1e-3, 0.3
SHAPES = {
    "NCHW": ((4, 3, 5, 2), torch.contiguous_format),
    "NHWC": ((4, 3, 5, 2), torch.channels_last),
    "NDHWC": ((3, 2, 2, 3, 2), torch.channels_last_3d),
    "NC": ((6, 3), torch.contiguous_format),
    "NCL": ((4, 3, 5), torch.contiguous_format),
}

LAST = ("NHWC", "NDHWC", "NC")  # dense layers lie in both


@pytest.fixture(params=["the reference arithmetic on cpu", "the fake"])
def ran(request):
    if request.param == "the fake":
        request.getfixturevalue("on_fake")
    return request.param


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1


class Case:
    """x, the vectors in the derived shape, and torch's batch norm of them."""

    def __init__(self, mode, layout="NCHW"):
        self.mode, (shape, form) = mode, SHAPES[layout]
        self.x, self.dy, self.z, self.y = (
            draw(*shape, seed=i).to(memory_format=form) for i in range(4)
        )
        derived = cudnn.derive_bn_tensor_descriptor(self.x, mode).shape
        self.scale, self.bias, self.mean = (draw(*derived, seed=4 + i) for i in range(3))
        self.variance = draw(*derived, seed=7).abs()

    def flat(self, t):
        """As torch's function wants it: the owners as channels."""
        return t.reshape(len(t), -1) if self.mode == PER_ACTIVATION else t

    def torchs(self, x, scale, bias, mean=None, variance=None, training=True):
        vectors = [None if v is None else v.reshape(-1) for v in (mean, variance, scale, bias)]
        y = F.batch_norm(self.flat(x), *vectors, training, FACTOR, EPS)
        return y.reshape(x.shape)

    def forward(self, **options):
        return cudnn.batch_normalization_forward_training(
            *(self.mode, self.x, self.scale, self.bias),
            **{"exponential_average_factor": FACTOR, "epsilon": EPS, **options},
        )

    def backward(self, **options):
        return cudnn.batch_normalization_backward(
            self.mode, self.x, self.dy, self.scale, **{"epsilon": EPS, **options}
        )


def same(got, wanted, **tolerance):
    torch.testing.assert_close(got, wanted.reshape(got.shape), **(tolerance or EXACT))


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("mode", BatchNormMode)
def test_training_and_its_backward(ran, mode, layout):
    case = Case(mode, layout)
    mean, variance = case.mean.clone(), case.variance.clone()
    done = case.forward(running_mean=mean, running_variance=variance)
    leaves = [t.clone().requires_grad_() for t in (case.x, case.scale, case.bias)]
    wanted = case.torchs(*leaves, case.mean, case.variance)  # torch moves these two
    gradients = torch.autograd.grad(wanted, leaves, case.dy)
    same(done.y, wanted.detach())
    same(mean, case.mean)
    same(variance, case.variance)
    assert done.y.stride() == case.x.stride()
    assert done.ran_on == ran
    saved = {"saved_mean": done.saved_mean, "saved_inv_variance": done.saved_inv_variance}
    for given in (saved, {}):
        back = case.backward(**given)
        for got, one in zip(back[:3], gradients, strict=True):
            same(got, one)
        assert back.ran_on == ran
    with pytest.raises(AssertionError, match="not close"):
        same(done.y + 1e-9, wanted.detach())


@pytest.mark.parametrize("mode", BatchNormMode)
def test_what_is_saved(ran, mode):
    case = Case(mode, "NHWC")
    done = case.forward()
    over = 0 if mode == PER_ACTIVATION else (0, 2, 3)
    same(done.saved_mean, case.x.mean(over))
    same(done.saved_inv_variance, (case.x.var(over, unbiased=False) + EPS).rsqrt())
    assert done.saved_mean.shape == case.scale.shape
    assert case.forward(save=False)[1:3] == (None, None)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("mode", BatchNormMode)
def test_inference(ran, mode, layout):
    case = Case(mode, layout)
    vectors = (case.scale, case.bias, case.mean, case.variance)
    done = cudnn.batch_normalization_forward_inference(
        mode, case.x, *vectors, epsilon=EPS, alpha=2.0, beta=-3.0, y=case.y.clone()
    )
    same(done.y, 2 * case.torchs(case.x, *vectors, training=False) - 3 * case.y)
    assert done.ran_on == ran


@pytest.mark.parametrize(("alpha", "beta"), [(1, 0), (0.5, 0), (0, 1), (2, -3)])
@pytest.mark.parametrize("mode", [SPATIAL, PER_ACTIVATION])
def test_blending(ran, mode, alpha, beta):
    """alpha * result + beta * prior, in y, in dx, and in both gradients of parameters."""
    case = Case(mode)
    y = case.y.clone()
    done = case.forward(y=y, alpha=alpha, beta=beta)
    assert done.y is y
    same(y, alpha * case.forward().y + beta * case.y)
    plain = case.backward()
    prior = {"dx": case.z.clone(), "d_scale": case.mean.clone(), "d_bias": case.variance.clone()}
    blend = {"alpha_data_diff": alpha, "beta_data_diff": beta}
    back = case.backward(**prior, **blend, alpha_param_diff=beta, beta_param_diff=alpha)
    assert back.dx is prior["dx"]
    same(back.dx, alpha * plain.dx + beta * case.z)
    same(back.d_scale, beta * plain.d_scale + alpha * case.mean)
    same(back.d_bias, beta * plain.d_bias + alpha * case.variance)


def test_with_beta_0_the_destination_is_not_read(ran):
    case = Case(SPATIAL)
    y, dx = (torch.full_like(case.x, torch.nan) for _ in range(2))
    assert case.forward(y=y).y.isfinite().all()
    assert case.backward(dx=dx).dx.isfinite().all()
    assert case.forward(y=torch.full_like(y, torch.nan), beta=1.0).y.isnan().all()


def test_a_backward_updates_nothing(ran):
    case = Case(SPATIAL)
    before = [t.clone() for t in (case.x, case.dy, case.scale, case.bias)]
    assert case.backward().d_scale.abs().min() > 0
    for t, old in zip((case.x, case.dy, case.scale, case.bias), before, strict=True):
        assert torch.equal(t, old)


@pytest.mark.parametrize(
    ("mode", "ops", "layout"),
    [
        *((mode, BN, layout) for mode in BatchNormMode for layout in ("NCHW", "NHWC")),
        *((PERSISTENT, ops, layout) for ops in (ACTIVATION, ADD_ACTIVATION) for layout in LAST),
    ],
)
def test_the_ex_calls(ran, mode, ops, layout):
    case = Case(mode, layout)
    z = case.z if ops == ADD_ACTIVATION else None
    mean, variance = case.mean.clone(), case.variance.clone()
    done = cudnn.batch_normalization_forward_training_ex(
        *(mode, ops, case.x, case.scale, case.bias),
        exponential_average_factor=FACTOR,
        epsilon=EPS,
        z=z,
        running_mean=mean,
        running_variance=variance,
    )
    leaves = [t.clone().requires_grad_() for t in (case.x, case.scale, case.bias, case.z)]
    wanted = case.torchs(*leaves[:3], case.mean, case.variance)
    wanted = wanted if z is None else wanted + leaves[3]
    wanted = wanted if ops == BN else wanted.relu()
    used = leaves if z is not None else leaves[:3]
    gradients = torch.autograd.grad(wanted, used, case.dy)
    same(done.y, wanted.detach())
    same(variance, case.variance)
    seen = {} if ops == BN else {"y": done.y, "bias": case.bias}
    back = cudnn.batch_normalization_backward_ex(
        *(mode, ops, case.x, case.dy, case.scale),
        epsilon=EPS,
        reserve=done.reserve,
        **seen,
        saved_mean=done.saved_mean,
        saved_inv_variance=done.saved_inv_variance,
    )
    got = [back.dx, back.d_scale, back.d_bias, *([] if z is None else [back.dz])]
    for mine, one in zip(got, gradients, strict=True):
        same(mine, one)
    assert (back.dz is None) == (z is None)
    assert done.ran_on == back.ran_on == ran


def test_sizes_are_those_of_what_runs(ran):
    case = Case(PERSISTENT, "NHWC")
    ask = (PERSISTENT, ACTIVATION, case.x)
    sizes = [
        cudnn.get_batch_normalization_forward_training_ex_workspace_size(*ask),
        cudnn.get_batch_normalization_backward_ex_workspace_size(*ask),
        cudnn.get_batch_normalization_training_ex_reserve_space_size(*ask),
    ]
    wanted = [24, 24, case.x.numel()] if ran == "the fake" else [0, 0, 0]
    assert [size.bytes for size in sizes] == wanted
    assert {size.ran_on for size in sizes} == {ran}
    with pytest.raises(ShapeError, match=r"reserve must have \d+ bytes on cpu but is \(7,\)"):
        cudnn.batch_normalization_backward_ex(
            *(PERSISTENT, BN, case.x, case.dy, case.scale),
            epsilon=EPS,
            reserve=torch.empty(7, dtype=torch.uint8),
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_data_has_float32_parameters(ran, dtype):
    case = Case(SPATIAL, "NHWC")
    exact = case.forward().y
    case.x, case.dy = case.x.to(dtype), case.dy.to(dtype)
    case.scale, case.bias = case.scale.float(), case.bias.float()
    done = case.forward()
    assert (done.y.dtype, done.saved_mean.dtype) == (dtype, torch.float32)
    assert case.backward().d_bias.dtype == torch.float32
    same(done.y.double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_twenty_values_of_variance_20_leave_21_05(ran):
    """forums.developer.nvidia.com/t/45063: it is the unbiased variance that is remembered."""
    x = torch.arange(20.0).double()
    x = ((x - x.mean()) / x.std(unbiased=False) * 20**0.5).reshape(20, 1, 1, 1)
    one, variance = torch.ones(1).double(), torch.zeros(1).double()
    done = cudnn.batch_normalization_forward_training(
        *(SPATIAL, x, one, torch.zeros(1).double()),
        exponential_average_factor=1.0,
        epsilon=0.0,
        running_mean=torch.zeros(1).double(),
        running_variance=variance,
    )
    assert float(variance) == pytest.approx(400 / 19, rel=1e-12)
    assert float(done.saved_inv_variance) == pytest.approx(20**-0.5, rel=1e-12)


def test_other_strides_are_copied(ran):
    """An expanded dy, as that of a sum, and an x with gaps."""
    case = Case(SPATIAL)
    case.dy = torch.ones(1).double().expand(case.x.shape)
    back = case.backward()
    same(back.d_bias, torch.full((3,), 40.0).double())
    wide = torch.stack((case.x, case.y), -1)
    case.x = wide[..., 0]
    same(case.forward().y, Case(SPATIAL).forward().y)


WRONG = {
    "no such mode": ({"mode": 3}, ConfigError, r"no mode 3; .* SPATIAL \(1\).*BAD_PARAM"),
    "rank": ({"x": draw(2, 3, 2, 2, 2, 2)}, ShapeError, r"must be \(N, C\).*BAD_PARAM"),
    "an array": ({"x": np.ones((2, 3, 2, 2))}, ShapeError, r"x is a ndarray, .* torch\.as_tensor"),
    "integers": ({"x": torch.ones(2, 3, 2, 2).char()}, ShapeError, r"x is torch.int8"),
    "empty": ({"x": draw(0, 3, 2, 2)}, ShapeError, r"is empty.*BAD_PARAM"),
    "huge": (
        {"x": draw(1).expand(2, 3, 2**15, 2**14)},
        ShapeError,
        r"2\^31 elements or more.*NOT_SUPPORTED",
    ),
    "m = 1": ({"x": draw(1, 3, 1, 1)}, ShapeError, r"one value for each mean.*does not check"),
    "epsilon": ({"epsilon": -1e-5}, ConfigError, r"epsilon must be 0 or more.*BAD_PARAM"),
    "factor": ({"exponential_average_factor": 1.5}, ConfigError, r"from 0 to 1.*does not check"),
    "no scale": ({"scale": None}, ShapeError, r"scale is missing.*BAD_PARAM"),
    "short bias": ({"bias": draw(2)}, ShapeError, r"bias of \(2,\) does not fit SPATIAL.*beyond"),
    "same size": ({"bias": draw(3, 1, 1, 5)}, ShapeError, r"wants \(1, 3, 1, 1\)"),
    "float scale": ({"scale": torch.ones(3)}, ShapeError, r"must be torch.float64.*BAD_PARAM"),
    "gaps": ({"scale": draw(6)[::2]}, ShapeError, r"scale must be contiguous and on cpu"),
    "mean alone": ({"running_mean": draw(3)}, ShapeError, r"go together.*does not check"),
    "y's shape": ({"y": draw(4, 3, 5, 5)}, ShapeError, r"y must be like x.*BAD_PARAM"),
    "y's layout": ({"y": Case(SPATIAL, "NHWC").y}, ShapeError, r"y must lie in memory as x does"),
    "beta, no y": ({"beta": 1.0}, ShapeError, r"beta of 1.0 takes the prior value of y"),
}


@pytest.mark.parametrize(("changes", "kind", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_call_changes_nothing(ran, changes, kind, words):
    case = Case(SPATIAL)
    buffers = {
        "running_mean": case.mean.reshape(3),
        "running_variance": case.variance.reshape(3),
        "y": case.y,
    }
    if "running_mean" in changes:
        del buffers["running_variance"]
    before = {name: t.clone() for name, t in buffers.items()}
    right = {"mode": SPATIAL, "x": case.x, "scale": case.scale, "bias": case.bias, **buffers}
    if "beta" in changes:
        del right["y"]
    options = {"exponential_average_factor": FACTOR, "epsilon": EPS}
    with pytest.raises(kind, match=words):
        cudnn.batch_normalization_forward_training(**{**right, **options, **changes})
    for name, t in before.items():
        assert torch.equal(t, buffers[name]), name


def test_wrong_backward_calls(ran):
    case = Case(SPATIAL)
    one = draw(3)
    for changes, words in [
        ({"saved_mean": one}, "saved_mean and saved_inv_variance go together.*BAD_PARAM"),
        ({"beta_data_diff": 1.0}, "prior value of dx"),
        ({"beta_param_diff": 1.0}, "prior value of d_scale"),
        ({"dx": case.dy}, "dx shares memory with dy"),
        ({"dx": case.x}, "dx shares memory with x"),
        ({"d_scale": one, "d_bias": one}, "d_scale shares memory with d_bias"),
        ({"d_scale": draw(4)}, r"d_scale of \(4,\) does not fit"),
    ]:
        with pytest.raises(ShapeError, match=words):
            case.backward(**changes)
    with pytest.raises(ShapeError, match="y shares memory with x"):
        case.forward(y=case.x)
    case.dy = draw(4, 3, 5, 3)
    with pytest.raises(ShapeError, match="dy must be like x"):
        case.backward()


def test_wrong_ex_calls(ran):
    case = Case(SPATIAL)
    options = {"exponential_average_factor": FACTOR, "epsilon": EPS}
    vectors = (case.scale, case.bias)
    for ops, changes, kind, words in [
        (3, {}, ConfigError, r"no bn_ops 3; choose one of BN \(0\)"),
        (ADD_ACTIVATION, {}, ShapeError, "BN_ADD_ACTIVATION needs z; .*BAD_PARAM"),
        (BN, {"z": case.z}, ShapeError, "BN takes no z"),
        (ACTIVATION, {"alpha": 2.0}, ConfigError, r"BN_ACTIVATION with alpha and beta of \(2.0"),
        (ACTIVATION, {}, ConfigError, "not for SPATIAL on NCHW; .*NOT_SUPPORTED"),
        (ADD_ACTIVATION, {"z": case.z}, ConfigError, "for SPATIAL_PERSISTENT on NHWC"),
    ]:
        with pytest.raises(kind, match=words):
            cudnn.batch_normalization_forward_training_ex(
                SPATIAL, ops, case.x, *vectors, **options, **changes
            )


def test_derived_descriptors():
    x = torch.empty(2, 3, 4, 5, dtype=torch.float16).to(memory_format=torch.channels_last)
    derive = cudnn.derive_bn_tensor_descriptor
    assert derive(x, SPATIAL) == ((1, 3, 1, 1), (3, 1, 1, 1), torch.float32)
    assert derive(x, PER_ACTIVATION) == ((1, 3, 4, 5), (60, 20, 5, 1), torch.float32)
    assert derive(x.double()[:, :, 0], PERSISTENT)[0] == (1, 3, 1, 1)
    assert derive(x[:, :, 0, 0].double(), 0) == ((1, 3, 1, 1), (3, 1, 1, 1), torch.float64)
    assert derive(torch.empty(2, 3, 4, 5, 6), PER_ACTIVATION).shape == (1, 3, 4, 5, 6)
    assert derive(torch.empty(2, 3, 4, 5, 6), SPATIAL).shape == (1, 3, 1, 1, 1)
