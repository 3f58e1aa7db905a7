"""What works here and what does not, with the remedy."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .. import __version__, allocator
from ..kernels import select
from ..view import View, view_of
from .ops import DTYPES, LAYOUTS

__all__ = ["Finding", "findings"]

TYPICAL = (32, 64, 56, 56)
_FAULTS = (
    "large blocks go back to the system at every free, so every fresh tensor faults its pages in "
    "anew"
)


class Finding(NamedTuple):
    """One line of the checkup. ``is_good`` is None where neither answer is wrong."""

    topic: str
    text: str
    is_good: bool | None = None
    remedy: str = ""


def findings() -> Iterator[Finding]:
    """Versions, backends, threads, allocator, CUDA, compiler."""
    yield Finding("python", f"{platform.python_version()} on {platform.system()}")
    yield Finding("torch", f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    yield Finding("evenkeel", __version__)
    for name in select.backends():
        yield _backend(name)
    yield _threads()
    yield _allocator()
    yield _cuda()
    yield _compiler()


def _backend(name: str) -> Finding:
    """Whether a backend runs batch norm on a typical batch of images, in each layout and dtype."""
    topic = f"backend {name}"
    device = torch.device("cuda" if name in select.ON_GPU else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        return Finding(topic, "for an NVIDIA GPU, and asked for by name; there is no GPU here")
    try:
        verbs = select.load(name)
        described = getattr(verbs, "describe", None)
        about = f"{described()}; " if callable(described) else ""
        refused: dict[str, list[str]] = {}
        runs: list[str] = []
        for layout in LAYOUTS:
            for dtype in DTYPES:
                reason = verbs.refuses(_typical(layout), DTYPES[dtype], device)
                place = runs if reason is None else refused.setdefault(reason, [])
                place.append(f"{layout} {dtype}")
    except Exception as error:  # a backend that fails to load must not hide what the others say
        return Finding(topic, f"cannot be loaded ({type(error).__name__}): {error}", False)
    text = f"runs {', '.join(runs)}" if runs else "runs nothing here"
    text += "".join(f"; not {', '.join(what)}: {why}" for why, what in refused.items())
    return Finding(topic, about + text, bool(runs))


def _typical(layout: str) -> View:
    strides = torch.empty(TYPICAL, device="meta", memory_format=LAYOUTS[layout]).stride()
    view = view_of(TYPICAL, strides, (1,))
    assert view is not None  # noqa: S101 - an empty tensor is dense
    return view


def _threads() -> Finding:
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    text = f"torch computes with {threads} on {cores} " + ("core" if cores == 1 else "cores")
    if threads > cores:
        return Finding("threads", text, False, f"torch.set_num_threads({cores})")
    return Finding("threads", text)


def _allocator() -> Finding:
    found = allocator.status()
    if found.setting != "default":
        return Finding("allocator", found.text, found.keeps or None)
    words = " ".join(f"{key}={value}" for key, value in allocator.KEEP.items())
    if os.environ.get(allocator.SWITCH) == "default":
        return Finding("allocator", f"{found.text}; {_FAULTS}", False, f"unset {allocator.SWITCH}")
    return Finding(
        "allocator",
        f"{found.text} until train, evaluate, predict, study or accelerate set it at run time; "
        f"by default {_FAULTS}",
        None,
        f"in other code: evenkeel.allocator.keep_blocks(), or before it starts: export {words}",
    )


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        built = "torch is built without it" if torch.version.cuda is None else "no device is seen"
        return Finding("CUDA", f"none: {built}")
    return Finding("CUDA", f"{torch.version.cuda}, {torch.cuda.get_device_name()}", True)


def _compiler() -> Finding:
    wanted = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
    for name in filter(None, wanted):
        path = shutil.which(name)
        if path is not None:
            return Finding("C++ compiler", f"{name} ({path})", True)
    return Finding(
        "C++ compiler",
        "none on the path; torch.compile on the CPU needs one",
        False,
        "install g++ or clang++, or set CXX",
    )
