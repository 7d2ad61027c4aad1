"""The embedded model loaded from files by core's loaders: described by the node, trained as with diffusers."""

import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.sd
import folder_paths
import pytest
import torch
from learning import assert_same_learning, newest_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

import nodes as comfy_nodes

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
COMFYUI = Path(folder_paths.__file__).resolve().parent
PROMPTS = ["a red circle", "two blue squares"]
PAIRS = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
}
"""Layers that diffusers and ComfyUI both keep in one piece."""


@pytest.fixture
def files(pack: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """ComfyUI's model folders with the embedded model in single files."""
    folders = {name: tmp_path / name for name in ("diffusion_models", "checkpoints", "vae", "loras", "vae_approx")}
    for name, folder in folders.items():
        folder.mkdir()
        entry = ([str(folder)], folder_paths.supported_pt_extensions)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, entry)
    folder_paths.filename_list_cache.clear()
    weights = pack("trainer.shapes").WEIGHTS
    network, vae = folders["diffusion_models"] / "shapes.safetensors", folders["vae"] / "shapes.safetensors"
    shutil.copy(weights / "transformer/diffusion_pytorch_model.safetensors", network)
    save_file(pack("nodes.demo").vae_weights(), vae)
    return SimpleNamespace(network=str(network), vae=str(vae), folder=tmp_path)


def graph_section(files: SimpleNamespace, **settings: object) -> dict:
    known = {"folder": str(COMFYUI), "file": files.network, "vae_file": files.vae, "weights": "float32"}
    return {"family": "comfy", "graph": known | settings}


def description(pack: object, model: dict, conditions: Path | None, **sections: dict) -> Any:
    return pack("trainer.config").parse_config(
        {
            "model": model,
            "prompts": {"texts": PROMPTS, "negative": "grey", "conditions": str(conditions) if conditions else None},
            "rewards": [{"name": "colorfulness"}],
            "rollout": {
                "kernel": "cps",
                "eta": 0.5,
                "steps": 4,
                "group_size": 4,
                "prompts_per_iteration": 2,
                "guidance_scale": 2.0,
            },
            "objective": {"updates": 2, "clip_range": 0.2},
            "runtime": {"iterations": 5},
            "optimizer": {"learning_rate": 1e-2},
        }
        | sections
    )


def with_conditions(pack: object, demo: SimpleNamespace, files: SimpleNamespace, config: Any) -> Any:
    """The same description with its prompts encoded beside it."""
    file = files.folder / "conditions.safetensors"
    pack("nodes.host.encoding").write(file, demo.clip, config)
    data = config.model_dump(mode="json")
    data["prompts"]["conditions"] = str(file)
    return pack("trainer.config").parse_config(data)


def train(pack: object, config: Any, start: dict[str, Tensor] | None) -> tuple[Any, dict, list[dict]]:
    """A whole run in this process; the trainer, its first LoRA and its events."""
    events: list[dict] = []
    processes = pack("trainer.utils.distributed").Processes("cpu")
    trainer = pack("trainer.loop").Trainer(config, None, processes, events.append)
    if start is not None:
        pack("trainer.adapters.lora").load(trainer.model.module, start)
    first = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    trainer.train()
    return trainer, first, [event for event in events if "loss" in event]


def native(name: str) -> str:
    """A LoRA parameter of diffusers' transformer under ComfyUI's name."""
    module, rest = name.split(".lora_")
    _, block, layer = module.split(".", 2)
    return f"joint_blocks.{block}.{PAIRS[layer]}.lora_{rest}"


def in_comfyui(name: str) -> str:
    """A name of `Policy.tensors`, with the LoRA parameter in it under ComfyUI's name."""
    kind, parameter, *rest = name.split("/")
    return "/".join([kind, native(parameter), *rest])


def patched(model: Any, lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that core's own loader makes of the model with a LoRA file."""
    loaded, _ = comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0)
    return {key: loaded.patch_weight_to_device(key, return_weight=True) for key in loaded.patches}


