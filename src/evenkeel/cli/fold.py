"""``evenkeel fold``: a network without its norms, proved and written for other programs."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.markup import escape
from rich.table import Table

from ..errors import ConfigError, FormatError, ShapeError, first_line, meant
from .console import check_free, check_place, console, device_named
from .network import note, open_network, random_inputs, shape_of, share_cores
from .options import Device, NetworkOrFile, Overwrite, OwnModelOfFile, Weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..surgery.export import Exported
    from ..surgery.fold import FoldReport

__all__ = ["fold"]

_DTYPES: Final = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")


@dataclass(frozen=True)
class _Subject:
    """A network to fold, an example of what it is given, and what a file of it is to say."""

    network: nn.Module
    example: Any
    about: dict[str, Any]


def fold(
    network: NetworkOrFile,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The new file: .pt2 (torch.export), .onnx, or .safetensors for the weights alone. "
            "Without it nothing is written.",
        ),
    ] = None,
    weights: Weights = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option("--input", help="The shape of an input, 1,3,224,224 say; once for each."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help=f"Of the inputs, once or for each: {', '.join(_DTYPES)}."),
    ] = None,
    example: Annotated[
        Path | None,
        typer.Option(
            help="Real inputs, .npy or .safetensors (several by name), in place of --input."
        ),
    ] = None,
    classes: Annotated[
        int | None, typer.Option(help="For a factory that asks for it; 10 by default.", min=1)
    ] = None,
    dynamic_batch: Annotated[
        bool,
        typer.Option("--dynamic-batch/--fixed-batch", help="Any batch size, or the example's."),
    ] = True,
    opset: Annotated[
        int | None, typer.Option(help="Of the ONNX file; by default torch's choice.", min=1)
    ] = None,
    model: OwnModelOfFile = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="If a norm stays, write nothing and exit with 1.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Fold a network's batch norms into its layers, prove it, and write the result.

    The folded network is compared with the original at every norm and at the end, and the file with
    the folded network. If either differs, nothing is written. What stays is named, with the reason.
    """
    share_cores()
    trained = Path(network).is_file()
    _check_words(network, trained, weights, input_shape, dtype, example, classes, model)
    shapes = [shape_of(text) for text in input_shape or ()]
    _check_out(out, opset, overwrite, [Path(network), *([weights] if weights else [])])
    kinds = _dtypes(dtype, len(shapes))
    where = device_named(device)
    if not as_json:
        _announce(network, weights, example, shapes, kinds, str(where), out, dynamic_batch)
    from ..surgery.export import export
    from ..surgery.fold import fold as folded_copy

    busy = nullcontext() if as_json else console.status("Working")
    with redirect_stdout(sys.stderr), busy:
        given = None if example is None else _read(example)
        if given is None and shapes:
            given = random_inputs(shapes, kinds)
        if trained:
            subject = _trained(Path(network), model, given, dynamic_batch, where)
        else:
            subject = _made(network, weights, given, classes, where)
        _try(network, subject, example)
        folded, report = folded_copy(subject.network, subject.example)
        file: Exported | None = None
        if out is not None and not (strict and report.left):
            about = subject.about | {"fold": report.to_dict()}
            file = export(
                folded, subject.example, out, dynamic_batch=dynamic_batch, opset=opset, about=about
            )
    if as_json:
        kept = None if file is None else file.to_dict()
        found = {"network": network, "fold": report.to_dict(), "file": kept}
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(report, file, "images" in subject.about)
    if strict and report.left:
        note(f"{_norms(len(report.left))} left, so nothing was written (--strict)")
        raise typer.Exit(1)


