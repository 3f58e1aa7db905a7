"""Statistics: against definitions, against scipy, and against studies whose truth is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evenkeel.report import numbers
from evenkeel.report.numbers import (
    ALIKE,
    Interval,
    as_family,
    compare,
    compare_arms,
    corrected,
    curve,
    interval,
    summarize,
)
from evenkeel.report.wording import evidence
from evenkeel.study.arms import Arm

from .planted import AFTER, BEFORE, NONE, STEPS, compared, failed, made, plan_of, study

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=6)


@pytest.fixture
def no_bootstrap(monkeypatch):
    """For tests of many studies, which do not look at the intervals."""
    monkeypatch.setattr(numbers, "interval", lambda values: Interval(float(np.mean(values))))


class TestHolm:
    def test_a_hand_worked_example(self):
        """0.005 * 4, then 0.01 * 3, then 0.03 * 2, then 0.04 * 1, which may not be less."""
        assert corrected([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_none_and_one(self):
        assert corrected([]) == []
        assert corrected([0.03]) == [0.03]
        assert corrected([0.6, 0.7]) == [1.0, 1.0]

    @given(P_VALUES)
    def test_it_is_the_closure_of_bonferroni(self, p):
        """By definition: the worst Bonferroni p-value of any family that the hypothesis is in."""
        for i, found in enumerate(corrected(p)):
            families = itertools.chain.from_iterable(
                itertools.combinations(range(len(p)), size) for size in range(1, len(p) + 1)
            )
            worst = max(min(1.0, len(s) * min(p[j] for j in s)) for s in families if i in s)
            assert found == pytest.approx(worst, abs=1e-12)

    @given(P_VALUES, st.randoms())
    def test_bounded_monotone_and_blind_to_order(self, p, random):
        found = corrected(p)
        assert all(raw <= each <= 1 for raw, each in zip(p, found, strict=True))
        order = sorted(range(len(p)), key=p.__getitem__)
        assert all(found[a] <= found[b] for a, b in itertools.pairwise(order))
        shuffled = list(range(len(p)))
        random.shuffle(shuffled)
        assert corrected([p[i] for i in shuffled]) == pytest.approx([found[i] for i in shuffled])


class TestInterval:
    def test_degenerate_cases(self):
        assert interval([0.7]) == Interval(0.7)
        assert interval([0.7, 0.7, 0.7]) == Interval(pytest.approx(0.7), *[pytest.approx(0.7)] * 2)
        rounding = [0.9 - 0.8, 0.8 - 0.7, 0.7 - 0.6]
        assert len(set(rounding)) > 1
        assert interval(rounding).low == interval(rounding).high

    @pytest.mark.parametrize("values", [[0.2, 0.8], [0.1, 0.5, 0.6], [3.0, -1.0, 2.0]])
    def test_of_two_or_three_values_it_is_the_range(self, values):
        """Each value alone fills one of n**n resamples, which is more than 2.5 %."""
        found = interval(values)
        assert (found.low, found.high) == (pytest.approx(min(values)), pytest.approx(max(values)))
        assert found.mean == pytest.approx(np.mean(values))

    def test_of_five_values_it_agrees_with_all_resamples(self):
        values = [0.91, 0.93, 0.96, 0.97, 0.99]
        means = np.mean(list(itertools.product(values, repeat=5)), axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        found = interval(values)
        assert (found.low, found.high) == (
            pytest.approx(low, abs=1e-3),
            pytest.approx(high, abs=1e-3),
        )

    def test_it_is_the_same_every_time(self):
        values = np.random.default_rng(1).normal(size=9).tolist()
        state = np.random.get_state()[1].copy()
        assert interval(values) == interval(values)
        assert (np.random.get_state()[1] == state).all()

    def test_it_covers_the_mean_about_as_often_as_it_says(self, monkeypatch):
        monkeypatch.setattr(numbers, "RESAMPLES", 400)
        rng = np.random.default_rng(0)
        found = [interval(rng.normal(0.5, 0.1, 25).tolist()) for _ in range(300)]
        covered = sum(each.low <= 0.5 <= each.high for each in found) / len(found)
        assert 0.90 <= covered <= 0.98


class TestPValues:
    A = (0.97, 0.95, 0.99, 0.96, 0.98, 0.94)
    B = (0.95, 0.96, 0.95, 0.95, 0.97, 0.90)

    def test_the_paired_t_test_is_scipys(self):
        found = compared(self.A, self.B)
        assert found.p == pytest.approx(stats.ttest_rel(self.A, self.B).pvalue)
        assert found.p == pytest.approx(compared(self.B, self.A).p)
        assert found.accuracy.mean == pytest.approx(-compared(self.B, self.A).accuracy.mean)
        assert found.spread == pytest.approx(np.std(np.subtract(self.A, self.B), ddof=1))
        assert found.seeds == 6

    @pytest.mark.parametrize("shift", [0.0, 0.003, -0.003, 0.006, -0.02])
    def test_alike_is_two_one_sided_tests(self, shift):
        a = np.array(self.B) + shift + np.array([1, -1, 2, -2, 1, -1]) * 1e-3
        above = stats.ttest_rel(a + ALIKE, self.B, alternative="greater").pvalue
        below = stats.ttest_rel(a - ALIKE, self.B, alternative="less").pvalue
        found = compared(a.tolist(), self.B)
        assert found.p_alike == pytest.approx(max(above, below))
        assert (found.p_alike < 0.05) == (abs(shift) < 0.004)

    def test_equal_accuracies_are_no_difference(self):
        found = compared(self.A, self.A)
        assert (found.p, found.accuracy) == (1.0, Interval(0, 0, 0))
        assert found.p_alike == 0.5**6

    @pytest.mark.parametrize(("seeds", "known"), [(2, False), (3, False), (5, False), (6, True)])
    def test_equal_differences_are_a_coincidence_until_there_are_six(self, seeds, known):
        """A t test would say p = 0 of two seeds that both have one image more."""
        base = [0.90, 0.80, 0.70, 0.95, 0.85, 0.75][:seeds]
        found = compared([b + 1 / 450 for b in base], base)
        assert found.p == pytest.approx(2 * stats.binomtest(seeds, seeds).pvalue / 2)
        assert (found.p < 0.05) == known
        assert found.p_alike == pytest.approx(0.5**seeds)

    def test_equal_differences_of_half_a_point_are_not_alike(self):
        base = [0.9, 0.8, 0.7]
        assert compared([b + ALIKE + 1e-4 for b in base], base).p_alike == 1
        assert compared([b - ALIKE - 1e-4 for b in base], base).p_alike == 1


class TestSeedsToTell:
    def test_the_power_formula_holds_in_a_simulation(self):
        """Four studies out of five with that many seeds find the difference."""
        rng = np.random.default_rng(0)
        planted = replace(compared([1, 1, 1], [0, 0, 0]), accuracy=Interval(0.01), spread=0.015)
        seeds = planted.seeds_to_tell()
        assert seeds == math.ceil((2.8 * 1.5) ** 2) + 1
        draws = rng.normal(0.01, 0.015, (4000, seeds))
        power = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
        assert 0.77 < power < 0.85

    def test_a_family_needs_more(self):
        """The same holds at the level that Holm leaves to the smallest of ten p-values."""
        planted = replace(compared([1, 1, 1], [0, 0, 0]), accuracy=Interval(0.01), spread=0.015)
        seeds = replace(planted, family=10).seeds_to_tell()
        assert seeds > planted.seeds_to_tell()
        draws = np.random.default_rng(0).normal(0.01, 0.015, (4000, seeds))
        power = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.005).mean()
        assert 0.74 < power < 0.85

    def test_where_no_number_can_be_said(self):
        assert compared([0.9, 0.8], [0.9, 0.8]).seeds_to_tell() is None
        assert compared([0.9, 0.8], [0.8, 0.9]).seeds_to_tell() is None

    def test_equal_differences_need_six_for_the_sign_test(self):
        assert compared([0.91, 0.81], [0.9, 0.8]).seeds_to_tell() == 6


class TestSpeed:
    PLAN = plan_of()

    def speed(self, a, b, **finals):
        trials = study(
            self.PLAN,
            {"before": [0.95] * len(a), "plain": [0.95] * len(b)},
            {"before": a, "plain": b},
        )
        return compare_arms(self.PLAN, trials, BEFORE, NONE)

    def test_the_ratio_is_the_geometric_mean_of_steps(self):
        found = self.speed([10, 20, 10, 40], [40, 40, 20, 80])
        assert found.speed.mean == pytest.approx((4 * 2 * 2 * 2) ** 0.25)
        assert not found.censored
        logs = np.log([4, 2, 2, 2])
        assert found.speed_p == pytest.approx(stats.ttest_1samp(logs, 0).pvalue)
        assert found.speed.low <= found.speed.mean <= found.speed.high
        back = compare_arms(
            self.PLAN,
            study(
                self.PLAN,
                {"before": [0.95] * 4, "plain": [0.95] * 4},
                {"plain": [10, 20, 10, 40], "before": [40, 40, 20, 80]},
            ),
            BEFORE,
            NONE,
        )
        assert back.speed.mean == pytest.approx(1 / found.speed.mean)

    def test_a_target_that_the_slower_arm_missed_counts_as_the_budget(self):
        found = self.speed([10, 20, 20, 40], [None, 40, None, 80])
        assert found.censored
        assert found.speed.mean == pytest.approx((10 * 2 * 5 * 2) ** 0.25)

    def test_both_missing_it_counts_as_a_tie(self):
        found = self.speed([10, None, 10, 20], [40, None, 40, 80])
        assert found.speed.mean == pytest.approx((4 * 4 * 4) ** 0.25)
        assert found.censored

    def test_an_arm_is_not_called_faster_if_it_missed_where_the_other_did_not(self):
        """100 steps is less than it needs, so its ratio would be too good."""
        found = self.speed([None, 10, 10, 10], [80, 80, 80, 80])
        assert found.speed is None
        assert found.speed_p is None
        assert self.speed([80, 80, 80, 80], [None, 10, 10, 10]).speed is None
        assert self.speed([80, 80, 80, 80], [60, 10, 10, 10]).speed is not None

    def test_nobody_reaching_it_is_no_speed(self):
        found = self.speed([None] * 3, [None] * 3)
        assert (found.speed, found.speed_p, found.censored) == (None, None, True)

    def test_other_budgets_are_not_compared(self):
        longer = replace(BEFORE, steps=200)
        plan = plan_of(NONE, longer)
        trials = study(plan, {"plain": [0.9, 0.91], "before": [0.93, 0.95]})
        found = compare_arms(plan, trials, longer, NONE)
        assert found.speed is None
        assert found.accuracy.mean == pytest.approx(0.035)


class TestCompareArms:
    PLAN = plan_of(seeds=5)

    def test_only_common_seeds_count(self):
        trials = [
            made(self.PLAN, "before", 0, 0.9),
            made(self.PLAN, "before", 2, 0.8),
            made(self.PLAN, "before", 4, 0.7),
            failed(self.PLAN, "plain", 0),
            made(self.PLAN, "plain", 4, 0.6),
            made(self.PLAN, "plain", 2, 0.5),
            made(self.PLAN, "plain", 3, 0.1),
        ]
        found = compare_arms(self.PLAN, trials, BEFORE, NONE)
        assert found.seeds == 2
        assert found.accuracy.mean == pytest.approx((0.3 + 0.1) / 2)

    @pytest.mark.parametrize("seeds", [0, 1])
    def test_one_common_seed_is_too_few(self, seeds):
        trials = study(self.PLAN, {"before": [0.9] * seeds, "plain": [0.8] * 4})
        assert compare_arms(self.PLAN, trials, BEFORE, NONE) is None
        assert compare(self.PLAN, trials, [(BEFORE, NONE)]) == []

    def test_a_diverged_trial_counts_with_its_accuracy(self):
        trials = study(self.PLAN, {"before": [0.9, 0.92], "plain": [0.9, 0.9]})
        trials[3] = made(self.PLAN, "plain", 1, 0.1, status="diverged", reach=None)
        found = compare_arms(self.PLAN, trials, BEFORE, NONE)
        assert found.accuracy.mean == pytest.approx(0.41)
        assert found.censored

    def test_identical_means_every_number(self):
        def identical(**changes):
            trials = study(self.PLAN, {"before": [0.9, 0.8], "plain": [0.9, 0.8]})
            trials[1] = replace(trials[1], **changes)
            return compare_arms(self.PLAN, trials, BEFORE, NONE).identical

        assert identical()
        assert not identical(final=0.81)
        assert not identical(accuracy=(0.3,) * len(STEPS))
        assert not identical(train_loss=(0.3,) * len(STEPS))

    def test_families(self):
        """Jointly: differences in accuracy and speed share one correction; alike has its own."""
        one = compared([0.9, 0.95, 0.96], [0.8, 0.81, 0.9], [1.0, 1.1, 0.9])
        two = compared([0.9, 0.95, 0.96], [0.9, 0.94, 0.97])
        joint, apart = as_family([one, two]), as_family([one, two], jointly=False)
        expected = corrected([one.p, two.p, one.speed_p])
        assert [joint[0].p_corrected, joint[1].p_corrected] == pytest.approx(expected[:2])
        assert joint[0].speed_p_corrected == pytest.approx(expected[2])
        assert joint[1].speed_p_corrected is None
        assert [c.p_corrected for c in apart] == pytest.approx(corrected([one.p, two.p]))
        assert apart[0].speed_p_corrected == pytest.approx(one.speed_p)
        for family in (joint, apart):
            alike = [c.p_alike_corrected for c in family]
            assert alike == pytest.approx(corrected([one.p_alike, two.p_alike]))
        assert as_family([]) == []


class TestSummaries:
    def test_what_is_counted(self):
        plan = plan_of(seeds=3)
        trials = [
            *study(plan, {"plain": [0.9, 0.92, 0.94]}, {"plain": [40, None, 100]}),
            made(plan, "before", 0, 0.97, reach=10),
            made(plan, "before", 1, 0.1, reach=None, status="diverged"),
            failed(plan, "before", 2),
        ]
        plain, before, after = summarize(plan, trials)
        assert (plain.trials, plain.diverged, plain.failed, plain.reached) == (3, 0, 0, 2)
        assert plain.accuracy.mean == pytest.approx(0.92)
        assert plain.steps.mean == pytest.approx((40 + 100 + 100) / 3)
        assert plain.against is None
        assert (before.trials, before.diverged, before.failed, before.reached) == (3, 1, 1, 1)
        assert before.accuracy.mean == pytest.approx((0.97 + 0.1) / 2)
        assert before.steps.mean == pytest.approx((10 + 100) / 2)
        assert (before.against.a, before.against.b) == ("before", "plain")
        assert (after.trials, after.accuracy, after.steps, after.against) == (0, None, None, None)

    def test_arms_are_compared_with_the_baseline_as_one_family(self):
        plan = plan_of(NONE, BEFORE, AFTER, baseline="before", seeds=3)
        trials = study(
            plan, {"plain": [0.9, 0.91, 0.9], "before": [0.95, 0.96, 0.97], "after": [0.8, 0.9, 1]}
        )
        plain, before, after = summarize(plan, trials)
        assert before.against is None
        assert [plain.against.p_corrected, after.against.p_corrected] == pytest.approx(
            corrected([plain.against.p, after.against.p])
        )

    def test_the_budget_is_the_arms_own(self):
        plan = plan_of(NONE, replace(BEFORE, steps=500))
        plain, before = summarize(plan, study(plan, {"before": [0.9]}, {"before": [None]}))
        assert (plain.budget, before.budget) == (100, 500)
        assert before.steps == Interval(500)

    def test_steps_to_is_the_first_measured_step(self):
        plan = plan_of()
        trial = made(plan, "plain", 0, accuracy=(0.1, 0.9, 0.3, 0.95, 0.99, 0.8))
        assert [trial.steps_to(t) for t in (0.05, 0.9, 0.91, 0.96, 1.0)] == [10, 20, 60, 80, None]

    def test_curves(self):
        plan = plan_of()
        trials = study(plan, {"plain": [0.9] * 3}, {"plain": [20, 40, 40]})
        trials.append(made(plan, "plain", 3, status="diverged", steps=(1,), accuracy=(0.1,)))
        found = curve(trials, "plain")
        assert found.steps == STEPS
        assert found.mean == pytest.approx([0.2, (0.92 + 0.4) / 3, 0.92, 0.92, 0.92, 0.92])
        assert found.low == pytest.approx([0.2, 0.2, 0.92, 0.92, 0.92, 0.92])
        assert found.high == pytest.approx([0.2, 0.92, 0.92, 0.92, 0.92, 0.92])
        one = curve(trials[:1], "plain")
        assert one.low == one.mean == one.high
        assert curve(trials, "before") is None
        assert curve(trials[3:], "plain") is None


GRID = tuple(math.ceil(300 * ((i + 1) / 20) ** 2) for i in range(20))


def noisy_study(rng, seeds, effect=0.0):
    """Five arms on 450 test images; the first better by ``effect``, else only chance differs."""
    arms = tuple(Arm(f"arm {i}", learning_rate=0.1 + i) for i in range(5))
    plan = plan_of(*arms, seeds=seeds, target=0.9)
    common = rng.normal(0, 0.004, seeds)
    trials = []
    for place, arm in enumerate(arms):
        for seed in range(seeds):
            right = rng.binomial(450, min(1, 0.97 + common[seed] + effect * (place == 0)))
            reach = GRID[rng.integers(3, 9)]
            accuracy = tuple(0.95 if step >= reach else 0.5 for step in GRID)
            trials.append(made(plan, arm, seed, right / 450, steps=GRID, accuracy=accuracy))
    return plan, trials


def claims(plan, trials):
    """The verdicts on the first arm against the others, as one family."""
    first, *others = plan.arms
    found = as_family([compare_arms(plan, trials, first, other) for other in others])
    return [evidence(each, "one", "another", "", plan.target).verdict for each in found]


@pytest.mark.usefixtures("no_bootstrap")
class TestPlantedEffects:
    @pytest.mark.parametrize(("seeds", "studies"), [(8, 300), (3, 150), (2, 150)])
    def test_where_nothing_differs_false_alarms_are_rare(self, seeds, studies):
        rng = np.random.default_rng(seeds)
        alarms = 0
        for _ in range(studies):
            alarms += bool(
                {"better", "worse", "faster", "slower"} & set(claims(*noisy_study(rng, seeds)))
            )
        assert alarms / studies < 0.07

    def test_a_large_difference_is_found(self):
        rng = np.random.default_rng(1)
        for _ in range(30):
            assert set(claims(*noisy_study(rng, 8, effect=-0.05))) == {"worse"}
            assert set(claims(*noisy_study(rng, 8, effect=0.029))) == {"better"}

    def test_alike_is_rarely_said_of_a_point_of_difference(self):
        rng = np.random.default_rng(2)
        wrong = sum("alike" in claims(*noisy_study(rng, 8, effect=-0.01)) for _ in range(100))
        assert wrong < 7
