"""The Triton kernels in Triton's interpreter, where there is no GPU: the contract, small blocks.

The interpreter takes milliseconds for each program, so the rows of the contract are dealt out:
every kernel, layout, dtype, activation and way of dividing the work is seen, not each with each. On
a GPU `tests/test_gpu.py` runs all of it, compiled.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenkeel import normalize
from evenkeel.errors import BackendError
from evenkeel.kernels import select
from evenkeel.kernels.contract import Activation, Affine
from evenkeel.kernels.reference import Reference
from evenkeel.view import View, view_of

from . import contract
from .contract import CHECKS, Contract
from .truth import ROWS, VARIANTS, subject

if not (os.environ.get("CI") and sys.platform == "linux" and platform.machine() == "x86_64"):
    pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("on a GPU tests/test_gpu.py runs these, compiled", allow_module_level=True)

import triton  # noqa: F401 - before the switch, which is for our kernels alone

with pytest.MonkeyPatch.context() as _patch:  # how a kernel runs is decided when it is defined
    _patch.setenv("TRITON_INTERPRET", "1")
    from triton.runtime import interpreter
    from triton.runtime.errors import InterpreterError

    from evenkeel.kernels.triton import Triton, backend, kernels, planning, tiles

try:
    Triton().stats(torch.zeros(2, 2), View((1, 2, 2, 1), (0, 1), (1,)))
except InterpreterError as error:  # Triton 3.6 does so with numpy 2.4
    if "0-dimensional arrays" not in str(error):
        raise
    pytest.skip(f"the interpreter does not know this numpy: {error}", allow_module_level=True)

RESIDENT = planning.Limits()
FUSED = planning.Limits(tile=64, resident=0, least=16, programs=(6, 6), line=8)
APART = dataclasses.replace(FUSED, fused=0)
WIDE = dataclasses.replace(FUSED, wide=0)
WAYS = {"resident": RESIDENT, "fused": FUSED, "apart": APART, "wide": WIDE}
"""Blocks that keep what they read, and small ones: splits merged where needed, or by a kernel."""

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PICKS = (
    ("spatial, NCHW", F32, "fused"),
    ("spatial, NCHW", BF16, "apart"),
    ("spatial, NCHW", F16, "resident"),
    ("spatial, NCHW", BF16, "wide"),
    ("spatial, NHWC", F32, "fused"),
    ("spatial, NHWC", BF16, "apart"),
    ("spatial, NHWC", F16, "resident"),
    ("spatial, NHWC", F32, "wide"),
    ("spatial, batch innermost", F16, "fused"),
    ("a long row, not a multiple of a vector", BF16, "resident"),
    ("two values per owner", F32, "fused"),
    ("dense layer", F16, "apart"),
    ("per activation", BF16, "fused"),
    ("per activation, owners not in memory order", F32, "resident"),
    ("per location, NCHW", F32, "apart"),
    ("per location, NHWC: values in two runs", BF16, "wide"),
    ("all values in one", F16, "fused"),
    ("k1 > 1: instance norm, NHWC", F32, "fused"),
    ("k1 > 1: every place of every sample", BF16, "resident"),
    ("k1 > 1: groups, NHWC", F32, "wide"),
    ("mean 1000, std 1", F32, "fused"),
    ("mean 1000, std 1, NHWC", F32, "apart"),
    ("mean 1000, std 0.01", F32, "fused"),
    ("mean 1000, std 0.01", F32, "resident"),
    ("values whose squares overflow half", F16, "fused"),
    ("a constant channel", BF16, "apart"),
    ("values at the kinks", F32, "fused"),
    ("a NaN in one owner", F16, "fused"),
    ("an infinity in one owner, NHWC", F32, "apart"),
    ("an infinity in one owner, NHWC", F32, "resident"),
)
NAMED = {row.why: row for row in ROWS}
SIDE_EFFECTS = (0, 12)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the interpreter two thirds of its time: it patches its language anew for each helper
    that a patched kernel calls, and looks for overflow in every sum of integers."""
    monkeypatch.setattr(
        interpreter.InterpretedFunction, "__call__", lambda self, *a, **k: self.rewrite()(*a, **k)
    )
    builder = interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=False)
    monkeypatch.setattr(builder, "options", options)


