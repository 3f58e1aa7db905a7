"""Networks to operate on, and what must be true of them before and after."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from evenkeel.study.models import MODELS, build
from evenkeel.surgery.graph import module_of


def built(name: str, activation: str = "relu", size: int = 8) -> nn.Module:
    return build(name, (1, size, size), 10, activation, seed=0)


def images(n: int = 6, channels: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, size, size, generator=generator)


ALL = tuple(MODELS)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that surgery must not touch: every bit, flag, hook and setting of a model."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = (
            id(module),
            type(module),
            module.training,
            [list(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks)],
            {k: repr(v) for k, v in vars(module).items() if not k.startswith("_")},
            sorted(module._modules),
        )
    for key, value in (*model.named_parameters(), *model.named_buffers()):
        raw = value.detach().contiguous().view(torch.uint8) if value.dim() else value.detach()
        digest = hashlib.sha256(raw.numpy().tobytes()).hexdigest()
        grad = None if value.grad is None else value.grad.sum().item()
        found[f"{key} value"] = (id(value), value.dtype, value.shape, digest, grad)
    return found


def norm_places(traced: fx.GraphModule, is_norm: Callable[[fx.Node], bool]) -> dict[str, str]:
    """Each norm's target, with the name of the node before it."""
    return {str(n.target): n.all_input_nodes[0].name for n in traced.graph.nodes if is_norm(n)}


def outputs_of(traced: fx.GraphModule, x: Tensor) -> dict[fx.Node, Any]:
    """The value of every node of the graph for an input."""
    interpreter = fx.Interpreter(traced, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(x)
    return dict(interpreter.env)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random running statistics and gammas, some negative, one zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_mean", None) is None:
            continue
        shape = module.running_mean.shape
        with torch.no_grad():
            module.running_mean.copy_(torch.randn(shape, generator=generator))
            module.running_var.copy_(torch.rand(shape, generator=generator) * 3 + 0.1)
            if module.weight is not None:
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
                module.weight.view(-1)[0] = 0
    return model


def kinds(traced: fx.GraphModule) -> list[str]:
    """The class of each module that the graph calls, or the name of its functions."""
    found = []
    for node in traced.graph.nodes:
        module = module_of(node)
        if module is not None:
            found.append(type(module).__name__)
        elif node.op in ("call_function", "call_method"):
            found.append(str(getattr(node.target, "__name__", node.target)))
    return found


class Functional(nn.Module):
    """Everything that can be a function is one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1)
        self.fc1 = nn.Linear(24, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = torch.relu(self.conv2(input=x))
        x = F.avg_pool2d(self.conv3(x).relu(), 2)
        return self.fc2(torch.tanh(input=self.fc1(x.flatten(1))))


class Nested(nn.Module):
    """Modules in modules, one activation object in all places."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.body = nn.ModuleDict({"first": nn.Sequential(nn.Conv2d(1, 4, 3), self.act)})
        self.body["second"] = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3)), self.act)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), self.act, nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body["second"](self.body["first"](x)))


class Twice(nn.Module):
    """One convolution called twice, the second time for the output."""

    def __init__(self, ends: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Identity() if ends else nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.conv(torch.relu(self.conv(x)))
        return self.fc(x.relu().mean((2, 3)))


class Branches(nn.Module):
    """A convolution whose output is used twice, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.side = nn.Conv2d(4, 4, 1)
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        value = self.conv(x)
        value = torch.relu(value) + self.side(value)
        flat = value.mean((2, 3))
        return self.left(flat) + torch.sigmoid(self.right(flat))


class Undecided(nn.Module):
    """Control flow that depends on values: torch.fx cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if y.sum() > 0 else -y


class Dropping(nn.Module):
    """Functional dropout that asks for the mode, as many networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc1, self.fc2 = nn.Linear(144, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout2d(F.relu(self.conv(x)), 0.25, self.training)
        x = F.dropout(F.relu(self.fc1(x.flatten(1))), training=self.training)
        return self.fc2(x)


class TwoFaced(nn.Module):
    """An output more in training."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.fc1(x))
        return (self.fc2(x), x) if self.training else self.fc2(x)
