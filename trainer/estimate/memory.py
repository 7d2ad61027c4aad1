"""Computes the memory of a run by part before anything is loaded, and which settings would reduce it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from ..check import CheckedRun
from ..config import ModelConfig, RunConfig
from ..models.diffusers.family import DiffusersModel
from ..models.memory import (
    BYTES,
    graph_parameter_count,
    latent_numbers,
    parameter_count,
    run_memory,
    weight_bytes,
)
from ..rewards import memory_together
from ..runs.capacity import iteration_bytes
from ..shapes import WEIGHTS

NETWORK, ADAPTER, HELD, PROCESS = (
    "network and VAE",
    "LoRA, gradients and optimizer",
    "latents and images of an iteration",
    "Python and libraries",
)
ROLLOUT, UPDATE, DECODE, REWARDS, ENCODERS = (
    "activations of the rollout",
    "activations of the update",
    "decode",
    "rewards",
    "text encoders",
)
TURNS = (ROLLOUT, UPDATE, DECODE, REWARDS)
"""Parts of which only one is on the device at a time."""
SAMPLED_PER_TRAINED = 3
"""Latents in a forward pass of the rollout that need no more than one of the update with gradient checkpointing; by the
table of presets in docs/families.md, more than three do."""
GRAPH_PROCESS = 800 * 2**20
"""Bytes of a training process with PyTorch, diffusers and ComfyUI's modules, before it loads a model."""
WORTH_IT = 0.02
"""A change is suggested if it saves at least this share of the peak."""


def parts(config: RunConfig, checked: CheckedRun, processes: int, on_cpu: bool) -> dict[str, int]:
    """Bytes of one process by part. For ComfyUI's models, activations are known only once they are measured.

    The device's context, fragmentation and workspaces of kernels are not counted.
    """
    found: dict[str, int] = {}
    if issubclass(checked.family, DiffusersModel):
        memory = run_memory(checked.family, config, processes)
        found |= {NETWORK: memory.weights, ADAPTER: memory.adapter, ROLLOUT: memory.rollout, UPDATE: memory.update}
        found |= {DECODE: memory.decode, ENCODERS: _encoders(config)}
    else:
        found[NETWORK] = weight_bytes(config.model, processes)
    found[REWARDS] = memory_together(checked.all_rewards.values())
    found[HELD] = iteration_bytes(config, processes, latent_numbers(checked.family, config.model))
    if on_cpu:
        found[PROCESS] = psutil.Process().memory_info().rss
    return found


def _encoders(config: RunConfig) -> int:
    """Bytes of the text encoders, which are in memory only while the prompts are encoded."""
    if config.prompts.conditions is not None:
        return 0
    folder = WEIGHTS if config.model.path == "embedded" else Path(config.model.path)
    count = sum(parameter_count(path) for path in folder.glob("text_encoder*") if path.is_dir())
    return int(count * BYTES[config.model.dtype])


def peak(found: dict[str, int], on_cpu: bool) -> int:
    """Peak memory in bytes. On a GPU only one of TURNS is in memory at a time; on a CPU, reward weights stay."""
    base = found.get(NETWORK, 0) + found.get(ADAPTER, 0) + found.get(HELD, 0)
    turns = [found.get(name, 0) for name in TURNS if not (on_cpu and name == REWARDS)]
    always = found.get(PROCESS, 0) + (found.get(REWARDS, 0) if on_cpu else 0)
    return always + max(base + max(turns), found.get(ENCODERS, 0))


def free_bytes(device: torch.device) -> int:
    """Memory available to this process on the device, including what it already holds."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def name_of(device: torch.device) -> str:
    """Display name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this computer's RAM"


def measured_peak(device: torch.device) -> int:
    """Peak memory of this process so far in bytes, on the GPU or in RAM."""
    from ..runs.metrics import peak_memory

    return int(peak_memory(device) * 2**20)


# -------------------------------------------------------------------------------------------------- what to change


def changes(config: RunConfig, checked: CheckedRun, processes: int, on_cpu: bool) -> list[tuple[str, int]]:
    """Settings that save memory, with the bytes that each saves alone; the cheapest first."""
    if not issubclass(checked.family, DiffusersModel):
        return []
    now = parts(config, checked, processes, on_cpu)
    whole, found = peak(now, on_cpu), []
    for label, changed in _candidates(config, checked.family):
        saved = whole - peak(parts(changed, checked, processes, on_cpu), on_cpu)
        if saved >= WORTH_IT * whole:
            found.append((label, saved))
    return found


