"""PyTorch's own sample inputs of batch_norm, with its own answers and refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import SampleInput

from evenkeel.errors import ShapeError
from evenkeel.functional import batch_norm

CLOSE = {torch.float64: (1e-11, 1e-11), torch.float32: (2e-6, 1e-5)}
OPS = [op for op in op_db if op.name == "nn.functional.batch_norm"]


def samples(dtype: torch.dtype) -> Iterator[SampleInput]:
    for op in OPS:
        yield from op.sample_inputs("cpu", dtype, requires_grad=True)


def outcome(call, sample: SampleInput) -> list[Tensor | None]:
    """y, the buffers after it, and the gradients of x, weight and bias."""
    x, *given = (
        None if t is None else t.detach().clone().requires_grad_(t.requires_grad)
        for t in (sample.input, *sample.args)
    )
    y = call(x, *given, **sample.kwargs)
    leaves = [t for t in (x, *given[2:]) if t is not None]
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y.detach(), *given[:2], *torch.autograd.grad(y, leaves, dy)]


def ours(x, running_mean, running_var, weight, bias, training=False, **options) -> Tensor:
    return batch_norm(x, weight, bias, running_mean, running_var, training=training, **options)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_every_sample(dtype: torch.dtype) -> None:
    """Where torch refuses we do; where it answers so do we, but for tensors without channels."""
    rtol, atol = CLOSE[dtype]
    answered = refused = 0
    for sample in samples(dtype):
        if sample.input.dim() < 2:  # torch lets an empty vector pass; it has no channel axis
            with pytest.raises(ShapeError, match="at least 2 dimensions but got 1"):
                outcome(ours, sample)
            refused += 1
            continue
        try:
            wanted = outcome(F.batch_norm, sample)
        except (ValueError, RuntimeError):
            with pytest.raises((ValueError, RuntimeError), match="one value per owner"):
                outcome(ours, sample)
            refused += 1
            continue
        got = outcome(ours, sample)
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)
        answered += 1
    assert answered >= 8
    assert refused >= 2


def test_a_wrong_answer_is_seen() -> None:
    for sample in samples(torch.float64):
        if sample.kwargs.get("training") and sample.input.dim() > 2 and sample.args[0] is not None:
            got, wanted = outcome(ours, sample), outcome(F.batch_norm, sample)
            got[2] = got[2] * (1 + 1e-6)
            with pytest.raises(AssertionError):
                torch.testing.assert_close(got[2], wanted[2], rtol=1e-11, atol=1e-11)
            return
    raise AssertionError("no sample trains")


ONE_VALUE = [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 1, 1, 1, 1), (1, 0)]


@pytest.mark.parametrize("shape", ONE_VALUE, ids=str)
def test_one_value_per_channel_is_refused_by_both(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        F.batch_norm(x, None, None, training=True)
    with pytest.raises(ShapeError, match="one value per owner"):
        batch_norm(x, training=True)
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    wanted = F.batch_norm(x, mean, var)
    torch.testing.assert_close(batch_norm(x, None, None, mean, var, training=False), wanted)


def test_the_samples_are_there() -> None:
    assert len(OPS) == 2
    assert {s.kwargs.get("training") for s in samples(torch.float64)} == {True, False, None}
