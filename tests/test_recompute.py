"""Promises in place of activations, with a norm of the test's own."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from evenkeel import recompute
from evenkeel.recompute import offer, recomputing

COUNT = {"again": 0}


def scaled(x: Tensor, gamma: Tensor, residual: Tensor | None) -> Tensor:
    COUNT["again"] += 1
    y = x * gamma[:, None, None]
    return torch.relu(y if residual is None else y + residual)


class Scale(torch.autograd.Function):
    """y = relu(gamma * x + residual), which keeps x and a mask, as a norm does."""

    @staticmethod
    def forward(ctx, x, gamma, residual):
        y = scaled(x, gamma, residual)
        ctx.save_for_backward(x, gamma, y > 0)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gamma, mask = ctx.saved_tensors
        dz = dy * mask
        dresidual = dz if ctx.needs_input_grad[2] else None
        return dz * gamma[:, None, None], (dz * x).sum((0, 2, 3)), dresidual


def scale(x: Tensor, gamma: Tensor, residual: Tensor | None = None) -> Tensor:
    y = Scale.apply(x, gamma, residual)
    offer(y, scaled, x, gamma, residual)
    return y


class Net:
    """Convolutions with a scale behind each; the second block has a shortcut."""

    def __init__(self, blocks: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)
        self.image = torch.randn(2, 4, 6, 6, generator=generator)
        self.weights = [torch.randn(4, 4, 3, 3, generator=generator) / 6 for _ in range(blocks + 1)]
        self.gammas = [torch.rand(4, generator=generator) + 0.5 for _ in range(blocks + 1)]
        for t in self.parameters():
            t.requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.gammas]

    def __call__(self, shortcuts: bool = True) -> Tensor:
        y = None
        for weight, gamma in zip(self.weights, self.gammas, strict=True):
            x = F.conv2d(self.image if y is None else y, weight, padding=1)
            y = scale(x, gamma, y if shortcuts else None)
        return F.conv2d(y, self.weights[0]).square().mean()


def gradients(loss: Tensor, net: Net) -> list[Tensor]:
    return list(torch.autograd.grad(loss, net.parameters()))


def kept(run) -> int:
    """How many bytes hooks outside see saved, each storage once."""
    held: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        held.append(t)
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values())


def in_region(net: Net, depth: int = 4, **options) -> Tensor:
    with recomputing(depth):
        return net(**options)


def same(mine: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(mine) == len(wanted)
    for one, other in zip(mine, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.fixture(autouse=True)
def balanced():
    """Torch's hooks are as they were, and no region is open."""
    before = recompute._top()
    yield
    assert recompute._top() == before
    assert not recompute.active()


# What is kept


@pytest.mark.parametrize("shortcuts", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2, 9])
def test_gradients_are_the_same_bits(depth, shortcuts):
    net = Net(5)
    wanted = gradients(net(shortcuts=shortcuts), net)
    loss = in_region(net, depth, shortcuts=shortcuts)
    assert torch.equal(loss, net(shortcuts=shortcuts))
    same(gradients(loss, net), wanted)


def test_outputs_are_not_kept():
    net = Net(3)
    whole = kept(lambda: net(shortcuts=False))
    small = kept(lambda: in_region(net, shortcuts=False))
    activation = net.image.numel() * 4
    assert whole - small == 4 * activation


@pytest.mark.parametrize(("depth", "promised"), [(0, 0), (1, 3), (2, 4), (3, 5), (6, 6)])
def test_a_row_of_residuals_is_cut_at_the_depth(depth, promised):
    """Six outputs; with depth 2 the third, which would need the two before it, is kept."""
    net = Net(5)
    saved = kept(net) - kept(lambda: in_region(net, depth))
    assert saved == promised * net.image.numel() * 4


def test_each_output_is_computed_again_once():
    """Of a row, and though two layers keep each: those that wait are held for their turn."""
    net = Net(5)
    loss = in_region(net, 6)
    COUNT["again"] = 0
    loss.backward()
    assert COUNT["again"] == 6


