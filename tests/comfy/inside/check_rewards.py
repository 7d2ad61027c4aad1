"""The reward nodes: they hand on a run description's `rewards`, and score as the trainer scores."""

from typing import ClassVar, Literal

import folder_paths
import pytest
import tiny_rewards
import torch

GREY = torch.tensor([0.2, 0.9, 0.6])[:, None, None, None].expand(3, 16, 16, 3)  # brightness is the value itself


@pytest.fixture
def nodes(pack):
    return pack("nodes.rewards")


@pytest.fixture
def load(nodes):
    return lambda name: nodes.LoadReward.execute({"reward": name}).result[0]


def weighed(nodes, *parts: tuple[object, float]):
    sockets = {}
    for i, (reward, weight) in enumerate(parts, 1):
        sockets |= {f"reward_{i}": reward, f"weight_{i}": weight}
    return nodes.CombineRewards.execute(**sockets).result[0]


def score(pack, reward, images=GREY, prompts=("a red circle",) * 3):
    scoring = pack("nodes.host.scoring")
    items = images.movedim(-1, 1)
    return scoring.score_all(reward, items, list(prompts), torch.device("cpu"), lambda size: None)


def test_every_reward_of_the_trainer_can_be_chosen(pack, nodes) -> None:
    (widget,) = nodes.LoadReward.define_schema().inputs
    assert [option.key for option in widget.options] == list(pack("trainer.rewards").REWARDS)


def test_what_flows_is_the_run_descriptions_own(pack, nodes, load) -> None:
    binary = nodes.ThresholdReward.execute(load("brightness"), 0.5).result[0]
    both = weighed(nodes, (binary, 2.0), (load("sharpness"), -0.5))
    assert both.description() == [
        {"name": "brightness", "weight": 2.0, "threshold": 0.5},
        {"name": "sharpness", "weight": -0.5},
    ]
    config = pack("trainer.config").RunConfig(rewards=both.description(), prompts={"texts": ["a red circle"]})
    assert config.rewards == list(both.rewards)


def test_weights_multiply_where_combinations_are_combined(nodes, load) -> None:
    inner = weighed(nodes, (load("brightness"), 2.0), (load("sharpness"), 3.0))
    outer = weighed(nodes, (inner, 0.5), (load("colorfulness"), 4.0))
    assert [reward.weight for reward in outer.rewards] == [1.0, 1.5, 4.0]


def test_scores_are_the_trainers(pack, nodes, load) -> None:
    assert score(pack, load("brightness"))["brightness"].tolist() == pytest.approx([0.2, 0.9, 0.6])
    binary = nodes.ThresholdReward.execute(load("brightness"), 0.5).result[0]
    assert score(pack, binary)["brightness"].tolist() == [0, 1, 1]


def test_the_table_and_the_plot(pack, load) -> None:
    scoring, parts = pack("nodes.host.scoring"), score(pack, load("brightness"))
    text = scoring.score_table(parts, parts["brightness"], ["a", "b", "c"])
    assert text.splitlines()[0] == "1: 0.2  a"
    assert text.splitlines()[-1] == "mean 0.5667, std 0.3512, best is image 2"
    plot = scoring.bar_plot(parts, parts["brightness"])
    assert plot.ndim == 4
    assert plot.shape[-1] == 3
    orange = torch.tensor([255, 127, 14]) / 255
    assert ((plot[0] - orange).abs().sum(-1) < 0.02).sum() > 200  # the best image's bar


def test_an_image_without_a_score_is_left_out(pack) -> None:
    scoring, scores = pack("nodes.host.scoring"), torch.tensor([0.5, torch.nan, 0.7])
    last = scoring.score_table({"a": scores}, scores, ["x"] * 3).splitlines()[-1]
    assert last == "mean 0.6, std 0.1414, 1 without a score, best is image 3"
    assert scoring.score_table({"a": scores[1:2]}, scores[1:2], ["x"]).splitlines()[-1] == "no image has a score"
    assert scoring.bar_plot({"a": scores}, scores).isfinite().all()


