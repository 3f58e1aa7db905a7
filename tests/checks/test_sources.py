"""Where findings are, and the three ways to silence them."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from evenkeel import accelerate, check, freeze
from evenkeel.checks.rules import CODES
from evenkeel.checks.sources import Sources, codes_in, project_ignores
from evenkeel.errors import ConfigError


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.BatchNorm2d(3, momentum=0.9)  # evenkeel: ignore[EK403]
        self.two = nn.BatchNorm2d(3, momentum=0.9)
        self.three = nn.BatchNorm2d(
            3,
            momentum=0.9,  # evenkeel: ignore[EK101, EK403]
        )
        self.four = nn.BatchNorm2d(3, momentum=0.9)  # evenkeel: ignore
        self.add_module("five", nn.BatchNorm2d(3, momentum=0.9))  # evenkeel: ignore[EK403]
        self.six = nn.Sequential(nn.BatchNorm2d(3, momentum=0.9))  # evenkeel:ignore[EK403]
        self.text = "# evenkeel: ignore[EK403]"


class SilentAsAWhole(nn.Module):  # evenkeel: ignore[EK403]
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=0.9, eps=0.5)


class Loud(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = SilentAsAWhole()
        self.norms = nn.ModuleList([nn.BatchNorm2d(3, momentum=0.9)])


def paths(model: nn.Module, code: str, **given) -> list[str]:
    return [f.path for f in check(model, **given).of(code)]


def line_of(kind: type, text: str) -> int:
    lines, first = inspect.getsourcelines(kind)
    return first + next(i for i, line in enumerate(lines) if text in line)


def test_comments_silence_the_module_of_their_line():
    found = check(Silent())
    assert [f.path for f in found.of("EK403")] == ["two"]
    assert dict(found.silenced) == {"EK403": 5, "EK301": 1}
    assert "5 of EK403 silenced" in str(found)


def test_a_comment_behind_class_silences_the_class():
    model = Loud()
    assert paths(model, "EK403") == ["norms.0"]
    assert paths(model, "EK404") == ["inner.norm"]
    assert paths(nn.Sequential(model), "EK403") == ["0.norms.0"]


def test_findings_have_the_line_that_makes_the_module():
    (finding,) = check(Silent()).of("EK403")
    assert finding.file == __file__
    assert finding.line == line_of(Silent, "self.two")
    (finding,) = check(Loud()).of("EK404")
    assert finding.line == line_of(SilentAsAWhole, "self.norm")
    (finding,) = check(Loud()).of("EK403")
    assert finding.line == line_of(Loud, "self.norms")


def test_networks_after_surgery_keep_their_places():
    model = Silent()
    assert paths(accelerate(model)[0], "EK403") == ["two"]
    freeze(model)
    assert paths(model, "EK403") == ["two"]
    kind = type("Frozen", (nn.BatchNorm2d,), {})  # a class without a source
    (finding,) = check(kind(3, momentum=0.9)).of("EK403")
    assert finding.file is None


def made() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3, momentum=0.9))  # evenkeel: ignore[EK403]


def test_the_source_of_a_factory_counts_if_it_is_told():
    assert paths(made(), "EK403") == ["0"]
    assert paths(made(), "EK403", origin=made) == []
    place = Sources(made(), made).place("0")
    assert (place.file, place.line) == (__file__, line_of(made, "def made"))
    assert Sources(made(), 3).place("0").file is None


def test_ignore_takes_codes_and_nothing_else():
    assert paths(Loud(), "EK403", ignore=["EK403"]) == []
    assert paths(Loud(), "EK403", ignore="EK403") == []
    assert "EK406" not in str(check(Loud(), ignore=["EK406"]).unchecked)
    with pytest.raises(ConfigError, match=r"ignore has the unknown code 'EK999'.*EK101 to EK5"):
        check(Loud(), ignore=["EK999"])
    with pytest.raises(ConfigError, match="did you mean 'EK403'"):
        codes_in(["EK-403"], CODES, "ignore")


def test_pyproject_is_found_upwards(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[tool.evenkeel]\nignore = ["EK403"]\n')
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert paths(Loud(), "EK403") == []
    assert paths(Loud(), "EK404") == ["inner.norm"]
    (deep / "pyproject.toml").write_text("[project]\nname = 'nearer'\n")
    assert paths(Loud(), "EK403") == ["norms.0"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('[tool.evenkeel]\nignore = ["EK1"]', "unknown code 'EK1'"),
        ('[tool.evenkeel]\nignore = "EK403"', "ignore is 'EK403'"),
        ("[tool.evenkeel", "cannot be read"),
    ],
)
def test_a_wrong_pyproject_is_an_error(text, what, tmp_path):
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ConfigError, match=what):
        project_ignores(CODES, tmp_path)


def test_without_a_pyproject_nothing_is_ignored(tmp_path):
    assert project_ignores(CODES, tmp_path) == frozenset()


def test_findings_come_in_order():
    """The worst first, then by code, then as the network calls them."""
    model = nn.Sequential(*(nn.BatchNorm2d(3, momentum=0.9) for _ in range(11)))
    model[2].running_var[0] = -1
    found = check(model, torch.randn(4, 3, 2, 2))
    assert found[0].code == "EK303"
    assert [f.path for f in found.of("EK403")] == [str(place) for place in range(11)]
