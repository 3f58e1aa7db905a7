"""The cuDNN backend on the host's cuDNN: every view it takes, in the contract's tolerances."""

from __future__ import annotations

import pytest
import torch

from evenkeel.errors import BackendError
from evenkeel.kernels.contract import Activation
from evenkeel.kernels.cudnn import Cudnn, arrangement
from evenkeel.kernels.cudnn_api import library as found
from evenkeel.kernels.cudnn_api.values import BatchNormMode
from evenkeel.view import View, logical_view, view_of

from ..kernels.contract import (
    check_apply,
    check_backward,
    check_empty,
    check_forward_training,
    check_side_effects,
)
from ..kernels.truth import ROWS, subject

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SPATIAL, PER_ACTIVATION = BatchNormMode.SPATIAL, BatchNormMode.PER_ACTIVATION
CALLS = (check_apply, check_forward_training, check_backward, check_side_effects)
NEAR_ZERO = [row for row in ROWS if row.mean == 0 and "tile" not in row.why]
PLAIN = {row.why: row for row in NEAR_ZERO}
HALVES = ("spatial, NCHW", "spatial, NHWC", "per activation", "values at the kinks")
NAMES = {
    "cudnnBatchNormalizationForwardInference",
    "cudnnBatchNormalizationForwardTraining",
    "cudnnBatchNormalizationBackward",
}


def names_called(host):
    return {name for name in host.names if name in NAMES}


@pytest.mark.parametrize("row", NEAR_ZERO, ids=lambda row: row.why)
def test_float64(fake, row):
    """Where values are far from zero the precision of cuDNN's kernels counts, and not ours."""
    s = subject(row, torch.float64, CPU)
    reason = arrangement(s.view)
    if isinstance(reason, str):
        assert "k1 > 1" in reason or "not four" in reason
        return
    for check in CALLS:
        check(Cudnn(), s)
    wanted = NAMES if s.count > 1 else NAMES - {"cudnnBatchNormalizationForwardTraining"}
    assert names_called(fake) == wanted, "the reference computed it all"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("why", HALVES)
def test_other_dtypes_round_once(fake, why, dtype):
    """Their parameters are float32 on the host too, so rows far from zero are left to a GPU."""
    s = subject(PLAIN[why], dtype, CPU)
    for check in CALLS[:2]:
        check(Cudnn(), s)
    assert "cudnnBatchNormalizationForwardTraining" in names_called(fake)


def test_the_checks_see_a_wrong_cudnn(fake, monkeypatch):
    """As if the running variance were the biased one, or the blend were lost."""
    s = subject(PLAIN["spatial, NCHW"], torch.float64, CPU)
    right = fake.blended

    def loses_the_prior(alpha, beta, d, into, result):
        into.zero_()
        right(alpha, beta, d, into, result)

    monkeypatch.setattr(fake, "blended", loses_the_prior)
    with pytest.raises(AssertionError, match="y of"):
        check_forward_training(Cudnn(), s)


def test_an_empty_batch(fake):
    check_empty(Cudnn(), torch.float32, CPU)
    assert fake.names == ["cudnnGetVersion"]


@pytest.mark.parametrize(
    ("shape", "order", "kept", "mode", "dims", "strides"),
    [
        ((4, 3, 5, 7), "nchw", (1,), SPATIAL, (4, 3, 35, 1), (105, 35, 1, 1)),
        ((4, 3, 5, 7), "nhwc", (1,), SPATIAL, (1, 3, 140, 1), (420, 1, 3, 3)),
        ((19, 7), "nc", (1,), SPATIAL, (1, 7, 19, 1), (133, 1, 7, 7)),
        ((5, 70), "nc", (1,), PER_ACTIVATION, (5, 70, 1, 1), (70, 1, 1, 1)),
        ((5, 3, 4, 2), "nchw", (1, 2, 3), PER_ACTIVATION, (5, 24, 1, 1), (24, 1, 1, 1)),
        ((5, 3, 4, 2), "nhwc", (1, 2, 3), PER_ACTIVATION, (5, 24, 1, 1), (24, 1, 1, 1)),
        ((5, 3, 4, 2), "nchw", (), SPATIAL, (1, 1, 120, 1), (120, 120, 1, 1)),
    ],
)
def test_what_cudnn_is_told(shape, order, kept, mode, dims, strides):
    x = torch.empty(shape)
    if order == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    told = arrangement(view_of(x.shape, x.stride(), kept))
    assert told.mode == mode
    assert told.layout == (dims, strides)


def test_what_it_refuses(fake):
    backend, view = Cudnn(), logical_view((2, 3, 4, 5), (1,))
    assert backend.refuses(view, torch.bfloat16, CUDA) is None
    assert "not on cpu" in backend.refuses(view, torch.float32, CPU)
    assert "no batch norm for torch.int8" in backend.refuses(view, torch.int8, CUDA)
    for sizes, words in [
        ((2, 3, 4, 5), "k1 > 1"),
        ((1, 2**17, 2, 2), "131072 samples are more"),
        ((1, 2**16, 2**14, 2), "2\\^31"),
        ((1, 2, 3, 4, 5, 6), "not four"),
    ]:
        view = View(sizes, tuple(range(len(sizes))), (0, 2))
        assert words.replace("\\", "") in backend.refuses(view, torch.float32, CUDA)
    assert "cuDNN 9.28.0" in backend.describe()


def test_the_inference_backward_is_the_references(fake):
    """cuDNN's own is that of training only."""
    s = subject(PLAIN["spatial, NCHW"], torch.float64, CPU)
    backend, x, dy = Cudnn(), s.tensor(s.x), s.tensor(s.dy)
    affine = s.affine(_Bare)
    backend.backward(dy, x, s.view, affine, Activation(), None, False)
    assert not names_called(fake)
    backend.backward(dy, x, s.view, affine, Activation(), None, True)
    assert names_called(fake) == {"cudnnBatchNormalizationBackward"}


class _Bare:
    has_weight = has_bias = False


def test_without_a_library_it_says_so(monkeypatch):
    monkeypatch.setattr(found, "_search", lambda: "there is none here")
    with pytest.raises(BackendError, match="there is none here"):
        Cudnn()
