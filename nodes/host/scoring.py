"""Scoring for Score Images, and the scores as text and as a bar plot."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...trainer import rewards as reward_models
from ...trainer.prompts.text import check_text, prompt_lines
from ...trainer.rewards.base import ModelReward
from ...trainer.rewards.remote.http import interruptible
from ...trainer.utils.errors import BadInput
from ..types import Rewards
from .images import image_output
from .progress import check_interrupt


def split_prompts(text: str, count: int, what: str) -> list[str]:
    """One prompt per image; a single line is used for all.

    Raises:
        BadInput: there is not one line, and not one line per image.
    """
    lines = require_prompt(text)
    if len(lines) not in (1, count):
        raise BadInput(f"prompt has {len(lines)} lines for {count} {what}: use one line for all, or one line each")
    return lines if len(lines) == count else lines * count


def require_prompt(text: str) -> list[str]:
    """The lines of a prompt.

    Raises:
        BadInput: it has none.
    """
    check_text(text, "prompt")
    lines = prompt_lines(text)
    if not lines:
        raise BadInput("prompt is empty: enter the prompt of the images")
    return lines


def score_all(
    reward: Rewards, items: Tensor, prompts: list[str], device: torch.device, make_room: Callable[[int], object]
) -> dict[str, Tensor]:
    """Raw scores `[B]` of each reward, by name.

    Args:
        items: images `[B, 3, H, W]` or videos `[B, F, 3, H, W]` in [0, 1].
        device: for rewards that are networks.
        make_room: called with the bytes that such a reward is about to take there.

    Raises:
        BadInput: a reward for videos is given images, or cannot score a prompt or an image.
    """
    loaded = load_rewards(reward, prompts, device, make_room)
    return {one.name: one.score(items, prompts, device) for one in loaded}


@dataclass(frozen=True)
class LoadedReward:
    """A reward that is ready to score, with its weights in memory."""

    name: str
    model: reward_models.Reward

    def score(self, items: Tensor, prompts: list[str], device: torch.device) -> Tensor:
        """Raw scores `[B]`. A cancel by the user also ends the waiting for a server.

        Raises:
            BadInput: it scores videos and is given images, or it cannot score an image.
        """
        check_interrupt()
        if self.model.media == "video" and (items.ndim == 4 or items.shape[1] < 2):
            raise BadInput(f"reward {self.name!r} scores videos: connect frames, and set batch to 'one video'")
        placed = items.to(device) if isinstance(self.model.holder, ModelReward) else items
        try:
            with interruptible(check_interrupt):
                return reward_models.score(self.model, placed, prompts)
        except ValueError as error:
            raise BadInput(f"reward {self.name!r}: {error}") from error
        finally:
            self.model.idle()


def load_rewards(
    reward: Rewards, prompts: list[str], device: torch.device, make_room: Callable[[int], object]
) -> list[LoadedReward]:
    """The rewards with their weights in memory.

    Args:
        device: where they are going to score.
        make_room: called with the bytes that weights are about to take on the device.

    Raises:
        BadInput: a file is missing or damaged, or a reward cannot score a prompt.
    """
    loaded = []
    for config in reward.rewards:
        check_interrupt()
        model = reward_models.load_reward(config, device.type)
        try:
            model.check_prompts(prompts)
        except ValueError as error:
            raise BadInput(f"reward {config.name!r}: {error}") from error
        model.register_memory_hook(lambda size, _: make_room(size))
        with interruptible(check_interrupt):
            model.load()
        loaded.append(LoadedReward(config.name, model))
    return loaded


def score_table(parts: dict[str, Tensor], total: Tensor, prompts: list[str]) -> str:
    """A line per image, and the mean over those that have a score."""
    lines = []
    for i, prompt in enumerate(prompts):
        detail = ", ".join(f"{name} {values[i]:.4g}" for name, values in parts.items())
        lines.append(f"{i + 1}: {total[i]:.4g}" + (f" ({detail})" if len(parts) > 1 else "") + f"  {prompt}")
    known = total[~total.isnan()]
    if len(known) == 0:
        return "\n".join([*lines, "no image has a score"])
    std = f", std {known.std():.4g}" if len(known) > 1 else ""
    missing = f", {len(total) - len(known)} without a score" if len(known) < len(total) else ""
    return "\n".join([*lines, f"mean {known.mean():.4g}{std}{missing}, best is image {best_of(total) + 1}"])


def best_of(scores: Tensor) -> int:
    """Index of the highest score, the first one in a tie; NaN means no score."""
    return int(scores.nan_to_num(-torch.inf).argmax())


def bar_plot(parts: dict[str, Tensor], total: Tensor) -> Tensor:
    """A bar plot per reward, and one of the weighted sum, as an IMAGE `[1, H, W, 3]` in [0, 1]."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    panels = dict(parts) if len(parts) == 1 else {**parts, "weighted sum": total}
    figure = Figure(figsize=(max(4.0, 0.3 * len(total)), 2.4 * len(panels)), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axis, (name, values) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        best = best_of(values)
        colors = ["tab:orange" if i == best else "tab:blue" for i in range(len(values))]
        axis.bar(range(1, len(values) + 1), values.tolist(), color=colors)
        axis.axhline(values.nanmean().item(), color="black", linewidth=0.8, linestyle="--")
        axis.set(title=name, xlabel="image", xlim=(0.4, len(values) + 0.6))
        axis.xaxis.get_major_locator().set_params(integer=True)
    canvas.draw()
    return image_output(Image.fromarray(np.asarray(canvas.buffer_rgba())))
