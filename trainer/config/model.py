"""The section `model` of a run description: the base model, from a diffusers folder or from a ComfyUI graph."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..utils.section import Section


class GraphSampling(Section):
    """Noise levels that a node of the graph gave the model (ModelSamplingSD3 and its like)."""

    kind: Literal["flow", "flux", "noise"] = Field(
        "flow", description="ComfyUI's ModelSamplingDiscreteFlow, ModelSamplingFlux or ModelSamplingDiscrete."
    )
    predicts: Literal["flow", "noise", "v"] = Field("flow", description="What the network's output means.")
    shift: Annotated[float, Field(gt=0, le=1000)] | None = Field(None, description="Shift towards noise.")
    multiplier: Annotated[float, Field(gt=0, le=100_000)] | None = Field(
        None, description="The timestep the network is told is sigma times this."
    )
    zsnr: bool = Field(False, description="Of kind noise: no signal is left at the highest level (zero terminal SNR).")


class GraphLora(Section):
    """A LoRA that the graph applied to the base model."""

    file: str = Field(description="Its .safetensors file.")
    strength: Annotated[float, Field(ge=-100, le=100)] = Field(1.0, description="As in its loader.")


class GraphModel(Section):
    """A model as ComfyUI loads it: which of its loaders, and which files."""

    folder: str = Field(description="ComfyUI's own folder, which holds main.py.")
    loader: Literal["diffusion_model", "checkpoint"] = Field(
        "diffusion_model", description="Load Diffusion Model or Load Checkpoint."
    )
    file: str = Field(description="File of the network.")
    weights: Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"] | None = Field(
        None, description="Type of the frozen weights; null leaves it to ComfyUI."
    )
    vae_loader: Literal["vae", "checkpoint"] = Field("vae", description="Load VAE or Load Checkpoint.")
    vae_file: str = Field(description="File of the VAE.")
    loras: list[GraphLora] = Field([], description="LoRAs applied before training; they stay in the base.")
    sampling: GraphSampling | None = Field(None, description="Noise levels set by a node; null for the model's own.")
    scheduler: str | None = Field(
        None, description="ComfyUI's scheduler, such as simple; null goes by rollout.shift where it is a number."
    )
    sigmas: list[Annotated[float, Field(ge=0)]] | None = Field(
        None, min_length=3, description="Noise levels in ComfyUI's scale, one more than rollout.steps."
    )
    reserve_gb: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.0,
        description="GPU memory in GB that weights leave free, for activations and rewards, beyond what ComfyUI keeps "
        "free to sample an image. Weights that do not fit stay in RAM.",
    )


class ModelConfig(Section):
    """The base model."""

    family: str = Field("sd3", description="Model family, a name of trainer.models.FAMILIES.")
    path: str = Field(
        "embedded", description="Folder of the model, or 'embedded' for the model of shapes in this pack."
    )
    height: Annotated[int, Field(ge=8, le=16384, multiple_of=8)] = Field(64, description="Image height in pixels.")
    width: Annotated[int, Field(ge=8, le=16384, multiple_of=8)] = Field(64, description="Image width in pixels.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of the frozen base weights; the LoRA is always float32."
    )
    frames: Annotated[int, Field(ge=1, le=10_000)] = Field(
        1, description="Frames of a video; 1 is an image. Video families take 1 more than a multiple of 4."
    )
    fps: Annotated[float, Field(gt=0, le=240)] = Field(16.0, description="Frames per second of saved videos.")
    embedded_guidance: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None,
        description="Guidance a distilled model takes as an input (FLUX, HunyuanVideo); null is the family's own.",
    )
    network_file: str | None = Field(
        None, description="Single .safetensors file of the transformer or UNet, in place of the folder's own."
    )
    quantization: Literal["int8", "nf4"] | None = Field(
        None, description="Keep the frozen base in 8 or 4 bits, through bitsandbytes."
    )
    sharded: bool = Field(
        False,
        description="Divide the frozen base over all processes (FSDP2), for models that do not fit one GPU.",
    )
    vae_dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32",
        description="Type the VAE decodes in; auto is bfloat16 where the device computes in it fast, else float32.",
    )
    decode_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None,
        description="Images or videos the VAE decodes at once; null takes as many as make a megapixel, 32 at most. "
        "A 512 x 512 image takes 0.75 GiB in float32.",
    )
    graph: GraphModel | None = Field(
        None, description="The model of a ComfyUI graph, for family comfy; path and the types above are not used then."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )

    @model_validator(mode="after")
    def _one_door(self) -> "ModelConfig":
        if (self.family == "comfy") != (self.graph is not None):
            raise ValueError("model.graph is required for family 'comfy' and not allowed for other families")
        if self.graph is not None and (self.network_file or self.quantization):
            raise ValueError("network_file and quantization are of diffusers folders; leave them out with graph")
        if self.sharded and (self.graph is not None or self.quantization):
            raise ValueError("sharded goes with diffusers folders alone, and without quantization")
        return self
