"""The example graph of Stable Diffusion 1.5 on a real ComfyUI server, with its own rewards, all at full size.

    python benchmarks/example_graph.py --comfyui ~/ComfyUI

Nothing is downloaded: checkpoint and reward models are files with random weights in the released layouts, under the
names that the graph looks for. The graph is `workflows/api/04 Train SD1.5.json` as it is, but for the numbers of this
command line and the settings in `OVERRIDES`, which make it short enough for a CPU. Memory is the peak of each process,
which includes pages of the files that it maps; ComfyUI's is given up to the end of the training and for the whole
graph, because *Compare LoRAs* loads the reward models into ComfyUI.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

GRAPH = ROOT / "workflows/api/04 Train SD1.5.json"
OVERRIDES = ["rollout.group_size=2", "rollout.prompts_per_iteration=2", "objective.batch_size=2", "evaluation.every=0"]
PROMPTS = "a red bicycle leaning on a wall\ntwo cats asleep on a sofa"
GIB = 2**30
PATIENCE = 7200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--folder", type=Path, help="base directory of the server; default a temporary one (8 GB)")
    parser.add_argument("--size", type=int, default=256, help="height and width")
    parser.add_argument("--steps", type=int, default=6, help="of a rollout and of the comparison")
    parser.add_argument("--iterations", type=int, default=2)
    args = parser.parse_args()
    os.environ["COMFYUI_PATH"] = str(args.comfyui.expanduser().resolve())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that server and temporary folder go
    with tempfile.TemporaryDirectory(prefix="example-graph-") as temporary:
        base = args.folder or Path(temporary)
        graph = shortened(json.loads(GRAPH.read_text()), args)
        if not (base / "models").exists():
            make_files(base, graph)
        print(report(*run(base, graph)))


# ------------------------------------------------------------------------------------------------------ graph and files


def inputs(graph: dict, kind: str) -> dict:
    """Inputs of the graph's first node of a class."""
    return next(node["inputs"] for node in graph.values() if node["class_type"] == kind)


def titled(graph: dict, title: str) -> dict:
    """Inputs of the node with a title."""
    return next(node["inputs"] for node in graph.values() if node["_meta"]["title"] == title)


def shortened(graph: dict, args: argparse.Namespace) -> dict:
    """The graph with the numbers of the command line."""
    titled(graph, "Width")["value"] = titled(graph, "Height")["value"] = args.size
    titled(graph, "Steps")["value"] = args.steps
    held_out = titled(graph, "Held-out prompts")
    held_out["value"] = held_out["value"].splitlines()[0]
    overrides = [*OVERRIDES, f"runtime.iterations={args.iterations}"]
    inputs(graph, "DanceGRPO_Preset")["overrides"] = "\n".join(overrides)
    inputs(graph, "DanceGRPO_TrainLoRA")["prompts"] = PROMPTS
    inputs(graph, "DanceGRPO_CompareLoRAs")["images_per_prompt"] = 2
    return graph


