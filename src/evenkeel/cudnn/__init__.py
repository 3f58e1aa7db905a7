"""cuDNN's batch-norm calls by their own names, for people who write C++ and want to see them work.

    from evenkeel import cudnn
    done = cudnn.batch_normalization_forward_training(
        cudnn.BatchNormMode.SPATIAL, x, scale, bias, running_mean=mean, running_variance=variance,
        exponential_average_factor=0.1, epsilon=1e-5)
    done.y, done.saved_mean, done.saved_inv_variance, done.ran_on

Names, order and meaning are those of NVIDIA's manual; handles, descriptors and streams are taken
care of. A call runs on cuDNN itself where x is on a CUDA device and the library is there, and on
evenkeel's reference arithmetic elsewhere; ``ran_on`` says which. Mistakes are found before anything
runs, so a call that raises has changed nothing. Nothing here is differentiated by autograd: the
backward calls are there to be called.

The calls stand in cuDNN 9 as deprecated in favour of its graph API, and all versions of it so far
have them. Source: ``cudnn_ops_v9.h``, and docs.nvidia.com/deeplearning/cudnn.
"""

from ..kernels.cudnn_api.library import CudnnError
from ..kernels.cudnn_api.values import MIN_EPSILON, BatchNormMode, BatchNormOps
from .checks import derive_bn_tensor_descriptor
from .extended import (
    batch_normalization_backward_ex,
    batch_normalization_forward_training_ex,
    get_batch_normalization_backward_ex_workspace_size,
    get_batch_normalization_forward_training_ex_workspace_size,
    get_batch_normalization_training_ex_reserve_space_size,
)
from .plain import (
    batch_normalization_backward,
    batch_normalization_forward_inference,
    batch_normalization_forward_training,
)
from .results import (
    BackwardExResult,
    BackwardResult,
    ForwardExResult,
    ForwardResult,
    InferenceResult,
    Size,
    TensorDescriptor,
)

__all__ = [
    "MIN_EPSILON",
    "BackwardExResult",
    "BackwardResult",
    "BatchNormMode",
    "BatchNormOps",
    "CudnnError",
    "ForwardExResult",
    "ForwardResult",
    "InferenceResult",
    "Size",
    "TensorDescriptor",
    "batch_normalization_backward",
    "batch_normalization_backward_ex",
    "batch_normalization_forward_inference",
    "batch_normalization_forward_training",
    "batch_normalization_forward_training_ex",
    "derive_bn_tensor_descriptor",
    "get_batch_normalization_backward_ex_workspace_size",
    "get_batch_normalization_forward_training_ex_workspace_size",
    "get_batch_normalization_training_ex_reserve_space_size",
]
