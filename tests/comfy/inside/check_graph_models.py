"""Models as ComfyUI has them, trained by its own code: tiny ones of core's classes, against core's own sampling."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import comfy.supported_models
import comfy_kitchen
import comfyui_version
import folder_paths
import pytest
import torch
from comfy_kitchen.backends.eager import rope
from safetensors.torch import save_file
from stages import InFloat64, gradients_of, items_of, rollout_of
from tiny_graphs import CASES, SAMPLING, STEPS, Case, Trained, draw, entry, euler, graph_model, new_patcher
from torch import Tensor

import nodes as comfy_nodes


def deterministic(pack: Callable, trained: Trained) -> Tensor:
    """The trainer's rollout without added noise."""
    rollout = pack("trainer.rollout")
    still = rollout.Plan("ode", 0.0, trained.plan.sigmas, [False] * STEPS, False, 2.0)
    return rollout.sample(
        trained.model, still, trained.prompting, torch.arange(2), trained.noise, lambda step: None, rollout.Execution()
    ).final


def core_samples(trained: Trained, patcher: Any) -> Tensor:
    """Core's sampling of the same two prompts, one by one, as its graph would."""
    sampling = patcher.model.model_sampling
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)
    prompting, case = trained.prompting, trained.case
    return torch.cat(
        [
            euler(patcher, trained.noise[i : i + 1], sigmas, prompting.conditions.entries[i], entry(case, 3), 2.0)
            for i in range(2)
        ]
    )


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def test_rollout_lora_file_and_ratio(pack: Callable, case: Case, caplog: pytest.LogCaptureFixture) -> None:
    check_rollout(pack, case, caplog)


LOCON = ["in_layers.2", "out_layers.3", "skip_connection", "op", "conv", "input_blocks.0.0", "proj_in", "to_q"]


@pytest.mark.parametrize("core", ["SD15", "SDXL"])
def test_convolutions_of_a_unet_are_trained_too(pack: Callable, core: str, caplog: pytest.LogCaptureFixture) -> None:
    check_rollout(pack, next(case for case in CASES if case.core == core), caplog, LOCON)


def check_rollout(
    pack: Callable, case: Case, caplog: pytest.LogCaptureFixture, targets: list[str] | None = None
) -> None:
    trained = graph_model(pack, case, new_patcher(case), {"lora": {"targets": targets}})
    reference = new_patcher(case)
    base = core_samples(trained, reference)
    comfy.model_management.in_training = True
    assert relative(deterministic(pack, trained), base) < case.rounding, "the rollout is not core's euler"

    trained.wake(case.scale)
    learned = deterministic(pack, trained)
    assert relative(learned, base) > 1e-2, "the LoRA does nothing, so this test would see nothing"
    weights = trained.lora.comfy_weights(trained.lora.parameters(trained.model.module), 6, trained.model.lora_key)
    names = comfy.lora.model_lora_keys_unet(reference.model, {})
    with caplog.at_level(logging.WARNING):
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(weights)), names)
    assert not [record.getMessage() for record in caplog.records if "not loaded" in record.getMessage()]
    assert len(patches) == len(weights) // 3
    patched = reference.clone()
    assert set(patched.add_patches(patches)) == set(patches)
    assert relative(core_samples(trained, patched), learned) < max(1e-4, case.rounding), (
        "the file is not what was trained"
    )

    comfy.model_management.in_training = True
    assert ratio_deviation(pack, trained) < 1e-6


def rollout_batch(pack: Callable, trained: Trained, plan: Any, advantages: list[float], dtype: torch.dtype) -> Any:
    """A rollout of both prompts, ready to be trained on."""
    rollout, prompt_of = pack("trainer.rollout"), torch.arange(2)
    kept = rollout.sample(
        trained.model,
        plan,
        trained.prompting,
        prompt_of,
        trained.noise,
        lambda step: torch.stack([draw(*trained.noise.shape[1:], seed=100 * step + i) for i in range(2)]),
        rollout.Execution(),
    )
    return rollout_of(plan, trained.prompting, kept, prompt_of, advantages, pack, dtype)


