"""Patterns: what they mean, which texts are refused and in which words."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenkeel.errors import PatternError, ShapeError
from evenkeel.pattern import NormSpec, parse

from .strategies import Case, cases

MEANINGS = [
    # pattern, owners, affine, is a batch norm, axes to give when it is built
    ("n c ... -> c", [("c",)], [("c",)], True, ["c"]),
    ("n c -> c", [("c",)], [("c",)], True, ["c"]),
    ("n c h w -> c h w", [("c",), ("h",), ("w",)], [("c",), ("h",), ("w",)], True, list("chw")),
    ("n c h w -> h w", [("h",), ("w",)], [("h",), ("w",)], True, list("hw")),
    ("n c h w ->", [], [], True, []),
    ("n c h w -> n", [("n",)], [], False, []),
    ("n c h w -> n c", [("n",), ("c",)], [("c",)], False, ["c"]),
    ("n (g c) h w -> n g", [("n",), ("g",)], [("g",)], False, ["g"]),
    ("n (g c) h w -> g", [("g",)], [("g",)], True, ["g"]),
    ("n (g c) h w -> (g c)", [("g", "c")], [("g", "c")], True, ["g", "c"]),
    ("n c h w -> (c h) w", [("c", "h"), ("w",)], [("c", "h"), ("w",)], True, list("chw")),
    ("(t b) c h w -> t c", [("t",), ("c",)], [("c",)], False, ["c"]),
    ("(t b) c h w -> b c", [("b",), ("c",)], [("c",)], False, ["c"]),
    ("(t b) c h w -> c", [("c",)], [("c",)], True, ["c"]),
    ("n ... -> ...", [("...",)], [("...",)], True, ["..."]),
]


@pytest.mark.parametrize(
    ("pattern", "owners", "affine", "is_batch", "fixed"), MEANINGS, ids=[m[0] for m in MEANINGS]
)
def test_meaning(pattern: str, owners: list, affine: list, is_batch: bool, fixed: list) -> None:
    spec = parse(pattern)
    assert spec.owners == tuple(owners)
    assert spec.affine == tuple(affine)
    assert spec.averages_batch is is_batch
    assert spec.fixed == tuple(fixed)
    assert spec.affine_is_owners is (owners == affine)


@pytest.mark.parametrize(
    ("affine", "groups", "fixed"),
    [
        ("(g c)", (("g", "c"),), ("g", "c")),
        ("c h w", (("c",), ("h",), ("w",)), ("c", "h", "w")),
        ("", (), ()),
        (None, None, ()),
    ],
)
def test_affine_axes_of_their_own(affine: str | None, groups: tuple, fixed: tuple) -> None:
    spec = parse("n (g c) h w -> n g", affine)
    assert spec.affine == groups
    assert spec.fixed == fixed
    assert spec.affine_text == affine
    assert not spec.affine_is_owners


@pytest.mark.parametrize(
    "spelling",
    ["n c h w -> c", "  n  c h w->c ", "n c h w -> (c)", "n (c) h w\t->\nc", "(n) c h w -> c"],
)
def test_spellings_of_one_meaning_are_equal(spelling: str) -> None:
    spec = parse(spelling)
    assert spec == parse("n c h w -> c")
    assert hash(spec) == hash(parse("n c h w -> c"))
    assert str(spec) == "n c h w -> c"


def test_meanings_that_differ_are_not_equal() -> None:
    specs = [parse(m[0]) for m in MEANINGS] + [parse("n c ... -> c", None)]
    specs.append(parse("n a ... -> a"))  # names are part of it: sizes are given by name
    assert len(set(specs)) == len(specs)


def test_grouping_of_owners_gives_the_same_statistics_in_another_shape() -> None:
    split, merged = parse("n (g c) -> g c"), parse("n (g c) -> (g c)")
    assert split != merged
    assert split.bind((4, 6), {"g": 2}).kept == merged.bind((4, 6), {"g": 2}).kept
    assert merged.bind((4, 6), {"g": 2}).stat_shape == (6,)


@given(cases())
def test_text_round_trip(case: Case) -> None:
    spec = parse(case.text)
    assert parse(str(spec)) == spec
    assert parse(str(spec), spec.affine_text) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


@given(cases(), st.randoms(use_true_random=False))
def test_white_space_means_nothing(case: Case, random) -> None:
    left, right = case.text.split("->")
    gap = random.choice(["  ", "\t", "\n "])
    assert parse(left.replace(" ", gap) + "->" + right.replace(" ", gap)) == parse(case.text)


@given(cases())
def test_bind_accounts_for_every_value(case: Case) -> None:
    bound = parse(case.text).bind(case.shape, case.given)
    assert math.prod(bound.shape) == math.prod(case.shape)
    assert math.prod(bound.stat_shape) * bound.count == math.prod(case.shape)
    assert [bound.shape[d] for d in bound.kept] == [case.sizes[name] for name in case.owners]
    assert len(bound.averaged) == len(bound.shape) - len(bound.kept)


BINDINGS = [
    # pattern, affine, shape, sizes -> split shape, kept, stat shape, affine shape, count
    ("n c ... -> c", "c", (4, 3), {}, (4, 3), (1,), (3,), (3,), 4),
    ("n c ... -> c", "c", (4, 3, 5, 6, 7), {}, (4, 3, 5, 6, 7), (1,), (3,), (3,), 840),
    ("n ... -> ...", "...", (4, 3, 5), {}, (4, 3, 5), (1, 2), (3, 5), (3, 5), 4),
    ("n ... c -> c", "... c", (4, 5, 6, 3), {}, (4, 5, 6, 3), (3,), (3,), (5, 6, 3), 120),
    ("n c h w -> (c h) w", "c", (4, 3, 5, 6), {}, (4, 3, 5, 6), (1, 2, 3), (15, 6), (3,), 4),
    ("n (g c) l -> n g", "(g c)", (4, 6, 5), {"g": 2}, (4, 2, 3, 5), (0, 1), (4, 2), (6,), 15),
    ("n (g c) l -> n g", "(g c)", (4, 6, 5), {"c": 3}, (4, 2, 3, 5), (0, 1), (4, 2), (6,), 15),
    ("n (a b c) -> b", "b", (4, 24), {"a": 2, "c": 4}, (4, 2, 3, 4), (2,), (3,), (3,), 32),
    ("n c h w ->", "c", (4, 3, 5, 6), {}, (4, 3, 5, 6), (), (), (3,), 360),
    ("n c ... -> c", "c", (0, 3, 5), {}, (0, 3, 5), (1,), (3,), (3,), 0),
]


@pytest.mark.parametrize("row", BINDINGS, ids=[f"{b[0]} on {b[2]}" for b in BINDINGS])
def test_bind(row: tuple) -> None:
    pattern, affine, shape, sizes, split, kept, stat_shape, affine_shape, count = row
    bound = parse(pattern, affine).bind(shape, sizes)
    assert bound.shape == split
    assert bound.kept == kept
    assert bound.stat_shape == stat_shape
    assert bound.affine_shape == affine_shape
    assert bound.count == count


def test_averaged_axes_as_text() -> None:
    assert parse("n c ... -> c").bind((4, 3, 5, 6)).averaged == (
        *("n=4", "dimension 2=5", "dimension 3=6"),
    )


def test_shapes_of_vectors_by_name() -> None:
    spec = parse("n (g c) h w -> n g", "(g c)")
    assert spec.affine is not None
    assert spec.shape_of(spec.affine, {"g": 4, "c": 8}) == (32,)
    assert parse("n c h w -> h w").shape_of((("h",), ("w",)), {"h": 5, "w": 6}) == (5, 6)


REFUSED = [
    ("n c h w", "has no '->'; write 'axes -> owners'"),
    ("", "'' has no '->'"),
    ("-> c", "must begin with the batch axis"),
    ("... c -> c", "must begin with the batch axis"),
    ("n c h w -> d", r"axis 'd' on the right of 'n c h w -> d' is not on the left \(n, c, h, w\)"),
    ("n c h w -> n c h w", "keeps every axis, so each mean would be of one value"),
    ("n (g c) -> n g c", "keeps every axis, so each mean would be of one value"),
    ("n c n -> c", "axis 'n' stands twice on the left of 'n c n -> c'"),
    ("n c -> c c", "axis 'c' stands twice on the right"),
    ("n ... ... -> n", "axis '...' stands twice on the left"),
    ("n (c c) -> n", "axis 'c' stands twice on the left"),
    ("n c h w -> w c", "the right of 'n c h w -> w c' changes the order of the axes; write 'c w'"),
    ("n (g c -> g", r"has a '\(' that is never closed"),
    ("n g c) -> g", r"has a '\)' that closes nothing, or an empty '\(\)'"),
    ("n () c -> c", r"has a '\)' that closes nothing, or an empty '\(\)'"),
    ("n (g (c d)) -> g", "parentheses inside parentheses; use one level"),
    ("n (c ...) -> c", r"has '...' inside parentheses; write it outside"),
    ("n 3 h -> h", "'3' on the left of 'n 3 h -> h' is neither a name"),
    ("n c -> c -> c", "'->' on the right of 'n c -> c -> c' is neither a name"),
    ("n, c -> c", "',' on the left of 'n, c -> c' is neither a name"),
    ("n .. c -> c", r"'..' on the left"),
    ("n c* -> c", r"'\*' on the left"),
]


@pytest.mark.parametrize(("pattern", "words"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused_patterns(pattern: str, words: str) -> None:
    with pytest.raises(PatternError, match=words):
        parse(pattern)


@pytest.mark.parametrize(
    ("affine", "words"),
    [
        ("d", "axis 'd' on the affine pattern of 'n c h w -> c' is not on the left"),
        ("n c", "affine 'n c' of 'n c h w -> c' has the batch axis 'n'; gamma and beta are shared"),
        ("w c", "the affine pattern of 'n c h w -> c' changes the order of the axes; write 'c w'"),
        ("c c", "axis 'c' stands twice on the affine pattern"),
    ],
)
def test_refused_affine_patterns(affine: str, words: str) -> None:
    with pytest.raises(PatternError, match=words):
        parse("n c h w -> c", affine)


MISFITS = [
    ("n c h w -> c", (4, 3, 5), {}, r"describes 4 dimensions but got 3 in \(4, 3, 5\)"),
    ("n c h w -> c", (4, 3, 5, 6, 7), {}, "describes 4 dimensions but got 5"),
    ("n c ... -> c", (4,), {}, r"describes at least 2 dimensions but got 1 in \(4,\)"),
    (
        "n (g c) -> g",
        (4, 6),
        {},
        r"splits a dimension of size 6 into \(g c\); give .* example g=..",
    ),
    ("n (g c) -> g", (4, 6), {"g": 4}, r"g=4 but got \(4, 6\): 6 does not split into \(g c\)"),
    ("n (g c) -> g", (4, 6), {"g": 0}, r"g=0 but got \(4, 6\): 6 does not split into \(g c\)"),
    ("n (g c) -> g", (4, 6), {"g": 2, "c": 2}, r"g=2, c=2 but got .* 6 does not split"),
    ("n c -> c", (4, 6), {"c": 3}, r"'n c -> c' was built for c=3 but got \(4, 6\)$"),
    ("n c h w -> c h w", (8, 4, 3, 3), {"c": 5}, r"was built for c=5 but got \(8, 4, 3, 3\)$"),
    (
        "n c h w -> c h w",
        (8, 16, 28, 28),
        {"c": 16, "h": 32, "w": 32},
        r"was built for h=32 but got \(8, 16, 28, 28\); a norm that owns places fixes the image",
    ),
]


@pytest.mark.parametrize(("pattern", "shape", "sizes", "words"), MISFITS)
def test_shapes_that_do_not_fit(pattern: str, shape: tuple, sizes: dict, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        parse(pattern).bind(shape, sizes)


def test_sizes_of_unknown_axes_are_refused() -> None:
    with pytest.raises(PatternError, match=r"q=3 is given but 'n c \.\.\. -> c' has no axis 'q'"):
        parse("n c ... -> c").bind((4, 3), {"q": 3})


def test_errors_are_also_value_errors() -> None:
    with pytest.raises(ValueError, match="has no '->'"):
        parse("n c")
    with pytest.raises(ValueError, match="describes 2 dimensions"):
        parse("n c -> c").bind((1, 2, 3))


def test_a_spec_cannot_be_changed() -> None:
    spec = parse("n c ... -> c")
    with pytest.raises(AttributeError):
        spec.owners = ()  # type: ignore[misc]
    assert isinstance(spec, NormSpec)
    assert parse("n c ... -> c") is spec  # read once, used everywhere
