"""The values and prototypes of cuDNN 9's batch-norm API, as data. Nothing here loads a library.

Source: the headers ``cudnn_graph_v9.h`` and ``cudnn_ops_v9.h`` of cuDNN 9.28.
"""

from __future__ import annotations

from ctypes import POINTER, c_char_p, c_double, c_int, c_size_t, c_void_p
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Final

__all__ = [
    "MAX_SPAN",
    "MIN_EPSILON",
    "RESULTS",
    "SIGNATURES",
    "STATUS",
    "ActivationMode",
    "BatchNormMode",
    "BatchNormOps",
    "DataType",
]

MIN_EPSILON: Final = 0.0
"""CUDNN_BN_MIN_EPSILON. It was 1e-5 in old versions, and many guides still say so."""

MAX_SPAN: Final = 2**31 - 1
"""As many elements a tensor may span; more is NOT_SUPPORTED."""


class BatchNormMode(IntEnum):
    """cudnnBatchNormMode_t: which values share one mean and one variance."""

    PER_ACTIVATION = 0
    """Those of one place in one channel, over the batch. Parameters of shape (1, C, H, W)."""
    SPATIAL = 1
    """Those of one channel, over batch and places. Parameters of shape (1, C, 1, 1)."""
    SPATIAL_PERSISTENT = 2
    """SPATIAL by faster kernels, which may overflow where values are large."""


class BatchNormOps(IntEnum):
    """cudnnBatchNormOps_t: what an Ex call does behind the norm. The activation is ReLU."""

    BN = 0
    BN_ACTIVATION = 1
    BN_ADD_ACTIVATION = 2


class DataType(IntEnum):
    """cudnnDataType_t, as far as batch norm takes them."""

    FLOAT = 0
    DOUBLE = 1
    HALF = 2
    BFLOAT16 = 9


class ActivationMode(IntEnum):
    """cudnnActivationMode_t, as far as the Ex calls take them."""

    RELU = 1


STATUS: Final = MappingProxyType(
    {
        0: "CUDNN_STATUS_SUCCESS",
        1001: "CUDNN_STATUS_NOT_INITIALIZED",
        1002: "CUDNN_STATUS_SUBLIBRARY_VERSION_MISMATCH",
        1003: "CUDNN_STATUS_SERIALIZATION_VERSION_MISMATCH",
        1004: "CUDNN_STATUS_DEPRECATED",
        1005: "CUDNN_STATUS_LICENSE_ERROR",
        1006: "CUDNN_STATUS_RUNTIME_IN_PROGRESS",
        1007: "CUDNN_STATUS_RUNTIME_FP_OVERFLOW",
        1008: "CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED",
        2000: "CUDNN_STATUS_BAD_PARAM",
        2001: "CUDNN_STATUS_INVALID_VALUE",
        2002: "CUDNN_STATUS_BAD_PARAM_NULL_POINTER",
        2003: "CUDNN_STATUS_BAD_PARAM_MISALIGNED_POINTER",
        2004: "CUDNN_STATUS_BAD_PARAM_NOT_FINALIZED",
        2005: "CUDNN_STATUS_BAD_PARAM_OUT_OF_BOUND",
        2006: "CUDNN_STATUS_BAD_PARAM_SIZE_INSUFFICIENT",
        2007: "CUDNN_STATUS_BAD_PARAM_STREAM_MISMATCH",
        2008: "CUDNN_STATUS_BAD_PARAM_SHAPE_MISMATCH",
        2009: "CUDNN_STATUS_BAD_PARAM_DUPLICATED_ENTRIES",
        2010: "CUDNN_STATUS_BAD_PARAM_ATTRIBUTE_TYPE",
        2011: "CUDNN_STATUS_BAD_PARAM_CUDA_GRAPH_MISMATCH",
        2012: "CUDNN_STATUS_BAD_PARAM_DESCRIPTOR_TYPE",
        3000: "CUDNN_STATUS_NOT_SUPPORTED",
        3001: "CUDNN_STATUS_NOT_SUPPORTED_GRAPH_PATTERN",
        3002: "CUDNN_STATUS_NOT_SUPPORTED_SHAPE",
        3003: "CUDNN_STATUS_NOT_SUPPORTED_DATA_TYPE",
        3004: "CUDNN_STATUS_NOT_SUPPORTED_LAYOUT",
        3005: "CUDNN_STATUS_NOT_SUPPORTED_INCOMPATIBLE_CUDA_DRIVER",
        3006: "CUDNN_STATUS_NOT_SUPPORTED_INCOMPATIBLE_CUDART",
        3007: "CUDNN_STATUS_NOT_SUPPORTED_ARCH_MISMATCH",
        3008: "CUDNN_STATUS_NOT_SUPPORTED_RUNTIME_PREREQUISITE_MISSING",
        3009: "CUDNN_STATUS_NOT_SUPPORTED_SUBLIBRARY_UNAVAILABLE",
        3010: "CUDNN_STATUS_NOT_SUPPORTED_SHARED_MEMORY_INSUFFICIENT",
        3011: "CUDNN_STATUS_NOT_SUPPORTED_PADDING",
        3012: "CUDNN_STATUS_NOT_SUPPORTED_BAD_LAUNCH_PARAM",
        3013: "CUDNN_STATUS_NOT_SUPPORTED_CUDA_GRAPH_NATIVE_API",
        3014: "CUDNN_STATUS_NOT_SUPPORTED_INVALID_DYNAMIC_SHAPE",
        4000: "CUDNN_STATUS_INTERNAL_ERROR",
        4001: "CUDNN_STATUS_INTERNAL_ERROR_COMPILATION_FAILED",
        4002: "CUDNN_STATUS_INTERNAL_ERROR_UNEXPECTED_VALUE",
        4003: "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        4004: "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        4005: "CUDNN_STATUS_INTERNAL_ERROR_BAD_LAUNCH_PARAM",
        4006: "CUDNN_STATUS_INTERNAL_ERROR_TEXTURE_CREATION_FAILED",
        5000: "CUDNN_STATUS_EXECUTION_FAILED",
        5001: "CUDNN_STATUS_EXECUTION_FAILED_CUDA_DRIVER",
        5002: "CUDNN_STATUS_EXECUTION_FAILED_CUBLAS",
        5003: "CUDNN_STATUS_EXECUTION_FAILED_CUDART",
        5004: "CUDNN_STATUS_EXECUTION_FAILED_CURAND",
    }
)
"""cudnnStatus_t of version 9. Version 8 had other numbers."""

