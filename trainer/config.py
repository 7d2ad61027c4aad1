"""The run description: everything that decides what a run does, validated before anything is loaded."""

import copy
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .diffusion import kernels
from .diffusion.solvers import solver_names
from .utils.errors import BadInput
from .utils.fields import OneOf

PRESETS = Path(__file__).parent / "presets"

Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the description: unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


def _check_texts(texts: list[str]) -> None:
    if any(not text.strip() for text in texts):
        raise ValueError("texts holds an empty prompt")
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            raise ValueError(f"texts holds {text!r} more than once")
        seen.add(text)


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
    height: Annotated[int, Field(ge=8, multiple_of=8)] = Field(64, description="Image height in pixels.")
    width: Annotated[int, Field(ge=8, multiple_of=8)] = Field(64, description="Image width in pixels.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of the frozen base weights; the LoRA is always float32."
    )
    frames: Annotated[int, Field(ge=1)] = Field(
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
    graph: GraphModel | None = Field(
        None, description="The model of a ComfyUI graph, for family comfy; path and the types above are not used then."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )

    @model_validator(mode="after")
    def _one_door(self) -> "ModelConfig":
        if (self.family == "comfy") != (self.graph is not None):
            raise ValueError("family comfy goes with the section graph, and every other family without")
        if self.graph is not None and (self.network_file or self.quantization):
            raise ValueError("network_file and quantization are of diffusers folders; leave them out with graph")
        if self.sharded and (self.graph is not None or self.quantization):
            raise ValueError("sharded goes with diffusers folders alone, and without quantization")
        return self


class PromptsConfig(Section):
    """What the model is asked for while it learns."""

    texts: list[str] = Field([], description="Prompts written here, one image group each.")
    file: str | None = Field(
        None,
        description="Text file with a prompt per line; or JSONL or CSV with 'prompt', and where wanted 'category' and "
        "'image', a first frame or source image beside the file.",
    )
    shapes: int | None = Field(None, ge=1, description="Use up to this many prompts per task of the shapes world.")
    conditions: str | None = Field(
        None,
        description="File written by 'encode' that holds every prompt's conditions; no text encoder is loaded then.",
    )
    negative: str = Field("", description="Negative prompt, used where guidance_scale is not 1.")

    @model_validator(mode="after")
    def _one_source(self) -> "PromptsConfig":
        if sum([bool(self.texts), self.file is not None, self.shapes is not None]) != 1:
            raise ValueError("give prompts in exactly one of texts, file and shapes")
        _check_texts(self.texts)
        return self


class WindowConfig(Section):
    """The only steps that are stochastic and trained (MixGRPO)."""

    size: Positive = Field(2, description="Number of steps in the window.")
    position: Literal["fixed", "random", "moving"] = Field(
        "random", description="Where it lies: always at start, anywhere from start on, or moving on from start."
    )
    start: int = Field(0, ge=0, description="First step the window may begin at.")
    every: Positive = Field(25, description="Iterations a moving window stays at one place.")


class RolloutConfig(Section):
    """How the images of an iteration are sampled."""

    kernel: Annotated[str, OneOf(kernels.stochastic)] = Field(
        "dance", description="Transition kernel of the stochastic steps; ddim for Stable Diffusion 1.x, 2.x and SDXL."
    )
    eta: Annotated[float, Field(gt=0, le=kernels.LARGEST_ETA)] = Field(
        kernels.DANCE.default_eta, description="Strength of the added noise, in the kernel's own scale."
    )
    steps: Annotated[int, Field(ge=2, le=1000)] = Field(16, description="Sampling steps of a trajectory.")
    solver: Annotated[str, OneOf(solver_names)] = Field(
        "euler",
        description="Solver of the deterministic steps: euler, or 2m (DPM-Solver++ 2M), which is of second order and "
        "needs fewer steps.",
    )
    shift: Annotated[float, Field(gt=0, le=100)] | None = Field(
        3.0,
        description="Shift of a flow model's noise levels towards noise; null takes the levels of its own scheduler, "
        "which in FLUX and Qwen-Image depend on the resolution. ddim always takes those.",
    )
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = Field(
        1.0, description="Classifier-free guidance; 1 is off."
    )
    group_size: Annotated[int, Field(ge=2)] = Field(12, description="Images per prompt, G.")
    prompts_per_iteration: Positive = Field(8, description="Prompts per iteration over all processes, P.")
    shared_noise: bool = Field(True, description="Every image of a group starts from the same noise.")
    window: WindowConfig | None = Field(None, description="Limit stochastic steps to a window; null for all steps.")
    batch_size: Positive = Field(96, description="Images denoised at once.")

    @model_validator(mode="after")
    def _fits(self) -> "RolloutConfig":
        kernels.named(self.kernel).check_eta(self.eta)
        if self.window and self.window.start + self.window.size > self.steps - 1:
            raise ValueError(
                f"window of {self.window.size} from step {self.window.start} does not fit: "
                f"the first {self.steps - 1} of {self.steps} steps can be stochastic"
            )
        return self


class RewardConfig(Section):
    """One judge."""

    name: str = Field(description="A name of trainer.rewards.REWARDS.")
    weight: Annotated[float, Field(ge=-1000, le=1000)] = Field(1.0, description="Weight of its advantages.")
    threshold: float | None = Field(None, description="Turn the score into 1 above this value and 0 otherwise.")
    options: dict[str, Any] = Field({}, description="Options of this reward, such as the path of its weights.")


class ObjectiveConfig(Section):
    """How rewards become an update."""

    train_steps: Literal["random", "first", "all"] = Field(
        "random",
        description="Steps trained: a random or the first share of the stochastic ones, or all; all of a window.",
    )
    step_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.6, description="The share of stochastic steps trained."
    )
    clip_range: Annotated[float, Field(gt=0, lt=1)] = Field(1e-4, description="Clip range of the probability ratio.")
    advantage_clip: Annotated[float, Field(gt=0)] = Field(5.0, description="Largest absolute advantage.")
    combine: Literal["advantages", "sum", "gdpo"] = Field(
        "advantages", description="Mix rewards by normalised advantages, by raw sum, or by GDPO."
    )
    normalize: Literal["group", "global-std", "global"] = Field(
        "group", description="Baseline and spread: of the group, group mean with the spread of all, or of all (DDPO)."
    )
    spread_floor: Annotated[float, Field(gt=0)] = Field(1e-6, description="Groups with less spread are skipped.")
    best_of_n: int | None = Field(None, ge=2, multiple_of=2, description="Train on the best and worst of each group.")
    updates: Positive = Field(1, description="Optimizer steps per iteration.")
    ratio: Literal["plain", "guard"] = Field("plain", description="Probability ratio: plain or GRPO-Guard's.")
    kl_weight: Annotated[float, Field(ge=0)] = Field(0.0, description="Weight of the velocity distance to the base.")
    batch_size: Positive = Field(96, description="Predictions per forward and backward pass.")