pytestmark = [  # of infinities, which numpy tells of and a GPU does not
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in reduce:RuntimeWarning"),
]

Check = Callable[[contract.Backend, contract.Subject], None]


def dealt() -> Iterator[object]:
    """Every check of every pick, each with two of the variants; side effects for some."""
    for place, (why, dtype, way) in enumerate(PICKS):
        row = NAMED[why]
        for turn, check in enumerate(CHECKS):
            if check is contract.check_side_effects and place not in SIDE_EFFECTS:
                continue
            if row.mean and check in (contract.check_apply, contract.check_backward_reduce):
                continue  # what those rows are for is the statistics
            variants = [VARIANTS[(place + turn + step) % len(VARIANTS)] for step in (0, 3)]
            name = f"{check.__name__.removeprefix('check_')}-{why}-{dtype}-{way}"
            yield pytest.param(check, row, dtype, way, variants, id=name)


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes later calls divide their work that way."""
    return lambda way: monkeypatch.setattr(planning, "LIMITS", WAYS[way])


class TestTriton(Contract):
    name = "triton"

    @pytest.mark.parametrize(("check", "row", "dtype", "way", "variants"), list(dealt()))
    def test_row(self, check, row, dtype, way, variants, divided, monkeypatch) -> None:
        divided(way)
        if check is not contract.check_side_effects:
            monkeypatch.setattr(contract, "VARIANTS", variants)
        super().test_row(check, row, dtype)


def test_every_variant_of_every_verb_is_dealt() -> None:
    """Both schedules, every way, and each activation in each of the verbs and dtypes."""
    seen = set()
    for check, row, dtype, way, variants in (param.values for param in dealt()):
        columns = subject(row, dtype, torch.device("cpu")).view.sizes[-1] == 1
        seen |= {(check.__name__, columns, way, dtype) for _ in variants}
        seen |= {(check.__name__, columns, variant.act.name) for variant in variants}
    verbs = [c.__name__ for c in CHECKS if c is not contract.check_side_effects]
    for verb, columns, variant in itertools.product(verbs, (False, True), VARIANTS):
        assert (verb, columns, variant.act.name) in seen
    for columns, way in itertools.product((False, True), WAYS):
        assert {("check_stats", columns, way, dtype) for dtype in (F32, BF16, F16)} & seen


PLAIN = Reference()
ACTS = (("none", 0.0), ("leaky_relu", 0.7), ("silu", 0.0))  # without a kink that rounding may cross


@settings(max_examples=10)
@given(data=st.data())
def test_any_shape_in_any_division(data: st.DataObject) -> None:
    """Forward and backward as the reference has them, in float32 and whatever splits there are."""
    shape = tuple(data.draw(st.sampled_from([1, 2, 3, 5, 8, 13])) for _ in range(3))
    order = data.draw(st.permutations(range(3)))
    owners = data.draw(st.sampled_from([(1,), (1, 2), (2,), (0, 1)]))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    back = [order.index(d) for d in range(3)]
    x, dy, residual = (
        torch.randn([shape[d] for d in order], generator=random).permute(back) for _ in range(3)
    )
    view = view_of(x.shape, x.stride(), owners)
    assert view is not None
    if not view.is_four or view.count < 3:
        return
    x = x + data.draw(st.sampled_from([0.0, -300.0]))
    limits = planning.Limits(
        tile=data.draw(st.sampled_from([16, 64])),
        resident=data.draw(st.sampled_from([0, 256])),
        least=8,
        programs=(data.draw(st.integers(1, 12)),) * 2,
        fused=data.draw(st.sampled_from([0, 64])),
        line=data.draw(st.sampled_from([8, 32])),
        wide=data.draw(st.sampled_from([0, 2**31])),
    )
    act = Activation(*data.draw(st.sampled_from(ACTS)))
    vectors = torch.randn(2, *view.kept_sizes, generator=random, dtype=torch.float64)
    weight, bias = (v if data.draw(st.booleans()) else None for v in vectors)
    added = residual if data.draw(st.booleans()) else None
    from_batch = data.draw(st.booleans())

    def run(verbs):
        y, mean, var = verbs.forward_training(x, view, weight, bias, 1e-3, act, added)
        affine = Affine(mean, (var + 1e-3).rsqrt(), weight, bias)
        return y, mean, var, *verbs.backward(dy, x, view, affine, act, added, from_batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "LIMITS", limits)
        mine = run(select.load("triton"))
    for got, wanted in zip(mine, run(PLAIN), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-4)


def test_a_first_value_far_from_the_others(divided) -> None:
    """Statistics are taken about it: the variance must not suffer, the mean may by a rounding."""
    divided("fused")
    torch.manual_seed(0)
    x = torch.randn(3, 2, 7, 31) + 1000
    x[0, 0, 0, 0] = 0
    x[0, 1, 0, 0] = 2000
    for t in (x, x.contiguous(memory_format=torch.channels_last)):
        view = view_of(t.shape, t.stride(), (1,))
        got, wanted = (verbs.stats(t, view) for verbs in (select.load("triton"), PLAIN))
        torch.testing.assert_close(got.m2, wanted.m2, rtol=1e-6, atol=0)
        float32 = torch.finfo(F32).eps
        torch.testing.assert_close(got.mean, wanted.mean, rtol=2 * float32, atol=0)


@pytest.mark.usefixtures("_fast")
def test_the_op_with_gradients_and_running_statistics() -> None:
    """By name, on a tensor with gaps, beside a sum and a ReLU; nothing else is asked for."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 6)[:, ::2].requires_grad_()
    weight, bias = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    residual = torch.randn(4, 3, 5, 6, requires_grad=True)
    results = []
    for name in ("triton", "reference"):
        running = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
        y = normalize(
            *(x, "n c h w -> c"),
            **(running | {"weight": weight, "bias": bias, "residual": residual}),
            activation="relu",
            backend=name,
        )
        gradients = torch.autograd.grad(y.square().sum(), (x, weight, bias, residual))
        results.append((y, *gradients, *running.values()))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


