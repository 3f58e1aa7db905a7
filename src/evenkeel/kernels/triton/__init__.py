"""The Triton backend: fused kernels for NVIDIA GPUs.

`planning` divides a call among programs, `kernels` is what a program does, with parts from `tiles`.
Only those two import Triton, and only when the backend is first loaded. `launching` launches a
kernel, `calls` is what a norm does in launches, `backend` makes the verbs of it.
"""

from __future__ import annotations

from .backend import Triton as Triton
from .backend import plan_of as plan_of
from .planning import Plan as Plan

__all__ = ["Plan", "Triton", "plan_of"]
