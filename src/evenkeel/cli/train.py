"""``evenkeel train``: one network, trained and kept in one file."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..allocator import keep_blocks
from ..errors import ConfigError
from .console import check_free, check_place, console, device_named, duration
from .network import note, share_cores
from .options import DataSource, Device, ImageSize

if TYPE_CHECKING:
    from types import FrameType

    from ..study.checkpoint import Epoch
    from ..study.data import Dataset
    from ..study.fit import Fit
    from ..study.training import Training

__all__ = ["train"]

_OUT = "model.safetensors"
_FEW_VALUES = 2**15
"""A batch of fewer input values than this trains faster on one thread than on several."""


def train(
    data: Annotated[
        str | None,
        typer.Option(
            help="digits (embedded, the default), mnist, fashion-mnist, cifar10, idx or folder."
        ),
    ] = None,
    data_dir: DataSource = None,
    image_size: ImageSize = None,
    binary: Annotated[
        bool | None, typer.Option("--binary", help="Pixels above half intensity are 1, others 0.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="standard (the default), paper, lenet5, residual, residual-pre, or your own as "
            "package.module:factory."
        ),
    ] = None,
    placement: Annotated[
        str | None,
        typer.Option(
            help="Where norms go: before-activation (the default), after-activation, on-input, "
            "after-pooling, after-addition or none."
        ),
    ] = None,
    statistics: Annotated[
        str | None,
        typer.Option(
            help="spatial (the default), per-activation, per-location, layer, or a pattern such as "
            "'n c h w -> c'."
        ),
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="relu (the default), leaky_relu or sigmoid.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="How often each image is seen; 4 for MNIST.", min=1)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="64 for MNIST.", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="0.05 for MNIST.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="SGD (the default) or another one of torch.optim.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of the optimizer, as key=value; SGD has momentum=0.9. Repeatable."),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="On weights, not on gamma and beta; 0.0005 with SGD.")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine (the default) or constant.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the weights and the order of the data; 0.", min=0)
    ] = None,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="The file of the trained network.")] = Path(_OUT),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the training that was stopped.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file, or a training that was stopped.")
    ] = False,
) -> None:
    """Train one network with batch norm, and keep it in one file.

    The defaults suit the data. Ctrl-C keeps what is done; --resume goes on and ends with the same
    weights, bit by bit. So does a power cut, from the end of the last epoch.
    """
    given = {
        "data": data, "image_size": image_size, "binary": binary, "placement": placement,
        "statistics": statistics, "activation": activation, "epochs": epochs,
        "batch_size": batch_size, "learning_rate": learning_rate, "optimizer": optimizer,
        "options": _options(option or []) or None, "weight_decay": weight_decay,
        "schedule": schedule, "seed": seed,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    if resume and given:
        raise ConfigError(
            "--resume goes on with a training as it was; give only --out, --data-dir, --device, or "
            "--model for a network of your own, with it"
        )
    share_cores()
    keep_blocks()
    fit = _resumed(out, data_dir, model, device) if resume else None
    if fit is None:
        if model is not None:
            given["model"] = model
        _check_target(out, overwrite)
        fit = _fresh(given, data_dir, device)
    _announce(fit, out)
    _run(fit, out)


def _options(words: list[str]) -> dict[str, Any]:
    """The optimizer's options from key=value; a value is JSON."""
    found: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        try:
            found[key.replace("-", "_")] = json.loads(text)
        except ValueError:
            raise ConfigError(
                f"--option {word} cannot be read; write key=value, the value a number, true, "
                "false, null or a list such as [0.9,0.99]"
            ) from None
    return found


def _check_target(out: Path, overwrite: bool) -> None:
    """Refuses what would end in tears after an hour of training."""
    from ..study.fit import state_path

    check_place(out)
    state = state_path(out)
    if state.exists() and not overwrite:
        raise ConfigError(
            f"{state} holds a training that was stopped; go on with it by --resume, or train anew "
            "with --overwrite"
        )
    check_free(out, overwrite)


def _fresh(given: dict[str, Any], folder: Path | None, device: str) -> Fit:
    from ..study.arms import Data
    from ..study.fit import Fit
    from ..study.training import training_for

    picked = {key: given.pop(key) for key in ("image_size", "binary") if key in given}
    path = None if folder is None else str(folder.expanduser().resolve())
    data = Data(given.pop("data", "digits"), path, **picked)
    training = training_for(data, **({"placement": "before-activation"} | given))
    where = device_named(device)
    dataset = _loaded(training)
    _choose_threads(training, dataset)
    return Fit(training, dataset, where)


