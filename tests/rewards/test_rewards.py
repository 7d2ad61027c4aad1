"""Rewards: rule rewards against independent formulas, and what every reward must keep to."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from trainer.config import RewardConfig
from trainer.rewards import Reward, Threshold, load_reward, score
from trainer.shapes.prompts import COLORS, SHAPES, Phrase, Prompt
from trainer.shapes.world import Scene, SceneObject, render
from trainer.utils.errors import BadInput

PROMPT = "a red circle"
RULES = ["brightness", "colorfulness", "jpeg-size", "shapes", "shapes-strict", "sharpness"]
"""Rewards that need nothing but images and prompts."""


def images(count: int = 4, height: int = 24, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def make_images() -> tuple[Tensor, list[str]]:
    """Images of the shapes world, some right and some wrong."""
    objects = [SceneObject(shape, color, 30.0, 34.0, 12.0) for shape in SHAPES for color in COLORS[:2]]
    texts = [Prompt("", (Phrase("circle", "red"),)).phrases[0].text()] * len(objects)
    return render([Scene((item,), (0.93, 0.93, 0.93)) for item in objects]), texts


def reward(name: str, **settings: object) -> Reward:
    return load_reward(RewardConfig(name=name, **settings))


def scores(name: str, batch: Tensor) -> list[float]:
    return score(reward(name), batch, [PROMPT] * len(batch)).tolist()


# ------------------------------------------------------------------------------------------------------- rule rewards


def test_brightness_is_the_mean_luma() -> None:
    batch = images()
    expected = [0.299 * i[0].mean() + 0.587 * i[1].mean() + 0.114 * i[2].mean() for i in batch.numpy()]
    assert scores("brightness", batch) == pytest.approx(expected, abs=1e-5)
    plain = torch.stack([torch.tensor(c)[:, None, None].expand(3, 8, 8) for c in ([0.0] * 3, [1.0] * 3, [1.0, 0, 0])])
    assert scores("brightness", plain) == pytest.approx([0, 1, 0.299], abs=1e-6)


def test_colorfulness_is_hasler_and_suesstrunks() -> None:
    batch = images(height=64, width=64) * torch.tensor([1.0, 0.5, 0.2, 0.8])[:, None, None, None]
    expected = []
    for red, green, blue in batch.numpy():
        rg, yb = red - green, 0.5 * (red + green) - blue
        expected.append(math.sqrt(rg.std() ** 2 + yb.std() ** 2) + 0.3 * math.sqrt(rg.mean() ** 2 + yb.mean() ** 2))
    assert scores("colorfulness", batch) == pytest.approx(expected, rel=1e-3)
    grey = images()[:, :1].expand(-1, 3, -1, -1)
    assert scores("colorfulness", grey) == pytest.approx([0] * 4, abs=1e-5)
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    assert scores("colorfulness", red) == pytest.approx([0.3 * math.hypot(1, 0.5)], rel=1e-5)


def test_images_too_small_for_a_spread_have_none() -> None:
    red = torch.tensor([1.0, 0, 0])[:, None, None]
    assert scores("colorfulness", red[None]) == pytest.approx([0.3 * math.hypot(1, 0.5)])
    two = torch.stack([red[:, 0], 1 - red[:, 0]], 2)  # red beside cyan: opponents 1, -1 and 0.5, -0.5
    spread = math.hypot(2**0.5, 0.5**0.5)
    assert scores("colorfulness", two[None]) == pytest.approx([spread], rel=1e-5)
    for size in ((1, 1), (2, 9), (9, 2), (3, 3)):
        assert scores("sharpness", torch.rand(2, 3, *size)) == [0, 0]
    three = torch.zeros(1, 3, 3, 4)
    three[..., 1, 1] = 1  # the Laplacian of the two inner pixels is -4 and 1
    assert scores("sharpness", three) == pytest.approx([5 / 2**0.5], rel=1e-5)


def test_a_jpeg_has_a_longest_side() -> None:
    assert scores("jpeg-size", torch.zeros(1, 3, 1, 65_500))[0] > 0
    with pytest.raises(ValueError, match="an image of 65501 x 1 is too large for JPEG: at most 65500 pixels"):
        scores("jpeg-size", torch.zeros(1, 3, 1, 65_501))


def test_sharpness_is_the_spread_of_the_laplacian() -> None:
    batch = images()
    expected = []
    for image in batch.double().numpy():
        y = np.tensordot([0.299, 0.587, 0.114], image, 1)
        laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
        expected.append(laplacian.std(ddof=1))
    assert scores("sharpness", batch) == pytest.approx(expected, rel=1e-4)
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    assert scores("sharpness", ramp) == pytest.approx([0], abs=1e-5)


def test_jpeg_size_is_that_of_a_file_of_quality_95() -> None:
    batch = images()
    expected = []
    for image in batch:
        buffer = io.BytesIO()
        array = np.rint(image.numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
        Image.fromarray(array).save(buffer, format="JPEG", quality=95)
        expected.append(len(buffer.getvalue()) / 1000)
    assert scores("jpeg-size", batch) == pytest.approx(expected)
    flat = torch.full((1, 3, 24, 32), 0.5)
    assert scores("jpeg-size", flat)[0] < min(expected)


# ------------------------------------------------------------------------------------------------------ every reward


@pytest.mark.parametrize("name", RULES)
def test_batch_equals_singles_and_repeats(name: str) -> None:
    batch, texts = make_images()
    tested = reward(name)
    together = score(tested, batch, texts)
    alone = torch.cat([score(tested, batch[i : i + 1], texts[i : i + 1]) for i in range(len(batch))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(score(tested, batch, texts), together)
    assert together.dtype == torch.float32
    assert together.shape == (len(batch),)
    assert together.unique().numel() > 1
    turned = score(tested, batch.flip(0), texts)
    torch.testing.assert_close(turned, together.flip(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_no_images_have_no_scores(name: str) -> None:
    assert score(reward(name), torch.zeros(0, 3, 8, 8), []).shape == (0,)


@pytest.mark.parametrize("name", RULES)
def test_half_precision_images_are_scored(name: str) -> None:
    batch, texts = make_images()
    full, half = (score(reward(name), b, texts) for b in (batch, batch.half()))
    torch.testing.assert_close(full, half, rtol=0.02, atol=0.02)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_pixels_that_are_no_numbers_are_an_error(bad: float) -> None:
    batch = images()
    batch[2, 1, 3, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        score(reward("brightness"), batch, [PROMPT] * 4)


def test_counts_must_match() -> None:
    with pytest.raises(ValueError, match="4 images but 3 prompts"):
        score(reward("brightness"), images(), [PROMPT] * 3)
    with pytest.raises(ValueError, match="0 images but 1 prompts"):
        score(reward("brightness"), images(0), [PROMPT])


def test_scores_of_the_wrong_shape_are_an_error() -> None:
    class Broken(Reward):
        name, typical_range = "broken", (0.0, 1.0)

        def score(self, images: Tensor, prompts: list[str]) -> Tensor:
            return images.mean((1, 2, 3))[:1]

    with pytest.raises(ValueError, match=r"'broken' gave scores of shape \(1,\) for 4 images"):
        score(Broken(), images(), [PROMPT] * 4)


def test_threshold_is_one_above_its_value_only() -> None:
    grey = torch.tensor([0.2, 0.5, 0.8])[:, None, None, None].expand(3, 3, 8, 8)
    tested = reward("brightness", threshold=0.6)
    assert isinstance(tested, Threshold)
    assert score(tested, grey, [PROMPT] * 3).tolist() == [0, 0, 1]
    assert score(reward("brightness", threshold=-1), grey, [PROMPT] * 3).tolist() == [1, 1, 1]
    assert score(reward("brightness", threshold=0), grey * 0, [PROMPT] * 3).tolist() == [0, 0, 0]


def test_threshold_lets_bad_scores_be_seen() -> None:
    class Failing(Reward):
        name, typical_range = "failing", (0.0, 1.0)

        def score(self, images: Tensor, prompts: list[str]) -> Tensor:
            return torch.tensor([math.nan, 1.0, 0.0])

    found = score(Threshold(Failing(), 0.5), images(3), [PROMPT] * 3).tolist()
    assert math.isnan(found[0])
    assert found[1:] == [1, 0]


def test_unknown_rewards_and_options_are_bad_input() -> None:
    with pytest.raises(BadInput, match=r"'sharpnes' is unknown: choose one of .*sharpness"):
        reward("sharpnes")
    with pytest.raises(BadInput, match="'brightness' has no option 'path'; it takes none"):
        reward("brightness", options={"path": "x"})


@pytest.mark.parametrize("name", ["shapes", "shapes-strict"])
def test_shapes_rewards_refuse_other_worlds(name: str) -> None:
    for tested in (reward(name), reward(name, threshold=0.5)):
        tested.check_prompts(["a red circle", "two triangles"])
        with pytest.raises(ValueError, match="a dog"):
            tested.check_prompts(["a red circle", "a dog"])
    reward("brightness").check_prompts(["a dog"])
