"""The run description: everything that decides what a run does, validated before anything is loaded."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ..diffusion import kernels
from ..diffusion.solvers import solver_names
from ..objectives import DEFAULT, OBJECTIVES, ObjectiveSection, objective_class
from ..objectives.advantage import AdvantageConfig
from ..prompts.text import check_prompts, check_text, clean
from ..utils.documents import dump_yaml
from ..utils.fields import OneOf
from ..utils.section import Positive, Section
from .model import ModelConfig


class PromptsConfig(Section):
    """The training prompts."""

    texts: list[str] = Field([], description="Training prompts as a list.")
    file: str | None = Field(
        None,
        description="Text file with one prompt per line (lines that begin with # are comments); or a CSV, JSONL or "
        "JSON file with 'prompt' and, optionally, 'category' and 'image' (path of a first frame or source image).",
    )
    shapes: int | None = Field(
        None, ge=1, le=1_000_000, description="Use up to this many prompts per task of the embedded model."
    )
    conditions: str | None = Field(
        None,
        description="File with all encoded prompts, written by 'encode', so that no text encoder is loaded.",
    )
    negative: str = Field("", description="Negative prompt, used if guidance_scale is not 1.")
    weight_syntax: bool = Field(
        False,
        description="Prompts contain ComfyUI's prompt weights, such as (red:1.3), which the CLIP has applied; reward "
        "models get the prompts without them.",
    )

    digests: list[str] = Field(
        [],
        description="What tells texts apart that each have conditions with images of their own, one for each text. "
        "Written by GRPO Train LoRA.",
    )

    _clean_texts = field_validator("texts")(lambda texts: [clean(text) for text in texts])
    _clean_negative = field_validator("negative")(clean)

    @model_validator(mode="after")
    def _one_source(self) -> "PromptsConfig":
        if sum(self._sources()) > 1:
            raise ValueError("give prompts in exactly one of texts, file and shapes")
        check_prompts(self.texts, "texts", self.digests)
        check_text(self.negative, "negative")
        return self

    def _sources(self) -> list[bool]:
        return [bool(self.texts), self.file is not None, self.shapes is not None]

    @property
    def has_source(self) -> bool:
        """Whether prompts are given here; an objective with data of its own needs none."""
        return any(self._sources())


class WindowConfig(Section):
    """A window of sampling steps, the only ones that are stochastic and trained (MixGRPO)."""

    size: Positive = Field(2, description="Number of steps in the window.")
    position: Literal["fixed", "random", "moving", "per-prompt"] = Field(
        "random",
        description="Where the window begins. fixed: at start. random: at a step from start on, drawn in each "
        "iteration. moving: at start, and one step later whenever `every` iterations have passed. per-prompt: as "
        "random, but drawn for each prompt (Flash-GRPO).",
    )
    start: int = Field(0, ge=0, le=1000, description="First step at which the window may begin.")
    every: Positive = Field(25, description="Iterations before a moving window moves by one step.")


class RolloutConfig(Section):
    """How the images of an iteration are sampled."""

    kernel: Annotated[str, OneOf(kernels.stochastic)] = Field(
        "dance", description="Transition kernel of the stochastic steps; ddim for Stable Diffusion 1.x, 2.x and SDXL."
    )
    eta: Annotated[float, Field(gt=0, le=kernels.LARGEST_ETA)] = Field(
        kernels.DANCE.default_eta, description="Strength of the added noise; its scale depends on the kernel."
    )
    steps: Annotated[int, Field(ge=2, le=1000)] = Field(16, description="Sampling steps of a trajectory.")
    solver: Annotated[str, OneOf(solver_names)] = Field(
        "euler",
        description="Solver of the deterministic steps: euler, or 2m (DPM-Solver++ 2M), a second-order solver "
        "that needs fewer steps.",
    )
    shift: Annotated[float, Field(gt=0, le=100)] | None = Field(
        3.0,
        description="Timestep shift of a flow model; null uses the noise levels of the model's scheduler, which for "
        "FLUX and Qwen-Image depend on the resolution. The kernel ddim always uses those.",
    )
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = Field(
        1.0, description="Scale of classifier-free guidance; 1 is off."
    )
    guidance_steps: tuple[Annotated[int, Field(ge=0, le=1000)], Annotated[int, Field(ge=1, le=1000)]] | None = Field(
        None,
        description="[first, end]: only the sampling steps from first to end - 1 use guidance; the others take half "
        "the time. null for all steps. Evaluations with another number of steps use the same share of them. Trained "
        "predictions always use guidance, so for the objective grpo the range must include every stochastic step.",
    )
    group_size: Annotated[int, Field(ge=2, le=10_000)] = Field(12, description="Number of images per prompt (G).")
    prompts_per_iteration: Positive = Field(8, description="Prompts per iteration (P), over all processes.")
    shared_noise: bool = Field(True, description="Start all images of a group from the same noise.")
    window: WindowConfig | None = Field(None, description="Window of stochastic steps; null for all but the last.")
    batch_size: Positive = Field(96, description="Batch size of sampling in each process.")
    merge_lora: bool = Field(
        False,
        description="Sample and evaluate with the LoRA merged into the base model's weights: faster, equal up to "
        "rounding, and the weights of these layers are held twice. Requires a float32 base model.",
    )

    @model_validator(mode="after")
    def _fits(self) -> "RolloutConfig":
        kernels.named(self.kernel).check_eta(self.eta)
        if self.window and self.window.start + self.window.size > self.steps - 1:
            raise ValueError(
                f"window of {self.window.size} from step {self.window.start} does not fit: "
                f"only the first {self.steps - 1} of {self.steps} steps can be stochastic; lower window.start or size"
            )
        if self.guidance_steps is not None:
            first, end = self.guidance_steps
            if not first < end <= self.steps:
                raise ValueError(
                    f"guidance_steps [{first}, {end}] must be two increasing numbers, at most {self.steps}"
                )
            if self.guidance_scale == 1:
                raise ValueError("guidance_steps needs guidance: set guidance_scale to another number than 1")
        return self

    def guided(self, steps: int) -> list[bool] | None:
        """Which sampling steps use guidance, in a schedule of `steps` steps; None for all."""
        if self.guidance_steps is None:
            return None
        first, end = (step * steps for step in self.guidance_steps)
        return [first <= i * self.steps < end for i in range(steps)]

    def check_stochastic_steps_are_guided(self) -> None:
        """Raise ValueError if a step that can be stochastic is sampled without guidance."""
        if self.guidance_steps is None:
            return
        start, end = (self.window.start if self.window else 0), self.steps - 1
        if self.window and self.window.position == "fixed":
            end = start + self.window.size
        first, last = self.guidance_steps
        if not first <= start <= end <= last:
            raise ValueError(
                f"rollout.guidance_steps [{first}, {last}] must include all steps that can be stochastic, which are "
                f"[{start}, {end}]: widen it, or set rollout.window to a fixed one inside it"
            )


class RewardConfig(Section):
    """A reward."""

    name: str = Field(description="Name of the reward (docs/rewards.md lists them).")
    weight: Annotated[float, Field(ge=-1000, le=1000)] = Field(1.0, description="Weight of this reward.")
    threshold: float | None = Field(None, description="Replace the score by 1 if it is above this value, else 0.")
    options: dict[str, Any] = Field({}, description="Options of this reward, such as the path of its weights.")


class LoraConfig(Section):
    """The LoRA that is trained."""

    rank: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Rank of the LoRA.")
    alpha: Annotated[float, Field(gt=0, le=100_000)] = Field(32.0, description="Scale of the LoRA is alpha / rank.")
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="Endings of the names of the linear and convolution layers that get a LoRA; null for the family's "
        "attention layers.",
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Moving average of the LoRA; 0 is off.")
    start_from: str | None = Field(
        None,
        description="LoRA file to continue training from (.safetensors, with ComfyUI's key names for this model); its "
        "rank must not exceed lora.rank.",
    )


class OptimizerConfig(Section):
    """The AdamW optimizer."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(1e-4, description="Learning rate.")
    warmup: int = Field(0, ge=0, le=1_000_000, description="Optimizer steps of linear warm-up.")
    schedule: Literal["constant", "linear"] = Field(
        "constant",
        description="Learning rate schedule: constant, or linear decay to 0 at the end of the run. If the run is "
        "extended, it decays to 0 at the new end.",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW's betas."
    )
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = Field(
        1e-4,
        description="Weight decay; learning_rate times weight_decay must be below 1.",
    )
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6)] = Field(1.0, description="Gradients are clipped to this norm.")

    @model_validator(mode="after")
    def _shrinks(self) -> "OptimizerConfig":
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                f"weight_decay {self.weight_decay:g} times learning_rate {self.learning_rate:g} must be below 1: "
                "lower one of them"
            )
        return self


