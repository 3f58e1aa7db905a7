"""Packing a folded graph: which convolutions, which activations, and the layouts behind them."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from evenkeel.bench import architectures
from evenkeel.nn.folded import BORDERED
from evenkeel.nn.packed import PackedConv2d
from evenkeel.surgery.fold import fold
from evenkeel.surgery.folding.packing import pack, unpack
from evenkeel.surgery.folding.values import record
from evenkeel.surgery.graph import module_of, trace

TOLERANCE = 2e-6
IMAGES = (2, 3, 24, 24)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def graph_of(model, x):
    """The network as a graph with what its nodes gave, as a fold leaves it."""
    traced = trace(model.eval(), x, inference=True)
    record(traced, (x,))
    return traced


def packed_of(model, x):
    own = copy.deepcopy(graph_of(model, x))
    pack(own)
    return own


def kinds(graph):
    return [type(m).__name__ for m in map(module_of, graph.graph.nodes) if m is not None]


def called(graph, name):
    return sum(name in (n.target, getattr(n.target, "__name__", None)) for n in graph.graph.nodes)


@torch.no_grad()
def assert_same(model, own, x, tolerance=TOLERANCE):
    """Equal values, and the same order in memory."""
    wanted, found = model(x), own(x)
    assert found.stride() == wanted.stride()
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    assert difference <= tolerance, difference


class Net(nn.Module):
    """Two convolutions with something between and something behind."""

    def __init__(self, between=None, behind=None):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 12, 3, padding=1)
        self.between, self.behind = between or nn.Identity(), behind or nn.Identity()

    def forward(self, x):
        return self.behind(self.second(self.between(self.first(x))))


def of(function):
    """A module that the tracer goes into."""

    class Function(nn.Module):
        def forward(self, x):
            return function(x)

    return Function()


class TestActivations:
    @pytest.mark.parametrize(
        ("between", "wanted"),
        [
            (nn.ReLU(), "relu"),
            (nn.ReLU(inplace=True), "relu"),
            (nn.ReLU6(), "relu6"),
            (nn.SiLU(), "silu"),
            (nn.LeakyReLU(0.3), ("leaky_relu", 0.3)),
            (of(F.relu), "relu"),
            (of(lambda x: x.relu_()), "relu"),
            (of(lambda x: F.leaky_relu(x, 0.3)), ("leaky_relu", 0.3)),
        ],
    )
    def test_are_taken_in(self, between, wanted):
        model, x = Net(between), torch.randn(IMAGES)
        own = packed_of(model, x)
        assert own.first.activation == wanted
        assert own.second.activation is None
        assert kinds(own) == ["PackedConv2d", "PackedConv2d", "Identity"]
        assert_same(model, own, x)

    @pytest.mark.parametrize(
        "between",
        [
            nn.Hardswish(),
            nn.Sigmoid(),
            of(lambda x: x + F.relu(x)),
            of(lambda x: F.relu(x) + F.silu(x)),
            of(lambda x: F.relu(x * 2)),
        ],
    )
    def test_stay_behind(self, between):
        model, x = Net(between), torch.randn(IMAGES)
        own = packed_of(model, x)
        assert isinstance(own.first, PackedConv2d)
        assert own.first.activation is None
        assert_same(model, own, x)

    def test_a_hooked_activation_stays(self):
        model, x = Net(nn.ReLU()), torch.randn(IMAGES)
        traced = graph_of(model, x)
        calls = []
        traced.between.register_forward_hook(lambda *_: calls.append(1))
        pack(traced)
        with torch.no_grad():
            traced(x)
        assert calls == [1]
        assert traced.first.activation is None

    def test_what_was_noted_at_the_activation_moves(self):
        x = torch.randn(IMAGES)
        traced = graph_of(Net(nn.ReLU()), x)
        (node,) = (n for n in traced.graph.nodes if n.target == "between")
        node.meta["means"] = "a name"
        own = traced
        pack(own)
        (conv,) = (n for n in own.graph.nodes if n.target == "first")
        assert conv.meta["means"] == "a name"


class TestConvolutions:
    def test_a_subclass_a_border_and_other_ranks_stay(self):
        class Odd(nn.Conv2d):
            pass

        line = nn.Sequential(Odd(3, 3, 3), BORDERED[nn.Conv2d](3, 3, 3, padding=1))
        line[1].register_buffer("border", torch.zeros(3, 1, 3, 3))
        before = kinds(graph_of(line, torch.randn(IMAGES)))
        assert kinds(packed_of(line, torch.randn(IMAGES))) == before
        one = nn.Sequential(nn.Conv1d(3, 3, 3))
        assert kinds(packed_of(one, torch.randn(2, 3, 9))) == ["Conv1d"]

    def test_one_that_is_called_twice_stays(self):
        conv = nn.Conv2d(3, 3, 3, padding=1)
        x = torch.randn(IMAGES)
        own = packed_of(nn.Sequential(conv, nn.ReLU(), conv), x)
        assert kinds(own) == ["Conv2d", "ReLU", "Conv2d"]

    def test_a_hooked_one_stays(self):
        x = torch.randn(IMAGES)
        traced = graph_of(Net(), x)
        traced.first.register_forward_pre_hook(lambda *_: None)
        pack(traced)
        assert kinds(traced)[0] == "Conv2d"
        assert type(traced.second) is PackedConv2d

    def test_names_and_state_stay(self):
        model = Net(nn.ReLU())
        own = packed_of(model, torch.randn(IMAGES))
        assert list(own.state_dict()) == list(model.state_dict())
        own.load_state_dict(model.state_dict())


MEMORY = {
    "flat": lambda x: x.view(x.shape[0], -1),
    "lines": lambda x: x.view(x.shape[0], x.shape[1], -1),
    "like": lambda x: x.view_as(x.flatten(1, 2)),
    "strides": lambda x: x * x.stride(1),
    "asks": lambda x: x * x.is_contiguous(),
    "strided": lambda x: x.as_strided((2, 4, 3), (50, 3, 1)) + 1,
    "a view of a view": lambda x: x.transpose(2, 3).flatten(2).view(-1),
    "shuffled": lambda x: (
        x.view(x.shape[0], 2, 6, 24, 24).transpose(1, 2).reshape(x.shape[0], 12, 24, 24)
    ),
    "halves": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1).view(-1),
    "nothing": lambda x: x,
    "pooled": lambda x: F.max_pool2d(x, 2),
}


class TestLayouts:
    @pytest.mark.parametrize("name", MEMORY)
    def test_values_that_are_asked_for_their_memory(self, name):
        model = Net(nn.ReLU(), of(MEMORY[name]))
        x = torch.randn(IMAGES)
        own = packed_of(model, x)
        assert isinstance(own.second, PackedConv2d)
        assert_same(model, own, x)
        assert_same(model, own, torch.randn(2, *IMAGES[1:]))

    def test_without_it_a_view_fails(self):
        """That the test above tests something."""
        x = torch.randn(IMAGES)
        own = packed_of(Net(nn.ReLU(), of(MEMORY["flat"])), x)
        for node in [n for n in own.graph.nodes if n.target == "contiguous"]:
            node.replace_all_uses_with(node.args[0])
            own.graph.erase_node(node)
        own.recompile()
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"view size is not compatible"):
            own(x)

    def test_values_between_are_left_as_they_come(self):
        model = Net(of(lambda x: F.max_pool2d(torch.cat([x, -x], 1)[:, :16], 2) * 2))
        own = packed_of(model, torch.randn(IMAGES))
        assert called(own, "contiguous") == 1  # for the output

    def test_a_network_that_ends_with_a_dense_layer_is_not_copied(self):
        model = nn.Sequential(Net(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))
        assert called(packed_of(model, torch.randn(IMAGES)), "contiguous") == 0

    def test_a_view_that_is_written_over(self):
        def written(x):
            x.view(x.shape[0], -1).mul_(2)
            return x + 1

        traced = graph_of(Net(), torch.randn(IMAGES))
        with traced.graph.inserting_before(next(iter(reversed(traced.graph.nodes)))):
            (last,) = (n for n in traced.graph.nodes if n.target == "second")
            view = traced.graph.call_method("view", (last, 2, -1))
            view.meta["seen"] = torch.empty(2, 12 * 24 * 24, device="meta")
            over = traced.graph.call_method("mul_", (view, 2))
            over.meta["seen"] = view.meta["seen"]
            total = traced.graph.call_function(operator.add, (last, 1))
            total.meta["seen"] = last.meta["seen"]
        (end,) = (n for n in traced.graph.nodes if n.op == "output")
        end.args = (total,)
        traced.recompile()
        own = copy.deepcopy(traced)
        pack(own)
        x = torch.randn(IMAGES)
        assert_same(traced, own, x)
        plain = Net().eval()
        plain.load_state_dict(traced.state_dict())
        with torch.no_grad():
            assert torch.allclose(own(x), written(plain(x)), atol=1e-4)

    def test_a_function_that_is_not_torchs(self):
        x = torch.randn(IMAGES)
        traced = graph_of(Net(nn.ReLU()), x)
        seen = []

        def noting(v):
            seen.append(v.is_contiguous())
            return v

        (last,) = (n for n in traced.graph.nodes if n.target == "second")
        with traced.graph.inserting_after(last):
            new = traced.graph.call_function(noting, (last,))
        last.replace_all_uses_with(new)
        new.args, new.meta = (last,), dict(last.meta)
        traced.recompile()
        pack(traced)
        with torch.no_grad():
            traced(x)
        assert seen == [True]


FOLDED = ("resnet18", "mobilenetv2", "densenet", "efficientnet", "shufflenet", "inception", "unet")


class TestFolded:
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("name", FOLDED)
    def test_networks(self, name, layout):
        model = architectures.build(name, size=32, width=0.25).eval()
        x = architectures.example(name, 2, 32, 1).contiguous(memory_format=layout)
        folded, _ = fold(model, x)
        own = copy.deepcopy(folded)
        pack(own)
        assert any(isinstance(m, PackedConv2d) for m in own.modules())
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            plain, found = (
                (net(x) - exact).abs().max() / exact.abs().max() for net in (folded, own)
            )
            assert float(found) <= 3 * float(plain) + 1e-6
            first, second = own(x), own(x)  # the second by the plan of the first
            assert first.is_contiguous()
            assert torch.equal(first, second)

    def test_export_and_pickle(self):
        model = architectures.build("mobilenetv2", size=32, width=0.25).eval()
        x = architectures.example("mobilenetv2", 2, 32, 1)
        own, _ = fold(model, x)
        pack(own)
        with torch.no_grad():
            wanted = own(x)
            program = torch.export.export(own, (x,))
            again = pickle.loads(pickle.dumps(own))(x)
            exact = copy.deepcopy(model).double()(x.double())
        assert torch.equal(again, wanted)
        assert not any("mkldnn" in str(n.target) for n in program.graph.nodes)
        found = program.module()(x).detach()
        plain, exported = ((y - exact).abs().max() for y in (wanted, found))
        assert float(exported) <= 3 * float(plain) + 1e-6 * float(exact.abs().max())

    def test_transposed_convolutions(self):
        model = architectures.build("dcgan", size=32, width=0.25).eval()
        x = architectures.example("dcgan", 2, 32, 1)
        own, _ = fold(model, x, pack=True)
        assert kinds(own).count("PackedConvTranspose2d") == 5
        with torch.no_grad():
            assert float((own(x) - model(x)).abs().max()) <= 1e-5
            assert torch.equal(own(x), own(x))

    def test_twice_changes_nothing(self):
        own = packed_of(Net(nn.ReLU()), torch.randn(IMAGES))
        before = own.code
        pack(own)
        assert own.code == before


class Residual(nn.Module):
    """A convolution and what is added to it, then an activation."""

    def __init__(self, add, between=None):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.add, self.between = add, between or nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.first(x)
        return self.between(self.add(self.second(x), x)).sin()


SUMS = {
    "+": lambda y, x: y + x,
    "the other way round": lambda y, x: x + y,
    "in place": lambda y, x: operator.iadd(y, x),
    "torch.add": lambda y, x: torch.add(y, x),
}
OTHER_SUMS = {
    "with a factor": lambda y, x: torch.add(y, x, alpha=2),
    "of different shapes": lambda y, x: y + x[:1],
    "of a number": lambda y, x: y + 1 + 0 * x,
    "of twice the same": lambda y, x: y + y + 0 * x,
    "used twice": lambda y, x: (y + x) * y,
    "into what others read": lambda y, x: x.add_(1) * 0 + (y + x),
}


class TestSums:
    @pytest.mark.parametrize("between", [nn.ReLU(), nn.ReLU6(True), nn.SiLU(), nn.Sigmoid()])
    @pytest.mark.parametrize("name", SUMS)
    def test_are_taken_in_with_the_activation_behind(self, name, between):
        model, x = Residual(SUMS[name], between), torch.randn(IMAGES)
        own = packed_of(model, x)
        left = [] if not isinstance(between, nn.Sigmoid) else ["Sigmoid"]
        assert kinds(own) == ["PackedConv2d", "PackedConv2d", *left]
        assert not {operator.add, operator.iadd, torch.add} & {n.target for n in own.graph.nodes}
        for _ in range(2):
            assert_same(model, own, x)
        unpack(own)
        assert kinds(own) == ["Conv2d", "Conv2d", type(between).__name__]
        assert_same(model, own, x)

    @pytest.mark.parametrize("name", OTHER_SUMS)
    def test_others_stay(self, name):
        model, x = Residual(OTHER_SUMS[name]), torch.randn(IMAGES)
        own = packed_of(model, x)
        assert all(len(n.args) == 1 for n in own.graph.nodes if n.op == "call_module")
        for _ in range(2):
            assert_same(model, own, x)

    def test_of_two_convolutions(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)

            def forward(self, x):
                return torch.relu(self.one(x) + self.other(x)).sin()

        model, x = Both(), torch.randn(IMAGES)
        own = packed_of(model, x)
        assert kinds(own) == ["PackedConv2d", "PackedConv2d"]
        assert [len(n.args) for n in own.graph.nodes if n.op == "call_module"] == [1, 2]
        for _ in range(2):
            assert_same(model, own, x)

    def test_gradients_and_training(self):
        model, x = Residual(SUMS["+"]), torch.randn(IMAGES)
        own = packed_of(model, x)
        for net in (model, own):
            net(x).sum().backward()
        for wanted, found in zip(model.parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad)


class TestUnpack:
    @pytest.mark.parametrize("between", [nn.ReLU(), nn.SiLU(), nn.LeakyReLU(0.3), nn.Sigmoid()])
    def test_undoes_it(self, between):
        model, x = Net(between, of(MEMORY["flat"])), torch.randn(IMAGES)
        own = packed_of(model, x)
        unpack(own)
        assert not any(isinstance(m, PackedConv2d) for m in own.modules())
        assert kinds(own) == ["Conv2d", type(between).__name__, "Conv2d"]
        assert called(own, "contiguous") == 0
        assert list(own.state_dict()) == list(model.state_dict())
        assert_same(model, own, x)
        pack(own)
        assert kinds(own) == ["PackedConv2d", *kinds(own)[1:]]
        assert_same(model, own, x)

    def test_a_copy_and_folding_again(self):
        model = architectures.build("unet", size=32, width=0.25).eval()
        x = architectures.example("unet", 2, 32, 1)
        own, _ = fold(model, x)
        pack(own)
        other = copy.deepcopy(own)
        unpack(other)
        assert called(other, "contiguous") == 0
        assert fold(other, x)[1].folded == ()
        assert fold(own, x)[1].folded == ()
        assert any(isinstance(m, PackedConv2d) for m in own.modules())

    def test_of_a_graph_that_was_not_packed(self):
        own = graph_of(Net(nn.ReLU()), torch.randn(IMAGES))
        before = own.code
        unpack(own)
        assert own.code == before
        assert isinstance(own, fx.GraphModule)
