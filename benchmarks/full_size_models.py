"""Files of released models with random weights, for `benchmarks/full_size.py`, written tensor by tensor.

Stable Diffusion is one checkpoint (float16), beside a diffusers folder whose network is read from it. Z-Image and Wan
are the files that core's templates name: network, VAE and text encoder (bfloat16). Shapes come from core's and
transformers' own classes on the meta device, so only one tensor is in memory at a time.
"""

import io
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.core_models import FOLDER_KL, NETWORKS, SDXL_DIFFUSERS, core_model, core_vae, random_like

CHECKPOINT = "full-size.safetensors"
NETWORK, VAE, TEXT = "network.safetensors", "vae.safetensors", "text_encoder.safetensors"
PIECE = 2**24
"""Most numbers that are in memory at once: those of a tensor, or of some of its rows. Each piece is taken from another
place of twice as many random numbers, because drawing billions takes longer than writing them."""
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
CLIP_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}
UNET_SD15 = {"cross_attention_dim": 768, "sample_size": 64}
UNET_SDXL = SDXL_DIFFUSERS | {"sample_size": 128}


@dataclass(frozen=True)
class Folder:
    """A diffusers folder.

    Attributes:
        family: of the trainer's diffusers backend.
        pipeline: diffusers' class.
        unet: settings of diffusers' UNet.
        texts: by component, transformers' class, its settings, and its prefix in core's names.
    """

    family: str
    pipeline: str
    unet: dict
    texts: dict[str, tuple[str, dict, str]]


@dataclass(frozen=True)
class Model:
    """A released model, and the tiny run that it is measured with.

    Attributes:
        network: name in `NETWORKS`.
        folder: None where the graph backend alone is measured; then core's files are several.
        text: how core's CLIPLoader calls the kind of its text encoder, where that is a file of its own.
        run: size, steps, prompts and dtype of the frozen weights, unless others are asked for.
    """

    network: str
    folder: Folder | None = None
    text: str | None = None
    run: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "sd15": Model(
        "SD 1.5",
        Folder("sd", "StableDiffusionPipeline", UNET_SD15, {"text_encoder": ("CLIPTextModel", CLIP_L, "clip_l")}),
        run={"size": 256, "steps": 4, "prompts": 2, "weights": "float32"},
    ),
    "sdxl": Model(
        "SDXL",
        Folder(
            "sdxl",
            "StableDiffusionXLPipeline",
            UNET_SDXL,
            {
                "text_encoder": ("CLIPTextModel", CLIP_L, "clip_l"),
                "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G, "clip_g"),
            },
        ),
        run={"size": 256, "steps": 3, "prompts": 1, "weights": "bfloat16"},
    ),
    "z-image": Model("Z-Image", text="lumina2", run={"size": 128, "steps": 2, "prompts": 1, "weights": "bfloat16"}),
    "wan-1.3b": Model("Wan 2.1 1.3B", text="wan", run={"size": 128, "steps": 3, "prompts": 1, "weights": "bfloat16"}),
}


def make(name: str, folder: Path, comfyui: Path, with_text: bool) -> None:
    """Write core's files, and the diffusers folder without a network; ComfyUI is imported already.

    Args:
        with_text: write a text encoder that is a file of its own.
    """
    for file, tensors in layout(MODELS[name]).items():
        if file == TEXT and not with_text:
            continue
        with_it = {"spiece_model": tokenizer()} if file == TEXT and MODELS[name].text == "wan" else {}
        write_random(folder / file, tensors, torch.float16 if file == CHECKPOINT else torch.bfloat16, with_it)
    if MODELS[name].folder is not None:
        make_folder(MODELS[name].folder, folder / "diffusers", comfyui)


# -------------------------------------------------------------------------------------------------------------- layouts


def layout(model: Model) -> dict[str, dict[str, Tensor]]:
    """Tensors on the meta device under the names of the released files, by file; ComfyUI is imported already."""
    network = NETWORKS[model.network]
    base = core_model(network.core, network.config, torch.bfloat16, torch.float32, "meta")
    weights, vae = base.diffusion_model.state_dict(), core_vae(network.vae).state_dict()
    if model.folder is not None:
        named = {f"{prefix}.transformer.{key}": value for key, value, prefix in clips(model.folder)}
        found = base.model_config.process_clip_state_dict_for_saving(named)
        found |= {f"model.diffusion_model.{key}": value for key, value in weights.items()}
        return {CHECKPOINT: found | {f"first_stage_model.{key}": value for key, value in vae.items()}}
    files = {NETWORK: weights, VAE: {key: value for key, value in vae.items() if "quant_conv" not in key}}
    return files | {TEXT: {"lumina2": _qwen3, "wan": _umt5}[model.text]().state_dict()}


