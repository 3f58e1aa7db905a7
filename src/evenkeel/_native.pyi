"""The C++ kernels (see ``native/bind.cpp``); tensors are given by their addresses, 0 for none."""

def forward(
    k1: int, r1: int, k2: int, r2: int, dtype: int, act: int, slope: float, phases: int,
    threads: int, eps: float, x: int, residual: int, y: int, mask: int, weight: int, bias: int,
    single: bool, memory: int, running_mean: int, running_var: int, running_single: bool,
    momentum: float, /,
) -> None: ...  # fmt: skip
def backward(
    k1: int, r1: int, k2: int, r2: int, dtype: int, act: int, slope: float, phases: int,
    threads: int, from_batch: bool, dy: int, x: int, residual: int, mask: int, dx: int,
    dresidual: int, weight: int, bias: int, single: bool, mean: int, invstd: int, sums: int,
    dweight: int, dbias: int, /,
) -> None: ...  # fmt: skip
def mask_bytes(k1: int, r1: int, k2: int, r2: int, dtype: int, /) -> int: ...
def use(name: str, /) -> None: ...
def instructions() -> str: ...
def is_intels() -> bool: ...
def pool() -> str: ...
def set_stream_from(nbytes: int, /) -> None: ...
