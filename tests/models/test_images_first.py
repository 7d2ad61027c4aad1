"""A LoRA that is learned from images goes on with videos: the two descriptions of docs/families.md, on tiny models."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import PROMPTS, ROOT, lora_of, results_of
from tiny_families import CASES

from trainer.config import parse_config
from trainer.loop import Trainer
from trainer.runs.directory import RunDirectory
from trainer.utils.distributed import Processes

SMALL = {"steps": 4, "group_size": 3, "prompts_per_iteration": 2}


def documented() -> list[dict[str, Any]]:
    """The descriptions for images and for videos."""
    section = (ROOT / "docs" / "families.md").read_text().split("## Images first, video later")[1].split("\n### ")[0]
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)]


def tiny(data: dict[str, Any], name: str, folder: Path, frames: int, start: Path | None) -> dict[str, Any]:
    """The same description for a tiny model, with a reward that needs no files."""
    size = {key: CASES[name].model[key] for key in ("height", "width")}
    model = {**data["model"], "family": name, "path": str(folder), "dtype": "float32", "vae_dtype": "float32"}
    lora = {**data["lora"]} | ({"start_from": str(start)} if start else {})
    return {
        **data,
        "model": {**model, **size, "frames": frames},
        "prompts": {"texts": PROMPTS[:3]},
        "rollout": {**data["rollout"], **SMALL},
        "rewards": [{"name": "brightness"}],
        "lora": lora,
        "evaluation": {**data["evaluation"], "file": None, "texts": ["a green circle"], "images_per_prompt": 1},
        "runtime": {"iterations": 2, "seed": 3, "device": "cpu"},
    }


def train(data: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """Run a description; the weights that it began with."""
    config, began = parse_config(data), {}
    run = RunDirectory(path).open(config, ["train"])
    try:
        trainer = Trainer(config, run, Processes("cpu"))
        start = trainer.policy.start
        trainer.policy.start = lambda: (start(), began.update(trainer.policy.result()))
        trainer.train()
        key, alpha = trainer.model.lora_key, config.lora.alpha
    finally:
        run.release()
    from trainer.adapters.lora import comfy_weights

    return comfy_weights(began, alpha, key)


def test_the_documented_descriptions_differ_in_what_the_page_says() -> None:
    images, videos = documented()
    assert (images["model"]["frames"], videos["model"]["frames"]) == (1, 33)
    assert videos["lora"] == images["lora"] | {"start_from": "runs/images/lora.safetensors"}
    for data in (images, videos):
        parse_config(data)


@pytest.mark.parametrize("name", ["wan", "hunyuanvideo"])
def test_a_lora_of_images_is_where_the_run_with_videos_begins(name: str, tmp_path: Path) -> None:
    folder = CASES[name].build(tmp_path / "model")
    images, videos = documented()
    fresh = train(tiny(images, name, folder, 1, None), tmp_path / "images")
    learned = lora_of(tmp_path / "images")
    assert any((learned[key] != fresh[key]).any() for key in learned)

    began = train(tiny(videos, name, folder, 5, tmp_path / "images" / "lora.safetensors"), tmp_path / "videos")
    assert began.keys() == learned.keys()
    for key, value in learned.items():
        if not key.endswith("alpha"):
            torch.testing.assert_close(began[key], value, rtol=1e-5, atol=1e-8)
    events = results_of(tmp_path / "videos")
    assert all(event["grad_norm"] > 0 for event in events)
    assert all(event["objective"]["rollout_deviation"]["max"] < 2e-5 for event in events)
    final = lora_of(tmp_path / "videos")
    assert any((final[key] != began[key]).any() for key in final)
    assert list((tmp_path / "videos" / "samples").glob("*.mp4"))
    assert not list((tmp_path / "images" / "samples").glob("*.mp4"))
