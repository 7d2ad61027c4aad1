"""A released model at its full size with random weights, trained for one tiny iteration on a CPU through both backends.

    python benchmarks/full_size.py sd15 --comfyui ~/ComfyUI

Nothing is downloaded. The network, VAE and text encoder are written as one checkpoint in the released layout (float16),
beside a diffusers folder whose network is read from that file. The graph backend runs as in a graph: one process
loads the checkpoint by core's own node, describes it and encodes the prompts, another one trains. Each process reports
its own peak memory, which includes pages of the files that it maps.
"""

import argparse
import json
import resource
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

PROMPTS = ["a red bicycle leaning on a wall", "two cats asleep on a sofa"]
CHECKPOINT = "full-size.safetensors"
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["sd15"], help="the model")
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--folder", type=Path, help="where the files go and stay; default a temporary one (6 GB)")
    parser.add_argument("--size", type=int, default=256, help="height and width")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--backends", nargs="+", choices=["diffusers", "graph"], default=["diffusers", "graph"])
    parser.add_argument("--stage", choices=["make", "host", *STAGES], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.comfyui = args.comfyui.expanduser().resolve()
    if args.stage:
        result = {"make": make, "host": host, **STAGES}[args.stage](args)
        result["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (args.folder / f"{args.stage}.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        args.folder.mkdir(parents=True, exist_ok=True)
        if not (args.folder / CHECKPOINT).exists():
            in_a_process(args, "make")
        results = {}
        for backend in args.backends:
            if backend == "graph":
                results["host"] = in_a_process(args, "host")
            results[backend] = in_a_process(args, backend)
        print(table(results))


def in_a_process(args: argparse.Namespace, stage: str) -> dict:
    """Run a stage of this script in a process of its own, whose memory is then its own too."""
    command = [sys.executable, __file__, args.name, "--comfyui", str(args.comfyui), "--folder", str(args.folder)]
    command += ["--size", str(args.size), "--guidance", str(args.guidance), "--stage", stage]
    print(f"{stage} ...", file=sys.stderr, flush=True)
    subprocess.run(command, check=True)
    return json.loads((args.folder / f"{stage}.json").read_text())


# ------------------------------------------------------------------------------------------------------------- files


def make(args: argparse.Namespace) -> dict:
    """The checkpoint in the released layout, and a diffusers folder without a network."""
    import diffusers
    import torch
    import transformers
    from safetensors.torch import save_file

    seconds = time.perf_counter()
    folder = args.folder / "diffusers"
    vocabulary = args.comfyui / "comfy" / "sd1_tokenizer"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(vocabulary, model_max_length=77)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_L))
    vae = diffusers.AutoencoderKL(**VAE)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    for name, part in {"text_encoder": text, "vae": vae}.items():
        fill(part.state_dict().items())
        part.half().save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    with torch.device("meta"):
        diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64).save_config(folder / "unet")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    for name, kind in (("text_encoder", "CLIPTextModel"), ("tokenizer", "CLIPTokenizer")):
        index[name] = ["transformers", kind]
    for name, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL"), ("scheduler", "DDIMScheduler")):
        index[name] = ["diffusers", kind]
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    weights = {f"cond_stage_model.transformer.{name}": value for name, value in text.state_dict().items()}
    weights |= native_weights(args.comfyui)
    save_file({name: value.contiguous() for name, value in weights.items()}, args.folder / CHECKPOINT)
    return {"seconds": time.perf_counter() - seconds}


CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}


def native_weights(comfyui: Path) -> dict[str, Any]:
    """Random weights of the UNet and the VAE under the names of the released file."""
    import torch

    import_comfyui(comfyui)
    import comfy.supported_models
    from comfy.ldm.models.autoencoder import AutoencoderKL

    from benchmarks.core_models import KL, SD15

    description = comfy.supported_models.SD15(dict(SD15))
    description.unet_config = dict(SD15)
    unet = description.get_model({}, "", device="meta").diffusion_model
    with torch.device("meta"):
        vae = AutoencoderKL(ddconfig=KL, embed_dim=4)
    weights = {f"model.diffusion_model.{name}": value for name, value in unet.state_dict().items()}
    weights |= {f"first_stage_model.{name}": value for name, value in vae.state_dict().items()}
    weights = {name: torch.empty(value.shape, dtype=torch.float16) for name, value in weights.items()}
    fill(weights.items())
    return weights


