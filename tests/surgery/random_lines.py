"""The lines of random networks: layers, norms, activations, and all that comes between.

Each function adds one line to a `Writer`, or raises LookupError where there is no place for it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import evenkeel
from evenkeel.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Norm, PerActivationBatchNorm

from .random_writer import Writer

OURS = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
TORCHS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class WithActivation(nn.BatchNorm2d):
    """A user's norm that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


# Layers


def conv(w: Writer) -> None:
    value = w.pick(lambda v: v.dim() in (3, 4, 5))
    rank, c = len(w.shape(value)) - 2, w.shape(value)[1]
    groups = w.one(1, 1, 1, *(g for g in (2, c) if c % g == 0))
    options: dict[str, Any] = {
        "kernel_size": [w.one(1, 2, 3) for _ in range(rank)],
        "stride": [w.one(1, 1, 1, 2) for _ in range(rank)],
        "padding": [w.one(0, 1, 1, 2) for _ in range(rank)],
        "dilation": [w.one(1, 1, 1, 2) for _ in range(rank)],
        "groups": groups,
        "bias": w.chance(60),
    }
    outputs = groups * w.one(1, 2) if groups > 1 else w.one(2, 4)
    if w.chance(25):
        kind: Any = TRANSPOSED[rank - 1]
        options["output_padding"] = [min(w.one(0, 0, 1), s - 1) for s in options["stride"]]
    else:
        kind = CONVS[rank - 1]
        options["padding_mode"] = w.one("zeros", "zeros", "zeros", "zeros", "reflect", "circular")
        if w.chance(10):
            options |= {"padding": "same", "stride": 1}
    w.call("conv", lively(w, kind(c, outputs, **options)), value)


def lively(w: Writer, layer: Any) -> Any:
    """The layer with weights that keep values at their size."""
    with torch.no_grad():
        layer = layer.double()
        fan = max(1, layer.weight[0].numel())
        layer.weight.copy_(w.numbers(*layer.weight.shape) / math.sqrt(fan))
        if layer.bias is not None:
            layer.bias.copy_(w.numbers(*layer.bias.shape) / 2)
    return layer


def functional_conv(w: Writer) -> None:
    value = w.pick(lambda v: v.dim() == 4)
    c, bias = w.shape(value)[1], w.one("None", w.tensor(4))
    padding, stride = w.one(0, 1), w.one(1, 1, 2)
    if w.chance(25):
        w.say(f"F.conv_transpose2d({{0}}, {w.tensor(c, 4, 2, 2)}, {bias}, stride=2)", value)
    elif w.chance(20):
        shared = w.tensor(c, c, 3, 3)
        middle = w.say(f"F.conv2d({{0}}, {shared}, padding=1)", value)
        w.say(f"F.conv2d({{0}}, {shared}, padding=1)", w.one(middle, value))
    else:
        weight = w.tensor(4, c, 3, 3)
        w.say(f"F.conv2d({{0}}, {weight}, {bias}, stride={stride}, padding={padding})", value)


def linear(w: Writer) -> None:
    value = w.pick(lambda v: v.dim() < 4 or w.chance(10))
    inputs, outputs = w.shape(value)[-1], w.one(2, 4, w.shape(value)[1])
    if w.chance(20):
        w.say(f"F.linear({{0}}, {w.tensor(outputs, inputs)}, {w.tensor(outputs)})", value)
    else:
        w.call("fc", lively(w, nn.Linear(inputs, outputs, bias=w.chance(60))), value)


# Norms


