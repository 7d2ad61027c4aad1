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
from trainer.rewards import REWARDS, Reward, differentiable_score, load_reward, score
from trainer.rewards.files import WEIGHTS, file_rule
from trainer.utils.errors import BadInput

SIZES = {"square": (40, 40), "portrait": (57, 31), "landscape": (31, 57)}
ODD = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 9), (3, 3), (3, 4), (2000, 3), (3, 2000), (1, 5000))
DIFFERENTIABLE = [name for name in LOCAL if REWARDS[name].differentiable]


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
def rewards(options: dict[str, dict]) -> dict[str, Reward]:
    return {name: reward(name, options[name]) for name in LOCAL}


def reward(name: str, options: dict) -> Reward:
    return load_reward(RewardConfig(name=name, options=options))


def make_images(name: str, count: int, size: tuple[int, int] = (40, 40), channels: int = 3) -> Tensor:
    """Images, or videos of three frames for a video reward."""
    shape = (count, *((3,) if name in VIDEO else ()), channels, *size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def scores(tested: Reward, name: str, images: Tensor | list[Tensor]) -> Tensor:
    if name in VIDEO:
        tested.shared.known.clear()
    return score(tested, images, [tiny_rewards.prompt(name)] * len(images))


def test_this_page_tests_every_local_reward() -> None:
    assert set(REWARDS) - set(LOCAL) == {"external", "mllm-rubric", "mllm-yes", "mllm-pairwise"}


@pytest.mark.parametrize("name", LOCAL)
def test_images_of_any_form(name: str, rewards: dict[str, Reward]) -> None:
    alone = [scores(rewards[name], name, make_images(name, 1, size)) for size in SIZES.values()]
    mixed = scores(rewards[name], name, [make_images(name, 1, size)[0] for size in SIZES.values()])
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert mixed.isfinite().all()
    grey = make_images(name, 1, channels=1)
    color = torch.cat([grey] * 3, -3)
    opaque = torch.cat([color, torch.ones_like(grey)], -3)
    clear = torch.cat([color, torch.zeros_like(grey)], -3)
    assert scores(rewards[name], name, grey) == scores(rewards[name], name, color)
    assert scores(rewards[name], name, opaque) == scores(rewards[name], name, color)
    assert scores(rewards[name], name, clear) == scores(rewards[name], name, torch.ones_like(color))


@pytest.mark.parametrize("name", LOCAL)
def test_tiny_and_very_long_images_have_a_score_or_one_sentence(name: str, rewards: dict[str, Reward]) -> None:
    for size in ODD:
        too_long = name in ("hpsv3", *VIDEO) and max(size) > 200 * min(size)
        if too_long:
            with pytest.raises(ValueError, match=f"an image of {size[1]} x {size[0]} is too long for this reward"):
                scores(rewards[name], name, make_images(name, 1, size))
        else:
            assert scores(rewards[name], name, make_images(name, 1, size)).isfinite().all(), size
    with pytest.raises(ValueError, match="are not \\[B, 3, H, W\\]"):
        scores(rewards[name], name, make_images(name, 1, (0, 8)))


@pytest.mark.parametrize("name", LOCAL)
def test_none_one_and_sixty_four(name: str, rewards: dict[str, Reward]) -> None:
    count = 4 if name in VIDEO[1:] else 64  # these share all but the last line with the first
    images = make_images(name, count)
    together = scores(rewards[name], name, images)
    assert together.shape == (count,)
    for index in (0, 2, count - 1):
        alone = scores(rewards[name], name, images[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-5, atol=1e-5)
    assert scores(rewards[name], name, images[:0]).shape == (0,)
    rewards[name].idle()
    assert torch.equal(scores(rewards[name], name, images[:1]), scores(rewards[name], name, images[:1]))


@pytest.mark.parametrize("name", LOCAL)
def test_bad_pixels_and_counts(name: str, rewards: dict[str, Reward]) -> None:
    for bad in (math.nan, math.inf):
        images = make_images(name, 2)
        images[1, ..., 3, 3] = bad
        with pytest.raises(ValueError, match="not finite"):
            scores(rewards[name], name, images)
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        score(rewards[name], make_images(name, 2), [tiny_rewards.prompt(name)])


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_each_prompt_is_encoded_once(name: str, rewards: dict[str, Reward], monkeypatch: pytest.MonkeyPatch) -> None:
    rewards[name].load()
    asked, encode = [], rewards[name].texts.encode
    monkeypatch.setattr(rewards[name].texts, "encode", lambda texts: asked.extend(texts) or encode(texts))
    for _ in range(2):
        score(rewards[name], make_images(name, 3), ["a new one", "another", "a new one"])
    assert asked == ["a new one", "another"]


# ------------------------------------------------------------------------------------------------------------- memory


def network_of(tested: Reward, name: str) -> torch.nn.Module | None:
    return (tested.shared if name in VIDEO else tested).module


@pytest.mark.parametrize("name", NETWORKS)
def test_an_idle_network_leaves_the_accelerator(
    name: str, rewards: dict[str, Reward], monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards[name].load()
    moved = []
    monkeypatch.setattr(network_of(rewards[name], name), "to", moved.append)
    rewards[name].idle()
    assert moved == ["cpu"]


@pytest.mark.parametrize("name", LOCAL)
def test_memory_is_known_before_the_weights_are_read(name: str, options: dict[str, dict]) -> None:
    other = {"fps": 7.0} if name in VIDEO else {}  # a network that no other test has loaded
    tested = reward(name, options[name] | other)
    before = tested.memory()
    if name not in NETWORKS:
        assert before == 0
        return
    assert network_of(tested, name) is None, "nothing is loaded"
    tested.load()
    network = network_of(tested, name)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))
    assert tested.memory() == held
    buffers = sum(tensor.numel() * tensor.element_size() for tensor in network.buffers())
    assert before >= held - buffers
    # Some files hold more than the network uses: a LoRA, a language model's output layer, a text encoder.
    if name not in ("preference", "hpsv3", *VIDEO):
        assert before < 1.05 * held


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_can_be_held_in_bfloat16(name: str, options: dict[str, dict], rewards: dict[str, Reward]) -> None:
    half = reward(name, {**options[name], "dtype": "bfloat16"})
    found = scores(half, name, make_images(name, 2))
    assert found.dtype == torch.float32
    network = network_of(half, name)
    for key, value in network.named_parameters():
        assert value.dtype == (torch.float32 if key.startswith(half.holder.float32_parts) else torch.bfloat16), key
    heads = sum(value.nbytes for value in network.parameters() if value.dtype == torch.float32)
    assert half.memory() - heads < 0.75 * (rewards[name].memory() - heads)
    torch.testing.assert_close(found, scores(rewards[name], name, make_images(name, 2)), rtol=0.1, atol=0.5)


# ---------------------------------------------------------------------------------------------------------- gradients


def saturated(side: int = 40) -> Tensor:
    """Images `[2, 3, side, side]`, a fifth of the pixels exactly 0, a fifth exactly 1."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(2, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return (smooth * 0.6 + torch.rand(2, 3, side, side, generator=generator) - 0.3).clamp(0, 1)


def gradient(tested: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    images = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(differentiable_score(tested, images, prompts).sum(), images)
    return found


def test_which_rewards_are_differentiable() -> None:
    assert {name for name, kind in REWARDS.items() if kind.differentiable} == {
        "brightness", "colorfulness", "sharpness", "hps-v2.1", "clip", "pickscore", "imagereward", "aesthetic",
        "preference",
    }  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_is_that_of_central_differences(name: str, rewards: dict[str, Reward]) -> None:
    images, prompts = saturated(), [tiny_rewards.prompt(name)] * 2
    found = gradient(rewards[name], images, prompts)
    assert found.isfinite().all()

    def value(moved: Tensor) -> float:
        return differentiable_score(rewards[name], moved.requires_grad_(), prompts).double().sum().item()

    generator = torch.Generator().manual_seed(4)
    masks = {
        "all": torch.ones_like(images),
        "black": (images == 0).float(),
        "white": (images == 1).float(),
        "some": (torch.rand(images.shape, generator=generator) < 0.3).float(),
    }
    for which, mask in masks.items():
        slope = (found * mask).norm().item()
        direction = found * mask / slope
        steps = {}
        for step in (0.4, 0.2):
            change = value(images + step * direction) - value(images - step * direction)
            steps[step] = change / (2 * step)
        estimate = (4 * steps[0.2] - steps[0.4]) / 3  # without the error of second order
        assert estimate == pytest.approx(slope, rel=0.02), which


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_saturated_pixels_have_a_gradient(name: str, rewards: dict[str, Reward]) -> None:
    images = saturated()
    images[0] = images[0] * 1.4 - 0.2  # a decoder's output leaves [0, 1] too
    found = gradient(rewards[name], images, [tiny_rewards.prompt(name)] * 2)
    for where in (images <= 0, images >= 1):
        assert (found[where] != 0).double().mean() > 0.95


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_grey_image_has_a_finite_gradient(name: str, rewards: dict[str, Reward]) -> None:
    for value in (0.0, 0.5, 1.0):
        grey = torch.full((1, 3, 30, 30), value)
        assert gradient(rewards[name], grey, [tiny_rewards.prompt(name)]).isfinite().all()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_differentiable_scores_are_the_scores_but_for_rounding(
    name: str, size: tuple[int, int], rewards: dict[str, Reward]
) -> None:
    images, prompts = make_images(name, 4, size), [tiny_rewards.prompt(name)] * 4
    images = torch.nn.functional.avg_pool2d(images, 5, 1, 2)  # without overshoot, which files cut off
    plain = score(rewards[name], images, prompts)
    with_gradient = differentiable_score(rewards[name], images.requires_grad_(), prompts)
    assert with_gradient.requires_grad
    torch.testing.assert_close(with_gradient.detach(), plain, rtol=0.02, atol=0.02)
    assert not score(rewards[name], images, prompts).requires_grad


def test_videos_have_gradients_too(rewards: dict[str, Reward]) -> None:
    video = torch.rand(2, 3, 3, 8, 8).requires_grad_()
    differentiable_score(rewards["brightness"], video, ["a"] * 2).sum().backward()
    torch.testing.assert_close(video.grad.sum((1, 3, 4)), torch.tensor([[0.299, 0.587, 0.114]] * 2))


@pytest.mark.parametrize("name", [name for name in LOCAL if name not in DIFFERENTIABLE])
def test_other_rewards_say_that_they_have_no_gradient(name: str, rewards: dict[str, Reward]) -> None:
    images = make_images(name, 1).requires_grad_()
    with pytest.raises(ValueError, match=f"reward '{name}' is not differentiable"):
        differentiable_score(rewards[name], images, [tiny_rewards.prompt(name)])
    scores(rewards[name], name, images)  # and are not disturbed by images that have one
    with pytest.raises(ValueError, match="do not require a gradient"):
        differentiable_score(rewards["brightness"], torch.rand(1, 3, 8, 8), ["a"])


# -------------------------------------------------------------------------------------------------------- wrong files


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
    for file, words in {"readme.md": "wrong file type", "none.pt": "does not exist"}.items():
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
    with pytest.raises(BadInput, match=r"changed.txt is not the original file: sha256 \w+..., expected"):
        reward(name, {**options[name], option: str(changed)})
