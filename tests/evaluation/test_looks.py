"""What images look like: against images whose numbers are known."""

import math

import pytest
import torch

from trainer.evaluation.looks import CLIP_DIVERSITY, DIVERSITY, clip_diversity, diversity, looks, tabulate


def plain(*color: float) -> torch.Tensor:
    return torch.tensor(color, dtype=torch.float32).view(3, 1, 1).expand(3, 40, 50)


def test_plain_colours_have_known_brightness_and_saturation() -> None:
    found = looks(torch.stack([plain(1, 1, 1), plain(0, 0, 0), plain(0.8, 0.4, 0.4), plain(0, 1, 0)]))
    assert [look.saturation for look in found] == pytest.approx([0, 0, 0.5, 1])
    assert [look.brightness for look in found] == pytest.approx([1, 0, 0.299 * 0.8 + 0.701 * 0.4, 0.587], abs=1e-3)


def test_diversity_is_the_mean_root_mean_square_difference_of_pairs() -> None:
    thumbnails = [look.thumbnail for look in looks(torch.stack([plain(0, 0, 0), plain(1, 1, 1), plain(0.5, 0.5, 0.5)]))]
    assert diversity(thumbnails) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert diversity(thumbnails[:1] * 4) == 0
    assert math.isnan(diversity(thumbnails[:1]))


def test_diversity_does_not_depend_on_the_size_or_the_order_of_images() -> None:
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = diversity([look.thumbnail for look in looks(images)])
    large = images.repeat_interleave(3, -1).repeat_interleave(3, -2)
    assert diversity([look.thumbnail for look in looks(large.flip(0))]) == pytest.approx(found, rel=1e-2)


def test_diversity_by_clip_is_the_mean_distance_of_directions() -> None:
    embeddings = [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 5.0]), torch.tensor([1.0, 0.0])]
    assert clip_diversity(embeddings) == pytest.approx((1 + 0 + 1) / 3)


def test_a_table_has_images_and_whole_prompts() -> None:
    images = torch.stack([plain(0, 0, 0), plain(1, 1, 1), plain(0.5, 0.5, 0.5), plain(0.5, 0.5, 0.5)])
    found = looks(images, embed=lambda batch: batch.flatten(1)[:, :2] + 1)
    rows = [(i // 2, i % 2, look) for i, look in enumerate(found)]
    table = tabulate(rows[::-1], prompts=3, per_prompt=2)
    assert table["brightness"][:2].tolist() == [pytest.approx([0, 1], abs=1e-6), pytest.approx([0.5, 0.5], abs=1e-6)]
    assert table["brightness"][2].isnan().all()
    assert table[DIVERSITY][:2, 0].tolist() == pytest.approx([1, 0])
    assert table[DIVERSITY].shape == (3, 1)
    assert table[CLIP_DIVERSITY][:2, 0].tolist() == pytest.approx([0, 0])


def test_videos_are_seen_by_their_middle_frame_and_pixels_that_are_no_numbers_do_not_spread() -> None:
    video = torch.stack([plain(0, 0, 0), plain(1, 1, 1), plain(0, 0, 0)])[None]
    assert looks(video)[0].brightness == pytest.approx(1)
    broken = plain(1, 1, 1).clone()
    broken[0, 0, 0] = torch.nan
    assert math.isfinite(looks(broken[None])[0].brightness)
