"""Findings for machines: JSON, SARIF 2.1.0 for code scanners, annotations for GitHub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from .. import __version__
from .findings import Finding, Findings, relative
from .rules import RULES

__all__ = ["FORMATS", "as_github", "as_json", "as_sarif"]

_SCHEMA: Final = "https://json.schemastore.org/sarif-2.1.0.json"
_ANNOTATIONS: Final = {"error": "error", "warning": "warning", "note": "notice"}


def as_json(findings: Findings) -> str:
    """The findings as they are, see `Findings.to_dict`."""
    return json.dumps(findings.to_dict(), indent=1)


def as_sarif(findings: Findings) -> str:
    """A log of one run in SARIF 2.1.0, with every rule's text."""
    used = {finding.code for finding in findings}
    rules = [rule for rule in RULES if rule.code in used]
    index = {rule.code: place for place, rule in enumerate(rules)}
    driver = {
        "name": "evenkeel",
        "version": __version__,
        "rules": [
            {
                "id": rule.code,
                "name": _camel(rule.name),
                "shortDescription": {"text": rule.name.replace("-", " ")},
                "fullDescription": {"text": rule.why},
                "help": {"text": rule.fix},
                "defaultConfiguration": {"level": rule.severities[0]},
            }
            for rule in rules
        ],
    }
    notes = [
        {"level": "note", "message": {"text": f"{', '.join(u.codes)} not checked: {u.reason}"}}
        for u in findings.unchecked
    ]
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": True, "toolExecutionNotifications": notes}],
        "results": [_result(finding, index[finding.code]) for finding in findings],
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1)


def as_github(findings: Findings) -> str:
    """One workflow command for each finding: GitHub shows it beside the line."""
    lines = []
    for f in findings:
        where = {} if f.file is None else {"file": relative(f.file), "line": str(f.line)}
        given = where | {"title": f"{f.code} {f.name}"}
        told = ",".join(f"{key}={_escaped(value, ':,')}" for key, value in given.items())
        text = _escaped(f"{f.place}: {f.message}. {f.fix}")
        lines.append(f"::{_ANNOTATIONS[f.severity]} {told}::{text}")
    return "\n".join(lines)


FORMATS: Final[dict[str, Callable[[Findings], str]]] = {
    "text": str,
    "json": as_json,
    "sarif": as_sarif,
    "github": as_github,
}
"""What writes each format."""


def _result(finding: Finding, index: int) -> dict[str, Any]:
    location: dict[str, Any] = {
        "logicalLocations": [{"fullyQualifiedName": finding.path, "kind": "member"}]
    }
    if not finding.path:
        location["logicalLocations"] = [{"name": "the network", "kind": "module"}]
    if finding.file is not None:
        location["physicalLocation"] = {
            "artifactLocation": {"uri": _uri(finding.file)},
            "region": {"startLine": finding.line or 1},
        }
    return {
        "ruleId": finding.code,
        "ruleIndex": index,
        "level": finding.severity,
        "message": {"text": f"{finding.place}: {finding.message}. {finding.fix}"},
        "locations": [location],
        "partialFingerprints": {"evenkeel/v1": f"{finding.code}:{finding.path}"},
        "properties": {
            "evidence": finding.evidence,
            "unit": finding.unit,
            "fixable": finding.fixable,
        },
    }


def _uri(file: str) -> str:
    path = relative(file)
    return Path(path).as_uri() if Path(path).is_absolute() else quote(path)


def _escaped(text: str, also: str = "") -> str:
    for letter in ("%", "\r", "\n", *also):
        text = text.replace(letter, f"%{ord(letter):02X}")
    return text


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("-"))
