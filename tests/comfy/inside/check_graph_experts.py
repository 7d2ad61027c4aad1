"""Models with one network for high noise and one for low noise, against core's two KSampler (Advanced) nodes."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.sample
import pytest
import torch
from stages import gradients_of, items_of, rollout_of, updater_for
from tiny_graphs import CASES, Case, conditioning, draw, entry, new_patcher
from torch import Tensor

import nodes as comfy_nodes

STEPS, BOUNDARY, CUT = 6, 0.6, 3
"""With a shift of 1, the levels of six steps are 1, 0.83, 0.67, and then below the boundary 0.5, 0.33, 0.17 and 0."""
T2V, I2V = (next(case for case in CASES if case.core == core) for core in ("WAN21_T2V", "WAN21_I2V"))


def pair(case: Case) -> tuple[Any, Any]:
    """Two networks of a family with different weights, and noise levels of shift 1."""
    high, low = new_patcher(case), new_patcher(case)
    with torch.no_grad():
        for i, parameter in enumerate(low.model.diffusion_model.parameters()):
            parameter.add_(0.3 * draw(*parameter.shape, seed=500 + i))
    for patcher in (high, low):
        patcher.model.model_sampling.set_parameters(shift=1.0)
    return high, low


def two(pack: Callable, case: Case, trained: str, patchers: tuple | None = None, **settings: object) -> SimpleNamespace:
    """The trainer's model of two networks with a LoRA, and what it needs for two prompts."""
    config_module, models, rollout = (pack(f"trainer.{name}") for name in ("config", "models", "rollout"))
    height, width, frames = case.size
    low = {"file": "low", "boundary": BOUNDARY, "trained": trained}
    graph = {"folder": "x", "file": "x", "vae_file": "x", "low_noise": low}
    size = {"height": height, "width": width, "frames": frames}
    config = config_module.ModelConfig(family="comfy", graph=graph, **size, **settings)
    model = pack("trainer.models.comfy.experts").TwoExperts(*(patchers or pair(case)), None, config)
    rollouts = {"steps": STEPS, "kernel": "cps", "eta": 0.3, "guidance_scale": 2.0, "shift": None}
    options = {"batch_size": 8, "clip_range": 0.99, "train_steps": "all"}
    updater = updater_for(model, options, pack, lora={"rank": 2, "alpha": 6}, rollout=rollouts)
    conditions = models.EntryConditions.of([entry(case, 1), entry(case, 2)])
    return SimpleNamespace(
        model=model,
        updater=updater,
        lora=pack("trainer.adapters.lora"),
        plan=updater.objective.plan(model, 0),
        prompting=rollout.Prompting(conditions, models.EntryConditions.of([entry(case, 3)])),
        noise=torch.stack([draw(*model.latent_shape, seed=4), draw(*model.latent_shape, seed=5)]),
    )


def wake(given: SimpleNamespace) -> None:
    for i, parameter in enumerate(given.lora.parameters(given.model.module).values()):
        parameter.data = (0.2 * draw(*parameter.shape, seed=i)).to(parameter)


def deterministic(pack: Callable, given: SimpleNamespace) -> Tensor:
    rollout = pack("trainer.rollout")
    still = rollout.Plan("ode", 0.0, given.plan.sigmas, [False] * STEPS, False, 2.0)
    comfy.model_management.in_training = True
    return rollout.sample(
        given.model, still, given.prompting, torch.arange(2), given.noise, lambda step: None, rollout.Execution()
    ).final


