"""Two facts that need no training, shown on numbers: what backward does, and where modes agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional import normalize

__all__ = ["BackwardFacts", "ModeFacts", "backward_facts", "mode_facts"]


@dataclass(frozen=True)
class BackwardFacts:
    """One forward, one backward and one explicit step of a norm with two channels.

    Attributes:
        gamma, beta, running_mean: at the start.
        dgamma, dbeta: what the backward call returned.
        parameters_moved, statistics_moved: whether the backward call changed any bit of them.
        running_mean_forward: behind the forward call, which is what moves the statistics.
        learning_rate, gamma_stepped, beta_stepped: the explicit step, gamma - rate * dgamma.
    """

    gamma: tuple[float, ...]
    beta: tuple[float, ...]
    running_mean: tuple[float, ...]
    dgamma: tuple[float, ...]
    dbeta: tuple[float, ...]
    parameters_moved: bool
    statistics_moved: bool
    running_mean_forward: tuple[float, ...]
    learning_rate: float
    gamma_stepped: tuple[float, ...]
    beta_stepped: tuple[float, ...]


@dataclass(frozen=True)
class ModeFacts:
    """The largest differences between the modes on a dense layer's values, forward and backward.

    Attributes:
        dense: spatial against per activation on (n, c).
        dense_as_image: spatial on (n, c, 1, 1) against per activation on (n, c).
        units_as_pixels: spatial on (n, 1, 1, c), one mean for all units, against per activation.
    """

    dense: float
    dense_as_image: float
    units_as_pixels: float


def backward_facts() -> BackwardFacts:
    """Runs the calls and looks what each of them changed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 2, generator=generator, dtype=torch.float64) * 2 + 1
    gamma = torch.ones(2, dtype=torch.float64, requires_grad=True)
    beta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    start = [t.detach().clone() for t in (gamma, beta, mean)]
    y = normalize(
        x, "n c -> c", weight=gamma, bias=beta, running_mean=mean, running_var=var, training=True
    )
    after_forward = [t.detach().clone() for t in (gamma, beta, mean, var)]
    target = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    dgamma, dbeta = torch.autograd.grad((y - target).square().mean(), [gamma, beta])
    moved = [
        not torch.equal(a, b) for a, b in zip((gamma, beta, mean, var), after_forward, strict=True)
    ]
    rate = 0.1
    return BackwardFacts(
        gamma=_plain(start[0]),
        beta=_plain(start[1]),
        running_mean=_plain(start[2]),
        dgamma=_plain(dgamma),
        dbeta=_plain(dbeta),
        parameters_moved=any(moved[:2]),
        statistics_moved=any(moved[2:]),
        running_mean_forward=_plain(after_forward[2]),
        learning_rate=rate,
        gamma_stepped=_plain(gamma - rate * dgamma),
        beta_stepped=_plain(beta - rate * dbeta),
    )


def mode_facts() -> ModeFacts:
    """Runs the modes on the values of one dense layer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 10, generator=generator) * torch.arange(1.0, 11.0) + 3
    dy = torch.randn(32, 10, generator=generator)
    own = _both(x, dy, "n c -> c")
    as_image = _both(x[:, :, None, None], dy[:, :, None, None], "n c h w -> c")
    as_pixels = _both(x[:, None, None], dy[:, None, None], "n c h w -> c")
    per_activation = _both(x[:, None, None], dy[:, None, None], "n c h w -> c h w")
    return ModeFacts(
        dense=_apart(own, per_activation),
        dense_as_image=_apart(as_image, per_activation),
        units_as_pixels=_apart(as_pixels, per_activation),
    )


def _both(x: Tensor, dy: Tensor, pattern: str) -> tuple[Tensor, Tensor]:
    """Output and input gradient, as (n, c)."""
    x = x.clone().requires_grad_()
    y = normalize(x, pattern)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach().reshape(32, 10), dx.reshape(32, 10)


def _apart(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def _plain(t: Tensor) -> tuple[float, ...]:
    return tuple(round(v, 6) for v in t.detach().tolist())