def ratio_deviation(pack: Callable, trained: Trained) -> float:
    """How far the ratio of any action is off 1 before an update, and the forward pass that training makes."""
    sampled = rollout_batch(pack, trained, trained.plan, [1.0, -1.0], torch.float32)
    pairs = [(i, step) for i in range(2) for step in range(STEPS - 1)]
    totals = trained.updater.accumulate(items_of(sampled, pairs, pack), sampled)
    assert any(gradient.any() for gradient in gradients_of(trained.updater).values())
    return totals.peaks["deviation"]


@pytest.mark.parametrize("case", [case for case in CASES if case.detected is not None], ids=str)
def test_a_single_file_is_loaded_again_as_the_graph_loaded_it(
    pack: Callable, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(case, config=case.config | case.detected, text=case.detected_text)
    original = new_patcher(case)
    weights = {f"model.diffusion_model.{k}": v for k, v in original.model.diffusion_model.state_dict().items()}
    save_file(weights, tmp_path / "tiny.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
    loaded = comfy_nodes.UNETLoader().load_unet("tiny.safetensors", "default")[0]
    assert type(loaded.model) is type(original.model)
    description = pack("trainer.models.comfy.describe")
    loader, file, options = description._network(loaded)
    graph = {"loader": loader, "file": file, "weights": description._weights(loaded, options), "vae_file": "x"}
    graph = pack("trainer.config").GraphModel(folder="x", **graph)
    again = pack("trainer.models.comfy.load").load_network(graph, pack("trainer.models.comfy.model")._modules())
    sampled = [core_samples(graph_model(pack, case, patcher), patcher) for patcher in (original, again)]
    assert relative(*sampled) < 1e-5


PAIRS = [(0, 0), (1, 1)]
"""Two actions (trajectory, step), of different prompts and noise levels."""
ADVANTAGES = [1.0, -0.6]


def rolled_out(pack: Callable, trained: Trained) -> Any:
    """Two steps of two prompts, scored while the LoRA does nothing."""
    plan = trained.plan
    short = replace(plan, sigmas=plan.sigmas[:3], stochastic=[True, True])
    return rollout_batch(pack, trained, short, ADVANTAGES, torch.float64)


def gradient_of(pack: Callable, trained: Trained, sampled: Any) -> list[Tensor]:
    """The gradient of an update's objective."""
    trained.updater.accumulate(items_of(sampled, PAIRS, pack), sampled)
    return list(gradients_of(trained.updater).values())


@torch.no_grad()
def objective_of(pack: Callable, trained: Trained, sampled: Any) -> float:
    """Minus the mean of ratio times advantage: the objective where nothing is clipped, written out again."""
    step, kept, plan, losses = pack("trainer.diffusion.kernels").step, sampled.trajectories, sampled.plan, []
    for (i, place), advantage in zip(PAIRS, ADVANTAGES, strict=True):
        latents, level = kept.samples[place, i : i + 1], torch.tensor([plan.sigmas[place]])
        conditions = trained.prompting.conditions.rows(torch.tensor([i]))
        prediction = trained.model.predict_guided(latents, level, conditions, 2.0, trained.prompting.unconditional)
        sigmas = plan.sigmas[place], plan.sigmas[place + 1]
        outcome, process = kept.next_samples[place, i : i + 1], trained.model.process
        again = step(plan.kernel, latents, prediction, *sigmas, plan.eta, next_sample=outcome, process=process)
        losses.append(-(again.log_prob - kept.log_probs[place, i]).exp() * advantage)
    return torch.cat(losses).mean().item()


ROTARY = ("apply_rope_split_half", "apply_rope_split_half1", "rms_rope", "rms_rope_split_half")


@pytest.mark.parametrize("name", ROTARY)
def test_fused_rotary_kernels_have_the_gradient_of_their_formula(pack: Callable, name: str) -> None:
    pack("trainer.models.comfy.autograd").differentiate_kernels()
    angles = draw(1, 1, 3, 4, seed=3)
    turns = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))
    states = [draw(1, 2, 3, 8, seed=seed) for seed in range(1 if name.endswith("1") else 2)]
    scales = [1 + 0.1 * draw(8, seed=seed) for seed in (4, 5)] if name.startswith("rms") else []
    weights = [draw(1, 2, 3, 8, seed=6 + i) for i in range(len(states))]

    def weighted(kernel: Callable, inputs: list[Tensor]) -> Tensor:
        found = kernel(*inputs[: len(states)], turns.to(inputs[0]), *inputs[len(states) :])
        found = found if isinstance(found, tuple) else (found,)
        return sum((value * weight.to(value)).sum() for value, weight in zip(found, weights, strict=True))

    inputs = [value.clone().requires_grad_() for value in states + scales]
    gradients = torch.autograd.grad(weighted(getattr(comfy_kitchen, name), inputs), inputs)
    for i, gradient in enumerate(gradients):
        direction = draw(*gradient.shape, seed=20 + i).double()
        ends = []
        for sign in (1, -1):
            moved = [value.double() for value in states + scales]
            moved[i] = moved[i] + sign * 1e-5 * direction
            ends.append(weighted(getattr(rope, name), moved))
        difference = ((ends[0] - ends[1]) / 2e-5).item()
        assert (gradient.double() * direction).sum().item() == pytest.approx(difference, rel=1e-4)


