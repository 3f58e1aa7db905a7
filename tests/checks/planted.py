"""One planted mistake for every rule, and the same network without it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from evenkeel.nn import PerActivationBatchNorm


@dataclass
class Plant:
    """What is checked, and what must be found in it."""

    model: nn.Module
    path: str
    evidence: float
    severity: str
    given: dict[str, Any] = field(default_factory=dict)


def images(n: int = 32, size: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator) * 2 + 1


class Net(nn.Module):
    """Two convolutions with norms and a dense layer, and room for mistakes."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def body(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def seen(model: nn.Module, x: Tensor | None = None, times: int = 60) -> nn.Module:
    """The network with running statistics of data like `images`."""
    was = model.training
    model.train()
    with torch.no_grad():
        for seed in range(times):
            model(images(seed=seed) if x is None else x)
    return model.train(was)


def net(bias: bool = False, *, kind: type[Net] = Net) -> Any:
    torch.manual_seed(0)
    return seen(kind(bias))


def bias_before_norm(bad: bool) -> Plant:
    return Plant(net(bias=bad), "conv1", 8, "note", {"example": images()})


def norm_on_logits(bad: bool) -> Plant:
    class Logits(Net):
        def __init__(self, bias: bool) -> None:
            super().__init__(bias)
            self.last = nn.BatchNorm1d(5) if bad else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(super().forward(x)).log_softmax(1)

    return Plant(net(kind=Logits), "last", 5, "warning", {"example": images()})


def norm_after_norm(bad: bool) -> Plant:
    class Twice(Net):
        def __init__(self, bias: bool) -> None:
            super().__init__(bias)
            self.again = nn.BatchNorm2d(8)

        def body(self, x: Tensor) -> Tensor:
            y = self.bn1(self.conv1(x))
            return F.relu(self.bn2(self.conv2(self.again(y if bad else F.relu(y)))))

    return Plant(net(kind=Twice), "again", 8, "warning", {"example": images()})


