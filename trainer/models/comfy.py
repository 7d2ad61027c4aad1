"""Whatever a ComfyUI graph loads, by ComfyUI's own code. The one file of the trainer that imports ComfyUI."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import GraphModel, GraphSampling, ModelConfig
from ..errors import BadInput
from ..schedule import sigma_schedule
from ..sde import DIFFUSION_KERNELS, KERNELS
from .autograd import OutOfPlace, checkpoint_blocks
from .base import Conditions, DiffusionModel
from .entries import EntryConditions

WEIGHT_FILES = (".safetensors", ".sft")


class ComfyModel(DiffusionModel):
    """A model behind ComfyUI's `BaseModel`, image or video.

    Flow models go by the flow kernels. Models that predict noise, v or the image go by `ddim`; ComfyUI holds their
    latents as x0 + s noise, this pack as that divided by sqrt(1 + s^2), and sigma = s / sqrt(1 + s^2).

    Args:
        patcher: ComfyUI's `ModelPatcher`, loaded, without patches.
        vae: ComfyUI's `VAE`, or None where nothing is decoded.

    Raises:
        BadInput: the model cannot be trained by these kernels, or the VAE does not fit.
    """

    family = "comfy"
    needs_opening_check = True
    default_targets = ()
    kernels = (*KERNELS, *DIFFUSION_KERNELS)  # of any; an instance has its own

    def __init__(self, patcher: Any, vae: Any, config: ModelConfig) -> None:
        self.patcher, self.vae, self.config = patcher, vae, config
        self.base, self.module = patcher.model, patcher.model.diffusion_model
        self.comfy = _modules()
        self.comfy.management.in_training = True  # fused kernels without a backward pass are left out, always
        self.predicts_flow = predicts_flow(self.base.model_sampling)
        self.kernels = tuple(KERNELS if self.predicts_flow else DIFFUSION_KERNELS)
        self.still_kernel = "ode" if self.predicts_flow else "ddim"
        self.module.requires_grad_(False)
        self.default_targets = attention_layers(self.module)
        self._keys = set(self.comfy.lora.model_lora_keys_unet(self.base, {}))
        self._options = {"transformer_options": {}, "model_function_wrapper": _apply}
        self._shape = latent_shape(self.base.latent_format, config)
        if vae is not None:
            check_vae(vae, self.base.latent_format)
        if config.gradient_checkpointing:
            checkpoint_blocks(self.module)
        patcher.pre_run()

    # ------------------------------------------------------------------------------------------------ loading

    @staticmethod
    def check(config: ModelConfig) -> None:
        graph = config.graph
        if not (Path(graph.folder) / "comfy" / "sd.py").is_file():
            raise BadInput(f"model.graph.folder is {graph.folder!r}: ComfyUI is not there")
        named = [("file", graph.file), ("vae_file", graph.vae_file), *(("loras", lora.file) for lora in graph.loras)]
        for field, file in named:
            if Path(file).suffix not in WEIGHT_FILES or not Path(file).is_file():
                raise BadInput(f"model.graph.{field} is {file!r}: there is no such .safetensors file (any more)")

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> "ComfyModel":
        comfy = _import(config.graph.folder, device)
        patcher = load_network(config.graph, comfy)
        vae = load_vae(config.graph, comfy)
        comfy.management.load_models_gpu([patcher])
        return cls(patcher, vae, config)

    @classmethod
    def encode(cls, config: ModelConfig, prompts: list[str], device: torch.device, pictures: Any = None) -> Conditions:
        raise BadInput("family comfy loads no text encoder: connect the graph's clip, which encodes the prompts")

    @classmethod
    def check_conditions(cls, config: ModelConfig, conditions: Conditions) -> None:
        if not isinstance(conditions, EntryConditions):
            raise BadInput("prompts.conditions: family comfy takes those that a ComfyUI graph has encoded")

    # --------------------------------------------------------------------------------------------- prediction

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    def predict(self, latents: Tensor, sigma: Tensor, conditions: EntryConditions) -> Tensor:
        return self._predict(latents, sigma, conditions, "positive")

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditions: EntryConditions,
        guidance_scale: float = 1.0,
        unconditional: EntryConditions | None = None,
    ) -> Tensor:
        positive = self._predict(latents, sigma, conditions, "positive")
        if guidance_scale == 1.0:
            return positive
        alone = unconditional.rows(torch.zeros(len(latents), dtype=torch.long))
        return self.guided(positive, self._predict(latents, sigma, alone, "negative"), guidance_scale)

    def _predict(self, latents: Tensor, sigma: Tensor, conditions: EntryConditions, branch: str) -> Tensor:
        level = sigma.float().double()
        scale = torch.ones_like(level) if self.predicts_flow else (1 - level**2).rsqrt()
        sigmas = (level * scale).float()
        noisy = latents * _column(scale.float(), latents)
        self._make_resident()
        groups = [(rows.to(latents.device), entry) for rows, entry in conditions.groups()]
        parts = [self._denoised(noisy[rows], sigmas[rows], entry, branch) for rows, entry in groups]
        order = torch.cat([rows for rows, _ in groups]).argsort()
        return ((noisy - torch.cat(parts)[order]) / _column(sigmas, noisy)).float()

    def _denoised(self, noisy: Tensor, sigmas: Tensor, entry: dict[str, Any], branch: str) -> Tensor:
        """ComfyUI's estimate of the clean latents."""
        entry = self._restored(entry)
        tokens = entry.pop("cross_attn")
        conds = {branch: self.comfy.sampler_helpers.convert_cond([[tokens, entry]])}
        conds = self.comfy.samplers.process_conds(
            self.base, noisy, conds, noisy.device, latent_image=torch.zeros_like(noisy), seed=0
        )
        self._check_guidance(conds[branch])
        return self.comfy.samplers.calc_cond_batch(self.base, [conds[branch]], noisy, sigmas, self._options)[0]

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
                f"model.embedded_guidance is {self.config.embedded_guidance}: this model takes none; leave it null"
            )

    def _make_resident(self) -> None:
        # Decoding may have moved it out.
        if self.device.type != "cpu":
            self.comfy.management.load_models_gpu([self.patcher])

    def plain(self, call: Callable[[], Tensor]) -> Tensor:
        self.comfy.management.in_training = False
        try:
            return call()
        finally:
            self.comfy.management.in_training = True

    # ------------------------------------------------------------------------------------------------ the rest

    def sigmas(self, steps: int, shift: float | None) -> list[float]:
        graph = self.config.graph
        if graph is not None and graph.sigmas is not None:
            return self._given(graph.sigmas, steps)
        scheduler = graph.scheduler if graph is not None else None
        if scheduler is None and self.predicts_flow and shift is not None:
            return sigma_schedule(steps, shift)
        own = self.comfy.samplers.calculate_sigmas(self.base.model_sampling, scheduler or "simple", steps)
        return self._given(own.tolist(), steps)

    def _given(self, values: list[float], steps: int) -> list[float]:
        """ComfyUI's noise levels in this pack's scale."""
        if len(values) != steps + 1:
            raise BadInput(f"there are {len(values)} sigmas, and {steps} steps take {steps + 1}: make them equal")
        if any(a <= b for a, b in zip(values[:-1], values[1:], strict=True)):
            raise BadInput(f"sigmas must fall from step to step, and they are {[round(v, 4) for v in values]}")
        if not self.predicts_flow:
            return [value / (1 + value**2) ** 0.5 for value in values]
        if values[0] > 1:
            raise BadInput(f"sigmas begin with {values[0]}, and those of a flow model are at most 1")
        return values

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        pixels = self.vae.decode(self.base.process_latent_out(latents)).to(latents.device, torch.float32)
        images = pixels.clamp(0, 1).movedim(-1, -3).contiguous()
        return images[:, 0] if images.ndim == 5 and images.shape[1] == 1 else images

    def lora_key(self, module_name: str) -> str:
        key = f"diffusion_model.{module_name}"
        if key not in self._keys:
            raise BadInput(f"lora.targets: ComfyUI has no LoRA key for {module_name!r} of this model")
        return key