def test_gradient_is_that_of_finite_differences_with_checkpointing_and_without(
    pack: Callable, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = graph_model(pack, case, new_patcher(case, torch.float64))
    checked = graph_model(pack, case, new_patcher(case, torch.float64), gradient_checkpointing=True)
    for trained in (plain, checked):
        trained.model.module.double()
        trained.noise = trained.noise.double()
    for name in ROTARY:  # the fused kernels refuse float64
        monkeypatch.setattr(comfy_kitchen, name, getattr(rope, name))
    with InFloat64():
        sampled = rolled_out(pack, plain)
        plain.wake(case.scale / 10)
        checked.wake(case.scale / 10)
        ours, again = gradient_of(pack, plain, sampled), gradient_of(pack, checked, sampled)
        for a, b in zip(ours, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)
        parameters = list(plain.lora.parameters(plain.model.module).values())
        directions = [draw(*p.shape, seed=900 + i).double() for i, p in enumerate(parameters)]
        length = sum(d.square().sum() for d in directions).sqrt()
        directions = [d / length for d in directions]
        slope = sum((g * d).sum() for g, d in zip(ours, directions, strict=True)).item()
        step, values = 1e-4, []
        for sign in (1, -2):
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += sign * step * direction
            values.append(objective_of(pack, plain, sampled))
    difference = (values[0] - values[1]) / (2 * step)
    print(f"{case}: {slope:.10g} {difference:.10g} {abs(slope - difference) / abs(difference):.1e}")
    assert abs(values[0] + 0.2) > 1e-6, "ratios of 1 would not tell one action from another"
    assert abs(slope) > 1e-6
    assert abs(slope - difference) < 1e-6 * abs(difference)


def test_guidance_of_the_description_replaces_that_of_the_conditions_and_is_refused_where_it_does_nothing(
    pack: Callable,
) -> None:
    flux, sd3 = (next(case for case in CASES if case.core == core) for core in ("Flux", "SD3"))

    def predicted(case: Case, **settings: object) -> Tensor:
        trained = graph_model(pack, case, new_patcher(case), **settings)
        with torch.no_grad():
            return trained.model.predict(trained.noise, torch.tensor([0.9, 0.5]), trained.prompting.conditions)

    given = predicted(flux)
    assert relative(predicted(replace(flux, extra=dict), embedded_guidance=6.0), given) == 0
    assert relative(predicted(flux, embedded_guidance=1.0), given) > 1e-3
    with pytest.raises(
        pack("trainer.utils.errors").BadInput,
        match="model.embedded_guidance is 2.0, but the model has no such input: use null",
    ):
        predicted(sd3, embedded_guidance=2.0)


def test_the_opening_check_passes_a_sound_model_and_stops_others(pack: Callable, monkeypatch) -> None:
    check, failed = pack("trainer.preflight").check, pack("trainer.utils.errors").RunFailed
    case = next(case for case in CASES if case.core == "Flux")
    trained = graph_model(pack, case, new_patcher(case))
    updater, model = trained.updater, trained.model
    arguments = (updater, trained.prompting, ["any"])
    check(*arguments)
    with monkeypatch.context() as changed:
        changed.setattr(model, "plain", lambda call: call() * 1.01)
        with pytest.raises(failed, match="computes something else in training than in sampling"):
            check(*arguments)
    with monkeypatch.context() as changed:
        real = model.predict_guided
        changed.setattr(model, "predict_guided", lambda *a: real(*a).detach() + 0 * torch.ones(1, requires_grad=True))
        with pytest.raises(failed, match="no gradient reaches the LoRA"):
            check(*arguments)


def described(
    pack: Callable, case: Case, patcher: Any, sigmas: list | None = None, **sections: dict
) -> tuple[Any, Any]:
    """What *GRPO Base Model* and *GRPO Train LoRA* know of a model before its run."""
    height, width, frames = case.size
    graph = {"folder": "x", "file": "x", "vae_file": "x", "scheduler": "simple", "sigmas": sigmas}
    process = pack("trainer.models.comfy.load").process_of(patcher.model.model_sampling, SAMPLING)
    kernel = pack("trainer.diffusion.kernels").stochastic(process)[0]
    data = {
        "model": {"family": "comfy", "graph": graph, "height": height, "width": width, "frames": frames},
        "prompts": {"texts": ["any"]},
        "rewards": [{"name": "colorfulness"}],
        "rollout": {"kernel": kernel},
    }
    return pack("nodes.types").ModelSpec.of(patcher), pack("trainer.config").parse_config(data | sections)


def test_a_model_without_weights_tells_which_conditions_it_takes(pack: Callable, case: Case, monkeypatch) -> None:
    dry_run, entries = pack("nodes.host.dry_run"), pack("trainer.models").EntryConditions
    spec, config = described(pack, case, new_patcher(case))
    reached = []
    whole = dry_run.MetaModel.take
    monkeypatch.setattr(dry_run.MetaModel, "take", lambda *arguments: (whole(*arguments), reached.append(1)))
    comfy.model_management.in_training = False
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)  # as on a GPU, where layers are filled later
    dry_run.refuse(spec, config, entries.of([entry(case, 1)]))
    assert comfy.memory_management.aimdo_enabled
    if not case.shapes:
        return
    assert reached, "the network was not run to its end, so that it could have refused nothing"
    assert not comfy.model_management.in_training, "the user's own sampling goes on as it was"
    wrong = entry(case, 1) | {"cross_attn": draw(1, 6, case.text[0] + 8)}
    with pytest.raises(
        pack("trainer.utils.errors").BadInput, match=f"expects width {case.text[0]} and gets {case.text[0] + 8}"
    ):
        dry_run.refuse(spec, config, entries.of([wrong]))
    if case.text[1] is not None:
        wrong = entry(case, 1) | {"pooled_output": draw(1, case.text[1] - 8)}  # some cut off what is more
        with pytest.raises(
            pack("trainer.utils.errors").BadInput,
            match=r"clip or conditioning does not match the model \(.*belongs to the model",
        ):
            dry_run.refuse(spec, config, entries.of([wrong]))


