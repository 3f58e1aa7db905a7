"""Views: every memory layout as kept, reduced, kept, reduced, ..."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evenkeel.view import View, logical_view, view_of

N, C, H, W, D = 2, 3, 5, 7, 11
AXES = "nchw"
SUBSETS = [set(s) for r in range(5) for s in itertools.combinations(range(4), r)]


def laid_out(shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """A tensor of ``shape`` with different values, its memory in ``order``, slowest first."""
    numel = 1
    for size in shape:
        numel *= size
    flat = torch.arange(numel, dtype=torch.float64).reshape([shape[d] for d in order])
    return flat.permute([order.index(d) for d in range(len(shape))])


def seen(x: Tensor, kept: set[int]) -> View:
    view = view_of(x.shape, x.stride(), sorted(kept))
    assert view is not None
    return view


NCHW, NHWC = (0, 1, 2, 3), (0, 2, 3, 1)
NAMED = [
    # owners, view of NCHW memory, view of NHWC memory
    ("c", (1, N, C, H * W), (1, N * H * W, C, 1)),
    ("chw", (1, N, C * H * W, 1), (1, N, C * H * W, 1)),
    ("hw", (1, N * C, H * W, 1), (1, N, H * W, C)),
    ("n", (1, 1, N, C * H * W), (1, 1, N, C * H * W)),
    ("nc", (1, 1, N * C, H * W), (N, H * W, C, 1)),
    ("nhw", (N, C, H * W, 1), (1, 1, N * H * W, C)),
    ("", (1, 1, 1, N * C * H * W), (1, 1, 1, N * C * H * W)),
    ("cw", (1, N, C, H, W, 1), (1, N * H, W * C, 1)),
    ("ch", (1, N, C * H, W), (1, N, H, W, C, 1)),
]


@pytest.mark.parametrize(("owners", "nchw", "nhwc"), NAMED, ids=[n[0] or "none" for n in NAMED])
def test_views_of_named_patterns(owners: str, nchw: tuple, nhwc: tuple) -> None:
    kept = {AXES.index(name) for name in owners}
    assert seen(laid_out((N, C, H, W), NCHW), kept).sizes == nchw
    assert seen(laid_out((N, C, H, W), NHWC), kept).sizes == nhwc


def test_group_norm_in_both_layouts() -> None:
    g, c = 4, 3
    nchw = laid_out((N, g, c, H, W), (0, 1, 2, 3, 4))
    nhwc = laid_out((N, g, c, H, W), (0, 3, 4, 1, 2))
    assert seen(nchw, {0, 1}).sizes == (1, 1, N * g, c * H * W)
    assert seen(nhwc, {0, 1}).sizes == (N, H * W, g, c)


@pytest.mark.parametrize(
    ("shape", "order", "too_long"),
    [
        ((N, C, H, W), NCHW, ["cw"]),
        ((N, C, H, W), NHWC, ["ch"]),
        ((N, C, D, H, W), (0, 1, 2, 3, 4), ["cw", "ch", "chw", "cdw", "dw", "ndw"]),
    ],
)
def test_four_numbers_are_nearly_always_enough(shape: tuple, order: tuple, too_long: list) -> None:
    axes = AXES if len(shape) == 4 else "ncdhw"
    x = laid_out(shape, order)
    found = [
        "".join(owners)
        for r in range(len(axes) + 1)
        for owners in itertools.combinations(axes, r)
        if not seen(x, {axes.index(name) for name in owners}).is_four
    ]
    assert sorted(found) == sorted(too_long)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_every_owner_set_in_every_layout(order: tuple[int, ...]) -> None:
    """Folding shares the memory, keeps every value with its owner, and can be undone."""
    x = laid_out((N, C, H, W), order)
    for kept in SUBSETS:
        view = seen(x, kept)
        folded = view.fold(x)
        assert folded.shape == view.sizes
        assert folded.data_ptr() == x.data_ptr()
        assert folded.is_contiguous()
        assert torch.equal(view.unfold(folded, x), x)
        assert view.unfold(folded, x).stride() == x.stride()
        reduced = [d for d in range(4) if d not in kept]
        wanted = x.mean(reduced) if reduced else x
        mean = folded.mean(view.reduced_dims)
        assert mean.shape == view.kept_sizes
        assert torch.allclose(view.unfold_vector(mean, x.shape), wanted, rtol=1e-14)
        assert torch.allclose(view.fold_vector(wanted, x.shape), mean, rtol=1e-14)
        assert view.count * mean.numel() == x.numel()


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_random_shapes_and_layouts(shape: list[int], random) -> None:
    order = tuple(random.sample(range(len(shape)), len(shape)))
    kept = {d for d in range(len(shape)) if random.random() < 0.5}
    x = laid_out(tuple(shape), order)
    for view in (seen(x, kept), logical_view(shape, sorted(kept))):
        folded = view.fold(x)
        assert torch.equal(view.unfold(folded, x), x)
        vector = torch.arange(x.numel() // view.count)
        there = view.unfold_vector(vector.reshape(view.kept_sizes), x.shape)
        assert torch.equal(view.fold_vector(there, x.shape).flatten(), vector)
        reduced = [d for d in range(x.dim()) if d not in kept]
        maximum = x.amax(reduced) if reduced else x
        assert torch.equal(view.unfold_vector(folded.amax(view.reduced_dims), x.shape), maximum)


def test_a_vector_out_of_order_would_be_noticed() -> None:
    """In NHWC memory the owners ``c h w`` lie as ``h w c``: skipping the reorder is wrong."""
    x = laid_out((N, C, H, W), NHWC)
    view = seen(x, {1, 2, 3})
    mean = view.fold(x).mean(view.reduced_dims)
    assert not torch.equal(mean.reshape(C, H, W), x.mean(0))
    assert torch.equal(view.unfold_vector(mean, x.shape), x.mean(0))


X = torch.arange(float(2 * 6 * 4 * 8)).reshape(2, 6, 4, 8)
GAPS = {
    "every second column": X[..., ::2],
    "first channels": X[:, :3],
    "expanded batch": X[:1].expand(4, -1, -1, -1),
    "expanded scalar": torch.tensor(1.0).expand(2, 3, 4, 5),
    "overlapping windows": torch.arange(10.0).unfold(0, 4, 1),
    "diagonal": torch.arange(16.0).reshape(4, 4).diagonal(),
}


@pytest.mark.parametrize("x", GAPS.values(), ids=GAPS.keys())
def test_gaps_and_overlaps_have_no_view(x: Tensor) -> None:
    assert view_of(x.shape, x.stride(), [min(1, x.dim() - 1)]) is None
    copy = x.clone()
    assert view_of(copy.shape, copy.stride(), [min(1, x.dim() - 1)]) is not None
    view = logical_view(x.shape, [0])  # needs no dense memory
    assert torch.equal(view.unfold(view.fold(x), x), x)


DENSE = {
    "transposed": (X.transpose(1, 3), (1, 2 * 6 * 4, 8, 1)),
    "first sample": (X[:1], (1, 1, 6, 32)),
    "expanded size 1": (X[:1].expand(1, 6, 4, 8), (1, 1, 6, 32)),
    "one channel of one sample": (X[:1, :1], (1, 1, 1, 32)),
    "step over nothing": (X[::2], (1, 1, 6, 32)),
    "odd stride of a size 1": (torch.zeros(6).as_strided((2, 1, 3), (3, 77, 1)), (1, 1, 1, 6)),
    "one image, no places": (torch.zeros(5, 3, 1, 1), (1, 5, 3, 1)),
}


@pytest.mark.parametrize(("x", "sizes"), DENSE.values(), ids=DENSE.keys())
def test_dense_memory_needs_no_copy(x: Tensor, sizes: tuple[int, ...]) -> None:
    view = view_of(x.shape, x.stride(), [1])
    assert view is not None
    assert view.sizes == sizes
    assert view.fold(x).data_ptr() == x.data_ptr()


def test_sizes_of_one_are_in_nobodys_way() -> None:
    """They neither split a run nor make two layouts of one memory differ."""
    assert logical_view((1, 1, 1, 5), [1, 3]).sizes == (1, 1, 5, 1)
    assert logical_view((2, 1, 3, 1, 5), [1, 3]).sizes == (1, 1, 1, 30)
    assert logical_view((2, 3, 1, 5), [1, 3]).sizes == (1, 2, 15, 1)
    strides = [(6, 1, 77, 3), (6, 1, 3, 77), (6, 1, 1, 1), (6, 1, 6, 6), (6, 1, 0, 0)]
    views = {view_of((5, 6, 1, 1), given, [1]) for given in strides}
    assert len(views) == 1


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_empty_tensors_have_a_view(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    view = seen(x, {1})
    assert view.fold(x).shape == view.sizes
    assert view.unfold(view.fold(x), x).shape == x.shape
    assert view.count == shape[0] * shape[2]
    assert view.unfold_vector(torch.zeros(view.kept_sizes), shape).shape == (shape[1],)
