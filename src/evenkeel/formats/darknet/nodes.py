"""What each operation of a network is to Darknet: a section, or why there is none."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx, nn
from torch.nn import functional as F

from .writer import Layer, Norm, Writer

__all__ = ["FUNCTIONS", "MODULES"]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _square(writer: Writer, node: fx.Node, **sizes: Any) -> dict[str, int]:
    """Sizes that must be the same for height and width."""
    for name, value in sizes.items():
        if isinstance(value, str) or _pair(value)[0] != _pair(value)[1]:
            raise writer.refusal(node, f"{name}={value}, and Darknet has one for both axes")
    return {name: _pair(value)[0] for name, value in sizes.items()}


def _convolution(writer: Writer, node: fx.Node, conv: nn.Conv2d) -> None:
    if _pair(conv.dilation) != (1, 1) or conv.padding_mode != "zeros":
        raise writer.refusal(node, "it is dilated, or padded with something else than zeros")
    padding = (0, 0) if conv.padding == "valid" else conv.padding
    if padding == "same":
        padding = tuple((size - 1) // 2 for size in conv.kernel_size)
        if any(size % 2 == 0 for size in conv.kernel_size):
            raise writer.refusal(node, "it is padded more on one side than on the other")
    sizes = _square(writer, node, size=conv.kernel_size, stride=conv.stride, padding=padding)
    before = None
    if sizes["size"] == 1 and sizes["stride"] > 1:
        if sizes["padding"]:
            raise writer.refusal(node, "it is a padded 1x1 convolution with a stride")
        before, sizes = _every(sizes["stride"]), sizes | {"stride": 1}
    options = {"filters": conv.out_channels, **sizes, "groups": conv.groups}
    layer = Layer("convolutional", options, conv.weight, conv.bias)
    writer.add(node, writer.source(node), layer, before)


def _every(stride: int) -> Layer:
    """Every so many places: pjreddie's program does not heed the stride of 1x1 convolutions."""
    return Layer("maxpool", {"size": 1, "stride": stride, "padding": 0})


def _dense(writer: Writer, node: fx.Node, linear: nn.Linear) -> None:
    if len(writer.shape(writer.source(node))) != 2:
        raise writer.refusal(node, "it is applied to more than one axis; flatten before it")
    layer = Layer("connected", {"output": linear.out_features}, linear.weight, linear.bias)
    writer.add(node, writer.source(node), layer)


def _norm(writer: Writer, node: fx.Node, norm: Norm) -> None:
    """A norm that no layer takes: behind a 1x1 convolution of one channel each, of weight 1.

    [batchnorm] would do for AlexeyAB's Darknet alone: pjreddie's does not store its beta.
    """
    writer.check_norm(node, norm)
    source = writer.source(node)
    if len(writer.shape(source)) == 3:
        raise writer.refusal(node, "it normalizes sequences")
    count = norm.num_features
    if count != writer.channels[writer.placed(source)]:
        raise writer.refusal(node, "it has a mean for each value, Darknet one for each channel")
    options = {"filters": count, "size": 1, "stride": 1, "padding": 0, "groups": count}
    layer = Layer("convolutional", {"batch_normalize": 1, **options}, torch.ones(count, 1, 1, 1))
    layer.norm = norm
    writer.goes_behind(source)
    writer.layers.append(layer)
    writer.name(writer.activation_behind(node, layer))


