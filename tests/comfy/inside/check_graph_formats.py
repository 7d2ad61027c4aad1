"""Bases in few bits with scales, and bases that are partly kept elsewhere: the embedded model, by core's loaders."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.quant_ops
import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nodes as comfy_nodes

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
LAYOUTS = comfy.quant_ops.QUANT_ALGOS
LOADED = {"dtype": torch.float32}
IN_GROUPS = ("convrot_w4a4", "asym_w4a8_int8")
"""Formats for layers whose width is a multiple of 256, which here are the last ones of the feed-forward blocks."""


@pytest.fixture(scope="module")
def weights(pack: Any) -> dict[str, Tensor]:
    """The embedded model's, under ComfyUI's names."""
    file = pack("trainer.shapes").WEIGHTS / "transformer/diffusion_pytorch_model.safetensors"
    network = comfy.sd.load_diffusion_model(str(file), model_options=dict(LOADED)).model.diffusion_model
    return {name: value.clone() for name, value in network.state_dict().items()}


def is_packed(name: str) -> bool:
    """The layers that such files usually pack: those of the blocks, but for modulation."""
    return (
        name.startswith("joint_blocks.") and name.endswith(".weight") and any(f".{x}." in name for x in ("attn", "mlp"))
    )


def scaled_fp8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As files named `fp8_scaled` are: a scale beside each weight, and a mark."""
    packed = dict(weights)
    for name in filter(is_packed, weights):
        scale = weights[name].abs().max() / 448
        packed[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        packed[name.replace(".weight", ".scale_weight")] = scale
    return packed | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}


def mixed(weights: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """As ComfyUI itself saves layers of a format."""
    packed, groups = dict(weights), 256 if form in IN_GROUPS else 1
    for name in filter(is_packed, weights):
        if weights[name].shape[1] % groups:
            continue
        options = {"scale": "recalculate"} if form in ("float8_e4m3fn", "float8_e5m2", "nvfp4") else {}
        value = comfy.quant_ops.QuantizedTensor.from_float(
            weights[name], LAYOUTS[form]["comfy_tensor_layout"], **options
        )
        packed |= {key: part.contiguous() for key, part in value.state_dict(name).items()}
        note = json.dumps({"format": form}).encode()
        packed[name.replace(".weight", ".comfy_quant")] = torch.tensor(list(note), dtype=torch.uint8)
    return packed


def unpacked(network: nn.Module) -> dict[str, Tensor]:
    """The weights that a network of packed ones stands for."""
    plain = {}
    for name, value in network.named_parameters():
        is_packed = isinstance(value, comfy.quant_ops.QuantizedTensor)
        plain[name] = (value.dequantize() if is_packed else value).detach().float().clone()
    return plain | {name: value.clone() for name, value in network.named_buffers()}


def with_lora(pack: Any, patcher: Any, vae: Any = None, reserve_gb: float = 0.0, **settings: object) -> Any:
    """The trainer's model with a LoRA that does something."""
    config_module, lora = pack("trainer.config"), pack("trainer.adapters.lora")
    graph = {"folder": "x", "file": "x", "vae_file": "x", "reserve_gb": reserve_gb}
    config = config_module.ModelConfig(family="comfy", graph=graph, height=64, width=64, **settings)
    model = pack("trainer.models.comfy.model").ComfyModel(patcher, vae, config)
    lora.inject(model.module, config_module.LoraConfig(rank=2, alpha=6), model.default_targets, 0, model.device)
    for i, parameter in enumerate(lora.parameters(model.module).values()):
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return model


@pytest.fixture(scope="module")
def probe(pack: Any, demo: Any) -> Any:
    """A model's prediction, and the gradient of a function of it by name."""
    entry = {"cross_attn": demo.encode("a red circle")[0][0], **demo.encode("a red circle")[0][1]}
    conditions = pack("trainer.models").EntryConditions.of([entry] * 2)
    draw = lambda seed: torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(seed))  # noqa: E731

    def run(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        parameters = pack("trainer.adapters.lora").parameters(model.module)
        output = model.predict_guided(draw(1), torch.tensor([0.9, 0.4]), conditions)
        gradients = torch.autograd.grad((output * draw(2)).sum(), list(parameters.values()), allow_unused=True)
        found = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
        return output.detach(), found

    return run


def equal(one: tuple, other: tuple, tolerance: float) -> None:
    assert one[1].keys() == other[1].keys()
    assert len(one[1]) > 0
    for a, b in [(one[0], other[0]), *((one[1][name], other[1][name]) for name in one[1])]:
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("form", ["scaled_fp8", *LAYOUTS])
def test_packed_weights_are_trained_as_what_they_stand_for(
    pack, weights, probe, tmp_path: Path, form: str, caplog
) -> None:
    file = tmp_path / "packed.safetensors"
    save_file(scaled_fp8(weights) if form == "scaled_fp8" else mixed(weights, form), file)
    patcher = comfy.sd.load_diffusion_model(str(file))
    plain = tmp_path / "plain.safetensors"
    save_file(unpacked(patcher.model.diffusion_model), plain)
    reference = with_lora(pack, comfy.sd.load_diffusion_model(str(plain), model_options=dict(LOADED)))
    expected = probe(reference)
    model = with_lora(pack, patcher)
    equal(probe(model), expected, 1e-4)
    layers = model.module.named_parameters()
    kept = [name for name, value in layers if isinstance(value, comfy.quant_ops.QuantizedTensor)]
    assert len(kept) == 5 if form in IN_GROUPS else len(kept) > 20, "the base stays packed"
    # The file of the LoRA goes into the packed weights as into plain ones.
    lora = pack("trainer.adapters.lora")
    written = lora.comfy_weights(lora.parameters(model.module), 6, model.lora_key)
    again = comfy.sd.load_diffusion_model(str(file))
    names = comfy.lora.model_lora_keys_unet(again.model, {})
    assert len(comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(written)), names)) == len(written) // 3
    assert "not loaded" not in caplog.text.lower()


