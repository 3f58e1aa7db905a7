"""What goes into each norm of a network, measured over many batches without changing the network.

The moments of every call are taken by the backend's ``stats`` and joined by its ``merge``, in
float64. So they are those of all values at once, whatever the sizes of the batches: no batch's
variance is averaged with another's.

While it is measured the network is in inference mode, and each norm is handed the statistics to
normalize with as its running ones, in buffers that stand in for its own. Thus its own are never
written, nothing in it needs to train, and SyncBatchNorm runs anywhere.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import SurgeryError
from ...kernels.contract import Moments
from ...kernels.reference import Reference
from ...kernels.select import choose, load
from ...layouts import dense
from ...nn import Norm
from ...pattern import NormSpec, parse
from ...view import View
from ..batch_norms import titled
from ..draws import gpus_of

__all__ = ["Batches", "Meter", "by_batch", "call_order", "held", "merged", "moments_of", "only"]

_SPATIAL = parse("n c ... -> c")


class Meter:
    """One norm, what has gone into it, and the statistics that it normalizes with meanwhile.

    Attributes:
        total: moments of all values so far; of none before the first call.
        calls: how many calls brought values.
        batch: moments of the last call.
    """

    def __init__(self, path: str, norm: Any) -> None:
        self.norm, self.name = norm, titled(path, norm)
        self.mean, self.var = norm.running_mean.clone(), norm.running_var.clone()
        self.forget()

    def forget(self) -> None:
        """Back to no values."""
        zeros = torch.zeros_like(self.mean, dtype=torch.float64, device="cpu")
        self.total, self.calls = Moments(0, zeros, zeros), 0

    def take(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Moments:
        """Adds the values of one call; gives the moments of these alone.

        Raises:
            SurgeryError: they do not fit the norm.
        """
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise SurgeryError(f"'{self.name}' was given {what} where a floating tensor is needed")
        is_ours = isinstance(self.norm, Norm)
        spec, sizes = (self.norm.spec, self.norm.sizes) if is_ours else (_SPATIAL, {})
        found = moments_of(x, spec, sizes)
        if found.mean.shape != self.mean.shape:
            raise SurgeryError(
                f"'{self.name}' has statistics of shape {tuple(self.mean.shape)}, but those of "
                f"'{spec}' for an input of {tuple(x.shape)} have {tuple(found.mean.shape)}"
            )
        if found.n:
            parts = [self.total, found] if self.calls else [found]
            self.total, self.calls = Reference().merge(parts), self.calls + 1
        return found

    def use(self, moments: Moments, correction: int) -> None:
        """Normalizes with these from now on, the variance divided by ``n - correction``."""
        self.mean.copy_(moments.mean)
        self.var.copy_(moments.m2 / (moments.n - correction))


def moments_of(x: Tensor, spec: NormSpec, sizes: Mapping[str, int]) -> Moments:
    """Moments of each owner in float64, in the shape of the norm's statistics."""
    bound = spec.bind(tuple(x.shape), sizes)
    parts = x.detach().reshape(bound.shape)
    if x.device.type not in ("cpu", "cuda"):
        parts = parts.cpu()  # not every device has float64
    if parts.numel() == 0:
        nothing = torch.zeros(bound.stat_shape, dtype=torch.float64, device=parts.device)
        return Moments(0, nothing, nothing)
    parts, view = dense(parts, bound.kept)
    found = load(choose("auto", view, parts.dtype, parts.device).name).stats(parts, view)
    if found.mean.dtype != torch.float64:
        found = corrected(parts, view, found.mean)
    mean, m2 = (view.unfold_vector(t, parts.shape).reshape(bound.stat_shape) for t in found[1:])
    return Moments(found.n, mean, m2)


def corrected(x: Tensor, view: View, near: Tensor) -> Moments:
    """Moments in float64 from deviations in float32 from a number near the mean.

    ::

        d = x - near        mean = near + sum(d) / n        m2 = sum(d^2) - sum(d)^2 / n

    The last term is what a mean of few digits costs; it is small, so that nothing cancels.
    """
    shape = [size if place % 2 == 0 else 1 for place, size in enumerate(view.sizes)]
    d = view.fold(x).to(near.dtype) - near.reshape(shape)
    off = d.sum(view.reduced_dims, dtype=torch.float64)
    square = d.square().sum(view.reduced_dims, dtype=torch.float64)
    mean = near.double().reshape(off.shape) + off / view.count
    return Moments(view.count, mean, (square - off.square() / view.count).clamp_min(0))


def merged(parts: Iterable[Moments]) -> Moments:
    """Moments of the union, on the CPU, joined in the order given."""
    return Reference().merge([Moments(n, mean.cpu(), m2.cpu()) for n, mean, m2 in parts])


class Batches:
    """A loader and the way to run the network on what it gives.

    Args:
        model: the network.
        loader: gives a tensor, a tuple or list that begins with one, or a dict of the arguments.
        forward: ``forward(model, batch)`` instead.
        steps: at most so many batches; None for all.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        forward: Callable[[nn.Module, Any], Any] | None,
        steps: int | None,
    ) -> None:
        self.model, self.loader, self.forward, self.steps = model, loader, forward, steps
        homes = {t.device for t in (*model.parameters(), *model.buffers())}
        self.home = homes.pop() if len(homes) == 1 else None

    def run(self) -> Iterator[int]:
        """Runs the network on each batch, and gives the batch's number, from 1."""
        for number, batch in enumerate(islice(self.loader, self.steps), start=1):
            with suppress(_EnoughError):
                self._call(batch, number)
            yield number

    def _call(self, batch: Any, number: int) -> None:
        if self.forward is not None:
            self.forward(self.model, batch)
            return
        value = batch[0] if isinstance(batch, tuple | list) and batch else batch
        kind = type(self.model).__name__
        if isinstance(value, Tensor):
            self.model(self._moved(value))
        elif isinstance(value, Mapping):
            try:
                inspect.signature(self.model.forward).bind(**value)
            except TypeError as error:
                raise SurgeryError(
                    f"batch {number} is a dict of {', '.join(map(str, value))}, which {kind} does "
                    f"not take ({error}); give forward=lambda model, batch: model(batch['...'])"
                ) from error
            self.model(**self._moved(dict(value)))
        else:
            raise SurgeryError(
                f"batch {number} is of type {type(batch).__name__}, which holds no input that "
                f"{kind} could be called with; give forward=lambda model, batch: ..."
            )

    def _moved(self, value: Any) -> Any:
        if self.home is None:
            return value
        return pytree.tree_map_only(Tensor, lambda t: t.to(self.home), value)


