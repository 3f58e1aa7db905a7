"""``evenkeel bench``: ops, training steps, memory and folded inference against torch's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .. import allocator
from ..errors import ConfigError, meant
from .console import check_place, console, device_named, duration, write_atomically

if TYPE_CHECKING:
    from ..bench.results import Results, Row

__all__ = ["bench"]

bench = typer.Typer(
    help="Time evenkeel against torch: single ops, training steps, memory, folded inference.",
    no_args_is_help=True,
)

Quick = Annotated[bool, typer.Option("--quick", help="A few small cases, without torch.compile.")]
Net = Annotated[
    str,
    typer.Option(
        help="vgg, resnet18, mobilenetv2, densenet, efficientnet, resnet50, or all but the last."
    ),
]
Batch = Annotated[int, typer.Option(help="Images in a batch.", min=2)]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or both.")]
Layout = Annotated[str, typer.Option(help="nchw, channels_last or both.")]
Device = Annotated[str, typer.Option(help="cpu or cuda (not yet seen on a GPU).")]
Compiles = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="torch.compile too; the default unless --quick."),
]
Seconds = Annotated[float | None, typer.Option(help="How long to measure one case.", min=0.001)]
Threads = Annotated[
    int | None, typer.Option(help="Torch's threads; its own choice by default.", min=1)
]
Out = Annotated[Path | None, typer.Option(help="A JSON file for all numbers, kept as it goes.")]
Allocator = Annotated[
    str,
    typer.Option(help="keep: glibc keeps large blocks, for every side; default: it does not."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would run and about how long, run nothing.")
]


@bench.command()
def ops(
    quick: Quick = False,
    net: Annotated[
        str, typer.Option(help="resnet50, vgg16, mobilenetv2, densenet121 or all.")
    ] = "all",
    every_tail: Annotated[
        bool,
        typer.Option(
            "--every-tail",
            help="Each shape alone, with ReLU and with add and ReLU, not only as in the nets.",
        ),
    ] = False,
    batch: Batch = 32,
    dtype: Dtype = "both",
    layout: Layout = "both",
    device: Device = "cpu",
    compiles: Compiles = None,
    seconds: Seconds = None,
    threads: Threads = None,
    out: Out = None,
    allocator: Allocator = "keep",
    dry_run: DryRun = False,
) -> None:
    """Forward and backward of every batch norm of four networks at 224x224."""
    settings = dict(locals())
    settings["device"] = device_named(device).type
    given = _prepare(settings, 1.0, 0.8)
    from ..bench import ops as timing

    chosen, left_out = timing.cases(
        batch=batch,
        layouts=_names("layout", layout, timing.LAYOUTS),
        dtypes=_names("dtype", dtype, timing.DTYPES),
        network=net,
        quick=quick,
        every_tail=every_tail,
        device=settings["device"],
    )
    what = f"{_count(len(chosen), 'case')} of batch norm, forward and backward, batch {batch}"
    rows = len(chosen)
    _carry_out("ops", what, settings, timing, chosen, given, rows=rows, left_out=left_out)


@bench.command()
def steps(
    quick: Quick = False,
    net: Net = "all",
    size: Annotated[
        int | None,
        typer.Option(help="Height and width of the images; 32 and 96 by default.", min=32),
    ] = None,
    batch: Batch = 32,
    dtype: Dtype = "float32",
    layout: Layout = "both",
    device: Device = "cpu",
    compiles: Compiles = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Ours with low memory too, as a side of its own.")
    ] = False,
    control: Annotated[
        bool,
        typer.Option("--control", help="Eager once more: what differs then is chance."),
    ] = False,
    seconds: Seconds = None,
    threads: Threads = None,
    out: Out = None,
    allocator: Allocator = "keep",
    dry_run: DryRun = False,
) -> None:
    """Whole training steps of five networks: forward, loss, backward, SGD."""
    settings = dict(locals())
    settings["device"] = device_named(device).type
    if settings["device"] == "cpu":
        del settings["device"]
    elif low_memory:
        raise ConfigError(
            f"--low-memory is for the native kernels, on the CPU, but got --device {device}; "
            "leave one of the two out"
        )
    if size is None:
        del settings["size"]
    _nets("steps", settings)


@bench.command()
def memory(
    quick: Quick = False,
    net: Net = "all",
    batch: Batch = 32,
    dtype: Dtype = "float32",
    layout: Layout = "both",
    compiles: Compiles = None,
    threads: Threads = None,
    out: Out = None,
    allocator: Allocator = "keep",
    dry_run: DryRun = False,
) -> None:
    """The bytes that a training step keeps for its backward."""
    _nets("memory", dict(locals()))


@bench.command()
def fold(
    quick: Quick = False,
    net: Annotated[
        str,
        typer.Option(
            help="vgg, resnet18, mobilenetv2, densenet, efficientnet, preact, inception, "
            "seresnet, shufflenet, unet, dcgan or all."
        ),
    ] = "all",
    batch: Annotated[
        int | None, typer.Option(help="Images in a batch; 1 and then 8 by default.", min=1)
    ] = None,
    layout: Layout = "both",
    compiles: Annotated[
        bool, typer.Option("--compile", help="torch.compile with frozen weights too.")
    ] = False,
    seconds: Seconds = None,
    threads: Threads = None,
    out: Out = None,
    allocator: Allocator = "keep",
    dry_run: DryRun = False,
) -> None:
    """Inference of eleven networks, folded by us and by torch."""
    settings = dict(locals())
    given = _prepare(settings, 10.0, 2.0)
    from ..bench import inference
    from ..bench.ops import LAYOUTS

    layouts = _names("layout", layout, LAYOUTS)
    chosen = inference.plans(layouts=layouts, batch=batch, network=net, quick=quick)
    what = f"inference of {_count(len({plan.net for plan in chosen}), 'network')}, folded; batch "
    what += " and ".join(str(size) for size in dict.fromkeys(plan.batch for plan in chosen))
    rows = sum(len(plan.layouts) for plan in chosen)
    _carry_out("fold", what, settings, inference, chosen, given, rows=rows)


def _nets(kind: str, settings: dict[str, Any]) -> None:
    """Steps and memory: the same networks, timed or counted."""
    given = _prepare(settings, 20.0, 4.0)
    from ..bench import memory, steps
    from ..bench.ops import DTYPES, LAYOUTS
    from ..bench.results import AGAIN, LOW

    chosen = steps.plans(
        batch=settings["batch"],
        layouts=_names("layout", settings["layout"], LAYOUTS),
        dtypes=_names("dtype", settings["dtype"], DTYPES),
        network=settings["net"],
        quick=settings["quick"],
        **{name: settings[name] for name in ("size", "device") if name in settings},
    )
    of = f"of {_count(len(chosen), 'network')}, batch {settings['batch']}"
    rows = sum(len(plan.layouts) for plan in chosen)
    if kind == "steps":
        wishes = {LOW: settings["low_memory"], AGAIN: settings["control"]}
        given["asked"] = [side for side, wished in wishes.items() if wished]
        _carry_out(kind, f"training steps {of}", settings, steps, chosen, given, rows=rows)
    else:
        del given["seconds"]
        what = f"memory kept for backward {of}"
        _carry_out(kind, what, settings, memory, chosen, given, rows=rows, unit="bytes")


def _prepare(settings: dict[str, Any], usual: float, quick: float) -> dict[str, Any]:
    """Sees to the allocator, for all sides, and to the threads.

    Gives the seconds of one case, and whether torch.compile runs; notes both in the settings.

    Raises:
        ConfigError: an option does not fit.
    """
    wish, out = settings["allocator"], settings["out"]
    allocator.check(wish)
    if out is not None:
        check_place(out)
    found = allocator.keep_blocks() if wish == "keep" else allocator.default_blocks()
    if wish == "default" and found.keeps:
        raise ConfigError(
            f"--allocator default cannot be had: {found.text}; unset "
            f"{', '.join(sorted(allocator.KEEP))}"
        )
    import torch

    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    if settings.get("seconds") is None:
        settings["seconds"] = quick if settings["quick"] else usual
    if settings["compiles"] is None:
        settings["compiles"] = not settings["quick"]
    return {name: settings[name] for name in ("seconds", "compiles")}


def _names(option: str, wish: str, known: Iterable[str]) -> list[str]:
    """'both', or the one that was named.

    Raises:
        ConfigError: no such name.
    """
    names = list(known)
    if wish == "both":
        return names
    if wish not in names:
        raise ConfigError(
            f"unknown {option} '{wish}'{meant(wish, names)}; choose {', '.join(names)} or both"
        )
    return [wish]


def _carry_out(
    kind: str,
    what: str,
    settings: dict[str, Any],
    room: Any,
    chosen: Sequence[Any],
    given: dict[str, Any],
    *,
    rows: int,
    unit: str = "s",
    left_out: Sequence[str] = (),
) -> None:
    """Says what will be done, does it, shows what was found; Ctrl-C shows what there is.

    ``room`` is the module that runs what was chosen, as given, and estimates how long that takes.
    """
    from ..bench.machine import machine
    from ..bench.results import Results

    out = settings["out"]
    results = Results(kind, unit, _plain(settings), machine(), left_out=list(left_out))
    ran_on = results.machine
    console.print(f"[bold]{escape(what)}[/], about {duration(room.estimate(chosen, **given))}")
    if settings.get("device", "cpu") != "cpu":
        console.print(escape(str(ran_on["gpu"]["name"])))
    console.print(
        escape(
            f"{ran_on['cpu']}, {_count(ran_on['cores'], 'core')}, "
            f"{_count(ran_on['threads'], 'thread')}; "
            f"torch {ran_on['torch']}; allocator {ran_on['allocator']}"
        )
    )
    if not given["compiles"]:
        console.print("[dim]torch.compile is left out; --compile brings it in[/]")
    if settings["dry_run"]:
        for case in left_out:
            console.print(f"left out: {escape(case)}")
        return
    try:
        _measure(room.run(chosen, **given), rows, results, out)
        results.finished = True
    except KeyboardInterrupt:
        console.print(f"Stopped; {len(results.rows)} of {rows} are measured.")
        raise
    finally:
        _show(results)
        _keep(results, out)
    if out is not None:
        console.print(f"\nNumbers: [bold]{escape(str(out))}[/]", soft_wrap=True)


def _measure(found: Iterable[Row], rows: int, results: Results, out: Path | None) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=rows)
        for row in found:
            results.rows.append(row)
            done = f"{len(results.rows)} of {rows}"
            progress.update(bar, advance=1, description=f"{done}: {row.name}")
            _keep(results, out)


def _show(results: Results) -> None:
    from ..bench.tables import sentences, tables

    for table in tables(results):
        console.print()
        console.print(table)
    console.print()
    for sentence in sentences(results):
        console.print(escape(sentence))


def _keep(results: Results, out: Path | None) -> None:
    if out is not None:
        write_atomically(out, results.to_json())


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The options that decide the numbers; where the file lies does not."""
    return {key: value for key, value in settings.items() if key not in ("out", "dry_run")}
