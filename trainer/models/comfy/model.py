"""Trains a model of a ComfyUI graph with ComfyUI's own code, which is imported here and in `describe.py` only."""

import sys
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...config import ModelConfig
from ...diffusion.process import FLOW
from ...diffusion.schedules import sigma_schedule
from ...utils.errors import BadInput
from ..base import Conditions, DiffusionModel
from .autograd import OutOfPlace, checkpoint_blocks, differentiate_kernels, kept_in_place
from .conditions import Entry, EntryConditions, alike, mapped, own_images
from .load import (
    attention_layers,
    check_extra_channels,
    check_offload,
    check_task,
    check_vae,
    decodes_with_noise,
    latent_shape,
    load_network,
    load_vae,
    may_have_sound,
    open_mixed_layers,
    process_of,
    require_version,
)

WEIGHT_FILES = (".safetensors", ".sft")
LARGEST_SIGMA = 1000.0
"""Noise levels of epsilon and v models, in ComfyUI's scale, are limited to the model's largest or this, if larger."""


class ComfyModel(DiffusionModel):
    """An image or video model of ComfyUI (`BaseModel`).

    The process is FLOW for flow models, VP_V for models that predict v, and VP for models that predict noise or the
    image. For VP and VP_V, ComfyUI's latents are x0 + s noise; this pack's are these divided by `VP.k_scale`.

    Args:
        patcher: ComfyUI's `ModelPatcher`, loaded, without patches.
        vae: ComfyUI's `VAE`, or None where nothing is decoded.

    Raises:
        BadInput: the model cannot be trained by these kernels, or the VAE does not fit.
    """

    family = "comfy"
    needs_opening_check = True
    default_targets = ()
    process = None  # depends on the checkpoint

    def __init__(self, patcher: Any, vae: Any, config: ModelConfig) -> None:
        self.patcher, self.vae, self.config = patcher, vae, config
        self.base, self.module = patcher.model, patcher.model.diffusion_model
        self.comfy = _modules()
        check_task(self.base)
        differentiate_kernels()
        self.comfy.management.in_training = True  # fused kernels without a backward pass are left out, always
        self.process = process_of(self.base.model_sampling, self.comfy.model_sampling)
        self.module.requires_grad_(False)
        open_mixed_layers(self.module, self.comfy.quant_ops.QuantizedTensor)
        self.default_targets = attention_layers(self.module)
        self._keys = self.comfy.lora.model_lora_keys_unet(self.base, {})
        apply = partial(_apply, keeps=kept_in_place(self.module))
        self._options = {"transformer_options": {}, "model_function_wrapper": apply}
        self._shape = latent_shape(self.base.latent_format, config)
        if vae is not None:
            check_vae(vae, self.base.latent_format)
            vae.first_stage_model.requires_grad_(False)
        if config.gradient_checkpointing:
            checkpoint_blocks(self.module)
        self._is_resident = False
        patcher.pre_run()

    @cached_property
    def _largest_sigma(self) -> float:
        """Read on first use: a network on the meta device, which only shapes are asked of, has none."""
        return max(float(self.base.model_sampling.sigma_max), LARGEST_SIGMA)

    # ------------------------------------------------------------------------------------------------ loading

    @staticmethod
    def check(config: ModelConfig) -> None:
        graph = config.graph
        require_version(Path(graph.folder))
        named = [("file", graph.file), ("vae_file", graph.vae_file), *(("loras", lora.file) for lora in graph.loras)]
        if (low := graph.low_noise) is not None:
            named += [("low_noise.file", low.file), *(("low_noise.loras", lora.file) for lora in low.loras)]
        for field, file in named:
            if Path(file).suffix not in WEIGHT_FILES or not Path(file).is_file():
                raise BadInput(f"model.graph.{field} is {file!r}: this .safetensors file does not exist")

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> "ComfyModel":
        comfy = import_comfy(config.graph.folder, device)
        patcher = load_network(config.graph, comfy)
        model = cls(patcher, load_vae(config.graph, comfy), config)
        model._make_resident()
        model._check_offload()
        return model

    def _check_offload(self) -> None:
        """Raise BadInput if the weights do not fit on the GPU and the backward pass would need all of them there."""
        offloaded = self.patcher.model_size() - self.patcher.loaded_size() if self.base.model_lowvram else 0
        check_offload(offloaded, self.config)

    @classmethod
    def encode_batches(cls, config: ModelConfig, *_: Any) -> Conditions:
        raise BadInput("a connected model needs clip, which encodes the prompts: connect the graph's CLIP")

    @classmethod
    def check_conditions(cls, config: ModelConfig, conditions: Conditions) -> None:
        if not isinstance(conditions, EntryConditions):
            raise BadInput("prompts.conditions: family comfy needs a file that was encoded by a ComfyUI graph")

    # --------------------------------------------------------------------------------------------- prediction

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    def predict(self, latents: Tensor, sigma: Tensor, conditions: EntryConditions) -> Tensor:
        return self._branches(latents, sigma, conditions)[0]

    def predict_guided(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditions: EntryConditions,
        guidance_scale: float = 1.0,
        unconditional: EntryConditions | None = None,
    ) -> Tensor:
        if guidance_scale == 1.0:
            return self.predict(latents, sigma, conditions)
        return self.guided(*self._branches(latents, sigma, conditions, unconditional), guidance_scale)

    def _branches(
        self, latents: Tensor, sigma: Tensor, conditions: EntryConditions, negative: EntryConditions | None = None
    ) -> list[Tensor]:
        """The prediction for `conditions`, and the one for the first row of `negative`, if there is one.

        Where the shapes of both are alike, ComfyUI calls the network once for both, as it does in sampling, if it has
        the memory. The rows of other entries take one more call with the negative prompt, all together. The negative
        prompt gets the images of each entry, if it has none of its own.
        """
        level = self._with_signal(sigma.float().double())
        scale = self.process.k_scale(level)
        sigmas = (level * scale).float()
        noisy = latents * _column(scale, latents).to(latents.dtype)
        self._make_resident()
        branches: dict[str, list[tuple[Tensor, Tensor]]] = {"positive": []}
        against, left = None, []
        if negative is not None:
            ((_, against),) = negative.rows(torch.zeros(1, dtype=torch.long)).groups()
            branches["negative"] = []

        def denoise(rows: Tensor, entries: dict[str, Entry]) -> None:
            for name, clean in self._denoised(noisy[rows], sigmas[rows], entries).items():
                branches[name].append((rows, clean))

        for rows, entry in conditions.groups():
            rows = rows.to(latents.device)
            images = {} if against is None else own_images(entry, against)
            opposite = None if against is None else mapped(against | images, Tensor.clone)
            if opposite is not None and alike(entry, opposite):
                denoise(rows, {"positive": entry, "negative": opposite})
                continue
            denoise(rows, {"positive": entry})
            if images:
                denoise(rows, {"negative": opposite})
            else:
                left.append(rows)
        if against is not None and left:
            denoise(torch.cat(left), {"negative": against})
        return [self.process.predicting(latents, in_order(parts), level).float() for parts in branches.values()]

    def _with_signal(self, level: Tensor) -> Tensor:
        """ComfyUI has a little signal at the highest level of models with zero terminal SNR; float32 rounds it to 0."""
        if self.process is FLOW:
            return level
        return level.clamp(max=self.process.from_k_sigma(self._largest_sigma))

    def _denoised(self, noisy: Tensor, sigmas: Tensor, entries: dict[str, Entry]) -> dict[str, Tensor]:
        """ComfyUI's estimates of the clean latents (x0) by branch."""
        conditions = [self._conditions_of(noisy, entry, branch) for branch, entry in entries.items()]
        found = self.comfy.samplers.calc_cond_batch(self.base, conditions, noisy, sigmas, self._options)
        return dict(zip(entries, found, strict=True))

    def _conditions_of(self, latents: Tensor, entry: dict[str, Any], branch: str) -> list[dict]:
        """Process an entry of CONDITIONING with ComfyUI, for latents of this shape and device."""
        entry = self._restored(entry)
        given = set(entry)
        tokens = entry.pop("cross_attn")
        conds = {branch: self.comfy.sampler_helpers.convert_cond([[tokens, entry]])}
        silent = {"latent_shapes": [latents.shape]} if may_have_sound(self.base) else {}
        conds = self.comfy.samplers.process_conds(
            self.base, latents, conds, latents.device, latent_image=torch.zeros_like(latents), seed=0, **silent
        )
        self._check_guidance(conds[branch])
        check_extra_channels(self.base, conds[branch], given)
        return conds[branch]

    def _restored(self, entry: dict[str, Any]) -> dict[str, Any]:
        entry = dict(entry)
        if self.config.embedded_guidance is not None:
            entry["guidance"] = self.config.embedded_guidance
        if "clip_vision_output" in entry:
            seen = self.comfy.clip_vision.Output()
            for name, value in entry["clip_vision_output"].items():
                setattr(seen, name, value)
            entry["clip_vision_output"] = seen
        return entry

    def _check_guidance(self, conds: list[dict]) -> None:
        if self.config.embedded_guidance is not None and not any("guidance" in c["model_conds"] for c in conds):
            raise BadInput(
                f"model.embedded_guidance is {self.config.embedded_guidance}, but the model has no such input: use null"
            )

    def _make_resident(self) -> None:
        if not self._is_resident:  # never between a forward and its backward pass, which needs the same weights
            self._load([self.patcher])
            self._is_resident = True

    def _load(self, patchers: list[Any]) -> None:
        """Move the VAE off the GPU, and as many weights as fit onto it, with ComfyUI's memory management."""
        management = self.comfy.management
        if self.vae is not None:
            others = [held for held in management.current_loaded_models if held.model is not self.vae.patcher]
            management.free_memory(1e30, self.vae.patcher.load_device, others)
        reserve = (self.config.graph and self.config.graph.reserve_gb) or 0.0
        needed = self.patcher.memory_required([1, *self._shape]) + reserve * 2**30
        management.load_models_gpu(patchers, memory_required=needed)
        for parameter in self.module.parameters():
            if parameter.requires_grad:  # ComfyUI may leave the LoRA in RAM, without casting it
                parameter.data = parameter.data.to(self.device)

    def make_room(self, size: int, device: torch.device) -> None:
        if torch.is_grad_enabled():  # the backward pass needs the weights where they were
            return
        self._is_resident = False
        management = self.comfy.management
        management.free_memory(size + management.minimum_inference_memory(), device)

    def plain(self, call: Callable[[], Tensor]) -> Tensor:
        self.comfy.management.in_training = False
        try:
            return call()
        finally:
            self.comfy.management.in_training = True

    # ------------------------------------------------------------------------------------------------ the rest

    def is_trained_at(self, sigma: float) -> bool:
        low = None if self.config.graph is None else self.config.graph.low_noise
        return low is None or low.is_trained_at(sigma)

    def sigmas(self, steps: int, shift: float | None) -> list[float]:
        graph = self.config.graph
        if graph is not None and graph.sigmas is not None:
            return self._given(graph.sigmas, steps)
        scheduler = graph.scheduler if graph is not None else None
        if scheduler is None and self.process is FLOW and shift is not None:
            return sigma_schedule(steps, shift)
        known = self.comfy.samplers.SCHEDULER_NAMES
        if scheduler is not None and scheduler not in known:
            raise BadInput(f"model.graph.scheduler is {scheduler!r}: choose one of {', '.join(known)}")
        own = self.comfy.samplers.calculate_sigmas(self.base.model_sampling, scheduler or "simple", steps)
        return self._given(own.tolist(), steps)

    def _given(self, values: list[float], steps: int) -> list[float]:
        """Check ComfyUI's noise levels and convert them to this pack's scale."""
        if len(values) != steps + 1:
            raise BadInput(f"there are {len(values)} sigmas, but {steps} steps need {steps + 1}: change one of them")
        if values[-1] != 0 or any(a <= b for a, b in zip(values[:-1], values[1:], strict=True)):
            raise BadInput(f"sigmas must decrease in every step and end at 0: they are {[round(v, 4) for v in values]}")
        levels = [self.process.from_k_sigma(value) for value in values]
        if levels[0] > 1:
            raise BadInput(f"sigmas begin with {values[0]}, but the sigmas of a flow model must be at most 1")
        return levels

    def decode_batch(self, latents: Tensor) -> Tensor:
        self._is_resident = False  # ComfyUI makes room for the VAE
        scaled = self.base.process_latent_out(latents)
        if decodes_with_noise(self.vae):
            pixels = torch.cat([self._decode_with_fixed_noise(part) for part in scaled.split(1)])
        else:
            pixels = self.vae.decode(scaled)
        images = rearrange(pixels.to(latents.device, torch.float32).clamp(0, 1), "... h w c -> ... c h w").contiguous()
        return images[:, 0] if images.ndim == 5 and images.shape[1] == 1 else images

    def _decode_with_fixed_noise(self, latents: Tensor) -> Tensor:
        """Decode with a fixed seed, so that the result does not depend on other images or earlier random numbers."""
        devices = [self.vae.device] if self.vae.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            return self.vae.decode(latents)

    def encode_image_batch(self, images: Tensor) -> Tensor:
        self._is_resident = False
        pixels = rearrange(images, "... c h w -> ... h w c")
        if self.vae.latent_dim == 2:
            latents = self.vae.encode(pixels)
        else:  # it encodes one video at a time
            latents = torch.cat([self.vae.encode(video if video.ndim == 4 else video[None]) for video in pixels])
        return self.base.process_latent_in(latents.to(images.device, torch.float32))

    def lora_key(self, module_name: str) -> str:
        key = f"diffusion_model.{module_name}"
        if key not in self._keys:
            raise BadInput(f"lora.targets: ComfyUI has no LoRA key for {module_name!r} of this model")
        return key

    def lora_aliases(self, module_name: str) -> list[str]:
        return [name for name, weight in self._keys.items() if weight == f"diffusion_model.{module_name}.weight"]