def dropout_before_norm(bad: bool) -> Plant:
    """Half of what comes is dropped: of values of mean m and variance v, 2v + m^2 in place of v."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.bn, self.fc = nn.Dropout(0.5), nn.BatchNorm2d(3), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.drop(x)) if bad else self.drop(self.bn(x))
            return self.fc(y.mean((2, 3)))

    torch.manual_seed(0)
    x = images(256)
    mean, square, var = x.mean((0, 2, 3)), x.square().mean((0, 2, 3)), x.var((0, 2, 3))
    ratio = float(((2 * square - mean.square()) / var).median())
    return Plant(seen(Dropped()), "bn", ratio, "warning", {"example": x})


def reused(bad: bool) -> Plant:
    class Reused(Net):
        def __init__(self, bias: bool) -> None:
            super().__init__(bias)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 5)

        def body(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            return F.relu((self.bn1 if bad else self.bn2)(self.conv2(x)))

    return Plant(net(kind=Reused), "bn1", 2, "warning", {"example": images()})


def fixed_size(bad: bool) -> Plant:
    model = net()
    if bad:
        model.bn1 = PerActivationBatchNorm((8, 6, 6))
        seen(model)
    return Plant(model, "bn1", 36, "note", {"example": images()})


def never_called(bad: bool) -> Plant:
    model = net()
    if bad:
        model.spare = nn.BatchNorm2d(7)
    return Plant(model, "spare", 7, "note", {"example": images()})


def skipped_at_inference(bad: bool) -> Plant:
    class Skips(Net):
        def body(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            if self.training or not bad:
                x = self.bn1(x)
            return F.relu(self.bn2(self.conv2(F.relu(x))))

    return Plant(net(kind=Skips), "bn1", 1, "error", {"example": images()})


def batch_statistics_at_inference(bad: bool) -> Plant:
    model = net()
    if bad:
        model.bn2 = nn.BatchNorm2d(6, track_running_stats=False)
    return Plant(model.eval(), "bn2", 32, "warning", {"example": images()})


def eval_in_training(bad: bool) -> Plant:
    model = net()
    model.bn2.train(not bad)
    return Plant(model, "bn2", 60, "warning")


def training_in_eval(bad: bool) -> Plant:
    model = net().eval()
    model.bn2.train(bad)
    return Plant(model, "bn2", 0.1, "error")


def frozen_but_moving(bad: bool) -> Plant:
    model = net()
    model.bn1.requires_grad_(not bad)
    return Plant(model, "bn1", 0.1, "warning")


def never_updated(bad: bool) -> Plant:
    model = net()
    nn.init.normal_(model.bn1.bias)
    if bad:
        model.bn1.reset_running_stats()
    return Plant(model, "bn1", 0, "error")


def not_finite(bad: bool) -> Plant:
    model = net()
    if bad:
        model.bn1.running_var[2:4] = torch.tensor([torch.nan, torch.inf])
    return Plant(model, "bn1", 2, "error")


def negative_variance(bad: bool) -> Plant:
    model = net()
    model.bn1.running_var[3] = -0.25 if bad else 0.25
    return Plant(model, "bn1", -0.25, "error")


def tiny_variance(bad: bool) -> Plant:
    model = net()
    if bad:
        model.bn1.running_var[:5] = 1e-14
    return Plant(model, "bn1", 1e-14, "warning")


def half_precision(bad: bool) -> Plant:
    model = net()
    if bad:
        model.bn1.half()
    return Plant(model, "bn1", 2**-10, "warning")


def mismatch(bad: bool) -> Plant:
    """Statistics of twice the data: deviation 2, mean off by one deviation of those kept."""
    model = net().eval()
    x = images(512)
    with torch.no_grad():
        y = model.conv1(x)
    model.bn1.running_mean.copy_(y.mean((0, 2, 3)))
    model.bn1.running_var.copy_(y.var((0, 2, 3)))
    if bad:
        model.bn1.running_mean -= 2 * model.bn1.running_var.sqrt()
        model.bn1.running_var *= 4
    return Plant(model, "bn1", 1.25**0.5, "warning", {"data": x.split(64)})


def eval_gap(bad: bool) -> Plant:
    plant = mismatch(bad)
    plant.model = nn.Sequential(plant.model.conv1, plant.model.bn1).eval()
    return Plant(plant.model, "1", 1.25**0.5, "error", plant.given)


def stale_average(bad: bool) -> Plant:
    """Averaged from a network whose first convolution then grew threefold."""
    start = net().eval()
    average = AveragedModel(start)
    moved = copy.deepcopy(start)
    with torch.no_grad():
        moved.conv1.weight.mul_(3)
    average.update_parameters(moved)
    with torch.no_grad():
        for name, value in average.module.named_parameters():
            value.copy_(moved.get_parameter(name))
    if not bad:
        seen(average)
    return Plant(average.eval(), "module.bn1", 0, "error", {"data": images(256).split(64)})


def lost_statistics(bad: bool) -> Plant:
    model = net()
    state = dict(model.named_parameters()) if bad else model.state_dict()
    return Plant(model, "bn2", 2, "error", {"checkpoint": state})


def counted_twice(bad: bool) -> Plant:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(self.body, x, use_reentrant=False) if bad else self.body(x)
            return self.fc(y.mean((2, 3)))

    return Plant(net(kind=Checkpointed), "bn1", 2, "warning", {"example": images()})


def dead_gamma(bad: bool) -> Plant:
    model = net()
    if bad:
        with torch.no_grad():
            model.bn1.weight[:5] = 0
    return Plant(model, "bn1", 5, "warning")


def huge_gamma(bad: bool) -> Plant:
    model = net()
    with torch.no_grad():
        model.bn1.weight[1] = -250 if bad else -25
    return Plant(model, "bn1", 250, "warning")


def momentum_of_other_convention(bad: bool) -> Plant:
    model = net()
    model.bn2.momentum = 0.99 if bad else 0.01
    return Plant(model, "bn2", 0.99, "warning")


def eps_outlier(bad: bool) -> Plant:
    model = net()
    model.bn2.eps = 0.1 if bad else 1e-5
    return Plant(model, "bn2", 0.1, "warning")


def eps_zero(bad: bool) -> Plant:
    model = net().half()
    model.bn2.running_var[0] = 0.5
    model.bn2.eps = 0.0 if bad else 1e-5
    least = float(model.bn2.running_var.min())
    return Plant(model, "bn2", least, "error")


def weight_decay(bad: bool) -> Plant:
    model = net()
    norms = [*model.bn1.parameters(), *model.bn2.parameters()]
    others = [p for p in model.parameters() if all(p is not n for n in norms)]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.02 if bad else 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=5e-4)
    return Plant(model, "bn1", 0.02, "warning", {"optimizer": optimizer})


def left_out_of_optimizer(bad: bool) -> Plant:
    model = net()
    held = [p for n, p in model.named_parameters() if not (bad and n.startswith("bn2"))]
    return Plant(model, "bn2", 2, "warning", {"optimizer": torch.optim.SGD(held, lr=0.1)})


def one_value(bad: bool) -> Plant:
    """Images of 5 pixels leave one place behind the second convolution."""
    x = images(33, size=5)
    dataset = torch.utils.data.TensorDataset(x)
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, drop_last=not bad)
    return Plant(seen(net(), x), "bn2", 1, "error", {"data": loader})


def two_values(bad: bool) -> Plant:
    x = images(34, size=5)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x), batch_size=8, drop_last=not bad
    )
    return Plant(seen(net(), x), "bn2", 2, "warning", {"data": loader})


def small_batch(bad: bool) -> Plant:
    return Plant(net(), "", 4, "warning", {"data": images(32).split(4 if bad else 16)})


def sync_on_cpu(bad: bool) -> Plant:
    model = net()
    if bad:
        model.bn1 = nn.SyncBatchNorm(8)
        seen(model)
    severity = "note" if torch.cuda.is_available() else "warning"
    return Plant(model, "bn1", 8, severity)


PLANTED: dict[str, Callable[[bool], Plant]] = {
    "EK101": bias_before_norm,
    "EK102": norm_on_logits,
    "EK103": norm_after_norm,
    "EK104": dropout_before_norm,
    "EK105": reused,
    "EK106": fixed_size,
    "EK107": never_called,
    "EK108": skipped_at_inference,
    "EK109": batch_statistics_at_inference,
    "EK201": eval_in_training,
    "EK202": training_in_eval,
    "EK203": frozen_but_moving,
    "EK301": never_updated,
    "EK302": not_finite,
    "EK303": negative_variance,
    "EK304": tiny_variance,
    "EK305": half_precision,
    "EK306": mismatch,
    "EK307": eval_gap,
    "EK308": stale_average,
    "EK309": lost_statistics,
    "EK310": counted_twice,
    "EK401": dead_gamma,
    "EK402": huge_gamma,
    "EK403": momentum_of_other_convention,
    "EK404": eps_outlier,
    "EK405": eps_zero,
    "EK406": weight_decay,
    "EK407": left_out_of_optimizer,
    "EK501": one_value,
    "EK502": two_values,
    "EK503": small_batch,
    "EK504": sync_on_cpu,
}
