"""Weights to check a network with: a file or a dict, and the averaged ones that may be in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..errors import ConfigError, FormatError, first_line
from ..files import whole
from .facts import is_norm_module

__all__ = ["Checkpoint", "Loaded", "as_checkpoint", "load_into", "save"]

_STATES: Final = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "module")
_AVERAGED: Final = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "averaged", "swa", "swa_state_dict",
)  # fmt: skip
_PREFIXES: Final = ("module.", "_orig_mod.", "model.")
_WRAPPER: Final = re.compile(r"\A(?:module|_orig_mod|model)\.")
_STATISTICS: Final = ("running_mean", "running_var")

State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Tensors by name, and those of an averaged network (EMA, SWA) beside them, if there are."""

    name: str
    state: State
    averaged: State | None = None


@dataclass(frozen=True, eq=False)
class Loaded:
    """What a checkpoint did to a network.

    Attributes:
        missing: for each norm, which of its statistics the checkpoint does not have.
        checkpoint: the tensors, under the network's own names.
    """

    missing: dict[str, tuple[str, ...]]
    checkpoint: Checkpoint


def as_checkpoint(given: str | Path | Mapping[str, Any]) -> Checkpoint:
    """Reads a .safetensors file, a file of torch's (weights only, no code), or a dict.

    A dict may hold the tensors themselves, or one of several dicts by the usual names:
    'state_dict', 'model', and 'ema', 'state_dict_ema' and the like for averaged weights.

    Raises:
        FormatError: the file cannot be read, or holds no tensors.
    """
    if isinstance(given, str | Path):
        name, found = str(given), _read(Path(given))
    else:
        name, found = "the checkpoint", given
    states = {key: _tensors(found.get(key)) for key in (*_STATES, *_AVERAGED)}
    averaged = next((s for key in _AVERAGED if (s := states[key])), None)
    state = _tensors(found) or next((s for key in _STATES if (s := states[key])), None)
    if state is None:
        state, averaged = averaged, None
    if not state:
        raise FormatError(f"{name}: there are no tensors in it; give a state dict")
    return Checkpoint(name, state, averaged)


def load_into(model: nn.Module, checkpoint: Checkpoint) -> Loaded:
    """Gives the network the checkpoint's tensors, all but running statistics that it lacks.

    Raises:
        FormatError: a weight is missing or has another shape.
    """
    own = model.state_dict()
    state = _renamed(checkpoint.state, own)
    averaged = None if checkpoint.averaged is None else _renamed(checkpoint.averaged, own)
    statistics = _statistics(model)
    missing = [name for name in own if name not in state]
    lost = [name for name in missing if name not in statistics]
    if lost:
        raise FormatError(
            f"{checkpoint.name}: it has no {', '.join(lost[:3])}"
            f"{f' and {len(lost) - 3} more' if len(lost) > 3 else ''}; it is of another network"
        )
    for name, value in state.items():
        if name in own and own[name].shape != value.shape:
            raise FormatError(
                f"{checkpoint.name}: {name} is {tuple(value.shape)}, but the network's is "
                f"{tuple(own[name].shape)}"
            )
    model.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
    lacking: dict[str, tuple[str, ...]] = {}
    for name in missing:
        path, _, short = name.rpartition(".")
        if short in _STATISTICS:
            lacking[path] = (*lacking.get(path, ()), short)
    return Loaded(lacking, Checkpoint(checkpoint.name, state, averaged))


def save(path: Path, model: nn.Module) -> None:
    """Writes the network's tensors as .safetensors, whole or not at all.

    Raises:
        ConfigError: the file cannot be written; an old one is still there.
    """
    from safetensors.torch import save as as_bytes

    state = {name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}
    with whole(path, ConfigError) as part:
        part.write_bytes(as_bytes(state))


def _read(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        what = "it is a folder; give a file in it" if path.is_dir() else "there is no such file"
        raise FormatError(f"{path}: {what}")
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError) as error:
        raise FormatError(f"{path}: it cannot be read ({first_line(error)})") from error
    except Exception as error:
        raise FormatError(
            f"{path}: it is no file of tensors ({first_line(error)}); save network.state_dict(), "
            "best as .safetensors"
        ) from error
    if not isinstance(found, Mapping):
        raise FormatError(f"{path}: it holds a {type(found).__name__}, not tensors by name")
    return found


def _tensors(found: Any) -> State | None:
    """The dict if all of its values are tensors, or all but a few numbers."""
    if not isinstance(found, Mapping) or not found:
        return None
    kept = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    return kept if 2 * len(kept) > len(found) else None


def _renamed(state: State, own: Mapping[str, Tensor]) -> State:
    """The tensors under the network's names: wrappers put a word before each."""
    best, bare = state, state
    for _ in range(3):  # compiled and distributed, say
        for prefix in ("", *_PREFIXES):
            renamed = {f"{prefix}{name}": value for name, value in bare.items()}
            best = max(best, renamed, key=lambda s: len(s.keys() & own.keys()))
        bare = {_WRAPPER.sub("", name): value for name, value in bare.items()}
    return best


def _statistics(model: nn.Module) -> set[str]:
    """The names of all running statistics, and of the counts of batches."""
    names: set[str] = set()
    for path, module in model.named_modules():
        if is_norm_module(module):
            names |= {
                f"{path}.{name}" if path else name
                for name, _ in module.named_buffers(recurse=False)
            }
    return names
