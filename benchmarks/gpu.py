"""All that only an NVIDIA GPU can tell, in one call: tests, times, a check of memory.

    python benchmarks/gpu.py [--out DIR] [--minutes 8] [--only PHASE ...]

Each phase is a process of its own with a limit of time; the next one starts whatever became of it,
and what a phase leaves of its time goes to those behind it. DIR gets what was printed (gpu.log),
what the tests have seen of cuDNN (seen.txt), and the files of `evenkeel bench`. Run it from a
checkout; evenkeel need not be installed, nor its native kernels built. The end is 0 if every phase
went well, 1 if not, 2 where there is no GPU.

The numbers alone, with torch.compile beside every norm, for which the tests leave no time:

    python benchmarks/gpu.py --only steps --only compiled --only ops
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
NET, BATCH, SIZE = "resnet50", 256, 224
CASES = 64
"""How many `bench ops` has for that network: 16 shapes, two layouts, two dtypes."""
LEAST = 30.0
"""Seconds for any phase while there are so many: torch alone takes some to load."""
STARTED = time.time()
GRACE = 15.0
"""Seconds that a phase has to end by itself when it is told to."""


@dataclass(frozen=True)
class Phase:
    """One process: what it is for, its share of the time, and what can be said of its output."""

    name: str
    what: str
    share: float
    command: list[str]
    told: Callable[[str], str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a phase."""

    name: str
    result: str
    told: str
    seconds: float
    is_good: bool


def main() -> int:
    """Runs the phases that are asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8, help="for all together, at most")
    only = {"action": "append", "metavar": "PHASE", "help": ", ".join(SHARES)}
    parser.add_argument("--only", choices=SHARES, **only)
    parser.add_argument("--serve", choices=SERVED, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        SERVED[given.serve]()
        return 0
    if not 0.5 <= given.minutes < 1e4:
        parser.error(f"--minutes is {given.minutes:g}; give half a minute or more")
    start = time.monotonic()
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {given.out} cannot be made: {error}")
    machine = probed()
    if isinstance(machine, str):
        print(f"error: {machine}", file=sys.stderr)
        return 2
    chosen = phases(given.out.resolve(), machine["gpu"]["name"], given.minutes, given.only)
    announce(chosen, machine, given.minutes)
    # To append, for what a phase has started may still write when the next one begins.
    with (given.out / "gpu.log").open("a+", encoding="utf-8", errors="replace") as log:
        log.truncate(0)
        found = carried_out(chosen, start + 60 * given.minutes - GRACE, log)
        log.seek(0)
        seen = [line for line in log if line.startswith("seen:")]
        if seen:
            (given.out / "seen.txt").write_text("".join(seen), encoding="utf-8")
        table = "\n".join(rows_of(found))
        log.write(f"\n{table}\n")
    print(f"\n{table}\n\nall that was printed: {given.out / 'gpu.log'}")
    return 0 if len(found) == len(chosen) and all(one.is_good for one in found) else 1


def there(module: str) -> bool:
    """True if a module can be imported."""
    return importlib.util.find_spec(module) is not None


INSTALLED = there("evenkeel")
"""Before the checkout is put on the path."""


SHARES = {
    "environment": 0.04, "tests": 0.25, "steps": 0.15, "ops": 0.15, "compiled": 0.33,
    "sanitizer": 0.08,
}  # fmt: skip
"""Of the time. First what is new, then the numbers; steps beside torch.compile, which takes
minutes, are a phase of their own, for the numbers of a phase count as a whole."""
COMPILED = 0.5
"""The norms' share where torch.compile is timed too, which takes seconds for each to compile."""


