"""The clock's rules, on a clock that only moves when a side is called."""

from __future__ import annotations

import gc
import time
from collections import Counter
from itertools import pairwise

import pytest

from evenkeel.bench import timing
from evenkeel.bench.timing import Ratio, Samples, geometric_mean, interleaved, order


@pytest.fixture(autouse=True)
def _no_faults(monkeypatch):
    monkeypatch.setattr(timing, "page_faults", lambda: 0)


class FakeClock:
    """Tells a time that sides add to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.called: list[str] = []

    def __call__(self) -> float:
        return self.now

    def side(self, name: str, *seconds: float):
        """A side that takes these times in turn, the last one forever."""
        left = list(seconds)

        def call() -> None:
            self.called.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


class TestOrder:
    def test_each_is_first_once_then_backwards(self):
        rounds = ["".join(order(list("abc"), number)) for number in range(6)]
        assert rounds == ["abc", "bca", "cab", "cba", "acb", "bac"]

    def test_one_side(self):
        assert order(["a"], 5) == ["a"]

    @pytest.mark.parametrize("count", range(2, 12))
    def test_everyone_follows_everyone_equally_often(self, count):
        names = list("abcdefghijk"[:count])
        rounds = [order(names, number) for number in range(2 * count)]
        assert all(sorted(row) == names for row in rounds)
        assert set(Counter(row[0] for row in rounds).values()) == {2}
        pairs = Counter(pair for row in rounds for pair in pairwise(row))
        assert len(pairs) == count * (count - 1)
        assert set(pairs.values()) == {2}


class TestInterleaved:
    def test_rounds_until_the_time_is_spent(self):
        clock = FakeClock()
        sides = {"a": clock.side("a", 1.0), "b": clock.side("b", 2.0)}
        found = interleaved(sides, seconds=20, least=2, most=100, clock=clock)
        assert [len(samples.seconds) for samples in found.values()] == [7, 7]
        assert found["a"].measure.median == 1
        assert found["b"].over(found["a"]) == Ratio(2, 2, 2)

    def test_least_and_most(self):
        for budget, rounds in ((0.0, 3), (1e9, 8)):
            clock = FakeClock()
            found = interleaved(
                {"a": clock.side("a", 1.0)}, seconds=budget, least=3, most=8, clock=clock
            )
            assert len(found["a"].seconds) == rounds

    def test_warming_up_is_no_sample(self):
        clock = FakeClock()
        found = interleaved(
            {"a": clock.side("a", 100.0, 50.0, 1.0)}, seconds=0, least=3, clock=clock
        )
        assert found["a"].seconds == (1, 1, 1)

    @pytest.mark.parametrize(
        ("settled_after", "seconds", "rounds"),
        [(0, 100, 3), (5, 100, 5), (99, 100, 12), (99, 6, 6)],
    )
    def test_warming_up_goes_on_while_pages_fault(
        self, monkeypatch, settled_after, seconds, rounds
    ):
        clock = FakeClock()
        sides = {"a": clock.side("a", 1.0)}
        monkeypatch.setattr(
            timing, "page_faults", lambda: 1000 * min(len(clock.called), settled_after - 1)
        )
        timing._warmed(sides, seconds, 1e-3, clock)
        assert len(clock.called) == rounds

    @pytest.mark.parametrize(("shortest", "calls"), [(0.4, 1), (1.0, 2), (3.2, 7)])
    def test_calls_in_a_row(self, shortest, calls):
        clock = FakeClock()
        found = interleaved(
            {"a": clock.side("a", 0.5)}, seconds=0, least=2, most=2, shortest=shortest, clock=clock
        )
        assert found["a"].calls == calls

    def test_turns(self):
        clock = FakeClock()
        sides = {name: clock.side(name, 1.0) for name in "ab"}
        interleaved(sides, seconds=0, least=4, clock=clock)
        assert "".join(clock.called[2 * timing.WARM_UP :]) == "ab" + "ba" + "ba" + "ab"

    def test_sides_that_compare_are_called_equally_often(self):
        """Else the faster one, called twice, would hide its first call, the cold one."""
        clock = FakeClock()
        sides = {
            name: clock.side(name, float(name)) for name in ("0.125", "0.75", "1.25", "2", "9")
        }
        found = interleaved(sides, seconds=0, least=2, most=2, shortest=1.0, clock=clock)
        assert [samples.calls for samples in found.values()] == [8, 2, 2, 2, 1]

    def test_short_calls_are_timed_many_at_once(self):
        clock = FakeClock()
        short = 2.0**-13  # which a sum of floats keeps
        sides = {"short": clock.side("short", short), "long": clock.side("long", 1.0)}
        found = interleaved(sides, seconds=0, least=2, clock=clock)
        assert (found["short"].calls, found["long"].calls) == (9, 1)
        assert found["short"].seconds == pytest.approx((short, short))
        assert clock.called.count("short") == timing.WARM_UP + 18

    def test_no_collection_in_a_sample(self):
        seen: list[bool] = []
        interleaved({"a": lambda: seen.append(gc.isenabled())}, seconds=0, least=2, most=2)
        assert not any(seen[timing.WARM_UP :])
        assert len(seen) > timing.WARM_UP
        assert gc.isenabled()

    def test_collection_is_back_after_a_failure(self):
        left = [None] * timing.WARM_UP

        def breaks() -> None:
            left.pop()

        with pytest.raises(IndexError):
            interleaved({"a": breaks}, seconds=1)
        assert gc.isenabled()

    def test_faults_are_counted_for_each_side(self, monkeypatch):
        faults = [0]
        monkeypatch.setattr(timing, "page_faults", lambda: faults[0])
        clock = FakeClock()
        plain = clock.side("a", 1.0)

        def faulting() -> None:
            faults[0] += 7
            clock.now += 1e-4

        found = interleaved({"a": plain, "b": faulting}, seconds=0, least=3, clock=clock)
        assert (found["a"].faults, found["b"].faults) == (0, 7)

    def test_where_nobody_counts_faults(self, monkeypatch):
        monkeypatch.setattr(timing, "page_faults", lambda: None)
        assert interleaved({"a": lambda: None}, seconds=0)["a"].faults is None


class TestClock:
    def test_on_the_cpu_it_is_pythons(self):
        assert timing.clock_on("cpu") is time.perf_counter

    def test_on_a_gpu_it_waits_for_the_device(self, monkeypatch):
        said = []
        monkeypatch.setattr("torch.cuda.synchronize", lambda: said.append("waited"))
        monkeypatch.setattr(time, "perf_counter", lambda: said.append("told") or 5.0)
        assert timing.clock_on("cuda")() == 5.0
        assert said == ["waited", "told"]


class TestNumbers:
    def test_median_and_quartiles(self):
        measure = Samples((5.0, 1.0, 4.0, 2.0, 3.0), calls=2, faults=1.5).measure
        assert (measure.low, measure.median, measure.high) == (2, 3, 4)
        assert (measure.rounds, measure.calls, measure.faults) == (5, 2, 1.5)

    def test_one_round(self):
        assert Samples((2.0,)).measure.high == 2

    def test_ratios_are_of_one_round(self):
        """Both sides get slower together; their ratio does not move."""
        drifting = Samples((1.0, 10.0, 100.0))
        assert drifting.over(Samples((2.0, 20.0, 200.0))) == Ratio(0.5, 0.5, 0.5)

    def test_rounds_must_match(self):
        with pytest.raises(ValueError, match="zip"):
            Samples((1.0,)).over(Samples((1.0, 2.0)))

    def test_geometric_mean(self):
        assert geometric_mean([0.5, 2.0]) == pytest.approx(1)
        assert geometric_mean([2.0, 8.0]) == pytest.approx(4)
