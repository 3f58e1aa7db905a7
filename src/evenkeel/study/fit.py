"""One training that can be stopped after any step and continued, to the same weights bit by bit.

Everything that the next step depends on is in one state file: weights, optimizer state, random
numbers, steps done. The learning rate and the order of the data follow from the number of steps.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.optim.lr_scheduler import LambdaLR

from ..errors import ConfigError, EvenkeelError, FormatError, StudyError, first_line
from ..surgery.introduce import Introduced
from . import container
from .checkpoint import Card, Epoch, card_from, card_of, rebuild, restore, save, tensors_of
from .data import Dataset
from .train import Batches, Feeder, evaluate, make_optimizer, network_for, train
from .training import Training

__all__ = ["DivergedError", "Fit", "State", "Step", "read_state", "state_path"]

_TIMED_STEPS: Final = 8
_TIMED_IMAGES: Final = 500
_NETWORK, _OPTIMIZER, _RANDOM = "network.", "optimizer.", "random."


class DivergedError(StudyError):
    """A loss is not finite."""


def state_path(path: Path) -> Path:
    """Where the state of an unfinished training is kept: beside the model that it will become."""
    stem = path.name.removesuffix(".safetensors")
    return path.with_name(f"{stem}.state.safetensors")


@dataclass(frozen=True)
class Step:
    """A step is done: how many there are now, and the loss of its batch before it."""

    done: int
    loss: float


@dataclass(frozen=True)
class State:
    """A training as it was stopped; `Fit.resume` goes on with it.

    Attributes:
        path: the file.
        card: what is trained, and the epochs that are finished.
        done: steps done.
        loss_sum: of the steps of the epoch that is not finished.
        plain: what the optimizer keeps that is no tensor, by ``number.key``.
        tensors: of the network, the optimizer and the random numbers.
    """

    path: Path
    card: Card
    done: int
    loss_sum: float
    plain: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name begins with the prefix, without it."""
        found = {n: v for n, v in self.tensors.items() if n.startswith(prefix)}
        return {name.removeprefix(prefix): value for name, value in found.items()}


def read_state(path: Path) -> State:
    """The state in a file that `Fit.save_state` wrote.

    Raises:
        FormatError: the file is not what it should be.
    """
    config, tensors = container.read(path, "training")
    progress = config.pop("progress", None)
    if not isinstance(progress, dict) or set(progress) != {"done", "loss_sum", "plain"}:
        raise FormatError(f"{path}: does not say how far the training got")
    kinds = {"done": int, "loss_sum": float, "plain": dict}
    for key, kind in kinds.items():
        if type(progress[key]) is not kind:
            raise FormatError(f"{path}: '{key}' is {progress[key]!r}, which is no {kind.__name__}")
    return State(path, card_from(path, config), tensors=tensors, **progress)


