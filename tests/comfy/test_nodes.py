"""The pack in a real ComfyUI: how it loads, what it shows, and what it says to bad input."""

import ast
import pickle
import re
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from comfy_host import PACK, ROOT, Fault, PromptFailed, Server, warnings_of_pack
from PIL import Image

NODE_IDS = re.findall(r'node_id="(DanceGRPO_\w+)"', "".join(p.read_text() for p in (ROOT / "nodes").glob("*.py")))


def test_it_loads_without_a_warning(comfy: Server) -> None:
    # How fast: inside/conftest.py, which a busy machine does not slow down.
    assert re.search(rf"[\d.]+ seconds: .*{PACK}", comfy.output), comfy.output
    assert "IMPORT FAILED" not in comfy.output
    assert "Error while calling comfy_entrypoint" not in comfy.output
    start = comfy.output[: comfy.output.index("To see the GUI go to")]
    own = [line for line in start.splitlines() if re.search("WARNING|ERROR|Traceback", line)]
    assert [line for line in own if PACK in line or "dancegrpo" in line.lower()] == []
    assert warnings_of_pack(start) == []


def test_the_packages_of_a_virtual_environment_in_the_clone_are_not_the_pack() -> None:
    own = [
        f"/base/custom_nodes/{PACK}/nodes/rewards.py:7: UserWarning: one",
        f"{ROOT}/trainer/loop.py:12: DeprecationWarning: two",
        f"/base/custom_nodes/{PACK}/__init__.py:1: FutureWarning: three",
    ]
    others = [
        f"{ROOT}/.venv/lib/python3.12/site-packages/torch/nn.py:3: UserWarning: four",
        f"/home/me/{PACK}/.venv/lib/python3.12/site-packages/trainer/nodes/x.py:3: UserWarning: five",
        f"/home/me/comfy/{PACK}/nodes/rewards.py is not a warning",
    ]
    assert warnings_of_pack("\n".join([*others, *own, *others])) == own


def test_every_node_is_there_with_words_for_everything(info: dict) -> None:
    assert len(NODE_IDS) >= 9
    for name in NODE_IDS:
        node = info[name]
        assert node["category"].startswith("DanceGRPO")
        assert node["description"]
        assert node["search_aliases"]
        for section in ("required", "optional"):
            for key, entry in node["input"].get(section, {}).items():
                assert entry[1].get("tooltip"), f"{name}.{key} has no tooltip"
                for choice in entry[1].get("options", []) if entry[0] == "COMFY_DYNAMICCOMBO_V3" else []:
                    found = [(k, e) for part in choice["inputs"].values() for k, e in part.items()]
                    assert [k for k, e in found if not e[1].get("tooltip")] == [], f"{name}.{choice['key']}"
        assert all(node["output_tooltips"]), f"{name}: an output has no tooltip"


def test_nodes_are_found_by_the_words_people_search_for(info: dict) -> None:
    found = {
        word: {name.removeprefix("DanceGRPO_") for name in NODE_IDS if word in info[name]["search_aliases"]}
        for word in ("rlhf", "dpo", "preference", "vote", "human feedback", "fine-tune", "lora", "reward model")
    }
    assert found["rlhf"] >= {"TrainLoRA", "Preset", "Settings", "Objective", "LoadReward", "CollectForVoting"}
    assert found["dpo"] >= {"TrainLoRA", "Preset", "Settings", "Objective", "CollectForVoting"}
    assert found["fine-tune"] >= {"TrainLoRA", "Preset", "Settings", "Objective", "BaseModel", "Run", "Estimate"}
    assert found["fine-tune"] == {
        n.removeprefix("DanceGRPO_") for n in NODE_IDS if "finetune" in info[n]["search_aliases"]
    }
    assert found["lora"] >= {"TrainLoRA", "Preset", "Settings", "CompareLoRAs", "ApplyLoRAOverSigmas"}
    assert found["reward model"] >= {"LoadReward", "CombineRewards", "ThresholdReward", "ScoreImages", "TrainLoRA"}
    for word in ("preference", "vote", "human feedback"):
        assert found[word] >= {"CollectForVoting", "LoadReward", "Objective", "TrainLoRA"}


