"""How each framework defines batch norm: the differences between them, as data.

All agree on ``y = (x - mean) / sqrt(var + eps) * gamma + beta`` and differ in the rest: where the
epsilon stands, which variance is remembered, and whether the number in the update weighs the new
value or the old one. Here the weight of the NEW value is always called ``momentum`` and the weight
of the old one ``decay``::

    running = (1 - momentum) * running + momentum * batch      the step form
    running = decay * running + (1 - decay) * batch            the keep form

With m values per channel, the biased variance is their squared deviation divided by m, the
unbiased one (Bessel's) by m - 1. This module holds numbers and names only; it imports no framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Final, Literal, TypeVar, cast

from .errors import ConfigError, ShapeError

__all__ = [
    "CONVENTIONS",
    "Convention",
    "convert_variance",
    "decay_from_momentum",
    "inside_epsilon",
    "lookup",
    "momentum_from_decay",
]

T = TypeVar("T")
Kind = Literal["biased", "unbiased"]
Place = Literal["inside", "outside"]
Form = Literal["momentum", "decay"]
Vectors = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Convention:
    """What one system means by batch norm.

    Attributes:
        name: the key in `CONVENTIONS`.
        eps: the default, or None where the caller must say.
        eps_place: ``inside`` for sqrt(var + eps), ``outside`` for sqrt(var) + eps.
        form: what the weight in the running update weighs: ``momentum`` the new value, ``decay``
            the old one.
        update_weight: the default of that weight, or None where the caller must say.
        normalizes_with: the variance that the training forward divides by.
        remembers: the variance that goes into the running one.
        initial_var: the running variance before the first batch, or None: the caller brings it.
        vectors: (name there, name in torch) of each vector, in the system's order; Caffe's
            ``factor`` has no name in torch.
        channel_axis: where the channels are by default, -1 for the last.
        source: where this can be read.
        note: what the fields above cannot say.
    """

    name: str
    eps: float | None
    eps_place: Place
    form: Form
    update_weight: float | None
    normalizes_with: Kind
    remembers: Kind
    initial_var: float | None
    vectors: Vectors
    channel_axis: int
    source: str
    note: str = ""

    @property
    def momentum(self) -> float | None:
        """The default weight of the new value, or None where there is no default."""
        if self.update_weight is None or self.form == "momentum":
            return self.update_weight
        return momentum_from_decay(self.update_weight)

    @property
    def decay(self) -> float | None:
        """The default weight of the old value, or None where there is no default."""
        return None if self.momentum is None else decay_from_momentum(self.momentum)


def lookup(name: str) -> Convention:
    """The convention of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in CONVENTIONS:
        raise ConfigError(f"no convention is called '{name}'; known are {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def momentum_from_decay(decay: float) -> float:
    """The weight of the new value, given that of the old: 0.99 gives 0.01, to the last digit.

    Raises:
        ConfigError: ``decay`` is not between 0 and 1.
    """
    return _one_minus(decay, "decay")


def decay_from_momentum(momentum: float) -> float:
    """The weight of the old value, given that of the new: 0.1 gives 0.9, to the last digit.

    Raises:
        ConfigError: ``momentum`` is not between 0 and 1.
    """
    return _one_minus(momentum, "momentum")


def convert_variance(var: T, count: int, *, given: Kind, wanted: Kind) -> T:
    """A running variance of one kind as the other kind: times (m - 1) / m or m / (m - 1).

    It is exact where every batch had ``count`` values per channel and the initial value is
    forgotten. Only training that goes on elsewhere needs it: inference uses what is stored.

    Args:
        var: a number, array or tensor; or a product of such, for the map is linear.
        count: m, values per channel and batch: n * h * w for a spatial norm.
        given, wanted: ``biased`` or ``unbiased``.

    Raises:
        ShapeError: the kinds differ and ``count`` is below 2, where no unbiased variance exists.
    """
    if given == wanted:
        return var
    if count < 2:
        raise ShapeError(
            f"cannot turn a {given} variance into a {wanted} one for {count} value per channel: "
            "the two differ by m - 1; give the count of the batches it was trained with, 2 or more"
        )
    ratio = (count - 1) / count if wanted == "biased" else count / (count - 1)
    return cast(T, cast(Any, var) * ratio)


def inside_epsilon(var: T, eps: float, wanted: float) -> tuple[T, float]:
    """A variance and epsilon for ``sqrt(var' + eps')`` that give the same ``sqrt(var) + eps``.

    The new variance is ``(sqrt(var) + eps)^2 - wanted``. Where any of it would be negative, the new
    epsilon is the least ``(sqrt(var) + eps)^2`` instead; torch runs no norm whose epsilon is 0.

    Args:
        var: an array or tensor of running variances; in float64 if no digit may be lost.
        eps: the epsilon outside the root.
        wanted: the epsilon that would be liked inside.

    Returns:
        (var', eps')
    """
    square = (cast(Any, var) ** 0.5 + eps) ** 2
    if (square < wanted).any():
        wanted = float(square.min())
    return square - wanted, wanted


def _one_minus(weight: float, name: str) -> float:
    if not 0 <= weight <= 1:
        raise ConfigError(f"{name} must be between 0 and 1 but is {weight}")
    # Through decimals, because 1 - 0.99 is 0.010000000000000009 in binary.
    return float(1 - Decimal(repr(float(weight))))


_TABLE: Final = """
name           eps   place    form      weight  normalizes  remembers  first  axis  vectors
torch          1e-5  inside   momentum  0.1     biased      unbiased   1      1     torch
cudnn          -     inside   momentum  -       biased      unbiased   -      1     cudnn
paper          -     inside   momentum  -       biased      unbiased   -      1     paper
tensorflow-op  1e-4  inside   momentum  1       biased      unbiased   -      -1    tensorflow
keras3         1e-3  inside   decay     0.99    biased      biased     1      -1    keras
keras2         1e-3  inside   decay     0.99    biased      biased     1      -1    keras
keras2-fused   1e-3  inside   decay     0.99    biased      unbiased   1      -1    keras
flax           1e-5  inside   decay     0.99    biased      biased     1      -1    flax
darknet-cpu    1e-6  outside  decay     0.99    unbiased    unbiased   0      1     darknet
darknet-gpu    1e-5  inside   decay     0.99    unbiased    unbiased   0      1     darknet
darknet-cudnn  1e-5  inside   momentum  0.01    biased      unbiased   0      1     darknet
alexeyab-cpu   1e-5  inside   decay     0.9     unbiased    unbiased   0      1     darknet
alexeyab-gpu   1e-5  inside   decay     0.99    biased      biased     0      1     darknet
alexeyab-cudnn 1e-5  inside   momentum  0.01    biased      unbiased   0      1     darknet
caffe          1e-5  inside   decay     0.999   biased      unbiased   0      1     caffe
mxnet          1e-3  inside   decay     0.9     biased      biased     1      1     mxnet
mxnet-cudnn    1e-3  inside   decay     0.9     biased      unbiased   1      1     mxnet
onnx           1e-5  inside   decay     0.9     biased      biased     -      1     onnx
paddle         1e-5  inside   decay     0.9     biased      biased     1      1     paddle
paddle-cudnn   1e-5  inside   decay     0.9     biased      unbiased   1      1     paddle
"""
"""The fields of `Convention`; ``-`` where the caller must say."""

_VECTORS: Final = {
    "torch": "weight bias running_mean running_var num_batches_tracked",
    "cudnn": "bnScale:weight bnBias:bias resultRunningMean:running_mean "
    "resultRunningVariance:running_var",
    "paper": "gamma:weight beta:bias E[x]:running_mean Var[x]:running_var",
    "tensorflow": "scale:weight offset:bias mean:running_mean variance:running_var",
    "keras": "gamma:weight beta:bias moving_mean:running_mean moving_variance:running_var",
    "flax": "scale:weight bias mean:running_mean var:running_var",
    "darknet": "biases:bias scales:weight rolling_mean:running_mean rolling_variance:running_var",
    "caffe": "BatchNorm.0:running_mean BatchNorm.1:running_var BatchNorm.2:factor "
    "Scale.0:weight Scale.1:bias",
    "mxnet": "gamma:weight beta:bias moving_mean:running_mean moving_var:running_var",
    "onnx": "scale:weight B:bias input_mean:running_mean input_var:running_var",
    "paddle": "weight bias _mean:running_mean _variance:running_var",
}
"""``theirs:torch's``, or one word where the two agree."""

_SOURCES: Final = {
    "torch": (
        "torch/nn/modules/batchnorm.py",
        "momentum=None is the plain average: weight 1/n at batch n",
    ),
    "cudnn": (
        "cudnn.h, cudnnBatchNormalizationForwardTraining",
        "exponentialAverageFactor is the momentum; 1/(1+n) at call n, from 0, gives the average",
    ),
    "paper": (
        "Ioffe & Szegedy 2015, algorithms 1 and 2",
        "plain averages over many batches, taken after training",
    ),
    "tensorflow-op": (
        "tensorflow/core/kernels/fused_batch_norm_op.cc (FusedBatchNormV3)",
        "the tf.compat.v1 wrapper has eps 1e-3; a variance of one value is remembered as it is",
    ),
    "keras3": (
        "keras/src/layers/normalization/batch_normalization.py",
        "its argument momentum is the decay; scale=False drops gamma, center=False beta",
    ),
    "keras2": (
        "tf_keras/layers/normalization/batch_normalization.py",
        "rank 2, float64, renorm and synchronized layers; its argument momentum is the decay",
    ),
    "keras2-fused": (
        "tf_keras/layers/normalization/batch_normalization.py",
        "rank 4 and 5 in float32, float16, bfloat16; its argument momentum is the decay",
    ),
    "flax": (
        "flax/linen/normalization.py, flax/nnx/nn/normalization.py",
        "use_fast_variance, on by default, loses the variance of data with a large mean",
    ),
    "darknet-cpu": (
        "pjreddie/darknet: src/blas.c, src/batchnorm_layer.c",
        "its backward divides by m and puts 1e-5 inside; [batchnorm] sections store no biases",
    ),
    "darknet-gpu": ("pjreddie/darknet: src/blas_kernels.cu", ""),
    "darknet-cudnn": ("pjreddie/darknet: src/batchnorm_layer.c", ""),
    "alexeyab-cpu": (
        "AlexeyAB/darknet: src/batchnorm_layer.c, src/connected_layer.c",
        "[connected] has decay 0.95; [batchnorm] sections store biases too",
    ),
    "alexeyab-gpu": ("AlexeyAB/darknet: src/blas_kernels.cu", ""),
    "alexeyab-cudnn": ("AlexeyAB/darknet: src/batchnorm_layer.c", ""),
    "caffe": (
        "BVLC/caffe: src/caffe/layers/batch_norm_layer.cpp, scale_layer.cpp",
        "stores sums, decay * sum + batch: blobs 0 and 1 are divided by blob 2; all 0 at first",
    ),
    "mxnet": (
        "apache/mxnet: src/operator/nn/batch_norm.cc",
        "fix_gamma, the op's default, makes gamma 1 whatever is stored; Gluon passes eps 1e-5",
    ),
    "mxnet-cudnn": ("apache/mxnet: src/operator/nn/cudnn/cudnn_batch_norm.cu", "as mxnet"),
    "onnx": ("onnx/defs/nn/defs.cc (BatchNormalization-15)", "its momentum is the decay"),
    "paddle": ("PaddlePaddle/Paddle: paddle/phi/kernels/cpu/batch_norm_kernel.cc", ""),
    "paddle-cudnn": ("PaddlePaddle/Paddle: paddle/phi/kernels/gpu/batch_norm_kernel.cu", ""),
}
"""Where to read it, and what the table cannot say."""


def _row(line: str) -> Convention:
    name, eps, place, form, weight, normalizes, remembers, first, axis, family = line.split()
    pairs = (word.partition(":") for word in _VECTORS[family].split())
    source, note = _SOURCES[name]
    return Convention(
        name=name,
        eps=_number(eps),
        eps_place=cast(Place, place),
        form=cast(Form, form),
        update_weight=_number(weight),
        normalizes_with=cast(Kind, normalizes),
        remembers=cast(Kind, remembers),
        initial_var=_number(first),
        vectors=tuple((theirs, ours or theirs) for theirs, _, ours in pairs),
        channel_axis=int(axis),
        source=source,
        note=note,
    )


def _number(text: str) -> float | None:
    return None if text == "-" else float(text)


CONVENTIONS: Final[Mapping[str, Convention]] = MappingProxyType(
    {entry.name: entry for entry in map(_row, _TABLE.strip().splitlines()[1:])}
)
"""Every convention that evenkeel knows, by name."""