def test_prompts_one_for_all_or_one_each(pack) -> None:
    split = pack("nodes.host.scoring").split_prompts
    assert split("a cat\n", 3, "images") == ["a cat"] * 3
    assert split("a cat\n\n a dog ", 2, "images") == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="prompt has 2 lines for 3 images"):
        split("a cat\na dog", 3, "images")
    with pytest.raises(ValueError, match="prompt is empty"):
        split(" \n", 3, "images")


def test_a_prompt_that_cannot_be_judged_is_said(pack, load) -> None:
    with pytest.raises(ValueError, match="a cat"):
        score(pack, load("shapes"), prompts=["a cat"] * 3)


def test_what_cannot_be_combined_is_refused(nodes, load) -> None:
    with pytest.raises(ValueError, match="'brightness' is connected more than once"):
        weighed(nodes, (load("brightness"), 1.0), (load("brightness"), 2.0))
    both = weighed(nodes, (load("brightness"), 1.0), (load("sharpness"), 1.0))
    with pytest.raises(ValueError, match="reward combines 2 rewards"):
        nodes.ThresholdReward.execute(both, 0.5)
    binary = nodes.ThresholdReward.execute(load("brightness"), 0.5).result[0]
    with pytest.raises(ValueError, match=r"already has a threshold \(0.5\)"):
        nodes.ThresholdReward.execute(binary, 0.7)


def test_the_best_come_first(nodes) -> None:
    images, scores = nodes.PickBest.execute([GREY[:2], GREY[2:]], [0.2, 0.9, 0.6], [2]).result
    assert scores == [0.9, 0.6]
    assert torch.equal(images, GREY[[1, 2]])
    with pytest.raises(ValueError, match="3 images but 2 scores"):
        nodes.PickBest.execute([GREY], [0.1, 0.2], [1])
    with pytest.raises(ValueError, match="k is 4, but only 3 images have a score"):
        nodes.PickBest.execute([GREY], [0.1, 0.2, 0.3], [4])
    assert nodes.PickBest.execute([GREY], [float("nan"), 0.2, 0.3], [2]).result[1] == [0.3, 0.2]
    with pytest.raises(ValueError, match="only 2 images have a score"):
        nodes.PickBest.execute([GREY], [float("nan"), 0.2, 0.3], [3])
    with pytest.raises(ValueError, match="2 different sizes"):
        nodes.PickBest.execute([GREY, GREY[:, :8]], [0.1] * 6, [1])


# ------------------------------------------------------------------------------------------- rewards of other kinds


@pytest.fixture
def film(pack, monkeypatch):
    """A reward for videos, registered like any other."""
    rewards = pack("trainer.rewards")

    class Film(rewards.Reward):
        name = "film"
        typical_range = (0.0, 1.0)
        media: ClassVar[str] = "video"

        def score(self, images, prompts):
            return torch.stack([video.mean() for video in images])

    monkeypatch.setitem(rewards.REWARDS, "film", Film)
    return Film


@pytest.fixture
def settable(pack, film):
    """The same with every sort of option."""
    from pydantic import Field

    class Options(pack("trainer.config").Section):
        weights: str = Field(
            "film/film.safetensors",
            description="Its weights.",
            json_schema_extra={"reward_file": {"suffixes": [".safetensors"], "folder": False}},
        )
        dtype: Literal["float32", "float16"] = "float32"
        frames: int = Field(8, ge=1, le=64)
        aspects: list[str] = ["light", "motion"]
        exact: bool = False

    film.Options = Options
    return film


def test_options_become_widgets(pack, settable, tmp_path, monkeypatch) -> None:
    (tmp_path / "film").mkdir()
    for name in ("film/film.safetensors", "film/other.safetensors", "film/notes.txt"):
        (tmp_path / name).write_text("x")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "rewards", ([str(tmp_path)], set()))
    folder_paths.filename_list_cache.pop("rewards", None)
    widgets = {w.id: w for w in pack("nodes.host.reward_files").option_widgets(settable)}
    kinds = {name: widget.get_io_type() for name, widget in widgets.items()}
    expected = {"weights": "COMBO", "dtype": "COMBO", "frames": "INT", "aspects": "STRING", "exact": "BOOLEAN"}
    assert kinds == expected
    assert (widgets["frames"].min, widgets["frames"].max) == (1, 64)
    values = pack("nodes.host.reward_files").option_values(settable, {"aspects": "light\n motion \n", "frames": 4})
    assert values == {"aspects": ["light", "motion"], "frames": 4}
    assert widgets["weights"].options == ["film/film.safetensors", "film/other.safetensors"]
    assert widgets["dtype"].options == ["float32", "float16"]


