"""Nodes to load, combine and threshold rewards, to score images, and to pick the best images."""

import math

import comfy.model_management
import torch
from comfy_api.latest import io, ui
from pydantic import ValidationError
from torch import Tensor

from ..trainer import rewards as reward_models
from ..trainer.config import RewardConfig
from ..trainer.config import describe as describe_errors
from ..trainer.utils.errors import BadInput
from .host import inputs, progress, results
from .host.devices import make_room_for_reward
from .host.reward_files import option_values, option_widgets, votes_fingerprint, with_files
from .host.scoring import bar_plot, best_of, require_prompt, score_all, score_table, split_prompts
from .types import CATEGORY, Rewards, RewardType, connected

SOCKETS = 4
FOR_SCORING = "For Score Images, GRPO Train LoRA, Threshold Reward and Combine Rewards."
VIDEO = "one video"


class LoadReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        known = reward_models.REWARDS.with_others()
        choices = [io.DynamicCombo.Option(name, option_widgets(kind)) for name, kind in known.items()]
        return io.Schema(
            node_id="DanceGRPO_LoadReward",
            display_name="Load Reward (DanceGRPO)",
            category=f"{CATEGORY}/rewards",
            description="A reward that scores images or videos, for training and for Score Images. Its weights are "
            "loaded when it is used.",
            search_aliases=[
                "reward model", "scorer", "aesthetic", "hps", "clip score", "grpo reward", "rlhf", "human feedback",
                "preference", "vote",
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=[
                io.DynamicCombo.Input(
                    "reward", options=choices, tooltip="The reward. Put its model files in models/rewards."
                )
            ],
            outputs=[RewardType.Output(display_name="REWARD", tooltip=FOR_SCORING)],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, reward: object = None, **_: object) -> str:
        return votes_fingerprint(reward)

    @classmethod
    def execute(cls, reward: dict | None = None) -> io.NodeOutput:
        if reward is None:  # ComfyUI drops a choice that is not among the options
            raise BadInput(f"reward {cls._chosen()} is unknown: choose one of {', '.join(reward_models.REWARDS)}")
        name = reward["reward"]
        given = {key: value for key, value in reward.items() if key != "reward" and value is not None}
        options = option_values(reward_models.REWARDS[name], given)
        return io.NodeOutput(Rewards((with_files(RewardConfig(name=name, options=options)),)))

    @classmethod
    def _chosen(cls) -> str:
        chosen = cls.hidden.dynprompt.get_node(cls.hidden.unique_id)["inputs"].get("reward")
        return repr(chosen[:100] if isinstance(chosen, str) else type(chosen).__name__)


class CombineRewards(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = []
        for number in range(1, SOCKETS + 1):
            inputs += [
                RewardType.Input(
                    f"reward_{number}", optional=number > 1, tooltip="From Load, Threshold or Combine Rewards."
                ),
                io.Float.Input(
                    f"weight_{number}",
                    default=1.0,
                    min=-1000.0,
                    max=1000.0,
                    step=0.05,
                    optional=number > 1,
                    tooltip="A negative weight minimises the reward. DanceGRPO's authors use HPS-v2.1 0.7, CLIP 1.4.",
                ),
            ]
        return io.Schema(
            node_id="DanceGRPO_CombineRewards",
            display_name="Combine Rewards (DanceGRPO)",
            category=f"{CATEGORY}/rewards",
            description="A weighted sum of several rewards. Training normalizes each to mean 0 and std 1 within the "
            "images of a prompt first; Score Images adds the raw scores.",
            search_aliases=["weighted reward", "mix rewards", "multi reward", "reward weight", "reward model", "rlhf"],
            inputs=inputs,
            outputs=[RewardType.Output(display_name="REWARD", tooltip=FOR_SCORING)],
        )

    @classmethod
    def execute(cls, **sockets: object) -> io.NodeOutput:
        combined: list[RewardConfig] = []
        for number in range(1, SOCKETS + 1):
            part = sockets.get(f"reward_{number}")
            if part is None:
                continue
            connected(part, Rewards, f"reward_{number}")
            weight = inputs.finite(sockets.get(f"weight_{number}", 1.0), f"weight_{number}")
            combined += [_changed(config, weight=config.weight * weight) for config in part.rewards]
        names = [config.name for config in combined]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise BadInput(f"reward {repeated!r} is connected more than once: connect it once, with one weight")
        return io.NodeOutput(Rewards(tuple(combined)))


def _changed(config: RewardConfig, **fields: float) -> RewardConfig:
    """The same reward with other values.

    Raises:
        BadInput: a value is not accepted.
    """
    try:
        return RewardConfig(**(config.model_dump() | fields))
    except ValidationError as error:
        raise BadInput(f"reward {config.name!r}: {describe_errors(error)}") from error


class ThresholdReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_ThresholdReward",
            display_name="Threshold Reward (DanceGRPO)",
            category=f"{CATEGORY}/rewards",
            description="Turns a reward into 1 if it is above the threshold, else 0 (DanceGRPO's binary reward).",
            search_aliases=["binary reward", "pass fail", "reward cut", "reward model"],
            inputs=[
                RewardType.Input("reward", tooltip="A single reward; use Combine Rewards after this node."),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=-10000.0,
                    max=10000.0,
                    step=0.01,
                    round=False,
                    tooltip="In the units of the raw score, before the weight. Score Images shows typical scores.",
                ),
            ],
            outputs=[RewardType.Output(display_name="REWARD", tooltip=FOR_SCORING)],
        )

    @classmethod
    def execute(cls, reward: Rewards, threshold: float) -> io.NodeOutput:
        connected(reward, Rewards, "reward")
        if len(reward.rewards) != 1:
            raise BadInput(f"reward combines {len(reward.rewards)} rewards: apply the threshold before Combine Rewards")
        (config,) = reward.rewards
        if config.threshold is not None:
            raise BadInput(f"reward {config.name!r} already has a threshold ({config.threshold}): use only one")
        return io.NodeOutput(Rewards((_changed(config, threshold=inputs.finite(threshold, "threshold")),)))


class ScoreImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_ScoreImages",
            display_name="Score Images (DanceGRPO)",
            category=f"{CATEGORY}/rewards",
            description="Scores each image with a reward; outputs the scores as numbers, as text and as a plot.",
            search_aliases=[
                "rate images", "evaluate", "reward score", "reward model", "score video", "benchmark", "preference",
            ],
            inputs=[
                RewardType.Input("reward", tooltip="From Load, Threshold or Combine Rewards."),
                io.Image.Input("images", lazy=True, tooltip="The images to score, or the frames of one video."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    tooltip="Prompt of the images: one line for all images, or one line per image.",
                ),
                io.Combo.Input(
                    "batch",
                    options=["images", VIDEO],
                    default="images",
                    advanced=True,
                    tooltip="Whether the batch holds images, or the frames of one video, which gets one score.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="scores", is_output_list=True, tooltip="One per image, in their order."),
                io.Image.Output(display_name="plot", tooltip="A bar per image, the best in orange."),
                io.String.Output(display_name="text", tooltip="Scores per image and reward, and their mean."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, prompt: str | None = None) -> bool | str:
        return inputs.accepted(prompt, "prompt", require_prompt)

    @classmethod
    def check_lazy_status(cls, reward: Rewards, images: Tensor | None = None, **_: object) -> list[str]:
        """Check the reward before the images are computed."""
        connected(reward, Rewards, "reward")
        return ["images"] if images is None else []

    @classmethod
    def execute(cls, reward: Rewards, images: Tensor, prompt: str, batch: str) -> io.NodeOutput:
        with progress.errors_on_node(cls.hidden.unique_id):
            connected(reward, Rewards, "reward")
            pixels = inputs.image_batch(images, "images").movedim(-1, 1).float().clamp(0, 1)
            items = pixels[None] if batch == VIDEO else pixels
            prompts = split_prompts(prompt, len(items), "videos" if batch == VIDEO else "images")
            parts = _scores(reward, items, prompts)
        total = sum(config.weight * parts[config.name] for config in reward.rewards)
        text, plot = score_table(parts, total, prompts), bar_plot(parts, total)
        progress.say(text, cls.hidden.unique_id)
        data = {"scores": total.tolist(), "rewards": {name: values.tolist() for name, values in parts.items()}}
        data |= {"prompts": prompts, "best": None if total.isnan().all() else best_of(total)}
        shown = ui.PreviewImage(plot, cls=cls).as_dict() | {"text": (text,), results.DATA: (results.jsonable(data),)}
        return io.NodeOutput(total.tolist(), plot, text, ui=shown)


def _scores(reward: Rewards, items: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    device = comfy.model_management.get_torch_device()
    return score_all(reward, items, prompts, device, lambda size: make_room_for_reward(size, device))


class PickBest(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_PickBest",
            display_name="Pick Best (DanceGRPO)",
            category=f"{CATEGORY}/rewards",
            description="The k images with the highest scores, best first: best-of-N sampling.",
            search_aliases=["best of n", "top k", "select images", "rank images", "filter images", "preference"],
            inputs=[
                io.Image.Input("images", tooltip="The images to choose from, all of one size."),
                io.Float.Input("scores", force_input=True, tooltip="From Score Images, one per image."),
                io.Int.Input("k", default=1, min=1, max=4096, tooltip="Number of images to keep."),
            ],
            outputs=[
                io.Image.Output(tooltip="The k best images, the best first."),
                io.Float.Output(display_name="scores", is_output_list=True, tooltip="Their scores, in that order."),
            ],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, images: list[Tensor], scores: list[float], k: list[int]) -> io.NodeOutput:
        sizes = {tuple(inputs.image_batch(batch, "images").shape[1:]) for batch in images}
        if len(sizes) > 1:
            raise BadInput(f"images have {len(sizes)} different sizes: all images must have the same size")
        together, count = torch.cat(images), inputs.single(k, "k")
        if len(together) != len(scores):
            raise BadInput(f"{len(together)} images but {len(scores)} scores: there must be one score per image")
        scored = [i for i, score in enumerate(scores) if not math.isnan(score)]
        if count > len(scored):
            raise BadInput(f"k is {count}, but only {len(scored)} images have a score")
        order = sorted(scored, key=lambda i: -scores[i])[:count]
        return io.NodeOutput(together[order], [scores[i] for i in order])


NODES = [LoadReward, CombineRewards, ThresholdReward, ScoreImages, PickBest]
