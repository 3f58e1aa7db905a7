"""Networks whose inference is timed: those of `nets`, and six more that norms stand in otherwise.

Pre-activation ResNet, Inception, ResNet with squeeze and excitation, ShuffleNet, U-Net and the
generator of DCGAN, as their papers or torchvision write them. `build` hands a network out as after
training: every norm has a scale, a shift and the statistics of data, for a fold of fresh norms,
which change nothing but for epsilon, would be right whatever it did. For images under 64 pixels the
first reductions of the image are left out, as in `nets`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ConfigError, meant
from ..surgery.recalibrate import recalibrate
from . import nets

__all__ = ["ARCHITECTURES", "build", "example"]

CLASSES = 10
LATENT = 100
"""What the generator makes an image of."""
BEHIND_THE_STATISTICS = 8
"""Images."""

Rows = tuple[tuple[int, ...], ...]


def _scaled(channels: int, width: float) -> int:
    """A multiple of 8."""
    return max(8, round(channels * width / 8) * 8)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def _unit(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, act: bool = True
) -> nn.Sequential:
    """Convolution, norm, ReLU."""
    parts = [_conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*parts, nn.ReLU(inplace=True)) if act else nn.Sequential(*parts)


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


class _PreActivation(nn.Module):
    """He et al. 2016, "Identity mappings in deep residual networks": the sum is never touched."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 3)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active: Tensor = self.relu(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(self.relu(self.bn2(self.conv1(active))))
        return out + identity


class _Squeezed(nn.Module):
    """A basic block whose channels are weighed before the sum (Hu et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            _unit(inputs, outputs, 3, stride), _unit(outputs, outputs, 3, act=False)
        )
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(outputs, max(1, outputs // 16), 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(max(1, outputs // 16), outputs, 1),
            nn.Sigmoid(),
        )
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = _unit(inputs, outputs, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return self.relu(out * self.excite(out) + self.shortcut(x))  # type: ignore[no-any-return]


def _residual(
    block: Callable[[int, int, int], nn.Module], size: int, width: float
) -> tuple[list[nn.Module], int]:
    """Eight blocks in four stages without what is before and behind them, and their channels."""
    layers: list[nn.Module] = []
    inputs = _scaled(64, width)
    for stage, channels in enumerate((64, 128, 256, 512)):
        outputs = _scaled(channels, width)
        for number in range(2):
            layers.append(block(inputs, outputs, 2 if stage and not number else 1))
            inputs = outputs
    return layers, inputs


def preact(size: int, width: float) -> nn.Module:
    """ResNet-18 with norm and ReLU before each convolution."""
    layers, channels = _residual(_PreActivation, size, width)
    first = _scaled(64, width)
    if size < 64:
        stem: list[nn.Module] = [_conv(3, first, 3)]
    else:
        stem = [_conv(3, first, 7, 2), nn.MaxPool2d(3, 2, 1)]
    last = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *layers, *last, *_head(channels))


def seresnet(size: int, width: float) -> nn.Module:
    """SE-ResNet-18."""
    layers, channels = _residual(_Squeezed, size, width)
    return nn.Sequential(*_stem(size, _scaled(64, width)), *layers, *_head(channels))


def _stem(size: int, outputs: int) -> list[nn.Module]:
    if size < 64:
        return [_unit(3, outputs, 3)]
    return [_unit(3, outputs, 7, 2), nn.MaxPool2d(3, 2, 1)]


class _Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(self, inputs: int, row: tuple[int, ...]) -> None:
        super().__init__()
        one, squeezed3, three, squeezed5, five, pooled = row
        self.branch1 = _unit(inputs, one, 1)
        self.branch3 = nn.Sequential(_unit(inputs, squeezed3, 1), _unit(squeezed3, three, 3))
        self.branch5 = nn.Sequential(_unit(inputs, squeezed5, 1), _unit(squeezed5, five, 5))
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), _unit(inputs, pooled, 1))
        self.outputs = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)]
        return torch.cat(branches, 1)


def inception(size: int, width: float) -> nn.Module:
    """GoogLeNet's nine modules (Szegedy et al. 2015) with norms."""
    stages: tuple[Rows, ...] = (
        ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
        ((192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64),
         (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128)),
        ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
    )  # fmt: skip
    first, inputs = _scaled(64, width), _scaled(192, width)
    layers = [*_stem(size, first), _unit(first, first, 1), _unit(first, inputs, 3)]
    for rows in stages:
        layers.append(nn.MaxPool2d(3, 2, 1))
        for row in rows:
            mixed = _Mixed(inputs, tuple(_scaled(channels, width) for channels in row))
            layers.append(mixed)
            inputs = mixed.outputs
    return nn.Sequential(*layers, *_head(inputs))


