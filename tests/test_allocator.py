"""glibc told to keep large blocks: the page faults tell whether it does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from evenkeel import allocator
from evenkeel.allocator import KEEP, SWITCH
from evenkeel.errors import ConfigError

CLEAN = {
    key: value
    for key, value in os.environ.items()
    if key not in allocator.variables(os.environ) and key not in (SWITCH, "LD_PRELOAD")
}
GLIBC = allocator.status().setting != "system"
glibc_only = pytest.mark.skipif(not GLIBC, reason="this process does not use glibc's allocator")

COUNT = """
import json, resource, threading
from evenkeel import allocator

def faults(size, blocks=1):
    def run(times):
        for _ in range(times):
            [b"x" * size for _ in range(blocks)]
    run(3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(4)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 4

found = []
"""
LARGE = 1 << 26
PAGES = LARGE // os.sysconf("SC_PAGE_SIZE") if GLIBC else 0


def run(program: str, **variables: str) -> list:
    """What a fresh process finds; its environment has no settings but these."""
    done = subprocess.run(
        [sys.executable, "-c", f"{COUNT}{program}\nprint(json.dumps(found))"],
        env=CLEAN | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def clean(monkeypatch):
    """This process's allocator as it comes, before and after."""
    for key in allocator.variables(os.environ):
        monkeypatch.delenv(key)
    monkeypatch.delenv(SWITCH, raising=False)
    allocator.default_blocks()
    yield
    allocator.default_blocks()


@glibc_only
class TestFaults:
    def test_they_stop_and_come_back(self):
        before, kept, again, after = run(
            f"found.append(faults({LARGE}))\n"
            f"allocator.keep_blocks(); found.append(faults({LARGE}))\n"
            f"allocator.keep_blocks(); found.append(faults({LARGE}))\n"
            f"allocator.default_blocks(); found.append(faults({LARGE}))\n"
        )
        assert before > 0.9 * PAGES
        assert kept < 0.01 * PAGES
        assert again < 0.01 * PAGES
        assert after > 0.9 * PAGES

    def test_run_time_is_as_good_as_the_environment(self):
        (run_time,) = run(f"allocator.keep_blocks(); found.append(faults({LARGE}))")
        (environment,) = run(f"found.append(faults({LARGE}))", **KEEP)
        assert max(run_time, environment) < 0.01 * PAGES

    def test_the_switch_turns_it_off(self):
        (off,) = run(
            f"allocator.keep_blocks(); found.append(faults({LARGE}))", EVENKEEL_ALLOCATOR="default"
        )
        assert off > 0.9 * PAGES

    def test_heaps_of_other_threads_are_kept_too(self):
        """Blocks that fill several heaps of an arena; an empty heap is given back by default."""
        program = (
            "def work():\n"
            f"    found.append(faults({3 * LARGE // 8}, 5))\n"
            "thread = threading.Thread(target=work); thread.start(); thread.join()\n"
        )
        (default,) = run(program)
        (kept,) = run("allocator.keep_blocks()\n" + program)
        assert default > 0.9 * PAGES
        assert kept < 0.01 * PAGES

    def test_the_way_back_gives_memory_back(self):
        program = (
            "def resident():\n"
            "    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
            "allocator.keep_blocks()\n"
            f"held = [b'x' * ({LARGE} + i) for i in range(4)]\n"
            "full = resident(); del held; kept = resident()\n"
            "allocator.default_blocks(); found += [full, kept, resident()]\n"
        )
        full, kept, after = run(program)
        assert full - kept < 0.1 * LARGE
        assert full - after > 3.9 * LARGE


@glibc_only
class TestStatus:
    def test_there_and_back(self, clean):
        assert allocator.status().setting == "default"
        assert not allocator.status().keeps
        found = allocator.keep_blocks()
        assert (found.setting, found.at_run_time, found.keeps) == ("keep", True, True)
        assert "set at run time" in found.text
        assert allocator.keep_blocks() == allocator.status() == found
        assert allocator.default_blocks().setting == "default"
        assert allocator.default_blocks() == allocator.status()
        assert allocator.keep_blocks() == found

    def test_import_sets_nothing(self):
        program = "import evenkeel.nn, evenkeel.surgery.accelerate\n"
        assert run(program + "found = allocator.status().setting") == "default"

    def test_the_environment_keeps_already(self):
        program = "for act in (allocator.keep_blocks, allocator.default_blocks):\n"
        program += "    found.append([act().setting, act().at_run_time, act().text])\n"
        text = "glibc keeps large blocks, set by the environment"
        assert run(program, **KEEP) == [["keep", False, text]] * 2

    @pytest.mark.parametrize(
        ("variables", "named"),
        [
            ({"MALLOC_ARENA_MAX": "2"}, "MALLOC_ARENA_MAX"),
            ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, "GLIBC_TUNABLES"),
            (KEEP | {"MALLOC_TOP_PAD_": "0"}, "MALLOC_TOP_PAD_"),
        ],
    )
    def test_the_users_own_settings_are_respected(self, variables, named):
        program = "state = allocator.keep_blocks(); found += [*vars(state).values()]\n"
        program += f"found.append(faults({LARGE}))"
        setting, text, at_run_time, _ = run(program, **variables)
        assert (setting, at_run_time) == ("own", False)
        assert named in text

    def test_tunables_of_something_else_do_not_count(self):
        setting = "found = allocator.keep_blocks().setting"
        assert run(setting, GLIBC_TUNABLES="glibc.pthread.rseq=0") == "keep"

    def test_the_switch(self, clean, monkeypatch):
        monkeypatch.setenv(SWITCH, "default")
        found = allocator.keep_blocks()
        assert (found.setting, found.text) == (
            "default",
            "glibc's default, as EVENKEEL_ALLOCATOR=default asks",
        )
        monkeypatch.setenv(SWITCH, "keep")
        assert allocator.keep_blocks().keeps

    def test_a_switch_that_does_not_exist(self, clean, monkeypatch):
        monkeypatch.setenv(SWITCH, "kep")
        with pytest.raises(ConfigError, match=r"EVENKEEL_ALLOCATOR=kep \(did you mean 'keep'"):
            allocator.keep_blocks()
        monkeypatch.delenv(SWITCH)
        assert not allocator.status().keeps

    def test_mallopt_that_refuses(self, clean, monkeypatch):
        told = []

        class Refuses:
            def mallopt(self, key, value):
                told.append((key, value))
                return int(key != -4)

            def malloc_trim(self, pad):
                raise AssertionError("nothing was kept")

        monkeypatch.setattr(allocator, "_glibc", Refuses)
        found = allocator.keep_blocks()
        assert found.setting == "default"
        assert "refuses" in found.text
        assert told[len(allocator._KEPT) :] == list(allocator._DEFAULT.items())


