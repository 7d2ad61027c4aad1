"""The updater: the loss scale, steps that overflow, passes that leave no trace, and what a checkpoint keeps of it."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import assert_same_tensors
from stages import gradients_of, items_of, rollout_of, updater_for
from torch import Tensor, nn

from trainer.config import parse_config
from trainer.loop import Trainer
from trainer.models import Conditions, DiffusionModel
from trainer.objectives.base import Loss, RolloutBatch, TrainingItem
from trainer.objectives.updater import TRIES, Updater
from trainer.rollout import Execution, Plan, Prompting, sample
from trainer.utils.distributed import Processes

WIDTH, IMAGES = 8, 4


class TinyModel(DiffusionModel):
    """velocity = W x, in a type of its own."""

    default_targets = ("proj",)
    latent_shape = (WIDTH,)
    check = load = encode_batches = classmethod(lambda cls, *_: None)
    decode = None
    lora_key = lambda self, name: name  # noqa: E731

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.module = nn.ModuleDict({"proj": nn.Linear(WIDTH, WIDTH, bias=False)}).to(dtype).requires_grad_(False)

    def predict(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        return self.module["proj"](latents.to(self.dtype)).float()


def stage(dtype: torch.dtype = torch.float32) -> tuple[Updater, RolloutBatch, list[TrainingItem]]:
    """An updater with a LoRA that does something, a rollout of one group, and all its actions."""
    updater = updater_for(TinyModel(dtype), {"clip_range": 0.5}, lora={"rank": 2, "alpha": 4})
    generator = torch.Generator().manual_seed(3)
    for parameter in updater.policy.parameters.values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    plan = Plan("dance", 0.6, [1.0, 0.6, 0.3, 0.0], [True, True, False], shared_noise=False)
    prompting = Prompting(Conditions({"c": torch.zeros(1, 1)}))
    prompt_of = torch.zeros(IMAGES, dtype=torch.long)
    draw = lambda _=None: torch.randn(IMAGES, WIDTH, generator=generator)  # noqa: E731
    kept = sample(updater.model, plan, prompting, prompt_of, draw(), draw, Execution())
    rollout = rollout_of(plan, prompting, kept, prompt_of, [1.5, -0.5, -1.2, 0.2], optimizer_steps=0)
    return updater, rollout, items_of(rollout, [(i, step) for i in range(IMAGES) for step in range(2)])


def test_the_scale_changes_no_bit_of_a_float32_gradient() -> None:
    updater, rollout, items = stage()
    updater.accumulate(items, rollout)
    plain = gradients_of(updater)
    assert sum(g.norm() for g in plain.values()) > 1e-3
    for exponent in (-20, 7, 60):
        updater.accumulate(items, rollout, 2.0**exponent)
        assert_same_tensors(plain, {name: g / 2.0**exponent for name, g in gradients_of(updater).items()})


def test_a_run_without_the_scale_is_the_same_run(tiny_description: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[list[dict], dict[str, Tensor], float]:
        trainer = Trainer(parse_config(copy.deepcopy(tiny_description)), None, Processes("cpu"))
        events = [trainer.iterate() for _ in range(2)]
        kept = {name: value.detach().clone() for name, value in trainer.policy.tensors().items()}
        return [(e["loss"], e["grad_norm"], e["objective"]) for e in events], kept, trainer.updater.scaler.get_scale()

    events, learned, scale = run()
    monkeypatch.setattr(Updater, "first_scale", lambda self, items: 1.0)
    plain, alone, one = run()
    assert (scale, one) == (2.0**11, 1.0), "8 images / 2 optimizer steps x 2 of 4 steps x 4 x 8 x 8 latents"
    assert events == plain
    assert_same_tensors(learned, alone)


def test_a_float16_gradient_at_the_size_of_a_real_run_is_right_with_the_scale_alone() -> None:
    exact, rollout, items = stage()
    half, _, _ = stage(torch.float16)
    exact.accumulate(items, rollout)
    expected = torch.cat([g.flatten() for g in gradients_of(exact).values()])

    def cosine(total: int, scale: float) -> float:
        found = torch.cat([g.flatten() for g in half.gradient(items, rollout, scale, total)])
        assert found.isfinite().all()
        return torch.cosine_similarity(found.double(), expected.double(), dim=0).nan_to_num().item()

    for actions in (192, 12_544):
        total = actions * 16_384 // WIDTH  # as much as 512 x 512 pixels of Stable Diffusion make of it
        assert cosine(total, half.first_scale(total)) > 0.999
    assert cosine(total, 1.0) == 0, "all of it is below what float16 can hold"


class Counting:
    """Counts an objective's losses, and may change them."""

    def __init__(self, updater: Updater, change: float = 1.0) -> None:
        self.loss, self.change, self.calls = updater.objective.loss, change, 0
        updater.objective.loss = self

    def __call__(self, *arguments: object) -> Loss:
        self.calls += 1
        loss = self.loss(*arguments)
        return replace(loss, value=loss.value * self.change)


