"""What a GPU does with every family, and with models of released sizes with random weights.

    python benchmarks/gpu.py --comfyui ~/ComfyUI                 # every case that has no line in the results yet
    python benchmarks/gpu.py --comfyui ~/ComfyUI --only z-image  # those whose name contains this
    python benchmarks/gpu.py --report                            # Markdown of the results, for RESULTS.md
    python benchmarks/gpu.py --dry                               # every case with tiny networks, on a CPU

Nothing is downloaded. A case runs in a process of its own (in a dry run all in one) and adds one line of JSON to the
results as it ends; cases that failed run again. FLUX.1's folder takes 24 GB of the disk, and its network 24 GB of RAM.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_suite.cases import cases
from benchmarks.gpu_suite.report import markdown
from benchmarks.gpu_suite.setting import Setting, Skipped
from trainer.utils.console import quiet_libraries

LIMIT = 1200
"""Seconds after which a case is given up."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH") or None, help="ComfyUI's folder")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cases whose name contains one of these")
    parser.add_argument("--dry", action="store_true", help="tiny networks on a CPU, in this process")
    parser.add_argument("--results", type=Path, help="file of the lines; default gpu.jsonl, none for a dry run")
    parser.add_argument("--folder", type=Path, help="where models go; default a temporary folder")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--report", action="store_true", help="print the results as Markdown")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.results = args.results or (None if args.dry else Path("gpu.jsonl"))
    names = [name for name in cases() if not args.only or any(text in name for text in args.only)]
    if args.list:
        print("\n".join(names))
    elif args.report:
        print(markdown(read(args.results)))
    elif args.case:
        print(json.dumps(run_case(args.case, args, args.folder)))
    else:
        sys.exit(run_all(names, args))


def run_all(names: list[str], args: argparse.Namespace) -> int:
    """Run what has no good line yet; returns 1 if a case failed."""
    if not args.dry and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is false; --dry runs the cases on a CPU", file=sys.stderr)
        return 2
    lines = read(args.results) if args.results else []
    done = {line["case"] for line in lines if "error" not in line and line["device"] == device_name(args.dry)}
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        for name in [name for name in names if name not in done]:
            line = run_case(name, args, args.folder) if args.dry else in_a_process(name, args)
            failed += "error" in line
            print(json.dumps(line), flush=True)
            if args.results:
                with args.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    return int(failed > 0)


def in_a_process(name: str, args: argparse.Namespace) -> dict:
    """The case's line; it has all of the GPU to itself."""
    command = [sys.executable, __file__, "--case", name, "--folder", str(args.folder)]
    command += ["--comfyui", str(args.comfyui)] if args.comfyui else []
    try:
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
        return json.loads(ended.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return heading(name, args.dry) | {"error": f"not done in {LIMIT} s"}
    except (IndexError, ValueError):
        return heading(name, args.dry) | {"error": f"the process ended with {ended.returncode} and said nothing"}


def run_case(name: str, args: argparse.Namespace, folder: Path) -> dict:
    """A case's line, made in this process."""
    quiet_libraries()
    device = torch.device("cpu" if args.dry else "cuda")
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    line = heading(name, args.dry)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        setting = Setting(device, args.dry, Path(own), args.comfyui)
        try:
            line |= cases()[name](setting)
        except Skipped as reason:
            line["skipped"] = str(reason)
        except Exception as error:  # noqa: BLE001 - the other cases run all the same
            traceback.print_exc()
            line["error"] = f"{type(error).__name__}: {error}"[:500]
        setting.free()
    return line | {"took": round(time.perf_counter() - started, 1)}


def heading(name: str, dry: bool) -> dict:
    return {
        "case": name,
        "device": device_name(dry),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
    }


def device_name(dry: bool) -> str:
    return "CPU" if dry else torch.cuda.get_device_name()


def read(path: Path) -> list[dict]:
    """The newest line of each case."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return list({(line["case"], line["device"]): line for line in lines}.values())


if __name__ == "__main__":
    main()
