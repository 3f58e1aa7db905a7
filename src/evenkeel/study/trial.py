"""One trial: one arm trained with one seed, and everything that was measured on the way."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .. import __version__
from ..errors import EvenkeelError
from ..surgery.graph import is_activation
from .arms import Arm, Plan
from .data import Dataset
from .inference import compare
from .train import Feeder, evaluate, make_network, make_optimizer, train

__all__ = ["Trial", "run_trial"]

PERCENTILES = (0.15, 0.5, 0.85)
_PROBED = 256


@dataclass(frozen=True)
class Trial:
    """What a trial left behind.

    Attributes:
        key, arm, seed: which trial.
        status: 'ok', 'diverged' (a loss that is not finite ended it) or 'failed' (see ``error``).
        steps, accuracy, train_loss: the curve; accuracy is of test images, loss the mean since the
            point before.
        final: test accuracy on all test images behind the last step.
        percentiles: of one hidden unit's input on fixed test images, a triple for each point: 15,
            50 and 85 %, as in the paper's figure 1.
        inference: test accuracy with norms in each way of inference, and under 'fold' which norms
            folded and the largest difference of a logit of any test image; empty for an arm without
            norms, and where a way was refused, with the reason in ``error``.
        seconds: of training alone.
        provenance: versions, device, threads.
    """

    key: str
    arm: str
    seed: int
    status: str
    steps: tuple[int, ...] = ()
    accuracy: tuple[float, ...] = ()
    train_loss: tuple[float, ...] = ()
    final: float | None = None
    percentiles: tuple[tuple[float, float, float], ...] = ()
    inference: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def steps_to(self, target: float) -> int | None:
        """The first measured step with the target accuracy, or None."""
        pairs = zip(self.steps, self.accuracy, strict=True)
        return next((step for step, accuracy in pairs if accuracy >= target), None)

    def to_json(self) -> str:
        """The trial as text; what is not finite becomes null."""
        return json.dumps(_finite(asdict(self)))

    @classmethod
    def from_json(cls, text: str) -> Trial:
        """The trial that `to_json` wrote."""
        values = json.loads(text)
        for key in ("steps", "accuracy", "train_loss"):
            values[key] = tuple(math.nan if v is None else v for v in values[key])
        values["percentiles"] = tuple(
            tuple(math.nan if v is None else v for v in row) for row in values["percentiles"]
        )
        return cls(**values)


def run_trial(
    plan: Plan,
    arm: Arm,
    seed: int,
    dataset: Dataset,
    device: torch.device,
    progress: Callable[[int], None] = lambda step: None,
) -> Trial:
    """Trains the arm with the seed; the same seed on the same device gives the same trial."""
    feeder = Feeder(dataset, plan.data, arm.input_norm, device)
    network = make_network(arm, feeder, len(dataset.classes), seed)
    optimizer = make_optimizer(network, arm)
    total = plan.steps_of(arm)
    log = _Log(plan, network, feeder, total, progress)
    started = time.perf_counter()
    torch.manual_seed(seed)  # for networks of users that draw numbers, as dropout does
    last = train(network, optimizer, feeder.batches(arm.batch_size, seed), range(total), log.after)
    seconds = time.perf_counter() - started - log.seconds
    network.eval()
    diverged = not math.isfinite(log.loss)
    final = evaluate(network, feeder.test()).accuracy
    inference, refused = {}, ""
    if arm.has_norm and not diverged:
        try:
            inference = _four_ways(network, feeder, dataset.classes)
        except EvenkeelError as error:
            refused = str(error)  # the training is done and counts
    return Trial(
        key=plan.key(arm),
        arm=arm.name,
        seed=seed,
        status="diverged" if diverged else "ok",
        steps=tuple(log.steps),
        accuracy=tuple(log.accuracy),
        train_loss=tuple(log.losses),
        final=final,
        percentiles=tuple(log.percentiles),
        inference=inference,
        error=refused,
        seconds=round(seconds, 3),
        provenance=_provenance(device) | {"steps_done": last, "data": dataset.fingerprint},
    )


class _Log:
    """Takes the curve's points while the network trains."""

    def __init__(
        self,
        plan: Plan,
        network: fx.GraphModule,
        feeder: Feeder,
        total: int,
        progress: Callable[[int], None],
    ) -> None:
        self._plan, self._network, self._feeder, self._progress = plan, network, feeder, progress
        # Squared spacing: early steps are where the arms differ.
        raw = (math.ceil(total * ((i + 1) / plan.points) ** 2) for i in range(plan.points))
        self._wanted = set(raw)
        self._probe = _Probe(network, next(feeder.test(_PROBED))[0])
        self._recent: list[float] = []
        self.loss = 0.0
        self.seconds = 0.0
        self.steps: list[int] = []
        self.accuracy: list[float] = []
        self.losses: list[float] = []
        self.percentiles: list[tuple[float, float, float]] = []

    def after(self, step: int, loss: float) -> None:
        self.loss = loss
        self._recent.append(loss)
        if step not in self._wanted and math.isfinite(loss):
            return
        started = time.perf_counter()
        self._network.eval()
        score = evaluate(self._network, self._feeder.test(self._plan.curve_limit))
        self.steps.append(step)
        self.accuracy.append(score.accuracy)
        self.losses.append(sum(self._recent) / len(self._recent))
        self._recent.clear()
        self.percentiles += self._probe.read()
        self._network.train()
        self._progress(step)
        self.seconds += time.perf_counter() - started


class _Probe(fx.Interpreter):
    """Reads the distribution of one hidden unit's input: the input of the last activation.

    The unit is the middle one (of a map, its centre); its percentiles over fixed test images.
    """

    def __init__(self, network: fx.GraphModule, images: Tensor) -> None:
        super().__init__(network, garbage_collect_values=False)
        nodes = [node for node in network.graph.nodes if is_activation(node)]
        self._node = nodes[-1].all_input_nodes[0] if nodes else None
        self._images = images

    @torch.no_grad()
    def read(self) -> list[tuple[float, float, float]]:
        """One triple, or none if the network has no activation."""
        if self._node is None:
            return []
        self.run(self._images)
        value = self.env[self._node]
        unit = value[(slice(None), *(size // 2 for size in value.shape[1:]))].double()
        low, middle, high = unit.quantile(unit.new_tensor(PERCENTILES)).tolist()
        self.env = {}
        return [(low, middle, high)]


def _four_ways(network: fx.GraphModule, feeder: Feeder, classes: tuple[str, ...]) -> dict[str, Any]:
    """The trained network's test accuracy with each treatment of its norms."""
    ways: dict[str, Any] = {}
    for way, result in compare(network, feeder.test, classes):
        if isinstance(result, EvenkeelError):
            raise type(result)(f"inference, {way}: {result}") from result
        ways[way] = result.accuracy
        if result.fold is not None:
            seen = {"difference": result.difference, "scale": result.scale}
            ways["fold"] = result.fold.to_dict() | seen
    return ways


def _provenance(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "evenkeel": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
