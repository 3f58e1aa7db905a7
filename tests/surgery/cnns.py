"""Convolutional networks as people write them, small, with torch's batch norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((3, 8), (8, 8), (8, 16)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
    layers += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 12), nn.BatchNorm1d(12), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.3), nn.Linear(12, 5))


class BasicBlock(nn.Module):
    """torchvision's, with one ReLU for both places."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(i, o, stride=stride)
        self.bn1 = nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(o, o)
        self.bn2 = nn.BatchNorm2d(o)
        self.downsample = None
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(conv(i, o, 1, stride), nn.BatchNorm2d(o))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 2

    def __init__(self, i: int, width: int, stride: int = 1) -> None:
        super().__init__()
        o = width * self.expansion
        self.conv1, self.bn1 = conv(i, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, o, 1), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(conv(i, o, 1, stride), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = self.downsample(x)
        out = out + identity
        out = self.relu(out)
        return out  # noqa: RET504


class ResNet(nn.Module):
    def __init__(self, block: Callable[..., nn.Module] = BasicBlock, o: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(block(8, 8), block(o, 8))
        self.layer2 = nn.Sequential(block(o, 12, 2))
        self.fc = nn.Linear(12 * o // 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def bottlenecks() -> nn.Module:
    return ResNet(Bottleneck, 16)


class Functional(nn.Module):
    """F.relu, torch.relu, methods, in place and not, of every activation."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv(3 if i == 0 else 6, 6) for i in range(8)])
        self.bns = nn.ModuleList([nn.BatchNorm2d(6) for _ in range(8)])
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        convs, bns = list(self.convs), list(self.bns)
        x = F.relu(bns[0](convs[0](x)))
        x = F.relu(bns[1](convs[1](x)), inplace=True)
        x = bns[2](convs[2](x)).relu_()
        x = torch.relu(bns[3](convs[3](x)))
        x = F.leaky_relu(bns[4](convs[4](x)), 0.2)
        x = F.dropout(x, 0.2, training=self.training)
        x = F.silu(input=bns[5](convs[5](x)))
        x = F.relu6(bns[6](convs[6](x)))
        x = bns[7](convs[7](x)).relu()
        return self.fc(x.mean((2, 3)))


class PreActivation(nn.Module):
    """He et al. 2016: norms come first, and a sum has none behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), conv(8, 8)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), conv(8, 8)
        self.bn3, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        y += x
        return self.fc(F.relu(self.bn3(y)).mean((2, 3)))


class ConvBNReLU(nn.Sequential):
    """A Sequential by another name, as in torchvision."""

    def __init__(self, i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__(conv(i, o, k, stride, groups), nn.BatchNorm2d(o), nn.ReLU6(inplace=True))
        self.out_channels = o


class InvertedResidual(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and i == o
        self.conv = nn.Sequential(
            ConvBNReLU(i, 2 * i, 1),
            ConvBNReLU(2 * i, 2 * i, 3, stride, groups=2 * i),
            nn.Conv2d(2 * i, o, 1, bias=False),
            nn.BatchNorm2d(o),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


def mobilenet() -> nn.Module:
    return nn.Sequential(
        ConvBNReLU(3, 8, 3, 2),
        InvertedResidual(8, 8, 1),
        InvertedResidual(8, 12, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


class DenseLayer(nn.Module):
    """torchvision's: the input may be a tensor or a list of them."""

    def __init__(self, i: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(i), nn.ReLU(inplace=True)
        self.conv1 = conv(i, 2 * growth, 1)
        self.norm2, self.relu2 = nn.BatchNorm2d(2 * growth), nn.ReLU(inplace=True)
        self.conv2 = conv(2 * growth, growth)

    def bottleneck(self, inputs: list[Tensor]) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

    def forward(self, given: Tensor | list[Tensor]) -> Tensor:
        inputs = [given] if isinstance(given, Tensor) else given
        return self.conv2(self.relu2(self.norm2(self.bottleneck(inputs))))


class DenseBlock(nn.ModuleDict):
    def __init__(self, i: int, growth: int, layers: int) -> None:
        super().__init__()
        for place in range(layers):
            self.add_module(f"layer{place}", DenseLayer(i + place * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 8), DenseBlock(8, 4, 2), nn.BatchNorm2d(16))
        self.classifier = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        return self.classifier(out.mean((2, 3)))


class SqueezeExcite(nn.Module):
    """EfficientNet's block with SiLU: one activation object for all that have none of their own."""

    silu = nn.SiLU(inplace=True)

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, channels), nn.BatchNorm2d(channels), nn.SiLU())
        self.depthwise = conv(channels, channels, groups=channels)
        self.bn1, self.act = nn.BatchNorm2d(channels), nn.SiLU(inplace=True)
        self.reduce, self.expand = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)
        self.project, self.bn2 = conv(channels, channels, 1), nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.act(self.bn1(self.depthwise(x)))
        scale = self.expand(self.act(self.reduce(y.mean((2, 3), keepdim=True))))
        y = self.bn2(self.project(y * scale.sigmoid()))
        return self.fc((y + x).mean((2, 3)))


class Branches(nn.Module):
    """Shake-Shake and many others: both branches are Sequentials that end in a norm."""

    def __init__(self, i: int = 3, o: int = 8, stride: int = 2) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            conv(i, o, stride=stride), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
            nn.Sequential(conv(o, o), nn.BatchNorm2d(o)),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if i != o:
            self.shortcut = nn.Sequential(conv(i, o, stride=stride), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.residual(x) + self.shortcut(x))


def branches() -> nn.Module:
    return nn.Sequential(Branches(), Branches(8, 8, 1), nn.Flatten(), nn.Linear(128, 5))


class ConvBN(nn.Module):
    """Ends in a norm; what follows is in the module around it."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv, self.bn = conv(i, o), nn.BatchNorm2d(o)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvBN(3, 8), ConvBN(8, 8)
        self.act = nn.LeakyReLU(0.1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = F.relu(self.second(x) + x)
        return self.fc(x.mean((2, 3)))


class Untraceable(nn.Module):
    """Which way it goes depends on the data; its blocks are like all others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = conv(3, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.block = BasicBlock(8, 8)
        self.extra, self.extra_bn = conv(8, 8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = self.block(x)
        if x.mean() > 0.1:
            x = F.relu(self.extra_bn(self.extra(x)))
        return self.fc(x.mean((2, 3)))


class AsksForTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())
        self.conv, self.bn, self.fc = conv(8, 8), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(self.body(x)))
        if self.training:
            x = F.relu(x) * 2
        return self.fc(F.relu(x).mean((2, 3)))


class Volumes(nn.Module):
    """One and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3, self.bn3 = nn.Conv3d(1, 4, (1, 3, 3)), nn.BatchNorm3d(4)
        self.conv1, self.bn1 = nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn3(self.conv3(x.unsqueeze(1))).relu()
        x = self.bn1(self.conv1(x.flatten(2))).relu()
        return self.fc(x.mean(2))


ZOO: dict[str, tuple[Callable[[], nn.Module], dict[str, str], int]] = {
    "vgg": (vgg, {"1": "relu", "4": "relu", "7": "relu", "12": "relu"}, 0),
    "resnet": (
        ResNet,
        {
            "bn1": "relu",
            "layer1.0.bn1": "relu",
            "layer1.0.bn2": "add and relu",
            "layer1.1.bn1": "relu",
            "layer1.1.bn2": "add and relu",
            "layer2.0.bn1": "relu",
            "layer2.0.bn2": "add and relu",
            "layer2.0.downsample.1": "",
        },
        0,
    ),
    "bottlenecks": (
        bottlenecks,
        {"bn1": "relu"}
        | {
            f"{block}.{norm}": what
            for block in ("layer1.0", "layer1.1", "layer2.0")
            for norm, what in (
                ("bn1", "relu"),
                ("bn2", "relu"),
                ("bn3", "add and relu"),
                ("downsample.1", ""),
            )
        },
        0,
    ),
    "functional": (
        Functional,
        {f"bns.{i}": "relu" for i in (0, 1, 2, 3, 7)}
        | {"bns.4": "leaky_relu of slope 0.2", "bns.5": "silu", "bns.6": "relu6"},
        0,
    ),
    "pre-activation": (PreActivation, {f"bn{i}": "relu" for i in (1, 2, 3)}, 0),
    "mobilenet": (
        mobilenet,
        {"0.1": "relu6"}
        | {f"{b}.conv.{i}.1": "relu6" for b in (1, 2) for i in (0, 1)}
        | {"1.conv.3": "", "2.conv.3": ""},
        0,
    ),
    "densenet": (
        DenseNet,
        {f"features.1.layer{i}.norm{j}": "relu" for i in (0, 1) for j in (1, 2)}
        | {"features.2": "relu"},
        2,
    ),
    "squeeze-excite": (SqueezeExcite, {"stem.1": "silu", "bn1": "silu", "bn2": ""}, 0),
    "branches": (
        branches,
        {
            "0.residual.1": "relu",
            "0.residual.3.1": "",
            "0.shortcut.1": "add and relu",
            "1.residual.1": "relu",
            "1.residual.3.1": "add and relu",
        },
        0,
    ),
    "nested": (Nested, {"first.bn": "leaky_relu of slope 0.1", "second.bn": ""}, 1),
    "untraceable": (
        Untraceable,
        {"bn": "relu", "block.bn1": "relu", "block.bn2": "add and relu", "extra_bn": ""},
        1,
    ),
    "asks for training": (AsksForTraining, {"body.1": "relu", "bn": ""}, 1),
    "volumes": (Volumes, {"bn3": "relu", "bn1": "relu"}, 0),
}
"""Each network: how to build it, what every norm takes over, and how many things are left."""


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = ZOO[name][0]()
    for module in model.modules():  # so that no gamma is one and no beta zero
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def images(n: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=generator)
