"""docs/check.md has every code, word for word; the words are of the house."""

from __future__ import annotations

from pathlib import Path

import pytest

from evenkeel.checks.findings import SEVERITIES
from evenkeel.checks.rules import CODES, RULES, as_table

DOCUMENT = Path(__file__).parents[2] / "docs" / "check.md"


def test_the_table_is_the_registry():
    text = DOCUMENT.read_text()
    start = text.index("| code | name |")
    assert text[start : text.index("\n\n", start)] == as_table()


def test_the_codes_are_in_order_and_each_once():
    codes = [rule.code for rule in RULES]
    assert codes == sorted(set(codes)) == list(CODES)
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_every_rule_says_why_and_what_to_do(rule):
    assert rule.why.endswith(".")
    assert rule.fix.endswith(".")
    assert rule.unit
    assert not rule.unit.endswith(".")
    assert rule.severities
    assert [s for s in SEVERITIES if s in rule.severities] == list(rule.severities)
    assert rule.look.__doc__
