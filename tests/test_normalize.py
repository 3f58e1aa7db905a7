"""`normalize`: random patterns against einops, the named ones against torch, refusals."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from einops import reduce, repeat
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evenkeel.errors import BackendError, ConfigError, PatternError, ShapeError
from evenkeel.functional import batch_norm, normalize
from evenkeel.pattern import parse

from .strategies import Case, cases

EPS = 1e-3
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def by_einops(x: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """y without weights, the mean and the biased variance, in einops' words."""
    there, back = f"{case.left} -> {case.right}", f"{case.right} -> {case.left}"
    mean = reduce(x, there, "mean", **case.sizes)
    var = reduce((x - repeat(mean, back, **case.sizes)).square(), there, "mean", **case.sizes)
    y = (x - repeat(mean, back, **case.sizes)) / (repeat(var, back, **case.sizes) + EPS).sqrt()
    return y, mean, var


def draw_input(case: Case, seed: int) -> Tensor:
    """A float64 tensor of the case's shape, its memory in some order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(case.shape), generator=generator).tolist()
    x = torch.randn([case.shape[d] for d in order], generator=generator, dtype=torch.float64)
    return (x * 2 + 1).permute([order.index(d) for d in range(len(order))])


@settings(max_examples=150)
@given(cases(), st.integers(0, 99))
def test_random_patterns_are_einops(case: Case, seed: int) -> None:
    """y, what is remembered, and the gradient, for any pattern in any layout."""
    spec, x = parse(case.text), draw_input(case, seed).requires_grad_()
    bound = spec.bind(case.shape, case.given)
    running = [None, None]
    if spec.averages_batch:
        running = [torch.zeros(bound.stat_shape).double() for _ in range(2)]
    options = {"eps": EPS, "sizes": case.given, "momentum": 1.0}
    if bound.count == 1:
        with pytest.raises(ShapeError, match="one value per owner"):
            normalize(x, case.text, **options)
        return
    y = normalize(x, case.text, running_mean=running[0], running_var=running[1], **options)
    wanted, mean, var = by_einops(x, case)
    torch.testing.assert_close(y, wanted, **EXACT)
    if spec.averages_batch:
        torch.testing.assert_close(running[0], mean, **EXACT)
        torch.testing.assert_close(running[1], var * bound.count / (bound.count - 1), **EXACT)
        again = normalize(
            *(x, case.text),
            running_mean=mean.detach(),
            running_var=var.detach(),
            training=False,
            **options,
        )
        torch.testing.assert_close(again, wanted, **EXACT)
    dy = torch.randn(y.shape, dtype=torch.float64)
    torch.testing.assert_close(
        *(torch.autograd.grad(out, x, dy)[0] for out in (y, wanted)), rtol=1e-9, atol=1e-9
    )


@settings(max_examples=150)
@given(cases(), st.integers(0, 99), st.randoms(use_true_random=False))
def test_random_affine_axes_are_einops(case: Case, seed: int, random) -> None:
    """Gamma and beta over any axes but the batch's, whoever owns the statistics."""
    x = draw_input(case, seed)
    batch = set(case.left.split()[0].strip("()").split())
    names = [name for name in case.sizes if name not in batch and not name.startswith("e")]
    axes = [name for name in names if random.random() < 0.5]
    bound = parse(case.text, " ".join(axes)).bind(case.shape, case.given)
    assume(bound.count > 1)
    shape = [case.sizes[name] for name in axes]
    leaves = [x.requires_grad_()]
    for _ in range(2):
        leaves.append(torch.randn(shape, dtype=torch.float64).requires_grad_())
    y = normalize(
        *(x, case.text),
        affine=" ".join(axes),
        weight=leaves[1],
        bias=leaves[2],
        eps=EPS,
        sizes=case.given,
    )
    spread = [repeat(t, f"{' '.join(axes)} -> {case.left}", **case.sizes) for t in leaves[1:]]
    wanted = by_einops(x, case)[0] * spread[0] + spread[1]
    torch.testing.assert_close(y, wanted, **EXACT)
    dy = torch.randn(y.shape, dtype=torch.float64)
    got, truth = (torch.autograd.grad(out, leaves, dy) for out in (y, wanted))
    for mine, theirs in zip(got, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_the_oracle_can_disagree() -> None:
    """einops over other axes than ours is another norm, and the comparison sees it."""
    case = Case("n c -> c", "n c", "n", (4, 3), {"n": 4, "c": 3}, {}, ("n",))
    x = torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(normalize(x, "n c -> c", eps=EPS), by_einops(x, case)[0])


X = torch.randn(4, 6, 3, 5, generator=torch.Generator().manual_seed(0))
TORCHS = {
    # pattern -> (affine, sizes, torch's own, whether torch's kernel runs it)
    "n c h w -> n c": ("c", None, lambda x, w, b: F.instance_norm(x, None, None, w, b), True),
    "n c ... -> n c": ("c", None, lambda x, w, b: F.instance_norm(x, None, None, w, b), True),
    "n (g c) h w -> n g": (
        *("(g c)", {"g": 2}),
        *(lambda x, w, b: F.group_norm(x, 2, w, b), True),
    ),
    "n (g c) ... -> n g": (
        *("(g c)", {"c": 2}),
        *(lambda x, w, b: F.group_norm(x, 3, w, b), True),
    ),
    "n (g c) h w -> n (g c)": (
        *("(g c)", {"g": 2}),
        *(lambda x, w, b: F.instance_norm(x, None, None, w, b), True),
    ),
    "(t b) c h w -> t b c": (
        *("c", {"t": 2}),
        *(lambda x, w, b: F.instance_norm(x, None, None, w, b), True),
    ),
    "n c h w -> n": ("c", None, lambda x, w, b: F.group_norm(x, 1, w, b), True),
    "n ... -> n": ("...", None, lambda x, w, b: F.layer_norm(x, (6, 3, 5), w, b), True),
    "n c h w -> n  ": ("c h w", None, lambda x, w, b: F.layer_norm(x, (6, 3, 5), w, b), True),
    "n c h w -> n h w": (
        *("c", None),
        *(lambda x, w, b: F.layer_norm(x.movedim(1, -1), (6,), w, b).movedim(-1, 1), False),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("with_weights", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("pattern", TORCHS)
def test_layer_instance_and_group_norm_are_torchs(
    pattern: str, with_weights: bool, dtype: torch.dtype
) -> None:
    affine, sizes, torchs, by_torch = TORCHS[pattern]
    affine = affine if with_weights else None
    x = X.to(dtype).requires_grad_()
    bound = parse(pattern, affine).bind(x.shape, sizes)
    weights = [None, None]
    if with_weights:
        weights = [torch.randn(bound.affine_shape).to(dtype).requires_grad_() for _ in range(2)]
    leaves = [leaf for leaf in (x, *weights) if leaf is not None]
    dy = torch.linspace(-1, 2, x.numel()).reshape(x.shape).to(dtype)
    outcomes = []
    for backend in ("auto", "reference", "torch"):
        if backend == "torch":
            y = torchs(x, *weights)
        else:
            y = normalize(
                *(x, pattern),
                affine=affine,
                weight=weights[0],
                bias=weights[1],
                sizes=sizes,
                backend=backend,
            )
        outcomes.append([y.detach(), *torch.autograd.grad(y, leaves, dy, retain_graph=True)])
        if backend == "auto":
            names = {y.grad_fn.name(), *(f.name() for f, _ in y.grad_fn.next_functions if f)}
            assert any(re.search("Native(Group|Layer)Norm", name) for name in names) is by_torch
    rtol, atol = {
        torch.float64: (1e-11, 1e-11),
        torch.float32: (2e-6, 2e-5),
        torch.float16: (2**-9, 5e-2),
    }[dtype]
    for mine, reference, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)
        torch.testing.assert_close(reference, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("pattern", ["n c h w -> n c", "n c h w -> n h w"])
def test_norms_of_a_sample_are_the_same_in_inference(pattern: str, backend: str) -> None:
    training, inference = (
        normalize(X, pattern, training=mode, backend=backend) for mode in (True, False)
    )
    assert torch.equal(training, inference)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_fusions_follow_torchs_group_norm_too(backend: str) -> None:
    x, residual = X.double(), X.flip(0).double()
    y = normalize(
        *(x, "n (g c) h w -> n g"),
        affine="(g c)",
        sizes={"g": 3},
        activation=("leaky_relu", 0.3),
        residual=residual,
        backend=backend,
    )
    wanted = F.leaky_relu(F.group_norm(x, 3) + residual, 0.3)
    torch.testing.assert_close(y, wanted, **EXACT)


@pytest.mark.parametrize(
    ("pattern", "affine"),
    [
        ("n c h w -> c", "c"),
        ("n c h w -> c", "h w"),
        ("n c h w -> n h w", "c"),
        ("n c h w -> n c", "c"),
        ("n c h w -> n", "c h w"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_y_is_like_x_on_every_path(pattern: str, affine: str, dtype: torch.dtype) -> None:
    """Also with float weights and a float residual; rounded once on all paths of our own."""
    x = X.to(dtype)
    shape = parse(pattern, affine).bind(x.shape).affine_shape
    weight = torch.linspace(0.5, 1.5, 90)[: torch.Size(shape).numel()].reshape(shape)
    y = normalize(x, pattern, affine=affine, weight=weight, bias=weight, residual=X)
    assert y.dtype == dtype
    assert y.shape == x.shape
    exact = normalize(
        *(x.double(), pattern),
        affine=affine,
        weight=weight.double(),
        bias=weight.double(),
        residual=X.double(),
        backend="reference",
    )
    eps = torch.finfo(dtype).eps
    rtol, atol = eps / 2, 2e-6
    if pattern in ("n c h w -> n c", "n c h w -> n"):  # torch's norms round before the add, too
        rtol, atol = eps, eps * float(exact.detach().abs().max()) / 2
    torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "pattern", ["n (g c) h w -> (g c)", "n (g c) h w -> g c", "n (g c) h w -> (g c) h"]
)
def test_owners_written_as_one_dimension(pattern: str) -> None:
    """The shapes of weights and gradients are the pattern's, '(g c)' being one dimension."""
    x = X.double().requires_grad_()
    shape = parse(pattern).bind(x.shape, {"g": 2}).stat_shape
    options = {"sizes": {"g": 2}, "running_mean": torch.zeros(shape).double()}
    options["running_var"] = torch.ones(shape).double()
    weight = torch.rand(shape).double().requires_grad_()
    y = normalize(x, pattern, weight=weight, bias=weight, **options)
    y.pow(2).sum().backward()
    assert weight.grad is not None
    assert weight.grad.shape == shape
    plain = "n c h w -> c h" if pattern.endswith("h") else "n c h w -> c"
    flat = (6, 3) if pattern.endswith("h") else (6,)
    same = weight.detach().reshape(flat)
    wanted = normalize(x, plain, weight=same, bias=same)
    torch.testing.assert_close(y, wanted, **EXACT)
    again = normalize(x, pattern, weight=weight, bias=weight, training=False, **options)
    assert again.shape == x.shape


def test_a_parsed_pattern_is_as_good_as_text() -> None:
    spec = parse("n c h w -> h w", "c")
    weight = torch.rand(6)
    assert torch.equal(
        normalize(X, spec, weight=weight),
        normalize(X, "n c h w -> h w", affine="c", weight=weight),
    )
    with pytest.raises(ConfigError, match="affine='c' comes with 'n c h w -> h w', which is pars"):
        normalize(X, spec, affine="c")


REFUSED: dict[str, tuple] = {
    "no norm": ("n c h w -> n c h w", {}, PatternError, "keeps every axis"),
    "unknown size": (
        *("n c h w -> c", {"sizes": {"k": 3}}, PatternError),
        "k=3 is given but 'n c h w -> c' has no axis 'k'",
    ),
    "another size": (
        *("n c h w -> c", {"sizes": {"c": 4}}, ShapeError),
        r"was built for c=4 but got \(4, 6, 3, 5\)",
    ),
    "no size": ("n (g c) h w -> n g", {}, ShapeError, "give the size of all but one"),
    "memory of samples": (
        *("n c h w -> n c", {"running_mean": torch.zeros(4, 6), "running_var": torch.ones(4, 6)}),
        *(PatternError, "owns the batch axis 'n', so every sample has its own statistics"),
    ),
    "affine of another shape": (
        *("n c h w -> h w", {"affine": "c", "weight": torch.ones(3, 5)}, ShapeError),
        r"weight of 'n c h w -> h w' must have shape \(6,\)",
    ),
    "weights without affine": (
        *("n c h w -> c", {"affine": None, "bias": torch.zeros(())}, ShapeError),
        "'n c h w -> c' was asked for without gamma and beta but got a weight or bias",
    ),
    "a backend of that name": (
        *("n c h w -> c", {"backend": "warp"}, BackendError),
        "there is no backend 'warp'",
    ),
    "a backend of that name, instance norm": (
        *("n c h w -> n c", {"backend": "warp"}, BackendError),
        "there is no backend 'warp'",
    ),
}


@pytest.mark.parametrize(("pattern", "options", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(pattern: str, options: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        normalize(X, pattern, **options)


@pytest.mark.parametrize("pattern", ["n c h w -> n c", "n c h w -> n", "n (g c) h w -> n g"])
def test_one_value_per_owner_is_refused_for_samples_too(pattern: str) -> None:
    x = torch.ones(4, 1, 1, 1) if pattern == "n c h w -> n" else torch.ones(4, 3, 1, 1)
    with pytest.raises(ShapeError, match="one value per owner"):
        normalize(x, pattern, sizes={"c": 1} if "g" in pattern else None)


@pytest.mark.parametrize(
    "pattern", ["n c h w -> c", "n c h w -> c h w", "n c h w -> n", "n c h w -> n c"]
)
def test_empty_batches_of_every_kind(pattern: str) -> None:
    assert normalize(torch.empty(0, 6, 3, 5), pattern).shape == (0, 6, 3, 5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "pattern", ["n c ... -> c", "n c h w -> c h w", "n c h w -> n", "n c h w -> h"]
)
def test_in_place(pattern, backend, training) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, 4, 3, 3).unbind()
    shape = {"n c ... -> c": (4,), "n c h w -> c h w": (4, 3, 3), "n c h w -> h": (3,)}
    running = {}
    if pattern in shape:
        running = {"running_mean": torch.ones(shape[pattern]), "running_var": torch.ones(1) * 4}
        running["running_var"] = running["running_var"].expand(shape[pattern]).clone()
    settings = {"training": training, "activation": "relu", "residual": residual}
    settings["backend"] = backend
    copies = {name: t.clone() for name, t in running.items()}
    wanted = normalize(x, pattern, **copies, **settings)
    before, version = x.data_ptr(), x._version
    y = normalize(x, pattern, **running, **settings, inplace=True)
    assert y is x
    assert (x.data_ptr(), x._version > version) == (before, True)
    torch.testing.assert_close(x, wanted, rtol=0, atol=0)
    for name, t in running.items():
        torch.testing.assert_close(t, copies[name], rtol=0, atol=0)


def test_in_place_is_refused_where_backward_needs_x() -> None:
    x = torch.randn(8, 3, 4, 4)
    weight = torch.ones(3, requires_grad=True)
    before = x.clone()
    with pytest.raises(ConfigError, match="inplace=True would write over x, which backward needs"):
        batch_norm(x, weight, training=True, inplace=True)
    assert torch.equal(x, before)
    with torch.no_grad():
        assert batch_norm(x, weight, training=True, inplace=True) is x
