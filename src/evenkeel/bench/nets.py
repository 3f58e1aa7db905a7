"""Networks whose training steps are timed: five families, small enough for a CPU; one for a GPU.

Written as torchvision writes them, with the batch norms in place. ``norm=False`` builds the same
network without: then convolutions have a bias. For images under 64 pixels the first reductions of
the image are left out, as is usual for CIFAR.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ConfigError, meant

__all__ = ["LARGE", "NETS", "build"]

Act = Callable[[], nn.Module]


def _relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def _relu6() -> nn.Module:
    return nn.ReLU6(inplace=True)


def _silu() -> nn.Module:
    return nn.SiLU(inplace=True)


def _scaled(channels: int, width: float) -> int:
    """A multiple of 8."""
    return max(8, round(channels * width / 8) * 8)


def _norm(channels: int, norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm else nn.Identity()


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int, norm: bool, groups: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=not norm)


def _unit(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    *,
    norm: bool,
    act: Act | None = _relu,
) -> nn.Sequential:
    """Convolution, norm, activation."""
    parts = [_conv(inputs, outputs, kernel, stride, norm, groups), _norm(outputs, norm)]
    return nn.Sequential(*parts) if act is None else nn.Sequential(*parts, act())


def _head(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def vgg(size: int, width: float, classes: int, norm: bool) -> nn.Module:
    """Eight 3x3 convolutions in four stages, a pooling behind each."""
    layers: list[nn.Module] = []
    inputs = 3
    for channels in (64, 128, 256, 512):
        outputs = _scaled(channels, width)
        layers += [_unit(inputs, outputs, norm=norm), _unit(outputs, outputs, norm=norm)]
        layers.append(nn.MaxPool2d(2))
        inputs = outputs
    return nn.Sequential(*layers, *_head(inputs, classes))


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride, norm)
        self.bn1 = _norm(outputs, norm)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(outputs, outputs, 3, 1, norm)
        self.bn2 = _norm(outputs, norm)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = _unit(inputs, outputs, 1, stride, norm=norm, act=None)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class _Bottleneck(nn.Module):
    """Narrow, convolve, widen; torchvision's, with its stride in the 3x3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int, norm: bool) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = _conv(inputs, width, 1, 1, norm)
        self.bn1 = _norm(width, norm)
        self.conv2 = _conv(width, width, 3, stride, norm)
        self.bn2 = _norm(width, norm)
        self.conv3 = _conv(width, outputs, 1, 1, norm)
        self.bn3 = _norm(outputs, norm)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = _unit(inputs, outputs, 1, stride, norm=norm, act=None)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


def _stem(size: int, outputs: int, norm: bool) -> list[nn.Module]:
    if size < 64:
        return [_unit(3, outputs, norm=norm)]
    return [_unit(3, outputs, 7, 2, norm=norm), nn.MaxPool2d(3, 2, 1)]


def resnet18(size: int, width: float, classes: int, norm: bool) -> nn.Module:
    """Eight basic blocks in four stages."""
    inputs = _scaled(64, width)
    layers = _stem(size, inputs, norm)
    for stage, channels in enumerate((64, 128, 256, 512)):
        outputs = _scaled(channels, width)
        for block in range(2):
            stride = 2 if stage and not block else 1
            layers.append(_BasicBlock(inputs, outputs, stride, norm))
            inputs = outputs
    return nn.Sequential(*layers, *_head(inputs, classes))


