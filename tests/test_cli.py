"""The command line: exit codes, what is printed, and runs that go wrong."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import (
    Forks,
    assert_same_tensors,
    lora_of,
    results_of,
    run_program,
    write_description,
)
from stub_server import free_port

from trainer import rewards
from trainer.cli import main
from trainer.config import WatchdogConfig, parse_config
from trainer.objectives import make_objective
from trainer.rewards import Reward
from trainer.runs import launch
from trainer.runs.directory import RunDirectory
from trainer.runs.watchdog import Watchdog


@pytest.fixture
def short(tiny_description: dict) -> dict:
    """Two iterations without evaluation."""
    del tiny_description["evaluation"]
    tiny_description["runtime"] |= {"iterations": 2, "samples_every": 0}
    return tiny_description


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_program_starts_by_name_and_by_path(tiny_description: dict, tmp_path: Path) -> None:
    """The one test that pays for real starts: by `-m`, and by the path of the start file from elsewhere."""
    import subprocess
    import sys

    from conftest import ROOT

    done = run_program(
        "train", write_description(tmp_path / "run.json", tiny_description), "--output", tmp_path / "run"
    )
    assert "finished: 4 iterations" in done.stdout
    assert "Traceback" not in done.stderr
    started = subprocess.run(
        [sys.executable, "-P", ROOT / "trainer" / "__main__.py", "status", tmp_path / "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(started.stdout)["state"] == "finished"


def test_train_leaves_everything_and_a_second_train_only_reports(
    tiny_description: dict, program: Forks, tmp_path: Path
) -> None:
    file, run = write_description(tmp_path / "run.json", tiny_description), tmp_path / "run"
    code, output = program.run("train", file, "--output", run)
    assert code == 0, output
    for name in ("run.yaml", "status.json", "events.jsonl", "lora.safetensors", "best.safetensors"):
        assert (run / name).stat().st_size, name
    for name in ("summary.json", "reward_curve.png", "before_after.png"):
        assert (run / "report" / name).stat().st_size, name
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert (summary["state"], summary["iterations"], summary["error"]) == ("finished", 4, None)
    assert set(summary["eval"]["before"]["rewards"]) == {"brightness", "colorfulness", "mix"}
    assert [e["iteration"] for e in summary["evaluations"]] == [0, 2, 4]
    assert Path(summary["lora"]) == run / "lora.safetensors"

    def times() -> dict[Path, int]:
        files = [path for path in run.rglob("*") if path.is_file() and path.name not in (".lock", ".owner")]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    for words in (("train", file, "--output", run), ("resume", run)):
        code, output = program.run(*words)
        assert code == 0, output
        assert "finished: 4 iterations" in output
        assert "iteration 1/4" not in output
    assert times() == before, "nothing was trained or written"


def test_same_seed_same_run(short: dict, program: Forks, tmp_path: Path) -> None:
    file = write_description(tmp_path / "run.json", short)
    for name, setting in (("a", "runtime.seed=5"), ("b", "runtime.seed=5"), ("c", "runtime.seed=6")):
        code, output = program.run("train", file, "--output", tmp_path / name, "--set", setting)
        assert code == 0, output
    assert_same_tensors(lora_of(tmp_path / "a"), lora_of(tmp_path / "b"))
    assert results_of(tmp_path / "a") == results_of(tmp_path / "b")
    assert results_of(tmp_path / "a") != results_of(tmp_path / "c")


def test_bad_input_is_exit_code_2_and_one_line(short: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = str(write_description(tmp_path / "run.json", short))
    out = ["--output", str(tmp_path / "run")]
    image = str(tmp_path / "no.png")
    cases = {
        ("train", str(tmp_path / "missing.yaml"), *out): "missing.yaml cannot be read",
        ("train", file, *out, "--set", "rollout.eta=-1"): "rollout.eta is -1",
        ("train", file, *out, "--set", "model.path=/nowhere"): "model.path is '/nowhere'",
        ("train", file, *out, "--set", "model.family=sd9"): "model.family is 'sd9'",
        ("train", file, *out, "--set", "model.height=1024"): "model.height is 1024",
        ("train", file, *out, "--set", "rewards.0.name=taste"): "'taste' is unknown",
        ("train", file, *out, "--set", "rewards.0.options={power: 2}"): "no option 'power'",
        ("train", file, *out, "--set", "rewards.0.name=shapes", "--set", "prompts.texts=[a cat]"): "reward 'shapes'",
        ("train", file, *out, "--set", "lora.targets=[attn.nothing]"): "'attn.nothing' matches no linear or",
        ("train", file, *out, "--set", "prompts={file: /no/prompts.txt}"): "/no/prompts.txt cannot be read",
        ("train", file, *out, "--set", "prompts.conditions=/no/c.safetensors"): "/no/c.safetensors cannot be read",
        (
            "train",
            file,
            *out,
            "--set",
            "evaluation={texts: [a red circle]}",
        ): "'a red circle' is also a training prompt",
        ("train", file, *out, "--set", "rollout.kernel=ddim"): "rollout.kernel is 'ddim'",
        ("train", file, *out, "--set", "rewards.0.name=videoalign"): "reward 'videoalign'",
        ("train", file, *out, "--set", "evaluation.rewards=[{name: hps-v2.1}]"): "reward 'hps-v2.1'",
        ("train", file, *out, "--set", "objective.name=grop"): "objective 'grop' is unknown",
        ("train", file, *out, "--set", "model.sharded=true"): "model.sharded is true",
        ("train", file, *out, "--processes", "9"): "9 processes are more than the 8 images",
        ("resume", str(tmp_path)): "is not a run directory",
        ("status", str(tmp_path)): "is not a run directory",
        ("stop", str(tmp_path)): "is not a run directory",
        ("encode", str(tmp_path / "missing.yaml"), "--output", str(tmp_path / "c")): "missing.yaml cannot be read",
        ("presets", "nope"): "'nope' is unknown",
        ("score", "brightness", image, "--prompt", "a"): "no.png cannot be read",
        ("score", "taste", image, "--prompt", "a"): "'taste' is unknown",
        ("score", "brightness", image, "--prompt", "a", "--prompt", "b"): "2 prompts for 1 images",
    }
    for words, sentence in cases.items():
        assert main(list(words)) == 2, words
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, words
        assert sentence in errors[0], errors[0]
        assert not (tmp_path / "run").exists(), "a description that is refused has no run directory"
    assert main(["train", file, *out]) == 0, "the corrected description gets the directory"


@pytest.mark.parametrize("words", [["paint"], [], ["train"], ["train", "x", "--processes", "0"], ["score", "a", "b"]])
def test_misspelt_command_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as raised:
        main(words)
    assert raised.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_another_description_in_a_used_directory(short: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, run = str(write_description(tmp_path / "run.json", short)), tmp_path / "run"
    assert main(["train", file, "--output", str(run)]) == 0
    before = lora_of(run)
    assert main(["train", file, "--output", str(run), "--set", "runtime.iterations=1"]) == 2
    assert "runtime.iterations was 2 and is now 1" in capsys.readouterr().err
    assert_same_tensors(lora_of(run), before)
    assert RunDirectory(run).status()["state"] == "finished"


def test_a_refused_run_leaves_its_directory_to_the_corrected_description(
    short: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Refused before the directory is made, and after it: a scoring server is asked once the run has begun."""
    run, address = tmp_path / "run", f"http://127.0.0.1:{free_port()}"
    bad = short | {"rewards": [{"name": "external", "options": {"url": address, "retries": 0}}]}
    assert main(["train", str(write_description(tmp_path / "a.json", bad)), "--output", str(run)]) == 2
    assert f"the server {address} cannot be reached" in capsys.readouterr().err
    lost = short | {"lora": {"start_from": str(tmp_path / "none.safetensors")}}
    assert main(["train", str(write_description(tmp_path / "b.json", lost)), "--output", str(run)]) == 2
    assert "none.safetensors: there is no file of this name" in capsys.readouterr().err
    assert main(["train", str(write_description(tmp_path / "b.json", lost)), "--output", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
    assert main(["train", str(write_description(tmp_path / "c.json", short)), "--output", str(run)]) == 0
    assert RunDirectory(run).is_finished()


def test_a_file_name_that_is_not_text_is_refused_or_used(
    short: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """On Linux a name may be any bytes; Python gives those that are not UTF-8 as unpaired surrogates."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    file = str(write_description(folder / "run.json", short))
    assert main(["train", file, "--output", str(folder / "run")]) == 2
    assert "has a name that is not UTF-8; choose another name" in capsys.readouterr().err
    for arguments in (["train", file, "--output", str(tmp_path / "run")], ["resume", str(tmp_path / "run")]):
        assert main(arguments) == 0
    short["prompts"] = {"file": "prompts.txt"}
    (folder / "prompts.txt").write_text("a red circle\n")
    write_description(folder / "run.json", short)
    assert main(["train", file, "--output", str(tmp_path / "other")]) == 2
    assert "prompts.txt', which has an unpaired Unicode surrogate" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_status_and_stop_of_a_run_that_is_not_running(
    short: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file, run = str(write_description(tmp_path / "run.json", short)), str(tmp_path / "run")
    main(["train", file, "--output", run])
    capsys.readouterr()
    assert main(["status", run]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["iteration"], status["iterations"], status["live"]) == ("finished", 2, 2, False)
    assert main(["stop", run]) == 0
    assert "was not running" in capsys.readouterr().out
    assert not (tmp_path / "run" / "stop").exists()


def test_encoded_prompts_train_as_the_text_encoder_does(
    tiny_description: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from trainer.models.diffusers.sd3 import SD3Model

    file, conditions = str(write_description(tmp_path / "run.json", tiny_description)), tmp_path / "c.safetensors"
    assert main(["train", file, "--output", str(tmp_path / "a")]) == 0
    assert main(["encode", file, "--output", str(conditions)]) == 0
    assert "7 prompts encoded" in capsys.readouterr().out  # 4 to train on, 2 held out, the negative one

    def fail(*_: object) -> None:
        raise AssertionError("a text encoder was loaded")

    monkeypatch.setattr(SD3Model, "encode_batches", fail)
    setting = f"prompts.conditions={conditions}"
    assert main(["train", file, "--output", str(tmp_path / "b"), "--set", setting]) == 0
    assert_same_tensors(lora_of(tmp_path / "a"), lora_of(tmp_path / "b"))
    assert results_of(tmp_path / "a") == results_of(tmp_path / "b")
    # A prompt that was not encoded is named.
    capsys.readouterr()
    more = "prompts.texts=[a red circle, a purple star]"
    assert main(["train", file, "--output", str(tmp_path / "c"), "--set", setting, "--set", more]) == 2
    assert "c.safetensors does not contain 'a purple star': encode again" in capsys.readouterr().err


def test_score_prints_a_line_per_image(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from PIL import Image

    for name, colour in (("white.png", "white"), ("black.png", "black"), ("glass.png", (0, 0, 0, 0))):
        Image.new("RGBA", (12, 8), colour).save(tmp_path / name)
    files = [str(tmp_path / name) for name in ("white.png", "black.png", "glass.png")]
    assert main(["score", "brightness", *files, "--prompt", "anything"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[1:] for row in rows] == [[file, "anything"] for file in files]
    assert [float(row[0]) for row in rows] == pytest.approx([1.0, 0.0, 1.0], abs=1e-6)
    prompts = ["--prompt", "a", "--prompt", "b", "--prompt", "c"]
    assert main(["score", "brightness", *files, *prompts]) == 0
    assert [line.split("\t")[2] for line in capsys.readouterr().out.splitlines()] == ["a", "b", "c"]
    assert main(["score", "shapes", files[0], "--prompt", "a cat"]) == 2
    (tmp_path / "text.png").write_text("no image")
    assert main(["score", "brightness", str(tmp_path / "text.png"), "--prompt", "a"]) == 2


def test_presets_are_listed_and_printed_as_descriptions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["presets"]) == 0
    names = capsys.readouterr().out.split()
    assert "demo" in names
    assert names[0] == "auto", "which is no file: see test_automatic"
    for name in names[1:]:
        assert main(["presets", name]) == 0
        (tmp_path / "preset.yaml").write_text(capsys.readouterr().out)
        from trainer.config import parse_config, preset, read_config

        assert read_config(tmp_path / "preset.yaml") == parse_config(preset(name), base=tmp_path)


# --------------------------------------------------------------------------------------------- rewards that misbehave


class Odd(Reward):
    """Brightness, but for what `spoil` makes of it."""

    name = "odd"
    typical_range = (0.0, 1.0)
    calls = 0

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        type(self).calls += 1
        return self.spoil(images.flatten(1).mean(1), self.calls)

    @staticmethod
    def spoil(scores: torch.Tensor, call: int) -> torch.Tensor:
        raise NotImplementedError


def install(monkeypatch: pytest.MonkeyPatch, spoil: object) -> None:
    reward = type("Installed", (Odd,), {"spoil": staticmethod(spoil), "calls": 0})
    monkeypatch.setitem(rewards.REWARDS, "odd", reward)


def one_bad(bad: float) -> object:
    def spoil(scores: torch.Tensor, call: int) -> torch.Tensor:
        scores[0] = bad
        return scores

    return spoil


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_sample_without_a_finite_reward_is_dropped_and_counted(
    short: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    install(monkeypatch, one_bad(bad))
    short["rewards"] = [{"name": "odd"}]
    short["objective"] = {"train_steps": "all"}
    file, run = write_description(tmp_path / "run.json", short), tmp_path / "run"
    assert main(["train", str(file), "--output", str(run)]) == 0
    for event in results_of(run):
        assert event["dropped_samples"] == 1
        trained = event["objective"]["actions"]
        assert trained == (2 * 4 - 1) * 4, "every other sample is trained at its 4 stochastic steps"
        assert 0 < event["rewards"]["odd"]["mean"] < 1, "the mean of the others"
    assert all(value.isfinite().all() for value in lora_of(run).values())


def test_too_many_dropped_samples_stop_the_run_with_a_reason(
    short: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    install(monkeypatch, one_bad(float("nan")))
    short["rewards"] = [{"name": "odd"}]
    short["runtime"] |= {"iterations": 10, "watchdog": {"max_dropped": 3}}
    file, run = write_description(tmp_path / "run.json", short), tmp_path / "run"
    assert main(["train", str(file), "--output", str(run)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert len(errors) == 1
    assert "4 samples had no finite reward (limit 3)" in errors[0]
    status = RunDirectory(run).status()
    assert (status["state"], status["iteration"]) == ("failed", 4)
    assert "no finite reward" in status["error"]
    assert RunDirectory(run).summary()["state"] == "failed"


@pytest.mark.parametrize(
    ("value", "words"),
    [(float("nan"), "no image had a finite reward"), (0.3, "the images of every group had equal rewards (odd 0.3)")],
    ids=["no finite reward", "equal rewards"],
)
def test_rewards_that_teach_nothing_change_nothing_and_are_no_success(
    short: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    value: float,
    words: str,
) -> None:
    install(monkeypatch, lambda scores, call: torch.full_like(scores, value))
    short["rewards"] = [{"name": "odd"}]
    file, run = write_description(tmp_path / "run.json", short), tmp_path / "run"
    for arguments in (["train", str(file), "--output", str(run)], ["resume", str(run)]):
        assert main(arguments) == 1
        assert f"failed: no iteration has trained anything: {words}" in capsys.readouterr().err
    for event in results_of(run):
        assert event["grad_norm"] is None
        assert (event["dropped_samples"], event["skipped_groups"]) == ((0, 2) if value == 0.3 else (8, 2))
    assert len(results_of(run)) == 2
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["error"].startswith("no iteration has trained anything")) == ("failed", True)
    assert all((value == 0).all() for name, value in lora_of(run).items() if "lora_B" in name)


def test_falling_reward_stops_the_run_with_its_best_lora(
    short: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A reward that rises for three iterations and then falls by ten standard deviations each time."""
    path = [0.0, 1.0, 2.0] + [-10.0 * i for i in range(1, 20)]
    install(monkeypatch, lambda scores, call: torch.linspace(-1, 1, 4).repeat(2) + path[call - 1])
    short["rewards"] = [{"name": "odd"}]
    short["runtime"] |= {"iterations": 20, "watchdog": {"patience": 3}}
    file, run = write_description(tmp_path / "run.json", short), tmp_path / "run"
    assert main(["train", str(file), "--output", str(run)]) == 1
    error = capsys.readouterr().err
    assert re.search(r"failed: stopped at iteration \d+: collapse: the smoothed reward is", error)
    assert "lora.safetensors holds the best LoRA" in error
    status = RunDirectory(run).status()
    assert status["state"] == "failed"
    assert status["iteration"] < 12
    assert_same_tensors(lora_of(run), lora_of(run, "best.safetensors"))
    newest, _ = RunDirectory(run).load_checkpoint()
    prefix, best = "average/", lora_of(run)
    ours = {
        n.removeprefix(prefix).replace(".default", ""): v for n, v in newest.tensors.items() if n.startswith(prefix)
    }
    assert any(not torch.equal(value, best[f"transformer.{name}"]) for name, value in ours.items())


def test_failing_reward_fails_the_run_and_keeps_what_it_had(
    short: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(scores: torch.Tensor, call: int) -> torch.Tensor:
        if call > 1:
            raise RuntimeError("the judge\nhas left")
        return scores

    install(monkeypatch, spoil)
    short["rewards"] = [{"name": "odd"}]
    file, run = write_description(tmp_path / "run.json", short), RunDirectory(tmp_path / "run")
    assert main(["train", str(file), "--output", str(run.path)]) == 1
    assert "has left" in (run.path / "error-0.txt").read_text()
    assert run.status()["state"] == "failed"
    assert "the judge has left" in run.status()["error"]
    assert run.load_checkpoint()[0].state["iteration"] == 1
    assert not launch.is_running(run)
    install(monkeypatch, lambda scores, call: scores)
    assert main(["resume", str(run.path)]) == 0
    assert [event["iteration"] for event in results_of(run.path)] == [1, 2]
    assert run.status()["error"] is None


def test_a_full_device_says_what_helps(short: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(scores: torch.Tensor, call: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    install(monkeypatch, spoil)
    short["rewards"] = [{"name": "odd"}]
    file, run = write_description(tmp_path / "run.json", short), RunDirectory(tmp_path / "run")
    assert main(["train", str(file), "--output", str(run.path)]) == 1
    for word in ("out of memory", "model.gradient_checkpointing", "objective.batch_size", "reserve_gb", "2.00 GiB"):
        assert word in run.status()["error"]


# ----------------------------------------------------------------------------------------------------- the watchdog


def event(reward: float | None = 0.0, deviation: float = 0.0, norm: float | None = 1.0, **more: int) -> dict:
    return {
        "rewards": {"r": {"mean": reward, "std": 1.0, "group_std": 2.0}},
        "objective": {"ratio": {"mean_deviation": deviation}},
        "skipped_groups": 0,
        "grad_norm": norm,
        "dropped_samples": more.get("dropped", 0),
        "bad_updates": more.get("bad", 0),
    }


GRPO = make_objective(parse_config({"prompts": {"texts": ["a"]}, "rewards": [{"name": "r"}]}))


def watchdog(weight: float = 1.0, **settings: float) -> Watchdog:
    return Watchdog(WatchdogConfig(**settings), {"r": weight})


def verdicts(watcher: Watchdog, events: list[dict]) -> list[str | None]:
    return [watcher.watch(e, GRPO.alarm(e["objective"]))[1] for e in events]


def test_watchdog_lets_a_steady_run_go_on() -> None:
    noisy = [event(reward=0.5 * (-1) ** i, deviation=0.1, norm=1 + i % 3) for i in range(100)]
    assert verdicts(watchdog(), noisy) == [None] * 100


def test_watchdog_ratio_needs_patience_in_a_row() -> None:
    bad, good = event(deviation=0.6), event(deviation=0.4)
    found = verdicts(watchdog(patience=3), [bad, bad, good, bad, bad, bad])
    assert found[:5] == [None] * 5
    assert found[5].startswith("collapse: the mean |ratio - 1| is 0.6, for 3 iterations in a row")
    assert verdicts(watchdog(patience=1), [event(deviation=float("nan"))])[0].startswith("collapse")


def test_watchdog_gradient_against_its_running_median() -> None:
    watcher = watchdog(patience=2, gradient_factor=10)
    assert verdicts(watcher, [event(norm=1e9), *[event(norm=n) for n in (1, 2, 1, 2, 1)]]) == [None] * 6
    found = verdicts(watcher, [event(norm=10.0), event(norm=30.0), event(norm=40.0)])
    assert found[:2] == [None, None]
    assert "the gradient norm is 40" in found[2]
    assert verdicts(watchdog(patience=1), [event(norm=None)] * 9) == [None] * 9


def test_watchdog_reward_is_measured_in_within_group_spreads() -> None:
    watcher = watchdog(patience=1, reward_drop=1.0)
    assert watcher.watch(event(0.0)) == (True, None)
    assert watcher.watch(event(2.0)) == (True, None)
    assert watcher.best == pytest.approx(0.2)  # one spread up, smoothed by 0.2
    improved, verdict = watcher.watch(event(-9.0))  # 4.5 spreads down: 0.2 + 0.2 (-4.5 - 0.2) = -0.74
    assert (improved, verdict) == (False, None)
    assert "1.69 standard deviations below its best" in watcher.watch(event(-9.0))[1]


def test_watchdog_reward_with_a_negative_weight_is_better_when_lower() -> None:
    watcher = watchdog(weight=-2.0)
    assert [watcher.watch(event(value))[0] for value in (1.0, 2.0, -5.0)] == [True, False, True]


def test_watchdog_counts_dropped_samples_and_bad_updates_over_the_whole_run() -> None:
    assert verdicts(watchdog(max_dropped=5), [event(dropped=3), event(), event(dropped=3)])[1:] == [
        None,
        "6 samples had no finite reward (limit 5)",
    ]
    found = verdicts(watchdog(max_bad_updates=1), [event(bad=1), event(bad=1)])
    assert found[0] is None
    assert "2 updates had no finite loss or gradient (limit 1)" in found[1]


def test_watchdog_state_goes_through_a_checkpoint() -> None:
    events = [event(reward=-i, deviation=0.1 * i, norm=1.0 + i) for i in range(30)]
    whole, first, second = watchdog(), watchdog(), watchdog()
    expected = verdicts(whole, events)
    found = verdicts(first, events[:12])
    second.restore(json.loads(json.dumps(first.state())))
    assert found + verdicts(second, events[12:]) == expected
    assert any(expected)
    assert second.state() == whole.state()
