"""The grammar of .cfg files, and that writing and reading are inverse."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenkeel.errors import FormatError
from evenkeel.formats.darknet.cfg import Section, parse, text_of

WORDS = st.text("abcdefgxyz_0123456789", min_size=1, max_size=8)
VALUES = st.text("abc019.,-+=/", min_size=1, max_size=8)
SECTIONS = st.lists(st.tuples(WORDS, st.dictionaries(WORDS, VALUES, max_size=4)), max_size=5)


def plain(sections: list[Section]) -> list[tuple[str, dict[str, str]]]:
    return [(section.name, dict(section.options)) for section in sections]


@given(SECTIONS)
def test_what_is_written_is_read(found):
    aliases = {"avg", "conn", "conv", "lrn", "max", "network", "soft"}
    found = [("net", {}), *(pair for pair in found if pair[0] not in aliases)]
    assert plain(parse(text_of(Section(*pair) for pair in found))) == found


@given(SECTIONS, st.randoms())
def test_space_and_comments_mean_nothing(found, random):
    source = text_of(Section(*pair) for pair in [("net", {}), *found])
    lines = []
    for line in source.split("\n"):
        spaced = "".join(char + random.choice(["", "", " ", "\t"]) for char in line)
        lines += [spaced + random.choice(["", "\r"]), random.choice(["", "# a=b", " ; [x]"])]
    assert plain(parse("\n".join(lines))) == plain(parse(source))


def test_aliases_and_equal_keys():
    found = parse("[network]\n[conv]\nsize=3\nsize=5\n[max]\n[conn]\n[avg]\n[soft]")
    assert [s.name for s in found] == [
        "net", "convolutional", "maxpool", "connected", "avgpool", "softmax"
    ]  # fmt: skip
    assert found[1].integer("size", 1) == 3


def test_numbers_as_c_reads_them():
    options = {"a": "80#classes", "b": "-2.5e1x", "c": "1,-2,+3", "d": ".5", "e": "x"}
    section = parse("[net]\n" + "\n".join(f"{k} = {v}" for k, v in options.items()))[0]
    assert section.integer("a", 0) == 80
    assert section.number("b", 0) == -25
    assert section.integers("c") == (1, -2, 3)
    assert section.number("d", 0) == 0.5
    assert section.integers("none") == ()
    with pytest.raises(FormatError, match=r"line 1 \[net\]: e=x is no number"):
        section.number("e", 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it does not begin with [net]; is it a Darknet .cfg?"),
        ("[convolutional]\nsize=1", "it does not begin with [net]"),
        ("size=3\n[net]", "line 1: 'size=3' stands before the first section"),
        ("[net]\n\nsize", "line 3: 'size' is neither [section] nor key=value"),
        ("[net]\nsize=", "line 2: 'size=' is neither [section] nor key=value"),
        ("[net\n", "line 1: '[net' has no closing bracket"),
    ],
)
def test_what_is_no_cfg(text, message):
    with pytest.raises(FormatError, match=re.escape(message)):
        parse(text)
