"""A person's votes: what files are taken, that the fit is the optimum, and that the taste is found again."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from clip_reference import TINY, file_image, open_clip_shapes, random_weights, to_transformers
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import RewardConfig
from trainer.rewards import Reward, load_reward, score
from trainer.rewards.preference import Preference, fit_pairs, fit_scores
from trainer.utils.errors import BadInput


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny tower and forty pictures, of which number 0 is the darkest."""
    (tmp_path / "taste-quickgelu.json").write_text(json.dumps({**TINY, "quick_gelu": True}))
    open_clip.add_model_config(tmp_path / "taste-quickgelu.json")
    monkeypatch.setattr(Preference, "network", "taste-quickgelu")
    weights = to_transformers(random_weights(open_clip_shapes(TINY)))
    save_file({key: value for key, value in weights.items() if key.startswith("vis")}, tmp_path / "tower.safetensors")
    for number, image in enumerate(pictures()):
        file_image(image).save(tmp_path / f"{number}.png")
    return tmp_path


def pictures(seed: int = 0) -> Tensor:
    light = torch.linspace(0.1, 0.9, 40)[:, None, None, None]
    return (light + 0.1 * torch.rand(40, 3, 30, 30, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def reward(folder: Path, votes: object, name: str = "votes.json", **options: object) -> Reward:
    (folder / name).write_text(votes if isinstance(votes, str) else json.dumps(votes))
    options = {"votes": str(folder / name), "tower": str(folder / "tower.safetensors"), **options}
    return load_reward(RewardConfig(name="preference", options=options))


PAIRS = [
    {"better": f"{max(i, j)}.png", "worse": f"{min(i, j)}.png"}
    for i in range(40)
    for j in [(i * 17 + 5) % 40]
    if i != j
]


def concordance(values: Tensor) -> float:
    order = values[:, None] > values
    return order.tril(-1).sum().item() / (len(values) * (len(values) - 1) / 2)


def test_pairs_teach_a_taste_that_holds_for_new_images(folder: Path, capsys: pytest.CaptureFixture) -> None:
    judge = reward(folder, PAIRS, shrinkage=0.001)
    found = score(judge, pictures(seed=1), ["x"] * 40)
    assert concordance(found) > 0.9
    assert "votes.json: agrees with " in capsys.readouterr().err
    turned = [{"better": pair["worse"], "worse": pair["better"]} for pair in PAIRS]
    torch.testing.assert_close(
        score(reward(folder, turned, shrinkage=0.001), pictures(seed=1), ["x"] * 40), -found, rtol=1e-4, atol=1e-5
    )


def test_scores_teach_the_same_from_csv(folder: Path, capsys: pytest.CaptureFixture) -> None:
    lines = "".join(f"{i}.png,{i * 2.5 - 7}\n" for i in range(40))
    judge = reward(folder, "image,score\n" + lines, "votes.csv", shrinkage=0.001)
    found = score(judge, pictures(seed=1), ["x"] * 40)
    assert concordance(found) > 0.85
    assert abs(found.mean()) < 0.5
    share = float(capsys.readouterr().err.split("agrees with ")[1].split("%")[0])
    assert share > 85


def test_a_batch_equals_singles(folder: Path) -> None:
    judge, images = reward(folder, PAIRS[:3]), pictures()[:5]
    together = score(judge, images, ["x"] * 5)
    alone = torch.cat([score(judge, image[None], ["x"]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_votes_at_random_are_reported_as_such(folder: Path, capsys: pytest.CaptureFixture) -> None:
    flips = torch.rand(len(PAIRS), generator=torch.Generator().manual_seed(1)) < 0.5
    votes = [p if flip else {"better": p["worse"], "worse": p["better"]} for p, flip in zip(PAIRS, flips, strict=True)]
    score(reward(folder, votes), pictures()[:1], ["x"])
    share = float(capsys.readouterr().err.split("agrees with ")[1].split("%")[0])
    assert 20 < share < 75


def test_the_fits_are_optima() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 7, generator=generator, dtype=torch.float64)
    w = fit_pairs(x, 0.3).requires_grad_()
    loss = torch.log1p(torch.exp(-(x @ w))).sum() + 0.15 * w.pow(2).sum()
    assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-9
    y = torch.randn(30, generator=generator, dtype=torch.float64)
    wb = fit_scores(x, y, 0.3).requires_grad_()
    standard = (y - y.mean()) / y.std()
    loss = (x @ wb[:-1] + wb[-1] - standard).pow(2).sum() + 0.3 * wb[:-1].pow(2).sum()
    assert torch.autograd.grad(loss, wb)[0].abs().max() < 1e-9


@pytest.mark.parametrize(
    ("votes", "words"),
    [
        ("[", "cannot be read as votes"),
        ({"better": "0.png"}, "is no list of votes"),
        ([], "holds 0 votes"),
        (PAIRS[:1], "holds 1 votes; at least 2"),
        ([*PAIRS[:2], {"better": "0.png"}], "vote 3 holds better; it must hold better and worse"),
        ([*PAIRS[:2], {"image": "0.png", "score": 1}], "vote 3 holds image, score; it must hold better and worse"),
        ([{"image": "0.png", "score": 1, "note": ""}], "it must hold image and score"),
        ([{"better": "0.png", "worse": "99.png"}], r"vote 1 names the image '99.png', which is not there"),
        ([{"better": "../a/0.png", "worse": "1.png"}], "images must lie in the folder of the votes"),
        ([{"better": "/etc/x.png", "worse": "1.png"}], "images must lie in the folder of the votes"),
        ([{"image": "0.png", "score": "good"}], "has the score 'good', which is no finite number"),
        ('[{"image": "0.png", "score": NaN}]', "has the score nan"),
        ([{"image": "0.png", "score": 1}, {"image": "1.png", "score": 1}], "every image has the same score"),
    ],
)
def test_bad_votes_are_bad_input_before_anything_is_loaded(folder: Path, votes: object, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        reward(folder, votes)
