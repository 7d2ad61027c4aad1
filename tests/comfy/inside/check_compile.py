"""`runtime.compile` with ComfyUI's networks: the same numbers, with checkpointing and without, and what is refused."""

from typing import Any

import pytest
import torch
from tiny_graphs import CASES, Trained, graph_model, new_patcher

CASE = next(case for case in CASES if str(case) == "WAN21_T2V")


def predictions(trained: Trained) -> dict[str, torch.Tensor]:
    """Of the LoRA without gradient, of the base model, and of the LoRA with its gradient."""
    model, policy = trained.model, trained.updater.policy
    levels = torch.tensor(trained.plan.sigmas[:2])

    def predict() -> torch.Tensor:
        prompting = trained.prompting
        return model.predict_guided(trained.noise, levels, prompting.conditions, 2.0, prompting.unconditional)

    with torch.no_grad():
        found = {"plain": model.plain(predict), "rollout": predict()}
    live = predict()
    with policy.using("base"):
        found["base"] = predict()
    (live * found["base"]).sum().backward()
    found["live"] = live.detach()
    found["gradient"] = torch.cat([parameter.grad.flatten() for parameter in policy.parameters.values()])
    policy.optimizer.zero_grad(set_to_none=True)
    return found


def graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def require_compiler(pack: Any) -> None:
    if absent := pack("trainer.models.compiled").missing_compiler(on_gpu=False):
        pytest.skip(f"this machine has no {absent}")


@pytest.mark.parametrize("checkpointing", [True, False])
def test_compiled_blocks_compute_the_same(pack, checkpointing: bool) -> None:
    require_compiler(pack)
    trained = graph_model(pack, CASE, new_patcher(CASE), gradient_checkpointing=checkpointing)
    trained.wake()
    plain = predictions(trained)
    trained.model.compile_blocks()
    before = graphs()
    compiled, count = predictions(trained), graphs() - before
    assert count > 0
    again = predictions(trained)
    assert graphs() == before + count
    assert torch.equal(compiled["plain"], plain["plain"]), "inference mode runs uncompiled"
    for name, value in plain.items():
        assert (compiled[name] - value).norm() < 1e-5 * value.norm(), name
        assert torch.equal(again[name], compiled[name]), name
    assert (plain["live"] - plain["base"]).norm() > 1e-3 * plain["live"].norm()
