"""Random networks fold right, or their norms are left by name: no wrong fold, and no accident.

`EVENKEEL_GRAPHS` says how many networks, 200 if it says nothing.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, note, settings
from torch import Tensor, nn

from evenkeel.errors import SurgeryError
from evenkeel.surgery.fold import FoldReport, fold
from evenkeel.surgery.graph import is_norm, name_of

from .nets import randomized, state
from .random_graphs import KINDS, NORMS, Case, cases, numbered

GRAPHS = int(os.environ.get("EVENKEEL_GRAPHS", "200"))
TOLERANCE = 1e-8
"""Of the largest output, in float64."""
UNSEEN = ((2, 1, 1.0, 0), (3, 2, 3.0, 0), (1, 3, 1.0, 0), (2, 4, 1.0, 1), (2, 5, 1.0, 3))
"""Samples, seed, spread and additional size of inputs that the fold has not seen."""

MISHEARD = "what torch.fx sees of"
"""The one reason to refuse a whole network here: torch.fx hears ``v += w`` as ``v = v + w``."""

many = settings(
    max_examples=GRAPHS,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@torch.no_grad()
def run(network: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output; some networks write over their input."""
    return network(*(x.clone() for x in inputs))


def runs(network: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """True if the network takes inputs of that shape."""
    try:
        run(network, inputs)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return True


def assert_equal(model: nn.Module, folded: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """The folded network gives what the network gives."""
    wanted, found = run(copy.deepcopy(model).eval(), inputs), run(folded, inputs)
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    difference = float((found - wanted).abs().max())
    assert difference <= TOLERANCE * float(wanted.abs().max()), (difference, wanted.abs().max())


def assert_accounted(case: Case, folded: Any, report: FoldReport) -> None:
    """Every norm is folded or left, and none is both; no other is to be found."""
    done, left = [f.norm for f in report.folded], [norm for norm, _ in report.left]
    assert case.norms <= {*done, *left}
    others = {*done, *left} - case.norms
    assert len(others) == case.functions
    assert all(norm.startswith("batch_norm") for norm in others)
    once = Counter(norm for norm in (*done, *left) if norm not in case.again)
    assert set(once.values()) <= {1}
    assert {name_of(node) for node in folded.graph.nodes if is_norm(node)} <= set(left)
    assert all(reason for _, reason in report.left)


def folding(case: Case) -> tuple[Any, FoldReport]:
    """Folds the network and leaves it as it was."""
    inputs = case.inputs(2, seed=0)
    before = state(case.model)
    folded, report = fold(case.model, inputs if len(inputs) > 1 else inputs[0])
    assert state(case.model) == before
    return folded, report


@pytest.mark.timeout(600 + 2 * GRAPHS)
@many
@given(cases())
def test_random_networks_fold_right_or_are_left(case):
    note(str(case.model))
    try:
        folded, report = folding(case)
    except SurgeryError as error:
        if not str(error).startswith(MISHEARD) or "+=" not in case.model.code:
            raise
        return
    assert_accounted(case, folded, report)
    assert report.difference <= report.budget * report.scale
    for n, seed, spread, more in UNSEEN:
        inputs = case.inputs(n, seed, spread, more)
        if runs(case.model, inputs):  # some take one size, or two samples at least
            assert_equal(case.model, folded, inputs)


# Traps that random networks have found


class Small(nn.Module):
    """A few modules under short names, put together by a function."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.how = how
        for name, module in modules.items():
            self.add_module(name, module)
        randomized(self.double().eval())

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


class Bounded(nn.BatchNorm2d):
    """A norm that also does tanh."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


def written_between(m: Any, x: Tensor) -> Tensor:
    r = m.c(x)
    total = m.n(x.sigmoid()) + r
    later = r.add_(1)
    return F.relu(total) * later


def written_between_norms(m: Any, x: Tensor) -> Tensor:
    first = m.n(x)
    second = F.batch_norm(first, m.n.running_mean, m.n.running_var)
    return first.add_(1) * F.leaky_relu(second, 0.2)


def written_behind_a_norm_that_goes(m: Any, x: Tensor) -> Tensor:
    first = m.n(m.c(x))
    second = m.n2(first)
    over = first.relu_()
    return over + m.d(second)


def one_activation_in_two_places(m: Any, x: Tensor) -> Tensor:
    first = m.c(x)
    second = m.d(m.a(m.n(first)))
    view = second.flatten(1)
    m.a(second)
    return torch.cat([view, first.sigmoid().flatten(1)], 1)


def tied(model: Any) -> nn.Module:
    model.d.weight = model.c.weight
    return model


IMAGE, ROWS, LINES = (4, 5, 5), (6,), (6, 4)
conv, dense, bn1, bn2 = nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d
SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a view of an expanded map": (
        lambda: Small(
            lambda m, x: m.n(m.c(x).relu()).view(-1, 2, 2, 5, 5).transpose(1, 2).reshape(-1, 100),
            c=conv(4, 4, 1), n=bn2(4),
        ), IMAGE,
    ),
    "a user's norm that stays, between a reader and a layer": (
        lambda: Small(lambda m, x: m.c(m.n(x)) + x.sigmoid(), n=Bounded(4), c=conv(4, 4, 1)),
        IMAGE,
    ),
    "the input is written over": (
        lambda: Small(lambda m, x: m.c(m.n(x.add_(1))), n=bn2(4), c=conv(4, 4, 1)), IMAGE,
    ),
    "the norm's output is written over and read again": (
        lambda: Small(
            lambda m, x: m.a(v := m.n(m.c(x))) + v.sigmoid(),
            c=conv(4, 4, 1), n=bn2(4), a=nn.LeakyReLU(-0.5, inplace=True),
        ), IMAGE,
    ),
    "a view of the norm's output is written over": (
        lambda: Small(
            lambda m, x: m.d(m.n(v := m.c(x)).flatten(1).relu_()) + v.sum((1, 2, 3))[:, None],
            c=conv(4, 4, 1), n=bn2(4), d=dense(100, 3),
        ), IMAGE,
    ),
    "an identity of the norm's output is written over": (
        lambda: Small(
            lambda m, x: m.d(m.i(m.n(v := m.c(x))).relu_()) + v.sigmoid(),
            c=conv(4, 4, 1), n=bn2(4), i=nn.Identity(), d=conv(4, 4, 1),
        ), IMAGE,
    ),
    "the other side of the sum is written over before the activation": (
        lambda: Small(
            lambda m, x: F.relu(m.n(x.sigmoid()) + (r := m.c(x))) * r.add_(1),
            c=conv(4, 4, 1), n=bn2(4),
        ), IMAGE,
    ),
    "the other side of the sum is written over between": (
        lambda: Small(written_between, c=conv(4, 4, 1), n=bn2(4)), IMAGE,
    ),
    "written over between two norms that stay": (
        lambda: Small(written_between_norms, n=bn2(4)), IMAGE,
    ),
    "written over before a layer that reads it through a norm": (
        lambda: Small(written_behind_a_norm_that_goes, c=conv(4, 4, 1), n=bn2(4), n2=bn2(4),
                      d=conv(4, 4, 1)),
        IMAGE,
    ),
    "an activation in place that writes over another value elsewhere": (
        lambda: Small(one_activation_in_two_places, c=conv(4, 4, 1), n=bn2(4), d=conv(4, 4, 1),
                      a=nn.ReLU(inplace=True)),
        IMAGE,
    ),
    "weights that are another layer's too": (
        lambda: tied(Small(lambda m, x: m.d(m.n(m.c(x)).relu()), c=conv(4, 4, 1), n=bn2(4),
                           d=conv(4, 4, 1))),
        IMAGE,
    ),
    "rows: the largest of two channels": (
        lambda: Small(lambda m, x: m.d(m.p(m.n(x))), n=bn1(6), p=nn.MaxPool1d(2), d=dense(3, 3)),
        ROWS,
    ),
    "rows: the mean of all channels": (
        lambda: Small(
            lambda m, x: m.d(m.p(m.n(x))), n=bn1(6), p=nn.AdaptiveAvgPool1d(1), d=dense(1, 3)
        ), ROWS,
    ),
    "sequences: the largest of two channels": (
        lambda: Small(lambda m, x: m.d(m.p(m.n(x))), n=bn1(6), p=nn.MaxPool2d(2), d=dense(2, 3)),
        LINES,
    ),
    "sequences: the mean of all channels": (
        lambda: Small(
            lambda m, x: m.d(m.p(m.n(x))), n=bn1(6), p=nn.AdaptiveAvgPool2d((1, 4)), d=dense(4, 3)
        ), LINES,
    ),
    "images: the largest of all channels": (
        lambda: Small(
            lambda m, x: m.d(m.p(m.n(x))), n=bn2(4), p=nn.AdaptiveMaxPool3d(1), d=dense(1, 3)
        ), IMAGE,
    ),
    "a function that stays, in double precision": (
        lambda: Small(
            lambda m, x: F.batch_norm(x, m.n.running_mean, m.n.running_var).relu(), n=bn2(4)
        ), IMAGE,
    ),
}  # fmt: skip