class EvaluationConfig(Section):
    """Evaluation on held-out prompts, with deterministic sampling and fixed seeds."""

    texts: list[str] = Field([], description="Held-out prompts as a list.")
    file: str | None = Field(None, description="File with held-out prompts; see prompts.file.")
    shapes: int | None = Field(
        None, ge=1, le=1_000_000, description="Use up to this many held-out prompts per task of the embedded model."
    )
    images_per_prompt: Annotated[int, Field(ge=1, le=10_000)] = Field(4, description="Images per held-out prompt.")
    every: int = Field(
        0, ge=0, le=1_000_000, description="Iterations between evaluations; 0 evaluates only before and after training."
    )
    steps: Annotated[int, Field(ge=1, le=1000)] | None = Field(None, description="Steps; null for rollout.steps.")
    solver: Annotated[str, OneOf(solver_names)] = Field("euler", description="Solver of all steps; see rollout.solver.")
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="Guidance scale; null for rollout.guidance_scale."
    )
    seed: int = Field(1234, ge=0, le=2**63 - 1, description="Seed of the initial noise.")
    rewards: list[RewardConfig] = Field([], description="Further rewards, which are evaluated but not trained.")
    digests: list[str] = Field([], description="As prompts.digests.")

    _clean_texts = field_validator("texts")(lambda texts: [clean(text) for text in texts])

    @model_validator(mode="after")
    def _one_source(self) -> "EvaluationConfig":
        if sum([bool(self.texts), self.file is not None, self.shapes is not None]) > 1:
            raise ValueError("give evaluation prompts in at most one of texts, file and shapes")
        check_prompts(self.texts, "texts", self.digests)
        if len({reward.name for reward in self.rewards}) != len(self.rewards):
            raise ValueError("a reward is named more than once")
        return self


