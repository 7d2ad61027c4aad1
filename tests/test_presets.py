"""Presets: complete descriptions whose numbers fit together, and are the paper's where they say so."""

import pytest

from trainer.config import RunConfig, parse_config, preset, preset_names
from trainer.models import FAMILIES, check_kernel
from trainer.schedule import stochastic_steps, trained_steps
from trainer.seeds import generator

# Images per rollout over all GPUs, trained steps, updates: the reference's scripts (docs/families.md).
PAPER = {
    "paper-sd14": (512, 49, 2),
    "paper-flux": (192, 9, 3),
    "paper-flux-lora": (192, 6, 2),
    "paper-hunyuanvideo": (768, 9, 2),
    "paper-skyreels-i2v": (256, 9, 1),
    "qwen-image": (192, 11, 2),
    "wan21": (192, 11, 1),
}


def described(name: str) -> RunConfig:
    return parse_config(preset(name))


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_descriptions_that_their_family_takes(name: str) -> None:
    config = described(name)
    family = FAMILIES[config.model.family]
    check_kernel(family, config.model.family, config.rollout)
    assert config.model.embedded_guidance is None or family.guidance is not None
    assert config.model.frames == 1 or (family.video and config.model.frames % 4 == 1)
    assert config.model.height % 16 == config.model.width % 16 == 0


@pytest.mark.parametrize("name", PAPER)
def test_numbers_of_the_paper_fit_together(name: str) -> None:
    config = described(name)
    rollout, objective = config.rollout, config.objective
    flags = stochastic_steps(rollout.steps, None, 0, generator(0, "test"))
    trained = trained_steps(flags, objective.train_steps, objective.step_fraction, generator(0, "test"))
    found = (rollout.group_size * rollout.prompts_per_iteration, len(trained), objective.updates)
    assert found == PAPER[name]
    assert (objective.clip_range, objective.advantage_clip, config.optimizer.weight_decay) == (1e-4, 5.0, 1e-4)
    assert rollout.shared_noise


def test_every_model_of_the_paper_has_a_preset_for_one_gpu() -> None:
    paper = {described(name).model.family for name in PAPER}
    single = {described(name).model.family for name in preset_names() if name.startswith("one-gpu")}
    assert single == paper
