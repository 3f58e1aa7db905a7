"""The memory layout of a network's weights: measured, changed, and given back.

A convolution computes in channels_last if its input or its weight lies so, and so does all that
follows. So the weights alone decide, and the network takes images as they come. (The weight of a
1x1 convolution of one channel lies in both ways at once; there the next one decides.) Which layout
is faster depends on the shapes, the processor and what stands between the convolutions; it can only
be measured.

A parameter stays the same object with the same values; only its storage is another one.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...errors import ConfigError, SurgeryError, first_line
from ..comparing import Difference, compare_layouts
from ..draws import gpus_of
from ..examples import call, cloned, tensors_in

__all__ = ["Layout", "check", "choose", "convert", "convert_back", "is_laid_out", "lay_out"]

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
NAMES = {torch.contiguous_format: CONTIGUOUS, torch.channels_last: CHANNELS_LAST}
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

PAYS = 0.02
"""The share of a step that three rounds of four must save for the layout to be changed."""
LEAST_ROUNDS = 3
MOST_ROUNDS = 50

_WAS = "_strides_before_acceleration"
"""The attribute of a module that holds the strides which its parameters had, by name."""


@dataclass(frozen=True)
class Layout:
    """The layout of the weights: which, whether it was changed, and why.

    ``contiguous`` and ``channels_last`` are medians over ``rounds`` of the seconds that one
    training step took; both are None where nothing was measured. ``difference`` is the largest
    between the two layouts in double precision, None where nothing was changed or compared.
    """

    chosen: str
    changed: bool
    reason: str
    contiguous: float | None = None
    channels_last: float | None = None
    rounds: int = 0
    difference: Difference | None = None

    def __str__(self) -> str:
        text = f"weights {'now' if self.changed else 'still'} {self.chosen}: {self.reason}"
        if self.contiguous is not None and self.channels_last is not None:
            text += (
                f"; a training step takes {1e3 * self.contiguous:.1f} ms in {CONTIGUOUS}, "
                f"{1e3 * self.channels_last:.1f} ms in {CHANNELS_LAST} (medians of {self.rounds})"
            )
        if self.difference is not None:
            text += f"; largest difference in double precision {self.difference}"
        return text


def check(wish: Any, example: Any, seconds: float) -> None:
    """Checks what was asked for, before anything is done.

    Raises:
        ConfigError: an unknown layout, 'auto' without an example, or no time to measure.
    """
    if wish not in ("keep", "auto", *NAMES):
        raise ConfigError(
            f"unknown memory_format {wish!r}; choose 'keep', 'auto', torch.contiguous_format or "
            "torch.channels_last, which is channels_last_3d for weights of five dimensions"
        )
    if wish == "auto" and example is None:
        raise ConfigError(
            "memory_format='auto' times training steps and needs an example to run; give a batch "
            "of the size that you train with"
        )
    if not seconds > 0:
        raise ConfigError(f"seconds must be above 0 to measure layouts, got {seconds}")


def lay_out(model: nn.Module, wish: Any, example: Any, seconds: float) -> Layout | None:
    """Lays the network's weights out as wished, in place; with an example, proves it.

    Returns:
        the layout, None for 'keep'.

    Raises:
        SurgeryError: in the layout that was asked for by name, the network does not run or
            computes something else; it is as it was before.
    """
    if wish == "keep":
        return None
    unsafe = None if wish is torch.contiguous_format else _unsafe(model)
    if unsafe is not None and wish != "auto":
        raise SurgeryError(
            f"the network cannot have its weights in {NAMES[wish]}: {unsafe}; nothing was changed; "
            "give memory_format='keep'"
        )
    if unsafe is not None:
        layout = Layout(_layout_of(model) or CONTIGUOUS, False, unsafe)
    elif wish == "auto":
        layout = choose(model, example, seconds)
    else:
        name = NAMES[wish]
        layout = Layout(name, not _lies(_weights_of(model), name), "as asked")
    if not layout.changed:
        return layout
    before = copy.deepcopy(model) if example is not None else None
    convert(model, layout.chosen)
    if before is None:
        return layout
    try:
        return replace(layout, difference=compare_layouts(before, model, example))
    except SurgeryError as error:
        convert_back(model)
        problem = first_line(error.__cause__ or error)
        if wish == "auto":
            reason = f"{layout.chosen} does not fit the network: {problem}"
            return Layout(_other(layout.chosen), False, reason)
        raise SurgeryError(
            f"the network cannot have its weights in {layout.chosen}: {problem}; nothing was "
            "changed; write reshape in place of view in its forward, or give memory_format='keep'"
        ) from error


def choose(model: nn.Module, example: Any, seconds: float) -> Layout:
    """The layout in which training steps of the network are faster, by measuring.

    A step is forward, the sum of the outputs' means, and backward. Copies of the network in both
    layouts take steps in turn; a ratio is taken within a round. The layout is changed only if three
    rounds of four save more than 2 %. The network, its gradients and torch's random numbers stay as
    they are; one that is in inference is measured in training.

    Args:
        model: the network, which stays as it is.
        example: an input, a tuple of inputs or a dict of inputs by name.
        seconds: about how long to measure, at most. If a step takes so long that there is no time
            for three rounds, the layout is kept.
    """
    now = _layout_of(model)
    if now is None:
        return Layout(CONTIGUOUS, False, "no weights of four or five dimensions")
    try:
        found = _measured(model, example, seconds)
    except Exception as error:  # such as a view that channels_last does not allow
        return Layout(now, False, f"it could not be measured: {first_line(error)}")
    rounds = len(found[now])
    if rounds < LEAST_ROUNDS:
        reason = f"no time to measure {LEAST_ROUNDS} rounds in {seconds:g} s; give more seconds"
        return Layout(now, False, reason)
    new = _other(now)
    ratios = [b / a for a, b in zip(found[now], found[new], strict=True)]
    saves = statistics.quantiles(ratios, n=4, method="inclusive")[2] < 1 - PAYS
    share = f"{100 * abs(1 - statistics.median(ratios)):.0f} %"
    if saves:
        reason = f"it saves {share} of a step"
    elif statistics.median(ratios) < 1:
        reason = f"{new} would save {share} of a step, no more than the noise"
    else:
        reason = f"{new} would take {share} longer"
    contiguous, last = (statistics.median(found[name]) for name in (CONTIGUOUS, CHANNELS_LAST))
    return Layout(new if saves else now, saves, reason, contiguous, last, rounds)


def convert(model: nn.Module, name: str) -> None:
    """Lays all weights of four and five dimensions out anew, in place, or none of them.

    Parameters stay the same objects; their gradients are laid out alike. The strides from before
    are kept with the module, for `convert_back`.
    """
    done: list[tuple[Tensor, Tensor]] = []
    noted: list[tuple[nn.Module, str]] = []
    try:
        for module, key, weight in _weights_of(model):
            strides = weight.stride()
            for t in (weight, weight.grad):
                if t is not None:
                    done.append((t, t.data))
                    t.data = t.data.to(memory_format=_format(name, t))
            before = vars(module).setdefault(_WAS, {})
            if key not in before:
                before[key] = strides
                noted.append((module, key))
    except BaseException:
        for t, data in done:
            t.data = data
        for module, key in noted:
            _forget(module, key)
        raise


def convert_back(model: nn.Module) -> None:
    """Gives all weights the strides that they had before `convert`, in place, with their values."""
    for module in model.modules():
        for key, strides in dict(vars(module).get(_WAS, {})).items():
            weight = module._parameters.get(key)
            for t in () if weight is None else (weight, weight.grad):
                if t is not None and t.dim() == len(strides):
                    t.data = torch.empty_strided(
                        t.shape, strides, dtype=t.dtype, device=t.device
                    ).copy_(t.data)
            _forget(module, key)


def is_laid_out(module: nn.Module) -> bool:
    """True if `convert` has changed weights of this one module that are not changed back."""
    return _WAS in vars(module)


def _unsafe(model: nn.Module) -> str | None:
    """Why the network must not be trained in channels_last on this processor, or None.

    With AVX2, oneDNN's gradient of the weight of a 1x1 convolution with strides and less than eight
    channels writes outside of its memory there, and the process ends or is wrong later (torch 2.13,
    seen with valgrind; not with eight channels or more, nor without strides).
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        return None
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Conv2d | nn.Conv3d)
            and set(module.kernel_size) == {1}
            and set(module.stride) != {1}
            and module.in_channels // module.groups < 8
            and module.weight.is_cpu
        ):
            return (
                f"on AVX2 torch writes outside of the gradient of '{name}', a 1x1 convolution with "
                "strides and less than eight channels, if channels come last"
            )
    return None


