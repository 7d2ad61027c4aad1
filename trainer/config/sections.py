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
    """What the model is asked for while it learns."""

    texts: list[str] = Field([], description="Prompts written here, one image group each.")
    file: str | None = Field(
        None,
        description="Text file with a prompt per line, where lines that begin with # are comments; or CSV, JSONL or "
        "JSON with 'prompt', and where wanted 'category' and 'image', a first frame or source image beside the file.",
    )
    shapes: int | None = Field(
        None, ge=1, le=1_000_000, description="Use up to this many prompts per task of the shapes world."
    )
    conditions: str | None = Field(
        None,
        description="File written by 'encode' that holds every prompt's conditions; no text encoder is loaded then.",
    )
    negative: str = Field("", description="Negative prompt, used where guidance_scale is not 1.")
    weight_syntax: bool = Field(
        False,
        description="Prompts carry ComfyUI's weights, such as (red:1.3), which the CLIP that wrote conditions has "
        "applied; reward models get the words without them.",
    )

    _clean_texts = field_validator("texts")(lambda texts: [clean(text) for text in texts])
    _clean_negative = field_validator("negative")(clean)

    @model_validator(mode="after")
    def _one_source(self) -> "PromptsConfig":
        if sum(self._sources()) > 1:
            raise ValueError("give prompts in exactly one of texts, file and shapes")
        check_prompts(self.texts, "texts")
        check_text(self.negative, "negative")
        return self

    def _sources(self) -> list[bool]:
        return [bool(self.texts), self.file is not None, self.shapes is not None]

    @property
    def has_source(self) -> bool:
        """Whether prompts are given here; an objective with data of its own needs none."""
        return any(self._sources())


class WindowConfig(Section):
    """The only steps that are stochastic and trained (MixGRPO)."""

    size: Positive = Field(2, description="Number of steps in the window.")
    position: Literal["fixed", "random", "moving"] = Field(
        "random", description="Where it lies: always at start, anywhere from start on, or moving on from start."
    )
    start: int = Field(0, ge=0, le=1000, description="First step the window may begin at.")
    every: Positive = Field(25, description="Iterations a moving window stays at one position.")


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
    group_size: Annotated[int, Field(ge=2, le=10_000)] = Field(12, description="Images per prompt, G.")
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
    """One reward model."""

    name: str = Field(description="Name of the reward model, as docs/rewards.md lists them.")
    weight: Annotated[float, Field(ge=-1000, le=1000)] = Field(1.0, description="Weight of its advantages.")
    threshold: float | None = Field(None, description="Turn the score into 1 above this value and 0 otherwise.")
    options: dict[str, Any] = Field({}, description="Options of this reward, such as the path of its weights.")


class LoraConfig(Section):
    """The adapter that learns."""

    rank: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Rank of the LoRA.")
    alpha: Annotated[float, Field(gt=0, le=100_000)] = Field(32.0, description="Scale of the LoRA is alpha / rank.")
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="Endings of the names of linear and convolution layers; null for the family's own, its attention.",
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Moving average of the LoRA; 0 is off.")
    start_from: str | None = Field(
        None,
        description="LoRA file (.safetensors, under ComfyUI's key names for this model) that training starts from; its "
        "rank must not exceed lora.rank.",
    )