def rising(model: nn.Module) -> nn.Module:
    """The same with norms that only scale, by more than zero: they pass more."""
    for module in model.modules():
        if isinstance(module, bn1 | bn2):
            with torch.no_grad():
                module.weight.copy_(module.weight.abs() + 0.2)
                module.bias.zero_()
                module.running_mean.zero_()
    return model


@pytest.mark.parametrize("change", [lambda model: model, rising], ids=["any", "rising"])
@pytest.mark.parametrize("case", SMALL)
def test_traps(case, change):
    """Right, or left by name; never an accident, and never a refusal of the whole network."""
    torch.manual_seed(0)
    made, shape = SMALL[case]
    model = change(made())
    one = Case(model, (shape,), frozenset(), frozenset(), 0, ())
    folded, report = folding(one)
    assert report.folded or report.left
    for n, seed, spread, _ in UNSEEN:
        assert_equal(model, folded, one.inputs(n, seed, spread))


SIZED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "padded to an even width, norm first": lambda m, x: m.c(F.pad(m.n(x), (0, x.shape[3] % 2))),
    "padded to an even width, norm last": lambda m, x: m.n(F.pad(m.c(x), (0, x.shape[3] % 2))),
    "joined along the height": lambda m, x: m.c(m.n2(torch.cat([m.n(x), x.sigmoid()], 2))),
    "joined along the height, norm last": lambda m, x: m.n(torch.cat([m.c(x), m.c2(x)], 2)),
    "resized to a size that is asked for": lambda m, x: m.c(F.interpolate(m.n(x), x.shape[3])),
    "pooled with a divisor, norm first": lambda m, x: m.c(
        F.avg_pool2d(m.n(x), 2, 2, 0, ceil_mode=True, divisor_override=4)
    ),
    "pooled with a divisor, norm last": lambda m, x: m.n(
        F.avg_pool2d(m.c(x), 2, 2, 0, ceil_mode=True, divisor_override=4)
    ),
    "pooled by halves": lambda m, x: m.c(F.avg_pool2d(m.n(x), 2, ceil_mode=True)),
    "pooled as a whole": lambda m, x: m.c(F.avg_pool2d(m.n(x), x.shape[2:])),
    "zero padding": lambda m, x: m.c(m.n(x)),
}