def _apply(function: Any, arguments: dict[str, Any], keeps: frozenset[Callable]) -> Tensor:
    """A `model_function_wrapper` that calls the network as `OutOfPlace` does if gradients are enabled."""
    if not torch.is_grad_enabled():
        return function(arguments["input"], arguments["timestep"], **arguments["c"])
    with OutOfPlace(keeps):
        return function(arguments["input"], arguments["timestep"], **arguments["c"])


def in_order(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows that were computed in parts, in the order of their numbers.

    Args:
        parts: numbers of rows, and the rows.
    """
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return torch.cat([values for _, values in parts])[order]


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))


# ----------------------------------------------------------------------------------------------------- ComfyUI itself


def import_comfy(folder: str, device: torch.device) -> SimpleNamespace:
    """Import ComfyUI's modules from its folder, if they are not loaded yet."""
    if "comfy" not in sys.modules:
        sys.path.insert(0, folder)
        import comfy.cli_args

        comfy.cli_args.args.cpu = device.type == "cpu"
        # With async offload, buffers with weights are reused before the backward pass has read them.
        comfy.cli_args.args.disable_async_offload = True
    return _modules()


def _modules() -> SimpleNamespace:
    import comfy.clip_vision
    import comfy.lora
    import comfy.model_management
    import comfy.model_patcher
    import comfy.model_sampling
    import comfy.quant_ops
    import comfy.sampler_helpers
    import comfy.samplers
    import comfy.sd
    import comfy.utils

    names = ("clip_vision", "lora", "model_patcher", "model_sampling", "quant_ops", "sampler_helpers", "samplers")
    names = (*names, "sd", "utils")
    return SimpleNamespace(management=comfy.model_management, **{name: sys.modules[f"comfy.{name}"] for name in names})
