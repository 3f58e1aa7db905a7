"""The C++ kernels (see ``native/bind.cpp``); tensors are given by their addresses, 0 for none."""

def forward(
    k1: int, r1: int, k2: int, r2: int, dtype: int, act: int, slope: float, eps: float,
    phases: int, threads: int, x: int, residual: int, y: int, weight: int, bias: int,
    mean: int, m2: int, invstd: int, /,
) -> None: ...  # fmt: skip
def backward(
    k1: int, r1: int, k2: int, r2: int, dtype: int, act: int, slope: float, from_batch: bool,
    phases: int, threads: int, dy: int, x: int, residual: int, dx: int, dresidual: int,
    weight: int, bias: int, mean: int, invstd: int, sum_dz: int, sum_dz_xhat: int, /,
) -> None: ...  # fmt: skip
def use(name: str, /) -> None: ...
def instructions() -> str: ...
def pool() -> str: ...
def set_stream_from(nbytes: int, /) -> None: ...
