"""Modules: torch's own names for the everyday batch norms, and one module for every pattern.

`BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d` are torch's classes with evenkeel's arithmetic;
`Norm` takes a pattern, and `PerActivationBatchNorm` is what cuDNN calls PER_ACTIVATION.
"""

from .named import BatchNorm1d as BatchNorm1d
from .named import BatchNorm2d as BatchNorm2d
from .named import BatchNorm3d as BatchNorm3d
from .norm import Norm as Norm
from .norm import PerActivationBatchNorm as PerActivationBatchNorm
