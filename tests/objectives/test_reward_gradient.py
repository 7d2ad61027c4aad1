"""Reward gradients: the steps with gradient are those of a rollout."""

from pathlib import Path

import pytest
import torch
from stages import items_of, rollout_of, updater_for
from tiny_families import CASES

from trainer.config import ModelConfig
from trainer.models import model_class
from trainer.rollout import Plan, Prompting, sample

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["sd", "sd-zero-snr", "wan-image"])
def test_draft_ends_where_a_rollout_without_gradient_would(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    config = ModelConfig(family=case.family, path=str(case.build(tmp_path)), **case.model)
    family = model_class(config)
    conditions = family.encode(config, ["a red circle", ""], CPU)
    model = family.load(config, CPU)
    kernel = case.rollout.get("kernel", "dance")
    options = {"name": "reward-gradient", "method": "draft", "gradient_steps": 2}
    updater = updater_for(model, options, rollout={"kernel": kernel, "steps": 4})
    plan = Plan(kernel, 0.0, model.sigmas(4, 3.0), [False] * 4, shared_noise=False)
    prompting, prompt_of = Prompting(conditions.rows(torch.tensor([0]))), torch.zeros(2, dtype=torch.long)
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    whole, begun = (
        sample(model, p, prompting, prompt_of, noise, lambda step: noise)
        for p in (plan, updater.objective.plan(model, 0))
    )
    rollout = rollout_of(updater.objective.plan(model, 0), prompting, begun, prompt_of, [0.0, 0.0])
    batch = updater.objective.batches(items_of(rollout, [(0, 0), (1, 0)]), rollout)[0]
    final, _, forwards = updater.objective._sample(model, rollout, batch)
    assert final.requires_grad
    assert forwards == 4
    torch.testing.assert_close(final.detach(), whole.final, rtol=1e-4, atol=1e-4)
