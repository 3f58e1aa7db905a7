"""Every launch that a norm makes on a GPU, compiled for one, as far as that goes without any."""

from __future__ import annotations

import gc
import sys
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("on a GPU tests/test_gpu.py runs these", allow_module_level=True)

from triton.runtime.driver import driver as active

from evenkeel.kernels.contract import Activation, Affine, Sums
from evenkeel.view import view_of

from . import test_triton  # noqa: F401 - loads the kernels first, for the interpreter
from .no_gpu import Driver, resources

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NCHW, NHWC = torch.contiguous_format, torch.channels_last
CASES = {
    "rows": ((32, 16, 28, 28), NCHW, F32, "relu", True),
    "rows, few": ((64, 3, 32, 32), NCHW, BF16, "leaky_relu", True),
    "columns": ((64, 64, 14, 14), NHWC, BF16, "silu", True),
    "columns, merged where needed": ((16, 128, 14, 14), NHWC, F32, "relu6", True),
    "resident rows": ((256, 24, 7, 7), NCHW, BF16, "relu", True),
    "resident columns": ((100, 513, 1, 1), NCHW, F16, "none", False),
}


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """The calls, their plans, and the driver. The kernels are defined again, to be compiled."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver = Driver()
    monkeypatch.setattr(active, "_active", driver)
    package = sys.modules["evenkeel.kernels.triton"]
    for name in ("tiles", "kernels"):
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}")
        monkeypatch.setattr(package, name, getattr(package, name))
    fresh = import_module(f"{package.__name__}.kernels")
    planning = import_module(f"{package.__name__}.planning")
    planning.plan.cache_clear()
    calls = import_module(f"{package.__name__}.calls").Calls
    launcher = import_module(f"{package.__name__}.launching").Launcher
    yield calls(launcher(fresh, is_interpreted=False)), planning, driver
    planning.plan.cache_clear()
    for kernel in fresh.__all__:
        getattr(fresh, kernel).device_caches.clear()
    gc.collect()  # kernels are unloaded by the driver, so while there is one


class Norm:
    """The tensors of a norm, and its calls in training and inference."""

    def __init__(self, calls, planning, shape, layout, dtype, act, adds, shift=0) -> None:
        self.calls, self.act = calls, Activation(act, 0.1)

        def tensor():
            memory = torch.empty(torch.Size(shape).numel() + shift, dtype=dtype)[shift:]
            return (
                memory.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
                if (layout == NHWC)
                else memory.view(shape)
            )

        self.x, self.dy, self.y, self.dx = (tensor() for _ in range(4))
        self.residual = tensor() if adds else None
        self.dresidual = tensor() if adds and act != "none" else None
        view = view_of(self.x.shape, self.x.stride(), (1,))
        self.vectors = [torch.zeros(view.kept_sizes) for _ in range(8)]
        self.plan, self.walk = (planning.plan(view, dtype.itemsize, k) for k in (True, False))
        has_bits = adds and self.act.has_bit
        self.bits = torch.empty(self.plan.bits, dtype=torch.uint8) if has_bits else None

    def __call__(self) -> None:
        mean, invstd, running_mean, running_var, weight, bias, one, two = self.vectors
        x, p, own = self.x, self.plan, (weight, bias)
        statistics = (mean, None, invstd, running_mean, running_var)
        self.calls.train(
            *(x, p, self.residual, self.y, statistics, own, 1e-5, 0.1, self.act, self.bits)
        )
        remembered = (running_mean, running_var, None)
        self.calls.map(x, self.walk, self.residual, self.y, *remembered, own, 1e-5, self.act)
        known, sums = Affine(mean, invstd, *own), Sums(one, two)
        for from_batch in (True, False):
            self.calls.backward(
                *(self.dy, x, p, self.residual, self.dx, self.dresidual),
                *(known, sums, self.act, from_batch, self.bits),
            )


def plainly(launches, norm):
    """Launches with addresses in place of tensors; memory that a call makes for itself is 'own'."""
    added = (norm.residual, norm.dresidual, norm.bits)
    given = (norm.x, norm.dy, norm.y, norm.dx, *added, *norm.vectors)
    known = {t.data_ptr() for t in given if t is not None}

    def plain(argument):
        address = argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
        is_own = isinstance(address, int) and address > 2**40 and address not in known
        return "own" if is_own else address

    return [launch._replace(arguments=[*map(plain, launch.arguments)]) for launch in launches]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_are_compiled_for_hopper(case, hopper, tmp_path) -> None:
    """With hardly a register spilled, and loads of 16 bytes where a run's length allows them.

    And the second time the same launches are made, past Triton's own way.
    """
    calls, planning, driver = hopper
    norm = Norm(calls, planning, *case)
    norm()
    first, driver.launches = driver.launches, []
    norm()
    assert plainly(first, norm) == plainly(driver.launches, norm)
    assert isinstance(first[0].arguments[0], torch.Tensor)
    assert all(isinstance(launch.arguments[0], int) for launch in driver.launches)
    size = norm.plan.unit * norm.x.itemsize
    for name, images in driver.images.items():
        for found in (resources(image, tmp_path) for image in images):
            assert found.spilled <= 16, f"{name} spills {found.spilled} bytes of registers"
            if size >= 16 and not name.startswith("merge"):
                assert found.widest == 128, f"{name} loads {found.widest} bits"


@pytest.mark.parametrize("adds", [False, True], ids=["relu", "sum and relu"])
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "channels_last"])
def test_memory_is_slower_than_the_arithmetic(layout, adds, hopper, tmp_path) -> None:
    """On paper: instructions for each value, in bfloat16, and those that there is time for.

    132 multiprocessors of 128 lanes at 1.98 GHz, and 4.8 TB/s. A third of that time is left over,
    but by statistics, which read one tensor and write nothing.
    """
    calls, planning, driver = hopper
    norm = Norm(calls, planning, (8, 64, 56, 56), layout, BF16, "relu", adds)
    norm()
    p, tensors = norm.plan, 3 if adds else 2
    time = 132 * 128 * 1.98e9 / 4.8e12 * norm.x.itemsize  # for each value of a tensor
    values = p.a * p.b / (32 * p.warps)
    for name, taken, moved, share in (
        ("moments", 2 * values, 1, 0.6),  # its tiles are half of a tile, and four of them
        ("apply", values, tensors, 0.4),
        ("backward_reduce", values, tensors, 0.5),
        ("backward_dx", values, 3, 0.4),
    ):
        for image in driver.images[name]:
            found = resources(image, tmp_path).loop / taken
            assert 4 < found < share * time * moved, f"{name}: {found:.1f} instructions a value"


def test_addresses_that_are_not_aligned_go_tritons_own_way(hopper) -> None:
    """It has to compile other kernels for them, and to know the old ones again."""
    calls, planning, driver = hopper
    norm = Norm(calls, planning, *CASES["resident rows"])
    odd = Norm(calls, planning, *CASES["resident rows"], shift=1)
    for n in (norm, odd, odd, norm):
        driver.launches = []
        n()
        kernels = {name: len(images) for name, images in driver.images.items()}
        is_first_way = isinstance(driver.launches[0].arguments[0], torch.Tensor)
        assert is_first_way is (n is odd or kernels["forward_resident"] == 1)
    assert kernels["forward_resident"] == 2


@pytest.mark.parametrize("change", ["act", "residual", "weight", "dtype"])
def test_a_call_of_another_kind_is_compiled_anew(hopper, change) -> None:
    calls, planning, driver = hopper
    norm = Norm(calls, planning, *CASES["rows"])
    norm()
    before = {name: len(images) for name, images in driver.images.items()}
    if change == "act":
        norm.act = Activation("silu", 0.1)
    elif change == "residual":
        norm.residual = norm.dresidual = None
    elif change == "weight":
        norm.vectors[4] = None
    else:
        norm.vectors = [t.double() for t in norm.vectors]
    norm()
    after = {name: len(images) for name, images in driver.images.items()}
    assert after["apply"] > before["apply"]
    assert after["backward_reduce"] > before["backward_reduce"]