def test_a_lora_of_the_graph_goes_into_packed_weights_as_core_puts_it_there(pack, weights, tmp_path: Path) -> None:
    file, lora = tmp_path / "packed.safetensors", pack("trainer.shapes").WEIGHTS / "lora.safetensors"
    save_file(scaled_fp8(weights), file)
    loras = [{"file": str(lora), "strength": 0.7}]
    graph = pack("trainer.config").GraphModel(folder="x", file=str(file), vae_file="x", loras=loras)
    ours = pack("trainer.models.comfy.load").load_network(graph, pack("trainer.models.comfy.model")._modules())
    core, _ = comfy.sd.load_lora_for_models(comfy.sd.load_diffusion_model(str(file)), None, load_file(lora), 0.7, 0)
    comfy.model_management.load_models_gpu([core])
    merged, plain = (unpacked(model.model.diffusion_model) for model in (ours, core))
    assert len(core.patches) > 0
    for name, value in plain.items():
        assert torch.equal(merged[name], value), name


def test_a_scaled_file_goes_from_the_graph_into_training(
    pack, demo, weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in (("diffusion_models", scaled_fp8(weights)), ("vae", pack("nodes.demo").vae_weights())):
        (tmp_path / name).mkdir()
        save_file(content, tmp_path / name / "shapes.safetensors")
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
    model = comfy_nodes.UNETLoader().load_unet("shapes.safetensors", "default")[0]
    vae = comfy_nodes.VAELoader().load_vae("shapes.safetensors")[0]
    graph = pack("trainer.models.comfy.describe").describe(model, vae, "simple", None, None, iter(()))
    assert graph["weights"] is None, "ComfyUI decides by the file"
    data = {
        "model": {"family": "comfy", "graph": graph},
        "prompts": {"texts": ["a red circle"], "conditions": str(tmp_path / "conditions.safetensors")},
        "rewards": [{"name": "colorfulness"}],
        "rollout": {"kernel": "cps", "eta": 0.5, "steps": 3, "group_size": 3, "prompts_per_iteration": 1},
        "runtime": {"iterations": 1},
        "optimizer": {"learning_rate": 1e-2},
    }
    config, events = pack("trainer.config").parse_config(data), []
    pack("nodes.host.encoding").write(Path(config.prompts.conditions), demo.clip, config)
    trainer = pack("trainer.loop").Trainer(
        config, None, pack("trainer.utils.distributed").Processes("cpu"), events.append
    )
    trainer.train()
    event = next(event for event in events if "loss" in event)
    assert event["bad_updates"] == 0
    assert event["objective"]["rollout_deviation"]["max"] < 1e-5
    ups = [value for name, value in trainer.policy.parameters.items() if "lora_B" in name]
    assert {value.dtype for value in ups} == {torch.float32}
    assert sum(value.abs().sum() for value in ups) > 0, "nothing was learned"


def test_a_base_that_is_partly_elsewhere_gives_the_same_gradients(pack, weights, probe, tmp_path: Path) -> None:
    file = tmp_path / "plain.safetensors"
    save_file(weights, file)
    whole = with_lora(pack, comfy.sd.load_diffusion_model(str(file), model_options=dict(LOADED)))
    expected = probe(whole)
    patcher = comfy.sd.load_diffusion_model(str(file), model_options=dict(LOADED))
    model = with_lora(pack, patcher, gradient_checkpointing=True)
    before = pack("trainer.adapters.lora").parameters(model.module)
    # What `load_models_gpu` does for decoding and after it: all out, and as much back as there is room for.
    patcher.detach()
    patcher.partially_load(CPU, patcher.model_size() / 2)
    cast = [name for name, layer in model.module.named_modules() if getattr(layer, "comfy_cast_weights", False)]
    assert patcher.model.model_lowvram
    assert 0 < patcher.loaded_size() < 0.6 * patcher.model_size()
    assert any("attn" in name for name in cast)
    after = pack("trainer.adapters.lora").parameters(model.module)
    assert all(after[name] is before[name] for name in before), "the optimizer must still have them"
    equal(probe(model), expected, 1e-5)


def test_room_is_asked_for_and_the_vae_leaves_when_sampling_goes_on(pack, demo, weights, probe, monkeypatch) -> None:
    management, calls = comfy.model_management, []
    load = management.load_models_gpu

    def loading(models: list, memory_required: float = 0, **options: object) -> None:
        calls.append((models[0], memory_required))
        load(models, memory_required=memory_required, **options)

    def held() -> list:
        return [loaded.model for loaded in management.current_loaded_models]

    monkeypatch.setattr(management, "load_models_gpu", loading)
    patcher = comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options=dict(LOADED))
    model = with_lora(pack, patcher, vae=demo.vae, reserve_gb=3.0)
    probe(model)
    needed = patcher.memory_required([1, 16, 8, 8]) + 3 * 2**30
    probe(model)
    assert calls == [(patcher, needed)], "once for all predictions"
    model.decode(torch.zeros(1, 16, 8, 8))
    assert demo.vae.patcher in held()
    probe(model)
    assert demo.vae.patcher not in held()
    assert patcher in held()
    assert [model for model, _ in calls] == [patcher, demo.vae.patcher, patcher]
    assert calls[2] == calls[0]