def _maximum(writer: Writer, node: fx.Node, pool: nn.MaxPool2d | None) -> None:
    sizes = _sizes(node, pool, "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    if _pair(sizes["dilation"] or 1) != (1, 1):
        raise writer.refusal(node, "it is dilated")
    source = writer.source(node)
    square = _square(
        writer, node, size=sizes["kernel_size"],
        stride=sizes["stride"] or sizes["kernel_size"], padding=sizes["padding"] or 0,
    )  # fmt: skip
    size, stride, padding = square["size"], square["stride"], square["padding"]
    given, wanted = writer.shape(source)[2:], writer.shape(node)[2:]
    totals = [2 * padding, 2 * padding + 1]  # of both sides; the odd place goes behind
    for total in totals:
        if all((a + total - size) // stride + 1 == b for a, b in zip(given, wanted, strict=True)):
            options = {"size": size, "stride": stride, "padding": total}
            return writer.add(node, source, Layer("maxpool", options))
    raise writer.refusal(node, "Darknet cannot round its size up so")


def _average(writer: Writer, node: fx.Node, pool: nn.AvgPool2d | None) -> None:
    """An average pooling: the global one, or a depthwise convolution with equal weights."""
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    sizes = _sizes(node, pool, *names)
    source = writer.source(node)
    square = _square(
        writer, node, size=sizes["kernel_size"],
        stride=sizes["stride"] or sizes["kernel_size"], padding=sizes["padding"] or 0,
    )  # fmt: skip
    if square["padding"] and sizes["count_include_pad"] is False:
        raise writer.refusal(node, "it leaves its padding out of the average")
    if sizes["ceil_mode"] or getattr(pool, "divisor_override", None):
        raise writer.refusal(node, "it rounds its size up, or divides by another number")
    count, size = writer.shape(source)[1], square["size"]
    weight = torch.full((count, 1, size, size), 1 / size**2)
    layer = Layer("convolutional", {"filters": count, **square, "groups": count}, weight)
    if size == 1 and not square["padding"]:
        layer = _every(square["stride"])
    writer.add(node, source, layer)


def _sizes(node: fx.Node, module: nn.Module | None, *names: str) -> dict[str, Any]:
    """A pooling's sizes: its attributes, or the arguments of the function."""
    if module is not None:
        return {name: getattr(module, name, None) for name in names}
    given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    return {name: given.get(name) for name in names}


def _global_average(writer: Writer, node: fx.Node, _: Any) -> None:
    if writer.shape(node) == writer.shape(writer.source(node)):
        return _same(writer, node, None)
    if (
        len(writer.shape(node)) < 2
        or writer.shape(node)[2:] not in ((1, 1), ())
        or len(writer.shape(writer.source(node))) != 4
    ):
        raise writer.refusal(node, "Darknet's [avgpool] averages whole images")
    if writer.shape(node)[1] != writer.shape(writer.source(node))[1]:
        raise writer.refusal(node, "it averages over channels")
    return writer.add(node, writer.source(node), Layer("avgpool", {}))


def _same(writer: Writer, node: fx.Node, _: Any) -> None:
    """What does nothing at inference, or only puts the values of an image in one row."""
    source = writer.source(node)
    before, after = writer.shape(source), writer.shape(node)
    if before != after and after != (before[0], math.prod(before[1:])):
        raise writer.refusal(node, f"it makes {after} of {before}, which is no flattening")
    writer.place[node] = writer.placed(source)


def _dropout(writer: Writer, node: fx.Node, module: nn.Dropout | None) -> None:
    if writer.placed(writer.source(node)) < 0:  # a first [dropout] reads before the first layer
        return _same(writer, node, None)
    chance = _sizes(node, module, "p")["p"]
    options = {"probability": 0.5 if chance is None else chance}
    return writer.add(node, writer.source(node), Layer("dropout", options))


def _sum(writer: Writer, node: fx.Node, _: Any) -> None:
    if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        raise writer.refusal(node, "it is not a plain sum of two values")
    one, other = (writer.placed(value) for value in node.args)
    if writer.shape(node.args[0]) != writer.shape(node.args[1]):  # type: ignore[arg-type]
        raise writer.refusal(node, "its values are of different shapes")
    if one < other:
        node_of_last, source = node.args[1], one
    else:
        node_of_last, source = node.args[0], other
    if source < 0:
        raise writer.refusal(node, "Darknet's layers cannot reach back to the image")
    writer.add(node, node_of_last, Layer("shortcut", {"from": source}))  # type: ignore[arg-type]


def _concatenation(writer: Writer, node: fx.Node, _: Any) -> None:
    values = node.args[0] if node.args else node.kwargs["tensors"]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    rank = len(writer.shape(node))
    if dim not in (1, 1 - rank) or not isinstance(values, list | tuple):
        raise writer.refusal(node, "Darknet's [route] joins channels")
    places = [writer.placed(value) for value in values]
    if min(places) < 0:
        raise writer.refusal(node, "Darknet's layers cannot reach back to the image")
    writer.layers.append(Layer("route", {"layers": ",".join(map(str, places))}))
    writer.name(node)


def _probabilities(writer: Writer, node: fx.Node, module: nn.Softmax | None) -> None:
    dim = module.dim if module is not None else node.kwargs.get("dim", (*node.args, None, None)[1])
    if len(writer.shape(node)) != 2 or dim not in (1, -1):
        raise writer.refusal(node, "Darknet's [softmax] is over all values of an image")
    writer.add(node, writer.source(node), Layer("softmax", {"groups": 1}))


def _larger(writer: Writer, node: fx.Node, module: nn.Upsample | None) -> None:
    given, made = writer.shape(writer.source(node))[2:], writer.shape(node)[2:]
    stride = made[0] // given[0]
    mode = node.kwargs.get("mode", "nearest") if module is None else module.mode
    if mode != "nearest" or made != (given[0] * stride, given[1] * stride):
        raise writer.refusal(node, "Darknet's [upsample] repeats places a whole number of times")
    writer.add(node, writer.source(node), Layer("upsample", {"stride": stride}))


MODULES: Final[dict[type[nn.Module], Callable[[Writer, fx.Node, Any], None]]] = {
    nn.Conv2d: _convolution, nn.Linear: _dense, nn.BatchNorm1d: _norm, nn.BatchNorm2d: _norm,
    nn.MaxPool2d: _maximum, nn.AvgPool2d: _average, nn.AdaptiveAvgPool2d: _global_average,
    nn.Flatten: _same, nn.Identity: _same, nn.Dropout: _dropout, nn.Dropout2d: _dropout,
    nn.Unflatten: _same, nn.Softmax: _probabilities, nn.Upsample: _larger,
}  # fmt: skip
FUNCTIONS: Final[dict[Any, Callable[[Writer, fx.Node, Any], None]]] = {
    F.max_pool2d: _maximum, torch.max_pool2d: _maximum, F.avg_pool2d: _average,
    F.adaptive_avg_pool2d: _global_average, torch.mean: _global_average, "mean": _global_average,
    torch.flatten: _same, "flatten": _same, "view": _same, "reshape": _same, torch.reshape: _same,
    F.dropout: _dropout, "contiguous": _same, "squeeze": _same, torch.squeeze: _same,
    operator.add: _sum, operator.iadd: _sum, torch.add: _sum, "add": _sum, "add_": _sum,
    torch.cat: _concatenation, torch.concat: _concatenation, torch.softmax: _probabilities,
    F.softmax: _probabilities, F.interpolate: _larger, "softmax": _probabilities,
}  # fmt: skip