def test_both_doors_give_the_same_losses_and_loras(pack, demo, files: SimpleNamespace, caplog) -> None:
    configs = {}
    for backend, model in (("diffusers", {"family": "sd3"}), ("graph", graph_section(files))):
        file = files.folder / f"{backend}.safetensors"
        pack("nodes.host.encoding").write(file, demo.clip, description(pack, model, None))
        targets = list(PAIRS) if backend == "diffusers" else list(PAIRS.values())
        configs[backend] = description(pack, model, file, lora={"rank": 4, "alpha": 8, "targets": targets})
    one, first, events = train(pack, configs["diffusers"], None)
    other, _, again = train(pack, configs["graph"], {native(name): value for name, value in first.items()})
    assert len(events) == len(again) == 5
    for a, b in zip(events, again, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert abs(a["rewards"]["colorfulness"]["mean"] - b["rewards"]["colorfulness"]["mean"]) < 1e-4
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-2 * a["grad_norm"]
        assert b["objective"]["rollout_deviation"]["max"] < 1e-6
    assert any(abs(event["loss"]) > 1e-4 for event in events), "losses of zero would equal each other"
    lora = pack("trainer.adapters.lora")
    both = [patched(demo.model, lora.comfy_weights(t.policy.result(), 8, t.model.lora_key)) for t in (one, other)]
    assert "not loaded" not in caplog.text.lower()
    assert both[0].keys() == both[1].keys()
    assert_same_learning(
        {in_comfyui(name): value for name, value in one.policy.tensors().items()}, other.policy.tensors()
    )
    base = demo.model.model.state_dict()
    changes = [torch.cat([(values[key] - base[key]).flatten() for key in sorted(values)]) for values in both]
    assert (changes[0] - changes[1]).norm() < 0.05 * changes[0].norm()


@pytest.mark.parametrize("weights", ["float8_e4m3fn", "bfloat16"])
def test_a_base_in_few_bits_stays_as_it_is_and_the_lora_learns_in_float32(
    pack, demo, files: SimpleNamespace, weights: str
) -> None:
    section = graph_section(files, weights=weights)
    config = description(pack, section, None, runtime={"iterations": 1}, objective={"clip_range": 1e-2})
    trainer, first, events = train(pack, with_conditions(pack, demo, files, config), None)
    base = {n: p for n, p in trainer.model.module.named_parameters() if "base_layer.weight" in n}
    assert {str(p.dtype) for p in base.values()} == {f"torch.{weights}"}
    assert {p.dtype for p in trainer.policy.parameters.values()} == {torch.float32}
    assert any((trainer.policy.parameters[name] != value).any() for name, value in first.items())
    assert events[0]["bad_updates"] == 0


# ------------------------------------------------------------------------------------------------------------ the node


class Graph:
    """A graph in API form, as a node sees it."""

    def __init__(self, **nodes: dict) -> None:
        self.get_node = nodes.__getitem__


@pytest.fixture
def base_model(pack: object, files: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls GRPO Base Model inside a graph."""
    node = pack("nodes.base_model").BaseModel
    here = {"inputs": {"model": ["lora", 0], "vae": ["vae", 0], "low_noise_model": ["unet", 0]}}
    lora = {"class_type": "LoraLoaderModelOnly", "inputs": {"lora_name": "a.safetensors", "strength_model": 0.5}}
    lora["inputs"]["model"] = ["unet", 0]
    unet = {"class_type": "UNETLoader", "inputs": {}}
    vae = {"class_type": "VAELoader", "inputs": {"vae_name": "shapes.safetensors"}}
    graph = Graph(here=here, lora=lora, unet=unet, vae=vae)
    hidden = SimpleNamespace(unique_id="here", dynprompt=graph)
    monkeypatch.setattr(node, "hidden", hidden, raising=False)

    def call(**inputs: object) -> dict:
        """The `model` section of a run description."""
        values = {"family": "sd3", "width": 64, "height": 64, "dtype": "bfloat16"} | inputs
        return node.execute("(none in models/diffusers)", **values).args[0].section

    return call


@pytest.fixture
def loaded(files: SimpleNamespace) -> tuple[Any, Any]:
    """MODEL and VAE of core's loader nodes."""
    model = comfy_nodes.UNETLoader().load_unet("shapes.safetensors", "default")[0]
    return model, comfy_nodes.VAELoader().load_vae("shapes.safetensors")[0]


def shifted(model: Any, shift: float) -> Any:
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    return ModelSamplingSD3().patch(model, shift)[0]


def with_lora(pack: object, model: Any, files: SimpleNamespace) -> Any:
    shutil.copy(pack("trainer.shapes").WEIGHTS / "lora.safetensors", files.folder / "loras" / "a.safetensors")
    return comfy_nodes.LoraLoaderModelOnly().load_lora_model_only(model, "a.safetensors", 0.5)[0]


@torch.no_grad()
def test_the_node_carries_files_shift_and_loras(pack, demo, files, loaded, base_model, sample, noise) -> None:
    model, vae = loaded
    changed = shifted(with_lora(pack, model, files), 5.0)
    given = base_model(model=changed, vae=vae, scheduler="normal")
    graph = given["graph"]
    assert (given["family"], graph["file"], graph["vae_file"]) == ("comfy", files.network, files.vae)
    assert graph["loras"] == [{"file": str(files.folder / "loras" / "a.safetensors"), "strength": 0.5}]
    sampling = {"kind": "flow", "predicts": "flow", "shift": 5.0, "multiplier": 1000.0, "zsnr": False}
    assert graph["sampling"] == sampling
    trained = pack("trainer.models").FAMILIES["comfy"].load(pack("trainer.config").ModelConfig(**given), CPU)
    sigmas = comfy.samplers.calculate_sigmas(changed.get_model_object("model_sampling"), "normal", 4)
    assert trained.sigmas(4, 3.0) == pytest.approx(sigmas.tolist(), abs=1e-7)
    positive = demo.encode("a red circle above a blue square")
    core = sample(comfy.samplers.sampler_object("euler"), sigmas, noise, model=changed)
    entry = {"cross_attn": positive[0][0], **positive[0][1]}
    rollout, entries = pack("trainer.rollout"), pack("trainer.models").EntryConditions
    plan = rollout.Plan("ode", 0.0, trained.sigmas(4, 3.0), [False] * 4, False)
    prompting = rollout.Prompting(entries.of([entry] * 4))
    ours = rollout.sample(trained, plan, prompting, torch.arange(4), noise, lambda step: None).final
    assert (ours - core).abs().max() < 1e-4
    images = trained.decode(ours)
    assert (images.movedim(1, -1) - vae.decode(demo.model.model.process_latent_out(core))).abs().max() < 1e-3


@torch.no_grad()
def test_a_checkpoint_brings_network_and_vae(pack, demo, files, base_model, noise) -> None:
    network = {f"model.diffusion_model.{k}": v for k, v in demo.model.model.diffusion_model.state_dict().items()}
    vae = {f"first_stage_model.{k}": v for k, v in pack("nodes.demo").vae_weights().items()}
    save_file(network | vae, files.folder / "checkpoints" / "both.safetensors")
    model, _, vae = comfy_nodes.CheckpointLoaderSimple().load_checkpoint("both.safetensors")
    given = base_model(model=model, vae=vae)
    assert (given["graph"]["loader"], given["graph"]["vae_loader"]) == ("checkpoint", "checkpoint")
    trained = pack("trainer.models").FAMILIES["comfy"].load(pack("trainer.config").ModelConfig(**given), CPU)
    kept = demo.model.model.diffusion_model.state_dict()
    for name, value in trained.module.state_dict().items():
        assert torch.equal(value, kept[name]), name
    images = trained.decode(noise)
    assert (images.movedim(1, -1) - demo.vae.decode(demo.model.model.process_latent_out(noise))).abs().max() < 1e-3


def refused(pack: object, says: str) -> Any:
    return pytest.raises(pack("trainer.utils.errors").BadInput, match=says)


def test_what_cannot_be_repeated_is_refused(pack, demo, files, loaded, base_model) -> None:
    model, vae = loaded
    other = model.clone()
    other.cached_patcher_init = None
    with refused(pack, "a loader that training does not support"):
        base_model(model=other, vae=vae)
    other.cached_patcher_init = (shutil.rmtree, (files.network, {}))
    with refused(pack, "a loader that training does not support"):
        base_model(model=other, vae=vae)
    outside = files.folder / "outside.safetensors"
    other.cached_patcher_init = (comfy.sd.load_diffusion_model, (str(outside), {}))
    with refused(pack, "is outside of ComfyUI's folders"):
        base_model(model=other, vae=vae)
    other.cached_patcher_init = (comfy.sd.load_diffusion_model, (files.network, {"custom_operations": 1}))
    with refused(pack, "loaded with custom_operations"):
        base_model(model=other, vae=vae)
    with refused(pack, "vae is not connected"):
        base_model(model=model)


def test_patches_that_cannot_be_carried_are_refused(pack, files, loaded, base_model) -> None:
    model, vae = loaded
    changed = with_lora(pack, model, files)
    key = next(iter(changed.patches))
    changed.add_patches({key: ("diff", (torch.zeros(1),))}, 0.3)
    with refused(pack, "before GRPO Base Model patches the model's weights"):
        base_model(model=changed, vae=vae)
    changed = model.clone()
    changed.set_model_sampler_cfg_function(lambda args: args["cond"])
    with refused(pack, r"does not support \(sampler_cfg_function\)"):
        base_model(model=changed, vae=vae)
    changed = model.clone()
    changed.add_object_patch("diffusion_model.final_layer", torch.nn.Identity())
    with refused(pack, "diffusion_model.final_layer"):
        base_model(model=changed, vae=vae)


def test_sizes_levels_and_other_vaes_are_refused(pack, files, loaded, base_model) -> None:
    model, vae = loaded
    with refused(pack, "model.frames is 5: it must be 1, because this model generates images"):
        base_model(model=model, vae=vae, frames=5)
    with refused(pack, "sigmas"):
        base_model(model=model, vae=vae, sigmas=torch.tensor([1.0, 0.0]))
    given = base_model(model=model, vae=vae, sigmas=torch.tensor([1.0, 0.5, 0.0]))
    trained = pack("trainer.models").FAMILIES["comfy"].load(pack("trainer.config").ModelConfig(**given), CPU)
    assert trained.sigmas(2, 3.0) == [1.0, 0.5, 0.0]
    with refused(pack, "there are 3 sigmas, but 4 steps need 5"):
        trained.sigmas(4, 3.0)
    vae.latent_channels = 4
    with refused(pack, "the VAE has 4 latent channels, but the model has 16"):
        base_model(model=model, vae=vae)
    vae.latent_channels, vae.latent_dim = 16, 3
    with refused(pack, "the VAE is for videos, but the model is for images"):
        base_model(model=model, vae=vae)
    vae.latent_dim, vae.upscale_ratio = 2, 16
    with refused(pack, "the VAE has 16 pixels per latent along an edge, but the model has 8"):
        base_model(model=model, vae=vae)


def test_an_old_comfyui_is_refused(pack, loaded, base_model, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "sd.py").touch()
    monkeypatch.setattr(folder_paths, "__file__", str(tmp_path / "folder_paths.py"))
    with refused(pack, "is of an unknown version, but a connected model needs 0.20.0 or later"):
        base_model(model=loaded[0], vae=loaded[1])
    for version, is_old in (("0.19.7", True), ("0.20.0", False), ("1.0.0", False)):
        (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
        with refused(pack, f"is {version}, but a connected model") if is_old else nullcontext():
            base_model(model=loaded[0], vae=loaded[1])
    floor = re.search(r'requires-comfyui = ">=(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    assert floor == ".".join(map(str, pack("trainer.models.comfy.load").OLDEST))


class Clip:
    """Text encoders of some width."""

    def __init__(self, width: int) -> None:
        self.width = width

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        return [[torch.zeros(1, 4, self.width), {"pooled_output": torch.zeros(1, 128)}]]


def test_nothing_is_unloaded_for_what_is_refused(pack, files, loaded, base_model, monkeypatch) -> None:
    runs, reached = pack("nodes.host.runs"), []
    monkeypatch.setattr(pack("nodes.host.devices"), "free_memory", lambda: reached.append(1))
    monkeypatch.setattr(runs, "run_folder", lambda name: files.folder / "runs" / name)
    given, spec = base_model(model=loaded[0], vae=loaded[1]), pack("nodes.types").ModelSpec.of(loaded[0])
    data = description(pack, graph_section(files), None).model_dump(mode="json") | {"model": given}

    def begin() -> None:
        runs.begin("x", data, Clip(100), "source", 1, None, spec=spec)

    with refused(pack, r"clip or conditioning does not match the model \(layer \S+ expects width \d+ and gets 100\)"):
        begin()
    file = Path(files.network)
    file.rename(file.with_suffix(".sft"))
    with refused(pack, "model.graph.file is .*: this .safetensors file does not exist"):
        begin()
    assert not reached
    assert not (files.folder / "runs").exists()


# ---------------------------------------------------------------------------------------------------------- conditions


def test_conditioning_that_is_no_data_is_refused(pack) -> None:
    carried = pack("nodes.host.encoding")._carried
    assert carried([[torch.zeros(1), {"pooled_output": torch.zeros(1), "guidance": 2.0}]]) == {"guidance": 2.0}
    with refused(pack, "conditioning contains 'control'"):
        carried([[torch.zeros(1), {"control": object()}]])
    with refused(pack, "has 2 parts"):
        carried([[torch.zeros(1), {}]] * 2)


# -------------------------------------------------------------------------------------------------------- the process


def test_two_processes_train_from_the_description_alone_and_give_the_run_of_one(
    pack, demo, files: SimpleNamespace
) -> None:
    runtime = {"iterations": 3, "device": "cpu"}
    config = description(pack, graph_section(files), None, runtime=runtime, optimizer={"learning_rate": 1e-3})
    config = with_conditions(pack, demo, files, config)
    trainer, _, alone = train(pack, config, None)
    written, output = files.folder / "run.yaml", files.folder / "out"
    written.write_text(config.to_yaml())
    command = [sys.executable, str(pack("trainer.runs.launch").START_FILE), "train", str(written)]
    command += ["--output", str(output), "--processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=files.folder, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = [event for event in pack("trainer.runs.directory").RunDirectory(output).events() if "loss" in event]
    assert len(alone) == len(shared) == 3
    for one, two in zip(alone, shared, strict=True):
        assert one["objective"]["actions"] == two["objective"]["actions"] > 0
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
        assert one["rewards"]["colorfulness"] == pytest.approx(two["rewards"]["colorfulness"], abs=1e-5)
    lora = load_file(output / "lora.safetensors")
    ours = pack("trainer.adapters.lora").comfy_weights(
        trainer.policy.result(), config.lora.alpha, trainer.model.lora_key
    )
    assert lora.keys() == ours.keys()
    assert_same_learning(trainer.policy.tensors(), newest_checkpoint(output))
    names = comfy.lora.model_lora_keys_unet(demo.model.model, {})
    assert len(comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), names)) == len(lora) // 3 > 0


# -------------------------------------------------------------------------------------------- two networks of one model


@pytest.fixture
def low(files: SimpleNamespace) -> Any:
    """A MODEL of core's loader with other weights, as the network for low noise."""
    weights = load_file(files.network)
    generator = torch.Generator().manual_seed(1)
    changed = {k: v + 0.02 * torch.randn(v.shape, generator=generator).to(v) for k, v in weights.items()}
    save_file(changed, Path(files.network).with_name("low.safetensors"))
    folder_paths.filename_list_cache.clear()
    return comfy_nodes.UNETLoader().load_unet("low.safetensors", "default")[0]


def test_the_node_describes_two_networks_and_refuses_what_does_not_belong_together(
    pack, demo, files, loaded, low, base_model
) -> None:
    model, vae = loaded
    given = base_model(model=model, vae=vae, low_noise_model=low, boundary=0.9, trained_network="low")
    expert = given["graph"]["low_noise"]
    assert Path(expert["file"]).name == "low.safetensors"
    assert (expert["loader"], expert["weights"]) == ("diffusion_model", given["graph"]["weights"])
    assert (expert["boundary"], expert["trained"], expert["loras"]) == (0.9, "low", [])
    config = pack("trainer.config").ModelConfig(**given)
    assert pack("trainer.models").model_class(config).__name__ == "TwoExperts"
    alone = pack("trainer.config").ModelConfig(**base_model(model=model, vae=vae))
    more = Path(expert["file"]).stat().st_size
    assert pack("trainer.models").weight_bytes(config) == pack("trainer.models").weight_bytes(alone) + more
    with refused(pack, "low_noise_model is connected and model is not"):
        base_model(low_noise_model=low)
    with refused(pack, "is loaded from the same file as model"):
        base_model(model=model, vae=vae, low_noise_model=model)
    with refused(pack, "have different samplings: put the same ModelSampling node"):
        base_model(model=shifted(model, 5.0), vae=vae, low_noise_model=low)
    other = low.clone()
    other.model = SimpleNamespace(diffusion_model=torch.nn.Linear(2, 2))
    with refused(pack, "is not a network of the same kind and size as model"):
        base_model(model=model, vae=vae, low_noise_model=other)
    Path(expert["file"]).unlink()
    with refused(pack, "model.graph.low_noise.file is .*: this .safetensors file does not exist"):
        pack("trainer.models").model_class(config)


@pytest.mark.parametrize("trained", ["both", "high"])
def test_a_run_of_two_networks_resumes_and_publishes_a_file_for_each_that_it_trains(
    pack, demo, files, low, monkeypatch, trained: str
) -> None:
    expert = {"file": str(Path(files.network).with_name("low.safetensors")), "weights": "float32", "trained": trained}
    runtime = {"iterations": 2, "device": "cpu", "checkpoint_every": 1}
    config = description(pack, graph_section(files, low_noise=expert), None, runtime=runtime)
    config = with_conditions(pack, demo, files, config)
    folders, loop = pack("trainer.runs.directory"), pack("trainer.loop")

    def run(name: str, until: int) -> Any:
        directory = folders.RunDirectory(files.folder / name).open(config, [])
        trainer = loop.Trainer(config, directory, pack("trainer.utils.distributed").Processes("cpu"))
        after = trainer._after
        monkeypatch.setattr(
            trainer, "_after", lambda event: (after(event), setattr(trainer, "interrupted", trainer.iteration >= until))
        )
        trainer.train()
        directory.release()
        return trainer, directory

    whole, directory = run("whole", 2)
    run("resumed", 1)
    again, _ = run("resumed", 2)
    for name, value in whole.policy.tensors().items():
        assert torch.equal(value, again.policy.tensors()[name]), name
    for number, event in enumerate([e for e in directory.events() if "loss" in e]):
        assert event["objective"]["rollout_deviation"]["max"] < 1e-5 or number

    begun = config.model_copy(update={"lora": config.lora.model_copy(update={"start_from": str(directory.lora_file)})})
    started = loop.Trainer(begun, None, pack("trainer.utils.distributed").Processes("cpu"))
    started.policy.start()
    found = pack("trainer.evaluation.files")
    switch = found.Adapters(
        pack("trainer.models").model_class(config.model).load(config.model, CPU),
        [file := found.LoraFile("mine", directory.lora_file)],
    )
    switch.use(file)
    switched = pack("trainer.adapters.lora").parameters(switch.model.module)
    for name, value in whole.policy.parameters.items():
        torch.testing.assert_close(started.policy.parameters[name], value, rtol=0, atol=1e-7)
        scale = 1 if "lora_A" in name else config.lora.alpha / config.lora.rank
        torch.testing.assert_close(switched[name], value * scale, rtol=0, atol=1e-6)

    monkeypatch.setattr(folder_paths, "output_directory", str(files.folder))
    published = pack("nodes.host.folders").publish_loras(directory.lora_file, "mine")
    networks = ["high", "low"] if trained == "both" else ["high"]
    assert [Path(name).name for name in published] == [f"mine_2_{network}.safetensors" for network in networks]
    names = comfy.lora.model_lora_keys_unet(demo.model.model, {})
    for name in published:
        weights = load_file(files.folder / "loras" / name)
        assert len(comfy.lora.load_lora(comfy.lora_convert.convert_lora(weights), names)) == len(weights) // 3 > 0
        assert any(value.any() for key, value in weights.items() if "lora_B" in key)


@pytest.fixture
def compare(pack, demo, files, loaded, low, monkeypatch) -> Any:
    """Compare LoRAs with both networks, called as ComfyUI calls it."""
    node = pack("nodes.compare").CompareLoRAs
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id=None, prompt=None, extra_pnginfo=None), raising=False)
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(files.folder))
    config = pack("trainer.config").RewardConfig
    sockets = {
        "model": loaded[0],
        "low_noise_model": low,
        "clip": demo.clip,
        "vae": loaded[1],
        "latent_image": {"samples": torch.zeros(1, 16, 8, 8)},
        "reward": pack("nodes.types").Rewards((config(name="colorfulness"),)),
    }
    widgets = {"prompts": "\n".join(HELD_OUT), "negative": "grey", "images_per_prompt": 2, "seed": 1234, "steps": 4}
    widgets |= {"cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "strength": 1.0, "boundary": 0.875}

    def call(method: str = "execute", **changes: object) -> Any:
        given = {name: [value] for name, value in (sockets | widgets | changes).items() if value is not None}
        return getattr(node, method)(**given)

    return call


HELD_OUT = ["a green triangle", "a yellow square above a red circle"]


def test_loras_of_two_networks_are_compared_as_the_trainer_evaluates_them(
    pack, demo, files, low, compare, monkeypatch
) -> None:
    expert = {"file": str(Path(files.network).with_name("low.safetensors")), "weights": "float32", "trained": "both"}
    sections = {
        "runtime": {"iterations": 2, "device": "cpu"},
        "evaluation": {"texts": HELD_OUT, "images_per_prompt": 2},
    }
    model = graph_section(files, low_noise=expert, scheduler="simple")
    config = with_conditions(pack, demo, files, description(pack, model, None, **sections))
    monkeypatch.setattr(folder_paths, "output_directory", str(files.folder))
    directory = pack("trainer.runs.directory").RunDirectory(files.folder / "dancegrpo/runs/mine").open(config, [])
    trainer = pack("trainer.loop").Trainer(config, directory, pack("trainer.utils.distributed").Processes("cpu"))
    trainer.train()
    directory.release()
    names = pack("nodes.host.folders").publish_loras(directory.lora_file, "mine")
    folder_paths.filename_list_cache.clear()
    own = pack("trainer.evaluation.command").run_evaluation(
        config, [directory.lora_file], files.folder / "own", lambda text: None
    )
    found = compare(lora_1=names[1], lora_2=names[0], run="mine").ui["dancegrpo"][0]["models"]
    assert [each["name"] for each in found] == ["base", "mine_2", "run mine"], "a pair is one LoRA, whichever is chosen"
    for each, expected in zip(found, [*own["models"], own["models"][1]], strict=True):
        for kind in ("rewards", "looks"):
            for name, block in expected[kind].items():
                assert each[kind][name]["estimate"] == pytest.approx(block["estimate"], abs=1e-3)
    assert abs(own["models"][1]["rewards"]["colorfulness"]["change"]["mean"]) > 5e-3, "the LoRA does nothing"
    assert compare("fingerprint_inputs", lora_1=names[0]) == compare("fingerprint_inputs", lora_1=names[1])

    with refused(pack, r"mine_2_low.safetensors' is for a model with a network for high and one for low noise"):
        compare("check_lazy_status", lora_1=names[1], low_noise_model=None)
    with refused(pack, "run 'mine' is for a model with a network for high and one for low noise"):
        compare("check_lazy_status", run="mine", low_noise_model=None)
    with refused(pack, "lora_model_1 and low_noise_model are connected"):
        compare("check_lazy_status", lora_model_1={})
    with refused(pack, "sigmas do not fall"):
        compare(sigmas=torch.tensor([1.0, 0.5, 0.7, 0.0]))
    with refused(pack, "have different samplings"):
        compare(low_noise_model=shifted(low, 5.0))
    (files.folder / "loras" / names[0]).rename(files.folder / "loras" / "dancegrpo" / "away.safetensors")
    with refused(pack, r"mine_2_low.safetensors' is one of two files, and '.*mine_2_high.safetensors' is not in"):
        compare("check_lazy_status", lora_1=names[1])
    with refused(pack, "away.safetensors' has neither high nor low in its name"):
        compare("check_lazy_status", lora_1="dancegrpo/away.safetensors")


def test_the_files_of_a_pair_are_found_by_the_word_in_their_names(pack) -> None:
    partners = pack("nodes.host.compared_loras").partners
    for name, high, low in (
        ("a/mine_40_low-2.safetensors", "a/mine_40_high-2.safetensors", "a/mine_40_low-2.safetensors"),
        ("light_HIGH.safetensors", "light_HIGH.safetensors", "light_LOW.safetensors"),
        ("high/x_Low_noise.safetensors", "high/x_High_noise.safetensors", "high/x_Low_noise.safetensors"),
    ):
        assert partners(name) == [high, low]
    assert partners("highlands_slow.safetensors") == ["highlands_slow.safetensors"]
