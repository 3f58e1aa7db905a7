"""What can only be seen on a GPU. Run with: pytest -m gpu. Not yet seen on one."""

from __future__ import annotations

import importlib
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from evenkeel.direct import gpu
from evenkeel.errors import BackendError
from evenkeel.functional import batch_norm, normalize
from evenkeel.kernels.select import choose
from evenkeel.nn import BatchNorm2d
from evenkeel.study.arms import Arm
from evenkeel.study.data import load
from evenkeel.study.trial import run_trial
from evenkeel.view import view_of

from .kernels.contract import Contract
from .study.helpers import tiny_plan

pytestmark = pytest.mark.gpu


class TestReferenceOnGpu(Contract):
    name = "reference"
    device = torch.device("cuda")


class TestTritonOnGpu(Contract):
    name = "triton"
    device = torch.device("cuda")


SMALL = {"tile": 256, "resident": 0, "least": 64, "programs": (24, 24)}
SHAPES = {
    "prime sizes": ("n c h w -> c", (5, 13, 31, 29)),
    "vectors of eight": ("n c h w -> c", (6, 24, 16, 16)),
    "7 x 7": ("n c h w -> c", (64, 40, 7, 7)),
    "14 x 14": ("n c h w -> c", (16, 72, 14, 14)),
    "few channels": ("n c h w -> c", (8, 3, 97, 101)),
    "per activation": ("n c h w -> c h w", (33, 5, 7, 11)),
    "per location": ("n c h w -> h w", (9, 5, 17, 8)),
}


BLOCKS = {"chosen": {}, "merged where needed": {"fused": 64}, "merged apart": {"fused": 0}}
"""How Triton divides the work: as it chooses, or in pieces so small that all is split."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "relu", "leaky_relu", "relu6", "silu")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
DEALT = [
    (shape, blocks, LAYOUTS[k], DTYPES[(i + j + k) % 3], ACTIVATIONS[(i + 2 * j + k) % 5])
    for (i, shape), (j, blocks), k in product(enumerate(SHAPES), enumerate(BLOCKS), range(2))
]


@pytest.mark.parametrize(("shape", "blocks", "layout", "dtype", "activation"), DEALT)
def test_triton_agrees_with_float64_on_the_cpu(
    shape, blocks, layout, dtype, activation, monkeypatch
):
    """y and all gradients, with the sum before the activation; the same bits when called again."""
    planning = importlib.import_module("evenkeel.kernels.triton.planning")
    if BLOCKS[blocks]:
        monkeypatch.setattr(planning, "LIMITS", planning.Limits(**SMALL, **BLOCKS[blocks]))
    gpu._plan.cache_clear()
    pattern, shape = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    x, dy, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    own = [size for axis, size in zip("nchw", shape, strict=True) if axis in pattern[11:]]
    weight, bias = (torch.randn(own, generator=generator) for _ in range(2))

    def run(device, to, backend):
        tensors = [t.to(device, to).contiguous(memory_format=layout) for t in (x, residual)]
        tensors += [t.to(device, torch.promote_types(to, torch.float32)) for t in (weight, bias)]
        given = x_, residual_, weight_, bias_ = [t.requires_grad_() for t in tensors]
        options = {"residual": residual_, "activation": activation, "backend": backend}
        y = normalize(x_, pattern, weight=weight_, bias=bias_, **options)
        into = dy.to(device, to).contiguous(memory_format=layout)
        return [y, *torch.autograd.grad(y, given, into)]

    mine, again = run("cuda", dtype, "triton"), run("cuda", dtype, "triton")
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for got, exact in zip(mine, run("cpu", torch.float64, "reference"), strict=True):
        scale = float(exact.abs().max())
        off = (got.double().cpu() - exact).abs() > tolerance * scale
        assert int(off.sum()) <= off.numel() // 1000  # a value at a kink may take the other side


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_triton_beyond_two_to_the_31_values(layout):
    """Offsets of 64 bits: the last image is as far away as it gets."""
    shape = (67, 32, 1024, 1024)
    x = torch.zeros(shape, device="cuda", dtype=torch.bfloat16).to(memory_format=layout)
    assert x.numel() > 2**31
    x[0] = 3
    x[-1] = -5
    y = normalize(x, "n c h w -> c", backend="triton")
    mean = (3 - 5) / shape[0]
    scale = ((9 + 25) / shape[0] - mean**2) ** -0.5
    for image, value in ((0, 3), (1, 0), (-1, -5)):
        wanted = torch.full_like(y[image], (value - mean) * scale)
        torch.testing.assert_close(y[image], wanted, rtol=1e-2, atol=1e-2)
    residual = torch.zeros_like(x).requires_grad_()
    options = {"residual": residual, "activation": "relu", "backend": "triton"}
    y = normalize(x, "n c h w -> c", **options)
    y.backward(torch.ones_like(y))  # by the bits that are kept
    for image, passes in ((0, 1), (1, 1), (-1, 0)):
        assert bool((residual.grad[image] == passes).all())


def test_triton_is_taken_where_it_runs():
    view = view_of((4, 3, 5, 7), (105, 35, 7, 1), (1,))
    assert choose("triton", view, torch.float32, torch.device("cuda")).name == "triton"
    with pytest.raises(BackendError, match=r"it has no kernels for torch\.float64"):
        choose("triton", view, torch.float64, torch.device("cuda"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_moves_running_statistics(layout):
    """In its own kernels, resident, merged where needed and merged apart; and not in inference."""
    for shape in ((32, 8, 7, 7), (32, 8, 28, 28), (64, 3, 64, 64)):
        x = torch.randn(shape, device="cuda").to(memory_format=layout) * 3 + 10
        ours, theirs = BatchNorm2d(shape[1]).cuda(), torch.nn.BatchNorm2d(shape[1]).cuda()
        ours.backend = "triton"
        for training in (True, True, False):
            y, wanted = (norm.train(training)(x) for norm in (ours, theirs))
            torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_triton_from_slices_of_a_larger_buffer():
    """Vectors that do not begin at a multiple of 16 bytes, as flattened parameters have them."""
    flat = torch.rand(64, device="cuda")
    x = torch.randn(16, 8, 14, 14, device="cuda")
    for start in (0, 1, 8, 3):
        weight, bias = flat[start : start + 8], flat[start + 9 : start + 17]
        y = batch_norm(x, weight, bias, training=True, backend="triton")
        wanted = F.batch_norm(x, None, None, weight, bias, training=True)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_inside_a_compiled_graph(layout):
    """Between a convolution and sums, in bfloat16 under autocast, forward and backward."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(8, 16, 3, padding=1, bias=False), BatchNorm2d(16)
            self.norm.backend, self.norm.activation = "triton", "relu"

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x, x / 2) + 1

    torch.manual_seed(0)
    net = Net().cuda().to(memory_format=layout)
    x = torch.randn(8, 8, 12, 12, device="cuda").to(memory_format=layout)
    found = []
    for step in (net, torch.compile(net, fullgraph=True)):
        net.norm.reset_running_stats()
        net.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            y = step(x)
        y.float().square().mean().backward()
        found.append([y.float(), *(p.grad.clone() for p in net.parameters()), *net.buffers()])
        found[-1] = [t.clone() for t in found[-1]]
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got.float(), wanted.float(), rtol=3e-2, atol=3e-2)