@glibc_only
class TestHugePages:
    """What /proc says of a process that holds one large block."""

    HOLD = (
        "import re\n"
        "def huge():\n"
        "    maps = open('/proc/self/smaps').read()\n"
        "    return sum(map(int, re.findall(r'AnonHugePages: +(\\d+)', maps))) << 10\n"
        f"held = b'x' * {LARGE}; before = huge(); del held\n"
        "text = allocator.keep_blocks().text\n"
        f"held = b'x' * {2 * LARGE}; found += [before, huge(), text]\n"
    )

    @pytest.mark.skipif(
        not GLIBC or not allocator._huge_pages_can_be_asked_for(),
        reason="this system does not give huge pages to programs that ask",
    )
    def test_they_are_asked_for(self):
        before, kept, text = run(self.HOLD)
        assert before == 0
        assert kept > 1.5 * LARGE
        assert text == "glibc keeps large blocks, set at run time, on huge pages"

    def test_the_way_back(self):
        program = "allocator.default_blocks()\n" * 2
        program += f"held = b'x' * {LARGE // 8}; found += [huge(), allocator.status().text]\n"
        *_, after, text = run(self.HOLD + "del held\n" + program)
        assert after < LARGE // 8
        assert text == "glibc's default"

    @pytest.mark.parametrize(
        ("enabled", "overcommit"),
        [("[always] madvise never", "0"), ("always [madvise] never", "2"), (None, "0")],
    )
    def test_they_are_not_asked_for(self, clean, monkeypatch, enabled, overcommit, tmp_path):
        if enabled is not None:
            (tmp_path / "enabled").write_text(enabled + "\n")
        (tmp_path / "overcommit").write_text(overcommit + "\n")
        monkeypatch.setattr(allocator, "_HUGE_PAGES", tmp_path / "enabled")
        monkeypatch.setattr(allocator, "_OVERCOMMIT", tmp_path / "overcommit")
        assert allocator.keep_blocks().text == "glibc keeps large blocks, set at run time"

    def test_a_process_of_limited_memory_keeps_its_room(self):
        limit = (
            "_, hard = resource.getrlimit(resource.RLIMIT_AS)\n"
            "resource.setrlimit(resource.RLIMIT_AS, (1 << 32, hard))\n"
        )
        _, kept, text = run(limit + self.HOLD)
        assert kept == 0
        assert text == "glibc keeps large blocks, set at run time"


@glibc_only
def test_an_allocator_that_was_preloaded_is_left_alone(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler here")
    source, library = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(
        "#include <stdlib.h>\n"
        "int posix_memalign(void **p, size_t to, size_t size)\n"
        "{ *p = aligned_alloc(to, (size + to - 1) / to * to); return *p ? 0 : 12; }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    program = "state = allocator.keep_blocks(); found += [*vars(state).values()]"
    setting, text, at_run_time = run(program, LD_PRELOAD=str(library))
    assert (setting, at_run_time) == ("system", False)
    assert str(library) in text

    harmless = tmp_path / "harmless.so"
    source.write_text("int nothing_of_malloc(void) { return 0; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", harmless, source], check=True)
    assert run("found = allocator.keep_blocks().setting", LD_PRELOAD=str(harmless)) == "keep"


@pytest.mark.parametrize("error", [OSError, TypeError, AttributeError])
def test_where_there_is_no_glibc(clean, monkeypatch, error):
    def fails(name):
        raise error("libc.so.6: cannot open shared object file")

    monkeypatch.setattr(allocator.ctypes, "CDLL", fails)
    assert allocator.status() == allocator.keep_blocks() == allocator.default_blocks()
    assert allocator.status().setting == "system"
    assert "nothing to set" in allocator.status().text


def test_names_of_settings():
    allocator.check("keep")
    allocator.check("default")
    with pytest.raises(ConfigError, match=r"'defualt' \(did you mean 'default'\?\)"):
        allocator.check("defualt")
