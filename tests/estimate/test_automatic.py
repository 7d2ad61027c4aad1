"""The preset `auto`: what it chooses for which model and card, and why."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import write_description

from trainer.check import check_run
from trainer.cli import main
from trainer.config import parse_config
from trainer.diffusion.process import FLOW, VP
from trainer.estimate.automatic import Choice, Facts, choose, choose_for, filled
from trainer.utils.errors import BadInput

GB = 2**30
CARDS = (8, 12, 16, 24, 48, 80)
FLUX_LIKE = Facts("comfy", FLOW, 512 * 512, 1, None, True, "a card", False, 24 * GB, lambda sections: 0)
KINDS = {
    "images": FLUX_LIKE,
    "large images": replace(FLUX_LIKE, pixels=1024 * 1024),
    "videos": replace(FLUX_LIKE, frames=33, embeds_guidance=False),
    "noise prediction": replace(FLUX_LIKE, process=VP),
    "distilled": replace(FLUX_LIKE, distilled=(1, 4)),
    "a family with a preset of its own": replace(FLUX_LIKE, family="qwen-image"),
}


def linear(per_prediction: float, checkpointed: float = 0.25) -> Callable[[dict], int]:
    """A model that needs so many GB per prediction of the update, and a part of it with gradient checkpointing."""

    def needed(sections: dict) -> int:
        share = checkpointed if sections["model"]["gradient_checkpointing"] else 1.0
        return int(GB * (per_prediction * share * sections["objective"]["batch_size"] + sections["lora"]["rank"] / 32))

    return needed


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_choice_is_a_description_that_fits(kind: str, card: int) -> None:
    facts = replace(KINDS[kind], memory=card * GB, needed=linear(8.0))
    choice = choose(facts)
    assert choice == choose(facts)
    assert facts.needed(choice.sections) <= 0.9 * facts.memory
    model = {"path": "x", **choice.sections["model"]}
    config = parse_config(
        filled({"model": model, "prompts": {"texts": ["a", "b"]}, "rewards": [{"name": "brightness"}]}, choice)
    )
    rollout = config.rollout
    assert rollout.kernel == ("ddim" if kind == "noise prediction" else "dance-exact")
    assert rollout.window.size < rollout.steps
    assert all(reason[-1] != "." for reason in choice.reasons)
    assert f"{rollout.group_size} images for each of {rollout.prompts_per_iteration} prompts" in choice.text()


def test_more_memory_buys_time_before_anything_else() -> None:
    chosen = [choose(replace(FLUX_LIKE, memory=card * GB, needed=linear(10.0))).sections for card in CARDS]
    batches = [sections["objective"]["batch_size"] for sections in chosen]
    assert batches == sorted(batches)
    assert (batches[0], batches[-1]) == (2, 4)
    assert [sections["model"]["gradient_checkpointing"] for sections in chosen] == [True] * 4 + [False] * 2
    assert chosen[0]["lora"]["rank"] == 32


def test_what_is_known_of_the_model_decides_steps_and_guidance() -> None:
    distilled = choose(KINDS["distilled"]).sections["rollout"]
    assert (distilled["steps"], distilled["guidance_scale"], distilled["window"]["size"]) == (4, 1.0, 2)
    two = choose(replace(KINDS["distilled"], distilled=(1, 1))).sections["rollout"]
    assert (two["steps"], two["window"]["size"]) == (2, 1)
    assert choose(KINDS["noise prediction"]).sections["rollout"]["guidance_scale"] == 1.0, "an input of the network"
    unguided = replace(KINDS["noise prediction"], embeds_guidance=False)
    assert choose(unguided).sections["rollout"]["guidance_scale"] == 5.0
    videos = choose(KINDS["videos"]).sections
    assert (videos["rollout"]["group_size"], videos["objective"]["batch_size"]) == (8, 1)
    slow = choose(replace(FLUX_LIKE, on_cpu=True)).sections["rollout"]
    assert (slow["group_size"], slow["prompts_per_iteration"]) == (6, 2)


def test_too_little_memory_is_refused_with_the_smallest_that_was_tried() -> None:
    with pytest.raises(BadInput, match=r"rank 8 the run needs 10.25 GB, but only 7.20 GB are usable on a card"):
        choose(replace(FLUX_LIKE, memory=8 * GB, needed=linear(40.0)))


def test_what_the_description_says_is_kept() -> None:
    choice = Choice({"rollout": {"steps": 12, "eta": 0.5, "window": {"size": 2}}, "objective": {"updates": 2}}, [])
    given = {"rollout": {"steps": 9}, "objective": {"name": "nft"}, "prompts": {"texts": ["a"]}}
    found = filled(given, choice)
    assert found["rollout"] == {"steps": 9, "eta": 0.5, "window": None}, "nft has no stochastic steps"
    assert found["objective"] == {"name": "nft"}
    assert filled({"rollout": {"eta": 0.7}}, choice)["rollout"] == {"steps": 12, "eta": 0.7, "window": {"size": 2}}


def test_the_embedded_model_gets_the_settings_that_were_measured_on_it() -> None:
    data = {"model": {"path": "embedded"}, "prompts": {"shapes": 1}, "rewards": [{"name": "shapes"}]}
    demo = parse_config(filled(data, choose_for(data)))
    assert demo.rollout.kernel == "cps"
    assert "preset demo" in choose_for(data).text()


def test_the_command_prints_a_description_that_runs(
    tiny_description: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = {name: tiny_description[name] for name in ("model", "prompts", "rewards", "evaluation", "runtime")}
    data["rollout"] = {"eta": 0.25}
    file = write_description(tmp_path / "mine.json", data)
    assert main(["presets", "auto", "--for", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# preset auto chose:\n# - the settings of preset one-gpu-flux")
    assert "GB" in printed or "MB" in printed
    config = parse_config(yaml.safe_load(printed))
    assert (config.rollout.eta, config.rollout.steps, config.runtime.iterations) == (0.25, 12, 4)
    check_run(config, 1)
    assert main(["presets", "auto"]) == 2
    assert "--for FILE" in capsys.readouterr().err
    assert main(["presets", "demo", "--for", str(file)]) == 2
    assert "--for is only for preset auto, not for demo" in capsys.readouterr().err
