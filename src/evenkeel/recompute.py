"""Outputs of norms that are computed again in backward instead of being kept for it.

A norm keeps its input x for backward. The layer behind it keeps the norm's output y, which is as
large and nothing but a cheap function of x. Inside `recomputing` autograd is given a promise in y's
place, and backward computes y again, bit for bit. So of each norm's two tensors one stays.

The other tensors pass through as they are. Torch compares no versions of what passes through hooks,
so that is done here: a tensor that was changed in place raises what it raises without the hooks.
Hooks that are in force outside see all that is kept, what a promise needs included.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

__all__ = ["DEPTH", "active", "offer", "recomputing"]

DEPTH = 4
"""How many outputs in a row, each the residual of the next, are computed again from one another."""

_AUTOGRAD: Any = torch._C._autograd
_Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
_Form = tuple[Sequence[int], Sequence[int], int]
"""Sizes, strides and offset: which part of its memory a tensor is."""


class _Open(threading.local):
    """The regions that a thread is in, the innermost last. Torch's hooks are a thread's own too."""

    def __init__(self) -> None:
        self.regions: list[recomputing] = []


_OPEN = _Open()


def active() -> bool:
    """True inside `recomputing`: an output that is offered may be computed again."""
    return not torch.compiler.is_compiling() and bool(_OPEN.regions)


def offer(y: Tensor, again: Callable[..., Tensor], *inputs: Tensor | None) -> None:
    """Says how y can be computed again, should anything behind keep it for backward.

    An offer that nobody takes costs nothing, and none is made of a y without a graph: its input is
    kept by nobody. It ends with the life of y, or of the innermost `recomputing`.

    Args:
        y: an output, with its place in the graph; kept as usual unless it fills its memory.
        again: gives y's very bits, in its strides, from ``inputs``. It runs in backward, without
            grad, perhaps in another thread, and holds no other tensor.
        inputs: what ``again`` is called with, detached: tensors that backward keeps anyway, and
            perhaps a residual, which may be an offered output itself. None is handed on.
    """
    if active() and y.requires_grad:
        _OPEN.regions[-1]._offer(y, again, inputs)


class recomputing:  # noqa: N801 - a context manager, named like torch's
    """A context in which autograd keeps no output that was offered.

    ::

        with recomputing():
            loss = model(x)
        loss.backward()

    Nothing happens while a graph is captured (torch.compile, torch.jit.trace), under the transforms
    of torch.func, which allow no such hooks, and inside a user's own `saved_tensors_hooks`.

    Args:
        depth: how many outputs in a row, each the residual of the next, are computed again from one
            another. The first of them is then asked for all the others, which wait in memory for
            their own turn; so what is saved is needed again for a moment.
    """

    def __init__(self, depth: int = DEPTH) -> None:
        self.depth = depth
        self.offers: dict[int, _Offer] = {}
        self.outer: _Hooks | None = None
        self.hooks: _Hooks = (self._pack, _unpack)

    def __enter__(self) -> recomputing:
        if self in _OPEN.regions:
            raise RuntimeError("this recomputing() is entered already; make another one")
        if not _is_captured() and _AUTOGRAD._saved_tensors_hooks_is_enabled():
            self.outer = _top()
            _AUTOGRAD._push_saved_tensors_default_hooks(*self.hooks)
            _OPEN.regions.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        # Regions further in that were never left, for an interrupt came between, end here too.
        while self in _OPEN.regions:
            _OPEN.regions.pop()._end()

    def _end(self) -> None:
        self.offers.clear()
        top = _top()
        # If the block of the hooks outside was left first, it took ours in place of its own.
        if top is not None and top in (self.hooks, self.outer):
            _AUTOGRAD._pop_saved_tensors_default_hooks()

    def _offer(self, y: Tensor, again: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        if _top() != self.hooks:
            return  # other hooks are in force, such as those of a checkpoint: nothing comes here
        memory = y.untyped_storage()
        if y.numel() == 0 or memory.nbytes() != y.numel() * y.element_size():
            return  # a view may show more of the memory than y does
        before = [self._found(t) for t in inputs]
        depth = 1 + max((found.promise.depth for found in before if found is not None), default=0)
        if depth > self.depth:
            return
        needed = [
            None if t is None else _Kept(t) if found is None else _Ticket(found.promise, t)
            for t, found in zip(inputs, before, strict=True)
        ]
        key, offers = memory._cdata, self.offers
        alive = weakref.ref(y, lambda _: offers.pop(key, None))
        offers[key] = _Offer(alive, y._version, _Promise(y, again, needed, depth))

    def _found(self, t: Tensor | None) -> _Offer | None:
        """The offer whose output t is, or is a view of, if it was not changed since."""
        if not self.offers or type(t) is not Tensor or t.layout is not torch.strided:
            return None
        key = t.untyped_storage()._cdata
        found = self.offers.get(key)
        return found if found is not None and found.holds(key, t) else None

    def _pack(self, t: Tensor) -> _Packed:
        found = self._found(t)
        if found is None:
            return self._passed_on(t)
        promise = found.promise
        if self.outer is not None and not promise.is_taken:
            if not all(part.is_unchanged for part in promise.needed if type(part) is _Kept):
                return self._passed_on(t)
            promise.needed = [
                self._passed_on(part.tensor) if type(part) is _Kept else part
                for part in promise.needed
            ]
        promise.is_taken = True
        return _Ticket(promise, t)

    def _passed_on(self, t: Tensor) -> _Packed:
        return _Kept(t) if self.outer is None else _Elsewhere(t, self.outer)


class _Packed(Protocol):
    """What autograd holds in a tensor's place."""

    def value(self) -> Tensor: ...


