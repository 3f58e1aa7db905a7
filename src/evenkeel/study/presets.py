"""The built-in studies. Each answers some of the questions that people ask; `quick` touches all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..errors import ConfigError, meant
from .arms import Arm, Data, Plan

__all__ = ["PRESETS", "preset"]

_MOMENTUM = {"momentum": 0.9}
NONE = Arm("no norm", learning_rate=0.02, options=_MOMENTUM)
BEFORE = replace(NONE, name="before activation", placement="before-activation")


def _placements() -> tuple[Arm, ...]:
    """The places that a norm can have in one network."""
    return (
        BEFORE,
        replace(BEFORE, name="after activation", placement="after-activation"),
        replace(BEFORE, name="on input of layers", placement="on-input"),
        replace(BEFORE, name="after pooling", placement="after-pooling"),
    )


def _extents() -> tuple[Arm, ...]:
    """How many of the places get a norm."""
    return (
        replace(BEFORE, name="every other layer", every=2),
        replace(BEFORE, name="convolutions only", layers="conv"),
        replace(BEFORE, name="dense layers only", layers="dense"),
    )


def _statistics() -> tuple[Arm, ...]:
    """Which axes own a statistic."""
    return (
        replace(BEFORE, name="per activation", statistics="per-activation"),
        replace(BEFORE, name="per location", statistics="per-location"),
        replace(BEFORE, name="layer norm", statistics="layer"),
        replace(BEFORE, name="dense per activation", dense_statistics="per-activation"),
    )


def _at_rates(rates: Mapping[str, float], *arms: Arm) -> tuple[Arm, ...]:
    return tuple(
        replace(arm, name=f"{arm.name}, lr {text}", learning_rate=rate)
        for text, rate in rates.items()
        for arm in arms
    )


def _at_batches(sizes: Mapping[int, int], *arms: Arm) -> tuple[Arm, ...]:
    """Arms at batch sizes, each with its steps; the learning rate scales with the batch."""
    return tuple(
        replace(
            arm,
            name=f"{arm.name}, batch {size}",
            batch_size=size,
            steps=steps,
            learning_rate=arm.learning_rate * size / arm.batch_size,
        )
        for size, steps in sizes.items()
        for arm in arms
    )


def quick() -> Plan:
    """Every question, on the embedded digits, in under three minutes on two cores."""
    layer = replace(BEFORE, name="layer norm", statistics="layer")
    sigmoid = replace(NONE, name="sigmoid", activation="sigmoid", learning_rate=0.1)
    with_sigmoid = replace(sigmoid, name="sigmoid, before", placement="before-activation")
    arms = (
        NONE,
        *_placements(),
        *_extents(),
        *_statistics(),
        replace(BEFORE, name="no gamma and beta", affine=False),
        replace(NONE, name="no norm, raw input", input_norm=False),
        replace(BEFORE, name="before activation, raw input", input_norm=False),
        sigmoid,
        with_sigmoid,
        replace(with_sigmoid, name="sigmoid, after", placement="after-activation"),
        replace(with_sigmoid, name="sigmoid, no gamma and beta", affine=False),
        *_at_rates({"0.2": 0.2}, NONE, BEFORE),
        *_at_batches({2: 800}, NONE, BEFORE, layer),
    )
    return Plan("quick", arms, seeds=7, steps=300, points=20, target=0.95, curve_limit=450)


def placement() -> Plan:
    """Every placement and extent, with ReLU, leaky ReLU and sigmoid, input normalized and not."""
    kinds = {"": NONE}
    kinds["leaky, "] = replace(NONE, activation="leaky_relu")
    kinds["sigmoid, "] = replace(NONE, activation="sigmoid", learning_rate=0.1)
    arms = [
        replace(
            arm,
            name=prefix + arm.name,
            activation=kind.activation,
            learning_rate=kind.learning_rate,
        )
        for prefix, kind in kinds.items()
        for arm in (NONE, *_placements(), *_extents())
    ]
    arms += [
        replace(NONE, name="no norm, raw input", input_norm=False),
        *(replace(arm, name=f"{arm.name}, raw input", input_norm=False) for arm in _placements()),
    ]
    return Plan("placement", tuple(arms), seeds=10, steps=400)


def modes() -> Plan:
    """Which axes: spatial, per activation, per location, layer; and one statistic for all units."""
    shared = replace(BEFORE, name="dense: one for all units", dense_statistics="n c ->")
    arms = (
        NONE,
        BEFORE,
        *_statistics(),
        shared,
        replace(BEFORE, name="no gamma and beta", affine=False),
        *(
            replace(a, name=f"{a.name}, after activation", placement="after-activation")
            for a in (BEFORE, *_statistics()[:3])
        ),
    )
    return Plan("modes", arms, seeds=10, steps=400)


def paper() -> Plan:
    """The paper's section 4.1: three layers of 100 sigmoids, binary input, batches of 60."""
    plain = Arm("no norm", "paper", "sigmoid", input_norm=False, batch_size=60)
    normed = replace(plain, name="batch norm", placement="before-activation")
    rates = {"0.05": 0.05, "0.1": 0.1, "0.5": 0.5}
    return Plan(
        "paper",
        _at_rates(rates, plain, normed),
        Data("mnist", binary=True),
        seeds=5,
        steps=20_000,
        points=100,
        target=0.94,
        curve_limit=10_000,
        baseline="no norm, lr 0.1",
    )


def batch_size() -> Plan:
    """How small the batch may get, against layer norm and no norm."""
    layer = replace(BEFORE, name="layer norm", statistics="layer")
    sizes = {2: 3000, 4: 1500, 8: 1000, 16: 600, 32: 400, 128: 200}
    arms = _at_batches(sizes, NONE, BEFORE, layer)
    return Plan("batch-size", arms, seeds=8, steps=400, baseline="no norm, batch 32")


def learning_rate() -> Plan:
    """Which learning rates work with and without batch norm."""
    rates = {str(r): r for r in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)}
    after = replace(BEFORE, name="after activation", placement="after-activation")
    arms = _at_rates(rates, NONE, BEFORE, after)
    return Plan("learning-rate", arms, seeds=6, steps=400, baseline="no norm, lr 0.02")


def residual() -> Plan:
    """Where batch norm goes in a residual block."""
    plain = replace(NONE, name="no norm", model="residual")
    first = replace(plain, name="BN before the addition", placement="before-activation")
    arms = (
        plain,
        first,
        replace(first, name="BN after the addition", placement="after-addition"),
        replace(
            first, name="full pre-activation", model="residual-pre", placement="after-addition"
        ),
        replace(first, name="BN after the activation", placement="after-activation"),
    )
    return Plan("residual", arms, seeds=8, steps=400)


PRESETS: dict[str, Callable[[], Plan]] = {
    "quick": quick,
    "placement": placement,
    "modes": modes,
    "paper": paper,
    "batch-size": batch_size,
    "learning-rate": learning_rate,
    "residual": residual,
}


def preset(name: str) -> Plan:
    """The built-in study of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"unknown preset '{name}'{meant(name, PRESETS)}; choose one of {', '.join(PRESETS)}"
        )
    return PRESETS[name]()
