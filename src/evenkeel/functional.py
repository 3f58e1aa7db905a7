"""Normalization as a function of tensors.

`normalize` takes any pattern; `batch_norm` is its everyday form, with torch's arguments and the
activation and residual add that may follow. Forward, backward, running statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import direct
from .errors import ConfigError, PatternError, ShapeError
from .kernels.contract import Activation
from .kernels.reference import activate
from .ops import norm
from .pattern import DEFAULT, Bound, NormSpec, parse

__all__ = ["activation_of", "batch_norm", "normalize"]

_SPATIAL = parse("n c ... -> c")
_OURS = ("cpu",)
"""Devices on which 'auto' takes kernels of ours."""
_Own = tuple[Tensor | None, Tensor | None]
"""Weight and bias."""
_Memory = tuple[Tensor | None, Tensor | None, bool, float | Tensor]
"""Running mean and variance, whether they move, and the weight of the new value."""
_SLOPES = {"none": 0.0, "relu": 0.0, "leaky_relu": 0.01, "relu6": 0.0, "silu": 0.0}


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: str | tuple[str, float] | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
    inplace: bool = False,
) -> Tensor:
    """Spatial batch normalization, one mean and variance per channel.

    ::

        y[n,c,...] = act((x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c] + residual)

    Args:
        x: (n, c, ...), any floating dtype, any strides; 2 dimensions or more.
        weight, bias: (c,) gamma and beta, or None for 1 and 0.
        running_mean, running_var: (c,), updated in place in training::

                running = (1 - momentum) * running + momentum * batch

            where the batch's variance is the unbiased one, m / (m - 1) times the biased variance
            that normalizes, m being n times the number of places. In inference they are used.
        training: True to take the statistics from x.
        momentum: weight of the NEW value (torch's momentum, cuDNN's exponentialAverageFactor).
        eps: added to the variance inside the square root.
        activation: None, 'relu', 'leaky_relu' (or ('leaky_relu', slope)), 'relu6' or 'silu'.
        residual: a tensor like x, added before the activation.
        backend: 'auto', or a name from `evenkeel.kernels.select.backends`. Where 'auto' has no
            kernels of ours, which is on every device but the CPU, it takes torch's batch norm.
        inplace: True to write y over x, which no gradient may then need.

    Returns:
        y, like x. Its backward returns the gradients of x, weight, bias and residual and changes
        nothing: weight and bias move when an optimizer moves them.

    Raises:
        ShapeError: a shape does not fit, or training would take a variance of one value.
        ConfigError: the activation is unknown, eps is negative, or x cannot be written over.
        BackendError: the named backend cannot run the call.

    Reference: Ioffe & Szegedy 2015, algorithms 1 and 2, section 3.2 for the axes.
    """
    return normalize(
        x,
        _SPATIAL,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        activation=activation,
        residual=residual,
        backend=backend,
        inplace=inplace,
    )


def normalize(
    x: Tensor,
    pattern: str | NormSpec,
    *,
    affine: str | None = DEFAULT,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: str | tuple[str, float] | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
    inplace: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> Tensor:
    """Normalizes over every axis that does not own a statistic.

    ::

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    Args:
        x: the tensor that the left side of the pattern describes, batch axis first.
        pattern: such as ``'n c h w -> c h w'``, or a parsed `NormSpec`.
        affine: the axes of weight and bias when they are not the owners without the batch axis.
            Only for a pattern given as text.
        weight, bias: of the affine axes' shape, or None.
        running_mean, running_var: of the owners' shape; for batch norms only (the batch axis is
            averaged). See `batch_norm` for the update rule; the variance kept is the unbiased one.
        training: for a batch norm, False to use the running statistics. A norm that owns the batch
            axis always uses the statistics of x.
        momentum, eps, activation, residual, backend, inplace: as in `batch_norm`.
        sizes: axis sizes to insist on; needed to split a dimension, as in ``{'g': 8}``.

    Returns:
        y, like x.

    Raises:
        PatternError: the pattern is no normalization, or owns the batch axis and was given running
            statistics.
        ShapeError: a shape does not fit, or a variance would be taken of one value.
        ConfigError: the activation is unknown, eps is negative, x cannot be written over, or an
            affine pattern was given with a parsed one.
    """
    spec = _parsed(pattern, affine)
    act = activation_of(activation)
    if not x.is_floating_point():
        raise ShapeError(f"a norm needs a floating tensor but got {x.dtype}; use x.float()")
    if not eps >= 0:
        raise ConfigError(f"eps must be 0 or more but is {eps}; the usual one is 1e-5")
    if inplace:
        residual = _apart(x, weight, bias, residual)
    from_batch = training or not spec.averages_batch
    way = None if sizes else direct.way(backend)
    if way is not None:
        given = (running_mean, running_var, from_batch, momentum)
        y = way(x, spec, weight, bias, *given, eps, act, residual, inplace)
        if y is not None:
            return y
    bound = _bound(spec, x, sizes or {})
    _check_shapes(spec, bound, x, weight, bias, running_mean, running_var, residual)
    if from_batch:
        _check_count(spec, bound, tuple(x.shape))
    elif running_mean is None or running_var is None:
        raise ShapeError(
            f"'{spec}' in inference needs running_mean and running_var; pass training=True to use "
            "the statistics of the batch"
        )
    memory = (running_mean, running_var, training, momentum)
    torchs = _by_torch(x, spec, bound, (weight, bias), eps, memory) if backend == "auto" else None
    if torchs is not None:
        y = _after(torchs, act, residual).to(x.dtype)
        return x.copy_(y) if inplace else y
    used = (None, None) if from_batch else (running_mean, running_var)
    split = len(bound.shape) != x.dim()
    parts = x.reshape(bound.shape) if split else x
    if spec.affine_is_owners or (weight is None and bias is None):
        added = residual.reshape(bound.shape) if split and residual is not None else residual
        owned = (_per_owner(weight, bound), _per_owner(bias, bound))
        y, mean, var = norm(parts, *owned, added, *used, bound.kept, eps, act, backend)
        y = y.reshape(x.shape) if split else y
    else:
        wide = parts.to(torch.promote_types(x.dtype, torch.float32))
        y, mean, var = norm(wide, None, None, None, *used, bound.kept, eps, Activation(), backend)
        y = _scale_and_shift(y, bound, weight, bias).reshape(x.shape)
        y = _after(y, act, residual).to(x.dtype)
    if from_batch and x.numel() > 0:
        with torch.no_grad():
            if running_mean is not None and running_var is not None:
                _remember(running_mean, mean, momentum)
                _remember(running_var, var * (bound.count / (bound.count - 1)), momentum)
    return x.copy_(y) if inplace else y


def _apart(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor | None:
    """The residual, apart from x, over which the result will be written.

    Raises:
        ConfigError: x cannot be written over.
    """
    others = (weight, bias, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)):
        raise ConfigError(
            "inplace=True would write over x, which backward needs; call it under torch.no_grad(), "
            "or with tensors that need no gradient"
        )
    if 0 in x.stride() and torch._debug_has_internal_overlap(x) == 1:
        raise ConfigError(
            f"inplace=True would write over x, but several of its values lie in one place (strides "
            f"{x.stride()}); use x.contiguous()"
        )
    return residual.clone() if residual is not None and _shares_some(residual, x) else residual


def _shares_some(t: Tensor, x: Tensor) -> bool:
    """True for a tensor in x's memory that is not x itself, whose values would be written over."""
    own = t.data_ptr() == x.data_ptr() and t.shape == x.shape and t.stride() == x.stride()
    return not own and t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def _remember(running: Tensor, new: Tensor, momentum: float | Tensor) -> None:
    """running = (1 - momentum) * running + momentum * new, in the precision of ``new``."""
    new = new.reshape(running.shape)
    if running.dtype == new.dtype and not isinstance(momentum, Tensor):
        running.lerp_(new, momentum)  # one kernel on a GPU, where there would be five
        return
    old = running.to(new.dtype)
    running.copy_(old * (1 - momentum) + new * momentum)