def test_a_dtype_that_is_not_used_says_so(comfy: Server, info: dict) -> None:
    node = info["DanceGRPO_BaseModel"]
    for name, loaded in (("dtype", "model"), ("vae_dtype", "VAE")):
        assert f"Ignored if a {loaded} is connected" in node["input"]["required"][name][1]["tooltip"]
    assert "folder, family, dtype and vae_dtype are ignored" in node["description"]
    page = comfy.fetch(f"/extensions/{PACK}/docs/DanceGRPO_BaseModel.md").decode()
    assert "**folder, family, dtype and vae_dtype are then ignored**" in page


def test_scripts_are_loaded_by_the_interface_and_put_text_in_as_text(comfy: Server) -> None:
    listed = [path for path in comfy.get("/extensions") if path.startswith(f"/extensions/{PACK}/")]
    assert f"/extensions/{PACK}/js/main.js" in listed
    for path in listed:
        script = comfy.fetch(urllib.parse.quote(path)).decode()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script), (
            path
        )


@pytest.mark.parametrize("name", NODE_IDS)
def test_help_pages_are_served(comfy: Server, name: str) -> None:
    page = comfy.fetch(f"/extensions/{PACK}/docs/{name}.md").decode()
    assert page.startswith("# ")
    assert len(page) > 200


def test_templates_are_listed_and_served_with_their_images(comfy: Server) -> None:
    listed = comfy.get("/workflow_templates")[PACK]
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    assert len(listed) >= 3
    for path in sorted((ROOT / "workflows").glob("*.*")):
        address = f"/api/workflow_templates/{PACK}/{urllib.parse.quote(path.name)}"
        assert comfy.fetch(address) == path.read_bytes()


def test_nothing_heavy_is_imported_at_the_door() -> None:
    """Only inside functions: diffusers, peft and the like."""
    heavy = {"diffusers", "peft", "transformers", "open_clip", "scipy", "matplotlib", "accelerate"}
    for path in (ROOT / "nodes").glob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                names = (
                    [a.name for a in statement.names] if isinstance(statement, ast.Import) else [statement.module or ""]
                )
                assert not {name.split(".")[0] for name in names} & heavy, path.name


# -------------------------------------------------------------------------------------------------------- bad input


def scoring(**changes: object) -> dict:
    """Score one grey image."""
    prompt = {
        "image": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 3, "color": 0x808080},
        },
        "reward": {"class_type": "DanceGRPO_LoadReward", "inputs": {"reward": "brightness"}},
        "score": {
            "class_type": "DanceGRPO_ScoreImages",
            "inputs": {"reward": ["reward", 0], "images": ["image", 0], "prompt": "a red circle", "batch": "images"},
        },
    }
    for place, value in changes.items():
        node, field = place.split("__")
        prompt[node]["inputs"][field] = value
    return prompt


def refusal(comfy: Server, prompt: dict) -> str:
    with pytest.raises(PromptFailed) as caught:
        comfy.run(prompt)
    return str(caught.value)


def only_fault(comfy: Server, prompt: dict) -> Fault:
    """The one report that a user gets."""
    with pytest.raises(PromptFailed) as caught:
        comfy.run(prompt)
    (fault,) = caught.value.faults
    return fault


def test_scores_are_text_plot_and_floats(comfy: Server) -> None:
    prompt = scoring()
    prompt["total"] = {"class_type": "PreviewAny", "inputs": {"source": ["score", 0]}}
    outputs = comfy.run(prompt)
    assert outputs["score"]["text"][0].startswith("1: 0.502  a red circle\n2: 0.502")
    assert comfy.images(outputs["score"])[0].is_file()
    assert [float(text) for text in outputs["total"]["text"]] == pytest.approx([128 / 255] * 3)


