"""``evenkeel evaluate``: how a trained network does on test images, in each way of inference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..allocator import keep_blocks
from ..errors import ConfigError, EvenkeelError
from .console import console, device_named
from .network import note, open_network, share_cores, test_data
from .options import AsJson, DataDir, Device, ImageSize, OwnModel, TestData, Trained

if TYPE_CHECKING:
    from ..study.checkpoint import Card
    from ..study.data import Dataset
    from ..study.inference import Result
    from ..study.train import Batches

__all__ = ["evaluate"]


def evaluate(
    network: Trained,
    data: TestData = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    inference: Annotated[
        str,
        typer.Option(
            help="running: running statistics, as it should be. batch: those of the test batch. "
            "skipped: norms left out. folded: norms merged into the layers before. all: side by "
            "side."
        ),
    ] = "running",
    model: OwnModel = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Test a trained network: accuracy, loss, accuracy of each class.

    --inference all shows that skipping batch norm breaks a network and that folding does not.
    """
    share_cores()
    keep_blocks()
    from ..study.inference import WAYS, compare, has_norms, images_in_batches

    if inference not in (*WAYS, "all"):
        raise ConfigError(f"unknown --inference '{inference}'; choose {', '.join(WAYS)} or all")
    where = device_named(device)
    trained, card = open_network(network, where, model)
    ways = tuple(WAYS) if inference == "all" else (inference,)
    if not has_norms(trained) and ways != ("running",):
        raise ConfigError(
            f"{network} has no norms, so there is nothing to skip or to fold; leave out --inference"
        )
    with nullcontext() if as_json else console.status("Testing"):
        dataset = test_data(card, data, data_dir, image_size)

        def batches() -> Batches:
            return images_in_batches(dataset.test, dataset.white, card.inputs, where)

        results = dict(compare(trained, batches, card.classes, ways))
    only = next(iter(results.values()))
    if len(results) == 1 and isinstance(only, EvenkeelError):
        raise only
    if as_json:
        typer.echo(json.dumps(_as_dict(network, card, dataset, results), indent=1))
    else:
        _show(network, card, dataset, results)


def _as_dict(
    path: Path, card: Card, dataset: Dataset, results: Mapping[str, Result | EvenkeelError]
) -> dict[str, Any]:
    return {
        "network": str(path),
        "model": card.training.arm.model,
        "data": dataset.name,
        "fingerprint": dataset.fingerprint,
        "trained_on": card.data,
        "images": len(dataset.test),
        "inference": {
            way: {"error": str(result)} if isinstance(result, EvenkeelError) else result.to_dict()
            for way, result in results.items()
        },
    }


def _show(
    path: Path, card: Card, dataset: Dataset, results: Mapping[str, Result | EvenkeelError]
) -> None:
    arm = card.training.arm
    console.print(
        f"{path}: {arm.model}, norms {arm.placement}, on {len(dataset.test):,} test images of "
        f"{dataset.name}",
        markup=False,
        soft_wrap=True,
    )
    if dataset.fingerprint != card.data:
        note(f"this is not the data that the network was trained on (fingerprint {card.data})")
    table = Table(box=None, pad_edge=False)
    table.add_column("inference")
    for name in ("accuracy %", "loss", "largest logit difference"):
        table.add_column(name, justify="right")
    for way, result in results.items():
        table.add_row(way, *_cells(way, result))
    console.print(table)
    for result in results.values():
        if isinstance(result, EvenkeelError):
            note(str(result))
        elif result.fold is not None:
            for norm, reason in result.fold.left:
                note(f"{norm} is not folded: {reason}")
    first = next(r for r in results.values() if not isinstance(r, EvenkeelError))
    classes = Table(box=None, pad_edge=False)
    classes.add_column("class", overflow="fold")
    classes.add_column("accuracy %", justify="right")
    for name, accuracy in first.per_class.items():
        classes.add_row(escape(name), "no images" if accuracy is None else f"{100 * accuracy:.2f}")
    console.print()
    console.print(classes)


def _cells(way: str, result: Result | EvenkeelError) -> tuple[str, ...]:
    if isinstance(result, EvenkeelError):
        return ("-", "-", "-")
    difference = "-" if way == "running" else f"{result.difference:.1e} of {result.scale:.1f}"
    return f"{100 * result.accuracy:.2f}", f"{result.loss:.4f}", difference