def _patterned(w: Writer, shape: tuple[int, ...]) -> nn.Module:
    names = {2: "n c", 3: "n c l", 4: "n c h w", 5: "n c d h w"}[len(shape)]
    sizes = dict(zip(names.split(), shape, strict=True))
    c = {"c": shape[1]}
    space = names[4:]
    choices: list[Callable[[], nn.Module]] = [
        lambda: Norm("n c ... -> c", **c),
        lambda: Norm("n c ... -> c", affine=None, **c),
        lambda: Norm("n c ... ->", "c", **c),
        lambda: PerActivationBatchNorm(shape[1:], affine=w.chance(70)),
        lambda: Norm("n c ... -> n", "c", **c),
    ]
    if space:
        places = {name: sizes[name] for name in space.split()}
        choices.append(lambda: Norm(f"{names} -> {space}", **places))
        choices.append(lambda: Norm(f"{names} -> c", space, **places, **c))
        choices.append(lambda: Norm(f"{names} -> {space}", "c", **places, **c))
    if shape[1] % 2 == 0:
        groups = {"g": 2, "c": shape[1] // 2}
        choices.append(lambda: Norm(names.replace("c", "(g c)") + " -> g", "(g c)", **groups))
    return w.one(*choices)()


def _frozen(norm: nn.Module) -> nn.Module:
    evenkeel.freeze(holder := nn.Sequential(norm))
    return holder[0]


def _active(w: Writer, norm: Any) -> nn.Module:
    norm.activation = w.one("relu", "silu", "relu6", ("leaky_relu", 0.2))
    return norm


Made = Callable[[Writer, tuple[int, ...]], nn.Module]
NORMS: dict[str, Made] = {
    "torch's": lambda w, s: TORCHS[len(s)](s[1], eps=w.one(1e-5, 1e-3)),
    "torch's, plain": lambda w, s: TORCHS[len(s)](s[1], affine=False),
    "ours": lambda w, s: OURS[len(s)](s[1]),
    "frozen": lambda w, s: _frozen(w.one(OURS, TORCHS)[len(s)](s[1])),
    "ours, active": lambda w, s: _active(w, OURS[len(s)](s[1])),
    "synchronized": lambda w, s: nn.SyncBatchNorm(s[1]),
    "patterned": _patterned,
    "forgetful": lambda w, s: TORCHS[len(s)](s[1], track_running_stats=False),
    "of groups": lambda w, s: nn.GroupNorm(1, s[1]),
    "a user's": lambda w, s: WithActivation(s[1]) if len(s) == 4 else TORCHS[len(s)](s[1]),
}
COMMON = ("torch's", "ours")


def norm(w: Writer) -> None:
    value = w.pick(lambda v: v.dim() in TORCHS)
    shape = w.shape(value)
    if w.chance(15):
        functional_norm(w, value, shape[1])
        return
    kind = w.one(*COMMON) if w.chance(40) else w.one(*NORMS)
    made = NORMS[kind](w, shape).double()
    statistics(w, made)
    if kind == "ours, active" and w.chance(40):
        residual = w.pick(lambda v: v.shape == w.values[value].shape)
        name = w.add("norm", made)
        w.say(f"self.{name}({{0}}, {{1}})", value, residual)
    else:
        name = w.call("norm", made, value)
    w.norms.append(name)
    w.marks.append(kind)


def functional_norm(w: Writer, value: str, c: int) -> None:
    mean, var, gamma, beta = (w.tensor(c, learned=i > 1) for i in range(4))
    holder = getattr(w.holder, var.removeprefix("self."))
    holder.copy_(holder.abs() + 0.1)
    given = f"{gamma}, {beta}" if w.chance(70) else "None, None"
    eps = w.one(1e-5, 1e-3)
    w.say(f"F.batch_norm({{0}}, {mean}, {var}, {given}, False, 0.1, {eps})", value)
    w.functions += 1
    w.marks.append("a function")


@torch.no_grad()
def statistics(w: Writer, norm: Any) -> None:
    """Running statistics, gamma and beta: any, or of a kind that passes more operations."""
    if getattr(norm, "running_mean", None) is None:
        return
    kind = w.one("any", "any", "any", "rising", "scaling", "nothing")
    mean, var = norm.running_mean, norm.running_var
    mean.copy_(w.numbers(*mean.shape))
    var.copy_(w.numbers(*var.shape).abs() * 2 + 0.1)
    if kind in ("scaling", "nothing"):
        mean.zero_()
    if norm.weight is None:
        return
    norm.weight.copy_(w.numbers(*norm.weight.shape))
    norm.bias.copy_(w.numbers(*norm.bias.shape))
    if kind == "any":
        norm.weight.view(-1)[0] *= w.one(0, -1)
    else:
        norm.weight.copy_(norm.weight.abs() + 0.1)
    if kind in ("scaling", "nothing"):
        norm.bias.zero_()
    if kind == "nothing" and norm.weight.shape == var.shape:
        norm.weight.copy_((var + norm.eps).sqrt())


# Everything else


ACTIVATIONS: tuple[Any, ...] = (
    "F.relu({0})", "{0}.relu()", "torch.relu({0})", "F.relu({0}, inplace=True)", "{0}.relu_()",
    "F.leaky_relu({0}, 0.2)", "F.leaky_relu({0}, -0.5)", "F.leaky_relu_({0}, 0.1)", "F.silu({0})",
    "torch.sigmoid({0})", "{0}.tanh()", "F.gelu({0})", "F.hardtanh({0})", "F.elu({0})",
    "{0}.abs()", "F.softmax({0}, 1)", "{0}.clamp(min=0)",
    nn.ReLU, nn.ReLU, lambda: nn.ReLU(inplace=True), lambda: nn.ReLU(inplace=True), nn.ReLU6,
    nn.LeakyReLU, lambda: nn.LeakyReLU(-0.5, inplace=True), nn.PReLU, lambda: nn.SiLU(inplace=True),
    nn.Hardswish, nn.Threshold,
)  # fmt: skip
PASSING: tuple[Any, ...] = (
    "{0}.contiguous()", "{0}.clone()", "{0}.detach()", "F.dropout({0}, 0.5, self.training)",
    "F.dropout2d({0}, training=False)", nn.Identity, nn.Dropout, lambda: nn.Dropout(inplace=True),
    nn.Dropout2d, nn.AlphaDropout,
)  # fmt: skip


def activation(w: Writer) -> None:
    form = w.one(*ACTIVATIONS)
    value = w.pick()
    if isinstance(form, str):
        w.say(form, value)
        return
    module = form(0.1, 0.2) if form is nn.Threshold else form()
    if form is nn.PReLU and w.chance(50):
        module = nn.PReLU(w.shape(value)[1])
    w.call("act", module, value)


def passing(w: Writer) -> None:
    form = w.one(*PASSING)
    if isinstance(form, str):
        w.say(form, w.pick())
    else:
        w.call("pass", form(), w.pick())


def pooling(w: Writer) -> None:
    value = w.pick(lambda v: v.dim() > 2 or w.chance(10))
    rank = len(w.shape(value)) - 2
    d = min(3, max(1, rank + w.one(0, 0, 0, 0, 0, 0, 1)))  # one more: the channels are pooled too
    kernel, stride, padding = w.one(2, 3), w.one(1, 2), w.one(0, 0, 1)
    ceil = w.chance(20)
    size = w.one(1, 2, (1,) * d)
    choices = (
        lambda: getattr(nn, f"MaxPool{d}d")(kernel, stride, padding, ceil_mode=ceil),
        lambda: getattr(nn, f"AvgPool{d}d")(kernel, stride, padding, ceil, w.chance(50)),
        lambda: getattr(nn, f"AdaptiveAvgPool{d}d")(size),
        lambda: getattr(nn, f"AdaptiveMaxPool{d}d")(size),
        lambda: getattr(nn, f"LPPool{d}d")(2, 2),
        lambda: nn.AvgPool2d(2, divisor_override=3),
    )
    texts = (
        f"F.max_pool{d}d({{0}}, {kernel}, {stride}, {padding})",
        f"F.avg_pool{d}d({{0}}, {kernel}, {stride}, {padding})",
        f"F.avg_pool{d}d({{0}}, {{0}}.shape[-1])",
        f"F.adaptive_avg_pool{d}d({{0}}, {size})",
        f"F.adaptive_max_pool{d}d({{0}}, 1)",
        f"torch.max_pool{d}d({{0}}, {kernel})",
    )
    if w.chance(60):
        w.call("pool", w.one(*choices)(), value)
    else:
        w.say(w.one(*texts), value)


MOVES = (
    "{0}.flatten(1)", "torch.flatten({0}, 1)", "{0}.view({0}.size(0), -1)",
    "{0}.reshape({0}.shape[0], -1)", "{0}.flatten(2)", "{0}.flatten(-2)", "{0}.transpose(1, 2)",
    "{0}.transpose(-1, -2)", "{0}.permute(0, 2, 1)", "{0}.permute(0, 2, 3, 1)",
    "{0}.permute(0, 3, 1, 2).contiguous()", "{0}.flip(1)", "{0}.flip(0)", "torch.roll({0}, 1, 1)",
    "{0}.roll(1, -1)", "{0}.unsqueeze(1)", "{0}.unsqueeze(-1)", "{0}.squeeze(2)", "{0}.squeeze(1)",
    "{0}[:, :2]", "{0}[:, ::2]", "{0}[..., 1:]", "{0}[:, 0]", "{0}[:, [1, 0]]",
    "{0}.unflatten(1, (2, -1))", "{0}.narrow(1, 0, 2)", "{0}.select(2, 0)", "{0}.movedim(1, -1)",
    "F.pixel_shuffle({0}, 2)", "F.pixel_unshuffle({0}, 2)", "{0}.repeat(1, 2, 1, 1)",
    "{0}.repeat_interleave(2, 1)", "torch.stack(({0}, {0}), 1)", "{0}.mT",
    "{0}.swapaxes(1, 2)", "F.unfold({0}, 2)",
)  # fmt: skip


def moving(w: Writer) -> None:
    modules: dict[str, Callable[[], nn.Module]] = {
        "flatten": nn.Flatten,
        "shuffle": lambda: nn.ChannelShuffle(2),
        "pixels": lambda: nn.PixelShuffle(2),
        "unflatten": lambda: nn.Unflatten(1, (2, -1)),
    }
    if w.chance(20):
        kind = w.one(*modules)
        w.call(kind, modules[kind](), w.pick())
    else:
        w.say(w.one(*MOVES), w.pick())


CUTS = (
    "{0}.chunk(2, 1)", "torch.chunk({0}, 2, dim=1)", "{0}.split([1, {0}.shape[1] - 1], 1)",
    "torch.split({0}, {0}.shape[1] // 2, 1)", "{0}.chunk(2, dim=-1)", "{0}.unbind(1)",
    "{0}.split({0}.size(1) // 2, dim=1)", "torch.tensor_split({0}, 2, 1)",
)  # fmt: skip


def cutting(w: Writer) -> None:
    value = w.pick(lambda v: v.shape[1] > 1)
    names = [w.fresh(), w.fresh()]
    w.write(f"{', '.join(names)} = " + w.one(*CUTS).format(value), [value], names)


def joining(w: Writer) -> None:
    first = w.pick()
    axis = w.one(1, 1, 1, -1, 2)
    shape = w.shape(first)

    def fits(v: Tensor) -> bool:
        same = [a == b for a, b in zip(v.shape, shape, strict=False)]
        return v.dim() == len(shape) > axis and sum(same) - same[axis] == len(shape) - 1

    second = w.pick(fits)
    parts = [first, second] if w.chance(80) else [second, first, w.pick(fits)]
    together = ", ".join(parts)
    form = w.one(f"torch.cat(({together}), {axis})", f"torch.cat([{together}], dim={axis})")
    name = w.fresh()
    w.write(f"{name} = {form}", parts, [name])


SUMS = (
    "{0} + {1}", "{0} + {1}", "torch.add({0}, {1})", "{0}.add({1})", "{0}.add_({1})",
    "torch.add({0}, {1}, alpha=2)", "{0} - 0.5 * {1}", "{0} * {1}", "{0} * torch.sigmoid({1})",
    "({0} + {1}) / 2", "torch.maximum({0}, {1})", "torch.where({0} > 0, {0}, {1})",
)  # fmt: skip
ALONE = (
    "{0} + 0.5", "{0} * 2", "-{0}", "1 - {0}", "{0} / 2", "{0} + {0}", "{0} * {0}",
    "{0}.mul_(2)", "{0} + {0}.mean(-1, keepdim=True)", "{0} * {0}.mean(1, keepdim=True).sigmoid()",
)  # fmt: skip


def adding(w: Writer) -> None:
    first = w.pick()
    if w.chance(25):
        w.say(w.one(*ALONE), first)
        return
    second = w.pick(lambda v: v.shape == w.values[first].shape)
    if w.chance(15):
        name = w.fresh()
        w.write(f"{name} = {first}; {name} += {second}", [first, second], [name])
    else:
        w.say(w.one(*SUMS), first, second)


SIZES = (
    "F.interpolate({0}, scale_factor=2)", "F.interpolate({0}, scale_factor=2, mode='bilinear')",
    "F.interpolate({0}, {0}.shape[2])", "F.interpolate({0}, scale_factor=1.5, mode='linear')",
    "F.interpolate({0}, scale_factor=2, mode='bicubic')", "F.pad({0}, (1, 1))",
    "F.pad({0}, (1, 0), value=0.5)", "F.pad({0}, (1, 1), mode='reflect')",
    "F.pad({0}, (0, 2, 1, 0), mode='replicate')", "F.pad({0}, (0, 0, 0, 0, 1, 1))",
    "F.pad({0}, (0, -1))",
)  # fmt: skip
RESIZERS: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Upsample(scale_factor=2), lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    lambda: nn.ZeroPad2d((1, 0, 2, 0)), lambda: nn.ReflectionPad2d(1),
    lambda: nn.ConstantPad2d(1, 0.5), lambda: nn.ReplicationPad1d(1), lambda: nn.ZeroPad1d(1),
)  # fmt: skip


