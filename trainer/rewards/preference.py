"""A reward model of one person's preferences: a Bradley-Terry model on image features, fitted to votes on pairs."""

import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..config import Section
from ..utils.errors import BadInput
from ..utils.media import read_image
from ..votes.analysis import comparisons
from ..votes.fit import Fit, agreement, enough, fit
from ..votes.pixels import PixelFeatures
from ..votes.store import Collection
from .base import Dtype, ModelReward, dtype_option
from .files import WEIGHTS
from .preprocess import rounded

PIXELS = "pixels"
FEWEST = 2


class Preference(ModelReward):
    """A reward model of your own preferences, fitted to your votes on pairs of images.

    The votes are in a collection: a folder with `images/` and `votes.csv`. Collections are made and voted on in ComfyUI
    (docs/votes.md); a hand-written one needs the columns `better` and `worse`, with names of files in `images/`. When
    the reward is first used, a Bradley-Terry model on image features is fitted to the votes, and its cross-validated
    accuracy on the votes is printed with a 95% interval. Near 50% it has learned nothing. Nothing is written, and the
    same votes give the same scores. The prompt is ignored, so add a reward that reads it.

    The features come from a backbone: `pixels` needs no file and describes colours and layout (260 numbers, see
    trainer/votes/pixels.py); a CLIP or SigLIP vision model also describes what an image shows.

    `python -m trainer score preference new.png --prompt "a red fox" --set collection=my_votes` fits and scores.
    """

    name = "preference"
    typical_range = (-10.0, 10.0)
    differentiable = True
    gpu_dtype = "float16"
    fitted: Fit | None = None

    class Options(Section):
        collection: str = Field(
            "",
            description="Collection of votes: its name in ComfyUI, or the path of its folder.",
            json_schema_extra={"votes": "collection"},
        )
        backbone: str = Field(
            PIXELS,
            description="Source of the features: pixels, which needs no file; or a CLIP or SigLIP vision model, by its "
            "name in models/clip_vision, as clip-vit-l (the file of the reward aesthetic), or by the path of a file.",
            json_schema_extra={"votes": "backbone"},
        )
        dtype: Dtype = dtype_option(gpu="float16")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        if not self.options.collection:
            raise BadInput("reward 'preference': collection is empty: name a collection of votes")
        check_backbone(self.options.backbone)
        self.collection = Collection(Path(self.options.collection))
        self.vote_log = self.collection.vote_log()
        winners = self.vote_log.counts()["winners"]
        if winners < FEWEST:
            raise BadInput(
                f"collection {self.collection.name!r} has {winners} votes with a winner: vote on more pairs; at least "
                f"{FEWEST} are needed, and a few dozen to be useful"
            )

    def build(self) -> nn.Module:
        return load_backbone(self.options.backbone)

    def weight_files(self) -> list[Path]:
        """Files that hold the network's weights."""
        return [] if self.options.backbone == PIXELS else [Path(self.options.backbone)]

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Utilities, relative to that of the mean features of the images that were voted on."""
        images = rounded(images)
        if self.fitted is None:
            self.fitted = self._fit(images.device)
        weights, center = (images.new_tensor(v, dtype=torch.float32) for v in (self.fitted.weights, self.fitted.center))
        return (self.module(images) - center) @ (weights / self.fitted.scale)

    def _fit(self, device: torch.device) -> Fit:
        names, votes = comparisons(self.vote_log)
        files = [self.collection.image_file(name) for name in names]
        with torch.no_grad():  # one by one, because their sizes differ
            features = torch.cat([self.module(read_image(file)[None].to(device)).cpu() for file in files])
        table = features.double().numpy()
        for complaint in self.vote_log.complaints:
            print(f"warning: {self.collection.name}: {complaint}", file=sys.stderr)
        words = enough(agreement(table, votes), self.vote_log.counts()["winners"])
        print(f"preference: {len(votes)} votes of {self.collection.name}: {words}", file=sys.stderr)
        return fit(table, votes)


def check_backbone(name: str) -> None:
    """Raise BadInput unless it is `pixels` or an existing file of weights."""
    if name == PIXELS:
        return
    if not Path(name).is_file() or Path(name).suffix.lower() not in WEIGHTS:
        raise BadInput(
            f"reward 'preference': backbone {name!r} is neither {PIXELS} nor a file of a CLIP or SigLIP vision model "
            f"({', '.join(WEIGHTS)})"
        )


def load_backbone(name: str) -> nn.Module:
    """A network that turns images `[B, 3, H, W]` in [0, 1] into features `[B, D]` float32.

    Raises:
        BadInput: the file is not a supported vision model.
    """
    if name == PIXELS:
        return PixelFeatures()
    from .clip.vision import load_vision_encoder

    return load_vision_encoder(Path(name))
