"""Where the cases run, and what a case may say of itself."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30


class Skipped(Exception):
    """A case cannot run here; says why."""


@dataclass(frozen=True)
class Setting:
    """
    Attributes:
        device: where everything runs.
        dry: tiny networks in place of those of released sizes.
        folder: for files, which the caller removes.
        comfyui: ComfyUI's folder; None where there is none.
    """

    device: torch.device
    dry: bool
    folder: Path
    comfyui: Path | None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def need_comfyui(self) -> Path:
        """ComfyUI's folder, with its modules imported for this device.

        Raises:
            Skipped: there is none.
        """
        if self.comfyui is None:
            raise Skipped("no ComfyUI: give its folder with --comfyui")
        from benchmarks.core_models import use_comfyui

        use_comfyui(self.comfyui, self.device)
        return self.comfyui

    def wait(self) -> None:
        """Until the GPU has done what it was asked for."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give back what nothing refers to any more."""
        import sys

        if "comfy.model_management" in sys.modules:
            sys.modules["comfy.model_management"].unload_all_models()
        if self.on_gpu:  # elsewhere nothing is scarce, and collecting takes longer than a tiny case
            gc.collect()
            torch.cuda.empty_cache()


@contextmanager
def replaced(owner: object, **values: object) -> Iterator[None]:
    """Attributes of an object or a module, exchanged in this block."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
