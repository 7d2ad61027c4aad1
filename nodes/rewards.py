"""Rewards: load, combine, threshold; score images with them, and pick the best."""

import math

import comfy.model_management
import torch
from comfy_api.latest import io, ui
from server import PromptServer
from torch import Tensor

from ..trainer import rewards as judges
from ..trainer.config import RewardConfig
from ..trainer.utils.errors import BadInput
from .host.reward_files import option_values, option_widgets, with_files
from .host.scoring import bar_plot, score_all, score_table, split_prompts
from .types import CATEGORY, Judges, RewardType, connected

SOCKETS = 4
FOR_SCORING = "For Score Images, GRPO Train LoRA, Threshold and Combine Rewards."


class LoadReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        choices = [io.DynamicCombo.Option(name, option_widgets(kind)) for name, kind in judges.REWARDS.items()]
        return io.Schema(
            node_id="DanceGRPO_LoadReward",
            display_name="Load Reward (DanceGRPO)",
            category=f"{CATEGORY}/rewards",
            description="A judge of images, to score with and to train with. Its weights are read when it is used.",
            search_aliases=["reward model", "scorer", "aesthetic", "hps", "clip score", "grpo reward", "judge"],
            inputs=[
                io.DynamicCombo.Input(
                    "reward", options=choices, tooltip="Which judge. Model files belong into models/rewards."
                )
            ],
            outputs=[RewardType.Output(display_name="REWARD", tooltip=FOR_SCORING)],
        )

    @classmethod
    def validate_inputs(cls, **inputs: object) -> bool | str:
        reward = inputs.get("reward")
        if not isinstance(reward, dict) or None in reward.values():  # one arrives by wire, and is not known yet
            return True
        try:
            cls.execute(reward)
        except BadInput as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, reward: dict) -> io.NodeOutput:
        name = reward["reward"]
        if name not in judges.REWARDS:
            raise BadInput(f"reward {name!r} is unknown: choose one of {', '.join(judges.REWARDS)}")
        options = option_values(judges.REWARDS[name], {key: reward[key] for key in reward if key != "reward"})
        return io.NodeOutput(Judges((with_files(RewardConfig(name=name, options=options)),)))


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
                    tooltip="Negative asks for less of it. HPS-v2.1 and CLIP: 0.7 and 1.4, the authors advise.",
                ),
            ]
        return io.Schema(
            node_id="DanceGRPO_CombineRewards",
            display_name="Combine Rewards (DanceGRPO)",
            category=f"{CATEGORY}/rewards",
            description="Several rewards with weights. Training brings each to mean 0 and spread 1 within the images "
            "of a prompt before it adds them; scoring adds the raw scores.",
            search_aliases=["weighted reward", "mix rewards", "multi reward", "reward weight"],
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
            connected(part, Judges, f"reward_{number}")
            for config in part.rewards:
                weight = config.weight * sockets[f"weight_{number}"]
                combined.append(RewardConfig(**(config.model_dump() | {"weight": weight})))
        names = [config.name for config in combined]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"reward {twice!r} is combined more than once: give it one socket and one weight")
        return io.NodeOutput(Judges(tuple(combined)))


class ThresholdReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_ThresholdReward",
            display_name="Threshold Reward (DanceGRPO)",
            category=f"{CATEGORY}/rewards",
            description="1 where a reward is above the threshold, else 0: the paper's binary reward.",
            search_aliases=["binary reward", "pass fail", "reward cut"],
            inputs=[
                RewardType.Input("reward", tooltip="One reward; combine after the threshold, not before."),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=-10000.0,
                    max=10000.0,
                    step=0.01,
                    round=False,
                    tooltip="In the reward's own units, before its weight; Score Images shows what it usually gives.",
                ),
            ],
            outputs=[RewardType.Output(display_name="REWARD", tooltip=FOR_SCORING)],
        )

    @classmethod
    def execute(cls, reward: Judges, threshold: float) -> io.NodeOutput:
        connected(reward, Judges, "reward")
        if len(reward.rewards) != 1:
            raise ValueError(f"reward holds {len(reward.rewards)} rewards: a threshold is for one, before combining")
        (config,) = reward.rewards
        if config.threshold is not None:
            raise ValueError(f"reward {config.name!r} has the threshold {config.threshold} already")
        return io.NodeOutput(Judges((RewardConfig(**(config.model_dump() | {"threshold": threshold})),)))


class ScoreImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_ScoreImages",
            display_name="Score Images (DanceGRPO)",
            category=f"{CATEGORY}/rewards",
            description="What a reward gives each image, as numbers, as text and as a plot.",
            search_aliases=["rate images", "evaluate", "reward score", "score video", "benchmark"],
            inputs=[
                RewardType.Input("reward", tooltip="From Load, Threshold or Combine Rewards."),
                io.Image.Input("images", tooltip="The images to score, or the frames of one video."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    tooltip="What the images should show: one line for all of them, or a line per image.",
                ),
                io.Combo.Input(
                    "batch",
                    options=["images", "one video"],
                    default="images",
                    advanced=True,
                    tooltip="Whether the batch holds images, or the frames of one video, which get one score.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="scores", is_output_list=True, tooltip="One per image, in their order."),
                io.Image.Output(display_name="plot", tooltip="A bar per image, the best in orange."),
                io.String.Output(display_name="text", tooltip="Scores per image and reward, and their mean."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, prompt: str | None = None) -> bool | str:
        return True if prompt is None or prompt.strip() else "prompt is empty: write what the images should show"

    @classmethod
    def execute(cls, reward: Judges, images: Tensor, prompt: str, batch: str) -> io.NodeOutput:
        connected(reward, Judges, "reward")
        pictures = images[..., :3].movedim(-1, 1).float().clamp(0, 1)
        items = pictures[None] if batch == "one video" else pictures
        prompts = split_prompts(prompt, len(items), "videos" if batch == "one video" else "images")
        device = comfy.model_management.get_torch_device()
        parts = score_all(reward, items, prompts, device, lambda size: comfy.model_management.free_memory(size, device))
        total = sum(config.weight * parts[config.name] for config in reward.rewards)
        text, plot = score_table(parts, total, prompts), bar_plot(parts, total)
        if cls.hidden.unique_id is not None:
            PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
        shown = ui.PreviewImage(plot, cls=cls).as_dict() | {"text": (text,)}
        return io.NodeOutput(total.tolist(), plot, text, ui=shown)


class PickBest(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_PickBest",
            display_name="Pick Best (DanceGRPO)",
            category=f"{CATEGORY}/rewards",
            description="The k images with the highest scores, best first: best-of-N sampling.",
            search_aliases=["best of n", "top k", "select images", "rank images", "filter images"],
            inputs=[
                io.Image.Input("images", tooltip="The images to choose from, all of one size."),
                io.Float.Input("scores", force_input=True, tooltip="From Score Images, one per image."),
                io.Int.Input("k", default=1, min=1, max=4096, tooltip="How many."),
            ],
            outputs=[
                io.Image.Output(tooltip="The k best images, the best first."),
                io.Float.Output(display_name="scores", is_output_list=True, tooltip="Their scores, in that order."),
            ],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, images: list[Tensor], scores: list[float], k: list[int]) -> io.NodeOutput:
        sizes = {tuple(batch.shape[1:]) for batch in images}
        if len(sizes) > 1:
            raise ValueError(f"images are of {len(sizes)} different sizes: all must have one")
        pictures, (count, *_) = torch.cat(images), k
        if len(pictures) != len(scores):
            raise ValueError(f"{len(pictures)} images but {len(scores)} scores: there must be one score per image")
        scored = [i for i, score in enumerate(scores) if not math.isnan(score)]
        if count > len(scored):
            raise ValueError(f"k is {count}, but only {len(scored)} images have a score")
        order = sorted(scored, key=lambda i: -scores[i])[:count]
        return io.NodeOutput(pictures[order], [scores[i] for i in order])


NODES = [LoadReward, CombineRewards, ThresholdReward, ScoreImages, PickBest]
