"""`evaluate`: what it says of base and LoRAs is what the trainer itself says, and bad input is told early."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_program, write_description
from PIL import Image
from safetensors.torch import load_file, save_file

from trainer.cli import main
from trainer.config import parse_config
from trainer.evaluation.comparison import summary
from trainer.loop import Trainer
from trainer.runs.directory import RunDirectory
from trainer.utils.distributed import Processes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_sd3: Path) -> Path:
    """A finished run of two rewards and a reward that is only evaluated."""
    folder = tmp_path_factory.mktemp("trained")
    description = {
        "model": {"family": "sd3", "path": str(tiny_sd3), "height": 16, "width": 16},
        "prompts": {"texts": ["a red circle", "a blue square"]},
        "rollout": {"steps": 4, "shift": 1.0, "group_size": 4, "prompts_per_iteration": 2, "batch_size": 5},
        "rewards": [{"name": "brightness"}, {"name": "colorfulness", "weight": 0.5}],
        "lora": {"rank": 4, "alpha": 8},
        "optimizer": {"learning_rate": 0.02},
        "evaluation": {
            "texts": ["a green circle", "a red square", "three triangles"],
            "images_per_prompt": 3,
            "rewards": [{"name": "sharpness"}],
        },
        "runtime": {"iterations": 3, "seed": 3, "device": "cpu"},
    }
    config = parse_config(description)
    run = RunDirectory(folder / "my run")
    run.open(config, ["test"])
    try:
        Trainer(config, run, Processes("cpu")).train()
    finally:
        run.release()
    return run.path


def evaluated(output: Path, *arguments: object) -> dict:
    assert main(["evaluate", *map(str, arguments), "--output", str(output)]) == 0
    return json.loads((output / "comparison.json").read_text())


def test_its_table_equals_the_trainers_own_evaluation(trained: Path, tmp_path: Path) -> None:
    record = evaluated(tmp_path / "out", trained, trained, trained / "lora.safetensors")
    before, after = RunDirectory(trained).summary()["eval"].values()
    assert [model["name"] for model in record["models"]] == ["base", "my run", "lora"]
    assert before["rewards"] != after["rewards"]
    for model, own in zip(record["models"], (before, after, after), strict=True):
        for kind in ("rewards", "looks"):
            means = {name: block["estimate"]["mean"] for name, block in model[kind].items()}
            assert means == pytest.approx(own[kind], rel=1e-4, abs=1e-6)
    assert {"brightness", "colorfulness", "sharpness", "mix"} == set(record["models"][0]["rewards"])
    assert {"brightness", "saturation", "diversity"} == set(before["looks"])


def test_changes_are_paired_and_a_model_is_even_with_itself(trained: Path, tmp_path: Path) -> None:
    lora = load_file(trained / "lora.safetensors")
    nothing = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in lora.items()}
    save_file(nothing, tmp_path / "nothing.safetensors")
    record = evaluated(tmp_path / "out", trained, tmp_path / "nothing.safetensors", trained)
    base, same, other = record["models"]
    for name, block in same["rewards"].items():
        assert block["change"]["mean"] == pytest.approx(0, abs=1e-6)
        assert block["estimate"]["mean"] == pytest.approx(base["rewards"][name]["estimate"]["mean"], abs=1e-6)
    for name, block in other["rewards"].items():
        gain = block["estimate"]["mean"] - base["rewards"][name]["estimate"]["mean"]
        assert block["change"]["mean"] == pytest.approx(gain, abs=1e-9)
        assert block["change"]["low"] <= gain <= block["change"]["high"]
        assert 0 <= block["win_rate"]["low"] <= block["win_rate"]["mean"] <= block["win_rate"]["high"] <= 1
    assert "change" not in base["rewards"]["brightness"]


def test_table_and_contact_sheet_name_every_model(trained: Path, tmp_path: Path) -> None:
    evaluated(tmp_path / "out", trained, trained, "--set", "evaluation.images_per_prompt=1")
    text = (tmp_path / "out" / "comparison.txt").read_text()
    assert "3 prompts, 1 images each" in text
    assert "  base" in text and "  my run" in text
    assert "diversity within a prompt" in text
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    base, lora = summary(record).splitlines()
    assert base.startswith("base: ") and "wins" not in base
    assert lora.startswith("my run: ") and "brightness" in lora and "wins" in lora
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 2 * 192 and sheet.height > 192


def test_other_held_out_prompts_come_from_a_file(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a yellow circle\n")
    record = evaluated(tmp_path / "out", trained, trained, "--prompts", tmp_path / "prompts.txt")
    assert record["prompts"] == 1
    assert record["models"][1]["rewards"]["brightness"]["estimate"]["low"] is None, "one prompt has no interval"


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main(["evaluate", *map(str, arguments)]) == 2
    words = capsys.readouterr().err.strip()
    assert words.startswith("error: ") and "\n" not in words
    return words


def test_bad_input_is_told_in_one_sentence_before_anything_is_loaded(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.models.diffusers.family.DiffusersModel.load", None)
    monkeypatch.setattr("trainer.evaluation.command.conditions_for", None)
    (tmp_path / "empty run").mkdir()
    (tmp_path / "text.safetensors").write_text("no weights")
    foreign = {"diffusion_model.blocks.0.q.lora_A.weight": torch.zeros(2, 4)}
    save_file(foreign | {"diffusion_model.blocks.0.q.lora_B.weight": torch.zeros(4, 2)}, tmp_path / "other.safetensors")
    out = ("--output", tmp_path / "out")
    assert "there is no file" in refused(capsys, trained, tmp_path / "none.safetensors", *out)
    assert "without lora.safetensors" in refused(capsys, trained, tmp_path / "empty run", *out)
    assert "not a safetensors file" in refused(capsys, trained, tmp_path / "text.safetensors", *out)
    assert "belongs to another model" in refused(capsys, trained, tmp_path / "other.safetensors", *out)
    assert "held-out prompts" in refused(capsys, trained, *out, "--set", "evaluation.texts=[]")
    assert not (tmp_path / "out").exists()


def test_results_are_never_written_over(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "contact_sheet.png").write_text("mine")
    assert "another evaluation" in refused(capsys, trained, "--output", tmp_path)
    assert (tmp_path / "contact_sheet.png").read_text() == "mine"


def test_as_a_program_it_chooses_a_folder_of_its_own(tiny_description: dict, tmp_path: Path) -> None:
    description = write_description(tmp_path / "d.json", tiny_description)
    done = run_program("evaluate", description, "--output", tmp_path / "out")
    assert "base: brightness" in done.stdout
    assert str(tmp_path / "out" / "comparison.json") in done.stdout


def test_a_collapse_of_diversity_is_warned_of(tiny_description: dict, capsys: pytest.CaptureFixture) -> None:
    trainer = Trainer(parse_config(tiny_description), None, Processes("cpu"))
    trainer.evaluate()
    assert "alike" not in capsys.readouterr().err
    trainer.evaluations[0]["looks"]["diversity"] *= 2.1
    trainer.evaluate()
    assert "the images of a held-out prompt have become alike" in capsys.readouterr().err
    trainer.evaluations[0]["looks"]["diversity"] = None  # one image per prompt
    trainer.evaluate()
    assert "alike" not in capsys.readouterr().err
