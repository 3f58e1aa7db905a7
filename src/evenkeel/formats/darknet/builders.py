"""What each kind of section is: a module, the shape of what it gives, the layers it takes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from torch import nn

from . import modules as own
from .places import Place, Shape

__all__ = ["BUILDERS", "Built"]

Built = tuple[nn.Module, Shape] | tuple[nn.Module, Shape, tuple[int, ...]]


def _chain(**parts: nn.Module) -> nn.Module:
    """The parts behind each other, without those that do nothing."""
    kept = {k: m for k, m in parts.items() if not isinstance(m, nn.Identity)}
    return nn.Sequential(OrderedDict(kept)) if kept else nn.Identity()


def _as_image(given: Shape) -> nn.Module:
    return nn.Unflatten(1, (given.c, 1, 1)) if given.flat else nn.Identity()


def _convolutional(place: Place) -> Built:
    section, given = place.section, place.image()
    filters, size = section.at_least("filters", 1, 1), section.at_least("size", 1, 1)
    stride, groups = section.at_least("stride", 1, 1), section.at_least("groups", 1, 1)
    steps = [section.at_least(key, stride, 1) for key in ("stride_y", "stride_x")]
    padding = size // 2 if section.integer("pad", 0) else section.at_least("padding", 0, 0)
    dilation = section.at_least("dilation", 1, 1) if size > 1 else 1
    if dilation > 1 and 2 * padding != size - 1:
        raise section.error("a dilated convolution must be padded by half of its size")
    if size == 1 and max(steps) > 1 and place.convention.name == "darknet-cpu":
        raise section.error(
            f"pjreddie's program takes the first places of each channel for size=1 with stride="
            f"{stride}, which is a mistake of its own; other builds skip places"
        )
    for what, count in (("input", given.c), ("output", filters)):
        if count % groups:
            raise section.error(f"groups={groups} do not divide {count} {what} channels")
    normalized = section.integer("batch_normalize", 0) or section.integer("cbn", 0)
    conv = nn.Conv2d(
        given.c, filters, size, (steps[0], steps[1]), padding * dilation, dilation, groups,
        bias=not normalized,
    )  # fmt: skip
    norm = place.norm(filters, False) if normalized else nn.Identity()
    h, w = (
        (length + 2 * padding - size) // step + 1
        for length, step in zip((given.h, given.w), steps, strict=True)
    )
    module = _chain(
        image=_as_image(given), conv=conv, norm=norm, activation=place.activation("logistic")
    )
    return module, Shape(filters, h, w)


def _connected(place: Place) -> Built:
    given, outputs = place.image(), place.section.at_least("output", 1, 1)
    normalized = place.section.integer("batch_normalize", 0)
    keeps = 0.05 if place.convention.name == "alexeyab-cpu" else None
    module = _chain(
        flatten=nn.Identity() if given.flat else nn.Flatten(),
        linear=nn.Linear(given.values, outputs, bias=not normalized),
        norm=place.norm(outputs, True, keeps) if normalized else nn.Identity(),
        activation=place.activation("logistic"),
    )
    return module, Shape(outputs, 1, 1, flat=True)


def _batchnorm(place: Place) -> Built:
    given = place.image()
    return place.norm(given.c, given.flat), given


def _maxpool(place: Place) -> Built:
    section, given = place.section, place.image()
    stride = section.at_least("stride", 1, 1)
    size = section.at_least("size", stride, 1)
    padding = section.at_least("padding", size - 1, 0)
    before = padding // 2
    h, w = ((length + padding - size) // stride + 1 for length in (given.h, given.w))
    shape = Shape(given.c, h, w)
    if padding == 2 * before and before <= size // 2:
        return _chain(image=_as_image(given), pool=nn.MaxPool2d(size, stride, before)), shape
    if (size, stride, padding) == (2, 2, 1):
        pool = nn.MaxPool2d(2, 2, ceil_mode=True)
        return _chain(image=_as_image(given), pool=pool), shape
    sides = (before, padding - before)
    return (
        _chain(
            image=_as_image(given),
            pad=nn.ConstantPad2d(sides * 2, float("-inf")),
            pool=nn.MaxPool2d(size, stride),
        ),
        shape,
    )


def _avgpool(place: Place) -> Built:
    given = place.image()
    return _chain(image=_as_image(given), pool=nn.AdaptiveAvgPool2d(1)), Shape(given.c, 1, 1)


def _shortcut(place: Place) -> Built:
    section, given = place.section, place.image()
    sources = tuple(place.source(number) for number in section.integers("from"))
    if not sources:
        raise section.error("it must say from=")
    alpha, beta = section.number("alpha", 1), section.number("beta", 1)
    if place.is_alexeyabs and (alpha, beta) != (1, 1):
        raise section.error("AlexeyAB's program does not know alpha and beta; leave them out")
    channels, stride, spread = None, 1, 1
    for other in (place.shapes[number] for number in sources):
        if (other.c, other.h, other.w) == (given.c, given.h, given.w):
            continue
        stride, spread = max(other.h // given.h, 1), max(given.h // other.h, 1)
        fits = all(a * spread == b * stride for a, b in ((other.h, given.h), (other.w, given.w)))
        if not fits or len(sources) > 1 or alpha != 1:
            raise section.error(f"{other} cannot be added to {given}")
        if place.is_alexeyabs and (other.h, other.w) != (given.h, given.w):
            raise section.error(
                f"AlexeyAB's program adds {other} to {given} by its place in memory, which is not "
                "supported; pjreddie's adds every few places"
            )
        if other.c != given.c:
            channels = min(other.c, given.c)
    module = _formed(place, own.Add(alpha, beta, channels, stride, spread), given, sources, True)
    return _with_activation(place, module), given, sources


def _scaled(place: Place) -> Built:
    section, given = place.section, place.image()
    sources = tuple(place.source(number) for number in section.integers("from"))
    if len(sources) != 1:
        raise section.error("it must say from= with one layer")
    other = place.shapes[sources[0]]
    wanted = (1, 1) if section.name == "scale_channels" else (other.h, other.w)
    if other.c != given.c or (given.h, given.w) != wanted:
        raise section.error(f"{given} cannot scale {other}")
    module = _formed(place, own.Multiply(), other, sources, True)
    return _with_activation(place, module), other, sources


def _formed(
    place: Place, module: nn.Module, like: Shape, sources: tuple[int, ...], and_given: bool
) -> nn.Module:
    """A module of several inputs, which may be flat or images of one place, like the result."""
    values = [place.given] * and_given + [place.shapes[number] for number in sources]
    which = [value.flat != like.flat for value in values]
    return own.Formed(module, like.flat, which) if any(which) else module


def _with_activation(place: Place, module: nn.Module) -> nn.Module:
    activation = place.activation("linear")
    return module if isinstance(activation, nn.Identity) else own.Behind(module, activation)


def _route(place: Place) -> Built:
    section = place.section
    sources = tuple(place.source(number) for number in section.integers("layers"))
    if not sources:
        raise section.error("it must say layers=")
    shapes = [place.shapes[number] for number in sources]
    first = shapes[0]
    if any((s.h, s.w) != (first.h, first.w) for s in shapes):
        raise section.error(f"layers of {', '.join(map(str, shapes))} do not fit together")
    groups, group = section.at_least("groups", 1, 1), section.at_least("group_id", 0, 0)
    if group >= groups or any(s.c % groups for s in shapes):
        raise section.error(f"group {group} of {groups} cannot be had of {first}")
    channels = sum(s.c // groups for s in shapes)
    shape = Shape(channels, first.h, first.w, first.flat)
    return _formed(place, own.Route(groups, group), first, sources, False), shape, sources


def _upsample(place: Place) -> Built:
    section, given = place.section, place.image()
    stride, scale = section.integer("stride", 2), section.number("scale", 1)
    times = own.Times(scale) if scale != 1 else nn.Identity()
    if stride < 0:
        mean = nn.AvgPool2d(-stride, divisor_override=1)
        return _chain(down=mean, scale=times), Shape(
            given.c, given.h // -stride, given.w // -stride
        )
    if stride == 0:
        raise section.error("stride=0 makes no image")
    up = nn.Upsample(scale_factor=stride, mode="nearest")
    return _chain(up=up, scale=times), Shape(given.c, given.h * stride, given.w * stride)


def _reorg(place: Place) -> Built:
    section, given = place.section, place.image()
    s, reverse = section.at_least("stride", 1, 1), bool(section.integer("reverse", 0))
    if given.c % (s * s) or (not reverse and (given.h % s or given.w % s)):
        raise section.error(f"stride={s} does not fit {given}")
    shape = (
        Shape(given.c // (s * s), given.h * s, given.w * s)
        if reverse
        else Shape(given.c * s * s, given.h // s, given.w // s)
    )
    return own.Reorg(s, reverse), shape


def _dropout(place: Place) -> Built:
    chance = place.section.number("probability", 0.5)
    if not 0 <= chance <= 1:
        raise place.section.error(f"probability={chance} is not between 0 and 1")
    return nn.Dropout(chance), place.given


def _crop(place: Place) -> Built:
    section, given = place.section, place.image()
    height, width = section.at_least("crop_height", 1, 1), section.at_least("crop_width", 1, 1)
    if height > given.h or width > given.w:
        raise section.error(f"{height}x{width} cannot be cropped from {given}")
    return own.Crop(height, width, not section.integer("noadjust", 0)), Shape(
        given.c, height, width
    )


def _softmax(place: Place) -> Built:
    section, given = place.section, place.image()
    groups, spatial = section.at_least("groups", 1, 1), bool(section.integer("spatial", 0))
    temperature = section.number("temperature", 1)
    if given.values % groups or temperature <= 0:
        raise section.error(f"{groups} groups at temperature {temperature} do not fit {given}")
    if spatial and (temperature != 1 or place.convention.name.endswith("-cpu")):
        raise section.error("spatial=1 is for a GPU, without a temperature; others do not heed it")
    flat = Shape(given.values, 1, 1, flat=True)
    return own.Softmax(groups, temperature, spatial and not given.flat), flat


def _yolo(place: Place) -> Built:
    section, given = place.section, place.image()
    count = len(section.integers("mask")) or section.at_least("num", 1, 1)
    classes = section.at_least("classes", 20, 1)
    _fill(place, count * (5 + classes))
    scale, raw = section.number("scale_x_y", 1), bool(section.integer("new_coords", 0))
    return own.Yolo(count, classes, scale, raw), given


def _region(place: Place) -> Built:
    section, given = place.section, place.image()
    count, classes = section.at_least("num", 1, 1), section.at_least("classes", 20, 1)
    coords = section.at_least("coords", 4, 2)
    _fill(place, count * (coords + 1 + classes))
    return own.Region(count, coords, classes, bool(section.integer("softmax", 0))), given


def _fill(place: Place, wanted: int) -> None:
    if place.given.c != wanted:
        raise place.section.error(
            f"it takes {wanted} channels but is given {place.given.c}; the filters before it, its "
            "classes and its anchors do not fit together"
        )


BUILDERS: Final[dict[str, Callable[[Place], Built]]] = {
    "activation": lambda place: (place.activation("linear"), place.given),
    "avgpool": _avgpool,
    "batchnorm": _batchnorm,
    "connected": _connected,
    "convolutional": _convolutional,
    "cost": lambda place: (nn.Identity(), place.given),
    "crop": _crop,
    "dropout": _dropout,
    "maxpool": _maxpool,
    "region": _region,
    "reorg": _reorg,
    "route": _route,
    "sam": _scaled,
    "scale_channels": _scaled,
    "shortcut": _shortcut,
    "softmax": _softmax,
    "upsample": _upsample,
    "yolo": _yolo,
}
