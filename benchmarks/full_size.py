"""A released model at its full size with random weights, trained for a few tiny iterations on a CPU.

    python benchmarks/full_size.py sd15 --comfyui ~/ComfyUI
    python benchmarks/full_size.py sdxl --comfyui ~/ComfyUI --estimate
    python benchmarks/full_size.py z-image --comfyui ~/ComfyUI --estimate
    python benchmarks/full_size.py wan-1.3b --comfyui ~/ComfyUI --frames 5

Nothing is downloaded: the files are written with random weights in the layouts of the released ones
(`benchmarks/full_size_models.py`). The graph backend runs as in a graph: one process loads the files by core's own
nodes, describes the model and encodes the prompts, another one trains. Stable Diffusion is trained from a diffusers
folder as well. Text encoders have their full size, too; only the tokenizer of Wan's is a small one.

Each process reports its own peak memory, which includes pages of the files that it maps. Seconds are those of the
processor, so that other programs count less. With --estimate, the loaded model is first measured as
`python -m trainer estimate` does it, and what that says stands beside what happened then; the first iteration is no
slower than others after that, so one is enough.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import full_size_models  # noqa: E402
from benchmarks.full_size_models import CHECKPOINT, MODELS, NETWORK, TEXT, VAE  # noqa: E402
from trainer.utils.console import quiet_libraries  # noqa: E402

PROMPTS = ["a red bicycle leaning on a wall", "two cats asleep on a sofa"]
KEYS = [(text, "") for text in [*PROMPTS, ""]]
GIB = 2**30
NUMBERS = {
    "size": "height and width",
    "frames": "of a video",
    "steps": "of a rollout",
    "prompts": "of an iteration, two images each",
    "iterations": "seconds are those of the last one",
}


def main() -> None:
    args = arguments()
    if args.stage:
        quiet_libraries()
        result = STAGES[args.stage](args)
        result.setdefault("memory", peak_bytes())
        (args.folder / f"{args.stage}.json").write_text(json.dumps(result))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the temporary folder goes
    with tempfile.TemporaryDirectory(prefix="full-size-") as temporary:
        args.folder = args.folder or Path(temporary)
        args.folder.mkdir(parents=True, exist_ok=True)
        print(table(all_stages(args)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS, help="the model")
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--folder", type=Path, help="where the files go and stay; default a temporary one (3 to 21 GB)")
    for name, what in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, help=what)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--weights", choices=["bfloat16", "float32"], help="dtype of the frozen network")
    parser.add_argument("--backends", nargs="+", choices=["diffusers", "graph"])
    parser.add_argument("--random-text", action="store_true", help="random numbers instead of a text encoder's")
    parser.add_argument("--estimate", action="store_true", help="estimate each run as well")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    defaults = {"frames": 1, "iterations": 1 if args.estimate else 2}
    for name, value in (defaults | MODELS[args.name].run).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    has_folder = MODELS[args.name].folder is not None
    args.backends = args.backends or (["diffusers", "graph"] if has_folder else ["graph"])
    if "diffusers" in args.backends and not has_folder:
        parser.error(f"--backends: {args.name} has the graph backend alone")
    args.comfyui = args.comfyui.expanduser().resolve()
    return args


def all_stages(args: argparse.Namespace) -> dict[str, dict]:
    """What every stage found, each in a process of its own."""
    if not (args.folder / (CHECKPOINT if MODELS[args.name].folder else VAE)).exists():
        in_a_process(args, "make")
    results = {}
    for backend in args.backends:
        stages = ["host", backend] if backend == "graph" else [backend]
        results |= {stage: in_a_process(args, stage) for stage in stages}
    return results


def in_a_process(args: argparse.Namespace, stage: str) -> dict:
    """Run a stage of this script in a process of its own, whose memory is then its own too."""
    command = [sys.executable, __file__, args.name, "--comfyui", args.comfyui, "--folder", args.folder]
    for name in (*NUMBERS, "guidance", "weights"):
        command += [f"--{name}", getattr(args, name)]
    command += [f"--{name.replace('_', '-')}" for name in ("estimate", "random_text") if getattr(args, name)]
    print(f"{stage} ...", file=sys.stderr, flush=True)
    subprocess.run([*map(str, command), "--stage", stage], check=True)
    return json.loads((args.folder / f"{stage}.json").read_text())


def peak_bytes() -> int:
    import torch

    from trainer.estimate.memory import measured_peak

    return measured_peak(torch.device("cpu"))


# ---------------------------------------------------------------------------------------------- the graph's own process


def make(args: argparse.Namespace) -> dict:
    """The files."""
    import_comfyui(args.comfyui)
    started = time.process_time()
    full_size_models.make(args.name, args.folder, args.comfyui, with_text=not args.random_text)
    return {"seconds": time.process_time() - started}


def import_comfyui(folder: Path) -> None:
    import torch

    from benchmarks.core_models import use_comfyui

    use_comfyui(folder, torch.device("cpu"))


def host(args: argparse.Namespace) -> dict:
    """What ComfyUI does before the training: load the files, describe the model, encode the prompts."""
    import_comfyui(args.comfyui)
    import comfy.cli_args
    import folder_paths

    from trainer.config import parse_config
    from trainer.models import EntryConditions
    from trainer.models.comfy.describe import describe
    from trainer.prompts.store import write_conditions

    comfy.cli_args.args.bf16_unet = args.weights == "bfloat16"
    for kind in ("checkpoints", "diffusion_models", "vae", "text_encoders"):
        folder_paths.add_model_folder_path(kind, str(args.folder))
    clock = Stopwatch()
    with clock.run("load"):
        model, clip, vae = load(args.name)
    with clock.run("describe"):
        graph = describe(model, vae, "simple", None, None, iter(()))
    del model, vae
    # On a CPU core computes in float32: without checkpointing, copies of all weights would wait for the backward pass.
    settings = {"family": "comfy", "graph": graph, "gradient_checkpointing": args.weights != "float32"}
    data = description(args) | {"model": size(args) | settings}
    data["prompts"]["conditions"] = str(args.folder / "conditions.safetensors")
    with clock.run("load the text encoder"):
        clip = None if args.random_text else clip()
    with clock.run("encode"):
        found = random_entries(args.name) if clip is None else encoded(clip)
        write_conditions(args.folder / "conditions.safetensors", KEYS, map(EntryConditions.of, found))
    parse_config(data)
    (args.folder / "run-graph.json").write_text(json.dumps(data))
    return {"seconds": clock.seconds}


def load(name: str) -> tuple[Any, Callable[[], Any], Any]:
    """MODEL and VAE from core's nodes, and a function that gives CLIP."""
    import nodes as core

    if MODELS[name].folder is not None:
        model, clip, vae = core.CheckpointLoaderSimple().load_checkpoint(CHECKPOINT)
        return model, lambda: clip, vae
    (model,) = core.UNETLoader().load_unet(NETWORK, "default")
    (vae,) = core.VAELoader().load_vae(VAE)
    return model, lambda: core.CLIPLoader().load_clip(TEXT, MODELS[name].text)[0], vae


