"""Checks that import ComfyUI itself, in a process of their own: its top-level name `nodes` is the pack's as well."""

import os
import subprocess
import sys
from pathlib import Path

from comfy_host import COMFYUI

CHECKS = Path(__file__).with_name("inside")


def test_samplers_loras_and_models_inside_comfyui(tmp_path: Path) -> None:
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
    command += [f"--rootdir={CHECKS}", f"--confcutdir={CHECKS}", "-o", "python_files=check_*.py", str(CHECKS)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
