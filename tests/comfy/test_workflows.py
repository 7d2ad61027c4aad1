"""The example workflows: each as it is saved for the interface, and its twin run over the API."""

import io
import json
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from comfy_host import ROOT, PromptFailed, Server
from PIL import Image

from tools import build_workflows

GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
SOCKET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")


def api(name: str) -> dict:
    return json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())


def widget_names(inputs: dict, order: dict, values: list, prefix: str = "") -> list[str]:
    """Names of a node's widgets in the order in which the interface saves their values; "" is what it adds itself.

    Args:
        values: what was saved; a choice decides which widgets follow it. What is used is taken away.
    """
    names = []
    for section in ("required", "optional"):
        for name in order.get(section, []):
            kind, *rest = inputs[section][name]
            options = rest[0] if rest else {}
            if not (isinstance(kind, list) or kind in SOCKET_TYPES) or options.get("forceInput"):
                continue
            names.append(prefix + name)
            chosen = values.pop(0)
            if options.get("control_after_generate") or options.get("image_upload"):
                names.append("")
                values.pop(0)
            if kind == "COMFY_DYNAMICCOMBO_V3":
                (option,) = [option for option in options["options"] if option["key"] == chosen]
                nested = {part: list(entries) for part, entries in option["inputs"].items()}
                names += widget_names(option["inputs"], nested, values, f"{prefix}{name}.")
    return names


