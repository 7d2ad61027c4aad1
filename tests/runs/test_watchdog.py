"""A run that trains nothing stops early, with the reason."""

import json
from pathlib import Path

import pytest
import torch
from conftest import lora_of, results_of, write_description

from trainer import rewards
from trainer.cli import main
from trainer.config import WatchdogConfig
from trainer.rewards import Reward
from trainer.runs.directory import RunDirectory
from trainer.runs.watchdog import Watchdog


def event(mean: float | None = 0.3, norm: float | None = None, **more: int) -> dict:
    return {
        "rewards": {"a": {"mean": mean, "std": 0.0, "group_std": 0.0}},
        "grad_norm": norm,
        "skipped_groups": more.get("skipped", 2),
        "dropped_samples": more.get("dropped", 0),
        "bad_updates": more.get("bad", 0),
    }


def reasons(events: list[dict], **settings: int) -> list[str | None]:
    watchdog = Watchdog(WatchdogConfig(**settings), {"a": 1.0})
    return [watchdog.watch(event)[1] for event in events]


def test_iterations_without_an_optimizer_step_are_counted_in_a_row() -> None:
    idle, busy, bad = event(), event(norm=1.0), event(bad=1)
    assert reasons([idle] * 9) == [None] * 9, "the default is 10"
    assert reasons([idle, idle, busy, idle, idle], max_idle=3) == [None] * 5
    assert reasons([idle, idle, bad, idle, idle], max_idle=3) == [None] * 5, "bad updates have a limit of their own"
    found = reasons([idle] * 3, max_idle=3)
    assert found[:2] == [None, None]
    assert found[2].startswith(
        "nothing was trained for 3 iterations in a row: the images of every group had equal rewards"
    )
    assert "(a 0.3)" in found[2]


def test_the_reason_is_another_where_no_image_had_a_reward() -> None:
    assert reasons([event(mean=None, skipped=0, dropped=4)] * 2, max_idle=2)[1] == (
        "nothing was trained for 2 iterations in a row: no image had a finite reward; "
        "check the log for warnings of the reward"
    )


def test_a_run_that_is_over_before_the_limit_has_failed_if_nothing_was_trained() -> None:
    def verdict(*events: dict) -> str | None:
        watchdog = Watchdog(WatchdogConfig(), {"a": 1.0})
        for each in events:
            assert watchdog.watch(each)[1] is None
        resumed = Watchdog(WatchdogConfig(), {"a": 1.0})
        resumed.restore(json.loads(json.dumps(watchdog.state())))
        return resumed.final_verdict()

    idle, busy, bad = event(), event(norm=1.0), event(bad=1)
    assert verdict(idle, busy, idle) is None
    assert verdict(idle, idle).startswith("no iteration has trained anything: the images of every group had equal")
    assert verdict(idle, event(mean=None, skipped=0, dropped=4)).endswith(
        "no image had a finite reward; check the log for warnings of the reward"
    )
    assert verdict(bad, bad) == "no iteration has trained anything: no update had a finite loss and gradient"


def test_an_alarm_of_the_objective_is_a_sign_of_collapse() -> None:
    watchdog = Watchdog(WatchdogConfig(patience=2), {"a": 1.0})
    assert watchdog.watch(event(norm=1.0), "the old policy is far away") == (False, None)
    assert watchdog.watch(event(norm=1.0)) == (False, None)
    watchdog.watch(event(norm=1.0), "the old policy is far away")
    _, reason = watchdog.watch(event(norm=1.0), "the old policy is far away")
    assert reason == "collapse: the old policy is far away, for 2 iterations in a row"


class Constant(Reward):
    """The same score for every image."""

    name = "constant"
    typical_range = (0.0, 1.0)
    value = 0.25

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return torch.full((len(images),), self.value)


@pytest.mark.parametrize(
    ("reward", "value", "words"),
    [
        ({"name": "constant"}, 0.25, ["equal rewards (constant 0.25)"]),
        ({"name": "brightness", "threshold": 2.0}, 0.0, ["equal rewards (brightness 0)", "threshold"]),
        ({"name": "constant"}, float("nan"), ["no image had a finite reward"]),
    ],
    ids=["constant", "threshold never met", "every sample dropped"],
)
def test_a_run_that_trains_nothing_fails_early(
    tiny_description: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    reward: dict,
    value: float,
    words: list[str],
) -> None:
    monkeypatch.setitem(rewards.REWARDS, "constant", type("Installed", (Constant,), {"value": value}))
    del tiny_description["evaluation"]
    tiny_description["rewards"] = [reward]
    tiny_description["runtime"] |= {"iterations": 50, "samples_every": 0, "watchdog": {"max_idle": 3}}
    file, run = write_description(tmp_path / "run.json", tiny_description), tmp_path / "run"
    assert main(["train", str(file), "--output", str(run)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: stopped at iteration 3: nothing was trained for 3 iterations in a row: ")
    for word in words:
        assert word in line
        assert word in RunDirectory(run).status()["error"]
    assert RunDirectory(run).status()["state"] == "failed"
    assert len(results_of(run)) == 3
    assert all((tensor == 0).all() for name, tensor in lora_of(run).items() if "lora_B" in name)
