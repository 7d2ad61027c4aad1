"""LoRAs of every diffusers family in ComfyUI: every key of the real architecture, and equal outputs on tiny models."""

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
import comfy.utils
import diffusers
import pytest
import torch
from core_networks import (
    FLUX,
    HUNYUAN,
    SD3_BASE,
    SD15,
    SD_BASE,
    SDXL,
    SDXL_BASE,
    SDXL_DIFFUSERS,
    TINY_FLUX,
    TINY_HUNYUAN,
    TINY_QWEN,
    TINY_WAN,
    WAN_14B,
    core_model,
)
from diffusers.loaders import single_file_model, single_file_utils
from safetensors.torch import save_file
from tiny_networks import draw
from torch import Tensor

Tensors = dict[str, Tensor]
SMALL = {"num_res_blocks": [2, 2], "channel_mult": [1, 2], "model_channels": 32}


@dataclass(frozen=True)
class Case:
    """A family.

    Attributes:
        core: ComfyUI's class of the family.
        network: diffusers' class.
        real: ComfyUI's configuration of the released model, and diffusers'.
        tiny: both of a tiny one.
        convert: ComfyUI's weights in diffusers' layout, by code that is not this pack's.
        call: a forward pass of ComfyUI's network, and of diffusers', on the same inputs.
    """

    family: str
    core: str
    network: str
    real: tuple[dict, dict]
    tiny: tuple[dict, dict]
    convert: Callable[[Tensors, dict], Tensors]
    call: Callable[[Any, Any], tuple[Tensor, Tensor]]


# -------------------------------------------------------------------------------------------------------- conversions


def by_map(names: dict[str, Any], weights: Tensors) -> Tensors:
    """Through ComfyUI's own map from diffusers' names to places in its layers."""
    result = {}
    for name, place in names.items():
        place = (place,) if isinstance(place, str) else place
        if place[0] not in weights:
            continue
        value = weights[place[0]]
        if len(place) > 1 and place[1] is not None:
            value = value.narrow(*place[1])
        result[name] = place[2](value) if len(place) > 2 else value
    return result


def convert_unet(weights: Tensors, config: dict) -> Tensors:
    names = comfy.utils.unet_to_diffusers(config)
    return by_map({name: place for name, place in names.items() if "class_embedding" not in name}, weights)


def convert_flux(weights: Tensors, config: dict) -> Tensors:
    names = comfy.utils.flux_to_diffusers(config)
    extra = ("ff.linear", "ff_context.linear", "to_qkv_mlp_proj", "attn.to_out.weight", "controlnet")  # other models'
    return by_map({name: place for name, place in names.items() if not any(e in name for e in extra)}, weights)


def tencent_name(name: str) -> str:
    """HunyuanVideo's released name of a weight of ComfyUI's."""
    for new, old in (
        ("_attn.qkv.", "_attn_qkv."),
        ("_attn.proj.", "_attn_proj."),
        ("_attn.norm.query_norm.", "_attn_q_norm."),
        ("_attn.norm.key_norm.", "_attn_k_norm."),
        ("self_attn.qkv.", "self_attn_qkv."),
        ("self_attn.proj.", "self_attn_proj."),
        ("_mod.lin.", "_mod.linear."),
        ("modulation.lin.", "modulation.linear."),
        ("img_mlp.0.", "img_mlp.fc1."),
        ("img_mlp.2.", "img_mlp.fc2."),
        ("txt_mlp.0.", "txt_mlp.fc1."),
        ("txt_mlp.2.", "txt_mlp.fc2."),
        ("norm.query_norm.", "q_norm."),
        ("norm.key_norm.", "k_norm."),
        ("mlp.0.", "mlp.fc1.") if "individual_token_refiner" in name else ("", ""),
        ("mlp.2.", "mlp.fc2.") if "individual_token_refiner" in name else ("", ""),
        ("_in.in_layer.", "_in.mlp.0.") if not name.startswith("vector") else ("", ""),
        ("_in.out_layer.", "_in.mlp.2.") if not name.startswith("vector") else ("", ""),
        ("_embedder.in_layer.", "_embedder.mlp.0." if "t_embedder" in name else "_embedder.linear_1."),
        ("_embedder.out_layer.", "_embedder.mlp.2." if "t_embedder" in name else "_embedder.linear_2."),
    ):
        if new:
            name = name.replace(new, old)
    return name


