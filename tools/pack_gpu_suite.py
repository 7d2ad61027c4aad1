"""Packs all that `benchmarks/gpu.py` needs into one folder, for a machine with a GPU and without a network.

    python tools/pack_gpu_suite.py FOLDER --comfyui ~/ComfyUI

Run it where there is a network, under the Python version of that machine (Linux). The folder then holds the repository
as it is committed, the code of ComfyUI, the wheels of all requirements and bitsandbytes (several GB, as PyTorch comes
with CUDA), and `run.sh`, which makes a virtual environment from the wheels, runs the cases that have no line yet, and
writes the report. With --no-wheels `run.sh` takes the Python of that machine as it is.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT_ANYWHERE = shutil.ignore_patterns("__pycache__", "*.safetensors")
LEFT_OUT_AT_THE_TOP = shutil.ignore_patterns(
    ".git", "models", "output", "input", "temp", "user", "custom_nodes", "venv", ".venv"
)
EXTRA = ["bitsandbytes>=0.43.3"]
RUN = """#!/bin/sh
# Runs the cases that have no line in gpu.jsonl yet; arguments go to benchmarks/gpu.py.
set -e
cd "$(dirname "$0")"
{environment}
"$PYTHON" repository/benchmarks/gpu.py --comfyui ComfyUI --results gpu.jsonl "$@"
"$PYTHON" repository/benchmarks/gpu.py --results gpu.jsonl --report > gpu.md
"""
FROM_WHEELS = """if [ ! -x venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv venv
    venv/bin/python -m pip install --quiet --no-index --find-links wheels -r wheels/requirements.txt
fi
PYTHON=venv/bin/python"""
AS_IT_IS = 'PYTHON="${PYTHON:-python3}"'


def pack(folder: Path, comfyui: Path, with_wheels: bool) -> None:
    """
    Args:
        folder: is made; must be empty if it is there.
        comfyui: ComfyUI's folder.
    """
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty: choose another folder")
    if not (comfyui / "main.py").is_file():
        raise SystemExit(f"--comfyui is {comfyui}, where there is no main.py: give ComfyUI's folder")
    folder.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as content:
        content.extractall(folder / "repository", filter="data")

    def left_out(inside: str, names: list[str]) -> set[str]:
        """ComfyUI has a package `comfy/ldm/models` beside its folder of weights, `models`."""
        at_the_top = LEFT_OUT_AT_THE_TOP(inside, names) if Path(inside) == comfyui else set()
        return LEFT_OUT_ANYWHERE(inside, names) | at_the_top

    shutil.copytree(comfyui, folder / "ComfyUI", ignore=left_out)
    if with_wheels:
        download(folder / "wheels", [ROOT / "requirements-dev.txt", comfyui / "requirements.txt"])
    script = folder / "run.sh"
    script.write_text(RUN.format(environment=FROM_WHEELS if with_wheels else AS_IT_IS))
    script.chmod(0o755)


def download(folder: Path, requirements: list[Path]) -> None:
    """Wheels of these requirement files and of `EXTRA`, and one file that names them all."""
    named = [option for file in requirements for option in ("-r", str(file))]
    folder.mkdir()
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--wheel-dir", str(folder), *named, *EXTRA], check=True)
    pinned = sorted("==".join(file.name.split("-")[:2]) for file in folder.glob("*.whl"))
    (folder / "requirements.txt").write_text("\n".join(pinned) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--no-wheels", action="store_true", help="leave the packages out")
    args = parser.parse_args()
    pack(args.folder, args.comfyui.expanduser().resolve(), not args.no_wheels)
    size = sum(file.stat().st_size for file in args.folder.rglob("*") if file.is_file())
    print(f"{args.folder}: {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
