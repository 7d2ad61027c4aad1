"""Operations and memory traffic that a LoRA adds to a network: in the base's dtype, and as peft computes it.

    python benchmarks/kernels.py sd15 sdxl

The networks are built in their released sizes on PyTorch's meta device, so nothing is computed: every operation that
reaches the device is counted (views are not), with the bytes of its inputs and outputs. On a GPU each operation is one
kernel or a few.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from core_networks import SDXL_DIFFUSERS

NETWORKS = {
    "sd15": {"cross_attention_dim": 768, "sample_size": 64},
    "sdxl": SDXL_DIFFUSERS | {"sample_size": 128},
}


@dataclass
class Counts:
    """Operations, those among them that only change the dtype, and bytes read and written."""

    operations: int = 0
    casts: int = 0
    traffic: int = 0


_FREE = (torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attention as one operation, as on a GPU; on the meta device PyTorch writes it out."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


class Counter(TorchDispatchMode):
    """Counts the operations of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.is_view or function in _FREE:
            return result
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        self.counts.operations += 1
        self.counts.casts += function is torch.ops.aten._to_copy.default
        self.counts.traffic += sum(t.numel() * t.element_size() for t in tensors)
        return result


def counted(call: Callable[[], Any]) -> Counts:
    with Counter() as counter:
        call()
    return counter.counts


def network(name: str, dtype: torch.dtype, variant: str, rank: int) -> nn.Module:
    """A frozen UNet on the meta device: without LoRA (`base`), with peft's layers (`peft`) or with ours (`ours`)."""
    import diffusers
    from diffusers.models.attention_processor import AttnProcessor2_0

    from trainer.adapters import lora
    from trainer.config import LoraConfig
    from trainer.models.diffusers.family import ATTENTION

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**NETWORKS[name])
    unet = nn.Module.to(unet, dtype).requires_grad_(False)
    unet.set_attn_processor(AttnProcessor2_0())
    if variant != "base":
        targets = tuple(target.removeprefix("attn.") for target in ATTENTION)
        with torch.device("meta"):
            lora.inject(unet, LoraConfig(rank=rank), targets, 0)
    if variant == "peft":
        for layer in unet.modules():
            if hasattr(layer, "lora_A"):
                layer.__class__ = type(layer).__mro__[1]
    return unet


def passes(unet: nn.Module, batch: int, size: int) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """A forward pass without gradient, and one with its backward pass."""
    config, dtype = unet.config, next(p.dtype for p in unet.parameters() if not p.requires_grad)
    with torch.device("meta"):
        latents = torch.zeros(batch, 4, size // 8, size // 8, dtype=dtype)
        steps, text = torch.zeros(batch), torch.zeros(batch, 77, config.cross_attention_dim, dtype=dtype)
        added = {"text_embeds": torch.zeros(batch, 1280, dtype=dtype), "time_ids": torch.zeros(batch, 6)}
    extra = {"added_cond_kwargs": added} if config.addition_embed_type else {}

    def predict() -> Tensor:
        return unet(latents, steps, text, return_dict=False, **extra)[0]

    def forward() -> Tensor:
        with torch.no_grad():
            return predict()

    return forward, lambda: predict().float().square().sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=list(NETWORKS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    from trainer.adapters.compute import cast_once

    nn.functional.scaled_dot_product_attention = flash_attention
    print("| network | LoRA | sampling: operations | casts | GiB | update: operations | casts | GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.names:
        for variant in ("base", "peft", "ours"):
            unet = network(name, getattr(torch, args.dtype), variant, args.rank)
            forward, both = passes(unet, args.batch, args.size)
            with cast_once(unet):
                forward()  # the first of a rollout, which casts the weights
                cells = [counted(forward)]
            if variant != "base":
                cells.append(counted(both))
            figures = [f"{c.operations} | {c.casts} | {c.traffic / 2**30:.1f}" for c in cells]
            print(f"| {name} | {variant} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
