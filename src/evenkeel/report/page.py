"""The page: one HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from plotly.offline import get_plotlyjs

from .boxes import box
from .build import Report
from .figures import figures
from .frame import frame
from .markup import escape, prose, table
from .plots import Figure
from .tables import arms, recipe, trials
from .wording import percent

__all__ = ["render"]

_NETWORKS = {
    "standard": "Conv-ReLU-Pool-Conv-ReLU-Pool-FC-FC",
    "paper": "three dense layers of 100 units, the paper's network for MNIST",
    "lenet5": "LeNet-5",
    "residual": "a small residual net",
    "residual-pre": "a small residual net with pre-activation blocks",
}
_ACTIVATIONS = {"relu": "ReLU", "leaky_relu": "leaky ReLU", "sigmoid": "sigmoid"}
_SECTIONS = (
    ("figures", "Figures"),
    ("arms", "All arms"),
    ("trials", "All trials"),
    ("numbers", "How the numbers are made"),
    ("provenance", "Provenance"),
)
_ORIGINS = {"data": "fingerprint of the data", "threads": "threads of a trial"}
_METHOD = (
    "Every arm is trained with the same seeds: equal seeds give equal initial weights and an "
    "equal order of the data, so that arms are compared pair by pair.",
    "Intervals are 95 % bootstrap intervals of the mean over seeds (percentile method, 10,000 "
    "resamples). P-values are of paired t tests, corrected by Holm within each question, and for "
    "the table of arms within the table, so that the chance of any false alarm there stays below "
    "5 %.",
    "'Better' and 'worse' say how the first of two compared does in final accuracy, 'faster' and "
    "'slower' how it does in steps to the target alone. 'Alike' is a claim too: the difference is "
    "less than half a point, by two one-sided tests. 'Unclear' means that this study cannot tell. "
    "The small drawings show each difference with its interval; the grey zone is half a point.",
    "Accuracy is of test images. A trial that never reached the target counts with all its steps, "
    "so that ratios of steps are cautious. A trial whose loss stops being finite has diverged; it "
    "counts with the accuracy that it had.",
)


def render(report: Report) -> str:
    """The report as one self-contained HTML page."""
    drawn = figures(report)
    scripts = [get_plotlyjs(), _asset("page.js")]
    title = f"Study '{report.name}' on {report.data}"
    body = "\n".join(
        [
            '<a class="skip" href="#answers">Skip to the answers</a>',
            _header(report),
            _contents(report),
            "<main>",
            _answers(report),
            _figures(drawn),
            _section("arms", _arms(report)),
            _section("trials", table(trials(report))),
            _section("numbers", "\n".join(f"<p>{prose(text)}</p>" for text in _METHOD)),
            _section("provenance", _provenance(report)),
            "</main>",
            '<p id="said" class="hidden" role="status" aria-live="polite"></p>',
            *(f"<script>{script}</script>" for script in scripts),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} \u00b7 evenkeel</title>\n"
        f'<link rel="icon" href="data:,">\n<style>\n{_asset("page.css")}</style>\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def _policy(scripts: list[str]) -> str:
    """Nothing from the network, and no script but the page's own, whatever a name may hold."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    own = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {own}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _header(report: Report) -> str:
    facts = "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{prose(value)}</dd></div>"
        for name, value in _facts(report)
    )
    return (
        f'<header>\n<p class="kicker">evenkeel \u00b7 batch normalization, studied</p>\n'
        f"<h1>Study \u2018{escape(report.name)}\u2019 on {escape(report.data)}</h1>\n"
        f'<p class="lead">{_lead(report)}</p>\n{_notes(report)}'
        f'<dl class="facts">\n{facts}\n</dl>\n</header>'
    )


