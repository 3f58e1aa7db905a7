"""Darknet's .cfg: sections of options, read as its own parser reads them, but nothing guessed.

Where Darknet goes on with a default behind a message (a line without '=', a word in place of a
number), this raises `FormatError` with the file and the line. Source: src/parser.c, src/utils.c and
src/option_list.c of pjreddie/darknet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from ...errors import FormatError

__all__ = ["Section", "parse", "read", "text_of"]

N = TypeVar("N", int, float)

_LARGEST: Final = 2**22
"""Bytes of a .cfg; YOLOv4's has 13,000."""

_DIGITS: Final = 40
_MOST: Final = 1000
"""Numbers in a list."""
_ALIASES: Final = {
    "avg": "avgpool", "conn": "connected", "conv": "convolutional", "lrn": "normalization",
    "max": "maxpool", "network": "net", "soft": "softmax",
}  # fmt: skip
_INTEGER: Final = re.compile(r"[+-]?\d+")
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Section:
    """One section: its name without brackets and alias, and its options in their order.

    Attributes:
        name: such as ``convolutional``.
        options: the texts behind the keys.
        where: the file and the line, for messages.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    where: str = ""

    def integer(self, key: str, default: int) -> int:
        """A whole number; what follows its digits is not read, as C's atoi has it."""
        return self._number(key, default, _INTEGER, int, "whole number")

    def number(self, key: str, default: float) -> float:
        """A number; what follows it is not read, as C's atof has it."""
        return self._number(key, default, _NUMBER, float, "number")

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers between commas; empty where the key is missing."""
        if key not in self.options:
            return ()
        text = self.options[key].partition("#")[0]
        found = [_INTEGER.match(part) for part in text.split(",")]
        if not all(found) or len(found) > _MOST:
            raise self.error(f"{key}={self.options[key][:80]} is no list of whole numbers")
        return tuple(self._bounded(key, int(match[0][:_DIGITS])) for match in found if match)

    def at_least(self, key: str, default: int, least: int) -> int:
        """A whole number that makes no sense below a bound."""
        value = self.integer(key, default)
        if value < least:
            raise self.error(f"{key}={value}, but it must be {least} or more")
        return value

    def error(self, text: str) -> FormatError:
        """An error that says where."""
        return FormatError(f"{self.where or 'the network'} [{self.name}]: {text}")

    def _number(
        self, key: str, default: N, pattern: re.Pattern[str], kind: type[N], what: str
    ) -> N:
        if key not in self.options:
            return default
        match = pattern.match(self.options[key])
        if not match:
            raise self.error(f"{key}={self.options[key][:80]} is no {what}")
        return self._bounded(key, kind(match[0][:_DIGITS]))

    def _bounded(self, key: str, value: N) -> N:
        if abs(value) >= 2**31:
            raise self.error(f"{key} is {value:g}, more than Darknet can count")
        return value


def read(path: Path) -> list[Section]:
    """The sections of a file, [net] first.

    Raises:
        FormatError: there is no such file, or it is no .cfg.
    """
    try:
        if not path.is_file():
            what = "it is a folder; give a .cfg in it" if path.is_dir() else "there is no such file"
            raise FormatError(f"{path}: {what}")
        if path.stat().st_size > _LARGEST:
            raise FormatError(f"{path}: over {_LARGEST:,} bytes are no .cfg")
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: it cannot be read ({error.strerror or error})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:  # in a comment, say; what counts is ASCII
        text = data.decode("latin-1")
    return parse(text, str(path))


def parse(text: str, name: str = "the .cfg") -> list[Section]:
    """The sections in a text, [net] first.

    Spaces, tabs and carriage returns mean nothing anywhere; lines that begin with '#' or ';' are
    comments; of two equal keys the first counts.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        FormatError: it does not begin with [net], or a line is neither section nor option.
    """
    found: list[tuple[str, dict[str, str], str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        bare = re.sub(r"\s", "", line)
        where = f"{name}, line {number}"
        if not bare or bare[0] in "#;":
            continue
        if bare[0] == "[":
            if bare[-1] != "]":
                raise FormatError(f"{where}: '{line.strip()}' has no closing bracket")
            section = bare[1:-1]
            found.append((_ALIASES.get(section, section), {}, where))
            continue
        key, _, value = bare.partition("=")
        if not key or not value:
            raise FormatError(f"{where}: '{line.strip()}' is neither [section] nor key=value")
        if not found:
            raise FormatError(f"{where}: '{line.strip()}' stands before the first section")
        found[-1][1].setdefault(key, value)
    sections = [Section(*entry) for entry in found]
    if not sections or sections[0].name != "net":
        raise FormatError(f"{name}: it does not begin with [net]; is it a Darknet .cfg?")
    return sections


def text_of(sections: Iterable[Section]) -> str:
    """A .cfg with these sections, one option a line."""
    return "\n".join(
        "\n".join((f"[{s.name}]", *(f"{key}={value}" for key, value in s.options.items()), ""))
        for s in sections
    )