def phases(out: Path, gpu: str, minutes: float, only: Sequence[str] | None) -> list[Phase]:
    """The phases in their order, for a GPU of that name."""
    python, slug = sys.executable, slug_of(gpu)
    compiles = only is not None and "tests" not in only
    shares = {**SHARES, "ops": COMPILED if compiles else SHARES["ops"]}
    own = [python, str(Path(__file__).resolve()), "--serve"]
    bench = [python, "-m", "evenkeel", "bench"]
    of_net = ["--device", "cuda", "--net", NET, "--batch", str(BATCH)]
    kinds = {"ops": "ops", "steps": "steps", "compiled": "steps-compiled"}
    files = {name: out / f"{kind}-{slug}.json" for name, kind in kinds.items()}
    # Of a case's time two thirds go to kernels that are compiled, to inputs and comparisons.
    seconds = min(1.0, max(0.1, 60 * minutes * SHARES["ops"] / CASES - 0.9))
    beside = ("with", "--compile") if compiles else ("without", "--no-compile")
    steps = [*of_net, "--size", str(SIZE), "--dtype", "bfloat16", "--layout", "channels_last"]
    steps += ["--seconds", "8"]
    found = {
        "environment": ("versions, and what works here", [*own, "environment"], said),
        "tests": ("every test that needs a GPU", tests(), tested),
        "steps": (
            f"training steps of {NET} at {SIZE}x{SIZE}",
            [*bench, "steps", *steps, "--no-compile", "--out", str(files["steps"])],
            lambda _: measured(files["steps"]),
        ),
        "ops": (
            f"every batch norm of {NET}, {beside[0]} torch.compile",
            [*bench, "ops", *of_net, beside[1], "--seconds", f"{seconds:.2g}", "--out",
             str(files["ops"])],
            lambda _: measured(files["ops"]),
        ),
        "compiled": (
            "the same steps, eager and compiled",
            [*bench, "steps", *steps, "--out", str(files["compiled"])],
            lambda _: measured(files["compiled"]),
        ),
        "sanitizer": ("a few Triton calls under compute-sanitizer", sanitizer(own), checked),
    }  # fmt: skip
    more = {
        "tests": {"TORCHINDUCTOR_COMPILE_THREADS": "2"},  # in each of many processes
        "sanitizer": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # each tensor a block of its own
    }
    return [
        Phase(name, what, shares[name], command, told, more.get(name, {}))
        for name, (what, command, told) in found.items()
        if only is None or name in only
    ]


MARKED = re.compile(r"^ *(?:@|pytestmark = )pytest\.mark\.gpu$", re.MULTILINE)
NEEDS = {"study": "safetensors"}
"""By folder of tests, a package without which they cannot even be collected."""
ELSEWHERE = ("tests/bench/test_steps.py",)
"""What takes minutes here, and is looked at by another phase too."""


