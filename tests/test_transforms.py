"""Tangents, torch.func's transforms and odd tensors: what torch's own norm does, ours does too."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import evenkeel
from evenkeel.errors import ConfigError
from evenkeel.nn.folded import ScaleShift
from evenkeel.nn.packed import pack_module
from evenkeel.pattern import parse

from .kernels.test_triton import WAYS  # noqa: F401 - loads the kernels, interpreted


def pair(training: bool) -> tuple[nn.Module, nn.Module]:
    """Torch's norm and ours with the same numbers, in float64."""
    torch.manual_seed(0)
    theirs, ours = nn.BatchNorm2d(3).double(), evenkeel.BatchNorm2d(3).double()
    with torch.no_grad():
        for value in (*theirs.parameters(), *theirs.buffers()):
            if value.is_floating_point():
                value.uniform_(0.5, 1.5)
    ours.load_state_dict(theirs.state_dict())
    return theirs.train(training), ours.train(training)


# Torch's own, when it loads its formulas for tangents.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)).double()
V = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(2)).double()


@pytest.mark.parametrize("training", [True, False])
def test_tangents(training):
    found = []
    for norm in pair(training):
        if training:  # torch's transforms allow no module to count its batches
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        jvp = torch.func.jvp(lambda x, norm=norm: x + norm(x), (X,), (V,))
        with forward_ad.dual_level():
            y = norm(forward_ad.make_dual(X.clone().requires_grad_(), V))
            tangent = forward_ad.unpack_dual(y).tangent
        found.append((*jvp, tangent))
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_transforms(training):
    found = []
    for norm in pair(training):
        if training:
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None

        def loss(x, weight, norm=norm):
            given = {"weight": weight, "bias": norm.bias}
            return torch.func.functional_call(norm, given, (x,)).pow(3).sum((0, 2, 3))

        weight = norm.weight.detach()
        found.append(
            (
                torch.func.jacrev(loss)(X, weight),
                torch.func.jacfwd(loss)(X, weight),
                torch.func.grad(lambda x, w, loss=loss: loss(x, w).sum(), 1)(X, weight),
                torch.func.vmap(loss, (0, None))(torch.stack([X, V]), weight),
            )
        )
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize("residual", [False, True])
def test_tangents_of_gradients(backend, residual):
    """Forward over reverse: the gradient of what comes with a tangent has one, too."""
    found = []
    for ours in (False, True):
        x, w = X.float().requires_grad_(), torch.rand(3, generator=torch.Generator().manual_seed(3))
        added = V.float() if residual else None
        if ours:
            options = {"training": True, "activation": "relu", "residual": added}
            y = evenkeel.batch_norm(x, w, backend=backend, **options)
        else:
            y = nn.functional.batch_norm(x, None, None, w, training=True)
            y = torch.relu(y if added is None else y + added)
        with forward_ad.dual_level():
            (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(V.float(), X.float()))
            found.append(forward_ad.unpack_dual(dx))
    torch.testing.assert_close(found[1].primal, found[0].primal, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1].tangent, found[0].tangent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [
    lambda y: nn.functional.l1_loss(y, torch.zeros_like(y)),
    lambda y: y.norm(p=1),
], ids=["l1", "norm"])  # fmt: skip
def test_gradients_that_torch_knows_to_be_zero(loss):
    """Torch hands back a tensor without memory there: the kernels must not be told of it."""
    found = []
    for norm in pair(True):
        x = X.clone().requires_grad_()
        (dx,) = torch.autograd.grad(loss(norm(x)), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x)[0])
        norm(x).sgn().sum().backward()
    torch.testing.assert_close(found[1], found[0])


