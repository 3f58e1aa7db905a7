"""Batch norm on devices for which 'auto' has no kernels of ours: torch's own, where it has one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from evenkeel import functional, normalize
from evenkeel.functional import batch_norm

from .test_functional import Call, randn

HALF, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def ways(monkeypatch):
    """Makes the CPU such a device, and tells by whom each call was computed."""
    taken = []
    op, torchs = functional.norm, F.batch_norm
    monkeypatch.setattr(functional, "_OURS", ())
    monkeypatch.setattr(functional.direct, "way", lambda backend: None)
    monkeypatch.setattr(functional, "norm", lambda *a: taken.append("op") or op(*a))
    monkeypatch.setattr(F, "batch_norm", lambda *a: taken.append("torch") or torchs(*a))
    return taken


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 9), (2, 3, 5, 7), (2, 3, 3, 2, 4)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"weight": False, "bias": False}, {"params": F32}, {"momentum": 0.3, "eps": 1e-3}],
    ids=str,
)
def test_it_is_torchs_bit_for_bit(shape, training, options, ways) -> None:
    dtype = BF16 if "params" in options else F32
    call = Call(randn(*shape, dtype=dtype), training=training, **options)
    got = call.run(Call.ours)
    assert ways == ["torch"]
    for name, wanted in call.run(Call.torchs).items():
        assert wanted is got[name] is None or torch.equal(wanted, got[name]), name


def test_what_follows_it_is_torchs_too(ways) -> None:
    x, residual = randn(2, 3, 4, 4, dtype=F32), randn(2, 3, 4, 4, dtype=F32, seed=1)
    y = batch_norm(x, training=True, activation="relu", residual=residual)
    assert torch.equal(
        y, (F.batch_norm(x, None, None, None, None, True, 0.1, 1e-5) + residual).relu()
    )
    assert "op" not in ways
    with torch.no_grad():
        assert batch_norm(x, training=True, residual=residual, activation="relu", inplace=True) is x
    assert torch.equal(x, y)


OTHERWISE = {
    "another pattern": {"pattern": "n c h w -> c h w"},
    "gamma for each place": {"affine": "c h w", "weight": torch.ones(3, 4, 4)},
    "a split axis": {"pattern": "n (g c) h w -> g c", "sizes": {"g": 3}},
    "a momentum that is a tensor": {"momentum": torch.tensor(0.5)},
    "no epsilon, which torch refuses": {"eps": 0.0},
    "parameters in half precision": {"weight": torch.ones(3).half()},
    "an empty batch": {"x": torch.ones(0, 3, 4, 4)},
    "by name": {"backend": "reference"},
}


@pytest.mark.parametrize("options", OTHERWISE.values(), ids=OTHERWISE)
def test_what_torch_cannot_do_is_not_left_to_it(options, ways) -> None:
    given = {"x": randn(2, 3, 4, 4, dtype=F32), "pattern": "n c h w -> c"} | options
    x, pattern = given.pop("x"), given.pop("pattern")
    assert normalize(x, pattern, **given).shape == x.shape
    assert ways == ["op"]