def _per_owner(vector: Tensor | None, bound: Bound) -> Tensor | None:
    """``vector`` with one dimension per owner: a pattern may write two of them as one, '(g c)'."""
    return None if vector is None else vector.reshape([bound.shape[d] for d in bound.kept])


def _scale_and_shift(y: Tensor, bound: Bound, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Gamma and beta over axes that are not those of the statistics."""
    shape = [s if d in bound.affine else 1 for d, s in enumerate(bound.shape)]
    if weight is not None:
        y = y * weight.reshape(shape)
    if bias is not None:
        y = y + bias.reshape(shape)
    return y


def _after(y: Tensor, act: Activation, residual: Tensor | None) -> Tensor:
    return activate(y if residual is None else y + residual, act)


def _by_torch(
    x: Tensor, spec: NormSpec, bound: Bound, own: _Own, eps: float, memory: _Memory
) -> Tensor | None:
    """Torch's own norm where that is what the pattern means and ours is no faster, else None.

    Kernels for the norms that own the batch axis are torch's business, not ours, and batch norm is
    where 'auto' takes none of ours.
    """
    if spec.averages_batch:
        is_ours = x.device.type in _OURS
        return None if is_ours else _batch_norm_by_torch(x, spec, bound, own, eps, memory)
    weight, bias = own
    owners = tuple(name for group in spec.owners for name in group)
    others, channel = spec.axes[1:], spec.axes[1:2]
    weightless = weight is None and bias is None
    if owners == spec.batch and (weightless or spec.affine == others):
        return F.layer_norm(x, x.shape[1:], weight, bias, eps)
    if not channel or channel == (("...",),) or not (weightless or spec.affine == channel):
        return None
    sizes = dict(zip(bound.names, bound.shape, strict=True))
    for split in range(3):  # one group, one for each g of (g c), one for each channel
        names = channel[0][:split]
        if owners == spec.batch + names:
            (groups,) = spec.shape_of((names,), sizes)
            return F.group_norm(x, groups, weight, bias, eps)
    return None


def _batch_norm_by_torch(
    x: Tensor, spec: NormSpec, bound: Bound, own: _Own, eps: float, memory: _Memory
) -> Tensor | None:
    """Torch's own batch norm where the pattern means the spatial one and torch can, else None."""
    (weight, bias), (mean, var, training, momentum) = own, memory
    dtypes = {t.dtype for t in (weight, bias, mean, var) if t is not None}
    if (
        bound.kept != (1,)
        or bound.shape != tuple(x.shape)
        or not (spec.affine_is_owners or weight is bias is None)
        or (mean is None) != (var is None)
        or isinstance(momentum, Tensor)
        or not (eps > 0 and x.numel())
        or len(dtypes) > 1
        or not dtypes <= {x.dtype, torch.float32}
    ):
        return None
    return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def activation_of(activation: str | tuple[str, float] | None) -> Activation:
    """The activation of a name, or of a name and a slope.

    Raises:
        ConfigError: it is unknown, or takes no slope.
    """
    name, slope = activation if isinstance(activation, tuple) else (activation or "none", None)
    if name not in _SLOPES:
        raise ConfigError(f"unknown activation '{name}'; choose one of {', '.join(_SLOPES)}")
    if slope is not None and name != "leaky_relu":
        raise ConfigError(f"activation '{name}' takes no slope but got {slope}; write '{name}'")
    return Activation(name, _SLOPES[name] if slope is None else slope)


def _parsed(pattern: str | NormSpec, affine: str | None) -> NormSpec:
    if isinstance(pattern, NormSpec):
        if affine != DEFAULT:
            raise ConfigError(
                f"affine={affine!r} comes with '{pattern}', which is parsed and has its own; "
                "give the pattern as text, or parse it with that affine"
            )
        return pattern
    if torch.compiler.is_compiling():
        return parse.__wrapped__(pattern, affine)
    return parse(pattern, affine)


def _bound(spec: NormSpec, x: Tensor, sizes: Mapping[str, int]) -> Bound:
    # Sizes may be symbols, which no cache can hold.
    if torch.compiler.is_compiling() or not all(type(size) is int for size in x.shape):
        return spec.bind(tuple(x.shape), sizes)
    return _bind(spec, tuple(x.shape), tuple(sizes.items()))


@lru_cache(maxsize=4096)
def _bind(spec: NormSpec, shape: tuple[int, ...], sizes: tuple[tuple[str, int], ...]) -> Bound:
    return spec.bind(shape, dict(sizes))


def _check_shapes(
    spec: NormSpec,
    bound: Bound,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
) -> None:
    wanted = {
        "weight": (weight, bound.affine_shape),
        "bias": (bias, bound.affine_shape),
        "running_mean": (running_mean, bound.stat_shape),
        "running_var": (running_var, bound.stat_shape),
        "residual": (residual, tuple(x.shape)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(
                f"{name} of '{spec}' must have shape {shape} for an input of {tuple(x.shape)} but "
                f"has {tuple(tensor.shape)}"
            )
        if tensor is not None and tensor.device != x.device:
            raise ShapeError(
                f"{name} of '{spec}' is on {tensor.device}, but the input is on {x.device}; move "
                "the network, or the input"
            )
    if spec.affine is None and (weight is not None or bias is not None):
        raise ShapeError(f"'{spec}' was asked for without gamma and beta but got a weight or bias")
    if not spec.averages_batch and (running_mean is not None or running_var is not None):
        raise PatternError(
            f"'{spec}' owns the batch axis '{spec.batch[0]}', so every sample has its own "
            "statistics and none can be remembered; leave running_mean and running_var out"
        )
    if (running_mean is None) != (running_var is None):
        raise ShapeError(
            f"'{spec}' got one of running_mean and running_var; pass both, or neither to remember "
            "nothing"
        )


def _check_count(spec: NormSpec, bound: Bound, shape: tuple[int, ...]) -> None:
    if bound.count == 1:
        raise ShapeError(
            f"'{spec}' on {shape} averages over {', '.join(bound.averaged)}: one value "
            "per owner, whose variance is zero; use a larger batch (drop_last=True for the last "
            "one), eval mode, or a pattern that averages more axes"
        )
