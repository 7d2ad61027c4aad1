"""Memory by part, counted without weights: against an allocator, and at released sizes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_families import CASES, build_sd
from torch.profiler import ProfilerActivity, profile

from trainer.adapters import lora
from trainer.config import ModelConfig, parse_config
from trainer.models import FAMILIES, run_memory, weight_bytes
from trainer.shapes import WEIGHTS

CPU = torch.device("cpu")


def allocated(work: Callable[[], object]) -> int:
    """Largest memory of a computation on a CPU, as its allocator reports it."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        work()
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_memory_of_decoding_is_counted_without_weights() -> None:
    config = ModelConfig(decode_batch_size=3)
    counted = FAMILIES["sd3"].decode_bytes(config)
    model = FAMILIES["sd3"].load(config, CPU)
    latents = torch.randn(3, 16, 8, 8)
    assert counted == pytest.approx(allocated(lambda: model.decode_batch(latents)), rel=0.05)
    single = FAMILIES["sd3"].decode_bytes(ModelConfig(decode_batch_size=1))
    assert counted == pytest.approx(3 * single, rel=0.01)


def test_memory_of_decoding_stable_diffusion_at_its_real_size(tmp_path: Path) -> None:
    folder = build_sd(tmp_path)
    real = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
    real |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | real))
    config = ModelConfig(family="sd", path=str(folder), height=512, width=512, decode_batch_size=12)
    assert FAMILIES["sd"].decode_bytes(config) / 2**30 == pytest.approx(9.0, abs=0.1)
    at_default = config.model_copy(update={"decode_batch_size": None})
    assert FAMILIES["sd"].decode_bytes(at_default) / 2**30 == pytest.approx(3.0, abs=0.1)


def test_memory_of_weights_counts_the_form_in_which_they_are_loaded(tmp_path: Path) -> None:
    for part, size in (("transformer", 1000), ("vae", 100)):
        (tmp_path / part).mkdir()
        save_file({"w": torch.zeros(size)}, tmp_path / part / "model.safetensors")
        save_file({"w": torch.zeros(size)}, tmp_path / part / "model.fp16.safetensors")
    settings = {"family": "wan", "path": str(tmp_path)}
    assert weight_bytes(ModelConfig(**settings)) == 4400
    assert weight_bytes(ModelConfig(**settings, dtype="bfloat16", vae_dtype="bfloat16")) == 2200
    assert weight_bytes(ModelConfig(**settings, quantization="int8")) == 1400
    assert weight_bytes(ModelConfig(**settings, quantization="nf4")) == 900
    assert weight_bytes(ModelConfig(**settings, sharded=True), processes=4) == 1400
    whole = {"model.diffusion_model.w": torch.zeros(10), "first_stage_model.w": torch.zeros(7)}
    for name, weights in (("network", {"w": torch.zeros(10)}), ("checkpoint", whole)):
        save_file(weights, tmp_path / f"{name}.safetensors")
        config = ModelConfig(**settings, network_file=str(tmp_path / f"{name}.safetensors"))
        assert weight_bytes(config) == 440
    (tmp_path / "network.safetensors").write_bytes(b"damaged")
    assert weight_bytes(ModelConfig(**settings, network_file=str(tmp_path / "network.safetensors"))) == 400
    assert weight_bytes(ModelConfig()) == weight_bytes(ModelConfig(path=str(WEIGHTS)))


@pytest.mark.parametrize("name", ["sd", "flux", "hunyuanvideo"])
def test_memory_of_rollout_and_update_is_what_an_allocator_reports(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = case.build(tmp_path)
    size = {"height": 64, "width": 64} | ({"frames": 5} if "frames" in case.model else {})
    config = parse_config(
        {
            "model": {"family": case.family, "path": str(folder), "gradient_checkpointing": name == "flux", **size},
            "prompts": {"texts": ["any"]},
            "rewards": [{"name": "brightness"}],
            "rollout": {"batch_size": 6, "guidance_scale": 3.0},
            "objective": {"batch_size": 4},
            "lora": {"rank": 4, "ema_decay": 0.9},
        }
    )
    family = FAMILIES[case.family]
    parts = run_memory(family, config)
    model = family.load(config.model, CPU)
    lora.inject(model.module, config.lora, model.default_targets, seed=0)
    learned = sum(value.numel() for value in lora.parameters(model.module).values())
    assert parts.adapter == (16 + 4) * learned, "weight, gradient, two moments; the moving average"
    frozen = [*model.module.parameters(), *model.vae.parameters()]
    assert parts.weights == sum(4 * value.numel() for value in frozen if not value.requires_grad)

    def predict(count: int) -> torch.Tensor:
        one, several = (family.empty_conditions(config.model, rows, CPU) for rows in (1, count))
        latents, level = torch.zeros(count, *model.latent_shape), torch.full((count,), 0.5)
        return model.predict_guided(latents, level, several, 3.0, one)

    def update() -> None:
        model.module.zero_grad(set_to_none=True)
        predict(4).square().sum().backward()

    with torch.no_grad():
        assert parts.rollout == pytest.approx(allocated(lambda: predict(6)), rel=0.15)
    assert parts.update == pytest.approx(allocated(update) - 4 * learned, rel=0.15)
    assert parts.total() == parts.weights + parts.adapter + max(parts.rollout, parts.update, parts.decode)
    assert parts.total(rewards=10**12) == parts.weights + parts.adapter + 10**12