def _apply(function: Any, arguments: dict[str, Any]) -> Tensor:
    """ComfyUI's way to wrap a call of the network."""
    if not torch.is_grad_enabled():
        return function(arguments["input"], arguments["timestep"], **arguments["c"])
    with OutOfPlace():
        return function(arguments["input"], arguments["timestep"], **arguments["c"])


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))


# ---------------------------------------------------------------------------------------- what fits, without loading


def predicts_flow(sampling: Any) -> bool:
    """Whether a `model_sampling` is that of a flow model; else it is one of noise levels x0 + s noise.

    Raises:
        BadInput: it is neither.
    """
    kinds = _modules().model_sampling
    names = [kind.__name__ for kind in type(sampling).__mro__]
    if getattr(sampling, "noise_scale", 1.0) != 1.0 or getattr(sampling, "zsnr", False):
        raise BadInput(f"the model's noise ({names[1]}) is scaled or has zero signal at its end: it cannot be trained")
    if isinstance(sampling, kinds.CONST) and "IMG_TO_IMG_FLOW" not in names and "ModelSamplingAV" not in names:
        return True
    if isinstance(sampling, kinds.EPS) and "IMG_TO_IMG" not in names:
        return False
    raise BadInput(f"the model's sampling ({', '.join(names[1:3])}) is neither that of flow nor of noise prediction")


