"""The files of rewards: where they are found, what is accepted, and what a wrong one says."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.check import check_groups, check_media
from trainer.cli import main
from trainer.config import RewardConfig, Section
from trainer.models.diffusers.sd3 import SD3Model
from trainer.rewards import REWARDS, Threshold, load_reward, score, score_or_nan, with_files_from
from trainer.rewards.base import ModelReward, Reward
from trainer.rewards.clip.text import TextCache
from trainer.rewards.files import (
    build,
    check_sha256,
    file_option,
    file_rule,
    fill,
    locate,
    read_weights,
    rename,
    stored_elements,
)
from trainer.utils.errors import BadInput


class Linear(ModelReward):
    """Mean colour through a linear layer in a file."""

    name, typical_range, batch_size = "linear", (-1.0, 1.0), 2

    class Options(Section):
        path: str = file_option("linear/weights.pt", "the weights of the test")
        scale: float = 1.0

    def build(self) -> nn.Module:
        path = Path(self.options.path)
        module = build(lambda: nn.Linear(3, 1))
        fill(module, read_weights(path), path, "a linear reward")
        return module

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        assert len(images) <= 2
        return self.module(images.mean((2, 3)))[:, 0] * self.options.scale


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "linear", Linear)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "rewards" / "linear" / "weights.pt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {"weight": torch.ones(1, 3), "bias": torch.zeros(1)}}, path)
    return path


def linear(path: Path | str, **options: object) -> Reward:
    return load_reward(RewardConfig(name="linear", options={"path": str(path), **options}))


def test_names_are_found_in_the_folders_only(weights: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "none", tmp_path / "rewards"]
    found = with_files_from(RewardConfig(name="linear", weight=2.0, options={"scale": 3}), folders)
    assert found.options == {"path": str(weights), "scale": 3.0}
    assert found.weight == 2.0
    (tmp_path / "secret.pt").write_bytes(b"x")
    for name in ("../secret.pt", str(tmp_path / "secret.pt"), ".", ""):
        assert locate(name, folders) is None
    (tmp_path / "rewards" / "link.pt").symlink_to(tmp_path / "secret.pt")
    assert locate("link.pt", folders) == tmp_path / "rewards" / "link.pt"
    with pytest.raises(BadInput, match=r"'linear': path 'x.pt' is not in .*rewards; the weights of the test"):
        with_files_from(RewardConfig(name="linear", options={"path": "x.pt"}), folders)


def test_a_field_that_names_a_file_can_be_told_from_others() -> None:
    rules = {name: file_rule(field) for name, field in Linear.Options.model_fields.items()}
    assert rules["scale"] is None
    assert ".safetensors" in rules["path"].suffixes


def test_a_missing_file_or_a_wrong_type_is_bad_input_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "weights.txt").write_text("x")
    for path, words in {
        tmp_path / "no.pt": r"no\.pt' does not exist; the weights of the test",
        tmp_path: "is a folder, but a file is expected",
        tmp_path / "weights.txt": r"has the wrong file type: choose a file of type \.safetensors, \.pt",
    }.items():
        with pytest.raises(BadInput, match=words):
            linear(path)


def test_options_are_typed(weights: Path) -> None:
    with pytest.raises(BadInput, match="'linear': scale is 'big': it must be a number"):
        linear(weights, scale="big")
    with pytest.raises(BadInput, match="'linear' has no option 'pth'; it takes path, scale"):
        linear(weights, pth="x")


def test_wrong_content_is_one_sentence(weights: Path, tmp_path: Path) -> None:
    content = weights.read_bytes()
    files = {
        "cut.pt": content[: len(content) // 2],
        "empty.pt": b"",
        "text.pt": b"hello",
        "cut.safetensors": b"12345678",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInput, match="cannot be loaded as weights|damaged") as caught:
            linear(tmp_path / name).load()
        assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(BadInput, match="does not contain a state dict"):
        linear(tmp_path / "list.pt").load()


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_file_is_one_sentence_or_still_whole(form: str, tmp_path: Path) -> None:
    shapes = {"first.weight": (8, 3), "first.bias": (8,), "second.weight": (1, 8), "second.bias": (1,)}
    whole, dice = {key: torch.rand(shape) for key, shape in shapes.items()}, random.Random(0)
    path = tmp_path / ("damaged.safetensors" if form == "safetensors" else "damaged.pt")
    if form == "safetensors":
        save_file(whole, path)
    else:
        torch.save(whole, path, _use_new_zipfile_serialization=form == "zip")
    content, refused = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(dice.choice((1, 3, 30))):
            damaged[dice.randrange(len(content))] = dice.randrange(256)
        path.write_bytes(damaged[: dice.choice((len(content), dice.randrange(len(content))))])
        module = nn.ModuleDict({"first": nn.Linear(3, 8), "second": nn.Linear(8, 1)})
        try:
            fill(module, read_weights(path), path, "a test")
            assert stored_elements(path) == 41
        except BadInput as error:
            refused += 1
            assert str(path) in str(error)
            assert str(error).isprintable()
            assert len(str(error)) < 1000
    assert refused > 100


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "trapped"),))

    torch.save({"weight": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(BadInput, match="not loaded for safety"):
        linear(tmp_path / "trap.pt").load()
    assert not (tmp_path / "trapped").exists()


def test_every_key_must_be_there_and_no_other(tmp_path: Path) -> None:
    good = {"weight": torch.ones(1, 3), "bias": torch.zeros(1)}
    cases = {
        r"weight has the dtype torch.int64, expected torch.float32": {**good, "weight": torch.ones(1, 3).long()},
        "missing keys bias": {"weight": good["weight"]},
        "unexpected keys other": {**good, "other": torch.ones(1)},
        r"weight has the shape \[1, 4\], expected \[1, 3\]": {**good, "weight": torch.ones(1, 4)},
    }
    for words, content in cases.items():
        save_file(content, tmp_path / "wrong.safetensors")
        with pytest.raises(BadInput, match=f"is not a linear reward: {words}"):
            linear(tmp_path / "wrong.safetensors").load()
    with pytest.raises(BadInput, match="a test: unexpected keys b, c, d and 1 more"):
        rename(dict.fromkeys("abcde", torch.ones(1)), {"a": "A"}.get, tmp_path, "a test")
    assert list(rename({"a": torch.ones(1), "b": torch.ones(1)}, {"a": "A", "b": ""}.get, tmp_path, "x")) == ["A"]


def test_scores_in_chunks_and_half_precision_files(tmp_path: Path, weights: Path) -> None:
    save_file({"weight": torch.ones(1, 3).half(), "bias": torch.zeros(1).half()}, tmp_path / "half.safetensors")
    images = torch.rand(5, 3, 8, 8)
    for path in (weights, tmp_path / "half.safetensors"):
        tested = linear(path)
        found = score(tested, images, ["x"] * 5)
        torch.testing.assert_close(found, images.mean((2, 3)).sum(1))
        assert next(tested.module.parameters()).dtype == torch.float32
        tested.idle()
    linear(weights).idle()


def test_room_is_asked_for_before_weights_move_to_an_accelerator(weights: Path) -> None:
    asked: list[tuple[int, str, str]] = []
    reward = linear(weights)
    inner = Threshold(reward, 0.5)  # hands the hook on
    inner.register_memory_hook(
        lambda size, device: asked.append((size, device.type, next(reward.module.parameters()).device.type))
    )
    assert inner.memory() == 4 * (3 + 1)
    for device in ("cpu", "meta", "meta"):
        reward.score(torch.rand(2, 3, 8, 8, device=device), ["x"] * 2)
    assert asked == [(16, "meta", "cpu")]
    assert REWARDS["brightness"]().memory() == 0
    REWARDS["brightness"]().register_memory_hook(lambda size, device: None)


def test_videos_through_an_image_reward(weights: Path) -> None:
    videos = [torch.rand(3, 3, 8, 8), torch.rand(17, 3, 8, 4)]
    tested = linear(weights)
    frames = [0, 2, 5, 7, 9, 11, 14, 16]  # 0, 16/7, 32/7, ... rounded
    expected = [videos[0].mean((2, 3)).sum(1).mean(), videos[1][frames].mean((2, 3)).sum(1).mean()]
    torch.testing.assert_close(score(tested, videos, ["a", "b"]), torch.stack(expected))
    torch.testing.assert_close(score(tested, videos[0][None], ["a"]), expected[0][None])
    videos[0][1, 0, 0, 0] = torch.nan
    found = score_or_nan(tested, videos, ["a", "b"])
    assert found[0].isnan()
    torch.testing.assert_close(found[1], expected[1])


def test_a_video_reward_takes_no_images() -> None:
    class Length(Reward):
        name, typical_range, media = "length", (0.0, 1.0), "video"

        def score(self, images: list[Tensor], prompts: list[str]) -> Tensor:
            return torch.tensor([float(len(video)) for video in images])

    assert score(Length(), [torch.rand(3, 3, 8, 8), torch.rand(5, 3, 4, 4)], ["a", "b"]).tolist() == [3, 5]
    assert score(Length(), torch.rand(2, 4, 3, 8, 8), ["a", "b"]).tolist() == [4, 4]
    with pytest.raises(ValueError, match="'length' scores videos, not images"):
        score(Length(), torch.rand(2, 3, 8, 8), ["a", "b"])


def test_lists_of_images_of_any_sizes(weights: Path) -> None:
    images = [torch.rand(3, 8, 8), torch.rand(1, 4, 6), torch.rand(3, 8, 8)]
    expected = torch.stack([image.expand(3, -1, -1).mean((1, 2)).sum() for image in images])
    torch.testing.assert_close(score(linear(weights), images, ["x"] * 3), expected)
    torch.testing.assert_close(score(linear(weights), images[::2], ["x"] * 2), expected[::2])


def test_command_line_scores_with_options_and_files(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    image = tmp_path / "white.png"
    Image.new("RGB", (4, 4), "white").save(image)
    words = ["score", "linear", str(image), "--prompt", "x", "--set", "scale=2"]
    assert main([*words, "--files", str(tmp_path / "rewards")]) == 0
    assert capsys.readouterr().out.startswith("6.000000\t")
    assert main([*words, "--set", f"path={weights}"]) == 0
    assert main(words) == 2
    assert "path 'linear/weights.pt' does not exist; the weights of the test" in capsys.readouterr().err
    assert main([*words, "--files", str(tmp_path)]) == 2
    assert f"path 'linear/weights.pt' is not in {tmp_path}; the weights" in capsys.readouterr().err
    assert main([*words, "--set", "scale"]) == 2
    assert "'scale' is not of the form" in capsys.readouterr().err


def test_a_run_reads_weights_before_its_model_and_trains_on_two_rewards(
    weights: Path, tiny_description: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idled = []
    monkeypatch.setattr(Linear, "idle", lambda self: idled.append(1))
    tiny_description["rewards"] = [{"name": "linear", "options": {"path": str(weights)}}, {"name": "brightness"}]
    tiny_description["runtime"] = {**tiny_description.get("runtime", {}), "iterations": 1}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(tiny_description))
    assert main(["train", str(file), "--output", str(tmp_path / "run")]) == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert set(events[0]["rewards"]) == {"linear", "brightness"}
    assert idled
    save_file({"weight": torch.ones(1, 3)}, tmp_path / "wrong.safetensors")
    tiny_description["rewards"][0]["options"]["path"] = str(tmp_path / "wrong.safetensors")
    file.write_text(json.dumps(tiny_description))
    monkeypatch.setattr(SD3Model, "load", lambda *a: pytest.fail("the model was loaded first"))
    assert main(["train", str(file), "--output", str(tmp_path / "other")]) == 2


def test_a_groupwise_reward_works_in_one_process_only() -> None:
    class Compared(Linear):
        groupwise = True

    check_groups({"compared": Compared.__new__(Compared)}, 1)
    with pytest.raises(BadInput, match="'compared' compares all images of a group: it works in one process, not 2"):
        check_groups({"compared": Compared.__new__(Compared)}, 2)


def test_a_missing_package_is_named() -> None:
    class Needy(Linear):
        name, packages = "needy", ("torch", "no_such_package")

    with pytest.raises(BadInput, match="'needy' needs the package 'no_such_package'"):
        Needy()


def test_text_features_are_computed_once_and_long_prompts_reported_once(capsys: pytest.CaptureFixture) -> None:
    asked = []

    def encode(texts: list[str]) -> Tensor:
        asked.extend(texts)
        return torch.tensor([[float(len(text))] for text in texts])

    cache = TextCache(encode, 2, lambda text: len(text.split()))
    cpu = torch.device("cpu")
    assert cache(["a b", "a b c", "a b"], cpu).tolist() == [[3], [5], [3]]
    assert cache(["a b c"], cpu).tolist() == [[5]]
    assert asked == ["a b", "a b c"]
    warned = capsys.readouterr().err.splitlines()
    assert warned == [
        "warning: the prompt 'a b c' has 3 tokens, of which the reward model reads 2; the rest is ignored"
    ]


def test_a_file_is_known_by_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    check_sha256(tmp_path / "a.txt", "ba7816bf", "template")
    with pytest.raises(BadInput, match=r"template .*a.txt is not the original file: sha256 ba7816bf.*, expected 00"):
        check_sha256(tmp_path / "a.txt", "00", "template")


def test_a_video_reward_does_not_go_with_a_model_of_images() -> None:
    class Film(Reward):
        name, typical_range, media = "film", (0.0, 1.0), "video"

        def score(self, images: Tensor, prompts: list[str]) -> Tensor:
            raise NotImplementedError

    check_media({"film": Film(), "brightness": REWARDS["brightness"]()}, 5)
    check_media({"brightness": REWARDS["brightness"]()}, 1)
    with pytest.raises(BadInput, match="reward 'film' .*videos.* model.frames is 1"):
        check_media({"film": Film()}, 1)
