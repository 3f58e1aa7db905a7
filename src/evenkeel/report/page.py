"""The page: one HTML file that needs no network."""

from __future__ import annotations

import json

from .build import Report

__all__ = ["render"]


def render(report: Report) -> str:
    """The report as one self-contained HTML page."""
    return f"<!doctype html><title>{report.name}</title><pre>{json.dumps(report.to_dict())}</pre>"
