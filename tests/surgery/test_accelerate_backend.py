"""`accelerate(..., backend=)`: norms that run on the backend that was asked for by name."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import evenkeel
from evenkeel.errors import BackendError, ConfigError, SurgeryError
from evenkeel.kernels import select
from evenkeel.kernels.reference import Reference
from evenkeel.surgery import accelerate as accelerate_module
from evenkeel.surgery import comparing

from .cnns import ZOO, built, images
from .nets import built as plain
from .nets import state


class Single(Reference):
    """Counts the norms that it computes, and takes no float64: as GPU kernels are."""

    norms = 0
    off = 1.0

    def refuses(self, view, dtype, device):
        return f"it has no kernels for {dtype}" if dtype == torch.float64 else None

    def forward_training(self, *given, **named):
        Single.norms += 1
        y, mean, var = super().forward_training(*given, **named)
        return y * self.off, mean, var


class Gone(Reference):
    def __init__(self):
        raise BackendError("it is not here; install it")


@pytest.fixture(autouse=True)
def single(monkeypatch):
    """Two backends more, to be asked for by name."""
    monkeypatch.setitem(select._PLACES, "single", f"{__name__}:Single")
    monkeypatch.setitem(select._PLACES, "gone", f"{__name__}:Gone")
    monkeypatch.setattr(Single, "norms", 0)
    yield
    select.load.cache_clear()


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def settings(model: nn.Module) -> list[dict[str, object]]:
    """What each module holds, by name, but for tensors."""
    held = (vars(module) for module in model.modules())
    return [{k: v for k, v in own.items() if k not in ("_parameters", "_buffers")} for own in held]


@pytest.mark.parametrize("name", ZOO)
def test_every_swapped_norm_runs_on_it(name):
    model = built(name)
    before = state(model)
    fast, report = evenkeel.accelerate(model, images(), backend="single")
    assert report.swapped == evenkeel.accelerate(model)[1].swapped
    assert report.backend == report.to_dict()["backend"] == "single"
    assert "  backend: single" in str(report).splitlines()
    assert {m.backend for m in norms(fast) if hasattr(m, "backend")} == {"single"}
    assert report.gradient.relative < report.budget == comparing.BUDGET
    assert state(model) == before
    Single.norms = 0
    fast.train()(images())
    assert Single.norms >= len(report.swapped)


def test_auto_is_not_told_and_leaves_no_setting():
    fast, report = evenkeel.accelerate(built("resnet"), images())
    assert report.backend == "auto"
    assert "backend" not in str(report)
    assert not any("backend" in key for m in fast.modules() for key in vars(m))


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("name", ZOO)
def test_restoring_undoes_it_to_the_last_attribute(name, inplace):
    model = built(name)
    wanted, shown = settings(model), repr(model)
    bits = {key: value.clone() for key, value in model.state_dict().items()}
    fast, _ = evenkeel.accelerate(model, backend="single", inplace=inplace)
    assert repr(fast).count("backend='single'") >= 1
    back = evenkeel.restore(fast, inplace=inplace)
    assert [list(own) for own in settings(back)] == [list(own) for own in wanted]
    assert repr(back) == shown
    assert [type(m) for m in back.modules()] == [type(m) for m in built(name).modules()]
    assert all(torch.equal(value, bits[key]) for key, value in back.state_dict().items())


@pytest.mark.parametrize("name", ["resnet", "untraceable", "branches"])
def test_copies_and_pickles_keep_it(name):
    fast, report = evenkeel.accelerate(built(name), backend="single")
    assert list(fast.state_dict()) == list(built(name).state_dict())
    fast.load_state_dict(built(name).state_dict(), strict=True)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        Single.norms = 0
        other.train()(images())
        assert Single.norms >= len(report.swapped)
        back = evenkeel.restore(other)
        assert not any("backend" in key for m in back.modules() for key in vars(m))


class TestOurOwn:
    """Norms that are ours already, with settings of their users."""

    def model(self) -> nn.Module:
        model = nn.Sequential(
            nn.Conv2d(3, 4, 1), evenkeel.BatchNorm2d(4), nn.ReLU(), evenkeel.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1), evenkeel.BatchNorm2d(4),
        )  # fmt: skip
        model[3].backend = "reference"
        model[5].activation = "silu"
        return model

    def test_they_run_on_it_too_and_get_their_own_settings_back(self):
        model = self.model()
        fast, report = evenkeel.accelerate(model, images(), backend="single")
        assert [path for path, _ in report.swapped] == ["1", "3", "5"]
        assert [fast[place].backend for place in (1, 3, 5)] == ["single"] * 3
        assert [fast[place].activation for place in (1, 3, 5)] == ["relu", None, "silu"]
        back = evenkeel.restore(fast)
        assert [vars(m).get("backend") for m in back] == [None, None, None, "reference", None, None]
        assert [vars(m).get("activation") for m in back] == [*[None] * 5, "silu"]
        assert repr(back) == repr(model)

    def test_auto_leaves_theirs(self):
        fast, report = evenkeel.accelerate(self.model())
        assert [path for path, _ in report.swapped] == ["1"]
        assert fast[3].backend == evenkeel.restore(fast)[3].backend == "reference"

    def test_they_count_as_accelerated(self):
        fast, _ = evenkeel.accelerate(self.model()[3:4], backend="single")
        with pytest.raises(SurgeryError, match=r"is accelerated already \(see '3'\)"):
            evenkeel.accelerate(fast)
        with pytest.raises(
            SurgeryError, match=r"is accelerated \(see '3'\); exchange the norms of"
        ):
            evenkeel.exchange(fast, "torch")

    def test_a_setting_that_was_deleted_meanwhile_is_no_obstacle(self):
        fast, _ = evenkeel.accelerate(self.model(), backend="single")
        del fast[3].backend
        assert evenkeel.restore(fast)[3].backend == "reference"

    def test_a_network_that_introduce_has_made(self):
        grey = images()[:, :1]
        model, _ = evenkeel.introduce(plain("residual"), grey)
        fast, report = evenkeel.accelerate(model, grey, backend="single")
        assert len(report.swapped) == len(norms(model))
        for other in (fast, copy.deepcopy(fast)):
            assert {m.backend for m in norms(other)} == {"single"}
            assert {m.backend for m in norms(evenkeel.restore(other))} == {"auto"}


class TestProof:
    def test_one_that_computes_something_else_is_refused(self, monkeypatch):
        monkeypatch.setattr(Single, "off", 1.01)
        model = built("resnet")
        before = state(model)
        with pytest.raises(SurgeryError, match=r"would change by .*; nothing was changed"):
            evenkeel.accelerate(model, images(), backend="single", inplace=True)
        assert state(model) == before

    def test_rounding_is_told_from_it_though_it_takes_no_float64(self, monkeypatch):
        monkeypatch.setattr(comparing, "BUDGET", 1e-12)
        fast, report = evenkeel.accelerate(built("resnet"), images(), backend="single")
        assert 1e-12 < report.output.relative < 1e-5
        assert {m.backend for m in norms(fast)} == {"single"}

    def test_layouts_are_compared_in_double_precision(self):
        layout = torch.channels_last
        fast, report = evenkeel.accelerate(
            built("resnet"), images(), backend="single", memory_format=layout
        )
        assert report.layout.difference.relative < 1e-9
        assert {m.backend for m in norms(fast)} == {"single"}


class TestRefused:
    """Before anything has changed."""

    @pytest.fixture(autouse=True)
    def _unchanged(self):
        self.networks = built("resnet"), built("resnet").double()
        before = [state(network) for network in self.networks]
        yield
        assert [state(network) for network in self.networks] == before

    def accelerated(self, is_double: bool = False, **options) -> None:
        evenkeel.accelerate(self.networks[is_double], inplace=True, **options)

    def test_an_unknown_name(self):
        names = "native, triton, cudnn, reference, single, gone"
        with pytest.raises(ConfigError, match=rf"'singel' \(did you .*'auto' or one of {names}$"):
            self.accelerated(backend="singel")

    def test_one_that_is_not_installed(self):
        with pytest.raises(BackendError, match="it is not here; install it"):
            self.accelerated(backend="gone")

    def test_one_that_does_not_run_where_the_network_is(self):
        where = r"'bn1', which is on cpu in torch\.float64: it has no kernels for torch\.float64"
        with pytest.raises(BackendError, match=rf"cannot run {where}; nothing was changed; move"):
            self.accelerated(is_double=True, backend="single")

    def test_low_memory_which_is_the_native_kernels(self):
        wanted = r"memory='low' is for norms on the native .* backend='single'; give memory='full'"
        with pytest.raises(ConfigError, match=wanted):
            self.accelerated(backend="single", memory="low")

    def test_an_accident_on_the_way(self, monkeypatch):
        swap, calls = accelerate_module._swap, []

        def third(*given, **named):
            calls.append(1)
            if len(calls) == 8 + 3:  # the copy is done first
                raise MemoryError("no memory")
            swap(*given, **named)

        monkeypatch.setattr(accelerate_module, "_swap", third)
        with pytest.raises(MemoryError):
            self.accelerated(backend="single")


def test_a_norm_without_tensors_is_where_the_network_is():
    norm = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm).double()
    with pytest.raises(BackendError, match=r"cannot run '1', which is on cpu in torch\.float64"):
        evenkeel.accelerate(model, backend="single")
    fast, _ = evenkeel.accelerate(nn.Sequential(norm), backend="single")
    fast(images())
    assert Single.norms == 1


def test_on_cuda_a_name_is_the_way():
    with FakeTensorMode():
        there = torch.empty(2, device="cuda")
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    model[1].register_buffer("there", there)
    with pytest.raises(SurgeryError, match=r"name a backend: backend='triton', not yet seen on a"):
        evenkeel.accelerate(model)
    with pytest.raises(SurgeryError, match="cannot be copied"):  # which only a fake cannot
        evenkeel.accelerate(model, backend="single")


def test_low_memory_works_with_the_native_kernels_by_name():
    pytest.importorskip("evenkeel._native", reason="the native kernels are not built")
    kept, gradients = [], []
    for backend in ("auto", "native"):
        low, report = evenkeel.accelerate(built("resnet"), images(), memory="low", backend=backend)
        kept.append(report.kept)
        y = low.train()(images())
        gradients.append(torch.autograd.grad(y.square().sum(), list(low.parameters())))
    assert kept[0] == kept[1]
    assert kept[1][1] < kept[1][0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_it_compiles_in_one_graph():
    torch._dynamo.reset()
    fast, report = evenkeel.accelerate(built("resnet"), backend="single")
    wanted = copy.deepcopy(fast)(images())
    Single.norms = 0
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), wanted, rtol=1e-5, atol=1e-6)
    assert Single.norms == len(report.swapped)


INTERPRETED = """
import torch, evenkeel
from torch import nn
torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
x = torch.randn(4, 3, 6, 6)
for layout in ("keep", torch.channels_last):
    fast, report = evenkeel.accelerate(network, x, backend="triton", memory_format=layout)
    assert report.output.absolute > 0
    print(report.swapped, fast[1].backend)
