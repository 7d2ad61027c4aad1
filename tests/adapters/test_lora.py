"""The adapter: an identity at first, saved under names and scales that others read alike."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.adapters import lora
from trainer.config import LoraConfig, ModelConfig
from trainer.models.diffusers.sd3 import SD3Model
from trainer.utils.errors import BadInput

CPU = torch.device("cpu")
CONFIG = LoraConfig(rank=4, alpha=6)
KINDS = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}


@pytest.fixture
def model(tiny_sd3: Path) -> SD3Model:
    return SD3Model.load(ModelConfig(path=str(tiny_sd3), height=16, width=16), CPU)


def predict(module: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, embeds, pooled = (
        torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 16, 128), (2, 128))
    )
    with torch.no_grad():
        return module(latents, embeds, pooled, torch.tensor([700.0, 300.0]), return_dict=False)[0]


def inject(model: SD3Model, config: LoraConfig = CONFIG, seed: int = 0) -> list[str]:
    return lora.inject(model.module, config, model.default_targets, seed)


def teach(model: SD3Model) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.parameters(model.module).values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def test_fresh_adapter_is_the_identity(model: SD3Model) -> None:
    base = predict(model.module)
    inject(model)
    assert torch.equal(predict(model.module), base)
    down = [p for name, p in lora.parameters(model.module).items() if "lora_A" in name]
    assert down
    assert all(p.any() for p in down)


def test_adapter_is_on_every_attention_layer_and_nothing_else_learns(model: SD3Model) -> None:
    names = inject(model)
    expected = {f"transformer_blocks.{block}.attn.{kind}" for block in (0, 1) for kind in KINDS}
    expected.remove("transformer_blocks.1.attn.to_add_out")  # the last block drops the text after its attention
    assert set(names) == expected
    parameters = lora.parameters(model.module)
    assert len(parameters) == 2 * len(names)
    learning = {name for name, p in model.module.named_parameters() if p.requires_grad}
    assert learning == set(parameters)
    assert {p.dtype for p in parameters.values()} == {torch.float32}


def test_adapter_of_a_half_precision_base_is_float32(tiny_sd3: Path) -> None:
    config = ModelConfig(path=str(tiny_sd3), height=16, width=16, dtype="bfloat16")
    half = SD3Model.load(config, CPU)
    inject(half)
    assert {p.dtype for p in lora.parameters(half.module).values()} == {torch.float32}
    assert half.module.transformer_blocks[0].attn.to_q.base_layer.weight.dtype == torch.bfloat16


def test_injecting_leaves_random_numbers_alone_and_depends_on_its_seed_alone(model: SD3Model, tiny_sd3: Path) -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    inject(model, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    for seed, same in ((5, True), (6, False)):
        other = SD3Model.load(ModelConfig(path=str(tiny_sd3), height=16, width=16), CPU)
        inject(other, seed=seed)
        mine, others = lora.parameters(model.module), lora.parameters(other.module)
        assert all(torch.equal(value, others[key]) for key, value in mine.items()) == same


def test_scale_is_alpha_over_rank(model: SD3Model) -> None:
    inject(model)
    teach(model)
    layer = model.module.transformer_blocks[0].attn.to_q
    x = torch.randn(3, 32)
    weights = {name: p for name, p in lora.parameters(model.module).items() if "blocks.0.attn.to_q." in name}
    down, up = (next(p for name, p in weights.items() if part in name) for part in ("lora_A", "lora_B"))
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 6 / 4 * x @ down.T @ up.T)


def test_disabled_is_the_base_and_enabling_it_again_gives_the_lora(model: SD3Model) -> None:
    base = predict(model.module)
    inject(model)
    teach(model)
    taught = predict(model.module)
    assert (taught - base).abs().max() > 1e-2
    lora.set_enabled(model.module, False)
    assert torch.equal(predict(model.module), base)
    lora.set_enabled(model.module, True)
    assert torch.equal(predict(model.module), taught)
    assert all(p.requires_grad for p in lora.parameters(model.module).values())


def test_loaded_weights_are_those_that_were_given(model: SD3Model) -> None:
    inject(model)
    fresh = {name: p.detach().clone() for name, p in lora.parameters(model.module).items()}
    base = predict(model.module)
    teach(model)
    assert not torch.equal(predict(model.module), base)
    lora.load(model.module, fresh)
    assert torch.equal(predict(model.module), base)


def saved(model: SD3Model, path: Path) -> dict[str, Tensor]:
    weights = lora.comfy_weights(lora.parameters(model.module), CONFIG.alpha, model.lora_key)
    lora.save(path, weights, {"base_model": "tiny"})
    return weights


def test_file_holds_both_matrices_and_the_scale_of_every_module(model: SD3Model, tmp_path: Path) -> None:
    from safetensors import safe_open

    names = inject(model)
    teach(model)
    saved(model, tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        assert file.metadata() == {"base_model": "tiny"}
    endings = ("lora_A.weight", "lora_B.weight", "alpha")
    assert set(found) == {f"transformer.{name}.{ending}" for name in names for ending in endings}
    assert {value.item() for key, value in found.items() if key.endswith(".alpha")} == {6.0}
    live = lora.parameters(model.module)
    for name in names:
        for side in "AB":
            assert torch.equal(
                found[f"transformer.{name}.lora_{side}.weight"], live[f"{name}.lora_{side}.default.weight"]
            )


def test_diffusers_loads_the_file_to_the_same_effect(model: SD3Model, tiny_sd3: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    inject(model)
    teach(model)
    saved(model, tmp_path / "lora.safetensors")
    found = load_file(tmp_path / "lora.safetensors")
    alphas = {key: value.item() for key, value in found.items() if key.endswith(".alpha")}
    matrices = {key: value for key, value in found.items() if key not in alphas}
    other = SD3Model.load(ModelConfig(path=str(tiny_sd3), height=16, width=16), CPU).module
    base = predict(other)
    other.load_lora_adapter(matrices, network_alphas=alphas, prefix="transformer")
    expected = predict(model.module)
    assert (predict(other) - expected).abs().max() < 1e-4
    assert (expected - base).abs().max() > 1e-2


def test_merging_the_file_by_hand_gives_the_trained_model(model: SD3Model, tiny_sd3: Path, tmp_path: Path) -> None:
    names = inject(model)
    teach(model)
    found = saved(model, tmp_path / "lora.safetensors")
    other = SD3Model.load(ModelConfig(path=str(tiny_sd3), height=16, width=16), CPU).module
    for name in names:
        down, up = (found[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        other.get_submodule(name).weight.data += found[f"transformer.{name}.alpha"] / down.shape[0] * up @ down
    assert (predict(other) - predict(model.module)).abs().max() < 1e-4


def test_targets_of_the_configuration_come_first(model: SD3Model) -> None:
    names = inject(model, LoraConfig(rank=2, alpha=2, targets=["attn.to_q", "transformer_blocks.0.ff.net.2"]))
    assert set(names) == {
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_q",
        "transformer_blocks.0.ff.net.2",
    }


@pytest.mark.parametrize("target", ["attn.to_qq", "o_q", "attn"])
def test_targets_that_match_nothing_are_bad_input(model: SD3Model, target: str) -> None:
    base = predict(model.module)
    with pytest.raises(BadInput, match=f"'{target}' matches no linear or convolution layer"):
        inject(model, LoraConfig(targets=["attn.to_q", target]))
    assert torch.equal(predict(model.module), base)
    assert not lora.parameters(model.module)
