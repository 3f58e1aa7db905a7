"""Every norm that algebra can remove from the architectures is removed, the rest has its reason."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

import evenkeel
from evenkeel.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from evenkeel.surgery.fold import FoldReport, fold
from evenkeel.surgery.graph import is_norm, name_of
from evenkeel.surgery.introduce import PLACEMENTS, introduce

from .architectures import BARE, NORMED, images
from .nets import randomized, state

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Of the largest output."""


@dataclass(frozen=True)
class Table:
    """Into which layers each norm goes, by direction; and a word of the reason of those left."""

    backward: dict[str, str]
    forward: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def own(norm: str) -> str:
    """The layer just before a norm, by the names that both have in these networks."""
    path, dot, last = norm.rpartition(".")
    before = str(int(last) - 1) if last.isdigit() else re.sub("bn|norm", "conv", last)
    return f"{path}{dot}{before}"


def each(text: str) -> dict[str, str]:
    """Norms that go into the layer just before them."""
    return {norm: own(norm) for norm in text.split()}


def under(blocks: str, norms: str) -> dict[str, str]:
    return each(" ".join(f"{b}.{n}" for b in blocks.split() for n in norms.split()))


SHARED = "used"  # what the norm reads is read by others too
ADDED = "add"  # to something that no norm has scaled
NEGATIVE = "negative|below zero"  # which turns a maximum into a minimum

TABLES = {
    "vgg": Table(each("features.1 features.4 features.8 features.11 classifier.1")),
    "resnet": Table(
        each("bn1 layer2.0.downsample.1") | under("layer1.0 layer1.1 layer2.0", "bn1 bn2")
    ),
    "bottlenecks": Table(
        each("bn1") | under("layer1.0 layer1.1 layer2.0", "bn1 bn2 bn3 downsample.1")
    ),
    "pre-activation": Table(
        {
            "blocks.0.bn2": "blocks.0.conv1",
            "blocks.1.bn2": "blocks.1.conv1",
            "bn": "blocks.1.conv2 blocks.1.shortcut",  # backward through the sum
        },
        left={"blocks.0.bn1": SHARED, "blocks.1.bn1": SHARED},
    ),
    "densenet": Table(
        {
            "features.norm0": "features.conv0",
            "features.block1.layer0.norm2": "features.block1.layer0.conv1",
            "features.block1.layer1.norm2": "features.block1.layer1.conv1",
            "features.block2.layer0.norm2": "features.block2.layer0.conv1",
            "features.block2.layer1.norm2": "features.block2.layer1.conv1",
        },
        left={  # all that is concatenated goes to the layers in between as well
            "features.block1.layer0.norm1": SHARED,
            "features.block1.layer1.norm1": SHARED,
            "features.transition.norm": SHARED,
            "features.block2.layer0.norm1": SHARED,
            "features.block2.layer1.norm1": SHARED,
            "features.norm5": SHARED,
        },
    ),
    "mobilenet": Table(each("0.1") | under("1.conv 2.conv", "0.1 1.1 3")),
    "inception": Table(
        each("0.bn")
        | under("2 3", "branch1.bn branch3.0.bn branch3.1.bn branch_pool.bn")
        | under("2.branch5 3.branch5", "0.bn 1.bn 2.bn")
    ),
    "cross-stage": Table(
        each("0.1 1.cv1.1 1.m.0.1 1.m.1.1 1.cv4.1") | {"1.bn": "1.cv3 1.cv2"}
    ),
    "squeeze-excite": Table({"stem.1": "stem.0", "bn1": "depthwise", "bn2": "project"}),
    "shufflenet": Table(
        each("conv1.1 conv5.1 stage2.0.branch1.1 stage2.0.branch1.3")
        | under("stage2.0.branch2 stage2.1.branch2", "1 4 6")
    ),
    "u-net": Table(
        under("inc down1 conv1 conv2", "1 4")
        | {"down2.3": "down2.1", "up1.1": "up1.0", "up2.2": "up2.0"}
    ),
    "generator": Table(each("1 4 7")),
    "sequence": Table(each("bn1 bn2 bn3"), {"bn0": "conv1"}),
    "volumes": Table(under("0 1 2", "bn1 bn2") | each("0.downsample.1 2.downsample.1")),
    "functional": Table({"batch_norm": "conv2d", "batch_norm_1": "conv2d_1"}),
    "post-activation": Table(
        {},
        {"0": "1", "3": "4", "11": "13", "15": "17"},
        {"6": NEGATIVE},
    ),
    "squeezenet": Table(
        {},
        {
            "2.norm1": "2.expand1x1 2.expand3x3",
            "2.norm2": "3.squeeze",
            "3.norm1": "3.expand1x1 3.expand3x3",
            "3.norm2": "5",
        },
    ),
    "convmixer": Table(
        {},
        {"6.2": "9"},
        {"2": ADDED, "3.fn.2": ADDED, "4.2": ADDED, "5.fn.2": ADDED},
    ),
    "per-activation": Table({"8": "7"}, {"5": "7"}),
}  # fmt: skip

