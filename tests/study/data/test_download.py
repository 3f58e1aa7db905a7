"""Downloads from servers that are good, cut off, lie, or are not there."""

import contextlib
import gzip
import hashlib
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pooch
import pytest

from evenkeel.errors import FormatError, StudyError
from evenkeel.study.data import download, load
from evenkeel.study.data.catalog import CIFAR10_ARCHIVE, FASHION_FILES, MNIST_FILES, Remote
from evenkeel.study.data.download import cache_folder, ensure, fetch

from .makers import idx_files
from .server import Behaviour, serve

CONTENT = random.Random(0).randbytes(400_000)
OTHER = random.Random(1).randbytes(400_000)
PART = "file.bin.part"


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy stands between us and our own server."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def _remote(*servers: Behaviour | str, content: bytes = CONTENT) -> Remote:
    urls = tuple(s if isinstance(s, str) else s.url for s in servers)
    return Remote("file.bin", hashlib.md5(content).hexdigest(), len(content), urls)


def _dead_url() -> str:
    """The address of a server that is not there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/file.bin"


def _kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_download_and_then_none(tmp_path: Path) -> None:
    with serve(Behaviour(CONTENT)) as server:
        path = fetch(_remote(server), tmp_path / "new" / "folder")
        assert path.read_bytes() == CONTENT
        assert fetch(_remote(server), path.parent) == path
        assert server.asked == [None]
    assert _kept(path.parent) == ["file.bin"]


def test_a_cut_connection_is_resumed_at_once(tmp_path: Path) -> None:
    with serve(Behaviour(CONTENT, cuts=[250_000, 100_000])) as server:
        assert fetch(_remote(server), tmp_path).read_bytes() == CONTENT
        starts = [int(asked.removeprefix("bytes=")[:-1]) for asked in server.asked[1:]]
    # What arrived counts, but for at most one block that was being read.
    assert len(starts) == 2
    assert 184_000 <= starts[0] <= 250_000
    assert starts[0] < starts[1] < 350_001


def test_what_came_before_an_outage_is_kept_for_the_next_run(tmp_path: Path) -> None:
    with serve(Behaviour(CONTENT, cuts=[200_000, 0])) as server:
        with pytest.raises(StudyError, match=r"cut off after .* of 400,000 bytes are kept for"):
            fetch(_remote(server), tmp_path)
        assert _kept(tmp_path) == [PART]
        assert fetch(_remote(server), tmp_path).read_bytes() == CONTENT
        assert server.asked[-1] == server.asked[-2]
        assert server.asked[-1] is not None
    assert _kept(tmp_path) == ["file.bin"]


def test_a_killed_process_is_resumed(tmp_path: Path) -> None:
    stall = threading.Event()
    with serve(Behaviour(CONTENT, cuts=[300_000], stall=stall)) as server:
        remote = _remote(server)
        code = (
            "from pathlib import Path\n"
            "from evenkeel.study.data.catalog import Remote\n"
            "from evenkeel.study.data.download import fetch\n"
            f"fetch({remote!r}, Path({str(tmp_path)!r}))"
        )
        child = subprocess.Popen([sys.executable, "-c", code])
        part = tmp_path / PART
        end = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > 200_000) and time.monotonic() < end:
            time.sleep(0.02)
        child.kill()
        child.wait()
        stall.set()
        assert part.stat().st_size > 200_000
        assert fetch(remote, tmp_path).read_bytes() == CONTENT
        assert server.asked == [None, f"bytes={server.asked[1].strip('bytes=-')}-"]
    # pooch's empty temporary file of the killed process may lie there too.
    assert "file.bin" in _kept(tmp_path)
    assert PART not in _kept(tmp_path)


def test_a_server_without_ranges_starts_again(tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(CONTENT[:1000])
    with serve(Behaviour(CONTENT, ranges=False)) as server:
        assert fetch(_remote(server), tmp_path).read_bytes() == CONTENT
        assert server.asked == ["bytes=1000-"]


@pytest.mark.parametrize(
    ("behaviour", "part"),
    [
        (Behaviour(CONTENT, shift=-1), CONTENT[:1000]),
        (Behaviour(CONTENT, shift=10**6), CONTENT[:1000]),
        (Behaviour(CONTENT), CONTENT + b"too long"),
        (Behaviour(CONTENT), OTHER[:1000]),
        (Behaviour(CONTENT), OTHER),
    ],
    ids=["wrong range", "416", "too long", "another file", "another whole file"],
)
def test_a_part_that_does_not_fit_is_thrown_away(
    tmp_path: Path, behaviour: Behaviour, part: bytes
) -> None:
    behaviour.asked.clear()
    (tmp_path / PART).write_bytes(part)
    with serve(behaviour) as server:
        assert fetch(_remote(server), tmp_path).read_bytes() == CONTENT
        assert server.asked[-1] is None
    assert _kept(tmp_path) == ["file.bin"]


def test_a_part_that_is_whole_needs_no_server(tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(CONTENT)
    assert fetch(_remote(_dead_url()), tmp_path).read_bytes() == CONTENT


def test_no_length_and_a_cut_is_no_end(tmp_path: Path) -> None:
    with serve(Behaviour(CONTENT, length=False, cuts=[300_000])) as server:
        assert fetch(_remote(server), tmp_path).read_bytes() == CONTENT
        assert len(server.asked) == 2


def test_an_encoding_of_the_server_changes_nothing(tmp_path: Path) -> None:
    packed = gzip.compress(CONTENT, mtime=0)
    with serve(Behaviour(packed, headers={"Content-Encoding": "gzip"})) as server:
        path = fetch(_remote(server, content=packed), tmp_path)
    assert path.read_bytes() == packed


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (OTHER, f"expected MD5 {hashlib.md5(CONTENT).hexdigest()}, found "),
        (b"<html>sign in</html>", f"found {hashlib.md5(b'<html>sign in</html>').hexdigest()}"),
        (CONTENT + b"x", "more than the 400,000 bytes of the file"),
    ],
)
def test_wrong_bytes_do_not_stay(tmp_path: Path, content: bytes, match: str) -> None:
    with serve(Behaviour(content)) as server:
        with pytest.raises(FormatError, match=match) as caught:
            fetch(_remote(server), tmp_path)
        assert server.url in str(caught.value)
    assert _kept(tmp_path) == []


def test_wrong_bytes_that_are_cut_off_end_after_two_rounds(tmp_path: Path) -> None:
    with serve(Behaviour(OTHER, cuts=[200_000, 400_000, 200_000, 400_000])) as server:
        with pytest.raises(FormatError, match="expected MD5"):
            fetch(_remote(server), tmp_path)
        assert len(server.asked) == 4
    assert _kept(tmp_path) == []


def test_a_damaged_file_in_the_cache_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(OTHER)
    with serve(Behaviour(CONTENT)) as server:
        assert fetch(_remote(server), tmp_path).read_bytes() == CONTENT


def test_the_next_mirror_goes_on_where_the_first_was_cut_off(tmp_path: Path) -> None:
    cut, wrong, good = Behaviour(CONTENT, cuts=[200_000, 0]), Behaviour(b"x"), Behaviour(CONTENT)
    with serve(cut), serve(wrong), serve(good):
        path = fetch(_remote(_dead_url(), cut, good, wrong), tmp_path)
        assert path.read_bytes() == CONTENT
        assert good.asked[0] == cut.asked[1]
        assert wrong.asked == []


def test_nobody_there(tmp_path: Path) -> None:
    urls = _dead_url(), _dead_url()
    with pytest.raises(StudyError, match="Connection refused") as caught:
        fetch(_remote(*urls), tmp_path)
    text = str(caught.value)
    assert text.startswith("file.bin could not be downloaded: ")
    assert all(url in text for url in urls)
    assert "--data-dir" in text
    assert _kept(tmp_path) == []


@pytest.mark.parametrize(("status", "match"), [(404, "HTTP status 404 Not Found"), (503, "503")])
def test_a_status_that_is_no_file(tmp_path: Path, status: int, match: str) -> None:
    (tmp_path / PART).write_bytes(CONTENT[:1000])
    with (
        serve(Behaviour(CONTENT, status=status)) as server,
        pytest.raises(StudyError, match=match),
    ):
        fetch(_remote(server), tmp_path)
    assert (tmp_path / PART).read_bytes() == CONTENT[:1000]


def test_a_url_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="could not be downloaded: nonsense"):
        fetch(_remote("nonsense"), tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match=r"cannot keep file.bin here .* set EVENKEEL_DATA"):
        fetch(_remote("http://127.0.0.1:1/x"), tmp_path / "file")


def test_two_at_once_download_once(tmp_path: Path) -> None:
    with serve(Behaviour(CONTENT)) as server:
        remote = _remote(server)
        threads = [threading.Thread(target=fetch, args=(remote, tmp_path)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.asked == [None]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level = pooch.get_logger().level
    with serve(Behaviour(CONTENT)) as server:
        fetch(_remote(server), tmp_path)
    assert pooch.get_logger().level == level
    assert capfd.readouterr() == ("", "")


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVENKEEL_DATA", str(tmp_path))
    assert cache_folder("mnist") == tmp_path / "mnist"
    monkeypatch.delenv("EVENKEEL_DATA")
    assert cache_folder("mnist") == Path(pooch.os_cache("evenkeel")) / "mnist"


def test_mnist_from_a_mirror_to_the_data_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EVENKEEL_DATA", str(tmp_path))
    with pytest.raises(StudyError, match=r"train-images.* is not there and downloading is off"):
        load("mnist", download=False)
    remotes = []
    with contextlib.ExitStack() as servers:
        for name, raw in idx_files().items():
            packed = gzip.compress(raw, mtime=0)
            url = servers.enter_context(serve(Behaviour(packed))).url
            md5 = hashlib.md5(packed).hexdigest()
            remotes.append(Remote(f"{name}.gz", md5, len(packed), (_dead_url(), url)))
        monkeypatch.setitem(download._FILES, "mnist", tuple(remotes))
        whole = load("mnist")
    assert whole.shape == (1, 4, 4)
    # The servers are gone; what is in the cache is enough.
    assert load("mnist").fingerprint == load("mnist", download=False).fingerprint
    (tmp_path / "mnist" / remotes[0].name).write_bytes(b"x")
    with pytest.raises(FormatError, match=f"has MD5 .*, expected {remotes[0].md5}"):
        ensure("mnist", download=False)


def test_the_catalog_is_whole() -> None:
    for files in (MNIST_FILES, FASHION_FILES):
        assert [f.name for f in files] == [f"{name}.gz" for name in idx_files()]
    for remote in (*MNIST_FILES, *FASHION_FILES, CIFAR10_ARCHIVE):
        assert len(bytes.fromhex(remote.md5)) == 16
        assert all(url.endswith(f"/{remote.name}") for url in remote.urls)
        assert remote.urls
