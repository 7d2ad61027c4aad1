"""Relative paths of a description: from its folder, in full."""

import json
from pathlib import Path

import pytest

from trainer.config import parse_config, read_config
from trainer.paths import with_absolute_paths

DESCRIPTION = {
    "model": {"path": "models/flux", "network_file": "/elsewhere/net.safetensors"},
    "prompts": {"file": "prompts.txt", "conditions": "../c.safetensors"},
    "evaluation": {"file": "held_out.txt", "rewards": [{"name": "aesthetic", "options": {"path": "a.pth"}}]},
    "rewards": [{"name": "pickscore", "options": {"path": "p.safetensors"}}, {"name": "brightness"}],
    "lora": {"start_from": "old.safetensors"},
}


def test_paths_are_taken_from_the_folder_of_the_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "data" / "run.json").write_text(json.dumps(DESCRIPTION))
    monkeypatch.chdir(tmp_path / "here")
    config = read_config(Path("../data/run.json"), ["lora.start_from=mine.safetensors"])
    data = tmp_path / "here" / ".." / "data"
    assert config.model.path == str(data / "models" / "flux")
    assert config.model.network_file == "/elsewhere/net.safetensors"
    assert config.prompts.file == str(data / "prompts.txt")
    assert config.prompts.conditions == str(data / ".." / "c.safetensors")
    assert config.evaluation.file == str(data / "held_out.txt")
    assert config.rewards[0].options == {"path": str(data / "p.safetensors")}
    assert config.evaluation.rewards[0].options == {"path": str(data / "a.pth")}
    assert config.lora.start_from == str(tmp_path / "here" / "mine.safetensors"), "a setting, from the current folder"


def test_what_is_not_a_relative_path_is_left_alone(tmp_path: Path) -> None:
    assert parse_config(DESCRIPTION).prompts.file == "prompts.txt", "without a folder to take them from"
    plain = {"model": {"path": "embedded", "network_file": None}, "prompts": {"file": ""}, "rewards": [{"name": 5}]}
    assert with_absolute_paths(json.loads(json.dumps(plain)), tmp_path) == plain
    for odd in (
        None,
        [],
        "text",
        {"rewards": 5, "evaluation": [], "prompts": {"file": ["a"]}, "model": {"path": "\0"}},
    ):
        assert with_absolute_paths(json.loads(json.dumps(odd)), tmp_path) == odd


def test_a_home_folder_is_known_and_links_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "blob").touch()
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "blob")
    found = with_absolute_paths({"lora": {"start_from": "~/a.safetensors"}}, Path("/other"))
    assert found["lora"]["start_from"] == str(tmp_path / "a.safetensors")
