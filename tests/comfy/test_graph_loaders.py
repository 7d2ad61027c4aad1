"""A model of core's loaders, trained from a graph by the real server and a real trainer, and used in the same graph."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from comfy_host import COMFYUI, ROOT, PromptFailed, Server
from safetensors.torch import load_file, save_file

WEIGHTS = ROOT / "trainer" / "shapes" / "weights"
OVERRIDES = "\n".join(
    [
        "rollout.steps=4",
        "lora.targets=null",  # the preset names layers as diffusers does
        "rollout.group_size=2",
        "rollout.prompts_per_iteration=2",
        "evaluation.images_per_prompt=1",
        "runtime.iterations=2",
    ]
)

SAMPLER = {
    "kernel": "cps",
    "eta": 0.5,
    "seed": 0,
    "start_step": 0,
    "end_step": 10000,
    "noise_device": "cpu",
    "first_image": 0,
}


@pytest.fixture(scope="module")
def files(comfy: Server) -> None:
    """The embedded model as single files in the server's model folders."""
    models = comfy.base / "models"
    for name in ("diffusion_models", "vae"):
        (models / name).mkdir(parents=True, exist_ok=True)
    network = WEIGHTS / "transformer/diffusion_pytorch_model.safetensors"
    shutil.copy(network, models / "diffusion_models" / "shapes.safetensors")
    # TAESD's own layout counts the clamp before the decoder as a layer.
    state = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    for name, value in load_file(WEIGHTS / "vae/diffusion_pytorch_model.safetensors").items():
        part, _, layer, rest = name.split(".", 3)
        state[f"taesd_{part}.{int(layer) + (part == 'decoder')}.{rest}"] = value.float()
    save_file(state, models / "vae" / "shapes.safetensors")


def node(class_type: str, **inputs: object) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def graph(name: str, **base: object) -> dict:
    """Core's loaders, a shift, training, and the result in core's loader, the pack's sampler and its score."""
    base_model = {
        "folder": "(none in models/diffusers)",
        "family": "sd3",
        "width": 64,
        "height": 64,
        "dtype": "bfloat16",
        "vae_dtype": "float32",
        "gradient_checkpointing": True,
        "model": ["shift", 0],
        "vae": ["vae", 0],
        "scheduler": "simple",
    }
    return {
        "unet": node("UNETLoader", unet_name="shapes.safetensors", weight_dtype="default"),
        "shift": node("ModelSamplingSD3", model=["unet", 0], shift=3.0),
        "vae": node("VAELoader", vae_name="shapes.safetensors"),
        "demo": node("DanceGRPO_DemoModel"),
        "base": node("DanceGRPO_BaseModel", **(base_model | base)),
        "reward": node("DanceGRPO_LoadReward", reward="colorfulness"),
        "settings": node("DanceGRPO_Preset", preset="demo", overrides=OVERRIDES),
        "train": node(
            "DanceGRPO_TrainLoRA",
            grpo_model=["base", 0],
            clip=["demo", 1],
            reward=["reward", 0],
            settings=["settings", 0],
            name=name,
            prompts="a red circle\ntwo blue squares",
            held_out_prompts="a green triangle",
            wait=True,
            processes=1,
        ),
        "lora": node("LoraModelLoader", model=["shift", 0], lora=["train", 0], strength_model=1.0, bypass=False),
        "text": node("CLIPTextEncode", text="a green triangle", clip=["demo", 1]),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=2),
        "noise": node("RandomNoise", noise_seed=5),
        "sampler": node("DanceGRPO_SDESampler", **SAMPLER),
        "sigmas": node("BasicScheduler", model=["lora", 0], scheduler="simple", steps=4, denoise=1.0),
        "guider": node("BasicGuider", model=["lora", 0], conditioning=["text", 0]),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["empty", 0],
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "score": node(
            "DanceGRPO_ScoreImages",
            reward=["reward", 0],
            images=["decode", 0],
            prompt="a green triangle",
            batch="images",
        ),
        "shown": node("PreviewAny", source=["score", 2]),
    }


