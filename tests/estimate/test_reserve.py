"""What a run on a connected model needs, and what it leaves free on the GPU where its description does not say."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.config import RunConfig, parse_config
from trainer.estimate.memory import GRAPH_PROCESS, graph_bytes, graph_peak, with_reserve


def config(tmp_path: Path, **sections: dict) -> RunConfig:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(bytes(1000))
    graph = {"folder": "x", "file": str(file), "vae_file": str(file), **sections.pop("graph", {})}
    data = {"model": {"family": "comfy", "graph": graph, "height": 512, "width": 512, "gradient_checkpointing": True}}
    data |= {"prompts": {"texts": ["a"]}, "rewards": [{"name": "brightness"}]}
    return parse_config(data | {"rollout": {"batch_size": 1}, "objective": {"batch_size": 1}} | sections)


def reserve(config: RunConfig) -> float:
    return with_reserve(config).graph.reserve_gb


def test_it_grows_with_what_the_run_computes_at_once(tmp_path: Path) -> None:
    small = config(tmp_path)
    assert reserve(small) == pytest.approx(graph_bytes(small.model, 1, 16, True) / 2**30)
    assert 0.7 < reserve(small) < 1
    assert reserve(config(tmp_path, rollout={"batch_size": 3})) == reserve(small)
    assert reserve(config(tmp_path, rollout={"batch_size": 8})) == pytest.approx(3 * reserve(small), rel=1e-3)
    assert reserve(config(tmp_path, objective={"batch_size": 3})) == pytest.approx(3 * reserve(small), rel=1e-3)
    assert reserve(config(tmp_path, rollout={"batch_size": 100_000})) == 1000, "what the setting accepts"


def test_what_the_description_says_is_kept(tmp_path: Path) -> None:
    given = config(tmp_path, graph={"reserve_gb": 0.0})
    assert with_reserve(given) == given.model
    plain = parse_config({"prompts": {"texts": ["a"]}, "rewards": [{"name": "brightness"}]})
    assert with_reserve(plain) == plain.model


@pytest.mark.parametrize(
    ("weights", "checkpointing", "bytes_per_weight"),
    [
        ("float32", False, 4),
        (None, False, 4),
        ("bfloat16", True, 2),
        ("bfloat16", False, 6),
        ("float8_e4m3fn", False, 5),
    ],
)
def test_a_cpu_holds_weights_and_rewards_beside_the_activations(
    tmp_path: Path, weights: str | None, checkpointing: bool, bytes_per_weight: int
) -> None:
    run = config(tmp_path, graph={"weights": weights}, objective={"batch_size": 4})
    run = run.model_copy(update={"model": run.model.model_copy(update={"gradient_checkpointing": checkpointing})})
    save_file({"network": torch.zeros(40, 20), "vae": torch.zeros(200)}, tmp_path / "weights.safetensors")
    network, rewards = graph_bytes(run.model, 4, 16, checkpointing), 5 * 2**30
    held = GRAPH_PROCESS + rewards + bytes_per_weight * 1000
    assert graph_peak(run, rewards, on_cpu=True) == network + held
    assert graph_peak(run, rewards, on_cpu=False) == max(network, rewards)


def test_a_file_of_another_format_counts_as_half_precision(tmp_path: Path) -> None:
    run = config(tmp_path, graph={"weights": "float32"})
    assert graph_peak(run, 0, on_cpu=True) == GRAPH_PROCESS + graph_bytes(run.model, 1, 16, True) + 4 * 500
