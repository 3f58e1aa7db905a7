"""The four ways of running a trained network's norms, side by side on test images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import EvenkeelError
from ..surgery.fold import FoldReport, fold, skip_norms
from ..surgery.graph import NORMS
from .data import Split
from .inputs import Inputs
from .train import Batches

__all__ = ["WAYS", "Result", "by_batch", "compare", "has_norms", "images_in_batches"]

WAYS: Final = {
    "running": "running statistics, as a batch norm is meant to be used",
    "batch": "statistics of each test batch",
    "skipped": "norms left out, which is a mistake",
    "folded": "norms merged into the layers before them",
}
_BATCH: Final = 500


@dataclass(frozen=True)
class Result:
    """How a network does on test images.

    Attributes:
        accuracy: share of right answers.
        loss: mean cross-entropy in nats.
        per_class: the accuracy among the images of each class, None where there are none.
        difference, scale: the largest difference of a logit to the network with running
            statistics, and the largest of that network's logits.
        fold: for 'folded': what was folded and what was left.
    """

    accuracy: float
    loss: float
    per_class: Mapping[str, float | None]
    difference: float
    scale: float
    fold: FoldReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values."""
        return asdict(self)


def has_norms(network: nn.Module) -> bool:
    """True if there is anything to skip or fold."""
    return any(isinstance(module, NORMS) for module in network.modules())


def by_batch(network: nn.Module) -> nn.Module:
    """A copy in inference mode whose norms use the statistics of the batch that they get."""
    own = copy.deepcopy(network).eval()
    for module in own.modules():
        if isinstance(module, NORMS):
            module.train()
    return own


def images_in_batches(
    split: Split, white: float, inputs: Inputs, device: torch.device, most: int = _BATCH
) -> Batches:
    """The images in their order, in batches of nearly equal sizes.

    Equal, because a last batch of one image has no statistics of its own.
    """
    inputs = inputs.to(device)
    count = -(-len(split) // most)
    images, labels = split.images.tensor_split(count), split.labels.tensor_split(count)
    for some, answers in zip(images, labels, strict=True):
        yield inputs(some.to(device), white), answers.to(device)


def compare(
    network: nn.Module,
    batches: Callable[[], Batches],
    classes: tuple[str, ...],
    ways: tuple[str, ...] = tuple(WAYS),
) -> Iterator[tuple[str, Result | EvenkeelError]]:
    """Each way with its result, as it is found, or with the reason why there is none.

    Args:
        network: in inference mode.
        batches: gives the test images, from the first one each time.
        classes: names of the outputs.
        ways: keys of `WAYS`.
    """
    plain, labels = _logits(network, batches())
    for way in ways:
        report: FoldReport | None = None
        try:
            if way == "running":
                logits = plain
            elif way == "batch":
                logits, _ = _logits(by_batch(network), batches())
            elif way == "skipped":
                logits, _ = _logits(skip_norms(network), batches())
            else:
                folded, report = fold(network, next(batches())[0])
                logits, _ = _logits(folded, batches())
        except EvenkeelError as error:
            yield way, error
            continue
        yield way, _result(logits, plain, labels, classes, report)


@torch.no_grad()
def _logits(network: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """The outputs for all images, and the labels, on the CPU."""
    pairs = [(network(x).cpu(), labels.cpu()) for x, labels in batches]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def _result(
    logits: Tensor,
    plain: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    report: FoldReport | None,
) -> Result:
    right = logits.argmax(1) == labels
    count = torch.bincount(labels, minlength=len(classes)).tolist()
    hits = torch.bincount(labels[right], minlength=len(classes)).tolist()
    per_class = {
        name: hit / n if n else None for name, hit, n in zip(classes, hits, count, strict=True)
    }
    return Result(
        accuracy=sum(hits) / len(labels),
        loss=float(F.cross_entropy(logits.double(), labels)),
        per_class=per_class,
        difference=float((logits - plain).abs().max()),
        scale=float(plain.abs().max()),
        fold=report,
    )
