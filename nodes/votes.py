"""GRPO Collect for Voting: adds images to a collection, which is voted on in the sidebar."""

from typing import Any

import torch
from comfy_api.latest import io

from ..trainer.utils.media import to_pil_image
from ..trainer.utils.names import check_name
from ..trainer.votes import store
from .host import inputs, progress
from .host.folders import votes_folder
from .host.scoring import split_prompts
from .types import CATEGORY


class CollectForVoting(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_CollectForVoting",
            display_name="GRPO Collect for Voting",
            category=CATEGORY,
            description="Add images to a collection. Vote on pairs of them in the GRPO tab of the sidebar; the reward "
            "'preference' of Load Reward is fitted to the votes.",
            search_aliases=[
                "vote",
                "votes",
                "preference",
                "human feedback",
                "rlhf",
                "dpo",
                "reward model",
                "favourites",
                "rate images",
                "dancegrpo",
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("images", tooltip="A batch. Images that are already in the collection are skipped."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="Prompt of the images: one line for all, one line per image, or empty. It is shown with "
                    "each pair, and pairs of images with the same prompt are shown first.",
                ),
                io.String.Input(
                    "name",
                    default="my_votes",
                    tooltip="Name of the collection, a folder in output/dancegrpo/votes. It is created if it does not "
                    "exist.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The same images."),
                io.String.Output(display_name="name", tooltip="Name of the collection."),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        return inputs.accepted(name, "collection", lambda text: check_name(text, "collection"))

    @classmethod
    def execute(cls, images: torch.Tensor, prompt: str, name: str) -> io.NodeOutput:
        with progress.errors_on_node(cls.hidden.unique_id):
            batch = inputs.image_batch(images, "images").movedim(-1, 1).float()
            prompts = split_prompts(prompt, len(batch), "images") if prompt.strip() else [""] * len(batch)
            collection = store.create(votes_folder(), name)
            added = collection.add(_with_sources(batch, prompts))
        text = f"{added.new} of {len(batch)} images added to {name}; vote on them in the GRPO tab of the sidebar"
        progress.say(text, cls.hidden.unique_id)
        return io.NodeOutput(images, name, ui={"text": (text,)})


def _with_sources(batch: torch.Tensor, prompts: list[str]) -> Any:
    for image, prompt in zip(batch, prompts, strict=True):
        yield to_pil_image(image[:3] if image.shape[0] > 3 else image.expand(3, -1, -1)), prompt, "graph"


NODES = [CollectForVoting]