def test_what_hides_its_sign():
    x, w = X.float(), torch.rand(3)
    wanted = evenkeel.batch_norm(-x, w, training=True, residual=-x)
    negated = torch._neg_view(x)
    found = evenkeel.batch_norm(negated, w, training=True, residual=torch._neg_view(x))
    torch.testing.assert_close(found, wanted)
    found = evenkeel.batch_norm(-x, w, training=True, residual=torch._neg_view(x))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_checkpoints_that_leave_early(momentum):
    """Recomputation ends with an exception out of the last norm; it was a batch all the same."""
    found = []
    for kind in (nn.BatchNorm2d, evenkeel.BatchNorm2d):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 3, 1), kind(3, momentum=momentum))
        for step in range(6):
            x = torch.randn(8, 3, 5, 5) + step
            checkpoint(network, x, use_reentrant=False).square().sum().backward()
        found.append(network[1].state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


def test_what_autograd_cannot_keep_moves_no_statistics():
    norm = evenkeel.BatchNorm2d(3)
    with torch.inference_mode():
        x = torch.randn(4, 3, 5, 5)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        norm(x)
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert norm.num_batches_tracked == 0


def test_scale_and_shift_know_wrappers_and_survive_meta():
    shift = ScaleShift(torch.full((8,), 2.0), torch.full((8,), 5.0), torch.zeros(8))
    x = torch.randn(4, 8, 6, 6)
    with torch.no_grad():
        wanted = shift(x)
        again = ScaleShift(*torch.zeros(3, 8)).to("meta").to_empty(device="cpu")
        again.load_state_dict(shift.state_dict())
        torch.testing.assert_close(again(x), wanted)
        again.scale = TwoTensor(again.scale, again.scale.clone())
        found = again(x)
        torch.testing.assert_close(found.a if isinstance(found, TwoTensor) else found, wanted)
    assert sorted(dict(shift.named_buffers())) == ["center", "scale", "shift"]


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("size", [1, 3])
def test_a_packed_convolution_adds_one_image_to_all(size, groups):
    conv, plain = (nn.Conv2d(16, 16, size, padding=size // 2, groups=groups) for _ in range(2))
    plain.load_state_dict(conv.state_dict())
    pack_module(conv)
    x = torch.randn(4, 16, 12, 12).contiguous(memory_format=torch.channels_last)
    one = torch.randn(1, 16, 12, 12).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        conv(x, torch.randn(4, 16, 12, 12))
        torch.testing.assert_close(conv(x, one), plain(x) + one, rtol=1e-4, atol=1e-4)


def test_in_place_over_what_lies_in_one_place():
    buffer = torch.randn(5, 16, 5, 3)
    options = {"training": True}
    wanted = evenkeel.batch_norm(buffer[1:], residual=buffer[:4], **options)
    found = evenkeel.batch_norm(buffer[1:], residual=buffer[:4], inplace=True, **options)
    torch.testing.assert_close(found, wanted)
    x = buffer.clone()
    wanted = evenkeel.batch_norm(x, residual=x, **options)
    torch.testing.assert_close(evenkeel.batch_norm(x, residual=x, inplace=True, **options), wanted)
    mean, var = torch.zeros(16), torch.ones(16)
    wide = torch.randn(4, 16, 1, 1).expand(4, 16, 5, 3)
    with pytest.raises(ConfigError, match="several of its values lie in one place"):
        evenkeel.batch_norm(wide, None, None, mean, var, inplace=True, **options)
    assert torch.equal(mean, torch.zeros(16))


def test_low_memory_behind_hooks_that_change_layouts():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    network = network.to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    low, _ = evenkeel.accelerate(network, x, memory="low")

    def pack(t):
        return torch.empty(t.size(), dtype=t.dtype).copy_(t)

    network(x).sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = low(x).sum()
    loss.backward()
    for ours, theirs in zip(low.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)


def test_symbolic_sizes_are_traced():
    from torch.fx.experimental.proxy_tensor import make_fx

    spec = parse("n c h w -> c")
    graph = make_fx(lambda x: evenkeel.normalize(x, spec), tracing_mode="symbolic")(X.float())
    torch.testing.assert_close(graph(V.float()), evenkeel.normalize(V.float(), spec))
