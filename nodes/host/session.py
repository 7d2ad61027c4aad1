"""ComfyUI's side of a run: its memory, and what it shows while it waits."""

import gc
import os
from pathlib import Path

import comfy.model_management as memory
import torch
from comfy.utils import ProgressBar
from server import PromptServer

from ...trainer.config import ModelConfig
from ...trainer.models import model_bytes
from ...trainer.utils.errors import BadInput

GIB = 2**30
HEADROOM = 0.5 * GIB
"""What a process needs beside the model, at the very least: CUDA's own context, or the libraries."""


def free_memory() -> None:
    """Move ComfyUI's models out, so that the trainer finds the device as empty as it can be."""
    memory.unload_all_models()
    gc.collect()
    memory.soft_empty_cache()


def require_memory(model: ModelConfig, gpus: list[int] | None, processes: int, on_cpu: bool) -> None:
    """
    Raises:
        BadInput: with the figures, where a device cannot even hold the model's weights and decode its images.
    """
    need, ram = model_bytes(model, processes) + HEADROOM, memory.get_free_memory(torch.device("cpu"))
    if on_cpu or memory.get_torch_device().type == "cpu":
        _require("this computer", ram, need * processes)
        return
    for label, device in _devices(gpus, processes):
        free = memory.get_free_memory(device)
        if model.graph is None:
            _require(label, free, need)
        else:  # what does not fit stays in RAM
            _require(f"{label} with this computer's RAM", free + ram / processes, need)


def _require(label: str, free: float, need: float) -> None:
    if free < need:
        raise BadInput(
            f"{label} has {free / GIB:.1f} GiB of memory free after ComfyUI's models were unloaded, and the "
            f"base model's weights and decoding take {need / GIB:.1f} GiB: close other programs, choose bfloat16, or "
            "lower model.decode_batch_size"
        )


def _devices(gpus: list[int] | None, processes: int) -> list[tuple[str, torch.device]]:
    """Those of the run's devices that ComfyUI sees, and so can measure."""
    own = memory.get_torch_device()
    if gpus is None and processes == 1:
        return [(f"device {own}", own)]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())]
    wanted = seen[:processes] if gpus is None else [str(gpu) for gpu in gpus]
    return [(f"GPU {gpu}", torch.device("cuda", seen.index(gpu))) for gpu in wanted if gpu in seen]


def parse_gpus(text: str, processes: int) -> list[int] | None:
    """GPU numbers from a widget; None leaves the choice to ComfyUI's own environment.

    Raises:
        BadInput: no list of as many different numbers as there are processes.
    """
    gpus = gpu_numbers(text)
    if gpus and (len(set(gpus)) != len(gpus) or len(gpus) != processes):
        raise BadInput(f"gpus is {text!r}: {processes} processes take {processes} different GPUs")
    return gpus or None


def gpu_numbers(text: str) -> list[int]:
    """
    Raises:
        BadInput: something else than numbers with commas between them.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isascii() and word.isdigit() and len(word) < 5 for word in words):
        raise BadInput(f"gpus is {text!r}: give numbers separated by commas, such as 0,1, or nothing")
    return [int(word) for word in words]


def require_gpus(gpus: list[int] | None, processes: int) -> None:
    """
    Raises:
        BadInput: more processes than the GPUs that would be found.
    """
    seen = torch.cuda.device_count()
    if gpus is None and seen and processes > seen and memory.get_torch_device().type != "cpu":
        raise BadInput(f"{processes} processes, but ComfyUI sees {seen} GPU(s): name them in gpus, such as 0,1")


def check_interrupt() -> None:
    """Raise ComfyUI's own exception (a BaseException) when the user cancels."""
    memory.throw_exception_if_processing_interrupted()


class Screen:
    """The node on the screen: a progress bar, a picture, a line of text. Only what changed is sent.

    Args:
        node_id: of the node that runs.
    """

    def __init__(self, node_id: str, iterations: int) -> None:
        self.node_id, self.iterations = node_id, iterations
        self.bar = ProgressBar(iterations, node_id=node_id)
        self.text, self.place = "", (-1, None)

    def show(self, iteration: int, text: str, picture: Path | None) -> None:
        """
        Args:
            picture: newest sample picture, if there is one.
        """
        place = (iteration, picture)
        if place != self.place:
            preview = _preview(picture) if picture != self.place[1] else None
            self.bar.update_absolute(iteration, self.iterations, preview)
            self.place = place
        self.say(text)

    def say(self, text: str) -> None:
        if text != self.text:
            say(text, self.node_id)
            self.text = text


def say(text: str, node_id: str) -> None:
    """Show text on a node; frontends draw it on nodes of any type."""
    PromptServer.instance.send_progress_text(text, node_id)


def _preview(picture: Path | None) -> tuple | None:
    if picture is None:
        return None
    from PIL import Image

    try:
        with Image.open(picture) as image:
            return ("JPEG", image.convert("RGB"), 1024)
    except OSError:
        return None
