"""The processes of torch.distributed that share one task: what each has made, in one order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ...errors import SurgeryError

__all__ = ["Together"]

T = TypeVar("T")


class Together:
    """The processes of a group.

    Args:
        group: a process group of torch.distributed; None for all processes if it runs, else this
            one alone; False for this one alone in any case.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.size, self.rank = 1, 0
        if group is not False and dist.is_available() and dist.is_initialized():
            self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def gather(self, make: Callable[[], T]) -> list[T]:
        """What ``make`` gave in each process, in the order of their ranks, the same for all.

        Where it fails in one process it fails in all, so that none waits for another for ever.

        Raises:
            SurgeryError: another process failed.
        """
        if self.size == 1:
            return [make()]
        made: T | None = None
        failed: Exception | None = None
        try:
            made = make()
        except Exception as error:
            failed = error
        said = None if failed is None else f"{type(failed).__name__}: {failed}"
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (said, made), group=self.group)
        if failed is not None:
            raise failed
        for rank, (text, _) in enumerate(found):
            if text is not None:
                raise SurgeryError(f"process {rank} failed: {text}; nothing was changed in any")
        return [given for _, given in found]