def test_an_output_is_dropped_when_all_who_keep_it_have_asked():
    x, gamma = torch.randn(2, 4, 3, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    seen: list[weakref.ref] = []

    def again(*inputs: Tensor) -> Tensor:
        value = scaled(*inputs)
        seen.append(weakref.ref(value))
        return value

    with recomputing():
        y = Scale.apply(x, gamma, None)
        offer(y, again, x, gamma, None)
        one, other = y.square().sum(), y.exp().sum() + y.pow(3).sum()
    del y
    torch.autograd.grad(one, x, retain_graph=True)
    assert len(seen) == 1
    assert seen[0]() is not None
    torch.autograd.grad(other, x, retain_graph=True)
    assert len(seen) == 1
    assert seen[0]() is None
    torch.autograd.grad(one, x, retain_graph=True)
    assert len(seen) == 2
    del one, other
    assert seen[1]() is None


def test_an_output_that_was_given_other_memory_is_not_mistaken():
    """Its own memory may be another tensor's by then."""
    x, gamma = torch.randn(2, 4, 3, 3, requires_grad=True), torch.rand(4)
    with recomputing() as inside:
        y = scale(x, gamma)
        (key,) = inside.offers
        y.data = torch.zeros(1)
        others: list[Tensor] = []
        while not others or others[-1].untyped_storage()._cdata != key:
            assert len(others) < 10_000
            others.append(torch.full_like(x, len(others)))
        weight = torch.ones_like(x, requires_grad=True)
        loss = (others[-1] * weight).sum()
    same(list(torch.autograd.grad(loss, weight)), [others[-1]])


def test_who_goes_without_asking_is_not_waited_for():
    x, gamma = torch.randn(2, 4, 3, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    seen: list[weakref.ref] = []

    def again(*inputs: Tensor) -> Tensor:
        value = scaled(*inputs)
        seen.append(weakref.ref(value))
        return value

    with recomputing():
        y = Scale.apply(x, gamma, None)
        offer(y, again, x, gamma, None)
        one, two, other = y.square().sum(), y.square().mean(), y.pow(3).sum()
    del y
    one.backward(retain_graph=True)
    two.backward(retain_graph=True)
    assert seen[0]() is not None
    del other
    assert seen[0]() is None
    assert len(seen) == 1


def test_views_are_promised_too():
    x, gamma = torch.randn(2, 4, 3, 3, requires_grad=True), torch.rand(4, requires_grad=True)

    def run() -> Tensor:
        y = scale(x, gamma)
        halves = y.chunk(2, 1)
        flat = y.flatten(1)
        return (halves[0] * halves[1]).sum() + flat.square().sum() + y.mT.exp().mul(y.mT).sum()

    wanted = torch.autograd.grad(run(), (x, gamma))
    with recomputing():
        loss = run()
    COUNT["again"] = 0
    same(list(torch.autograd.grad(loss, (x, gamma))), list(wanted))
    assert COUNT["again"] == 1


def test_views_of_another_kind_are_kept():
    """Of another type, or with a sign that is yet to be applied."""
    x, gamma = torch.randn(2, 4, 3, 3, requires_grad=True), torch.rand(4, requires_grad=True)
    weights = [torch.ones(2, 4, 3, 6).bfloat16(), torch.ones(2, 4, 3, 3)]
    found = []
    for context in (torch.enable_grad(), recomputing()):
        with context:
            y = scale(x, gamma)
            views = [y.detach().view(torch.bfloat16), torch._neg_view(y.detach())]
            pairs = zip(views, [w.requires_grad_() for w in weights], strict=True)
            loss = sum((view * w).nan_to_num().sum() for view, w in pairs)
        found.append([g.nan_to_num(7.0) for g in torch.autograd.grad(loss, weights)])
    same(*found)


def test_what_fills_not_its_memory_is_kept():
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    wide = torch.zeros(2, 8, 3, 3)

    class Part(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return wide[:, :4].copy_(x).detach()

        @staticmethod
        def backward(ctx, dy):
            return dy

    with recomputing():
        y = Part.apply(x)
        offer(y, lambda *_: pytest.fail("computed again"), x)
        loss = y.square().sum()
    same(list(torch.autograd.grad(loss, x)), [2 * x.detach()])


def test_nothing_is_offered_without_a_graph():
    x, gamma = torch.randn(2, 4, 3, 3), torch.rand(4)
    weight = torch.randn(4, 4, 1, 1, requires_grad=True)
    with recomputing():
        loss = F.conv2d(scale(x, gamma), weight).sum()
        with torch.no_grad():
            scale(x, gamma.clone().requires_grad_())
        with torch.inference_mode():
            scale(x, gamma.clone().requires_grad_())
    COUNT["again"] = 0
    loss.backward()
    assert COUNT["again"] == 0
    assert weight.grad is not None


# In place


def test_a_relu_in_place_ends_the_offer():
    x, gamma = torch.randn(2, 4, 3, 3, requires_grad=True), torch.rand(4, requires_grad=True)

    def run() -> Tensor:
        return scale(x, gamma).clamp_(max=0.3).square().sum()

    wanted = torch.autograd.grad(run(), x)
    with recomputing():
        loss = run()
    COUNT["again"] = 0
    same(list(torch.autograd.grad(loss, x)), list(wanted))
    assert COUNT["again"] == 0


@pytest.mark.parametrize("what", ["x", "gamma", "residual"])
def test_inputs_changed_in_place_are_an_error(what):
    x, gamma, residual = torch.randn(2, 4, 3, 3), torch.rand(4), torch.randn(2, 4, 3, 3)
    given = {"x": x * 1, "gamma": gamma * 1, "residual": residual * 1}
    weight = torch.randn(4, 4, 1, 1, requires_grad=True)
    start = x.requires_grad_() * 1
    with recomputing():
        y = Scale.apply(start, given["gamma"], given["residual"])
        offer(y, scaled, *given.values())
        loss = F.conv2d(y, weight).sum()
    given[what].add_(1)
    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation: \[torch.FloatTensor"
    ):
        torch.autograd.grad(loss, weight)


def test_other_tensors_are_checked_as_torch_checks_them():
    """Hooks turn torch's own check off, so it must be ours."""
    for context in (torch.enable_grad(), recomputing()):
        a, b = torch.ones(3, requires_grad=True) * 1, torch.ones(3, requires_grad=True)
        with context:
            loss = (a * b).sum()
        a.add_(1)
        with pytest.raises(RuntimeError, match="is at version 1; expected version 0 instead"):
            loss.backward()


def test_an_output_changed_after_it_was_kept_has_the_right_gradient():
    """Torch would refuse; but the value that counts can be computed again."""
    x, gamma = torch.randn(2, 4, 3, 3, requires_grad=True), torch.rand(4, requires_grad=True)
    weight = torch.randn(4, 4, 1, 1, requires_grad=True)
    wanted = torch.autograd.grad(F.conv2d(scale(x, gamma), weight).sum(), (x, weight))
    with recomputing():
        y = scale(x, gamma)
        loss = F.conv2d(y, weight).sum()
        y.add_(1)
    same(list(torch.autograd.grad(loss, (x, weight))), list(wanted))


def test_an_unpacked_value_that_was_changed_is_not_handed_on():
    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(y)
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            (y,) = ctx.saved_tensors
            return dy * y.detach().zero_()

    x, gamma = torch.randn(2, 4, 3, 3, requires_grad=True), torch.rand(4, requires_grad=True)
    with recomputing():
        y = scale(x, gamma)
        square = y.square().sum()
        loss = square + Careless.apply(y).sum()
    assert torch.equal(
        torch.autograd.grad(loss, x)[0], torch.autograd.grad(scale(x, gamma).square().sum(), x)[0]
    )


def test_another_output_than_offered_is_an_error():
    x, gamma = torch.randn(2, 4, 3, 3, requires_grad=True), torch.rand(4)
    with recomputing():
        y = Scale.apply(x, gamma, None)
        offer(y, lambda x: x.double(), x)
        loss = y.square().sum()
    with pytest.raises(RuntimeError, match=r"computed again with torch\.float64"):
        loss.backward()


# Backward in all its ways


def test_retained_graphs_and_second_derivatives():
    net = Net(3)

    def twice(loss: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(loss, net.parameters(), retain_graph=True)
        again = torch.autograd.grad(loss, net.parameters(), retain_graph=True)
        same(list(first), list(again))
        slopes = torch.autograd.grad(loss, net.weights, create_graph=True)
        second = torch.autograd.grad(sum(s.square().sum() for s in slopes), net.weights)
        return [*first, *second]

    same(twice(in_region(net)), twice(net()))
    with recomputing():
        inside = twice(net())
    same(inside, twice(net()))


def test_again_runs_without_grad():
    x, gamma = torch.randn(2, 4, 3, 3, requires_grad=True), torch.rand(4)
    modes = []

    def again(*inputs: Tensor) -> Tensor:
        modes.append(torch.is_grad_enabled())
        return scaled(*inputs)

    with recomputing():
        y = Scale.apply(x, gamma, None)
        offer(y, again, x, gamma, None)
        loss = y.pow(3).sum()
    torch.autograd.grad(loss, x, create_graph=True)
    assert modes == [False]


def test_second_derivatives_are_those_of_finite_differences():
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    gamma = torch.rand(2, dtype=torch.float64) + 0.5
    sign = x.sign() * (x.abs() + 0.2)

    def run(x: Tensor) -> Tensor:
        with recomputing():
            return scale(x, gamma).pow(3)

    assert torch.autograd.gradcheck(run, sign.requires_grad_())
    assert torch.autograd.gradgradcheck(run, sign)


def test_nothing_outlives_the_graph():
    net = Net(4)
    with recomputing() as inside:
        y = scale(F.conv2d(net.image, net.weights[0], padding=1), net.gammas[0])
        x = F.conv2d(y, net.weights[1], padding=1)
        y = scale(x, net.gammas[1], y)
        loss = F.conv2d(y, net.weights[2]).sum()
        gone = [weakref.ref(x), weakref.ref(y), weakref.ref(loss)]
        del y
        assert gone[1]() is None
        assert not inside.offers
        kept_on = scale(net.image, net.gammas[3])
        assert len(inside.offers) == 1
    assert not inside.offers
    del kept_on
    gc.disable()  # there must be no circle that only the collector can undo
    try:
        del x
        loss.backward()
        del loss
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


def test_a_graph_that_is_thrown_away_is_freed():
    net = Net(4)
    gc.collect()
    gc.disable()
    try:
        before = tensors_alive()
        loss = in_region(net)
        assert tensors_alive() > before
        del loss
        assert tensors_alive() == before
        with recomputing():
            loss = net().exp()  # which keeps its own output
        del loss
        assert tensors_alive() == before
        in_region(net).backward()
        net_grads = sum(p.grad is not None for p in net.parameters())
        assert tensors_alive() == before + net_grads
    finally:
        gc.enable()


def tensors_alive() -> int:
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


def test_an_output_that_nobody_keeps_costs_nothing():
    net = Net(1)
    with recomputing() as inside:
        y = scale(net.image, net.gammas[0])
        assert len(inside.offers) == 1
        total = (y + 1).sum()
        del y
        assert not inside.offers
    COUNT["again"] = 0
    total.backward()
    assert COUNT["again"] == 0


# Other hooks, checkpoints, threads, capture


def test_hooks_outside_see_what_is_kept_and_hooks_inside_win():
    net = Net(3)
    wanted = gradients(net(), net)
    with save_on_cpu():
        loss = in_region(net)
    same(gradients(loss, net), wanted)
    COUNT["again"] = 0
    with recomputing() as outside, save_on_cpu():
        y = scale(net.image, net.gammas[0])
        assert not outside.offers
        loss = net()
    COUNT["again"] = 0
    same(gradients(loss, net), wanted)
    assert COUNT["again"] == 0
    assert y.requires_grad


def test_regions_in_one_another():
    net = Net(3)
    wanted = gradients(net(), net)
    with recomputing():
        y = scale(net.image, net.gammas[0])
        with recomputing():
            loss = net() + y.square().sum()
    COUNT["again"] = 0
    same(gradients(loss, net)[:4], wanted[:4])
    assert COUNT["again"] == 5
    once = recomputing()
    with once, pytest.raises(RuntimeError, match="entered already"):
        once.__enter__()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside_and_outside(reentrant):
    net = Net(3)
    image = net.image.clone().requires_grad_()

    def run(image: Tensor) -> Tensor:
        net.image = image
        return net()

    wanted = gradients(run(image), net)
    for inside in (False, True):
        for p in net.parameters():
            p.grad = None

        def part(image: Tensor, inside: bool = inside) -> Tensor:
            if inside:
                return run(image)
            with recomputing():
                return run(image)

        if inside:
            with recomputing():
                loss = checkpoint(part, image * 1, use_reentrant=reentrant)
        else:
            loss = checkpoint(part, image * 1, use_reentrant=reentrant)
        loss.backward()
        same([p.grad for p in net.parameters()], wanted)


def test_an_input_changed_before_it_was_kept_outside_is_no_promise():
    x, gamma = torch.randn(2, 4, 3, 3, requires_grad=True), torch.rand(4)
    with saved_tensors_hooks(torch.clone, lambda t: t), recomputing():
        y = scale(x, gamma)
        gamma.add_(1)
        loss = y.square().sum()
    COUNT["again"] = 0
    wanted = 2 * y.detach() * (x > 0) * (gamma - 1)[:, None, None]
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], wanted)
    assert COUNT["again"] == 0


def test_threads_are_apart():
    net = Net(3)
    wanted = gradients(net(), net)
    found: dict[str, object] = {}

    def other() -> None:
        torch.set_num_threads(1)  # a thread has its own number, which decides the last bits
        found["active"] = recompute.active()
        found["hooks"] = recompute._top()
        found["gradients"] = gradients(in_region(net), net)

    with recomputing():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        loss = net()
    assert (found["active"], found["hooks"]) == (False, None)
    same(found["gradients"], wanted)

    # Backward in another thread than forward.
    def late() -> None:
        torch.set_num_threads(1)
        found["late"] = gradients(loss, net)

    thread = threading.Thread(target=late)
    thread.start()
    thread.join()
    same(found["late"], wanted)


@pytest.mark.gpu
def test_another_stream_computes_for_itself():
    """It could read the value of the first stream before it is there."""
    x = torch.randn(2, 4, 64, 64, device="cuda", requires_grad=True)
    gamma = torch.rand(4, device="cuda")
    other = torch.cuda.Stream()

    def run() -> Tensor:
        y = scale(x, gamma)
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            cube = y.pow(3).sum()
        torch.cuda.current_stream().wait_stream(other)
        return y.square().sum() + y.pow(4).sum() + cube

    wanted = torch.autograd.grad(run(), x)
    with recomputing():
        loss = run()
    COUNT["again"] = 0
    same(list(torch.autograd.grad(loss, x)), list(wanted))
    assert COUNT["again"] >= 2


def test_backward_inside_the_region():
    """The gradient is part of the loss, as in a gradient penalty."""
    net = Net(3)

    def penalty() -> Tensor:
        loss = net()
        slopes = torch.autograd.grad(loss, net.gammas, create_graph=True)
        return loss + sum(s.square().sum() for s in slopes)

    wanted = gradients(penalty(), net)
    with recomputing():
        loss = penalty()
    same(gradients(loss, net), wanted)


def test_errors_leave_torchs_hooks_as_they_were():
    net = Net(1)
    with pytest.raises(RuntimeError, match="Given groups=1"), recomputing():
        F.conv2d(scale(net.image, net.gammas[0]), torch.ones(1, 3, 1, 1))


def test_functional_transforms_go_past_it():
    net = Net(1)

    def loss(weight: Tensor) -> Tensor:
        with recomputing():
            assert not recompute.active()
            return F.conv2d(net.image, weight).square().sum()

    weight = net.weights[0].detach()
    slope = torch.func.grad(loss)(weight)
    wanted = torch.autograd.grad(F.conv2d(net.image, net.weights[0]).square().sum(), net.weights[0])
    torch.testing.assert_close(slope, wanted[0])


def test_capture_goes_past_it():
    net = Net(1)

    def run(image: Tensor) -> Tensor:
        with recomputing():
            return torch.relu(image) * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and still used
        traced = torch.jit.trace(run, net.image)
    assert "detach" not in str(traced.graph)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    assert torch.equal(compiled(net.image), run(net.image))
