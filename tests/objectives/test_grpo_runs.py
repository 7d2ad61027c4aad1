"""Whole runs of GRPO's options: what they record, what changes nothing, and resuming."""

import copy
from pathlib import Path

import pytest
from conftest import assert_same_tensors
from short_runs import assert_constant_changes_nothing, train

from trainer.config import parse_config
from trainer.loop import Trainer
from trainer.objectives.base import RolloutBatch
from trainer.utils.distributed import Processes
from trainer.utils.errors import BadInput

PER_PROMPT = {"window": {"size": 2, "position": "per-prompt"}}
GARDO = {"kl_weight": 5.0, "kl_reference": "moving", "kl_reference_every": 2, "kl_share": 0.5}
CASES = {
    "dppo": {"objective": {"ratio": "dppo", "updates": 2, "divergence_limit": 1e-4}},
    "window per prompt": {"rollout": PER_PROMPT, "objective": {"updates": 2, "step_weights": "flash"}},
    "gardo": {"objective": GARDO, "evaluation": {"rewards": [{"name": "sharpness"}]}},
    "ddpo": {"advantage": {"normalize": "global"}, "rollout": {"shared_noise": False}, "objective": {"updates": 2}},
    "dpok": {"rollout": {"guidance_scale": 2.0}, "objective": {"clip": "plain", "kl_weight": 0.5, "updates": 2}},
}


def described(description: dict, case: str) -> dict:
    data = copy.deepcopy(description)
    data["objective"] = {}
    for section, settings in CASES[case].items():
        data[section] = data.get(section, {}) | settings
    data["runtime"] |= {"iterations": 4, "checkpoint_every": 1, "samples_every": 0}
    return data


@pytest.mark.parametrize("case", CASES)
def test_a_run_learns_and_resumes_to_the_bit(case: str, tiny_description: dict, tmp_path: Path) -> None:
    data = described(tiny_description, case)
    whole, events = train(data, tmp_path / "whole")
    assert all(event["grad_norm"] > 0 for event in events)
    train(data | {"runtime": data["runtime"] | {"iterations": 3}}, tmp_path / "parted")
    parted, rest = train(data, tmp_path / "parted")
    assert rest[0]["objective"] == events[3]["objective"]
    assert_same_tensors(whole.policy.tensors(), parted.policy.tensors())
    assert whole.objective.state() == parted.objective.state()


@pytest.mark.parametrize("case", ["window per prompt", "gardo", "ddpo"])
def test_a_constant_added_to_all_rewards_changes_nothing(
    case: str, tiny_description: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = described(tiny_description, case)
    assert_constant_changes_nothing(data, monkeypatch)


def test_images_of_a_prompt_share_a_window_and_prompts_do_not(tiny_description: dict) -> None:
    data = described(tiny_description, "window per prompt")
    data["rollout"] |= {"prompts_per_iteration": 4, "group_size": 2}
    trainer = Trainer(parse_config(data), None, Processes("cpu"))
    seen = set()
    for iteration in range(4):
        plan = trainer.objective.plan(trainer.model, iteration)
        assert plan.stochastic == [any(flags) for flags in zip(*plan.windows, strict=True)]
        assert all(sum(window) == 2 and not window[-1] for window in plan.windows)
        seen |= {tuple(window) for window in plan.windows}
    assert len(seen) == 3, "every place that a window of 2 has in 4 steps"


def test_weights_of_steps_average_to_one_over_an_optimizer_step(tiny_description: dict) -> None:
    data = described(tiny_description, "window per prompt")
    data["objective"]["updates"] = 1
    trainer = Trainer(parse_config(data), None, Processes("cpu"))
    losses = []
    real = trainer.objective.loss

    def loss(model: object, rollout: RolloutBatch, batch: object) -> object:
        found = real(model, rollout, batch)
        losses.extend((found.value / -rollout.advantages_of(batch.items)).tolist())
        return found

    trainer.objective.loss = loss
    trainer.iterate()
    assert len(losses) == 2 * 2 * 4
    assert sum(losses) / len(losses) == pytest.approx(1, abs=1e-5), "the ratio is 1, so the weight is left"
    assert max(losses) > 1.05


def test_a_moving_reference_is_renewed_when_it_is_old_or_left_behind(tiny_description: dict) -> None:
    data = described(tiny_description, "gardo")
    del data["evaluation"]
    data["objective"] |= {"kl_share": 1.0, "kl_reference_limit": 1e9}
    _, slow = train(data)
    kls = [event["objective"]["kl"] for event in slow]
    assert kls[0] == 0 and kls[1] > 0
    assert kls[2] == 0, "renewed after two iterations"
    data["objective"] |= {"kl_reference_every": 100, "kl_reference_limit": 1e-12}
    _, quick = train(data)
    assert [event["objective"]["kl"] > 0 for event in quick] == [False, True, False, True]
    data["objective"]["kl_reference"] = "base"
    _, base = train(data)
    kls = [event["objective"]["kl"] for event in base]
    assert 0 == kls[0] < kls[1] < kls[3]


def test_the_gate_gives_the_kl_to_its_share_of_the_images(tiny_description: dict) -> None:
    data = described(tiny_description, "gardo")
    trainer = Trainer(parse_config(data), None, Processes("cpu"))
    trainer.iterate()
    gate = trainer.objective._gate
    assert gate.shape == (2, 4)
    assert gate.sum() == 4


def test_what_gardo_lacks_is_said(tiny_description: dict) -> None:
    data = described(tiny_description, "gardo")
    del data["evaluation"]["rewards"]
    with pytest.raises(BadInput, match="evaluation.rewards is empty: name a reward there, or set kl_share to 1"):
        parse_config(data)
    data["objective"] = {**GARDO, "kl_share": 1.0, "old_log_prob": "update", "updates": 2}
    with pytest.raises(BadInput, match="both need the old copy of the LoRA"):
        parse_config(data)