def _lead(report: Report) -> str:
    if report.lead is not None:
        return prose(report.lead.sentence)
    return prose(
        "This study has no two arms, with at least two seeds in common, of which one has batch "
        "norm before the activation and the other has none, all else equal."
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    recipes = report.recipes.values()
    models = list(dict.fromkeys(str(each["model"]) for each in recipes))
    activations = list(dict.fromkeys(str(each["activation"]) for each in recipes))
    budgets = sorted({int(each["steps"]) for each in recipes})
    steps = f"{budgets[0]:,}" + (f" to {budgets[-1]:,}" if len(budgets) > 1 else "")
    facts = [
        ("Network", "; ".join(_NETWORKS.get(model, model) for model in models)),
        ("Data", report.data),
        ("Arms", f"{len(report.recipes)} \u00d7 {report.seeds} seeds = {report.planned} trials"),
        ("Training", f"{steps} steps each"),
        ("Target", f"{percent(report.target, 0)} test accuracy"),
        ("Baseline", report.baseline),
    ]
    if any(model in _NETWORKS for model in models):
        words = ", ".join(_ACTIVATIONS.get(each, each) for each in activations)
        facts.insert(1, ("Activations", words))
    return facts


def _notes(report: Report) -> str:
    notes: list[str] = []
    if report.finished < report.planned:
        notes.append(
            f"{report.finished} of {report.planned} trials are done; everything below rests on "
            "those. To go on: evenkeel study --resume"
        )
    counts = [
        f"{count} {status}"
        for status in ("diverged", "failed")
        if (count := sum(row.status == status for row in report.rows))
    ]
    if counts:
        notes.append(f"Of {report.finished} trials, {' and '.join(counts)}: see the trials.")
    return "".join(f'<p class="note">{prose(note)}</p>\n' for note in notes)


def _contents(report: Report) -> str:
    questions = "\n".join(
        f'<li><a href="#q{each.number}"><span class="dot {each.verdict.replace(" ", "-")}">'
        f'</span><span>{escape(each.question)}<span class="hidden">: {escape(each.verdict)}'
        "</span></span></a></li>"
        for each in report.answers
    )
    sections = "\n".join(f'<li><a href="#{key}">{title}</a></li>' for key, title in _SECTIONS)
    return (
        f'<nav aria-label="Contents">\n<p><a href="#answers">Answers</a></p>\n'
        f"<ol>\n{questions}\n</ol>\n<ul>\n{sections}\n</ul>\n</nav>"
    )


def _section(key: str, content: str) -> str:
    title = dict(_SECTIONS)[key]
    return (
        f'<section id="{key}" aria-labelledby="{key}-title">\n<h2 id="{key}-title">{title}</h2>\n'
        f"{content}\n</section>"
    )


def _answers(report: Report) -> str:
    kinds = ("answered", "exact", "cannot tell")
    counts = [(sum(a.verdict == kind for a in report.answers), kind) for kind in kinds]
    said = ", ".join(f"{count} {kind}" for count, kind in counts if count)
    boxes = "\n".join(box(report, answer) for answer in report.answers)
    return (
        '<section id="answers" aria-labelledby="answers-title" tabindex="-1">\n'
        f'<h2 id="answers-title">Answers</h2>\n<p>{len(report.answers)} questions: {said}. '
        'Each says only what the numbers of this study support; <a href="#numbers">how they are '
        f"made</a> is told below.</p>\n{boxes}\n</section>"
    )


def _figures(drawn: list[Figure]) -> str:
    note = (
        '<p class="note" id="not-drawn">The figures need JavaScript; the tables under them hold '
        "the same numbers.</p>"
    )
    return _section("figures", "\n".join([note, *(frame(each) for each in drawn)]))


def _arms(report: Report) -> str:
    own = recipe(report.recipes[report.baseline])
    return f"{table(arms(report))}\n<p>The baseline's recipe: {prose(own)}.</p>"


def _provenance(report: Report) -> str:
    if not report.provenance:
        return "<p>No trial has finished yet.</p>"
    values: dict[str, list[str]] = {}
    for key, value, count in report.provenance:
        everywhere = count == len(report.rows)
        values.setdefault(key, []).append(value if everywhere else f"{value} ({count} trials)")
    rows = "\n".join(
        f"<div><dt>{escape(_ORIGINS.get(key, key))}</dt><dd>{escape('; '.join(found))}</dd></div>"
        for key, found in values.items()
    )
    return f'<dl class="facts">\n{rows}\n</dl>'
