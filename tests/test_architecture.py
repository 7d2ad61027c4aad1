"""Rules about the code itself, read from its syntax trees."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ROOT / "trainer"
FILES = sorted(TRAINER.rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))
HOST = {"comfy", "comfy_api", "comfy_extras", "nodes", "server", "folder_paths", "execution"}
HOST_FILES = {"models/comfy/model.py", "models/comfy/describe.py"}
EXTERNAL_PROCESSES = {"subprocess", "multiprocessing", "pty"}


def name(path: Path) -> str:
    return path.relative_to(TRAINER).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module and its level (0 is absolute)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def absolute_imports_of_its_own(tree: ast.AST) -> list[str]:
    return [module for module, level in imports(tree) if level == 0 and module.split(".")[0] == "trainer"]


def host_imports(tree: ast.AST) -> list[str]:
    return [module for module, level in imports(tree) if level == 0 and module.split(".")[0] in HOST]


def process_starters(tree: ast.AST) -> list[str]:
    """Imports of process modules, and calls such as os.system."""
    found = [module for module, level in imports(tree) if level == 0 and module.split(".")[0] in EXTERNAL_PROCESSES]
    prefixes = ("os.system", "os.popen", "os.exec", "os.spawn", "os.fork", "os.posix_spawn", "os.startfile")
    return found + [call for call, _ in calls(tree) if call.startswith(prefixes)]


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def dangers(tree: ast.AST) -> list[str]:
    """Ways to run what a file or a text says."""
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    found = [module for module, _ in imports(tree) if module.split(".")[0] in modules]
    for call, node in calls(tree):
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        unsafe_load = call == "torch.load" and keywords.get("weights_only") != "True"
        unsafe_yaml = call in ("yaml.load", "yaml.unsafe_load", "yaml.full_load")
        shell = keywords.get("shell", "False") != "False"
        remote = keywords.get("trust_remote_code", "False") != "False"
        if call in ("eval", "exec", "compile", "__import__") or unsafe_load or unsafe_yaml or shell or remote:
            found.append(ast.unparse(node))
    return found


def tree(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_there_is_something_to_look_at() -> None:
    assert {"diffusion/kernels/dance.py", "models/diffusers/sd3.py", "shapes/checker.py", "rewards/brightness.py"} <= {
        name(path) for path in FILES
    }


@pytest.mark.parametrize("path", FILES, ids=name)
def test_inside_the_trainer_imports_are_relative(path: Path) -> None:
    # It is imported under two names: as a part of the pack, and as the top-level package of the background process.
    expected = ["trainer.runs.lifeline", "trainer.cli"] if name(path) == "__main__.py" else []
    assert absolute_imports_of_its_own(tree(path)) == expected


@pytest.mark.parametrize("path", FILES, ids=name)
def test_relative_imports_stay_inside_and_lead_somewhere(path: Path) -> None:
    for module, level in imports(tree(path)):
        if level == 0:
            continue
        folder = path.parents[level - 1]
        assert folder == TRAINER or TRAINER in folder.parents, module
        target = folder.joinpath(*module.split(".")) if module else folder
        assert target.with_suffix(".py").is_file() or (target / "__init__.py").is_file(), module


def modules_imported_at_start(path: Path) -> Iterator[str]:
    """Files of the trainer that importing this one imports: imports inside functions and for type checkers are not."""
    for node in tree(path).body:
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for alias in node.names:
            parts = [folder / alias.name, folder]
            files = [f for part in parts for f in (part.with_suffix(".py"), part / "__init__.py") if f.is_file()]
            yield name(files[0])


def test_imports_have_no_cycle() -> None:
    waiting = {name(path): set(modules_imported_at_start(path)) - {name(path)} for path in FILES}
    while ready := {file for file, needed in waiting.items() if not needed & waiting.keys()}:
        waiting = {file: needed for file, needed in waiting.items() if file not in ready}
    assert waiting == {}, "these import each other"


@pytest.mark.parametrize(
    ("folder", "below"),
    [
        ("utils", ()),
        ("diffusion", ("utils",)),
        ("shapes", ("diffusion", "utils")),
        ("adapters", ("utils", "config", "models")),
        ("rewards", ("utils", "config", "shapes", "votes")),
        ("votes", ("utils",)),
    ],
)
def test_lower_parts_import_nothing_above_them(folder: str, below: tuple[str, ...]) -> None:
    files = [path for path in FILES if name(path).startswith(f"{folder}/")]
    imported = {file.split("/")[0].removesuffix(".py") for path in files for file in modules_imported_at_start(path)}
    assert imported <= {folder, *below}


@pytest.mark.parametrize("path", [*FILES, *NODES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_trainer_knows_nothing_of_its_host(path: Path) -> None:
    assert name(path) in HOST_FILES or host_imports(tree(path)) == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_the_launcher_starts_processes(path: Path) -> None:
    assert name(path) == "runs/launch.py" or process_starters(tree(path)) == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_runs_what_a_file_says(path: Path) -> None:
    assert dangers(tree(path)) == []


@pytest.mark.parametrize("path", [ROOT / "__init__.py", *NODES], ids=lambda path: path.name)
def test_the_nodes_start_no_process_and_run_nothing_they_read(path: Path) -> None:
    found = tree(path)
    assert process_starters(found) == []
    assert dangers(found) == []
    # Their package has one of several names, and `nodes` and `trainer` are somebody else's in ComfyUI.
    assert [m for m, level in imports(found) if level == 0 and m.split(".")[0] in ("trainer", "nodes")] == []


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("import trainer.diffusion.kernels", absolute_imports_of_its_own),
        ("from trainer import rollout", absolute_imports_of_its_own),
        ("def f():\n    import comfy.utils", host_imports),
        ("from server import PromptServer", host_imports),
        ("from subprocess import run", process_starters),
        ("import os\nos.system('ls')", process_starters),
        ("eval(text)", dangers),
        ("import pickle", dangers),
        ("torch.load(path)", dangers),
        ("torch.load(path, weights_only=False)", dangers),
        ("yaml.load(file, Loader=yaml.Loader)", dangers),
        ("run(command, shell=True)", dangers),
    ],
)
def test_the_rules_see_what_they_forbid(code: str, rule: object) -> None:
    assert rule(ast.parse(code))


def test_the_rules_let_the_allowed_pass() -> None:
    code = (
        "from . import loop\nfrom ..config import x\ntorch.load(p, weights_only=True)\nyaml.safe_load(f)\nre.compile(r)"
    )
    for rule in (absolute_imports_of_its_own, host_imports, process_starters, dangers):
        assert rule(ast.parse(code)) == []


LOADED = """
import importlib, os, sys
import torch
for module in {modules!r}:
    if not (pid := os.fork()):
        importlib.import_module("trainer." + module)
        print(module, *[name for name in {heavy!r} if name in sys.modules], flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""


def test_light_modules_load_no_heavy_library() -> None:
    """Each in a fork of a process that has imported torch."""
    modules = ["config", "diffusion.kernels", "rewards", "models", "cli"]
    # The host loads them at its own start.
    heavy = ("diffusers", "peft", "transformers", "scipy", "matplotlib", "open_clip", "torchvision", "tokenizers")
    code = LOADED.format(modules=modules, heavy=heavy)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.splitlines()) == (0, modules), done.stdout + done.stderr