class LoraConfig(Section):
    """The adapter that learns."""

    rank: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Rank of the LoRA.")
    alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="Scale of the LoRA is alpha / rank.")
    targets: list[str] | None = Field(None, min_length=1, description="Module name endings; null for the family's own.")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Moving average of the LoRA; 0 is off.")


class OptimizerConfig(Section):
    """AdamW."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(1e-4, description="Learning rate.")
    warmup: int = Field(0, ge=0, description="Optimizer steps of linear warm-up.")
    decay: bool = Field(
        False, description="Lower the learning rate in a straight line, to nothing after the last iteration."
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="Decay of AdamW's first and second moments."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-4, description="Weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradient norm is clipped to this.")


class EvaluationConfig(Section):
    """Deterministic sampling on fixed, held-out prompts and seeds."""

    texts: list[str] = Field([], description="Held-out prompts written here.")
    file: str | None = Field(None, description="File of held-out prompts, as for prompts.file.")
    shapes: int | None = Field(None, ge=1, description="Up to this many held-out prompts per task of the shapes world.")
    images_per_prompt: Annotated[int, Field(ge=1)] = Field(4, description="Images per held-out prompt.")
    every: int = Field(0, ge=0, description="Also evaluate every so many iterations; 0 only before and after.")
    steps: Annotated[int, Field(ge=1, le=1000)] | None = Field(None, description="Sampling steps; null as in rollout.")
    solver: Annotated[str, OneOf(solver_names)] = Field("euler", description="As rollout.solver, for every step.")
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="Guidance; null as in rollout."
    )
    seed: int = Field(1234, ge=0, description="Seed of the fixed noise.")
    rewards: list[RewardConfig] = Field([], description="Further judges that only watch.")

    @model_validator(mode="after")
    def _one_source(self) -> "EvaluationConfig":
        if sum([bool(self.texts), self.file is not None, self.shapes is not None]) > 1:
            raise ValueError("give evaluation prompts in at most one of texts, file and shapes")
        _check_texts(self.texts)
        if len({reward.name for reward in self.rewards}) != len(self.rewards):
            raise ValueError("a reward is named more than once")
        return self


class GuardConfig(Section):
    """When a run that goes wrong stops by itself, keeping its best LoRA."""

    reward_drop: Annotated[float, Field(gt=0)] = Field(
        3.0, description="Stop when the smoothed reward is this many standard deviations below its best."
    )
    ratio_deviation: Annotated[float, Field(gt=0)] = Field(
        0.5, description="Stop when the mean |ratio - 1| of an iteration is above this."
    )
    gradient_factor: Annotated[float, Field(gt=1)] = Field(
        1000.0, description="Stop when the gradient norm is this many times its running median."
    )
    patience: Positive = Field(5, description="Iterations in a row a sign must last.")
    max_dropped: Positive = Field(100, description="Stop after so many samples without a finite reward.")
    max_bad_updates: Positive = Field(5, description="Stop after so many updates without a finite loss.")


class RuntimeConfig(Section):
    """How long, where, and how often things are saved."""

    iterations: Positive = Field(100, description="Iterations of the whole run.")
    seed: int = Field(0, ge=0, description="Seed of everything random.")
    device: Literal["auto", "cpu"] = Field("auto", description="auto uses a GPU where there is one.")
    checkpoint_every: Positive = Field(1, description="Iterations between checkpoints.")
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(2, description="Newest checkpoints kept.")
    samples_every: int = Field(10, ge=0, description="Iterations between sample grids of the rollout; 0 is never.")
    guard: GuardConfig = GuardConfig()


class RunConfig(Section):
    """The complete description of a run."""

    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()
    rewards: Annotated[list[RewardConfig], Field(min_length=1)]
    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @field_validator("rewards")
    @classmethod
    def _distinct(cls, rewards: list[RewardConfig]) -> list[RewardConfig]:
        if len({reward.name for reward in rewards}) != len(rewards):
            raise ValueError("a reward is named more than once")
        return rewards

    @model_validator(mode="after")
    def _fits(self) -> "RunConfig":
        rollout, objective = self.rollout, self.objective
        if not any(reward.weight for reward in self.rewards):
            raise ValueError("every reward has weight 0, so there is nothing to learn")
        trained = {reward.name: reward for reward in self.rewards}
        for judge in self.evaluation.rewards:
            if judge.name in trained and judge != trained[judge.name]:
                raise ValueError(f"evaluation.rewards names {judge.name!r}, which is trained on with other settings")
        if objective.best_of_n and objective.best_of_n > rollout.group_size:
            raise ValueError(
                f"objective.best_of_n {objective.best_of_n} is above rollout.group_size {rollout.group_size}"
            )
        members = objective.best_of_n or rollout.group_size
        if rollout.prompts_per_iteration % objective.updates and members % objective.updates:
            raise ValueError(
                f"objective.updates {objective.updates} divides neither rollout.prompts_per_iteration "
                f"{rollout.prompts_per_iteration} nor the {members} trained images of a group"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# ------------------------------------------------------------------------------------------------------- reading them


def read_config(path: Path, overrides: list[str] = ()) -> RunConfig:
    """Read a run description from YAML or JSON.

    Args:
        overrides: settings such as `rollout.eta=0.5`, applied in order.

    Raises:
        BadInput: naming the field, the value and what is accepted.
    """
    return parse_config(read_mapping(path), overrides)


def read_mapping(path: Path) -> dict[str, Any]:
    """The file's content as a mapping, not validated yet."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"run description {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"run description {path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise BadInput(
            f"run description {path} must be a mapping with the sections {', '.join(RunConfig.model_fields)}"
        )
    return data


