"""Random models of every diffusers family, a few thousand weights each, in the classes and file layout of the real."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROPE = {"flux": (4, 6, 6)}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def stir(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights, also where diffusers starts at zero; norms stay near one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        start = 1.0 if bool((parameter == 1).all()) else 0.0
        parameter.data = start + 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def clip_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    from trainer.shapes import WEIGHTS

    # Learning one anew would break ties at random: another model in every process.
    shutil.copytree(WEIGHTS / "tokenizer", folder)
    return CLIPTokenizer.from_pretrained(folder)


def clip_text(tokenizer: Any, projected: bool = False) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return stir((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def word_tokenizer(folder: Path, kind: str, special: tuple[str, ...] = (), words: tuple[str, ...] = ()) -> Any:
    """A fast tokenizer of class `kind` over letters and `words`, with T5's end token."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in LETTERS] + [(f"▁{word}", -1.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    fast.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": kind}))
    return getattr(transformers, kind).from_pretrained(folder)


def t5_text(tokenizer: Any, kind: str = "T5EncoderModel") -> torch.nn.Module:
    import transformers

    config = getattr(transformers, "UMT5Config" if kind.startswith("UMT5") else "T5Config")(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return stir(getattr(transformers, kind)(config))


def image_vae(channels: int, **settings: Any) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    return stir(
        AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=4,
            **settings,
        )
    )


# ------------------------------------------------------------------------------------------------------------ builders


def build_unet(xl: bool) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D") if xl else ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D") if xl else ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 32,
    }
    if xl:
        return UNet2DConditionModel(
            **settings,
            cross_attention_dim=32,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        )
    return UNet2DConditionModel(**settings, cross_attention_dim=16, attention_head_dim=2)