def test_a_model_without_weights_tells_what_else_the_trainer_would_refuse(pack: Callable) -> None:
    refuse, bad, entries = (
        pack("nodes.host.dry_run").refuse,
        pack("trainer.utils.errors").BadInput,
        pack("trainer.models"),
    )
    flux, sdxl = (next(case for case in CASES if case.core == core) for core in ("Flux", "SDXL"))
    patcher = new_patcher(flux)
    refuse(*described(pack, flux, patcher), None)
    with pytest.raises(bad, match="rollout.kernel is 'ddim': models of family comfy take"):
        refuse(*described(pack, flux, patcher, rollout={"kernel": "ddim"}), None)
    with pytest.raises(bad, match="lora.targets: 'attention.qkv' matches no linear or convolution layer"):
        refuse(*described(pack, flux, patcher, lora={"targets": ["attention.qkv"]}), None)
    with pytest.raises(bad, match="there are 3 sigmas, but 6 steps need 7"):
        refuse(*described(pack, flux, patcher, [1.0, 0.5, 0.0], rollout={"kernel": "dance", "steps": 6}), None)
    ltxv = next(case for case in CASES if case.core == "LTXV")
    lacking = {"cross_attn": draw(1, 6, 16)}
    with pytest.raises(bad, match="clip and conditioning lack an input of the model .*'attention_mask'"):
        refuse(*described(pack, ltxv, new_patcher(ltxv)), entries.EntryConditions.of([lacking]))
    with pytest.raises(bad, match=r"clip and conditioning lack an input of the model \('pooled_output'\)"):
        refuse(*described(pack, sdxl, new_patcher(sdxl)), entries.EntryConditions.of([lacking]))


