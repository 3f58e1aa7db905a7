"""The networks of a study, all without norms: `introduce` puts those in.

Built-in factories take ``(shape, classes, activation)``; a user's factory is named as
``package.module:factory`` and gets those of these arguments that it has parameters for.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ConfigError

__all__ = ["ACTIVATIONS", "MODELS", "build", "source_fingerprint"]

Shape = tuple[int, int, int]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": lambda: nn.LeakyReLU(0.01),
}


def standard(shape: Shape, classes: int, activation: str) -> nn.Module:
    """Conv1 Relu1 Pool1 Conv2 Relu2 Pool2 FC1 FC2, the network of the textbooks.

    5x5 convolutions with 20 and 50 channels and 500 hidden units, as in Caffe's LeNet; for images
    under 16 pixels 3x3 ones with 16 and 32 channels and 64 hidden units. An activation follows FC1.
    """
    small = min(shape[1:]) < 16
    first, second, hidden, kernel = (16, 32, 64, 3) if small else (20, 50, 500, 5)
    act = ACTIVATIONS[activation]
    flat = second * (shape[1] // 4) * (shape[2] // 4)
    return _chain(
        conv1=nn.Conv2d(shape[0], first, kernel, padding=kernel // 2),
        act1=act(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(first, second, kernel, padding=kernel // 2),
        act2=act(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(flat, hidden),
        act3=act(),
        fc2=nn.Linear(hidden, classes),
    )


def paper(shape: Shape, classes: int, activation: str) -> nn.Module:
    """The MNIST network of the paper's section 4.1: three dense layers of 100 units.

    The paper starts from small Gaussian weights without saying how small; the deviation here is
    0.05. It matters to the net without batch norm alone: at learning rate 0.1 that needs 13,600
    steps to 94 % from 0.05 and 9,300 from 1 / sqrt(inputs), with batch norm it is 3,200 and 3,000.
    """
    act = ACTIVATIONS[activation]
    model = _chain(
        flatten=nn.Flatten(),
        fc1=nn.Linear(shape[0] * shape[1] * shape[2], 100),
        act1=act(),
        fc2=nn.Linear(100, 100),
        act2=act(),
        fc3=nn.Linear(100, 100),
        act3=act(),
        fc4=nn.Linear(100, classes),
    )
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.05)
            nn.init.zeros_(layer.bias)
    return model


def lenet5(shape: Shape, classes: int, activation: str) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with average pooling: 6 and 16 maps, then 120 and 84 units."""
    act = ACTIVATIONS[activation]
    height, width = shape[1] // 2, shape[2] // 2
    padding = 0 if min(height, width) >= 8 else 2
    height, width = (height + 2 * padding - 4) // 2, (width + 2 * padding - 4) // 2
    return _chain(
        conv1=nn.Conv2d(shape[0], 6, 5, padding=2),
        act1=act(),
        pool1=nn.AvgPool2d(2),
        conv2=nn.Conv2d(6, 16, 5, padding=padding),
        act2=act(),
        pool2=nn.AvgPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(16 * height * width, 120),
        act3=act(),
        fc2=nn.Linear(120, 84),
        act4=act(),
        fc3=nn.Linear(84, classes),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, activation after the sum (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.act1 = ACTIVATIONS[activation]()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)
        self.act2 = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv2(self.act1(self.conv1(x)))
        out: Tensor = self.act2(branch + self.shortcut(x))
        return out


class PreActivationBlock(nn.Module):
    """The same with both activations before their convolutions (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str) -> None:
        super().__init__()
        self.act1 = ACTIVATIONS[activation]()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.act2 = ACTIVATIONS[activation]()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.act2(self.conv1(self.act1(x)))) + self.shortcut(x)
        return out


def residual(shape: Shape, classes: int, activation: str) -> nn.Module:
    """A small residual net: a stem, three blocks of 16, 32 and 32 channels, global average."""
    return _chain(
        stem=nn.Conv2d(shape[0], 16, 3, 1, 1),
        act=ACTIVATIONS[activation](),
        block1=ResidualBlock(16, 16, 1, activation),
        block2=ResidualBlock(16, 32, 2, activation),
        block3=ResidualBlock(32, 32, 1, activation),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(32, classes),
    )


def residual_pre(shape: Shape, classes: int, activation: str) -> nn.Module:
    """The small residual net with pre-activation blocks and an activation before the average."""
    return _chain(
        stem=nn.Conv2d(shape[0], 16, 3, 1, 1),
        block1=PreActivationBlock(16, 16, 1, activation),
        block2=PreActivationBlock(16, 32, 2, activation),
        block3=PreActivationBlock(32, 32, 1, activation),
        act=ACTIVATIONS[activation](),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(32, classes),
    )


MODELS: dict[str, Callable[[Shape, int, str], nn.Module]] = {
    "standard": standard,
    "paper": paper,
    "lenet5": lenet5,
    "residual": residual,
    "residual-pre": residual_pre,
}


def build(name: str, shape: Shape, classes: int, activation: str, seed: int) -> nn.Module:
    """A network with its initial weights, which depend on the seed alone.

    Raises:
        ConfigError: no such network or activation, or the user's factory cannot be had or fails.
    """
    if activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ConfigError(f"unknown activation '{activation}'; choose one of {names}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if ":" in name:
            return _build_users(name, shape, classes, activation)
        if name not in MODELS:
            raise ConfigError(
                f"unknown model '{name}'; choose one of {', '.join(MODELS)}, or name your own as "
                "package.module:factory"
            )
        return MODELS[name](shape, classes, activation)


def _build_users(name: str, shape: Shape, classes: int, activation: str) -> nn.Module:
    factory = _factory(name)
    offered = {"shape": shape, "classes": classes, "activation": activation}
    try:
        taken = inspect.signature(factory).parameters
        model = factory(**{key: value for key, value in offered.items() if key in taken})
    except Exception as error:
        raise ConfigError(
            f"'{name}' failed with {type(error).__name__}: {error}; it is called with those of "
            "shape=(c, h, w), classes and activation that it has parameters for"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"'{name}' returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _factory(name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"'{name}' names no network; write package.module:factory")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"'{module_name}' of model '{name}' cannot be imported ({type(error).__name__}: "
            f"{error}); run from the folder that holds it, or install it"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(f"module '{module_name}' has no '{attribute}'")
    found: Callable[..., object] = getattr(module, attribute)
    if not callable(found):
        raise ConfigError(f"'{name}' is of type {type(found).__name__}, not a function or class")
    return found


def source_fingerprint(name: str) -> str:
    """A hash of the file that a user's factory is written in, so that an edit is noticed."""
    path = inspect.getsourcefile(inspect.unwrap(_factory(name)))
    source = b"" if path is None else Path(path).read_bytes()
    return hashlib.sha256(source).hexdigest()[:16]


def _chain(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))