def _forget(module: nn.Module, key: str) -> None:
    before = vars(module)[_WAS]
    del before[key]
    if not before:
        del vars(module)[_WAS]


def _weights_of(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters that can be laid out, each once, with the module that holds them.

    One that shares its storage stays as it is, and so does one that is no plain tensor: wrappers
    for several machines make such.
    """
    found: dict[int, tuple[nn.Module, str, nn.Parameter]] = {}
    for module in model.modules():
        for key, weight in module._parameters.items():
            if weight is None or is_lazy(weight) or type(weight.data) is not Tensor:
                continue
            if weight.dim() in _LAST and weight.layout == torch.strided:
                found.setdefault(id(weight), (module, key, weight))
    owners = Counter(weight.untyped_storage().data_ptr() for _, _, weight in found.values())
    return [
        (module, key, weight)
        for module, key, weight in found.values()
        if weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
        and owners[weight.untyped_storage().data_ptr()] == 1
    ]


def _layout_of(model: nn.Module) -> str | None:
    """The layout that the weights have now; None if there are none to lay out."""
    weights = _weights_of(model)
    if not weights:
        return None
    return CHANNELS_LAST if _lies(weights, CHANNELS_LAST) else CONTIGUOUS


def _lies(weights: Iterable[tuple[nn.Module, str, Tensor]], name: str) -> bool:
    """True if all of the weights lie so already."""
    return all(weight.stride() == _strides(weight, name) for _, _, weight in weights)


def _strides(t: Tensor, name: str) -> tuple[int, ...]:
    return torch.empty(t.shape, device="meta", memory_format=_format(name, t)).stride()


def _format(name: str, t: Tensor) -> torch.memory_format:
    return _LAST[t.dim()] if name == CHANNELS_LAST else torch.contiguous_format


def _other(name: str) -> str:
    return CONTIGUOUS if name == CHANNELS_LAST else CHANNELS_LAST


def _measured(model: nn.Module, example: Any, seconds: float) -> dict[str, list[float]]:
    """The seconds of training steps in each layout, round by round."""
    sides = {name: copy.deepcopy(model) for name in NAMES.values()}
    for name, side in sides.items():
        convert(side, name)
        if not side.training:
            side.train()
    devices = gpus_of(model)
    found: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    with torch.random.fork_rng(devices), torch.enable_grad():
        for place in range(1 + MOST_ROUNDS):
            since = time.perf_counter()
            # Who comes first changes, and both have equal random numbers.
            for name in reversed(sides) if place % 2 else sides:
                torch.manual_seed(place)
                span = _step(sides[name], example, waits=bool(devices))
                if place:  # the first round is to warm up
                    found[name].append(span)
            now = time.perf_counter()
            if now + (now - since) > end:
                break
    return found


def _step(model: nn.Module, example: Any, *, waits: bool) -> float:
    """The seconds of one step."""
    model.zero_grad(set_to_none=True)
    given = cloned(example)
    if waits:
        torch.cuda.synchronize()
    started = time.perf_counter()
    outputs = [t for t in tensors_in(call(model, given)) if t.requires_grad]
    if outputs:
        torch.autograd.backward([t.mean() for t in outputs])
    if waits:
        torch.cuda.synchronize()
    return time.perf_counter() - started