def resnet50(size: int, width: float, classes: int, norm: bool) -> nn.Module:
    """Sixteen bottleneck blocks in four stages."""
    inputs = _scaled(64, width)
    layers = _stem(size, inputs, norm)
    for stage, (channels, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        narrow = _scaled(channels, width)
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(_Bottleneck(inputs, narrow, stride, norm))
            inputs = 4 * narrow
    return nn.Sequential(*layers, *_head(inputs, classes))


class _InvertedResidual(nn.Module):
    """Expand, depthwise, project; with ``squeeze`` the channels are weighed in between."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int,
        expand: int,
        *,
        norm: bool,
        act: Act,
        squeeze: bool,
    ) -> None:
        super().__init__()
        self.use_shortcut = stride == 1 and inputs == outputs
        hidden = inputs * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers.append(_unit(inputs, hidden, 1, norm=norm, act=act))
        layers.append(_unit(hidden, hidden, kernel, stride, hidden, norm=norm, act=act))
        if squeeze:
            layers.append(_SqueezeExcitation(hidden, max(1, inputs // 4)))
        layers.append(_unit(hidden, outputs, 1, norm=norm, act=None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return x + out if self.use_shortcut else out


class _SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = nn.SiLU(inplace=True)
        self.scale = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.scale(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        return scale * x


def _inverted(
    rows: tuple[tuple[int, int, int, int, int], ...],
    last: int,
    size: int,
    width: float,
    classes: int,
    *,
    norm: bool,
    act: Act,
    squeeze: bool,
) -> nn.Module:
    """A chain of inverted residuals; a row is expansion, kernel, channels, blocks, stride."""
    inputs = _scaled(32, width)
    layers: list[nn.Module] = [_unit(3, inputs, 3, 1 if size < 64 else 2, norm=norm, act=act)]
    for number, (expand, kernel, channels, blocks, first) in enumerate(rows):
        outputs = _scaled(channels, width)
        for block in range(blocks):
            stride = 1 if block or (size < 64 and number < 2) else first
            layers.append(
                _InvertedResidual(
                    inputs, outputs, kernel, stride, expand, norm=norm, act=act, squeeze=squeeze
                )
            )
            inputs = outputs
    layers.append(_unit(inputs, _scaled(last, width), 1, norm=norm, act=act))
    return nn.Sequential(*layers, *_head(_scaled(last, width), classes))


def mobilenetv2(size: int, width: float, classes: int, norm: bool) -> nn.Module:
    """MobileNetV2's seventeen inverted residuals, with ReLU6."""
    rows = (
        (1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 3, 32, 3, 2), (6, 3, 64, 4, 2), (6, 3, 96, 3, 1),
        (6, 3, 160, 3, 2), (6, 3, 320, 1, 1),
    )  # fmt: skip
    return _inverted(rows, 1280, size, width, classes, norm=norm, act=_relu6, squeeze=False)


def efficientnet(size: int, width: float, classes: int, norm: bool) -> nn.Module:
    """EfficientNet-B0's sixteen blocks with SiLU, without dropout and stochastic depth."""
    rows = (
        (1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2), (6, 5, 112, 3, 1),
        (6, 5, 192, 4, 2), (6, 3, 320, 1, 1),
    )  # fmt: skip
    return _inverted(rows, 1280, size, width, classes, norm=norm, act=_silu, squeeze=True)


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int, norm: bool) -> None:
        super().__init__()
        self.norm1 = _norm(inputs, norm)
        # Without a norm its input is what other layers read too, and must not change.
        self.relu1 = nn.ReLU(inplace=norm)
        self.conv1 = _conv(inputs, 4 * growth, 1, 1, norm)
        self.norm2 = _norm(4 * growth, norm)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = _conv(4 * growth, growth, 3, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        new: Tensor = self.conv1(self.relu1(self.norm1(x)))
        new = self.conv2(self.relu2(self.norm2(new)))
        return torch.cat([x, new], 1)


def densenet(size: int, width: float, classes: int, norm: bool) -> nn.Module:
    """Four dense blocks of 4, 6, 8 and 6 layers."""
    growth, channels = _scaled(32, width), _scaled(64, width)
    layers = _stem(size, channels, norm)
    for number, count in enumerate((4, 6, 8, 6)):
        if number:
            halved = channels // 2
            layers += [_norm(channels, norm), nn.ReLU(inplace=norm)]
            layers += [_conv(channels, halved, 1, 1, norm), nn.AvgPool2d(2)]
            channels = halved
        for _ in range(count):
            layers.append(_DenseLayer(channels, growth, norm))
            channels += growth
    layers += [_norm(channels, norm), nn.ReLU(inplace=norm)]
    return nn.Sequential(*layers, *_head(channels, classes))


NETS: dict[str, Callable[[int, float, int, bool], nn.Module]] = {
    "vgg": vgg,
    "resnet18": resnet18,
    "mobilenetv2": mobilenetv2,
    "densenet": densenet,
    "efficientnet": efficientnet,
}
LARGE = {"resnet50": resnet50}
"""Those that are built if asked for by name; the word 'all' means `NETS`."""


def build(
    name: str, *, size: int = 32, width: float = 1.0, classes: int = 10, norm: bool = True
) -> nn.Module:
    """A network for images of 3 x size x size, in training mode; the same weights every time.

    Args:
        name: one of `NETS` or `LARGE`.
        size: of the images, 32 or 96 say.
        width: what all channels are multiplied by, rounded to multiples of 8.
        classes: how many outputs.
        norm: False for the same network without batch norm.

    Raises:
        ConfigError: no such network.
    """
    known = NETS | LARGE
    if name not in known:
        raise ConfigError(
            f"unknown network '{name}'{meant(name, known)}; choose one of {', '.join(known)}, or "
            f"all, which is the first {len(NETS)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = known[name](size, width, classes, norm)
        for layer in model.modules():
            # Keeps the signal's size without norms too, so that no side computes with denormals.
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        for block in model.modules():
            if isinstance(block, _Bottleneck) and not norm:
                # Each of sixteen sums would double the signal, until training ends in NaN.
                block.conv3.weight.data.mul_(0.25)
    return model
