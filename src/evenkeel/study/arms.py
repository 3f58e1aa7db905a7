"""What a study compares: arms, and the plan that holds them.

An `Arm` is one complete recipe, from network to optimizer; a `Plan` is arms, data, seeds and
budget. Both are plain frozen data: equal recipes have equal keys, and that is how a finished trial
is found again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, PatternError, meant
from ..pattern import parse
from ..surgery.introduce import LAYER_KINDS, PLACEMENTS, STATISTICS
from .data import NAMES as DATA_NAMES
from .models import ACTIVATIONS, MODELS

__all__ = ["Arm", "Data", "Plan", "check_keys"]


@dataclass(frozen=True)
class Arm:
    """One recipe. Two arms that differ in the name alone are the same recipe.

    Attributes:
        name: shown in reports.
        model: one of `MODELS`, or ``package.module:factory``.
        activation: of the built-in networks: relu, sigmoid or leaky_relu.
        placement: 'none', or one of `PLACEMENTS`.
        statistics, dense_statistics: one of `STATISTICS` or a pattern, for convolutional and for
            dense values; dense ones are 'spatial' by default ('layer' with 'layer').
        layers: 'all', 'conv' or 'dense': where norms may go.
        every: 1 for every place, 2 for every other one.
        affine: gamma and beta or not.
        input_norm: inputs shifted and scaled by the training set's mean and deviation per channel.
        learning_rate, batch_size, optimizer, options: ``torch.optim`` class and its options.
        weight_decay: on the weights; on gamma and beta only with ``decay_norm``.
        steps: training steps; None for the plan's.
        bn_momentum, eps: of the norms; momentum is the weight of the new value.
    """

    name: str
    model: str = "standard"
    activation: str = "relu"
    placement: str = "none"
    statistics: str = "spatial"
    dense_statistics: str | None = None
    layers: str = "all"
    every: int = 1
    affine: bool = True
    input_norm: bool = True
    learning_rate: float = 0.05
    batch_size: int = 32
    optimizer: str = "SGD"
    options: Mapping[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    decay_norm: bool = False
    steps: int | None = None
    bn_momentum: float = 0.1
    eps: float = 1e-5

    def __post_init__(self) -> None:
        what = f"arm '{self.name}'"
        _check_types(self, what)
        _check_choice(self, "placement", ("none", *PLACEMENTS))
        _check_choice(self, "layers", LAYER_KINDS)
        if ":" in self.model:
            object.__setattr__(self, "activation", "relu")  # not the arm's to choose
        else:
            _check_choice(self, "model", MODELS)
        _check_choice(self, "activation", ACTIVATIONS)
        for key in ("statistics", "dense_statistics"):
            _check_statistics(self, key)
        _check_bounds(self, what, {"every": 1, "batch_size": 1, "steps": 1})
        _check_bounds(self, what, {"learning_rate": 0, "weight_decay": 0, "eps": 0})

    @property
    def has_norm(self) -> bool:
        """True for an arm with norms."""
        return self.placement != "none"

    def recipe(self) -> dict[str, Any]:
        """Everything that decides the outcome: all but the name, and nothing without effect."""
        values = asdict(self)
        del values["name"]
        if not self.has_norm:
            for key in ("statistics", "dense_statistics", "layers", "every", "affine"):
                del values[key]
            for key in ("decay_norm", "bn_momentum", "eps"):
                del values[key]
        return values

    def difference(self, other: Arm) -> dict[str, tuple[Any, Any]]:
        """The fields, besides the name, in which two arms differ."""
        mine, theirs = asdict(self), asdict(other)
        return {
            key: (value, theirs[key])
            for key, value in mine.items()
            if key != "name" and value != theirs[key]
        }


@dataclass(frozen=True)
class Data:
    """Which data set, and how its images are read.

    Attributes:
        name: one of the loaders' names.
        folder: where its files are; None to download (or, for digits, nothing).
        image_size: for a folder of images.
        binary: pixels above half intensity are 1, the rest 0, as in the paper's section 4.1.
        train_limit: use only so many training images, the first ones.
    """

    name: str = "digits"
    folder: str | None = None
    image_size: int | None = None
    binary: bool = False
    train_limit: int | None = None

    @property
    def path(self) -> Path | None:
        """The folder as a path."""
        return None if self.folder is None else Path(self.folder)

    def __post_init__(self) -> None:
        _check_types(self, "the data")
        _check_bounds(self, "the data", {"image_size": 1, "train_limit": 1})
        if self.name not in DATA_NAMES:
            raise ConfigError(
                f"unknown data '{self.name}'{meant(self.name, DATA_NAMES)}; choose one of "
                f"{', '.join(DATA_NAMES)}"
            )


@dataclass(frozen=True)
class Plan:
    """A study: arms times seeds on one data set.

    Attributes:
        name: names the folder of the run.
        arms: the recipes, each name once.
        data: the data set.
        seeds: trials run with the seeds 0 .. seeds - 1; a seed sets the initial weights and the
            order of the data, the same for every arm.
        steps: training steps of an arm that does not say.
        points: how often the test accuracy is taken along the way.
        curve_limit: how many test images those points use; the last one uses all.
        target: the accuracy whose first reaching is counted in steps.
        baseline: the arm that the others are compared with.
        context: what the outcome depends on beyond the plan, found out when a run begins: the
            version of evenkeel, the fingerprints of the data and of the user's own network.
    """

    name: str
    arms: tuple[Arm, ...]
    data: Data = field(default_factory=Data)
    seeds: int = 5
    steps: int = 400
    points: int = 20
    curve_limit: int = 2000
    target: float = 0.95
    baseline: str = ""
    context: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        what = f"study '{self.name}'"
        _check_types(self, what)
        _check_bounds(self, what, {"seeds": 1, "steps": 1, "points": 1, "curve_limit": 1})
        names = [arm.name for arm in self.arms]
        if not names:
            raise ConfigError(f"study '{self.name}' has no arms; add an [[arm]]")
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ConfigError(f"study '{self.name}' has two arms named '{min(twice)}'")
        if not self.baseline:
            object.__setattr__(self, "baseline", names[0])
        if self.baseline not in names:
            raise ConfigError(
                f"the baseline '{self.baseline}' of study '{self.name}' is no arm"
                f"{meant(self.baseline, names)}"
            )

    @property
    def baseline_arm(self) -> Arm:
        """The arm that the others are compared with."""
        return next(arm for arm in self.arms if arm.name == self.baseline)

    @property
    def trials(self) -> list[tuple[Arm, int]]:
        """Every (arm, seed), seed by seed, so that an unfinished study has whole comparisons."""
        return [(arm, seed) for seed in range(self.seeds) for arm in self.arms]

    def steps_of(self, arm: Arm) -> int:
        """How many steps the arm trains for."""
        return self.steps if arm.steps is None else arm.steps

    def key(self, arm: Arm) -> str:
        """Names everything that decides the outcome of the arm's trials, the seed apart."""
        wanted = ("data", "version", arm.model)
        data = asdict(self.data)
        del data["folder"]
        what = {
            "recipe": arm.recipe() | {"steps": self.steps_of(arm)},
            "data": data,
            "points": self.points,
            "curve_limit": self.curve_limit,
            "context": {k: v for k, v in self.context.items() if k in wanted},
        }
        text = json.dumps(what, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The plan as text, read back by `from_json`."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote."""
        values = json.loads(text)
        arms = tuple(Arm(**arm) for arm in values.pop("arms"))
        return cls(arms=arms, data=Data(**values.pop("data")), **values)

    def on(self, **changes: Any) -> Plan:
        """The plan with some fields changed; None leaves a field as it is."""
        return replace(self, **{key: value for key, value in changes.items() if value is not None})

    def adapted(
        self,
        *,
        data: str | None = None,
        folder: Path | None = None,
        image_size: int | None = None,
        model: str | None = None,
        steps: int | None = None,
        seeds: int | None = None,
    ) -> Plan:
        """The plan on other data or another network; None leaves things as they are.

        Arms that the change makes equal (a network of the user's has its own activations) are kept
        once. ``steps`` scales the arms that have a number of their own alike.
        """
        arms = self.arms
        if steps is not None:
            share = steps / self.steps
            arms = tuple(
                arm if arm.steps is None else replace(arm, steps=max(1, round(arm.steps * share)))
                for arm in arms
            )
        if model is not None:
            arms = _without_twins(replace(arm, model=model) for arm in arms)
        source = self.data
        if data is not None and data != source.name:
            source = replace(source, name=data, folder=None)
        if folder is not None:
            source = replace(source, folder=str(folder.expanduser().resolve()))
        if image_size is not None:
            source = replace(source, image_size=image_size)
        kept = {arm.name for arm in arms}
        baseline = self.baseline if self.baseline in kept else arms[0].name
        return self.on(arms=arms, data=source, steps=steps, seeds=seeds, baseline=baseline)

    @property
    def folder_name(self) -> str:
        """What a run of the plan is called among the runs."""
        return f"{self.name}-{self.data.name}"


def check_keys(given: Iterable[str], kind: type[Any], where: str) -> None:
    """Raises ConfigError if a key is no field of a dataclass."""
    names = [f.name for f in fields(kind)]
    for key in given:
        if key not in names:
            raise ConfigError(
                f"{where} has an unknown key '{key}'{meant(key, names)}; keys are "
                f"{', '.join(names)}"
            )


_PLAIN: Mapping[str, Any] = {
    "int": int, "str": str, "bool": bool, "float": (int, float), "Mapping[str, Any]": dict,
    "int | None": (int, type(None)), "str | None": (str, type(None)),
}  # fmt: skip


def _check_types(thing: Any, what: str) -> None:
    """Raises ConfigError if a field of a dataclass, read from a file perhaps, has a wrong type."""
    for f in fields(thing):
        value, wanted = getattr(thing, f.name), _PLAIN.get(str(f.type), object)
        if not isinstance(value, wanted) or (isinstance(value, bool) and str(f.type) != "bool"):
            raise ConfigError(f"{what}: {f.name} must be {f.type} but is {value!r}")


def _check_bounds(thing: Any, what: str, bounds: Mapping[str, int]) -> None:
    for key, bound in bounds.items():
        value = getattr(thing, key)
        if value is not None and not value >= bound:
            raise ConfigError(f"{what}: {key} is {value}; give {bound} or more")


def _check_choice(arm: Arm, key: str, choices: Iterable[str]) -> None:
    value = getattr(arm, key)
    if value not in choices:
        raise ConfigError(
            f"arm '{arm.name}': unknown {key} '{value}'{meant(value, choices)}; choose one of "
            f"{', '.join(choices)}"
        )


def _check_statistics(arm: Arm, key: str) -> None:
    value = getattr(arm, key)
    if value is None or value in STATISTICS:
        return
    if "->" not in value:
        _check_choice(arm, key, STATISTICS)
    try:
        parse(value)
    except PatternError as error:
        raise ConfigError(f"arm '{arm.name}': {error}") from error


def _without_twins(arms: Iterable[Arm]) -> tuple[Arm, ...]:
    """The arms, of those with equal recipes the first only."""
    kept: dict[str, Arm] = {}
    for arm in arms:
        kept.setdefault(json.dumps(arm.recipe(), sort_keys=True), arm)
    return tuple(kept.values())
