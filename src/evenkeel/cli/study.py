"""``evenkeel study``: train the arms, keep every trial, show what they say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..allocator import keep_blocks
from ..errors import ConfigError
from .console import console, device_named, duration
from .options import DataSource, Device, ImageSize
from .report import finish

if TYPE_CHECKING:
    from ..study.arms import Plan
    from ..study.run import Prepared
    from ..study.trial import Trial

__all__ = ["study"]

ROOT = Path("runs")


def study(
    preset: Annotated[
        str | None,
        typer.Option(
            help="quick (the default), placement, modes, paper, batch-size, learning-rate or "
            "residual."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with arms of your own.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="digits (embedded), mnist, fashion-mnist, cifar10, idx or folder."),
    ] = None,
    data_dir: DataSource = None,
    image_size: ImageSize = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="standard, paper, lenet5, residual, residual-pre, or your own as "
            "package.module:factory."
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Trials of each arm.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of a trial.", min=1)] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; one for each core by default.", min=1)
    ] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; runs/PRESET-DATA[-MODEL] by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the arms and the estimated time, train nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the latest run (or the one in --out).")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try failed trials again.")
    ] = False,
) -> None:
    """Train a CNN with batch norm in every place worth trying, and say what is better.

    Every finished trial is kept: run the same command again to go on where it stopped.
    """
    from ..study.pool import get_ready
    from ..study.run import prepare

    choices = (preset, config, data, data_dir, image_size, model, steps)
    if resume and any(choice is not None for choice in choices):
        raise ConfigError(
            "--resume goes on with a run as it was; give only --out, --seeds or --workers with it"
        )
    if resume:
        folder = out or _latest()
        plan = _stored_plan(folder).on(seeds=seeds)
    else:
        plan = _planned(preset, config).adapted(
            data=data,
            folder=data_dir,
            image_size=image_size,
            model=model,
            steps=steps,
            seeds=seeds,
        )
        suffix = f"-{model.replace(':', '.')}" if model else ""
        folder = out or ROOT / (plan.folder_name + suffix)
    keep_blocks()
    where = device_named(device)
    if not dry_run:
        get_ready()
    count = workers or (1 if where.type == "cuda" else os.cpu_count() or 1)
    with console.status("Loading the data and trying each arm") as status:
        prepared = prepare(
            plan,
            where,
            lambda name: status.update(f"Trying [bold]{escape(name)}[/]"),
            leave_out=model is not None,
        )
    _announce(prepared, folder, count)
    if dry_run:
        return
    _run(prepared, folder, count, retry_failed)
    finish(folder)


def _planned(preset: str | None, config: Path | None) -> Plan:
    from ..study.config import load_plan
    from ..study.presets import preset as built_in

    if config is not None:
        if preset is not None:
            raise ConfigError("give --preset or --config, not both")
        return load_plan(config)
    return built_in(preset or "quick")


def _stored_plan(folder: Path) -> Plan:
    from ..study.store import Store

    with Store(folder) as store:
        return store.plan()


def _latest() -> Path:
    """The folder of the run that was worked on last."""
    from ..study.store import FILE

    found = sorted(ROOT.glob(f"*/{FILE}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"there is no run in {ROOT}; start one with 'evenkeel study'")
    return found[-1].parent


def _announce(prepared: Prepared, folder: Path, workers: int) -> None:
    """Says what will be done before it is done."""
    from ..study.store import FILE, Store

    plan = prepared.plan
    jobs = plan.trials
    if (folder / FILE).is_file():
        with Store(folder) as store:
            jobs = store.missing(plan)
    table = Table(title=f"Study '{plan.name}'", title_justify="left", box=None, pad_edge=False)
    table.add_column("arm", overflow="fold")
    table.add_column("differs from the baseline in", overflow="fold")
    table.add_column("one trial", justify="right", no_wrap=True)
    for arm in plan.arms:
        changes = arm.difference(plan.baseline_arm).items()
        differs = ", ".join(f"{key} {mine}" for key, (mine, _) in changes)
        table.add_row(
            escape(arm.name),
            escape(differs or "(this is the baseline)"),
            f"{prepared.estimate.seconds[arm.name]:.1f} s",
        )
    console.print(table)
    console.print(f"\nData: {escape(prepared.dataset.summary())}")
    for note in prepared.dataset.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}")
    for reason in prepared.left_out:
        console.print(f"[yellow]Left out:[/] {escape(reason)}")
    total = prepared.estimate.total(jobs, workers)
    finished = len(plan.trials) - len(jobs)
    console.print(
        f"{len(plan.arms)} arms x {plan.seeds} seeds = {len(plan.trials)} trials"
        + (f", {finished} of them done" if finished else "")
        + f"; about [bold]{duration(total)}[/] on {workers} "
        + ("worker" if workers == 1 else "workers")
        + f" ({prepared.device}); kept in {escape(str(folder))}"
    )


def _run(prepared: Prepared, folder: Path, workers: int, retry_failed: bool) -> None:
    """Runs what is left, with a bar; Ctrl-C stops cleanly."""
    from ..study.run import Started, run
    from ..study.trial import Trial

    plan, seconds = prepared.plan, prepared.estimate.seconds
    reached: dict[tuple[str, int], float] = {}
    finished = failed = told = 0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=None)
        try:
            for event in run(prepared, folder, workers, retry_failed=retry_failed):
                if isinstance(event, Started):
                    total = len(event.jobs)
                    progress.update(bar, total=sum(seconds[arm.name] for arm, _ in event.jobs))
                    continue
                share = 1.0
                if isinstance(event, Trial):
                    finished += 1
                    failed += event.status == "failed"
                    if event.status != "ok" or event.error:
                        _tell_trouble(progress.console, event)
                else:
                    arm = next(arm for arm in plan.arms if arm.name == event.arm)
                    share = event.step / plan.steps_of(arm)
                reached[event.arm, event.seed] = share * seconds[event.arm]
                text = f"{finished} of {total} trials"
                progress.update(bar, completed=sum(reached.values()), description=text)
                if not console.is_terminal and finished * 10 // total > told:
                    told = finished * 10 // total
                    console.print(text)
        except KeyboardInterrupt:
            progress.stop()
            console.print(
                f"Stopped; {finished} finished just now and kept. Run the same command "
                "again to go on."
            )
            raise
    if failed:
        trials = "1 trial" if failed == 1 else f"{failed} trials"
        console.print(f"[yellow]{trials} failed[/]; try again with --retry-failed")


def _tell_trouble(out: Console, trial: Trial) -> None:
    reason = f": {trial.error.strip().splitlines()[-1]}" if trial.error else ""
    out.print(f"[yellow]{escape(trial.arm)}, seed {trial.seed}: {trial.status}{escape(reason)}[/]")
