"""`Norm`: any pattern as a module, with the memory that a batch norm needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatternError, ShapeError
from ..functional import normalize
from ..kernels.contract import accumulation_dtype
from ..kernels.select import check as check_backend
from ..pattern import DEFAULT, NormSpec, parse

__all__ = ["Norm", "PerActivationBatchNorm", "forward_with_memory"]

_AXES = {1: "c", 2: "c l", 3: "c h w", 4: "c d h w"}


class Norm(nn.Module):
    """Normalizes over every axis of a pattern that does not own a statistic.

    ::

        y = (x - mean) / sqrt(var + eps) * weight + bias

    A pattern that averages the batch axis is a batch norm. In training it uses the batch's mean and
    biased variance, and remembers::

        running = (1 - momentum) * running + momentum * batch

    with the unbiased variance; in eval mode it uses what it remembers. A pattern that owns the
    batch axis (layer, instance, group norm) has no memory.

    Args:
        pattern: such as ``'n c ... -> c'`` or ``'n c h w -> h w'``.
        affine: the axes of weight (gamma) and bias (beta); None for neither; left out, the owners
            without the batch axis. For layer norm, say which: that default would be one number.
        eps: added to the variance inside the square root.
        momentum: weight of the NEW value; None for the plain average of all batches.
        track_running_stats: False to use the batch's statistics in eval mode too.
        device, dtype: of the parameters and buffers.
        backend: 'auto', or a name from `evenkeel.kernels.select.backends`: who computes it. A
            setting that may be changed later; no state dict knows it.
        sizes: the size of each axis that owns a statistic or has a weight, as in ``c=64``, and of
            all axes but one in each ``(g c)``.

    Raises:
        PatternError: the pattern is no normalization, or a size is missing or of no axis.
        ConfigError: there is no backend of that name.

    Example:
        >>> Norm('n (g c) h w -> n g', affine='(g c)', g=4, c=8)
        Norm('n (g c) h w -> n g', affine='(g c)', g=4, c=8, eps=1e-05)
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    backend: str = "auto"

    def __init__(
        self,
        pattern: str,
        affine: str | None = DEFAULT,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        **sizes: int,
    ) -> None:
        super().__init__()
        check_backend(backend)
        if backend != "auto":
            self.backend = backend
        self.spec = parse(pattern, affine)
        self.eps = eps
        self.momentum = momentum
        self.track_running_stats = track_running_stats and self.spec.averages_batch
        self.sizes = _checked(self.spec, sizes)
        weight = bias = None
        if self.spec.affine is not None:
            shape = self.spec.shape_of(self.spec.affine, self.sizes)
            weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
            bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        mean = var = count = None
        if self.track_running_stats:
            shape = self.spec.shape_of(self.spec.owners, self.sizes)
            mean = torch.zeros(shape, device=device, dtype=dtype)
            var = torch.ones(shape, device=device, dtype=dtype)
            count = torch.tensor(0, dtype=torch.long, device=device)
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)
        self.register_buffer("num_batches_tracked", count)

    def reset_running_stats(self) -> None:
        """Forgets all batches: mean 0, variance 1."""
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Back to the start: weight 1, bias 0, nothing remembered."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return forward_with_memory(self, x, self.spec, self.sizes)

    def _settings(self) -> str:
        text = f"eps={self.eps}"
        if self.spec.averages_batch:
            text += f", momentum={self.momentum}"
            text += "" if self.track_running_stats else ", track_running_stats=False"
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"

    def extra_repr(self) -> str:
        spec = self.spec
        shown = [repr(str(spec))]
        if spec != parse(str(spec)):
            shown.append(f"affine={spec.affine_text!r}")
        shown += [f"{name}={size}" for name, size in self.sizes.items()]
        return ", ".join([*shown, self._settings()])


class PerActivationBatchNorm(Norm):
    """Batch norm with one mean and variance for every activation, cuDNN's PER_ACTIVATION.

    ::

        y[n,c,h,w] = (x - mean[c,h,w]) / sqrt(var[c,h,w] + eps) * weight[c,h,w] + bias[c,h,w]

    The average is over the batch axis alone. For a dense layer's (n, c) this is the same norm as
    the spatial one. For images it fixes their size.

    Args:
        shape: the shape of one sample, as in ``(c, h, w)``; an int for ``(c,)``.
        affine: False for no weight and bias.
        eps, momentum, track_running_stats, device, dtype, backend: as in `Norm`.

    Raises:
        ShapeError: a sample has no axis, or more than four.
        ConfigError: there is no backend of that name.

    Reference: Ioffe & Szegedy 2015, algorithm 1; cuDNN's CUDNN_BATCHNORM_PER_ACTIVATION.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        axes = _AXES.get(len(self.shape))
        if axes is None:
            raise ShapeError(
                f"a per-activation norm takes the shape of one sample with 1 to 4 axes but got "
                f"{self.shape}; use Norm with a pattern"
            )
        super().__init__(
            f"n {axes} -> {axes}",
            DEFAULT if affine else None,
            eps=eps,
            momentum=momentum,
            track_running_stats=track_running_stats,
            device=device,
            dtype=dtype,
            backend=backend,
            **dict(zip(axes.split(), self.shape, strict=True)),
        )

    def extra_repr(self) -> str:
        affine = "" if self.spec.affine is not None else ", affine=False"
        return f"{self.shape}, {self._settings()}{affine}"


def forward_with_memory(
    module: Any,
    x: Tensor,
    spec: NormSpec,
    sizes: Mapping[str, int] | None = None,
    *,
    activation: str | tuple[str, float] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """What a norm module computes: the norm itself, then the count of batches.

    ``module`` has torch's names: weight, bias, running_mean, running_var, num_batches_tracked,
    momentum, eps, track_running_stats, training; and ``backend``, who computes it. ``activation``
    and ``residual`` are as in `normalize`.
    """
    updates = module.training and module.track_running_stats
    count: Tensor | None = module.num_batches_tracked
    momentum: float | Tensor | None = module.momentum
    if momentum is None:
        momentum = 0.0
        if updates and count is not None:
            wide = accumulation_dtype(torch.float32, count.device)
            momentum = (count + 1).to(wide).reciprocal()
    mean, var = module.running_mean, module.running_var  # once: a module looks long for its own
    remembers = mean is not None or var is not None
    uses_memory = updates or (remembers and not module.training)
    if updates and count is not None:
        count.add_(1)  # first: checkpointing may leave through the norm, with statistics moved
    try:
        return normalize(
            x,
            spec,
            weight=module.weight,
            bias=module.bias,
            running_mean=mean if uses_memory else None,
            running_var=var if uses_memory else None,
            training=module.training or not remembers,
            momentum=momentum,
            eps=module.eps,
            activation=activation,
            residual=residual,
            backend=module.backend,
            sizes=sizes,
        )
    except (RuntimeError, TypeError, ValueError):  # a refused batch is not counted
        if updates and count is not None:
            count.sub_(1)
        raise


def _checked(spec: NormSpec, sizes: Mapping[str, int]) -> dict[str, int]:
    spec.check_names(sizes)
    if "..." in spec.fixed:
        raise PatternError(
            f"'{spec}' has weights or statistics over '...', whose sizes cannot be given; name the "
            "axes, as in 'n c h w -> c h w'"
        )
    missing = [name for name in spec.fixed if name not in sizes]
    if missing:
        wanted = ", ".join(f"{name}=..." for name in missing)
        raise PatternError(f"'{spec}' needs the size of {', '.join(missing)}; pass {wanted}")
    return {name: sizes[name] for group in spec.axes for name in group if name in sizes}
