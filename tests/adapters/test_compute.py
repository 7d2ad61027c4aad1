"""A LoRA beside a base of half precision: computed in its dtype, learned in float32, and nothing else changed."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPTS
from short_runs import train
from tiny_families import CASES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.adapters import lora
from trainer.adapters.compute import cast_once
from trainer.config import LoraConfig

TARGETS = LoraConfig(rank=4, alpha=8, targets=["first", "second", "pixels"])
SCALE = {torch.bfloat16: 1.0, torch.float16: 2.0**18}


class Network(nn.Module):
    """Two linear layers and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.pixels = nn.Conv2d(4, 6, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(nn.functional.silu(self.first(x)))
        return self.pixels(x.reshape(len(x), 4, 16, -1))


def network(dtype: torch.dtype, spread: float = 0.02, plain_peft: bool = False) -> Network:
    """With a LoRA that does something, on weights that every dtype holds exactly.

    Args:
        plain_peft: compute as peft does.
    """
    torch.manual_seed(0)
    module = Network().requires_grad_(False).to(torch.bfloat16).to(dtype)
    lora.inject(module, TARGETS, (), 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora.parameters(module).items():
        if "lora_B" in name:
            parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    for layer in module.modules() if plain_peft else ():
        if hasattr(layer, "lora_A"):
            layer.__class__ = type(layer).__mro__[1]
    return module


def batch(dtype: torch.dtype) -> Tensor:
    return torch.randn(64, 16, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).to(dtype)


def gradients(module: Network, dtype: torch.dtype) -> list[Tensor]:
    scale, output = SCALE.get(dtype, 1.0), module(batch(dtype)).float()
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    ((output * weights).mean() * scale).backward()
    return [p.grad.double() / scale for p in lora.parameters(module).values()]


def cosine(a: Tensor, b: Tensor) -> float:
    return (a.flatten() / a.norm() @ (b.flatten() / b.norm())).item()


class Operations(TorchDispatchMode):
    """Counts what is computed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.found[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_compute_as_peft_to_the_bit(dtype: torch.dtype) -> None:
    ours, theirs = network(dtype), network(dtype, plain_peft=True)
    assert torch.equal(ours(batch(dtype)), theirs(batch(dtype)))
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours, dtype), gradients(theirs, dtype), strict=True))


@pytest.mark.parametrize("spread", [1e-5, 1e-2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_are_those_of_float32(dtype: torch.dtype, spread: float) -> None:
    half, exact = network(dtype, spread), network(torch.float32, spread)
    names = lora.parameters(half)
    assert {p.dtype for p in names.values()} == {torch.float32}
    found, expected = gradients(half, dtype), gradients(exact, torch.float32)
    assert {p.grad.dtype for p in lora.parameters(half).values()} == {torch.float32}
    for name, a, b in zip(names, found, expected, strict=True):
        assert cosine(a, b) > 0.999, name


def test_what_the_lora_adds_is_computed_in_the_bases_dtype() -> None:
    module, x = network(torch.bfloat16), batch(torch.bfloat16)
    with torch.no_grad():
        output = module(x)
        with Operations() as counter:
            module(x)
        with cast_once(module):
            module(x)
            with Operations() as again:
                assert torch.equal(module(x), output)
        lora.set_enabled(module, False)
        assert (module(x) - output).float().norm() > 0.01 * output.float().norm()
    assert output.dtype == torch.bfloat16
    assert counter.found["_to_copy"] == 2 * 3, "two small matrices of each of three layers"
    assert again.found["_to_copy"] == 0
    assert counter.found["mul"] <= 1, "the scale of a linear layer is part of its product"


def test_weights_that_were_cast_once_are_forgotten_afterwards() -> None:
    module, x = network(torch.bfloat16), batch(torch.bfloat16)
    with torch.no_grad():
        with cast_once(module):
            before = module(x)
        for parameter in lora.parameters(module).values():
            parameter.mul_(3)
        assert not torch.equal(module(x), before)
    with cast_once(module):
        module(x).float().sum().backward()
    assert all(p.grad.any() for p in lora.parameters(module).values()), "with gradient, weights are cast as ever"


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASES["sd"].build(tmp_path_factory.mktemp("sd"))


@pytest.mark.parametrize("objective", [{"updates": 2}, {"name": "nft"}])
def test_a_run_in_bfloat16_is_on_policy(sd: Path, objective: dict) -> None:
    """Rollout and update compute alike, also with convolutions and after the weights have changed."""
    data = {
        "model": {"family": "sd", "path": str(sd), "dtype": "bfloat16", **CASES["sd"].model},
        "prompts": {"texts": PROMPTS[:2]},
        "rollout": {"steps": 4, "group_size": 2, "prompts_per_iteration": 2, "kernel": "ddim", "eta": 0.5},
        "rewards": [{"name": "brightness"}],
        "objective": {"batch_size": 96} | objective,
        "lora": {"rank": 2, "alpha": 4, "targets": ["attn1.to_q", "attn2.to_out.0", "conv1"]},
        "optimizer": {"learning_rate": 1e-2},
        "runtime": {"iterations": 2, "device": "cpu"},
    }
    trainer, events = train(copy.deepcopy(data))
    assert {p.dtype for p in trainer.policy.parameters.values()} == {torch.float32}
    for event in events:
        assert event["grad_norm"] > 0
        if "rollout_deviation" in event["objective"]:
            assert event["objective"]["rollout_deviation"]["max"] == 0
