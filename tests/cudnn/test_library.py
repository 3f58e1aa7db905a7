"""Finding cuDNN, its prototypes, statuses, handles and descriptors.

What needs a real library looks for one as evenkeel does, and needs no GPU; where there is none it
is skipped. ``EVENKEEL_CUDNN`` or a wheel on the path, such as nvidia-cudnn-cu12, gives one.
"""

from __future__ import annotations

import ctypes
import gc
import pickle
import re
import subprocess
import sys
import threading
from ctypes import POINTER, c_int, c_void_p
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evenkeel.cudnn import BatchNormMode, BatchNormOps, derive_bn_tensor_descriptor
from evenkeel.errors import BackendError
from evenkeel.kernels.cudnn_api import calls, descriptors, handles, library, values
from evenkeel.kernels.cudnn_api.handles import Handle, Pool

from .fake import Fake


@pytest.fixture
def real():
    reason = library.missing()
    if reason is not None:
        pytest.skip(f"there is no cuDNN to ask: {reason}")
    return library.library()


@pytest.fixture
def search(monkeypatch):
    """The search, uncached, in a process where nothing is open and torch has no cuDNN."""
    monkeypatch.setattr(library, "mapped", lambda: None)
    monkeypatch.setattr(library, "_torchs", lambda: None)
    return library._search.__wrapped__


def test_importing_opens_nothing():
    program = (
        "import evenkeel.cudnn, evenkeel.kernels.cudnn, evenkeel.kernels.cudnn_api.library as l;"
        "print(l._search.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr


def test_an_order_that_cannot_be_met_is_an_error(search, monkeypatch, tmp_path):
    monkeypatch.setenv("EVENKEEL_CUDNN", str(tmp_path / "nowhere"))
    assert re.search(r"EVENKEEL_CUDNN is .*nowhere, but there is no .*nowhere$", search())
    monkeypatch.setenv("EVENKEEL_CUDNN", str(tmp_path))
    for name in ("libcudnn.so.9", "libcudnn_graph.so.9", "libcudnn_ops.so.9"):
        (tmp_path / name).write_bytes(b"no library")
    assert re.search(r"cannot be opened \(.*libcudnn_graph.so.9: .*\); install", search())
    other = tmp_path / "libcudnn.so.9.28"
    other.write_bytes(b"")
    monkeypatch.setattr(library, "mapped", lambda: str(other))
    assert re.search(r"has .*so.9.28 open already, and a second copy would be mixed", search())


def test_where_it_is_looked_for(search, monkeypatch, tmp_path):
    monkeypatch.delenv("EVENKEEL_CUDNN", raising=False)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path)])
    assert library._place() == "libcudnn.so.9"
    shim = tmp_path / "nvidia" / "cudnn" / "lib" / "libcudnn.so.9"
    shim.parent.mkdir(parents=True)
    shim.touch()
    assert library._place() == str(shim)
    monkeypatch.setattr(library, "mapped", lambda: "/opt/torchs/libcudnn.so.9")
    assert library._place() == "/opt/torchs/libcudnn.so.9"
    monkeypatch.setattr(sys, "platform", "win32")
    assert "on Linux only, and this is win32" in search()


def test_a_copy_that_is_not_torchs_is_refused(search, monkeypatch):
    made = Fake().library()
    monkeypatch.setattr(library, "_check_parts", lambda path: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: None)
    monkeypatch.setattr(library, "Library", lambda dll, path: made)
    assert search() is made
    monkeypatch.setattr(library, "_torchs", lambda: 92600)
    assert re.search(r"cuDNN 9.28.0 in the fake is not the one that torch uses, 92600", search())


@pytest.mark.parametrize("version", [8907, 100000])
def test_other_majors_are_refused(version):
    with pytest.raises(BackendError, match=rf"its version is {version}; .* for version 9"):
        Fake(version).library()


def test_a_library_without_the_calls_is_refused():
    with pytest.raises(BackendError, match=r"in /opt/new has no cudnnGetVersion; .* such as 9\.28"):
        library.Library(SimpleNamespace(), "/opt/new")


