"""The Triton backend: fused kernels for NVIDIA GPUs.

`planning` divides a call among programs, `kernels` is what a program does, with parts from `tiles`.
Only those two import Triton, and only when the backend is first loaded.
"""

from __future__ import annotations

from .backend import Triton as Triton

__all__ = ["Triton"]
