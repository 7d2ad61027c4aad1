"""Checks that import ComfyUI itself, in processes of their own: its top-level name `nodes` is the pack's as well."""

import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
from comfy_host import COMFYUI

CHECKS = Path(__file__).with_name("inside")
FILES = {path.stem.removeprefix("check_") for path in CHECKS.glob("check_*.py")}
HALF = {"float16", "sampling", "compare", "training", "lora", "rewards"}
"""Files that take about as long as all others. A process takes nine seconds to start, so there is not one for each."""


@pytest.mark.parametrize("names", [HALF, FILES - HALF], ids=["half", "other half"])
def test_checks_inside_comfyui(names: set[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(COMFYUI), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
    ]
    command += [f"--rootdir={CHECKS}", f"--confcutdir={CHECKS}", "--junitxml", str(tmp_path / "tests.xml")]
    command += [str(CHECKS / f"check_{name}.py") for name in sorted(names)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    tests = xml.etree.ElementTree.parse(tmp_path / "tests.xml").iter("testcase")
    passed = {test.get("classname", "").removeprefix("check_") for test in tests if test.find("skipped") is None}
    assert passed == names, "each file has a test, and not all of them were skipped"
