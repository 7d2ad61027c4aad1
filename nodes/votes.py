"""Images for voting."""

from comfy_api.latest import io
from server import PromptServer
from torch import Tensor

from ..trainer.utils.errors import BadInput
from ..trainer.utils.media import to_picture
from ..trainer.utils.names import check_name
from ..trainer.votes import store
from .host.scoring import split_prompts
from .host.votes import votes_folder
from .types import CATEGORY


class CollectForVoting(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_CollectForVoting",
            display_name="Collect for Voting (DanceGRPO)",
            category=f"{CATEGORY}/rewards",
            description="Adds images to a collection, on whose pairs you vote. Load Reward's preference learns from "
            "the votes what you like.",
            search_aliases=[
                "vote", "preference", "human feedback", "rlhf", "dpo", "favourites", "pairs", "reward model", "compare",
            ],
            inputs=[
                io.Image.Input("images", tooltip="The images; those that are in the collection already are kept once."),
                io.String.Input(
                    "name", default="my taste", tooltip="Of the collection. It is made if there is none of that name."
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="What the images show: one line for all of them, or a line per image; or nothing. Pairs of "
                    "images of one prompt are shown first.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The images as they came."),
                io.String.Output(display_name="collection", tooltip="The collection's name."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        try:
            return True if name is None or check_name(name) else ""
        except BadInput as error:
            return str(error)

    @classmethod
    def execute(cls, images: Tensor, name: str, prompts: str) -> io.NodeOutput:
        count = len(images)
        texts = split_prompts(prompts, count, "images") if prompts.strip() else [""] * count
        collection = store.create(votes_folder(), name)
        pictures = (to_picture(_rgb(image)) for image in images)
        added = collection.add((p, text, "Collect for Voting") for p, text in zip(pictures, texts, strict=True))
        total, old = len(collection.items()[0]), count - added.new
        text = f"{added.new} images added to {name!r}" + (f", {old} were there already" if old else "")
        text += f"; it has {total}"
        if cls.hidden.unique_id is not None:
            PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
        return io.NodeOutput(images, name, ui={"text": (text,)})


def _rgb(image: Tensor) -> Tensor:
    """`[H, W, C]` in [0, 1] as `[3, H, W]`; transparency is laid on white."""
    image = image.movedim(-1, 0).float().clamp(0, 1)
    if len(image) == 4:
        return image[:3] * image[3:] + 1 - image[3:]
    return image if len(image) == 3 else image[:1].expand(3, -1, -1)


NODES = [CollectForVoting]