def _candidates(config: RunConfig, family: type[DiffusersModel]) -> Iterator[tuple[str, RunConfig]]:
    model, objective, rollout = config.model, config.objective, config.rollout
    if not model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true", _with(config, "model", gradient_checkpointing=True)
    if objective.batch_size > 1:
        size = objective.batch_size // 2
        yield f"objective.batch_size={size}", _with(config, "objective", batch_size=size)
    if rollout.batch_size > 1:
        size = rollout.batch_size // 2
        yield f"rollout.batch_size={size}", _with(config, "rollout", batch_size=size)
    if model.decode_batch_size != 1:
        yield "model.decode_batch_size=1", _with(config, "model", decode_batch_size=1)
    if model.dtype == "float32" and model.path != "embedded":
        yield "model.dtype=bfloat16", _with(config, "model", dtype="bfloat16")
    for kind in ("int8", "nf4") if model.quantization is None and model.path != "embedded" else ():
        yield f"model.quantization={kind}", _with(config, "model", quantization=kind)
    if config.lora.rank > 8:
        rank = config.lora.rank // 2
        yield f"lora.rank={rank}", _with(config, "lora", rank=rank)
    if rollout.group_size > 4:
        group = rollout.group_size // 2
        yield f"rollout.group_size={group}", _with(config, "rollout", group_size=group)
    smaller = {side: getattr(model, side) * 3 // 4 // 64 * 64 for side in ("width", "height")}
    if min(smaller.values()) >= 256:
        label = f"model.width={smaller['width']} and model.height={smaller['height']}"
        yield label, _with(config, "model", **smaller)


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def graph_bytes(config: ModelConfig, batch: int, rank: int, checkpointing: bool) -> int:
    """A rule of thumb for what a connected model needs beside its weights, which ComfyUI keeps in RAM where needed.

    It bounds the computed table of docs/comfy-backend.md from above: 3 GiB of activations per million pixels of images
    and 5 GiB per million pixels and latent frame of videos, for one prediction with gradient checkpointing; six times
    as much without; and a LoRA with its optimizer of 8% of the weights in bfloat16 at rank 16.
    """
    frames = 1 + (config.frames - 1) // 4
    megapixels = config.height * config.width * frames / 1e6
    activations = (3 if frames == 1 else 5) * 2**30 * megapixels * batch * (1 if checkpointing else 6)
    return int(activations + 0.08 * weight_bytes(config) * rank / 16)


def graph_run_bytes(config: RunConfig) -> int:
    """What update and rollout of a run on a connected model need beside its weights, by the rule of `graph_bytes`."""
    model, rank = config.model, config.lora.rank
    sampled = -(-config.rollout.batch_size // SAMPLED_PER_TRAINED)
    update = graph_bytes(model, config.objective.batch_size, rank, model.gradient_checkpointing)
    return max(update, graph_bytes(model, sampled, rank, checkpointing=True))


def graph_peak(config: RunConfig, rewards: int, on_cpu: bool) -> int:
    """Bytes that a run on a connected model needs at its peak, by the same rule.

    On a GPU the reward models take turns with the network, whose weights ComfyUI keeps in RAM where they do not fit. On
    a CPU all of them share one memory, and core computes in float32: from smaller weights it makes float32 copies,
    which wait for the backward pass unless there is gradient checkpointing.

    Args:
        rewards: bytes of the reward models.
    """
    network, model = graph_run_bytes(config), config.model
    if not on_cpu:
        return max(network, rewards)
    itemsize = getattr(torch, model.graph.weights or "float32").itemsize
    copies = 0 if model.gradient_checkpointing or itemsize == 4 else 4
    weights = graph_parameter_count(model.graph) * (itemsize + copies)
    return GRAPH_PROCESS + network + rewards + weights


def with_reserve(config: RunConfig) -> ModelConfig:
    """The section `model`; where its graph leaves `reserve_gb` open, with what the run needs beside the weights."""
    model, graph = config.model, config.model.graph
    if graph is None or graph.reserve_gb is not None:
        return model
    reserve = min(graph_run_bytes(config) / 2**30, 1000.0)
    return model.model_copy(update={"graph": graph.model_copy(update={"reserve_gb": reserve})})


GRAPH_CHANGES: tuple[str, ...] = (
    "load an fp8 file of the model: half the memory of bfloat16 weights",
    "raise reserve_gb of GRPO Base Model: ComfyUI then leaves more of the weights in RAM",
    "model.gradient_checkpointing=true",
    "objective.batch_size and rollout.batch_size: halve them",
    "a smaller width and height in GRPO Base Model",
)
"""Ways to save memory if the model comes from a ComfyUI graph; the cheapest first."""