def as_prompt(graph: dict, info: dict) -> dict:
    """What the interface sends for a saved graph."""
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        known = info[node["type"]]
        names = widget_names(known["input"], known["input_order"], list(node["widgets_values"]))
        values = zip(names, node["widgets_values"], strict=True)
        inputs = {name: value for name, value in values if name}
        inputs |= {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_a_graph_and_its_twin_say_the_same(info: dict, path: Path) -> None:
    if not (ROOT / "workflows" / "api" / path.name).is_file():
        pytest.fail(f"{path.name} has no twin in workflows/api")
    twin = {key: {k: node[k] for k in ("class_type", "inputs")} for key, node in api(path.stem).items()}
    assert as_prompt(json.loads(path.read_text()), info) == twin


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_a_graph_is_tidy(path: Path) -> None:
    graph = json.loads(path.read_text())
    boxes = [(*node["pos"], *node["size"]) for node in graph["nodes"]]
    title = 30  # above a node's position
    for i, (x, y, width, height) in enumerate(boxes):
        for u, v, w, h in boxes[:i]:
            assert x >= u + w or u >= x + width or y - title >= v + h or v - title >= y + height
    notes = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    assert any(("**Files:**" if path in MODELS else "**For a real model:**") in note for note in notes)
    slots = {(node["id"], i): slot for node in graph["nodes"] for i, slot in enumerate(node["inputs"])}
    sources = {(node["id"], i): slot for node in graph["nodes"] for i, slot in enumerate(node["outputs"])}
    for number, source, out, target, into, kind in graph["links"]:
        assert slots[target, into]["link"] == number
        assert number in sources[source, out]["links"]
        assert sources[source, out]["type"] == kind


MODELS = [path for path in GRAPHS if 4 <= int(path.stem[:2]) <= 15]
"""The graphs for released models."""
VOTES = [path for path in GRAPHS if int(path.stem[:2]) in (2, 3)]
SMALL = [path for path in GRAPHS if path not in MODELS]
"""The graphs on the embedded model."""
MISSING_FILES = ("ckpt_name", "unet_name", "vae_name", "clip_name", "clip_name1", "clip_name2", "clip_name3", "image")


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_graph_for_a_released_model_lacks_nothing_but_its_files(comfy: Server, info: dict, path: Path) -> None:
    prompt = api(path.stem)
    with pytest.raises(PromptFailed) as refused:
        comfy.queue(prompt)
    assert refused.value.details["node_errors"], "ComfyUI says nothing of what is wrong"
    for node in refused.value.details["node_errors"].values():
        for fault in node["errors"]:
            kind, name = fault["type"], fault["extra_info"].get("input_name")
            assert kind in ("value_not_in_list", "custom_validation_failed"), fault
            if node["class_type"] == "DanceGRPO_LoadReward":
                assert (
                    f"(missing: put it at models/rewards/{fault['extra_info']['received_value']})" in fault["details"]
                )
            else:
                assert name in MISSING_FILES
    for node in prompt.values():
        for section in ("required", "optional"):
            for name, (kind, *_) in info[node["class_type"]]["input"].get(section, {}).items():
                source = node["inputs"].get(name)
                if isinstance(source, list):
                    given = info[prompt[source[0]]["class_type"]]["output"][source[1]]
                    assert kind == "*" or given in kind.split(","), (
                        f"{node['class_type']}.{name} is {kind} and gets {given}"
                    )
                elif section == "required":
                    assert name in node["inputs"]


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_size_and_steps_of_a_released_model_stand_in_one_place(path: Path) -> None:
    prompt, found = api(path.stem), {}
    names = {"width": "Width", "height": "Height", "frames": "Frames", "length": "Frames", "steps": "Steps"}
    for node in prompt.values():
        for name in names.keys() & node["inputs"].keys():
            value = node["inputs"][name]
            if isinstance(value, list):
                found.setdefault(names[name], set()).add(value[0])
            else:
                assert (name, value) == ("frames", 1), f"{node['class_type']}.{name} is {value}"
    assert {"Width", "Height", "Steps"} <= set(found)
    for title, sources in found.items():
        (source,) = sources
        assert (prompt[source]["class_type"], prompt[source]["_meta"]["title"]) == ("PrimitiveInt", title)
    fed = [node["class_type"] for node in prompt.values() if isinstance(node["inputs"].get("steps"), list)]
    assert {"DanceGRPO_Preset", "DanceGRPO_CompareLoRAs"} <= set(fed)


def test_graphs_are_what_the_script_writes(info: dict) -> None:
    written = build_workflows.files(info)
    assert len(written) == 2 * len(GRAPHS) == 40
    for path, content in written.items():
        assert (ROOT / "workflows" / path).read_text(encoding="utf-8") == content, f"{path}: run tools.build_workflows"


def only(prompt: dict, class_type: str) -> str:
    (key,) = [key for key, node in prompt.items() if node["class_type"] == class_type]
    return key


def pixels(comfy: Server, prompt: dict) -> np.ndarray:
    """The images that a graph's one SaveImage wrote, `[images, H, W, 3]` in 0 to 255."""
    output = comfy.run(prompt)[only(prompt, "SaveImage")]
    return np.array([np.asarray(Image.open(path).convert("RGB")).astype(int) for path in comfy.images(output)])


def least_difference(images: np.ndarray) -> int:
    """The largest difference of any pixel, of the two images that are most alike."""
    return min(np.abs(images[i] - images[j]).max() for i in range(len(images)) for j in range(i))


def test_what_eta_does(comfy: Server) -> None:
    prompt = api("20 What eta does")
    sampler = prompt[only(prompt, "DanceGRPO_SDESampler")]["inputs"]
    noisy = pixels(comfy, prompt)
    assert len(noisy) == 4
    sampler["kernel"] = "ode"
    plain = pixels(comfy, prompt)
    assert max(np.abs(plain[0] - other).max() for other in plain) <= 2  # without noise a group is one image
    assert least_difference(np.stack([plain[0], *noisy])) > 10
    sampler |= {"kernel": "cps", "eta": 0.9}
    assert least_difference(np.stack([*noisy, *pixels(comfy, prompt)])) > 10


def test_score_and_pick_the_best(comfy: Server) -> None:
    prompt = api("18 Score and pick the best of 16")
    best, score = only(prompt, "DanceGRPO_PickBest"), only(prompt, "DanceGRPO_ScoreImages")
    prompt["chosen"] = {"class_type": "PreviewAny", "inputs": {"source": [best, 1]}}
    prompt["scores"] = {"class_type": "PreviewAny", "inputs": {"source": [score, 0]}}
    outputs = comfy.run(prompt)
    scores = [float(text) for text in outputs["scores"]["text"]]
    assert len(scores) == 16
    assert [float(text) for text in outputs["chosen"]["text"]] == sorted(scores, reverse=True)[:4]
    assert min(scores) < max(scores)
    assert len(comfy.images(outputs[only(prompt, "SaveImage")])) == 4


def test_a_lora_early_or_late(comfy: Server) -> None:
    prompt = api("19 Use a LoRA early or late")
    limits = [node["inputs"] for node in prompt.values() if node["class_type"] == "DanceGRPO_ApplyLoRAOverSigmas"]
    assert [(node["start_percent"], node["end_percent"]) for node in limits] == [(0.0, 0.5), (0.5, 1.0)]
    (apart,) = pixels(comfy, prompt)
    for node in limits:
        node["strength"] = 0.0
    (base,) = pixels(comfy, prompt)
    early, late, plain, again = (row for grid in (apart, base) for row in (grid[4:124], grid[-124:-4]))
    assert np.abs(plain - again).max() <= 2, "two rows of the base model, from the same noise"
    assert least_difference(np.stack([early, late, plain])) > 10


# -------------------------------------------------------------------------------------------------------------- votes


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_a_graph_on_the_embedded_model_is_small_and_begins_with_its_note(path: Path) -> None:
    graph = json.loads(path.read_text())
    assert len(graph["nodes"]) <= 12
    assert graph["extra"]["ds"]["scale"] >= 0.75
    (note,) = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    assert note["pos"] == [min(node["pos"][axis] for node in graph["nodes"]) for axis in (0, 1)], "at the top left"
    assert 2 <= len(graph["groups"]) <= 3
    inside = [[n["id"] for n in graph["nodes"] if within(n, group["bounding"])] for group in graph["groups"]]
    assert sorted(sum(inside, [])) == sorted(node["id"] for node in graph["nodes"] if node is not note)
    assert all(group["title"] for group in graph["groups"])


def within(node: dict, box: list[float]) -> bool:
    (x, y), (width, height) = node["pos"], node["size"]
    left, top, wide, high = box
    return left <= x and top + 30 <= y - 30 and x + width <= left + wide and y + height <= top + high


@pytest.mark.parametrize("path", VOTES, ids=lambda path: path.stem)
def test_what_was_voted_on_is_trained_on(comfy: Server, path: Path) -> None:
    """The part that collects, votes over the routes by a rule (the darker image is better), then the whole graph."""
    prompt, name = api(path.stem), f"graph {path.stem.split()[0]}"
    for node in prompt.values():
        node["inputs"] |= {key: name for key, value in node["inputs"].items() if value == "my_votes"}
        if node["class_type"] == "DanceGRPO_Preset":
            node["inputs"]["overrides"] += "\nruntime.iterations=2"
    (collect,) = [key for key, node in prompt.items() if node["class_type"] == "DanceGRPO_CollectForVoting"]
    with pytest.raises(PromptFailed, match="no collection named|has 0 votes with a winner|at least 2 are needed"):
        comfy.run(prompt)
    comfy.run({key: prompt[key] for key in above(prompt, collect)})
    quoted = urllib.parse.quote(name)
    state = comfy.get(f"/dancegrpo/votes/{quoted}")
    assert (state["images"], state["prompts"]) == (128, 16)
    pair = comfy.get(f"/dancegrpo/votes/{quoted}/pair")["pair"]
    for _ in range(12):
        dark = {side: brightness(comfy, quoted, pair[side]["image"]) for side in ("left", "right")}
        body = {"id": pair["id"], "choice": min(dark, key=dark.get)}
        body |= {side: pair[side]["image"] for side in dark}
        pair = comfy.post(f"/dancegrpo/votes/{quoted}/vote", body)["pair"]
    outputs = comfy.run(prompt)
    (train,) = [key for key, node in prompt.items() if node["class_type"] == "DanceGRPO_TrainLoRA"]
    (data,) = outputs[train]["dancegrpo"]
    assert (data["state"], data["iteration"]) == ("finished", 2)
    assert data["lora_name"]
    log = (comfy.base / "output" / data["folder"] / "log.txt").read_text()
    assert f"12 votes of {name}" in log or f"12 pairs of {name}" in log
    shown = [key for key, node in prompt.items() if node["class_type"] in ("DanceGRPO_CompareLoRAs", "SaveImage")]
    assert comfy.images(outputs[shown[0]])[0].is_file()


def above(prompt: dict, key: str) -> set[str]:
    """A node and all that it depends on."""
    links = [value[0] for value in prompt[key]["inputs"].values() if isinstance(value, list)]
    return {key}.union(*(above(prompt, link) for link in links))


def brightness(comfy: Server, name: str, image: str) -> float:
    return np.asarray(Image.open(io.BytesIO(comfy.fetch(f"/dancegrpo/votes/{name}/images/{image}")))).mean()
