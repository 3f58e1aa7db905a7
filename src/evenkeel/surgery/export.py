"""A folded network as a file: .pt2, .onnx, or its weights as .safetensors, each read back at once.

What is written is proved before it takes its name: it is loaded by the library that will load it,
runs the example, and is compared with the network. A file that fails is never there.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import __version__
from ..errors import ConfigError, SurgeryError, meant
from ..files import whole
from .examples import arguments, call, tensors_in
from .exporting.programs import (
    KEY,
    Run,
    batch_of,
    is_installed,
    program_of,
    reason,
    resized,
    write_onnx,
    write_pt2,
)
from .graph import copied

__all__ = ["FORMATS", "Exported", "check_target", "export", "largest_difference"]

FORMATS: Final = (".pt2", ".onnx", ".safetensors")
BUDGETS: Final = {".pt2": 1e-5, ".onnx": 1e-4, ".safetensors": 0.0}
"""The largest difference allowed, relative to the largest output: for torch's own operations, for
another library's kernels, and none for weights."""

_NOISY: Final = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares with the network.

    Attributes:
        path, format, bytes: the file, its suffix and its size.
        batch: 'any', or the one batch size that it takes; None for weights alone.
        opset: of the ONNX graph, else None.
        read_by: what the file was read back with.
        difference, scale: the largest difference of an output to the network's on the example, at
            every batch size that was tried, and the largest output; None for weights alone, which
            are the same bits.
        budget: the relative difference that was allowed.
    """

    path: str
    format: str
    bytes: int
    batch: str | int | None
    opset: int | None
    read_by: str
    difference: float | None
    scale: float | None
    budget: float

    def __str__(self) -> str:
        size = f"{self.bytes / 1e6:,.1f} MB" if self.bytes >= 1e5 else f"{self.bytes / 1e3:.1f} kB"
        opset = "" if self.opset is None else f", opset {self.opset}"
        if self.difference is None:
            return f"{self.path} ({size}): the same bits, read back by {self.read_by}"
        batch = "any batch size" if self.batch == "any" else f"batches of {self.batch} alone"
        return (
            f"{self.path} ({size}{opset}, {batch}): run by {self.read_by}, largest output "
            f"difference {self.difference:.2e} of {self.scale:.3g} (budget {self.budget:.0e} "
            "relative)"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def check_target(path: str | Path, opset: int | None = None) -> str:
    """The format of a file that is to be written, by its suffix.

    Raises:
        ConfigError: there is no such format, it has no opset, or what writes it is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        found = f"'{suffix}'{meant(suffix, FORMATS)}" if suffix else "a name without suffix"
        raise ConfigError(
            f"{path}: a network is not written as {found}; choose {', '.join(FORMATS)}"
        )
    if opset is not None and suffix != ".onnx":
        raise ConfigError(f"{path}: an opset belongs to .onnx; leave it out")
    lacking = [name for name in ("onnx", "onnxscript") if not is_installed(name)]
    if suffix == ".onnx" and lacking:
        raise ConfigError(
            f"{path}: writing .onnx takes {' and '.join(lacking)}, not installed here; "
            "pip install 'evenkeel[onnx]'"
        )
    return suffix


def export(
    folded: nn.Module,
    example: Any,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    opset: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> Exported:
    """Writes a network in inference mode as the file's suffix says, whole or not at all.

    ::

        .pt2          torch.export.load(path).module()(x), without evenkeel
        .onnx         for onnxruntime and others; the opset is torch's choice unless one is given
        .safetensors  the state dict of the folded network

    Before the file gets its name it is read back and compared, each output y with the network's:
    ``max|y' - y| <= budget * max|y|``, the budget 1e-5 for .pt2 and 1e-4 for .onnx. Weights must be
    the same bits. The file holds no number of the example and no path of this machine.

    Args:
        folded: what `evenkeel.fold` gave; it is not changed.
        example: an input, a tuple of inputs or a dict of inputs by name, the batch axis first.
        path: the file; one that is there is replaced.
        dynamic_batch: False to fix the batch size to the example's. Otherwise every input of that
            batch size may have any, and the file is tried with batches of one, of the example's
            size and of one more.
        opset: of ONNX; an error if torch cannot write the network in it.
        about: plain values, kept as JSON in the file's metadata under 'evenkeel.fold' beside
            evenkeel's version and the inputs' names, shapes and types.

    Raises:
        ConfigError: an unknown suffix, a missing package, or a file that cannot be written.
        SurgeryError: the network cannot be written so, or the file computes something else.
        ShapeError: the example has no batch axis.
    """
    path = Path(path)
    suffix = check_target(path, opset)
    own = copied(folded).eval()
    example = _in_order(own, example)
    if suffix == ".onnx":  # which knows no device, and is run on the CPU
        own = own.cpu()
        example = pytree.tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, example)
    said = json.dumps({**_inputs(own, example), **(about or {})}, sort_keys=True)
    batch: str | int = "any" if dynamic_batch else batch_of(example)
    with _quietly(), whole(path, ConfigError) as part:
        if suffix == ".safetensors":
            _write_weights(own, part, said)
            size, by = part.stat().st_size, f"safetensors {version('safetensors')}"
            made = Exported(str(path), suffix, size, None, None, by, None, None, 0.0)
        else:
            program = program_of(own, example, dynamic_batch)
            if suffix == ".pt2":
                run, found = write_pt2(program, part, said), None
                by = f"torch.export {torch.__version__}"
            else:
                run, found, by = write_onnx(program, own, part, said, opset)
            pair = _compared(own, run, example, dynamic_batch, suffix)
            size, budget = part.stat().st_size, BUDGETS[suffix]
            made = Exported(str(path), suffix, size, batch, found, by, *pair, budget)
    return made


