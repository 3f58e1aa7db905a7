"""The native backend: the contract, for every instruction set that this processor runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .contract import Contract

native = pytest.importorskip("evenkeel._native", reason="the native kernels are not built")


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set in turn; the best one again afterwards."""
    try:
        native.use(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.use("best")


@pytest.mark.usefixtures("instructions")
class TestNative(Contract):
    name = "native"