class TestMistakes:
    """The contract sees a kernel that is broken."""

    @pytest.fixture
    def broken(self, monkeypatch, divided) -> Callable[..., None]:
        def check(name: str, mistake: object, why: str, checked: Check, match: str) -> None:
            divided("fused")
            s = subject(NAMED[why], F32, torch.device("cpu"))
            checked(select.load("triton"), s)
            monkeypatch.setattr(kernels, name, mistake)
            with pytest.raises(AssertionError, match=match):
                checked(select.load("triton"), s)

        return check

    @pytest.mark.parametrize("why", ["spatial, NCHW", "spatial, NHWC"])
    def test_splits_merged_without_the_distance_of_their_means(self, broken, why) -> None:
        def mistake(parts, owners, exist, count, splits, *rest):
            mean, _ = tiles.merged_moments(parts, owners, exist, count, splits, *rest)
            return mean, tiles.summed(parts, owners, exist, count, splits, rest[2], rest[4])[1]

        broken("merged_moments", mistake, why, contract.check_stats, "m2: 3 of 3")

    @pytest.mark.parametrize("why", ["spatial, NCHW", "spatial, NHWC"])
    def test_the_last_step_left_out(self, broken, why) -> None:
        def mistake(step, stop, *rest):
            return tiles.tile(step, stop - 1, *rest)

        broken("tile", mistake, why, contract.check_backward_reduce, "dz of Variant")

    def test_statistics_about_zero(self, broken) -> None:
        def mistake(*given):
            return tiles.pivot_of(*given) * 0.0

        broken("pivot_of", mistake, "mean 1000, std 0.01", contract.check_stats, "mean: 2 of 2")

    def test_an_activation_without_its_gradient(self, broken) -> None:
        def mistake(*given):
            return tiles.gradient_before(*given[:-1], "none")

        check = contract.check_backward_dx
        broken("gradient_before", mistake, "spatial, NHWC", check, "dx in training of .*'relu'")