class WatchdogConfig(Section):
    """Conditions under which a run stops by itself and keeps its best LoRA."""

    reward_drop: Annotated[float, Field(gt=0, le=1e9)] = Field(
        3.0, description="Stop when the smoothed reward is this many standard deviations below its best."
    )
    gradient_factor: Annotated[float, Field(gt=1, le=1e12)] = Field(
        1000.0, description="Stop when the gradient norm is this many times its running median."
    )
    patience: Positive = Field(5, description="Consecutive iterations with such a sign before the run stops.")
    max_dropped: Positive = Field(100, description="Stop after this many samples without a finite reward.")
    max_bad_updates: Positive = Field(5, description="Stop after this many updates without finite loss.")
    max_idle: Positive = Field(
        10,
        description="Stop after this many consecutive iterations without training, because the images of every group "
        "had equal rewards, or no reward was finite.",
    )
    diversity_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.5,
        description="Warn when the diversity of the images of a held-out prompt (RMS difference of thumbnails) falls "
        "below this fraction of the first evaluation's; 0 never warns. Requires evaluation.images_per_prompt of 2 or "
        "more.",
    )


class RuntimeConfig(Section):
    """Length of the run, device, checkpoints and logging."""

    iterations: Positive = Field(100, description="Total number of iterations; raise it later to extend the run.")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of all random numbers.")
    device: Literal["auto", "cpu"] = Field("auto", description="auto uses a GPU if there is one.")
    tf32: bool = Field(
        True,
        description="On an NVIDIA GPU, multiply float32 matrices in TF32, which is faster and rounds factors to 10 "
        "bits; false multiplies in full float32. No effect on a CPU and on other dtypes.",
    )
    compile: bool = Field(
        False,
        description="Compile the network's repeated blocks with torch.compile, which takes minutes at the start and "
        "again for each new shape; what it gains on a GPU is not measured. For diffusers folders only. Requires Triton "
        "on a GPU, a C++ compiler and float32 on a CPU, and weights that are neither quantized nor sharded.",
    )
    checkpoint_every: Positive = Field(1, description="Iterations between checkpoints.")
    keep_checkpoints: Annotated[int, Field(ge=2, le=1_000_000)] = Field(2, description="Checkpoints to keep.")
    samples_every: int = Field(
        10, ge=0, le=1_000_000, description="Iterations between sample grids of the rollout; 0 for none."
    )
    watchdog: WatchdogConfig = WatchdogConfig()
    trackers: list[str] = Field(
        [],
        description="Experiment trackers for scalars, samples and the description: tensorboard, wandb. Both write into "
        "the run directory.",
    )
    wandb_mode: Literal["offline", "online"] = Field(
        "offline", description="Whether the tracker wandb sends its data to the wandb server (online) or not."
    )


class RunConfig(Section):
    """The complete description of a run."""

    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: list[RewardConfig] = []
    advantage: AdvantageConfig = AdvantageConfig()
    objective: ObjectiveSection = OBJECTIVES[DEFAULT].Options()
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
        objective = objective_class(self.objective)
        if not self.prompts.has_source and objective.needs_rollout:
            raise ValueError("prompts is empty: give training prompts in exactly one of texts, file and shapes")
        if not self.rewards and objective.needs_rewards:
            raise ValueError("rewards is empty, so there is nothing to learn: name at least one reward")
        if self.rewards and not any(reward.weight for reward in self.rewards):
            raise ValueError("every reward has weight 0, so there is nothing to learn")
        trained = {reward.name: reward for reward in self.rewards}
        for reward in self.evaluation.rewards:
            if reward.name in trained and reward != trained[reward.name]:
                raise ValueError(f"evaluation.rewards names {reward.name!r}, which is trained on with other settings")
        best, group = self.advantage.best_of_n, self.rollout.group_size
        if best and best > group:
            raise ValueError(f"advantage.best_of_n {best} is above rollout.group_size {group}")
        objective.check_config(self)
        return self

    def to_yaml(self) -> str:
        return dump_yaml(self.model_dump(mode="json"))
