"""The dtype of reward networks: what `auto` means on which device, and that a resumed run keeps it."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_rewards
import torch
from short_runs import train
from tiny_rewards import NETWORKS, VIDEO

from trainer.check import load_rewards
from trainer.config import RewardConfig, parse_config
from trainer.rewards import Reward, load_reward, score
from trainer.rewards.base import ModelReward

ON_A_GPU = dict.fromkeys(("hps-v2.1", "clip", "pickscore", "imagereward", "aesthetic", "preference"), torch.float16)
ON_A_GPU |= {"geneval-like": torch.float32, "hpsv3": torch.bfloat16, **dict.fromkeys(VIDEO, torch.bfloat16)}
ON_A_CPU = dict.fromkeys(NETWORKS, torch.float32) | dict.fromkeys(("hpsv3", *VIDEO), torch.bfloat16)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict]]:
    """Options of each reward, without a dtype; the networks are small."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_rewards.shrink(patch.setattr, importlib.import_module)
        found = tiny_rewards.write(tmp_path_factory.mktemp("rewards"))
        yield {name: {key: value for key, value in found[name].items() if key != "dtype"} for name in NETWORKS}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as the choice of a dtype can see."""
    pretend_gpu(monkeypatch, (8, 0))


def pretend_gpu(patch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))


def network(reward: Reward) -> ModelReward:
    assert isinstance(reward.holder, ModelReward)
    return reward.holder


@pytest.mark.parametrize("name", NETWORKS)
def test_auto_on_a_gpu(name: str, options: dict[str, dict], gpu: None) -> None:
    config = RewardConfig(name=name, options=options[name])
    assert network(load_reward(config)).dtype == ON_A_GPU[name]
    assert network(load_reward(config, "cuda")).dtype == ON_A_GPU[name]
    assert network(load_reward(config, "cpu")).dtype == ON_A_CPU[name], "a run on the CPU beside a GPU"
    assert network(load_reward(config, "auto", gradient=True)).dtype == ON_A_CPU[name]
    for dtype in ("float32", "bfloat16", "float16"):
        chosen = RewardConfig(name=name, options={**options[name], "dtype": dtype})
        assert network(load_reward(chosen)).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("name", NETWORKS)
def test_auto_without_a_gpu(name: str, options: dict[str, dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("auto", "cpu", "mps"):
        assert network(load_reward(RewardConfig(name=name, options=options[name]), device)).dtype == ON_A_CPU[name]


def test_auto_on_a_gpu_that_is_slow_in_half_precision(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (6, 1))
    config = RewardConfig(name="hps-v2.1", options=options["hps-v2.1"])
    assert network(load_reward(config)).dtype == torch.float32


@pytest.mark.parametrize("name", ["hps-v2.1", "clip", "pickscore", "imagereward", "aesthetic", "preference"])
def test_half_precision_takes_half_the_memory_and_keeps_heads_whole(name: str, options: dict, gpu: None) -> None:
    whole = network(load_reward(RewardConfig(name=name, options=options[name]), "cpu"))
    half = network(load_reward(RewardConfig(name=name, options=options[name])))
    assert half.memory() == whole.memory() / 2, "before anything is loaded"
    images, prompts = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)), ["a red circle"] * 3
    exact, found = (score(reward, images, prompts) for reward in (whole, half))
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact), "it is computed in half precision"
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.05)
    for key, value in half.module.named_parameters():
        expected = torch.float32 if key.startswith(("head.", "mlp.")) else torch.float16
        assert value.dtype == expected, key
    heads = sum(value.nbytes for value in half.module.parameters() if value.dtype == torch.float32)
    assert half.memory() - heads < 0.75 * (whole.memory() - heads)


def test_trained_rewards_stay_float32_where_their_gradients_are_wanted(
    options: dict, tiny_description: dict, gpu: None
) -> None:
    rewards = [{"name": "aesthetic", "options": options["aesthetic"]}]
    evaluation = {"rewards": [{"name": "hps-v2.1", "options": options["hps-v2.1"]}]}
    for objective, expected in {"grpo": torch.float16, "reward-gradient": torch.float32}.items():
        sections = {"rewards": rewards, "objective": {"name": objective}, "evaluation": evaluation}
        config = parse_config({**tiny_description, **sections, "runtime": {"device": "auto"}})
        trained, every = load_rewards(config)
        assert network(trained["aesthetic"]).dtype == expected
        assert network(every["hps-v2.1"]).dtype == torch.float16, "it is only evaluated"


def test_a_resumed_run_keeps_the_dtype_whatever_the_device(
    options: dict, tiny_description: dict, tmp_path: Path
) -> None:
    rewards = [{"name": "aesthetic", "options": options["aesthetic"]}]
    data = {**tiny_description, "rewards": rewards, "runtime": {"iterations": 1, "device": "cpu"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelReward, "auto_dtype", classmethod(lambda cls, device, gradient: cls.gpu_dtype))
        first, _ = train(data, tmp_path / "run")
    assert network(first.evaluator.rewards["aesthetic"]).dtype == torch.float16
    resumed, events = train({**data, "runtime": {**data["runtime"], "iterations": 2}}, tmp_path / "run")
    kept = network(resumed.evaluator.rewards["aesthetic"])
    assert len(events) == 1
    assert kept.dtype == next(kept.module["visual"].parameters()).dtype == torch.float16
