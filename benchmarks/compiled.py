"""What `runtime.compile` gains or costs: processor seconds of a rollout's and an update's pass, compiled and not.

    python benchmarks/compiled.py flux --dtype float32

Networks of diffusers with random weights and a LoRA of rank 16 on the attention, on one thread of a CPU: `flux` is
FLUX.1's with 4 single blocks of width 1024 (16 x 16 tokens of the image), `sd15` is SD1.5's UNet at its real
size (256 x 256 pixels). Passes are timed in turns, uncompiled and compiled, after a first one of each; the
compiler's own time, with that of the programs that it starts, is told beside it.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
FLUX = {"num_layers": 0, "num_single_layers": 4, "attention_head_dim": 64, "num_attention_heads": 16}
FLUX |= {"joint_attention_dim": 512, "pooled_projection_dim": 256, "axes_dims_rope": (16, 24, 24)}
SIDE = {"flux": 16, "sd15": 32}
"""Tokens or latents along an edge."""


def network(name: str, dtype: torch.dtype) -> nn.Module:
    """The frozen network with a LoRA."""
    import diffusers

    from trainer.adapters import lora
    from trainer.config import LoraConfig

    torch.manual_seed(0)
    if name == "flux":
        module = diffusers.FluxTransformer2DModel(**FLUX)
    else:
        module = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    module = nn.Module.to(module, dtype).eval().requires_grad_(False)
    lora.inject(module, LoraConfig(rank=16), ("to_q", "to_k", "to_v"), 0)
    for parameter in lora.parameters(module).values():
        parameter.data.normal_(std=0.02)
    return module


def prediction(name: str, module: nn.Module, rows: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A call of the network on random inputs."""
    generator, side = torch.Generator().manual_seed(1), SIDE[name]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    levels = torch.full((rows,), 0.5)
    if name == "sd15":
        latents, text = draw(rows, 4, side, side), draw(rows, 77, 768)
        return lambda: module(latents, 500 * levels, text, return_dict=False)[0]
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    given = {
        "hidden_states": draw(rows, side * side, 64),
        "encoder_hidden_states": draw(rows, 64, FLUX["joint_attention_dim"]),
        "pooled_projections": draw(rows, FLUX["pooled_projection_dim"]),
        "timestep": levels,
        "img_ids": torch.cat([torch.zeros(len(places), 1), places], dim=1),
        "txt_ids": torch.zeros(64, 3),
    }
    return lambda: module(**given, return_dict=False)[0]


def passes(module: nn.Module, predict: Callable[[], Tensor]) -> dict[str, Callable[[], Tensor]]:
    """A prediction without gradient, and one with its backward pass, which returns the gradient."""
    from trainer.adapters import lora

    parameters = list(lora.parameters(module).values())

    def rollout() -> Tensor:
        with torch.no_grad():
            return predict()

    def update() -> Tensor:
        predict().float().square().sum().backward()
        found = torch.cat([parameter.grad.flatten() for parameter in parameters])
        for parameter in parameters:
            parameter.grad = None
        return found

    return {"rollout": rollout, "update": update}


def spent() -> float:
    """Processor seconds of this process and of the ones it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(SIDE))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    from trainer.models.compiled import compile_repeated_blocks

    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    module = network(args.name, dtype)
    if args.checkpointing:
        module.enable_gradient_checkpointing()
    calls = passes(module, prediction(args.name, module, args.rows, dtype))
    plain = {kind: call() for kind, call in calls.items()}
    compile_repeated_blocks(module)
    print(f"{args.name}, {sum(p.numel() for p in module.parameters()) / 1e6:.0f}M parameters, {args.dtype}")
    print("| pass | uncompiled, s | compiled, s | compiling, s | difference |")
    print("|---|---|---|---|---|")
    for kind, call in calls.items():
        started = spent()
        found = call()
        first = spent() - started
        seconds: dict[str, list[float]] = {"plain": [], "compiled": []}
        for _ in range(args.times):
            with torch.compiler.set_stance("force_eager"):
                seconds["plain"].append(timed(call))
            seconds["compiled"].append(timed(call))
        before, after = (statistics.median(values) for values in seconds.values())
        off = (found - plain[kind]).norm() / plain[kind].norm()
        print(f"| {kind} | {before:.2f} | {after:.2f} | {first - after:.0f} | {off:.1e} |", flush=True)


def timed(call: Callable[[], Tensor]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


if __name__ == "__main__":
    main()
