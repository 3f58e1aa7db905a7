"""Darknet in NumPy, place by place: what a .cfg and a .weights file compute, one image at a time.

It shares nothing with evenkeel: it reads the text and the bytes by itself, in float64, and loops
over places as Darknet's C does (src/parser.c, src/blas.c and the layers' files).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import numpy as np

Array = np.ndarray
Options = dict[str, str]

ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "elu": lambda x: x if x >= 0 else math.exp(x) - 1,
    "hardtan": lambda x: -1.0 if x < -1 else 1.0 if x > 1 else x,
    "leaky": lambda x: x if x > 0 else 0.1 * x,
    "lhtan": lambda x: 0.001 * x if x < 0 else 0.001 * (x - 1) + 1 if x > 1 else x,
    "linear": lambda x: x,
    "loggy": lambda x: 2 / (1 + math.exp(-x)) - 1,
    "logistic": lambda x: 1 / (1 + math.exp(-x)),
    "mish": lambda x: x * math.tanh(math.log(1 + math.exp(x))),
    "plse": lambda x: 0.01 * (x + 4) if x < -4 else 0.01 * (x - 4) + 1 if x > 4 else x / 8 + 0.5,
    "ramp": lambda x: x * (x > 0) + 0.1 * x,
    "relie": lambda x: x if x > 0 else 0.01 * x,
    "relu": lambda x: x * (x > 0),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "selu": lambda x: 1.0507 * x if x >= 0 else 1.0507 * 1.6732 * (math.exp(x) - 1),
    "stair": lambda x: math.floor(x / 2) + (math.floor(x) % 2) * (x - math.floor(x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
}


class Numbers:
    """The numbers of a .weights file, taken one after the other."""

    def __init__(self, data: bytes) -> None:
        major, minor, self.revision = struct.unpack_from("<iii", data)
        self.transposed = major > 1000 or minor > 1000
        start = 20 if major * 10 + minor >= 2 and not self.transposed else 16
        self.values = np.frombuffer(data, "<f4", offset=start).astype(np.float64)
        self.at = 0

    def take(self, *shape: int) -> Array:
        count = math.prod(shape)
        assert self.at + count <= len(self.values), "the file is too short"
        self.at += count
        return self.values[self.at - count : self.at].reshape(shape)


def run(cfg: str, data: bytes, image: Array, *, outside: bool) -> list[Array]:
    """What every layer gives for an image of shape (c, h, w).

    Args:
        outside: epsilon 1e-6 behind the root, as pjreddie's program has it on a CPU.
    """
    numbers = Numbers(data)
    x, outputs = image.astype(np.float64), []
    for name, options in sections(cfg)[1:]:
        x = LAYERS[name](x, options, numbers, outputs, outside)
        outputs.append(x)
    assert numbers.at == len(numbers.values), "the file is too long"
    return outputs


def sections(cfg: str) -> list[tuple[str, Options]]:
    found: list[tuple[str, Options]] = []
    for line in cfg.splitlines():
        line = line.replace(" ", "")
        if line.startswith("["):
            found.append((line[1:-1], {}))
        elif line and line[0] not in "#;":
            key, value = line.split("=", 1)
            found[-1][1].setdefault(key, value)
    return found


def number(options: Options, key: str, default: float) -> float:
    return float(options.get(key, default))


def whole(options: Options, key: str, default: int) -> int:
    return int(options.get(key, default))


def activated(x: Array, options: Options, default: str) -> Array:
    function = ACTIVATIONS[options.get("activation", default)]
    return np.array([function(float(value)) for value in x.ravel()]).reshape(x.shape)


def normalized(x: Array, vectors: list[Array], outside: bool) -> Array:
    beta, gamma, mean, var = (v[:, None, None] for v in vectors)
    root = np.sqrt(var) + 1e-6 if outside else np.sqrt(var + 1e-5)
    return (x - mean) / root * gamma + beta


def convolutional(x, options, numbers, outputs, outside):
    n, size = whole(options, "filters", 1), whole(options, "size", 1)
    stride, groups = whole(options, "stride", 1), whole(options, "groups", 1)
    pad = size // 2 if whole(options, "pad", 0) else whole(options, "padding", 0)
    c, h, w = x.shape
    vectors = [numbers.take(n)]
    if whole(options, "batch_normalize", 0):
        vectors += [numbers.take(n) for _ in range(3)]
    if whole(options, "flipped", 0):
        kernel = numbers.take(c // groups * size * size, n).T.reshape(n, c // groups, size, size)
    else:
        kernel = numbers.take(n, c // groups, size, size)
    high, wide = (h + 2 * pad - size) // stride + 1, (w + 2 * pad - size) // stride + 1
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    y = np.zeros((n, high, wide))
    for k in range(n):
        channels = slice(k // (n // groups) * (c // groups), None)
        for i in range(high):
            for j in range(wide):
                top, left = i * stride, j * stride
                part = padded[channels, top : top + size, left : left + size][: c // groups]
                y[k, i, j] = (part * kernel[k]).sum()
    y = normalized(y, vectors, outside) if len(vectors) > 1 else y + vectors[0][:, None, None]
    return activated(y, options, "logistic")


def connected(x, options, numbers, outputs, outside):
    n = whole(options, "output", 1)
    bias = numbers.take(n)
    kernel = numbers.take(x.size, n).T if numbers.transposed else numbers.take(n, x.size)
    y = (kernel @ x.ravel())[:, None, None]
    if whole(options, "batch_normalize", 0):
        y = normalized(y, [bias, *(numbers.take(n) for _ in range(3))], outside)
    else:
        y = y + bias[:, None, None]
    return activated(y, options, "logistic")


def batchnorm(x, options, numbers, outputs, outside):
    c = len(x)
    beta = numbers.take(c) if numbers.revision >= 5 else np.zeros(c)
    return normalized(x, [beta, *(numbers.take(c) for _ in range(3))], outside)


def maxpool(x, options, numbers, outputs, outside):
    stride = whole(options, "stride", 1)
    size = whole(options, "size", stride)
    padding = whole(options, "padding", size - 1)
    c, h, w = x.shape
    high, wide = (h + padding - size) // stride + 1, (w + padding - size) // stride + 1
    y = np.full((c, high, wide), -np.inf)
    for i in range(high):
        for j in range(wide):
            for a in range(size):
                for b in range(size):
                    row, column = i * stride + a - padding // 2, j * stride + b - padding // 2
                    if 0 <= row < h and 0 <= column < w:
                        y[:, i, j] = np.maximum(y[:, i, j], x[:, row, column])
    return y


def avgpool(x, options, numbers, outputs, outside):
    return x.mean((1, 2), keepdims=True)


def shortcut(x, options, numbers, outputs, outside):
    alpha, beta = number(options, "alpha", 1), number(options, "beta", 1)
    y = x.copy()
    for text in options["from"].split(","):
        other = outputs[int(text) if int(text) >= 0 else len(outputs) + int(text)]
        stride = max(other.shape[2] // x.shape[2], 1)
        sample = max(x.shape[2] // other.shape[2], 1)
        for k in range(min(len(x), len(other))):
            for i in range(min(x.shape[1], other.shape[1])):
                for j in range(min(x.shape[2], other.shape[2])):
                    place = k, i * sample, j * sample
                    y[place] = alpha * y[place] + beta * other[k, i * stride, j * stride]
    return activated(y, options, "linear")


def route(x, options, numbers, outputs, outside):
    groups, group = whole(options, "groups", 1), whole(options, "group_id", 0)
    parts = []
    for text in options["layers"].split(","):
        other = outputs[int(text) if int(text) >= 0 else len(outputs) + int(text)]
        each = len(other) // groups
        parts.append(other[group * each : (group + 1) * each])
    return np.concatenate(parts)


def scale_channels(x, options, numbers, outputs, outside):
    source = int(options["from"])
    return activated(
        x * outputs[source if source >= 0 else len(outputs) + source], options, "linear"
    )


def upsample(x, options, numbers, outputs, outside):
    stride, scale = whole(options, "stride", 2), number(options, "scale", 1)
    c, h, w = x.shape
    if stride < 0:
        y = np.zeros((c, h // -stride, w // -stride))
        for i in range(h):
            for j in range(w):
                y[:, i // -stride, j // -stride] += scale * x[:, i, j]
        return y
    y = np.zeros((c, h * stride, w * stride))
    for i in range(h * stride):
        for j in range(w * stride):
            y[:, i, j] = scale * x[:, i // stride, j // stride]
    return y


def reorg(x, options, numbers, outputs, outside):
    """Reads x as if its rows were stride times longer, in channels stride^2 times fewer."""
    s, (c, h, w) = whole(options, "stride", 1), x.shape
    flat, y = x.ravel(), np.zeros(x.size)
    few = c // (s * s)
    for k in range(c):
        for j in range(h):
            for i in range(w):
                near = i + w * (j + h * k)
                column, row = i * s + k // few % s, j * s + k // few // s
                far = column + w * s * (row + h * s * (k % few))
                if whole(options, "reverse", 0):
                    y[far] = flat[near]
                else:
                    y[near] = flat[far]
    if whole(options, "reverse", 0):
        return y.reshape(few, h * s, w * s)
    return y.reshape(c * s * s, h // s, w // s)


def crop(x, options, numbers, outputs, outside):
    height, width = whole(options, "crop_height", 1), whole(options, "crop_width", 1)
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    y = x[:, top : top + height, left : left + width]
    return y if whole(options, "noadjust", 0) else 2 * y - 1


def softmax(x, options, numbers, outputs, outside):
    groups, temperature = whole(options, "groups", 1), number(options, "temperature", 1)
    if whole(options, "spatial", 0):
        e = np.exp(x / temperature)
        return (e / e.sum(0)).reshape(-1, 1, 1)
    e = np.exp(x.reshape(groups, -1) / temperature)
    return (e / e.sum(1, keepdims=True)).reshape(-1, 1, 1)


def yolo(x, options, numbers, outputs, outside):
    classes, scale = whole(options, "classes", 20), number(options, "scale_x_y", 1)
    raw, y = whole(options, "new_coords", 0), x.copy()
    for k in range(len(x)):
        entry = k % (5 + classes)
        if entry not in (2, 3) and not raw:
            y[k] = 1 / (1 + np.exp(-x[k]))
        if entry < 2:
            y[k] = scale * y[k] - 0.5 * (scale - 1)
    return y


def region(x, options, numbers, outputs, outside):
    classes, coords = whole(options, "classes", 20), whole(options, "coords", 4)
    y = x.copy()
    for k in range(len(x)):
        entry = k % (coords + 1 + classes)
        soft = whole(options, "softmax", 0)
        if entry < 2 or entry == coords or (entry > coords and not soft):
            y[k] = 1 / (1 + np.exp(-x[k]))
        elif entry > coords:
            start = k - entry + coords + 1
            e = np.exp(x[start : start + classes])
            y[k] = np.exp(x[k]) / e.sum(0)
    return y


def same(x, options, numbers, outputs, outside):
    return x


LAYERS = {
    "activation": lambda x, options, *_: activated(x, options, "linear"),
    "avgpool": avgpool, "batchnorm": batchnorm, "connected": connected,
    "convolutional": convolutional, "cost": same, "crop": crop, "dropout": same,
    "maxpool": maxpool, "region": region, "reorg": reorg, "route": route,
    "sam": scale_channels, "scale_channels": scale_channels, "shortcut": shortcut,
    "softmax": softmax, "upsample": upsample, "yolo": yolo,
}  # fmt: skip