class _EnoughError(BaseException):
    """The rest of the network need not run for this batch; no error, and caught where it ran."""


def by_batch(meters: Iterable[Meter], batches: Batches) -> int:
    """Measures every norm in one pass, each normalizing each batch by its own statistics.

    Returns:
        the number of batches.

    Raises:
        SurgeryError: a value is not finite, or a batch has one value per statistic.
    """
    number = 0
    called: list[tuple[Meter, Moments]] = []

    def take(meter: Meter, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found = meter.take(args, kwargs)
        if found.n == 1:
            raise SurgeryError(
                f"'{meter.name}' gets one value per statistic in batch {number + 1}, which has no "
                "variance to normalize by; use larger batches (drop_last=True for the last one), "
                "or propagate='population'"
            )
        if found.n:
            meter.use(found, 0)
            called.append((meter, found))

    with _watched(meters, take):
        for number in batches.run():
            _refuse_not_finite(called, number)
            called.clear()
    return number


def call_order(meters: list[Meter], batches: Batches) -> tuple[list[Meter], int]:
    """The norms in the order in which every batch calls them, and the number of batches.

    Each norm is measured as its running statistics are now, which is final for the first.

    Raises:
        SurgeryError: a norm is called twice, or the order changes.
    """
    order: list[Meter] = []
    number = 0
    called: list[tuple[Meter, Moments]] = []

    def take(meter: Meter, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if any(meter is other for other, _ in called):
            raise SurgeryError(
                f"'{meter.name}' is called twice in one forward, so its statistics may depend on "
                "themselves; use propagate='batch'"
            )
        called.append((meter, meter.take(args, kwargs)))

    with _watched(meters, take):
        for number in batches.run():
            order += [meter for meter, _ in called if meter not in order]
            places = [order.index(meter) for meter, _ in called]
            if places != sorted(places):
                raise SurgeryError(
                    f"batch {number} calls the norms in another order than those before it; use "
                    "propagate='batch'"
                )
            _refuse_not_finite(called[:1], number)
            called.clear()
    return order, number


def only(meter: Meter, batches: Batches) -> None:
    """Measures one norm, every other one using the statistics that it has; runs no further."""
    meter.forget()
    called: list[tuple[Meter, Moments]] = []

    def take(meter: Meter, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        called.append((meter, meter.take(args, kwargs)))
        raise _EnoughError

    with _watched([meter], take):
        for number in batches.run():
            _refuse_not_finite(called, number)
            called.clear()


@contextmanager
def _watched(
    meters: Iterable[Meter],
    take: Callable[[Meter, tuple[Any, ...], dict[str, Any]], None],
) -> Iterator[None]:
    """Calls ``take`` with what goes into each norm, just before the norm runs."""

    def hook_of(meter: Meter) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _, args, kwargs: take(meter, args, kwargs)

    with ExitStack() as stack:
        for meter in meters:
            handle = meter.norm.register_forward_pre_hook(hook_of(meter), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _refuse_not_finite(called: list[tuple[Meter, Moments]], number: int) -> None:
    if not called:
        return
    device = called[0][1].mean.device  # one answer, so that a GPU is waited for once
    sound = [(mean.sum() + m2.sum()).isfinite().to(device) for _, (_, mean, m2) in called]
    if not bool(torch.stack(sound).all()):
        name = next(m.name for (m, _), good in zip(called, sound, strict=True) if not bool(good))
        raise SurgeryError(
            f"the input of '{name}' has a value that is not finite in batch {number}; look for NaN "
            "and infinity in the data and the weights"
        )


@contextmanager
def held(model: nn.Module, meters: Iterable[Meter]) -> Iterator[None]:
    """The network in inference mode, the norms on stand-ins for their statistics, for a while.

    Whatever happens, all flags, buffers and random numbers are then as before, and each buffer is
    the tensor that it was.
    """
    flags = [(m, m.__dict__.get("training", m.training)) for m in model.modules()]
    own = [(m, dict(m._buffers)) for m in model.modules() if isinstance(m._buffers, dict)]
    values = [(tensor, tensor.clone()) for tensor in model.buffers()]
    compiled = any("_orig_mod" in m._modules or _is_compiled(m) for m in model.modules())
    with _same_random_numbers(model), torch.no_grad():
        # What is compiled already would not see the hooks.
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        try:
            for module, _ in flags:
                module.training = False
            for meter in meters:
                meter.norm._buffers.update(running_mean=meter.mean, running_var=meter.var)
            with eager:
                yield
        finally:
            for module, buffers in own:
                module._buffers.clear()
                module._buffers.update(buffers)
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
            for module, flag in flags:
                module.training = flag


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


@contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Random numbers go on behind this as if nothing had been drawn."""
    drawn, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(gpus_of(model)):
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(numbers)
