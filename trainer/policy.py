"""The policy: a LoRA on a frozen base model, with its optimizer, moving average and old copy."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .adapters import lora
from .adapters.average import MovingAverage
from .adapters.start import start_weights
from .config import RunConfig
from .models import DiffusionModel
from .utils.distributed import Processes
from .utils.seeds import derive

Weights = Literal["live", "base", "average", "old"]
"""`live`: the LoRA that is trained; `base`: no LoRA; `average`: its moving average; `old`: the objective's copy."""


class Policy:
    """
    Args:
        model: the frozen base model, into which the LoRA is injected here.
        config: of the run.
        keeps_old: keep an old copy of the LoRA for `using("old")`, initialised with the LoRA's weights.
    """

    def __init__(self, model: DiffusionModel, config: RunConfig, keeps_old: bool = False) -> None:
        self.model, self.config = model, config
        self.modules = lora.inject(
            model.module, config.lora, model.default_targets, derive(config.runtime.seed, "lora"), model.device
        )
        for name in self.modules:
            model.lora_key(name)  # fails now, rather than after hours of training
        self.parameters = lora.parameters(model.module)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
        )
        self.average = MovingAverage(self.parameters, config.lora.ema_decay) if config.lora.ema_decay else None
        self.old = {name: p.detach().clone() for name, p in self.parameters.items()} if keeps_old else None
        self.updates = 0
        self._active: Weights = "live"
        self._live: dict[str, Tensor] = {}

    # --------------------------------------------------------------------------------------------- which weights

    @contextmanager
    def using(self, weights: Weights) -> Iterator[None]:
        """In this context the model uses these weights, without gradient unless they are `live`.

        Nothing is copied: parameters temporarily point at other storage. A later backward pass therefore uses the live
        weights, even where gradient checkpointing recomputes activations, and `.grad` is not affected. If the run has
        no moving average, `average` is the same as `live`.

        Raises:
            ValueError: the policy keeps no old copy.
        """
        before = self._active
        self._activate(weights)
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and weights == "live"):
                yield
        finally:
            self._activate(before)

    def _activate(self, weights: Weights) -> None:
        if weights == "old" and self.old is None:
            raise ValueError("the policy keeps no old weights")
        if weights == self._active:
            return
        if self._active == "live":
            self._live = {name: p.data for name, p in self.parameters.items()}
        if (weights == "base") != (self._active == "base"):
            lora.set_enabled(self.model.module, weights != "base")
        tensors = {"average": self.average and self.average.weights, "old": self.old}.get(weights) or self._live
        for name, parameter in self.parameters.items():
            parameter.data = tensors[name]
        self._active = weights

    @torch.no_grad()
    def update_old(self, decay: float = 0.0) -> None:
        """old <- decay old + (1 - decay) live; 0 copies the live weights."""
        for name, parameter in self.parameters.items():
            self.old[name].lerp_(parameter, 1 - decay)

    # ------------------------------------------------------------------------------------------------- learning

    def start(self) -> None:
        """Load the weights of `lora.start_from`, if it is set.

        Raises:
            BadInput: the file is not a LoRA for the trained modules.
        """
        config, model = self.config.lora, self.model
        if config.start_from is None:
            return
        weights = start_weights(config, self.modules, model.lora_key, model.lora_aliases, self.parameters)
        lora.load(model.module, weights)
        if self.average:
            self.average = MovingAverage(self.parameters, config.ema_decay)
        if self.old:
            self.update_old()

    def step(self, processes: Processes, scaler: torch.amp.GradScaler | None = None) -> float | None:
        """One optimizer step with the gradients of all processes.

        Args:
            scaler: unscales the gradients, and adapts its scale to whether they were finite; None for no loss scale.

        Returns:
            the gradient norm, or None if it was not finite and the step was skipped.
        """
        gradients = []
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        processes.sum_(gradients)
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        config = self.config.optimizer
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm).item()
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.param_groups[0]["lr"] = self.learning_rate()
            self.optimizer.step()
            if self.average:
                self.average.update(self.parameters, self.updates)
            self.updates += 1
        if scaler is not None:
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm if finite else None

    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step."""
        config, whole = self.config.optimizer, self.config.runtime.iterations * self.config.objective.updates
        warm = min(1.0, (self.updates + 1) / config.warmup) if config.warmup else 1.0
        left = max(0.0, 1 - self.updates / whole) if config.schedule == "linear" else 1.0
        return config.learning_rate * warm * left

    # ---------------------------------------------------------------------------------------- saving and resuming

    def result(self) -> dict[str, Tensor]:
        """A copy of the weights that are the run's result: the moving average if there is one, else the LoRA."""
        weights = self.average.weights if self.average else self.parameters
        return {name: value.detach().clone() for name, value in weights.items()}

    def save_lora(self, path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Write a LoRA file with ComfyUI's key names."""
        lora.save(path, lora.comfy_weights(weights, self.config.lora.alpha, self.model.lora_key), metadata)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that change during training, by name."""
        tensors = {f"lora/{name}": parameter for name, parameter in self.parameters.items()}
        if self.average:
            tensors |= {f"average/{name}": value for name, value in self.average.weights.items()}
        if self.old:
            tensors |= {f"old/{name}": value for name, value in self.old.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"optimizer/{name}/{k}": v for k, v in self.optimizer.state.get(parameter, {}).items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Load what `tensors` returned after this number of optimizer steps."""
        lora.load(self.model.module, {name: tensors[f"lora/{name}"] for name in self.parameters})
        if self.average:
            self.average.weights = {n: tensors[f"average/{n}"].to(p.device) for n, p in self.parameters.items()}
        if self.old:
            self.old = {n: tensors[f"old/{n}"].to(p.device) for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            prefix = f"optimizer/{name}/"
            moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if moments:
                self.optimizer.state[parameter] = {
                    k: v.clone() if k == "step" else v.to(parameter.device).clone() for k, v in moments.items()
                }
        self.updates = updates
