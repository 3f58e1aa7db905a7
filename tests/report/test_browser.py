"""The page in headless Chromium: drawn, quiet, usable by keyboard, on a phone, in the dark."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from evenkeel.report.figures import figures
from evenkeel.report.page import render

from .browser import ARGUMENTS, executable, opened

pytestmark = pytest.mark.page

STUDIES = ["whole", "hostile", "unfinished", "failed", "one_arm", "no_norms", "empty"]
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def browser():
    path = executable()
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def files(request, tmp_path_factory) -> dict[str, Path]:
    """A file of each study's page."""
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for study in STUDIES:
        found[study] = folder / f"{study}.html"
        found[study].write_text(render(request.getfixturevalue(study)), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def shown(browser: Browser, files):
    """The whole study's page, for tests that only look at it; one at a time sizes it."""
    with opened(browser, files["whole"]) as watched:
        yield watched.page
        assert watched.quiet(), (watched.said, watched.asked)


@pytest.fixture
def view(browser: Browser, files):
    """The whole study's page, which must stay quiet whatever a test does with it."""
    with opened(browser, files["whole"]) as watched:
        yield watched.page
        assert watched.quiet(), (watched.said, watched.asked)


def color(page: Page, selector: str, name: str = "color") -> str:
    return page.eval_on_selector(selector, f"e => getComputedStyle(e)['{name}']")


def traces(page: Page, key: str) -> int:
    """How many traces of a figure are drawn."""
    return page.locator(f"#{key} .main-svg .trace").count()


def settled(page: Page) -> Page:
    """The page behind two frames: media changes and resizes have arrived by then."""
    page.evaluate("() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
    return page


def open_all(page: Page) -> None:
    for summary in page.locator("main details > summary:visible").all():
        summary.click()


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_is_drawn_in_silence_at_any_width(browser, files, study, request):
    with opened(browser, files[study]) as watched:
        page = watched.page
        wanted = [f.key for f in figures(request.getfixturevalue(study)) if f.spec]
        for key in wanted:
            assert page.locator(f"#{key} .main-svg").count() >= 1, key
            assert traces(page, key) >= 1, key
        assert page.locator(".plot").count() == len(wanted)
        assert page.evaluate("window.hacked") is None
        assert page.locator("main img").count() == 0
        assert not page.locator("#not-drawn").count()
        page.set_viewport_size({"width": 360, "height": 740})
        open_all(page)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert watched.quiet(), (watched.said, watched.asked)


def test_a_phone_needs_no_sideways_scrolling(browser, files):
    with opened(browser, files["whole"], **PHONE) as watched:
        open_all(watched.page)
        watched.page.evaluate("scrollTo(1000, 0)")
        assert watched.page.evaluate("[scrollX, innerWidth]") == [0, 360]
        assert watched.quiet(), (watched.said, watched.asked)


class TestLinks:
    def test_each_leads_to_what_it_names(self, shown):
        for link in shown.locator("a[href^='#']").all():
            target = link.get_attribute("href")
            assert shown.locator(target).count() == 1, target
        shown.locator("nav a", has_text="Provenance").click()
        assert shown.url.endswith("#provenance")

    def test_the_policy_stops_scripts_from_elsewhere(self, browser, files, tmp_path):
        page = files["whole"].read_text(encoding="utf-8")
        changed = tmp_path / "changed.html"
        foreign = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
        changed.write_text(page.replace("<main>", f"<main>{foreign}"), encoding="utf-8")
        with opened(browser, changed) as watched:
            assert watched.page.evaluate("window.hacked") is None
            assert "Content Security Policy" in " ".join(watched.said)
            assert watched.page.locator("#curves .main-svg").count() >= 1


class TestKeyboard:
    def reached(self, page: Page, limit: int = 400) -> list[str]:
        """What the Tab key reaches, in order."""
        name = """() => {
            const e = document.activeElement;
            const near = e.closest("figure, section[id], article");
            const kind = e.className && e.tagName !== "LABEL" ? "." + e.className : "";
            return (near ? near.id : "") + " " + e.tagName.toLowerCase() + kind;
        }"""
        found: list[str] = []
        for _ in range(limit):
            page.keyboard.press("Tab")
            now = page.evaluate(name)
            if now.endswith("body"):
                break
            found.append(now)
        return found

    def test_everything_can_be_reached(self, view):
        found = self.reached(view)
        assert found[0] == " a.skip"
        for key in ("curves", "finals", "bands", "rates", "batches", "inference"):
            assert f"{key} summary" in found
        for wanted in (
            "arms div.scroll",
            "trials div.scroll",
            "q4 div.scroll",
            "curves input",
            "bands select",
            "trials button.sort",
        ):
            assert wanted in found

    def test_the_skip_link_skips(self, view):
        view.keyboard.press("Tab")
        assert view.locator(".skip").bounding_box()["y"] >= 0
        view.keyboard.press("Enter")
        assert view.evaluate("document.activeElement.id") == "answers"
        view.keyboard.press("Tab")
        assert view.evaluate("document.activeElement.closest('section').id") == "answers"

    def test_focus_can_be_seen(self, shown):
        for selector in ("#curves summary", "#arms .scroll", "#curves input", ".sort"):
            shown.locator(selector).first.focus()
            shown.keyboard.press("Shift+Tab")
            shown.keyboard.press("Tab")
            width = "getComputedStyle(document.activeElement).outlineWidth"
            assert shown.evaluate(width) == "3px", selector

    def test_a_figures_table_opens(self, view):
        summary = view.locator("#finals > details > summary")
        table = view.locator("#finals-table")
        assert not table.is_visible()
        summary.focus()
        view.keyboard.press("Enter")
        assert table.is_visible()

    def test_a_table_sorts(self, view):
        rows = (
            "[...document.querySelectorAll('#arms-table tbody tr')].map(r => r.cells[0].innerText)"
        )
        accuracy = "[...document.querySelectorAll('#arms-table tbody tr')].map(r => r.cells[2])"
        numbers = f"{accuracy}.map(c => Number(c.dataset.sort))"
        original = view.evaluate(rows)
        heading = view.locator("#arms-table th", has_text="accuracy")
        heading.locator("button").focus()
        for state, arrange in (("ascending", sorted), ("descending", lambda v: sorted(v)[::-1])):
            view.keyboard.press("Enter")
            assert heading.get_attribute("aria-sort") == state
            assert view.evaluate(numbers) == arrange(view.evaluate(numbers))
        view.keyboard.press("Enter")
        assert heading.get_attribute("aria-sort") == "none"
        assert view.evaluate(rows) == original

    def test_names_sort_too_and_gaps_go_last(self, view):
        view.locator("#arms-table th button", has_text="points").click()
        last = view.locator("#arms-table tbody tr").last
        assert last.locator("th").inner_text() == "plain"  # the baseline has no difference
        view.locator("#arms-table th button").first.click()
        names = view.locator("#arms-table tbody th").all_inner_texts()
        assert names == sorted(names)


class TestControls:
    def test_arms_are_shown_and_hidden(self, view):
        before = traces(view, "curves")
        view.locator("#curves fieldset summary").click()
        box = view.get_by_label("layer norm", exact=True)
        assert not box.is_checked()
        box.focus()
        view.keyboard.press("Space")
        assert traces(view, "curves") == before + 3
        view.keyboard.press("Space")
        assert traces(view, "curves") == before

    def test_axes_change(self, view):
        ticks = view.locator("#curves .ytick")
        assert "99%" not in ticks.all_text_contents()
        view.locator("#curves [data-switch=stretch]").check()
        assert "98%" in ticks.all_text_contents()
        line = view.locator("#curves .scatterlayer .js-line").last
        before = line.get_attribute("d")
        view.locator("#curves [data-switch=log]").check()
        assert line.get_attribute("d") != before

    def test_another_band_is_picked(self, view):
        titles = view.locator("#bands .annotation-text")
        assert titles.all_text_contents() == ["sigmoid", "sigmoid, before"]
        view.locator("#bands select").first.select_option(label="after")
        assert titles.all_text_contents() == ["after", "sigmoid, before"]

    def test_a_command_is_copied(self, browser, files):
        grant = {"permissions": ["clipboard-read", "clipboard-write"]}
        with opened(browser, files["whole"], **grant) as watched:
            code = watched.page.locator("code.command").first
            watched.page.locator("button.copy").first.click()
            watched.page.get_by_text("Copied", exact=True).first.wait_for()
            copied = watched.page.evaluate("navigator.clipboard.readText()")
            assert copied == code.text_content()
            assert copied.startswith("evenkeel study")


class TestSchemes:
    def test_the_dark_is_dark_and_figures_follow(self, shown):
        look = {}
        for scheme in ("light", "dark", "light"):
            shown.emulate_media(color_scheme=scheme)
            settled(shown)
            now = (
                color(shown, "body", "background-color"),
                color(shown, "#curves .xtitle", "fill"),
                color(shown, "#finals .point", "fill"),
            )
            assert look.setdefault(scheme, now) == now
        assert all(a != b for a, b in zip(look["light"], look["dark"], strict=True))

        def brightness(text: str) -> int:
            return sum(map(int, re.findall(r"\d+", text)[:3]))

        assert brightness(look["dark"][0]) < 150 < 600 < brightness(look["light"][0])
        assert brightness(look["light"][1]) < 150 < 600 < brightness(look["dark"][1])

    def test_a_figure_stays_as_its_reader_left_it(self, view):
        view.locator("#curves .legend input").first.uncheck()
        count = traces(view, "curves")
        view.emulate_media(color_scheme="dark")
        assert traces(settled(view), "curves") == count

    def test_paper_is_light_and_shows_all_trials(self, view):
        view.emulate_media(color_scheme="dark", media="print")
        settled(view)
        assert color(view, "#curves .xtitle", "fill") == "rgb(27, 29, 34)"
        box = view.locator("#trials .scroll").bounding_box()
        assert box["height"] >= view.locator("#trials-table").bounding_box()["height"]
        assert not view.locator("nav").is_visible()


class TestSizes:
    def test_nothing_is_wider_than_the_window(self, shown):
        drawn = "[...document.querySelectorAll('.plot')].map(p => [p.clientWidth, "
        drawn += "p.querySelector('.main-svg').clientWidth])"
        for width in (320, 360, 600, 900, 1280, 1920):
            shown.set_viewport_size({"width": width, "height": 800})
            settled(shown)
            assert all(room == used for room, used in shown.evaluate(drawn)), width
            assert shown.evaluate("document.documentElement.scrollWidth") == width

    @pytest.mark.parametrize("width", [360, 1280])
    def test_labels_stay_inside_and_apart(self, shown, width):
        """Ticks and names of arms: none clipped by the figure, none over another."""
        shown.set_viewport_size({"width": width, "height": 800})
        settled(shown)
        wrong = shown.evaluate(
            """() => [...document.querySelectorAll(".plot")].flatMap((plot) => {
                const edge = plot.getBoundingClientRect();
                return [".xtick", ".ytick", ".annotation-text"].flatMap((kind) => {
                    const boxes = [...plot.querySelectorAll(kind)].map((e) =>
                        [e.textContent, e.getBoundingClientRect()]);
                    const out = boxes.filter(([, b]) =>
                        b.left < edge.left - 1 || b.right > edge.right + 1 ||
                        b.top < edge.top - 1 || b.bottom > edge.bottom + 1);
                    const over = boxes.filter(([, a], n) => boxes.slice(n + 1).some(([, b]) =>
                        a.left < b.right - 1 && b.left < a.right - 1 &&
                        a.top < b.bottom - 2 && b.top < a.bottom - 2));
                    return [...out, ...over].map(([text]) => plot.dataset.spec + " " + text);
                });
            })"""
        )
        assert wrong == []


class TestWithoutScripts:
    def test_answers_and_tables_can_be_read(self, browser, files, whole):
        with opened(browser, files["whole"], java_script_enabled=False) as watched:
            page = watched.page
            assert page.locator("article .sentence:visible").count() == 10
            assert page.locator("#trials-table tbody tr:visible").count() == len(whole.rows)
            assert page.locator("#arms-table tbody tr:visible").count() == len(whole.arms)
            assert page.get_by_text("The figures need JavaScript").is_visible()
            assert page.locator(".plot:visible, .controls:visible").count() == 0
            page.locator("#curves > details > summary").click()
            assert page.locator("#curves-table").is_visible()


class TestWithoutBrowser:
    """What happens where there is none."""

    @pytest.mark.parametrize(
        ("ci", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)]
    )
    def test_it_is_a_skip_but_a_failure_in_ci(self, monkeypatch, ci, outcome):
        monkeypatch.setitem(os.environ, "CI", ci)
        monkeypatch.setitem(os.environ, "EVENKEEL_CHROMIUM", "/nowhere/chromium")
        with pytest.raises(outcome, match="EVENKEEL_CHROMIUM is '/nowhere/chromium'"):
            executable()