def _check_words(
    network: str,
    trained: bool,
    weights: Path | None,
    input_shape: list[str] | None,
    dtype: list[str] | None,
    example: Path | None,
    classes: int | None,
    model: str | None,
) -> None:
    """Options that do not go together."""
    if not trained and ":" not in network:
        raise FormatError(
            f"{network}: {_missing(Path(network))}; give what 'evenkeel train' wrote, or "
            "package.module:factory"
        )
    if trained and (weights is not None or classes is not None):
        raise ConfigError(f"{network} has weights and classes; leave out --weights and --classes")
    if not trained and model is not None:
        raise ConfigError("--model is for a file of 'evenkeel train'; the network is named already")
    if example is not None and (input_shape or dtype):
        raise ConfigError(f"{example} has shapes and types; leave out --input and --dtype")
    if not trained and not input_shape and example is None:
        raise ConfigError(
            "folding is proved on an input; give its shape, --input 1,3,224,224 say, or --example"
        )


def _missing(path: Path) -> str:
    return "is a folder, not a file" if path.is_dir() else "there is no such file"


def _check_out(out: Path | None, opset: int | None, overwrite: bool, sources: list[Path]) -> None:
    """A file that cannot be written is refused before the work, not behind it."""
    from ..surgery.export import check_target

    if out is None:
        if opset is not None:
            raise ConfigError("--opset belongs to a file; name it, -o FILE.onnx say")
        return
    check_place(out)
    check_target(out, opset)
    if out.exists() and any(path.exists() and out.samefile(path) for path in sources):
        raise ConfigError(f"{out} is what the network is made of; choose another --out")
    check_free(out, overwrite)


def _dtypes(names: list[str] | None, inputs: int) -> list[str]:
    """A type for each input."""
    names = names or ["float32"]
    for name in names:
        if name not in _DTYPES:
            raise ConfigError(
                f"unknown --dtype '{name}'{meant(name, _DTYPES)}; choose {', '.join(_DTYPES)}"
            )
    if len(names) not in (1, inputs):
        raise ConfigError(
            f"--dtype is given {len(names)} times and --input {inputs}; give one type for all "
            "inputs, or one for each"
        )
    return names * inputs if len(names) == 1 else names


def _read(path: Path) -> Any:
    """The inputs in a file: one, or several by name.

    Raises:
        FormatError: it cannot be read, or holds something else.
    """
    import numpy as np
    import torch
    from safetensors.torch import load_file

    if not path.is_file():
        raise FormatError(f"{path}: {_missing(path)}")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if path.suffix == ".safetensors":
            found = load_file(path)
            return found if len(found) > 1 else next(iter(found.values()))
    except Exception as error:
        raise FormatError(
            f"{path}: there are no inputs in it that can be read ({first_line(error)})"
        ) from error
    raise FormatError(f"{path}: inputs are read from .npy and .safetensors; save them so")


def _trained(
    path: Path, model: str | None, given: Any, dynamic_batch: bool, where: torch.device
) -> _Subject:
    """A network of 'evenkeel train'."""
    network, card = open_network(path, where, model)
    given = random_inputs([(8 if dynamic_batch else 1, *card.shape)]) if given is None else given
    if tuple(getattr(given, "shape", ()))[1:] != card.shape:
        raise ConfigError(f"{path} was trained on images of {card.shape}; give one input like them")
    about = {
        "network": card.training.arm.model,
        "classes": list(card.classes),
        "images": {"binary": card.training.data.binary, "shift": card.shift, "scale": card.scale},
    }
    return _Subject(network, given.to(where), about)


def _made(
    name: str, weights: Path | None, given: Any, classes: int | None, where: torch.device
) -> _Subject:
    """The network of a factory, with the weights in it."""
    import torch
    from torch.utils import _pytree as pytree

    from ..study.models import build

    first: Tensor = pytree.tree_leaves(given)[0]
    shape: Any = tuple(first.shape[1:])
    network = build(name, shape, classes or 10, "relu", 0)
    about = {"network": name}
    if weights is not None:
        _load(network, weights)
        about["weights"] = weights.name
    example = pytree.tree_map_only(torch.Tensor, lambda t: t.to(where), given)
    return _Subject(network.to(where), example, about)


