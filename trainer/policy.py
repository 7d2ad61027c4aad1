"""What learns: the LoRA on a frozen model, its optimizer and its moving average."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .adapters import lora
from .adapters.average import MovingAverage
from .adapters.start import start_weights
from .config import RunConfig
from .models import DiffusionModel
from .utils.distributed import Processes
from .utils.seeds import derive


class Policy:
    """
    Args:
        model: with a frozen base; gets the LoRA injected here.
        config: of the run.
    """

    def __init__(self, model: DiffusionModel, config: RunConfig) -> None:
        self.model, self.config = model, config
        self.modules = lora.inject(
            model.module, config.lora, model.default_targets, derive(config.runtime.seed, "lora"), model.device
        )
        for name in self.modules:
            model.lora_key(name)  # before hours of training, not after
        self.parameters = lora.parameters(model.module)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
        )
        self.average = MovingAverage(self.parameters, config.lora.ema_decay) if config.lora.ema_decay else None
        self.updates = 0

    def start(self) -> None:
        """Take over the weights of `lora.start_from`, where one is named.

        Raises:
            BadInput: the file is not a LoRA of what is trained.
        """
        config, model = self.config.lora, self.model
        if config.start_from is None:
            return
        weights = start_weights(config, self.modules, model.lora_key, model.lora_aliases, self.parameters)
        lora.load(model.module, weights)
        if self.average:
            self.average = MovingAverage(self.parameters, config.ema_decay)

    def step(self, processes: Processes) -> float | None:
        """One optimizer step with the gradients of all processes.

        Returns:
            the gradient norm, or None if it was not finite and the step left out.
        """
        gradients = []
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        processes.sum_(gradients)
        config = self.config.optimizer
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm).item()
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.param_groups[0]["lr"] = self.learning_rate()
            self.optimizer.step()
            if self.average:
                self.average.update(self.parameters, self.updates)
            self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        return norm if finite else None

    def learning_rate(self) -> float:
        """Of the next optimizer step."""
        config, whole = self.config.optimizer, self.config.runtime.iterations * self.config.objective.updates
        warm = min(1.0, (self.updates + 1) / config.warmup) if config.warmup else 1.0
        left = max(0.0, 1 - self.updates / whole) if config.decay else 1.0
        return config.learning_rate * warm * left

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model runs with the moving average where there is one."""
        if self.average is None:
            yield
            return
        with lora.swapped(self.model.module, self.average.weights):
            yield

    def result(self) -> dict[str, Tensor]:
        """A copy of the weights a run ends with: the LoRA's, or their moving average where there is one."""
        weights = self.average.weights if self.average else self.parameters
        return {name: value.detach().clone() for name, value in weights.items()}

    def save_lora(self, path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Write a LoRA under the names ComfyUI loads."""
        lora.save(path, lora.comfy_weights(weights, self.config.lora.alpha, self.model.lora_key), metadata)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes in training, by name."""
        tensors = {f"lora/{name}": parameter for name, parameter in self.parameters.items()}
        if self.average:
            tensors |= {f"average/{name}": value for name, value in self.average.weights.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"optimizer/{name}/{k}": v for k, v in self.optimizer.state.get(parameter, {}).items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Go back to what `tensors` returned after so many updates."""
        lora.load(self.model.module, {name: tensors[f"lora/{name}"] for name in self.parameters})
        if self.average:
            self.average.weights = {n: tensors[f"average/{n}"].to(p.device) for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            prefix = f"optimizer/{name}/"
            moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if moments:
                self.optimizer.state[parameter] = {
                    k: v.clone() if k == "step" else v.to(parameter.device).clone() for k, v in moments.items()
                }
        self.updates = updates
