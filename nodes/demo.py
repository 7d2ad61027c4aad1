"""Demo Model: the embedded model as MODEL, CLIP and VAE, loaded into ComfyUI's own classes."""

import json
from pathlib import Path
from types import SimpleNamespace

import comfy.sd
import torch
from comfy.clip_model import CLIPTextModel
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import CONST, ModelSamplingDiscreteFlow
from comfy.sd1_clip import SDClipModel, SDTokenizer
from comfy.utils import load_torch_file
from comfy_api.latest import io
from torch import Tensor

from ..trainer.shapes import WEIGHTS
from .types import CATEGORY, Model, ModelType

ENCODERS = ("text_encoder", "text_encoder_2")
FULL_PRECISION = {"dtype": torch.float32}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------- flow transformer


def load_model(folder: Path = WEIGHTS) -> ModelPatcher:
    """The transformer in ComfyUI's SD3 class, with the timestep shift it was trained with."""
    model = comfy.sd.load_diffusion_model(
        str(folder / "transformer/diffusion_pytorch_model.safetensors"), model_options=FULL_PRECISION
    )

    class Flow(ModelSamplingDiscreteFlow, CONST):
        pass

    sampling = Flow(model.model.model_config)
    sampling.set_parameters(shift=read_json(folder / "scheduler/scheduler_config.json")["shift"], multiplier=1000)
    model.add_object_patch("model_sampling", sampling)
    return model


# ---------------------------------------------------------------------------------------------------- text encoders


class SmallCLIP(CLIPTextModel):
    """ComfyUI's CLIP text model with the vocabulary size of its configuration."""

    def __init__(self, config: dict, dtype: torch.dtype, device: torch.device, operations: object) -> None:
        super().__init__(config, dtype, device, operations)
        self.set_input_embeddings(
            operations.Embedding(config["vocab_size"], config["hidden_size"], dtype=dtype, device=device)
        )


class TextEncoders(torch.nn.Module):
    """Two small CLIP text encoders whose outputs are concatenated, as in Stable Diffusion 3."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, model_options: dict) -> None:
        super().__init__()
        self.dtypes = {dtype}
        self.encoders = torch.nn.ModuleList()
        for name in ENCODERS:
            config = read_json(folder / name / "config.json")
            end = config["eos_token_id"]
            self.encoders.append(
                SDClipModel(
                    device=device,
                    dtype=dtype,
                    max_length=config["max_position_embeddings"],
                    layer="hidden",
                    layer_idx=-2,
                    layer_norm_hidden_state=False,
                    textmodel_json_config=config,
                    model_class=SmallCLIP,
                    special_tokens={"start": config["bos_token_id"], "end": end, "pad": end},
                    model_options={**model_options, "model_name": name},
                )
            )

    def set_clip_options(self, options: dict) -> None:
        for encoder in self.encoders:
            encoder.set_clip_options(options)

    def reset_clip_options(self) -> None:
        for encoder in self.encoders:
            encoder.reset_clip_options()

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, Tensor]:
        outputs = [
            encoder.encode_token_weights(tokens[name]) for name, encoder in zip(ENCODERS, self.encoders, strict=True)
        ]
        return torch.cat([embeds for embeds, _ in outputs], -1), torch.cat([pooled for _, pooled in outputs], -1)

    def load_sd(self, weights: dict[str, dict[str, Tensor]]) -> None:
        for name, encoder in zip(ENCODERS, self.encoders, strict=True):
            encoder.transformer.load_state_dict(weights[name], strict=True)


class Tokenizer:
    """Tokenizes a text for both encoders, with ComfyUI's prompt weights."""

    def __init__(self, folder: Path) -> None:
        self.tokenizers = {}
        for encoder, name in zip(ENCODERS, ("tokenizer", "tokenizer_2"), strict=True):
            config = read_json(folder / encoder / "config.json")
            self.tokenizers[encoder] = SDTokenizer(
                str(folder / name),
                max_length=config["max_position_embeddings"],
                embedding_size=config["hidden_size"],
                embedding_key=encoder,
            )

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: object) -> dict[str, list]:
        return {
            name: tokenizer.tokenize_with_weights(text, return_word_ids, **options)
            for name, tokenizer in self.tokenizers.items()
        }

    def untokenize(self, tokens: list) -> list:
        return self.tokenizers[ENCODERS[0]].untokenize(tokens)

    def state_dict(self) -> dict:
        return {}


def load_clip(folder: Path = WEIGHTS) -> comfy.sd.CLIP:
    """The two text encoders."""
    target = SimpleNamespace(params={"folder": folder}, clip=TextEncoders, tokenizer=lambda **unused: Tokenizer(folder))
    clip = comfy.sd.CLIP(target, model_options=FULL_PRECISION)
    clip.cond_stage_model.load_sd(
        {name: load_torch_file(str(folder / name / "model.safetensors")) for name in ENCODERS}
    )
    return clip


# ------------------------------------------------------------------------------------------------------ autoencoder


def vae_weights(folder: Path = WEIGHTS) -> dict[str, Tensor]:
    """The autoencoder's weights under the names of ComfyUI's TAESD, which counts the decoder's clamp as a layer."""
    state = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    for name, value in load_torch_file(str(folder / "vae/diffusion_pytorch_model.safetensors")).items():
        part, _, layer, rest = name.split(".", 3)
        offset = 1 if part == "decoder" else 0
        state[f"taesd_{part}.{int(layer) + offset}.{rest}"] = value.float()
    return state


def load_vae(folder: Path = WEIGHTS) -> comfy.sd.VAE:
    """The autoencoder in ComfyUI's TAESD class."""
    vae = comfy.sd.VAE(sd=vae_weights(folder), dtype=torch.float32)
    vae.throw_exception_if_invalid()
    return vae


# ------------------------------------------------------------------------------------------------------------- node


class DemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_DemoModel",
            display_name="Demo Model (DanceGRPO)",
            category=CATEGORY,
            description="A small model for images of coloured shapes that comes with this pack: no download, fast on a "
            "CPU. Use 64 x 64 pixels and prompts such as 'a red circle and a blue square'.",
            search_aliases=["shapes", "embedded model", "toy model", "grpo demo", "tiny model"],
            outputs=[
                io.Model.Output(tooltip="A Stable Diffusion 3 transformer of a few million parameters."),
                io.Clip.Output(tooltip="Two small CLIP text encoders."),
                io.Vae.Output(tooltip="An autoencoder of TAESD's architecture."),
                ModelType.Output(display_name="GRPO_MODEL", tooltip="The same model for GRPO Train LoRA."),
                io.LoraModel.Output(tooltip="A LoRA for this model, trained from rewards by the demo."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        lora = load_torch_file(str(WEIGHTS / "lora.safetensors"))
        grpo_model = Model({"family": "sd3", "path": "embedded", "vae_dtype": "auto"})
        return io.NodeOutput(load_model(), load_clip(), load_vae(), grpo_model, lora)


NODES = [DemoModel]
