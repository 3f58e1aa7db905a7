"""Looking at a network without changing it: a copy is run, and what norms see is kept.

The given network is never run, nor are its buffers, flags, hooks or the random numbers of torch,
Python and NumPy any different afterwards, whatever happens.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import SurgeryError, first_line
from ..surgery.accelerate import restore
from ..surgery.batch_norms import unwrapped
from ..surgery.draws import gpus_of
from ..surgery.examples import call, tensors_in
from .facts import NormFacts, norms_of
from .given import Data, Decay, batches_of, decays_of, doubled, samples_in
from .measure import Moments, moments
from .measured import Measured, Subject, measured
from .record import recorded, traced
from .walk import nodes_of
from .weights import Checkpoint, Loaded, load_into

__all__ = ["Observation", "observe"]


@dataclass
class Observation:
    """All that rules may ask for; what could not be had is None, and ``lacks`` says why.

    Attributes:
        norms: every norm by path, as it was given (with the checkpoint's weights, if any).
        training: the network's own flag.
        trains, infers: what is called in a forward of training and of inference.
        attempt: the same for a training forward that failed on its way.
        ran: True if ``trains`` is of a run, with shapes and moments.
        quiet: moments of the example at each norm with dropout off.
        samples: in the example.
        recounts: norms in checkpointed segments, and how often one step counts statistics.
        data, measured: batches of the user's, and the gap that they show.
        decays: what the optimizer does with norms.
        loaded: what a checkpoint brought.
        averaged: the number of models averaged, for torch's AveragedModel without its buffers.
        lacks: 'training', 'inference', 'run', 'data', 'measure', 'optimizer' or 'checkpoint', and
            the reason.
        remarks: for the reader.
    """

    norms: dict[str, NormFacts]
    training: bool
    trains: fx.Graph | None = None
    infers: fx.Graph | None = None
    attempt: fx.Graph | None = None
    ran: bool = False
    quiet: dict[str, Moments] = field(default_factory=dict)
    samples: int | None = None
    recounts: dict[str, float] = field(default_factory=dict)
    data: Data | None = None
    measured: Measured | None = None
    decays: dict[str, Decay] | None = None
    loaded: Loaded | None = None
    averaged: int | None = None
    lacks: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def batch_norms(self) -> list[NormFacts]:
        """The batch norms whose values can be read."""
        return [facts for facts in self.norms.values() if facts.batch and not facts.unread]

    @property
    def calls(self) -> fx.Graph | None:
        """The training forward, or as much of it as there was."""
        return self.trains if self.ran else self.attempt


def observe(
    model: nn.Module,
    example: Any = None,
    data: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    checkpoint: Checkpoint | None = None,
) -> Observation:
    """Everything about the network that rules ask for; see `evenkeel.check` for the arguments.

    Raises:
        SurgeryError: there is a checkpoint, and the network cannot be copied to take it.
        FormatError: the checkpoint is of another network.
    """
    inner = unwrapped(model)
    subject: Subject | None = None
    reason = ""
    try:
        own = restore(inner)
    except SurgeryError as error:
        if checkpoint is not None:
            raise
        own, reason = inner, str(error)
    loaded = None if checkpoint is None else load_into(own, checkpoint)
    seen = Observation(norms_of(own), inner.training, loaded=loaded)
    seen.averaged = _averaged(own)
    if optimizer is None:
        seen.lacks["optimizer"] = "give the optimizer"
    else:
        paths = [(path, inner.get_submodule(path)) for path in seen.norms]
        seen.decays = decays_of(optimizer, paths)
    if checkpoint is None:
        seen.lacks["checkpoint"] = "give a checkpoint"
    unread = [path for path, facts in seen.norms.items() if facts.unread]
    if unread:
        seen.remarks.append(
            f"{len(unread)} norms have no values yet (lazy, or on the meta device), the first of "
            f"them '{unread[0]}'; only what the network calls was checked for them"
        )
    with undisturbed(own):
        if data is not None:
            seen.data = batches_of(data, example)
            example = seen.data.inputs[0] if example is None else example
        if reason:
            seen.lacks |= dict.fromkeys(("training", "inference", "run", "measure"), reason)
        else:
            subject = Subject(own, seen.norms, inner.training)
            _look(seen, subject, example)
    if data is None:
        seen.lacks["data"] = seen.lacks["measure"] = "give data: a loader or a few batches"
    return seen


def _look(seen: Observation, subject: Subject, example: Any) -> None:
    """All runs that there is an input for; without one, traces."""
    if example is None:
        _trace(seen, subject)
        seen.lacks["run"] = "give an example input"
        return
    seen.samples = samples_in(example)
    inputs = subject.ready(doubled(example))
    _run(seen, subject, inputs)
    if seen.trains is None or seen.infers is None:
        _trace(seen, subject)
    if seen.data is not None:
        batches = [subject.ready(doubled(batch)) for batch in seen.data.inputs]
        found = measured(subject, batches)
        if isinstance(found, str):
            seen.lacks["measure"] = found
        else:
            seen.measured = found


def _run(seen: Observation, subject: Subject, inputs: Any) -> None:
    def look(path: str, x: Tensor) -> Moments | None:
        return moments(subject.norms[path], x) if path in subject.norms else None

    try:
        with subject.as_eval(), torch.no_grad():
            seen.infers, _ = recorded(subject.model, subject.fresh(inputs), look)
    except Exception as error:
        seen.lacks["inference"] = _why(error, "inference")
    try:
        with subject.as_train(seen.training), torch.enable_grad():
            seen.trains, _ = recorded(subject.model, subject.fresh(inputs), look)
        seen.ran = True
    except Exception as error:
        seen.lacks["training"] = seen.lacks["run"] = _why(error, "training")
        seen.attempt = getattr(error, "graph", None)
        return
    if any(node.meta.get("checkpointed") for node in nodes_of(seen.trains)):
        seen.recounts = _recounts(seen, subject, inputs)
    try:
        with subject.by_batch(), torch.no_grad(), subject.watching() as found:
            call(subject.model, subject.fresh(inputs))
        seen.quiet = {path: parts[0] for path, parts in found.items()}
    except Exception as error:
        seen.remarks.append(f"statistics without dropout were not had: {first_line(error)}")


def _trace(seen: Observation, subject: Subject) -> None:
    """What there is no run of, by torch.fx."""
    passes: list[tuple[str, Callable[[], Any]]] = [
        ("training", lambda: subject.as_train(seen.training)),
        ("inference", subject.as_eval),
    ]
    for need, mode in passes:
        if (seen.trains if need == "training" else seen.infers) is not None:
            continue
        try:
            with mode():
                graph = traced(subject.model)
        except Exception as error:
            reason = f"torch.fx cannot trace it ({first_line(error)})"
            before = seen.lacks.get(need)
            seen.lacks[need] = f"{before or 'give an example input'}; {reason}"
            continue
        seen.lacks.pop(need, None)
        if need == "training":
            seen.trains = graph
        else:
            seen.infers = graph


def _recounts(seen: Observation, subject: Subject, inputs: Any) -> dict[str, float]:
    """How often statistics are counted in one forward and backward, for checkpointed norms."""
    held = {n.target for n in nodes_of(seen.trains) if n.meta.get("checkpointed")}
    norms = {path: module for path, module in subject.modules.items() if path in held}
    calls = dict.fromkeys(norms, 0)
    hooks = [m.register_forward_pre_hook(_counter(calls, p)) for p, m in norms.items()]
    try:
        with subject.as_train(seen.training), torch.enable_grad():
            given = subject.fresh(inputs, learns=True)
            leaves = tensors_in(call(subject.model, given))
            once = dict(calls)
            before = {path: _statistics(module) for path, module in norms.items()}
            outputs = [t for t in leaves if t.requires_grad]
            torch.autograd.backward([t.float().sum() for t in outputs])
            moved = {p: not torch.equal(before[p], _statistics(m)) for p, m in norms.items()}
    except Exception as error:
        seen.remarks.append(f"checkpointed segments were not run backward: {first_line(error)}")
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return {path: calls[path] / max(once[path], 1) for path in norms if moved[path]}


def _counter(calls: dict[str, int], path: str) -> Callable[..., None]:
    def count(*_: Any) -> None:
        calls[path] += 1

    return count


def _statistics(module: nn.Module) -> Tensor:
    held = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    flat = [t.detach().double().flatten() for t in held if isinstance(t, Tensor)]
    return torch.cat(flat) if flat else torch.empty(0)


def _averaged(model: nn.Module) -> int | None:
    if not isinstance(model, torch.optim.swa_utils.AveragedModel) or model.use_buffers:
        return None
    count = model.n_averaged
    return int(count) if isinstance(count, Tensor) and int(count) > 0 else None


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Random numbers of torch, Python and NumPy are afterwards as before; no warnings meanwhile."""
    drawn = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(gpus_of(model)))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            torch.manual_seed(0)
            yield
        finally:
            random.setstate(drawn)
            if numpy is not None:
                numpy.random.set_state(state)


def _why(error: Exception, mode: str) -> str:
    return f"the network cannot run the example in {mode} ({first_line(error)})"
