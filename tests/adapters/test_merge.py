"""Sampling with the LoRA merged into the base weights: the same run, faster layers, and nothing left behind."""

import copy
from pathlib import Path

import pytest
import torch
from learning import assert_same_learning
from short_runs import train

from trainer.adapters import lora
from trainer.adapters.merge import check_merge, check_merged, merged
from trainer.config import LoraConfig, ModelConfig, parse_config
from trainer.models.diffusers.sd3 import SD3Model
from trainer.utils.errors import BadInput

CPU = torch.device("cpu")
EVERY_LINEAR = LoraConfig(rank=4, alpha=6, targets=["attn.to_q", "attn.to_out.0", "ff.net.2", "proj_out"])


@pytest.fixture
def taught(tiny_sd3: Path) -> torch.nn.Module:
    module = SD3Model.load(ModelConfig(path=str(tiny_sd3), height=16, width=16), CPU).module
    lora.inject(module, EVERY_LINEAR, (), 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.parameters(module).values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


def predict(module: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, embeds, pooled = (
        torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 16, 128), (2, 128))
    )
    with torch.no_grad():
        return module(latents, embeds, pooled, torch.tensor([700.0, 300.0]), return_dict=False)[0]


def bases(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if "lora_" not in name}


def test_merged_weights_predict_alike_with_the_adapter_off(taught: torch.nn.Module) -> None:
    apart, before = predict(taught), bases(taught)
    lora.set_enabled(taught, False)
    base = predict(taught)
    lora.set_enabled(taught, True)
    assert (apart - base).norm() > 0.01 * base.norm(), "the LoRA does nothing, so merging it means nothing"
    called = []
    hooks = [m.register_forward_hook(lambda *a: called.append(1)) for n, m in taught.named_modules() if "lora_A." in n]
    with merged(taught):
        together = predict(taught)
        assert not called
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5 * apart.abs().max().item())
    assert torch.equal(predict(taught), apart)
    assert called
    assert all(torch.equal(value, before[name]) for name, value in bases(taught).items())
    assert all(p.requires_grad for p in lora.parameters(taught).values())
    for hook in hooks:
        hook.remove()


def test_weights_come_back_after_an_error(taught: torch.nn.Module) -> None:
    apart = predict(taught)
    with pytest.raises(RuntimeError, match="stop"), merged(taught):
        raise RuntimeError("stop")
    assert torch.equal(predict(taught), apart)


def test_a_disabled_lora_stays_out_of_the_weights(taught: torch.nn.Module) -> None:
    lora.set_enabled(taught, False)
    base = predict(taught)
    with merged(taught):
        assert torch.equal(predict(taught), base)
    assert torch.equal(predict(taught), base)


def test_layers_of_another_dtype_keep_their_lora_apart(taught: torch.nn.Module) -> None:
    check_merged(taught)
    half = taught.to(torch.bfloat16)
    with pytest.raises(BadInput, match=r"rollout.merge_lora is true and no layer .* float32"):
        check_merged(half)
    before = bases(half)
    with merged(half):
        assert all(torch.equal(value, before[name]) for name, value in bases(half).items())


@pytest.mark.parametrize("settings", ["model.dtype=bfloat16", "model.quantization=nf4", "model.sharded=true"])
def test_it_is_refused_where_it_would_round_the_lora_away(settings: str, tiny_description: dict) -> None:
    config = parse_config(tiny_description, [settings, "rollout.merge_lora=true"])
    with pytest.raises(BadInput, match="rollout.merge_lora is true and the base model is .* model.dtype to float32"):
        check_merge(config)
    check_merge(parse_config(tiny_description, [settings]))


@pytest.mark.parametrize(
    "objective", [{}, {"updates": 2}, {"name": "nft"}, {"name": "awm"}, {"name": "reward-gradient"}]
)
def test_a_run_learns_the_same(objective: dict, tiny_description: dict) -> None:
    data = copy.deepcopy(tiny_description)
    data["objective"] = objective
    data["runtime"] |= {"iterations": 2, "samples_every": 0}
    apart, events = train(data)
    data["rollout"] = data.get("rollout", {}) | {"merge_lora": True}
    together, others = train(data)
    assert_same_learning(apart.policy.tensors(), together.policy.tensors())
    for event, other in zip(events, others, strict=True):
        assert event["rewards"]["brightness"]["mean"] == pytest.approx(other["rewards"]["brightness"]["mean"], abs=1e-3)
