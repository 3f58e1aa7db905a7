"""cuDNN itself. Run with: pytest -m gpu tests/cudnn -rP. Not yet seen on a GPU.

The first half holds the binding, the face and the backend to the reference arithmetic. The second
asks what the manual leaves open, and prints what was seen, a line that begins with ``seen:`` each;
it fails only where an answer would make evenkeel wrong.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import pytest
import torch

from evenkeel import cudnn
from evenkeel.cudnn import BatchNormMode, BatchNormOps, CudnnError
from evenkeel.kernels.cudnn import Cudnn
from evenkeel.kernels.cudnn_api import calls, handles
from evenkeel.kernels.cudnn_api.calls import Blend, Call, Pair
from evenkeel.kernels.cudnn_api.descriptors import channels_last, packed
from evenkeel.kernels.cudnn_api.library import library, missing

from ..kernels.contract import CHECKS, refusal
from ..kernels.truth import ROWS, TOLERANCES, subject

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
EPS, FACTOR = 1e-3, 0.3
PER_ACTIVATION, SPATIAL, PERSISTENT = BatchNormMode
FORMS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""With the largest error that a value may have, as a part of the largest value."""

in_every_way = pytest.mark.parametrize(
    ("mode", "form", "dtype"),
    list(itertools.product(BatchNormMode, FORMS, DTYPES)),
    ids=lambda v: str(v).removeprefix("torch."),
)


@pytest.fixture(autouse=True)
def _there():
    reason = missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def seen(record_property):
    """Prints and records what was seen."""

    def say(question: str, answer: object) -> None:
        record_property(question, str(answer))
        print(f"seen: {library()}, {torch.cuda.get_device_name()}: {question}: {answer}")

    return say


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double() * 2 + 1


class Case:
    """Tensors on the GPU in a dtype and layout; ``exact`` the same in float64 on the CPU."""

    def __init__(self, mode, form, dtype, shape=(8, 16, 7, 5)):
        self.mode, self.dtype = mode, dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        derived = cudnn.derive_bn_tensor_descriptor(torch.empty(shape), mode).shape
        data = {"x": 0, "dy": 1, "z": 2, "prior": 3}
        vectors = {"scale": 4, "bias": 5, "mean": 6, "variance": 7}
        self.exact, self.on = {}, {}
        for name, seed in {**data, **vectors}.items():
            is_data = name in data
            t = draw(*(shape if is_data else derived), seed=seed)
            t = t.abs() if name == "variance" else t
            t = t.to(dtype if is_data else self.wide)
            if is_data and len(shape) == 4:
                t = t.to(memory_format=FORMS[form])
            self.on[name], self.exact[name] = t.to(DEVICE), t.double()
        last = form == "NHWC"
        self.layout = (channels_last if last else packed)(shape)

    def near(self, got, wanted):
        error = float((got.double().cpu() - wanted.double()).abs().max())
        assert error <= DTYPES[self.dtype] * float(wanted.abs().max()), error

    def call(self):
        return Call(self.mode, self.on["x"], self.layout)


class RefusedError(Exception):
    """What cuDNN said no to; its status."""


def raw_training(case, y=None, **options):
    """The bare call, past the face's checks: (y, mean, second).

    Raises:
        RefusedError: cuDNN does not take it.
    """
    on = case.on
    y = torch.empty_like(on["x"]) if y is None else y
    saved = Pair(torch.zeros_like(on["scale"]), torch.zeros_like(on["scale"]))
    given = {"epsilon": EPS, "saved": saved, **options}
    try:
        calls.forward_training(case.call(), on["x"], y, on["scale"], on["bias"], **given)
        torch.cuda.synchronize()
    except CudnnError as error:
        raise RefusedError(error.name) from error
    return y, *saved


@in_every_way
def test_the_face_agrees_with_the_reference(mode, form, dtype):
    case = Case(mode, form, dtype)
    results = []
    for given in (case.on, case.exact):
        t = {name: value.clone() for name, value in given.items()}
        x, scale, bias = t["x"], t["scale"], t["bias"]
        done = cudnn.batch_normalization_forward_training(
            *(mode, x, scale, bias),
            exponential_average_factor=FACTOR,
            epsilon=EPS,
            running_mean=t["mean"],
            running_variance=t["variance"],
            y=t["prior"].clone(),
            alpha=0.5,
            beta=-1.0,
        )
        back = cudnn.batch_normalization_backward(
            *(mode, x, t["dy"], scale),
            epsilon=EPS,
            saved_mean=done.saved_mean,
            saved_inv_variance=done.saved_inv_variance,
            dx=t["prior"].clone(),
            alpha_data_diff=2.0,
            beta_data_diff=1.0,
        )
        alone = cudnn.batch_normalization_backward(mode, x, t["dy"], scale, epsilon=EPS)
        inferred = cudnn.batch_normalization_forward_inference(
            *(mode, x, scale, bias, t["mean"], t["variance"]), epsilon=EPS
        )
        assert done.ran_on.startswith("cuDNN 9" if x.is_cuda else "the reference")
        tensors = (*done[:3], *back[:3], *alone[:3], inferred.y, t["mean"], t["variance"])
        results.append(tensors)
    for got, wanted in zip(*results, strict=True):
        case.near(got, wanted)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.why)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