def build_sd(folder: Path, prediction: str = "epsilon", zero_snr: bool = False) -> Path:
    from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline

    levels = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": prediction}
    if zero_snr:
        scheduler = DDIMScheduler(
            **levels, clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1
        )
    else:
        scheduler = PNDMScheduler(**levels, steps_offset=1, skip_prk_steps=True)  # the file of Stable Diffusion 1.4
    tokenizer = clip_tokenizer(folder / "tokenizer")
    StableDiffusionPipeline(
        vae=image_vae(4, scaling_factor=0.18215),
        text_encoder=clip_text(tokenizer),
        tokenizer=tokenizer,
        unet=stir(build_unet(xl=False)),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    del index["requires_safety_checker"]  # the released folders name a checker in its place
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def build_sdxl(folder: Path) -> Path:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer = clip_tokenizer(folder / "tokenizer")
    StableDiffusionXLPipeline(
        vae=image_vae(4, scaling_factor=0.13025),
        text_encoder=clip_text(tokenizer),
        text_encoder_2=clip_text(tokenizer, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=stir(build_unet(xl=True)),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    ).save_pretrained(folder)
    return folder


FLUX_VAE = {
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def build_flux(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    clip, t5 = clip_tokenizer(folder / "tokenizer"), word_tokenizer(folder / "tokenizer_2", "T5TokenizerFast")
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),  # the file of FLUX.1 dev
        vae=image_vae(16, **FLUX_VAE),
        text_encoder=clip_text(clip),
        tokenizer=clip,
        text_encoder_2=t5_text(t5),
        tokenizer_2=t5,
        transformer=stir(
            FluxTransformer2DModel(
                in_channels=64,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                guidance_embeds=True,
                axes_dims_rope=ROPE["flux"],
            )
        ),
    ).save_pretrained(folder)
    return folder


def wan_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    return stir(AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1))


def build_wan(folder: Path) -> Path:
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    tokenizer = word_tokenizer(folder / "tokenizer", "T5TokenizerFast")
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_text(tokenizer, "UMT5EncoderModel"),
        transformer=stir(WanTransformer3DModel(**WAN)),
        vae=wan_vae(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ).save_pretrained(folder)
    return folder


WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


def build_wan_i2v(folder: Path) -> Path:
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    tokenizer = word_tokenizer(folder / "tokenizer", "T5TokenizerFast")
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    settings = WAN | {"in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 24}
    WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_text(tokenizer, "UMT5EncoderModel"),
        transformer=stir(WanTransformer3DModel(**settings)),
        vae=wan_vae(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        image_encoder=stir(CLIPVisionModel(vision)),
        image_processor=CLIPImageProcessor(size=32, crop_size=32),
    ).save_pretrained(folder)
    return folder


def llama_text(tokenizer: Any) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    return stir(LlamaModel(config))


def hunyuan_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKLHunyuanVideo

    return stir(
        AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
        )
    )


def build_hunyuan(folder: Path, pipeline: str = "HunyuanVideoPipeline", in_channels: int = 4) -> Path:
    import diffusers
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video

    words = pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE["template"].split()
    llama = word_tokenizer(folder / "tokenizer", "LlamaTokenizerFast", words=tuple(dict.fromkeys(words)))
    clip = clip_tokenizer(folder / "tokenizer_2")
    getattr(diffusers, pipeline)(
        text_encoder=llama_text(llama),
        tokenizer=llama,
        text_encoder_2=clip_text(clip),
        tokenizer_2=clip,
        transformer=stir(
            diffusers.HunyuanVideoTransformer3DModel(
                in_channels=in_channels,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                text_embed_dim=16,
                pooled_projection_dim=16,
                rope_axes_dim=(4, 6, 6),
            )
        ),
        vae=hunyuan_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    ).save_pretrained(folder)
    return folder


def build_skyreels(folder: Path) -> Path:
    return build_hunyuan(folder, "HunyuanSkyreelsImageToVideoPipeline", in_channels=8)


QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen_text(tokenizer: Any) -> torch.nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = dict(zip(QWEN_TOKENS, tokenizer.convert_tokens_to_ids(list(QWEN_TOKENS)), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return stir(Qwen2_5_VLForConditionalGeneration(config))


def qwen_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKLQwenImage

    return stir(AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1))


def build_qwen(folder: Path, edit: bool = False) -> Path:
    import diffusers

    tokenizer = word_tokenizer(folder / "tokenizer", "Qwen2TokenizerFast", QWEN_TOKENS)
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(  # the file of Qwen-Image
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        "vae": qwen_vae(),
        "text_encoder": qwen_text(tokenizer),
        "tokenizer": tokenizer,
        "transformer": stir(
            diffusers.QwenImageTransformer2DModel(
                in_channels=64,
                out_channels=16,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                axes_dims_rope=(4, 6, 6),
            )
        ),
    }
    if edit:
        from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

        images, videos = Qwen2VLImageProcessor(min_pixels=784, max_pixels=3136), Qwen2VLVideoProcessor()
        parts["processor"] = Qwen2VLProcessor(images, tokenizer, videos)
    (diffusers.QwenImageEditPipeline if edit else diffusers.QwenImagePipeline)(**parts).save_pretrained(folder)
    return folder


def build_qwen_edit(folder: Path) -> Path:
    return build_qwen(folder, edit=True)


def write_image(path: Path, seed: int) -> Path:
    """An image of random colours."""
    from PIL import Image

    pixels = torch.randint(0, 256, (24, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.numpy()).save(path)
    return path


# --------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """A family and how it is tried.

    Attributes:
        build: writes the folder.
        model: settings of its model section.
        rollout: settings of its rollout section, guidance included.
        guidance: the pipeline's name for true guidance.
        takes_images: whether prompts need images.
    """

    family: str
    build: Callable[[Path], Path]
    model: dict[str, Any] = field(default_factory=lambda: {"height": 16, "width": 16})
    rollout: dict[str, Any] = field(default_factory=dict)
    guidance: str = "guidance_scale"
    takes_images: bool = False


DDIM = {"kernel": "ddim", "eta": 1.0, "guidance_scale": 5.0}
OWN_LEVELS = {"shift": None}
VIDEO = {"height": 16, "width": 32, "frames": 5}
CASES = {
    "sd": Case("sd", build_sd, rollout=DDIM),
    "sd-v": Case("sd", lambda folder: build_sd(folder, "v_prediction"), rollout=DDIM),
    "sd-zero-snr": Case("sd", lambda folder: build_sd(folder, "v_prediction", zero_snr=True), rollout=DDIM),
    "sdxl": Case("sdxl", build_sdxl, rollout=DDIM),
    "flux": Case("flux", build_flux, {"height": 16, "width": 24}, OWN_LEVELS, "true_cfg_scale"),
    "wan": Case("wan", build_wan, VIDEO, {"shift": 5.0, "guidance_scale": 5.0}),
    "wan-image": Case("wan", build_wan, VIDEO | {"frames": 1}, OWN_LEVELS),
    "wan-i2v": Case("wan", build_wan_i2v, VIDEO, {"guidance_scale": 5.0}, takes_images=True),
    "hunyuanvideo": Case("hunyuanvideo", build_hunyuan, VIDEO, {"shift": 5.0}),
    "hunyuanvideo-image": Case("hunyuanvideo", build_hunyuan, VIDEO | {"frames": 1}, OWN_LEVELS),
    "skyreels": Case("skyreels", build_skyreels, VIDEO, {"guidance_scale": 5.0}, "true_cfg_scale", takes_images=True),
    "qwen-image": Case(
        "qwen-image", build_qwen, {"height": 32, "width": 48}, OWN_LEVELS | {"guidance_scale": 4.0}, "true_cfg_scale"
    ),
    "qwen-image-edit": Case(
        "qwen-image-edit",
        build_qwen_edit,
        {"height": 32, "width": 64},
        {"guidance_scale": 4.0},
        "true_cfg_scale",
        takes_images=True,
    ),
}
