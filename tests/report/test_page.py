"""The page without a browser: whole, escaped, its numbers the report's, readable as it is."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from importlib.resources import files
from itertools import combinations, pairwise

import pytest
from plotly.offline import get_plotlyjs

from evenkeel.report.build import Report
from evenkeel.report.figures import figures
from evenkeel.report.markup import prose, script_data
from evenkeel.report.page import render
from evenkeel.report.wording import percent

from .reading import Element, read, rows
from .synthetic import HOSTILE

# What each kind of colour vision makes of linear RGB (Machado, Oliveira and Fernandes 2009).
COLOUR_VISION = {
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
_CONES_OF_RGB = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
_LAB_OF_CONES = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
STUDIES = ["whole", "hostile", "unfinished", "failed", "one_arm", "no_norms", "empty"]


def plain(text: str) -> str:
    """A sentence as the page shows it, commands and all."""
    return read(f"<p>{prose(text)}</p>").text


@pytest.fixture(scope="module", params=STUDIES)
def study(request) -> tuple[Report, str, Element]:
    report = request.getfixturevalue(request.param)
    page = render(report)
    return report, page, read(page)


@pytest.fixture(scope="module")
def tree(page) -> Element:
    return read(page)


class TestEveryStudy:
    def test_every_answer_is_there_in_order(self, study):
        report, _, tree = study
        boxes = tree.all("article")
        assert [box.attributes["id"] for box in boxes] == [f"q{n}" for n in range(1, 11)]
        for box, answer in zip(boxes, report.answers, strict=True):
            heading = box.one("h3")
            assert answer.question in heading.text
            assert heading.one("span", class_="badge").text == answer.verdict
            assert box.one("p", class_="sentence").text == plain(answer.sentence)
            assert plain(answer.background) in box.text
            assert plain(answer.next_step) in box.text
            marks = [mark.text for mark in box.all("span", class_="mark")]
            assert marks == [each.verdict for each in answer.evidence[1:]]
            for each in answer.evidence[1:]:
                assert plain(each.sentence) in box.text

    def test_a_command_that_would_tell_can_be_copied(self, study):
        report, _, tree = study
        for box, answer in zip(tree.all("article"), report.answers, strict=True):
            command = re.search(r"evenkeel study.*", answer.next_step)
            codes = [code.text for code in box.all("code", class_="command")]
            assert codes == ([command[0]] if command else [])

    def test_figures_or_what_would_give_them(self, study):
        report, _, tree = study
        for figure in figures(report):
            place = tree.one(id=figure.key)
            assert place.one("h3").text == figure.title
            if figure.spec is None:
                assert place.tag == "div"
                assert place.one("p").text == plain(figure.missing)
                continue
            assert place.tag == "figure"
            assert place.one("figcaption").text == plain(figure.caption)
            drawing = place.one(class_="plot")
            assert drawing.attributes["role"] == "img"
            assert drawing.attributes["aria-label"] == figure.label
            data = place.one("script", id=drawing.attributes["data-spec"])
            assert data.attributes["type"] == "application/json"
            assert json.loads(data.raw) == figure.spec
            assert len(rows(place.one("table"))) == len(figure.table.rows)

    def test_all_trials_are_there(self, study):
        report, _, tree = study
        shown = rows(tree.one("table", id="trials-table"))
        assert len(shown) == report.finished
        for row, trial in zip(shown, report.rows, strict=True):
            assert row[0] == " ".join(trial.arm.split())
            assert row[1:3] == [str(trial.seed), trial.status]
            accuracy = "\u2013" if trial.accuracy is None else percent(trial.accuracy, 2)
            assert row[3].replace("\u202f", " ") == accuracy
            steps = trial.steps_to_target
            assert row[4] == ("\u2013" if steps is None else str(steps))
            assert float(row[6]) == pytest.approx(trial.seconds, abs=0.006)

    def test_all_arms_are_there(self, study):
        report, _, tree = study
        shown = rows(tree.one("table", id="arms-table"))
        for row, arm in zip(shown, report.arms, strict=True):
            assert row[0] == " ".join(arm.name.split())
            if arm.accuracy is None:
                assert row[2] == "\u2013"
            else:
                number = row[2].replace("\u202f", " ").split("|")[0]
                assert number == percent(arm.accuracy.mean, 2)
            if arm.against is not None:
                number = row[3].replace("\u2212", "-").split("|")[0]
                assert number == f"{100 * arm.against.accuracy.mean:+.2f}"

    def test_scripts_are_the_pages_own(self, study):
        _, _, tree = study
        code = [s for s in tree.all("script") if s.attributes.get("type") != "application/json"]
        assert [s.attributes for s in code] == [{}, {}]
        assert code[0].raw == get_plotlyjs()
        for each in tree.all():
            assert not [name for name in each.attributes if name.startswith("on")]
            assert each.tag not in {"img", "iframe", "object", "embed", "base", "form"}

    def test_the_policy_forbids_the_network_and_foreign_scripts(self, study):
        _, _, tree = study
        (meta,) = [m for m in tree.all("meta") if "http-equiv" in m.attributes]
        assert meta.attributes["http-equiv"] == "Content-Security-Policy"
        rules = dict(rule.strip().split(" ", 1) for rule in meta.attributes["content"].split(";"))
        assert rules["default-src"] == "'none'"
        assert rules["img-src"] == "data:"
        assert "unsafe" not in rules["script-src"]
        for script in tree.all("script"):
            digest = hashlib.sha256(script.raw.encode()).digest()
            own = f"'sha256-{base64.b64encode(digest).decode()}'"
            runs = script.attributes.get("type") != "application/json"
            assert (own in rules["script-src"]) == runs

    def test_nothing_refers_to_the_network(self, study):
        _, _, tree = study
        for each in tree.all():
            for name in ("src", "href", "action", "data", "poster", "srcset"):
                value = each.attributes.get(name)
                assert value is None or value.startswith(("#", "data:")), (each.tag, value)

    def test_ids_are_unique_and_links_lead_somewhere(self, study):
        _, _, tree = study
        ids = [e.attributes["id"] for e in tree.all() if "id" in e.attributes]
        assert len(ids) == len(set(ids))
        for each in tree.all():
            for name in ("href", "aria-labelledby"):
                value = (each.attributes.get(name) or "").removeprefix("#")
                if value and not value.startswith("data:"):
                    assert value in ids, (each.tag, name, value)

    def test_headings_are_in_order(self, study):
        _, _, tree = study
        levels = [int(e.tag[1]) for e in tree.all() if re.fullmatch("h[1-6]", e.tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))

    def test_tables_can_be_read_by_ear(self, study):
        _, _, tree = study
        for table in tree.all("table"):
            assert table.attributes["aria-labelledby"]
            for heading in table.one("thead").all("th"):
                assert heading.attributes["scope"] == "col"
            for row in table.one("tbody").all("tr"):
                assert row.one("th").attributes["scope"] == "row"
        for region in tree.all(role="region"):
            assert region.attributes["tabindex"] == "0"
            assert region.attributes["aria-labelledby"]

    def test_it_says_what_it_is(self, study):
        report, page, tree = study
        assert page.startswith("<!doctype html>\n")
        assert tree.one("html").attributes["lang"] == "en"
        assert tree.one("title").text == f"Study '{report.name}' on {report.data} \u00b7 evenkeel"
        (view,) = tree.all("meta", name="viewport")
        assert view.attributes["content"] == "width=device-width, initial-scale=1"
        assert len(tree.all("main")) == len(tree.all("nav")) == len(tree.all("header")) == 1
        assert len(page) < len(get_plotlyjs()) + 500_000


class TestHeader:
    def test_what_was_studied(self, whole, tree):
        facts = {
            d.one("dt").text: d.one("dd").text for d in tree.one("header").one("dl").all("div")
        }
        assert facts == {
            "Network": "Conv-ReLU-Pool-Conv-ReLU-Pool-FC-FC",
            "Activations": "ReLU, sigmoid",
            "Data": "digits",
            "Arms": "10 \u00d7 4 seeds = 40 trials",
            "Training": "100 to 400 steps each",
            "Target": "90 % test accuracy",
            "Baseline": "plain",
        }
        assert tree.one("p", class_="lead").text == plain(whole.lead.sentence)

    def test_trouble_is_told(self, tree):
        note = tree.one("header").one("p", class_="note")
        assert note.text == "Of 40 trials, 4 diverged: see the trials."

    def test_an_unfinished_study_says_so(self, unfinished):
        note = read(render(unfinished)).one("header").one("p", class_="note")
        assert note.text.startswith("5 of 40 trials are done;")
        assert note.one("code").text == "evenkeel study --resume"

    def test_without_a_lead(self, one_arm):
        text = read(render(one_arm)).one("p", class_="lead").text
        assert text.startswith("This study has no two arms")


class TestTables:
    def test_arms_say_how_they_differ(self, tree):
        shown = {row[0]: row for row in rows(tree.one("table", id="arms-table"))}
        assert shown["plain"][1] == "the baseline"
        assert shown["before"][1] == "placement before-activation"
        assert shown["no gamma"][1] == "placement before-activation, gamma and beta no"
        assert shown["plain, batch 2"][1] == "learning rate 0.00125, batch size 2, steps 400"
        assert shown["plain, lr 0.2"][6] == "4|4 diverged"
        assert shown["sigmoid"][5] == "never"

    def test_bold_is_what_is_known(self, whole, tree):
        for row, arm in zip(
            tree.one("table", id="arms-table").one("tbody").all("tr"), whole.arms, strict=True
        ):
            bold = bool(row.all("td", class_="strong"))
            assert bold == (arm.against is not None and arm.against.p_corrected < 0.05)

    def test_the_four_ways(self, whole, tree):
        ways = whole.answers[4].inference
        shown = rows(tree.one("table", id="ways-table"))
        numbers = [row[1].replace("\u202f", " ").split("|")[0] for row in shown]
        expected = (ways.running, ways.batch, ways.folded, ways.skipped)
        assert numbers == [percent(i.mean, 2) for i in expected]
        box = tree.one(id="q5").text
        assert "Norms folded3 of 3" in box
        assert "10\u207b\u2076" in box
        assert "'after': 3 of 3 stay; the first one: its input comes from 'relu1'." in box

    def test_the_backward_demonstration(self, whole, tree):
        facts = whole.answers[3].backward
        shown = rows(tree.one("table", id="backward-table"))

        def said(values: tuple[float, ...]) -> str:
            return "(" + ", ".join(f"{v:.4g}".replace("-", "\u2212") for v in values) + ")"

        assert [row[1:3] for row in shown if row[0] == "the backward call returned"] == [
            [said(facts.dgamma), said(facts.dbeta)]
        ]
        assert [row[1:] for row in shown if row[0] == "and changed"] == [["no bit changed"] * 3]
        assert shown[-1][1:3] == [said(facts.gamma_stepped), said(facts.beta_stepped)]
        assert shown[1][3] == said(facts.running_mean_forward)

    def test_the_modes(self, whole, tree):
        facts = whole.answers[1].modes
        shown = [row[1] for row in rows(tree.one("table", id="modes-table"))]
        assert shown == ["0", "0", f"{facts.units_as_pixels:.3g}"]

    def test_an_error_is_shown_whole_on_demand(self, failed):
        table = read(render(failed)).one("table", id="trials-table")
        assert {row[2] for row in rows(table)} == {"failed"}
        for detail in table.all("details"):
            assert detail.one("summary").text == "RuntimeError: out of luck"
            assert detail.one("pre").raw == "Traceback\nRuntimeError: out of luck"
        assert len(table.all("details")) == failed.finished

    def test_provenance(self, whole, tree):
        facts = tree.one(id="provenance").one("dl").text
        for key, value, count in whole.provenance:
            assert key in facts
            assert value in facts
            assert count == whole.finished


class TestHostileNames:
    def test_they_are_shown_as_text(self, hostile):
        page = render(hostile)
        tree = read(page)
        assert HOSTILE not in page
        assert "<script>window" not in page
        assert "<img" not in page
        names = [row[0] for row in rows(tree.one("table", id="arms-table"))]
        assert names == [" ".join(arm.name.split()) for arm in hostile.arms]

    @pytest.mark.parametrize("text", ["</script>", "<!--<script>", "\u2028\u2029", "]]>", "&lt;"])
    def test_data_cannot_end_its_block(self, text):
        block = script_data("x", {"name": text})
        inner = block.removeprefix('<script type="application/json" id="x">')
        inner = inner.removesuffix("</script>")
        assert not re.search("[<>&\u2028\u2029]", inner)
        assert json.loads(inner) == {"name": text}


class TestProse:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            (
                "95 % interval -0.3 to +0.2 points",
                "95\u202f% interval \u22120.3 to +0.2\u00a0points",
            ),
            ("(p = 0.03)", "(p\u00a0=\u00a00.03)"),
            ("p < 0.001", "p\u00a0&lt;\u00a00.001"),
            ("4.8e-07 of it", "4.8\u202f\u00d7\u202f10\u207b\u2077 of it"),
            ("before-activation lr 1e-3", "before-activation lr 1e-3"),
            ("a - 0.1 * b", "a\u00a0\u2212\u00a00.1\u00a0\u00d7\u00a0b"),
        ],
    )
    def test_signs_and_spaces(self, text, shown):
        assert prose(text) == shown

    def test_commands(self):
        found = read(prose("Run: evenkeel study --preset modes --seeds 18")).one("code")
        assert found.text == "evenkeel study --preset modes --seeds 18"
        parts = [part.text for part in found.all("span")]
        assert parts == ["--preset modes", "--seeds 18"]

    def test_a_command_with_a_path(self):
        command = "evenkeel study --data mnist --data-dir '/my data/<x>' --model my.net:make"
        assert read(prose(f"Run: {command}")).one("code").text == command


class TestStyle:
    """Contrast as in WCAG 2, and colours that stay apart for colour-blind readers."""

    @staticmethod
    def palettes() -> dict[str, dict[str, str]]:
        css = files("evenkeel.report").joinpath("assets", "page.css").read_text()
        light, dark = re.findall(r":root \{([^}]*)\}", css)
        found = {
            name: dict(re.findall(r"--([a-z-]+\d?): (#[0-9a-f]{6})", block))
            for name, block in (("light", light), ("dark", dark))
        }
        assert found["light"].keys() == found["dark"].keys()
        return found

    @staticmethod
    def linear(colour: str) -> list[float]:
        shares = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]

    def contrast(self, a: str, b: str) -> float:
        parts = (0.2126, 0.7152, 0.0722)
        light = sorted(
            sum(p * c for p, c in zip(parts, self.linear(x), strict=True)) for x in (a, b)
        )
        return (light[1] + 0.05) / (light[0] + 0.05)

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_contrast(self, scheme):
        colours = self.palettes()[scheme]
        pairs = [(ink, ground) for ink in ("ink", "muted", "link", "trouble")
                 for ground in ("paper", "card")]  # fmt: skip
        pairs += [(kind, f"{kind}-soft") for kind in ("answered", "exact", "cannot-tell")]
        pairs += [("ink", "zone"), ("ink", "cannot-tell-soft"), ("link", "cannot-tell-soft")]
        for ink, ground in pairs:
            assert self.contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        for line in ("c1", "c2", "c3", "c4", "c5", "c6", "focus"):
            assert self.contrast(colours[line], colours["card"]) >= 3, line

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("vision", COLOUR_VISION)
    def test_lines_stay_apart(self, scheme, vision):
        colours = self.palettes()[scheme]
        seen = [self.perceived(colours[f"c{n}"], COLOUR_VISION[vision]) for n in range(1, 7)]
        for a, b in combinations(range(6), 2):
            assert math.dist(seen[a], seen[b]) >= 0.09, (f"c{a + 1}", f"c{b + 1}")

    def perceived(self, colour: str, matrix: list[list[float]]) -> list[float]:
        """The colour in OKLab, as seen through a matrix on linear RGB."""

        def times(rows: list[list[float]], v: list[float]) -> list[float]:
            return [sum(x * y for x, y in zip(row, v, strict=True)) for row in rows]

        light = [min(1.0, max(0.0, c)) for c in times(matrix, self.linear(colour))]
        return times(_LAB_OF_CONES, [c ** (1 / 3) for c in times(_CONES_OF_RGB, light)])
