"""The arguments of a training call, all checked: nothing runs before they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.cudnn_api.calls import Blend, Pair
from ..kernels.cudnn_api.values import BatchNormMode
from .checks import (
    Data,
    apart,
    check_epsilon,
    check_factor,
    check_training,
    destination,
    examine,
    like,
    pair,
    parameter,
)

__all__ = ["Backward", "Forward", "backward", "forward"]


@dataclass(frozen=True)
class Forward:
    """Of ForwardTraining and ForwardTrainingEx."""

    data: Data
    z: Tensor | None
    y: Tensor
    scale: Tensor
    bias: Tensor
    blend: Blend
    factor: float
    running: Pair
    epsilon: float
    saved: Pair


@dataclass(frozen=True)
class Backward:
    """Of Backward and BackwardEx."""

    data: Data
    y: Tensor | None
    dy: Tensor
    dz: Tensor | None
    dx: Tensor
    scale: Tensor
    bias: Tensor | None
    d_scale: Tensor
    d_bias: Tensor
    in_data: Blend
    in_parameters: Blend
    epsilon: float
    saved: Pair


def forward(
    mode: BatchNormMode,
    x: Tensor,
    z: Tensor | None,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    blend: Blend,
    factor: float,
    running: tuple[Tensor | None, Tensor | None],
    epsilon: float,
    save: bool,
) -> Forward:
    """Checks them; ``z`` None means that there is none."""
    data = examine(mode, x)
    check_training(data)
    check_epsilon(epsilon)
    check_factor(factor)
    parameter("scale", scale, data)
    parameter("bias", bias, data)
    both = pair(("running_mean", "running_variance"), running, data, refused=False)
    target = destination("y", y, data, blend)
    added = None if z is None else like("z", z, data)
    written = {"y": target, "running_mean": running[0], "running_variance": running[1]}
    apart(written, {"x": data.x, "z": z, "scale": scale, "bias": bias})
    return Forward(
        data=data,
        z=added,
        y=target,
        scale=scale,
        bias=bias,
        blend=blend,
        factor=factor,
        running=Pair() if both is None else Pair(*both),
        epsilon=epsilon,
        saved=Pair(torch.empty_like(scale), torch.empty_like(scale)) if save else Pair(),
    )


def backward(
    mode: BatchNormMode,
    x: Tensor,
    y: Tensor | None,
    dy: Tensor,
    has_z: bool,
    dx: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    d_scale: Tensor | None,
    d_bias: Tensor | None,
    in_data: Blend,
    in_parameters: Blend,
    epsilon: float,
    saved: tuple[Tensor | None, Tensor | None],
) -> Backward:
    """Checks them; y and bias None mean that the call takes none."""
    data = examine(mode, x)
    check_training(data)
    check_epsilon(epsilon)
    parameter("scale", scale, data)
    if bias is not None:
        parameter("bias", bias, data)
    both = pair(("saved_mean", "saved_inv_variance"), saved, data, refused=True)
    gradient = like("dy", dy, data)
    output = None if y is None else like("y", y, data)
    target = destination("dx", dx, data, in_data)
    to_scale = parameter("d_scale", d_scale, data, blend=in_parameters, form=scale)
    to_bias = parameter("d_bias", d_bias, data, blend=in_parameters, form=scale)
    written = {"dx": target, "d_scale": to_scale, "d_bias": to_bias}
    read = {"x": data.x, "y": output, "dy": dy, "scale": scale, "bias": bias}
    apart(written, {**read, "saved_mean": saved[0], "saved_inv_variance": saved[1]})
    return Backward(
        data=data,
        y=output,
        dy=gradient,
        dz=torch.empty_like(data.x) if has_z else None,
        dx=target,
        scale=scale,
        bias=bias,
        d_scale=to_scale,
        d_bias=to_bias,
        in_data=in_data,
        in_parameters=in_parameters,
        epsilon=epsilon,
        saved=Pair() if both is None else Pair(*both),
    )
