"""GRPO Estimate in a running ComfyUI."""

import pytest
from comfy_host import PromptFailed, Server


def graph(**changes: object) -> dict:
    settings = (
        "rollout.steps=4\nrollout.group_size=4\nrollout.prompts_per_iteration=2\nrollout.window=null\n"
        "evaluation.images_per_prompt=2\nruntime.iterations=7"
    )
    inputs = {
        "grpo_model": ["demo", 3],
        "clip": ["demo", 1],
        "reward": ["reward", 0],
        "settings": ["preset", 0],
        "prompts": "a red circle\na blue square",
        "held_out_prompts": "a green square",
        "negative": "",
        "processes": 1,
        "gpus": "",
    }
    return {
        "demo": {"class_type": "DanceGRPO_DemoModel", "inputs": {}},
        "reward": {"class_type": "DanceGRPO_LoadReward", "inputs": {"reward": "brightness"}},
        "preset": {"class_type": "DanceGRPO_Preset", "inputs": {"preset": "demo", "overrides": settings}},
        "estimate": {"class_type": "DanceGRPO_Estimate", "inputs": inputs | changes},
        "text": {"class_type": "PreviewAny", "inputs": {"source": ["estimate", 0]}},
    }


def test_figures_are_in_the_history_as_text_and_data(comfy: Server) -> None:
    outputs = comfy.run(graph())
    (data,) = outputs["estimate"]["dancegrpo"]
    assert data["iterations"] == 7
    assert data["memory"]["fits"] is True
    assert data["memory"]["parts"]["network and VAE"] > 3_800_000 * 4
    seconds = data["seconds"]
    assert seconds["whole"] == pytest.approx(
        seconds["start"] + 7 * seconds["iteration"] + 2 * seconds["evaluation"], rel=1e-6
    )
    assert "per iteration" in outputs["text"]["text"][0]
    assert "per iteration" in outputs["estimate"]["text"][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"prompts": ""}, "prompts is empty"), ({"processes": 99}, "processes"), ({"grpo_model": "x"}, "grpo_model must")],
)
def test_bad_input_is_refused(comfy: Server, changes: dict, words: str) -> None:
    with pytest.raises(PromptFailed, match=words):
        comfy.run(graph(**changes))