def fill(weights: Any) -> None:
    """Random values: scales of norms near 1, small biases, and matrices that keep the size of what they are given."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, value in weights:
        if not value.is_floating_point():
            continue
        spread = 0.02 if value.ndim < 2 or "embedding" in name else 0.7 / max(1.0, value[0].numel()) ** 0.5
        start = 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0
        value.copy_(start + spread * torch.randn(value.shape, generator=generator))


def import_comfyui(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


# ---------------------------------------------------------------------------------------------- the graph's own process


def host(args: argparse.Namespace) -> dict:
    """What ComfyUI does before the training: load the checkpoint, describe the model, encode the prompts."""
    import_comfyui(args.comfyui)
    import folder_paths
    import torch

    import nodes as core

    folder_paths.add_model_folder_path("checkpoints", str(args.folder))
    started = time.perf_counter()
    model, clip, vae = core.CheckpointLoaderSimple().load_checkpoint(CHECKPOINT)
    loaded = time.perf_counter()
    from trainer.config import parse_config
    from trainer.models import EntryConditions
    from trainer.models.comfy.describe import describe
    from trainer.prompts.store import write_conditions

    data = description(args) | {"model": size(args) | {"family": "comfy", "graph": None}}
    data["model"]["graph"] = describe(model, vae, "simple", None, None, iter(()))
    data["prompts"]["conditions"] = str(args.folder / "conditions.safetensors")
    described = time.perf_counter()
    with torch.no_grad():
        scheduled = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in [*PROMPTS, ""]]
    batches = (EntryConditions.of([{"cross_attn": tokens, **extra}]) for tokens, extra in scheduled)
    keys = [(text, "") for text in [*PROMPTS, ""]]
    write_conditions(args.folder / "conditions.safetensors", keys, batches)
    parse_config(data)
    (args.folder / "graph_run.json").write_text(json.dumps(data))
    seconds = {"load": loaded - started, "describe": described - loaded, "encode": time.perf_counter() - described}
    return {"seconds": seconds}


# ---------------------------------------------------------------------------------------------------------- training


def size(args: argparse.Namespace) -> dict:
    return {"height": args.size, "width": args.size}


def description(args: argparse.Namespace) -> dict:
    """The run, but for its model."""
    return {
        "prompts": {"texts": PROMPTS},
        "rollout": {
            "steps": 4,
            "group_size": 2,
            "prompts_per_iteration": 2,
            "kernel": "ddim",
            "eta": 1.0,
            "guidance_scale": args.guidance,
        },
        "rewards": [{"name": "brightness"}, {"name": "colorfulness"}],
        "objective": {"batch_size": 2},
        "lora": {"rank": 16, "alpha": 32},
        "runtime": {"iterations": 1, "device": "cpu"},
    }


def train_diffusers(args: argparse.Namespace) -> dict:
    network = {"path": str(args.folder / "diffusers"), "network_file": str(args.folder / CHECKPOINT)}
    return train(description(args) | {"model": size(args) | network | {"family": "sd"}})


def train_graph(args: argparse.Namespace) -> dict:
    return train(json.loads((args.folder / "graph_run.json").read_text()))


STAGES = {"diffusers": train_diffusers, "graph": train_graph}


class Stopwatch:
    """Seconds inside some functions; a call inside another one counts for the outer one alone."""

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
        self.inside, started = True, time.perf_counter()
        try:
            yield
        finally:
            self.inside = False
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def train(data: dict) -> dict:
    """One iteration in this process, as the command line would run it."""
    import torch

    from trainer import loop
    from trainer.adapters import lora
    from trainer.config import parse_config
    from trainer.models import model_class
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
    started = time.process_time()
    event = trainer.iterate()
    busy = time.process_time() - started
    inside = sum(watch.seconds.get(name, 0.0) for name in ("network", "VAE", "rewards"))
    keys = lora.comfy_weights(trainer.policy.parameters, config.lora.alpha, trainer.model.lora_key)
    return {
        "seconds": before | event["seconds"],
        "busy": busy,
        "weights": config.model.dtype if config.model.graph is None else config.model.graph.weights,
        "outside": 1 - inside / event["seconds"]["total"],
        "deviation": event["objective"]["rollout_deviation"]["max"],
        "forwards_per_image": event["forwards_per_image"],
        "keys": len(keys),
        "parameters": sum(p.numel() for p in trainer.policy.parameters.values()),
    }


def table(results: dict[str, dict]) -> str:
    """The backends side by side."""
    backends = {name: found for name, found in results.items() if name != "host"}
    phases = list(dict.fromkeys(phase for found in backends.values() for phase in found["seconds"]))
    lines = [f"| | {' | '.join(backends)} |", f"|---|{'---|' * len(backends)}"]

    def line(title: str, cell: Callable[[dict], str]) -> None:
        lines.append(f"| {title} | {' | '.join(cell(found) for found in backends.values())} |")

    for phase in phases:
        line(f"{phase}, s", lambda found, phase=phase: f"{found['seconds'].get(phase, 0.0):.1f}")
    line("processor time of the iteration, s", lambda found: f"{found['busy']:.1f}")
    line("type of the weights", lambda found: found["weights"])
    line("peak memory of the training process, GiB", lambda found: f"{found['memory'] / GIB:.1f}")
    line("largest deviation of a ratio from 1 before the update", lambda found: f"{found['deviation']:.1e}")
    line("forward passes per image", lambda found: f"{found['forwards_per_image']:.1f}")
    line("tensors in the LoRA file", lambda found: str(found["keys"]))
    line("LoRA parameters", lambda found: f"{found['parameters'] / 1e6:.1f}M")
    line("time outside network, VAE and rewards", lambda found: f"{found['outside']:.2%}")
    if "host" in results:
        seconds = ", ".join(f"{name} {value:.1f} s" for name, value in results["host"]["seconds"].items())
        lines.append(
            f"\nComfyUI's process of the graph backend: {seconds}; peak {results['host']['memory'] / GIB:.1f} GiB."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
