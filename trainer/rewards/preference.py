"""Your own taste: votes on your own images, fitted into a line through CLIP's features."""

import csv
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..utils.errors import BadInput
from ..utils.media import read_image
from .clip.aesthetic import ClipLargeReward
from .files import file_option

FOLDS = 5


class Preference(ClipLargeReward):
    """Your own taste, from your votes: pairs of images (better, worse), or images with scores.

    The votes are a CSV file with the columns `better,worse` or `image,score`, or a JSON list of objects with those
    keys. Images are named relative to that file and lie in its folder or below. A linear head on CLIP ViT-L/14 is
    fitted to them when the reward is first used: by logistic regression of pairs (Bradley-Terry), or by ridge
    regression of scores. It then says how often a fit agrees with votes left out of it; near 50% it has learned
    nothing, and more votes are needed. Some dozens are a beginning. The prompt is not looked at, so add a judge that
    looks at it. Nothing is written, and the same votes give the same scores.

    A file `models/rewards/preference/votes.csv`, with the images beside it:

    ```
    better,worse
    fox_3.png,fox_1.png
    fox_2.png,fox_1.png
    ```

    `python -m trainer score preference new.png --prompt "a red fox" --files ComfyUI/models/rewards` fits it and says
    how far the votes agree.
    """

    name = "preference"
    typical_range = (-2.0, 2.0)
    licence = "CLIP: MIT"
    weights: Tensor | None = None

    class Options(ClipLargeReward.Options):
        votes: str = file_option("preference/votes.csv", "CSV or JSON file of your votes.", suffixes=(".csv", ".json"))
        shrinkage: Annotated[float, Field(gt=0)] = Field(
            0.1, description="Weight of the penalty on large weights; more of it where votes are few or contradict."
        )

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.votes = read_votes(Path(self.options.votes))

    def judge(self, images: Tensor, prompts: list[str]) -> Tensor:
        if self.weights is None:
            self._learn(images.device)
        return self.features(self.module, images) @ self.weights[:-1].to(images.device) + self.weights[-1].item()

    def _learn(self, device: torch.device) -> None:
        names = list(dict.fromkeys(name for vote in self.votes for name in vote if isinstance(name, Path)))
        table, votes = {}, self.votes
        for name in names:
            try:
                image = read_image(name)
            except BadInput as error:
                print(f"warning: preference: {error}; votes on it are left out", file=sys.stderr)
                votes = [vote for vote in votes if name not in vote]
                continue
            table[name] = self.features(self.module, image[None].to(device))[0].cpu().double()
        if len(votes) < 2:
            kept = f"{len(votes)} of its {len(self.votes)} votes"
            raise BadInput(f"{self.options.votes}: {kept} name images that can be read; at least 2 are needed")
        self.weights, agreement = learn(votes, table, self.options.shrinkage)
        share = "too few to test" if agreement is None else f"agrees with {agreement:.0%} of those left out of a fit"
        print(f"preference: {len(votes)} votes of {self.options.votes}: {share}", file=sys.stderr)


Vote = tuple[Path, Path] | tuple[Path, float]
"""(better, worse) or (image, score)."""


def read_votes(path: Path) -> list[Vote]:
    """The votes of a file, all of one kind.

    Raises:
        BadInput: it is of another form, too short, or names images that are not there.
    """
    rows = _rows(path)
    keys = ("better", "worse") if rows and "better" in rows[0] else ("image", "score")
    votes: list[Vote] = []
    for place, row in enumerate(rows, 1):
        if set(row) != set(keys):
            raise BadInput(f"{path}: vote {place} holds {', '.join(map(str, row))}; it must hold {' and '.join(keys)}")
        if keys[0] == "better":
            votes.append((_image(path, place, row["better"]), _image(path, place, row["worse"])))
        else:
            votes.append((_image(path, place, row["image"]), _score(path, place, row["score"])))
    if len(votes) < 2:
        raise BadInput(f"{path} holds {len(votes)} votes; at least 2 are needed, and some dozens to be of use")
    if keys[0] == "image" and len({score for _, score in votes}) == 1:
        raise BadInput(f"{path}: every image has the same score, so there is nothing to learn")
    return votes


def _rows(path: Path) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if path.suffix.lower() == ".json" else list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise BadInput(f"{path} cannot be read as votes: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{path} is no list of votes with the keys better and worse, or image and score")
    return rows


