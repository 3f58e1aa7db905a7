"""Who runs a call: cuDNN where there is one for x, else the reference arithmetic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.cudnn_api.library import library, missing

__all__ = ["Place", "place_of"]


class Place(NamedTuple):
    """``is_cudnn``, and the words for it."""

    is_cudnn: bool
    text: str


def place_of(x: Tensor) -> Place:
    """cuDNN if x is on a CUDA device and the library can be used."""
    if x.device.type != "cuda":
        return Place(False, f"the reference arithmetic on {x.device}")
    reason = missing()
    if reason is not None:
        return Place(False, f"the reference arithmetic on {x.device}, for {reason}")
    return Place(True, f"{library()} on {torch.cuda.get_device_name(x.device)} ({x.device})")
