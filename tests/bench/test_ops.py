"""Every side of an op computes the same, and a side that does not is not timed."""

from __future__ import annotations

import pytest
import torch

from evenkeel.bench import ops
from evenkeel.bench.ops import DTYPES, LAYOUTS, Case, cases, floor_bytes, inputs_of
from evenkeel.bench.shapes import TAILS, Place
from evenkeel.errors import ConfigError

CLOSE = {"float32": (1e-5, 1e-5), "bfloat16": (2e-2, 8e-2)}


def tiny(tail="bn+relu", layout="nchw", dtype="float32", **counts) -> Case:
    return Case(Place(4, 6, 5, tail), 3, layout, dtype, counts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tail", TAILS)
def test_ours_is_eagers(tail, layout, dtype):
    given = inputs_of(tiny(tail, layout, dtype))
    theirs, own = ops.eager(given, tail)(), ops.ours(given, tail)()
    assert len(own) == len(theirs) == 5 if TAILS[tail].residual else 4
    for a, b in zip(own, theirs, strict=True):
        assert a.dtype == b.dtype
        rtol, atol = CLOSE[dtype]
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch uses it itself
def test_compiled_is_eagers():
    case = tiny("bn+add+relu")
    given = inputs_of(case)
    torch.testing.assert_close(
        ops.compiled(given, case.place.tail)(), ops.eager(given, case.place.tail)()
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_have_the_layout_and_are_the_same_every_time(layout):
    first, second = (inputs_of(tiny("bn+add", layout)) for _ in range(2))
    for t in (first.x, first.residual, first.dy, ops.copy(first)()):
        assert t.is_contiguous(memory_format=LAYOUTS[layout])
    assert torch.equal(first.dy, second.dy)
    assert not torch.equal(first.x, first.residual)
    assert all(t.requires_grad for t in first.sources)
    assert not first.dy.requires_grad


def test_a_side_leaves_nothing_behind():
    given = inputs_of(tiny("bn+add+relu"))
    ops.ours(given, "bn+add+relu")()
    assert all(t.grad is None for t in given.sources)


@pytest.mark.parametrize(
    ("tail", "passes", "bits"),
    [("bn", 5, 0), ("bn+relu", 5, 0), ("bn+relu6", 5, 0), ("bn+add", 6, 0), ("bn+add+relu", 7, 2)],
)
def test_floor(tail, passes, bits):
    case = tiny(tail)
    assert floor_bytes(case) == passes * case.bytes + bits * 3 * 4 * 6 * 5 / 8
    assert floor_bytes(case, streams=True) - floor_bytes(case) == 3 * case.bytes


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_side_on_cuda_is_eagers(dtype, layout):
    place = Place(8, 14, 14, "bn+add+relu")
    (row,) = ops.run([Case(place, 16, layout, dtype, {}, "cuda")], seconds=0, compiles=True)
    assert row.absent == {}
    assert set(row.sides) == {"copy", "eager", "evenkeel", "cudnn", "compile", "floor"}
    assert not ops._streams(tiny("bn+relu"))
    assert ops._streams(Case(Place(64, 112, 112, "bn+relu"), 256, layout, dtype, {}, "cuda"))


class TestCases:
    def test_sides_on_each_device(self):
        (case, *_), _ = cases(batch=2, layouts=["nchw"], dtypes=["float32"], device="cuda")
        assert case.device == "cuda"
        assert list(ops.builders_of(case, True)) == ["eager", "evenkeel", "cudnn", "compile"]
        backends = [ops.builders_of(case, True)[side].keywords for side in ("evenkeel", "cudnn")]
        assert backends == [{"backend": "triton"}, {"backend": "cudnn"}]
        assert list(ops.builders_of(tiny(), False)) == ["eager", "evenkeel"]

    def test_all(self):
        chosen, left_out = cases(batch=2, layouts=LAYOUTS, dtypes=DTYPES)
        assert len(chosen) == 4 * 99
        assert left_out == []
        assert ops.estimate(chosen, 1.0, True) > ops.estimate(chosen, 1.0, False) > 390

    def test_tensors_too_large_are_left_out_and_named(self):
        chosen, left_out = cases(batch=128, layouts=["nchw"], dtypes=DTYPES, network="vgg16")
        assert [case.name for case in chosen if case.place.height == 224] == ["64x224x224 bn+relu"]
        assert left_out == [
            "64x224x224 bn+relu in float32: its tensor has 1.5 GiB, more than 1; use a smaller "
            "--batch"
        ]

    def test_every_tail(self):
        chosen, _ = cases(
            batch=2, layouts=["nchw"], dtypes=["float32"], network="vgg16", every_tail=True
        )
        assert len(chosen) == 5 * 3
        assert sum(case.counts.get("vgg16", 0) for case in chosen) == 13
        assert [case.counts for case in chosen if case.place.tail == "bn"] == [{}] * 5

    def test_unknown_network(self):
        with pytest.raises(ConfigError, match="unknown network 'lenet'"):
            cases(batch=2, layouts=["nchw"], dtypes=["float32"], network="lenet")


class TestRun:
    def test_row(self):
        (row,) = ops.run([tiny(resnet50=3)], seconds=0, compiles=False)
        assert row.name == "4x6x5 bn+relu"
        assert row.group == ("nchw", "float32")
        assert set(row.sides) == {"copy", "floor", "eager", "evenkeel"}
        assert set(row.ratios) == {"eager"}
        assert (row.counts, row.absent) == ({"resnet50": 3}, {})
        assert 0 <= row.difference < 1e-5
        assert all(side.median > 0 for side in row.sides.values())
        case = tiny()
        copied = row.sides["copy"].median
        assert row.sides["floor"].median == pytest.approx(
            floor_bytes(case) / (2 * case.bytes) * copied
        )

    @pytest.mark.parametrize("error", [RuntimeError("no kernel\nat all"), ValueError("")])
    def test_a_side_that_fails_is_left_out(self, monkeypatch, error):
        def fails(given, tail):
            raise error

        monkeypatch.setattr(ops, "eager", fails)
        (row,) = ops.run([tiny()], seconds=0, compiles=False)
        assert "eager" not in row.sides
        assert row.ratios == {}
        assert row.absent["eager"].startswith(f"{type(error).__name__}: ")
        assert "at all" not in row.absent["eager"]

    @pytest.mark.parametrize("change", [lambda t: t * 1.2, lambda t: t * float("nan")])
    def test_a_side_with_wrong_numbers_is_left_out(self, monkeypatch, change):
        right = ops.ours

        def wrong(given, tail):
            side = right(given, tail)
            return lambda: tuple(map(change, side()))

        monkeypatch.setattr(ops, "ours", wrong)
        (row,) = ops.run([tiny()], seconds=0, compiles=False)
        assert "evenkeel" not in row.sides
        assert "its numbers are off by" in row.absent["evenkeel"]

    def test_a_missing_gradient_is_wrong(self):
        one, two = torch.ones(2), torch.ones(3)
        assert ops._distance([one], [two]) == float("inf")
        assert ops._distance([one], [one]) == 0