def encoded(clip: Any) -> Iterator[list[dict]]:
    """Conditioning of each prompt."""
    import torch

    for text, _ in KEYS:
        with torch.no_grad():
            tokens, extra = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]
        yield [{"cross_attn": tokens, **extra}]


def random_entries(name: str) -> Iterator[list[dict]]:
    """Random numbers in the shape of each prompt's conditioning."""
    import torch

    from benchmarks.core_models import NETWORKS, entry

    generator = torch.Generator().manual_seed(0)
    for _ in KEYS:
        made = entry(NETWORKS[MODELS[name].network])
        yield [made | {"cross_attn": made["cross_attn"].normal_(generator=generator)}]


# ---------------------------------------------------------------------------------------------------------- training


def size(args: argparse.Namespace) -> dict:
    return {"height": args.size, "width": args.size, "frames": args.frames}


def description(args: argparse.Namespace) -> dict:
    """The run, but for its model."""
    noise = {"kernel": "ddim", "eta": 1.0} if MODELS[args.name].folder else {}
    return {
        "prompts": {"texts": PROMPTS},
        "rollout": {
            "steps": args.steps,
            "group_size": 2,
            "prompts_per_iteration": args.prompts,
            "guidance_scale": args.guidance,
            **noise,
        },
        # In a group of two, equal weights would cancel wherever the rewards disagree, and such a group is skipped.
        "rewards": [{"name": "brightness"}, {"name": "colorfulness", "weight": 0.5}],
        "objective": {"batch_size": 2},
        "lora": {"rank": 16, "alpha": 32},
        "runtime": {"iterations": args.iterations, "device": "cpu", "samples_every": 0},
        "evaluation": {"every": 0},
    }


def diffusers_run(args: argparse.Namespace) -> dict:
    model = size(args) | {"path": str(args.folder / "diffusers"), "network_file": str(args.folder / CHECKPOINT)}
    return description(args) | {"model": model | {"family": MODELS[args.name].folder.family, "dtype": args.weights}}


def graph_run(args: argparse.Namespace) -> dict:
    return json.loads((args.folder / "run-graph.json").read_text())


class Stopwatch:
    """Processor seconds inside some functions; a call inside another one counts for the outer one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inside = False

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Replace a function by one that is timed."""
        call: Callable = getattr(owner, function)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.run(name):
                return call(*arguments, **keywords)

        setattr(owner, function, timed)

    @contextmanager
    def run(self, name: str) -> Iterator[None]:
        if self.inside:
            yield
            return
        self.inside, started = True, time.process_time()
        try:
            yield
        finally:
            self.inside = False
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started


class ProcessorTime:
    """In place of the module `time`: seconds of this process."""

    perf_counter = staticmethod(time.process_time)


