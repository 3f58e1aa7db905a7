"""`accelerate(..., memory="low")`: the same training in fewer bytes."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import evenkeel
from evenkeel import recompute
from evenkeel.bench import nets
from evenkeel.bench.memory import saved_bytes
from evenkeel.bench.steps import Step
from evenkeel.direct import cpu
from evenkeel.errors import ConfigError, SurgeryError
from evenkeel.surgery import accelerate as accelerate_module
from evenkeel.surgery.accelerating import low_memory

from .cnns import ZOO, BasicBlock, built, conv, images
from .nets import state


def low(name: str = "resnet") -> nn.Module:
    return evenkeel.accelerate(built(name), memory="low")[0]


def full(name: str = "resnet") -> nn.Module:
    return evenkeel.accelerate(built(name))[0]


def trained(model: nn.Module, seed: int = 0) -> list[Tensor]:
    """Output, gradients and running statistics of one step."""
    torch.manual_seed(seed)
    y = model(images())
    wanted = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(y.square().sum(), wanted)
    return [y.detach(), *gradients, *[b.clone() for b in model.buffers()]]


def same(mine: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(mine) == len(wanted)
    for one, other in zip(mine, wanted, strict=True):
        assert torch.equal(one, other)


def own_hooks(model: nn.Module) -> int:
    """How many of our hooks there are, on all modules."""
    return sum(
        hook in (low_memory._enter, low_memory._leave)
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    )


@pytest.fixture(autouse=True)
def balanced():
    """Torch's hooks are as they were, and no region is open."""
    before = recompute._top()
    yield
    assert recompute._top() == before
    assert not recompute.active()
    assert not low_memory._CALLS.open


# Bytes and bits


@pytest.mark.parametrize("name", ZOO)
def test_training_is_the_same_bit_for_bit(name):
    one, other = low(name), full(name)
    same(trained(one), trained(other))
    one.eval()
    other.eval()
    assert torch.equal(one(images()), other(images()))


@pytest.mark.parametrize(
    ("net", "at_most"), [("resnet18", 0.6), ("mobilenetv2", 0.45), ("vgg", 0.65), ("densenet", 0.6)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_far_fewer_bytes_are_kept(net, at_most, layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 32, 32, generator=generator).contiguous(memory_format=layout)
    labels = torch.zeros(8, dtype=torch.long)
    found = {}
    for side in ("eager", "full", "low"):
        model = nets.build(net, width=0.25).to(memory_format=layout)
        if side != "eager":
            model = evenkeel.accelerate(model, memory=side)[0]
        found[side] = saved_bytes(Step(model, x, labels, "float32"))
    assert found["low"] < found["full"]
    assert found["low"] < at_most * found["eager"]


@pytest.mark.parametrize("memory", ["full", "low"])
def test_outputs_of_norms_die_with_the_forward(memory):
    model = evenkeel.accelerate(built("resnet"), memory=memory)[0]
    outputs: list[weakref.ref[Tensor]] = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *given: outputs.append(weakref.ref(given[2])))
    y = model(images())
    alive = sum(ref() is not None for ref in outputs)
    # The last one is averaged, and the average keeps nothing of it but its shape.
    assert (alive == 0) is (memory == "low")
    y.sum().backward()
    del y
    assert all(ref() is None for ref in outputs)


class Captured(torch.autograd.Function):
    """Hands its input on; backward compares what was kept with a copy."""

    compared = 0

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        ctx.copy = y.clone()
        ctx.mark_non_differentiable()
        return y * 1

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        assert y.stride() == ctx.copy.stride()
        assert torch.equal(y.nan_to_num(123.0), ctx.copy.nan_to_num(123.0))
        Captured.compared += 1
        return dy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("act", [None, "relu", ("leaky_relu", 0.2), "relu6", "silu"], ids=str)
@pytest.mark.parametrize("shape", [(4, 5, 7, 9), (2, 64, 32, 33)], ids=str)
def test_outputs_are_computed_again_in_the_same_bits(dtype, layout, training, adds, act, shape):
    """Alone, and behind another one as the residual."""
    generator = torch.Generator().manual_seed(0)
    x, r = (
        torch.randn(*shape, generator=generator).to(dtype).contiguous(memory_format=layout)
        for _ in range(2)
    )
    x[0, 0, 0, 0] = float("nan")
    norms = [evenkeel.BatchNorm2d(shape[1]).train(training) for _ in range(2)]
    for norm in norms:
        nn.init.uniform_(norm.weight, -0.5, 1.5)
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    norms[1].activation = act
    Captured.compared = 0
    count = {"again": 0}
    again = cpu._again

    def counted(*given, **options):
        count["again"] += torch._C._current_graph_task_id() != -1
        return again(*given, **options)

    with pytest.MonkeyPatch.context() as patch, recompute.recomputing():
        patch.setattr(cpu, "_again", counted)
        first = norms[0](r.requires_grad_())
        second = norms[1](x, first if adds else None)
        loss = Captured.apply(first).sum() + Captured.apply(second).sum()
    loss.backward()
    assert Captured.compared == 2
    assert count["again"] == 2


# The network lives on


@pytest.mark.parametrize("name", ZOO)
def test_restore_takes_the_hooks_away(name):
    model = built(name)
    quick = low(name)
    assert own_hooks(quick) == 2
    back = evenkeel.restore(quick)
    assert own_hooks(quick) == 2
    assert own_hooks(back) == 0
    assert not back._forward_hooks_always_called
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    again, report = evenkeel.accelerate(back, images(), memory="low")
    assert report.memory == "low"
    assert own_hooks(again) == 2


def test_copies_and_pickles_are_low_too():
    quick = low()
    saved = io.BytesIO()
    torch.save(quick, saved)
    saved.seek(0)
    wanted = trained(copy.deepcopy(full()))
    for other in (
        copy.deepcopy(quick),
        pickle.loads(pickle.dumps(quick)),
        torch.load(saved, weights_only=False),
        copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(quick)))),
    ):
        assert own_hooks(other) == 2
        same(trained(other), wanted)