def test_rewards_are_given_room_while_they_score_and_never_before_a_backward_pass(
    pack, weights, probe, monkeypatch
) -> None:
    asked, free = [], comfy.model_management.free_memory
    model = with_lora(pack, comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options=dict(LOADED)))
    before = probe(model)
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda *given: (asked.append(given), free(*given))[1])
    model.make_room(2**60, CPU)
    assert asked == [], "a gradient is being computed"
    with torch.no_grad():
        model.make_room(2**60, CPU)
    beside = comfy.model_management.minimum_inference_memory()
    assert asked == [(2**60 + beside, CPU)], "the weights, and what core keeps free for activations"
    equal(probe(model), before, 1e-6)
    held = [loaded.model for loaded in comfy.model_management.current_loaded_models]
    assert model.patcher in held, "it came back"


def test_the_lora_is_on_the_device_also_where_the_base_is_not(pack, weights, monkeypatch) -> None:
    model = with_lora(pack, comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options=dict(LOADED)))
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models, memory_required: None)
    monkeypatch.setattr(model.patcher, "load_device", torch.device("cuda", 3))  # asked for, and not there
    moved = []
    with monkeypatch.context() as changed:
        changed.setattr(Tensor, "to", lambda value, device: (moved.append((value.shape, device)), value)[1])
        model._make_resident()
    adapter = pack("trainer.adapters.lora").parameters(model.module)
    assert moved == [(value.shape, torch.device("cuda", 3)) for value in adapter.values()]


def test_memory_is_computed_as_an_allocator_counts_it() -> None:
    spec = importlib.util.spec_from_file_location("memory_benchmark", ROOT / "benchmarks" / "memory.py")
    memory = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    allocated, computed = memory.check()
    assert allocated > 10
    assert abs(computed - allocated) < 0.01 * allocated
    gb = 2**30
    assert memory.in_ram(20 * gb, 18 * gb, 24) == "all on the GPU"
    assert memory.in_ram(20 * gb, 18 * gb, 16) == "5.5 in RAM"
    assert memory.in_ram(20 * gb, 5 * gb, 12) == "no"


def test_weights_in_ram_need_checkpointing(pack) -> None:
    check, bad = pack("trainer.models.comfy.load").check_offload, pack("trainer.utils.errors").BadInput
    config = pack("trainer.config").ModelConfig
    with pytest.raises(
        bad, match="2.0 GB of the weights do not fit on the GPU and stay in RAM.*turn model.gradient_checkpointing on"
    ):
        check(2 * 2**30, config())
    check(2 * 2**30, config(gradient_checkpointing=True))
    check(0, config())
