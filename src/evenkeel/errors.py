"""Every error that evenkeel raises on purpose.

A message says what is wrong, where, what was found, and what to do. Each kind is also a builtin
kind, so that code which catches ``ValueError`` or ``RuntimeError`` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BackendError",
    "ConfigError",
    "EvenkeelError",
    "FormatError",
    "PatternError",
    "ShapeError",
    "StudyError",
    "SurgeryError",
    "first_line",
    "meant",
]


class EvenkeelError(Exception):
    """Base of all errors that evenkeel raises on purpose."""


class PatternError(EvenkeelError, ValueError):
    """A pattern that does not describe a normalization."""


class ShapeError(EvenkeelError, ValueError):
    """A tensor whose shape, dtype or number of values does not fit."""


class BackendError(EvenkeelError, RuntimeError):
    """A backend was asked for by name and cannot do what was asked."""


class SurgeryError(EvenkeelError, RuntimeError):
    """A model cannot be edited as asked; it is as it was before."""


class FormatError(EvenkeelError, ValueError):
    """A file that is not what it should be; nothing was loaded from it."""


class ConfigError(EvenkeelError, ValueError):
    """A name, option or configuration file that evenkeel does not understand."""


class StudyError(EvenkeelError, RuntimeError):
    """A study that cannot start or go on; finished trials are kept."""


def meant(word: str, choices: Iterable[str]) -> str:
    """What a mistyped name was probably meant to be, as an insertion for a message, or nothing."""
    close = difflib.get_close_matches(word, list(choices), 1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
