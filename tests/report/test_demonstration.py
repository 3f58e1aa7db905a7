"""The two facts that need no training, recomputed by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from evenkeel.report import answers as module
from evenkeel.report import demonstration
from evenkeel.report.answers import answers
from evenkeel.report.demonstration import backward_facts, mode_facts

from .planted import plan_of

FACTS = backward_facts()
MODES = mode_facts()


def batch():
    """The values that the demonstration draws."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 2, generator=generator, dtype=torch.float64) * 2 + 1
    return x.numpy(), torch.randn(8, 2, generator=generator, dtype=torch.float64).numpy()


class TestBackward:
    def test_the_gradients_are_those_of_the_paper(self):
        """dgamma is the sum of dy * xhat and dbeta that of dy, dy being 2 (y - target) / 16."""
        x, target = batch()
        xhat = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        dy = 2 * (xhat - target) / target.size
        assert FACTS.dgamma == pytest.approx((dy * xhat).sum(0), abs=1e-6)
        assert FACTS.dbeta == pytest.approx(dy.sum(0), abs=1e-6)
        assert all(abs(value) > 1e-3 for value in FACTS.dgamma)

    def test_the_backward_call_moved_nothing(self):
        assert not FACTS.parameters_moved
        assert not FACTS.statistics_moved
        assert (FACTS.gamma, FACTS.beta, FACTS.running_mean) == ((1, 1), (0, 0), (0, 0))

    def test_the_forward_call_moved_the_statistics(self):
        assert FACTS.running_mean_forward == pytest.approx(0.1 * batch()[0].mean(0), abs=1e-6)

    def test_the_explicit_step(self):
        stepped = [1 - FACTS.learning_rate * d for d in FACTS.dgamma]
        assert FACTS.gamma_stepped == pytest.approx(stepped, abs=1e-6)
        stepped = [-FACTS.learning_rate * d for d in FACTS.dbeta]
        assert FACTS.beta_stepped == pytest.approx(stepped, abs=1e-6)
        assert FACTS.gamma_stepped != FACTS.gamma

    @pytest.mark.parametrize(
        ("which", "parameters", "statistics"),
        [("weight", True, False), ("bias", True, False), ("running_mean", False, True),
         ("running_var", False, True)],
    )  # fmt: skip
    def test_a_backward_that_moves_something_is_found_out(
        self, which, parameters, statistics, monkeypatch
    ):
        real = demonstration.normalize

        def careless(x, pattern, **given):
            y = real(x, pattern, **given)

            def move(dy):
                given[which].data.add_(1e-9)  # behind autograd's back

            y.register_hook(move)
            return y

        monkeypatch.setattr(demonstration, "normalize", careless)
        facts = backward_facts()
        assert (facts.parameters_moved, facts.statistics_moved) == (parameters, statistics)

    def test_it_is_the_same_every_time_and_draws_no_numbers_of_the_users(self):
        state = torch.get_rng_state()
        assert backward_facts() == FACTS
        assert mode_facts() == MODES
        assert torch.equal(torch.get_rng_state(), state)


class TestModes:
    def test_a_dense_layer_has_one_mode(self):
        assert MODES.dense == 0
        assert MODES.dense_as_image == 0

    def test_units_as_pixels_are_another_matter(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, 10, generator=generator) * torch.arange(1.0, 11.0) + 3
        x = x.double().numpy()
        own = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        shared = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        assert MODES.units_as_pixels >= np.abs(own - shared).max() - 1e-4
        assert 0.5 < MODES.units_as_pixels < 10

    def test_a_difference_would_be_seen(self, monkeypatch):
        real = demonstration.normalize

        def off(x, pattern, **given):
            return real(x, pattern, **given) + (1e-6 if pattern == "n c -> c" else 0)

        monkeypatch.setattr(demonstration, "normalize", off)
        assert mode_facts().dense > 0
        assert mode_facts().dense_as_image == 0


def test_the_answers_state_these_numbers_or_own_up(monkeypatch):
    found = {answer.number: answer for answer in answers(plan_of(), [])}
    fourth, second = found[4], found[2]
    assert (fourth.verdict, fourth.backward, fourth.next_step) == ("exact", FACTS, "")
    for value in (*FACTS.dgamma, *FACTS.gamma_stepped):
        assert f"{value:.4g}" in fourth.sentence
    assert fourth.sentence.startswith("No: the backward call returned dgamma = (")
    assert second.modes == MODES
    assert f"differ by up to {MODES.units_as_pixels:.1f}." in second.sentence

    for changed in ("parameters_moved", "statistics_moved"):
        facts = replace(FACTS, **{changed: True})
        monkeypatch.setattr(module, "backward_facts", lambda facts=facts: facts)
        assert "this is a bug in evenkeel" in answers(plan_of(), [])[3].sentence
    monkeypatch.setattr(module, "mode_facts", lambda: replace(MODES, dense_as_image=1e-7))
    assert "this is a bug in evenkeel" in answers(plan_of(), [])[1].sentence
