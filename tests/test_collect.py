"""What an iteration trains on: scoring by servers goes on while the next images are sampled, and changes nothing."""

import threading

import pytest
import torch
from torch import Tensor

from trainer.config import parse_config
from trainer.loop import Trainer
from trainer.objectives.base import RolloutBatch
from trainer.rewards.brightness import Brightness
from trainer.runs.metrics import Clock
from trainer.utils.distributed import Processes
from trainer.utils.errors import RunFailed

OBJECTIVES = {
    "grpo": {"name": "grpo"},
    "nft": {"name": "nft"},
    "window per prompt": {"name": "grpo", "step_weights": "flash"},
}


def collected(description: dict) -> tuple[RolloutBatch, dict[str, float]]:
    trainer = Trainer(parse_config(description), None, Processes("cpu"))
    clock = Clock()
    return trainer.collector.collect(0, clock), clock.seconds


@pytest.fixture
def description(tiny_description: dict) -> dict:
    """Four prompts of four images, two prompts in a batch."""
    tiny_description["rollout"] |= {"prompts_per_iteration": 4, "batch_size": 8}
    return tiny_description


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shared_noise", [True, False])
def test_scoring_in_the_background_changes_no_result(
    description: dict, monkeypatch: pytest.MonkeyPatch, objective: str, shared_noise: bool
) -> None:
    description["objective"] = OBJECTIVES[objective]
    description["rollout"]["shared_noise"] = shared_noise
    if objective == "window per prompt":
        description["rollout"]["window"] = {"size": 2, "position": "per-prompt"}
    local, _ = collected(description)
    monkeypatch.setattr(Brightness, "remote", True)
    remote, seconds = collected(description)
    assert {"rollout", "decode", "reward"} <= seconds.keys()
    for name, values in local.scores.items():
        torch.testing.assert_close(remote.scores[name], values, rtol=1e-5, atol=1e-5)
    assert list(remote.scores) == list(local.scores)
    torch.testing.assert_close(remote.advantages.values, local.advantages.values, rtol=1e-2, atol=1e-2)
    assert remote.trajectories.steps == local.trajectories.steps
    assert remote.trajectories.forwards == local.trajectories.forwards
    for name in ("final", "samples", "next_samples", "log_probs"):
        found, expected = getattr(remote.trajectories, name), getattr(local.trajectories, name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_next_images_are_sampled_while_a_server_scores_the_last_ones(
    description: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on = threading.Event()
    trainer = Trainer(parse_config(description), None, Processes("cpu"))
    decode, decoded = trainer.model.decode, []
    waited = []

    def watch(latents: Tensor) -> Tensor:
        decoded.append(len(latents))
        if len(decoded) == 2:
            going_on.set()
        return decode(latents)

    score = Brightness.score

    def slow(self: Brightness, *given: object) -> Tensor:
        waited.append(going_on.wait(60))
        return score(self, *given)

    monkeypatch.setattr(Brightness, "remote", True)
    monkeypatch.setattr(Brightness, "score", slow)
    monkeypatch.setattr(trainer.model, "decode", watch)
    rollout = trainer.collector.collect(0, Clock())
    assert decoded == [8, 8], "two parts, each decoded once"
    assert waited == [True, True], "the first part's scores came after the second part had been sampled"
    assert rollout.scores["brightness"].isfinite().all()


def test_a_server_that_fails_ends_the_iteration_with_its_own_words(
    description: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Brightness, *given: object) -> Tensor:
        raise RunFailed("the server is gone")

    monkeypatch.setattr(Brightness, "remote", True)
    monkeypatch.setattr(Brightness, "score", fail)
    with pytest.raises(RunFailed, match="the server is gone"):
        collected(description)