def parse_config(data: dict[str, Any], overrides: list[str] = ()) -> RunConfig:
    """Validate a description given as plain data.

    Raises:
        BadInput: the first few faults, one sentence each.
    """
    data = copy.deepcopy(data)
    for override in overrides:
        _override(data, override)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise BadInput(describe(error)) from error


def settings(overrides: list[str]) -> dict[str, Any]:
    """Settings such as `dtype=float16` as plain data, applied in order.

    Raises:
        BadInput: one is not of that form.
    """
    data: dict[str, Any] = {}
    for override in overrides:
        _override(data, override)
    return data


def preset(name: str) -> dict[str, Any]:
    """A preset's plain data.

    Raises:
        BadInput: no such preset.
    """
    if name not in preset_names():
        raise BadInput(f"preset {name!r} is unknown; choose one of {', '.join(preset_names())}")
    return read_mapping(PRESETS / f"{name}.yaml")


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise BadInput(f"setting {override!r} is not of the form section.field=value")
    *parents, last = key.strip().split(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"setting {key}: {text!r} is not a YAML value") from error
    place = data
    for parent in parents:
        if isinstance(place, dict) and place.get(parent) is None:
            place[parent] = {}
        place = place[parent if isinstance(place, dict) else _index(place, parent, key)]
        if not isinstance(place, dict | list):
            raise BadInput(f"setting {key}: {parent} is not a section")
    place[last if isinstance(place, dict) else _index(place, last, key)] = value


def _index(place: list, text: str, key: str) -> int:
    if not text.isdigit() or int(text) >= len(place):
        raise BadInput(f"setting {key}: {text} is not an index below {len(place)}")
    return int(text)


def describe(error: ValidationError) -> str:
    """Pydantic's findings as sentences that name the field, the value and what is accepted."""
    sentences = []
    for fault in error.errors()[:5]:
        field = ".".join(str(part) for part in fault["loc"]) or "run description"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            sentences.append(f"{field} is not a setting; check the spelling (docs/configuration.md lists them all)")
        elif fault["type"] == "missing":
            sentences.append(f"{field} is missing")
        elif fault["type"] == "value_error":
            sentences.append(f"{field}: {message}")
        else:
            sentences.append(f"{field} is {fault['input']!r}: {message[0].lower()}{message[1:]}")
    return "; ".join(sentences)
