"""What families from a diffusers folder share: checks, loading, text encoding, schedules."""

import importlib.util
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import BadInput
from ..schedule import sigma_schedule
from .base import Conditions, DiffusionModel, require_files

ENCODED_AT_ONCE = 16


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file of the folder.

    Raises:
        BadInput: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"model.path: {path} cannot be read as JSON: {error}") from error


def vae_scale(config: dict[str, Any]) -> int:
    """Pixels per latent along each side: one halving between the VAE's resolution levels."""
    levels = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return 2 ** (len(levels) - 1)


class DiffusersModel(DiffusionModel):
    """A family whose models are diffusers folders.

    Attributes:
        family: its name in run descriptions.
        pipelines: the pipeline classes a folder of it may name; the first encodes prompts.
        component: the folder of the network.
        network_class: the network's class.
        encoders: what must be in the folder to encode prompts.
        guidance: embedded guidance where the description gives none; None where the family has no such input.
        condition_widths: fields of the network's configuration that hold the width of each condition.
        video: whether latents have a time axis.
    """

    family: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    component: ClassVar[str] = "transformer"
    network_class: ClassVar[str]
    encoders: ClassVar[tuple[str, ...]]
    guidance: ClassVar[float | None] = None
    condition_widths: ClassVar[dict[str, str]] = {}
    video: ClassVar[bool] = False

    def __init__(self, module: nn.Module, vae: nn.Module, config: ModelConfig) -> None:
        self.module, self.vae, self.config = module, vae, config
        self.dtype = getattr(torch, config.dtype)

    # ------------------------------------------------------------------------------------------------- checks

    @classmethod
    def folder(cls, config: ModelConfig) -> Path:
        return Path(config.path)

    @classmethod
    def network_config(cls, config: ModelConfig) -> dict[str, Any]:
        return read_json(cls.folder(config) / cls.component / "config.json")

    @classmethod
    def vae_config(cls, config: ModelConfig) -> dict[str, Any]:
        return read_json(cls.folder(config) / "vae" / "config.json")

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        folder = cls.folder(config)
        files = ["model_index.json", f"{cls.component}/config.json", "vae/config.json"]
        require_files(folder, [*files, "scheduler/scheduler_config.json"], cls.family)
        pipeline = read_json(folder / "model_index.json").get("_class_name")
        if pipeline not in cls.pipelines:
            wanted = " or ".join(cls.pipelines)
            raise BadInput(f"model.path {str(folder)!r} holds a {pipeline}, and family {cls.family} takes {wanted}")
        network = cls.network_config(config)
        if network.get("_class_name") != cls.network_class:
            found = f"{folder / cls.component} holds a {network.get('_class_name')}"
            raise BadInput(f"model.path: {found}, and family {cls.family} takes {cls.network_class}")
        _check_weights(config, folder, cls.component)
        _check_quantization(config)
        if config.embedded_guidance is not None and not cls.takes_guidance(network):
            raise BadInput(
                f"model.embedded_guidance is {config.embedded_guidance}: this model takes none; leave it null"
            )
        cls.check_size(config, network, cls.vae_config(config))

    @classmethod
    def takes_guidance(cls, network: dict[str, Any]) -> bool:
        """Whether the network has guidance as an input."""
        return cls.guidance is not None and bool(network.get("guidance_embeds", False))

    @classmethod
    def check_size(cls, config: ModelConfig, network: dict[str, Any], vae: dict[str, Any]) -> None:
        """Raise BadInput for a height, width or number of frames that the model cannot take."""
        step, frames = cls.size_step(network, vae)
        for name, size in (("height", config.height), ("width", config.width)):
            if size % step:
                raise BadInput(f"model.{name} is {size}: this model takes multiples of {step}")
        if config.frames != 1 and (frames is None or (config.frames - 1) % frames):
            accepted = "1, an image" if frames is None else f"1 more than a multiple of {frames}"
            raise BadInput(f"model.frames is {config.frames}: this model takes {accepted}")

    @classmethod
    def size_step(cls, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int | None]:
        """Pixels that height and width are multiples of, and frames per latent frame (None for image families)."""
        return vae_scale(vae), None

    @classmethod
    def check_conditions(cls, config: ModelConfig, conditions: Conditions) -> None:
        network = cls.network_config(config)
        for name, field in cls.condition_widths.items():
            if name not in conditions.tensors:
                raise BadInput(f"the conditions hold no {name!r}, which family {cls.family} needs; encode them again")
            width, wanted = conditions.tensors[name].shape[-1], network[field]
            if width != wanted:
                raise BadInput(
                    f"the conditions {name!r} are {width} wide, and {cls.folder(config) / cls.component} takes {wanted}"
                )

    # ------------------------------------------------------------------------------------------------ loading

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> "DiffusersModel":
        network = cls._load_network(config, device)
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        vae = load_vae(cls.folder(config), config).to(device).requires_grad_(False)
        if all(parameter.ndim < 5 for parameter in vae.parameters()):
            vae = vae.to(memory_format=torch.channels_last)
        return cls(network.requires_grad_(False), vae, config)

    @classmethod
    def _load_network(cls, config: ModelConfig, device: torch.device) -> nn.Module:
        import diffusers

        network_class = getattr(diffusers, cls.network_class)
        dtype, folder = getattr(torch, config.dtype), cls.folder(config)
        extra = _quantization(config, device)
        if config.network_file is None:
            network = network_class.from_pretrained(
                folder / cls.component, dtype=dtype, local_files_only=True, use_safetensors=True, **extra
            )
        else:
            network = network_class.from_single_file(
                config.network_file,
                config=str(folder),
                subfolder=cls.component,
                dtype=dtype,
                local_files_only=True,
                **extra,
            )
        return network if extra else network.to(device)

    # ----------------------------------------------------------------------------------------------- encoding

    @classmethod
    def takes_pictures(cls, config: ModelConfig) -> bool:
        """Whether every prompt needs a picture: a first frame or a source image."""
        return False

    @classmethod
    @torch.no_grad()
    def encode(
        cls, config: ModelConfig, prompts: list[str], device: torch.device, pictures: list[Path | None] | None = None
    ) -> Conditions:
        pictures = pictures or [None] * len(prompts)
        cls._check_pictures(config, prompts, pictures)
        require_files(cls.folder(config), list(cls.encoders), cls.family)
        pipeline = cls._encoders(config, device)
        parts = []
        for start in range(0, len(prompts), ENCODED_AT_ONCE):
            batch = slice(start, start + ENCODED_AT_ONCE)
            parts.append(cls.encode_batch(pipeline, config, prompts[batch], pictures[batch]))
        del pipeline
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return together(parts)

    @classmethod
    def _check_pictures(cls, config: ModelConfig, prompts: list[str], pictures: list[Path | None]) -> None:
        takes = cls.takes_pictures(config)
        for prompt, picture in zip(prompts[:-1], pictures[:-1], strict=True):  # the last is the negative prompt
            if takes and picture is None:
                raise BadInput(f"prompt {prompt!r} has no image, and {cls.family} in {config.path} needs one for each")
            if picture is not None and not takes:
                raise BadInput(f"prompt {prompt!r} has an image, and {cls.family} in {config.path} takes none")

    @classmethod
    def _encoders(cls, config: ModelConfig, device: torch.device) -> Any:
        """A pipeline of the text encoders alone."""
        import diffusers

        folder = cls.folder(config)
        index = read_json(folder / "model_index.json")
        left_out = [name for name, entry in index.items() if isinstance(entry, list) and name not in cls.encoders]
        pipeline_class = getattr(diffusers, index["_class_name"])
        pipeline = pipeline_class.from_pretrained(
            folder,
            **dict.fromkeys(left_out),
            dtype=getattr(torch, config.dtype),
            local_files_only=True,
            use_safetensors=True,
        )
        return pipeline.to(device)

    @classmethod
    def encode_batch(
        cls, pipeline: Any, config: ModelConfig, prompts: list[str], pictures: list[Path | None]
    ) -> Conditions:
        """Conditions of some prompts, by the pipeline's own encoders."""
        raise NotImplementedError

    # ----------------------------------------------------------------------------------------------- sampling

    def sigmas(self, steps: int, shift: float | None) -> list[float]:
        return self.own_sigmas(steps) if shift is None else sigma_schedule(steps, shift)

    def own_sigmas(self, steps: int) -> list[float]:
        """Noise levels of the folder's scheduler, as its pipeline would ask for them."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = read_json(self.folder(self.config) / "scheduler" / "scheduler_config.json")
        if "flow_shift" in config:  # UniPC and its like
            return sigma_schedule(steps, config["flow_shift"])
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        even = [1 - i / steps for i in range(steps)]
        scheduler.set_timesteps(sigmas=even, mu=self._resolution_shift(scheduler.config))
        return scheduler.sigmas.double().tolist()

    def _resolution_shift(self, config: Any) -> float | None:
        """mu of a shift that grows with the number of tokens (FLUX's calculate_shift); None for fixed shifts."""
        if not config.use_dynamic_shifting:
            return None
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return config.base_shift + slope * (self.tokens - config.base_image_seq_len)

    @property
    def tokens(self) -> int:
        """Length of the image's token sequence, in families that take 2 x 2 latents as a token."""
        return (self.latent_shape[-1] // 2) * (self.latent_shape[-2] // 2)

    def guidance_input(self, batch: int, device: torch.device) -> Tensor | None:
        """Embedded guidance, `[B]`, or None where the network takes none."""
        if not self.takes_guidance(self.module.config):
            return None
        value = self.guidance if self.config.embedded_guidance is None else self.config.embedded_guidance
        return torch.full((batch,), value, device=device)


# ------------------------------------------------------------------------------------------------------------ helpers


def load_vae(folder: Path, config: ModelConfig) -> nn.Module:
    """The folder's VAE in `config.vae_dtype`.

    Raises:
        BadInput: its configuration names no autoencoder of diffusers.
    """
    import diffusers

    name = str(read_json(folder / "vae" / "config.json").get("_class_name"))
    vae_class = getattr(diffusers, name, None) if name.startswith("Autoencoder") else None
    if vae_class is None:
        raise BadInput(f"model.path: {folder / 'vae/config.json'} names {name!r}, which is no autoencoder of diffusers")
    dtype = getattr(torch, config.vae_dtype)
    return vae_class.from_pretrained(folder / "vae", dtype=dtype, local_files_only=True, use_safetensors=True)


def together(parts: list[Conditions]) -> Conditions:
    """Conditions one under the other, on the CPU; token sequences are padded with zeros to the longest."""
    joined = {}
    for name in parts[0].tensors:
        values = [part.tensors[name].cpu() for part in parts]
        longest = max(value.shape[1] for value in values)
        joined[name] = torch.cat([_padded(value, longest) for value in values])
    return Conditions(joined)


def _padded(value: Tensor, length: int) -> Tensor:
    missing = length - value.shape[1]
    if not missing:
        return value
    return torch.cat([value, value.new_zeros(len(value), missing, *value.shape[2:])], dim=1)


def pack(latents: Tensor) -> Tensor:
    """Latents `[B, C, H, W]` as tokens of 2 x 2 latents, `[B, H/2 W/2, 4 C]` (FLUX, Qwen-Image)."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * w // 2, 4 * c)


def unpack(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack` for latents of shape `[C, H, W]`."""
    c, h, w = shape
    return tokens.view(len(tokens), h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, c, h, w)


def _check_weights(config: ModelConfig, folder: Path, component: str) -> None:
    places = [folder / "vae"] if config.network_file else [folder / component, folder / "vae"]
    for place in places:
        if not any(place.glob("*.safetensors")):
            raise BadInput(f"model.path: {place} holds no .safetensors weights")
    if config.network_file is None:
        return
    file = Path(config.network_file)
    if file.suffix != ".safetensors" or not file.is_file():
        raise BadInput(f"model.network_file is {config.network_file!r}: give a .safetensors file that exists")


def _check_quantization(config: ModelConfig) -> None:
    if config.quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput(
            f"model.quantization is {config.quantization!r}: it needs the package bitsandbytes, which is not installed"
        )


def _quantization(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Arguments with which diffusers loads a network in 8 or 4 bits; none for a plain one."""
    if config.quantization is None:
        return {}
    from diffusers import BitsAndBytesConfig

    kinds = {
        "int8": {"load_in_8bit": True},
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": getattr(torch, config.dtype),
        },
    }
    return {"quantization_config": BitsAndBytesConfig(**kinds[config.quantization]), "device_map": {"": device}}
