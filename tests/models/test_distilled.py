"""Step-distilled models are known by name, and settings that do not suit them are named."""

import pytest

from trainer.config import parse_config
from trainer.models.distilled import distilled_notes


def notes(file: str, loras: tuple[str, ...] = (), **rollout: object) -> list[str]:
    graph = {"folder": "x", "file": file, "vae_file": "x", "loras": [{"file": name} for name in loras]}
    return distilled_notes(
        parse_config(
            {
                "model": {"family": "comfy", "graph": graph},
                "prompts": {"texts": ["any"]},
                "rewards": [{"name": "brightness"}],
                "rollout": {"steps": 4, "guidance_scale": 1.0, **rollout},
            }
        )
    )


@pytest.mark.parametrize(
    ("file", "word", "steps"),
    [
        ("flux1-schnell-fp8.safetensors", "schnell", "2 to 4"),
        ("z_image_turbo_bf16.safetensors", "turbo", "2 to 9"),
        ("flux-2-klein-4b.safetensors", "klein", "4"),
        ("sdxl_lightning_4step.safetensors", "lightning", "2 to 8"),
    ],
)
def test_steps_and_guidance_that_do_not_suit_are_named(file: str, word: str, steps: str) -> None:
    assert notes(f"/models/{file}") == []
    [note] = notes(f"/models/{file}", steps=20, guidance_scale=3.5)
    assert f"{file} is by its name a step-distilled model ({word})" in note
    assert "rollout.steps 20 and rollout.guidance_scale 3.5" in note
    assert f"made for {steps} steps and guidance_scale 1" in note


def test_a_lora_may_be_what_distils() -> None:
    [note] = notes("sd_xl_base_1.0.safetensors", ("/loras/sdxl_lightning_8step_lora.safetensors",), steps=30)
    assert "sdxl_lightning_8step_lora.safetensors" in note


def test_the_network_for_low_noise_counts_too() -> None:
    low = {"file": "/models/wan_low.safetensors", "loras": [{"file": "/loras/wan_lightning_low.safetensors"}]}
    graph = {"folder": "x", "file": "wan_high.safetensors", "vae_file": "x", "low_noise": low}
    data = {"model": {"family": "comfy", "graph": graph}, "prompts": {"texts": ["any"]}, "rollout": {"steps": 20}}
    [note] = distilled_notes(parse_config({**data, "rewards": [{"name": "brightness"}]}))
    assert "wan_lightning_low.safetensors" in note


@pytest.mark.parametrize("file", ["flux1-dev.safetensors", "flux-2-klein-base-4b.safetensors", "hypernova.safetensors"])
def test_other_models_are_left_alone(file: str) -> None:
    assert notes(f"/turbo/{file}", steps=30, guidance_scale=4.0) == []