def test_triton_under_ddp(tmp_path):
    """One process, NCCL: buffers are broadcast and gradients reduced as for torch's norms."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_nccl_available()):
        pytest.skip("torch has no NCCL here")
    dist.init_process_group("nccl", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        norm = BatchNorm2d(8).cuda()
        norm.backend = "triton"
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), norm, torch.nn.ReLU()).cuda()
        ddp = torch.nn.parallel.DistributedDataParallel(net, device_ids=[0])
        x = torch.randn(4, 3, 9, 9, device="cuda")
        ddp(x).square().mean().backward()
        own = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        net(x).square().mean().backward()
        for got, p in zip(own, net.parameters(), strict=True):
            torch.testing.assert_close(got, p.grad, rtol=1e-4, atol=1e-5)
        assert int(norm.num_batches_tracked) == 2
        sync = torch.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm2d(8).cuda())
        norm.reset_running_stats()
        torch.testing.assert_close(sync(net[0](x)), norm(net[0](x)), rtol=1e-4, atol=1e-4)
    finally:
        dist.destroy_process_group()


def test_triton_in_a_cuda_graph():
    """Nothing waits for the device: a training step is captured, and replayed on other values."""
    weight, bias = torch.rand(8, device="cuda"), torch.rand(8, device="cuda")

    def layer(x):
        return batch_norm(x, weight, bias, training=True, backend="triton")

    x = torch.randn(16, 8, 14, 14, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles
            torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
    with torch.no_grad():
        x.copy_(torch.randn(16, 8, 14, 14) * 2 + 5)
    graph.replay()
    other = x.detach().clone().requires_grad_()
    wanted = F.batch_norm(other, None, None, weight, bias, training=True)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    (wanted_dx,) = torch.autograd.grad(wanted.square().sum(), other)
    torch.testing.assert_close(dx, wanted_dx, rtol=1e-3, atol=1e-4)


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