def convert_hunyuan(weights: Tensors, config: dict) -> Tensors:
    width, result = config["hidden_size"], {}
    for name, value in weights.items():
        if ".linear1." in name:  # diffusers' converter knows the real width alone
            block, kind = name.split(".linear1.")
            block = block.replace("single_blocks", "single_transformer_blocks")
            parts = value.split([width, width, width, len(value) - 3 * width])
            layers = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            result |= {f"{block}.{layer}.{kind}": part for layer, part in zip(layers, parts, strict=True)}
    original = {}
    for name, value in weights.items():
        if ".linear1." in name:
            continue
        original[tencent_name(name)] = value
    return result | single_file_utils.convert_hunyuan_video_transformer_to_diffusers(original)


def convert_wan(weights: Tensors, config: dict) -> Tensors:
    return single_file_utils.convert_wan_transformer_to_diffusers(dict(weights))


def convert_sd3(weights: Tensors, config: dict) -> Tensors:
    names = comfy.utils.mmdit_to_diffusers(config)
    names["pos_embed.pos_embed"] = "pos_embed"
    return by_map(names, weights)


def same(weights: Tensors, config: dict) -> Tensors:
    return dict(weights)


# -------------------------------------------------------------------------------------------------------------- calls


def call_unet(core: Any, network: Any) -> tuple[Tensor, Tensor]:
    x, text, times = draw(2, 4, 8, 8), draw(2, 5, network.config.cross_attention_dim, seed=1), torch.tensor([7, 900])
    y, added = None, None
    if network.config.addition_embed_type:
        y = draw(2, core.label_emb[0][0].in_features, seed=2)
        ids = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)
        # ComfyUI hands over the sizes' embedding, diffusers makes it.
        sizes = network.add_time_proj(ids.flatten().float()).reshape(2, -1)
        added = {"text_embeds": y[:, : y.shape[1] - sizes.shape[1]], "time_ids": ids}
        y = torch.cat([added["text_embeds"], sizes], dim=1)
    theirs = core(x, timesteps=times, context=text, y=y)
    return theirs, network(x, times, text, added_cond_kwargs=added).sample


def call_flux(core: Any, network: Any) -> tuple[Tensor, Tensor]:
    x, text, pooled, sigma = draw(2, 16, 4, 6), draw(2, 5, 16, seed=1), draw(2, 16, seed=2), torch.tensor([0.9, 0.3])
    guidance = torch.full((2,), 3.5)
    tokens = x.view(2, 16, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 64)
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    ids = torch.cat([torch.zeros(6, 1), grid], 1)
    ours = network(
        tokens,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=sigma,
        img_ids=ids,
        txt_ids=torch.zeros(5, 3),
        guidance=guidance,
    ).sample
    ours = ours.view(2, 2, 3, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 16, 4, 6)
    return core(x, sigma, text, pooled, guidance), ours


def call_hunyuan(core: Any, network: Any) -> tuple[Tensor, Tensor]:
    channels = network.config.in_channels
    x, text, pooled = draw(2, channels, 2, 4, 4), draw(2, 5, 16, seed=1), draw(2, 16, seed=2)
    times, guidance = torch.tensor([900.0, 300.0]), torch.full((2,), 6.0)
    ours = network(x, times, text, torch.ones(2, 5), pooled, guidance * 1000).sample
    return core(x, times, text, pooled, guidance=guidance), ours


def call_wan(core: Any, network: Any) -> tuple[Tensor, Tensor]:
    x, times = draw(2, network.config.in_channels, 2, 4, 4), torch.tensor([900.0, 300.0])
    text = draw(2, 512, 16, seed=1)  # diffusers takes what is beyond 512 tokens for the image
    seen = draw(2, 257, 1280, seed=2) if network.config.image_dim else None
    return core(x, times, text, seen), network(x, times, text, encoder_hidden_states_image=seen).sample


def call_qwen(core: Any, network: Any) -> tuple[Tensor, Tensor]:
    x, text, sigma = draw(2, 16, 4, 8), draw(2, 5, 16, seed=1), torch.tensor([0.9, 0.3])
    tokens = x.view(2, 16, 2, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 8, 64)
    ours = network(tokens, text, torch.ones(2, 5), sigma, [[(1, 2, 4)]] * 2).sample
    ours = ours.view(2, 2, 4, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 16, 4, 8)
    return core(x.unsqueeze(2), sigma, text).squeeze(2), ours


def call_qwen_edit(core: Any, network: Any) -> tuple[Tensor, Tensor]:
    x, text, source = draw(2, 16, 4, 8), draw(2, 5, 16, seed=1), draw(2, 16, 4, 8, seed=2)
    sigma = torch.tensor([0.9, 0.3])
    tokens = [y.view(2, 16, 2, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 8, 64) for y in (x, source)]
    ours = network(torch.cat(tokens, 1), text, torch.ones(2, 5), sigma, [[(1, 2, 4)] * 2] * 2).sample[:, :8]
    ours = ours.view(2, 2, 4, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 16, 4, 8)
    return core(x.unsqueeze(2), sigma, text, ref_latents=[source.unsqueeze(2)]).squeeze(2), ours


