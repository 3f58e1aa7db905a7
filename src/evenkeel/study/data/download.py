"""Downloads into the cache: resumed when cut off, and never taken for good without its checksum.

pooch keeps the files and verifies their checksums. Our downloader for it writes into a ``.part``
file that outlives an interruption, and asks the server for the rest only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pooch
import requests
import urllib3
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ...errors import FormatError, StudyError
from .catalog import CIFAR10_ARCHIVE, FASHION_FILES, MNIST_FILES, Remote

__all__ = ["cache_folder", "ensure", "fetch"]

_FILES: Final[dict[str, tuple[Remote, ...]]] = {
    "mnist": MNIST_FILES,
    "fashion-mnist": FASHION_FILES,
    "cifar10": (CIFAR10_ARCHIVE,),
}
_TIMEOUT: Final = (10.0, 30.0)  # seconds to connect, and between two reads
_CHUNK: Final = 2**16
_MOST_CUTS: Final = 20


def cache_folder(name: str) -> Path:
    """Where the files of a data set are kept: below $EVENKEEL_DATA or the user's cache folder."""
    root = os.environ.get("EVENKEEL_DATA") or pooch.os_cache("evenkeel")
    return Path(root).expanduser() / name


def ensure(name: str, download: bool) -> Path:
    """The cache folder of a data set, with all its files in it and verified.

    Raises:
        StudyError: a file is missing and cannot or may not be downloaded.
        FormatError: a file does not have the checksum that it must have.
    """
    folder = cache_folder(name)
    for remote in _FILES[name]:
        if download:
            fetch(remote, folder)
        else:
            _verify(remote, folder)
    return folder


def _verify(remote: Remote, folder: Path) -> None:
    path = folder / remote.name
    advice = "allow the download, or give --data-dir"
    if not path.is_file():
        raise StudyError(f"{path} is not there and downloading is off; {advice}")
    found = pooch.file_hash(path, alg="md5")
    if found != remote.md5:
        raise FormatError(f"{path} has MD5 {found}, expected {remote.md5}; {advice}")


def fetch(remote: Remote, folder: Path) -> Path:
    """The path of a file in ``folder``, downloaded if it is not there with the right checksum.

    The mirrors are tried in order. Several processes may ask for one file; one of them downloads.

    Raises:
        StudyError: no mirror could be reached, or the file cannot be written.
        FormatError: what the mirrors sent does not have the right checksum.
    """
    problems: list[str] = []
    wrong = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), _quiet_pooch():
            for url in remote.urls:
                try:
                    return _from_mirror(url, remote, folder)
                except _WrongBytesError as problem:
                    wrong = True
                    problems.append(f"{url}: {problem}")
                except _UnreachableError as problem:
                    problems.append(f"{url}: {problem}")
    except OSError as error:
        raise StudyError(
            f"{folder}: cannot keep {remote.name} here ({error.strerror or error}); "
            "set EVENKEEL_DATA to another folder"
        ) from error
    kept = _size(folder / f"{remote.name}.part")
    rest = f"; {kept:,} of {remote.size:,} bytes are kept for the next try" if kept else ""
    raise (FormatError if wrong else StudyError)(
        f"{remote.name} could not be downloaded: {'; '.join(problems)}{rest}; try again later, or "
        "fetch it by hand and give its folder with --data-dir"
    )


class _UnreachableError(Exception):
    """A mirror that does not give the file."""


class _WrongBytesError(Exception):
    """A mirror that gives another file."""


class _CutOffError(Exception):
    """A connection that ended before the file did."""


def _from_mirror(url: str, remote: Remote, folder: Path, *, again: bool = True) -> Path:
    """Downloads from one mirror; once more from the start if what was kept did not fit."""
    resume = _Resume(remote, folder)
    try:
        path = pooch.retrieve(
            url,
            known_hash=f"md5:{remote.md5}",
            fname=remote.name,
            path=folder,
            downloader=resume,
        )
        return Path(path)
    except ValueError as error:  # what pooch says to a wrong checksum
        if not (again and resume.resumed):
            raise _WrongBytesError(f"expected MD5 {remote.md5}, found {resume.found}") from error
    return _from_mirror(url, remote, folder, again=False)