def _write_weights(own: nn.Module, part: Path, said: str) -> None:
    from safetensors.torch import load_file
    from safetensors.torch import save as to_bytes

    state = own.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"the network keeps '{name}', of type {type(value).__name__}, which is no tensor; "
                "keep it as a buffer, or write .pt2"
            )
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
    part.write_bytes(to_bytes(tensors, {"format": "pt", KEY: said}))
    again = load_file(part)
    if again.keys() != tensors.keys() or not all(_same(again[n], t) for n, t in tensors.items()):
        raise SurgeryError("what safetensors reads is not what it wrote; nothing was written")


def _same(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))


def _compared(
    own: nn.Module, run: Run, example: Any, dynamic_batch: bool, suffix: str
) -> tuple[float, float]:
    """The largest difference between network and file over the batch sizes, and its scale."""
    first = batch_of(example)
    others = sorted({1, first + 1} - {first}) if dynamic_batch else []
    pairs = []
    for batch in (first, *others):
        given = example if batch == first else resized(example, batch)
        with torch.no_grad():
            try:
                wanted = tensors_in(call(own, given))
            except Exception as error:
                if batch != first:
                    continue  # the network itself takes no such batch
                raise SurgeryError(
                    f"the network cannot run the example: {reason(error)}"
                ) from error
            where = f"the {suffix} file, run with a batch of {batch},"
            try:
                found = run(given)
            except Exception as error:
                raise SurgeryError(f"{where} fails: {reason(error)}; it was not kept") from error
        difference, scale = largest_difference(wanted, found)
        if not difference <= BUDGETS[suffix] * scale:
            raise SurgeryError(
                f"{where} differs from the network by {difference:.2e} where "
                f"{BUDGETS[suffix] * scale:.2e} is allowed; it was not kept; the usual cause is "
                "half precision (write it in float32, then convert)"
            )
        pairs.append((difference, scale))
    return max(pairs, key=_relative)


def largest_difference(wanted: list[Tensor], found: list[Tensor]) -> tuple[float, float]:
    """The difference of the output that differs most, relative to its size, and that size.

    Raises:
        SurgeryError: the outputs are not as many, have other shapes, no values, or such as are not
            finite.
    """
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (wanted, found)]
    if shapes[0] != shapes[1]:
        raise SurgeryError(f"the file gives outputs of {shapes[1]}, the network of {shapes[0]}")
    if not any(t.numel() for t in wanted):
        raise SurgeryError("the example gives no output to compare; give a batch of real inputs")
    pairs = []
    for one, other in zip(wanted, found, strict=True):
        a, b = (t.detach().cpu().double() for t in (one, other))
        if not bool(torch.isfinite(a).all()):
            raise SurgeryError("the network gives values that are not finite on the example")
        if a.numel():
            pairs.append((float((a - b).abs().max()), float(a.abs().max())))
    return max(pairs, key=_relative)


def _relative(pair: tuple[float, float]) -> float:
    difference, scale = pair
    if scale == 0 or math.isnan(difference):
        return 0.0 if difference == 0 else math.inf
    return difference / scale


def _in_order(own: nn.Module, example: Any) -> Any:
    """Inputs by name in the order in which the network takes them, as a file numbers them."""
    if not isinstance(example, Mapping):
        return example
    order = [name for name in inspect.signature(own.forward).parameters if name in example]
    return {name: example[name] for name in (*order, *(n for n in example if n not in order))}


def _inputs(own: nn.Module, example: Any) -> dict[str, Any]:
    """What every file says of itself."""
    args, kwargs = arguments(example)
    named = dict(zip(inspect.signature(own.forward).parameters, args, strict=False)) | kwargs
    inputs = [
        {"name": name, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
        for name, t in named.items()
        if isinstance(t, Tensor)
    ]
    return {"evenkeel": __version__, "inputs": inputs}


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps from the user what torch and onnx tell their developers."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
