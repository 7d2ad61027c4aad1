"""GPU memory that training a connected model takes, computed on the meta device from core's own networks.

    python benchmarks/memory.py --comfyui ~/ComfyUI            # the table in docs/comfy-backend.md
    python benchmarks/memory.py --comfyui ~/ComfyUI --check    # the same counting against memory really allocated

Nothing is loaded and nothing runs on a GPU. Each network is built in its released size without weights; the trainer's
own adapter puts the LoRA on it and checkpoints its blocks; one prediction goes forward and backward, others go forward
as in a rollout, the VAE decodes as many images as `model.decode_batch_size` says by default, and every tensor is
counted from when it is made until nothing refers to it any more. Attention counts as a fused kernel, which keeps what
comes in and goes out. Rollout, update, decoding and rewards take turns. Network and LoRA stay on the GPU for rollout
and update; ComfyUI moves the network to RAM as far as decoding or the rewards need its room. Not counted:
fragmentation, workspaces of matrix libraries, and the copies of weights that ComfyUI makes to move them from RAM.
`benchmarks/memory_presets.py` does the same for the presets of diffusers folders.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.core_models import FLUX, NETWORKS, Network, core_model, core_vae, entry, use_comfyui
from trainer.models.memory import STATES
from trainer.utils.allocation import AllocatedBytes, attention_memory, peak_bytes

META = torch.device("meta")
GB = 2**30
CONTEXT = 1.5 * GB
"""Left free for what is not counted: the GPU contexts of the server and of the training process, and the rest."""
CARDS = (12, 16, 24, 48, 80)
REWARDS = {"HPS-v2.1": 2 * 0.986e9}
"""Bytes of the weights of the reward that the table counts, in float16, as `dtype: auto` is on a GPU."""
TINY = Network(
    "Flux", FLUX | {"hidden_size": 256, "num_heads": 2, "depth": 3, "depth_single_blocks": 6}, (64, 4096, 768)
)


# ------------------------------------------------------------------------------------------------------------ counting


def fused_attention(_: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *arguments: Any, **keywords: Any) -> Tensor:
    """In place of ComfyUI's attention: the memory of a fused kernel, and none of its values."""
    batch, tokens = (q.shape[0], q.shape[2]) if keywords.get("skip_reshape") else q.shape[:2]
    width = q.shape[-1] if keywords.get("skip_reshape") else q.shape[-1] // heads
    shape = (batch, heads, tokens, width) if keywords.get("skip_output_reshape") else (batch, tokens, heads * width)
    return attention_memory(q, k, v, shape)


def build(
    network: Network, size: int, weights: torch.dtype, rank: int, device: torch.device, checkpointing: bool = True
) -> Any:
    """The trainer's model of a network, with its LoRA."""
    import comfy.model_patcher

    from trainer.adapters import lora
    from trainer.config import LoraConfig, ModelConfig
    from trainer.models.comfy.model import ComfyModel

    class Placed(ComfyModel):
        def _make_resident(self) -> None:
            """Everything is where it was built."""

    compute = torch.float32 if weights == torch.float32 else torch.bfloat16
    base = core_model(network.core, network.config, weights, None if weights == compute else compute, device)
    base.model_sampling.to(device)
    config = ModelConfig(
        family="comfy",
        graph={"folder": "x", "file": "x", "vae_file": "x"},
        height=size,
        width=size,
        frames=network.frames,
        gradient_checkpointing=checkpointing,
    )
    model = Placed(comfy.model_patcher.ModelPatcher(base, device, device), None, config)
    with device:
        lora.inject(model.module, LoraConfig(rank=rank, alpha=rank), model.default_targets, seed=0)
    return model


def prediction(model: Any, network: Network, batch: int) -> Callable[[], Tensor]:
    """A call that predicts for a batch of one prompt, and for its negative prompt where there is one."""
    device = model.device
    samplers, level = model.comfy.samplers, torch.full((batch,), 0.5, device=device)
    latents = torch.zeros(batch, *model.latent_shape)
    (condition,) = model._conditions_of(latents, entry(network), "positive")
    latents = latents.to(device)
    for part in condition["model_conds"].values():
        if isinstance(part.cond, Tensor):  # on the device, as a run has them
            part.cond = part.cond.to(device)

    def once() -> Tensor:
        parts = {
            name: part.process_cond(batch_size=batch, area=None) for name, part in condition["model_conds"].items()
        }
        given = samplers.cond_cat([parts])
        options = {"cond_or_uncond": [0], "uuids": [condition["uuid"]], "sigmas": level}
        options["optimized_attention_override"] = fused_attention
        given["transformer_options"] = options
        call = {"input": latents, "timestep": level, "c": given}
        return model._options["model_function_wrapper"](model.base.apply_model, call).float()

    return lambda: sum(once() for _ in range(1 + network.guided))


def update(predict: Callable[[], Tensor]) -> None:
    """Predictions of one batch and their backward pass, as an update makes them."""
    predict().square().sum().backward()


@dataclass(frozen=True)
class Counted:
    """Numbers of weights, and bytes.

    Attributes:
        parameters, lora: numbers of weights of the network and of the LoRA.
        weights: of the network.
        rollout, update: activations at their largest.
    """

    parameters: int
    lora: int
    weights: int
    rollout: int
    update: int

    @property
    def states(self) -> int:
        """LoRA, gradients and optimizer."""
        return self.lora * STATES

    @property
    def resident(self) -> int:
        """At the peak of rollout and update."""
        return self.weights + self.states + max(self.rollout, self.update)


