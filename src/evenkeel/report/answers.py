"""An answer to each question: the sentence that this study's numbers support, and its evidence."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..study.arms import Arm, Plan
from ..study.presets import PRESETS
from ..study.trial import Trial
from .demonstration import BackwardFacts, ModeFacts, backward_facts, mode_facts
from .numbers import Comparison, Interval, as_family, compare_arms, comparison, interval
from .questions import QUESTIONS, Contrast, Question
from .wording import Evidence, context, evidence, percent, points, probability

__all__ = ["Answer", "FourWays", "answers", "best_of", "four_ways"]


@dataclass(frozen=True)
class FourWays:
    """An arm's test accuracy in the four ways of inference.

    Attributes:
        arm: its name.
        running, batch, skipped, folded: accuracy with running statistics, with those of each test
            batch, without the norms, and with the norms folded.
        drop: running minus skipped, on matched seeds.
        folded_norms, left_norms: how many norms the fold removed and how many it had to leave.
        left_reason: why the first of those stays; empty if none does.
        difference, relative: the largest difference of a logit that folding made in any trial, and
            the same over the largest logit of that trial.
        same: whether the folded network was as accurate in every trial.
    """

    arm: str
    running: Interval
    batch: Interval
    skipped: Interval
    folded: Interval
    drop: Comparison | None
    folded_norms: int
    left_norms: int
    left_reason: str
    difference: float
    relative: float
    same: bool


@dataclass(frozen=True)
class Answer:
    """What a study says to one question.

    Attributes:
        verdict: 'answered', 'exact' (true by computation, whatever the study) or 'cannot tell'.
        sentence: the headline.
        evidence: the comparisons behind it, the headline's first.
        next_step: what would tell, where the study cannot.
        background: what holds by definition.
    """

    number: int
    question: str
    verdict: str
    sentence: str
    evidence: tuple[Evidence, ...]
    next_step: str
    background: str
    backward: BackwardFacts | None = None
    modes: ModeFacts | None = None
    inference: FourWays | None = None


def answers(plan: Plan, trials: Sequence[Trial]) -> list[Answer]:
    """An answer to every question; each question's comparisons are one Holm family."""
    return [_answer(plan, trials, question) for question in QUESTIONS]


def _evidence(plan: Plan, trials: Sequence[Trial], contrasts: Sequence[Contrast]) -> list[Evidence]:
    """The contrasts that the trials can compare, in words."""
    tried = [(c, compare_arms(plan, trials, c.a, c.b)) for c in contrasts]
    compared = [(c, found) for c, found in tried if found is not None]
    several = len({c.a.activation for c, _ in compared}) > 1
    usual = _usual(plan)
    return [
        evidence(
            found,
            c.a_words,
            c.b_words,
            context(c.a, c.b, usual, name_activation=several),
            plan.target,
        )
        for (c, _), found in zip(compared, as_family([f for _, f in compared]), strict=True)
    ]


def _usual(plan: Plan) -> Arm:
    """The baseline with a norm in the usual place: what a sentence need not mention."""
    return replace(plan.baseline_arm, placement="before-activation")


def _answer(plan: Plan, trials: Sequence[Trial], q: Question) -> Answer:
    if q.number == 4:
        facts = backward_facts()
        return Answer(4, q.text, "exact", _backward_sentence(facts), (), "", q.background, facts)
    if q.number == 5:
        return _inference_answer(plan, q, best_of(plan, trials))
    contrasts = q.contrasts(plan)
    found = _evidence(plan, trials, contrasts)
    sentence = found[0].sentence if found else _nothing(contrasts)
    verdict = "cannot tell" if not found or found[0].verdict == "unclear" else "answered"
    modes = mode_facts() if q.number == 2 else None
    if modes is not None:
        sentence += " " + _modes_sentence(modes)
    return Answer(
        q.number,
        q.text,
        verdict,
        sentence,
        tuple(found),
        _next_step(plan, q, contrasts, found[0] if found else None)
        if verdict == "cannot tell"
        else "",
        q.background,
        modes=modes,
    )


def _nothing(contrasts: Sequence[Contrast]) -> str:
    if contrasts:
        return "This study has arms that differ in this alone, but no two finished seeds of both."
    return "This study has no arms that differ in this alone."


def _next_step(
    plan: Plan, q: Question, contrasts: Sequence[Contrast], found: Evidence | None
) -> str:
    """What would tell."""
    if found is None and contrasts:
        return "More finished trials of these arms."
    if found is None:
        return f"Run: {_command(plan, q.preset)}"
    seeds = found.comparison.seeds_to_tell()
    if seeds is None or seeds > 500:
        return (
            "The difference is so small that no affordable number of seeds would show it; a harder "
            "data set might (--data cifar10)."
        )
    wanted = max(seeds, plan.seeds + 1)
    name = q.preset if plan.name == "quick" else plan.name
    command = f": {_command(plan, name)} --seeds {wanted}" if name in PRESETS else "."
    return f"About {wanted} seeds would show a difference of this size{command}"


