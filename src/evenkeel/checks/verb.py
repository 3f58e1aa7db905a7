"""`check`: a linter for batch norm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..surgery.batch_norms import unwrapped
from .findings import SEVERITIES, Finding, Findings, LayerGap, Unchecked
from .observe import Observation, observe
from .rules import CODES, RULES, Blind, Found, Rule
from .sources import Place, Sources, codes_in, project_ignores
from .weights import as_checkpoint

__all__ = ["check", "judged"]

_MOST = 1e300
"""Evidence is finite, for JSON has no word for infinity."""


def check(
    model: nn.Module,
    example: Any = None,
    data: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    checkpoint: str | Path | Mapping[str, Any] | None = None,
    ignore: Iterable[str] = (),
    *,
    origin: Any = None,
) -> Findings:
    """The mistakes with batch norm in a network, each with its place, a number and its remedy.

    The network is not changed: a copy is run, and random numbers are afterwards as before. What
    cannot be seen without an argument that is not given is listed in ``unchecked``.

    Args:
        model: any network, in the mode in which it is used: one that is about to train in training
            mode, one for inference in eval mode.
        example: an input, a tuple of inputs or a dict of inputs by name; its values hardly matter.
        data: real batches as the network gets them, shuffled: a loader or a list; of each batch the
            first entry is the input. The first 16 are used. For what only data can show.
        optimizer: the one that trains the network.
        checkpoint: weights to check the network with, a file (.safetensors, or torch's, read
            without running code) or a state dict.
        ignore: codes that are not to be told. They may also stand in a comment
            ``# evenkeel: ignore[EK101]`` in the source of a module's class, or in pyproject.toml
            under ``[tool.evenkeel]``.
        origin: the function that made the network; its source is looked at too.

    Raises:
        ConfigError: an unknown code, or data without a batch.
        FormatError: a checkpoint that cannot be read, or is of another network.
        SurgeryError: the network cannot be copied to take the checkpoint.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"check takes a torch.nn.Module but got {type(model).__name__}")
    ignored = codes_in(ignore, CODES, "ignore") | project_ignores(CODES)
    loaded = None if checkpoint is None else as_checkpoint(checkpoint)
    seen = observe(model, example, data, optimizer, loaded)
    return judged(seen, Sources(unwrapped(model), origin), ignored)


def judged(seen: Observation, sources: Sources, ignored: frozenset[str]) -> Findings:
    """All rules on an observation."""
    found: list[Finding] = []
    blind: dict[str, list[str]] = {}
    silenced: Counter[str] = Counter()
    order = _order(seen)
    for rule in RULES:
        lacking = _lacking(seen, rule)
        if lacking is not None:
            if rule.code not in ignored:
                blind.setdefault(lacking, []).append(rule.code)
            continue
        for each in rule.look(seen):
            if isinstance(each, Blind):
                blind.setdefault(each.reason, []).append(rule.code)
                continue
            place = sources.place(each.path)
            if rule.code in ignored or place.ignored & {rule.code, "*"}:
                silenced[rule.code] += 1
                continue
            found.append(_finding(rule, each, place))
    found.sort(key=lambda f: (SEVERITIES.index(f.severity), f.code, order.get(f.path, -1)))
    layers: tuple[LayerGap, ...] = ()
    if seen.measured is not None:
        late = seen.measured.at_inference
        layers = tuple(
            LayerGap(path, own.size, late[path].size if path in late else own.size)
            for path, own in seen.measured.own.items()
        )
    if not seen.norms:
        seen.remarks.append("the network has no norms")
    unchecked = tuple(Unchecked(tuple(codes), reason) for reason, codes in blind.items())
    return Findings(
        tuple(found), unchecked, tuple(sorted(silenced.items())), layers, tuple(seen.remarks)
    )


def _lacking(seen: Observation, rule: Rule) -> str | None:
    """Why a rule cannot look, or None."""
    for need in rule.needs:
        if need == "run or attempt":
            if seen.calls is None:
                return seen.lacks.get("run", "give an example input")
        elif need in seen.lacks:
            return seen.lacks[need]
    return None


def _finding(rule: Rule, found: Found, place: Place) -> Finding:
    return Finding(
        code=rule.code,
        name=rule.name,
        severity=found.severity or rule.severities[0],
        path=found.path,
        evidence=max(-_MOST, min(_MOST, float(found.evidence))),
        unit=rule.unit,
        message=found.message,
        why=rule.why,
        fix=rule.fix,
        fixable=rule.fixable and found.fixable,
        file=place.file,
        line=place.line,
    )


def _order(seen: Observation) -> dict[str, int]:
    """The place of each module in the order of the calls, or else of registration."""
    names = dict.fromkeys(
        str(n.target) for n in (seen.trains.nodes if seen.trains is not None else ())
    )
    names |= dict.fromkeys(seen.norms)
    return {name: place for place, name in enumerate(names)}
