"""Frozen bases in fewer bits: they train, and what rounding does to ratios."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS
from tiny_families import CASES, WAN, stir

from trainer.adapters import lora
from trainer.config import LoraConfig, ModelConfig, parse_config
from trainer.loop import Trainer
from trainer.models.diffusers.wan import WanModel
from trainer.utils.distributed import Processes

CPU = torch.device("cpu")


def wide_wan(folder: Path) -> Path:
    """A network with layers as wide as the blocks that 4-bit weights are quantised in."""
    from diffusers import WanTransformer3DModel

    sizes = WAN | {"attention_head_dim": 32, "ffn_dim": 64, "text_dim": 64, "freq_dim": 64}
    stir(WanTransformer3DModel(**sizes)).save_pretrained(folder / "transformer")
    return folder


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(("kind", "layer", "error"), [("int8", "Linear8bitLt", 0.02), ("nf4", "Linear4bit", 0.4)])
def test_gradients_reach_a_lora_on_a_quantised_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, layer: str, error: float
) -> None:
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        # diffusers asks for a GPU; bitsandbytes itself computes on a CPU as well.
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **options: None)
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 16, 2, 4, 4, generator=draw), torch.randn(2, 5, 64, generator=draw)
    inputs = (latents, torch.tensor([900.0, 300.0]), text)
    path, outputs, sizes = wide_wan(tmp_path), {}, {}
    for quantization in (None, kind):
        config = ModelConfig(family="wan", path=str(path), quantization=quantization)
        network = WanModel._load_network(config, CPU).requires_grad_(False)
        network.train()  # on a CPU alone, 4-bit layers would be repacked for inference
        network.enable_gradient_checkpointing()
        sizes[quantization] = sum(p.numel() * p.element_size() for p in network.parameters())
        lora.inject(network, LoraConfig(rank=2), WanModel.default_targets, 0, CPU)
        learned = lora.parameters(network)
        for i, parameter in enumerate(learned.values()):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        outputs[quantization] = network(*inputs, return_dict=False)[0]
    assert sum(type(module).__name__ == layer for module in network.modules()) > 10
    assert sizes[kind] < 0.4 * sizes[None]
    difference = outputs[kind] - outputs[None]
    assert 0 < difference.norm() < error * outputs[None].norm()
    outputs[kind].square().mean().backward()
    assert all(p.dtype == torch.float32 and p.grad.norm() > 0 for p in learned.values())
    assert not [n for n, p in network.named_parameters() if n not in learned and p.grad is not None]


@pytest.fixture(scope="module")
def hunyuan_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASES["hunyuanvideo"].build(tmp_path_factory.mktemp("hunyuanvideo"))


def trained_in_bfloat16(folder: Path, batch_size: int, old_log_prob: str) -> list[dict]:
    """Events of two iterations of two optimizer steps; the weights hardly move, so that only rounding moves a ratio."""
    model = {"family": "hunyuanvideo", "path": str(folder), "dtype": "bfloat16", **CASES["hunyuanvideo"].model}
    description = {
        "model": model,
        "prompts": {"texts": PROMPTS[:2]},
        "rollout": {"steps": 4, "group_size": 3, "prompts_per_iteration": 2, "batch_size": 96},
        "rewards": [{"name": "brightness"}],
        "objective": {
            "train_steps": "all",
            "batch_size": batch_size,
            "updates": 2,
            "old_log_prob": old_log_prob,
        },
        "lora": {"rank": 2, "alpha": 4},
        "optimizer": {"learning_rate": 1e-12},
        "runtime": {"iterations": 2, "seed": 3, "device": "cpu"},
    }
    events: list[dict] = []
    trainer = Trainer(parse_config(description), None, Processes("cpu"), events.append)
    trainer.train()
    events = [event for event in events if "objective" in event]
    assert {p.dtype for p in trainer.policy.parameters.values()} == {torch.float32}
    assert {p.dtype for n, p in trainer.model.module.named_parameters() if "lora" not in n} == {torch.bfloat16}
    assert all(event["grad_norm"] > 0 for event in events)
    return events


@pytest.mark.parametrize(("batch_size", "old_log_prob"), [(96, "rollout"), (1, "rollout"), (1, "update")])
def test_training_on_a_bfloat16_base_is_on_policy(
    hunyuan_video: Path, batch_size: int, old_log_prob: str, capsys: pytest.CaptureFixture
) -> None:
    """Batches of other sizes round differently, and the optimizer steps do not feel it where that is asked for."""
    events = trained_in_bfloat16(hunyuan_video, batch_size, old_log_prob)
    off = max(event["objective"]["rollout_deviation"]["max"] for event in events)
    ratio = max(event["objective"]["ratio"]["max_deviation"] for event in events)
    clipped = sum(event["objective"]["clip_fraction"] for event in events)
    warned = capsys.readouterr().err.count("set objective.old_log_prob to update")
    if batch_size == 96:
        assert off == ratio == clipped == warned == 0
    else:
        assert 1e-4 < off < 1e-2, "above the clip range"
        exact = old_log_prob == "update"
        assert (ratio == 0, clipped == 0, warned) == (exact, exact, 0 if exact else 1)
