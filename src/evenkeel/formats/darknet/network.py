"""A Darknet network as a module of torch's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...conventions import CONVENTIONS, Convention
from ...errors import ConfigError, meant
from .cfg import Section
from .layers import HEADS, layers_of
from .weights import Header

__all__ = ["Network", "convention_named"]


class Network(nn.Module):
    """What a .cfg describes, made of torch's own convolutions, norms and activations.

    Its input is (N, c, h, w) with the c of [net], pixels / 255 for Darknet's own networks. It gives
    what Darknet's last layer does; with several outputs, as [yolo] layers are, a tuple. Weights
    are Darknet's initial ones: convolutions normal with variance ``2 / (size^2 * c / groups)``,
    dense layers uniform in ``+-sqrt(2 / inputs)``.

    Attributes:
        layers: a module for each section behind [net].
        sections: of the .cfg, [net] first.
        image: (c, h, w) of [net].
        convention: the build of Darknet whose norms these are, a name in `evenkeel.conventions`.
        header: of the .weights file, with the number of images seen.

    Args:
        sections: as `cfg.read` gives them.
        convention: which build's epsilon, and momentum for more training.

    Raises:
        FormatError: a section that Darknet knows and this does not, or sizes that do not fit.
        ConfigError: a convention that is not Darknet's.
    """

    def __init__(self, sections: Sequence[Section], convention: str = "darknet-gpu") -> None:
        super().__init__()
        image, layers = layers_of(sections, convention_named(convention))
        self.layers = nn.ModuleList(layer.module for layer in layers)
        self.sections = tuple(sections)
        self.image = (image.c, image.h, image.w)
        self.convention = convention
        self.header = Header()
        self._sources = tuple(layer.sources for layer in layers)
        self._kept = {number for sources in self._sources for number in sources}
        last = len(layers) - 1
        self._given = {i for i, layer in enumerate(layers) if layer.section.name in HEADS} | {last}
        self._initialize()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs for a batch of images."""
        kept: dict[int, Tensor] = {}
        outputs = []
        for index, layer in enumerate(self.layers):
            others = [kept[number] for number in self._sources[index]]
            is_route = self.sections[index + 1].name == "route"
            x = layer(*others) if is_route else layer(x, *others)
            if index in self._kept:
                kept[index] = x
            if index in self._given:
                outputs.append(x)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @torch.no_grad()
    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.weight[0].numel()
                module.weight.normal_(std=math.sqrt(2 / fan))
            elif isinstance(module, nn.Linear):
                bound = math.sqrt(2 / module.in_features)
                module.weight.uniform_(-bound, bound)
            else:
                continue
            if module.bias is not None:
                module.bias.zero_()


def convention_named(name: str) -> Convention:
    """One of Darknet's conventions.

    Raises:
        ConfigError: there is none of that name.
    """
    names = [n for n in CONVENTIONS if n.startswith(("darknet-", "alexeyab-"))]
    if name not in names:
        raise ConfigError(
            f"'{name}' is no build of Darknet{meant(name, names)}; choose {', '.join(names)}"
        )
    return CONVENTIONS[name]
