"""Reward gradients: the steps with gradient are those of a rollout; images without a finite reward are left out."""

from pathlib import Path

import pytest
import torch
from stages import items_of, rollout_of, updater_for
from tiny_families import CASES

from trainer.config import ModelConfig, parse_config
from trainer.loop import Trainer
from trainer.models import SD3Model, model_class
from trainer.rollout import Plan, Prompting, sample
from trainer.runs.metrics import Clock
from trainer.utils.distributed import Processes

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


def trainer_with_broken_decode(description: dict, monkeypatch: pytest.MonkeyPatch, broken: slice) -> Trainer:
    """A trainer of one optimizer step on 8 images, of which some have a decode that is not a number."""
    description["objective"] = {"name": "reward-gradient", "batch_size": 8}
    description["rewards"] = [{"name": "brightness"}]
    description["rollout"] |= {"group_size": 4, "prompts_per_iteration": 2}
    description["evaluation"] = {}
    description["lora"].pop("ema_decay")
    whole = SD3Model.decode_batch

    def decode(self: SD3Model, latents: torch.Tensor) -> torch.Tensor:
        images = whole(self, latents)
        if not images.requires_grad:
            return images
        factor = torch.ones(len(images), 1, 1, 1)
        factor[broken] = torch.nan  # as where a VAE overflows in float16: the backward pass has NaN, too
        return images * factor

    monkeypatch.setattr(SD3Model, "decode_batch", decode)
    return Trainer(parse_config(description), None, Processes("cpu"))


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.policy.parameters.items()}


def test_an_image_without_a_finite_reward_is_left_out_alone(
    tiny_description: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_with_broken_decode(tiny_description, monkeypatch, slice(0, 1))
    before, attempts = weights_of(trainer), []
    accumulate = trainer.updater.accumulate
    monkeypatch.setattr(trainer.updater, "accumulate", lambda *args: attempts.append(args) or accumulate(*args))
    event = trainer.iterate()
    assert (event["dropped_samples"], event["bad_updates"], event["objective"]["items"]) == (1, 0, 8)
    assert event["grad_norm"] > 0
    assert event["objective"]["reward"] == pytest.approx(event["rewards"]["brightness"]["mean"])
    assert any(not torch.equal(before[name], value) for name, value in weights_of(trainer).items())
    assert all(value.isfinite().all() for value in weights_of(trainer).values())
    assert (len(attempts), trainer.updater.scaler.get_scale()) == (1, trainer.updater.first_scale(8)), (
        "not taken for an overflow"
    )


def test_a_broken_image_changes_no_other_image_s_gradient(
    tiny_description: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_with_broken_decode(tiny_description, monkeypatch, slice(0, 1))
    rollout = trainer.collector.collect(0, Clock())
    (items,) = trainer.objective.items(rollout)
    found = trainer.updater.gradient(items, rollout, 1.0, 8)
    monkeypatch.undo()
    expected = trainer.updater.gradient(items[1:], rollout, 1.0, 8)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)
    assert any(one.abs().max() > 0 for one in found)


def test_latents_that_are_not_finite_reach_no_gradient(tiny_description: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_with_broken_decode(tiny_description, monkeypatch, slice(0, 0))
    rollout = trainer.collector.collect(0, Clock())
    (items,) = trainer.objective.items(rollout)
    expected = trainer.updater.gradient(items[1:], rollout, 1.0, 8)
    rollout.trajectories.final[rollout.row_of[items[0].member]] = torch.inf
    found = trainer.updater.gradient(items, rollout, 1.0, 8)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)


def test_without_any_finite_reward_nothing_is_trained(tiny_description: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_description["runtime"]["watchdog"] = {"max_dropped": 8}
    trainer = trainer_with_broken_decode(tiny_description, monkeypatch, slice(0, 8))
    before = weights_of(trainer)
    for iteration in range(2):
        event = trainer.iterate()
        assert (event["dropped_samples"], event["bad_updates"], event["grad_norm"]) == (8, 0, None)
        _, verdict = trainer.watchdog.watch(event)
        assert (verdict is not None) == (iteration == 1), "the limit is 8 samples"
    assert "16 samples had no finite reward" in verdict
    assert all(torch.equal(before[name], value) for name, value in weights_of(trainer).items())
