"""What every local reward must keep to, each with tiny weights in files of the original layout, all sockets blocked."""

import importlib
import math
import os
import pickle
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_rewards
import torch
from safetensors.torch import save_file
from tiny_rewards import CONTRASTIVE, LOCAL, NETWORKS, VIDEO
from torch import Tensor

from trainer.config import RewardConfig
from trainer.rewards import REWARDS, Reward, load_reward, score
from trainer.rewards.files import WEIGHTS, file_rule
from trainer.utils.errors import BadInput

SIZES = {"square": (40, 40), "portrait": (57, 31), "landscape": (31, 57)}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict]]:
    """Options of each reward, its network small and every socket blocked."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    folder = tmp_path_factory.mktemp("rewards")
    with pytest.MonkeyPatch.context() as patch:
        tiny_rewards.shrink(patch.setattr, importlib.import_module)
        found = tiny_rewards.write(folder)
        tiny_rewards.import_anew(patch, folder / "ocr")
        for name in ("socket", "create_connection", "getaddrinfo"):
            patch.setattr(socket, name, refuse)
        yield found


@pytest.fixture(scope="module")
def judges(options: dict[str, dict]) -> dict[str, Reward]:
    return {name: reward(name, options[name]) for name in LOCAL}


def reward(name: str, options: dict) -> Reward:
    return load_reward(RewardConfig(name=name, options=options))


def seen(name: str, count: int, size: tuple[int, int] = (40, 40), channels: int = 3) -> Tensor:
    """Images, or videos of three frames for a judge of videos."""
    shape = (count, *((3,) if name in VIDEO else ()), channels, *size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def scores(judge: Reward, name: str, images: Tensor | list[Tensor]) -> Tensor:
    if name in VIDEO:
        judge.shared.known.clear()
    return score(judge, images, [tiny_rewards.prompt(name)] * len(images))


def test_this_page_tests_every_local_reward() -> None:
    assert set(REWARDS) - set(LOCAL) == {"external", "mllm-rubric", "mllm-yes", "mllm-pairwise"}


@pytest.mark.parametrize("name", LOCAL)
def test_images_of_any_form(name: str, judges: dict[str, Reward]) -> None:
    alone = [scores(judges[name], name, seen(name, 1, size)) for size in SIZES.values()]
    mixed = scores(judges[name], name, [seen(name, 1, size)[0] for size in SIZES.values()])
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert mixed.isfinite().all()
    grey = seen(name, 1, channels=1)
    color = torch.cat([grey] * 3, -3)
    opaque = torch.cat([color, torch.ones_like(grey)], -3)
    clear = torch.cat([color, torch.zeros_like(grey)], -3)
    assert scores(judges[name], name, grey) == scores(judges[name], name, color)
    assert scores(judges[name], name, opaque) == scores(judges[name], name, color)
    assert scores(judges[name], name, clear) == scores(judges[name], name, torch.ones_like(color))


@pytest.mark.parametrize("name", LOCAL)
def test_none_one_and_sixty_four(name: str, judges: dict[str, Reward]) -> None:
    count = 4 if name in VIDEO[1:] else 64  # these share all but the last line with the first
    images = seen(name, count)
    together = scores(judges[name], name, images)
    assert together.shape == (count,)
    for place in (0, 2, count - 1):
        alone = scores(judges[name], name, images[place : place + 1])
        torch.testing.assert_close(together[place : place + 1], alone, rtol=1e-5, atol=1e-5)
    assert scores(judges[name], name, images[:0]).shape == (0,)
    judges[name].idle()
    assert torch.equal(scores(judges[name], name, images[:1]), scores(judges[name], name, images[:1]))


@pytest.mark.parametrize("name", LOCAL)
def test_bad_pixels_and_counts(name: str, judges: dict[str, Reward]) -> None:
    for bad in (math.nan, math.inf):
        images = seen(name, 2)
        images[1, ..., 3, 3] = bad
        with pytest.raises(ValueError, match="not finite"):
            scores(judges[name], name, images)
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        score(judges[name], seen(name, 2), [tiny_rewards.prompt(name)])


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_each_prompt_is_encoded_once(name: str, judges: dict[str, Reward], monkeypatch: pytest.MonkeyPatch) -> None:
    asked, encode = [], judges[name].texts.encode
    monkeypatch.setattr(judges[name].texts, "encode", lambda texts: asked.extend(texts) or encode(texts))
    for _ in range(2):
        score(judges[name], seen(name, 3), ["a new one", "another", "a new one"])
    assert asked == ["a new one", "another"]


@pytest.mark.parametrize("name", NETWORKS)
def test_an_idle_network_leaves_the_accelerator(
    name: str, judges: dict[str, Reward], monkeypatch: pytest.MonkeyPatch
) -> None:
    judges[name].load()
    network = (judges[name].shared if name in VIDEO else judges[name]).module
    moved = []
    monkeypatch.setattr(network, "to", moved.append)
    judges[name].idle()
    assert moved == ["cpu"]


class Trap:
    """What a pickle that runs code holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder / "trapped"),)


def weight_options() -> list[tuple[str, str]]:
    """Reward and option, for every option that names a file of weights."""
    rules = {
        (name, key): file_rule(field) for name in NETWORKS for key, field in REWARDS[name].Options.model_fields.items()
    }
    return [
        place for place, rule in rules.items() if rule and set(rule.suffixes) == set(WEIGHTS) and place[0] != "clip"
    ]


@pytest.mark.parametrize(("name", "option"), weight_options())
def test_a_wrong_file_is_one_sentence_that_names_it(
    name: str, option: str, options: dict[str, dict], tmp_path: Path
) -> None:
    right = Path(options[name][option])
    torch.save({"weight": Trap(tmp_path)}, tmp_path / "trap.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Trap(tmp_path), protocol=2))
    (tmp_path / f"cut{right.suffix}").write_bytes(right.read_bytes()[: right.stat().st_size // 2])
    save_file({"unet.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    for file in ("trap.pt", "old.pt", f"cut{right.suffix}", "other.safetensors"):
        with pytest.raises(BadInput, match=re.escape(file)) as caught:
            reward(name, {**options[name], option: str(tmp_path / file)}).load()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "trapped").exists()
    (tmp_path / "readme.md").write_text("x")
    for file, words in {"readme.md": "wrong type of file", "none.pt": "does not exist"}.items():
        with pytest.raises(BadInput, match=f"'{name}': {option} .*{file}' .*{words}"):
            reward(name, {**options[name], option: str(tmp_path / file)})


@pytest.mark.parametrize(
    ("name", "option"), [("hpsv3", "instruction"), ("hpsv3", "suffix"), *((name, "template") for name in VIDEO)]
)
def test_a_text_must_be_there_and_the_original(
    name: str, option: str, options: dict[str, dict], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=f"'{name}': {option} .*none.txt' does not exist"):
        reward(name, {**options[name], option: str(tmp_path / "none.txt")})
    changed = tmp_path / "changed.txt"
    changed.write_bytes(Path(options[name][option]).read_bytes().rstrip() + b"\n")
    with pytest.raises(BadInput, match=r"changed.txt is not the original: its sha256 is \w+..., expected"):
        reward(name, {**options[name], option: str(changed)})