def test_the_backend_keeps_the_contract(check, row, dtype):
    s, backend = subject(row, dtype, DEVICE), Cudnn()
    reason = backend.refuses(s.view, dtype, DEVICE) if row.axes != "nchw" else refusal_of(s)
    if reason is not None:
        pytest.skip(f"cudnn refuses: {reason}")
    check(backend, s)


def refusal_of(s):
    """cuDNN has no mode for k1 > 1; all else in four numbers it must run."""
    return (
        Cudnn().refuses(s.view, s.dtype, s.device) if s.view.sizes[0] > 1 else refusal(Cudnn(), s)
    )


@pytest.mark.parametrize("shape", [(8, 16), (8, 16, 7), (4, 8, 3, 5, 2)], ids=str)
@pytest.mark.parametrize("mode", BatchNormMode)
def test_other_ranks(mode, shape):
    case = Case(mode, "NCHW", torch.float32, shape)
    results = []
    for t in (case.on, case.exact):
        options = {"exponential_average_factor": 1.0, "epsilon": EPS}
        vectors = (t["scale"], t["bias"])
        done = cudnn.batch_normalization_forward_training(mode, t["x"], *vectors, **options)
        back = cudnn.batch_normalization_backward(mode, t["x"], t["dy"], vectors[0], epsilon=EPS)
        results.append((done.y, *back[:3]))
    for got, wanted in zip(*results, strict=True):
        case.near(got, wanted)