def _shuffled(x: Tensor) -> Tensor:
    """The channels of the two halves in turn."""
    batch, channels, height, width = x.shape
    halves = x.view(batch, 2, channels // 2, height, width)
    return halves.transpose(1, 2).reshape(batch, channels, height, width)


class _Shuffle(nn.Module):
    """Half of the channels goes past; where the image is halved both halves are of all of it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.first: nn.Module | None = None
        if stride != 1:
            self.first = nn.Sequential(
                _unit(inputs, inputs, 3, stride, inputs, act=False), _unit(inputs, half, 1)
            )
        self.second = nn.Sequential(
            _unit(half if self.first is None else inputs, half, 1),
            _unit(half, half, 3, stride, half, act=False),
            _unit(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            passed, taken = x.chunk(2, 1)
            return _shuffled(torch.cat([passed, self.second(taken)], 1))
        return _shuffled(torch.cat([self.first(x), self.second(x)], 1))


def shufflenet(size: int, width: float) -> nn.Module:
    """ShuffleNet V2 x1.0's sixteen blocks (Ma et al. 2018), its channels rounded to sixteens."""
    inputs = 24
    layers = _stem(size, inputs)
    for channels, count in ((116, 4), (232, 8), (464, 4)):
        outputs = 2 * _scaled(channels // 2, width)
        for number in range(count):
            layers.append(_Shuffle(inputs, outputs, 1 if number else 2))
            inputs = outputs
    last = _scaled(1024, width)
    return nn.Sequential(*layers, _unit(inputs, last, 1), *_head(last))


class _UNet(nn.Module):
    """Four halvings of the image and back, each level with what its own size had on the way."""

    def __init__(self, width: float) -> None:
        super().__init__()
        channels = [_scaled(c, width) for c in (32, 64, 128, 256, 512)]
        self.down = nn.ModuleList()
        inputs = 3
        for outputs in channels:
            self.down.append(_twice(inputs, outputs))
            inputs = outputs
        self.up, self.joined = nn.ModuleList(), nn.ModuleList()
        for outputs in channels[-2::-1]:
            self.up.append(nn.ConvTranspose2d(inputs, outputs, 2, 2))
            self.joined.append(_twice(2 * outputs, outputs))
            inputs = outputs
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(inputs, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        passed = []
        for level in self.down[:-1]:
            x = level(x)
            passed.append(x)
            x = self.pool(x)
        x = self.down[-1](x)
        for up, joined in zip(self.up, self.joined, strict=True):
            x = joined(torch.cat([passed.pop(), up(x)], 1))
        return self.last(x)  # type: ignore[no-any-return]


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_unit(inputs, outputs, 3), _unit(outputs, outputs, 3))


def unet(size: int, width: float) -> nn.Module:
    """U-Net (Ronneberger et al. 2015) with padded convolutions and norms, from 32 channels on."""
    return _UNet(width)


def dcgan(size: int, width: float) -> nn.Module:
    """DCGAN's generator (Radford et al. 2016): five transposed convolutions."""
    inputs = _scaled(512, width)
    layers: list[nn.Module] = [nn.ConvTranspose2d(LATENT, inputs, size // 16, bias=False)]
    for channels in (256, 128, 64):
        outputs = _scaled(channels, width)
        layers += [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)]
        layers.append(nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False))
        inputs = outputs
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(inputs, 3, 4, 2, 1, bias=False), nn.Tanh())


_OWN: dict[str, Callable[[int, float], nn.Module]] = {
    "preact": preact,
    "inception": inception,
    "seresnet": seresnet,
    "shufflenet": shufflenet,
    "unet": unet,
    "dcgan": dcgan,
}
ARCHITECTURES = (*nets.NETS, *_OWN)


def example(name: str, batch: int, size: int, seed: int = 0) -> Tensor:
    """Random images of 3 x size x size, or what the generator makes such images of."""
    shape = (LATENT, 1, 1) if name == "dcgan" else (3, size, size)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def build(name: str, *, size: int = 32, width: float = 1.0) -> nn.Module:
    """A network as after training, in eval mode; the same weights every time.

    Args:
        name: one of `ARCHITECTURES`.
        size: of the images, 32 or 96 say: a multiple of 16.
        width: what all channels are multiplied by, rounded to multiples of 8.

    Raises:
        ConfigError: no such network.
    """
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"unknown network '{name}'{meant(name, ARCHITECTURES)}; choose one of "
            f"{', '.join(ARCHITECTURES)}, or all"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in _OWN:
            model = _OWN[name](size, width)
        else:
            model = nets.build(name, size=size, width=width, classes=CLASSES)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, std=0.1)
    recalibrate(model, [example(name, BEHIND_THE_STATISTICS, size, seed=1)])
    return model.eval()