def _image(path: Path, place: int, name: Any) -> Path:
    relative = Path(str(name))
    if relative.is_absolute() or ".." in relative.parts:
        raise BadInput(f"{path}: vote {place} names {str(name)!r}; images must lie in the folder of the votes")
    if not (path.parent / relative).is_file():
        raise BadInput(f"{path}: vote {place} names the image {str(name)!r}, which is not there")
    return path.parent / relative


def _score(path: Path, place: int, value: Any) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = float("nan")
    if score - score != 0:  # neither NaN nor infinite
        raise BadInput(f"{path}: vote {place} has the score {value!r}, which is no finite number")
    return score


# ------------------------------------------------------------------------------------------------------------ the fit


def learn(votes: list[Vote], features: dict[Path, Tensor], shrinkage: float) -> tuple[Tensor, float | None]:
    """Weights `[D + 1]` float32 (the last is the offset), and the agreement with votes left out (None: too few).

    Args:
        features: `[D]` float64 per image.
    """
    if isinstance(votes[0][1], Path):
        differences = torch.stack([features[better] - features[worse] for better, worse in votes])
        weights = fit_pairs(differences, shrinkage)
        hits = [differences[test] @ fit_pairs(differences[train], shrinkage) for train, test in _folds(len(votes))]
        agreement = (torch.cat(hits) > 0).double().mean().item() if hits else None
        return torch.cat([weights, torch.zeros(1)]).float(), agreement
    inputs = torch.stack([features[image] for image, _ in votes])
    targets = torch.tensor([score for _, score in votes], dtype=torch.float64)
    found = [(_line(inputs[test], fit_scores(inputs[train], targets[train], shrinkage)), targets[test])
             for train, test in _folds(len(votes))]  # fmt: skip
    hits = [_concordance(guess, truth) for guess, truth in found]
    hits = [hit for hit in hits if hit is not None]
    return fit_scores(inputs, targets, shrinkage).float(), sum(hits) / len(hits) if hits else None


def fit_pairs(differences: Tensor, shrinkage: float) -> Tensor:
    """The w that minimises sum log(1 + exp(-w d)) + shrinkage / 2 |w|^2 over pairs, by Newton's method.

    Args:
        differences: `[N, D]` float64, features of the better image less those of the worse.
    """
    weights = torch.zeros(differences.shape[1], dtype=torch.float64)
    identity = torch.eye(len(weights), dtype=torch.float64)
    for _ in range(50):
        wrong = torch.sigmoid(-differences @ weights)
        gradient = shrinkage * weights - differences.T @ wrong
        if gradient.norm() < 1e-10:
            break
        curvature = shrinkage * identity + differences.T @ ((wrong * (1 - wrong))[:, None] * differences)
        weights = weights - torch.linalg.solve(curvature, gradient)
    return weights


def fit_scores(inputs: Tensor, targets: Tensor, shrinkage: float) -> Tensor:
    """Ridge regression of standardised scores: w of |X w + b - y|^2 + shrinkage |w|^2, and b.

    Args:
        inputs: `[N, D]` float64.
        targets: `[N]` float64.
    """
    targets = (targets - targets.mean()) / targets.std().clamp(min=1e-12)
    centre = inputs.mean(0)
    centered = inputs - centre
    identity = torch.eye(inputs.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(centered.T @ centered + shrinkage * identity, centered.T @ targets)
    return torch.cat([weights, -(weights @ centre)[None]])


def _line(inputs: Tensor, weights: Tensor) -> Tensor:
    return inputs @ weights[:-1] + weights[-1]


def _folds(count: int) -> list[tuple[Tensor, Tensor]]:
    """Which votes a fit sees and which it is tested on; none where there are too few."""
    if count < 2 * FOLDS:
        return []
    place = torch.arange(count) % FOLDS
    return [(torch.where(place != fold)[0], torch.where(place == fold)[0]) for fold in range(FOLDS)]


def _concordance(guess: Tensor, truth: Tensor) -> float | None:
    """Share of pairs of different scores that are in the right order."""
    order = (guess[:, None] - guess).sign() * (truth[:, None] - truth).sign()
    ranked = truth[:, None] > truth
    return (order[ranked] > 0).double().mean().item() if ranked.any() else None