class _Resume:
    """A downloader for pooch that goes on where the last one was cut off.

    Attributes:
        resumed: whether bytes of an earlier connection are in the file.
        found: the MD5 of the whole file.
    """

    def __init__(self, remote: Remote, folder: Path) -> None:
        self._remote = remote
        self._part = folder / f"{remote.name}.part"
        self.resumed = False
        self.found = ""

    def __call__(self, url: str, output_file: str, pooch: object) -> None:
        """Downloads ``url`` into ``output_file``; pooch verifies it afterwards."""
        with _progress() as bar:
            task = bar.add_task(self._remote.name, total=self._remote.size)
            for _ in range(_MOST_CUTS):
                before = _size(self._part)
                try:
                    self._connect(url, bar, task)
                    break
                except _CutOffError as cut:
                    if _size(self._part) <= before:
                        raise _UnreachableError(str(cut)) from cut
            else:
                raise _UnreachableError(f"the connection was cut {_MOST_CUTS} times")
        self.found = _md5(self._part)
        # Moved in any case: a file with the wrong checksum must not be resumed.
        os.replace(self._part, output_file)

    def _connect(self, url: str, bar: Progress, task: Any) -> None:
        """One connection: asks for what is missing and appends it."""
        have = _size(self._part)
        if have == self._remote.size:
            self.resumed = True
            return None
        # A server that packs once more, or unpacks, would change the bytes.
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
                start = self._start(response, have)
                if start is None:
                    self._part.unlink()
                    return self._connect(url, bar, task)
                self._store(response, start, bar, task)
        except requests.RequestException as error:
            raise _UnreachableError(_reason(error)) from error
        return None

    def _start(self, response: requests.Response, have: int) -> int | None:
        """Where in the file the answer begins; None if what we have must be thrown away."""
        if response.status_code == 200:
            return 0
        if response.status_code == 206 and have:
            range_ = response.headers.get("Content-Range", "")
            return (
                have
                if range_ == f"bytes {have}-{self._remote.size - 1}/{self._remote.size}"
                else None
            )
        if response.status_code == 416 and have:
            return None
        raise _UnreachableError(f"HTTP status {response.status_code} {response.reason}".rstrip())

    def _store(self, response: requests.Response, start: int, bar: Progress, task: Any) -> None:
        """Writes the body behind the first ``start`` bytes of the part file."""
        self.resumed = start > 0
        done = start
        with self._part.open("ab" if start else "wb") as file:
            try:
                for chunk in response.raw.stream(_CHUNK, decode_content=False):
                    done += len(chunk)
                    if done > self._remote.size:
                        break
                    file.write(chunk)
                    bar.update(task, completed=done)
            except (urllib3.exceptions.HTTPError, ConnectionError) as error:
                raise _CutOffError(f"cut off after {done:,} bytes ({_reason(error)})") from error
        if done > self._remote.size:
            self._part.unlink()
            raise _WrongBytesError(f"more than the {self._remote.size:,} bytes of the file")
        if done < _end(response, start, self._remote.size):
            raise _CutOffError(f"cut off after {done:,} bytes")


def _end(response: requests.Response, start: int, size: int) -> int:
    """How many bytes the file must have when this answer is over."""
    length = response.headers.get("Content-Length", "")
    if length.isdecimal():
        return start + int(length)
    # Chunks say where they end. Without either, an end may be no more than a cut.
    return start if "Transfer-Encoding" in response.headers else size


def _reason(error: Exception) -> str:
    """The innermost cause of an error of the network, in a few words."""
    inner: BaseException = error
    while inner.__cause__ or inner.__context__:
        inner = inner.__cause__ or inner.__context__ or inner
    text = getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
    return str(text)[:200]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(path: Path) -> str:
    return str(pooch.file_hash(path, alg="md5"))


def _progress() -> Progress:
    """A progress bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def _quiet_pooch() -> Iterator[None]:
    """Keeps pooch from writing its own lines between ours."""
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes out while one downloads into the folder, where locks exist."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (folder / ".lock").open("w") as lock:
        # Some network folders have no locks; then two downloads may clash and fail the checksum.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