def call_sd3(core: Any, network: Any) -> tuple[Tensor, Tensor]:
    x, text, pooled = draw(2, 16, 4, 6), draw(2, 5, 16, seed=1), draw(2, 16, seed=2)
    times = torch.tensor([900.0, 300.0])
    return core(x, times, text, pooled), network(x, text, pooled, times).sample


# -------------------------------------------------------------------------------------------------------------- cases

TINY_SD = SD_BASE | {
    **SMALL,
    "num_heads": 2,
    "transformer_depth": [1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 0, 0, 0],
    "context_dim": 16,
}
TINY_SDXL = SDXL_BASE | {
    **SMALL,
    "adm_in_channels": 6 * 8 + 16,
    "transformer_depth": [0, 0, 2, 2],
    "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2],
    "context_dim": 32,
    "num_head_channels": 16,
}
TINY_SDXL_DIFFUSERS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "cross_attention_dim": 32,
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
FLUX_DIFFUSERS = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}
HUNYUAN_DIFFUSERS = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}
WAN_DIFFUSERS = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
}
I2V = {"model_type": "i2v", "in_dim": 36}
QWEN_DIFFUSERS = {key: value for key, value in TINY_QWEN.items() if key != "image_model"}


def linear(features: int, out: int) -> dict:
    return {"target": "torch.nn.Linear", "params": {"in_features": features, "out_features": out}}


SD35_LARGE = SD3_BASE | {
    "depth": 38,
    "adm_in_channels": 2048,
    "context_embedder_config": linear(4096, 38 * 64),
    "num_patches": 192**2,
    "pos_embed_max_size": 192,
}
TINY_SD3 = SD3_BASE | {
    "depth": 2,
    "adm_in_channels": 16,
    "context_embedder_config": linear(16, 128),
    "num_patches": 64,
    "pos_embed_max_size": 8,
}
SD35_LARGE_DIFFUSERS = {
    "in_channels": 16,
    "num_layers": 38,
    "num_attention_heads": 38,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 38 * 64,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
SD3_DIFFUSERS = {
    "in_channels": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}

CASES = [
    Case(
        "sd3",
        "SD3",
        "SD3Transformer2DModel",
        (SD35_LARGE, SD35_LARGE_DIFFUSERS),
        (TINY_SD3, SD3_DIFFUSERS),
        convert_sd3,
        call_sd3,
    ),
    Case(
        "sd",
        "SD15",
        "UNet2DConditionModel",
        (SD15, {"cross_attention_dim": 768}),
        (
            TINY_SD,
            {
                "block_out_channels": (32, 64),
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "cross_attention_dim": 16,
                "attention_head_dim": 2,
            },
        ),
        convert_unet,
        call_unet,
    ),
    Case(
        "sdxl",
        "SDXL",
        "UNet2DConditionModel",
        (SDXL, SDXL_DIFFUSERS),
        (TINY_SDXL, TINY_SDXL_DIFFUSERS),
        convert_unet,
        call_unet,
    ),
    Case(
        "flux",
        "Flux",
        "FluxTransformer2DModel",
        (FLUX, {"guidance_embeds": True}),
        (TINY_FLUX, FLUX_DIFFUSERS),
        convert_flux,
        call_flux,
    ),
    Case(
        "hunyuanvideo",
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        (HUNYUAN, {}),
        (TINY_HUNYUAN, HUNYUAN_DIFFUSERS),
        convert_hunyuan,
        call_hunyuan,
    ),
    Case(
        "skyreels",
        "HunyuanVideoSkyreelsI2V",
        "HunyuanVideoTransformer3DModel",
        (HUNYUAN | {"in_channels": 32}, {"in_channels": 32}),
        (TINY_HUNYUAN | {"in_channels": 32}, HUNYUAN_DIFFUSERS | {"in_channels": 32}),
        convert_hunyuan,
        call_hunyuan,
    ),
    Case("wan", "WAN21_T2V", "WanTransformer3DModel", (WAN_14B, {}), (TINY_WAN, WAN_DIFFUSERS), convert_wan, call_wan),
    Case(
        "wan",
        "WAN21_I2V",
        "WanTransformer3DModel",
        (WAN_14B | I2V, {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}),
        (TINY_WAN | I2V, WAN_DIFFUSERS | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 24}),
        convert_wan,
        call_wan,
    ),
    Case(
        "qwen-image",
        "QwenImage",
        "QwenImageTransformer2DModel",
        ({"image_model": "qwen_image"}, {}),
        (TINY_QWEN, QWEN_DIFFUSERS),
        same,
        call_qwen,
    ),
    Case(
        "qwen-image-edit",
        "QwenImage",
        "QwenImageTransformer2DModel",
        ({"image_model": "qwen_image"}, {}),
        (TINY_QWEN, QWEN_DIFFUSERS),
        same,
        call_qwen_edit,
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case.family}-{case.core}")
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def core_network(case: Case, config: dict, device: str) -> Any:
    """ComfyUI's model."""
    return core_model(case.core, config, torch.float32, None, device)


def family_model(pack: Callable, case: Case, network: Any) -> Any:
    """The pack's model around a network; no VAE is needed to name LoRA keys."""
    family = pack("trainer.models").FAMILIES[case.family]
    model = object.__new__(family)
    model.module = network
    return model


def exported(pack: Callable, model: Any, targets: list[str] | None = None) -> Tensors:
    """A LoRA on the network that does something, under the names that the pack writes."""
    lora = pack("trainer.adapters.lora")
    config = pack("trainer.config").LoraConfig(rank=2, alpha=6, targets=targets)
    lora.inject(model.module, config, model.default_targets, seed=0)
    parameters = lora.parameters(model.module)
    for i, parameter in enumerate(parameters.values()):
        parameter.data = 0.1 * draw(*parameter.shape, seed=i)
    return lora.comfy_weights(parameters, config.alpha, model.lora_key)


def load(core: Any, lora: Tensors, caplog: pytest.LogCaptureFixture) -> dict:
    """Core's own loader, which must not pass over a key."""
    names = comfy.lora.model_lora_keys_unet(core, {})
    with caplog.at_level(logging.WARNING):
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), names)
    assert not [record.getMessage() for record in caplog.records if "not loaded" in record.getMessage()]
    assert patches
    return patches


