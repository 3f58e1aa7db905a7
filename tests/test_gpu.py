"""What can only be seen on a GPU. Run with: pytest -m gpu. Not yet seen on one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from evenkeel.functional import batch_norm, normalize
from evenkeel.nn import BatchNorm2d
from evenkeel.study.arms import Arm
from evenkeel.study.data import load
from evenkeel.study.trial import run_trial

from .kernels.contract import Contract
from .study.helpers import tiny_plan

pytestmark = pytest.mark.gpu


class TestReferenceOnGpu(Contract):
    name = "reference"
    device = torch.device("cuda")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batch_norm_agrees_with_float64_on_the_cpu(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(8, 6, 9, 7, generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(6, generator=generator) for _ in range(2))

    def run(device, to):
        tensors = [t.to(device).to(to) for t in (x, weight, bias)]
        if to == dtype:
            tensors[1:] = [weight.to(device), bias.to(device)]
        tensors[0] = tensors[0].to(memory_format=layout)
        tensors = [t.requires_grad_() for t in tensors]
        y = batch_norm(*tensors, training=True, activation="relu")
        return [y, *torch.autograd.grad(y, tensors, dy.to(device).to(y.dtype))]

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for mine, exact in zip(run("cuda", dtype), run("cpu", torch.float64), strict=True):
        scale = float(exact.abs().max())
        assert float((mine.double().cpu() - exact).abs().max()) <= tolerance * scale


def test_running_statistics_agree_with_torch():
    x = torch.randn(16, 5, 8, 8, device="cuda") * 3 + 10
    ours, theirs = BatchNorm2d(5).cuda(), torch.nn.BatchNorm2d(5).cuda()
    for _ in range(3):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_autocast_keeps_the_input_dtype():
    x = torch.randn(4, 3, 8, 8, device="cuda", dtype=torch.float16)
    mean, var, one = torch.zeros(3).cuda(), torch.ones(3).cuda(), torch.ones(3).cuda()
    with torch.autocast("cuda"):
        ours = batch_norm(x, one, mean, training=True)
        theirs = F.batch_norm(x, mean.clone(), var, one, mean, training=True)
    assert ours.dtype == theirs.dtype


def test_torch_compile_keeps_one_graph():
    layer = torch.compile(BatchNorm2d(4).cuda(), fullgraph=True)
    x = torch.randn(8, 4, 6, 6, device="cuda", requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    y = torch.compile(lambda t: normalize(t, "n c h w -> c h w"), fullgraph=True)(x)
    torch.testing.assert_close(y, normalize(x, "n c h w -> c h w"))


def test_a_trial_repeats():
    arm = Arm("normed", placement="before-activation")
    first, second = (
        run_trial(tiny_plan(arm), arm, 0, load("digits"), torch.device("cuda")) for _ in range(2)
    )
    bare = {"seconds": 0.0, "provenance": {}}
    assert replace(first, **bare) == replace(second, **bare)