def latent_shape(latent_format: Any, config: ModelConfig) -> tuple[int, ...]:
    """Shape of one image's or video's latents, by the model's own latent format.

    Raises:
        BadInput: a height, width or number of frames that it cannot take.
    """
    step, frame_step = latent_format.spacial_downscale_ratio, latent_format.temporal_downscale_ratio
    for name, size in (("height", config.height), ("width", config.width)):
        if size % step:
            raise BadInput(f"model.{name} is {size}: this model takes multiples of {step}")
    size = (config.height // step, config.width // step)
    if latent_format.latent_dimensions == 2:
        if config.frames != 1:
            raise BadInput(f"model.frames is {config.frames}: this model makes images; give 1")
        return (latent_format.latent_channels, *size)
    if latent_format.latent_dimensions != 3:
        raise BadInput("this model makes neither images nor videos")
    if (config.frames - 1) % frame_step:
        raise BadInput(f"model.frames is {config.frames}: this model takes 1 more than a multiple of {frame_step}")
    return (latent_format.latent_channels, (config.frames - 1) // frame_step + 1, *size)


def check_vae(vae: Any, latent_format: Any) -> None:
    """
    Raises:
        BadInput: the VAE belongs to another model.
    """
    if vae.latent_channels != latent_format.latent_channels:
        raise BadInput(
            f"the VAE has {vae.latent_channels} latent channels and the model {latent_format.latent_channels}: connect "
            "the VAE that belongs to it"
        )


def attention_layers(network: nn.Module) -> tuple[str, ...]:
    """Names of the linear layers of its attention, and of those that FLUX-like single blocks fuse it with.

    Raises:
        BadInput: there are none that a LoRA could be put on.
    """
    linear = [name for name, child in network.named_modules() if isinstance(child, nn.Linear)]
    found = tuple(name for name in linear if _is_attention(name.split(".")))
    if not found:
        raise BadInput("the model has no attention layers with plain, fp8 or bf16 weights, so no LoRA can be put on it")
    return found


def _is_attention(path: list[str]) -> bool:
    if any("mod" in part.lower() for part in path[-2:]):  # modulation beside the attention
        return False
    fused = path[-1] in ("linear1", "linear2") and any(part.startswith("single") for part in path)
    return fused or any("attn" in part or "attention" in part for part in path)


# ----------------------------------------------------------------------------------------------------- ComfyUI itself


def _import(folder: str, device: torch.device) -> SimpleNamespace:
    """ComfyUI's modules, from its folder where they are not loaded yet."""
    if "comfy" not in sys.modules:
        sys.path.insert(0, folder)
        import comfy.cli_args

        comfy.cli_args.args.cpu = device.type == "cpu"
    return _modules()


def _modules() -> SimpleNamespace:
    import comfy.clip_vision
    import comfy.lora
    import comfy.model_management
    import comfy.model_patcher
    import comfy.model_sampling
    import comfy.sampler_helpers
    import comfy.samplers
    import comfy.sd
    import comfy.utils

    names = ("clip_vision", "lora", "model_patcher", "model_sampling", "sampler_helpers", "samplers", "sd", "utils")
    return SimpleNamespace(
        management=comfy.model_management, **{name: sys.modules[f"comfy.{name}"] for name in names}
    )


def load_network(graph: GraphModel, comfy: SimpleNamespace) -> Any:
    """What core's loader gives for these files, with the graph's LoRAs in its weights and the graph's noise levels."""
    options = {} if graph.weights is None else {"dtype": getattr(torch, graph.weights)}
    try:
        if graph.loader == "diffusion_model":
            patcher = comfy.sd.load_diffusion_model(graph.file, model_options=options)
        else:
            patcher = comfy.sd.load_checkpoint_guess_config(
                graph.file, output_vae=False, output_clip=False, model_options=options
            )[0]
    except RuntimeError as error:
        raise BadInput(f"model.graph.file: ComfyUI cannot load {graph.file}: {error}") from error
    for lora in graph.loras:
        patcher = _with_lora(patcher, lora.file, lora.strength, comfy)
    if graph.loras:
        patcher.patch_model()  # into the weights for good: names change when the trained LoRA is added
        patcher = comfy.model_patcher.ModelPatcher(patcher.model, patcher.load_device, patcher.offload_device)
    if graph.sampling is not None:
        patcher.model.model_sampling = build_sampling(graph.sampling, patcher.model.model_config, comfy.model_sampling)
    return patcher


def _with_lora(patcher: Any, file: str, strength: float, comfy: SimpleNamespace) -> Any:
    weights = comfy.utils.load_torch_file(file, safe_load=True)
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, weights, strength, 0)
    return patched


def load_vae(graph: GraphModel, comfy: SimpleNamespace) -> Any:
    """What core's loader gives for the VAE's file."""
    try:
        if graph.vae_loader == "checkpoint":
            vae = comfy.sd.load_checkpoint_guess_config(graph.vae_file, output_clip=False, output_model=False)[2]
        else:
            weights, metadata = comfy.utils.load_torch_file(graph.vae_file, return_metadata=True)
            vae = comfy.sd.VAE(sd=weights, metadata=metadata)
        vae.throw_exception_if_invalid()
    except RuntimeError as error:
        raise BadInput(f"model.graph.vae_file: ComfyUI cannot load a VAE from {graph.vae_file}: {error}") from error
    return vae


_KINDS = {"flow": "ModelSamplingDiscreteFlow", "flux": "ModelSamplingFlux", "noise": "ModelSamplingDiscrete"}
_PREDICTS = {"flow": "CONST", "noise": "EPS", "v": "V_PREDICTION"}


def build_sampling(description: GraphSampling, model_config: Any, kinds: ModuleType) -> Any:
    """A `model_sampling` as core's own nodes make it."""
    kind, predicts = getattr(kinds, _KINDS[description.kind]), getattr(kinds, _PREDICTS[description.predicts])
    sampling = type("GraphSampling", (kind, predicts), {})(model_config)
    given = {"shift": description.shift, "multiplier": description.multiplier}
    given = {name: value for name, value in given.items() if value is not None}
    if given:
        sampling.set_parameters(**given)
    return sampling


def describe_sampling(sampling: Any) -> dict[str, Any]:
    """The description from which `build_sampling` makes an equal one.

    Raises:
        BadInput: it is of another kind, or has noise levels of its own.
    """
    kinds = _modules().model_sampling
    known = [name for name in _KINDS if any(c.__name__ == _KINDS[name] for c in type(sampling).__mro__[1:])]
    meant = [name for name in _PREDICTS if getattr(kinds, _PREDICTS[name]) in type(sampling).__mro__]
    if not known or not meant:
        names = ", ".join(kind.__name__ for kind in type(sampling).__mro__[1:3])
        raise BadInput(f"a node changed the model's sampling ({names}), which training cannot carry over")
    found = {"kind": known[0], "predicts": meant[-1]}  # v is also a kind of noise prediction
    for name in ("shift", "multiplier"):
        if hasattr(sampling, name):
            found[name] = float(getattr(sampling, name))
    return found
