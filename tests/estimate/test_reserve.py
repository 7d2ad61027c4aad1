"""What a connected model leaves free on the GPU where its description does not say."""

from pathlib import Path

import pytest

from trainer.config import RunConfig, parse_config
from trainer.estimate.memory import graph_bytes, with_reserve


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
