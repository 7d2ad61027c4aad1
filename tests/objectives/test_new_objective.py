"""Objectives of other kinds than GRPO, each one class and one registration, trained by the very same trainer."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from conftest import assert_same_tensors
from torch import Tensor

from trainer.config import parse_config
from trainer.diffusion import kernels
from trainer.loop import Trainer
from trainer.objectives import OBJECTIVES
from trainer.objectives.advantage import Advantages
from trainer.objectives.base import (
    Batch,
    Loss,
    Objective,
    ObjectiveOptions,
    RolloutBatch,
    Totals,
    TrainingItem,
    split_updates,
)
from trainer.prompts.sets import PromptSet
from trainer.rollout import Plan, Trajectories
from trainer.runs.directory import RunDirectory
from trainer.utils.distributed import Processes
from trainer.utils.errors import BadInput
from trainer.utils.seeds import noise


@dataclass(frozen=True)
class Rows(Batch):
    """Items with the rows of their images."""

    rows: Tensor


class Plain(Objective):
    """What the three below share: one batch per optimizer step, and a deterministic rollout."""

    def plan(self, model: object, iteration: int) -> Plan:
        config = self.config.rollout
        # Without noise on the way, images that start from one noise would all be the same.
        return Plan("ode", 0.0, model.sigmas(config.steps, config.shift), [False] * config.steps, shared_noise=False)

    def dummy_item(self, rollout: RolloutBatch) -> TrainingItem:
        return TrainingItem(rollout.members[0])

    def batches(self, items: list[TrainingItem], rollout: RolloutBatch) -> list[Batch]:
        return [Rows(items, torch.tensor([rollout.row_of[item.member] for item in items]))] if items else []

    def items(self, rollout: RolloutBatch) -> Iterator[list[TrainingItem]]:
        for members in split_updates(rollout.active_groups(), self.options.updates):
            yield [TrainingItem(member, draw) for member in members for draw in range(2)]

    def velocity(self, rollout: RolloutBatch, rows: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        conditions = rollout.prompting.conditions.rows(rollout.prompt_of[rows])
        return self.model.predict_guided(latents, sigma, conditions)

    def record(self, every: Totals, first: Totals) -> dict:
        return {"terms": every.items, **{name: every.mean(name) for name in every.sums}, **every.peaks}


class MatchingOptions(ObjectiveOptions):
    name: Literal["matching"] = "matching"
    decay: float = 0.5


class Matching(Plain):
    """Forward process: final latents alone, noised again; the old LoRA samples and anchors."""

    name = "matching"
    Options = MatchingOptions
    keeps_old_weights = True

    def rollout_weights(self) -> AbstractContextManager:
        return self.policy.using("old")

    def loss(self, model: object, rollout: RolloutBatch, batch: Rows) -> Loss:
        final = rollout.trajectories.final[batch.rows]
        drawn = [noise(final.shape[1:], 5, rollout.iteration, *item.member, item.step) for item in batch.items]
        eps, sigma = torch.stack(drawn), torch.tensor([(0.3, 0.7)[item.step] for item in batch.items])
        column = sigma[:, None, None, None]
        noised = (1 - column) * final + column * eps
        with self.policy.using("old"):
            old = self.velocity(rollout, batch.rows, noised, sigma)
        live = self.velocity(rollout, batch.rows, noised, sigma)
        advantages = rollout.advantages_of(batch.items)
        value = advantages * (live - (eps - final)).square().flatten(1).mean(1)
        contrast = (live - old).detach().square().flatten(1).mean(1).double()
        return Loss(value, {"contrast": contrast.sum()}, {"largest": contrast.max()}, 2 * len(final))

    def after_iteration(self, iteration: int) -> None:
        self.policy.update_old(self.options.decay)

    def alarm(self, record: dict) -> str | None:
        return "the contrast is live" if record.get("contrast", 0) > 0 else None


class PairsOptions(ObjectiveOptions):
    name: Literal["pairs"] = "pairs"


class Pairs(Plain):
    """Offline preference pairs: no rollout, no rewards, prompts of its own."""

    name = "pairs"
    Options = PairsOptions
    needs_rewards = needs_advantages = needs_rollout = False
    data: ClassVar[list[str]] = ["a red circle", "a blue square"]

    @classmethod
    def check_config(cls, config: object) -> None:
        """Nothing is sampled, so nothing is divided."""

    def training_prompts(self) -> PromptSet:
        return PromptSet(self.data, [""] * len(self.data))

    def collect(self, iteration: int) -> RolloutBatch:
        pairs = len(self.data)
        members = [(pair, side) for pair in range(pairs) for side in range(2)]
        final = torch.stack([noise(self.model.latent_shape, 1, *member) for member in members])
        nothing = torch.empty(0)
        return RolloutBatch(
            iteration=iteration,
            plan=self.plan(self.model, iteration),
            prompting=self.prompting,
            members=members,
            prompt_of=torch.arange(pairs).repeat_interleave(2),
            texts=[text for text in self.data for _ in range(2)],
            trajectories=Trajectories(final, [], nothing, nothing, nothing, None, 0),
            advantages=Advantages.none(pairs, 2),
            active=torch.ones(pairs, 2, dtype=torch.bool),
        )

    def items(self, rollout: RolloutBatch) -> Iterator[list[TrainingItem]]:
        yield [TrainingItem((pair, 0), other=(pair, 1)) for pair in range(len(rollout.active))]

    def loss(self, model: object, rollout: RolloutBatch, batch: Rows) -> Loss:
        losers = torch.tensor([rollout.row_of[item.other] for item in batch.items])
        eps = torch.stack([noise(self.model.latent_shape, 2, *item.member) for item in batch.items])
        both, sigma = torch.cat([batch.rows, losers]), torch.full((2 * len(losers),), 0.5)
        final, eps = rollout.trajectories.final[both], torch.cat([eps, eps])
        noised = 0.5 * final + 0.5 * eps

        def error() -> Tensor:
            return (self.velocity(rollout, both, noised, sigma) - (eps - final)).square().flatten(1).mean(1)

        with self.policy.using("base"):
            reference = error()
        winner, loser = (error() - reference).chunk(2)
        value = -torch.nn.functional.logsigmoid(-50 * (winner - loser))
        return Loss(value, {"margin": (loser - winner).detach().double().sum()}, {}, 2 * len(both))


class GradientOptions(ObjectiveOptions):
    name: Literal["gradient"] = "gradient"


class Gradient(Plain):
    """Reward gradient: the rollout stops before its last step, which is made and scored with gradient."""

    name = "gradient"
    Options = GradientOptions
    needs_advantages = False

    def check(self, family: type, rewards: dict) -> None:
        for name in rewards:
            if name != "brightness":
                raise BadInput(f"reward {name!r} is not differentiable")

    def plan(self, model: object, iteration: int) -> Plan:
        plan = super().plan(model, iteration)
        return Plan(plan.kernel, 0.0, plan.sigmas, plan.stochastic, plan.shared_noise, stop=len(plan.stochastic) - 1)

    def items(self, rollout: RolloutBatch) -> Iterator[list[TrainingItem]]:
        yield [member for group in rollout.active_groups() for member in map(TrainingItem, group)]

    def loss(self, model: object, rollout: RolloutBatch, batch: Rows) -> Loss:
        latents, sigma = rollout.trajectories.final[batch.rows], rollout.plan.sigmas[-2]
        velocity = self.velocity(rollout, batch.rows, latents, torch.full((len(latents),), sigma))
        scores = kernels.step("ode", latents, velocity, sigma, 0.0, 0.0).next_sample.flatten(1).mean(1)
        table = rollout.scores.setdefault("brightness", torch.full(rollout.active.shape, torch.nan).double())
        for item, score in zip(batch.items, scores.tolist(), strict=True):
            table[item.member] = score
        return Loss(-scores, {}, {}, len(latents))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for objective in (Matching, Pairs, Gradient):
        monkeypatch.setitem(OBJECTIVES, objective.name, objective)


def trained(description: dict, run: RunDirectory | None = None) -> tuple[Trainer, list[dict]]:
    events: list[dict] = []
    trainer = Trainer(parse_config(description), run, Processes("cpu"), events.append)
    trainer.train()
    return trainer, [event for event in events if "rewards" in event]


@pytest.fixture
def short(tiny_description: dict) -> dict:
    del tiny_description["evaluation"]
    tiny_description["runtime"] |= {"iterations": 3, "samples_every": 0}
    return tiny_description


def test_a_forward_process_objective_trains_on_final_latents_and_its_old_lora_goes_through_a_checkpoint(
    short: dict, tmp_path: Path
) -> None:
    short["objective"] = {"name": "matching", "updates": 2}
    whole, events = trained(short)
    assert [event["objective"]["terms"] for event in events] == [16, 16, 16]
    contrasts = [event["objective"]["contrast"] for event in events]
    assert contrasts[0] > 0, "the second optimizer step sees what the first has done"
    assert events[0]["forwards_per_image"] == 5 + 2 * 2, "five steps, and two passes for each of two draws"
    # Stopped after two iterations and gone on with.
    config = parse_config(short)
    run = RunDirectory(tmp_path / "run").open(config, ["test"])
    first = Trainer(config, run, Processes("cpu"), lambda event: event.get("iteration") == 2 and run.request_stop())
    assert first.train()["state"] == "stopped"
    run.stop_file.unlink()
    again, rest = trained(short, run)
    assert rest[0]["objective"] == events[2]["objective"]
    assert_same_tensors(whole.policy.tensors(), again.policy.tensors())
    assert any(name.startswith("old/") for name in again.policy.tensors())
    run.release()


def test_the_watchdog_hears_the_alarm_of_the_objective(short: dict) -> None:
    from trainer.utils.errors import RunFailed

    short["objective"] = {"name": "matching", "updates": 2}
    short["runtime"] |= {"watchdog": {"patience": 2}}
    with pytest.raises(RunFailed, match="collapse: the contrast is live, for 2 iterations in a row"):
        trained(short)


def test_an_offline_objective_needs_neither_prompts_nor_rewards_nor_a_rollout(short: dict) -> None:
    del short["prompts"], short["rewards"]
    short["objective"] = {"name": "pairs"}
    short["rollout"] |= {"prompts_per_iteration": 8}
    _, events = trained(short)
    margins = [event["objective"]["margin"] for event in events]
    assert margins[0] == pytest.approx(0, abs=1e-6), "the LoRA begins as the base model"
    assert margins[0] < margins[1] < margins[2], "winners are fitted better, losers worse"
    assert all(event["rewards"] == {} for event in events)


def test_a_reward_gradient_needs_no_advantages_and_scores_for_itself(short: dict) -> None:
    short["rewards"] = [{"name": "brightness"}]
    short["objective"] = {"name": "gradient"}
    _, events = trained(short)
    means = [event["rewards"]["brightness"]["mean"] for event in events]
    assert events[0]["objective"]["terms"] == 8
    assert events[0]["rewards"]["brightness"]["std"] > 0
    assert events[0]["loss"] == pytest.approx(-means[0], rel=1e-5)
    assert all(event["grad_norm"] > 0 for event in events)
    short["rewards"] = [{"name": "colorfulness"}]
    with pytest.raises(BadInput, match="reward 'colorfulness' is not differentiable"):
        trained(short)


def test_every_registered_objective_says_its_own_name() -> None:
    for name, objective in OBJECTIVES.items():
        assert name == objective.name == objective.Options().name
