"""Compare LoRAs: what it says equals the trainer's own evaluation, and bad input is refused before models load."""

from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

TEXTS = ["a red circle", "a blue square above a green circle", "two yellow triangles"]
WIDGETS = {
    "prompts": ["\n".join(TEXTS)],
    "negative": [""],
    "images_per_prompt": [2],
    "seed": [1234],
    "steps": [5],
    "cfg": [1.0],
    "sampler_name": ["euler"],
    "scheduler": ["simple"],
    "strength": [1.0],
}


@pytest.fixture
def node(pack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type:
    """The node, prepared as ComfyUI prepares it."""
    kind = pack("nodes.compare").CompareLoRAs
    monkeypatch.setattr(kind, "hidden", SimpleNamespace(unique_id=None, prompt=None, extra_pnginfo=None), raising=False)
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    return kind


@pytest.fixture
def rewards(pack) -> object:
    config = pack("trainer.config").RewardConfig
    kinds = (config(name="shapes"), config(name="brightness", weight=2.0))
    return pack("nodes.types").Rewards(kinds)


@pytest.fixture
def sockets(demo, rewards) -> dict:
    latent = {"samples": torch.zeros(3, 16, 8, 8)}
    return {
        "model": [demo.model],
        "clip": [demo.clip],
        "vae": [demo.vae],
        "latent_image": [latent],
        "reward": [rewards],
    }


def bundled(pack) -> Path:
    return pack("trainer.shapes").WEIGHTS / "lora.safetensors"


def figures(result: object) -> dict:
    return result.ui["dancegrpo"][0]


def test_it_equals_the_trainers_own_evaluation(pack, node, sockets, tmp_path: Path) -> None:
    description = {
        "model": {"family": "sd3", "path": "embedded", "vae_dtype": "auto"},
        "prompts": {"texts": ["a green square"]},
        "rollout": {"steps": 5, "shift": 3.0},
        "rewards": [{"name": "shapes"}, {"name": "brightness", "weight": 2.0}],
        "evaluation": {"texts": TEXTS, "images_per_prompt": 2},
        "runtime": {"device": "cpu"},
    }
    config = pack("trainer.config").parse_config(description)
    own = pack("trainer.evaluation.command").run_evaluation(
        config, [bundled(pack)], tmp_path / "own", lambda text: None
    )
    lora = load_file(bundled(pack))
    found = figures(node.execute(**sockets, **WIDGETS, lora_model_1=[lora]))
    assert [model["name"] for model in found["models"]] == ["base", "lora_model_1"]
    for model, expected in zip(found["models"], own["models"], strict=True):
        for name, room in (("shapes", 0.02), ("brightness", 1e-3)):  # the checker cuts at colours' borders
            for key, estimate in model["rewards"][name].items():
                if key != "win_rate":  # two nearly equal images may be ranked either way
                    assert estimate == pytest.approx(expected["rewards"][name][key], abs=room)
        for name, block in model["looks"].items():
            assert block["estimate"] == pytest.approx(expected["looks"][name]["estimate"], abs=1e-3)
    total = found["models"][1]["rewards"]["weighted sum"]["estimate"]["mean"]
    parts = [found["models"][1]["rewards"][name]["estimate"]["mean"] for name in ("shapes", "brightness")]
    assert total == pytest.approx(parts[0] + 2 * parts[1])


def test_loras_by_name_and_by_socket_are_the_same_and_strength_0_is_the_base(
    pack, node, sockets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loras" / "mine").mkdir(parents=True)
    save_file(load_file(bundled(pack)), tmp_path / "loras" / "mine" / "a.safetensors")
    known = {"mine/a.safetensors": str(tmp_path / "loras" / "mine" / "a.safetensors")}
    monkeypatch.setattr(folder_paths, "get_full_path", lambda kind, name: known.get(name))
    widgets = WIDGETS | {"images_per_prompt": [1], "lora_1": ["mine/a.safetensors"], "lora_2": ["(none)"]}
    lora = load_file(bundled(pack))
    result = node.execute(**sockets, **widgets, lora_model_2=[lora])
    base, named, connected = figures(result)["models"]
    assert [named["name"], connected["name"]] == ["a", "lora_model_2"]
    assert named["rewards"] == connected["rewards"] != base["rewards"]
    assert base["looks"]["diversity"]["estimate"]["mean"] is None, "one image has no pair"
    sheet, text = result.args
    assert sheet.shape[0] == 1 and sheet.shape[-1] == 3 and sheet.shape[2] > 3 * 192
    assert "  lora_model_2" in text
    none = figures(node.execute(**sockets, **(widgets | {"strength": [0.0]})))["models"][1]
    assert none["rewards"]["shapes"]["estimate"] == pytest.approx(base["rewards"]["shapes"]["estimate"])
    assert none["rewards"]["shapes"]["win_rate"]["mean"] == 0.5


def test_a_file_that_is_replaced_is_compared_again(pack, node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    save_file(load_file(bundled(pack)), file)
    monkeypatch.setattr(folder_paths, "get_full_path", lambda kind, name: str(file))
    before = node.fingerprint_inputs(lora_1=["a.safetensors"])
    assert node.fingerprint_inputs(lora_1=["a.safetensors"]) == before
    save_file({"x": torch.zeros(1)}, file)
    assert node.fingerprint_inputs(lora_1=["a.safetensors"]) != before


def test_bad_input_is_refused_before_any_model_is_asked_for(node, rewards) -> None:
    lazy = {name: [None] for name in ("model", "clip", "vae", "latent_image", "reward", "lora_model_1")}
    assert node.check_lazy_status(**lazy, **WIDGETS) == ["reward"]
    ready = lazy | {"reward": [rewards]}
    assert node.check_lazy_status(**ready, **WIDGETS) == ["lora_model_1", "model", "clip", "vae", "latent_image"]
    with pytest.raises(ValueError, match="not in ComfyUI's list of LoRAs"):
        node.check_lazy_status(**lazy, **WIDGETS, lora_1=["../../secret.safetensors"])
    with pytest.raises(ValueError, match="reward must be connected"):
        node.check_lazy_status(**(lazy | {"reward": [{"rewards": []}]}), **WIDGETS)
    assert "prompts is empty" in node.validate_inputs(prompts=["# nothing"])
    assert "more than once" in node.validate_inputs(prompts=["a\nb\na"]) or "twice" in node.validate_inputs(
        prompts=["a\na"]
    )
    assert node.validate_inputs(prompts=["a\nb"]) is True


def test_a_lora_of_another_model_is_named(node, sockets) -> None:
    foreign = {"lora_unet_single_blocks_0_linear1.lora_up.weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match="'lora_model_1': lora: none of its 1 tensors fits the model"):
        node.execute(**sockets, **WIDGETS, lora_model_1=[foreign])


def test_literals_in_place_of_links_are_refused(node, sockets) -> None:
    for name, value in (("model", "x"), ("vae", 1), ("latent_image", {"samples": [0]}), ("clip", {})):
        with pytest.raises(ValueError, match=f"{name} must be connected"):
            node.execute(**(sockets | {name: [value]}), **WIDGETS)
