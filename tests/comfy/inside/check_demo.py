"""The embedded model in ComfyUI's classes against the same files in diffusers' (the trainer's)."""

from types import SimpleNamespace

import pytest
import torch

PROMPTS = ["a red circle", "two blue squares and a green triangle", ""]


@pytest.fixture(scope="module")
def trained(pack: object) -> object:
    config = pack("trainer.config").ModelConfig()
    return pack("trainer.models.diffusers.sd3").SD3Model.load(config, torch.device("cpu"))


@pytest.fixture(scope="module")
def conditions(pack: object) -> object:
    config = pack("trainer.config").ModelConfig()
    return pack("trainer.models.diffusers.sd3").SD3Model.encode(config, PROMPTS, torch.device("cpu"))


def largest(first: torch.Tensor, second: torch.Tensor) -> float:
    assert first.shape == second.shape
    return (first - second).abs().max().item()


@pytest.mark.parametrize("row", range(len(PROMPTS)))
def test_clip(demo: SimpleNamespace, conditions: object, row: int) -> None:
    (embeds, extra), *_ = demo.encode(PROMPTS[row])
    assert largest(embeds[0], conditions.tensors["embeds"][row]) < 1e-4
    assert largest(extra["pooled_output"][0], conditions.tensors["pooled"][row]) < 1e-4


def test_prompt_weights_work(demo: SimpleNamespace) -> None:
    plain, heavy = demo.encode("a red circle")[0][0], demo.encode("a (red:1.5) circle")[0][0]
    assert plain.shape == heavy.shape
    assert largest(plain, heavy) > 1e-2


@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.05])
def test_model(demo: SimpleNamespace, trained: object, conditions: object, noise: torch.Tensor, sigma: float) -> None:
    x, levels = noise[:3], torch.full((3,), sigma)
    with torch.no_grad():
        expected = trained.predict(x, levels, conditions)
        model = demo.model.model
        denoised = model.apply_model(
            x, levels, c_crossattn=conditions.tensors["embeds"], y=conditions.tensors["pooled"]
        )
    assert largest((x - denoised) / sigma, expected) < 1e-4


def test_vae_decodes(demo: SimpleNamespace, trained: object, noise: torch.Tensor) -> None:
    expected = trained.decode(noise)
    images = demo.vae.decode(demo.model.model.process_latent_out(noise))
    assert largest(images.movedim(-1, 1), expected) < 1e-4


def test_vae_encodes(demo: SimpleNamespace, trained: object) -> None:
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = trained.vae.encode(images.movedim(-1, 1) * 2 - 1).latents
    assert largest(demo.vae.encode(images), expected) < 1e-4


def test_what_the_trainer_gets_describes_the_same_model(pack: object) -> None:
    value = pack("nodes.demo").DemoModel.execute().result[3]
    assert pack("trainer.config").ModelConfig(**value.section).path == "embedded"
