"""CLIP score: cosine similarity of image and prompt, by any CLIP model of open_clip."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...config import Section
from ...utils.errors import BadInput
from ..base import Dtype, dtype_option
from ..files import WEIGHTS, build, file_option, fill, read_weights
from ..preprocess import to_pil, trimmed
from .contrastive import ContrastiveReward, architecture, open_clip_network

_NAMES = ("open_clip_model", "open_clip_pytorch_model")
_UNUSED = ("input_resolution", "context_length", "vocab_size")
"""Metadata in OpenAI's state dicts."""


class ClipScore(ContrastiveReward):
    """CLIP score: the cosine similarity of image and prompt embeddings, without logit scale.

    DanceGRPO uses DFN5B ViT-H-14-378. The preprocessing is read from open_clip_config.json in the folder. Scores
    of different models cannot be compared. ComfyUI's clip_vision files have no text encoder and cannot be used.
    """

    name = "clip"
    typical_range = (0.25, 0.45)
    licence = "of the model chosen; DFN5B: Apple's own, see its page"

    class Options(Section):
        path: str = file_option(
            "clip/DFN5B-CLIP-ViT-H-14-378",
            "Folder with open_clip_config.json and open_clip_pytorch_model.bin or .safetensors, such as "
            "apple/DFN5B-CLIP-ViT-H-14-378 on the Hugging Face hub (3.9 GB); or one file of open_clip weights.",
            folder=True,
        )
        architecture: str = Field(
            "", description="open_clip's name of the model, such as ViT-L-14; needed if path is one file."
        )
        resize: Literal["config", "squash", "shortest", "longest"] = Field(
            "config",
            description="How images become square: squashed, cropped or padded; config as the model is configured.",
        )
        dtype: Dtype = dtype_option(gpu="float16")

    def __init__(self, options: Section | None = None) -> None:
        super().__init__(options)
        self.file, self.config, self.preparation = self._plan(Path(self.options.path))
        self.clean = self._cleaning()

    def _plan(self, path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
        """The file of weights, the configuration of the network, and the settings of the preprocessing."""
        if path.is_dir():
            config = _read_config(path / "open_clip_config.json")
            file, network, preparation = _weights_in(path), config["model_cfg"], config.get("preprocess_cfg") or {}
        else:
            network = architecture(self.options.architecture)
            if network is None:
                raise BadInput(
                    f"reward 'clip': architecture is {self.options.architecture[:60]!r}, but path {str(path)!r} is one "
                    "file: give open_clip's name of its model, such as ViT-H-14 or ViT-H-14-378-quickgelu"
                )
            file, preparation = path, _usual_preparation(self.options.architecture)
        text = network.get("text_cfg", {})
        if text.get("hf_model_name") or text.get("hf_tokenizer_name"):
            raise BadInput(
                f"reward 'clip': the text encoder of {path} is not CLIP's own; other kinds are not supported"
            )
        if self.options.resize != "config":
            preparation = {**preparation, "resize_mode": self.options.resize}
        return file, network, preparation

    def _cleaning(self) -> str:
        settings = self.config.get("text_cfg", {}).get("tokenizer_kwargs") or {}
        clean = settings.get("clean", "lower")
        if set(settings) - {"clean"} or clean not in ("lower", "whitespace", "canonicalize"):
            raise BadInput(f"reward 'clip': the tokenizer settings {str(settings)[:80]} of {self.file} are unknown")
        return clean

    def weight_files(self) -> list[Path]:
        return [self.file]

    def build(self) -> nn.Module:
        module = self._network()
        weights = {key: value for key, value in read_weights(self.file).items() if key not in _UNUSED}
        fill(module, weights, self.file, "the CLIP model of its configuration")
        self.context = module.context_length
        return module

    def _network(self) -> nn.Module:
        from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

        try:
            module = build(lambda: open_clip_network(self.config))
            settings = merge_preprocess_dict(PreprocessCfg(size=module.visual.image_size), self.preparation)
            self.transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadInput(f"reward 'clip': open_clip refuses the configuration of {self.file}: {reason}") from error
        self.trim = settings.get("resize_mode") == "shortest"
        self.transform.transforms = [_on_tensors_too(step) for step in self.transform.transforms]
        return module

    def pixels(self, images: Tensor) -> Tensor:
        images = trimmed(images) if self.trim else images
        if images.requires_grad:
            return self.transform(images.float())
        return torch.stack([self.transform(image) for image in to_pil(images)]).to(images.device)


class KeepRatio:
    """open_clip's ResizeKeepRatio for images and tensors, with sides of at least one pixel."""

    def __init__(self, size: tuple[int, int], longest: float, interpolation: Any) -> None:
        self.size, self.longest, self.interpolation = size, longest, interpolation

    def __call__(self, image: Any) -> Any:
        from torchvision.transforms.functional import get_dimensions, resize

        _, *source = get_dimensions(image)
        ratios = [side / target for side, target in zip(source, self.size, strict=True)]
        ratio = max(ratios) * self.longest + min(ratios) * (1 - self.longest)
        return resize(image, [max(1, round(side / ratio)) for side in source], self.interpolation)


def _on_tensors_too(step: Any) -> Any:
    from open_clip.transform import ResizeKeepRatio

    return KeepRatio(step.size, step.longest, step.interpolation) if isinstance(step, ResizeKeepRatio) else step


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if all(key in config["model_cfg"] for key in ("embed_dim", "vision_cfg", "text_cfg")):
            return config
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error)[:200]
        raise BadInput(f"reward 'clip': {path} cannot be read as an open_clip configuration: {reason}") from error
    raise BadInput(
        f"reward 'clip': {path} does not describe a CLIP model: embed_dim, vision_cfg or text_cfg is missing"
    )


def _weights_in(folder: Path) -> Path:
    for path in (folder / (name + ending) for ending in WEIGHTS for name in _NAMES):
        if path.is_file():
            return path
    raise BadInput(f"reward 'clip': {folder} has no open_clip_pytorch_model.bin or open_clip_model.safetensors")


def _usual_preparation(name: str) -> dict[str, Any]:
    """open_clip's preprocessing for this architecture's published weights, if it is the same for all of them."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    keys = ("mean", "std", "interpolation", "resize_mode")
    published = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
    found = [{key: entry[key] for key in keys if entry.get(key)} for entry in published]
    return found[0] if found and all(entry == found[0] for entry in found) else {}
