"""The paper's two algorithms and cuDNN's rules, written out with loops, against ours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evenkeel.conventions import lookup
from evenkeel.functional import batch_norm, normalize
from evenkeel.nn import BatchNorm1d, BatchNorm2d, PerActivationBatchNorm

EXACT = {"rtol": 1e-12, "atol": 1e-12}
EPS = 1e-3


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1


def algorithm_1(values: list[float], gamma: float, beta: float) -> list[float]:
    """Batch normalizing transform of one activation over a mini-batch, line by line."""
    m = len(values)
    mu = sum(values) / m
    sigma2 = sum((x - mu) ** 2 for x in values) / m
    normalized = [(x - mu) / math.sqrt(sigma2 + EPS) for x in values]
    return [gamma * xhat + beta for xhat in normalized]


def algorithm_1_backward(
    values: list[float], dy: list[float], gamma: float
) -> tuple[list[float], float, float]:
    """(dx, dgamma, dbeta) by the chain rule of the paper's section 3, line by line."""
    m = len(values)
    mu = sum(values) / m
    sigma2 = sum((x - mu) ** 2 for x in values) / m
    root = math.sqrt(sigma2 + EPS)
    xhat = [(x - mu) / root for x in values]
    dxhat = [g * gamma for g in dy]
    dsigma2 = sum(g * (x - mu) for g, x in zip(dxhat, values, strict=True)) * -0.5 * root**-3
    dmu = sum(g * -1 / root for g in dxhat) + dsigma2 * sum(-2 * (x - mu) for x in values) / m
    dx = [
        g / root + dsigma2 * 2 * (x - mu) / m + dmu / m for g, x in zip(dxhat, values, strict=True)
    ]
    dgamma = sum(g * h for g, h in zip(dy, xhat, strict=True))
    return dx, dgamma, sum(dy)


def owners(x: Tensor, mode: str) -> list[tuple]:
    """The index of each activation's values: one per channel, or one per channel and place."""
    if mode == "spatial":
        return [(slice(None), c) for c in range(x.shape[1])]
    return [(slice(None), *place) for place in np.ndindex(*x.shape[1:])]


def build(mode: str, x: Tensor, **options: object) -> nn.Module:
    if mode == "spatial":
        kind = BatchNorm2d if x.dim() == 4 else BatchNorm1d
        module: nn.Module = kind(x.shape[1], eps=EPS, **options)
    else:
        module = PerActivationBatchNorm(tuple(x.shape[1:]), eps=EPS, **options)
    for i, parameter in enumerate(module.parameters()):
        parameter.data = draw(*parameter.shape, seed=10 + i)
    return module.double()


MODES = pytest.mark.parametrize("mode", ["spatial", "per activation"])
X = draw(5, 3, 2, 4)
DY = draw(5, 3, 2, 4, seed=1)


