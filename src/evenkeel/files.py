"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import EvenkeelError

__all__ = ["whole"]


@contextmanager
def whole(
    path: Path, kind: type[EvenkeelError], text: str = "cannot be written: {}"
) -> Iterator[Path]:
    """A file beside the path, which takes its place if all goes well and is gone if not.

    Args:
        path: the file; an old one is there until then.
        kind: of the error.
        text: what the error says behind the path, with a place for the system's reason.

    Raises:
        EvenkeelError: of that kind: the disk is full, or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise kind(f"{path} {text.format(error.strerror or error)}") from error
    finally:
        with suppress(OSError):
            part.unlink()
