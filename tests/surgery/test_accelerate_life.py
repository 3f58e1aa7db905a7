"""An accelerated network lives on: checkpoints, copies, hooks, compilers, DDP, autocast."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import traceback
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evenkeel
from evenkeel.surgery.accelerating.remade import Remade

from .cnns import ZOO, BasicBlock, ResNet, built, images

NAMES = ("vgg", "resnet", "functional", "mobilenet", "branches", "untraceable")


def fast(name: str = "resnet") -> nn.Module:
    return evenkeel.accelerate(built(name))[0]


def trained(model: nn.Module, seed: int = 0) -> list[torch.Tensor]:
    """Output, memory and gradients of one step."""
    model.train()
    torch.manual_seed(seed)
    y = model(images())
    gradients = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    return [y.detach(), *gradients, *[b.clone() for b in model.buffers()]]


def same(a: nn.Module, b: nn.Module) -> None:
    for mine, other in zip(trained(a), trained(b), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", ZOO)
def test_checkpoints_go_both_ways(name):
    model = built(name)
    quick = fast(name)
    trained(model)
    assert list(quick.state_dict()) == list(model.state_dict())
    quick.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(quick.eval()(images()), model.eval()(images()), rtol=1e-4, atol=1e-5)
    trained(quick)
    model.load_state_dict(quick.state_dict(), strict=True)
    torch.testing.assert_close(model.eval()(images()), quick.eval()(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_copies_and_pickles(name):
    quick = fast(name)
    saved = io.BytesIO()
    torch.save(quick, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(quick),
        torch.load(saved, weights_only=False),
        *[pickle.loads(pickle.dumps(quick, protocol)) for protocol in (0, 2, 5)],
        copy.deepcopy(pickle.loads(pickle.dumps(quick))),
    ]
    for other in copies:
        assert [type(m) for m in other.modules()] == [type(m) for m in quick.modules()]
        same(other, copy.deepcopy(quick))
        back = evenkeel.restore(other)
        assert [type(m) for m in back.modules()] == [type(m) for m in built(name).modules()]


def test_a_shallow_copy_shares_the_weights():
    quick = fast()
    other = copy.copy(quick)
    assert type(other) is type(quick)
    assert other.conv1 is quick.conv1
    assert torch.equal(other.eval()(images()), quick.eval()(images()))


@pytest.mark.parametrize(
    ("name", "backend"), [("vgg", "eager"), ("resnet", "aot_eager"), ("branches", "aot_eager")]
)
def test_compiled_in_one_graph(name, backend):
    torch._dynamo.reset()
    quick = fast(name).eval()
    compiled = torch.compile(copy.deepcopy(quick), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(images()), quick(images()), rtol=1e-5, atol=1e-6)
    quick.train()
    compiled.train()
    for module in (*quick.modules(), *compiled.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x, other = (images().requires_grad_() for _ in range(2))
    y, wanted = compiled(x), quick(other)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["vgg", "resnet", "branches"])
def test_exported(name, strict):
    quick = fast(name).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(quick, (images(),), dynamic_shapes=({0: batch},), strict=strict)
    x = images(7)
    torch.testing.assert_close(program.module()(x), quick(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    model, quick = built(name), fast(name)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        wanted = model(images())
        torch.manual_seed(0)
        y = quick(images())
    assert y.dtype == wanted.dtype
    torch.testing.assert_close(y, wanted, rtol=0.2, atol=0.1)
    y.float().square().sum().backward()
    assert all(p.grad is not None for p in quick.parameters() if p.requires_grad) or (
        name == "untraceable"
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_channels_last(layout):
    quick = fast().to(memory_format=layout).eval()
    x = images().to(memory_format=layout)
    torch.testing.assert_close(quick(x), built("resnet").eval()(x), rtol=1e-4, atol=1e-5)


def test_distributed_data_parallel(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch is built without gloo here")
    from torch.nn.parallel import DistributedDataParallel

    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        models = [DistributedDataParallel(fast()), fast()]
        for model in models:
            model(images()).square().sum().backward()
        for mine, other in zip(*(m.parameters() for m in models), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)
        wrapped = DistributedDataParallel(built("resnet"))
        evenkeel.accelerate(wrapped.module, images(), inplace=True)
        wrapped(images()).sum().backward()
        assert isinstance(wrapped.module.layer1[0], Remade)
    finally:
        torch.distributed.destroy_process_group()


# Hooks, attributes, classes


def test_hooks_of_containers_and_layers_fire():
    model = built("resnet")
    seen: list[str] = []
    for path in ("layer1", "layer1.0", "layer1.0.conv1", "layer2.0.downsample", "fc"):
        hook = lambda *_, path=path: seen.append(path)  # noqa: E731
        model.get_submodule(path).register_forward_hook(hook)
    quick, report = evenkeel.accelerate(model)
    assert len(report.swapped) == 8
    quick(images())
    assert sorted(seen) == sorted(
        ["layer1", "layer1.0", "layer1.0.conv1", "layer2.0.downsample", "fc"]
    )


def test_hooks_set_later_see_the_activations():
    model, quick = built("resnet").eval(), fast().eval()
    seen: list[list[torch.Tensor]] = []
    for network in (model, quick):
        seen.append([])
        for path in ("relu", "layer1.0.relu", "layer1"):
            network.get_submodule(path).register_forward_hook(
                lambda *given, to=seen[-1]: to.append(given[2].clone())
            )
        network(images())
    assert len(seen[0]) == len(seen[1]) == 4
    for mine, wanted in zip(*seen, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


def test_attributes_methods_and_modes_stay():
    model = built("resnet")
    model.layer1[0].note = "mine"
    model.layer1[1].eval()
    model.conv1.weight.requires_grad_(False)
    quick, _ = evenkeel.accelerate(model)
    block = quick.layer1[0]
    assert isinstance(block, BasicBlock)
    assert (block.note, block.stride) == ("mine", 1)
    assert quick._forward.__func__ is ResNet._forward
    assert [m.training for m in quick.modules()] == [m.training for m in model.modules()]
    assert not quick.conv1.weight.requires_grad
    assert type(quick.layer1[0]) is type(quick.layer1[1])
    assert type(block).__qualname__ == "BasicBlock"
    assert type(block).__module__ == BasicBlock.__module__


def test_a_new_module_of_its_class_is_a_plain_one():
    block = fast().layer1[0]
    assert type(type(block)(8, 8)) is BasicBlock
    body = fast("branches")[0].shortcut
    assert isinstance(body, Remade)
    assert type(body[:1]) is nn.Sequential


def test_the_rewritten_forward_can_be_read():
    source = inspect.getsource(type(fast().layer1[0]).forward)
    assert "self.bn2(conv2, downsample)" not in source
    assert "self.bn2(conv2, x)" in source
    model = fast()
    with pytest.raises(RuntimeError, match="to have 8 channels") as caught:
        model.layer1[0](torch.ones(2, 5, 4, 4))
    assert "self.conv1(x)" in "".join(traceback.format_exception(caught.value))


def test_settings_of_functional_dropout_follow_the_mode():
    model = fast("functional")
    model.eval()
    assert torch.equal(model(images()), model(images()))
    model.train()
    assert not torch.equal(model(images()), model(images()))


def test_residuals_that_broadcast_or_promote_mean_what_they_meant():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x, other):
            return F.relu(self.bn(x) + other)

    model = Sum()
    quick, report = evenkeel.accelerate(model)
    assert report.swapped == (("bn", "BatchNorm2d with add and relu"),)
    x = images()
    for other in (x, x.double(), torch.ones(3, 1, 1), 2.5, x.half(), torch.ones(2, 4, 3, 8, 8)):
        y, wanted = quick(x, other), model(x, other)
        assert (y.dtype, y.shape) == (wanted.dtype, wanted.shape)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


def test_nothing_holds_a_network_alive():
    quick = fast()
    gone = weakref.ref(quick)
    del quick
    gc.collect()
    assert gone() is None


def test_parametrizations_of_other_layers_stay():
    model = built("resnet")
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    model.layer1[1].conv2 = nn.utils.parametrizations.spectral_norm(model.layer1[1].conv2)
    quick, report = evenkeel.accelerate(model.eval(), images())
    assert len(report.swapped) == 8
    assert list(quick.state_dict()) == list(model.state_dict())
    assert nn.utils.parametrize.is_parametrized(quick.layer1[0].conv1)
    wanted = model(images())
    torch.testing.assert_close(quick(images()), wanted, rtol=1e-4, atol=1e-5)
    nn.utils.parametrize.remove_parametrizations(quick.layer1[0].conv1, "weight")
    torch.testing.assert_close(quick(images()), wanted, rtol=1e-4, atol=1e-5)
