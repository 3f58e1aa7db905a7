"""``evenkeel recalibrate``: a trained network's running statistics taken anew, in a new file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..allocator import keep_blocks
from .console import check_free, check_place, console, device_named
from .network import note, open_network, share_cores, test_data
from .options import AsJson, DataDir, Device, ImageSize, Overwrite, OwnModel, TestData, Trained

if TYPE_CHECKING:
    import torch

    from ..study.checkpoint import Card
    from ..study.data import Dataset
    from ..study.train import Batches, Score
    from ..surgery.recalibrate import Recalibrated

__all__ = ["recalibrate"]


def recalibrate(
    network: Trained,
    out: Annotated[
        Path | None,
        typer.Option(help="The new file; by default NETWORK with '-recalibrated' in its name."),
    ] = None,
    data: TestData = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    batch_size: Annotated[
        int | None, typer.Option(help="By default that of the training.", min=2)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="At most so many batches; by default all images.", min=1)
    ] = None,
    propagate: Annotated[
        str,
        typer.Option(
            help="batch: while a norm is measured, those before it use each batch's statistics, as "
            "in training. population: they use their final ones, as at inference; a pass each."
        ),
    ] = "batch",
    model: OwnModel = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Take the running statistics of a trained network anew, from all training images.

    They become the exact mean and variance of the images, where training left an average over its
    last batches. The network is tested before and after. The new file is written whole at the end,
    so Ctrl-C leaves nothing behind.
    """
    share_cores()
    keep_blocks()
    target = _target(network, out, overwrite)
    from ..study.checkpoint import save
    from ..study.inference import images_in_batches
    from ..study.train import evaluate

    where = device_named(device)
    trained, card = open_network(network, where, model)
    dataset = test_data(card, data, data_dir, image_size)
    size = batch_size or card.training.arm.batch_size

    def test() -> Score:
        return evaluate(trained, images_in_batches(dataset.test, dataset.white, card.inputs, where))

    images = _training_images(card, dataset, where, size)
    before = test()
    report = _with_a_bar(trained, images, -(-len(dataset.train) // size), steps, propagate)
    after = test()
    save(target, trained, card)
    if as_json:
        found = _as_dict(network, target, dataset, size, (before, after), report)
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(network, target, card, dataset, size, (before, after), report)


def _target(network: Path, out: Path | None, overwrite: bool) -> Path:
    """Where the new file goes; refused before the work, not behind it."""
    stem = network.name.removesuffix(".safetensors")
    target = out or network.parent / f"{stem}-recalibrated.safetensors"
    check_place(target)
    check_free(target, overwrite)
    return target


def _training_images(
    card: Card, dataset: Dataset, where: torch.device, size: int
) -> Callable[[], Batches]:
    """What gives the training images in batches, mixed: one class alone has other statistics."""
    import torch

    from ..study.data.base import Split
    from ..study.inference import images_in_batches

    train = dataset.train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    mixed = Split(train.images[order], train.labels[order])
    return lambda: images_in_batches(mixed, dataset.white, card.inputs, where, size)


class _Told:
    """Batches that a bar follows; each pass begins with the first."""

    def __init__(self, batches: Callable[[], Batches], after: Callable[[], None]) -> None:
        self.batches, self.after = batches, after

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches():
            yield batch
            self.after()


def _with_a_bar(
    trained: torch.nn.Module,
    batches: Callable[[], Batches],
    count: int,
    steps: int | None,
    propagate: Any,
) -> Recalibrated:
    from ..surgery.batch_norms import batch_norms
    from ..surgery.recalibrate import recalibrate as run

    passes = len(batch_norms(trained)[0]) if propagate == "population" else 1
    columns = (
        TextColumn("Measuring"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=min(count, steps or count) * passes)
        loader = _Told(batches, lambda: progress.advance(bar))
        return run(trained, loader, steps=steps, propagate=propagate)


def _as_dict(
    network: Path,
    target: Path,
    dataset: Dataset,
    size: int,
    scores: tuple[Score, Score],
    report: Recalibrated,
) -> dict[str, Any]:
    before, after = scores
    return {
        "network": str(network),
        "out": str(target),
        "data": dataset.name,
        "fingerprint": dataset.fingerprint,
        "batch_size": size,
        "test_images": len(dataset.test),
        "before": before._asdict(),
        "after": after._asdict(),
        **report.to_dict(),
    }


def _show(
    network: Path,
    target: Path,
    card: Card,
    dataset: Dataset,
    size: int,
    scores: tuple[Score, Score],
    report: Recalibrated,
) -> None:
    arm = card.training.arm
    console.print(
        f"{network}: {arm.model}, norms {arm.placement}; {report.batches:,} batches of up to {size}"
        f" of the {len(dataset.train):,} training images of {dataset.name}",
        markup=False,
        soft_wrap=True,
    )
    if dataset.fingerprint != card.data:
        note(f"this is not the data that the network was trained on (fingerprint {card.data})")
    norms = Table(box=None, pad_edge=False)
    norms.add_column("norm", overflow="fold")
    for name in ("values", "mean moved by, in deviations", "variance times"):
        norms.add_column(name, justify="right")
    for change in report.changes:
        cells = ("was not finite", "was not finite")
        if change.mean_moved is not None and change.variance_times is not None:
            least, most = change.variance_times
            cells = (f"up to {change.mean_moved:.2g}", f"{least:.3g} to {most:.3g}")
        norms.add_row(escape(change.norm), f"{change.values:,}", *cells)
    console.print(norms)
    for name, reason in report.left:
        note(f"{name} stays as it is: {reason}")
    table = Table(box=None, pad_edge=False)
    table.add_column(f"on {len(dataset.test):,} test images")
    for name in ("accuracy %", "loss"):
        table.add_column(name, justify="right")
    for name, score in zip(("before", "after"), scores, strict=True):
        table.add_row(name, f"{100 * score.accuracy:.2f}", f"{score.loss:.4f}")
    console.print()
    console.print(table)
    console.print(f"Kept in {escape(str(target))}", soft_wrap=True)
