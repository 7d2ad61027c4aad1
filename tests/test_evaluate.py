"""How held-out prompts are sampled, and what an evaluation says of the trained rewards together."""

import pytest
import torch

from trainer.config import parse_config
from trainer.loop import Trainer
from trainer.objectives.advantage import Mixture
from trainer.utils.distributed import Processes


def mixed(record: dict, weights: dict[str, float], units: dict[str, float]) -> float:
    return sum(weight * record["rewards"][name] / units[name] for name, weight in weights.items())


@pytest.mark.parametrize("combine", ["advantages", "sum"])
def test_mix_is_in_spreads_of_the_base_model_before_and_after(tiny_description: dict, combine: str) -> None:
    tiny_description["advantage"] = {"combine": combine}
    trainer = Trainer(parse_config(tiny_description), None, Processes("cpu"))
    trainer.evaluate()
    trainer.iterate()
    trainer.evaluate()
    before, after = trainer.evaluations
    weights = {"brightness": 1.0, "colorfulness": 0.5}
    units = before["spread"] if combine == "advantages" else dict.fromkeys(weights, 1.0)
    for record in (before, after):
        assert record["rewards"]["mix"] == pytest.approx(mixed(record, weights, units), rel=1e-9)
    assert before["rewards"]["mix"] != after["rewards"]["mix"]


def test_one_reward_has_no_mix(tiny_description: dict) -> None:
    tiny_description["rewards"] = [{"name": "brightness"}]
    trainer = Trainer(parse_config(tiny_description), None, Processes("cpu"))
    trainer.evaluate()
    assert set(trainer.evaluations[0]["rewards"]) == {"brightness"}


def test_mixture_of_an_image_without_a_score_is_none() -> None:
    columns = {"a": torch.tensor([1.0, torch.nan]), "b": torch.tensor([2.0, 3.0])}
    values = Mixture({"a": 1.0, "b": 2.0}, {"a": 0.5, "b": 4.0}).of(columns)
    assert values[0] == 1 / 0.5 + 2 * 2 / 4.0
    assert values[1].isnan()


def test_evaluation_and_rollout_have_a_solver_each(tiny_description: dict) -> None:
    def scores(*settings: str) -> tuple[dict, dict]:
        window = ["rollout.window={size: 1, position: fixed}", "lora.ema_decay=0"]
        trainer = Trainer(parse_config(tiny_description, [*window, *settings]), None, Processes("cpu"))
        trainer.evaluate()
        return trainer.evaluations[0]["rewards"], trainer.iterate()["rewards"]

    evaluation, rollout = scores()
    assert scores("evaluation.solver=euler", "rollout.solver=euler") == (evaluation, rollout)
    other, same = scores("evaluation.solver=2m")
    assert other != evaluation
    assert same == rollout
    same, other = scores("rollout.solver=2m")
    assert same == evaluation
    assert other != rollout