def test_an_empty_prompt_is_refused_before_anything_runs(comfy: Server) -> None:
    assert "prompt is empty" in refusal(comfy, scoring(score__prompt=" \n"))


def test_prompts_that_do_not_match_the_images_are_one_sentence(comfy: Server) -> None:
    text = refusal(comfy, scoring(score__prompt="a red circle\na blue square"))
    assert "prompt has 2 lines for 3 images: use one line for all, or one line each" in text


def test_an_unknown_reward_is_refused(comfy: Server) -> None:
    assert "reward" in refusal(comfy, scoring(reward__reward="../../secret"))


PICKSCORE = {"reward.path": "pickscore/model.safetensors", "reward.scale": "cosine", "reward.dtype": "float32"}
BAD_NAMES = ["../../x", "/etc/passwd", "C:\\x", "D:x", "\\\\host\\x", "nul", "a\x00b", "a\nb", "a\u202eb"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_every_node_that_takes_a_name_refuses_one_that_leads_elsewhere(comfy: Server, name: str) -> None:
    size = {"width": 64, "height": 64, "dtype": "float32", "vae_dtype": "auto", "gradient_checkpointing": False}
    lora = {"model": ["demo", 0], "lora_name": name, "strength": 1.0, "start_percent": 0.0, "end_percent": 0.5}
    train = {"grpo_model": ["demo", 3], "reward": ["good", 0], "wait": True, "processes": 1, "prompts": "a"}
    reward = {"reward": "pickscore", **PICKSCORE, "reward.path": name}
    nodes = {
        "demo": ("DemoModel", {}),
        "good": ("LoadReward", {"reward": "brightness"}),
        "name": ("TrainLoRA", train | {"name": name}),
        "run": ("Run", {"name": name, "action": "look"}),
        "folder": ("BaseModel", size | {"folder": name, "family": "sd3"}),
        "preset": ("Preset", {"preset": name}),
        "reward": ("LoadReward", reward),
        "lora_name": ("ApplyLoRAOverSigmas", lora),
    }
    prompt = {key: {"class_type": f"DanceGRPO_{kind}", "inputs": inputs} for key, (kind, inputs) in nodes.items()}
    for key in ("folder", "preset", "reward", "lora_name"):
        prompt[f"{key} shown"] = {"class_type": "PreviewAny", "inputs": {"source": [key, 0]}}
    before = sorted(comfy.base.rglob("*"))
    with pytest.raises(PromptFailed) as failed:
        comfy.run(prompt)
    at_fault = {key for key, node in failed.value.details["node_errors"].items() if "DanceGRPO" in node["class_type"]}
    assert at_fault == {"name", "run", "folder", "preset", "reward", "lora_name"}
    assert sorted(comfy.base.rglob("*")) == before


def test_a_file_that_is_missing_is_said_before_anything_runs(comfy: Server) -> None:
    prompt = scoring(reward__reward="pickscore")
    prompt["reward"]["inputs"] |= PICKSCORE
    with pytest.raises(PromptFailed) as failed:
        comfy.run(prompt)
    (fault,) = failed.value.faults
    assert (fault.node, fault.input, fault.kind) == ("reward", "reward.path", "value_not_in_list")
    hint = "(missing: put it at models/rewards/pickscore/model.safetensors)"
    assert fault.text == f"reward.path: 'pickscore/model.safetensors' not in ['{hint}']"
    prompt["reward"]["inputs"]["reward.path"] = hint  # it can be chosen, for want of another
    fault = only_fault(comfy, prompt)
    assert fault.node == "reward"
    assert fault.text.startswith(f"reward 'pickscore': path '{hint}' is not in {comfy.base}")


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_no_pickle_is_run(comfy: Server, tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    for folder, name in (("loras", "trap.pt"), ("rewards", "trap.pth"), ("rewards", "trap.safetensors")):
        (comfy.base / "models" / folder).mkdir(parents=True, exist_ok=True)
        (comfy.base / "models" / folder / name).write_bytes(pickle.dumps({"weight": Trap(marker)}))
    lora = {"model": ["demo", 0], "lora_name": "trap.pt", "strength": 1.0, "start_percent": 0.0, "end_percent": 0.5}
    prompt = {
        "demo": {"class_type": "DanceGRPO_DemoModel", "inputs": {}},
        "lora": {"class_type": "DanceGRPO_ApplyLoRAOverSigmas", "inputs": lora},
        "shown": {"class_type": "PreviewAny", "inputs": {"source": ["lora", 0]}},
    }
    assert "trap.pt is damaged or contains more than weights" in refusal(comfy, prompt)
    for name in ("trap.pth", "trap.safetensors"):
        prompt = scoring(reward__reward="pickscore")
        prompt["reward"]["inputs"] |= PICKSCORE | {"reward.path": name}
        assert f"{name} " in refusal(comfy, prompt)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Trap(marker)))  # noqa: S301 - what the trap is for
    assert marker.exists(), "the trap is none, so that this test would see nothing"


