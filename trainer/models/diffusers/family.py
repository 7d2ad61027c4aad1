"""Base class of the families that load a diffusers folder: checks, loading, text encoding, schedules."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...config import ModelConfig
from ...diffusion.schedules import sigma_schedule
from ...utils.allocation import peak_bytes
from ...utils.errors import BadInput
from ...utils.media import open_image
from ..base import ENCODED_AT_ONCE, IMAGE_PREFIX, Conditions, DiffusionModel, matching, require_files
from ..compiled import compile_repeated_blocks
from .folders import check_quantization, check_weights, quantization, read_json
from .latents import together
from .sharding import load_sharded, shard
from .single_file import input_channels_of, load_network
from .vae import IMAGE_VAES, check_vae, decode, encode, latent_channels, load_vae, vae_dtype, vae_on_meta, vae_scale

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
"""LoRA targets: the attention projections of the image tokens, by diffusers' names."""

JOINT_ATTENTION = (*ATTENTION, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
"""LoRA targets: `ATTENTION`, and the projections of the text tokens in joint attention."""


class DiffusersModel(DiffusionModel):
    """A family whose models are diffusers folders.

    Attributes:
        family: its name in run descriptions.
        pipelines: accepted pipeline classes in model_index.json; the first encodes prompts.
        component: subfolder of the network.
        network_class: diffusers class of the network.
        encoders: components that are needed to encode prompts.
        guidance: default embedded guidance; None if the family has no such input.
        condition_widths: for each condition, the field of the network's configuration with its width.
        condition_masks: names of the masks among the conditions.
        text_tokens: number of tokens of a prompt; of a long prompt, if the number varies.
        vae_classes: accepted VAE classes.
        input_layers: keys of the weight of the network's first layer, in diffusers' and in released files; its second
            dimension is the number of input channels.
        video: whether latents have a time axis.
        scheduler_spaces: whether the pipeline leaves the spacing of levels to the scheduler; else it is even.
        pipeline_options: further arguments for loading the pipeline of the text encoders.
    """

    family: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    component: ClassVar[str] = "transformer"
    network_class: ClassVar[str]
    encoders: ClassVar[tuple[str, ...]]
    guidance: ClassVar[float | None] = None
    condition_widths: ClassVar[dict[str, str]] = {}
    condition_masks: ClassVar[tuple[str, ...]] = ()
    text_tokens: ClassVar[int]
    vae_classes: ClassVar[tuple[str, ...]] = IMAGE_VAES
    input_layers: ClassVar[tuple[str, ...]]
    video: ClassVar[bool] = False
    scheduler_spaces: ClassVar[bool] = False
    pipeline_options: ClassVar[dict[str, Any]] = {}

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
            raise BadInput(f"model.path {str(folder)!r} is a {pipeline}, but family {cls.family} needs {wanted}")
        network = cls.network_config(config)
        if network.get("_class_name") != cls.network_class:
            found = f"{folder / cls.component} is a {network.get('_class_name')}"
            raise BadInput(f"model.path: {found}, but family {cls.family} needs {cls.network_class}")
        check_vae(folder, cls.vae_classes, cls.family)
        check_weights(config, folder, cls.component)
        check_quantization(config)
        cls.check_channels(config, network, cls.vae_config(config))
        if config.embedded_guidance is not None and not cls.takes_guidance(network):
            raise BadInput(
                f"model.embedded_guidance is {config.embedded_guidance}, but this model has no guidance input: use null"
            )
        cls.check_size(config, network, cls.vae_config(config))

    @classmethod
    def takes_guidance(cls, network: dict[str, Any]) -> bool:
        """Whether the network has guidance as an input."""
        return cls.guidance is not None and bool(network.get("guidance_embeds", False))

    @classmethod
    def input_channels(cls, config: ModelConfig, vae: dict[str, Any]) -> int:
        """Number of input channels that this family passes to the network."""
        return latent_channels(vae)

    @classmethod
    def check_channels(cls, config: ModelConfig, network: dict[str, Any], vae: dict[str, Any]) -> None:
        """Raise BadInput if the network has another number of input channels than this family passes."""
        given = cls.input_channels(config, vae)
        where, found = cls.folder(config) / cls.component, network["in_channels"]
        if config.network_file is not None:
            where = config.network_file
            found = input_channels_of(Path(config.network_file), cls.input_layers) or found
        if found != given:
            raise BadInput(
                f"model.path: {where} has {found} input channels, but family {cls.family} uses {given}: models for "
                "inpainting, editing, depth or other control images cannot be trained with this family"
            )

    @classmethod
    def check_size(cls, config: ModelConfig, network: dict[str, Any], vae: dict[str, Any]) -> None:
        """Raise BadInput for a height, width or number of frames that the model does not support."""
        step, frames = cls.size_step(network, vae)
        for name, size in (("height", config.height), ("width", config.width)):
            if size % step:
                raise BadInput(f"model.{name} is {size}: it must be a multiple of {step} for this model")
        if config.frames != 1 and (frames is None or (config.frames - 1) % frames):
            accepted = "1, because it generates images" if frames is None else f"a multiple of {frames}, plus 1"
            raise BadInput(f"model.frames is {config.frames}: for this model it must be {accepted}")

    @classmethod
    def size_step(cls, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int | None]:
        """The divisor of height and width in pixels, and the frames per latent frame (None for image families)."""
        return vae_scale(vae), None

    @classmethod
    def check_conditions(cls, config: ModelConfig, conditions: Conditions) -> None:
        widths, images = cls.widths(cls.network_config(config)), cls.image_shapes(config)
        found, wanted = set(conditions.tensors), {*widths, *cls.condition_masks, *images}
        if found != wanted:
            raise BadInput(
                f"prompts.conditions has {', '.join(sorted(found))}, but family {cls.family} in {cls.folder(config)} "
                f"needs {', '.join(sorted(wanted))}: encode the prompts again"
            )
        for name, width in widths.items():
            given = conditions.tensors[name].shape[-1]
            if given != width:
                raise BadInput(
                    f"text embeddings {name!r} have width {given}, but {cls.folder(config) / cls.component} needs "
                    f"{width}: use the text encoders that belong to the model"
                )
        for name, shape in images.items():
            given = tuple(conditions.tensors[name].shape[1:])
            if [None if size is None else found for size, found in zip(shape, given, strict=False)] != list(shape):
                found = " x ".join(map(str, given))
                wanted = " x ".join("tokens" if size is None else str(size) for size in shape)
                raise BadInput(
                    f"the image conditions {name!r} have shape {found}, but {cls.family} in {cls.folder(config)} needs "
                    f"{wanted} for this model.height, width and frames: encode the prompts again"
                )

    @classmethod
    def widths(cls, network: dict[str, Any]) -> dict[str, int]:
        """Width of each text embedding."""
        return {name: network[field] for name, field in cls.condition_widths.items()}

    @classmethod
    def image_shapes(cls, config: ModelConfig) -> dict[str, tuple[int | None, ...]]:
        """Shapes of the image conditions of one prompt; None means any number of tokens."""
        if not cls.takes_images(config):
            return {}
        vae = cls.vae_config(config)
        step, _ = cls.size_step(cls.network_config(config), vae)
        scale = step // 2  # a token is 2 x 2 latents in every family with image conditions
        return {f"{IMAGE_PREFIX}latents": (latent_channels(vae), config.height // scale, config.width // scale)}

    @classmethod
    def prompt_tokens(cls, config: ModelConfig) -> int:
        """Tokens of a prompt; of a long one where prompts differ."""
        return cls.text_tokens

    @classmethod
    def empty_conditions(cls, config: ModelConfig, count: int, device: torch.device) -> Conditions:
        """Conditions of zeros with the shapes of real ones, for `text_tokens` tokens."""
        network = cls.network_config(config)
        shapes = {name: (None, width) for name, width in cls.widths(network).items()}
        shapes |= dict.fromkeys(cls.condition_masks, (None,)) | cls.image_shapes(config)
        if "pooled" in shapes:
            shapes["pooled"] = shapes["pooled"][1:]
        tokens = cls.prompt_tokens(config)
        sizes = {name: [tokens if size is None else size for size in shape] for name, shape in shapes.items()}
        kinds = {name: torch.long if name.endswith("mask") else torch.float32 for name in sizes}
        return Conditions({n: torch.zeros(count, *size, dtype=kinds[n], device=device) for n, size in sizes.items()})

    @classmethod
    def skeleton(cls, config: ModelConfig) -> nn.Module:
        """The network on the meta device, without weights."""
        import diffusers

        with torch.device("meta"):
            return getattr(diffusers, cls.network_class).from_config(cls.network_config(config))

    @classmethod
    def check_targets(cls, config: ModelConfig, targets: list[str]) -> None:
        if not targets:  # the default targets are known to match
            return
        bare = object.__new__(cls)
        bare.module = cls.skeleton(config)
        for name in matching(bare.module, targets):
            bare.lora_key(name)

    # ------------------------------------------------------------------------------------------------ loading

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> "DiffusersModel":
        network = (cls._load_sharded if config.sharded else cls._load_network)(config, device).requires_grad_(False)
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return cls(network, load_vae(cls.folder(config), config, device), config)

    @classmethod
    def on_meta(cls, config: ModelConfig) -> "DiffusersModel":
        """The model on the meta device, without weights: it computes shapes only."""
        network = cls.skeleton(config)
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        dtype = getattr(torch, config.dtype)
        network = nn.Module.to(network, dtype).requires_grad_(False)  # diffusers' own `to` warns of such a cast
        return cls(network, vae_on_meta(cls.folder(config), config), config)

    @classmethod
    def _load_sharded(cls, config: ModelConfig, device: torch.device) -> nn.Module:
        """This process's part of the network; a file whose names are translated is read whole."""
        found = None
        if config.network_file is None:
            part = cls.folder(config) / cls.component
            found = load_sharded(cls.network_class, part, getattr(torch, config.dtype), device)
        return found or shard(cls._load_network(config, torch.device("cpu")).requires_grad_(False), device)

    @classmethod
    def _load_network(cls, config: ModelConfig, device: torch.device) -> nn.Module:
        import diffusers

        network_class = getattr(diffusers, cls.network_class)
        dtype, folder = getattr(torch, config.dtype), cls.folder(config)
        extra = quantization(config, device)
        if config.network_file is None:
            network = network_class.from_pretrained(
                folder / cls.component, dtype=dtype, local_files_only=True, use_safetensors=True, **extra
            )
        else:
            network = load_network(Path(config.network_file), network_class, folder, cls.component, dtype, extra)
        return network if extra else network.to(device)

    def compile_blocks(self) -> None:
        compile_repeated_blocks(self.module)

    # ----------------------------------------------------------------------------------------------- encoding

    @classmethod
    def takes_images(cls, config: ModelConfig) -> bool:
        """Whether every prompt needs an image: a first frame or a source image."""
        return False

    @classmethod
    @torch.no_grad()
    def encode_batches(
        cls, config: ModelConfig, prompts: list[str], images: list[Path | None], negative: str, device: torch.device
    ) -> Iterator[Conditions]:
        cls._check_images(config, prompts, images)
        require_files(cls.folder(config), list(cls.encoder_components(config)), cls.family)
        pipeline = cls._encoders(config, device)
        for start in range(0, len(prompts), ENCODED_AT_ONCE):
            some = slice(start, start + ENCODED_AT_ONCE)
            yield cls.encode_rows(pipeline, config, prompts[some], images[some], negative)
        del pipeline
        if device.type == "cuda":
            torch.cuda.empty_cache()

    @classmethod
    def encode_rows(
        cls, pipeline: Any, config: ModelConfig, prompts: list[str], images: list[Path | None], negative: str
    ) -> Conditions:
        """Conditions of at most ENCODED_AT_ONCE prompts."""
        texts = together([cls.encode_prompts(pipeline, config, prompts)])
        if not cls.takes_images(config):
            return texts
        seen = together([Conditions(cls.encode_prompt_image(pipeline, config, open_image(path))) for path in images])
        return Conditions(texts.tensors | seen.tensors)

    @classmethod
    def _check_images(cls, config: ModelConfig, prompts: list[str], images: list[Path | None]) -> None:
        takes = cls.takes_images(config)
        for prompt, image in zip(prompts, images, strict=True):
            if takes and image is None:
                raise BadInput(f"prompt {prompt!r} has no image, but {cls.family} in {config.path} needs one")
            if image is not None and not takes:
                raise BadInput(f"prompt {prompt!r} has an image, but {cls.family} in {config.path} does not use images")

    @classmethod
    def _encoders(cls, config: ModelConfig, device: torch.device) -> Any:
        """A pipeline with the text encoders (and image encoders) only."""
        import diffusers

        folder = cls.folder(config)
        index = read_json(folder / "model_index.json")
        kept = cls.encoder_components(config)
        left_out = [name for name, entry in index.items() if isinstance(entry, list) and name not in kept]
        pipeline_class = getattr(diffusers, index["_class_name"])
        pipeline = pipeline_class.from_pretrained(
            folder,
            **dict.fromkeys(left_out),
            **cls.pipeline_options,
            dtype={"default": getattr(torch, config.dtype), "vae": vae_dtype(config, device)},
            local_files_only=True,
            use_safetensors=True,
        )
        return pipeline.to(device)

    @classmethod
    def encode_prompts(cls, pipeline: Any, config: ModelConfig, prompts: list[str]) -> Conditions:
        """Conditions of prompts, from the pipeline's text encoders."""
        raise NotImplementedError

    @classmethod
    def encode_prompt_image(cls, pipeline: Any, config: ModelConfig, image: Any) -> dict[str, Tensor]:
        """Conditions of an image, with one row and names that start with IMAGE_PREFIX."""
        raise NotImplementedError

    @classmethod
    def image_encoders(cls, config: ModelConfig) -> tuple[str, ...]:
        """Components that encode images."""
        return ("vae",)

    @classmethod
    def encoder_components(cls, config: ModelConfig) -> tuple[str, ...]:
        """Components that encode prompts and their images."""
        return cls.encoders + (cls.image_encoders(config) if cls.takes_images(config) else ())

    # ------------------------------------------------------------------------------------------------- images

    def decode_batch(self, latents: Tensor) -> Tensor:
        return decode(self.vae, latents)

    def encode_image_batch(self, images: Tensor) -> Tensor:
        return encode(self.vae, images)

    @classmethod
    @torch.no_grad()
    def decode_bytes(cls, config: ModelConfig) -> int:
        model = cls.on_meta(config)
        latents = torch.zeros(model.decode_batch_size, *model.latent_shape, device="meta")
        return peak_bytes(lambda: model.decode_batch(latents))

    # ----------------------------------------------------------------------------------------------- sampling

    def sigmas(self, steps: int, shift: float | None) -> list[float]:
        return self.own_sigmas(steps) if shift is None else sigma_schedule(steps, shift)

    def own_sigmas(self, steps: int) -> list[float]:
        """Noise levels of the folder's scheduler, as in its pipeline."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = read_json(self.folder(self.config) / "scheduler" / "scheduler_config.json")
        if "flow_shift" in config:  # UniPC and similar schedulers
            return sigma_schedule(steps, config["flow_shift"])
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        levels = {} if self.scheduler_spaces else {"sigmas": [1 - i / steps for i in range(steps)]}
        scheduler.set_timesteps(steps, mu=self._resolution_shift(scheduler.config), **levels)
        return scheduler.sigmas.double().tolist()

    def _resolution_shift(self, config: Any) -> float | None:
        """mu of a shift that grows with the number of tokens (FLUX's calculate_shift); None for fixed shifts."""
        if not config.use_dynamic_shifting:
            return None
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return config.base_shift + slope * (self.tokens - config.base_image_seq_len)

    @property
    def tokens(self) -> int:
        """Number of image tokens, in families with 2 x 2 latents per token."""
        return (self.latent_shape[-1] // 2) * (self.latent_shape[-2] // 2)

    def guidance_input(self, batch: int, device: torch.device) -> Tensor | None:
        """Embedded guidance, `[B]`, or None if the network has no such input."""
        if not self.takes_guidance(self.module.config):
            return None
        value = self.guidance if self.config.embedded_guidance is None else self.config.embedded_guidance
        return torch.full((batch,), value, device=device)
