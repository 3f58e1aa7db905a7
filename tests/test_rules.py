"""The rules of the house: layers, light imports, budgets, public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import evenkeel

SOURCE = Path(evenkeel.__file__).parent
LAYERS = (
    ("errors",),
    ("pattern", "view", "conventions", "allocator", "files"),
    ("layouts",),
    ("kernels",),
    ("plainly",),
    ("ops", "cudnn"),
    ("recompute",),
    ("direct",),
    ("functional",),
    ("nn",),
    ("formats",),
    ("surgery",),
    ("checks",),
    ("study",),
    ("report",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
HEAVY = ("triton", "plotly", "onnx", "keras", "matplotlib", "sklearn", "scipy", "PIL", "typer")


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py"))


def imports(tree: ast.Module, module: str, is_package: bool) -> set[str]:
    """The full names of evenkeel's modules that a module imports when it runs."""
    found: set[str] = set()
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            found.add(".".join([*base, *(node.module or "").split(".")]).strip("."))
    return {name for name in found if name.startswith("evenkeel.")}


def wrong_arrows(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of a room that is not below the importer's own."""
    own = module.split(".")[1]
    wrong = []
    for name in imports(ast.parse(source), module, is_package):
        room = name.split(".")[1]
        if room != own and RANK[room] >= RANK[own]:
            wrong.append(f"{module} imports {name}")
    return wrong


def name_of(path: Path) -> tuple[str, bool]:
    parts = ["evenkeel", *path.relative_to(SOURCE).with_suffix("").parts]
    is_package = parts[-1] == "__init__"
    return ".".join(parts[:-1] if is_package else parts), is_package


def test_arrows_point_down_the_layers():
    wrong = []
    for path in modules():
        module, is_package = name_of(path)
        if module != "evenkeel":
            wrong += wrong_arrows(path.read_text(), module, is_package)
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "module", "count"),
    [
        ("from ..nn import Norm", "evenkeel.kernels.reference", 1),
        ("import evenkeel.study.arms", "evenkeel.surgery.fold", 1),
        ("from ..view import View", "evenkeel.kernels.reference", 0),
        ("from .conventions import lookup", "evenkeel.pattern", 1),
        ("from ...surgery.fold import fold", "evenkeel.formats.darknet.saving", 1),
        ("def f():\n    from ..report.page import render", "evenkeel.study.run", 1),
        ("if TYPE_CHECKING:\n    from ..report import page", "evenkeel.study.run", 0),
    ],
)
def test_the_layer_test_sees_wrong_arrows(source, module, count):
    assert len(wrong_arrows(source, module)) == count


def test_the_cudnn_binding_knows_only_errors():
    for path in sorted((SOURCE / "kernels" / "cudnn_api").glob("*.py")):
        names = imports(ast.parse(path.read_text()), *name_of(path))
        others = {n for n in names if not n.startswith("evenkeel.kernels.cudnn_api")}
        assert others <= {"evenkeel.errors"}, f"{path.name} imports {others}"


def test_every_room_has_a_layer():
    assert {name_of(path)[0].split(".")[1] for path in modules() if path.parent != SOURCE} | {
        path.stem for path in SOURCE.glob("*.py") if path.stem != "__init__"
    } == set(RANK)


def loaded_by(statement: str) -> set[str]:
    """The heavy modules that a fresh interpreter has loaded behind a statement."""
    program = f"{statement}\nimport sys\nprint(*sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in done.stdout.split()}


def test_import_is_light():
    assert not loaded_by("import evenkeel") & {*HEAVY, "torch", "numpy"}


def test_the_library_loads_no_tools():
    rooms = ("functional", "nn", "surgery.accelerate", "surgery.fold", "surgery.introduce")
    loaded = loaded_by("; ".join(f"import evenkeel.{room}" for room in (*rooms, "checks.fix")))
    assert "torch" in loaded
    assert not loaded & set(HEAVY)


def test_the_command_line_is_there_without_a_script():
    words = [sys.executable, "-m", "evenkeel", "--version"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"evenkeel {evenkeel.__version__}\n")


def test_help_needs_no_torch():
    assert not loaded_by("import evenkeel.cli") & {"torch", "numpy", "plotly", "scipy"}


def test_the_import_test_sees_what_is_loaded():
    assert "plotly" in loaded_by("import plotly")


def test_import_touches_no_gpu():
    program = "import evenkeel.nn, torch; print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_files_and_functions_stay_small():
    long = []
    lengths = {path: len(path.read_text().splitlines()) for path in modules()}
    for path, length in lengths.items():
        if length > 400:
            long.append(f"{path.relative_to(SOURCE)} has {length} lines, 400 are allowed")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and code_lines(node) > 60:
                long.append(f"{path.relative_to(SOURCE)}:{node.name} has over 60 lines")
    longest = sorted(lengths, key=lambda path: -lengths[path])[:5]
    print("longest files:", *(f"{p.relative_to(SOURCE)} {lengths[p]}" for p in longest))
    assert long == []


def code_lines(function: ast.FunctionDef) -> int:
    """The lines of a function behind its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_public_names():
    assert evenkeel.__all__ == [
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "Norm",
        "NormSpec",
        "PerActivationBatchNorm",
        "accelerate",
        "allocator",
        "batch_norm",
        "check",
        "conventions",
        "cudnn",
        "errors",
        "exchange",
        "fold",
        "freeze",
        "functional",
        "introduce",
        "nn",
        "normalize",
        "parse",
        "recalibrate",
        "recalibrated",
        "restore",
        "unfold",
        "unfreeze",
    ]
    for name in evenkeel.__all__:
        assert getattr(evenkeel, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'batchnorm'"):
        _ = evenkeel.batchnorm


def test_public_things_have_docstrings():
    missing = []
    for path in modules():
        tree = ast.parse(path.read_text())
        if ast.get_docstring(tree) is None:
            missing.append(str(path.relative_to(SOURCE)))
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if public and ast.get_docstring(node) is None:
                missing.append(f"{path.relative_to(SOURCE)}:{node.name}")
    assert missing == []
