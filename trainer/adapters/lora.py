"""The LoRA adapter: injection, reading and setting its weights, and saving with ComfyUI's key names."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import LoraConfig
from ..models.base import FusedRows, matching
from ..utils.files import write_atomically
from .compute import compute_in_base_dtype

ADAPTER = "default"


def inject(
    module: nn.Module,
    config: LoraConfig,
    targets: tuple[str, ...],
    seed: int,
    device: torch.device | None = None,
) -> list[str]:
    """Add a LoRA with float32 weights to every target of a frozen network; initially it changes nothing.

    Args:
        targets: suffixes of module names, used if the configuration has none.
        device: device of the LoRA's weights; None for that of the weights they belong to.

    Returns:
        names of the modules that have a LoRA.

    Raises:
        BadInput: a target matches nothing.
    """
    import peft

    # Full names, because a suffix such as `skip_connection` also matches modules that peft does not support.
    wanted = sorted(set(matching(module, config.targets or list(targets))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=wanted, lora_dropout=0.0), module
        )
    for parameter in parameters(module).values():
        parameter.data = parameter.data.to(device or parameter.device, torch.float32)
        parameter.requires_grad_(True)
    compute_in_base_dtype(module)
    return sorted({name.rsplit(".lora_", 1)[0] for name in parameters(module)})


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA's parameters by name, in a fixed order."""
    return {name: p for name, p in module.named_parameters() if f".{ADAPTER}." in name and ".lora_" in name}


def set_enabled(module: nn.Module, enabled: bool) -> None:
    """Enable or disable the LoRA in forward passes; without it, the network is the base model."""
    from peft.tuners.lora import LoraLayer

    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            layer.enable_adapters(enabled)


@torch.no_grad()
def load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Set the LoRA's weights, by parameter name."""
    for name, parameter in parameters(module).items():
        parameter.copy_(weights[name])


def comfy_weights(weights: dict[str, Tensor], alpha: float, key: Callable[[str], str | FusedRows]) -> dict[str, Tensor]:
    """Weights with ComfyUI's key names, including `.alpha`, without which ComfyUI would use a scale of 1.

    Args:
        weights: by parameter name, `<module>.lora_A.default.weight`.
        key: maps a module's name to ComfyUI's, or to its part of a layer that is fused in ComfyUI.
    """
    plain: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        module, _, rest = name.partition(".lora_")
        plain.setdefault(module, {})[rest[0]] = value.detach().float().cpu().contiguous()
    parts: dict[str, list[tuple[FusedRows, dict[str, Tensor]]]] = {}
    result: dict[str, Tensor] = {}
    for module, pair in plain.items():
        native = key(module)
        if isinstance(native, str):
            result |= _entries(native, pair["A"], pair["B"], alpha)
        else:
            parts.setdefault(native.key, []).append((native, pair))
    for name, fused in parts.items():
        result |= _entries(name, *_fuse(fused), alpha * len(fused))
    return result


def _entries(key: str, down: Tensor, up: Tensor, alpha: float) -> dict[str, Tensor]:
    return {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.alpha": torch.tensor(float(alpha))}


def _fuse(parts: list[tuple[FusedRows, dict[str, Tensor]]]) -> tuple[Tensor, Tensor]:
    """Merge the LoRAs of the parts of a fused layer: ranks add up, and each part affects only its own output rows."""
    rank = parts[0][1]["A"].shape[0]
    up = torch.zeros(parts[0][0].total, rank * len(parts))
    for i, (rows, pair) in enumerate(parts):
        up[rows.first : rows.first + len(pair["B"]), i * rank : (i + 1) * rank] = pair["B"]
    return torch.cat([pair["A"] for _, pair in parts]), up


def save(path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a LoRA file atomically."""
    from safetensors.torch import save as serialize

    write_atomically(path, serialize(weights, metadata))
