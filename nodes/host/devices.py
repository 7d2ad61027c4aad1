"""Device memory and GPUs for the processes of a run."""

import gc
import os

import comfy.model_management as memory
import torch

from ...trainer.config import ModelConfig
from ...trainer.models import model_bytes, weight_bytes
from ...trainer.utils.errors import BadInput, shorten

GIB = 2**30
HEADROOM = 0.5 * GIB
"""Memory in bytes that a process needs at least besides the weights: the CUDA context and libraries."""


def free_memory() -> None:
    """Unload ComfyUI's models to free device memory for the trainer."""
    memory.unload_all_models()
    gc.collect()
    memory.soft_empty_cache()


def make_room_for_reward(size: int, device: torch.device) -> None:
    """Free memory for a reward's weights, and what core keeps free beside a model for its activations."""
    memory.free_memory(size + memory.minimum_inference_memory(), device)


def require_memory(model: ModelConfig, gpus: list[int] | None, processes: int, on_cpu: bool, rewards: int = 0) -> None:
    """
    Args:
        rewards: bytes of the reward models, which score when images have been decoded.

    Raises:
        BadInput: a device has too little memory for the model's weights and for decoding.
    """
    decoding = model_bytes(model, processes)
    need = max(decoding, weight_bytes(model, processes) + rewards) + HEADROOM
    ram = memory.get_free_memory(torch.device("cpu"))
    if on_cpu or memory.get_torch_device().type == "cpu":
        _require("this computer", ram, need * processes)
        return
    for label, device in _devices(gpus, processes):
        free = memory.get_free_memory(device)
        if model.graph is None:
            _require(label, free, need)
        else:  # weights that do not fit stay in RAM
            _require(f"{label} with this computer's RAM", free + ram / processes, need)


def _require(label: str, free: float, need: float) -> None:
    if free < need:
        raise BadInput(
            f"{label} has {free / GIB:.1f} GiB of free memory after ComfyUI's models were unloaded, but the "
            f"base model's weights with decoding or rewards need {need / GIB:.1f} GiB: close other programs, choose "
            "bfloat16 or smaller rewards, or lower model.decode_batch_size"
        )


def _devices(gpus: list[int] | None, processes: int) -> list[tuple[str, torch.device]]:
    """The devices of the run whose free memory ComfyUI can query."""
    own = memory.get_torch_device()
    if gpus is None and processes == 1:
        return [(f"device {own}", own)]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())]
    wanted = seen[:processes] if gpus is None else [str(gpu) for gpu in gpus]
    return [(f"GPU {gpu}", torch.device("cuda", seen.index(gpu))) for gpu in wanted if gpu in seen]


def parse_gpus(text: str, processes: int) -> list[int] | None:
    """GPU numbers from a widget; None if it is empty.

    Raises:
        BadInput: it is not a list of different numbers, one per process.
    """
    gpus = gpu_numbers(text)
    if gpus and (len(set(gpus)) != len(gpus) or len(gpus) != processes):
        raise BadInput(f"gpus is {shorten(text)}: list {processes} different GPUs, one per process, or leave it empty")
    return gpus or None


def gpu_numbers(text: str) -> list[int]:
    """
    Raises:
        BadInput: the text is not a list of numbers separated by commas.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isascii() and word.isdigit() and len(word) < 5 for word in words):
        raise BadInput(f"gpus is {text[:60]!r}: enter numbers separated by commas, such as 0,1, or leave it empty")
    return [int(word) for word in words]


def require_gpus(gpus: list[int] | None, processes: int) -> None:
    """
    Raises:
        BadInput: there are more processes than GPUs that ComfyUI sees, and `gpus` is None.
    """
    seen = torch.cuda.device_count()
    if gpus is None and seen and processes > seen and memory.get_torch_device().type != "cpu":
        raise BadInput(f"processes is {processes}, but ComfyUI sees {seen} GPU(s): list GPUs in gpus, such as 0,1")