class _Kept:
    """A tensor as it is, and the version that it must still have."""

    __slots__ = ("tensor", "version")

    def __init__(self, t: Tensor) -> None:
        # The tensor itself would close a circle: a node may keep its own output.
        self.tensor, self.version = t.detach(), t._version

    @property
    def is_unchanged(self) -> bool:
        return self.tensor._version == self.version

    def value(self) -> Tensor:
        if not self.is_unchanged:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: [{self.tensor.type()} {list(self.tensor.shape)}] is at "
                f"version {self.tensor._version}; expected version {self.version} instead; call "
                "backward before it is changed, or change a clone"
            )
        return self.tensor


class _Elsewhere:
    """What the hooks outside made of a tensor."""

    __slots__ = ("packed", "unpack")

    def __init__(self, t: Tensor, outer: _Hooks) -> None:
        pack, self.unpack = outer
        self.packed = pack(t)

    def value(self) -> Tensor:
        return self.unpack(self.packed)


class _Offer:
    """An output that can be promised, while it lives."""

    __slots__ = ("promise", "version", "y")

    def __init__(self, y: weakref.ref[Tensor], version: int, promise: _Promise) -> None:
        self.y, self.version, self.promise = y, version, promise

    def holds(self, key: int, t: Tensor) -> bool:
        """True if t is the output, or strides over it, with the bits as they were."""
        y = self.y()
        if y is None or y.untyped_storage()._cdata != key:
            return False  # the output was given other memory, and its own may be another's now
        return t._version == self.version and t.dtype == y.dtype and not t.is_neg()


class _Promise:
    """An output to be computed again, for all who keep it.

    Computed once it is held until everyone who keeps it has asked, or is gone; then it starts anew,
    for backward may be called again.
    """

    __slots__ = (
        "again", "depth", "dtype", "form", "is_taken", "needed", "nobody", "round", "stream",
        "tickets", "value", "version", "waiting",
    )  # fmt: skip

    def __init__(
        self, y: Tensor, again: Callable[..., Tensor], needed: list[Any], depth: int
    ) -> None:
        self.again, self.needed, self.depth = again, needed, depth
        self.form, self.dtype = _form(y), y.dtype
        self.is_taken = False
        self.tickets = self.waiting = self.round = 0
        self.value: Tensor | None = None
        self.version = 0
        self.stream: Any = None

    def computed(self) -> Tensor:
        value, stream = self.value, _stream(self.value)
        if value is None or value._version != self.version or stream != self.stream:
            with torch.no_grad():
                value = self.again(*[None if p is None else p.value() for p in self.needed])
            if _form(value) != self.form or value.dtype != self.dtype:
                raise RuntimeError(
                    f"an output of {self.dtype} and form {self.form} was computed again with "
                    f"{value.dtype} and {_form(value)}; `again` must give what it was offered for"
                )
            self.value, self.version, self.stream = value, value._version, _stream(value)
        return value

    def served(self) -> None:
        """One of those who keep it has asked, or is gone."""
        self.waiting -= 1
        if self.waiting <= 0:
            self.value = self.stream = None
            self.waiting = self.tickets
            self.round += 1


class _Ticket:
    """One who keeps a promised output, or a view of it."""

    __slots__ = ("form", "promise", "round")

    def __init__(self, promise: _Promise, t: Tensor) -> None:
        self.promise, self.round = promise, promise.round - 1
        form = _form(t)
        self.form = None if form == promise.form else form
        promise.tickets += 1
        promise.waiting += 1

    def value(self) -> Tensor:
        value = self.promise.computed()
        if self.round != self.promise.round:
            self.round = self.promise.round
            self.promise.served()
        return value if self.form is None else value.as_strided(*self.form)

    def __del__(self) -> None:
        self.promise.tickets -= 1
        if self.round != self.promise.round:
            self.promise.served()


def _unpack(packed: _Packed) -> Tensor:
    return packed.value()


def _form(t: Tensor) -> _Form:
    return t.shape, t.stride(), int(t.storage_offset())


def _stream(t: Tensor | None) -> Any:
    """Where the tensor is computed: another stream might read it before it is there."""
    return torch.cuda.current_stream(t.device) if t is not None and t.is_cuda else None


def _top() -> _Hooks | None:
    return cast("_Hooks | None", _AUTOGRAD._top_saved_tensors_default_hooks(True))


def _is_captured() -> bool:
    return torch.compiler.is_compiling() or bool(torch._C._get_tracing_state())