def test_hooks_of_the_user_stay_and_fire_once():
    seen: list[str] = []
    model = built("resnet")
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.register_forward_hook(lambda *_: seen.append("after"), always_call=True)
    evenkeel.accelerate(model, memory="low", inplace=True)
    late = model.register_forward_hook(lambda *_: seen.append("late"))
    model(images())
    assert sorted(seen) == ["after", "before", "late"]
    late.remove()
    evenkeel.restore(model, inplace=True)
    assert own_hooks(model) == 0
    seen.clear()
    model(images())
    assert seen == ["before", "after"]
    assert len(model._forward_hooks_always_called) == 1


def test_the_report_says_so():
    _, report = evenkeel.accelerate(built("vgg"), images(), memory="low")
    assert report.memory == report.to_dict()["memory"] == "low"
    text = str(report)
    assert "low memory: backward computes what norms have handed on again" in text
    before, now = report.kept
    assert now < 0.7 * before
    assert f"keeps {now / 1e6:.3g} MB for backward, {before / 1e6:.3g} MB before" in text
    _, report = evenkeel.accelerate(built("vgg"), images())
    assert (report.memory, report.kept) == ("full", None)
    assert "memory" not in str(report)
    _, report = evenkeel.accelerate(built("vgg"), memory="low")
    assert report.kept is None


def test_an_unknown_memory_is_an_error():
    with pytest.raises(ConfigError, match=r"unknown memory 'lo' \(did you mean 'low'\?\)"):
        evenkeel.accelerate(built("vgg"), memory="lo")


def test_a_network_without_norms_is_not_made_low_twice():
    quick, report = evenkeel.accelerate(nn.Sequential(conv(3, 4)), memory="low")
    assert report.swapped == ()
    with pytest.raises(SurgeryError, match="is accelerated already"):
        evenkeel.accelerate(quick, memory="low")


