"""A network as a program of torch.export and as an ONNX graph: made, written, read back."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...errors import ShapeError, SurgeryError
from ...kernels.contract import Activation
from ...kernels.reference import activate
from ..examples import arguments, call, tensors_in
from ..graph import NORMS, is_norm

__all__ = [
    "KEY",
    "Run",
    "batch_of",
    "is_installed",
    "program_of",
    "reason",
    "resized",
    "write_onnx",
    "write_pt2",
]

KEY: Final = "evenkeel.fold"
"""Where a file's metadata says what was folded."""

_LARGEST_ONNX: Final = 2**31 - 2**20  # protobuf's limit, less the graph

Run = Callable[[Any], list[Tensor]]
"""What a file that was read back computes for an example: its outputs in their order."""


def program_of(own: nn.Module, example: Any, dynamic_batch: bool) -> torch.export.ExportedProgram:
    """The network as torch.export sees it, of torch's operations alone.

    It holds no number of the example and no path of this machine.

    Raises:
        SurgeryError: torch.export cannot take it, or not for any batch size.
    """
    given = example
    if dynamic_batch and batch_of(example) == 1:
        given = resized(example, 2)  # torch takes a size of one for a constant
    program = _captured(own, given, dynamic_batch)
    ours = torch.ops.evenkeel.norm.default
    if any(node.target is ours for node in program.graph.nodes):
        program = program.run_decompositions({ours: _norm_in_torch})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    program.example_inputs = None
    return program


