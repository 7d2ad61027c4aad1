"""The reward learned from votes: what it is fitted to, that it finds a taste again, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from clip_reference import TINY, open_clip_shapes, random_weights, to_transformers
from PIL import Image
from safetensors.torch import save_file
from scipy.optimize import minimize
from torch import Tensor

from trainer.config import RewardConfig
from trainer.rewards import Reward, load_reward, score
from trainer.rewards.clip import vision
from trainer.utils.errors import BadInput
from trainer.votes.pixels import PixelFeatures


def make_images(seed: int = 0) -> Tensor:
    """Forty noisy grey images, of which the first is the darkest."""
    light = torch.linspace(0.1, 0.9, 40)[:, None, None, None]
    return (light + 0.1 * torch.rand(40, 3, 30, 30, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A collection of those images, without votes."""
    (tmp_path / "light" / "images").mkdir(parents=True)
    for number, image in enumerate((make_images() * 255).round().byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(tmp_path / "light" / "images" / f"{number}.png")
    return tmp_path / "light"


PAIRS = [(max(i, (i * 17 + 5) % 40), min(i, (i * 17 + 5) % 40)) for i in range(40) if i != (i * 17 + 5) % 40]


def reward(folder: Path, pairs: list[tuple[int, int]], **options: object) -> Reward:
    rows = "".join(f"{better}.png,{worse}.png\n" for better, worse in pairs)
    (folder / "votes.csv").write_text("better,worse\n" + rows)
    return load_reward(RewardConfig(name="preference", options={"collection": str(folder), **options}))


def concordance(values: Tensor) -> float:
    order = values[:, None] > values
    return order.tril(-1).sum().item() / (len(values) * (len(values) - 1) / 2)


def test_a_taste_is_found_in_new_images(folder: Path, capsys: pytest.CaptureFixture) -> None:
    found = score(reward(folder, PAIRS), make_images(seed=1), ["x"] * 40)
    assert concordance(found) > 0.9
    assert -0.5 < found.mean() < 0.5
    said = capsys.readouterr().err
    assert "preference: 40 votes of light: enough to train on: predicts " in said
    turned = score(reward(folder, [pair[::-1] for pair in PAIRS]), make_images(seed=1), ["x"] * 40)
    torch.testing.assert_close(turned, -found, rtol=1e-3, atol=1e-4)


def test_scores_are_the_bradley_terry_fit_of_the_features(folder: Path) -> None:
    found = score(reward(folder, PAIRS[:6]), make_images(seed=1), ["x"] * 40)
    used = sorted({name for pair in PAIRS[:6] for name in pair})
    files = {n: torch.from_numpy(np.array(Image.open(folder / "images" / f"{n}.png"))) for n in used}
    features = {n: PixelFeatures()(f.permute(2, 0, 1)[None] / 255)[0].double() for n, f in files.items()}
    table = torch.stack(list(features.values()))
    center, scale = table.mean(0), ((table - table.mean(0)) ** 2).sum(1).mean().sqrt()
    differences = torch.stack([(features[better] - features[worse]) / scale for better, worse in PAIRS[:6]]).numpy()
    candidates = []
    for precision in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0):

        def loss(w: np.ndarray, precision: float = precision) -> float:
            return np.logaddexp(0, -differences @ w).sum() + precision / 2 * w @ w

        def slope(w: np.ndarray, precision: float = precision) -> np.ndarray:
            return precision * w - differences.T @ (1 / (1 + np.exp(differences @ w)))

        best = minimize(loss, np.zeros(260), jac=slope, method="BFGS", options={"gtol": 1e-8})
        p = 1 / (1 + np.exp(-differences @ best.x))
        hessian = np.eye(260) + (differences.T * (p * (1 - p))) @ differences / precision
        candidates.append((-best.fun - np.linalg.slogdet(hessian)[1] / 2, best.x))
    weights = torch.from_numpy(max(candidates, key=lambda one: one[0])[1])
    expected = ((PixelFeatures()(make_images(seed=1)).double() - center) / scale) @ weights
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_ties_count_and_skips_and_undone_votes_do_not(folder: Path) -> None:
    def scores(rows: str) -> Tensor:
        (folder / "votes.csv").write_text("better,worse,tie,skip,undo,id,time\n" + rows)
        model = load_reward(RewardConfig(name="preference", options={"collection": str(folder)}))
        return score(model, make_images(seed=1)[::8], ["x"] * 5)

    plain = scores("30.png,2.png,,,,1,\n25.png,8.png,,,,2,\n")
    more = "30.png,2.png,,,,1,\n2.png,30.png,,,,3,\n,,,,3,u,\n25.png,8.png,,,,2,\n39.png,0.png,,1,,4,\n"
    torch.testing.assert_close(scores(more), plain)
    tied = scores("30.png,2.png,,,,1,\n25.png,8.png,,,,2,\n30.png,2.png,1,,,3,\n")
    assert tied[-1] - tied[0] < plain[-1] - plain[0]


