"""Studies of the user's own, from a TOML file.

::

    name = "mine"
    seeds = 8
    steps = 600
    baseline = "plain"

    [data]
    name = "mnist"
    folder = "mnist"

    [defaults]                        # fields of every arm
    model = "mypackage.nets:small"
    learning_rate = 0.05

    [[arm]]
    name = "plain"

    [[arm]]
    name = "normed"
    placement = ["before-activation", "after-activation"]   # a list: one arm for each value
"""

from __future__ import annotations

import tomllib
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .arms import Arm, Data, Plan, check_keys

__all__ = ["load_plan"]


def load_plan(path: Path) -> Plan:
    """The study that a TOML file describes.

    Raises:
        ConfigError: the file cannot be read, or a key or value in it is wrong; which, and where.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    given = values.pop("arm", [])
    defaults = values.pop("defaults", {})
    data = values.pop("data", {})
    for key in ("arms", "context"):
        if key in values:
            raise ConfigError(f"{path} has an unknown key '{key}'; arms are written as [[arm]]")
    if not isinstance(given, list) or not all(isinstance(arm, dict) for arm in given):
        raise ConfigError(f"{path}: write each arm as a table that begins with [[arm]]")
    data = {"name": data} if isinstance(data, str) else data
    for table, what in ((data, "[data]"), (defaults, "[defaults]")):
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {what} must be a table but is {table!r}")
    check_keys(data, Data, f"[data] of {path}")
    check_keys(defaults, Arm, f"[defaults] of {path}")
    check_keys(values, Plan, str(path))
    arms = [arm for table in given for arm in _spread(table, defaults, path)]
    values.setdefault("name", path.stem)
    return Plan(arms=tuple(arms), data=Data(**data), **values)


def _spread(table: dict[str, Any], defaults: dict[str, Any], path: Path) -> list[Arm]:
    """The arms of one table: one for each combination of the values given as lists."""
    check_keys(table, Arm, f"an [[arm]] of {path}")
    name = table.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{path}: every [[arm]] needs a name")
    fields = defaults | table
    lists = {key: value for key, value in fields.items() if isinstance(value, list)}
    arms: list[Arm] = []
    for combination in product(*lists.values()):
        chosen = dict(zip(lists, combination, strict=True))
        suffix = "".join(f", {key} {value}" for key, value in chosen.items())
        arms.append(Arm(**{**fields, **chosen, "name": name + suffix}))
    return arms
