"""Rewards of other packages, found by their entry points."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from trainer.config import RewardConfig
from trainer.rewards import REWARDS, load_reward, registry, score
from trainer.rewards.registry import GROUP, installed_rewards
from trainer.utils.errors import BadInput

MODULE = '''
from torch import Tensor


def redness(base):
    class Options(base.Section):
        scale: float = 1.0

    class Redness(base.Reward):
        """Mean of the red channel."""

        name = "redness"
        typical_range = (0.0, 1.0)

        def score(self, images: Tensor, prompts: list[str]) -> Tensor:
            return images[:, 0].mean((1, 2)) * self.options.scale

    Redness.Options = Options
    return Redness


def twice(base):
    return redness(base)


def broken(base):
    raise RuntimeError("it needs\\na GPU")


def other(base):
    return dict


def nameless(base):
    class Nameless(base.Reward):
        def score(self, images, prompts):
            return images.mean((1, 2, 3))

    return Nameless
'''
POINTS = """
[dancegrpo.rewards]
redness = more_rewards:redness
"""
BAD_POINTS = """
brightness = more_rewards:redness
twice = more_rewards:twice
broken = more_rewards:broken
other = more_rewards:other
nameless = more_rewards:nameless
gone = more_rewards:gone
missing = no_such_module:reward
"""


def install(folder: Path, points: str) -> None:
    """A package as pip leaves it."""
    (folder / "more_rewards.py").write_text(MODULE)
    info = folder / "more_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: more-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


def test_a_reward_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "more_rewards", raising=False)
    found = installed_rewards(entry_points(group=GROUP))
    monkeypatch.setitem(REWARDS, "redness", found["redness"])
    images = torch.rand(2, 3, 4, 4)
    reward = load_reward(RewardConfig(name="redness", options={"scale": 2}))
    torch.testing.assert_close(score(reward, images, ["a", "b"]), 2 * images[:, 0].mean((1, 2)))
    with pytest.raises(BadInput, match="'redness' has no option 'size'; it takes scale"):
        load_reward(RewardConfig(name="redness", options={"size": 2}))


def test_one_that_cannot_be_used_is_reported_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    install(tmp_path, POINTS + BAD_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "more_rewards", raising=False)
    assert list(installed_rewards(entry_points(group=GROUP))) == ["redness"]
    lines = {line.split("'")[1]: line for line in capsys.readouterr().err.splitlines()}
    expected = {
        "brightness": "a reward of that name exists",
        "twice": "the class has the name 'redness'",
        "broken": "RuntimeError: it needs a GPU",
        "other": "is not a subclass of Reward",
        "nameless": "the class has the name None",
        "gone": "AttributeError",
        "missing": "No module named 'no_such_module'",
    }
    assert set(lines) == set(expected)
    for name, words in expected.items():
        assert words in lines[name], lines[name]


def test_other_packages_are_asked_once_and_only_for_a_name_that_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "more_rewards", raising=False)
    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or entry_points(group=group))
    rewards = registry.Registry(REWARDS)
    assert "brightness" in rewards
    assert rewards["brightness"] is REWARDS["brightness"]
    assert asked == []
    assert "redness" in rewards
    assert rewards["redness"].name == "redness"
    assert "rednes" not in rewards
    with pytest.raises(KeyError):
        rewards["rednes"]
    assert asked == [GROUP]


def test_the_command_line_knows_it(tmp_path: Path) -> None:
    from PIL import Image

    install(tmp_path, POINTS)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    command = [sys.executable, "-m", "trainer", "score", "redness", str(tmp_path / "red.png"), "--prompt", "x"]
    found = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(tmp_path), "PATH": ""}, capture_output=True, text=True, timeout=300
    )
    assert found.stdout.startswith("1.000000\t"), found.stderr
