"""cuDNN's batch-norm calls by ctypes: values and prototypes, the library, handles, calls.

`values` is data and knows neither torch nor the library. `library` finds one copy of cuDNN and
turns a status into an error. `handles` and `descriptors` make what calls need, once for each
thread. `calls` has one function for each call of the C API, on torch tensors whose layout is given
in the terms of cuDNN; it checks nothing, for its callers have: `evenkeel.kernels.cudnn`, the
backend, and `evenkeel.cudnn`, the face.
"""