@torch.no_grad()
def in_core(case: Case, high: Any, low: Any, noise: Tensor, monkeypatch: pytest.MonkeyPatch, cut: int = CUT) -> Tensor:
    """What two KSampler (Advanced) nodes make of the two prompts, one by one, in the network's scale of latents."""
    comfy.model_management.in_training = False
    found = []
    for i in range(2):
        given = noise[i : i + 1]
        monkeypatch.setattr(comfy.sample, "prepare_noise", lambda *_, given=given: given)
        latent, negative = {"samples": torch.zeros_like(given)}, conditioning(entry(case, 3))
        for model, add, first, last, leave in (
            (high, "enable", 0, cut, "enable"),
            (low, "disable", cut, 99, "disable"),
        ):
            (latent,) = comfy_nodes.KSamplerAdvanced().sample(
                model, add, 1, STEPS, 2.0, "euler", "simple", conditioning(entry(case, i + 1)), negative, latent,
                first, last, leave,
            )  # fmt: skip
        found.append(high.model.process_latent_in(latent["samples"]))
    return torch.cat(found)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("trained", ["both", "high", "low"])
@pytest.mark.parametrize("case", [T2V, I2V], ids=str)
def test_rollout_is_that_of_cores_two_samplers_and_each_file_is_for_its_own_loader(
    pack: Callable, case: Case, trained: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given, reference = two(pack, case, trained), pair(case)
    assert [level >= BOUNDARY for level in given.plan.sigmas] == [True] * CUT + [False] * (STEPS + 1 - CUT)
    base = in_core(case, *reference, given.noise, monkeypatch)
    assert relative(deterministic(pack, given), base) < 1e-5, "the rollout is not that of core's two samplers"
    assert relative(in_core(case, *reference, given.noise, monkeypatch, CUT + 1), base) > 1e-3, "the cut is not seen"

    wake(given)
    learned = deterministic(pack, given)
    assert relative(learned, base) > 1e-2, "the LoRA does nothing"
    weights = given.lora.comfy_weights(given.lora.parameters(given.model.module), 6, given.model.lora_key)
    files = {trained: weights}
    if trained == "both":
        files = {
            name: {key.partition(".")[2]: value for key, value in weights.items() if key.startswith(f"{name}.")}
            for name in ("high", "low")
        }
        assert sum(map(len, files.values())) == len(weights)
    patched = dict(zip(("high", "low"), reference, strict=True))
    for name, lora in files.items():
        names = comfy.lora.model_lora_keys_unet(patched[name].model, {})
        with caplog.at_level(logging.WARNING):
            patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), names)
        assert not [record for record in caplog.records if "not loaded" in record.getMessage()]
        assert len(patches) == len(lora) // 3
        patched[name] = patched[name].clone()
        assert set(patched[name].add_patches(patches)) == set(patches)
    assert relative(in_core(case, patched["high"], patched["low"], given.noise, monkeypatch), learned) < 1e-4


def sampled(pack: Callable, given: SimpleNamespace) -> Any:
    """A rollout of both prompts with noise, ready to be trained on."""
    rollout, prompt_of = pack("trainer.rollout"), torch.arange(2)
    kept = rollout.sample(
        given.model,
        given.plan,
        given.prompting,
        prompt_of,
        given.noise,
        lambda step: torch.stack([draw(*given.noise.shape[1:], seed=100 * step + i) for i in range(2)]),
        rollout.Execution(),
    )
    return rollout_of(given.plan, given.prompting, kept, prompt_of, [1.0, -1.0], pack)


TRAINED = {"both": range(STEPS - 1), "high": range(CUT), "low": range(CUT, STEPS - 1)}