def test_empty_lines_are_refused_before_anything_runs(comfy: Server) -> None:
    lines = {"class_type": "DanceGRPO_PromptLines", "inputs": {"prompts": " \n\n"}}
    prompt = {"a": lines, "b": {"class_type": "PreviewAny", "inputs": {"source": ["a", 0]}}}
    with pytest.raises(PromptFailed, match="prompts is empty") as failed:
        comfy.run(prompt)
    assert list(failed.value.details["node_errors"]) == ["a"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "C:\\x.safetensors", "a\x00b"])
def test_a_lora_name_leads_nowhere_else(comfy: Server, name: str) -> None:
    prompt = {
        "demo": {"class_type": "DanceGRPO_DemoModel", "inputs": {}},
        "lora": {
            "class_type": "DanceGRPO_ApplyLoRAOverSigmas",
            "inputs": {
                "model": ["demo", 0],
                "lora_name": name,
                "strength": 1.0,
                "start_percent": 0.0,
                "end_percent": 0.5,
            },
        },
        "shown": {"class_type": "PreviewAny", "inputs": {"source": ["lora", 0]}},
    }
    fault = only_fault(comfy, prompt)
    assert (fault.node, fault.input) == ("lora", "lora_name")
    assert "not in" in fault.text


def test_two_numbers_that_do_not_fit_are_one_report_before_the_model_is_made(comfy: Server) -> None:
    inputs = {"lora_name": "(from the lora socket)", "strength": 1.0, "start_percent": 0.9, "end_percent": 0.5}
    prompt = {
        "demo": {"class_type": "DanceGRPO_DemoModel", "inputs": {}},
        "model": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["demo", 0], "shift": 2.3456}},  # not cached
        "lora": {"class_type": "DanceGRPO_ApplyLoRAOverSigmas", "inputs": inputs | {"model": ["model", 0]}},
        "shown": {"class_type": "PreviewAny", "inputs": {"source": ["lora", 0]}},
    }
    with pytest.raises(PromptFailed) as failed:
        comfy.run(prompt)
    (fault,) = failed.value.faults
    assert (fault.node, fault.text) == ("lora", "start_percent 0.9 must be below end_percent 0.5")
    (error,) = [body for kind, body in failed.value.details if kind == "execution_error"]
    assert "model" not in error["executed"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"start_step": 5, "end_step": 2}, "start_step is 5 and end_step is 2: use"),
        ({"kernel": "cps", "eta": 2.5}, "eta 2.5 is outside the range of kernel cps: 0 to 1"),
        ({"kernel": "ddim", "eta": 1.5}, "eta 1.5 is outside the range of kernel ddim: 0 to 1"),
        ({"eta": -0.1}, "eta"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"kernel": "heun"}, "kernel: 'heun' not in"),
    ],
)
def test_what_the_sampler_cannot_do_is_said_once_and_before_it_samples(comfy: Server, changes: dict, says: str) -> None:
    inputs = {"kernel": "dance", "eta": 0.3, "seed": 0, "start_step": 0, "end_step": 2, "noise_device": "cpu"}
    sampler = {"class_type": "DanceGRPO_SDESampler", "inputs": inputs | {"first_image": 0} | changes}
    fault = only_fault(comfy, {"a": sampler, "b": {"class_type": "PreviewAny", "inputs": {"source": ["a", 0]}}})
    assert fault.node == "a"
    assert fault.text.startswith(says)


