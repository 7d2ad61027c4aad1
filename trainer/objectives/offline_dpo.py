"""Offline DPO on pairs that people voted on (Diffusion-DPO, arXiv 2311.12908), without rollout and rewards.

In run descriptions it is the objective `dpo` with `collection` set.
"""

from __future__ import annotations

import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..rollout import Trajectories
from ..utils.errors import BadInput
from ..utils.seeds import prompt_indices
from .advantage import Advantages
from .base import Member, Resources, RolloutBatch, TrainingItem
from .dpo import Dpo

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..config import RunConfig
    from ..models import DiffusionModel
    from ..prompts.sets import PromptSet
    from ..rewards import Reward
    from .pairs import Pairs


class OfflineDpo(Dpo):
    """The loss of `Dpo` on pairs of image files. All pairs are used once before any is repeated."""

    needs_rewards = needs_advantages = needs_rollout = False

    @classmethod
    def check_config(cls, config: RunConfig) -> None:
        pairs, updates = config.rollout.prompts_per_iteration, config.objective.updates
        if pairs % updates:
            raise ValueError(
                f"objective.updates {updates} does not divide rollout.prompts_per_iteration {pairs}, the pairs of an "
                "iteration"
            )
        if config.prompts.has_source:
            raise ValueError("the prompts come from objective.collection: remove texts, file and shapes from prompts")
        if config.rewards:
            raise ValueError(
                "objective.collection is trained without rewards: remove rewards; rewards for evaluation belong in "
                "evaluation.rewards"
            )
        if config.model.frames > 1:
            raise ValueError(f"model.frames is {config.model.frames}, but a collection has only images: set it to 1")

    @classmethod
    def shares(cls, config: RunConfig) -> tuple[int, str]:
        return config.rollout.prompts_per_iteration, "pairs"

    @cached_property
    def data(self) -> Pairs:
        """The pairs, read once."""
        from .pairs import read_pairs

        return read_pairs(Path(self.options.collection))

    def training_prompts(self) -> PromptSet:
        from ..prompts.sets import PromptSet
        from ..prompts.text import without_weights

        texts = self.data.prompts
        scored = [without_weights(text) for text in texts] if self.config.prompts.weight_syntax else []
        return PromptSet(texts, [""] * len(texts), scored=scored)

    def check(self, family: type[DiffusionModel], rewards: Mapping[str, Reward]) -> None:
        """Nothing to check: the pairs have been read already, and no rewards are needed."""

    # ----------------------------------------------------------------------------------------------- the images

    def setup(self, resources: Resources) -> None:
        super().setup(resources)
        if self.processes.is_main:
            print(f"dpo: {self.data.sentence()}", file=sys.stderr)
        self._row_of_prompt = {text: row for row, text in enumerate(self.data.prompts)}
        self._encoded = self._encode(self.data.files)

    def _encode(self, files: list[Path]) -> dict[Path, Tensor]:
        """Latents of all images, on the CPU. Each process encodes a part.

        Images are encoded one at a time, so that the latents of an image do not depend on the other images.

        Raises:
            BadInput: an image is damaged; raised in all processes.
        """
        mine, fault = [], None
        try:
            for number in self.processes.share(len(files)):
                image = fitted(files[number], self.config.model.height, self.config.model.width)
                mine.append((number, self.model.encode_image(image[None])[0].cpu()))
        except BadInput as error:
            fault = str(error)
        if faults := [one for one in self.processes.gather([fault]) if one]:
            raise BadInput(f"objective.collection: {faults[0]}; undo the votes on this image, or replace the file")
        return {files[number]: latents for number, latents in self.processes.gather(mine)}

    # ------------------------------------------------------------------------------------------ in every iteration

    def collect(self, iteration: int) -> RolloutBatch:
        count, seed = self.config.rollout.prompts_per_iteration, self.config.runtime.seed
        chosen = [self.data.pairs[i] for i in prompt_indices(len(self.data.pairs), count, iteration, seed)]
        self._latents = {(slot, 0): self._encoded[pair.better] for slot, pair in enumerate(chosen)}
        self._latents |= {(slot, 1): self._encoded[pair.worse] for slot, pair in enumerate(chosen)}
        mine = list(self.processes.share(count))
        rows = torch.tensor([self._row_of_prompt[chosen[slot].prompt] for slot in mine])
        device, nothing = self.processes.device, torch.empty(0)
        return RolloutBatch(
            iteration=iteration,
            plan=self.plan(self.model, iteration),
            prompting=self.prompting.rows(rows).to(device),
            members=[(slot, 0) for slot in mine],
            prompt_of=torch.arange(len(mine), device=device),
            texts=[chosen[slot].prompt for slot in mine],
            trajectories=Trajectories(nothing, [], nothing, nothing, nothing, None, 0),
            advantages=Advantages.none(count, 2),
            active=torch.ones(count, 2, dtype=torch.bool),
        )

    def _pairs(self, rollout: RolloutBatch) -> list[tuple[Member, Member]]:
        return [((slot, 0), (slot, 1)) for slot in range(len(rollout.active))]

    def dummy_item(self, rollout: RolloutBatch) -> TrainingItem:
        slot, _ = rollout.members[0]
        return TrainingItem((slot, 0), 0, other=(slot, 1))

    # ---------------------------------------------------------------------------------------------------- resuming

    def state(self) -> dict:
        return {"pairs": self.data.digest()}

    def restore(self, state: dict) -> None:
        """
        Raises:
            BadInput: the pairs have changed since the run was started.
        """
        if state["pairs"] != self.data.digest():
            raise BadInput(
                f"the votes of {self.data.name} have changed since this run was stopped: start another run to train on "
                "the new votes, with this run's LoRA as lora.start_from to continue from it"
            )


def fitted(file: Path, height: int, width: int) -> Tensor:
    """An image `[3, height, width]` in [0, 1], resized (bicubic) to cover that size and centre-cropped.

    Raises:
        BadInput: the file cannot be read.
    """
    from PIL import Image, ImageOps

    from ..utils.media import open_image, to_tensor

    image = open_image(file)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return to_tensor(image)
