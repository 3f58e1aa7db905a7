"""Batch normalization for CNNs, on an even keel.

    import evenkeel
    y = evenkeel.batch_norm(x, weight, bias, running_mean, running_var, training=True)
    norm = evenkeel.Norm("n c h w -> c h w", c=64, h=8, w=8)
    model, report = evenkeel.introduce(model, example)
    model, report = evenkeel.accelerate(model, example)
    model, report = evenkeel.fold(model, example)

Names are loaded on first use, so that ``import evenkeel`` is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BatchNorm1d": "nn",
    "BatchNorm2d": "nn",
    "BatchNorm3d": "nn",
    "Norm": "nn",
    "PerActivationBatchNorm": "nn",
    "NormSpec": "pattern",
    "accelerate": "surgery.accelerate",
    "batch_norm": "functional",
    "check": "checks.verb",
    "exchange": "surgery.exchange",
    "fold": "surgery.fold",
    "freeze": "surgery.freeze",
    "introduce": "surgery.introduce",
    "normalize": "functional",
    "parse": "pattern",
    "recalibrate": "surgery.recalibrate",
    "recalibrated": "surgery.recalibrate",
    "restore": "surgery.accelerate",
    "unfold": "surgery.unfold",
    "unfreeze": "surgery.freeze",
}
_ROOMS = ("allocator", "conventions", "cudnn", "errors", "functional", "nn")

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Norm",
    "NormSpec",
    "PerActivationBatchNorm",
    "accelerate",
    "allocator",
    "batch_norm",
    "check",
    "conventions",
    "cudnn",
    "errors",
    "exchange",
    "fold",
    "freeze",
    "functional",
    "introduce",
    "nn",
    "normalize",
    "parse",
    "recalibrate",
    "recalibrated",
    "restore",
    "unfold",
    "unfreeze",
]

if TYPE_CHECKING:
    from . import allocator as allocator
    from . import conventions as conventions
    from . import cudnn as cudnn
    from . import errors as errors
    from . import functional as functional
    from . import nn as nn
    from .checks.verb import check as check
    from .functional import batch_norm as batch_norm
    from .functional import normalize as normalize
    from .nn import BatchNorm1d as BatchNorm1d
    from .nn import BatchNorm2d as BatchNorm2d
    from .nn import BatchNorm3d as BatchNorm3d
    from .nn import Norm as Norm
    from .nn import PerActivationBatchNorm as PerActivationBatchNorm
    from .pattern import NormSpec as NormSpec
    from .pattern import parse as parse
    from .surgery.accelerate import accelerate as accelerate
    from .surgery.accelerate import restore as restore
    from .surgery.exchange import exchange as exchange
    from .surgery.fold import fold as fold
    from .surgery.freeze import freeze as freeze
    from .surgery.freeze import unfreeze as unfreeze
    from .surgery.introduce import introduce as introduce
    from .surgery.recalibrate import recalibrate as recalibrate
    from .surgery.recalibrate import recalibrated as recalibrated
    from .surgery.unfold import unfold as unfold


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value  # so that the next access, perhaps one of each step, is a plain one
        return value
    raise AttributeError(f"module 'evenkeel' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
