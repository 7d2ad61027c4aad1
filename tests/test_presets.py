"""Presets: complete descriptions whose numbers fit together, and are the paper's where they say so."""

import pytest

from trainer.config import RunConfig, parse_config, preset, preset_names
from trainer.diffusion.schedules import stochastic_steps, trained_steps
from trainer.models import FAMILIES, check_kernel
from trainer.rewards import REWARDS
from trainer.utils.seeds import generator

# The reference's scripts: size, steps, eta, shift, group, prompts over all GPUs, trained steps, updates, learning
# rate, guidance (embedded, true), iterations, reward.
PAPER = {
    "paper-sd14": ((512, 512, 1), 50, 1.0, None, 16, 32, 49, 2, 1e-5, (None, 5.0), 300, "hps-v2.1"),
    "paper-flux": ((720, 720, 1), 16, 0.3, 3.0, 12, 16, 9, 3, 1e-5, (3.5, 1.0), 300, "hps-v2.1"),
    "paper-flux-lora": ((720, 720, 1), 12, 0.3, 3.0, 12, 16, 6, 2, 3e-4, (3.5, 1.0), 301, "hps-v2.1"),
    "paper-hunyuanvideo": ((480, 480, 53), 16, 0.25, 5.0, 24, 32, 9, 2, 1e-5, (6.018, 1.0), 202, "videoalign-vq"),
    "paper-skyreels-i2v": ((400, 640, 53), 16, 0.3, 7.0, 8, 32, 9, 1, 1e-5, (1.0, 5.0), 121, "videoalign-mq"),
    "qwen-image": ((720, 720, 1), 20, 0.3, 3.0, 12, 16, 11, 2, 1e-5, (None, 1.0), 300, "hps-v2.1"),
    "wan21": ((512, 512, 1), 20, 0.3, 3.0, 12, 16, 11, 1, 1e-5, (None, 5.0), 1000, "hps-v2.1"),
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
    assert all(reward.name in REWARDS for reward in config.rewards)


@pytest.mark.parametrize("name", PAPER)
def test_numbers_of_the_paper_are_the_reference_scripts(name: str) -> None:
    config = described(name)
    model, rollout, objective, optimizer = config.model, config.rollout, config.objective, config.optimizer
    flags = stochastic_steps(rollout.steps, None, 0, generator(0, "test"))
    trained = trained_steps(flags, objective.train_steps, objective.step_fraction, generator(0, "test"))
    found = (
        (model.height, model.width, model.frames),
        rollout.steps,
        rollout.eta,
        None if rollout.kernel == "ddim" else rollout.shift,
        rollout.group_size,
        rollout.prompts_per_iteration,
        len(trained),
        objective.updates,
        optimizer.learning_rate,
        (model.embedded_guidance, rollout.guidance_scale),
        config.runtime.iterations,
        config.rewards[0].name,
    )
    assert found == PAPER[name]
    assert rollout.kernel == ("ddim" if name == "paper-sd14" else "dance")
    assert config.advantage.best_of_n == (8 if name == "paper-hunyuanvideo" else None)
    assert (objective.clip_range, config.advantage.clip) == (1e-4, 5.0)
    assert (optimizer.weight_decay, optimizer.max_grad_norm, optimizer.betas) == (1e-4, 1.0, (0.9, 0.999))
    assert rollout.shared_noise
    assert config.runtime.seed == 42


def test_every_model_of_the_paper_has_a_preset_for_one_gpu() -> None:
    paper = {described(name).model.family for name in PAPER}
    single = {described(name).model.family for name in preset_names() if name.startswith("one-gpu")}
    assert single == paper


def test_baselines_have_the_numbers_of_their_reference_code() -> None:
    """DDPO: TRL's configuration and trainer. DPOK: train_online_pg.py, whose loss has a factor of 100 beside the KL."""
    ddpo, dpok = described("ddpo"), described("dpok")
    for config, guidance in ((ddpo, 5.0), (dpok, 7.5)):
        rollout = config.rollout
        assert (rollout.kernel, rollout.eta, rollout.steps, rollout.guidance_scale) == ("ddim", 1.0, 50, guidance)
        assert not rollout.shared_noise
        assert (config.objective.train_steps, config.objective.clip_range) == ("all", 1e-4)
    assert (ddpo.advantage.normalize, ddpo.advantage.clip, ddpo.objective.clip) == ("global", 5.0, "pessimistic")
    assert (ddpo.optimizer.learning_rate, ddpo.optimizer.weight_decay, ddpo.optimizer.max_grad_norm) == (3e-4, 1e-4, 1)
    assert (dpok.objective.clip, dpok.objective.updates, dpok.lora.rank) == ("plain", 5, 4)
    assert dpok.objective.kl_weight == pytest.approx(0.01 / 100)
    assert (dpok.optimizer.learning_rate, dpok.optimizer.max_grad_norm) == (1e-5, pytest.approx(0.1 / 100))
