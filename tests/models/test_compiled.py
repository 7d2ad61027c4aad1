"""`runtime.compile` in diffusers folders: the same numbers, no stale LoRA, no graph for weights that are exchanged."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import assert_same_tensors, lora_of
from short_runs import train
from tiny_families import CASES

from trainer import preflight
from trainer.adapters.compute import cast_once
from trainer.check import check_run
from trainer.config import parse_config
from trainer.loop import Trainer
from trainer.models import FAMILIES
from trainer.models.compiled import check_compile, missing_compiler
from trainer.policy import Policy
from trainer.utils.distributed import Processes
from trainer.utils.errors import BadInput, RunFailed

ABSENT = missing_compiler(on_gpu=False)
compiles = pytest.mark.skipif(ABSENT is not None, reason=f"this machine has no {ABSENT}")
CPU = torch.device("cpu")
SAME = 1e-5
"""Largest part of a prediction by which compiling may move it."""


def graphs() -> int:
    """Number of graphs compiled so far in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def stirred(policy: Policy) -> Policy:
    """A policy whose live, old and average LoRA are three different ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in (policy.parameters, policy.old, policy.average.weights):
            for value in weights.values():
                value.copy_(0.05 * torch.randn(value.shape, generator=generator))
    return policy


def predictions(policy: Policy) -> dict[str, torch.Tensor]:
    """With each set of weights, and a gradient to which a prediction with other weights in between is no matter."""
    model, generator = policy.model, torch.Generator().manual_seed(1)
    conditions = type(model).empty_conditions(model.config, 2, CPU)
    for value in conditions.tensors.values():
        value.normal_(generator=generator) if value.is_floating_point() else value.fill_(1)
    latents = torch.randn(2, *model.latent_shape, generator=generator)

    def predict() -> torch.Tensor:
        return model.predict(latents, torch.tensor([0.7, 0.3]), conditions)

    with torch.no_grad(), cast_once(model.module):
        found = {"rollout": predict()}
    trained = predict()
    for weights in ("base", "average", "old"):
        with policy.using(weights), cast_once(model.module):
            found[weights] = predict()
    (trained * found["old"]).sum().backward()
    found["live"] = trained.detach()
    found["gradient"] = torch.cat([parameter.grad.flatten() for parameter in policy.parameters.values()])
    policy.optimizer.zero_grad(set_to_none=True)
    return found


def off(value: torch.Tensor, like: torch.Tensor) -> float:
    return ((value - like).norm() / like.norm()).item()


@compiles
@pytest.mark.parametrize("checkpointing", [True, False])
def test_compiled_blocks_compute_the_same_with_every_set_of_weights(checkpointing: bool, tmp_path: Path) -> None:
    case = CASES["wan-image"]
    case.build(tmp_path)
    model = {"family": case.family, "path": str(tmp_path), **case.model}
    data = {"model": model | {"gradient_checkpointing": checkpointing}, "lora": {"rank": 4, "ema_decay": 0.9}}
    data |= {"prompts": {"texts": ["a"]}, "rewards": [{"name": "brightness"}], "rollout": case.rollout}
    config = parse_config(data)
    policy = stirred(Policy(FAMILIES[case.family].load(config.model, CPU), config, keeps_old=True))
    plain, names = predictions(policy), list(policy.parameters)
    policy.model.compile_blocks()
    before = graphs()
    compiled, made = predictions(policy), graphs()
    assert made > before or not checkpointing, "nothing was compiled"  # the second case has the graphs of the first
    again = predictions(policy)
    assert graphs() == made, "a graph for each exchange of weights"
    for name, value in plain.items():
        assert off(compiled[name], value) < SAME, name
        assert torch.equal(again[name], compiled[name]), name
    assert off(compiled["rollout"], compiled["live"]) <= max(1e-6, off(plain["rollout"], plain["live"]))
    cosine = torch.cosine_similarity(compiled["gradient"].double(), plain["gradient"].double(), dim=0)
    assert cosine > 0.9999
    assert off(compiled["old"], compiled["live"]) > 10 * SAME, "the sets of weights hardly differ"
    policy.update_old()
    assert list(policy.parameters) == names
    assert torch.equal(predictions(policy)["old"], compiled["rollout"]), "the old weights are those of before"
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(predictions(policy)["rollout"], plain["rollout"])


@compiles
def test_a_compiled_run_resumes_and_writes_the_same_names(tiny_description: dict, tmp_path: Path) -> None:
    tiny_description["rollout"] |= {"steps": 3, "batch_size": 2, "shared_noise": False}
    tiny_description["objective"] |= {"batch_size": 2, "updates": 1}
    del tiny_description["evaluation"]
    tiny_description["runtime"] |= {"iterations": 2}
    plain, events = train(copy.deepcopy(tiny_description), tmp_path / "plain")
    tiny_description["runtime"] |= {"compile": True}
    whole, compiled = train(copy.deepcopy(tiny_description), tmp_path / "whole")
    assert list(lora_of(tmp_path / "plain")) == list(lora_of(tmp_path / "whole"))
    for one, two in zip(events, compiled, strict=True):
        assert two["objective"]["rollout_deviation"]["max"] < 1e-5
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    short = copy.deepcopy(tiny_description)
    short["runtime"]["iterations"] = 1
    train(short, tmp_path / "parts")
    resumed, _ = train(tiny_description, tmp_path / "parts")
    assert_same_tensors(dict(resumed.policy.tensors()), dict(whole.policy.tensors()))


def test_compiling_is_refused_where_it_cannot_work(tiny_description: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none_found() -> str:
        raise exc.InvalidCxxCompiler

    tiny_description["runtime"] |= {"compile": True}
    config = parse_config(tiny_description)
    with pytest.raises(BadInput, match="runtime.compile is true and the base model is sharded"):
        check_run(parse_config(tiny_description, ["model.sharded=true"]), 2)
    with pytest.raises(BadInput, match="the base model is of a ComfyUI graph, which is not compiled"):
        check_compile(config.model.model_copy(update={"graph": object()}), "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="the base model computes in bfloat16 on a CPU"):
        check_run(parse_config(tiny_description, ["model.dtype=bfloat16"]), 1)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    with pytest.raises(BadInput, match="runtime.compile is true, but this machine has no C\\+\\+ compiler"):
        check_run(config, 1)
    tiny_description["runtime"]["compile"] = False
    check_run(parse_config(tiny_description), 1)


@pytest.mark.parametrize("factor", [1.0, 1.03])
def test_a_wrong_compiled_gradient_stops_the_run_at_its_start(
    tiny_description: dict, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    trainer = Trainer(parse_config(tiny_description), None, Processes("cpu"))
    name = next(name for name in trainer.policy.parameters if "lora_B" in name)
    factors = [factor, 1.0]  # of the compiled network's gradient, and of the uncompiled one's
    stances = []

    @contextmanager
    def stance(kind: str) -> Iterator[None]:
        stances.append(kind)
        factors.pop(0)
        yield

    monkeypatch.setattr(torch.compiler, "set_stance", stance)
    trainer.policy.parameters[name].register_hook(lambda gradient: gradient * factors[0])
    if factor == 1.0:
        preflight.check_compiled(trainer.updater, trainer.prompting)
    else:
        with pytest.raises(RunFailed, match=r"compiled network differs .* by 0\.0.*: set runtime.compile to false"):
            preflight.check_compiled(trainer.updater, trainer.prompting)
    assert stances == ["force_eager"]
    assert all(parameter.grad is None for parameter in trainer.policy.parameters.values())