def resizing(w: Writer) -> None:
    value = w.pick(lambda v: v.dim() > 2)
    if w.chance(50):
        w.say(w.one(*SIZES), value)
    else:
        w.call("resize", w.one(*RESIZERS)(), value)


REDUCTIONS = (
    "{0}.mean((2, 3))", "{0}.mean((2, 3), keepdim=True)", "{0}.mean(-1)", "torch.mean({0}, 2)",
    "{0}.mean([-1, -2])", "{0}.mean(1)", "{0}.mean(1, keepdim=True)", "{0}.sum(2)", "{0}.amax(2)",
    "torch.amax({0}, (2, 3))", "{0}.amin(2)", "{0}.max(2).values", "{0}.flatten(2).mean(2)",
)  # fmt: skip


def reducing(w: Writer) -> None:
    w.say(w.one(*REDUCTIONS), w.pick(lambda v: v.dim() > 2))


def again(w: Writer) -> None:
    """A module once more, on the same value or on another of the same shape."""
    if not w.calls:
        raise LookupError
    name, shape = w.one(*w.calls)
    w.say(f"self.{name}({{0}})", w.pick(lambda v: tuple(v.shape) == shape))


def block(w: Writer) -> None:
    """What most networks are made of: layer, norm, activation."""
    with w.reading(w.pick()):
        first, *rest = w.one((conv, norm), (conv, norm, activation), (norm, activation, conv))
        first(w)
    with w.reading():
        for part in rest:
            part(w)


