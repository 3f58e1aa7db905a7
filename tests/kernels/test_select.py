"""Which backend runs a call: the first that can, or the one that was wished for, never another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from evenkeel.errors import BackendError
from evenkeel.functional import batch_norm
from evenkeel.kernels import select
from evenkeel.kernels.reference import Reference
from evenkeel.view import logical_view

CPU = torch.device("cpu")
VIEW = logical_view((2, 3, 4, 5), (1,))
SIX = logical_view((2, 3, 4, 5), (1, 3))


class Picky(Reference):
    """Runs float32 in four numbers."""

    name = "picky"

    def refuses(self, view, dtype, device):
        if not view.is_four:
            return f"the view {view.sizes} has more than four numbers"
        return None if dtype == torch.float32 else f"{dtype} is not its dtype"


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two backends: picky, then the reference."""
    places = {
        "picky": f"{__name__}:Picky",
        "reference": "evenkeel.kernels.reference:Reference",
    }
    monkeypatch.setattr(select, "_PLACES", places)
    select.load.cache_clear()
    yield
    select.load.cache_clear()


def test_the_reference_is_the_last_resort() -> None:
    assert select.backends()[-1] == "reference"
    assert len(set(select.backends())) == len(select.backends())
    assert "auto" not in select.backends()


def test_load_knows_each_name_and_keeps_the_object() -> None:
    assert select.load("reference").name == "reference"
    assert select.load("reference") is select.load("reference")


@pytest.mark.parametrize("call", [select.load, lambda n: select.choose(n, VIEW, torch.half, CPU)])
def test_unknown_names_are_refused(call) -> None:
    with pytest.raises(BackendError, match=r"no backend 'cuda'; choose 'auto' or one of .*referen"):
        call("cuda")


def test_auto_always_finds_one() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for view in (VIEW, SIX):
            choice = select.choose("auto", view, dtype, CPU)
            assert select.load(choice.name).refuses(view, dtype, CPU) is None
            assert choice.reason


def test_auto_does_not_load_what_it_does_not_take(monkeypatch) -> None:
    """Triton takes a second to import, and cuDNN is hundreds of megabytes."""

    def load(name: str) -> Reference:
        assert name in ("native", "reference"), f"{name} was loaded"
        return Reference()

    monkeypatch.setattr(select, "load", load)
    select._missing.cache_clear()
    assert select.choose("auto", VIEW, torch.float32, CPU).name == "native"
    choice = select.choose("auto", VIEW, torch.float32, torch.device("cuda", 0))
    assert choice == (
        "reference",
        "native: it is taken on cpu, not on cuda; triton: it is taken only if asked for by name; "
        "cudnn: it is taken only if asked for by name",
    )
    select._missing.cache_clear()


@pytest.mark.usefixtures("picky")
def test_the_first_that_can_runs() -> None:
    assert select.choose("auto", VIEW, torch.float32, CPU).name == "picky"


@pytest.mark.usefixtures("picky")
def test_who_was_passed_over_and_why() -> None:
    choice = select.choose("auto", SIX, torch.float32, CPU)
    assert choice.name == "reference"
    assert choice.reason == f"picky: the view {SIX.sizes} has more than four numbers"


@pytest.mark.usefixtures("picky")
def test_a_wish_is_met_or_is_an_error() -> None:
    assert select.choose("reference", VIEW, torch.float32, CPU) == (
        *("reference", "asked for by name"),
    )
    assert select.choose("picky", VIEW, torch.float32, CPU).name == "picky"
    with pytest.raises(
        BackendError,
        match=r"'picky' was asked for by name but cannot run this call: torch\.float64 is not its "
        r"dtype; use backend='auto'",
    ):
        select.choose("picky", VIEW, torch.float64, CPU)


@pytest.mark.usefixtures("picky")
def test_the_functional_form_passes_the_wish_on() -> None:
    x = torch.randn(2, 3, 4, 5)
    batch_norm(x, training=True, backend="picky")
    with pytest.raises(BackendError, match="'picky' was asked for by name"):
        batch_norm(x.double(), training=True, backend="picky")
    with pytest.raises(BackendError, match="there is no backend 'turbo'"):
        batch_norm(x, training=True, backend="turbo")
