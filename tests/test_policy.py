"""The policy: how its learning rate goes over a run, and which weights it runs with."""

from pathlib import Path

import pytest
import torch
from conftest import assert_same_tensors
from torch import Tensor

from trainer.adapters import lora
from trainer.config import parse_config
from trainer.loop import Trainer
from trainer.models import Conditions
from trainer.models.diffusers.sd3 import SD3Model
from trainer.policy import Policy
from trainer.utils.distributed import Processes

CPU = torch.device("cpu")


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


# ----------------------------------------------------------------------------------------------------- which weights


@pytest.fixture(params=[False, True], ids=["plain", "checkpointing"])
def policy(request: pytest.FixtureRequest, tiny_description: dict, tiny_sd3: Path) -> Policy:
    """A LoRA that has moved on from its average and from its old copy, which are not the same either."""
    tiny_description["model"]["gradient_checkpointing"] = request.param
    config = parse_config(tiny_description)
    policy = Policy(SD3Model.load(config.model, CPU), config, keeps_old=True)
    move(policy, seed=1)
    policy.update_old()
    move(policy, seed=2)
    policy.average.update(policy.parameters, 0)
    move(policy, seed=3)
    return policy


def move(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters.values():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)


def predict(model: SD3Model) -> Tensor:
    draw = torch.Generator().manual_seed(7)
    conditions = Conditions(
        {"embeds": torch.randn(2, 5, 128, generator=draw), "pooled": torch.randn(2, 128, generator=draw)}
    )
    return model.predict(torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([0.9, 0.4]), conditions)


def plain_prediction(policy: Policy, weights: dict[str, Tensor] | None) -> Tensor:
    """Of another model, whose LoRA, where it has one, holds these weights."""
    model = SD3Model.load(policy.config.model, CPU)
    if weights is not None:
        lora.inject(model.module, policy.config.lora, model.default_targets, seed=0)
        lora.load(model.module, weights)
    return predict(model).detach()


def test_each_kind_of_weights_is_what_its_name_says(policy: Policy) -> None:
    expected = {
        "live": plain_prediction(policy, dict(policy.parameters)),
        "base": plain_prediction(policy, None),
        "average": plain_prediction(policy, policy.average.weights),
        "old": plain_prediction(policy, policy.old),
    }
    values = list(expected.values())
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(values) for b in values[:i])
    for name, value in expected.items():
        with policy.using(name):
            found = predict(policy.model)
        assert torch.equal(found, value), name
        assert found.requires_grad == (name == "live")
    with policy.using("old"), policy.using("live"), policy.using("base"):
        assert torch.equal(predict(policy.model), expected["base"])
    with pytest.raises(RuntimeError), policy.using("average"):
        raise RuntimeError
    assert torch.equal(predict(policy.model), expected["live"])
    assert all(parameter.requires_grad for parameter in policy.parameters.values())


@pytest.mark.parametrize("others", [("old",), ("base", "average", "old"), ("old", "base")])
def test_other_weights_between_forward_and_backward_leave_the_gradient_alone(
    policy: Policy, others: tuple[str, ...]
) -> None:
    def gradient(*between: str) -> list[Tensor]:
        value = predict(policy.model)
        for name in between:
            with policy.using(name):
                predict(policy.model)
        value.square().mean().backward()
        found = [parameter.grad for parameter in policy.parameters.values()]
        for parameter in policy.parameters.values():
            parameter.grad = None
        return found

    alone = gradient()
    assert sum(g.norm() for g in alone) > 1e-4
    assert all(torch.equal(a, b) for a, b in zip(alone, gradient(*others), strict=True))


def test_old_weights_follow_the_live_ones_as_far_as_they_are_told(policy: Policy) -> None:
    old, live = ({n: v.detach().clone() for n, v in w.items()} for w in (policy.old, policy.parameters))
    policy.update_old(decay=0.75)
    for name, value in policy.old.items():
        torch.testing.assert_close(value, 0.75 * old[name] + 0.25 * live[name])
    policy.update_old()
    assert all(torch.equal(value, live[name]) for name, value in policy.old.items())
    move(policy, seed=9)
    assert all(torch.equal(value, live[name]) for name, value in policy.old.items()), "a copy, not the same storage"


def test_a_checkpoint_holds_every_kind_of_weights(policy: Policy) -> None:
    kept = {name: value.detach().clone() for name, value in policy.tensors().items()}
    assert {name.split("/")[0] for name in kept} == {"lora", "average", "old"}
    other = Policy(SD3Model.load(policy.config.model, CPU), policy.config, keeps_old=True)
    other.restore(kept, updates=3)
    assert_same_tensors(kept, {name: value.detach() for name, value in other.tensors().items()})
    for name in ("live", "average", "old"):
        with policy.using(name):
            first = predict(policy.model)
        with other.using(name):
            assert torch.equal(predict(other.model), first)


def test_without_an_average_the_live_weights_stand_in_and_without_old_ones_nothing_does(
    tiny_description: dict,
) -> None:
    del tiny_description["lora"]["ema_decay"]
    config = parse_config(tiny_description)
    policy = Policy(SD3Model.load(config.model, CPU), config)
    move(policy, seed=1)
    live = predict(policy.model)
    with policy.using("average"):
        assert torch.equal(predict(policy.model), live)
    with pytest.raises(ValueError, match="keeps no old weights"), policy.using("old"):
        pass


def test_a_run_that_starts_from_a_lora_has_it_in_every_kind_of_weights(
    policy: Policy, tiny_description: dict, tmp_path: Path
) -> None:
    file = tmp_path / "start.safetensors"
    policy.save_lora(file, {name: value.detach() for name, value in policy.parameters.items()}, {})
    tiny_description["lora"]["start_from"] = str(file)
    config = parse_config(tiny_description)
    other = Policy(SD3Model.load(config.model, CPU), config, keeps_old=True)
    other.start()
    expected = predict(policy.model).detach()
    for name in ("live", "average", "old"):
        with other.using(name):
            torch.testing.assert_close(predict(other.model).detach(), expected, rtol=1e-5, atol=1e-6)
