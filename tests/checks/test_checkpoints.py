"""Checkpointed segments: which norms they count twice, by torch's own count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evenkeel import check

from .planted import Net, images, net


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_that_counts_once_is_no_finding(use_reentrant):
    """Only a backward pass shows: the last norm of a segment need not be computed again."""

    class Part(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(self.conv1, x, use_reentrant=use_reentrant)
            return self.fc(F.relu(self.bn1(y)).mean((2, 3)))

        def __init__(self, bias: bool = False) -> None:
            super().__init__(bias)
            self.fc = nn.Linear(8, 5)

    assert not check(net(kind=Part), images()).of("EK310")

    class Whole(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(self.body, x, use_reentrant=use_reentrant)
            return self.fc(y.mean((2, 3)))

    model = net(kind=Whole)
    twice = {f.path: f.evidence for f in check(model, images()).of("EK310")}
    x = images().requires_grad_()
    counts = {n: getattr(model, n).num_batches_tracked.item() for n in ("bn1", "bn2")}
    model(x).sum().backward()
    true = {n: getattr(model, n).num_batches_tracked.item() - c for n, c in counts.items()}
    assert twice == {n: c for n, c in true.items() if c > 1}


@contextmanager
def paused(norm: nn.Module) -> Iterator[None]:
    momentum, norm.momentum = norm.momentum, 0.0
    yield
    norm.momentum = momentum


def test_a_segment_that_pauses_its_norms_when_it_runs_again_is_right():
    class Pauses(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(
                self.body,
                x,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), paused(self.bn1)),
            )
            return self.fc(y.mean((2, 3)))

    assert [f.path for f in check(net(kind=Pauses), images()).of("EK310")] == ["bn2"]


def test_checkpoints_that_ask_for_gradients_are_seen():
    """As in torchvision's DenseNet, which checkpoints only where there is something to gain."""

    class Asks(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            if x.requires_grad:
                x = checkpoint(self.bn1, x, use_reentrant=False)
            return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))

    assert [f.path for f in check(net(kind=Asks), images()).of("EK310")] == ["bn1"]
