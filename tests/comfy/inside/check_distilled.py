"""Step-distilled models in a graph: preset auto takes their settings, and the node warns of others."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_graphs import CASES, new_patcher

PLAIN, DISTILLED = "flux1-dev.safetensors", "flux1-schnell-fp8.safetensors"


@pytest.fixture
def noted(pack: Callable, tmp_path: Path) -> Callable:
    """What GRPO Train LoRA makes of preset auto for a file of this name: its rollout and what it says."""
    training, types, runs = pack("nodes.training"), pack("nodes.types"), pack("nodes.host.runs")
    spec = types.ModelSpec.of(new_patcher(next(case for case in CASES if case.core == "FluxSchnell")))
    rewards = types.Rewards((pack("trainer.config").RewardConfig(name="brightness"),))

    def call(file: str, overrides: str = "") -> tuple[dict, str]:
        (tmp_path / file).write_bytes(b"")
        graph = {"folder": "x", "file": str(tmp_path / file), "vae_file": str(tmp_path / file)}
        model = pack("trainer.config").ModelConfig(family="comfy", graph=graph, height=64, width=64)
        section = model.model_dump(mode="json")
        settings = pack("nodes.settings").Preset.execute("auto", overrides).args[0]
        data = runs.describe(section, settings.sections, rewards, None, "a red circle", "", "")
        data, chosen = pack("nodes.host.automatic").resolved(data, settings, None, types.Model(section, spec), 1)
        return data["rollout"], training.noted(data, chosen)

    return call


def test_preset_auto_takes_their_steps_and_no_guidance(noted: Callable) -> None:
    rollout, text = noted(DISTILLED)
    assert (rollout["steps"], rollout["guidance_scale"]) == (4, 1.0)
    assert rollout["window"]["size"] < 4
    assert "4 steps without guidance: by its name the model is step-distilled" in text
    assert "warning" not in text
    rollout, text = noted(PLAIN)
    assert rollout["steps"] > 4
    assert "distilled" not in text


def test_the_node_warns_of_settings_that_do_not_suit(noted: Callable) -> None:
    rollout, text = noted(DISTILLED, "rollout.steps=20\nrollout.guidance_scale=3.5")
    assert (rollout["steps"], rollout["guidance_scale"]) == (20, 3.5)
    assert (
        f"warning: {DISTILLED} is by its name a step-distilled model (schnell), and the run has rollout.steps 20"
        in text
    )
    assert "guidance_scale 3.5" in text
    assert "warning" not in noted(PLAIN, "rollout.steps=20")[1]


def test_preset_auto_counts_the_reward_models(noted: Callable, pack: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def too_large(rewards: list) -> int:
        counted.extend(rewards)
        return 2**60

    monkeypatch.setattr(pack("nodes.host.automatic"), "memory_together", too_large)
    with pytest.raises(pack("trainer.utils.errors").BadInput, match="preset auto finds no settings that fit"):
        noted(PLAIN)
    assert [type(reward).__name__ for reward in counted] == ["Brightness"]
