"""A planned graph gives what its modules give, and sees at once whatever was changed."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import fx, nn

from evenkeel.nn import ways
from evenkeel.nn.packed import KINDS, pack_module
from evenkeel.nn.planned import PlannedGraph, as_kind

from .packing import in_threads


@pytest.fixture(autouse=True)
def _seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(ways, "SMALL", 0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.two(self.one(x))


class Net(nn.Module):
    """Modules in modules, three convolutions, a dense layer."""

    def __init__(self):
        super().__init__()
        self.block = Block()
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(4, 5)

    def forward(self, x):
        return self.last(self.drop(self.up(self.block(x))).mean((2, 3)))


def pair(net=None):
    """A network in eval mode, and the same as a planned graph of packed convolutions."""
    plain = (net or Net()).eval()
    own = fx.symbolic_trace(copy.deepcopy(plain))
    for module in list(own.modules()):
        if type(module) in KINDS:
            pack_module(module)
    as_kind(own, PlannedGraph)
    return plain, own


def images(*shape):
    return torch.randn(shape or (2, 3, 8, 6))


def calls(own, x):
    """How many packed convolutions are called as modules, which a plan does not."""
    count = 0

    def counting(self, *args):
        nonlocal count
        count += 1
        return forward(self, *args)

    kind = next(type(m) for m in own.modules() if type(m) in KINDS.values()).__mro__[1]
    forward, kind.forward = kind.forward, counting
    try:
        with torch.no_grad():
            own(x)
    finally:
        kind.forward = forward
    return count


@torch.no_grad()
def assert_same(plain, own, x):
    wanted = copy.deepcopy(plain).double()(x.double())
    for _ in range(3):
        found = own(x)
        assert found.shape == wanted.shape
        assert float((found - wanted).abs().max() / wanted.abs().max()) <= 2e-6


class TestPlan:
    def test_is_made_by_the_first_call_and_taken_by_the_next(self):
        plain, own = pair()
        x = images()
        assert [calls(own, x) for _ in range(3)] == [3, 0, 0]
        assert_same(plain, own, x)
        assert calls(own, images()) == 0

    def test_of_another_shape(self):
        plain, own = pair()
        for shape in ((2, 3, 8, 6), (1, 3, 5, 5), (2, 3, 8, 6), (4, 3, 8, 6)):
            x = images(*shape)
            assert calls(own, x) == 3
            assert calls(own, x) == 0
            assert_same(plain, own, x)

    def test_the_same_bits_as_the_modules(self):
        _, own = pair()
        x = images()
        with torch.no_grad():
            assert torch.equal(own(x), own(x))

    def test_several_inputs(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)

            def forward(self, x, scale):
                return self.conv(x) * scale

        plain, own = pair(Two())
        x, scale = images(), torch.rand(4, 1, 1)
        with torch.no_grad():
            for _ in range(2):
                assert torch.allclose(own(x, scale), plain(x, scale), atol=1e-6)
            assert own._plan is not None
            wide = own(x, scale.double())
            assert wide.dtype == torch.float64
            assert torch.allclose(own(x, scale=scale), plain(x, scale), atol=1e-6)
            assert torch.allclose(own(x, 2.0), plain(x, 2.0), atol=1e-6)

    def test_other_layouts_go_where_the_modules_take_them(self):
        plain, own = pair(nn.Sequential(nn.Conv2d(16, 8, 3), nn.Conv2d(8, 8, 1)))
        x = torch.randn(2, 16, 24, 24)
        with torch.no_grad():
            own(x), own(x)
            found, wanted = own(x.to_mkldnn()), plain(x.to_mkldnn())
            assert found.layout == wanted.layout
            assert torch.allclose(found.to_dense(), wanted.to_dense(), atol=1e-5)
            with pytest.raises(RuntimeError, match=r"sparse"):
                own(x.to_sparse())

    def test_shapes_that_depend_on_values(self):
        class Chosen(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

            def forward(self, x):
                y = self.conv(x)
                return self.other(y[y.mean((1, 2, 3)) > 0])

        plain, own = pair(Chosen())
        with torch.no_grad():
            for _ in range(12):
                x = images(6, 3, 8, 8)
                found, wanted = own(x), plain(x)
                assert found.shape == wanted.shape
                assert torch.allclose(found, wanted, atol=1e-6)

    def test_threads(self):
        plain, own = pair()
        wrong = []

        def run(seed):
            x = torch.randn(1 + seed, 3, 8, 6, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                wanted = plain(x)
                wrong.extend(
                    seed for _ in range(30) if not torch.allclose(own(x), wanted, atol=1e-5)
                )

        in_threads(run)
        assert not wrong


CHANGES = {
    "in place": lambda net, other: net.block.one.weight.mul_(2),
    "by data": lambda net, other: net.block.two.weight.data.mul_(2),
    "new data": lambda net, other: setattr(net.up.weight, "data", net.up.weight.data * 2),
    "bias in place": lambda net, other: net.block.one.bias.mul_(2),
    "new bias data": lambda net, other: setattr(net.up.bias, "data", net.up.bias.data * 2),
    "replaced weight": lambda net, other: setattr(
        net.block.one, "weight", nn.Parameter(net.block.one.weight * 2)
    ),
    "no bias": lambda net, other: setattr(net.block.two, "bias", None),
    "loaded": lambda net, other: net.load_state_dict(other.state_dict()),
    "assigned": lambda net, other: net.load_state_dict(other.state_dict(), assign=True),
    "settings": lambda net, other: setattr(net.block.two, "dilation", (2, 1)),
    "replaced convolution": lambda net, other: setattr(net.block, "one", other.block.one),
    "replaced block": lambda net, other: setattr(net, "block", other.block),
    "another layer": lambda net, other: setattr(net, "last", other.last),
    "dense weight": lambda net, other: net.last.weight.mul_(2),
    "a hook": lambda net, other: net.block.one.register_forward_hook(lambda m, a, y: y * 2),
    "a hook before": lambda net, other: net.up.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "a hook of all": lambda net, other: net.register_forward_hook(lambda m, a, y: y * 2),
    "another forward": lambda net, other: setattr(
        net.block.one, "forward", other.block.one.forward
    ),
    "a weight norm": lambda net, other: setattr(
        nn.utils.parametrizations.weight_norm(net.block.two).parametrizations.weight,
        "original0",
        nn.Parameter(2 * net.block.two.parametrizations.weight.original0),
    ),
    "double": lambda net, other: net.double(),
}


class TestChanges:
    @pytest.mark.parametrize("name", CHANGES)
    @torch.no_grad()
    def test_are_honoured_at_once(self, name):
        plain, own = pair()
        other = Net().eval()
        x = images()
        own(x), own(x)
        for net in (plain, own):
            CHANGES[name](net, copy.deepcopy(other))
        x = x.double() if name == "double" else x
        for _ in range(2):
            found, wanted = own(x), plain(x)
            assert found.dtype == wanted.dtype
            assert torch.allclose(found, wanted, atol=1e-6)
        assert not torch.allclose(found, pair()[1](x.float()).to(found.dtype), atol=1e-6)

    @torch.no_grad()
    def test_compiled_in_place(self):
        plain, own = pair()
        x, seen = images(), []

        def backend(graph, inputs):
            seen.append(graph)
            return graph

        own(x), own(x)
        own.compile(backend=backend)
        assert torch.allclose(own(x), plain(x), atol=1e-6)
        assert seen

    def test_hooks_on_all_modules(self):
        _, own = pair()
        x, seen = images(), []
        with torch.no_grad():
            own(x), own(x)
            handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(m))
            try:
                own(x)
            finally:
                handle.remove()
        assert len(seen) == 6

    @torch.no_grad()
    def test_the_graph(self):
        plain, own = pair()
        x = images()
        own(x), own(x)
        (output,) = (n for n in own.graph.nodes if n.op == "output")
        with own.graph.inserting_before(output):
            output.args = (own.graph.call_function(torch.neg, (output.args[0],)),)
        own.recompile()
        assert torch.allclose(own(x), -plain(x), atol=1e-6)


class TestModes:
    def test_gradients(self):
        plain, own = pair()
        x = images()
        with torch.no_grad():
            own(x), own(x)
        for net in (plain, own):
            net(x).sum().backward()
        for wanted, found in zip(plain.parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad)

    def test_training(self):
        _, own = pair()
        x = images()
        with torch.no_grad():
            own(x), own(x)
            own.train()
            assert not torch.equal(own(x), own(x))  # dropout

    def test_inference_mode_and_autocast(self):
        plain, own = pair()
        x = images()
        with torch.inference_mode():
            assert_same(plain, own, x)
            with torch.autocast("cpu", torch.bfloat16):
                assert own(x).dtype == torch.bfloat16
            assert_same(plain, own, x)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jvp imports torch.jit's
    def test_transforms(self):
        plain, own = pair()
        x = images()
        with torch.no_grad():
            own(x), own(x)
            many = torch.stack([x, x + 1])
            assert torch.allclose(torch.vmap(own)(many), torch.vmap(plain)(many), atol=1e-5)
            new = {k: v * 2 for k, v in own.state_dict().items()}
            found = torch.func.functional_call(own, new, (x,))
            assert torch.allclose(found, torch.func.functional_call(plain, new, (x,)), atol=1e-4)
        found, wanted = (torch.func.jvp(n, (x,), (x,))[1] for n in (own, plain))
        assert torch.allclose(found, wanted, atol=1e-5)

    def test_operations_are_seen(self):
        from torch.utils.flop_counter import FlopCounterMode

        plain, own = pair()
        x = images()
        counts = []
        with torch.no_grad():
            own(x), own(x)
            for net in (plain, own):
                with FlopCounterMode(display=False) as counter:
                    net(x)
                counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0

    def test_compiled_exported_and_traced(self):
        plain, own = pair()
        x = images()
        with torch.no_grad():
            own(x), own(x)
            compiled = torch.compile(own, backend="eager", fullgraph=True)
            assert torch.allclose(compiled(x), plain(x), atol=1e-6)
            program = torch.export.export(own, (x,))
            assert torch.allclose(program.module()(x), plain(x), atol=1e-6)
            again = fx.symbolic_trace(own)
            assert torch.allclose(again(x), plain(x), atol=1e-6)


class TestTravels:
    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "file"])
    def test_and_plans_anew(self, way):
        plain, own = pair()
        x = images()
        with torch.no_grad():
            own(x), own(x)
        if way == "deepcopy":
            other = copy.deepcopy(own)
        elif way == "pickle":
            other = pickle.loads(pickle.dumps(own))
        else:
            file = io.BytesIO()
            torch.save(own, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert isinstance(other, PlannedGraph)
        assert other._plan is None
        assert other.__dict__.keys() <= own.__dict__.keys()
        assert [calls(other, x), calls(other, x)] == [3, 0]
        with torch.no_grad():
            own.block.one.weight.mul_(2)
        assert_same(plain, other, x)

    def test_no_longer_planned(self):
        plain, own = pair()
        x = images()
        with torch.no_grad():
            own(x), own(x)
        as_kind(own, fx.GraphModule)
        assert not isinstance(own, PlannedGraph)
        assert "_plan" not in vars(own)
        assert calls(own, x) == calls(own, x) == 3
        assert_same(plain, own, x)