def _resumed(out: Path, folder: Path | None, model: str | None, device: str) -> Fit:
    from dataclasses import replace

    from ..study.fit import Fit, read_state, state_path

    path = state_path(out)
    if not path.exists():
        what = f"{out} is finished" if out.exists() else "start one without --resume"
        raise ConfigError(f"there is no stopped training in {path}; {what}")
    state = read_state(path)
    training = state.card.training
    if folder is not None:
        data = replace(training.data, folder=str(folder.expanduser().resolve()))
        training = replace(training, data=data)
        state = replace(state, card=replace(state.card, training=training))
    where = device_named(device)
    dataset = _loaded(training)
    _choose_threads(training, dataset)
    return Fit.resume(state, dataset, where, model=model)


def _loaded(training: Training) -> Dataset:
    from ..study.data import load

    data = training.data
    with console.status(f"Loading {escape(data.name)}"):
        dataset = load(data.name, data.path, image_size=data.image_size)
    for text in dataset.notes:
        note(text)
    console.print(f"Data: {escape(dataset.summary())}", soft_wrap=True)
    return dataset


def _choose_threads(training: Training, dataset: Dataset) -> None:
    """One thread for small images; by a rule, not by the clock, so that the bits are the same."""
    import torch

    if training.arm.batch_size * math.prod(dataset.shape) < _FEW_VALUES:
        torch.set_num_threads(1)


def _announce(fit: Fit, out: Path) -> None:
    """Says what will be done before it is done."""
    import torch

    training, arm = fit.training, fit.training.arm
    weights = sum(p.numel() for p in fit.network.parameters())
    activation = "" if ":" in arm.model else f", {arm.activation}"
    console.print(f"Network: {escape(arm.model)}{activation}, {weights:,} weights")
    if fit.introduced is None:
        console.print("No norms (--placement none)")
    else:
        console.print(escape(str(fit.introduced)), soft_wrap=True)
    options = "".join(f", {key} {value}" for key, value in arm.options.items())
    console.print(
        f"{arm.optimizer}: learning rate {arm.learning_rate:g} ({training.schedule}){options}, "
        f"weight decay {arm.weight_decay:g}, batches of {arm.batch_size}, seed {training.seed}",
        markup=False,
        soft_wrap=True,
    )
    with console.status("Estimating the time"):
        seconds = fit.seconds_left()
    count = torch.get_num_threads()
    threads = "" if fit.device.type != "cpu" else f", {count} thread" + "s" * (count > 1)
    done = f", {fit.done:,} of them done" if fit.done else ""
    console.print(
        f"{training.epochs} epochs of {fit.steps_per_epoch:,} steps = {fit.total:,} steps{done}; "
        f"about [bold]{duration(seconds)}[/] ({fit.device}{threads}); kept in {escape(str(out))}",
        soft_wrap=True,
    )


def _run(fit: Fit, out: Path) -> None:
    """Trains to the end, with a bar; Ctrl-C keeps what is done."""
    from ..study.fit import DivergedError, Step, state_path

    state = state_path(out)
    fit.save_state(state)  # tells now, not in an hour, that the disk is full
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(compact=True))
    started = since = time.perf_counter()
    with (
        _interrupts() as asked,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        bar = progress.add_task("", total=fit.total, completed=fit.done)
        try:
            for event in fit.run():
                epochs = len(fit.history)
                if isinstance(event, Step):
                    epoch = f"epoch {epochs + 1} of {fit.training.epochs}"
                    progress.update(bar, completed=event.done, description=epoch)
                else:
                    now = time.perf_counter()
                    _tell(event, epochs, fit.training.epochs, now - since)
                    since = now
                    fit.save_state(state)
                if asked.is_set():
                    fit.save_state(state)
                    break
        except DivergedError:
            state.unlink(missing_ok=True)  # going on would end there again
            raise
    if asked.is_set() and len(fit.history) < fit.training.epochs:
        _tell_how_to_go_on(fit, out)
        raise KeyboardInterrupt
    fit.save(out)
    state.unlink(missing_ok=True)
    console.print(
        f"Test accuracy [bold]{100 * fit.history[-1].accuracy:.2f} %[/] in "
        f"{duration(time.perf_counter() - started)}; kept in {escape(str(out))}\n"
        f"Try: evenkeel evaluate {escape(str(out))} --inference all",
        soft_wrap=True,
    )


def _tell(event: Epoch, number: int, of: int, seconds: float) -> None:
    span = f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
    console.print(
        f"epoch {number} of {of}: loss {event.train_loss:.4f}, "
        f"test accuracy {100 * event.accuracy:.2f} % ({span})"
    )


def _tell_how_to_go_on(fit: Fit, out: Path) -> None:
    own = f" --model {fit.training.arm.model}" if ":" in fit.training.arm.model else ""
    where = "" if out == Path(_OUT) else f" --out {out}"
    console.print(
        f"Stopped behind step {fit.done:,} of {fit.total:,}; all of it is kept. Go on with:\n"
        f"  evenkeel train --resume{escape(own + where)}",
        soft_wrap=True,
    )


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that no step is torn; a second one ends the program at once."""
    asked = threading.Event()

    def first(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(number, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread hears signals
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, first) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
