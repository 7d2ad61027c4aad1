"""The files of benchmarks/full_size.py: core recognises their layouts, from names and shapes alone."""

import sys
from pathlib import Path

import comfy.model_detection
import comfy.sd
import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[3]))

from benchmarks import full_size_models
from benchmarks.core_models import NETWORKS
from benchmarks.full_size_models import CHECKPOINT, MODELS, NETWORK, TEXT

PREFIX = "model.diffusion_model."


@pytest.mark.parametrize("name", MODELS)
def test_core_recognises_the_files_by_their_headers(name: str) -> None:
    model = MODELS[name]
    files = full_size_models.layout(model)
    weights, prefix = (files[CHECKPOINT], PREFIX) if model.folder else (files[NETWORK], "")
    config = comfy.model_detection.model_config_from_unet(weights, prefix)
    assert type(config).__name__ == NETWORKS[model.network].core
    config.set_inference_dtype(torch.bfloat16, None)
    network = config.get_model(weights, prefix, device="meta").diffusion_model
    written = {key.removeprefix(prefix): value.shape for key, value in weights.items() if key.startswith(prefix)}
    assert written == {key: value.shape for key, value in network.state_dict().items()}
    if TEXT in files:
        kinds = {"lumina2": comfy.sd.TEModel.QWEN3_4B, "wan": comfy.sd.TEModel.T5_XXL}
        assert comfy.sd.detect_te_model(files[TEXT]) is kinds[model.text]


@pytest.mark.parametrize("name, encoders", [("sd15", {"clip_l"}), ("sdxl", {"clip_l", "clip_g"})])
def test_core_finds_the_text_encoders_of_a_checkpoint(name: str, encoders: set[str]) -> None:
    weights = full_size_models.layout(MODELS[name])[CHECKPOINT]
    config = comfy.model_detection.model_config_from_unet(weights, PREFIX)
    found = config.process_clip_state_dict(dict(weights))
    assert {key.partition(".")[0] for key in found} == encoders
    expected = {
        f"{prefix}.transformer.{key}": value.shape for key, value, prefix in full_size_models.clips(MODELS[name].folder)
    }
    assert {key: value.shape for key, value in found.items() if key in expected} == expected


def test_a_file_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size_models, "PIECE", 200)
    shapes = {"norm.weight": (7,), "wide.weight": (30, 16), "conv.weight": (3, 2, 9, 9)}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    full_size_models.write_random(
        tmp_path / "some.safetensors", tensors, torch.bfloat16, {"words": torch.arange(3, dtype=torch.uint8)}
    )
    assert [path.name for path in tmp_path.iterdir()] == ["some.safetensors"]
    written = load_file(tmp_path / "some.safetensors")
    assert written.pop("words").tolist() == [0, 1, 2]
    assert {name: tuple(value.shape) for name, value in written.items()} == shapes
    assert all(value.dtype == torch.bfloat16 for value in written.values())
    rows = written["wide.weight"].float()
    assert len(rows.unique(dim=0)) > 20 and 0.1 < rows.std() < 0.25  # 0.7 / 16 ** 0.5, and pieces differ
    assert 0.9 < written["norm.weight"].float().mean() < 1.1
