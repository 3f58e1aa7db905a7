"""Small networks in torchvision's style, with norms and without from one definition.

`NORMED` has them with norms, as they were published or as people vary them. `BARE` has them
without: each norm is an identity, and each layer has a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evenkeel.nn import PerActivationBatchNorm
from evenkeel.surgery.graph import LAYERS, NORMS

from .cnns import DenseBlock, ResNet, SqueezeExcite, bottlenecks, conv, mobilenet


def unit(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, norm, activation."""
    layers = conv(i, o, k, stride, groups), nn.BatchNorm2d(o), nn.ReLU(inplace=True)
    return nn.Sequential(*layers)


class VGG(nn.Module):
    """Its layers have biases with norms too, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in ((3, 8), (8, 8), (0, 0), (8, 16), (16, 16), (0, 0)):
            if not o:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class PreActivationBlock(nn.Module):
    """He et al. 2016. Where there is a projection, it sees the activated value."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), conv(i, o, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), conv(o, o)
        self.shortcut = conv(i, o, 1, stride) if stride != 1 or i != o else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))  # not in place: without norms that would be x
        identity = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(F.relu(self.bn2(self.conv1(y)), inplace=True))
        y += identity
        return y


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.blocks = nn.Sequential(PreActivationBlock(8, 8), PreActivationBlock(8, 12, 2))
        self.bn, self.fc = nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class DenseNet(nn.Module):
    """Two dense blocks with a transition between them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", conv(3, 8))
        self.features.add_module("norm0", nn.BatchNorm2d(8))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
        self.features.add_module("block1", DenseBlock(8, 4, 2))
        self.features.add_module("transition", nn.Sequential())
        self.features.transition.add_module("norm", nn.BatchNorm2d(16))
        self.features.transition.add_module("relu", nn.ReLU(inplace=True))
        self.features.transition.add_module("conv", conv(16, 8, 1))
        self.features.transition.add_module("pool", nn.AvgPool2d(2, 2))
        self.features.add_module("block2", DenseBlock(8, 4, 2))
        self.features.add_module("norm5", nn.BatchNorm2d(16))
        self.classifier = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


class BasicConv(nn.Module):
    """Inception's: a larger epsilon, and the activation is a function."""

    def __init__(self, i: int, o: int, k: int) -> None:
        super().__init__()
        self.conv, self.bn = conv(i, o, k), nn.BatchNorm2d(o, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    def __init__(self, i: int) -> None:
        super().__init__()
        self.branch1 = BasicConv(i, 4, 1)
        self.branch3 = nn.Sequential(BasicConv(i, 4, 1), BasicConv(4, 6, 3))
        self.branch5 = nn.Sequential(BasicConv(i, 4, 1), BasicConv(4, 4, 3), BasicConv(4, 4, 3))
        self.pool, self.branch_pool = nn.AvgPool2d(3, 1, 1), BasicConv(i, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.branch1(x), self.branch3(x), self.branch5(x)]
        return torch.cat([*branches, self.branch_pool(self.pool(x))], 1)


def inception() -> nn.Module:
    return nn.Sequential(
        BasicConv(3, 8, 3), nn.MaxPool2d(3, 2), Inception(8), Inception(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


class CrossStage(nn.Module):
    """YOLOv5's cross-stage partial block: one norm on two convolutions side by side."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.cv3 = unit(i, o, 1), conv(i, o, 1), conv(o, o, 1)
        self.cv4, self.m = unit(2 * o, o, 1), nn.Sequential(unit(o, o, 1), unit(o, o))
        self.bn, self.act = nn.BatchNorm2d(2 * o), nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        y = self.cv3(y + self.m(y))
        return self.cv4(self.act(self.bn(torch.cat((y, self.cv2(x)), dim=1))))


def cross_stage() -> nn.Module:
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return nn.Sequential(unit(3, 8, 3, 2), CrossStage(8, 8), *head)


def shuffled(x: Tensor, groups: int) -> Tensor:
    """The channels of the groups by turns."""
    n, c, h, w = x.size()
    x = x.view(n, groups, c // groups, h, w)
    return torch.transpose(x, 1, 2).contiguous().view(n, c, h, w)


class ShuffleUnit(nn.Module):
    """ShuffleNet V2's."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        half, self.stride = o // 2, stride
        i = i if stride > 1 else half
        depthwise = conv(i, i, 3, stride, i), nn.BatchNorm2d(i)
        self.branch1 = nn.Sequential(*depthwise, *unit(i, half, 1)) if stride > 1 else None
        depthwise = conv(half, half, 3, stride, half), nn.BatchNorm2d(half)
        self.branch2 = nn.Sequential(*unit(i, half, 1), *depthwise, *unit(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.branch1 is None:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return shuffled(out, 2)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.maxpool = unit(3, 8, 3), nn.MaxPool2d(3, 2, 1)
        self.stage2 = nn.Sequential(ShuffleUnit(8, 16, 2), ShuffleUnit(16, 16, 1))
        self.conv5, self.fc = unit(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5(self.stage2(self.maxpool(self.conv1(x))))
        return self.fc(x.mean([2, 3]))


class UNet(nn.Module):
    """One way up is a transposed convolution, the other an interpolation with a norm behind."""

    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down1 = self.double(3, 8), self.double(8, 16)
        self.down2 = nn.Sequential(nn.MaxPool2d(2), conv(16, 24), nn.Dropout2d(), *unit(24, 24)[1:])
        self.up1 = nn.Sequential(nn.ConvTranspose2d(24, 16, 2, 2), nn.BatchNorm2d(16))
        self.conv1 = self.double(32, 16)
        resized = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.up2 = nn.Sequential(conv(16, 8, 1), resized, nn.BatchNorm2d(8))
        self.conv2, self.outc = self.double(16, 8), nn.Conv2d(8, 2, 1)
        self.pool = nn.MaxPool2d(2)

    @staticmethod
    def double(i: int, o: int) -> nn.Sequential:
        return nn.Sequential(*unit(i, o), *unit(o, o))

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(self.pool(x1))
        y = self.conv1(torch.cat([x2, self.up1(self.down2(x2))], dim=1))
        return self.outc(self.conv2(torch.cat([x1, self.up2(y)], dim=1)))


def generator() -> nn.Module:
    """DCGAN's, with one layer in groups."""
    up = partial(nn.ConvTranspose2d, kernel_size=4, bias=False)
    return nn.Sequential(
        up(8, 16), nn.BatchNorm2d(16), nn.ReLU(True),
        up(16, 16, stride=2, padding=1, groups=4), nn.BatchNorm2d(16), nn.ReLU(True),
        up(16, 8, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(True),
        up(8, 3, stride=2, padding=1), nn.Tanh(),
    )  # fmt: skip


class Sequence(nn.Module):
    """Sounds, one dimension: a norm on the input takes the place of its preparation."""

    def __init__(self) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm1d(2)
        self.conv1, self.bn1 = nn.Conv1d(2, 8, 9, stride=2), nn.BatchNorm1d(8)
        self.conv2, self.bn2 = nn.Conv1d(8, 12, 3, dilation=2), nn.BatchNorm1d(12)
        self.conv3, self.bn3 = nn.Conv1d(12, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.pool, self.fc = nn.MaxPool1d(2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(self.bn0(x)))))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.avg_pool1d(x, x.shape[-1])
        return self.fc(x.squeeze(2))


class VolumeBlock(nn.Module):
    """R(2+1)D: space and time have a convolution each."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        space, time = (1, stride, stride), (stride, 1, 1)
        self.conv1 = nn.Conv3d(i, o, (1, 3, 3), space, (0, 1, 1), bias=False)
        self.bn1, self.relu = nn.BatchNorm3d(o), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv3d(o, o, (3, 1, 1), time, (1, 0, 0), bias=False)
        self.bn2, self.downsample = nn.BatchNorm3d(o), None
        if i != o:
            down = nn.Conv3d(i, o, 1, stride, bias=False)
            self.downsample = nn.Sequential(down, nn.BatchNorm3d(o))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def volumes() -> nn.Module:
    blocks = VolumeBlock(2, 8), VolumeBlock(8, 8), VolumeBlock(8, 12, 2)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(12, 5))


class FunctionalLayer(nn.Module):
    """A holder of tensors, some under the names of a norm: what it does are functions."""

    def __init__(self, i: int, o: int, norms: bool) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(o, i, 3, 3) / 4)
        self.norms = norms
        if norms:
            self.weight, self.bias = nn.Parameter(torch.ones(o)), nn.Parameter(torch.zeros(o))
            self.register_buffer("running_mean", torch.zeros(o))
            self.register_buffer("running_var", torch.ones(o))
        else:
            self.bias = nn.Parameter(torch.randn(o))

    def forward(self, x: Tensor) -> Tensor:
        if not self.norms:
            return F.relu(F.conv2d(x, self.kernel, self.bias, padding=1))
        x = F.conv2d(x, self.kernel, None, 1, 1)
        moments = self.running_mean, self.running_var
        x = F.batch_norm(x, *moments, self.weight, self.bias, self.training, 0.1, 1e-3)
        return F.relu(x)


class Functional(nn.Module):
    """Everything that can be a function is one."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([FunctionalLayer(*io, norms) for io in ((3, 8), (8, 12))])
        self.weight = nn.Parameter(torch.randn(5, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.max_pool2d(layer(x), 2)
        return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self.weight)


def post_activation() -> nn.Module:
    """The norm comes behind each activation, and on the input."""
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.BatchNorm2d(8), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(12),
        nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Dropout(),
        nn.Linear(16, 5),
    )  # fmt: skip


class Fire(nn.Module):
    """SqueezeNet's, a norm behind each activation: the first one's output has two readers."""

    def __init__(self, i: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze, self.norm1 = nn.Conv2d(i, squeeze, 1), nn.BatchNorm2d(squeeze)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(2 * expand)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(F.relu(self.squeeze(x)))
        x = torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)
        return self.norm2(x)


def squeezenet() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3, 2), nn.ReLU(inplace=True), Fire(8, 4, 6), Fire(12, 4, 8),
        nn.Dropout(), nn.Conv2d(16, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def convmixer() -> nn.Module:
    """Trockman & Kolter 2022: GELU, then the norm, and a residual around the depthwise half."""

    def mixed(layer: nn.Module) -> nn.Sequential:
        return nn.Sequential(layer, nn.GELU(), nn.BatchNorm2d(8))

    def depthwise() -> nn.Module:
        return nn.Conv2d(8, 8, 5, groups=8, padding="same")

    blocks = [(Residual(mixed(depthwise())), mixed(nn.Conv2d(8, 8, 1))) for _ in range(2)]
    return nn.Sequential(
        *mixed(nn.Conv2d(3, 8, 4, 4)), *(m for block in blocks for m in block),
        nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def per_activation() -> nn.Module:
    """LeNet with cudnn's PER_ACTIVATION mode: before the flattening and behind a dense layer."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 3), nn.Tanh(),
        PerActivationBatchNorm((8, 4, 4)), nn.Flatten(),
        nn.Linear(128, 16), PerActivationBatchNorm(16), nn.Tanh(), nn.Linear(16, 5),
    )  # fmt: skip


def without_norms(model: nn.Module) -> nn.Module:
    """The network with an identity for each norm, and a bias for each layer that had none."""
    for name, module in list(model.named_modules()):
        if isinstance(module, NORMS):
            model.set_submodule(name, nn.Identity())
        elif isinstance(module, LAYERS) and module.bias is None:
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            outputs = module.out_channels if transposed else module.weight.shape[0]
            module.bias = nn.Parameter(torch.randn(outputs) / 4)
    return model


def flagged(make: Callable[[], nn.Module]) -> Callable[[bool], nn.Module]:
    """A definition with norms as one that takes the flag."""
    return lambda norms: make() if norms else without_norms(make())


IMAGE = (3, 16, 16)
ARCHITECTURES: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "vgg": (flagged(VGG), IMAGE),
    "resnet": (flagged(ResNet), IMAGE),
    "bottlenecks": (flagged(bottlenecks), IMAGE),
    "pre-activation": (flagged(PreActivation), IMAGE),
    "densenet": (flagged(DenseNet), IMAGE),
    "mobilenet": (flagged(mobilenet), IMAGE),
    "inception": (flagged(inception), IMAGE),
    "cross-stage": (flagged(cross_stage), IMAGE),
    "squeeze-excite": (flagged(SqueezeExcite), IMAGE),
    "shufflenet": (flagged(ShuffleNet), IMAGE),
    "u-net": (flagged(UNet), IMAGE),
    "generator": (flagged(generator), (8, 1, 1)),
    "sequence": (flagged(Sequence), (2, 40)),
    "volumes": (flagged(volumes), (2, 6, 10, 10)),
    "functional": (Functional, IMAGE),
    "post-activation": (flagged(post_activation), IMAGE),
    "squeezenet": (flagged(squeezenet), IMAGE),
    "convmixer": (flagged(convmixer), IMAGE),
    "per-activation": (flagged(per_activation), IMAGE),
}
"""Each network's definition, and the shape of one sample."""


def built(name: str, norms: bool) -> nn.Module:
    """The network with He's weights, so that its input is still to be seen in its output."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name][0](norms)
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if weight.dim() > 1 and not isinstance(module, NORMS):
                nn.init.kaiming_normal_(weight)
    return model


NORMED: dict[str, Callable[[], nn.Module]] = {n: partial(built, n, True) for n in ARCHITECTURES}
BARE: dict[str, Callable[[], nn.Module]] = {n: partial(built, n, False) for n in ARCHITECTURES}


def images(name: str, n: int = 2, seed: int = 0) -> Tensor:
    """A batch that the architecture takes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *ARCHITECTURES[name][1], generator=generator)
