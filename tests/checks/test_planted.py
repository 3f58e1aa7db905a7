"""Every rule finds the mistake planted for it, with its module and number, and nothing else."""

from __future__ import annotations

import pytest

from evenkeel import check
from evenkeel.checks.rules import CODES, RULES

from .planted import PLANTED

TOLERANCE = {"EK104": 0.03, "EK306": 0.02, "EK307": 0.02, "EK308": None}
"""What is measured on random data is known to a few percent; how far EK308 is off is not known."""


def test_every_rule_has_a_planted_mistake():
    assert list(PLANTED) == list(CODES)
    assert len(CODES) == len(RULES)


@pytest.mark.parametrize("code", PLANTED)
def test_the_planted_mistake_is_found(code):
    plant = PLANTED[code](True)
    found = check(plant.model, **plant.given)
    (finding,) = [f for f in found.of(code) if f.path == plant.path]
    assert finding.severity == plant.severity
    assert finding.severity in CODES[code].severities
    assert finding.message
    tolerance = TOLERANCE.get(code, 1e-6)
    if tolerance is None:
        assert finding.evidence > 0.5
    else:
        assert finding.evidence == pytest.approx(plant.evidence, rel=tolerance)


@pytest.mark.parametrize("code", PLANTED)
def test_without_the_mistake_the_rule_is_silent(code):
    plant = PLANTED[code](False)
    found = check(plant.model, **plant.given)
    assert found.of(code) == ()
    assert all(code not in u.codes for u in found.unchecked)


@pytest.mark.parametrize("code", PLANTED)
def test_a_mistake_breaks_few_other_rules(code):
    """What else is told of the planted network follows from the same mistake."""
    kin = {
        "EK104": {"EK307", "EK306"},
        "EK105": {"EK306", "EK307"},
        "EK108": {"EK307", "EK306"},
        "EK306": {"EK307"},
        "EK307": {"EK306", "EK102"},
        "EK308": {"EK306", "EK307"},
        "EK309": {"EK301"},
    }
    plant = PLANTED[code](True)
    loud = {f.code for f in check(plant.model, **plant.given) if f.severity != "note"}
    mended = PLANTED[code](False)
    noise = {f.code for f in check(mended.model, **mended.given) if f.severity != "note"}
    assert loud - noise <= {code} | kin.get(code, set())
    assert noise <= {"EK305", "EK102"}, noise
