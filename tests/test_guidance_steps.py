"""Guidance in some sampling steps only: which predictions use it, and what is refused."""

import copy

import pytest
import torch
from short_runs import train

from trainer.config import parse_config
from trainer.models.base import DiffusionModel
from trainer.utils.errors import BadInput

STEPS = 5


def description(tiny_description: dict, guidance_steps: list | None, **rollout: object) -> dict:
    data = copy.deepcopy(tiny_description)
    data["rollout"] = {
        **data.get("rollout", {}),
        "steps": STEPS,
        "window": {"size": 2, "position": "fixed"},
        "guidance_scale": 2.0,
        "guidance_steps": guidance_steps,
        **rollout,
    }
    data["runtime"] |= {"iterations": 1, "samples_every": 0}
    return data


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, float, float]]:
    """Whether it is trained, the noise level and the guidance scale of each prediction."""
    seen, predict = [], DiffusionModel.predict_guided

    def watched(self: DiffusionModel, latents: torch.Tensor, sigma: torch.Tensor, *given: object) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), round(sigma[0].item(), 4), given[1]))
        return predict(self, latents, sigma, *given)

    monkeypatch.setattr(DiffusionModel, "predict_guided", watched)
    return seen


@pytest.mark.parametrize("objective", [{}, {"name": "nft"}])
def test_only_these_steps_and_what_is_trained_use_guidance(
    tiny_description: dict, scales: list, objective: dict
) -> None:
    data = description(tiny_description, [0, 3])
    data["objective"] = objective or data["objective"]
    data["evaluation"] = {"texts": ["a green circle"], "images_per_prompt": 1, "steps": 2 * STEPS}
    trainer, events = train(data)
    sampled = {sigma: scale for trained, sigma, scale in scales if not trained}
    for steps, guided in ((STEPS, 3), (2 * STEPS, 6)):
        levels = [round(level, 4) for level in trainer.model.sigmas(steps, trainer.config.rollout.shift)[:-1]]
        assert [sampled[level] for level in levels] == [2.0] * guided + [1.0] * (steps - guided)
    assert {scale for trained, _, scale in scales if trained} == {2.0}
    if not objective:
        assert events[0]["objective"]["rollout_deviation"]["max"] < 1e-5


@pytest.mark.parametrize(
    ("guidance_steps", "rollout", "said"),
    [
        ([3, 3], {}, "guidance_steps .3, 3. must be two increasing numbers, at most 5"),
        ([0, 6], {}, "guidance_steps .0, 6. must be two increasing numbers, at most 5"),
        ([0, 3], {"guidance_scale": 1.0}, "guidance_steps needs guidance"),
        ([1, 3], {}, r"must include all steps that can be stochastic, which are .0, 2."),
        ([0, 3], {"window": {"size": 2}}, r"which are .0, 4."),
        ([0, 3], {"window": None}, r"which are .0, 4."),
    ],
)
def test_what_is_refused(tiny_description: dict, guidance_steps: list, rollout: dict, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        parse_config(description(tiny_description, guidance_steps, **rollout))


def test_objectives_without_stochastic_steps_take_any(tiny_description: dict) -> None:
    data = description(tiny_description, [1, 3], window=None)
    parse_config(data | {"objective": {"name": "nft"}})
