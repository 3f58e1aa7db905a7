"""What each class of Keras's layers is here: a module and the shape of what it gives."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, nn

from ...conventions import momentum_from_decay
from ...nn import Norm
from . import modules as own
from .places import Place, Shape, activation_of, layer_activation, pair
from .windows import WINDOWS, Built, behind, bias_of, chain, set_numbers

__all__ = ["ARITHMETIC", "BUILDERS", "Built"]


def _dense(place: Place) -> Built:
    units, count = int(place.config["units"]), place.shape[-1]
    kernel = place.take("kernel", count, units)
    bias = bias_of(place, units)
    if len(place.shape) == 1:
        linear: nn.Module = nn.Linear(count, units, bias=bias is not None)
        set_numbers(linear, kernel.T, bias)
        return behind(place, linear, (units,))
    if len(place.shape) != 3 or place.first:
        raise place.error(f"on values of {place.shape} it is not supported")
    conv = nn.Conv2d(count, units, 1, bias=bias is not None)
    set_numbers(conv, kernel.T[:, :, None, None], bias)
    return behind(place, conv, (*place.shape[:-1], units))


def _batch_normalization(place: Place) -> Built:
    axis = place.config.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis  # as Keras 2 has it
    if not isinstance(axis, int) or len(place.shape) not in (1, 3):
        raise place.error(f"axis={axis} of values of {place.shape} is not supported")
    if place.flag("renorm", False):
        raise place.error("batch renormalization is not supported")
    dim = place.axis(axis)
    count = place.shape[(axis + len(place.shape) + 1 if axis < 0 else axis) - 1]
    eps = float(place.config.get("epsilon", 1e-3))
    momentum = momentum_from_decay(float(place.config.get("momentum", 0.99)))
    weight = place.take("gamma", count) if place.flag("scale", True) else None
    beta = place.take("beta", count) if place.flag("center", True) else None
    statistics = [place.take(name, count) for name in ("moving_mean", "moving_variance")]
    bias = torch.zeros(count) if beta is None else beta
    norm: Any
    if len(place.shape) == 1:
        norm = nn.BatchNorm1d(count, eps, momentum)
    elif dim == 1:
        norm = nn.BatchNorm2d(count, eps, momentum)
    else:
        owner = "nchw"[dim]
        sizes: dict[str, Any] = {owner: count}
        norm = Norm(f"n c h w -> {owner}", eps=eps, momentum=momentum, **sizes)
    set_numbers(norm, torch.ones(count) if weight is None else weight, bias)
    norm.running_mean.copy_(statistics[0])
    norm.running_var.copy_(statistics[1])
    if not bool((norm.running_var >= 0).all()):
        raise place.error("its moving_variance has values below 0, or that are no numbers")
    return norm, place.shape


def _global(place: Place) -> Built:
    channels, *_ = place.image
    keep = place.flag("keepdims", False)
    module = own.Pool(place.kind.startswith("GlobalMax"), keep)
    return module, place.images(channels, 1, 1) if keep else (channels,)


def _moved(place: Place, shape: Shape, order: list[int] | None = None) -> Built:
    def are_images(values: Shape) -> bool:
        return len(values) == 3 and not place.first

    flat = None if order is not None else shape
    module = own.AsKeras(are_images(place.shape), are_images(shape), flat, order)
    if len(shape) not in (1, 3):
        raise place.error(f"values of {shape} are neither vectors nor images")
    return module, shape


def _flatten(place: Place) -> Built:
    count = prod(place.shape)
    if len(place.shape) == 1:
        return nn.Identity(), place.shape
    if place.first or place.image[1:] == (1, 1):
        # With channels first Keras still counts places before channels.
        order = [2, 3, 1] if place.first and place.image[1:] != (1, 1) else None
        parts = {"order": own.AsKeras(False, False, None, order)} if order else {}
        return chain(**parts, flatten=nn.Flatten()), (count,)
    return _moved(place, (count,))


def _reshape(place: Place) -> Built:
    target = [int(size) for size in place.config["target_shape"]]
    count = prod(place.shape)
    if target.count(-1) == 1:
        target[target.index(-1)] = count // abs(prod(target))
    if prod(target) != count or min(target, default=0) < 1:
        raise place.error(f"{place.shape} cannot become {tuple(target)}")
    return _moved(place, tuple(target))


def _permute(place: Place) -> Built:
    order = [int(axis) for axis in place.config["dims"]]
    if sorted(order) != list(range(1, len(place.shape) + 1)):
        raise place.error(f"dims={order} of {place.shape}")
    return _moved(place, tuple(place.shape[axis - 1] for axis in order), order)


def _sides(place: Place, key: str) -> tuple[int, int, int, int]:
    value = place.config[key]
    value = [value, value] if isinstance(value, int) else value
    rows, columns = ([v, v] if isinstance(v, int) else list(v) for v in value)
    top, bottom, left, right = (int(n) for n in (*rows, *columns))
    if min(top, bottom, left, right) < 0:
        raise place.error(f"{key}={value} is below 0")
    return top, bottom, left, right


def _zero_padding(place: Place) -> Built:
    c, h, w = place.image
    top, bottom, left, right = _sides(place, "padding")
    return nn.ZeroPad2d((left, right, top, bottom)), place.images(
        c, h + top + bottom, w + left + right
    )


def _cropping(place: Place) -> Built:
    c, h, w = place.image
    sides = _sides(place, "cropping")
    return own.Crop(sides), place.images(c, h - sum(sides[:2]), w - sum(sides[2:]))


def _up_sampling(place: Place) -> Built:
    c, h, w = place.image
    a, b = pair(place, "size", 2)
    how = place.config.get("interpolation", "nearest")
    if how not in ("nearest", "bilinear"):
        raise place.error(f"interpolation='{how}' is not supported")
    up = nn.Upsample(scale_factor=(a, b), mode=how)
    return up, place.images(c, h * a, w * b)


def _merge(place: Place) -> Built:
    if place.config.get("number") is not None:
        number, at = place.config["number"]
        return own.WithNumber(place.kind, number, at == 0), place.shape
    if len(place.given) < 2:
        raise place.error("it is given one value")
    if len({len(shape) for shape in place.given}) > 1:
        raise place.error(f"it is given {', '.join(map(str, place.given))}")
    try:
        shape = torch.broadcast_shapes(*place.given)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise place.error(f"it is given {', '.join(map(str, place.given))}") from error
    return own.Merge(place.kind), tuple(shape)


def _concatenate(place: Place) -> Built:
    axis = int(place.config.get("axis", -1))
    dim, at = place.axis(axis), axis if axis < 0 else axis - 1
    others = {(*shape[:at], *shape[at:][1:]) for shape in place.given}
    if dim == 0 or len(others) > 1:
        raise place.error(f"{', '.join(map(str, place.given))} cannot be joined on axis {axis}")
    shape = list(place.shape)
    shape[at] = sum(given[at] for given in place.given)
    return own.Concatenate(dim), tuple(shape)


def _rescaling(place: Place) -> Built:
    scale, offset = place.config["scale"], place.config.get("offset", 0.0)
    if place.first and isinstance(offset, list) and len(place.shape) == 3:
        raise place.error("an offset for each channel is not supported with channels first")
    numbers = [_per_channel(place, torch.tensor(v, dtype=torch.float32)) for v in (scale, offset)]
    return own.Affine(*numbers), place.shape


def _normalization(place: Place) -> Built:
    """Keras's Normalization: of the data, with fixed numbers."""
    axis = place.config.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    if place.flag("invert", False):
        raise place.error("invert=True is not supported")
    if axis is not None and (not isinstance(axis, int) or place.axis(axis) != 1):
        raise place.error(f"axis={axis} is not the channels', which is not supported")
    if place.config.get("mean") is not None:
        mean, variance = (torch.tensor(place.config[k]).float() for k in ("mean", "variance"))
    else:
        count = () if axis is None else (_channels(place),)
        mean, variance = place.take("mean", *count), place.take("variance", *count)
        place.arrays.clear()  # how many values were seen
    scale = 1 / variance.sqrt().clamp(min=1e-7)
    return own.Affine(_per_channel(place, scale), _per_channel(place, -mean * scale)), place.shape


