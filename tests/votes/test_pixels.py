"""The description of colours and layout: its numbers, its independence of size, and its gradient."""

import colorsys

import numpy as np
import pytest
import torch

from trainer.votes.pixels import LAYOUT_WEIGHT, PixelFeatures, oklab

FEATURES = PixelFeatures()


def test_oklab_is_that_of_its_author() -> None:
    # https://bottosson.github.io/posts/oklab/: white is L 1, and the table of XYZ pairs; here sRGB primaries.
    colors = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    known = [
        [1, 0, 0],
        [0, 0, 0],
        [0.62796, 0.22486, 0.12585],
        [0.86644, -0.23389, 0.17950],
        [0.45201, -0.03246, -0.31153],
    ]
    found = oklab(colors[:, :, None, None])[..., 0, 0]
    coloured = [0, 2, 3, 4]
    torch.testing.assert_close(found[coloured], torch.tensor(known)[coloured], rtol=0, atol=2e-3)
    assert found[1].abs().max() < 0.05  # the small number under the root lifts black a little
    grey = oklab(torch.linspace(0, 1, 20)[:, None, None, None].expand(20, 3, 1, 1))[..., 0, 0]
    assert grey[:, 1:].abs().max() < 1e-4
    assert (grey[:, 0].diff() > 0).all()


def test_the_histogram_counts_pixels() -> None:
    # A quarter white and three quarters black: the roots of the shares, each spread over neighbouring bins.
    image = torch.zeros(1, 3, 32, 32)
    image[..., :16, :16] = 1
    share = FEATURES(image)[0, :100].square().view(4, 5, 5) - 1e-4
    assert share.sum() == pytest.approx(1, abs=1e-4)
    assert share[3, 2, 2] == pytest.approx(0.25, abs=0.01)
    assert share[0, 2, 2] == pytest.approx(0.75, abs=0.12)
    pure = (
        FEATURES(torch.tensor([0.0, 0.0, 1.0])[None, :, None, None].expand(1, 3, 8, 8))[0, :100].square().view(4, 5, 5)
    )
    assert pure[:, :, 0].sum() > 0.99  # b is below its first centre
    assert pure[1, 2, 0] + pure[2, 2, 0] + pure[1, 1, 0] + pure[2, 1, 0] > 0.99


def test_the_layout_says_where() -> None:
    image = torch.ones(1, 3, 64, 64)
    image[..., 48:, :16] = 0
    layout = FEATURES(image)[0, 100:196].view(6, 4, 4) / LAYOUT_WEIGHT
    light = torch.ones(4, 4)
    light[3, 0] = layout[0, 3, 0]
    assert layout[0, 3, 0] < 0.05
    torch.testing.assert_close(layout[0], light, rtol=0, atol=1e-3)
    edges = FEATURES(image)[0, 196:].view(4, 4, 4)
    for index, (across, along) in enumerate([((3, 1), (2, 0)), ((2, 0), (3, 1))] * 2):
        # The first of a pair sees differences along rows, at the right edge of the dark cell; the second above it.
        assert edges[index].max() > 0.1
        cells = {tuple(cell.tolist()) for cell in (edges[index] > 0.01).nonzero()}
        assert cells <= {(3, 0), across, along} | ({(3, 1)} if index % 2 == 0 else {(2, 0)})


def test_size_does_not_matter_and_a_batch_equals_singles() -> None:
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(3, 3, 64, 64, generator=generator)
    large = small.repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(FEATURES(large), FEATURES(small), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([FEATURES(one[None]) for one in small]), FEATURES(small), rtol=1e-5, atol=1e-6)
    assert FEATURES(torch.rand(2, 3, 7, 300)).shape == (2, 260)
    assert FEATURES(small).dtype == torch.float32


def test_the_same_image_again_is_the_same_to_the_last_bit() -> None:
    image = torch.rand(1, 3, 50, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(FEATURES(image), FEATURES(image.clone()))


def test_similar_hues_are_nearer_than_others() -> None:
    def plain(hue: float) -> np.ndarray:
        color = torch.tensor(colorsys.hsv_to_rgb(hue, 0.8, 0.8))
        return FEATURES(color[None, :, None, None].expand(1, 3, 16, 16))[0].numpy()

    for hue in np.linspace(0, 1, 7):
        distances = [np.linalg.norm(plain(hue) - plain((hue + step) % 1)) for step in (0.03, 0.1, 0.3)]
        assert distances == sorted(distances)


def test_the_gradient_is_that_of_the_function_and_is_finite_everywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 16, 16, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    direction = torch.randn(260, generator=generator, dtype=torch.float64)

    def value(x: torch.Tensor) -> torch.Tensor:
        return FEATURES(x) @ direction.float()

    x = image.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(x).sum(), x)
    move = torch.randn(image.shape, generator=generator, dtype=torch.float64)
    step = 1e-4
    measured = (value(image + step * move) - value(image - step * move)).double() / (2 * step)
    assert (slope * move).sum().item() == pytest.approx(measured.item(), rel=0.05)
    for flat in (0.0, 1.0, 0.5):
        x = torch.full((1, 3, 64, 64), flat, requires_grad=True)
        (slope,) = torch.autograd.grad(FEATURES(x).sum(), x)
        assert slope.isfinite().all()
    x = torch.full((1, 3, 64, 64), 0.5, requires_grad=True)
    assert torch.autograd.grad(FEATURES(x)[0, 100], x)[0].abs().max() > 0