def test_a_video_reward_is_not_given_images(pack, film) -> None:
    reward = pack("nodes.types").Rewards((pack("trainer.config").RewardConfig(name="film"),))
    with pytest.raises(ValueError, match=r"'film' \w+ videos"):
        score(pack, reward)
    with pytest.raises(ValueError, match="'film' scores videos"):
        single = torch.zeros(1, 1, 3, 16, 16)
        pack("nodes.host.scoring").score_all(reward, single, ["a"], torch.device("cpu"), lambda size: None)


def test_a_video_reward_scores_frames(pack, film) -> None:
    reward = pack("nodes.types").Rewards((pack("trainer.config").RewardConfig(name="film"),))
    frames = GREY.movedim(-1, 1)[None]
    scores = pack("nodes.host.scoring").score_all(reward, frames, ["a"], torch.device("cpu"), lambda size: None)
    assert scores["film"].tolist() == pytest.approx([GREY.mean().item()])


# -------------------------------------------------------------------- every reward that works on the CPU, in small


@pytest.fixture(scope="module")
def files(pack, tmp_path_factory):
    """models/rewards with tiny weights in the original layouts; gives each reward's options by the files' names."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        tiny_rewards.shrink(patch.setattr, pack)
        written = tiny_rewards.write(folder)
        tiny_rewards.import_anew(patch, folder / "ocr")
        for key in ("rewards", "clip_vision"):
            patch.setitem(folder_paths.folder_names_and_paths, key, ([str(folder)], set()))
            folder_paths.filename_list_cache.pop(key, None)
        for module in ("reward_files", "vote_collections"):
            patch.setattr(pack(f"nodes.host.{module}"), "votes_folder", lambda: folder)
        yield {
            name: {key: str(value).removeprefix(f"{folder}/") for key, value in options.items()}
            for name, options in written.items()
        }
    for key in ("rewards", "clip_vision"):
        folder_paths.filename_list_cache.pop(key, None)


def test_rewards_ask_for_their_weights_and_what_core_keeps_free_beside_them(pack, monkeypatch) -> None:
    asked, management = [], pack("nodes.host.devices").memory
    monkeypatch.setattr(management, "free_memory", lambda *given: asked.append(given))
    pack("nodes.host.devices").make_room_for_reward(1000, torch.device("cpu"))
    assert asked == [(1000 + management.minimum_inference_memory(), torch.device("cpu"))]


@pytest.mark.parametrize("name", tiny_rewards.LOCAL)
def test_each_is_loaded_combined_scored_and_the_best_picked(pack, nodes, files, name, monkeypatch) -> None:
    video, prompt = name in tiny_rewards.VIDEO, tiny_rewards.prompt(name)
    loaded = nodes.LoadReward.execute({"reward": name, **files[name]}).result[0]
    other = "sharpness" if name == "brightness" else "brightness"
    both = weighed(nodes, (loaded, 0.7), (nodes.LoadReward.execute({"reward": other}).result[0], 1.4))
    images = torch.rand(3, 40, 40, 3, generator=torch.Generator().manual_seed(0))
    items = images.movedim(-1, 1)[None] if video else images.movedim(-1, 1)
    room, base = [], pack("trainer.rewards.base").ModelReward
    move_to = base.move_to

    def moving(reward: object, device: torch.device) -> None:
        reward.memory_hook(reward.memory(), device)  # as before a move to a GPU
        move_to(reward, device)

    monkeypatch.setattr(base, "move_to", moving)
    parts = pack("nodes.host.scoring").score_all(both, items, [prompt] * len(items), torch.device("cpu"), room.append)
    assert list(parts) == [name, other]
    assert parts[name].isfinite().all()
    assert all(room)
    assert bool(room) == (name in tiny_rewards.NETWORKS), "room is made for networks, and for them alone"
    total = 0.7 * parts[name] + 1.4 * parts[other]
    if not video:
        picked, scores = nodes.PickBest.execute([images], total.tolist(), [1]).result
        assert scores == [total.max().item()]
        assert torch.equal(picked, images[[int(total.argmax())]])