def passage(w: Writer) -> None:
    """A norm and a layer with something between, which nothing else reads."""
    between = [w.one(passing, pooling, moving, resizing, activation) for _ in range(w.one(1, 1, 2))]
    layer = w.one(conv, conv, linear)
    first, last = w.one((norm, layer), (layer, norm))
    with w.reading(w.pick()):
        first(w)
    with w.reading():
        for part in (*between, last):
            part(w)


def fork(w: Writer) -> None:
    """A norm that several layers read."""
    norm(w)
    with w.reading(w.latest):
        for part in w.one((conv, conv), (conv, linear), (conv, passing, conv), (linear, linear)):
            part(w)


def branches(w: Writer) -> None:
    """Two layers of one kind, a sum or a concatenation, and a norm."""
    with w.reading(w.pick()):
        value, calls = str(w.wanted), len(w.calls)
        w.one(conv, conv, linear)(w)
        if len(w.calls) == calls:
            raise LookupError  # it was a function
        first, module = w.latest, getattr(w.holder, w.calls[-1][0])
        w.call("twin", lively(w, copy.deepcopy(module)), value)
    w.say(w.one("torch.cat(({0}, {1}), 1)", "{0} + {1}", "{1} + {0}"), first, w.latest)
    with w.reading():
        norm(w)


OVER = (
    "{0}.relu_()", "{0}.mul_(2)", "F.leaky_relu({0}, 0.2, inplace=True)", "{0}.flatten(1).relu_()",
    "{0}.add_(1)", "{0}.transpose(1, -1).mul_(0.5)",
)  # fmt: skip


def overwriting(w: Writer) -> None:
    """A norm's input or output is written over, perhaps through a view, and read again."""
    before = w.pick()
    with w.reading(before):
        norm(w)
    after = w.latest
    written = w.one(before, after)
    w.say(w.one(*OVER), written)
    with w.reading(w.one(before, after, w.latest)):
        w.one(conv, conv, linear, activation)(w)


KINDS: dict[str, Callable[[Writer], None]] = {
    "conv": conv, "functional conv": functional_conv, "linear": linear, "norm": norm,
    "activation": activation, "passing": passing, "pooling": pooling, "moving": moving,
    "cutting": cutting, "joining": joining, "adding": adding, "resizing": resizing,
    "reducing": reducing, "again": again, "block": block, "passage": passage, "fork": fork,
    "branches": branches, "overwriting": overwriting,
}  # fmt: skip
