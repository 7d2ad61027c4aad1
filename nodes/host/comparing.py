"""Samples images with each model by ComfyUI's own samplers, and scores them with rewards."""

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import torch
from comfy.utils import ProgressBar
from torch import Tensor

from ...trainer.evaluation.comparison import ModelScores
from ...trainer.evaluation.embedding import embedder
from ...trainer.evaluation.looks import looks, tabulate
from ...trainer.models.comfy.conditions import images_of
from ...trainer.runs.sample_grids import Sample
from ...trainer.utils.errors import BadInput, shorten
from ...trainer.utils.seeds import derive, noise
from ..lora import load_patches
from ..types import Rewards
from .memory import make_room_for_reward
from .progress import check_interrupt, say
from .scoring import LoadedReward, load_rewards

SAMPLING = ("images_per_prompt", "seed", "steps", "cfg", "sampler_name", "scheduler", "strength")
SHOWN = 24
"""Prompts on the contact sheet."""
TOTAL = "weighted sum"


@dataclass(frozen=True)
class Sampling:
    """The node's widgets."""

    images_per_prompt: int
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    strength: float
    negative: str


@dataclass(frozen=True)
class Parts:
    """The values of the sockets: ComfyUI's MODEL, CLIP, VAE and LATENT; CONDITIONING and SIGMAS, or None."""

    model: Any
    clip: Any
    vae: Any
    latent: dict
    conditioning: list | None
    sigmas: Tensor | None


def score_models(
    parts: Parts,
    sampling: Sampling,
    texts: list[str],
    reward: Rewards,
    loras: dict[str, dict[str, Tensor]],
    node_id: str | None,
) -> list[ModelScores]:
    """The base model first, then the LoRAs in their order.

    Raises:
        BadInput: a LoRA does not fit the model, or a reward cannot score a prompt or an image.
    """
    patched = {"base": parts.model}
    for name, lora in loras.items():
        model = parts.model.clone()
        model.add_patches(_patches(model, name, lora), sampling.strength)
        patched[name] = model
    device = comfy.model_management.get_torch_device()
    loaded = load_rewards(reward, texts, device, lambda size: make_room_for_reward(size, device))
    positive, negative = [_encoded(parts, text) for text in texts], _encoded(parts, sampling.negative)
    bar, found = ProgressBar(len(patched) * len(texts), node_id=node_id), []
    for name, model in patched.items():
        images = []
        for number, text in enumerate(texts):
            say(f"{name}: prompt {number + 1} of {len(texts)}", node_id)
            images.append(_images(model, parts, sampling, positive[number], negative, text))
            bar.update(1)
        found.append(_scores_of(name, images, texts, loaded, reward, sampling, device))
    return found


def _patches(model: Any, name: str, lora: dict[str, Tensor]) -> dict:
    try:
        return load_patches(model, lora)
    except BadInput as error:
        raise BadInput(f"{shorten(name)}: {error}") from error


def _encoded(parts: Parts, text: str) -> list:
    """CONDITIONING of a prompt, with everything but the text of the connected CONDITIONING."""
    check_interrupt()
    encoded = parts.clip.encode_from_tokens_scheduled(parts.clip.tokenize(text))
    if parts.conditioning is None:
        return encoded
    carried = images_of(parts.conditioning[0][1])
    return [[tokens, extra | carried] for tokens, extra in encoded]


def _images(model: Any, parts: Parts, sampling: Sampling, positive: list, negative: list, text: str) -> Tensor:
    """The images of one prompt, `[K, 3, H, W]`, or videos, `[K, F, 3, H, W]`, in [0, 1] on the CPU."""
    latent = comfy.sample.fix_empty_latent_channels(
        model,
        parts.latent["samples"][:1],
        parts.latent.get("downscale_ratio_spacial"),
        parts.latent.get("downscale_ratio_temporal"),
    )
    count = sampling.images_per_prompt
    latent = latent.expand(count, *latent.shape[1:]).contiguous()
    start = torch.stack([noise(tuple(latent.shape[1:]), sampling.seed, text, k) for k in range(count)])
    done = comfy.sample.sample(
        model,
        start,
        sampling.steps,
        sampling.cfg,
        sampling.sampler_name,
        sampling.scheduler,
        positive,
        negative,
        latent,
        sigmas=parts.sigmas,
        disable_pbar=True,
        seed=derive(sampling.seed, text),
    )
    pixels = parts.vae.decode(done).movedim(-1, -3).float().clamp(0, 1).cpu()
    return pixels[:, 0] if pixels.ndim == 5 and pixels.shape[1] == 1 else pixels


def _scores_of(
    name: str,
    images: list[Tensor],
    texts: list[str],
    loaded: list[LoadedReward],
    reward: Rewards,
    sampling: Sampling,
    device: torch.device,
) -> ModelScores:
    count, scores, rows = sampling.images_per_prompt, {}, []
    embed = embedder({one.name: one.model for one in loaded})
    for p, batch in enumerate(images):
        found = looks(batch) if embed is None else looks(batch.to(device), embed)
        rows += [(p, k, look) for k, look in enumerate(found)]
    for one in loaded:
        values = [one.score(batch, [text] * count, device) for batch, text in zip(images, texts, strict=True)]
        scores[one.name] = torch.stack(values).double()
        one.model.idle()
    if len(reward.rewards) > 1:
        scores[TOTAL] = sum(config.weight * scores[config.name] for config in reward.rewards)
    shown = torch.linspace(0, len(texts) - 1, min(SHOWN, len(texts))).round().int().tolist()
    samples = [
        Sample(texts[p], str(sampling.seed), {n: v[p, 0].item() for n, v in scores.items() if n != TOTAL})
        for p in shown
    ]
    table = tabulate(rows, len(texts), count)
    return ModelScores(name, scores, table, torch.stack([images[p][0] for p in shown]), samples)