"""


def test_triton_in_its_interpreter(monkeypatch):
    """In a process of its own, for how its kernels run is decided when they are loaded."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("on a GPU the test below runs them compiled")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter does not know this numpy")
    assert done.returncode == 0, done.stderr
    said = "(('1', 'BatchNorm2d with relu'), ('3', 'BatchNorm2d')) triton"
    assert done.stdout.splitlines() == [said] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["keep", torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", ["triton", "cudnn"])
@pytest.mark.parametrize("name", ["vgg", "resnet", "mobilenet", "branches"])
def test_on_a_gpu(name, backend, layout):
    """Trained three steps beside torch's norms, in float32, as it is and compiled."""
    torch._dynamo.reset()
    model = built(name).cuda()
    x = images().cuda()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        fast, report = evenkeel.accelerate(model, x, backend=backend, memory_format=layout)
        assert report.swapped
        assert str(report).count(f"backend: {backend}") == 1
        compiled = torch.compile(copy.deepcopy(fast))
        losses = []
        for network in (model, fast, compiled):
            optimizer = torch.optim.SGD(network.parameters(), 0.01)
            for module in network.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            for _ in range(3):
                optimizer.zero_grad()
                loss = network(x).square().mean()
                loss.backward()
                optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(losses[2], losses[0], rtol=1e-3, atol=1e-5)
        back = evenkeel.restore(fast).eval()
        torch.testing.assert_close(back(x), fast.eval()(x), rtol=1e-3, atol=1e-4)
    assert not any("backend" in key for m in back.modules() for key in vars(m))
