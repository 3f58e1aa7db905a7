"""Text, JSON, SARIF 2.1.0 and GitHub's annotations."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from urllib.parse import unquote

import pytest
from torch import nn

from evenkeel import check
from evenkeel.checks.findings import Finding, Findings, Unchecked
from evenkeel.checks.formats import FORMATS, as_github, as_json, as_sarif
from evenkeel.checks.rules import CODES

from .planted import images, mismatch, net

LEVELS = {"error", "warning", "note", "none"}


@pytest.fixture
def found() -> Findings:
    model = net(bias=True)
    model.bn1.momentum = 0.99
    model.bn2.running_var[0] = -1.0
    return check(model, images())


def made(**changes) -> Finding:
    start = Finding("EK101", "bias-before-norm", "note", "a.b", 3.0, "biases", "m", "w", "f")
    return replace(start, **changes)


def test_text_tells_each_rule_once(found):
    text = str(found)
    assert text.startswith("1 error, 1 warning, 1 note\n\nerror EK303 negative-variance\n")
    assert text.count("why:") == text.count("fix:") == 3
    assert "bn1 (tests/checks/planted.py:" in text or "bn1 (/" in text
    assert "not checked: EK406, EK407: give the optimizer" in text
    assert FORMATS["text"](found) == text


def test_text_of_many_places_is_short():
    text = str(Findings(tuple(made(path=f"layer{i}") for i in range(9))))
    assert "EK101 bias-before-norm, 9 places" in text
    assert "and 5 more" in text
    assert "layer4" not in text
    assert str(Findings()) == "0 errors, 0 warnings, 0 notes"


def test_findings_are_a_sequence(found):
    assert len(found) == len(list(found)) == 3
    assert found[0].severity == "error"
    assert found.errors + found.warnings + found.notes == tuple(found)
    assert found.of("EK303") == found.of("negative-variance") == (found[0],)
    assert found.of("EK999") == ()


def test_json_is_all_of_it(found):
    told = json.loads(as_json(found))
    assert (told["errors"], told["warnings"], told["notes"]) == (1, 1, 1)
    first = told["findings"][0]
    assert first["code"] == "EK303"
    assert first["path"] == "bn2"
    assert first["evidence"] == -1.0
    assert {"codes": ["EK406", "EK407"], "reason": "give the optimizer"} in told["unchecked"]
    plant = mismatch(True)
    layers = json.loads(as_json(check(plant.model, **plant.given)))["layers"]
    assert [layer["path"] for layer in layers] == ["bn1", "bn2"]
    assert layers[0]["own"] == pytest.approx(1.25**0.5, rel=0.02)


def test_json_has_no_word_for_infinity():
    model = nn.BatchNorm2d(3)
    model.running_var[0], model.running_var[1] = float("-inf"), float("nan")
    model.eps = 0.0
    text = as_json(check(model))
    assert "Infinity" not in text
    assert "NaN" not in re.sub(r'"[^"]*"', "", text)


def test_sarif_has_what_the_standard_requires(found):
    """Sections 3.13, 3.14, 3.18, 3.19, 3.27, 3.28 and 3.49 of SARIF 2.1.0."""
    log = json.loads(as_sarif(found))
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "evenkeel"
    assert run["invocations"][0]["executionSuccessful"] is True
    for note in run["invocations"][0]["toolExecutionNotifications"]:
        assert note["level"] in LEVELS
        assert note["message"]["text"]
    ids = [rule["id"] for rule in driver["rules"]]
    assert len(ids) == len(set(ids))
    for rule in driver["rules"]:
        assert rule["shortDescription"]["text"]
        assert rule["help"]["text"] == CODES[rule["id"]].fix
        assert rule["defaultConfiguration"]["level"] in LEVELS
    assert len(run["results"]) == len(found)
    for result, finding in zip(run["results"], found, strict=True):
        assert result["ruleId"] == finding.code == ids[result["ruleIndex"]]
        assert result["level"] == finding.severity
        assert finding.message in result["message"]["text"]
        (location,) = result["locations"]
        assert location["logicalLocations"][0]["fullyQualifiedName"] == finding.path
        physical = location["physicalLocation"]
        assert physical["region"]["startLine"] == finding.line >= 1
        uri = physical["artifactLocation"]["uri"]
        assert "\\" not in uri
        assert unquote(uri).endswith("planted.py")


def test_sarif_of_files_here_is_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside, outside = str(tmp_path / "my nets.py"), str(tmp_path.parent / "other.py")
    found = Findings((made(file=inside, line=3), made(file=outside, line=4), made(path="")))
    results = json.loads(as_sarif(found))["runs"][0]["results"]
    uris = [
        r["locations"][0].get("physicalLocation", {}).get("artifactLocation", {}).get("uri")
        for r in results
    ]
    assert uris[0] == "my%20nets.py"
    assert uris[1].startswith("file:///")
    assert uris[2] is None
    assert results[2]["locations"][0]["logicalLocations"] == [
        {"name": "the network", "kind": "module"}
    ]
    assert json.loads(as_sarif(Findings()))["runs"][0]["results"] == []


def test_github_lines_are_workflow_commands(found, monkeypatch, tmp_path):
    lines = as_github(found).splitlines()
    assert len(lines) == len(found)
    for line, finding in zip(lines, found, strict=True):
        word = {"error": "error", "warning": "warning", "note": "notice"}[finding.severity]
        match = re.fullmatch(rf"::{word} file=([^,:]+),line=(\d+),title=([^,:]+)::(.+)", line)
        assert match is not None, line
        assert match[3] == f"{finding.code} {finding.name}"
    monkeypatch.chdir(tmp_path)
    odd = made(message="50 % of\nit", file=str(tmp_path / "a,b:c.py"), line=1)
    assert as_github(Findings((odd, made(path="")))).splitlines() == [
        "::notice file=a%2Cb%3Ac.py,line=1,title=EK101 bias-before-norm::a.b: 50 %25 of%0Ait. f",
        "::notice title=EK101 bias-before-norm::the network: m. f",
    ]
    assert as_github(Findings()) == ""


def test_what_is_unchecked_is_in_every_format_that_has_a_place_for_it():
    found = Findings(unchecked=(Unchecked(("EK306",), "give data"),), remarks=("a remark",))
    assert "not checked: EK306: give data" in str(found)
    assert str(found).endswith("a remark")
    for text in (as_json(found), as_sarif(found)):
        assert "give data" in text