def _captured(own: nn.Module, given: Any, dynamic_batch: bool) -> torch.export.ExportedProgram:
    args, kwargs = arguments(given)
    shapes: Any = None
    if dynamic_batch:
        size, batch = batch_of(given), torch.export.Dim("batch")
        axes = pytree.tree_map(
            lambda v: {0: batch} if _has_batch(v, size) else None, (args, kwargs)
        )
        shapes = axes[1] if kwargs else axes[0]
    try:
        return torch.export.export(own, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        why = reason(error)
        if dynamic_batch:
            with suppress(Exception):
                torch.export.export(own, args, kwargs)
                why = "it takes one batch size alone; give dynamic_batch=False (--fixed-batch)"
        raise SurgeryError(f"torch.export cannot export the folded network: {why}") from error


def _norm_in_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    kept: Sequence[int],
    eps: float,
    activation: str,
    slope: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `evenkeel.ops.norm_op` computes, of torch's operations, for who has no evenkeel."""
    shape = [size if dim in kept else 1 for dim, size in enumerate(x.shape)]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if mean is None or var is None:
        over = [dim for dim in range(x.dim()) if dim not in kept]
        mean = wide.mean(over)
        var = (wide - mean.reshape(shape)).square().mean(over)
    y = (wide - mean.reshape(shape)) * (var + eps).rsqrt().reshape(shape)
    y = y if weight is None else y * weight.reshape(shape)
    y = y if bias is None else y + bias.reshape(shape)
    y = y if residual is None else y + residual
    y = activate(y, Activation(activation, slope)).to(x.dtype)
    return y, mean, var, x.new_empty(0, dtype=torch.uint8)


def write_pt2(program: torch.export.ExportedProgram, part: Path, said: str) -> Run:
    """Writes the program with its metadata, and gives what the file computes.

    Raises:
        SurgeryError: torch.export cannot save it, or cannot load it again.
    """
    buffer = io.BytesIO()  # into a file torch would write the file's name too
    try:
        torch.export.save(program, buffer, extra_files={KEY: said})
        part.write_bytes(buffer.getvalue())
        loaded = torch.export.load(io.BytesIO(part.read_bytes())).module()
    except OSError:
        raise
    except Exception as error:
        raise SurgeryError(f"torch.export cannot save the network: {reason(error)}") from error
    return lambda example: tensors_in(call(loaded, example))


def write_onnx(
    program: torch.export.ExportedProgram, own: nn.Module, part: Path, said: str, opset: int | None
) -> tuple[Run, int, str]:
    """Writes the graph with its metadata; gives what it computes, its opset, and what runs it.

    Raises:
        SurgeryError: torch.onnx cannot write it, not in this opset, or with a norm too many.
    """
    if sum(t.numel() * t.element_size() for t in tensors_in(own.state_dict())) > _LARGEST_ONNX:
        raise SurgeryError("more than 2 GiB of weights do not fit into one ONNX file; write .pt2")
    named = ["output"] if len(program.graph_signature.user_outputs) == 1 else None
    try:
        made: Any = torch.onnx.export(
            program, opset_version=opset, dynamo=True, verbose=False, output_names=named
        )
        model = made.model_proto
    except Exception as error:
        raise SurgeryError(f"torch.onnx cannot write the network: {reason(error)}") from error
    found = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if opset is not None and found != opset:
        raise SurgeryError(
            f"opset {opset} was asked for, but torch.onnx writes this network in opset {found}; "
            "leave the opset out, or choose 18 or more"
        )
    if "BatchNormalization" in _kinds(model) and not _has_norms(own):
        raise SurgeryError("the ONNX graph has a BatchNormalization, but the network has no norm")
    model.metadata_props.add(key=KEY, value=said)
    part.write_bytes(model.SerializeToString())
    try:
        run, read_by = _onnx_runner(part)
    except Exception as error:
        types = {t.dtype for t in tensors_in(own.state_dict()) if t.is_floating_point()}
        remedy = "" if types <= {torch.float32} else "; convert the network to float32 first"
        why = reason(error).replace(str(part), "it")
        raise SurgeryError(f"the ONNX file cannot be loaded again: {why}{remedy}") from error
    return run, found, read_by


def _onnx_runner(part: Path) -> tuple[Run, str]:
    """What runs an ONNX file, and its name: onnxruntime, or without it onnx's own reference."""
    if is_installed("onnxruntime"):
        runtime: Any = import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(str(part), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        read_by = f"onnxruntime {runtime.__version__}"
    else:
        session = import_module("onnx.reference").ReferenceEvaluator(str(part))
        names = session.input_names
        read_by = f"onnx.reference {version('onnx')}"

    def run(example: Any) -> list[Tensor]:
        arrays = [t.detach().numpy() for t in tensors_in(arguments(example))]
        found = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.as_tensor(array) for array in found]

    return run, read_by


def _has_norms(own: nn.Module) -> bool:
    nodes = own.graph.nodes if isinstance(own, fx.GraphModule) else ()
    return any(isinstance(m, NORMS) for m in own.modules()) or any(is_norm(n) for n in nodes)


def _kinds(model: Any) -> set[str]:
    """The kinds of nodes in an ONNX model, those inside of other nodes too."""
    waiting = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    found = set()
    while waiting:
        node = waiting.pop()
        found.add(node.op_type)
        for value in node.attribute:
            waiting += [inner for graph in (value.g, *value.graphs) for inner in graph.node]
    return found


def batch_of(example: Any) -> int:
    """The size of the first input's first axis.

    Raises:
        ShapeError: there is no such axis.
    """
    first = next((t for t in tensors_in(arguments(example)) if t.dim() > 0), None)
    if first is None:
        raise ShapeError("the example has no tensor with a batch axis; give dynamic_batch=False")
    return len(first)


def _has_batch(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


def resized(example: Any, size: int) -> Any:
    """The example with the batch cut, or filled up with its own samples from the first on."""
    old = batch_of(example)
    order = torch.arange(size) % old
    return pytree.tree_map(
        lambda v: v[order.to(v.device)] if _has_batch(v, old) else v,
        dict(example) if isinstance(example, Mapping) else example,
    )


def is_installed(package: str) -> bool:
    """True if a package can be imported; nothing is."""
    return find_spec(package) is not None


def reason(error: BaseException) -> str:
    """The first line of the error that another came from, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
