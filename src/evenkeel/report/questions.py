"""The questions that people ask about batch norm, and which arms of a study bear on each.

A question looks for pairs of arms that differ in one thing only, in any study: a preset or a file
of the user's. The text beside each answer says what holds by definition; the sentence above it says
only what the study's numbers support.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..study.arms import Arm, Plan

__all__ = ["QUESTIONS", "Contrast", "Question", "differing_in"]


@dataclass(frozen=True)
class Contrast:
    """Two arms that differ in one field, and what to call them."""

    a: Arm
    b: Arm
    a_words: str
    b_words: str


@dataclass(frozen=True)
class Question:
    """A question, the contrasts that answer it, and the preset made for it."""

    number: int
    text: str
    contrasts: Callable[[Plan], list[Contrast]]
    preset: str
    background: str


Words = dict[Any, str]
Recipe = dict[str, Any]


def differing_in(plan: Plan, key: str, first: Any, second: Any) -> list[tuple[Arm, Arm]]:
    """Arms with the first and the second value of a field that agree in all else that counts."""
    recipes = [(arm, arm.recipe()) for arm in plan.arms]
    return [
        (a, b)
        for a, x in recipes
        if x.get(key) == first
        for b, y in recipes
        if y.get(key) == second and plan.steps_of(a) == plan.steps_of(b)
        if all(_agree(a, b, x, y, other) for other in (x.keys() | y.keys()) - {key, "steps"})
    ]


_USUAL = Arm("usual")


def _agree(a: Arm, b: Arm, x: Recipe, y: Recipe, key: str) -> bool:
    """True if two arms agree in a field of their recipes.

    A field of the norms that an arm without norms does not have agrees with the usual value, too.
    """
    usual = getattr(_USUAL, key)
    return bool(x.get(key, usual) == y.get(key, usual) or getattr(a, key) == getattr(b, key))


def _contrast(key: str, first: Words, second: Words) -> Callable[[Plan], list[Contrast]]:
    """Contrasts of each of the first values with each of the second."""

    def find(plan: Plan) -> list[Contrast]:
        return [
            Contrast(a, b, a_words, b_words)
            for value, a_words in first.items()
            for other, b_words in second.items()
            for a, b in differing_in(plan, key, value, other)
        ]

    return find


def _all(*finders: Callable[[Plan], list[Contrast]]) -> Callable[[Plan], list[Contrast]]:
    return lambda plan: [contrast for find in finders for contrast in find(plan)]


_BEFORE = {"before-activation": "batch norm before the activation"}
_NONE = {"none": "no norm"}
_FULL = {"all": "batch norm on every layer but the last"}


def _inputs(plan: Plan) -> list[Contrast]:
    """Normalized input against raw input, nets with batch norm first."""
    words = {
        True: ("batch norm on normalized input", "batch norm on raw input"),
        False: ("a net on normalized input", "one on raw input"),
    }
    found = [
        Contrast(a, b, *words[a.has_norm]) for a, b in differing_in(plan, "input_norm", True, False)
    ]
    return sorted(found, key=lambda contrast: not contrast.a.has_norm)


def _where(plan: Plan) -> list[Contrast]:
    """Everywhere against some places, with equal statistics."""
    find = _all(
        _contrast("every", {1: _FULL["all"]}, {2: "batch norm on every other layer"}),
        _contrast("layers", _FULL, {"conv": "batch norm on convolutions only"}),
        _contrast("layers", _FULL, {"dense": "batch norm on dense layers only"}),
        _contrast("placement", _BEFORE, {"after-pooling": "batch norm after the poolings"}),
        _contrast(
            "placement",
            {"before-activation": "batch norm before the addition"},
            {"after-addition": "batch norm after the addition"},
        ),
    )
    return find(plan)


def _small_batches(plan: Plan) -> list[Contrast]:
    """Batch norm against layer norm and against none, from the smallest batch up.

    Without a second batch size there is nothing to say about how small it may get.
    """
    find = _all(
        _contrast("statistics", {"spatial": "batch norm"}, {"layer": "layer norm"}),
        _contrast("placement", {"before-activation": "batch norm"}, _NONE),
    )
    baseline = plan.baseline_arm
    rate = baseline.learning_rate / baseline.batch_size  # per sample, kept when the batch changes
    found = [
        contrast
        for contrast in find(plan)
        if (contrast.a.activation, contrast.a.input_norm)
        == (baseline.activation, baseline.input_norm)
        and contrast.a.statistics == "spatial"
        and math.isclose(contrast.a.learning_rate / contrast.a.batch_size, rate)
    ]
    if len({contrast.a.batch_size for contrast in found}) < 2:
        return []
    return sorted(found, key=lambda contrast: contrast.a.batch_size)


QUESTIONS = (
    Question(
        1,
        "Before or after the non-linearity?",
        _contrast("placement", _BEFORE, {"after-activation": "batch norm after it"}),
        "placement",
        "The paper puts it before, on W x + b, whose distribution is the more symmetric one; the "
        "layer's bias is then redundant, for beta takes its place. At inference it folds "
        "into its layer there; after the activation it folds into the next layer, if one follows.",
    ),
    Question(
        2,
        "SPATIAL or PER_ACTIVATION, and is SPATIAL fine for dense layers?",
        _all(
            _contrast(
                "statistics",
                {"spatial": "a net with one mean per channel (SPATIAL)"},
                {"per-activation": "one with one per activation (PER_ACTIVATION)"},
            ),
            _contrast(
                "dense_statistics",
                {None: "SPATIAL on the dense layers"},
                {"per-activation": "PER_ACTIVATION on them"},
            ),
        ),
        "modes",
        "SPATIAL averages over the batch and all places of a channel, PER_ACTIVATION over the "
        "batch alone, which needs larger batches and fixes the image size.",
    ),
    Question(
        3,
        "On a convolution's output or on its input?",
        _contrast(
            "placement",
            {"before-activation": "batch norm on the layers' outputs"},
            {"on-input": "batch norm on their inputs"},
        ),
        "placement",
        "On the input it sees what the layer multiplies, after activation and pooling. The first "
        "layer's input is then normalized too. With zero padding the norm's shift does not reach "
        "the border, so a fold into the layer must mend the outputs there.",
    ),
    Question(
        4,
        "Does the backward call update gamma and beta?",
        lambda plan: [],
        "",
        "No: a backward call, cuDNN's too, returns gradients and changes nothing. The optimizer "
        "makes the step. Running statistics move in the forward call. Darknet makes the step in "
        "its update function, once for each full batch.",
    ),
    Question(
        5,
        "May BN be skipped at inference?",
        lambda plan: [],
        "quick",
        "Skipping it computes another function than the one that was trained. Folding it computes "
        "the same one: with running statistics it is a fixed scale and shift for each channel, "
        "which the layer before it absorbs.",
    ),
    Question(
        6,
        "Which axes: per channel, per activation, per location, per sample?",
        _contrast(
            "statistics",
            {"spatial": "a net with one mean per channel"},
            {
                "per-activation": "one with one per activation",
                "per-location": "one with one per location",
                "layer": "one with one per sample (layer norm)",
            },
        ),
        "modes",
        "The axes that own a statistic keep their own mean; all others are averaged. Per channel "
        "is the convention for convolutions, for all places of a map share their weights.",
    ),
    Question(
        7,
        "Normalize the input too, or does BN make it needless?",
        _inputs,
        "placement",
        "Input normalization uses one mean and deviation per channel from the training set, fixed "
        "before training. A norm on the first layer's output divides by that output's own "
        "deviation, and so undoes any scale of the input.",
    ),
    Question(
        8,
        "Where in Conv-ReLU-Pool-Conv-ReLU-Pool-FC-FC: every layer, every other, dense ones too?",
        _where,
        "placement",
        "Behind every layer but the last, whose output is the logits, is the usual answer.",
    ),
    Question(
        9,
        "How small may the batch get, and is layer norm better then?",
        _small_batches,
        "batch-size",
        "A mean over few values is noisy, and the running statistics that inference uses are "
        "averages of that noise. Layer norm takes its statistics from each sample, so the batch "
        "does not matter to it.",
    ),
    Question(
        10,
        "What do gamma and beta buy?",
        _contrast("affine", {True: "a net with gamma and beta"}, {False: "one with neither"}),
        "modes",
        "They restore what normalizing takes away: without them a sigmoid sees unit inputs only, "
        "in its nearly linear part. Before a ReLU the next layer can do gamma's work.",
    ),
)
