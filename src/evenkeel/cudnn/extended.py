"""The Ex calls: the norm with an add and a ReLU behind it, and the memory that they ask for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ShapeError
from ..kernels.cudnn_api import calls
from ..kernels.cudnn_api.calls import Blend
from ..kernels.cudnn_api.values import BatchNormMode, BatchNormOps
from . import arguments, emulated
from .checks import Data, check_fused, check_ops, examine
from .place import place_of
from .results import BackwardExResult, ForwardExResult, Size

__all__ = [
    "batch_normalization_backward_ex",
    "batch_normalization_forward_training_ex",
    "get_batch_normalization_backward_ex_workspace_size",
    "get_batch_normalization_forward_training_ex_workspace_size",
    "get_batch_normalization_training_ex_reserve_space_size",
]


def get_batch_normalization_forward_training_ex_workspace_size(
    mode: BatchNormMode, bn_ops: BatchNormOps, x: Tensor
) -> Size:
    """cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize: scratch memory of forward.

    The call here allocates it by itself. The reference arithmetic needs none and says 0.
    """
    return _size(calls.forward_workspace, mode, bn_ops, x)


def get_batch_normalization_backward_ex_workspace_size(
    mode: BatchNormMode, bn_ops: BatchNormOps, x: Tensor
) -> Size:
    """cudnnGetBatchNormalizationBackwardExWorkspaceSize: scratch memory of backward.

    The call here allocates it by itself. The reference arithmetic needs none and says 0.
    """
    return _size(calls.backward_workspace, mode, bn_ops, x)


def get_batch_normalization_training_ex_reserve_space_size(
    mode: BatchNormMode, bn_ops: BatchNormOps, x: Tensor
) -> Size:
    """cudnnGetBatchNormalizationTrainingExReserveSpaceSize: what forward leaves for backward.

    Unlike scratch memory it must stay as it is until then. The reference arithmetic leaves nothing
    and says 0.
    """
    return _size(calls.reserve_size, mode, bn_ops, x)


@torch.no_grad()
def batch_normalization_forward_training_ex(
    mode: BatchNormMode,
    bn_ops: BatchNormOps,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    exponential_average_factor: float,
    epsilon: float,
    z: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_variance: Tensor | None = None,
    y: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    save: bool = True,
) -> ForwardExResult:
    """cudnnBatchNormalizationForwardTrainingEx: ``y = relu(norm(x) + z)``.

    BN is the plain norm, BN_ACTIVATION has a ReLU behind it, BN_ADD_ACTIVATION adds z before the
    ReLU. The last two are for SPATIAL_PERSISTENT on NHWC (channels_last): cuDNN 9.28 insists. The
    manual of version 7 also wants float16 and C a multiple of 4; what the cuDNN at hand refuses it
    says by a `CudnnError`, and the reference arithmetic takes it.

    Args:
        bn_ops: what is done; the activation is ReLU, the only one that the call takes.
        z: like x; for BN_ADD_ACTIVATION, and only for it.
        alpha, beta: y's blend, for BN alone.
        The rest is as in `batch_normalization_forward_training`.

    Returns:
        as there, and the reserve that the backward call takes.

    Raises:
        ShapeError, ConfigError: an argument does not fit; nothing is changed.
        CudnnError: cuDNN refuses the call.
    """
    blend = Blend(alpha, beta)
    ops = check_ops(bn_ops, {"alpha and beta": blend})
    _check_presence("z", z, ops == BatchNormOps.BN_ADD_ACTIVATION, ops)
    given = arguments.forward(
        *(mode, x, z, y, scale, bias, blend, exponential_average_factor),
        *((running_mean, running_variance), epsilon, save),
    )
    where, data = place_of(x), given.data
    check_fused(ops, data)
    reserve = _memory(data, _bytes(calls.reserve_size, data, ops))
    if where.is_cudnn:
        calls.forward_training_ex(
            data.call,
            ops,
            data.x,
            given.z,
            given.y,
            scale,
            bias,
            epsilon=epsilon,
            workspace=_memory(data, _bytes(calls.forward_workspace, data, ops)),
            reserve=reserve,
            blend=blend,
            factor=given.factor,
            running=given.running,
            saved=given.saved,
        )
    else:
        emulated.forward(given, is_activated=ops != BatchNormOps.BN)
    return ForwardExResult(given.y, *given.saved, reserve, where.text)


@torch.no_grad()
def batch_normalization_backward_ex(
    mode: BatchNormMode,
    bn_ops: BatchNormOps,
    x: Tensor,
    dy: Tensor,
    scale: Tensor,
    *,
    epsilon: float,
    reserve: Tensor,
    y: Tensor | None = None,
    bias: Tensor | None = None,
    saved_mean: Tensor | None = None,
    saved_inv_variance: Tensor | None = None,
    dx: Tensor | None = None,
    d_scale: Tensor | None = None,
    d_bias: Tensor | None = None,
    alpha_data_diff: float = 1.0,
    beta_data_diff: float = 0.0,
    alpha_param_diff: float = 1.0,
    beta_param_diff: float = 0.0,
) -> BackwardExResult:
    """cudnnBatchNormalizationBackwardEx: the gradients of the Ex forward. It updates nothing.

    ::

        dz = dy where y > 0, else 0        (dy itself for BN)

    and the rest is `batch_normalization_backward` of dz in the place of dy.

    Args:
        reserve: what the forward call returned, unchanged.
        y, bias: those of the forward call, if an activation followed.
        The rest is as in `batch_normalization_backward`.

    Returns:
        as there, and dz, the gradient of z, for BN_ADD_ACTIVATION.

    Raises:
        ShapeError, ConfigError: an argument does not fit; nothing is changed.
        CudnnError: cuDNN refuses the call.
    """
    in_data = Blend(alpha_data_diff, beta_data_diff)
    in_parameters = Blend(alpha_param_diff, beta_param_diff)
    ops = check_ops(bn_ops, {"data scalars": in_data, "param scalars": in_parameters})
    is_activated = ops != BatchNormOps.BN
    _check_presence("y", y, is_activated, ops)
    _check_presence("bias", bias, is_activated, ops)
    given = arguments.backward(
        *(mode, x, y, dy, ops == BatchNormOps.BN_ADD_ACTIVATION, dx, scale, bias),
        *(d_scale, d_bias, in_data, in_parameters, epsilon, (saved_mean, saved_inv_variance)),
    )
    where, data = place_of(x), given.data
    check_fused(ops, data)
    _check_reserve(reserve, data, _bytes(calls.reserve_size, data, ops))
    if where.is_cudnn:
        calls.backward_ex(
            data.call,
            ops,
            data.x,
            given.y,
            given.dy,
            given.dz,
            given.dx,
            scale,
            bias,
            given.d_scale,
            given.d_bias,
            epsilon=epsilon,
            workspace=_memory(data, _bytes(calls.backward_workspace, data, ops)),
            reserve=reserve,
            data=in_data,
            parameters=in_parameters,
            saved=given.saved,
        )
    else:
        emulated.backward(given)
    return BackwardExResult(given.dx, given.dz, given.d_scale, given.d_bias, where.text)


_Query = Callable[[calls.Call, BatchNormOps], int]


def _size(query: _Query, mode: BatchNormMode, bn_ops: BatchNormOps, x: Tensor) -> Size:
    data, ops = examine(mode, x), check_ops(bn_ops, {})
    return Size(_bytes(query, data, ops), place_of(x).text)


def _bytes(query: _Query, data: Data, ops: BatchNormOps) -> int:
    if not place_of(data.x).is_cudnn:
        return 0
    return query(data.call, ops)


def _memory(data: Data, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=data.x.device)


def _check_presence(name: str, t: Tensor | None, is_needed: bool, ops: BatchNormOps) -> None:
    if is_needed and t is None:
        raise ShapeError(f"{ops.name} needs {name}; cuDNN: CUDNN_STATUS_BAD_PARAM")
    if t is not None and not is_needed:
        raise ShapeError(f"{ops.name} takes no {name}; leave it out")


def _check_reserve(reserve: Tensor, data: Data, size: int) -> None:
    if reserve.device != data.x.device or reserve.numel() * reserve.element_size() != size:
        raise ShapeError(
            f"reserve must have {size} bytes on {data.x.device} but is {tuple(reserve.shape)} "
            f"{reserve.dtype} on {reserve.device}; pass what the forward call returned"
        )
