"""Compare LoRAs in a running ComfyUI: results for people and for programs, and one sentence for what is wrong."""

import pytest
from comfy_host import PromptFailed, Server


def graph(**changes: object) -> dict:
    """The demo model and the LoRA that comes with it."""
    compare = {
        "model": ["demo", 0],
        "clip": ["demo", 1],
        "vae": ["demo", 2],
        "latent_image": ["latent", 0],
        "reward": ["reward", 0],
        "prompts": "a red circle\na blue square",
        "negative": "",
        "images_per_prompt": 2,
        "seed": 1234,
        "steps": 4,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "strength": 1.0,
        "lora_1": "(none)",
        "lora_model_1": ["demo", 4],
    }
    return {
        "demo": {"class_type": "DanceGRPO_DemoModel", "inputs": {}},
        "latent": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "reward": {"class_type": "DanceGRPO_LoadReward", "inputs": {"reward": "shapes"}},
        "compare": {"class_type": "DanceGRPO_CompareLoRAs", "inputs": compare | changes},
        "sheet": {"class_type": "PreviewImage", "inputs": {"images": ["compare", 0]}},
        "table": {"class_type": "PreviewAny", "inputs": {"source": ["compare", 1]}},
    }


def test_figures_are_in_the_history_as_text_image_and_data(comfy: Server) -> None:
    outputs = comfy.run(graph())
    (data,) = outputs["compare"]["dancegrpo"]
    assert data["prompt_texts"] == ["a red circle", "a blue square"]
    assert [model["name"] for model in data["models"]] == ["base", "lora_model_1"]
    lora = data["models"][1]["rewards"]["shapes"]
    assert lora["estimate"]["low"] <= lora["estimate"]["mean"] <= lora["estimate"]["high"]
    assert set(lora) == {"estimate", "change", "win_rate"}
    assert outputs["compare"]["images"]
    assert outputs["sheet"]["images"]
    assert "wins against the base" in outputs["compare"]["text"][0]
    assert outputs["table"]["text"][0] == outputs["compare"]["text"][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": "# nothing"}, "prompts is empty"),
        ({"lora_2": "../other.safetensors"}, "lora_2"),
        ({"images_per_prompt": 0}, "images_per_prompt"),
        ({"model": "a file"}, "model must be connected"),
        ({"latent_image": {"samples": "x"}}, "latent_image must be connected"),
    ],
)
def test_bad_input_is_refused(comfy: Server, changes: dict, words: str) -> None:
    with pytest.raises(PromptFailed, match=words):
        comfy.run(graph(**changes))