class Fit:
    """A training: its network, its optimizer, and how far it is.

    Attributes:
        network: in training mode while it runs, in inference mode behind each epoch.
        introduced: the norms that were put in, if any were.
        steps_per_epoch, total: steps.
        done: steps done.
        history: what each finished epoch ended with.
    """

    def __init__(self, training: Training, dataset: Dataset, device: torch.device) -> None:
        self.training, self.device = training, device
        arm = training.arm
        self.feeder = Feeder(dataset, training.data, arm.input_norm, device)
        self._card = card_of(training, dataset, self.feeder)
        example, classes = self.feeder.example(), len(dataset.classes)
        self.network: fx.GraphModule
        self.introduced: Introduced | None
        self.network, self.introduced = network_for(arm, example, classes, training.seed)
        tensors_of(self.network)  # fails before the training, not behind it
        self._optimizer = make_optimizer(self.network, arm)
        next(self.feeder.batches(arm.batch_size, training.seed))  # likewise
        self.steps_per_epoch = len(self.feeder.train_labels) // arm.batch_size
        self.total = training.epochs * self.steps_per_epoch
        self.done = 0
        self.history: list[Epoch] = []
        self._loss_sum = 0.0
        self._random: dict[str, Tensor] = {}
        self._runs = False

    @property
    def card(self) -> Card:
        """What is trained, with the epochs that are finished."""
        return replace(self._card, history=tuple(self.history))

    def run(self) -> Iterator[Step | Epoch]:
        """Trains to the end; yields each step and each epoch as it is done.

        Whenever something was yielded the training may be saved, and left.

        Raises:
            DivergedError: a loss is not finite; more steps would not mend that.
        """
        arm, seed = self.training.arm, self.training.seed
        self._seed_random()
        schedule = self._schedule()
        batches = self.feeder.batches(arm.batch_size, seed, self.done)
        while len(self.history) < self.training.epochs:
            end = (len(self.history) + 1) * self.steps_per_epoch
            while self.done < end:
                loss = self._step(batches)
                schedule.step()
                yield Step(self.done, loss)
            yield self._finish_epoch()

    def _step(self, batches: Batches) -> float:
        losses: list[float] = []
        steps = range(self.done, self.done + 1)
        train(self.network, self._optimizer, batches, steps, lambda _, loss: losses.append(loss))
        self._check("training loss", losses[0])
        self.done += 1
        self._loss_sum += losses[0]
        return losses[0]

    def _finish_epoch(self) -> Epoch:
        self.network.eval()
        score = evaluate(self.network, self.feeder.test())
        self._check("test loss", score.loss)
        mean = self._loss_sum / self.steps_per_epoch
        self.history.append(Epoch(mean, score.loss, score.accuracy))
        self._loss_sum = 0.0
        return self.history[-1]

    def _check(self, what: str, loss: float) -> None:
        if not math.isfinite(loss):
            raise DivergedError(
                f"the {what} is {loss} at step {self.done + 1:,} of {self.total:,}: the training "
                f"has diverged; choose a learning rate below {self.training.arm.learning_rate:g}"
            )

    def _schedule(self) -> LambdaLR:
        """The schedule at the steps done; the rates follow from their number alone."""
        for group in self._optimizer.param_groups:
            group["initial_lr"] = self.training.arm.learning_rate
        rate, total = self.training.rate, self.total
        return LambdaLR(self._optimizer, lambda step: rate(step, total), self.done - 1)

    def save(self, path: Path) -> None:
        """Writes the trained network."""
        save(path, self.network, self.card)

    # --- the state of an unfinished training ---------------------------------------------------

    def save_state(self, path: Path) -> None:
        """Writes all that the next step depends on, whole or not at all."""
        tensors = {f"{_NETWORK}{name}": value for name, value in tensors_of(self.network).items()}
        plain: dict[str, Any] = {}
        for name, value in _state_of(self._optimizer).items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{name}"] = value
            elif value is None or isinstance(value, bool | int | float):
                plain[name] = value
            else:
                raise StudyError(
                    f"{type(self._optimizer).__name__} keeps '{name}', of type "
                    f"{type(value).__name__}, which cannot be saved; choose another optimizer"
                )
        random = self._drawn() if self._runs else self._random
        tensors |= {f"{_RANDOM}{name}": value for name, value in random.items()}
        progress = {"done": self.done, "loss_sum": float(self._loss_sum), "plain": plain}
        container.write(path, "training", self.card.to_dict() | {"progress": progress}, tensors)

    @classmethod
    def resume(
        cls, state: State, dataset: Dataset, device: torch.device, *, model: str | None = None
    ) -> Fit:
        """A training that goes on where the state was taken.

        Args:
            state: what `read_state` gave.
            dataset: the same data set as before, perhaps from another folder.
            device: where to train; the bits are the same only on the same device.
            model: ``package.module:factory`` if the network is the user's own.

        Raises:
            FormatError: the state does not fit its training, or the data is another.
            ConfigError: the network is the user's own, and not the one that was named.
        """
        path, card = state.path, state.card
        if dataset.fingerprint != card.data:
            raise FormatError(
                f"{path}: was trained on {card.training.data.name} with fingerprint {card.data}, "
                f"but this data has {dataset.fingerprint}; give the same data, or train anew"
            )
        weights = state.part(_NETWORK)
        rebuild(path, card, weights, model)
        fit = cls(card.training, dataset, device)
        if replace(card, history=()) != replace(fit.card, version=card.version):
            raise FormatError(f"{path}: its config does not agree with its data or its network")
        per_epoch, epochs = fit.steps_per_epoch, len(card.history)
        if not epochs * per_epoch <= state.done <= min((epochs + 1) * per_epoch, fit.total):
            raise FormatError(f"{path}: {state.done} steps done do not fit {epochs} epochs")
        fit._restore_optimizer(state)
        fit._restore_random(state)
        restore(path, fit.network, weights)
        fit.done, fit.history, fit._loss_sum = state.done, list(card.history), state.loss_sum
        return fit

    def _restore_optimizer(self, state: State) -> None:
        found: dict[str, Any] = {**state.part(_OPTIMIZER), **state.plain}
        wanted = _layout(self._stepped_twin()[1]) if state.done else {}
        if {name: _kind(value) for name, value in found.items()} != wanted:
            raise FormatError(
                f"{state.path}: the optimizer's state does not fit {self.training.arm.optimizer} "
                "for this network; train anew with --overwrite"
            )
        by_number: dict[int, dict[str, Any]] = {}
        for name, value in found.items():
            number, _, key = name.partition(".")
            by_number.setdefault(int(number), {})[key] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": by_number, "param_groups": groups})

    def _stepped_twin(self, steps: int = 1) -> tuple[list[float], torch.optim.Optimizer]:
        """Trains a copy: the clock behind each step, and the copy's optimizer."""
        arm, seed = self.training.arm, self.training.seed
        marks: list[float] = []
        with torch.random.fork_rng(devices=_cuda(self.device)):
            twin = copy.deepcopy(self.network)
            optimizer = make_optimizer(twin, arm)
            batches = self.feeder.batches(arm.batch_size, seed)
            try:
                train(
                    twin,
                    optimizer,
                    batches,
                    range(steps),
                    lambda step, loss: marks.append(time.perf_counter()),
                )
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                if isinstance(error, EvenkeelError):
                    raise
                raise ConfigError(
                    f"'{arm.model}' cannot train on images of shape {self._card.shape}: "
                    f"{type(error).__name__}: {first_line(error)}"
                ) from error
        return marks, optimizer

    def seconds_left(self) -> float:
        """About how long the rest takes: a copy of the network trains a little, and is scored."""
        marks, _ = self._stepped_twin(_TIMED_STEPS)
        gaps = sorted(b - a for a, b in pairwise(marks)) or [0.0]
        training = self.network.training
        self.network.eval()
        images = min(_TIMED_IMAGES, len(self.feeder.test_labels))
        started = time.perf_counter()
        evaluate(self.network, self.feeder.test(images))
        score = (time.perf_counter() - started) * len(self.feeder.test_labels) / images
        self.network.train(training)
        epochs = self.training.epochs - len(self.history)
        return gaps[len(gaps) // 2] * (self.total - self.done) + score * epochs

    # --- random numbers, for networks that draw some, as dropout does ----------------------------

    def _seed_random(self) -> None:
        self._runs = True
        if not self._random:
            torch.manual_seed(self.training.seed)
            return
        torch.set_rng_state(self._random["cpu"])
        if self.device.type == "cuda" and "cuda" in self._random:
            torch.cuda.set_rng_state(self._random["cuda"], self.device)

    def _restore_random(self, state: State) -> None:
        found = state.part(_RANDOM)
        try:
            if found or state.done:
                torch.Generator().set_state(found["cpu"])
            if self.device.type == "cuda" and "cuda" in found:
                torch.Generator(self.device).set_state(found["cuda"])
        except (KeyError, RuntimeError, TypeError) as error:
            raise FormatError(
                f"{state.path}: the state of the random numbers cannot be used ({error})"
            ) from error
        self._random = found

    def _drawn(self) -> dict[str, Tensor]:
        """The state of the random numbers."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state


def _state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state, flat: by ``number of the parameter.key``."""
    state = optimizer.state_dict()["state"]
    return {f"{n}.{key}": value for n, values in state.items() for key, value in values.items()}


def _layout(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {name: _kind(value) for name, value in _state_of(optimizer).items()}


def _kind(value: Any) -> Any:
    """What two values of an optimizer's state must have in common."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return type(value)


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