def _load(network: nn.Module, path: Path) -> None:
    """Puts the weights in, all of them: what is missing would be folded as if it were right.

    Raises:
        FormatError: the weights are not those of the network.
    """
    from ..checks.weights import as_checkpoint, load_into

    loaded = load_into(network, as_checkpoint(path))
    lacking = [f"{norm}.{name}" for norm, names in loaded.missing.items() for name in names]
    own = network.state_dict()
    extra = [n for n in loaded.checkpoint.state if n not in own and "num_batches" not in n]
    for names, says in (
        (lacking, "it has no {}, and a norm is nothing without its statistics"),
        (extra, "it has {}, which the network does not have; it is of another network"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise FormatError(f"{path}: {says.format(', '.join(names[:3]) + more)}")
    if loaded.checkpoint.averaged is not None:
        note(f"{path} has averaged weights (EMA or SWA) too; those were not taken")


def _try(name: str, subject: _Subject, example: Path | None) -> None:
    """Runs the example once: what does not fit is the user's mistake, and told as such.

    Raises:
        ShapeError: the network cannot run it.
    """
    import torch

    from ..surgery.examples import call, tensors_in
    from ..surgery.exporting.programs import reason

    try:
        with torch.no_grad():
            call(subject.network.eval(), subject.example)
    except Exception as error:
        shapes = " and ".join("x".join(map(str, t.shape)) for t in tensors_in(subject.example))
        what = f"random inputs of {shapes}" if example is None else f"{example}, of {shapes}"
        raise ShapeError(f"{name} cannot run {what}: {reason(error)}") from error


def _announce(
    network: str,
    weights: Path | None,
    example: Path | None,
    shapes: list[tuple[int, ...]],
    kinds: list[str],
    device: str,
    out: Path | None,
    dynamic_batch: bool,
) -> None:
    """What will be done."""
    numbers = "random images of the size that it was trained on"
    if example is not None:
        numbers = f"the inputs in {example}"
    elif shapes:
        pairs = zip(shapes, kinds, strict=True)
        numbers = "random " + " and ".join(f"{'x'.join(map(str, s))} {kind}" for s, kind in pairs)
    lines = [
        f"Folding {network}" + (f" with the weights in {weights}" if weights else ""),
        f"Proving it on {numbers}, on {device}",
    ]
    if out is not None and out.suffix == ".safetensors":
        lines.append(f"Writing the weights to {out}")
    elif out is not None:
        lines.append(
            f"Writing {out} for {'any batch size' if dynamic_batch else 'this batch size'}"
        )
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def _show(report: FoldReport, file: Exported | None, images: bool) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("norm", overflow="fold", max_width=30)
    table.add_column("folded into, or why it stays", overflow="fold")
    table.add_column("difference", justify="right", no_wrap=True)
    for one in report.folded:
        into = ", ".join(one.into) or "nothing, it did nothing"
        way = f" (through {', '.join(one.through)})" if one.through else ""
        table.add_row(escape(one.norm), escape(into + way), f"{one.difference:.1e}")
    for norm, reason in report.left:
        table.add_row(escape(norm), escape(f"stays: {reason}"), "")
    console.print()
    if report.folded or report.left:
        console.print(table)
    left = f", {len(report.left)} left" if report.left else ""
    console.print(f"{_norms(len(report.folded))} folded{left}")
    exact = "" if report.exact is None else f"; in double precision {report.exact:.0e}"
    console.print(
        f"Largest output difference {report.difference:.1e} of {report.scale:.3g} (budget "
        f"{report.budget:.0e} relative{exact})"
    )
    for text in report.notes:
        note(text)
    if file is not None:
        console.print(f"Kept in {escape(str(file))}")
        if images:
            console.print("Its metadata has the classes, and what an image is to be made into")


def _norms(count: int) -> str:
    return f"{count} norm{'' if count == 1 else 's'}"
