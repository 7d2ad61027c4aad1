"""Memory of a run by part, known before any weights are loaded."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import GraphModel, LoraConfig, ModelConfig, RunConfig
from ..shapes import WEIGHTS
from ..utils.allocation import peak_bytes
from .base import Conditions, DiffusionModel
from .diffusers.family import DiffusersModel
from .diffusers.single_file import PREFIX

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "auto": 4.0, "int8": 1.0, "nf4": 0.5}
"""Bytes per weight; "auto" is float32 at most."""


STATES = 16
"""Bytes per LoRA parameter: float32 weight and gradient, and AdamW's two moments."""
META = torch.device("meta")


@dataclass(frozen=True)
class RunMemory:
    """Device memory of one process, in bytes.

    The device's context (about 0.5 GB), fragmentation and workspaces of kernels are not counted.

    Attributes:
        weights: the network and the VAE.
        adapter: the LoRA, its gradient, the optimizer's states and its moving average.
        rollout: one forward pass of `rollout.batch_size` images at its peak.
        update: one forward and backward pass of `objective.batch_size` predictions at its peak.
        decode: decoding at its peak.
    """

    weights: int
    adapter: int
    rollout: int
    update: int
    decode: int

    def total(self, rewards: int = 0) -> int:
        """At the peak: rollout, decoding, rewards and update take turns.

        Args:
            rewards: bytes of the reward models while they score.
        """
        return self.weights + self.adapter + max(self.rollout, self.update, self.decode, rewards)


def run_memory(family: type[DiffusersModel], config: RunConfig, processes: int = 1) -> RunMemory:
    """Memory of a run of a diffusers folder, counted on PyTorch's meta device from configurations and file headers."""
    model = family.on_meta(config.model)
    parameters = add_adapter(model, config.lora)
    rollout, batch = config.rollout, config.objective.batch_size

    def conditions(count: int) -> Conditions:
        return family.empty_conditions(config.model, count, META)

    def passes(count: int) -> Callable[[], torch.Tensor]:
        return prediction(model, conditions(count), conditions(1), rollout.guidance_scale)

    return RunMemory(
        weights=weight_bytes(config.model, processes),
        adapter=parameters * (STATES + (4 if config.lora.ema_decay else 0)),
        rollout=forward_bytes(passes(rollout.batch_size)),
        update=update_bytes(passes(batch)) - parameters * 4,  # gradients are the adapter's
        decode=family.decode_bytes(config.model),
    )


def add_adapter(model: DiffusionModel, config: LoraConfig) -> int:
    """Inject the LoRA into a model on the meta device; returns its number of parameters."""
    from ..adapters import lora

    with META:
        lora.inject(model.module, config, model.default_targets, seed=0)
    return sum(parameter.numel() for parameter in lora.parameters(model.module).values())


def prediction(
    model: DiffusionModel, conditions: Conditions, unconditional: Conditions, guidance_scale: float
) -> Callable[[], torch.Tensor]:
    """A call that predicts for as many latents as there are conditions."""
    latents = torch.zeros(len(conditions), *model.latent_shape, device=META)
    sigma = torch.full((len(conditions),), 0.5, device=META)
    return lambda: model.predict_guided(latents, sigma, conditions, guidance_scale, unconditional)


@torch.no_grad()
def forward_bytes(predict: Callable[[], torch.Tensor]) -> int:
    """Peak memory of a prediction in a rollout."""
    return peak_bytes(predict)


def update_bytes(predict: Callable[[], torch.Tensor]) -> int:
    """Peak memory of a prediction and its backward pass, gradients of the LoRA included."""
    return peak_bytes(lambda: predict().square().sum().backward())


def weight_bytes(config: ModelConfig, processes: int = 1) -> int:
    """Bytes that the network and the VAE take in each process; 0 for folders without safetensors files.

    Args:
        processes: of the run; they share a sharded network.
    """
    if config.graph is not None:
        return sum(file.stat().st_size for file in _graph_files(config.graph))
    folder = WEIGHTS if config.path == "embedded" else Path(config.path)
    if config.network_file is None:
        network = sum(parameter_count(folder / name) for name in ("transformer", "unet"))
    else:
        sizes = _sizes(Path(config.network_file))
        network = sum(size for name, size in sizes.items() if name.startswith(PREFIX)) or sum(sizes.values())
    network *= BYTES[config.quantization or config.dtype] / (processes if config.sharded else 1)
    return int(network + parameter_count(folder / "vae") * BYTES[config.vae_dtype])


def graph_parameter_count(graph: GraphModel) -> int:
    """Number of weights in the files of a graph's model; two bytes are taken for one where a file is no safetensors."""
    return sum(sum(_sizes(file).values()) or file.stat().st_size // 2 for file in _graph_files(graph))


def _graph_files(graph: GraphModel) -> set[Path]:
    """Files of the networks and the VAE; a checkpoint, which holds both, is one."""
    low_noise = {graph.low_noise.file} if graph.low_noise else set()
    return {Path(file) for file in {graph.file, graph.vae_file} | low_noise}


def latent_numbers(family: type[DiffusionModel], config: ModelConfig) -> int:
    """Number of elements of one image's latents; loads nothing. 0 for a graph's model, which is known once loaded."""
    return math.prod(family.on_meta(config).latent_shape) if issubclass(family, DiffusersModel) else 0


def parameter_count(component: Path) -> int:
    """Number of weights in the `.safetensors` files of a folder, read from their headers; 0 where there are none.

    A folder that holds the weights twice (a `fp16` variant beside them) is counted once.
    """
    sizes: dict[str, int] = {}
    for file in sorted(component.glob("*.safetensors")):
        sizes.update(_sizes(file))
    return sum(sizes.values())


def _sizes(file: Path) -> dict[str, int]:
    """Number of elements per tensor name; empty where it is not a safetensors file, which loading reports."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            return {name: math.prod(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}