def test_every_key_of_the_real_architecture_is_known(
    case: Case, pack: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    core = core_network(case, case.real[0], "meta")
    with torch.device("meta"):
        model = family_model(pack, case, getattr(diffusers, case.network)(**case.real[1]))
    linear = [name for name, child in model.module.named_modules() if isinstance(child, torch.nn.Linear)]
    targets = [name for name in linear if any(name.endswith(f".{t}") for t in model.default_targets)]
    assert len(targets) > 30
    keys = {}
    for name in targets:
        place = model.lora_key(name)
        keys[place if isinstance(place, str) else place.key] = None
    lora = {}
    for key in keys:
        lora |= {f"{key}.lora_A.weight": torch.zeros(1, 1), f"{key}.lora_B.weight": torch.zeros(1, 1)}
        lora[f"{key}.alpha"] = torch.tensor(1.0)
    patches = load(core, lora, caplog)
    assert len(patches) == len(keys)


def test_output_with_the_lora_is_the_trained_one(case: Case, pack: Callable, caplog: pytest.LogCaptureFixture) -> None:
    compare_output(case, pack, caplog)


def compare_output(
    case: Case, pack: Callable, caplog: pytest.LogCaptureFixture, targets: list[str] | None = None
) -> None:
    """Core's network with the exported LoRA against diffusers' with the trained one."""
    core = core_network(case, case.tiny[0], "cpu")
    network = core.diffusion_model.float().eval()
    weights = {}
    for i, (name, value) in enumerate(network.state_dict().items()):
        start = 1.0 if value.ndim == 1 and "norm" in name and name.endswith(("weight", "scale")) else 0.0
        weights[name] = start + 0.1 * draw(*value.shape, seed=i)
    network.load_state_dict(weights)
    trained = getattr(diffusers, case.network)(**case.tiny[1]).eval()
    trained.load_state_dict(case.convert(weights, core.model_config.unet_config))
    with torch.no_grad():
        theirs, ours = case.call(network, trained)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        lora = exported(pack, family_model(pack, case, trained), targets)
        patcher = comfy.model_patcher.ModelPatcher(core, torch.device("cpu"), torch.device("cpu"))
        patches = load(core, lora, caplog)
        assert set(patcher.add_patches(patches)) == set(patches)
        patcher.patch_model()
        patched, learned = case.call(patcher.model.diffusion_model, trained)
    assert (learned - ours).abs().max() > 1e-3
    torch.testing.assert_close(patched, learned, rtol=0, atol=1e-4)


UNETS = [case for case in CASES if case.family in ("sd", "sdxl")]


@pytest.mark.parametrize("case", UNETS, ids=lambda case: case.family)
def test_every_convolution_of_a_unet_has_a_key(case: Case, pack: Callable, caplog: pytest.LogCaptureFixture) -> None:
    core = core_network(case, case.real[0], "meta")
    with torch.device("meta"):
        model = family_model(pack, case, getattr(diffusers, case.network)(**case.real[1]))
    convolutions = {n: c for n, c in model.module.named_modules() if isinstance(c, torch.nn.Conv2d)}
    assert len(convolutions) > 40
    keys = {model.lora_key(name): layer for name, layer in convolutions.items()}
    assert len(keys) == len(convolutions)
    shapes = {name: value.shape for name, value in core.state_dict().items()}
    assert {key: shapes[f"{key}.weight"] for key in keys} == {key: c.weight.shape for key, c in keys.items()}
    assert keys.keys() == {
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.startswith("diffusion_model.") and name.endswith(".weight") and len(shape) == 4
    }
    lora = {}
    for key, layer in keys.items():
        lora |= {f"{key}.lora_A.weight": torch.zeros(1, *layer.weight.shape[1:])}
        lora |= {f"{key}.lora_B.weight": torch.zeros(len(layer.weight), 1, 1, 1), f"{key}.alpha": torch.tensor(1.0)}
    assert len(load(core, lora, caplog)) == len(keys)


LOCON = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out", "to_q"]


@pytest.mark.parametrize("case", UNETS, ids=lambda case: case.family)
def test_output_with_a_locon_is_the_trained_one(case: Case, pack: Callable, caplog: pytest.LogCaptureFixture) -> None:
    compare_output(case, pack, caplog, LOCON)


def test_odd_numbers_of_qwen_tokens_are_placed_nearer_to_the_text_in_comfyui() -> None:
    """What docs/families.md says of sizes that are no multiples of 32."""
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    for rows, ours, theirs in ((4, [-2, -1, 0, 1], [-2, -1, 0, 1]), (5, [-3, -2, -1, 0, 1], [-2, -1, 0, 1, 2])):
        image, _ = QwenEmbedRope(10000, [4, 6, 6], scale_rope=True)([(1, rows, 2)], max_txt_seq_len=3)
        first_turn = image.view(rows, 2, 8)[:, 0, 2]  # of the rows' axis: one radian per place
        torch.testing.assert_close(first_turn.angle(), torch.tensor(ours).float())
        core = core_network(CASES[-1], TINY_QWEN, "cpu").diffusion_model
        _, ids, _ = core.process_img(torch.zeros(1, 16, 1, 2 * rows, 4))
        assert ids.view(rows, 2, 3)[:, 0, 1].tolist() == theirs


def original(case: Case, weights: Tensors) -> Tensors:
    """The weights as the released file names them."""
    rename = {convert_hunyuan: tencent_name, convert_flux: black_forest_name}.get(case.convert, str)
    return {rename(name): value for name, value in weights.items()}


def black_forest_name(name: str) -> str:
    """FLUX's released name of a weight of ComfyUI's."""
    return name.replace("_norm.weight", "_norm.scale")


def test_network_comes_from_a_file_in_the_original_names(
    case: Case, pack: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a file on disk needs no network"))
    if case.convert in (convert_flux, convert_hunyuan):  # diffusers' converters know the released width alone
        core = core_network(case, case.real[0], "meta").diffusion_model
        with torch.device("meta"):
            network = getattr(diffusers, case.network)(**case.real[1])
        name = type(network).__name__
        convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
        converted = convert(checkpoint=original(case, core.state_dict()), config=network.config)
        expected = network.state_dict()
        assert {key: value.shape for key, value in converted.items()} == {k: v.shape for k, v in expected.items()}
        return
    core = core_network(case, case.tiny[0], "cpu")
    shapes = {name: value.shape for name, value in core.diffusion_model.state_dict().items()}
    weights = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    expected = case.convert(dict(weights), core.model_config.unet_config)
    family, file = pack("trainer.models").FAMILIES[case.family], tmp_path / "one.safetensors"
    getattr(diffusers, case.network)(**case.tiny[1]).save_config(tmp_path / family.component)
    config = pack("trainer.config").ModelConfig(family=case.family, path=str(tmp_path), network_file=str(file))
    for prefix, others in (("", {}), ("model.diffusion_model.", {"first_stage_model.x": torch.zeros(1)})):
        save_file({prefix + name: value for name, value in original(case, weights).items()} | others, file)
        loaded = family._load_network(config, torch.device("cpu")).state_dict()
        assert loaded.keys() == expected.keys()
        assert [name for name in loaded if not torch.equal(loaded[name], expected[name])] == []