def test_a_step_that_overflows_is_made_again_with_half_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(exponent: int) -> tuple[Updater, int, float | None]:
        updater, rollout, items = stage(torch.float16)
        monkeypatch.setattr(updater, "first_scale", lambda items: 2.0**exponent)
        counting = Counting(updater)
        monkeypatch.setattr(updater.objective, "items", lambda rollout: iter([items]))
        update = updater.update(rollout)
        assert update.bad == (update.grad_norm is None)
        return updater, counting.calls, update.grad_norm

    largest = next(e for e in range(40) if run(e)[1] > 1) - 1  # beyond it, float16 overflows
    assert largest > 8
    _, once, expected = run(largest)
    updater, calls, norm = run(largest + 3)
    assert (once, calls) == (1, 4)
    assert updater.scaler.get_scale() == 2.0**largest
    assert updater.policy.updates == 1
    assert norm == pytest.approx(expected, rel=1e-3)
    updater, calls, norm = run(largest + TRIES + 2)
    assert (calls, norm, updater.policy.updates) == (TRIES, None, 0)
    assert updater.scaler.get_scale() == 2.0 ** (largest + 2), "the next iteration goes on from here"


def test_a_loss_that_is_not_finite_is_counted_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    updater, rollout, items = stage()
    counting = Counting(updater, float("nan"))
    monkeypatch.setattr(updater.objective, "items", lambda rollout: iter([items, items]))
    before = {name: p.detach().clone() for name, p in updater.policy.parameters.items()}
    update = updater.update(rollout)
    assert (counting.calls, update.bad, update.grad_norm, rollout.optimizer_steps) == (2, 2, None, 0)
    assert_same_tensors(before, {name: p.detach() for name, p in updater.policy.parameters.items()})


@pytest.mark.parametrize("change", [1.0, float("inf"), float("nan")])
def test_passes_that_keep_other_processes_company_leave_no_trace(change: float) -> None:
    updater, rollout, items = stage()
    updater.accumulate(items, rollout)
    expected = gradients_of(updater)
    asked = []
    updater.execution = replace(updater.execution, match=lambda n: asked.append(n) or n + 2)
    counting = Counting(updater)
    dummy_item = updater.objective.dummy_item(rollout)

    def loss(model: object, rollout: RolloutBatch, batch: object) -> Loss:
        counting.change = change if batch.items == [dummy_item] else 1.0
        return counting(model, rollout, batch)

    updater.objective.loss = loss
    totals = updater.accumulate(items, rollout)
    assert (asked, counting.calls, totals.items) == ([1], 3, len(items))
    assert_same_tensors(expected, gradients_of(updater))
    # Neither where this process has nothing to train at all.
    other = replace(rollout, members=rollout.members[:1])
    updater.accumulate([item for item in items if item.member != other.members[0]], other)
    assert all((g == 0).all() for g in gradients_of(updater).values())


def test_the_scale_goes_through_a_checkpoint() -> None:
    updater, rollout, _ = stage()
    assert updater.state() == {}
    updater.update(rollout)
    updater.scaler.update(2.0**9)
    other, _, _ = stage()
    other.restore(json.loads(json.dumps(updater.state())))
    assert other.scaler.get_scale() == 2.0**9
    assert other.state() == updater.state()
    other.restore({})
    assert other.state() == updater.state()