_P, _I, _D, _S = c_void_p, c_int, c_double, c_size_t  # handles, descriptors and data are pointers

_BLEND = (_P, _P)  # alpha, beta
_TENSOR = (_P, _P)  # descriptor, data
_ROOM = (_P, _S)  # memory, bytes
_MEAN_VARIANCE = (_P, _P)

_OWN_RESULT: Final[dict[str, Any]] = {
    "cudnnGetVersion": _S,
    "cudnnGetErrorString": c_char_p,
    "cudnnGetLastErrorString": None,
}
RESULTS: Final = MappingProxyType(_OWN_RESULT)
"""What a function returns that does not return a status."""

_ARGUMENTS: Final[dict[str, tuple[Any, ...]]] = {
    "cudnnGetVersion": (),
    "cudnnGetErrorString": (_I,),
    "cudnnGetLastErrorString": (c_char_p, _S),
    "cudnnQueryRuntimeError": (_P, POINTER(_I), _I, _P),
    "cudnnCreate": (POINTER(_P),),
    "cudnnDestroy": (_P,),
    "cudnnSetStream": (_P, _P),
    "cudnnCreateTensorDescriptor": (POINTER(_P),),
    "cudnnSetTensorNdDescriptor": (_P, _I, _I, POINTER(_I), POINTER(_I)),
    "cudnnGetTensorNdDescriptor": (*(_P, _I, POINTER(_I), POINTER(_I), POINTER(_I), POINTER(_I)),),
    "cudnnDestroyTensorDescriptor": (_P,),
    "cudnnCreateActivationDescriptor": (POINTER(_P),),
    "cudnnSetActivationDescriptor": (_P, _I, _I, _D),
    "cudnnDestroyActivationDescriptor": (_P,),
    "cudnnDeriveBNTensorDescriptor": (_P, _P, _I),
    "cudnnBatchNormalizationForwardInference": (
        *(_P, _I, *_BLEND, *_TENSOR, *_TENSOR),
        *(_P, _P, _P, *_MEAN_VARIANCE, _D),
    ),
    "cudnnBatchNormalizationForwardTraining": (
        *(_P, _I, *_BLEND, *_TENSOR, *_TENSOR),
        *(_P, _P, _P, _D, *_MEAN_VARIANCE, _D, *_MEAN_VARIANCE),
    ),
    "cudnnBatchNormalizationBackward": (
        *(_P, _I, *_BLEND, *_BLEND, *_TENSOR, *_TENSOR, *_TENSOR),
        *(_P, _P, _P, _P, _D, *_MEAN_VARIANCE),
    ),
    "cudnnBatchNormalizationForwardTrainingEx": (
        *(_P, _I, _I, *_BLEND, *_TENSOR, *_TENSOR, *_TENSOR),
        *(_P, _P, _P, _D, *_MEAN_VARIANCE, _D, *_MEAN_VARIANCE),
        *(_P, *_ROOM, *_ROOM),
    ),
    "cudnnBatchNormalizationBackwardEx": (
        *(_P, _I, _I, *_BLEND, *_BLEND),
        *(*_TENSOR, *_TENSOR, *_TENSOR, *_TENSOR, *_TENSOR),
        *(_P, _P, _P, _P, _P, _D, *_MEAN_VARIANCE),
        *(_P, *_ROOM, *_ROOM),
    ),
    "cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize": (
        *(_P, _I, _I, _P, _P, _P, _P, _P, POINTER(_S)),
    ),
    "cudnnGetBatchNormalizationBackwardExWorkspaceSize": (
        *(_P, _I, _I, _P, _P, _P, _P, _P, _P, _P, POINTER(_S)),
    ),
    "cudnnGetBatchNormalizationTrainingExReserveSpaceSize": (_P, _I, _I, _P, _P, POINTER(_S)),
}
SIGNATURES: Final = MappingProxyType(_ARGUMENTS)
"""The arguments of each function, in the order of the header."""
