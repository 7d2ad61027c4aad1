"""TF32 is set for a run, as it says, and set back after it, also after a failure."""

import copy

import pytest
import torch
from short_runs import train

from trainer.rewards.brightness import Brightness
from trainer.utils.precision import tf32


def switches() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(params=[(False, True), (True, False)])
def before(request: pytest.FixtureRequest) -> tuple[bool, bool]:
    kept = switches()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


@pytest.mark.parametrize("enabled", [True, False])
def test_both_switches_are_set_and_set_back(before: tuple[bool, bool], enabled: bool) -> None:
    with tf32(enabled):
        assert switches() == (enabled, enabled)
    assert switches() == before
    with pytest.raises(RuntimeError, match="stop"), tf32(enabled):
        raise RuntimeError("stop")
    assert switches() == before


@pytest.mark.parametrize(("setting", "enabled"), [({}, True), ({"tf32": False}, False)])
def test_a_run_sets_it(
    setting: dict, enabled: bool, before: tuple[bool, bool], tiny_description: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, score = set(), Brightness.score

    def watched(self: Brightness, *given: object) -> torch.Tensor:
        seen.add(switches())
        return score(self, *given)

    monkeypatch.setattr(Brightness, "score", watched)
    data = copy.deepcopy(tiny_description)
    data["runtime"] |= {"iterations": 1} | setting
    train(data)
    assert seen == {(enabled, enabled)}
    assert switches() == before
