"""One training in plain values, from the arm to the seed, with defaults for each data set."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch

from ..errors import ConfigError
from .arms import Arm, Data

__all__ = ["SCHEDULES", "Training", "training_for"]

SCHEDULES: Final = ("cosine", "constant")
_MOST_EPOCHS: Final = 1_000_000
_SEEDS: Final = 2**32


@dataclass(frozen=True)
class Training:
    """Everything that decides what a training ends with, but the data's bytes and the device.

    Attributes:
        arm: the network and its optimizer; its own ``steps`` are not used.
        data: which data set, and how its images are read.
        epochs: how often each training image is seen.
        schedule: 'cosine': the learning rate falls to 0 along half a cosine; or 'constant'.
        seed: of the initial weights and of the order of the data.
    """

    arm: Arm
    data: Data
    epochs: int
    schedule: str = "cosine"
    seed: int = 0

    def __post_init__(self) -> None:
        for key, low, high in (("epochs", 1, _MOST_EPOCHS), ("seed", 0, _SEEDS - 1)):
            value = getattr(self, key)
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"{key} must be a number from {low} to {high:,} but is {value!r}")
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f"unknown schedule '{self.schedule}'; choose one of {', '.join(SCHEDULES)}"
            )

        for key in ("learning_rate", "weight_decay", "eps", "bn_momentum"):
            if not math.isfinite(getattr(self.arm, key)):
                raise ConfigError(f"{key} is {getattr(self.arm, key)}; give a finite number")
        try:
            json.dumps(self.arm.options, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"the options {dict(self.arm.options)} of the optimizer cannot be kept ({error}); "
                "give finite numbers, true, false, null or lists"
            ) from error

    def rate(self, step: int, total: int) -> float:
        """The share of the learning rate that the step after ``step`` steps gets."""
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1.0 + math.cos(math.pi * step / total))


class _Defaults(NamedTuple):
    epochs: int
    batch_size: int
    learning_rate: float


# For SGD with momentum 0.9 and the standard network.
_DEFAULTS: Final = {
    "digits": _Defaults(20, 32, 0.05),
    "mnist": _Defaults(4, 64, 0.05),
    "fashion-mnist": _Defaults(8, 64, 0.05),
    "cifar10": _Defaults(20, 64, 0.05),
    "idx": _Defaults(8, 64, 0.05),
    "folder": _Defaults(20, 32, 0.02),
}
_SGD_OPTIONS: Final = {"momentum": 0.9}
_SGD_DECAY: Final = 5e-4


def training_for(
    data: Data,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    optimizer: str = "SGD",
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    options: Mapping[str, Any] | None = None,
    schedule: str = "cosine",
    seed: int = 0,
    **network: Any,
) -> Training:
    """A training with sensible values for what is left out.

    SGD gets momentum 0.9, weight decay 5e-4 and the data set's learning rate; another optimizer
    gets its own default learning rate and no weight decay.

    Args:
        network: of `Arm`: model, placement, statistics, activation and so on.

    Raises:
        ConfigError: a name or a number that cannot be.
    """
    usual = _DEFAULTS[data.name]
    is_sgd = optimizer == "SGD"
    if learning_rate is None:
        learning_rate = usual.learning_rate if is_sgd else _own_rate(optimizer)
    if weight_decay is None:
        weight_decay = _SGD_DECAY if is_sgd else 0.0
    arm = Arm(
        "train",
        batch_size=batch_size or usual.batch_size,
        optimizer=optimizer,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        options=(_SGD_OPTIONS if is_sgd else {}) | dict(options or {}),
        **network,
    )
    return Training(arm, data, epochs or usual.epochs, schedule, seed)


def _own_rate(optimizer: str) -> float:
    """The learning rate that an optimizer of torch has by default."""
    try:
        parameters = inspect.signature(getattr(torch.optim, optimizer)).parameters
        return float(parameters["lr"].default)
    except (AttributeError, KeyError, TypeError, ValueError):
        return 1e-3  # a name that is no optimizer is refused when the optimizer is made
