"""A cuDNN on the host: the same functions behind C function pointers, written out with torch.

It does what the manual says, in float64, on memory that it is given as addresses with descriptors.
So it sees every argument as the C library would: a wrong order, a float read as a double, a NULL.
Nothing of evenkeel's arithmetic is used.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_float, c_int, cast
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from evenkeel.kernels.cudnn_api.library import Library
from evenkeel.kernels.cudnn_api.values import RESULTS, SIGNATURES

OK, BAD_PARAM, NOT_SUPPORTED = 0, 2000, 3000
DTYPES = {0: torch.float32, 1: torch.float64, 2: torch.float16, 9: torch.bfloat16}
PER_ACTIVATION, PERSISTENT = 0, 2
BN, ACTIVATION, ADD_ACTIVATION = 0, 1, 2
WORKSPACE = 24


class RefusedError(Exception):
    """What makes a call return a status; its text is the last error."""


def need(condition: object, text: str, status: int = BAD_PARAM) -> None:
    if not condition:
        raise RefusedError(status, text)


class Fake:
    """The functions by their names without 'cudnn', each given what C would be given."""

    def __init__(self, version: int = 92800) -> None:
        self.version = version
        self.descriptors: dict[int, tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]] = {}
        self.names: list[str] = []
        self.streams: list[tuple[int, int]] = []
        self.last_error = b""
        self._made = 0
        self._texts = ctypes.create_string_buffer(b"CUDNN_STATUS_OF_THE_FAKE")

    def library(self) -> Library:
        functions = {}
        for name, arguments in SIGNATURES.items():
            # A callback cannot hand bytes out, and would be given a copy of a buffer.
            result, *types = (
                ctypes.c_void_p if kind is ctypes.c_char_p else kind
                for kind in (RESULTS.get(name, c_int), *arguments)
            )
            functions[name] = ctypes.CFUNCTYPE(result, *types)(self._guarded(name))
        return Library(SimpleNamespace(**functions), "the fake")

    def _guarded(self, name: str) -> Any:
        method = getattr(self, name.removeprefix("cudnn"))

        def call(*arguments: Any) -> Any:
            self.names.append(name)
            try:
                result = method(*arguments)
            except RefusedError as error:
                status, text = error.args
                self.last_error = text.encode()
                return status
            return OK if result is None and name not in RESULTS else result

        return call

    def GetVersion(self) -> int:  # noqa: N802
        return self.version

    def GetErrorString(self, status: int) -> int:  # noqa: N802
        return ctypes.addressof(self._texts)

    def GetLastErrorString(self, memory: int, size: int) -> None:  # noqa: N802
        ctypes.memmove(memory, self.last_error + b"\0", len(self.last_error) + 1)

    def QueryRuntimeError(self, handle: int, status: Any, mode: int, tag: Any) -> None:  # noqa: N802
        status[0] = 0

    def _new(self, out: Any) -> int:
        self._made += 1
        out[0] = self._made
        return self._made

    def Create(self, out: Any) -> None:  # noqa: N802
        self._new(out)

    def Destroy(self, handle: int) -> None:  # noqa: N802
        raise AssertionError("destroying a handle waits for the device")

    def SetStream(self, handle: int, stream: int) -> None:  # noqa: N802
        self.streams.append((handle, stream))

    def CreateTensorDescriptor(self, out: Any) -> None:  # noqa: N802
        self.descriptors[self._new(out)] = (torch.float32, (), ())

    CreateActivationDescriptor = CreateTensorDescriptor

    def SetTensorNdDescriptor(self, d: int, kind: int, n: int, dims: Any, strides: Any) -> None:  # noqa: N802
        sizes = tuple(dims[:n])
        need(all(size > 0 for size in sizes), f"a size in {sizes}")
        self.descriptors[d] = (DTYPES[kind], sizes, tuple(strides[:n]))

    def GetTensorNdDescriptor(self, *arguments: Any) -> None:  # noqa: N802
        raise AssertionError("nobody calls it")

    DeriveBNTensorDescriptor = GetTensorNdDescriptor

    def SetActivationDescriptor(self, d: int, mode: int, nan: int, coef: float) -> None:  # noqa: N802
        self.descriptors[d] = (torch.float32, (mode, nan), ())

    def DestroyTensorDescriptor(self, d: int) -> None:  # noqa: N802
        del self.descriptors[d]

    DestroyActivationDescriptor = DestroyTensorDescriptor

    def memory(self, d: int, address: int) -> Tensor:
        """What a descriptor says of an address, to read and write."""
        need(d and address, "NULL")
        dtype, dims, strides = self.descriptors[d]
        span = 1 + sum((size - 1) * s for size, s in zip(dims, strides, strict=True))
        raw = (ctypes.c_char * (span * dtype.itemsize)).from_address(address)
        return torch.frombuffer(raw, dtype=dtype).as_strided(dims, strides)

    def blended(self, alpha: int, beta: int, d: int, into: Tensor, result: Tensor) -> None:
        kind = c_double if self.descriptors[d][0] == torch.float64 else c_float
        a, b = (cast(p, POINTER(kind))[0] for p in (alpha, beta))
        into.copy_(a * result + (b * into.double() if b != 0 else 0))

    def parameters(self, mode: int, x: int, bn: int, *addresses: int) -> list[Tensor]:
        """Vectors, seen through the shared descriptor, which must be the derived one."""
        dtype, dims, _ = self.descriptors[x]
        own_dtype, own_dims, _ = self.descriptors[bn]
        wanted = (1, *dims[1:]) if mode == PER_ACTIVATION else (1, dims[1], *[1] * (len(dims) - 2))
        need(len(dims) in (4, 5), f"a rank of {len(dims)}")
        need(own_dims == wanted, f"parameters of {own_dims}, not {wanted}")
        need((own_dtype == torch.float64) == (dtype == torch.float64), f"{own_dtype} for {dtype}")
        need(own_dtype in (torch.float32, torch.float64), f"parameters in {own_dtype}")
        return [self.memory(bn, address) for address in addresses]

    def BatchNormalizationForwardTraining(self, *a: Any) -> None:  # noqa: N802
        h, mode, alpha, beta, xd, x, yd, y, *rest = a
        self._forward(h, mode, BN, alpha, beta, xd, x, None, None, yd, y, *rest, None)

    def BatchNormalizationForwardTrainingEx(self, *a: Any) -> None:  # noqa: N802
        *main, activation, workspace, room, reserve, size = a
        ops, alpha_beta, xd = main[2], main[3:5], main[5]
        mask = self._extra(main[1], ops, alpha_beta, activation, workspace, room, reserve, size, xd)
        self._forward(*main, mask)

    def _extra(self, *a: Any) -> Tensor | None:
        """The mask in the reserve, for a ReLU, which only some data may have behind it."""
        mode, ops, alpha_beta, activation, workspace, room, reserve, size, xd = a
        if ops == BN:
            return None
        is_last = self.descriptors[xd][2][1] == 1
        need(mode == PERSISTENT and is_last, "", NOT_SUPPORTED)
        kind = c_double if self.descriptors[xd][0] == torch.float64 else c_float
        need([cast(p, POINTER(kind))[0] for p in alpha_beta] == [1, 0], "", NOT_SUPPORTED)
        need(activation and self.descriptors[activation][1][0] == 1, "no ReLU")
        need(workspace and room == WORKSPACE, "no workspace")
        dims = self.descriptors[xd][1]
        need(reserve and size == torch.Size(dims).numel(), "no reserve")
        raw = (ctypes.c_char * size).from_address(reserve)
        return torch.frombuffer(raw, dtype=torch.uint8).reshape(dims)

    def _forward(self, *a: Any) -> None:
        h, mode, ops, alpha, beta, xd, x, zd, z, yd, y, bn, scale, bias, factor, *rest = a
        run_mean, run_var, eps, save_mean, save_inv, mask = rest
        need(h and eps >= 0, f"epsilon {eps}")
        need((save_mean is None) == (save_inv is None), "one saved pointer")
        gamma, beta_ = self.parameters(mode, xd, bn, scale, bias)
        values, out = self.memory(xd, x).double(), self.memory(yd, y)
        over = (0,) if mode == PER_ACTIVATION else (0, *range(2, values.dim()))
        mean, var = values.mean(over, True), values.var(over, False, keepdim=True)
        unbiased = values.var(over, True, keepdim=True)
        inverse = 1 / (var + eps).sqrt()
        result = (values - mean) * inverse * gamma + beta_
        if ops == ADD_ACTIVATION:
            result = result + self.memory(zd, z)
        if mask is not None:
            mask.copy_(result > 0)
            result = result.relu()
        self.blended(alpha, beta, xd, out, result)
        for address, new in ((run_mean, mean), (run_var, unbiased)):
            if address is not None:
                running = self.memory(bn, address)
                running.copy_(running.double() * (1 - factor) + new * factor)
        if save_mean is not None:
            self.memory(bn, save_mean).copy_(mean)
            self.memory(bn, save_inv).copy_(inverse)

    def BatchNormalizationForwardInference(self, *a: Any) -> None:  # noqa: N802
        h, mode, alpha, beta, xd, x, yd, y, bn, scale, bias, mean, var, eps = a
        need(h and eps >= 0, f"epsilon {eps}")
        gamma, beta_, mu, sigma2 = self.parameters(mode, xd, bn, scale, bias, mean, var)
        result = (self.memory(xd, x).double() - mu) / (sigma2 + eps).sqrt() * gamma + beta_
        self.blended(alpha, beta, xd, self.memory(yd, y), result)

    def BatchNormalizationBackward(self, *a: Any) -> None:  # noqa: N802
        h, mode, *blends = a[:6]
        xd, x, dyd, dy, dxd, dx, bn, scale, *rest = a[6:]
        self._backward(
            *(h, mode, BN, *blends, xd, x, None, None, dyd, dy, None, None, dxd, dx),
            *(bn, scale, None, *rest, None),
        )

    def BatchNormalizationBackwardEx(self, *a: Any) -> None:  # noqa: N802
        *main, activation, workspace, room, reserve, size = a
        ops, alpha_beta, xd = main[2], main[3:5], main[7]
        mask = self._extra(main[1], ops, alpha_beta, activation, workspace, room, reserve, size, xd)
        if mask is not None:
            y, bias = self.memory(main[9], main[10]), main[19]
            need(bias, "no bias")
            assert torch.equal(y > 0, mask.bool()), "not forward's y, or not its reserve"
        self._backward(*main, mask)

    def _backward(self, *a: Any) -> None:
        h, mode, ops, a_data, b_data, a_param, b_param, xd, x, _, _, dyd, dy, dzd, dz, *rest = a
        dxd, dx, bn, scale, _, d_scale, d_bias, eps, save_mean, save_inv, mask = rest
        need(h and eps >= 0, f"epsilon {eps}")
        need((save_mean is None) == (save_inv is None), "one saved pointer")
        gamma, to_scale, to_bias = self.parameters(mode, xd, bn, scale, d_scale, d_bias)
        values, grad = self.memory(xd, x).double(), self.memory(dyd, dy).double()
        over = (0,) if mode == PER_ACTIVATION else (0, *range(2, values.dim()))
        if save_mean is None:
            mean = values.mean(over, True)
            inverse = 1 / (values.var(over, False, keepdim=True) + eps).sqrt()
        else:
            mean, inverse = (self.memory(bn, p).double() for p in (save_mean, save_inv))
        if mask is not None:
            grad = grad * mask
        if ops == ADD_ACTIVATION:
            self.memory(dzd, dz).copy_(grad)
        xhat = (values - mean) * inverse
        sums = grad.sum(over, True), (grad * xhat).sum(over, True)
        count = values.numel() // gamma.numel()
        result = gamma * inverse * (grad - (sums[0] + xhat * sums[1]) / count)
        self.blended(a_data, b_data, xd, self.memory(dxd, dx), result)
        self.blended(a_param, b_param, bn, to_bias, sums[0])
        self.blended(a_param, b_param, bn, to_scale, sums[1])

    def GetBatchNormalizationForwardTrainingExWorkspaceSize(self, *a: Any) -> None:  # noqa: N802
        _, _, ops, xd, zd, yd, bn, activation, size = a
        need(xd and yd and bn and (ops == BN or activation), "NULL")
        need(ops != ADD_ACTIVATION or zd, "no z")
        size[0] = 0 if ops == BN else WORKSPACE

    def GetBatchNormalizationBackwardExWorkspaceSize(self, *a: Any) -> None:  # noqa: N802
        _, _, ops, xd, yd, dyd, dzd, dxd, bn, activation, size = a
        need(xd and dyd and dxd and bn and (ops == BN or (activation and yd)), "NULL")
        need(ops != ADD_ACTIVATION or dzd, "no dz")
        size[0] = 0 if ops == BN else WORKSPACE

    def GetBatchNormalizationTrainingExReserveSpaceSize(self, *a: Any) -> None:  # noqa: N802
        _, _, ops, activation, xd, size = a
        need(xd in self.descriptors and (ops == BN or activation), "NULL")
        size[0] = 0 if ops == BN else torch.Size(self.descriptors[xd][1]).numel()
