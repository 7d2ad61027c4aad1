"""Scoring images for the score node, and the scores as text and as a picture."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...trainer import rewards as reward_models
from ...trainer.prompts.text import check_text, prompt_lines
from ...trainer.rewards.base import ModelReward
from ...trainer.utils.errors import BadInput
from ...trainer.utils.media import to_tensor
from ..types import Rewards
from .progress import check_interrupt


def split_prompts(text: str, count: int, what: str) -> list[str]:
    """One prompt per image; a single line is used for all.

    Raises:
        BadInput: there are neither one line nor one per image.
    """
    check_text(text, "prompt")
    lines = prompt_lines(text)
    if not lines:
        raise BadInput("prompt is empty: write what the images should show")
    if len(lines) not in (1, count):
        raise BadInput(f"prompt has {len(lines)} lines for {count} {what}: give one line for all, or one for each")
    return lines if len(lines) == count else lines * count


def score_all(
    reward: Rewards, items: Tensor, prompts: list[str], device: torch.device, make_room: Callable[[int], object]
) -> dict[str, Tensor]:
    """Raw scores `[B]` by the reward's name.

    Args:
        items: images `[B, 3, H, W]` or videos `[B, F, 3, H, W]` in [0, 1].
        device: for rewards that are networks.
        make_room: called with the bytes that such a reward needs there.

    Raises:
        BadInput: a reward for videos is given images, or cannot score a prompt or an image.
    """
    judges = load_judges(reward, prompts, make_room)
    return {judge.name: judge.score(items, prompts, device) for judge in judges}


@dataclass(frozen=True)
class Judge:
    """A reward that is ready to score.

    Attributes:
        model: with its weights in memory.
        network: those weights; None for a rule.
        make_room: called with the bytes that they need on the device.
    """

    name: str
    model: reward_models.Reward
    network: torch.nn.Module | None
    make_room: Callable[[int], object]

    def score(self, items: Tensor, prompts: list[str], device: torch.device) -> Tensor:
        """Raw scores `[B]`.

        Raises:
            BadInput: it scores videos and is given images, or it cannot score an image.
        """
        check_interrupt()
        if self.model.media == "video" and (items.ndim == 4 or items.shape[1] < 2):
            raise BadInput(f"reward {self.name!r} scores videos: give it frames, with batch set to 'one video'")
        if self.network is not None:
            self.make_room(sum(p.numel() * p.element_size() for p in self.network.parameters()))
        try:
            return reward_models.score(self.model, items if self.network is None else items.to(device), prompts)
        except ValueError as error:
            raise BadInput(f"reward {self.name!r}: {error}") from error


def load_judges(reward: Rewards, prompts: list[str], make_room: Callable[[int], object]) -> list[Judge]:
    """The rewards with their weights in memory.

    Raises:
        BadInput: a file is missing or damaged, or a reward cannot score a prompt.
    """
    judges = []
    for config in reward.rewards:
        check_interrupt()
        model = reward_models.load_reward(config)
        try:
            model.check_prompts(prompts)
        except ValueError as error:
            raise BadInput(f"reward {config.name!r}: {error}") from error
        judges.append(Judge(config.name, model, _network(model), make_room))
    return judges


def _network(reward: reward_models.Reward) -> torch.nn.Module | None:
    """A reward's network, read from its file; None for a rule."""
    inner = reward.reward if isinstance(reward, reward_models.Threshold) else reward
    inner.load()
    return inner.module if isinstance(inner, ModelReward) else None


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
    """Index of the highest score, the first of equal ones; NaN stands for no score."""
    return int(scores.nan_to_num(-torch.inf).argmax())


def bar_plot(parts: dict[str, Tensor], total: Tensor) -> Tensor:
    """A panel per reward and one for their sum, a bar per image: `[1, H, W, 3]` in [0, 1]."""
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
    return to_tensor(Image.fromarray(np.asarray(canvas.buffer_rgba()))).movedim(0, -1)[None]