class TestPlanning:
    @given(run=st.integers(1, 2**30), n=st.integers(0, 2**30 - 1))
    def test_division_by_multiplication(self, run, n) -> None:
        magic, shift = planning.divisor(run)
        assert n * magic >> shift == n // run
        assert 0 < magic < 2**31

    @given(
        sizes=st.tuples(*[st.sampled_from([1, 2, 3, 7, 24, 49, 64, 512, 3136, 65536])] * 4),
        itemsize=st.sampled_from([2, 4]),
        keeps=st.booleans(),
    )
    def test_every_value_has_one_program(self, sizes, itemsize, keeps) -> None:
        k1, r1, k2, r2 = sizes
        view = View(sizes, (0, 1, 2, 3), (0, 2))
        p, limits = planning.plan(view, itemsize, keeps), planning.Limits()
        across, run, jump, block, _, _, length, per = p.sizes
        assert (p.splits - 1) * per < length <= p.splits * per
        assert per % p.a == 0
        assert p.a & (p.a - 1) == p.b & (p.b - 1) == 0
        assert p.a * p.b <= max(limits.tile, limits.resident)
        assert p.groups * (p.b if p.columns else 1) >= p.owners == k1 * k2
        assert length * (1 if p.columns else p.b) == view.count
        assert block * p.unit * k1 == k1 * r1 * k2 * r2
        assert p.groups == k1 * across
        assert p.splits <= max(1, limits.programs[p.columns])
        assert p.resident <= keeps
        assert run * p.unit == (k2 if p.columns else r2)
        assert jump * p.unit == k2 * r2

    def test_few_channels_fill_the_chip(self) -> None:
        for sizes in ((1, 256, 64, 12544), (1, 256 * 12544, 64, 1), (1, 256, 3, 224 * 224)):
            p = planning.plan(View(sizes, (0, 1, 2, 3), (1,)), 2)
            assert 512 <= p.groups * p.splits <= 2048

    def test_offsets_are_wide_where_they_must_be(self) -> None:
        sizes = {2**31: True, 2**31 - 2**16: False}
        for count, wide in sizes.items():
            view = View((1, 256, 64, count // 2**14), (0, 1, 2, 3), (1,))
            assert planning.plan(view, 2).wide is wide


class TestRefusals:
    def test_what_it_does_not_run(self) -> None:
        verbs, view = select.load("triton"), View((1, 4, 3, 35), (0, 1, 2, 3), (1,))
        cpu, cuda = torch.device("cpu"), torch.device("cuda")
        assert verbs.refuses(view, F32, cpu) is None
        assert "no kernels for torch.float64" in verbs.refuses(view, torch.float64, cpu)
        assert "has 6 runs" in verbs.refuses(View((1,) * 6, (), ()), F32, cpu)
        assert "2^30 or more" in verbs.refuses(View((1, 2**20, 3, 2**10), (), ()), F32, cpu)
        assert "TRITON_INTERPRET is set" in verbs.refuses(view, F32, cuda)

    def test_compiled_kernels_need_a_gpu_that_is_new_enough(self, monkeypatch) -> None:
        verbs, view = Triton(), View((1, 4, 3, 35), (0, 1, 2, 3), (1,))
        monkeypatch.setattr(verbs, "_interpreted", False)
        cuda = torch.device("cuda")
        assert "TRITON_INTERPRET=1" in verbs.refuses(view, F32, torch.device("cpu"))
        assert "no CUDA device" in verbs.refuses(view, F32, cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for found, reason in (((7, 5), "8.0, this device has 7.5"), ((9, 0), "None")):
            backend._unfit.cache_clear()
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, f=found: f)
            assert reason in str(verbs.refuses(view, F32, cuda))
        backend._unfit.cache_clear()

    def test_without_triton_the_wish_names_the_extra(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "evenkeel.kernels.triton.kernels", None)
        with pytest.raises(BackendError, match=r"pip install evenkeel\[gpu\]"):
            Triton()

    def test_what_it_says_of_itself(self) -> None:
        assert "interpreter" in select.load("triton").describe()