def test_an_error_says_all_that_is_known():
    made = Fake().library()
    with pytest.raises(library.CudnnError) as caught:
        descriptors.tensor(made, torch.float32, descriptors.packed((2, 0, 3, 4)))
    assert str(caught.value) == (
        "cudnnSetTensorNdDescriptor failed with CUDNN_STATUS_BAD_PARAM (2000): a size in "
        "(2, 0, 3, 4) [cuDNN 9.28.0; torch.float32 (2, 0, 3, 4) with strides (0, 12, 4, 1)]; the "
        "parameters do not fit together"
    )
    assert (caught.value.status, caught.value.name) == (2000, "CUDNN_STATUS_BAD_PARAM")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.status) == (str(caught.value), 2000)
    assert "9999): its" in str(library.CudnnError("f", 9999, "its text", "about"))


def test_the_status_has_the_layout_in_it(fake):
    x = torch.ones(2, 3, 4, 4)
    call = calls.Call(BatchNormMode.SPATIAL, x, descriptors.channels_last(x.shape))
    one = torch.ones(3)
    with pytest.raises(library.CudnnError, match=r"epsilon -1.0.*SPATIAL, float32 \(2, 3, 4, 4\)"):
        calls.forward_inference(call, x, x.clone(), one, one, one, one, epsilon=-1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scalars_are_as_wide_as_cudnn_reads_them(fake, dtype):
    """A double 1.0 that is read as a float is 0.0: then all output is zero, and no error."""
    x = torch.ones(2, 1, 1, 1, dtype=dtype)
    call = calls.Call(BatchNormMode.SPATIAL, x, descriptors.packed(x.shape))
    kind = ctypes.c_double if dtype == torch.float64 else ctypes.c_float
    assert [scalar._obj.value for scalar in call.blend(calls.OVER)] == [1.0, 0.0]
    assert {type(scalar._obj) for scalar in call.blend(calls.OVER)} == {kind}
    wrong = ctypes.cast(ctypes.byref(ctypes.c_double(1.0)), POINTER(ctypes.c_float))
    assert wrong[0] == 0.0


def test_a_handle_for_each_thread_and_device_and_streams_only_if_they_change():
    fake, pool = Fake(), Pool()
    made = fake.library()
    first = pool.handle(made, 0)
    assert pool.handle(made, 0) is first
    assert pool.handle(made, 1) is not first
    for stream in (7, 7, 8, 7):
        first.use(stream)
    assert [stream for _, stream in fake.streams] == [7, 8, 7]
    seen: list[Handle] = []

    def work():
        seen.append(pool.handle(made, 0))

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        gc.collect()
    assert seen[0] is not first
    assert seen[1] is seen[0], "a thread that ended leaves its handle to the next"


def test_a_child_process_starts_anew(monkeypatch):
    monkeypatch.setattr(handles, "_pool", handles._pool)
    before = handles._pool
    handles._forget()
    assert handles._pool is not before


def test_descriptors_are_made_once_and_destroyed():
    fake = Fake()
    made = fake.library()
    layout = descriptors.packed((2, 3, 4))
    one = descriptors.tensor(made, torch.float32, layout)
    assert descriptors.tensor(made, torch.float32, layout) is one
    assert descriptors.tensor(made, torch.float16, layout) is not one
    assert fake.descriptors[one.pointer] == (torch.float32, (2, 3, 4, 1), (12, 4, 1, 1))
    before = set(fake.descriptors)
    lone = descriptors._tensor(made, torch.float64, layout)
    del lone
    gc.collect()
    assert set(fake.descriptors) == before


# --- a real library, without a GPU ---------------------------------------------------------------


def test_the_real_one_opens(real):
    assert real.version[0] == 9
    assert Path(library.mapped()).samefile(real.path)
    assert library.library() is real


def test_statuses_are_its_own(real):
    wrong = {code: real.text_of(code) for code in values.STATUS}
    names = dict(values.STATUS)
    names.pop(2001)  # deprecated: it has no text any more
    assert {code: wrong[code] for code in names} == names


KINDS = {
    "void": None,
    "size_t": ctypes.c_size_t,
    "double": ctypes.c_double,
    "int": c_int,
    "size_t *": POINTER(ctypes.c_size_t),
    "int *": POINTER(c_int),
    "char *": ctypes.c_char_p,
}


def kind_of(parameter: str):
    """The ctypes type of a parameter of the header."""
    text = re.sub(r"\bconst\b|/\*.*?\*/", " ", parameter)
    stars = "*" * (text.count("*") + text.count("["))
    kind = text.replace("*", " ").split("[")[0].split()[0]
    known = KINDS.get(f"{kind} {stars}".strip())
    if known is not None or kind == "void":
        return known or c_void_p
    if re.fullmatch(r"cudnn(Handle|TensorDescriptor|ActivationDescriptor)_t|cudaStream_t", kind):
        return POINTER(c_void_p) if stars else c_void_p
    if kind == "cudnnRuntimeTag_t":
        return c_void_p
    assert kind.startswith("cudnn"), parameter  # an enum
    return POINTER(c_int) if stars else c_int


def test_prototypes_and_values_are_the_headers(real):
    folder = Path(real.path).resolve().parent.parent / "include"
    files = [folder / name for name in ("cudnn_graph_v9.h", "cudnn_ops_v9.h")]
    if not all(file.exists() for file in files):
        pytest.skip(f"{folder} has no headers")
    text = "".join(re.sub(r"/\*.*?\*/", " ", file.read_text(), flags=re.DOTALL) for file in files)
    for name, arguments in values.SIGNATURES.items():
        found = re.search(rf"\b{name}\(([^;]*)\);", text)
        parameters = [p for p in found[1].split(",") if p.strip() not in ("", "void")]
        assert [kind_of(p) for p in parameters] == list(arguments), name
    for enum, prefix in [(BatchNormMode, "BATCHNORM_"), (BatchNormOps, "BATCHNORM_OPS_")]:
        for member in enum:
            assert re.search(rf"CUDNN_{prefix}{member.name}\s*=\s*{member.value}\b", text), member
    for kind in values.DataType:
        assert re.search(rf"CUDNN_DATA_{kind.name}\s*=\s*{kind.value}\b", text), kind
    assert re.search(r"CUDNN_ACTIVATION_RELU\s*=\s*1\b", text)
    assert re.search(r"CUDNN_BN_MIN_EPSILON\s+0\.0", text)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 5, 6), (2, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("mode", BatchNormMode)
def test_derived_descriptors_are_its_own(real, mode, shape):
    x = torch.empty(shape, dtype=torch.float16)
    ours = derive_bn_tensor_descriptor(x, mode)
    layout = descriptors.packed(shape)
    made = descriptors.Descriptor(real, "Tensor")
    source = descriptors.tensor(real, torch.float16, layout)
    real.call("cudnnDeriveBNTensorDescriptor", made.pointer, source.pointer, mode)
    kind, rank = c_int(), c_int()
    dims, strides = (c_int * 8)(), (c_int * 8)()
    real.call(
        *("cudnnGetTensorNdDescriptor", made.pointer, 8, ctypes.byref(kind), ctypes.byref(rank)),
        *(dims, strides),
    )
    assert tuple(dims[: rank.value]) == ours.shape
    assert tuple(strides[: rank.value]) == ours.strides
    assert kind.value == descriptors.TYPES[ours.dtype]


def test_descriptors_have_the_limits_that_we_check(real):
    for layout, status in [
        (descriptors.packed((2, 0, 3, 4)), 2000),
        (descriptors.Layout((2, 3, 4, 4), (48, 16, 4, 0)), 2000),
        (descriptors.packed((2**10, 2**10, 2**10, 2)), 3000),
    ]:
        with pytest.raises(library.CudnnError, match="cudnnSetTensorNdDescriptor") as caught:
            descriptors.tensor(real, torch.float32, layout)
        assert caught.value.status // 1000 * 1000 == status
    descriptors.tensor(real, torch.float32, descriptors.packed((2**10, 2**10, 2**10, 1)))
    assert descriptors.relu(real).pointer


def test_without_a_device_a_handle_is_an_error(real):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(library.CudnnError, match=r"NOT_INITIALIZED \(1001\).*nvidia-smi"):
        Handle(real)