def test_threads_and_streams_have_their_own():
    """A side stream sees its own work, and another thread another handle."""
    case, found = Case(SPATIAL, "NCHW", torch.float32), []
    first = raw_training(case)[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        again = raw_training(case)[0]

    def work():
        with handles.ready(library(), DEVICE) as handle:
            found.append((handle, raw_training(case)[0]))

    with handles.ready(library(), DEVICE) as own:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found[0][0] != own
    assert torch.equal(first, again)
    assert torch.equal(first, found[0][1])


# --- open questions ------------------------------------------------------------------------------


@in_every_way
def test_what_is_saved(mode, form, dtype, seen):
    case = Case(mode, form, dtype)
    _, mean, second = raw_training(case)
    x = case.exact["x"]
    over = (0,) if mode == PER_ACTIVATION else (0, 2, 3)
    wanted = (x.var(over, unbiased=False, keepdim=True) + EPS).rsqrt()
    off = float((second.double().cpu() / wanted - 1).abs().max())
    seen(f"saved / (1 / sqrt(var + eps)) - 1, {mode.name} {form} {dtype}", f"{off:.1e}")
    assert off < 1e-4
    case.near(mean, x.mean(over, keepdim=True))


@pytest.mark.parametrize("mode", BatchNormMode)
def test_the_running_variance_is_unbiased(mode, seen):
    case = Case(mode, "NCHW", torch.float32)
    running = Pair(torch.zeros_like(case.on["scale"]), torch.zeros_like(case.on["scale"]))
    raw_training(case, factor=1.0, running=running)
    over = (0,) if mode == PER_ACTIVATION else (0, 2, 3)
    x = case.exact["x"]
    ratio = running.second.double().cpu() / x.var(over, unbiased=False, keepdim=True)
    m = x.numel() // ratio.numel()
    seen(f"running / biased variance, m = {m}, {mode.name}", f"{float(ratio.mean()):.6f}")
    assert float((ratio * (m - 1) / m - 1).abs().max()) < 1e-4
    nan = Pair(*(torch.full_like(t, torch.nan) for t in running))
    raw_training(case, factor=1.0, running=nan)
    seen(f"NaN in running with factor 1, {mode.name}", f"stays: {bool(nan.mean.isnan().any())}")


def test_the_variance_far_from_zero(seen):
    """The backend relies on it where |mean| / std is 1000."""
    case = Case(SPATIAL, "NCHW", torch.float32)
    case.on["x"] += 2000
    case.exact["x"] = case.on["x"].double().cpu()
    second = raw_training(case)[2]
    wanted = (case.exact["x"].var((0, 2, 3), unbiased=False, keepdim=True) + EPS).rsqrt()
    off = float((second.double().cpu() / wanted - 1).abs().max())
    seen("relative error of 1 / sqrt(var + eps) at mean 2000, std 2, float32", f"{off:.1e}")


@pytest.mark.parametrize("mode", BatchNormMode)
def test_one_value_for_each_mean(mode, seen):
    case = Case(mode, "NCHW", torch.float32, (1, 4, 1, 1))
    running = Pair(torch.zeros_like(case.on["scale"]), torch.ones_like(case.on["scale"]))
    try:
        y: object = raw_training(case, factor=0.5, running=running)[0].flatten().tolist()
    except RefusedError as refused:
        y = refused
    seen(f"m = 1, {mode.name}", f"y {y}, running variance {running.second.flatten().tolist()}")


@in_every_way
def test_in_place(mode, form, dtype, seen):
    case = Case(mode, form, dtype)
    wanted = raw_training(case)[0].clone()
    kept = case.on["x"].clone()
    try:
        same: object = torch.equal(raw_training(case, y=case.on["x"])[0], wanted)
    except RefusedError as refused:
        same = refused
    case.on["x"] = kept
    on, dxs = case.on, []
    for dx in (torch.empty_like(on["dy"]), on["dy"]):
        sums = torch.empty_like(on["scale"]), torch.empty_like(on["scale"])
        try:
            calls.backward(case.call(), on["x"], on["dy"], dx, on["scale"], *sums, epsilon=EPS)
            dxs.append(dx.clone())
        except CudnnError as error:
            print(error)
    is_same = len(dxs) == 2 and torch.equal(*dxs)
    seen(f"in place, {mode.name} {form} {dtype}", f"y = x {same}, dx = dy {is_same}")


@in_every_way
def test_layouts_that_differ(mode, form, dtype, seen):
    case = Case(mode, form, dtype)
    wanted, on, call = raw_training(case)[0], case.on, case.call()
    other = "NHWC" if form == "NCHW" else "NCHW"
    y = torch.empty_like(on["x"]).to(memory_format=FORMS[other])
    there = call.data((channels_last if other == "NHWC" else packed)(y.shape))
    try:
        call.run(
            *("cudnnBatchNormalizationForwardTraining", mode, *call.blend(Blend())),
            *(call.x.pointer, on["x"].data_ptr(), there.pointer, y.data_ptr()),
            *(call.parameters.pointer, on["scale"].data_ptr(), on["bias"].data_ptr()),
            *(0.0, None, None, EPS, None, None),
        )
        answer: object = f"right: {torch.allclose(y.float(), wanted.float(), atol=1e-2)}"
    except CudnnError as error:
        answer = error.name
    seen(f"x {form}, y {other}, {mode.name} {dtype}", answer)


@pytest.mark.parametrize("ops", BatchNormOps)
@in_every_way
def test_the_ex_calls(mode, form, dtype, ops, seen):
    """Their sizes, what is refused, and that what is not refused is right; with a blend too."""
    case, title = Case(mode, form, dtype), f"Ex {ops.name} {mode.name} {form} {dtype}"
    on, call = case.on, case.call()
    z = on["z"] if ops == BatchNormOps.BN_ADD_ACTIVATION else None
    for blend in (Blend(), Blend(1.0, 1.0)):
        y, (dx, dz) = on["prior"].clone(), (torch.empty_like(on["x"]) for _ in range(2))
        saved = Pair(torch.zeros_like(on["scale"]), torch.zeros_like(on["scale"]))
        d_scale, d_bias = torch.empty_like(on["scale"]), torch.empty_like(on["scale"])
        try:
            sizes = [
                query(call, ops)
                for query in (calls.reserve_size, calls.forward_workspace, calls.backward_workspace)
            ]
            reserve, *spaces = (torch.zeros(n, dtype=torch.uint8, device=DEVICE) for n in sizes)
            calls.forward_training_ex(
                *(call, ops, on["x"], z, y, on["scale"], on["bias"]),
                epsilon=EPS,
                workspace=spaces[0],
                reserve=reserve,
                blend=blend,
                saved=saved,
            )
            torch.cuda.synchronize()
            y_given = None if ops == BatchNormOps.BN else y
            dz_given = None if z is None else dz
            calls.backward_ex(
                *(call, ops, on["x"], y_given, on["dy"], dz_given, dx, on["scale"], on["bias"]),
                *(d_scale, d_bias),
                epsilon=EPS,
                workspace=spaces[1],
                reserve=reserve,
                saved=saved,
            )
            torch.cuda.synchronize()
        except CudnnError as error:
            seen(f"{title} {tuple(blend)}", f"{error.function}: {error.name}")
            continue
        seen(f"{title} {tuple(blend)}: reserve, workspaces", sizes)
        if blend == Blend():
            check_ex(case, ops, y, dx, d_scale, d_bias, dz_given)


def check_ex(case, ops, y, dx, d_scale, d_bias, dz):
    e, options = case.exact, {"exponential_average_factor": 1.0, "epsilon": EPS}
    last = {name: t.to(memory_format=torch.channels_last) for name, t in e.items()}
    mode = PERSISTENT if ops != BatchNormOps.BN else case.mode
    z = None if dz is None else last["z"]
    vectors = (e["scale"], e["bias"])
    forward = cudnn.batch_normalization_forward_training_ex
    done = forward(mode, ops, last["x"], *vectors, z=z, **options)
    case.near(y, done.y)
    seen_by = {} if ops == BatchNormOps.BN else {"y": y.cpu().double(), "bias": e["bias"]}
    back = cudnn.batch_normalization_backward_ex(
        *(mode, ops, last["x"], last["dy"], e["scale"]),
        **{"epsilon": EPS, "reserve": done.reserve, **seen_by},
    )
    for got, wanted in zip((dx, d_scale, d_bias), (back.dx, *back[2:4]), strict=True):
        case.near(got, wanted)
    if dz is not None:
        case.near(dz, back.dz)


@pytest.mark.parametrize("n", [65535, 65536, 131070, 131071, 262136, 262137, 880801, 880802])
@pytest.mark.parametrize("mode", BatchNormMode)
def test_batch_limits(mode, n, seen):
    case = Case(mode, "NCHW", torch.float32, (n, 2, 1, 2))
    on, y = case.on, torch.empty_like(case.on["x"])
    try:
        raw_training(case)
        training: object = "runs"
    except RefusedError as refused:
        training = refused
    try:
        calls.forward_inference(
            *(case.call(), on["x"], y, on["scale"], on["bias"], on["mean"], on["variance"]),
            epsilon=EPS,
        )
        torch.cuda.synchronize()
        inference = "runs"
    except CudnnError as error:
        inference = error.name
    seen(f"N = {n}, {mode.name}", f"training {training}, inference {inference}")


def apart(program: str) -> str:
    """What a program says last, in a process of its own: what it does may cost it its device."""
    words = [sys.executable, "-c", f"from tests.cudnn.test_gpu import *\n{program}"]
    done = subprocess.run(words, capture_output=True, text=True)
    return f"exit {done.returncode}, {(done.stdout or done.stderr).strip().splitlines()[-1]}"


def test_one_running_pointer_alone(seen):
    answer = apart(
        "case = Case(SPATIAL, 'NCHW', torch.float32)\n"
        "running = Pair(torch.zeros_like(case.on['scale']), None)\n"
        "raw_training(case, factor=1.0, running=running)\n"
        "print(running.mean.flatten()[:2].tolist())\n"
    )
    seen("one NULL of the running pair", answer)


def test_the_overflow_flag_of_persistent(seen):
    import ctypes

    for scale in (1.0, 1e4, 1e18):
        case = Case(PERSISTENT, "NCHW", torch.float32, (32, 16, 14, 14))
        case.on["x"] *= scale
        y = raw_training(case)[0]
        status = ctypes.c_int(-1)
        with handles.ready(library(), DEVICE) as handle:
            library().call("cudnnQueryRuntimeError", handle, ctypes.byref(status), 2, None)
        seen(f"overflow at std {2 * scale:g}", f"{status.value}, finite {bool(y.isfinite().all())}")


@in_every_way
def test_the_same_call_gives_the_same_bits(mode, form, dtype, seen):
    case = Case(mode, form, dtype, (64, 32, 28, 28))
    first = raw_training(case)
    same = all(
        torch.equal(a, b) for _ in range(5) for a, b in zip(first, raw_training(case), strict=True)
    )
    seen(f"six calls bit for bit, {mode.name} {form} {dtype}", same)


@pytest.mark.parametrize("mode", BatchNormMode)
def test_inside_a_cuda_graph(mode, seen):
    case = Case(mode, "NCHW", torch.float32)
    on, y = case.on, torch.empty_like(case.on["x"])
    wanted = raw_training(case)[0].clone()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        raw_training(case)  # the handle of this stream, before the capture
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, stream=stream):
            calls.forward_training(case.call(), on["x"], y, on["scale"], on["bias"], epsilon=EPS)
        graph.replay()
        torch.cuda.synchronize()
        answer = f"right: {torch.equal(y, wanted)}"
    except RuntimeError as error:
        answer = str(error)
    seen(f"CUDA graph, {mode.name}", answer)


def test_an_address_between_vectors(seen):
    """A slice begins anywhere; cuDNN 9 has a status for pointers that it finds misaligned."""
    answer = apart(
        "case = Case(SPATIAL, 'NCHW', torch.float16)\n"
        "wanted, x = raw_training(case)[0], case.on['x']\n"
        "memory = torch.empty(x.numel() + 1).half().to(DEVICE)\n"
        "case.on['x'] = memory[1:].view(x.shape).copy_(x)\n"
        "print('right:', torch.equal(raw_training(case)[0], wanted))\n"
    )
    seen("x two bytes off", answer)
