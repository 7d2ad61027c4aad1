"""Every package that the code imports is listed, and no bound moves one of ComfyUI's own."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = (ROOT / "requirements.txt").read_text().split()
HOST = {"comfy", "comfy_kitchen", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server", "trainer"}
CORE_OF_PYDANTIC = "pydantic-core"
IMPORTED_BY_DIFFUSERS = {"ftfy"}
"""The pipelines of Wan clean prompts with it."""
DISTRIBUTIONS = {"rapidocr": "rapidocr"}
"""Of optional packages that may not be installed here."""


def plain(name: str) -> str:
    """A distribution's name in its normal form, without version bounds."""
    return re.split(r"[<>=~! \[]", name)[0].lower().replace("_", "-").replace(".", "-")


def imported(folder: str) -> Iterator[str]:
    """Top-level names of all absolute imports."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield node.module.split(".")[0]


def test_every_imported_package_is_listed_and_every_listed_one_is_imported() -> None:
    names = {*imported("trainer"), *imported("nodes")} - set(sys.stdlib_module_names) - HOST
    known = packages_distributions()
    found = {
        plain(known[name][0] if name in known else DISTRIBUTIONS.get(name, name)) for name in names
    } | IMPORTED_BY_DIFFUSERS
    extras = re.search(r"optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    optional = {plain(line) for line in re.findall(r'"(.*?)"', extras)}
    assert "bitsandbytes" in optional
    assert found - optional - {CORE_OF_PYDANTIC} == {plain(line) for line in REQUIRED}


def test_packages_that_comfyui_pins_have_no_bounds() -> None:
    unbound = {"torch", "torchvision", "numpy", "einops", "tokenizers"}
    assert unbound <= set(REQUIRED)
    assert not [line for line in REQUIRED if re.search(r"<|==|~=|!=", line)]