def test_a_failure_leaves_the_network_as_it_was(monkeypatch):
    model = built("resnet")
    model.register_forward_hook(lambda *_: None, always_call=True)
    before = state(model)
    hooks = copy.copy(model._forward_hooks), copy.copy(model._forward_pre_hooks)

    def refuse(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        plan = accelerate_module._planned

        def planned(scratch: nn.Module, backend: str):
            found = plan(scratch, backend)
            found.edits[""] = found.edits.pop("", lambda _: None)
            return found

        patch.setattr(accelerate_module, "_planned", planned)
        patch.setattr(nn.Module, "register_forward_hook", refuse)
        with pytest.raises(KeyboardInterrupt):
            evenkeel.accelerate(model, memory="low", inplace=True)
    assert state(model) == before
    assert (model._forward_hooks, model._forward_pre_hooks) == hooks
    same(trained(model), trained(built("resnet")))


def test_roots_of_every_kind():
    """A norm alone, a graph, a network in a network."""
    norm, _ = evenkeel.accelerate(nn.BatchNorm2d(3), images(), memory="low")
    y = norm(images().requires_grad_())
    F.conv2d(y, torch.ones(1, 3, 1, 1)).sum().backward()
    graph = torch.fx.symbolic_trace(built("vgg"))
    quick, report = evenkeel.accelerate(graph, images(), memory="low")
    _, plain = evenkeel.accelerate(built("vgg"), images(), memory="low")
    assert report.kept[1] == plain.kept[1] < 0.7 * report.kept[0]
    assert own_hooks(quick) == 2
    same(trained(quick), trained(full("vgg")))
    assert own_hooks(evenkeel.restore(quick)) == 0
    outer = nn.Sequential(nn.Upsample(8), low("bottlenecks"))
    plain = nn.Sequential(nn.Upsample(8), full("bottlenecks"))
    with recompute.recomputing():
        mine = trained(outer)
    same(mine, trained(plain))
    back = evenkeel.restore(outer)
    assert own_hooks(back) == 0


# Calls that end in other ways


class Stopping(nn.Module):
    """A network that can be stopped on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.block = BasicBlock(3, 3)
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if self.error is not None:
            raise self.error
        return self.block(x)


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt("stop")], ids=repr)
@pytest.mark.parametrize("outside", [False, True])
def test_an_error_in_forward_leaves_no_hooks(error, outside):
    """Torch runs no hook behind a KeyboardInterrupt: the next call tidies up."""
    torch.manual_seed(0)
    model = Stopping()
    found = []
    for memory in ("full", "low"):
        own, _ = evenkeel.accelerate(model, memory=memory)
        own.error = error
        around = torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t)
        with pytest.raises(type(error), match="stop"), around if outside else torch.enable_grad():
            own(images())
        own.error = None
        found.append(trained(own))
    same(*found)


def test_an_interrupt_that_is_caught_on_the_way():
    """What is left of the inner network's call ends with the outer one's."""

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.block = inner, BasicBlock(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(KeyboardInterrupt):
                x = self.inner(x)
            return self.block(x)

    torch.manual_seed(0)
    inner, outer = Stopping(), Outer(nn.Identity())
    found = []
    for memory in ("full", "low"):
        quick, _ = evenkeel.accelerate(outer, memory=memory)
        quick.inner, _ = evenkeel.accelerate(inner, memory=memory)
        quick.inner.error = KeyboardInterrupt("stop")
        y = quick(images())
        assert not low_memory._CALLS.open
        found.append(torch.autograd.grad(y.square().sum(), list(quick.block.parameters())))
    same(*found)


def test_an_error_before_our_hook_ends_no_other_call():
    inner, outer = low("vgg"), nn.Sequential(nn.Identity())
    inner._forward_pre_hooks.move_to_end(next(iter(inner._forward_pre_hooks)))

    def refuse(module: nn.Module, _: object) -> None:
        raise ValueError("not today")

    handle = inner.register_forward_pre_hook(refuse, prepend=True)

    class Outer(nn.Module):
        def forward(self, x: Tensor) -> bool:
            with pytest.raises(ValueError, match="not today"):
                inner(x)
            return recompute.active()

    outer, _ = evenkeel.accelerate(Outer(), memory="low")
    assert outer(images())
    handle.remove()


def test_calls_in_one_another_and_one_after_the_other():
    class Twice(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            return self.model(x) + (self(x + 1, depth - 1) if depth else 0)

    models = [Twice(built("vgg")) for _ in range(2)]
    for model in models:
        model.model[14].p = 0.0
    quick, _ = evenkeel.accelerate(models[0], memory="low")
    plain, _ = evenkeel.accelerate(models[1])
    same(trained(quick), trained(plain))
    losses = []
    for model in (quick, plain):
        losses.append([model(images(seed=s)).square().sum() for s in range(2)])
    for mine, wanted in zip(
        *(torch.autograd.grad(a + b, list(m.parameters()))
          for (a, b), m in zip(losses, (quick, plain), strict=True)),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(mine, wanted)


def test_threads_share_a_network():
    quick, plain = low().eval(), full().eval()
    wanted = trained(plain)
    found: dict[int, list[Tensor]] = {}

    def run(place: int) -> None:
        torch.set_num_threads(1)
        y = quick(images())
        parameters = list(quick.parameters())
        gradients = torch.autograd.grad(y.square().sum(), parameters)
        found[place] = [y.detach(), *gradients, *quick.buffers()]

    threads = [threading.Thread(target=run, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(4):
        same(found[place], wanted)


def test_nothing_holds_a_network_or_its_activations():
    quick = low()
    gone = weakref.ref(quick)
    quick(images())
    loss = quick(images()).sum()
    del quick, loss
    gc.collect()
    assert gone() is None


# Ways to train


def test_gamma_changed_before_backward_is_an_error():
    quick = low("vgg")
    loss = quick(images()).sum()
    with torch.no_grad():
        quick[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()


def test_steps_of_an_optimizer():
    models = [low("resnet"), full("resnet")]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for step in range(4):
            optimizer.zero_grad()
            for part in range(2):  # gradients are collected over two batches
                model(images(seed=2 * step + part)).square().sum().backward()
            optimizer.step()
    for mine, wanted in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(mine, wanted)


def test_second_derivatives():
    """A penalty on the gradient: of the input, with the graph of the gradient kept."""
    found = []
    for model in (low().double(), full().double()):
        x = images().double().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), list(model.parameters())))
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)


def test_no_grad_and_inference_mode_and_frozen_norms():
    quick, plain = low(), full()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(quick(images()), plain(images()))
    for model in (quick, plain):
        model.eval()
        model.conv1.weight.requires_grad_(False)
        model.bn1.requires_grad_(False)
    same(trained(quick), trained(plain))
    for model in (quick, plain):
        model.requires_grad_(False)
        model.fc.requires_grad_(True)
    same(trained(quick), trained(plain))


@pytest.mark.parametrize("name", ["vgg", "resnet", "functional", "mobilenet", "branches"])
def test_autocast(name):
    found = []
    for model in (low(name), full(name)):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(images())
        gradients = torch.autograd.grad(y.float().square().sum(), list(model.parameters()))
        found.append([y.detach(), *gradients])
    same(*found)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_checkpoints(where, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.first, self.body = conv(3, 3), body

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, self.first(x), use_reentrant=reentrant)

    torch.manual_seed(0)
    model = Checkpointed(built("resnet"))
    plain, _ = evenkeel.accelerate(copy.deepcopy(model))
    if where == "inside":
        model, _ = evenkeel.accelerate(model, memory="low")
    else:
        evenkeel.accelerate(model.body, memory="low", inplace=True)
    found = []
    for network in (model, plain):
        # Not torch.autograd.grad, which a reentrant checkpoint refuses.
        y = network(images())
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in network.parameters()), *network.buffers()])
    same(*found)


@pytest.mark.parametrize("unused", [False, True])
def test_distributed_data_parallel(tmp_path, unused):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch is built without gloo here")
    from torch.nn.parallel import DistributedDataParallel

    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        quick = low()
        wrapped = DistributedDataParallel(quick, find_unused_parameters=unused)
        plain = full()
        for _ in range(2):
            for model in (wrapped, plain):
                model(images()).square().sum().backward()
        for mine, other in zip(quick.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.grad, other.grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_compiled_and_exported(name):
    torch._dynamo.reset()
    quick, plain = low(name), full(name)
    for model in (quick, plain):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    whole = torch.compile(copy.deepcopy(quick), backend="aot_eager", fullgraph=True)
    wanted = trained(copy.deepcopy(plain))
    for mine, other in zip(trained(whole), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    quick.eval()
    program = torch.export.export(quick, (images(),))
    torch.testing.assert_close(program.module()(images()), quick(images()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_part():
    torch._dynamo.reset()
    quick, plain = low(), full()
    quick.layer1.compile(backend="aot_eager")
    for mine, other in zip(trained(quick), trained(plain), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