@MODES
def test_algorithm_1_forward_and_backward(mode: str) -> None:
    module = build(mode, X)
    x = X.clone().requires_grad_()
    y = module(x)
    y.backward(DY)
    for where in owners(X, mode):
        values, dy = X[where].flatten().tolist(), DY[where].flatten().tolist()
        gamma, beta = float(module.weight.data[where[1:]]), float(module.bias.data[where[1:]])
        wanted = algorithm_1(values, gamma, beta)
        dx, dgamma, dbeta = algorithm_1_backward(values, dy, gamma)
        np.testing.assert_allclose(y.detach()[where].flatten(), wanted, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(x.grad[where].flatten(), dx, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(module.weight.grad[where[1:]], dgamma, rtol=1e-11)
        np.testing.assert_allclose(module.bias.grad[where[1:]], dbeta, rtol=1e-11)


@MODES
def test_algorithm_2_inference_after_training(mode: str) -> None:
    """Train on batches, average mean and m/(m-1) variance, then one affine map per activation.

    With momentum=None the memory is that average.
    """
    batches = [draw(5, 3, 2, 4, seed=s) for s in range(6)]
    module = build(mode, X, momentum=None)
    for batch in batches:
        module(batch)
    y = module.eval()(X).detach()
    for where in owners(X, mode):
        m = X[where].numel()
        means, variances = [], []
        for batch in batches:
            values = batch[where].flatten().tolist()
            mu = sum(values) / m
            means.append(mu)
            variances.append(sum((v - mu) ** 2 for v in values) / m)
        expected = sum(means) / len(means)
        variance = m / (m - 1) * (sum(variances) / len(variances))
        gamma, beta = float(module.weight.data[where[1:]]), float(module.bias.data[where[1:]])
        scale = gamma / math.sqrt(variance + EPS)
        shift = beta - gamma * expected / math.sqrt(variance + EPS)
        np.testing.assert_allclose(y[where], scale * X[where] + shift, rtol=1e-11, atol=1e-12)


@MODES
def test_biased_normalizes_and_unbiased_is_remembered(mode: str) -> None:
    module = build(mode, X, momentum=1.0, affine=False)
    y = module(X)
    for where in owners(X, mode):
        values, kept = X[where].flatten(), module.running_var[where[1:]]
        torch.testing.assert_close(kept, values.var(unbiased=True), **EXACT)
        assert float(kept) != pytest.approx(float(values.var(unbiased=False)), rel=1e-3)
        root = (values.var(unbiased=False) + EPS).sqrt()
        torch.testing.assert_close(y[where].flatten(), (values - values.mean()) / root, **EXACT)


def test_the_measured_numbers_of_cudnn() -> None:
    """Twenty samples of variance 20 leave 400/19 = 21.05 in the running variance."""
    x = torch.arange(20).double()
    x = ((x - x.mean()) / x.std(unbiased=False) * math.sqrt(20)).reshape(20, 1, 1, 1)
    mean, var = torch.zeros(1).double(), torch.zeros(1).double()
    batch_norm(x, None, None, mean, var, training=True, momentum=1.0)
    assert float(x.var(unbiased=False)) == pytest.approx(20)
    assert float(var) == pytest.approx(400 / 19, rel=1e-12)


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.5, 1.0])
def test_the_factor_weighs_the_new_value(factor: float) -> None:
    mean, var = torch.full((3,), 7.0).double(), torch.full((3,), 5.0).double()
    batch_norm(X, None, None, mean, var, training=True, momentum=factor)
    for c in range(3):
        new_mean, new_var = float(X[:, c].mean()), float(X[:, c].var(unbiased=True))
        assert float(mean[c]) == pytest.approx(7 * (1 - factor) + new_mean * factor, rel=1e-12)
        assert float(var[c]) == pytest.approx(5 * (1 - factor) + new_var * factor, rel=1e-12)
    assert lookup("cudnn").form == "momentum"


@MODES
def test_factor_one_over_n_plus_one_is_the_cumulative_average(mode: str) -> None:
    """cuDNN's recipe: factor 1/(n+1) on call n, from 0; what was there before has no weight."""
    options: dict = {"eps": EPS}
    pattern = "n c h w -> c" if mode == "spatial" else "n c h w -> c h w"
    shape = (3,) if mode == "spatial" else (3, 2, 4)
    mean, var = torch.full(shape, 123.0).double(), torch.full(shape, 456.0).double()
    module = build(mode, X, momentum=None)
    batches = [draw(5, 3, 2, 4, seed=s) for s in range(7)]
    for n, batch in enumerate(batches):
        memory = {"running_mean": mean, "running_var": var, "momentum": 1 / (n + 1)}
        normalize(batch, pattern, **options, **memory)
        module(batch)
    over = (0, 2, 3) if mode == "spatial" else (0,)
    wanted = torch.stack([batch.mean(over) for batch in batches]).mean(0)
    torch.testing.assert_close(mean, wanted, **EXACT)
    wanted = torch.stack([batch.var(over, unbiased=True) for batch in batches]).mean(0)
    torch.testing.assert_close(var, wanted, **EXACT)
    torch.testing.assert_close(module.running_mean, mean, **EXACT)
    torch.testing.assert_close(module.running_var, var, **EXACT)