def test_a_graph_of_core_loaders_trains_and_uses_the_lora(comfy: Server, files: None) -> None:
    outputs = comfy.run(graph("graph_loaders"), patience=400)
    assert outputs["shown"]["text"]
    run = comfy.base / "output" / "dancegrpo" / "runs" / "graph_loaders"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert len(events) == 2
    assert events[0]["objective"]["rollout_deviation"]["max"] < 1e-6
    lora = load_file(run / "lora.safetensors")
    assert all(key.startswith("diffusion_model.joint_blocks.") for key in lora)
    assert "lora key not loaded" not in comfy.output


def test_two_networks_are_trained_with_a_conditioning_for_each_prompt(comfy: Server, files: None) -> None:
    folder, generator = comfy.base / "models" / "diffusion_models", torch.Generator().manual_seed(1)
    weights = load_file(folder / "shapes.safetensors")
    changed = {k: v + 0.02 * torch.randn(v.shape, generator=generator).to(v) for k, v in weights.items()}
    save_file(changed, folder / "low.safetensors")
    prompt = graph("graph_experts", low_noise_model=["low_shift", 0], boundary=0.875, trained_network="both")
    prompt["low"] = node("UNETLoader", unet_name="low.safetensors", weight_dtype="default")
    prompt["low_shift"] = node("ModelSamplingSD3", model=["low", 0], shift=3.0)
    prompt["lines"] = node("DanceGRPO_PromptLines", prompts="a red circle\na red circle")
    prompt["each"] = node("CLIPTextEncode", text=["lines", 0], clip=["demo", 1])
    own = {"prompts": ["lines", 0], "conditioning": ["each", 0], "held_out_conditioning": ["text", 0]}
    prompt["train"]["inputs"] |= own
    wanted = above(prompt, "train")
    outputs = comfy.run({key: prompt[key] for key in wanted}, patience=400)
    says, data = outputs["train"]["text"][0], outputs["train"]["dancegrpo"][0]
    published = comfy.base / "output" / "loras" / "dancegrpo"
    for network in ("high", "low"):
        file = published / f"graph_experts_2_{network}.safetensors"
        assert file.name in says
        assert all(key.startswith("diffusion_model.joint_blocks.") for key in load_file(file))
    assert data["lora_name"] is None, "one loader cannot take two LoRAs"
    files = [f"loras/dancegrpo/graph_experts_2_{network}.safetensors" for network in ("high", "low")]
    assert [each["file"] for each in data["loras"]] == files
    run = comfy.base / "output" / "dancegrpo" / "runs" / "graph_experts"
    description = yaml.safe_load((run / "run.yaml").read_text())["description"]
    assert description["prompts"]["texts"] == ["a red circle"] * 2
    assert len(set(description["prompts"]["digests"])) == 2
    again = comfy.run({key: prompt[key] for key in wanted}, patience=400)
    assert "finished" in again["train"]["text"][0]
    del prompt["train"]["inputs"]["held_out_conditioning"]
    with pytest.raises(PromptFailed, match="held_out_conditioning has 0 entries and held_out_prompts has 1 lines"):
        comfy.run({key: prompt[key] for key in above(prompt, "train")})


def test_what_cannot_be_trained_is_said_on_the_node(comfy: Server, files: None) -> None:
    with pytest.raises(PromptFailed, match="model.frames is 5: it must be 1, because this model generates images"):
        comfy.run(graph("graph_loaders_frames", frames=5))
    prompt = graph("graph_loaders_vae", vae=["demo", 2])
    with pytest.raises(PromptFailed, match="VAE comes from a loader that training does not support"):
        comfy.run(prompt)
    prompt = graph("graph_loaders_clip")
    del prompt["train"]["inputs"]["clip"]
    with pytest.raises(PromptFailed, match="clip is not connected"):
        comfy.run(prompt)


