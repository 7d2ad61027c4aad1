"""`runtime.compile` with ComfyUI's networks: the same numbers, with checkpointing and without, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_graphs import CASES, Trained, graph_model, new_patcher

CASE = next(case for case in CASES if str(case) == "WAN21_T2V")


def prediction(trained: Trained) -> Callable[[], torch.Tensor]:
    levels, prompting = torch.tensor(trained.plan.sigmas[:2]), trained.prompting
    given = (trained.noise, levels, prompting.conditions, 2.0, prompting.unconditional)
    return lambda: trained.model.predict_guided(*given)


def predictions(trained: Trained) -> dict[str, torch.Tensor]:
    """Of the LoRA without gradient, of the base model, and of the LoRA with its gradient."""
    policy, predict = trained.updater.policy, prediction(trained)
    with torch.no_grad():
        found = {"rollout": predict()}
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
    with torch.no_grad():
        inference = trained.model.plain(prediction(trained))
    assert graphs() == before, "inference mode is what the opening check compares with"
    assert (inference - plain["rollout"]).norm() < 1e-5 * inference.norm()
    compiled, made = predictions(trained), graphs()
    assert made > before or not checkpointing, "nothing was compiled"  # the second case has the graphs of the first
    again = predictions(trained)
    assert graphs() == made
    for name, value in plain.items():
        assert (compiled[name] - value).norm() < 1e-5 * value.norm(), name
        assert torch.equal(again[name], compiled[name]), name
    assert (plain["live"] - plain["base"]).norm() > 1e-3 * plain["live"].norm()


def test_offloaded_weights_are_refused(pack) -> None:
    trained = graph_model(pack, CASE, new_patcher(CASE))
    trained.model.base.model_lowvram = True
    with pytest.raises(pack("trainer.utils.errors").BadInput, match="weights of the model do not fit on the GPU"):
        trained.model.compile_blocks()
