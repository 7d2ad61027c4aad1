"""Models with one network for high noise and one for low noise (Wan 2.2), each trained at the levels it predicts at."""

from typing import Any

import torch
from torch import Tensor, nn

from ...config import ModelConfig
from ...config.model import BOTH, HIGH, LOW
from .conditions import EntryConditions
from .load import load_network, load_vae
from .model import ComfyModel, import_comfy, in_order


class TwoExperts(ComfyModel):
    """Two networks of the same class that share latents, VAE and conditions.

    What it inherits is the network for high noise. Its `module` holds the networks that are trained: one of them, or
    both, by the names `high` and `low`. Only those that a call needs have to be on the GPU; a rollout calls one after
    the other, so each of them is moved there once.

    Args:
        patcher: ComfyUI's `ModelPatcher` of the network for high noise, loaded, without patches.
        low: that of the one for low noise.
        vae: ComfyUI's `VAE`, or None where nothing is decoded.
    """

    def __init__(self, patcher: Any, low: Any, vae: Any, config: ModelConfig) -> None:
        super().__init__(patcher, vae, config)
        self.low = ComfyModel(low, None, config)
        self.low._is_resident = True  # `_switch_to` takes care of both
        self._held: set[str] = set()
        self.expert, networks = config.graph.low_noise, {HIGH: self.module, LOW: self.low.module}
        if self.expert.trained == BOTH:
            self.module = nn.ModuleDict(networks)
            self.default_targets = tuple(f"{name}.{target}" for name in networks for target in self.default_targets)
        else:
            self.module = networks[self.expert.trained]

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> "TwoExperts":
        comfy = import_comfy(config.graph.folder, device)
        expert = config.graph.low_noise
        own = {name: getattr(expert, name) for name in ("loader", "file", "weights", "loras")}
        high, low = (load_network(graph, comfy) for graph in (config.graph, config.graph.model_copy(update=own)))
        model = cls(high, low, load_vae(config.graph, comfy), config)
        trained = {HIGH, LOW} if expert.trained == BOTH else {expert.trained}
        model._switch_to(trained)
        for name in trained:
            (model if name == HIGH else model.low)._check_offload()
        return model

    # --------------------------------------------------------------------------------------------- prediction

    def _branches(
        self, latents: Tensor, sigma: Tensor, conditions: EntryConditions, negative: EntryConditions | None = None
    ) -> list[Tensor]:
        is_low = self.expert.is_low(sigma.double())
        rows_of = {name: rows.nonzero().flatten() for name, rows in ((HIGH, ~is_low), (LOW, is_low)) if rows.any()}
        self._switch_to(set(rows_of))
        parts = []
        for name, rows in rows_of.items():
            predict = super()._branches if name == HIGH else self.low._branches
            found = predict(latents[rows], sigma[rows], conditions.rows(rows), negative)
            parts.append([(rows, branch) for branch in found])
        return [in_order(list(branch)) for branch in zip(*parts, strict=True)]

    def _switch_to(self, needed: set[str]) -> None:
        """Have these networks on the GPU; with gradient those that are there stay, for the backward pass of a call."""
        held = self._held if self._is_resident else set()
        if needed <= held:
            return
        self._held = needed | held if torch.is_grad_enabled() else needed
        self._load([(self if name == HIGH else self.low).patcher for name in sorted(self._held)])
        self._is_resident = True

    def _make_resident(self) -> None:
        """`_switch_to` has done it."""

    # ------------------------------------------------------------------------------------------------ the LoRA

    def lora_key(self, module_name: str) -> str:
        """With two LoRAs, their keys begin with `high.` and `low.`, as their modules' names do."""
        prefix, model, name = self._place(module_name)
        return prefix + ComfyModel.lora_key(model, name)

    def lora_aliases(self, module_name: str) -> list[str]:
        prefix, model, name = self._place(module_name)
        return [prefix + alias for alias in ComfyModel.lora_aliases(model, name)]

    def _place(self, module_name: str) -> tuple[str, ComfyModel, str]:
        """The beginning of a module's name that says whose it is, that network's model, and the rest of the name."""
        if self.expert.trained != BOTH:
            return "", self if self.expert.trained == HIGH else self.low, module_name
        name, _, rest = module_name.partition(".")
        return f"{name}.", self if name == HIGH else self.low, rest
