"""LoRA files of a comparison: finds them, checks that they fit, and loads their weights into the model."""

from dataclasses import dataclass
from pathlib import Path

from ..adapters import lora
from ..adapters.start import changed_modules, fitted_weights, highest_rank
from ..config import LoraConfig, RunConfig
from ..models import DiffusionModel
from ..models.diffusers.family import DiffusersModel
from ..utils.errors import BadInput, cut

BASE = "base"
MOST_RANK = 1024


@dataclass(frozen=True)
class LoraFile:
    """
    Attributes:
        name: display name, unique.
        path: a safetensors file.
    """

    name: str
    path: Path

    @property
    def what(self) -> str:
        return f"LoRA {cut(str(self.path), 200)}"


def lora_files(paths: list[Path]) -> list[LoraFile]:
    """Find the LoRAs of files and run directories, from headers alone; a run's LoRA is named after its directory.

    Raises:
        BadInput: one is missing, or holds no LoRA.
    """
    found: list[LoraFile] = []
    for path in paths:
        file = path / "lora.safetensors" if path.is_dir() else path
        if path.is_dir() and not file.is_file():
            raise BadInput(f"LoRA {cut(str(path), 200)} is a folder without lora.safetensors: name a run that has one")
        name, number = path.resolve().name if path.is_dir() else path.stem, 2
        taken = {BASE, *(other.name for other in found)}
        if name in taken:
            while f"{name} ({number})" in taken:
                number += 1
            name = f"{name} ({number})"
        found.append(LoraFile(name, file))
        if highest_rank(file, found[-1].what) > MOST_RANK:
            raise BadInput(f"{found[-1].what} has a rank above {MOST_RANK}")
    return found


class Adapters:
    """One LoRA adapter whose rank suffices for every file; `use` loads the weights of one of them.

    Args:
        model: gets the LoRA injected here, if there are files.

    Raises:
        BadInput: a file does not fit the model.
    """

    def __init__(self, model: DiffusionModel, files: list[LoraFile]) -> None:
        self.model, self.modules = model, _every_module(model, files)
        if not files:
            return
        rank = max(highest_rank(file.path, file.what) for file in files)
        self.config = LoraConfig(rank=rank, alpha=rank, targets=self.modules)
        self.modules = lora.inject(model.module, self.config, (), 0, model.device)
        self.fresh = {name: value.detach().clone() for name, value in lora.parameters(model.module).items()}

    def use(self, file: LoraFile | None) -> None:
        """Switch to this LoRA; None switches to the base model."""
        if self.modules:
            lora.set_enabled(self.model.module, file is not None)
        if file is not None:
            key, aliases = self.model.lora_key, self.model.lora_aliases
            weights = fitted_weights(file.path, file.what, self.config, self.modules, key, aliases, self.fresh)
            lora.load(self.model.module, weights)


def check_fit(family: type[DiffusionModel], config: RunConfig, files: list[LoraFile]) -> None:
    """Raise BadInput if a file does not fit the model, which is not loaded. ComfyUI's models are checked later."""
    if files and issubclass(family, DiffusersModel):
        _every_module(family.on_meta(config.model), files)


def _every_module(model: DiffusionModel, files: list[LoraFile]) -> list[str]:
    """The linear layers that any of the files changes."""
    from torch import nn

    linear = [name for name, child in model.module.named_modules() if isinstance(child, nn.Linear)]
    key, aliases = model.lora_key, model.lora_aliases
    changed = [set(changed_modules(file.path, file.what, linear, key, aliases)) for file in files]
    return [name for name in linear if any(name in each for each in changed)]
