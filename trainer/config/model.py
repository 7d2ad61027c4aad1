"""The section `model` of a run description: the base model, from a diffusers folder or from a ComfyUI graph."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..utils.section import Section


class GraphSampling(Section):
    """Model sampling set by a node of the graph, such as ModelSamplingSD3."""

    kind: Literal["flow", "flux", "noise"] = Field(
        "flow", description="ComfyUI's ModelSamplingDiscreteFlow, ModelSamplingFlux or ModelSamplingDiscrete."
    )
    predicts: Literal["flow", "noise", "v"] = Field("flow", description="Prediction type of the network.")
    shift: Annotated[float, Field(gt=0, le=1000)] | None = Field(None, description="Timestep shift.")
    multiplier: Annotated[float, Field(gt=0, le=100_000)] | None = Field(
        None, description="Factor from sigma to the timestep that the network gets."
    )
    zsnr: bool = Field(False, description="Of kind noise: no signal is left at the highest level (zero terminal SNR).")


class GraphLora(Section):
    """A LoRA that the graph applies to the base model."""

    file: str = Field(description="LoRA file (.safetensors).")
    strength: Annotated[float, Field(ge=-100, le=100)] = Field(1.0, description="Strength of the LoRA.")


HIGH, LOW, BOTH = "high", "low", "both"
_ROUNDED = 1e-6
"""Noise levels are rounded to float32, so one this far below the boundary lies on it."""


def is_low_noise(sigma: Any, boundary: float) -> Any:
    """Whether noise levels, a number or a tensor of them, are below the boundary between two networks."""
    return sigma < boundary - _ROUNDED


class GraphExpert(Section):
    """The network for low noise of a model that has one for high noise and one for low noise (Wan 2.2)."""

    loader: Literal["diffusion_model", "checkpoint"] = Field(
        "diffusion_model", description="Loader of the network: Load Diffusion Model or Load Checkpoint."
    )
    file: str = Field(description="File that the loader loads.")
    weights: Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"] | None = Field(
        None, description="dtype of the frozen weights; null leaves the choice to ComfyUI."
    )
    loras: list[GraphLora] = Field([], description="LoRAs merged into this network before training.")
    boundary: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.875,
        description="Noise level (sigma) from which on the network for high noise predicts; below it, this one. Wan "
        "2.2 was made with 0.875 for text to video and 0.9 for image to video.",
    )
    trained: Literal["both", "high", "low"] = Field(
        "both",
        description="Which of the two networks gets a LoRA. A network is trained at the steps at which it predicts; "
        "the other one is used as it is.",
    )

    def is_low(self, sigma: Any) -> Any:
        """Whether the network for low noise predicts at a noise level, a number or a tensor of them."""
        return is_low_noise(sigma, self.boundary)

    def is_trained_at(self, sigma: float) -> bool:
        return self.trained == BOTH or self.is_low(sigma) == (self.trained == LOW)


class GraphModel(Section):
    """A model of a ComfyUI graph: its loaders and files. Written by the node GRPO Base Model."""

    folder: str = Field(description="ComfyUI's folder (with main.py).")
    loader: Literal["diffusion_model", "checkpoint"] = Field(
        "diffusion_model", description="Loader of the network: Load Diffusion Model or Load Checkpoint."
    )
    file: str = Field(description="File that the loader loads.")
    weights: Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"] | None = Field(
        None, description="dtype of the frozen weights; null leaves the choice to ComfyUI."
    )
    vae_loader: Literal["vae", "checkpoint"] = Field("vae", description="Load VAE or Load Checkpoint.")
    vae_file: str = Field(description="File of the VAE.")
    loras: list[GraphLora] = Field([], description="LoRAs merged into the base model before training.")
    sampling: GraphSampling | None = Field(None, description="Model sampling; null for the model's default.")
    scheduler: str | None = Field(
        None, description="ComfyUI scheduler, such as simple; null uses rollout.shift, if it is set."
    )
    sigmas: list[Annotated[float, Field(ge=0)]] | None = Field(
        None, min_length=3, description="Noise levels in ComfyUI's scale; their number is rollout.steps + 1."
    )
    low_noise: GraphExpert | None = Field(
        None,
        description="The network for low noise, if `file` is the one for high noise (Wan 2.2); null for other models.",
    )
    reserve_gb: Annotated[float, Field(ge=0, le=1000)] | None = Field(
        None,
        description="GPU memory in GB to keep free for the LoRA and for activations, in addition to what ComfyUI keeps "
        "free for sampling; null for an estimate. Weights that do not fit stay in RAM.",
    )

    @property
    def trained_files(self) -> list[str]:
        """The files of the networks that get a LoRA."""
        if self.low_noise is None:
            return [self.file]
        files = {HIGH: self.file, LOW: self.low_noise.file}
        return [file for network, file in files.items() if self.low_noise.trained in (BOTH, network)]


class ModelConfig(Section):
    """The base model."""

    family: str = Field("sd3", description="Model family, a name of trainer.models.FAMILIES.")
    path: str = Field(
        "embedded", description="Diffusers folder, or 'embedded' for the small model that comes with this pack."
    )
    height: Annotated[int, Field(ge=8, le=16384, multiple_of=8)] = Field(64, description="Image height in pixels.")
    width: Annotated[int, Field(ge=8, le=16384, multiple_of=8)] = Field(64, description="Image width in pixels.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="dtype of the frozen base model. The LoRA computes in this dtype, from float32 weights.",
    )
    frames: Annotated[int, Field(ge=1, le=10_000)] = Field(
        1, description="Frames of a video; 1 for images. Most video models need a multiple of 4, plus 1."
    )
    fps: Annotated[float, Field(gt=0, le=240)] = Field(16.0, description="Frames per second of saved videos.")
    embedded_guidance: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None,
        description="Guidance input of guidance-distilled models (FLUX, HunyuanVideo); null for the family's default.",
    )
    network_file: str | None = Field(
        None, description="A .safetensors file of the transformer or UNet, used instead of the folder's weights."
    )
    quantization: Literal["int8", "nf4"] | None = Field(
        None, description="Quantize the frozen base model to 8 or 4 bits with bitsandbytes."
    )
    sharded: bool = Field(
        False,
        description="Shard the frozen base model over all processes (FSDP2), if it does not fit on one GPU.",
    )
    vae_dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32",
        description="dtype of the VAE; auto is bfloat16 if the device computes fast in it, else float32.",
    )
    decode_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None,
        description="Batch size of VAE decoding; null uses as many images as make a megapixel, at most 32. A 512 x 512 "
        "image needs 0.75 GiB in float32.",
    )
    graph: GraphModel | None = Field(
        None, description="The model of a ComfyUI graph, for family comfy; path and dtypes are ignored then."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )

    @model_validator(mode="after")
    def _graph_or_folder(self) -> "ModelConfig":
        if (self.family == "comfy") != (self.graph is not None):
            raise ValueError("model.graph is required for family 'comfy' and not allowed for other families")
        if self.graph is not None and (self.network_file or self.quantization):
            raise ValueError("network_file and quantization need a diffusers folder: remove them, or remove graph")
        if self.sharded and (self.graph is not None or self.quantization):
            raise ValueError(
                "sharded needs a diffusers folder and no quantization: set sharded to false, or remove graph or "
                "quantization"
            )
        return self