@pytest.mark.parametrize("change", [lambda model: model, rising], ids=["any", "rising"])
@pytest.mark.parametrize("case", SIZED)
def test_other_image_sizes(case, change):
    """What the example has happens to be no rule."""
    torch.manual_seed(0)
    layers = {"c": conv(4, 4, 3, padding=2), "c2": conv(4, 4, 3, padding=2)}
    model = change(Small(SIZED[case], n=bn2(4), n2=bn2(4), **layers))
    folded, _ = folding(Case(model, ((4, 6, 6),), frozenset(), frozenset(), 0, ()))
    for size in ((6, 6), (7, 7), (5, 9), (1, 1)):
        inputs = Case(model, ((4, *size),), frozenset(), frozenset(), 0, ()).inputs(2, 1)
        assert_equal(model, folded, inputs)


class Hidden(nn.Module):
    """torch.fx hears ``+=`` as ``+``: in the graph, what is read afterwards is another value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        value = x
        value += x
        return self.conv(value) + self.norm(x)


def test_what_torch_fx_mishears_is_refused():
    model = randomized(Hidden().double()).eval()
    one = Case(model, (IMAGE,), frozenset({"norm"}), frozenset(), 0, ())
    with pytest.raises(SurgeryError, match=MISHEARD):
        folding(one)


# The networks are worth it, and the judges are awake


def test_the_networks_have_everything_and_fold_every_way():
    seen: Counter[str] = Counter()
    for number in range(120):
        case = numbered(number)
        seen.update(set(case.marks))
        try:
            _, report = folding(case)
        except SurgeryError:
            seen.update({"refused"})
            continue
        seen.update({f.direction for f in report.folded})
        seen.update({"through" for f in report.folded if f.through})
        seen.update({"into several" for f in report.folded if len(f.into) > 1})
        seen.update({"left" for _ in report.left})
    assert not {*KINDS, *NORMS, "a function"} - set(seen)
    least = {"backward": 40, "forward": 20, "through": 25, "into several": 20, "left": 60}
    assert all(seen[what] >= count for what, count in least.items()), seen
    assert seen["refused"] <= 3


def one_case() -> Case:
    """Two convolutions with a norm that goes into the first."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm1(self.conv1(x))

    torch.manual_seed(0)
    model = Pair().double().eval()
    return Case(model, ((4, 6, 6),), frozenset({"norm1"}), frozenset(), 0, ())


@pytest.mark.parametrize("factor", [1 + 1e-6, -1.0])
def test_a_wrong_fold_is_seen(factor):
    case = one_case()
    folded, _ = folding(case)
    assert_equal(case.model, folded, case.inputs(2, 1))
    with torch.no_grad():
        next(folded.parameters()).mul_(factor)
    with pytest.raises(AssertionError):
        assert_equal(case.model, folded, case.inputs(2, 1))


def test_a_norm_that_nobody_speaks_of_is_seen():
    case = one_case()
    folded, report = folding(case)
    assert_accounted(case, folded, report)
    silent = FoldReport(**{**vars(report), "folded": ()})
    twice = FoldReport(**{**vars(report), "left": (("norm1", "a reason"),)})
    for wrong in (silent, twice):
        with pytest.raises(AssertionError):
            assert_accounted(case, folded, wrong)
    with pytest.raises(AssertionError):
        assert_accounted(case, torch.fx.symbolic_trace(case.model), report)