def make_files(base: Path, graph: dict) -> None:
    """Checkpoint and reward models with random weights, each in a process that ends, so that no memory stays behind."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    checkpoint = base / "models/checkpoints" / inputs(graph, "CheckpointLoaderSimple")["ckpt_name"]
    tasks: list[tuple[Callable, Path]] = [(make_checkpoint, checkpoint)]
    for node in graph.values():
        if node["class_type"] == "DanceGRPO_LoadReward":
            path = base / "models/rewards" / node["inputs"]["reward.path"]
            tasks.append((MAKERS[node["inputs"]["reward"]], path))
    for task, path in tasks:
        print(f"making {path.name} ...", file=sys.stderr, flush=True)
        process = context.Process(target=task, args=(path,))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"could not make {path}")


def make_checkpoint(path: Path) -> None:
    import torch

    from benchmarks import full_size_models as models
    from benchmarks.core_models import use_comfyui

    use_comfyui(Path(os.environ["COMFYUI_PATH"]), torch.device("cpu"))
    path.parent.mkdir(parents=True, exist_ok=True)
    (tensors,) = models.layout(models.MODELS["sd15"]).values()
    models.write_random(path, tensors, torch.float16, {})


def make_hps(path: Path) -> None:
    from benchmarks.rewards_full_size import hps

    path.parent.mkdir(parents=True, exist_ok=True)
    hps(path.parent)


def make_clip(path: Path) -> None:
    from benchmarks.rewards_full_size import clip

    path.mkdir(parents=True, exist_ok=True)
    clip(path)


MAKERS = {"hps-v2.1": make_hps, "clip": make_clip}


# ----------------------------------------------------------------------------------------------------------- the server


class PeakMemory(threading.Thread):
    """Follows the peak memory of a process and of those that it starts, in bytes by process number."""

    def __init__(self, number: int) -> None:
        super().__init__(daemon=True)
        self.process, self.peaks, self.ended = psutil.Process(number), {}, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            for process in [self.process, *self.process.children(recursive=True)]:
                if found := peak_of(process.pid):
                    self.peaks[process.pid] = found


def peak_of(number: int) -> int | None:
    """Peak resident memory of a process that runs, in bytes."""
    try:
        lines = Path(f"/proc/{number}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def run(base: Path, graph: dict) -> tuple[dict, dict, Path, str]:
    """Run the graph; the seconds and memory of its stages, its outputs, its run directory, and what the server said."""
    from comfy_host import Server

    server = Server(base).start()
    try:
        memory = PeakMemory(server.process.pid)
        memory.start()
        started = time.monotonic()
        number = server.queue(graph)
        folder = base / "output/dancegrpo/runs" / inputs(graph, "DanceGRPO_TrainLoRA")["name"]
        begun = wait_for(lambda: events(folder), server, number) - started
        trained = wait_for(lambda: has_ended(folder), server, number) - started
        before = dict(memory.peaks)
        entry = server.wait(number, PATIENCE)
        ended = time.monotonic() - started
        memory.ended.set()
    finally:
        server.stop()
    if entry["status"]["status_str"] != "success":
        raise SystemExit(json.dumps(entry["status"]["messages"], indent=1)[:4000])
    host = server.process.pid
    found = {
        "first iteration after, s": begun,
        "training after, s": trained,
        "graph after, s": ended,
        "ComfyUI until trained, GiB": before[host] / GIB,
        "ComfyUI, whole graph, GiB": memory.peaks[host] / GIB,
        "training process, GiB": max(peak for pid, peak in memory.peaks.items() if pid != host) / GIB,
    }
    return found, entry["outputs"], folder, server.output


def wait_for(happened: Callable[[], Any], server: Any, number: str) -> float:
    """The moment at which something has happened, or the graph has ended."""
    while not happened() and not server.get(f"/history/{number}"):
        time.sleep(0.5)
    return time.monotonic()


def events(folder: Path) -> list[dict]:
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def has_ended(folder: Path) -> bool:
    path = folder / "status.json"
    return path.exists() and json.loads(path.read_text())["state"] not in ("starting", "running", "stopping")


# ------------------------------------------------------------------------------------------------------------ the table


def report(found: dict, outputs: dict, folder: Path, log: str) -> str:
    from safetensors import safe_open

    last = events(folder)[-1]
    lines = ["| | |", "|---|---|"]
    rows = {name: f"{value:.1f}" for name, value in found.items()}
    rows |= {f"last iteration, {phase}, s": f"{value:.1f}" for phase, value in last["seconds"].items()}
    deviations = [event["objective"]["rollout_deviation"]["max"] for event in events(folder)]
    rows["largest deviation of a ratio from 1, by iteration"] = ", ".join(f"{value:.1e}" for value in deviations)
    with safe_open(folder / "lora.safetensors", "pt") as file:
        rows["tensors in the LoRA file"] = str(len(list(file.keys())))
    rows["lines of core about keys that were not loaded"] = str(log.count("not loaded"))
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    texts = [text for output in outputs.values() for text in output.get("text", [])]
    return "\n".join([*lines, "", *texts])


if __name__ == "__main__":
    main()