@MODES
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_backward_returns_gradients_and_updates_nothing(mode: str, training: bool) -> None:
    """Scale and bias move when an optimizer moves them, and never in a backward."""
    module = build(mode, X)
    module(X)
    x = X.clone().requires_grad_()
    y = module.train(training)(x)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for _ in range(2):
        y.backward(DY, retain_graph=True)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(x.detach(), X)
    assert bool(module.weight.grad.any())
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert not torch.equal(module.weight, before["weight"])


def test_inference_backward_takes_the_memory_for_constants() -> None:
    """Not the training formula: dx = dy * gamma / sqrt(running_var + eps), nothing subtracted."""
    module = build("spatial", X)
    module(X)
    x = X.clone().requires_grad_()
    module.eval()(x).backward(DY)
    for n, c, h, w in np.ndindex(*X.shape):
        root = math.sqrt(float(module.running_var[c]) + EPS)
        wanted = float(DY[n, c, h, w]) * float(module.weight.data[c]) / root
        assert float(x.grad[n, c, h, w]) == pytest.approx(wanted, rel=1e-12)


def test_inference_takes_the_variance_not_its_inverse() -> None:
    mean, var = torch.tensor([1.0]).double(), torch.tensor([4.0]).double()
    y = batch_norm(torch.full((1, 1), 5.0).double(), None, None, mean, var, training=False, eps=0.0)
    assert float(y) == (5 - 1) / 2


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1, 1)], ids=str)
def test_the_two_modes_coincide_without_places(shape: tuple[int, ...]) -> None:
    x = draw(*shape)
    spatial, per_activation = build("spatial", x), build("per activation", x)
    per_activation.load_state_dict(
        {
            k: v.reshape(per_activation.state_dict()[k].shape)
            for k, v in spatial.state_dict().items()
        }
    )
    outcomes = []
    for module in (spatial, per_activation):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.pow(3).sum().backward()
        state = [value.flatten() for value in module.state_dict().values()]
        outcomes.append([y.detach(), leaf.grad, module.weight.grad.flatten(), *state])
        outcomes[-1].append(module.eval()(x).detach())
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_the_two_modes_differ_with_places() -> None:
    """And both remain: per activation every place has mean 0, spatial only every channel has."""
    spatial = normalize(X, "n c h w -> c")
    per_activation = normalize(X, "n c h w -> c h w")
    assert float(per_activation.mean(0).abs().max()) < 1e-12
    assert float(spatial.mean(0).abs().max()) > 0.1
    assert float(spatial.mean((0, 2, 3)).abs().max()) < 1e-12


def test_one_sample_with_places_is_instance_norm() -> None:
    x = draw(1, 3, 4, 5)
    torch.testing.assert_close(
        batch_norm(x, training=True), nn.functional.instance_norm(x), **EXACT
    )


def test_a_bias_before_the_norm_does_nothing() -> None:
    """The paper's section 3.2: beta takes the place of b, whose gradient is zero."""
    b = torch.zeros(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        batch_norm(X + 5, training=True), batch_norm(X, training=True), **EXACT
    )
    batch_norm(X + b, training=True).mul(DY).sum().backward()
    assert float(b.grad.abs().max()) < 1e-12


def test_the_scale_before_the_norm_does_nothing() -> None:
    """The paper's section 3.3: BN(aWu) = BN(Wu), and the gradient by W shrinks by a."""
    grads = []
    for a in (1.0, 10.0):
        y = batch_norm(X * a, training=True, eps=0.0)
        torch.testing.assert_close(y, batch_norm(X, training=True, eps=0.0), **EXACT)
        scaled = (X * a).requires_grad_()
        (g,) = torch.autograd.grad(batch_norm(scaled, training=True, eps=0.0), scaled, DY)
        grads.append(g)
    torch.testing.assert_close(grads[1] * 10, grads[0], **EXACT)
