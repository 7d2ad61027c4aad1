"""The pack in a real ComfyUI: how it loads, what it shows, and what it says to bad input."""

import ast
import re
import urllib.parse

import pytest
from comfy_host import PACK, ROOT, PromptFailed, Server

NODE_IDS = re.findall(r'node_id="(DanceGRPO_\w+)"', "".join(p.read_text() for p in (ROOT / "nodes").glob("*.py")))


@pytest.fixture(scope="module")
def info(comfy: Server) -> dict:
    return comfy.get("/object_info")


def test_it_loads_fast_and_without_a_warning(comfy: Server) -> None:
    seconds = re.search(rf"([\d.]+) seconds(?: \(IMPORT FAILED\))?: .*{PACK}", comfy.output)
    assert seconds, comfy.output
    assert "IMPORT FAILED" not in comfy.output
    assert "Error while calling comfy_entrypoint" not in comfy.output
    assert float(seconds.group(1)) < 0.5
    start = comfy.output[: comfy.output.index("To see the GUI go to")]
    own = [line for line in start.splitlines() if re.search("WARNING|ERROR|Traceback", line)]
    assert [line for line in own if "User settings" not in line and "--multi-user" not in line] == []


def test_every_node_is_there_with_words_for_everything(info: dict) -> None:
    assert len(NODE_IDS) >= 9
    for name in NODE_IDS:
        node = info[name]
        assert node["category"].startswith("DanceGRPO")
        assert node["description"]
        assert node["search_aliases"]
        for section in node["input"].values():
            for key, entry in section.items():
                widget = isinstance(entry[0], str) and entry[0] in ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN")
                obvious = key.split("_")[0] in ("strength", "k", "threshold", "weight")
                assert not widget or obvious or entry[1].get("tooltip"), f"{name}.{key} has no tooltip"


@pytest.mark.parametrize("name", NODE_IDS)
def test_help_pages_are_served(comfy: Server, name: str) -> None:
    page = comfy.fetch(f"/extensions/{PACK}/docs/{name}.md").decode()
    assert page.startswith("# ")
    assert len(page) > 200


def test_templates_are_listed_and_served_with_their_pictures(comfy: Server) -> None:
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
    assert "prompt has 2 lines for 3 images: give one line for all, or one for each" in text


def test_an_unknown_reward_is_refused(comfy: Server) -> None:
    assert "reward" in refusal(comfy, scoring(reward__reward="../../secret"))


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
    assert "not in" in refusal(comfy, prompt)
    prompt["lora"]["inputs"] |= {"lora_name": "(from the lora socket)", "start_percent": 0.9}
    assert "the start below the end" in refusal(comfy, prompt)