def test_zero_terminal_snr_of_cores_node_is_carried_over_for_models_that_predict_v(pack: Callable) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    load, config = pack("trainer.models.comfy.load"), pack("trainer.config")
    case = next(case for case in CASES if case.core == "SDXL")
    patcher = new_patcher(case)
    patched = ModelSamplingDiscrete().patch(patcher, "v_prediction", True)[0]
    sampling = patched.get_model_object("model_sampling")
    assert sampling.sigma_max > 4000
    description = load.describe_sampling(sampling, SAMPLING)
    assert description == {"kind": "noise", "predicts": "v", "zsnr": True}
    again = load.build_sampling(config.GraphSampling(**description), patcher.model.model_config, SAMPLING)
    assert torch.equal(again.sigmas, sampling.sigmas)
    assert load.process_of(again, SAMPLING).name == "vp-v"
    of_noise = ModelSamplingDiscrete().patch(patcher, "eps", True)[0].get_model_object("model_sampling")
    with pytest.raises(pack("trainer.utils.errors").BadInput, match="predicts noise with zero terminal SNR"):
        load.process_of(of_noise, SAMPLING)


SMALL = {"hidden_size": 32, "num_heads": 2, "in_channels": 16, "out_channels": 16, "num_attention_heads": 2}
NEITHER = "is neither that of flow nor of noise prediction"
REFUSED = {
    "ACEStep": r"\(ACEStep\) makes music",
    "ACEStep15": "neither images nor videos",
    "CogVideoX_I2V": NEITHER,
    "CogVideoX_Inpaint": NEITHER,
    "CogVideoX_T2V": NEITHER,
    "CosmosI2VPredict2": rf"\(ModelSamplingCosmosRFlow, ModelSamplingContinuousEDM, COSMOS_RFLOW\) {NEITHER}",
    "CosmosT2IPredict2": NEITHER,
    "DepthAnything3": "measures depth",
    "HiDreamO1": "noise is scaled by 8",
    "Hunyuan3Dv2": "neither images nor videos",
    "Hunyuan3Dv2_1": "neither images nor videos",
    "Hunyuan3Dv2mini": "neither images nor videos",
    "LotusD": NEITHER,
    "MiniMaxH3": NEITHER,
    "MiniMaxMusic3": "neither images nor videos",
    "RT_DETR_v4": "finds objects",
    "SAM3": "finds objects",
    "SAM31": "finds objects",
    "SeedVR2": "enlarges images",
    "Trellis2": "makes 3D models",
    "TripoSplat": "makes 3D models",
    "WAN21_FlowRVS": NEITHER,
}
"""Core's classes that cannot be trained, and why."""


@pytest.mark.parametrize("core", REFUSED)
def test_other_classes_of_cores_are_refused_in_a_sentence(pack: Callable, core: str) -> None:
    load, kind = pack("trainer.models.comfy.load"), getattr(comfy.supported_models, core)
    config = SMALL | dict(kind.unet_config)
    description = kind(dict(config))
    description.unet_config = config | {"disable_unet_model_creation": True}
    base = description.get_model({}, "", device="cpu")
    graph = {"folder": "x", "file": "x", "vae_file": "x"}
    size = pack("trainer.config").ModelConfig(family="comfy", graph=graph, height=256, width=256)
    with pytest.raises(pack("trainer.utils.errors").BadInput, match=REFUSED[core]):
        load.check_task(base)
        load.process_of(base.model_sampling, SAMPLING)
        load.latent_shape(base.latent_format, size)


@pytest.mark.skipif(not comfyui_version.__version__.startswith("0.33."), reason="the page is about ComfyUI 0.33")
def test_the_documentation_names_every_class_of_cores() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "comfy-backend.md").read_text()
    tried = {case.core for case in CASES} | set(REFUSED)
    assert [name for name in tried if f"`{name}`" not in page] == []
    known = {kind.__name__ for kind in comfy.supported_models.models}
    assert [name for name in known if f"`{name}`" not in page] == []
