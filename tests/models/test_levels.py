"""Noise levels of a folder's own scheduler are those that its pipeline samples at."""

import shutil
from pathlib import Path

import pytest
import torch

from trainer.config import ModelConfig
from trainer.models import SD3Model

STEPS = 7


@pytest.mark.parametrize("settings", [{"shift": 3.0}, {"shift": 1.0}], ids=["shifted", "plain"])
def test_sd3_has_the_levels_of_its_pipeline(tiny_sd3: Path, tmp_path: Path, settings: dict) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    shutil.copytree(tiny_sd3, tmp_path / "model")
    FlowMatchEulerDiscreteScheduler(**settings).save_pretrained(tmp_path / "model/scheduler")
    model = SD3Model.load(
        ModelConfig(family="sd3", path=str(tmp_path / "model"), height=16, width=16), torch.device("cpu")
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "model/scheduler")
    channels, width = model.module.config.joint_attention_dim, model.module.config.pooled_projection_dim
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "text_encoder_3"))
    parts |= dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
    pipeline = StableDiffusion3Pipeline(transformer=model.module, scheduler=scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    embeds, pooled = torch.zeros(1, 3, channels), torch.zeros(1, width)
    pipeline(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, guidance_scale=1.0, num_inference_steps=STEPS,
        height=16, width=16, latents=torch.zeros(1, *model.latent_shape), output_type="latent",
    )  # fmt: skip
    assert model.sigmas(STEPS, None) == pytest.approx(scheduler.sigmas.tolist())
    assert model.sigmas(STEPS, settings["shift"]) != pytest.approx(model.sigmas(STEPS, None), abs=1e-3)