@pytest.mark.parametrize("trained", TRAINED)
def test_a_network_is_trained_at_its_own_steps_and_the_other_one_is_left_alone(pack: Callable, trained: str) -> None:
    given, steps = two(pack, T2V, trained), TRAINED[trained]
    assert [i for i, flag in enumerate(given.plan.stochastic) if flag] == list(steps)
    data = sampled(pack, given)
    (items,) = given.updater.objective.items(data)
    assert {item.step for item in items} == set(steps)
    totals = given.updater.accumulate(items, data)
    assert totals.peaks["deviation"] < 1e-6
    gradients = gradients_of(given.updater)
    if trained == "both":
        for step, name, other in ((0, "high", "low"), (CUT, "low", "high")):
            given.updater.accumulate(items_of(data, [(0, step)], pack), data)
            alone = gradients_of(given.updater)
            assert any(g.any() for key, g in alone.items() if key.startswith(f"{name}."))
            assert not any(g.any() for key, g in alone.items() if key.startswith(f"{other}."))
        assert {key.partition(".")[0] for key in gradients} == {"high", "low"}
    network = given.model.low if trained == "low" else given.model
    adapted = {id(p) for p in network.base.diffusion_model.parameters() if p.requires_grad}
    assert trained == "both" or adapted == {id(p) for p in given.updater.policy.parameters.values()}
    assert any(gradient.any() for gradient in gradients.values())
    checked = two(pack, T2V, trained, gradient_checkpointing=True)
    for one in (given, checked):
        wake(one)
        one.updater.accumulate(items, data)
    for a, b in zip(gradients_of(given.updater).values(), gradients_of(checked.updater).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)


def test_the_opening_check_looks_at_the_network_that_is_trained(pack: Callable, monkeypatch) -> None:
    given, check = two(pack, T2V, "low"), pack("trainer.preflight").check
    levels = []
    predict = given.model.predict_guided

    def seen(latents: Tensor, sigma: Tensor, *rest: object) -> Tensor:
        levels.extend(sigma.tolist())
        return predict(latents, sigma, *rest)

    monkeypatch.setattr(given.model, "predict_guided", seen)
    check(given.updater, given.prompting, ["any"])
    assert max(levels) < BOUNDARY


def test_only_the_networks_that_are_needed_are_loaded(pack: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    given, loads = two(pack, T2V, "both"), []
    names = {id(given.model.patcher): "high", id(given.model.low.patcher): "low"}
    load = given.model.comfy.management.load_models_gpu

    def recorded(patchers: list, **options: object) -> None:
        loads.append([names[id(patcher)] for patcher in patchers])
        load(patchers, **options)

    monkeypatch.setattr(given.model.comfy.management, "load_models_gpu", recorded)
    data = sampled(pack, given)
    assert loads == [["high"], ["low"]], "each is moved once in a rollout"
    given.model._is_resident = False  # as decoding does
    loads.clear()
    given.updater.accumulate(items_of(data, [(0, 0), (1, 1)], pack), data)
    assert loads == [["high"]]
    given.updater.accumulate(items_of(data, [(0, CUT)], pack), data)
    assert loads == [["high"], ["high", "low"]], "what a backward pass may need stays"


def test_settings_that_train_nothing_are_refused(pack: Callable) -> None:
    bad, given = pack("trainer.utils.errors").BadInput, two(pack, T2V, "high")
    objectives, parse = pack("trainer.objectives"), pack("trainer.config").parse_config

    def plan(options: dict, model: Any = given.model, **rollout: object) -> Any:
        data = {"prompts": {"texts": ["any"]}, "rewards": [{"name": "brightness"}], "objective": options}
        return objectives.make_objective(parse({**data, "rollout": {"steps": STEPS, "shift": None, **rollout}})).plan(
            model, 0
        )

    with pytest.raises(bad, match=r"window of 4 steps from step 0 does not fit: .* trained are 0 to 2"):
        plan({"name": "grpo"}, window={"size": 4})
    with pytest.raises(bad, match="gradient in the last steps, at which the network that is trained does not predict"):
        plan({"name": "reward-gradient"})
    low = two(pack, T2V, "low").model
    with pytest.raises(bad, match=r"level_fraction 0.5: the network that is trained predicts at none"):
        plan({"name": "nft", "level_fraction": 0.5}, low)
    assert plan({"name": "reward-gradient"}, low)
    two_steps = {"name": "grpo"}, low
    with pytest.raises(bad, match="rollout.steps 2: the network that is trained predicts at none of the steps"):
        plan(*two_steps, steps=2)
