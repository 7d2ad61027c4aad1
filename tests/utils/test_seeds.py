"""Random numbers are named by their place, and by nothing else."""

import random

import torch

from trainer.utils.seeds import derive, generator, noise, prompt_indices

SHAPE = (4, 8, 8)


def test_noise_does_not_depend_on_what_ran_before_or_on_who_draws_it() -> None:
    places = [("step", 3, prompt, member, step) for prompt in range(2) for member in range(3) for step in range(2)]
    in_order = {place: noise(SHAPE, 7, *place) for place in places}
    torch.manual_seed(99)
    random.Random(1).shuffle(places)
    halves = places[:5], places[5:]  # as two processes would share them
    for half in halves:
        torch.rand(17)
        random.random()
        for place in half:
            assert torch.equal(noise(SHAPE, 7, *place), in_order[place])


def test_noise_leaves_global_random_numbers_alone() -> None:
    torch.manual_seed(5)
    before, python = torch.random.get_rng_state(), random.getstate()
    noise(SHAPE, 7, "start", 0)
    generator(7, "window", 1).random()
    prompt_indices(5, 3, 0, 7)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert random.getstate() == python


def test_different_places_differ() -> None:
    places = [(7, "start", 0, 1), (7, "start", 1, 0), (7, "step", 0, 1), (8, "start", 0, 1), (7, "start", 0, 1, 0)]
    places += [(7, "start", 0, 11), (7, "start", 0, 1, 1), (7, "start", 0, "1")]
    drawn = [noise(SHAPE, *place) for place in places]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
            assert abs(correlation) < 0.3
    assert len({derive(*place) for place in places}) == len(places)
    assert len({generator(*place).random() for place in places}) == len(places)


def test_noise_is_standard_normal_float32() -> None:
    drawn = noise((100_000,), 1, "start")
    assert drawn.dtype == torch.float32
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 1) < 0.02


def test_seeds_fit_every_generator() -> None:
    assert all(0 <= derive(seed, "place") < 2**63 for seed in range(200))


def test_every_prompt_comes_once_before_any_comes_again() -> None:
    for count, per_iteration in ((7, 3), (3, 8), (4, 4), (1, 2)):
        drawn = [p for iteration in range(2 * count) for p in prompt_indices(count, per_iteration, iteration, 0)]
        epochs = [drawn[start : start + count] for start in range(0, len(drawn), count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert all(len(prompt_indices(count, per_iteration, i, 0)) == per_iteration for i in range(3))


def test_order_of_prompts_changes_with_epoch_and_seed() -> None:
    assert prompt_indices(20, 20, 0, 0) != prompt_indices(20, 20, 1, 0)
    assert prompt_indices(20, 20, 0, 0) != prompt_indices(20, 20, 0, 1)
    assert prompt_indices(20, 20, 3, 5) == prompt_indices(20, 20, 3, 5)