THROUGH = {
    ("pre-activation", "bn"): r"add(_\d+)?",
    ("cross-stage", "1.bn"): r"cat(_\d+)?",
    ("u-net", "up2.2"): r"up2\.1",
    ("u-net", "down2.3"): r"down2\.2",
    ("post-activation", "11"): r"12",
    ("post-activation", "15"): r"16",
    ("squeezenet", "3.norm2"): r"4",
    ("convmixer", "6.2"): r"7 8",
    ("vgg", "features.1"): r"",
}


POOLLESS = ("pre-activation", "squeeze-excite", "generator", "squeezenet")
"""They pool nothing that a layer comes behind."""
FIXED = ("post-activation", "per-activation")
"""Their dense layers fix the images' size."""


@torch.no_grad()
def assert_same(model: nn.Module, folded: nn.Module, x: Tensor, tolerance: float) -> None:
    """Equal to within the tolerance of the largest output."""
    wanted, found = copy.deepcopy(model).eval()(x), folded(x)
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert wanted.abs().max() > 0.1
    difference = float((found - wanted).abs().max())
    assert difference <= tolerance * float(wanted.abs().max())


def lively(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The architecture with random statistics and gammas, one of each norm zero."""
    return randomized(NORMED[name](), seed=1).to(dtype)


def assert_table(report: FoldReport, table: Table) -> None:
    """What was folded, into what, and what was left is as the table has it."""
    for direction, wanted in (("backward", table.backward), ("forward", table.forward)):
        done = {f.norm: set(f.into) for f in report.folded if f.direction == direction}
        assert done == {norm: set(into.split()) for norm, into in wanted.items()}
    assert {norm for norm, _ in report.left} == set(table.left)
    for norm, reason in report.left:
        assert re.search(table.left[norm], reason, re.IGNORECASE), (norm, reason)


def norms_in(folded: nn.Module) -> set[str]:
    return {name_of(node) for node in folded.graph.nodes if is_norm(node)}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", NORMED)
def test_every_norm_that_algebra_can_remove_is_removed(name, dtype):
    model, x = lively(name, dtype), images(name, 4).to(dtype)
    before = state(model)
    folded, report = fold(model, x)
    assert state(model) == before
    assert_table(report, TABLES[name])
    assert norms_in(folded) <= set(TABLES[name].left)
    for seed in (1, 2):
        assert_same(model, folded, images(name, 3, seed).to(dtype), TOLERANCES[dtype])
    assert report.difference <= report.budget * report.scale
    assert all(f.difference <= report.budget for f in report.folded)
    for norm, _, through, _, _ in report.folded:
        if (name, norm) in THROUGH:
            assert re.search(f"^{THROUGH[name, norm]}$", " ".join(through))


def test_the_tables_are_complete():
    assert list(TABLES) == list(NORMED) == list(BARE)
    for name, table in TABLES.items():
        parts = [set(part) for part in (table.backward, table.forward, table.left)]
        assert sum(map(len, parts)) == len(set.union(*parts)) > 0, name
    for name, norm in THROUGH:
        assert norm in TABLES[name].backward | TABLES[name].forward


@pytest.mark.parametrize("name", [name for name in NORMED if name not in FIXED])
def test_images_of_another_size_are_right_too(name):
    """What a fold writes into the weights holds at every size that the network takes."""
    model, x = lively(name), images(name, 2).double()
    folded, _ = fold(model, x)
    larger = torch.randn([n + 8 if i > 1 else n for i, n in enumerate(x.shape)]).double()
    assert_same(model, folded, larger, 1e-9)


@pytest.mark.parametrize("name", ["sequence", "post-activation", "convmixer", "pre-activation"])
def test_folding_what_is_folded_changes_nothing(name):
    model, x = lively(name), images(name).double()
    once, _ = fold(model, x)
    twice, report = fold(once, x)
    assert report.folded == report.left == ()
    assert_same(once, twice, images(name, 3, seed=1).double(), 1e-12)
    assert_same(model, twice, images(name, 3, seed=1).double(), 1e-9)


@pytest.mark.parametrize("name", ["pre-activation", "shufflenet", "generator", "u-net"])
def test_a_folded_network_is_copied_pickled_exported_and_compiled(name):
    """Even where its annotations are strings, as in files that postpone them."""
    folded, _ = fold(lively(name), images(name).double())
    x = images(name, 3, seed=1).double()
    program = torch.export.export(folded, (x,)).module()
    compiled = torch.compile(copy.deepcopy(folded), backend="aot_eager", fullgraph=True)
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), program, compiled):
        with torch.no_grad():
            torch.testing.assert_close(other(x), folded(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["vgg", "shufflenet", "generator", "post-activation"])
def test_channels_last_stays_channels_last(name):
    model, x = lively(name).to(memory_format=torch.channels_last), images(name).double()
    folded, report = fold(model, x.contiguous(memory_format=torch.channels_last))
    assert_table(report, TABLES[name])
    assert_same(model, folded, images(name, 3, seed=1).double(), 1e-9)
    for weight in folded.parameters():
        assert weight.dim() != 4 or weight.is_contiguous(memory_format=torch.channels_last)


# The same algebra whatever the norms are


def ours(model: nn.Module, **options: bool) -> nn.Module:
    """The network with evenkeel's norms for torch's."""
    for name, norm in list(model.named_modules()):
        for theirs, kind in zip(TORCHS, OURS, strict=True):
            if type(norm) is theirs:
                made = kind(norm.num_features, norm.eps, **options).to(norm.running_mean)
                made.load_state_dict(norm.state_dict(), strict=not options)
                model.set_submodule(name, made)
    return model


TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
OURS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


def frozen(model: nn.Module) -> nn.Module:
    evenkeel.freeze(model)
    return model.train()


def accelerated(model: nn.Module) -> nn.Module:
    return evenkeel.accelerate(model, allocator="default")[0]


KINDS = {"ours": ours, "frozen": frozen, "accelerated": accelerated}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in NORMED if name != "functional"])
def test_all_kinds_of_norms_fold_alike(name, kind):
    model, x = lively(name), images(name).double()
    wanted = copy.deepcopy(model).eval()(x).detach()
    own_kind = KINDS[kind](model)
    folded, report = fold(own_kind, x)
    assert_table(report, TABLES[name])
    assert_same(own_kind, folded, x, 1e-9)
    torch.testing.assert_close(folded(x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in NORMED if name != "functional"])
def test_norms_without_gamma_and_beta(name):
    """Scales are positive then, so a norm passes the maximum that a negative gamma cannot."""
    model = ours(lively(name), affine=False)
    folded, report = fold(model, x := images(name).double())
    table = TABLES[name]
    if name == "post-activation":
        table = Table({}, {**table.forward, "6": "8"}, {})
    assert_table(report, table)
    assert_same(model, folded, x + 0.5, 1e-9)


def positive(model: nn.Module) -> nn.Module:
    """Norms that only scale, by more than zero."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            with torch.no_grad():
                module.running_mean.zero_()
                module.bias.zero_()
                module.weight.copy_(module.weight.abs() + 0.2)
    return model


@pytest.mark.parametrize("name", NORMED)
def test_a_scale_above_zero_without_a_shift_passes_a_relu(name):
    """Then pre-activation and dense networks lose all their norms."""
    model, x = positive(lively(name)), images(name).double()
    folded, report = fold(model, x)
    left = {"convmixer": {"2", "3.fn.2", "4.2", "5.fn.2"}}
    assert {norm for norm, _ in report.left} == left.get(name, set())
    assert norms_in(folded) <= {norm for norm, _ in report.left}
    assert_same(model, folded, images(name, 3, seed=1).double(), 1e-9)


# There and back


PLACES = [
    (name, placement)
    for name in BARE
    for placement in PLACEMENTS
    if placement != "after-pooling" or name not in POOLLESS
]


@pytest.mark.parametrize(("name", "placement"), PLACES)
def test_introducing_and_folding_gives_the_network_back(name, placement):
    """With the statistics of data, a norm computes nothing, whether it is folded or left."""
    model, x = BARE[name]().eval(), images(name, 4)
    network, introduced = introduce(model, x, placement, calibrate=images(name, 16, seed=3))
    folded, report = fold(network, x)
    done = {f.norm for f in report.folded} | {norm for norm, _ in report.left}
    assert done == {norm for norm, _ in introduced.norms}
    assert_same(model, folded, images(name, 3, seed=1), 1e-5)
    if placement == "before-activation":
        assert report.left == ()


@pytest.mark.parametrize(("name", "placement"), PLACES)
def test_norms_at_every_place_fold_right(name, placement):
    """Random statistics and gammas: the folded network equals the one with the norms."""
    network, introduced = introduce(BARE[name](), images(name), placement)
    randomized(network.double(), seed=2).eval()
    folded, report = fold(network, images(name).double())
    done = {f.norm for f in report.folded} | {norm for norm, _ in report.left}
    assert done == {norm for norm, _ in introduced.norms}
    assert norms_in(folded) <= {norm for norm, _ in report.left}
    assert_same(network, folded, images(name, 3, seed=1).double(), 1e-9)
    if placement == "before-activation":
        assert report.left == ()


# The judges


def broken(change: Callable[[Tensor], None]) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, its fold with one tensor changed, and an input."""
    model, x = lively("vgg"), images("vgg").double()
    folded, _ = fold(model, x)
    with torch.no_grad():
        change(next(p for p in folded.parameters() if p.dim() == 4))
    return model, folded, x


@pytest.mark.parametrize("factor", [1 + 1e-6, -1.0, 0.0])
def test_the_comparison_sees_a_wrong_weight(factor):
    assert_same(*broken(lambda weight: None), 1e-9)
    with pytest.raises(AssertionError):
        assert_same(*broken(lambda weight: weight.mul_(factor)), 1e-9)


def test_the_table_is_compared_in_all_its_parts():
    report = fold(lively("pre-activation"), images("pre-activation").double())[1]
    right = TABLES["pre-activation"]
    assert_table(report, right)
    wrong: Iterable[Table] = (
        replace(right, backward={**right.backward, "bn": "blocks.1.conv2"}),
        replace(right, backward={}),
        replace(right, forward={"bn": "fc"}),
        replace(right, left={**right.left, "blocks.0.bn1": "no reason of this kind"}),
        replace(right, left={}),
    )
    for table in wrong:
        with pytest.raises(AssertionError):
            assert_table(report, table)
