"""What stands behind the score node: the judges at work, and their scores as text and as a picture."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...trainer import rewards as judges
from ...trainer.prompts.text import check_text, prompt_lines
from ...trainer.rewards.base import ModelReward
from ...trainer.utils.media import to_tensor
from ..types import Judges


def split_prompts(text: str, count: int, what: str) -> list[str]:
    """One prompt per image: a single line stands for all.

    Raises:
        ValueError: no line, or neither one nor one per image.
    """
    check_text(text, "prompt")
    lines = prompt_lines(text)
    if not lines:
        raise ValueError("prompt is empty: write what the images should show")
    if len(lines) not in (1, count):
        raise ValueError(f"prompt has {len(lines)} lines for {count} {what}: give one line for all, or one for each")
    return lines if len(lines) == count else lines * count


def score_all(
    reward: Judges, items: Tensor, prompts: list[str], device: torch.device, make_room: Callable[[int], object]
) -> dict[str, Tensor]:
    """Raw scores `[B]` by the reward's name.

    Args:
        items: images `[B, 3, H, W]` or videos `[B, F, 3, H, W]` in [0, 1].
        device: where judges that are networks work.
        make_room: called with the bytes that a judge needs there.

    Raises:
        ValueError: a judge of videos is given images, or a prompt cannot be judged.
    """
    scores = {}
    for config in reward.rewards:
        judge = judges.load_reward(config)
        if judge.media == "video" and (items.ndim == 4 or items.shape[1] < 2):
            raise ValueError(f"reward {config.name!r} judges videos: give it frames, with batch set to 'one video'")
        judge.check_prompts(prompts)
        network = _network(judge)
        if network is not None:
            make_room(sum(p.numel() * p.element_size() for p in network.parameters()))
        scores[config.name] = judges.score(judge, items if network is None else items.to(device), prompts)
    return scores


def _network(judge: judges.Reward) -> torch.nn.Module | None:
    """A judge's network, read from its file; None for a rule."""
    inner = judge.reward if isinstance(judge, judges.Threshold) else judge
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
    spread = f", spread {known.std():.4g}" if len(known) > 1 else ""
    missing = f", {len(total) - len(known)} without a score" if len(known) < len(total) else ""
    return "\n".join([*lines, f"mean {known.mean():.4g}{spread}{missing}, best is image {best_of(total) + 1}"])


def best_of(scores: Tensor) -> int:
    """The first of the highest; NaN stands for no score."""
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
