"""Who may import whom. A module imports only from rows below its own, and from its own package."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "llmcomp"

# Top to bottom. A name stands for a module, or for a package as far as its modules have no row of their own.
ROWS = [
    "__main__",
    "cli",
    "api training_api",
    "recovery pruned_training distillation augmentation",
    "training_run",
    "session publishing",
    "staging",
    "report hub uploading",
    "downloading hub_failures",
    "training",
    "pipeline exports generation",
    "loading",
    "formats measure adapters checkpoint calibration.capture calibration.lint",
    "hf lora",
    "packed_kinds",
    "packed",
    "calibration.data calibration.batching calibration.media calibration.pairs calibration.processors",
    "recipe",
    "steps",
    "methods kernels",
    "native_kinds",
    "native",
    "progress run_options weights losses inner_losses kinds calibration.stats calibration.files calibration.hub_data "
    "calibration.parking sentences provenance export_record remote_code",
    "report.schema",
    "report.words building kept packing bnb schemes patterns activations matmul network aliases samples shards experts "
    "feeds ranks devices digests licences tokenizing",
    "errors",
]

# In these packages every file stands for itself, but for what they share (gptq falls back on rtn and wanda).
SHARED = {
    "cli": {"options", "progress", "running", "scripting", "training"},
    "formats": {"base", "loading", "reading", "opening", "save", "witness"},
    "methods": {
        "_grid", "_masks", "_project", "_scale", "_solve", "_swept", "rank_budget", "solution", "retarget", "rtn",
        "gptq", "wanda",
    },
}
COLLECTORS = {"cli.main", "exports", "formats", "kernels", "methods"}  # the five that name every file of their package

# Rows below, and yet none of its business.
NEVER = {package: {"methods", "recipe"} for package in ("formats", "adapters", "measure")}

HEAVY = "onnx onnxruntime gguf openvino "
HEAVY += "peft torch transformers datasets evaluate accelerate matplotlib scipy sklearn pandas compressed_tensors"


def modules() -> dict[str, Path]:
    """{module without the leading 'llmcomp.': its file}; the top of the package, which is lazy, left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found.pop("")
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module of llmcomp, line), wherever in the file; what only type checkers read does not count."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            if module.split(".")[0] == "llmcomp":
                inner = ".".join([*module.split(".")[1:], name])
                yield (inner if inner in MODULES else module.removeprefix("llmcomp").strip(".")), node.lineno


def row(module: str) -> int | None:
    """The row of a module, by the longest name in the table that it starts with."""
    rows = {name: number for number, line in enumerate(ROWS) for name in line.split()}
    while module and module not in rows:
        module = module.rpartition(".")[0]
    return rows.get(module)


def breach(module: str, other: str) -> str | None:
    """Why `module` may not import `other`, or None."""
    package, _, name = other.rpartition(".")
    siblings = module.rpartition(".")[0] == package and package in SHARED
    if siblings and module not in COLLECTORS and name not in SHARED[package]:
        return f"files of {package}/ stand for themselves"
    if other.split(".")[0] in NEVER.get(module.split(".")[0], ()):
        return f"{module.split('.')[0]} must not know of {other}"
    mine, theirs = row(module), row(other)
    if mine is None or theirs is None or theirs > mine:
        return None
    if theirs == mine and module.split(".")[0] == other.split(".")[0]:
        return None
    return f"row {theirs} ({ROWS[theirs]}) is not below row {mine} ({ROWS[mine]})"


def test_every_module_has_a_row() -> None:
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    missing = [name for name in MODULES if row(name) is None]
    assert set(missing) <= packages, "give it a row in ROWS"


def test_imports_go_down() -> None:
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line} imports llmcomp.{other}: {why}"
        for module, path in MODULES.items()
        for other, line in imports(path)
        if (why := breach(module, other)) is not None
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("module", "other"),
    [
        ("methods.gptq", "formats.save"),
        ("formats.dense", "methods"),
        ("schemes", "recipe"),
        ("cli.report", "cli.quantize"),
        ("formats.dense", "formats.compressed_tensors"),
        ("adapters.discover", "checkpoint"),
    ],
)
def test_a_breach_is_seen(module: str, other: str) -> None:
    assert breach(module, other)
    assert module in MODULES and other in MODULES


def test_methods_know_only_tensors() -> None:
    for module, path in MODULES.items():
        if module.startswith("methods"):
            text = path.read_text(encoding="utf-8")
            assert "transformers" not in text and "nn.Module" not in text, path


def test_nobody_prints() -> None:
    """But for `_main`, which is a process of its own (`python -m llmcomp.measure.cost`)."""
    for path in MODULES.values():
        for part in ast.parse(path.read_text(encoding="utf-8")).body:
            calls = [node.func for node in ast.walk(part) if isinstance(node, ast.Call)]
            prints = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
            assert not prints or getattr(part, "name", None) == "_main", f"{path}:{part.lineno}"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import llmcomp", 0),
        ("import llmcomp; llmcomp.Recipe().to_yaml()", 0),
        ("from llmcomp.cli.main import main; status = main(['--help'])", 0),
        ("from llmcomp.cli.main import main; status = main(['quantize', '--help'])", 0),
        ("from llmcomp.cli.main import main; status = main(['models'])", 0),
        ("from llmcomp.cli.main import main; status = main(['quantize', 'nobody/no-such-model'])", 2),
    ],
    ids=["import", "recipe", "help", "help of a verb", "models", "unknown name"],
)
def test_what_is_light_stays_light(code: str, status: int, tmp_path: Path) -> None:
    after = f"import sys; heavy = sorted(set({HEAVY.split()!r}) & set(sys.modules))"
    program = f"status = 0\n{code}\n{after}\nassert not heavy, heavy\nsys.exit(status)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == status, done.stderr
    assert "AssertionError" not in done.stderr
