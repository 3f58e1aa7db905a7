"""Tensors that come back from hooks in another layout, that are no plain ones, or lie elsewhere."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.testing._internal.two_tensor import TwoTensor

from evenkeel import batch_norm
from evenkeel.errors import ShapeError

from .kernels.test_triton import WAYS  # noqa: F401 - loads the kernels, interpreted

BACKENDS = ("native", "triton", "reference")
LAST = torch.channels_last


def repacked():
    """Hooks as those of save_on_cpu(pin_memory=True): what is saved comes back contiguous."""

    def pack(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(t.size(), dtype=t.dtype).copy_(t)

    return saved_tensors_hooks(pack, lambda t: t)


def given(*, gaps: bool = False, single: bool = True) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    x, residual, dy = (
        torch.randn(4, 6, 5, 3, generator=random).contiguous(memory_format=LAST) for _ in range(3)
    )
    if gaps:
        wide = torch.randn(4, 12, 5, 3, generator=random).contiguous(memory_format=LAST)
        wide[:, ::2] = x
        x = wide[:, ::2]
    dtype = torch.float32 if single else torch.float16
    weight, bias = (torch.rand(6, generator=random).to(dtype) for _ in range(2))
    return {"x": x, "weight": weight, "bias": bias, "residual": residual, "dy": dy}


def gradients(tensors, backend, *, adds, activation, hooks, training=True):
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items() if k != "dy"}
    statistics = {} if training else {"running_mean": torch.ones(6), "running_var": torch.ones(6)}
    residual = leaves["residual"] if adds else None
    with hooks:
        y = batch_norm(
            leaves["x"], leaves["weight"], leaves["bias"], **statistics, training=training,
            activation=activation, residual=residual, backend=backend,
        )  # fmt: skip
    wanted = list(leaves.values()) if adds else list(leaves.values())[:3]
    return torch.autograd.grad(y, wanted, tensors["dy"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("way", ["direct", "gaps", "half"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_tensors_in_another_layout(backend, way, adds, activation, training):
    """The kernels are told of the layout that forward saw; the bits lie in its order."""
    if backend == "triton" and way == "half":
        way = "direct"  # Triton's op takes half-precision parameters, too; the CPU's does not
    tensors = given(gaps=way == "gaps", single=way != "half")
    options = {"adds": adds, "activation": activation, "training": training}
    plain = gradients(tensors, backend, hooks=nullcontext(), **options)
    hooked = gradients(tensors, backend, hooks=repacked(), **options)
    for one, other in zip(hooked, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_behind_hooks(backend):
    tensors = given()
    found = []
    for hooks in (nullcontext(), repacked()):
        x = tensors["x"].detach().requires_grad_()
        with hooks:
            y = batch_norm(
                x, tensors["weight"], tensors["bias"], training=True, activation="relu",
                residual=tensors["residual"], backend=backend,
            )  # fmt: skip
            (dx,) = torch.autograd.grad(y, x, tensors["dy"], create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_vectors_that_hide_their_values(backend, name):
    """A wrapper has no values at its address: it must see torch's ops."""
    tensors = given()
    vectors = {k: tensors[k] for k in ("weight", "bias")}
    vectors |= {"running_mean": torch.rand(6), "running_var": torch.rand(6) + 0.5}
    options = {"training": False, "backend": backend}
    wanted = batch_norm(tensors["x"], **vectors, **options)
    hidden = vectors | {name: TwoTensor(vectors[name], vectors[name].clone())}
    found = batch_norm(tensors["x"], **hidden, **options)
    found = found.a if isinstance(found, TwoTensor) else found
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "residual"])
def test_tensors_on_another_device(name):
    tensors = given()
    vectors = {k: tensors[k] for k in ("weight", "bias", "residual")}
    vectors |= {"running_mean": torch.zeros(6), "running_var": torch.ones(6)}
    vectors[name] = vectors[name].to("meta")
    with pytest.raises(
        ShapeError, match=rf"{name} of .* is on meta, but the input is on cpu; move"
    ):
        batch_norm(tensors["x"], **vectors, training=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_gradients_at_once(backend):
    """is_grads_batched, which torch.autograd.functional.jacobian(vectorize=True) asks for."""
    tensors = given()
    x = tensors["x"].detach().requires_grad_()
    y = batch_norm(x, tensors["weight"], training=True, activation="relu", backend=backend)
    many = torch.randn(3, *y.shape)
    (found,) = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)
    for one, dy in zip(found, many, strict=True):
        torch.testing.assert_close(
            one, torch.autograd.grad(y, x, dy, retain_graph=True)[0], rtol=1e-5, atol=1e-5
        )
