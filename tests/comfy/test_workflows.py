"""The example workflows: each as it is saved for the interface, and its twin run over the API."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from comfy_host import ROOT, PromptFailed, Server
from PIL import Image

GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")


def api(name: str) -> dict:
    return json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())


def typed(sections: dict, values: Iterator, prefix: str = "") -> dict[str, object]:
    """What the interface has saved of a node's widgets, taken from `values` in its order."""
    found = {}
    for section in ("required", "optional"):
        for name, (kind, *rest) in sections.get(section, {}).items():
            options = rest[0] if rest else {}
            if (isinstance(kind, str) and kind not in WIDGET_TYPES) or options.get("forceInput"):
                continue
            found[prefix + name] = value = next(values)
            if options.get("control_after_generate"):
                next(values)
            if kind == "COMFY_DYNAMICCOMBO_V3":
                (chosen,) = [option for option in options["options"] if option["key"] == value]
                found |= typed(chosen["inputs"], values, f"{prefix}{name}.")
    return found


def as_prompt(graph: dict, info: dict) -> dict:
    """What the interface sends for a saved graph."""
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        values = iter(node["widgets_values"])
        inputs = typed(info[node["type"]]["input"], values)
        assert list(values) == []
        inputs |= {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_a_graph_and_its_twin_say_the_same(comfy: Server, path: Path) -> None:
    if not (ROOT / "workflows" / "api" / path.name).is_file():
        pytest.fail(f"{path.name} has no twin in workflows/api")
    twin = {key: {k: node[k] for k in ("class_type", "inputs")} for key, node in api(path.stem).items()}
    assert as_prompt(json.loads(path.read_text()), comfy.get("/object_info")) == twin


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_a_graph_is_tidy(path: Path) -> None:
    graph = json.loads(path.read_text())
    boxes = [(*node["pos"], *node["size"]) for node in graph["nodes"]]
    title = 30  # above a node's position
    for i, (x, y, width, height) in enumerate(boxes):
        for u, v, w, h in boxes[:i]:
            assert x >= u + w or u >= x + width or y - title >= v + h or v - title >= y + height
    notes = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    assert any("**For a real model:**" in note for note in notes)
    slots = {(node["id"], i): slot for node in graph["nodes"] for i, slot in enumerate(node["inputs"])}
    sources = {(node["id"], i): slot for node in graph["nodes"] for i, slot in enumerate(node["outputs"])}
    for number, source, out, target, into, kind in graph["links"]:
        assert slots[target, into]["link"] == number
        assert number in sources[source, out]["links"]
        assert sources[source, out]["type"] == kind


# ------------------------------------------------------------------------------------------- graphs of released models


def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", ROOT / "workflows" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_graphs_of_released_models_are_what_the_script_writes(comfy: Server) -> None:
    for path, content in builder().files(comfy.get("/object_info")).items():
        assert (ROOT / "workflows" / path).read_text() == content, f"{path}: python workflows/build.py URL"


def test_graphs_of_released_models_want_for_nothing_but_their_files(comfy: Server) -> None:
    models = builder().MODELS
    assert len(models) == 12
    for model in models:
        for file, folder in model.files.items():
            place = comfy.base / "models" / folder / file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
    picture = comfy.base / "input" / "example.png"
    picture.parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(picture)
    for model in models:
        with pytest.raises(PromptFailed) as failed:
            comfy.run(api(model.name))
        # Not refused as a prompt: its first loader finds an empty file.
        (error,) = [body for kind, body in failed.value.details if kind == "execution_error"]
        assert "Loader" in error["node_type"]
        assert "header" in error["exception_message"]


def saved(comfy: Server, prompt: dict, outputs: dict) -> Path:
    (key,) = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    (path,) = comfy.images(outputs[key])
    return path


def cells(path: Path, rows: int, columns: int) -> np.ndarray:
    """The pictures of a grid, `[rows, columns, H, W, 3]` in 0 to 255, without gaps and edges."""
    picture, gap, edge = np.asarray(Image.open(path).convert("RGB")).astype(int), 4, 4
    height, width = (picture.shape[0] + gap) // rows, (picture.shape[1] + gap) // columns
    cut = [
        [picture[r * height : (r + 1) * height - gap, c * width : (c + 1) * width - gap] for c in range(columns)]
        for r in range(rows)
    ]
    return np.array(cut)[:, :, edge:-edge, edge:-edge]


def difference(first: np.ndarray, second: np.ndarray) -> int:
    """The largest of any pixel."""
    return np.abs(first - second).max()


def test_the_cells_of_a_grid_are_found(tmp_path: Path) -> None:
    values = np.arange(6).reshape(2, 3)
    picture = np.full((2 * 20 + 4, 3 * 30 + 8, 3), 255, np.uint8)
    for r, c in np.ndindex(2, 3):
        picture[r * 24 : r * 24 + 20, c * 34 : c * 34 + 30] = values[r, c]
    Image.fromarray(picture).save(tmp_path / "grid.png")
    found = cells(tmp_path / "grid.png", 2, 3)
    assert found.shape == (2, 3, 12, 22, 3)
    assert (found == values[:, :, None, None, None]).all()


def test_what_eta_does(comfy: Server) -> None:
    prompt = api("1 What eta does")
    grid = cells(saved(comfy, prompt, comfy.run(prompt)), 6, 4)
    assert max(difference(grid[0, 0], other) for other in grid[0]) <= 2  # without noise a group is one image
    images = [grid[0, 0], *grid[1:].reshape(-1, *grid.shape[2:])]
    assert min(difference(images[i], images[j]) for i in range(len(images)) for j in range(i)) > 10


def test_score_and_pick_the_best(comfy: Server) -> None:
    prompt = api("2 Score and pick the best of 16")
    (best,) = [key for key, node in prompt.items() if node["class_type"] == "DanceGRPO_PickBest"]
    (score,) = [key for key, node in prompt.items() if node["class_type"] == "DanceGRPO_ScoreImages"]
    prompt["chosen"] = {"class_type": "PreviewAny", "inputs": {"source": [best, 1]}}
    prompt["scores"] = {"class_type": "PreviewAny", "inputs": {"source": [score, 0]}}
    outputs = comfy.run(prompt)
    scores = [float(text) for text in outputs["scores"]["text"]]
    assert len(scores) == 16
    assert [float(text) for text in outputs["chosen"]["text"]] == sorted(scores, reverse=True)[:4]
    best = cells(saved(comfy, prompt, outputs), 1, 4)[0]
    assert min(difference(best[i], best[j]) for i in range(4) for j in range(i)) > 10


def test_a_lora_early_or_late(comfy: Server) -> None:
    prompt = api("4 Use a LoRA early or late")
    outputs = comfy.run(prompt)
    grid = cells(saved(comfy, prompt, outputs), 4, 8)
    assert min(difference(grid[i], grid[j]) for i in range(4) for j in range(i)) > 10
    means = {
        prompt[key]["_meta"]["title"]: float(output["text"][0].splitlines()[-1].split(",")[0].removeprefix("mean "))
        for key, output in outputs.items()
        if prompt[key]["class_type"] == "DanceGRPO_ScoreImages"
    }
    assert means["Score: LoRA all the way"] > means["Score: Base model"]