def tests() -> list[str]:
    """Pytest on the files that have such tests alone: others may need what is not installed."""
    folder = ROOT / "tests"
    files = sorted(p for p in folder.rglob("test_*.py") if MARKED.search(p.read_text("utf-8")))
    missing = [name for name, needed in NEEDS.items() if not there(needed)]
    files = [p for p in files if p.relative_to(folder).parts[0] not in missing]
    files = [p for p in files if str(p.relative_to(ROOT)) not in ELSEWHERE]
    # Of plugins only ours: one that is there by chance may not get on with the others.
    words = ["-p", "pytest_timeout"] if there("pytest_timeout") else []
    if there("xdist"):
        words += ["-p", "xdist.plugin", "-n", str(min(16, os.cpu_count() or 1))]
        words += ["--dist", "worksteal"]  # or tests wait behind one that compiles for a minute
    # Here a warning is only shown, so that each test says all that it can.
    words += ["-W", "default", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-raP", *words]
    return [*command, *(str(p.relative_to(ROOT)) for p in files)]


def sanitizer(own: Sequence[str]) -> list[str]:
    """Nothing where there is no compute-sanitizer."""
    found = shutil.which("compute-sanitizer")
    return [found, "--error-exitcode", "9", *own, "sanitizer"] if found else []


def slug_of(gpu: str) -> str:
    """A GPU's name as part of a file's: h200 for NVIDIA H200."""
    words = re.findall(r"[a-z0-9]+", gpu.lower())
    return "-".join(word for word in words if word != "nvidia") or "gpu"


def probed() -> dict[str, Any] | str:
    """The machine as `evenkeel.bench` names it, or why nothing can be run."""
    words = [sys.executable, str(Path(__file__).resolve()), "--serve", "machine"]
    try:
        done = subprocess.run(  # noqa: S603
            words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return "torch does not answer within 120 s; see whether nvidia-smi does"
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or [""]
    if done.returncode:
        return f"torch and evenkeel cannot be loaded from {ROOT}: {lines[-1]}"
    machine: dict[str, Any] = json.loads(lines[-1])
    if machine["gpu"] is None:
        return (
            f"torch {machine['torch']} finds no CUDA device here; run this on a machine with an "
            "NVIDIA GPU, with a CUDA build of torch"
        )
    return machine


def environment() -> dict[str, str]:
    """The environment of every phase: the checkout on the path if evenkeel is not installed."""
    found = {**os.environ, "COLUMNS": "100", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if not INSTALLED:
        paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return found


def announce(chosen: Sequence[Phase], machine: dict[str, Any], minutes: float) -> None:
    """Says what will be done and how long it may take."""
    print(f"{machine['gpu']['name']}, torch {machine['torch']}; at most {minutes:g} minutes")
    whole = sum(phase.share for phase in chosen)
    for phase in chosen:
        limit = max(60 * minutes * phase.share / whole, LEAST)
        print(f"  {phase.name}: {phase.what}, about {limit:.0f} s at most", flush=True)


def carried_out(chosen: Sequence[Phase], deadline: float, log: IO[str]) -> list[Outcome]:
    """Runs one phase after another; Ctrl-C ends the one that runs, and all behind it."""
    found: list[Outcome] = []
    for place, phase in enumerate(chosen):
        remaining = max(0.0, deadline - time.monotonic())
        share = remaining * phase.share / sum(other.share for other in chosen[place:])
        limit = min(remaining, max(share, LEAST))
        print(f"{phase.name} ...", flush=True)
        try:
            found.append(ran(phase, limit, log))
        except KeyboardInterrupt:
            print("stopped")
            break
        one = found[-1]
        print(f"  {one.result}: {one.told} ({one.seconds:.0f} s)", flush=True)
    return found


def ran(phase: Phase, limit: float, log: IO[str]) -> Outcome:
    """Runs one phase, and shows the end of what it printed if it failed."""
    if not phase.command:
        return Outcome(phase.name, "left out", "it is not on the PATH", 0.0, True)
    log.write(f"\n==== {phase.name}, {limit:.0f} s: {shlex.join(phase.command)}\n")
    log.flush()
    begin, start = log.tell(), time.monotonic()
    process = subprocess.Popen(  # noqa: S603
        phase.command, cwd=ROOT, env=environment() | phase.environment, stdout=log,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        code = process.wait(limit)
        result = "ok" if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        result = f"stopped after {limit:.0f} s"
    finally:
        end(process)
    seconds = time.monotonic() - start
    log.seek(begin)
    text = log.read()
    if result != "ok":
        print("\n".join(f"  | {line}" for line in text.strip().splitlines()[-25:]), flush=True)
    return Outcome(phase.name, result, phase.told(text), seconds, result == "ok")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it has started: as Ctrl-C does, so that it says what it has."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return (text.strip().splitlines() or ["nothing was printed"])[-1].strip()[:100]


def said(text: str) -> str:
    """The first line of the environment, which is all versions; the last one of a failure."""
    first = (text.strip().splitlines() or ["nothing was printed"])[0][:100]
    return last_line(text) if first.startswith("Traceback") else first


def tested(text: str) -> str:
    """Pytest's own count."""
    counts = re.findall(r"^.*\b\d+ (?:passed|failed|errors?|skipped)\b.*$", text, re.MULTILINE)
    return counts[-1].strip("= ") if counts else last_line(text)


def measured(file: Path) -> str:
    """How many rows a result file has, and what ours takes over the others."""
    from_source()
    from evenkeel.bench.results import OURS_COMPILED, Results, geometric_means
    from evenkeel.errors import FormatError

    if not file.exists() or file.stat().st_mtime < STARTED:
        return "no numbers"
    try:
        found = Results.from_json(file.read_text(encoding="utf-8"))
    except FormatError as error:
        return str(error)
    means = {f"ours / {peer}": mean for peer, mean in geometric_means(found.rows).items()}
    for row in found.rows:
        if {OURS_COMPILED, "compile"} <= {*row.sides}:
            ratio = row.sides[OURS_COMPILED].median / row.sides["compile"].median
            means["ours compiled / compile"] = ratio
    whole = "" if found.finished else ", not all"
    absent = sorted({side for row in found.rows for side in row.absent})
    parts = [f"{name} {mean:.2f}" for name, mean in means.items()]
    parts += [f"{', '.join(absent)} missing"] if absent else []
    return "; ".join([f"{len(found.rows)} rows{whole}", *parts])


def checked(text: str) -> str:
    """What the sanitizer has found."""
    found = re.findall(r"ERROR SUMMARY: .*", text)
    return found[-1] if found else last_line(text)


def rows_of(found: Sequence[Outcome]) -> Iterator[str]:
    """The table at the end."""
    yield f"{'phase':13}{'seconds':>8}  {'result':22}what came out"
    for one in found:
        yield f"{one.name:13}{one.seconds:8.0f}  {one.result:22}{one.told}"


def from_source() -> None:
    """Makes evenkeel importable from the checkout, where it is not installed."""
    if not INSTALLED and str(ROOT / "src") not in sys.path:
        sys.path.insert(0, str(ROOT / "src"))


def serve_machine() -> None:
    """One line of JSON."""
    from evenkeel.bench.machine import machine

    print(json.dumps(machine()))


def serve_environment() -> None:
    """Versions, what `evenkeel doctor` finds, and the machine."""
    from evenkeel.bench.checkup import findings
    from evenkeel.bench.machine import machine

    found = machine()
    gpu = found["gpu"]
    versions = (f"{name} {gpu[name]}" for name in ("triton", "cudnn", "cuda"))
    print(gpu["name"], f"driver {driver()}", f"torch {found['torch']}", *versions, sep=", ")
    print(*(f"{finding.topic}: {finding.text}" for finding in findings()), sep="\n")
    print(json.dumps(found, indent=1))


def driver() -> str:
    """The version of NVIDIA's driver."""
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)  # noqa: S603
        return done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def small_calls(device: str = "cuda", backend: str = "triton") -> None:
    """Calls of sizes at which a block ends inside a tensor and a tensor inside a block."""
    import torch

    from evenkeel import batch_norm

    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    cases = {(5, 13, 7, 9): float32, (64, 40, 7, 7): bfloat16, (3, 3, 65, 67): float16}
    layouts = (torch.contiguous_format, torch.channels_last)
    for layout, (shape, dtype) in itertools.product(layouts, cases.items()):
        given = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        x, residual = (t.contiguous(memory_format=layout).requires_grad_() for t in given)
        own = torch.ones(shape[1], device=device, requires_grad=True)
        running = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
        options = {"activation": "relu", "residual": residual, "backend": backend}
        for training in (True, False):
            y = batch_norm(x, own, own, *running, training=training, **options)
            y.float().square().sum().backward()
        print(f"ran {shape} {dtype} {layout}, {float(x.grad.sum()):.3g}", flush=True)


SERVED = {"machine": serve_machine, "environment": serve_environment, "sanitizer": small_calls}

if __name__ == "__main__":
    sys.exit(main())
