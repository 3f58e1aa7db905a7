"""Packed convolutions: the numbers of torch's own, and never those of a weight that was."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn

from evenkeel.errors import ConfigError
from evenkeel.nn import ways
from evenkeel.nn.packed import PackedConv2d, pack_module, unpacked

from .packing import (
    ACTIVATIONS,
    LAYOUTS,
    TOLERANCE,
    assert_same,
    conv_and_input,
    in_threads,
    off,
    packed,
    way,
)

SETTINGS = {
    "pointwise": {"kernel_size": 1},
    "pointwise strided": {"kernel_size": 1, "stride": (2, 3)},
    "pointwise padded": {"kernel_size": 1, "padding": 1},
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": (3, 2), "padding": (1, 0), "stride": 2},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "wide": {"kernel_size": (1, 7), "padding": (0, 3)},
    "same": {"kernel_size": 5, "padding": "same"},
    "same, one side more": {"kernel_size": 4, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "no bias": {"kernel_size": 3, "bias": False},
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class TestNumbers:
    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("name", SETTINGS)
    def test_every_setting(self, name, layout, limits):
        for batch, (height, width), (activation, function) in itertools.product(
            (1, 4), ((7, 12), (17, 11)), ACTIVATIONS.items()
        ):
            conv = nn.Conv2d(8, 12, **SETTINGS[name]).eval()
            x = torch.randn(batch, 8, height, width).contiguous(memory_format=LAYOUTS[layout])
            assert_same(conv, packed(conv, activation), x, function)

    @pytest.mark.parametrize("kernel", [1, 3])
    @pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33])
    def test_every_number_of_channels(self, channels, kernel, limits):
        for outputs, batch in itertools.product((1, 5, 8, 33), (1, 4)):
            conv = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2).eval()
            assert_same(conv, packed(conv, "relu"), torch.randn(batch, channels, 9, 7), torch.relu)

    @pytest.mark.parametrize("kernel", [1, 3, 5])
    @pytest.mark.parametrize("groups", [2, 3, 6])
    @pytest.mark.parametrize("multiplier", [1, 2])
    def test_groups(self, groups, kernel, multiplier, limits):
        outputs = 6 * multiplier
        conv = nn.Conv2d(6, outputs, kernel, padding=kernel // 2, groups=groups, stride=2).eval()
        for layout in LAYOUTS.values():
            x = torch.randn(2, 6, 11, 13).contiguous(memory_format=layout)
            assert_same(conv, packed(conv, "relu6"), x, F.relu6)

    @pytest.mark.parametrize("kernel", [1, 3])
    def test_inputs_that_are_not_dense(self, kernel, limits):
        conv = nn.Conv2d(4, 8, kernel).eval()
        for x in (
            torch.randn(2, 4, 18, 9)[:, :, ::2],
            torch.randn(1, 4, 1, 9).expand(3, 4, 9, 9),
            torch.randn(9, 9, 4, 2).permute(3, 2, 0, 1),
            torch.randn(2, 8, 9, 9)[:, ::2],
        ):
            assert_same(conv, packed(conv), x)

    def test_a_channels_last_weight(self, limits):
        for kernel in (1, 3):
            conv = nn.Conv2d(16, 24, kernel).eval().to(memory_format=torch.channels_last)
            assert_same(conv, packed(conv), torch.randn(2, 16, 9, 9))

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("kernel", [1, 3])
    def test_nan_is_not_hidden(self, activation, kernel, limits):
        conv, x = conv_and_input(kernel_size=kernel, padding=0)
        x[0, 0, 4, 4] = float("nan")
        with torch.no_grad():
            found, wanted = packed(conv, activation)(x), ACTIVATIONS[activation](conv(x))
        assert torch.equal(found.isnan(), wanted.isnan())
        assert wanted.isnan().any()

    def test_the_input_is_not_written_over(self, limits):
        for kernel in (1, 3):
            conv, x = conv_and_input(kernel_size=kernel)
            kept = x.clone()
            with torch.no_grad():
                packed(conv, "relu")(x)
            assert torch.equal(x, kept)

    def test_a_wrong_number_is_seen(self):
        conv, x = conv_and_input()
        own = packed(conv)
        with torch.no_grad():
            own.weight[3, 3, 1, 1] += 1e-4
        with pytest.raises(AssertionError):
            assert_same(conv, own, x)


class TestWays:
    @pytest.mark.parametrize(
        ("settings", "wanted"),
        [
            ({"kernel_size": 1, "padding": 0}, "product"),
            ({"kernel_size": 3}, "reordered"),
            ({"kernel_size": 3, "groups": 16, "outputs": 16}, "depthwise"),
            ({"kernel_size": 3, "groups": 16}, "reordered"),
            ({"kernel_size": 3, "size": 3, "batch": 1}, "torch"),
            ({"kernel_size": 1, "padding": 0, "size": 96, "batch": 8}, "product"),
            (
                {"kernel_size": 1, "padding": 0, "size": 4, "channels": 512, "outputs": 1024},
                "reordered",
            ),
            ({"kernel_size": 1, "padding": 0, "channels": 512, "outputs": 1024}, "product"),
            ({"kernel_size": 3, "padding_mode": "reflect"}, "torch"),
        ],
    )
    def test_the_one_that_was_measured_to_be_fastest(self, settings, wanted, monkeypatch):
        monkeypatch.setattr(ways, "_most", lambda shape: math.inf)
        settings = dict(settings)
        sizes = {"channels": 16, "outputs": 32, "size": 24, "batch": 2} | settings
        channels, outputs, size, batch = (
            sizes.pop(k) for k in ("channels", "outputs", "size", "batch")
        )
        conv = nn.Conv2d(channels, outputs, **({"padding": 1} | sizes)).eval()
        own, x = packed(conv), torch.randn(batch, channels, size, size)
        assert_same(conv, own, x)
        assert way(own) == wanted

    @pytest.mark.parametrize("size", [8, 24])
    @pytest.mark.parametrize("instructions", ["avx2", "avx512"])
    @pytest.mark.parametrize("is_intels", [False, True])
    def test_mkl_has_no_avx512_on_others_processors(
        self, instructions, is_intels, size, monkeypatch
    ):
        kernels = SimpleNamespace(instructions=lambda: instructions, is_intels=lambda: is_intels)
        monkeypatch.setattr(ways, "kernels_for", lambda shape: kernels)
        conv, x = nn.Conv2d(64, 64, 1).eval(), torch.randn(2, 64, size, size)
        own = packed(conv)
        assert_same(conv, own, x)
        is_behind = size == 24 and instructions == "avx512" and not is_intels
        assert way(own) == ("reordered" if is_behind else "product")

    @pytest.mark.parametrize("kernel", [1, 3])
    def test_the_output_is_channels_last(self, kernel, reordering):
        conv, x = conv_and_input(kernel_size=kernel)
        with torch.no_grad():
            y = packed(conv, "relu")(x)
        assert y.is_contiguous(memory_format=torch.channels_last)

    def test_another_size_is_packed_anew(self, reordering):
        conv, x = conv_and_input()
        own = packed(conv)
        for size in (x.shape, (1, 16, 30, 5), (4, 16, 3, 3), x.shape):
            assert_same(conv, own, torch.randn(size))
            assert own._way.shape == torch.Size(size)

    def test_the_same_weight_is_packed_once(self, reordering):
        conv, x = conv_and_input()
        own = packed(conv)
        with torch.no_grad():
            own(x)
            first = own._way
            own(x)
        assert own._way is first

    def test_onednn_switched_off(self, reordering):
        conv, x = conv_and_input()
        own = packed(conv, "relu")
        torch._C._set_mkldnn_enabled(False)  # the public flag is frozen by torch's test tools
        try:
            assert_same(conv, own, x, torch.relu)
        finally:
            torch._C._set_mkldnn_enabled(True)
        assert way(own) is None

    def test_a_torch_without_the_operation(self, monkeypatch):
        monkeypatch.setattr(ways, "HAS_OPS", False)
        conv, x = conv_and_input()
        own = packed(conv, "relu")
        assert_same(conv, own, x, torch.relu)
        assert way(own) is None

    def test_autocast(self, reordering):
        conv, x = conv_and_input()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert packed(conv)(x).dtype == torch.bfloat16

    def test_threads(self, reordering):
        conv, _ = conv_and_input()
        own, wrong = packed(conv, "relu"), []

        def run(seed):
            x = torch.randn(1 + seed, 16, 9, 9, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                wanted = torch.relu(conv(x))
                wrong.extend(seed for _ in range(30) if off(own(x), wanted) > TOLERANCE)

        in_threads(run)
        assert not wrong


class TestErrors:
    @pytest.mark.parametrize(
        ("shape", "match"),
        [
            ((2, 15, 9, 9), r"expected input\[2, 15, 9, 9\] to have 16 channels"),
            ((2, 16, 2, 9), r"Kernel size can't be greater than actual input size"),
            ((16, 9), r"Expected 3D .* or 4D"),
        ],
    )
    def test_those_of_torch(self, shape, match, reordering):
        conv, _ = conv_and_input(padding=0)
        with torch.no_grad(), pytest.raises(RuntimeError, match=match):
            packed(conv)(torch.randn(shape))

    def test_no_images_and_no_batch_axis(self, reordering):
        conv, x = conv_and_input()
        with torch.no_grad():
            assert packed(conv)(x[:0]).shape == (0, 24, 9, 9)
            assert off(packed(conv)(x[0]), conv(x[0])) <= TOLERANCE

    def test_a_subclass(self):
        with pytest.raises(TypeError, match=r"got LazyConv2d"):
            pack_module(nn.LazyConv2d(3, 3))

    def test_an_unknown_activation(self):
        conv = nn.Conv2d(3, 3, 3)
        with pytest.raises(ConfigError, match=r"unknown activation 'gelu'"):
            pack_module(conv, "gelu")
        assert type(conv) is nn.Conv2d


CHANGES = {
    "in place": lambda own, other: own.weight.copy_(other.weight),
    "by data": lambda own, other: own.weight.data.copy_(other.weight),
    "new data": lambda own, other: setattr(own.weight, "data", other.weight.clone()),
    "loaded": lambda own, other: own.load_state_dict(other.state_dict()),
    "assigned": lambda own, other: own.load_state_dict(other.state_dict(), assign=True),
    "replaced": lambda own, other: setattr(own, "weight", nn.Parameter(other.weight.clone())),
}


class TestChangedWeights:
    @pytest.mark.parametrize("kernel", [1, 3])
    @pytest.mark.parametrize("name", CHANGES)
    @torch.no_grad()
    def test_are_honoured_at_once(self, name, kernel, limits):
        conv, x = conv_and_input(kernel_size=kernel)
        other = conv_and_input(kernel_size=kernel)[0]
        own = packed(conv, "relu")
        own(x)
        CHANGES[name](own, other)
        own.bias.copy_(other.bias)
        assert_same(other, own, x, torch.relu)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_types(self, dtype, reordering):
        conv, x = conv_and_input()
        own = packed(conv, "silu")
        own(x)
        own.to(dtype)
        wanted = F.silu(conv.to(dtype)(x.to(dtype)))
        assert torch.equal(own(x.to(dtype)), wanted)
        with pytest.raises(RuntimeError, match=r"type"):
            own(x)
        own.float()
        assert_same(conv.float(), own, x, F.silu)

    @torch.no_grad()
    def test_settings(self, reordering):
        conv, x = conv_and_input()
        own = packed(conv)
        own(x)
        for one in (conv, own):
            one.stride, one.padding = (2, 1), (0, 2)
        assert_same(conv, own, x)
        own.activation = "relu"
        assert_same(conv, own, x, torch.relu)

    @torch.no_grad()
    def test_weights_that_are_computed_at_every_call(self, reordering):
        conv, x = conv_and_input()
        own = packed(conv, "relu")
        own(x)
        for net in (conv, own):
            torch.nn.utils.parametrizations.weight_norm(net)
            net.parametrizations.weight.original0.mul_(2)
        assert torch.equal(own(x), torch.relu(conv(x)))
        torch.nn.utils.parametrize.remove_parametrizations(own, "weight")
        assert_same(nn.Sequential(conv, nn.ReLU()), own, x)

    @pytest.mark.parametrize("name", ["weight", "bias"])
    @torch.no_grad()
    def test_pruned(self, name, reordering):
        conv, x = conv_and_input()
        own = packed(conv, "relu")
        own(x)
        for net in (conv, own):
            torch.nn.utils.prune.l1_unstructured(net, name, 0.5)
        assert torch.equal(own(x), torch.relu(conv(x)))

    def test_weights_without_a_version(self, reordering):
        with torch.inference_mode():
            conv, x = conv_and_input()
            own = packed(conv)
            own(x)
            own.weight.mul_(2)
            conv.weight.mul_(2)
            found = own(x)
            assert off(found, conv(x)) <= TOLERANCE

    def test_modes_in_turn(self, reordering):
        conv, x = conv_and_input()
        own = packed(conv)
        with torch.inference_mode():
            own(x)
        with torch.no_grad():
            assert off(own(x), conv(x)) <= TOLERANCE
        assert off(own.requires_grad_(False)(x), conv(x)) <= TOLERANCE


class TestGradients:
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("kernel", [1, 3])
    def test_are_torchs(self, activation, kernel, limits):
        conv, x = conv_and_input(kernel_size=kernel)
        own = packed(conv, activation)
        with torch.no_grad():
            own(x)
        found, wanted = [], []
        for net, into in ((own, found), (lambda v: ACTIVATIONS[activation](conv(v)), wanted)):
            v = x.clone().requires_grad_()
            net(v).square().sum().backward()
            into.append(v.grad)
        found += [own.weight.grad, own.bias.grad]
        wanted += [conv.weight.grad, conv.bias.grad]
        assert all(map(torch.equal, found, wanted))

    def test_of_the_input_alone_or_the_bias_alone(self, reordering):
        conv, x = conv_and_input()
        own = packed(conv, "relu").requires_grad_(False)
        assert not own(x).requires_grad
        assert own(x.clone().requires_grad_()).requires_grad
        own.bias.requires_grad_()
        assert own(x).requires_grad

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jvp imports torch.jit's
    def test_forward_mode_and_vmap(self, reordering):
        conv, x = conv_and_input()
        own = packed(conv, "silu").requires_grad_(False)
        conv.requires_grad_(False)
        direction = torch.randn_like(x)
        found = torch.func.jvp(own, (x,), (direction,))[1]
        wanted = torch.func.jvp(lambda v: F.silu(conv(v)), (x,), (direction,))[1]
        assert off(found, wanted) <= TOLERANCE
        many = torch.stack([x, x + 1])
        assert off(torch.vmap(own)(many), torch.vmap(lambda v: F.silu(conv(v)))(many)) <= TOLERANCE


class TestAModule:
    def test_state_dict_and_repr(self):
        conv, _ = conv_and_input()
        own = packed(conv, "relu")
        assert list(own.state_dict()) == list(conv.state_dict()) == ["weight", "bias"]
        assert repr(own) == "Packed" + repr(conv)[:-1] + ", activation='relu')"
        assert repr(packed(conv)) == "Packed" + repr(conv)
        assert isinstance(own, nn.Conv2d)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_hold_no_packed_weight(self, copied, reordering):
        conv, x = conv_and_input()
        own = packed(conv, ("leaky_relu", 0.2))
        with torch.no_grad():
            own(x)
        assert own._way is not None
        other = copied(own)
        assert "_packed" not in vars(other)
        assert other.activation == ("leaky_relu", 0.2)
        with torch.no_grad():
            other.weight.mul_(2)
            conv.weight.mul_(2)
        assert_same(conv, other, x, ACTIVATIONS["leaky_relu", 0.2])

    def test_pickle_is_no_larger(self, reordering):
        conv, x = conv_and_input()
        own = packed(conv)
        before = len(pickle.dumps(own))
        with torch.no_grad():
            own(x)
        assert len(pickle.dumps(own)) == before

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_export_gives_plain_operations(self, activation, reordering):
        conv, x = conv_and_input()
        own = packed(conv, activation)
        with torch.no_grad():
            own(x)
            program = torch.export.export(own, (x,))
        targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        assert targets[0] == "aten.conv2d.default"
        assert not any("mkldnn" in target for target in targets)
        assert off(program.module()(x), ACTIVATIONS[activation](conv(x))) <= TOLERANCE

    def test_jit_traces_plain_operations(self, reordering):
        conv, x = conv_and_input()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            traced = torch.jit.trace(packed(conv, "relu"), x)
        assert "mkldnn" not in str(traced.graph)

    def test_compiles_in_one_graph(self, reordering):
        conv, x = conv_and_input()
        compiled = torch.compile(packed(conv, "relu"), backend="eager", fullgraph=True)
        with torch.no_grad():
            assert torch.equal(compiled(x), torch.relu(conv(x)))

    def test_fx_traces_plain_operations(self):
        conv, _ = conv_and_input()
        traced = torch.fx.Tracer().trace(packed(conv, "relu"))
        assert [n.op for n in traced.nodes].count("call_function") >= 1
        assert not any("mkldnn" in str(n.target) for n in traced.nodes)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_unpacked(self, activation, reordering):
        conv, x = conv_and_input()
        own = packed(conv, activation)
        with torch.no_grad():
            own(x)
            plain, act = unpacked(own)
            assert type(plain) is nn.Conv2d
            assert plain.weight is own.weight
            assert "_packed" not in vars(plain)
            assert (act is None) == (activation is None)
            found = plain(x) if act is None else act(plain(x))
            assert torch.equal(found, ACTIVATIONS[activation](conv(x)))
        plain.weight = nn.Parameter(torch.zeros_like(plain.weight))
        assert own.weight.abs().sum() > 0
        assert isinstance(own, PackedConv2d)