def counted(
    network: Network,
    size: int,
    weights: torch.dtype,
    rank: int = 16,
    batch: int = 1,
    sampled: int = 1,
    checkpointing: bool = True,
) -> Counted:
    """
    Args:
        batch: predictions of an update.
        sampled: latents of a forward pass in the rollout.
    """
    from trainer.adapters import lora

    model = build(network, size, weights, rank, META, checkpointing)
    adapter = sum(value.numel() for value in lora.parameters(model.module).values())
    base = [value for value in model.module.parameters() if not value.requires_grad]
    sample, train = prediction(model, network, sampled), prediction(model, network, batch)
    with torch.no_grad(), AllocatedBytes() as forward:
        sample()
    with AllocatedBytes() as both:
        update(train)
    return Counted(
        parameters=sum(value.numel() for value in base),
        lora=adapter,
        weights=sum(value.numel() * value.element_size() for value in base),
        rollout=forward.peak,
        update=both.peak - adapter * 4,  # gradients are counted among the states
    )


@torch.no_grad()
def decoding(network: Network, size: int) -> int:
    """Bytes of the VAE, and of decoding as many images as the trainer decodes at once by default."""
    import comfy.model_management
    from comfy.ldm.lightricks.vae import causal_video_autoencoder

    comfy.model_management.ENABLE_PYTORCH_ATTENTION = True  # as on a GPU
    # LTX-Video's VAE writes its frames into RAM, which nothing can be copied to from the meta device: they count here.
    comfy.model_management.intermediate_device = lambda: META
    causal_video_autoencoder.get_max_chunk_size = lambda device: causal_video_autoencoder.MAX_CHUNK_SIZE
    model = build(network, size, torch.bfloat16, 1, META)
    latents = torch.zeros(model.decode_batch_size, *model.latent_shape, dtype=torch.bfloat16, device=META)
    vae = core_vae(network.vae).to(torch.bfloat16)
    return 2 * sum(value.numel() for value in vae.parameters()) + peak_bytes(lambda: vae.decode(latents))


# -------------------------------------------------------------------------------------------------------------- tables


def in_ram(bytes_needed: float, weights: float, gpu: float) -> str:
    """What has to stay in RAM on a GPU."""
    over = bytes_needed + CONTEXT - gpu * GB
    if over <= 0:
        return "all on the GPU"
    return f"{over / GB:.1f} in RAM" if over < 0.95 * weights else "no"


def choice(wide: Counted, narrow: Counted, alone: float, gpu: float) -> str:
    """The widest weights with which a model trains on a card.

    Args:
        wide, narrow: the network in bfloat16 and in fp8.
        alone: bytes of what needs room for itself: decoding and rewards.
        gpu: memory of the card in GiB.
    """
    if alone + narrow.states + CONTEXT > gpu * GB:
        return "no"
    for label, kind in (("bf16", wide), ("fp8", narrow)):
        if kind.resident + CONTEXT <= gpu * GB:
            return label
    kept = in_ram(narrow.resident, narrow.weights, gpu)
    return kept if kept == "no" else f"fp8, {kept}"


def table(names: list[str], sizes: list[int], rank: int, batch: int, sampled: int) -> Iterator[str]:
    judge, score = next(iter(REWARDS.items()))
    yield (
        "| model | size | weights bf16 / fp8 | LoRA | rollout | update bf16 / fp8 | decoding | "
        f"{judge} | server's RAM | {' | '.join(f'{card} GB' for card in CARDS)} |"
    )
    yield f"|{'---|' * (9 + len(CARDS))}"
    for name in names:
        network = NETWORKS[name]
        for size in [-(-size // network.multiple) * network.multiple for size in sizes]:
            wide = counted(network, size, torch.bfloat16, rank, batch, sampled)
            narrow = counted(network, size, torch.float8_e4m3fn, rank, batch, sampled)
            decoded = decoding(network, size)
            frames = f" x {network.frames}" if network.frames > 1 else ""
            server = (wide.weights + 2 * network.encoders) / GB
            fits = " | ".join(choice(wide, narrow, max(decoded, score), card) for card in CARDS)
            yield (
                f"| {name}, {wide.parameters / 1e9:.2f}B | {size} x {size}{frames} | {wide.weights / GB:.1f} / "
                f"{narrow.weights / GB:.1f} | {wide.states / GB:.2f} | {wide.rollout / GB:.1f} | "
                f"{wide.update / GB:.1f} / {narrow.update / GB:.1f} | {decoded / GB:.1f} | {score / GB:.1f} | "
                f"{server:.0f} | {fits} |"
            )


def check() -> tuple[float, float]:
    """Largest memory in MB of a tiny network on a CPU: as its allocator tells, and as counted without values."""
    from torch.profiler import ProfilerActivity, profile

    cpu = torch.device("cpu")
    model = build(TINY, 256, torch.float32, 16, cpu)
    predict = prediction(model, TINY, 2)
    update(predict)
    model.module.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        update(predict)
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    predict = prediction(build(TINY, 256, torch.float32, 16, META), TINY, 2)
    with AllocatedBytes() as counter:
        update(predict)
    return peak / 2**20, counter.peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="MODEL")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 720], help="height and width in pixels")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="objective.batch_size")
    parser.add_argument("--sampled", type=int, default=4, help="rollout.batch_size")
    parser.add_argument("--check", action="store_true", help="compare the counting with memory that is allocated")
    args = parser.parse_args()
    use_comfyui(args.comfyui, torch.device("cpu"))
    if args.check:
        print("allocated {:.1f} MB, computed {:.1f} MB".format(*check()))
        return
    for line in table(args.models, args.sizes, args.rank, args.batch, args.sampled):
        print(line, flush=True)


if __name__ == "__main__":
    main()