def _command(plan: Plan, name: str) -> str:
    """Runs a preset on the plan's data and on the user's network."""
    words = ["evenkeel", "study", "--preset", name]
    if plan.data.name != PRESETS[name]().data.name:
        words += ["--data", plan.data.name]
    if plan.data.folder is not None:
        words += ["--data-dir", plan.data.folder]
    if plan.data.image_size is not None:
        words += ["--image-size", str(plan.data.image_size)]
    if ":" in plan.baseline_arm.model:
        words += ["--model", plan.baseline_arm.model]
    return shlex.join(words)


def _backward_sentence(facts: BackwardFacts) -> str:
    if facts.parameters_moved or facts.statistics_moved:
        return "The backward call changed parameters or statistics: this is a bug in evenkeel."
    return (
        f"No: the backward call returned dgamma = {_numbers(facts.dgamma)} and left gamma at "
        f"{_numbers(facts.gamma)}, beta and the running statistics as they were, bit for bit. "
        f"Only the explicit step gamma - {facts.learning_rate:g} * dgamma moved it, to "
        f"{_numbers(facts.gamma_stepped)}."
    )


def _modes_sentence(facts: ModeFacts) -> str:
    if facts.dense != 0 or facts.dense_as_image != 0:
        return "SPATIAL and PER_ACTIVATION differ on a dense layer: this is a bug in evenkeel."
    return (
        "On a dense layer's (n, c), or (n, c, 1, 1), the two are the same computation to the last "
        f"bit; with the units laid out as pixels, (n, 1, 1, c), SPATIAL takes one mean for all "
        f"units, and the results differ by up to {facts.units_as_pixels:.1f}."
    )


def _inference_answer(plan: Plan, q: Question, ways: FourWays | None) -> Answer:
    if ways is None or ways.drop is None:
        step = f"Run: {_command(plan, q.preset)}"
        text = "This study has no trained batch norm to skip, or too few seeds."
        return Answer(5, q.text, "cannot tell", text, (), step, q.background, inference=ways)
    known = ways.drop.differs
    step = "" if known else "More seeds would tell."
    verdict = "answered" if known else "cannot tell"
    sentence = f"{_skipping(ways, ways.drop)} {_folding(ways)}"
    return Answer(5, q.text, verdict, sentence, (), step, q.background, inference=ways)


def _skipping(ways: FourWays, drop: Comparison) -> str:
    """What leaving the norms out does."""
    loss = drop.accuracy
    known = drop.differs
    start = "This study cannot tell"
    if known:
        start = "No" if loss.mean > 0 else "Here it did no harm"
    what, sign = ("a loss", 1) if loss.mean >= 0 else ("a gain", -1)
    ends = (loss.mean if end is None else end for end in (loss.low, loss.high))
    low, high = sorted(100 * sign * end for end in ends)
    return (
        f"{start}: without its norms '{ways.arm}' goes from {percent(ways.running.mean)} to "
        f"{percent(ways.skipped.mean)}, {what} of {points(abs(loss.mean))} (95 % interval "
        f"{low:.1f} to {high:.1f}, {probability(drop.p_corrected)})."
    )


def _folding(ways: FourWays) -> str:
    """What folding them does."""
    if ways.folded_norms == 0:
        return f"Its norms do not fold: {ways.left_reason}."
    equal = "exactly as accurate in every trial" if ways.same else percent(ways.folded.mean)
    return (
        f"With {ways.folded_norms} of {ways.folded_norms + ways.left_norms} norms folded into "
        f"the layers around them it is {equal}; the largest difference of a logit is "
        f"{ways.difference:.1e}, {ways.relative:.1e} of the largest logit."
    )


def four_ways(plan: Plan, trials: Sequence[Trial]) -> list[FourWays]:
    """The four ways for each arm with norms that have running statistics."""
    names = [arm.name for arm in plan.arms if arm.statistics != "layer"]
    owned = [(name, [t for t in trials if t.arm == name and t.inference]) for name in names]
    return [_four_ways_of(name, own) for name, own in owned if own]


def best_of(plan: Plan, trials: Sequence[Trial]) -> FourWays | None:
    """The most accurate arm among those whose norms all fold; if none does, among all."""
    ways = four_ways(plan, trials)
    return max(ways, key=lambda w: (w.left_norms == 0, w.running.mean), default=None)


def _four_ways_of(name: str, own: Sequence[Trial]) -> FourWays:
    ways = {
        way: [float(trial.inference[way]) for trial in own]
        for way in ("running", "batch", "skipped", "folded")
    }
    folds = [trial.inference["fold"] for trial in own]
    left = folds[0]["left"]
    pairs = list(zip(ways["running"], ways["skipped"], strict=True))
    return FourWays(
        arm=name,
        **{way: interval(values) for way, values in ways.items()},
        drop=as_family([comparison(name, f"{name}, skipped", pairs)])[0] if pairs[1:] else None,
        folded_norms=len(folds[0]["folded"]),
        left_norms=len(left),
        left_reason=left[0][1] if left else "",
        difference=max(fold["difference"] for fold in folds),
        relative=max(fold["difference"] / (fold["scale"] or 1) for fold in folds),
        same=ways["running"] == ways["folded"],
    )


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
