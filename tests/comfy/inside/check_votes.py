"""Image encoders against ComfyUI's own, and what the routes take for a page of the server's own."""

import json
from pathlib import Path

import comfy.cli_args
import comfy.clip_vision
import comfy.model_management
import open_clip
import pytest
import torch
from safetensors.torch import save_file

CONFIGS = Path(comfy.clip_vision.__file__).parent
SMALL = {"hidden_size": 64, "intermediate_size": 96}
"""Heads and layers' kind stay those of the real network, where they fit."""


def small(name: str) -> dict:
    """ComfyUI's configuration of a network, with two narrow layers."""
    config = json.loads((CONFIGS / name).read_text()) | SMALL
    config["num_hidden_layers"], config["num_attention_heads"] = 2, 2
    config["image_size"] = 2 * config["patch_size"]
    return config | ({"projection_dim": 48} if "projection_dim" in config else {})


def comfys(config: dict) -> comfy.clip_vision.ClipVisionModel:
    """ComfyUI's network with random weights."""
    found = comfy.clip_vision.ClipVisionModel(config)
    generator = torch.Generator().manual_seed(1)
    for name, value in found.model.state_dict().items():
        is_scale = value.ndim == 1 and name.endswith("weight")
        value.copy_(float(is_scale) + 0.1 * torch.randn(value.shape, generator=generator))
    return found


@pytest.fixture
def vision(pack):
    return pack("trainer.rewards.clip.vision")


@pytest.mark.parametrize(
    ("name", "quick", "bare"),
    [
        ("clip_vision_config_vitl.json", True, False),
        ("clip_vision_config_vitl_336_llava.json", True, True),
        ("clip_vision_config_h.json", False, False),
        ("clip_vision_config_g.json", False, False),
    ],
)
def test_clip_is_comfyuis(vision, monkeypatch, tmp_path, name: str, quick: bool, bare: bool) -> None:
    config = small(name)
    own = comfys({key: value for key, value in config.items() if not bare or key != "projection_dim"})
    sizes = {"layers": 2, "width": 64, "head_width": 32, "mlp_ratio": 1.5}
    sizes |= {"patch_size": config["patch_size"], "image_size": config["image_size"]}
    text = {"context_length": 8, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
    described = {"embed_dim": config["projection_dim"], "vision_cfg": sizes, "text_cfg": text, "quick_gelu": quick}
    (tmp_path / "checked.json").write_text(json.dumps(described))
    open_clip.add_model_config(tmp_path / "checked.json")
    monkeypatch.setattr(vision, "CLIP", {vision.Layout(64, 2, 5, config["patch_size"]): "checked"})
    compare(vision, own, tmp_path / "model.safetensors", lambda output: output["image_embeds"])


@pytest.mark.parametrize("name", ["clip_vision_siglip_384.json", "clip_vision_siglip_512.json"])
def test_siglip_is_comfyuis(vision, monkeypatch, tmp_path, name: str) -> None:
    config = small(name)
    side, patch = config["image_size"], config["patch_size"]
    monkeypatch.setattr(vision, "SIGLIP", {vision.Layout(64, 2, 4, patch): side})
    monkeypatch.setattr(vision, "SIGLIP_SIZES", {"num_attention_heads": 2, "intermediate_size": 96})
    # ComfyUI has no pooling; without its weights the mean over patches stands for the image.
    compare(vision, comfys(config), tmp_path / "model.safetensors", lambda found: found["last_hidden_state"].mean(1))


def compare(vision, own, file: Path, embedding) -> None:
    save_file({key: value.contiguous() for key, value in own.get_sd().items()}, file)
    encoder = vision.load_vision_encoder(file)
    # ComfyUI rounds pixels to 256 values after resizing; at the network's own size that changes nothing.
    for size, tolerance in (((own.image_size, own.image_size), 1e-4), ((64, 64), 1e-2)):
        images = torch.rand(3, *size, 3, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
        with torch.no_grad():
            found, expected = encoder(images.movedim(-1, 1)), embedding(own.encode_image(images)).float()
        expected = expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        others = expected.roll(1, 0)
        assert (found - expected).norm(dim=1).max() < 0.2 * (others - expected).norm(dim=1).min()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("clip_vision_config_vitl.json", "CLIP"),
        ("clip_vision_config_vitl_336.json", "CLIP"),
        ("clip_vision_config_h.json", "CLIP"),
        ("clip_vision_config_g.json", "CLIP"),
        ("clip_vision_siglip_384.json", "SIGLIP"),
        ("clip_vision_siglip_512.json", "SIGLIP"),
    ],
)
def test_every_layout_of_comfyui_is_known_at_its_real_size(pack, vision, name: str, kind: str) -> None:
    config = json.loads((CONFIGS / name).read_text())
    with torch.device("meta"):
        own = comfy.clip_vision.IMAGE_ENCODERS[config["model_type"]](config, torch.float32, "meta", torch.nn)
    weights = own.state_dict()
    layout = vision._layout(weights)
    sizes = {"num_attention_heads": config["num_attention_heads"], "intermediate_size": config["intermediate_size"]}
    if kind == "SIGLIP":
        assert (vision.SIGLIP[layout], vision.SIGLIP_SIZES) == (config["image_size"], sizes)
        return
    described = vision.architecture(vision.CLIP[layout])
    with torch.device("meta"):
        ours = vision.open_clip_network(described).visual
    assert ours.image_size[0] == config["image_size"]
    assert ours.transformer.resblocks[0].attn.num_heads == sizes["num_attention_heads"]
    assert (described.get("quick_gelu") is True) == (config["hidden_act"] == "quick_gelu")
    convert = pack("trainer.rewards.clip.layout").from_transformers
    named = {key.removeprefix("visual."): value.shape for key, value in convert(weights, Path("x"), "x").items()}
    assert named == {key: value.shape for key, value in ours.state_dict().items()}
