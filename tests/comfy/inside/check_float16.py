"""Bases that core loads in float16: every objective's gradient, at the size of real runs, is that of float32.

Core computes in float16 on the CPU too where it is told that this device does, so no GPU is needed.
"""

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.taesd.taesd
import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from stages import rollout_of
from tiny_graphs import CASES, STEPS, Trained, draw, graph_model, new_patcher
from torch import Tensor

import nodes as comfy_nodes

BASE = next(case for case in CASES if case.core == "SD15")
SD15 = replace(BASE, config=BASE.config | BASE.detected, text=BASE.detected_text, size=(16, 16, 1))
LATENT = (4, 2, 2)
"""Small, because a CPU takes long for products in float16; the width is what core knows the model by."""
LATENTS_AT_512 = 4 * 64 * 64
ACTIONS = (192, 12_544)
OBJECTIVES = {
    "grpo": {"clip_range": 0.5},
    "grpo-guard": {"name": "grpo", "ratio": "guard", "clip_range": 0.5, "kl_weight": 0.1},
    "nft": {},
    "awm": {},
    "awm-anchored": {"name": "awm", "weighting": "sigma", "kl_weight": 0.1, "trust_weight": 0.1},
    "dpo": {},
    "reward-gradient": {"gradient_steps": 2},
    "reward-gradient-refl": {"name": "reward-gradient", "method": "refl"},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1.5 that core's loader knows, with weights that float16 holds exactly."""
    network = new_patcher(SD15).model.diffusion_model
    weights = {f"model.diffusion_model.{k}": v.half().float() for k, v in network.state_dict().items()}
    path = tmp_path_factory.mktemp("diffusion_models") / "tiny.safetensors"
    save_file(weights, path)
    return path


def loaded(pack: Any, file: Path, monkeypatch: pytest.MonkeyPatch, half: bool) -> Any:
    """The trainer's model of what *Load Diffusion Model* loads on a device that prefers float16, or float32."""
    folders = {"diffusion_models": ([str(file.parent)], {".safetensors"})}
    with monkeypatch.context() as changed:
        changed.setattr(comfy.model_management, "should_use_fp16", lambda *_, **__: half)
        for name, value in folders.items():
            changed.setitem(folder_paths.folder_names_and_paths, name, value)
        folder_paths.filename_list_cache.clear()
        connected = comfy_nodes.UNETLoader().load_unet(file.name, "default")[0]
        describe = pack("trainer.models.comfy.describe")
        loader, path, options = describe._network(connected)
        weights = describe._weights(connected, options)
        graph = pack("trainer.config").GraphModel(folder="x", loader=loader, file=path, weights=weights, vae_file="x")
        patcher = pack("trainer.models.comfy.load").load_network(graph, pack("trainer.models.comfy.model")._modules())
        comfy.model_management.load_models_gpu([patcher])
    kind = torch.float16 if half else torch.float32
    assert weights == str(kind).removeprefix("torch.")
    assert (patcher.model.get_dtype(), patcher.model.manual_cast_dtype) == (kind, None), "it computes in this type"
    return patcher


@pytest.fixture(scope="module")
def vae() -> Any:
    network = comfy.taesd.taesd.TAESD(latent_channels=4)
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, value in network.state_dict().items():
        spread = 1 / max(1.0, value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
        weights[name] = spread * torch.randn(value.shape, generator=generator)
    weights |= {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    return comfy.sd.VAE(sd=weights, dtype=torch.float32)


@dataclass
class Stage:
    """A model with a LoRA that does something, an objective, and four images of two prompts to train on."""

    trained: Trained
    rollout_batch: Any
    items: list


def trainable(pack: Any, patcher: Any, vae: Any, name: str, **sizes: int) -> Trained:
    """A model with a LoRA that does something, and an objective with its reward."""
    options = {"name": name, "batch_size": 4} | OBJECTIVES[name]
    sections = {
        "objective": options,
        "rollout": {"kernel": "ddim", "eta": 0.5, "steps": STEPS, "guidance_scale": 2.0, "group_size": 2} | sizes,
        "rewards": [{"name": "colorfulness"}],
    }
    trained = graph_model(pack, SD15, patcher, sections, vae)
    trained.wake(0.05)
    trained.updater.objective.rewards = {"colorfulness": pack("trainer.rewards.colorfulness").Colorfulness()}
    return trained


def stage(pack: Any, trained: Trained, sampled: Any = None) -> Stage:
    """
    Args:
        sampled: trajectories of another model to train on; None for this model's own.
    """
    rollout, objective = pack("trainer.rollout"), trained.updater.objective
    plan, prompt_of = objective.plan(trained.model, 0), torch.tensor([0, 0, 1, 1])
    start = torch.stack([draw(*trained.model.latent_shape, seed=i) for i in range(4)])
    added = lambda step: torch.stack([draw(*start.shape[1:], seed=100 * step + i) for i in range(4)])  # noqa: E731
    plan = replace(plan, shared_noise=False)
    if sampled is None:
        sampled = rollout.sample(trained.model, plan, trained.prompting, prompt_of, start, added, rollout.Execution())
    rollout_batch = rollout_of(plan, trained.prompting, sampled, prompt_of, [1.0, -0.6, -0.4, 0.8], pack)
    rollout_batch.optimizer_steps = 0
    return Stage(trained, rollout_batch, next(iter(objective.items(rollout_batch))))


def gradient(stage: Stage, actions: int, scale: float | None = None) -> list[Tensor]:
    """The gradient with which the updater's optimizer step is made, where the loss is a mean over so many actions.

    Args:
        scale: begin with this loss scale; None for the updater's own.
    """
    updater, found = stage.trained.updater, []
    total = actions * LATENTS_AT_512 // math.prod(stage.trained.model.latent_shape)
    first_scale = updater.first_scale
    changed = SimpleNamespace(
        first_scale=lambda items: first_scale(total) if scale is None else scale,
        accumulate=functools.partial(type(updater).accumulate, updater, total=total),
        scaler=None,
    )
    kept = {name: p.detach().clone() for name, p in updater.policy.parameters.items()}
    keep = lambda optimizer, *_: found.extend(p.grad.clone() for p in updater.policy.parameters.values())  # noqa: E731
    hook = updater.policy.optimizer.register_step_pre_hook(keep)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in vars(changed).items():
            patch.setattr(updater, name, value)
        patch.setattr(updater.objective, "items", lambda rollout_batch: iter([stage.items]))
        update = updater.update(stage.rollout_batch)
    hook.remove()
    stage.rollout_batch.optimizer_steps = 0
    for name, parameter in updater.policy.parameters.items():
        parameter.data = kept[name]
    assert update.bad == 0
    return found


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    a, b = (torch.cat([g.flatten() for g in gradients]).double() for gradients in (a, b))
    return (a @ b / (a.norm() * b.norm()).clamp(min=1e-300)).item()


def silent(gradients: list[Tensor]) -> int:
    """How many tensors of the LoRA are given no gradient at all."""
    return sum(not g.any() for g in gradients)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_in_float16_is_that_of_float32_with_the_loss_scale_and_not_without(
    pack, file: Path, vae, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    half, exact = (trainable(pack, loaded(pack, file, monkeypatch, kind), vae, name) for kind in (True, False))
    exact = stage(pack, exact)
    # The same images: what differs is the arithmetic of the update alone.
    half = stage(pack, half, exact.rollout_batch.trajectories)
    for actions in ACTIONS:
        expected, found, plain = gradient(exact, actions), gradient(half, actions), gradient(half, actions, 1.0)
        print(
            f"{name}, {actions} actions: cosine {cosine(found, expected):.5f}, {silent(found)} of {len(found)} silent; "
            f"without the loss scale {cosine(plain, expected):.2f}, {silent(plain)}"
        )
        assert silent(expected) == silent(found) == 0
        assert cosine(found, expected) > 0.99
        assert cosine(plain, expected) < 0.99 or silent(plain) > 0, "a size at which nothing would need the scale"


@pytest.mark.parametrize("name", ["grpo", "nft", "reward-gradient"])
def test_the_opening_check_sees_a_gradient_that_is_lost_in_rounding(
    pack, file: Path, vae, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    check, failed = pack("trainer.preflight").check, pack("trainer.utils.errors").RunFailed
    items = ACTIONS[0] * LATENTS_AT_512 // math.prod(LATENT)
    sizes = {"prompts_per_iteration": items // 64, "group_size": 64}
    half = trainable(pack, loaded(pack, file, monkeypatch, True), vae, name, **sizes)
    check(half.updater, half.prompting, ["any"])
    monkeypatch.setattr(half.updater, "first_scale", lambda items: 1.0)
    with pytest.raises(failed, match="lost in rounding|no gradient reaches the LoRA"):
        check(half.updater, half.prompting, ["any"])