# ----------------------------------------------------------------- an example for a released model, on a tiny one


@pytest.fixture(scope="module")
def tiny_models(comfy: Server, files: None) -> None:
    """A random FLUX.1 under the released files' names."""
    environment = {**os.environ, "PYTHONPATH": str(COMFYUI), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("tiny_files.py")
    subprocess.run([sys.executable, script, comfy.base / "models"], env=environment, check=True, timeout=200)
    shutil.copy(comfy.base / "models" / "vae" / "shapes.safetensors", comfy.base / "models" / "vae" / "ae.safetensors")


def shortened(name: str) -> dict:
    """An example in API format: small and short, scored by rules, its text encoders the embedded model's."""
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    rules = iter(("colorfulness", "sharpness"))
    small = {"width": 64, "height": 64, "steps": 4, "batch_size": 1, "images_per_prompt": 1}
    encoders = next(key for key, n in prompt.items() if n["class_type"].endswith("CLIPLoader"))
    prompt[encoders] = node("DanceGRPO_DemoModel")
    for entry in prompt.values():
        inputs = entry["inputs"]
        inputs |= {field: [encoders, 1] for field, value in inputs.items() if value == [encoders, 0]}
        inputs |= {field: value for field, value in small.items() if field in inputs}
        if entry["class_type"] == "DanceGRPO_LoadReward":
            entry["inputs"] = {"reward": next(rules)}
        elif entry["class_type"] == "DanceGRPO_Preset":
            inputs["overrides"] = OVERRIDES
    return prompt


def test_an_example_for_a_released_model_runs(comfy: Server, tiny_models: None) -> None:
    prompt = shortened("07 Train FLUX.1")
    keys = {n["class_type"]: key for key, n in prompt.items()}
    outputs = comfy.run(prompt, patience=400)
    run = comfy.base / "output" / "dancegrpo" / "runs" / "flux1_lora"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert len(events) == 2
    assert events[0]["objective"]["rollout_deviation"]["max"] < 1e-6
    compare = outputs[keys["DanceGRPO_CompareLoRAs"]]
    assert [model["name"] for model in compare["dancegrpo"][0]["models"]] == ["base", "lora_model_1"]
    assert all(file.stat().st_size > 300 for file in comfy.images(compare))
    assert all(key.startswith("diffusion_model.") for key in load_file(run / "lora.safetensors"))
    assert "lora key not loaded" not in comfy.output


def test_preset_auto_chooses_for_the_connected_model(comfy: Server, tiny_models: None) -> None:
    prompt = shortened("07 Train FLUX.1")
    train, preset = (
        next(key for key, n in prompt.items() if n["class_type"] == kind)
        for kind in ("DanceGRPO_TrainLoRA", "DanceGRPO_Preset")
    )
    prompt[preset]["inputs"] |= {"preset": "auto"}
    prompt[train]["inputs"] |= {"name": "automatic"}
    outputs = comfy.run({key: prompt[key] for key in above(prompt, train)}, patience=400)
    says = outputs[train]["text"][0]
    assert "preset auto chose:" in says
    assert "because the model is a flow model that makes images" in says
    run = yaml.safe_load((comfy.base / "output" / "dancegrpo" / "runs" / "automatic" / "run.yaml").read_text())[
        "description"
    ]
    assert run["rollout"]["kernel"] == "dance-exact"
    assert run["runtime"]["iterations"] == 2, "the overrides are kept"
    again = comfy.run({key: prompt[key] for key in above(prompt, train)}, patience=400)
    assert "finished" in again[train]["text"][0], "the same choice again, so the run is recognised"


def above(prompt: dict, key: str) -> set[str]:
    """A node and all that it depends on."""
    links = [value[0] for value in prompt[key]["inputs"].values() if isinstance(value, list)]
    return {key}.union(*(above(prompt, link) for link in links))
