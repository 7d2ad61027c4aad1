"""Step-distilled models: made to sample in a few steps without guidance, which a run should keep to."""

import re
from pathlib import Path

from ..config import ModelConfig, RunConfig

_STEPS = {
    "schnell": (1, 4),
    "klein": (4, 4),
    "lightning": (2, 8),
    "turbo": (1, 9),
    "hyper": (1, 8),
    "lcm": (2, 8),
    "dmd": (1, 4),
    "distilled": (4, 8),
}
"""The steps such models are published with, from and to, by a word of their file's name."""


def distilled_notes(config: RunConfig) -> list[str]:
    """A sentence where the model's name says that it is step-distilled and the sampling does not suit that."""
    found = _found(config.model)
    if found is None:
        return []
    word, name = found
    least, most = _STEPS[word]
    wrong = []
    rollout, evaluation = config.rollout, config.evaluation
    for field, steps in (("rollout.steps", rollout.steps), ("evaluation.steps", evaluation.steps)):
        if steps is not None and steps > most:
            wrong.append(f"{field} {steps}")
    for field, scale in (
        ("rollout.guidance_scale", rollout.guidance_scale),
        ("evaluation.guidance_scale", evaluation.guidance_scale),
    ):
        if scale is not None and scale != 1:
            wrong.append(f"{field} {scale:g}")
    if not wrong:
        return []
    steps = f"{max(least, 2)} to {most}" if most > max(least, 2) else str(most)
    return [
        f"{name} is by its name a step-distilled model ({word}), and the run has {' and '.join(wrong)}: such models "
        f"are made for {steps} steps and guidance_scale 1, and a LoRA should learn at the settings it will be used with"
    ]


def distilled_steps(model: ModelConfig) -> tuple[int, int] | None:
    """Fewest and most steps that a model is made for by its name; None for models that are not step-distilled."""
    found = _found(model)
    return None if found is None else _STEPS[found[0]]


def _found(model: ModelConfig) -> tuple[str, str] | None:
    """The word that says it, and the name that it is in."""
    return next(((word, name) for name in _names(model) for word in _STEPS if _says(name, word)), None)


def _names(model: ModelConfig) -> list[str]:
    """Names of the files and folders that the model's weights come from."""
    if model.graph is not None:
        networks = [model.graph] if model.graph.low_noise is None else [model.graph, model.graph.low_noise]
        files = [file for one in networks for file in (one.file, *(lora.file for lora in one.loras))]
    else:
        files = [model.path] if model.network_file is None else [model.network_file, model.path]
    return [Path(file).name for file in files]


def _says(name: str, word: str) -> bool:
    """Whether a word is in a name as one of its own; klein has a base model that is not distilled."""
    words = re.split(r"[^a-z]+", name.lower())
    return word in words and not (word == "klein" and "base" in words)
