"""The calls that are counted on the stand-in are those that the real model gets."""

from collections import Counter

import pytest
import torch

from trainer.check import check_run
from trainer.config import parse_config
from trainer.estimate.calls import Call, evaluation_calls, evaluations, iteration_calls
from trainer.loop import Trainer
from trainer.models import Conditions
from trainer.utils.distributed import Processes

OBJECTIVES = {
    "grpo": [],
    "grpo, window, guidance": ["rollout.window={size: 2, position: fixed}", "rollout.guidance_scale=3"],
    "grpo, own noise, two batches": ["rollout.shared_noise=false", "rollout.batch_size=5", "objective.batch_size=3"],
    "nft": ["objective={name: nft, updates: 2}"],
    "awm": ["objective={name: awm}"],
    "dpo": ["objective={name: dpo}"],
    "reward-gradient": ["objective={name: reward-gradient, batch_size: 4}", "rewards=[{name: brightness}]"],
}


@pytest.mark.parametrize("case", OBJECTIVES)
def test_counted_calls_are_the_real_ones(tiny_description: dict, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(tiny_description, OBJECTIVES[case])
    trainer = Trainer(config, None, Processes("cpu"))
    counted = iteration_calls(
        config, check_run(config, 1), trainer.model.process, trainer.model.sigmas, trainer.processes
    )
    real: Counter = Counter()
    predict, decode = trainer.model.predict_guided, trainer.model.decode

    def predicted(
        latents: torch.Tensor, sigma: object, conditions: Conditions, scale: float = 1.0, *rest: object
    ) -> object:
        kind, prompts = "train" if torch.is_grad_enabled() else "forward", distinct(conditions)
        real[Call(kind, len(latents), scale, prompts=prompts)] += 1
        return predict(latents, sigma, conditions, scale, *rest)

    def decoded(latents: torch.Tensor) -> torch.Tensor:
        real[Call("decode-train" if latents.requires_grad else "decode", len(latents))] += 1
        return decode(latents)

    monkeypatch.setattr(trainer.model, "predict_guided", predicted)
    monkeypatch.setattr(trainer.model, "decode", decoded)
    event = trainer.iterate()
    assert event["skipped_groups"] == 0, "else fewer calls are right"
    assert {call: n for call, n in counted.items() if not call.kind.startswith("score")} == real
    forwards = sum(call.rows * n for call, n in real.items() if call.kind in ("forward", "train"))
    assert forwards / 8 == pytest.approx(event["forwards_per_image"])


def distinct(conditions: Conditions) -> int:
    """Number of prompts with different embeddings."""
    return len(torch.cat([value.flatten(1) for value in conditions.tensors.values()], 1).unique(dim=0))


def test_evaluations_of_a_run_and_their_calls(tiny_description: dict) -> None:
    config = parse_config(tiny_description, ["runtime.iterations=5", "rollout.batch_size=3"])
    checked = check_run(config, 1)
    assert evaluations(config, checked) == 4, "before, after 2, after 4, at the end"
    calls = evaluation_calls(config, checked, Processes("cpu"))
    assert calls[Call("forward", 3, prompts=2)] == 5 and calls[Call("forward", 1)] == 5
    assert calls[Call("decode", 3)] == calls[Call("decode", 1)] == 1
    without = parse_config(tiny_description, ["evaluation.texts=[]"])
    assert evaluations(without, check_run(without, 1)) == 0
