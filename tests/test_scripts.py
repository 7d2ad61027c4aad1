"""The scripts of benchmarks/ and tools/: all start, name nothing that is gone, and cheap ones run at a tiny size."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for folder in ("benchmarks", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
OWN = {"trainer", "benchmarks", "tools"}
HOST = {"comfy", "comfy_execution", "folder_paths", "nodes"}
"""Modules of ComfyUI: what needs them is imported in tests/comfy/inside."""
STARTED = [path for path in FILES if "ArgumentParser" in path.read_text()]
AS_MODULE = {"tools/pretrain_shapes.py": ["-m", "tools.pretrain_shapes"]}
"""How a script is started that is not started by its path."""
TINY = [
    "solvers.py --steps 1 --reference 1",
    "kernels.py sd15 --size 64",
    "memory_presets.py one-gpu-sd14",
    "overhead.py --iterations 1 --set rollout.group_size=2 --set rollout.prompts_per_iteration=1 --set rollout.steps=2"
    " --set rollout.window=null",
    "estimate.py trainer/presets/demo.yaml --only seconds --iterations 2 --set rollout.group_size=2"
    " --set rollout.prompts_per_iteration=1 --set rollout.steps=3",
]
"""Commands that take less than five seconds of processor time."""


def command(words: str) -> list[str]:
    script, *arguments = words.split()
    return [f"benchmarks/{script}", *arguments]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def help_of(path: Path) -> list[str]:
    return [*AS_MODULE.get(name_of(path), [name_of(path)]), "--help"]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of each command, all run by one process."""
    folder = tmp_path_factory.mktemp("scripts")
    commands = [*map(help_of, STARTED), *map(command, TINY)]
    (folder / "commands.json").write_text(json.dumps(commands))
    subprocess.run([sys.executable, ROOT / "tests" / "run_scripts.py", folder], cwd=ROOT, check=True, timeout=600)
    codes = json.loads((folder / "codes.json").read_text())
    return {
        " ".join(words): (code, (folder / f"{number}.txt").read_text())
        for number, (words, code) in enumerate(zip(commands, codes, strict=True))
    }


@pytest.mark.parametrize("path", STARTED, ids=name_of)
def test_help_is_said(ended: dict[str, tuple[int, str]], path: Path) -> None:
    code, output = ended[" ".join(help_of(path))]
    assert code == 0, output
    assert output.startswith(f"usage: {path.name}"), output


@pytest.mark.parametrize("words", TINY, ids=lambda words: words.split()[0])
def test_it_runs_at_a_tiny_size(ended: dict[str, tuple[int, str]], words: str) -> None:
    code, output = ended[" ".join(command(words))]
    assert code == 0, output
    table = [line for line in output.splitlines() if line.startswith("| ") or "estimated" in line or "overhead" in line]
    assert table, output


# --------------------------------------------------------------------------------- what a script names of the project


def resolved(path: Path, node: ast.ImportFrom) -> str:
    """The module's full name."""
    if not node.level:
        return node.module
    package = path.relative_to(ROOT).parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def imported(module: str) -> ModuleType | None:
    """None if it needs ComfyUI.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] in HOST:
            return None
        raise


def is_there(owner: ModuleType, name: str) -> bool:
    if hasattr(owner, name):
        return True
    try:
        imported(f"{owner.__name__}.{name}")
    except ModuleNotFoundError:
        return False
    return True


def missing(path: Path) -> Iterator[str]:
    """Names that a file imports from the project's modules, or looks up in them, and that are not there."""
    tree, modules = ast.parse(path.read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (module := resolved(path, node)).split(".")[0] in OWN:
            owner = imported(module)
            for alias in node.names if owner else []:
                if not is_there(owner, alias.name):
                    yield f"{module}.{alias.name}"
                elif isinstance(found := getattr(owner, alias.name, None), ModuleType):
                    modules[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            owner = modules[node.value.id]
            if not is_there(owner, node.attr):
                yield f"{owner.__name__}.{node.attr}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_it_names_of_the_project_is_there(path: Path) -> None:
    assert list(missing(path)) == []


def test_a_name_that_is_gone_is_found(tmp_path: Path) -> None:
    """Imported within a function, and looked up in a module."""
    script = tmp_path / "script.py"
    script.write_text("def f():\n    from trainer.loop import Gone\n    from trainer import loop\n    loop.lost()\n")
    assert list(missing(script)) == ["trainer.loop.Gone", "trainer.loop.lost"]
