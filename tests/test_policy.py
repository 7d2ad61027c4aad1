"""How the learning rate goes over a run."""

import pytest

from trainer.config import parse_config
from trainer.loop import Trainer
from trainer.utils.distributed import Processes


def rates(description: dict, **optimizer: object) -> list[float]:
    """The learning rate of every optimizer step of a run."""
    description["optimizer"] = {"learning_rate": 0.001, **optimizer}
    description["objective"] = {"updates": 1}
    trainer = Trainer(parse_config(description), None, Processes("cpu"))
    seen = []
    for _ in range(description["runtime"]["iterations"]):
        trainer.iterate()
        seen.append(trainer.policy.optimizer.param_groups[0]["lr"])
    return seen


def test_learning_rate_is_constant_unless_asked(tiny_description: dict) -> None:
    assert rates(tiny_description) == [0.001] * 4


def test_a_linear_schedule_goes_to_nothing_after_the_last_iteration(tiny_description: dict) -> None:
    assert rates(tiny_description, schedule="linear") == pytest.approx([0.001, 0.00075, 0.0005, 0.00025])


def test_warm_up_and_schedule_are_multiplied(tiny_description: dict) -> None:
    assert rates(tiny_description, schedule="linear", warmup=2) == pytest.approx([0.0005, 0.00075, 0.0005, 0.00025])
