"""A scripted voter who prefers blue on light ground, from the first vote to a reward model that agrees with them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.votes import MARGIN, liking, scenes
from trainer.config import RewardConfig
from trainer.rewards import load_reward, score
from trainer.shapes.world import render
from trainer.utils.media import read_image
from trainer.votes import analysis, store
from trainer.votes.analysis import VoteAnalyzer
from trainer.votes.pixels import PixelFeatures
from trainer.votes.records import Vote
from trainer.votes.store import Collection

VOTES = 80


def describe(path: Path) -> np.ndarray:
    return PixelFeatures()(read_image(path)[None])[0].double().numpy()


@pytest.fixture(scope="module")
def voted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Collection, VoteAnalyzer]:
    """80 votes on 100 images, on pairs asked for four at a time."""
    pool = scenes(100, seed=0)
    collection = store.create(tmp_path_factory.mktemp("votes"), "blue")
    arrays = (render(pool) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    images = collection.add((Image.fromarray(one), "shapes", f"scene {i}") for i, one in enumerate(arrays)).names
    likes = {name: liking(scene) for name, scene in zip(images, pool, strict=True)}
    analyzer = VoteAnalyzer(lambda backbone: describe)
    for _ in range(VOTES // 4):
        for left, right in analyzer.next(collection, "pixels", count=4):
            difference = likes[left.image] - likes[right.image]
            better, worse = (left.image, right.image) if difference > 0 else (right.image, left.image)
            kind = "tie" if abs(difference) <= MARGIN else "winner"
            assert collection.record([Vote(better, worse, kind, f"{better[:20]}-{worse[:20]}")]) == 1
    return collection, analyzer


def test_eighty_votes_predict_more_than_four_of_five_left_out(voted: tuple[Collection, VoteAnalyzer]) -> None:
    collection, analyzer = voted
    state = analyzer.state(collection, "pixels")
    assert state["images"] == state["described"] == 100
    assert state["votes"]["winners"] + state["votes"]["ties"] == VOTES
    assert len({frozenset((v.better, v.worse)) for v in collection.vote_log().votes}) == VOTES, "no pair came twice"
    assert state["agreement"]["share"] > 0.8
    assert state["agreement"]["low"] < state["agreement"]["share"] < state["agreement"]["high"]
    assert state["enough"].startswith(("enough to train on", "better than guessing"))
    assert state["warnings"] == []


def test_the_reward_model_ranks_new_images_as_the_voter_does(
    voted: tuple[Collection, VoteAnalyzer], capsys: pytest.CaptureFixture
) -> None:
    reward = load_reward(RewardConfig(name="preference", options={"collection": str(voted[0].folder)}))
    new = scenes(200, seed=1)
    found = score(reward, render(new), ["x"] * 200).numpy()
    truth = np.array([liking(scene) for scene in new])
    one, other = np.triu_indices(200, 1)
    clear = np.abs(truth[one] - truth[other]) > MARGIN
    agrees = ((found[one] > found[other]) == (truth[one] > truth[other]))[clear].mean()
    assert agrees > 0.9
    assert f"preference: {VOTES} votes of blue: " in capsys.readouterr().err


def test_results_are_kept_until_the_votes_change(
    voted: tuple[Collection, VoteAnalyzer], monkeypatch: pytest.MonkeyPatch
) -> None:
    collection, analyzer = voted
    before = analyzer.state(collection, "pixels"), analyzer.next(collection, "pixels")
    with monkeypatch.context() as patch:
        patch.setattr(analysis, "fit", None)
        patch.setattr(analysis, "agreement", None)
        assert (analyzer.state(collection, "pixels"), analyzer.next(collection, "pixels")) == before
    assert collection.undo("undo") is not None
    votes = analyzer.state(collection, "pixels")["votes"]
    assert sum(votes.values()) == VOTES - 1


def test_pairs_on_a_screen_and_pairs_that_were_skipped_do_not_come(tmp_path: Path) -> None:
    collection = store.create(tmp_path, "small")
    images = collection.add((Image.new("RGB", (8, 8), (60 * i, 90, 20)), "", "") for i in range(4)).names
    analyzer = VoteAnalyzer(lambda backbone: describe)
    found = analyzer.next(collection, "pixels", count=9)
    assert len({frozenset((a.image, b.image)) for a, b in found}) == 6
    first = tuple(item.image for item in found[0])
    others = analyzer.next(collection, "pixels", count=9, exclude=[first[::-1], ("gone.png", images[0])])
    assert {frozenset((a.image, b.image)) for a, b in others} == {frozenset((a.image, b.image)) for a, b in found[1:]}
    collection.record([Vote(*first, "skip", "1")])
    assert len(analyzer.next(collection, "pixels", count=9, mode="random")) == 5
    assert len(analyzer.next(collection, "pixels", count=9, repeat=True)) == 6
    empty = store.create(tmp_path, "empty")
    assert analyzer.next(empty, "pixels") == []
    assert analyzer.state(empty, "pixels")["enough"].startswith("too few votes to tell: 0")


def test_an_image_that_cannot_be_described_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    collection = store.create(tmp_path, "broken")
    collection.add((Image.new("RGB", (8, 8), (60 * i, 90, 20)), "", "") for i in range(3))
    (collection.images / "broken.png").write_text("no image")
    analyzer = VoteAnalyzer(lambda backbone: describe)
    state = analyzer.state(collection, "pixels")
    assert (state["images"], state["described"]) == (4, 3)
    assert state["warnings"][0].startswith("broken.png is ignored: ")
    assert len(analyzer.next(collection, "pixels", count=9)) == 3