def test_the_same_votes_give_the_same_scores_in_any_batch(folder: Path) -> None:
    images = make_images(seed=1)[::5]
    first = score(reward(folder, PAIRS), images, ["x"] * 8)
    model = reward(folder, PAIRS)
    assert torch.equal(score(model, images, ["y"] * 8), first)
    alone = torch.cat([score(model, image[None], ["x"]) for image in images])
    torch.testing.assert_close(alone, first, rtol=1e-5, atol=1e-5)


def test_votes_at_random_are_reported_as_such(folder: Path, capsys: pytest.CaptureFixture) -> None:
    flips = torch.rand(len(PAIRS), generator=torch.Generator().manual_seed(1)) < 0.5
    score(reward(folder, [p if f else p[::-1] for p, f in zip(PAIRS, flips, strict=True)]), make_images()[:1], ["x"])
    assert "not yet better than guessing: predicts " in capsys.readouterr().err


def test_a_line_that_cannot_be_read_is_said(folder: Path, capsys: pytest.CaptureFixture) -> None:
    score(reward(folder, [*PAIRS, (99, 1)]), make_images()[:1], ["x"])
    assert "warning: light: votes.csv, line 42 is ignored: there is no image '99.png'" in capsys.readouterr().err


@pytest.fixture
def clip_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny CLIP vision model as ComfyUI has them in models/clip_vision."""
    import json

    import open_clip

    (folder / "taste-quickgelu.json").write_text(json.dumps({**TINY, "quick_gelu": True}))
    open_clip.add_model_config(folder / "taste-quickgelu.json")
    monkeypatch.setattr(vision, "CLIP", {vision.Layout(32, 2, 5, 14): "taste-quickgelu"})
    weights = to_transformers(random_weights(open_clip_shapes(TINY)))
    save_file({key: value for key, value in weights.items() if key.startswith("vis")}, folder / "clip.safetensors")
    return folder / "clip.safetensors"


def test_a_clip_vision_file_is_a_backbone(folder: Path, clip_file: Path) -> None:
    model = reward(folder, PAIRS, backbone=str(clip_file))
    found = score(model, make_images(seed=1), ["x"] * 40)
    assert concordance(found) > 0.85
    half = reward(folder, PAIRS, backbone=str(clip_file), dtype="bfloat16")
    assert concordance(score(half, make_images(seed=1), ["x"] * 40)) > 0.8
    assert next(half.module.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("backbone", ["pixels", "clip"])
def test_the_gradient_makes_images_better(folder: Path, clip_file: Path, backbone: str) -> None:
    model = reward(folder, PAIRS, backbone=str(clip_file) if backbone == "clip" else backbone)
    assert model.differentiable
    images = (make_images(seed=1)[5:8] * 255).round() / 255  # without a gradient, pixels are rounded
    before = score(model, images, ["x"] * 3)
    pixels = images.clone().requires_grad_()
    scores = model.score_batch(pixels, ["x"] * 3)
    torch.testing.assert_close(scores.detach(), before, rtol=1e-3, atol=1e-3)
    (slope,) = torch.autograd.grad(scores.sum(), pixels)
    assert slope.isfinite().all()
    better = (images + 0.02 * slope.sign()).clamp(0, 1)
    assert (score(model, better, ["x"] * 3) > before).all()


def test_what_cannot_be_used_is_bad_input_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    def refused(words: str, **options: object) -> None:
        with pytest.raises(BadInput, match=words):
            load_reward(RewardConfig(name="preference", options=options))

    refused("collection is empty: name a collection of votes")
    refused("nothing is not a collection of votes", collection=str(tmp_path / "nothing"))
    refused("'light' has 0 votes with a winner: vote on more pairs; at least 2 are needed", collection=str(folder))
    with pytest.raises(BadInput, match="'light' has 1 votes with a winner"):
        reward(folder, PAIRS[:1])
    reward(folder, PAIRS[:2])
    refused("backbone 'x.safetensors' is neither pixels nor", collection=str(folder), backbone="x.safetensors")
    refused("neither pixels nor", collection=str(folder), backbone=str(folder / "votes.csv"))
    refused("has no option 'votes'; it takes collection, backbone, dtype", votes="votes.csv")