def clips(folder: Folder) -> list[tuple[str, Tensor, str]]:
    """Name under `text_model` or beside it, tensor, and prefix in core of each weight of the text encoders."""
    return [(key, value, prefix) for *_, prefix, encoder in _encoders(folder) for key, value in encoder.items()]


def _encoders(folder: Folder) -> list[tuple[str, str, Any, str, dict[str, Tensor]]]:
    """Component, class, configuration, core's prefix, and tensors under the released names, of each text encoder."""
    import transformers

    found = []
    for part, (kind, settings, prefix) in folder.texts.items():
        config = transformers.CLIPTextConfig(**settings)
        with torch.device("meta"):
            weights = getattr(transformers, kind)(config).state_dict()
        inner = ("text_model.", "text_projection.")  # later versions of transformers leave the first one out
        named = {key if key.startswith(inner) else f"text_model.{key}": value for key, value in weights.items()}
        found.append((part, kind, config, prefix, named))
    return found


def _qwen3() -> torch.nn.Module:
    import comfy.ops
    from comfy.text_encoders.llama import Qwen3_4B

    return Qwen3_4B({}, torch.bfloat16, "meta", comfy.ops.disable_weight_init)


def _umt5() -> torch.nn.Module:
    import comfy.ops
    from comfy.text_encoders import t5

    config = json.loads(Path(t5.__file__).with_name("umt5_config_xxl.json").read_text())
    return t5.T5(config, torch.bfloat16, "meta", comfy.ops.disable_weight_init)


def tokenizer() -> Tensor:
    """A small tokenizer, learned from the README, in place of the one inside the released file of Wan's encoder."""
    import sentencepiece

    model, text = io.BytesIO(), Path(__file__).parents[1] / "README.md"
    numbers = {"vocab_size": 300, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.read_text().splitlines()), model_writer=model, minloglevel=2, **numbers
    )
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


# -------------------------------------------------------------------------------------------------------------- writing


def make_folder(model: Folder, path: Path, comfyui: Path) -> None:
    """A diffusers folder without the weights of its network."""
    import diffusers
    import transformers

    index: dict[str, Any] = {"_class_name": model.pipeline, "_diffusers_version": diffusers.__version__}
    for part, kind, config, _, weights in _encoders(model):
        config.architectures = [kind]
        config.save_pretrained(path / part)
        write_random(path / part / "model.safetensors", weights, torch.float16, {})
        tokenizer = part.replace("text_encoder", "tokenizer")
        vocabulary = comfyui / "comfy" / "sd1_tokenizer"
        transformers.CLIPTokenizer.from_pretrained(vocabulary, model_max_length=77).save_pretrained(path / tokenizer)
        index |= {part: ["transformers", kind], tokenizer: ["transformers", "CLIPTokenizer"]}
    with torch.device("meta"):
        vae, unet = diffusers.AutoencoderKL(**FOLDER_KL), diffusers.UNet2DConditionModel(**model.unet)
    unet.save_config(path / "unet")
    vae.save_config(path / "vae")
    write_random(path / "vae" / "diffusion_pytorch_model.safetensors", vae.state_dict(), torch.float16, {})
    diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    ).save_pretrained(path / "scheduler")
    for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL"), ("scheduler", "DDIMScheduler")):
        index[part] = ["diffusers", kind]
    (path / "model_index.json").write_text(json.dumps(index, indent=1))


def write_random(file: Path, tensors: dict[str, Tensor], dtype: torch.dtype, given: dict[str, Tensor]) -> None:
    """A safetensors file of random numbers; it gets its name when it is whole.

    Args:
        tensors: by name; only shapes are used.
        given: bytes by name, which are written as they are.
    """
    header, end = {}, 0
    kind = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    for name, value in (tensors | given).items():
        start, end = end, end + value.numel() * (1 if name in given else dtype.itemsize)
        shown = "U8" if name in given else kind
        header[name] = {"dtype": shown, "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    part = file.with_suffix(".part")
    with part.open("wb") as content:
        content.write(struct.pack("<Q", len(text)) + text)
        for numbers in _random(tensors, dtype):
            content.write(numbers.view(torch.uint8).numpy())
        for value in given.values():
            content.write(value.numpy())
    part.rename(file)


def _random(tensors: dict[str, Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """The numbers of each tensor in pieces, each of which is overwritten by the next one."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2 * PIECE, generator=generator)
    wide, narrow = torch.empty(PIECE), torch.empty(PIECE, dtype=dtype)
    for name, value in tensors.items():
        mean, spread = random_like(name, value)
        for rows in value.split(max(1, PIECE // value[0].numel())):
            size, start = rows.numel(), int(torch.randint(PIECE, (1,), generator=generator))
            torch.mul(drawn[start : start + size], spread, out=wide[:size]).add_(mean)
            yield narrow[:size].copy_(wide[:size])
