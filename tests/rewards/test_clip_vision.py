"""Image encoders from ComfyUI's clip_vision files: recognized by shape, filled strictly, right to the numbers.

The comparison with ComfyUI's own loader is in tests/comfy/inside/check_votes.py.
"""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from clip_reference import TINY, open_clip_shapes, random_weights, to_transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from trainer.rewards.clip import vision
from trainer.rewards.clip.vision import Layout, VisionEncoder, load_vision_encoder, square
from trainer.utils.errors import BadInput

IMAGES = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "seen-quickgelu.json").write_text(json.dumps({**TINY, "quick_gelu": True}))
    open_clip.add_model_config(tmp_path / "seen-quickgelu.json")
    monkeypatch.setattr(vision, "CLIP", {Layout(32, 2, 5, 14): "seen-quickgelu"})
    monkeypatch.setattr(vision, "SIGLIP", {Layout(32, 2, 4, 14): 28})
    monkeypatch.setattr(vision, "SIGLIP_SIZES", {"num_attention_heads": 2, "intermediate_size": 48})
    return tmp_path


def load(folder: Path, weights: dict[str, Tensor]) -> VisionEncoder:
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    return load_vision_encoder(folder / "model.safetensors").eval()


def test_the_two_names_of_clips_tensors_mean_the_same_network(tiny: Path) -> None:
    weights = random_weights(open_clip_shapes(TINY))
    transformers = {key: value for key, value in to_transformers(weights).items() if key.startswith("vis")}
    of_llava = {"multi_modal_projector.linear_1.weight": torch.ones(2, 2)}
    first = load(tiny, weights)(IMAGES)
    torch.testing.assert_close(load(tiny, transformers | of_llava)(IMAGES), first)
    half = load(tiny, {key: value.half() for key, value in transformers.items()})
    torch.testing.assert_close(half(IMAGES), first, atol=0.02, rtol=0)
    assert first.shape == (3, 20)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(3))
    bare = {key: value for key, value in transformers.items() if "projection" not in key}
    assert load(tiny, bare)(IMAGES).shape == (3, 32)


@pytest.mark.parametrize("pooling", [True, False])
def test_siglip_is_transformers_own(tiny: Path, pooling: bool) -> None:
    torch.manual_seed(0)
    config = SiglipVisionConfig(hidden_size=32, num_hidden_layers=2, image_size=28, patch_size=14,
                                num_attention_heads=2, intermediate_size=48, vision_use_head=pooling)  # fmt: skip
    own = SiglipVisionModel(config).eval()
    weights = {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in own.state_dict().items()}
    found = load(tiny, weights | {"text_model.x": torch.ones(1), "logit_scale": torch.ones(1)})(IMAGES)
    with torch.no_grad():
        output = own(IMAGES * 2 - 1)
    embedding = output.pooler_output if pooling else output.last_hidden_state.mean(1)
    torch.testing.assert_close(found, embedding / embedding.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_the_middle_square_is_resized_as_pillow_does() -> None:
    wide = torch.rand(1, 3, 90, 160, generator=torch.Generator().manual_seed(1))
    found = square(wide, 28)[0]
    middle = (wide[0, :, :, 35:125] * 255).round().byte().permute(1, 2, 0).numpy()
    expected = np.array(Image.fromarray(middle).resize((28, 28), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=3 / 255)
    assert torch.equal(square(IMAGES, 28), IMAGES)
    assert square(torch.ones(1, 3, 7, 3000), 28).shape == (1, 3, 28, 28)


def test_another_model_is_refused_with_what_to_choose(tiny: Path) -> None:
    with pytest.raises(BadInput, match=r"choose CLIP ViT-L/14, ViT-H/14 or ViT-bigG/14, or SigLIP SO400M"):
        load(tiny, {"encoder.layer.0.layer_scale2.lambda1": torch.ones(3)})  # DINOv2
    weights = random_weights(open_clip_shapes(TINY))
    shallow = {key: value for key, value in weights.items() if "resblocks.1" not in key}
    with pytest.raises(BadInput, match="choose CLIP"):
        load(tiny, shallow)
    with pytest.raises(BadInput, match=r"is not CLIP seen: missing keys ln_post\.bias"):
        load(tiny, {key: value for key, value in weights.items() if key != "visual.ln_post.bias"})
    with pytest.raises(BadInput, match=r"is not CLIP seen: unexpected keys \w+"):
        load(tiny, weights | {"visual.more": torch.ones(1)})
    flat = {"vision_model.embeddings.position_embedding.weight": torch.ones(5),
            "vision_model.embeddings.patch_embedding.weight": torch.ones(2, 3, 4, 4)}  # fmt: skip
    with pytest.raises(BadInput, match="choose CLIP"):
        load(tiny, flat)
    (tiny / "cut.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:200])
    with pytest.raises(BadInput, match="cannot be loaded as weights"):
        load_vision_encoder(tiny / "cut.safetensors")


@pytest.mark.parametrize(
    ("name", "embedding"),
    [("ViT-L-14-quickgelu", 768), ("ViT-L-14-336-quickgelu", 768), ("ViT-H-14", 1024), ("ViT-bigG-14", 1280)],
)
def test_the_released_sizes_of_clip_are_recognized(name: str, embedding: int) -> None:
    config = vision.architecture(name)
    size = config["vision_cfg"]
    with torch.device("meta"):
        network = vision.open_clip_network(config).visual
    weights = {f"visual.{key}": value for key, value in network.state_dict().items()}
    layout = vision._layout(weights)
    assert vision.CLIP[layout] == name
    assert network.output_dim == embedding
    assert (layout.positions - 1) * layout.patch**2 == size["image_size"] ** 2