def train(data: dict, estimated: bool) -> dict:
    """The iterations in this process, as the command line would run them; seconds are those of the last one."""
    import torch

    from trainer import loop
    from trainer.adapters import lora
    from trainer.config import parse_config
    from trainer.models import model_class
    from trainer.runs import metrics
    from trainer.utils.distributed import Processes

    watch = Stopwatch()
    config = parse_config(data)
    watch.watch(loop, "conditions_for", "encode")
    watch.watch(model_class(config.model), "load", "load")
    trainer = loop.Trainer(config, None, Processes("cpu"))
    before = dict(watch.seconds)
    watch.watch(trainer.model.module, "forward", "network")
    watch.watch(torch.autograd, "backward", "network")
    watch.watch(trainer.model, "decode", "VAE")
    for reward in trainer.collector.rewards.values():
        watch.watch(reward, "score", "rewards")
    loaded = peak_bytes()
    guess = estimate(trainer) if estimated else None
    metrics.time = ProcessorTime()
    events = []
    for _ in range(config.runtime.iterations):
        watch.seconds.clear()
        events.append(trainer.iterate())
        print(json.dumps(events[-1]["seconds"]), file=sys.stderr, flush=True)
    event, inside = events[-1], sum(watch.seconds.get(name, 0.0) for name in ("network", "VAE", "rewards"))
    keys = lora.comfy_weights(trainer.policy.parameters, config.lora.alpha, trainer.model.lora_key)
    return {
        "estimate": guess,
        "memory": max(loaded, peak_bytes()),
        "seconds": before | event["seconds"],
        "weights": config.model.dtype if config.model.graph is None else config.model.graph.weights,
        "outside": 1 - inside / event["seconds"]["total"],
        "deviations": [event["objective"]["rollout_deviation"]["max"] for event in events],
        "forwards_per_image": event["forwards_per_image"],
        "keys": len(keys),
        "parameters": sum(p.numel() for p in trainer.policy.parameters.values()),
    }


def estimate(trainer: Any) -> dict:
    """Seconds of an iteration by phase, and peak memory, as `python -m trainer estimate` finds them."""
    from benchmarks.estimate import estimated_seconds
    from trainer.runs.capacity import iteration_bytes

    seconds = estimated_seconds(trainer, time.process_time)
    needed = peak_bytes() + iteration_bytes(trainer.config, 1, math.prod(trainer.model.latent_shape))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return {"seconds": seconds, "bytes": needed}


STAGES: dict[str, Callable[[argparse.Namespace], dict]] = {
    "make": make,
    "host": host,
    "diffusers": lambda args: train(diffusers_run(args), args.estimate),
    "graph": lambda args: train(graph_run(args), args.estimate),
}


# ------------------------------------------------------------------------------------------------------------ the table


def table(results: dict[str, dict]) -> str:
    """The backends side by side."""
    backends = {name: found for name, found in results.items() if name in ("diffusers", "graph")}
    phases = list(dict.fromkeys(phase for found in backends.values() for phase in found["seconds"]))
    lines = [f"| | {' | '.join(backends)} |", f"|---|{'---|' * len(backends)}"]

    def line(title: str, cell: Callable[[dict], str]) -> None:
        lines.append(f"| {title} | {' | '.join(cell(found) for found in backends.values())} |")

    for phase in phases:
        line(f"{phase}, s", lambda found, phase=phase: f"{found['seconds'].get(phase, 0.0):.1f}")
    line("dtype of the weights", lambda found: found["weights"])
    line("peak memory of the training process, GiB", lambda found: f"{found['memory'] / GIB:.1f}")
    line("largest deviation of a ratio from 1, by iteration", lambda found: numbers(found["deviations"]))
    line("forward passes per image", lambda found: f"{found['forwards_per_image']:.1f}")
    line("tensors in the LoRA file", lambda found: str(found["keys"]))
    line("LoRA parameters", lambda found: f"{found['parameters'] / 1e6:.1f}M")
    line("time outside network, VAE and rewards", lambda found: f"{found['outside']:.2%}")
    for name, found in backends.items():
        if (guess := found["estimate"]) is None:
            continue
        seconds = guess["seconds"]
        total = against(sum(seconds.values()), found["seconds"]["total"])
        lines.append(f"\nEstimate, {name}: seconds {total}, of which ")
        lines[-1] += ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
        lines[-1] += f"; peak memory, GiB, {against(guess['bytes'] / GIB, found['memory'] / GIB)}."
    if "host" in results:
        seconds = ", ".join(f"{name} {value:.1f} s" for name, value in results["host"]["seconds"].items())
        lines.append(f"\nComfyUI's process: {seconds}; peak {results['host']['memory'] / GIB:.1f} GiB.")
    return "\n".join(lines)


def numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.1e}" for value in values)


def against(estimated: float, was: float) -> str:
    return f"estimated {estimated:.2f}, was {was:.2f} ({estimated / was - 1:+.1%})"


if __name__ == "__main__":
    main()
