"""Training one network: batches, optimizer, loop, accuracy. The plainest loop that is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import ConfigError
from ..surgery.graph import NORMS, trace
from ..surgery.introduce import Introduced, introduce
from .arms import Arm, Data
from .data import Dataset
from .inputs import Inputs
from .models import build

__all__ = [
    "Batches",
    "Feeder",
    "Score",
    "evaluate",
    "make_network",
    "make_optimizer",
    "network_for",
    "repeatable",
    "train",
]

Batches = Iterator[tuple[Tensor, Tensor]]
"""Images and their labels, batch by batch."""

_EVAL_BATCH = 500
_EAGER_PIXELS = 2**24


class Score(NamedTuple):
    """Share of right answers and mean cross-entropy (nats)."""

    accuracy: float
    loss: float


class Feeder:
    """A data set on a device, as float batches in [0, 1] or normalized.

    With ``input_norm`` each channel is shifted and scaled by the mean and the deviation of the
    training images.

    Attributes:
        inputs: what turns bytes into the network's numbers.
        train_labels, test_labels: (n,) on the device.
    """

    def __init__(
        self, dataset: Dataset, data: Data, input_norm: bool, device: torch.device
    ) -> None:
        self._white = float(dataset.white)
        limit = data.train_limit or len(dataset.train.labels)
        self.train_labels = dataset.train.labels[:limit].to(device)
        self.test_labels = dataset.test.labels.to(device)
        train, test = dataset.train.images[:limit], dataset.test.images
        self.inputs = Inputs(data.binary)
        if input_norm:
            self.inputs = Inputs.measured(train, self._white, data.binary)
        self._train, self._test = self._store(train, device), self._store(test, device)
        self.inputs = self.inputs.to(device)

    def _store(self, images: Tensor, device: torch.device) -> Tensor:
        if images.numel() <= _EAGER_PIXELS:
            images = self._ready(images)
        return images.to(device)

    def _ready(self, images: Tensor) -> Tensor:
        return self.inputs(images, self._white) if images.dtype == torch.uint8 else images

    def example(self) -> Tensor:
        """A small batch, for its shape."""
        return self._ready(self._train[:2])

    def batches(self, size: int, seed: int, start: int = 0) -> Batches:
        """Endless training batches from step ``start`` on; the order depends on the seed alone.

        Every epoch is a fresh permutation; what does not fill a batch is left out, so no batch is
        smaller than asked.
        """
        count = len(self.train_labels)
        per_epoch = count // size
        if per_epoch == 0:
            raise ConfigError(f"a batch of {size} is more than the {count} training images")
        epoch, within = divmod(start, per_epoch)
        while True:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator).to(self.train_labels.device)
            for at in range(within, per_epoch):
                chosen = order[at * size : (at + 1) * size]
                yield self._ready(self._train[chosen]), self.train_labels[chosen]
            epoch, within = epoch + 1, 0

    def test(self, limit: int | None = None, size: int = _EVAL_BATCH) -> Batches:
        """The test images in their order, in batches of nearly equal sizes.

        Equal, because a last batch of one image has no statistics of its own.
        """
        images, labels = self._test[:limit], self.test_labels[:limit]
        parts = -(-len(labels) // size)
        pairs = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
        for some, answers in pairs:
            yield self._ready(some), answers


def make_network(arm: Arm, feeder: Feeder, classes: int, seed: int) -> fx.GraphModule:
    """The arm's network on the feeder's device, norms in their places, weights from the seed."""
    return network_for(arm, feeder.example(), classes, seed)[0]


def network_for(
    arm: Arm, example: Tensor, classes: int, seed: int
) -> tuple[fx.GraphModule, Introduced | None]:
    """The arm's network for inputs like the example, and what was introduced, if anything was."""
    shape = (example.shape[1], example.shape[2], example.shape[3])
    plain = build(arm.model, shape, classes, arm.activation, seed).to(example.device)
    if not arm.has_norm:
        return trace(plain, example), None
    return introduce(
        plain,
        example,
        arm.placement,
        statistics=arm.statistics,
        dense_statistics=arm.dense_statistics,
        layers=arm.layers,
        every=arm.every,
        affine=arm.affine,
        eps=arm.eps,
        momentum=arm.bn_momentum,
    )


def make_optimizer(network: nn.Module, arm: Arm) -> torch.optim.Optimizer:
    """The arm's optimizer; weight decay spares gamma and beta unless the arm says otherwise.

    Raises:
        ConfigError: no such optimizer, or it does not take the options.
    """
    kind: Any = getattr(torch.optim, arm.optimizer, None)
    usable = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if not usable or arm.optimizer in ("Optimizer", "LBFGS", "SparseAdam"):
        raise ConfigError(
            f"torch.optim has no optimizer '{arm.optimizer}' for this loop; "
            "choose SGD, Adam, AdamW, RMSprop or another one that steps without a closure"
        )
    spared: list[nn.Parameter] = []
    if not arm.decay_norm:
        norms = (m for m in network.modules() if isinstance(m, NORMS))
        spared = [p for norm in norms for p in norm.parameters(recurse=False)]
    ids = {id(p) for p in spared}
    others = [p for p in network.parameters() if id(p) not in ids]
    groups = [
        {"params": others, "weight_decay": arm.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    given = [group for group in groups if group["params"]]
    try:
        optimizer: torch.optim.Optimizer = kind(given, lr=arm.learning_rate, **arm.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"torch.optim.{arm.optimizer} refused: {error}") from error
    return optimizer


@contextmanager
def repeatable() -> Iterator[None]:
    """Asks cuDNN for the algorithms that add in a fixed order; its other settings stay.

    Past ``torch.backends.cudnn``, whose attributes cannot be set once anything has imported torch's
    test internals, and whose ``flags`` sets all the others too.
    """
    before = torch._C._get_cudnn_benchmark(), torch._C._get_cudnn_deterministic()
    try:
        torch._C._set_cudnn_benchmark(False)
        torch._C._set_cudnn_deterministic(True)
        yield
    finally:
        torch._C._set_cudnn_benchmark(before[0])
        torch._C._set_cudnn_deterministic(before[1])


@repeatable()
def train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    steps: range,
    after: Callable[[int, float], None],
) -> int:
    """Trains for the given steps and returns the last step done.

    ``after(step, loss)`` is called behind every step, counted from 1. A loss that is not finite
    ends the training there: the network has diverged.
    """
    network.train()
    for step in steps:
        x, labels = next(batches)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(network(x), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        value = loss.item()
        after(step + 1, value)
        if not math.isfinite(value):
            return step + 1
    return steps.stop


@repeatable()
@torch.no_grad()
def evaluate(network: nn.Module, batches: Batches) -> Score:
    """Accuracy and loss in the mode that the network is in."""
    right, loss, count = 0, 0.0, 0
    for x, labels in batches:
        logits = network(x)
        right += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    return Score(right / count, loss / count)