# --------------------------------------------------------------------------------------------- sampling in the server


def sampling(steps: int, kernel: str = "dance", model: tuple[str, int] = ("demo", 0)) -> dict:
    """Two images of the demo model, saved."""
    nodes = {
        "demo": ("DanceGRPO_DemoModel", {}),
        "text": ("CLIPTextEncode", {"clip": ["demo", 1], "text": "a red circle"}),
        "guider": ("BasicGuider", {"model": list(model), "conditioning": ["text", 0]}),
        "noise": ("DanceGRPO_GroupNoise", {"noise_seed": steps}),
        "sigmas": ("BasicScheduler", {"model": ["demo", 0], "scheduler": "simple", "steps": steps, "denoise": 1.0}),
        "latent": ("EmptySD3LatentImage", {"width": 64, "height": 64, "batch_size": 2}),
        "sampler": (
            "DanceGRPO_SDESampler",
            {
                "kernel": kernel,
                "eta": 0.5,
                "seed": 1,
                "start_step": 0,
                "end_step": 10000,
                "noise_device": "gpu",
                "first_image": 0,
            },
        ),
        "sample": (
            "SamplerCustomAdvanced",
            {
                "noise": ["noise", 0],
                "guider": ["guider", 0],
                "sampler": ["sampler", 0],
                "sigmas": ["sigmas", 0],
                "latent_image": ["latent", 0],
            },
        ),
        "decode": ("VAEDecode", {"samples": ["sample", 0], "vae": ["demo", 2]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "sampling"}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def test_an_interrupt_ends_sampling_at_once(comfy: Server) -> None:
    prompt_id = comfy.queue(sampling(10000))
    end = time.monotonic() + 60
    while "/10000 [" not in comfy.output and time.monotonic() < end:
        time.sleep(0.1)
    comfy.post("/interrupt", {})
    entry = comfy.wait(prompt_id, 60)
    assert "10000/10000" not in comfy.output
    assert entry["status"]["status_str"] == "error"
    assert "execution_interrupted" in [kind for kind, _ in entry["status"]["messages"]]
    comfy.run(sampling(4))


def test_a_kernel_for_other_models_is_one_sentence(comfy: Server) -> None:
    assert "kernel 'ddim' is not for flow models: choose one of dance" in refusal(comfy, sampling(3, "ddim"))


def test_a_new_lora_file_is_listed_and_used_without_a_restart(comfy: Server) -> None:
    folder = comfy.base / "output" / "loras" / "dancegrpo"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shapes_0001.safetensors").write_bytes((ROOT / "trainer/shapes/weights/lora.safetensors").read_bytes())
    choices = comfy.get("/object_info/DanceGRPO_ApplyLoRAOverSigmas")["DanceGRPO_ApplyLoRAOverSigmas"]["input"]
    name = str(Path("dancegrpo") / "shapes_0001.safetensors")
    assert name in choices["required"]["lora_name"][1]["options"]
    plain = comfy.images(comfy.run(sampling(5))["save"])
    prompt = sampling(5, model=("lora", 0))
    inputs = {"model": ["demo", 0], "lora_name": name, "strength": 1.0, "start_percent": 0.0, "end_percent": 0.7}
    prompt["lora"] = {"class_type": "DanceGRPO_ApplyLoRAOverSigmas", "inputs": inputs}
    changed = comfy.images(comfy.run(prompt)["save"])
    pixels = lambda path: np.asarray(Image.open(path)).astype(int)  # noqa: E731
    assert np.abs(pixels(plain[0]) - pixels(changed[0])).max() > 10
    assert "lora key not loaded" not in comfy.output
