"""The three plain calls: training, inference, backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.cudnn_api import calls
from ..kernels.cudnn_api.calls import Blend
from ..kernels.cudnn_api.values import BatchNormMode
from . import arguments, emulated
from .checks import apart, check_epsilon, destination, examine, parameter
from .place import place_of
from .results import BackwardResult, ForwardResult, InferenceResult

__all__ = [
    "batch_normalization_backward",
    "batch_normalization_forward_inference",
    "batch_normalization_forward_training",
]


@torch.no_grad()
def batch_normalization_forward_training(
    mode: BatchNormMode,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    exponential_average_factor: float,
    epsilon: float,
    running_mean: Tensor | None = None,
    running_variance: Tensor | None = None,
    y: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    save: bool = True,
) -> ForwardResult:
    """cudnnBatchNormalizationForwardTraining: normalizes with the statistics of the batch.

    ::

        result = scale * (x - mean) / sqrt(variance + epsilon) + bias
        y      = alpha * result + beta * y

    Args:
        mode: SPATIAL: mean and variance of each channel, over m = N * places values.
            PER_ACTIVATION: of each place of each channel, over m = N values.
        x: (N, C, H, W) or (N, C, D, H, W); (N, C) and (N, C, L), which the C call refuses, are
            taken for (N, C, 1, 1) and (N, C, L, 1). As NCHW or NHWC; else it is copied. float16,
            bfloat16, float32, float64.
        scale, bias: gamma and beta, contiguous, of the shape that `derive_bn_tensor_descriptor`
            says, or of that without its ones; float32, or float64 for float64.
        exponential_average_factor: the weight of the NEW value, in the next two lines::

                running_mean     = running_mean * (1 - factor) + mean * factor
                running_variance = running_variance * (1 - factor) + m / (m - 1) * variance * factor

            It is torch's momentum, and 1 - momentum of Keras. 1 in the first call; 1 / (n + 1) in
            call n, from 0, for the average of all.
        epsilon: 0 or more, and the same one in backward.
        running_mean, running_variance: updated in place; both or neither. What goes into the
            variance is the unbiased one, while the biased one normalizes.
        y: where the result goes; it must lie as x does. Made if it is None.
        alpha, beta: y's blend. With beta 0 the old y is not read.
        save: False for NULL saved tensors; backward then computes them again.

    Returns:
        y, the mean, ``1 / sqrt(variance + epsilon)``, and who computed them.

    Raises:
        ShapeError, ConfigError: an argument does not fit, among others m = 1; nothing is changed.
        CudnnError: cuDNN refuses the call.

    Reference: Ioffe & Szegedy 2015, algorithm 1; section 3.2 for SPATIAL.
    """
    given = arguments.forward(
        *(mode, x, None, y, scale, bias, Blend(alpha, beta), exponential_average_factor),
        *((running_mean, running_variance), epsilon, save),
    )
    where, data = place_of(x), given.data
    if where.is_cudnn:
        calls.forward_training(
            data.call,
            data.x,
            given.y,
            scale,
            bias,
            epsilon=epsilon,
            blend=given.blend,
            factor=given.factor,
            running=given.running,
            saved=given.saved,
        )
    else:
        emulated.forward(given, is_activated=False)
    return ForwardResult(given.y, *given.saved, where.text)


@torch.no_grad()
def batch_normalization_forward_inference(
    mode: BatchNormMode,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    estimated_mean: Tensor,
    estimated_variance: Tensor,
    *,
    epsilon: float,
    y: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> InferenceResult:
    """cudnnBatchNormalizationForwardInference: normalizes with given statistics.

    ::

        result = scale * (x - estimated_mean) / sqrt(estimated_variance + epsilon) + bias
        y      = alpha * result + beta * y

    It takes the running VARIANCE, not the inverse standard deviation that training saves.

    Args:
        mode, x, scale, bias, epsilon, y, alpha, beta: as in the training call.
        estimated_mean, estimated_variance: what training calls have left in the running buffers.

    Raises:
        ShapeError, ConfigError: an argument does not fit; nothing is changed.
        CudnnError: cuDNN refuses the call.

    Reference: Ioffe & Szegedy 2015, algorithm 2.
    """
    data, blend = examine(mode, x), Blend(alpha, beta)
    check_epsilon(epsilon)
    vectors = {
        "scale": scale,
        "bias": bias,
        "estimated_mean": estimated_mean,
        "estimated_variance": estimated_variance,
    }
    for name, vector in vectors.items():
        parameter(name, vector, data)
    target = destination("y", y, data, blend)
    apart({"y": target}, {"x": data.x, **vectors})
    where = place_of(x)
    if where.is_cudnn:
        calls.forward_inference(
            data.call,
            data.x,
            target,
            *vectors.values(),
            epsilon=epsilon,
            blend=blend,
        )
    else:
        emulated.inference(data, target, vectors, epsilon, blend)
    return InferenceResult(target, where.text)


@torch.no_grad()
def batch_normalization_backward(
    mode: BatchNormMode,
    x: Tensor,
    dy: Tensor,
    scale: Tensor,
    *,
    epsilon: float,
    saved_mean: Tensor | None = None,
    saved_inv_variance: Tensor | None = None,
    dx: Tensor | None = None,
    d_scale: Tensor | None = None,
    d_bias: Tensor | None = None,
    alpha_data_diff: float = 1.0,
    beta_data_diff: float = 0.0,
    alpha_param_diff: float = 1.0,
    beta_param_diff: float = 0.0,
) -> BackwardResult:
    """cudnnBatchNormalizationBackward: the gradients of a training call. It updates nothing.

    ::

        xhat    = (x - saved_mean) * saved_inv_variance
        d_bias  = sum(dy)        d_scale = sum(dy * xhat)        over the m values of each mean
        dx      = scale * saved_inv_variance * (dy - (d_bias + xhat * d_scale) / m)

    each one blended into its destination: ``alpha * result + beta * prior``, with the data scalars
    for dx and the param scalars for d_scale and d_bias. beta_param_diff = 1 adds to gradients that
    are there. scale and bias stay as they are; an optimizer moves them.

    It is the backward of `batch_normalization_forward_training` alone. For one of inference, whose
    statistics are constants, cuDNN has no call: ``dx = dy * scale / sqrt(variance + epsilon)``.

    Args:
        mode, x, scale, epsilon: those of the forward call; x must not have changed since.
        dy: like x; it is copied if it lies otherwise.
        saved_mean, saved_inv_variance: what forward returned; both or neither. Without them they
            are computed again.
        dx, d_scale, d_bias: where the gradients go; made if None.

    Raises:
        ShapeError, ConfigError: an argument does not fit; nothing is changed.
        CudnnError: cuDNN refuses the call.

    Reference: Ioffe & Szegedy 2015, section 3.
    """
    given = arguments.backward(
        *(mode, x, None, dy, False, dx, scale, None, d_scale, d_bias),
        *(Blend(alpha_data_diff, beta_data_diff), Blend(alpha_param_diff, beta_param_diff)),
        *(epsilon, (saved_mean, saved_inv_variance)),
    )
    where, data = place_of(x), given.data
    if where.is_cudnn:
        calls.backward(
            data.call,
            data.x,
            given.dy,
            given.dx,
            scale,
            given.d_scale,
            given.d_bias,
            epsilon=epsilon,
            data=given.in_data,
            parameters=given.in_parameters,
            saved=given.saved,
        )
    else:
        emulated.backward(given)
    return BackwardResult(given.dx, given.d_scale, given.d_bias, where.text)