class OptimizerConfig(Section):
    """AdamW."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(1e-4, description="Learning rate.")
    warmup: int = Field(0, ge=0, le=1_000_000, description="Optimizer steps of linear warm-up.")
    schedule: Literal["constant", "linear"] = Field(
        "constant",
        description="Learning rate over the run: constant, or falling linearly to 0 after the last step. When a run is "
        "extended, the line is drawn to the new end.",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="Decay of AdamW's first and second moments."
    )
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = Field(
        1e-4,
        description="Weight decay; every step shrinks the LoRA by learning_rate times this, which must be below 1.",
    )
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6)] = Field(1.0, description="Gradient norm is clipped to this.")

    @model_validator(mode="after")
    def _shrinks(self) -> "OptimizerConfig":
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                f"weight_decay {self.weight_decay:g} times learning_rate {self.learning_rate:g} is not below 1: every "
                "step would turn the LoRA around"
            )
        return self


class EvaluationConfig(Section):
    """Deterministic sampling on fixed, held-out prompts and seeds."""

    texts: list[str] = Field([], description="Held-out prompts written here.")
    file: str | None = Field(None, description="File of held-out prompts, as for prompts.file.")
    shapes: int | None = Field(
        None, ge=1, le=1_000_000, description="Up to this many held-out prompts per task of the shapes world."
    )
    images_per_prompt: Annotated[int, Field(ge=1, le=10_000)] = Field(4, description="Images per held-out prompt.")
    every: int = Field(
        0, ge=0, le=1_000_000, description="Also evaluate every so many iterations; 0 only before and after."
    )
    steps: Annotated[int, Field(ge=1, le=1000)] | None = Field(None, description="Sampling steps; null as in rollout.")
    solver: Annotated[str, OneOf(solver_names)] = Field("euler", description="As rollout.solver, for every step.")
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="Guidance; null as in rollout."
    )
    seed: int = Field(1234, ge=0, le=2**63 - 1, description="Seed of the fixed noise.")
    rewards: list[RewardConfig] = Field([], description="Further reward models, evaluated and not trained on.")

    _clean_texts = field_validator("texts")(lambda texts: [clean(text) for text in texts])

    @model_validator(mode="after")
    def _one_source(self) -> "EvaluationConfig":
        if sum([bool(self.texts), self.file is not None, self.shapes is not None]) > 1:
            raise ValueError("give evaluation prompts in at most one of texts, file and shapes")
        check_prompts(self.texts, "texts")
        if len({reward.name for reward in self.rewards}) != len(self.rewards):
            raise ValueError("a reward is named more than once")
        return self


class WatchdogConfig(Section):
    """When a run that goes wrong stops by itself, keeping its best LoRA."""

    reward_drop: Annotated[float, Field(gt=0, le=1e9)] = Field(
        3.0, description="Stop when the smoothed reward is this many standard deviations below its best."
    )
    gradient_factor: Annotated[float, Field(gt=1, le=1e12)] = Field(
        1000.0, description="Stop when the gradient norm is this many times its running median."
    )
    patience: Positive = Field(5, description="Iterations in a row a sign must last.")
    max_dropped: Positive = Field(100, description="Stop after so many samples without a finite reward.")
    max_bad_updates: Positive = Field(5, description="Stop after so many updates without a finite loss.")
    max_idle: Positive = Field(
        10,
        description="Stop after so many iterations in a row in which nothing could be trained, because the images of "
        "every group had equal rewards or none was finite.",
    )
    diversity_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.5,
        description="Warn when the images of a held-out prompt differ from each other less than this share of what "
        "they did in the first evaluation (root mean square difference of their thumbnails); 0 never warns. It needs "
        "evaluation.images_per_prompt of 2 or more.",
    )


class RuntimeConfig(Section):
    """How long, where, and how often things are saved."""

    iterations: Positive = Field(
        100, description="Iterations of the whole run; may be raised later, which extends the run."
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of everything random.")
    device: Literal["auto", "cpu"] = Field("auto", description="auto uses a GPU where there is one.")
    checkpoint_every: Positive = Field(1, description="Iterations between checkpoints.")
    keep_checkpoints: Annotated[int, Field(ge=2, le=1_000_000)] = Field(2, description="Newest checkpoints kept.")
    samples_every: int = Field(
        10, ge=0, le=1_000_000, description="Iterations between sample grids of the rollout; 0 is never."
    )
    watchdog: WatchdogConfig = WatchdogConfig()
    trackers: list[str] = Field(
        [],
        description="Where scalars, samples and the description also go: tensorboard, wandb. Both write into the run "
        "directory.",
    )
    wandb_mode: Literal["offline", "online"] = Field(
        "offline", description="online sends what the tracker wandb records to its server; offline sends nothing."
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
            raise ValueError("prompts names none: give them in exactly one of texts, file and shapes")
        if not self.rewards and objective.needs_rewards:
            raise ValueError("rewards names none, so there is nothing to learn")
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