def _channels(place: Place) -> int:
    return place.shape[0 if place.first and len(place.shape) == 3 else -1]


def _per_channel(place: Place, values: Tensor) -> Tensor:
    """A number for all, or one for each channel, beside images or vectors."""
    if values.numel() == 1:
        return values.reshape(())
    if values.squeeze().shape != (_channels(place),) or values.shape[-1] != _channels(place):
        raise place.error(f"its numbers of {tuple(values.shape)} are not one for each channel")
    values = values.flatten()
    return values[:, None, None] if len(place.shape) == 3 else values


def _dropout(place: Place) -> Built:
    rate = float(place.config["rate"])
    noise = place.config.get("noise_shape")
    if noise is not None:
        if len(noise) != len(place.shape) + 1 or not {*noise[1:]} <= {1, None, *place.shape}:
            raise place.error(f"noise_shape={noise} does not fit {place.shape}")
        shared = {place.axis(at) for at, size in enumerate(noise) if size == 1}
        return own.SharedDropout(rate, shared), place.shape
    kind = nn.Dropout2d if place.kind == "SpatialDropout2D" else nn.Dropout
    return kind(rate), place.shape


def _activation(place: Place) -> Built:
    return activation_of(place, place.config["activation"]), place.shape


def _activation_layer(place: Place) -> Built:
    return layer_activation(place, place.kind, place.config), place.shape


def _same(place: Place) -> Built:
    return nn.Identity(), place.shape


ARITHMETIC: Final = ("Add", "Multiply", "Subtract", "Maximum", "Minimum")
"""What may be called with a number: ``x + 3`` is an Add to Keras."""

BUILDERS: Final[dict[str, Callable[[Place], Built]]] = WINDOWS | {
    "Activation": _activation, "ActivityRegularization": _same, "Add": _merge, "Average": _merge,
    "BatchNormalization": _batch_normalization, "Concatenate": _concatenate,
    "Cropping2D": _cropping, "Dense": _dense, "Dropout": _dropout, "ELU": _activation_layer,
    "Flatten": _flatten, "GlobalAveragePooling2D": _global, "GlobalMaxPooling2D": _global,
    "LeakyReLU": _activation_layer, "Maximum": _merge, "Minimum": _merge, "Multiply": _merge,
    "Normalization": _normalization, "Permute": _permute, "ReLU": _activation_layer,
    "Rescaling": _rescaling, "Reshape": _reshape, "Softmax": _activation_layer,
    "SpatialDropout2D": _dropout, "Subtract": _merge, "UpSampling2D": _up_sampling,
    "ZeroPadding2D": _zero_padding,
}  # fmt: skip
