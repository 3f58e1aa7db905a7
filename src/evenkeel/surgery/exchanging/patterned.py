"""Norms that have other statistics than a batch norm per channel: other patterns, other groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, ShapeError
from ...nn import Norm
from ...pattern import DEFAULT, Groups, NormSpec, parse
from .becoming import Already, Edit, become, edit_of, said, settings_of
from .kinds import Seen, channels_of, is_spatial, name_of_kind

__all__ = ["GroupCount", "grouped", "patterned"]

GroupCount = int | Callable[[int], int] | None
"""How many groups: a number, a function of the number of channels, or None for the default."""

ENOUGH = 16
"""The values that a group should have in a sample: of two the norm tells only which is larger."""

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_INSTANCE = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def grouped(to: str, path: str, norm: Any, seen: Seen, groups: GroupCount) -> Edit | str:
    """Group, layer or instance norm, with gamma and beta per channel."""
    channels = channels_of(norm)
    affine = norm.weight is not None
    places, text = seen.fewest_places(path, norm)
    count = {"layer": 1, "instance": channels}.get(to)
    if count is None:
        count = group_count(path, channels, groups, places)
    values = 0 if places is None else channels // count * places
    if values == 1:
        return (
            f"{text} each sample has one value in each of {count} groups, and the norm of one "
            "value is zero" + ("; give fewer groups" if to == "group" else "")
        )
    note = f"{path}: {text} a group has two values, whose norms are +-1" if values == 2 else None
    if to == "instance":
        rank = seen.rank(path, norm)
        if isinstance(rank, str):
            return rank
        kind = _INSTANCE.get(rank)
        if kind is None:
            return f"torch has no instance norm for inputs of {rank} dimensions"
        fresh: nn.Module = kind(channels, norm.eps, affine=affine, device="meta")
        becomes = name_of_kind(kind)
    else:
        fresh = nn.GroupNorm(count, channels, norm.eps, affine, device="meta")
        becomes = f"torch.nn.GroupNorm({count}, {channels})"
    buffers = dict.fromkeys(fresh._buffers)
    own = dict(norm._parameters)
    run = partial(become, norm, type(fresh), settings_of(fresh), own, buffers)
    return edit_of(path, norm, becomes, run, same=False, note=note)


def group_count(path: str, channels: int, groups: GroupCount, places: int | None) -> int:
    """How many groups: those given, or as many as make sense, 32 at most.

    A group then has two channels or more, and 16 values or more in a sample if the number of places
    is known, as it is behind a dense layer, where each channel has one.

    Raises:
        ConfigError: it does not divide the channels.
    """
    if groups is None:
        least = 2 if places is None else max(2, math.ceil(ENOUGH / max(places, 1)))
        fit = [g for g in range(1, 33) if channels % g == 0 and channels // g >= least]
        return max(fit, default=1)
    count = groups(channels) if callable(groups) else groups
    if not isinstance(count, int) or count < 1 or channels % count:
        raise ConfigError(
            f"groups={count!r} does not divide the {channels} channels of '{path}'; give a "
            "divisor, or a function of the number of channels"
        )
    return count


def patterned(spec: NormSpec, path: str, norm: Any, seen: Seen, groups: GroupCount) -> Edit | str:
    """A `Norm` of the pattern; gamma and beta stay, per channel if the owners are not."""
    own = _with_affine(spec, norm.weight is not None)
    if isinstance(norm, Norm) and norm.spec == own:
        return Already(f"it is {said(norm)} already")
    if not is_spatial(norm):
        return f"it is {said(norm)}, whose numbers are not per channel"
    channel = spec.axes[1]
    places, _ = seen.fewest_places(path, norm) if len(channel) > 1 else (None, "")
    sizes = _channel_sizes(spec, path, channels_of(norm), groups, places)
    found = _sizes(own, sizes, path, norm, seen)
    if isinstance(found, str):
        return found
    given: dict[str, Any] = {name: found[name] for name in own.fixed}
    given |= {name: sizes[name] for name in channel if len(channel) > 1}
    eps, momentum, tracks = norm.eps, norm.momentum, norm.track_running_stats
    fresh = Norm(
        str(own),
        own.affine_text,
        eps=eps,
        momentum=momentum,
        track_running_stats=tracks,
        device="meta",
        **given,
    )
    if fresh.weight is not None and fresh.weight.shape != norm.weight.shape and seen.ties(norm):
        return "its gamma and beta are also another module's, and would no longer be"
    remembers = norm.running_mean is not None and own.averages_batch
    carries = own.averages_batch and set(channel) <= _names(own.owners)
    spread = partial(_spread, channel=channel, sizes=found)
    run = partial(_to_pattern, norm, fresh, spread, carries)
    per_channel = own.owners == (channel,)
    becomes = f"evenkeel.{fresh!r}".partition(", eps=")[0] + ")"
    same = carries and (norm.running_mean is not None or per_channel)
    return edit_of(path, norm, becomes, run, same=same, fresh=remembers and not carries)


def _with_affine(spec: NormSpec, affine: bool) -> NormSpec:
    """The pattern with gamma and beta per owner if each channel is one, else per channel."""
    if not affine:
        return parse(str(spec), None)
    channel = spec.axes[1]
    if set(channel) <= _names(spec.owners):
        return parse(str(spec), DEFAULT)
    return parse(str(spec), channel[0] if len(channel) == 1 else f"({' '.join(channel)})")


def _names(groups: Groups) -> set[str]:
    return {name for group in groups for name in group}


def _channel_sizes(
    spec: NormSpec, path: str, channels: int, groups: GroupCount, places: int | None
) -> dict[str, int]:
    """The sizes of the axes that the channels are split into."""
    names = spec.axes[1]
    if len(names) == 1:
        return {names[0]: channels}
    first = next((name for name in names if name in _names(spec.owners)), names[0])
    count = group_count(path, channels, groups, places)
    return {name: count if name == first else channels // count for name in names}


def _sizes(
    spec: NormSpec, channel: dict[str, int], path: str, norm: Any, seen: Seen
) -> dict[str, int] | str:
    """The sizes of all axes that the norm must know, or why they cannot be known."""
    shapes = sorted(seen.shapes_of(path))
    others = [name for name in spec.fixed if name not in channel]
    if others and not shapes:
        return f"the example does not reach it, so the size of {', '.join(others)} is not known"
    found: list[dict[str, int]] = []
    for shape in shapes:
        try:
            bound = spec.bind(shape, channel)
        except ShapeError as error:
            return str(error)
        table = dict(zip(bound.names, bound.shape, strict=True))
        found.append({name: table[name] for name in others})
        if bound.count == 1 and not spec.averages_batch:
            return f"on {tuple(shape)} '{spec}' has one value per owner, whose norm is zero"
    if any(sizes != found[0] for sizes in found):
        text = " and ".join(str(tuple(shape)) for shape in shapes)
        return f"the example brings it {text}, and '{spec}' fixes the size of {', '.join(others)}"
    rank = None if shapes or ("...",) in spec.axes else seen.rank(path, norm)
    if isinstance(rank, int) and rank != len(spec.axes):
        return f"'{spec}' describes {len(spec.axes)} dimensions and its inputs have {rank}"
    return {**channel, **(found[0] if found else {})}


def _spread(
    vector: Tensor, groups: Groups, channel: tuple[str, ...], sizes: dict[str, int]
) -> Tensor:
    """A number per channel as one for each place of ``groups``; itself if the shapes are one."""
    names = [name for group in groups for name in group]
    start = [sizes[name] if name in channel else 1 for name in names]
    full = vector.detach().reshape(start).expand([sizes[name] for name in names])
    shape = [math.prod(sizes[name] for name in group) for group in groups]
    return vector if list(vector.shape) == shape else full.reshape(shape).clone()


def _to_pattern(norm: Any, fresh: Norm, spread: Callable[..., Tensor], carries: bool) -> None:
    spec = fresh.spec
    parameters: dict[str, Any] = {"weight": None, "bias": None}
    for name in parameters:
        old = norm._parameters.get(name)
        if old is not None and spec.affine is not None:
            new = spread(old, spec.affine)
            parameters[name] = old if new is old else nn.Parameter(new, old.requires_grad)
    buffers: dict[str, Any] = dict.fromkeys(_BUFFERS)
    if fresh.track_running_stats and norm.running_mean is not None:
        for name, start in (("running_mean", 0.0), ("running_var", 1.0)):
            old = getattr(norm, name)
            empty = torch.empty_like(getattr(fresh, name), dtype=old.dtype, device=old.device)
            buffers[name] = spread(old, spec.owners) if carries else empty.fill_(start)
        count = norm.num_batches_tracked
        buffers["num_batches_tracked"] = count if carries or count is None else count * 0
    become(norm, type(fresh), settings_of(fresh), parameters, buffers)
