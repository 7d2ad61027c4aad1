"""Samples images with each model by ComfyUI's own samplers, and scores them with rewards."""

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.utils import ProgressBar
from torch import Tensor

from ...trainer.config import GraphExpert
from ...trainer.config.model import is_low_noise
from ...trainer.evaluation.comparison import ModelScores
from ...trainer.evaluation.embedding import embedder
from ...trainer.evaluation.looks import looks, tabulate
from ...trainer.models.comfy.conditions import images_of
from ...trainer.runs.sample_grids import Sample
from ...trainer.utils.errors import BadInput, shorten
from ...trainer.utils.seeds import derive, noise
from ..lora import load_patches
from ..types import Rewards
from .compared_loras import LOW_SOCKET, Lora
from .devices import make_room_for_reward
from .progress import check_interrupt, say
from .scoring import LoadedReward, load_rewards

SAMPLING = ("images_per_prompt", "seed", "steps", "cfg", "sampler_name", "scheduler", "strength")
SHOWN = 24
"""Prompts on the contact sheet."""
TOTAL = "weighted sum"
BOUNDARY = GraphExpert.model_fields["boundary"].default
Stage = tuple[str, Any, Tensor | None]
"""A socket, its MODEL, and the noise levels that it samples at; None for those of steps and scheduler."""


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
    """ComfyUI's MODEL, CLIP, VAE and LATENT; CONDITIONING, SIGMAS and the MODEL for low noise, or None.

    With a MODEL for low noise, `model` is the one for high noise, and predicts from the noise level `boundary` on.
    """

    model: Any
    clip: Any
    vae: Any
    latent: dict
    conditioning: list | None
    sigmas: Tensor | None
    low_noise_model: Any = None
    boundary: float = BOUNDARY


def score_models(
    parts: Parts,
    sampling: Sampling,
    texts: list[str],
    reward: Rewards,
    loras: dict[str, Lora],
    node_id: str | None,
) -> list[ModelScores]:
    """The base model first, then the LoRAs in their order.

    Raises:
        BadInput: a LoRA does not fit the model, or a reward cannot score a prompt or an image.
    """
    base = _stages(parts, sampling)
    models = {"base": base} | {name: _patched(base, name, lora, sampling) for name, lora in loras.items()}
    device = comfy.model_management.get_torch_device()
    loaded = load_rewards(reward, texts, device, lambda size: make_room_for_reward(size, device))
    positive, negative = [_encoded(parts, text) for text in texts], _encoded(parts, sampling.negative)
    bar, found = ProgressBar(len(models) * len(base) * len(texts), node_id=node_id), []
    for name, stages in models.items():
        latents: list[Tensor | None] = [None] * len(texts)
        for stage, (_, model, sigmas) in enumerate(stages):  # one network for all prompts, then the other
            for number, text in enumerate(texts):
                part = f", network {stage + 1} of {len(stages)}" if len(stages) > 1 else ""
                say(f"{name}{part}: prompt {number + 1} of {len(texts)}", node_id)
                prompts = (positive[number], negative)
                latents[number] = _sampled(model, sigmas, parts, sampling, prompts, text, latents[number])
                bar.update(1)
        images = [_decoded(parts, each) for each in latents]
        found.append(_scores_of(name, images, texts, loaded, reward, sampling, device))
    return found


def _stages(parts: Parts, sampling: Sampling) -> list[Stage]:
    """The networks in the order in which they sample; one that predicts at none of the levels is left out.

    Raises:
        BadInput: connected noise levels do not fall.
    """
    if parts.low_noise_model is None:
        return [("model", parts.model, parts.sigmas)]
    levels = parts.sigmas
    if levels is None:
        names = {"sampler": sampling.sampler_name, "scheduler": sampling.scheduler}
        levels = comfy.samplers.KSampler(parts.model, sampling.steps, torch.device("cpu"), **names).sigmas
    elif not (levels.diff() < 0).all():
        raise BadInput("sigmas do not fall from step to step, as sampling with two networks needs")
    cut = int((~is_low_noise(levels[:-1].double(), parts.boundary)).sum())
    split = (("model", parts.model, levels[: cut + 1]), (LOW_SOCKET, parts.low_noise_model, levels[cut:]))
    return [stage for stage in split if len(stage[2]) > 1]


def _patched(stages: list[Stage], name: str, lora: Lora, sampling: Sampling) -> list[Stage]:
    """The same with a LoRA in the networks that it is for."""
    found = []
    for network, model, sigmas in stages:
        if network in lora:
            model = model.clone()
            model.add_patches(_patches(model, name, lora[network]), sampling.strength)
        found.append((network, model, sigmas))
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


def _sampled(
    model: Any,
    sigmas: Tensor | None,
    parts: Parts,
    sampling: Sampling,
    prompts: tuple[list, list],
    text: str,
    latents: Tensor | None,
) -> Tensor:
    """Latents of the images of one prompt: from noise, or from those that the network for high noise has left.

    Args:
        prompts: CONDITIONING of the prompt and of the negative prompt.
        latents: None for the first network.
    """
    is_first = latents is None
    if is_first:
        latents = _empty(model, parts.latent, sampling.images_per_prompt)
        shape, count = tuple(latents.shape[1:]), sampling.images_per_prompt
        start = torch.stack([noise(shape, sampling.seed, text, k) for k in range(count)])
    else:
        start = torch.zeros_like(latents)  # what noise is left is in the latents
    return comfy.sample.sample(
        model,
        start,
        sampling.steps,
        sampling.cfg,
        sampling.sampler_name,
        sampling.scheduler,
        *prompts,
        latents,
        sigmas=sigmas,
        disable_pbar=True,
        seed=derive(sampling.seed, text, *(() if is_first else (LOW_SOCKET,))),
    )


def _empty(model: Any, latent: dict, count: int) -> Tensor:
    """The connected empty latent with the model's channels, `[count, ...]`."""
    ratios = latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    empty = comfy.sample.fix_empty_latent_channels(model, latent["samples"][:1], *ratios)
    return empty.expand(count, *empty.shape[1:]).contiguous()


def _decoded(parts: Parts, latents: Tensor) -> Tensor:
    """The images of one prompt, `[K, 3, H, W]`, or videos, `[K, F, 3, H, W]`, in [0, 1] on the CPU."""
    check_interrupt()
    pixels = parts.vae.decode(latents).movedim(-1, -3).float().clamp(0, 1).cpu()
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
