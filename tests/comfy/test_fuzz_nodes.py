"""Hostile values over every widget, every override and every route of a real server: sentences, and nothing is lost."""

import json
import random
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import hostile
import pytest
from comfy_host import PromptFailed, Server
from PIL import Image

from trainer.config import RunConfig, parse_config
from trainer.runs.directory import RunDirectory
from trainer.votes import store
from trainer.votes.records import Vote

WIDGETS, OVERRIDES, REQUESTS = 220, 80, 100
SOURCES = {
    "IMAGE": ("image", 0),
    "MODEL": ("demo", 0),
    "CLIP": ("demo", 1),
    "VAE": ("demo", 2),
    "SIGMAS": ("sigmas", 0),
    "CONDITIONING": ("text", 0),
    "REWARD": ("reward", 0),
    "GRPO_SETTINGS": ("settings", 0),
    "GRPO_MODEL": ("base", 0),
}
WORDS = {"prompt": "a fox", "batch": "images"}
BASE_WIDGETS = {"width": 64, "height": 64, "dtype": "float32", "vae_dtype": "float32", "gradient_checkpointing": False}
OTHERS = {
    "image": ("EmptyImage", {"width": 16, "height": 16, "batch_size": 2, "color": 0x808080}),
    "demo": ("DanceGRPO_DemoModel", {}),
    "sigmas": ("BasicScheduler", {"model": ["demo", 0], "scheduler": "simple", "steps": 3, "denoise": 1.0}),
    "text": ("CLIPTextEncode", {"clip": ["demo", 1], "text": "a red circle"}),
    "reward": ("DanceGRPO_LoadReward", {"reward": "brightness"}),
    "scores": ("DanceGRPO_ScoreImages", {"reward": ["reward", 0], "images": ["image", 0]} | WORDS),
    "settings": ("DanceGRPO_Preset", {"preset": "demo", "overrides": "runtime.iterations=1"}),
    # A folder that is not there: whatever the widgets say, no fuzzed graph may start hours of training.
    "base": ("DanceGRPO_BaseModel", {"folder": "(none in models/diffusers)", "family": "sd3"} | BASE_WIDGETS),
}
CORES_OWN = ("invalid_input_type", "value_not_in_list", "value_smaller_than_min", "value_bigger_than_max")
GIVEN = {"name": "mine", "prompt": "a red circle", "prompts": "a red circle", "lora_name": "dancegrpo/mine.safetensors"}
"""Values with which a node does its work, where its defaults do nothing."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose user has a run, a LoRA and a collection of votes, each named `mine`."""
    host = Server(tmp_path_factory.mktemp("fuzz"))
    output = host.base / "output"
    description = {"prompts": {"texts": ["a red circle"]}, "rewards": [{"name": "brightness"}]}
    run = RunDirectory(output / "dancegrpo" / "runs" / "mine").open(parse_config(description), [])
    run.write_status("stopped", iteration=0)
    run.release()
    lora = output / "loras" / "dancegrpo" / "mine.safetensors"
    lora.parent.mkdir(parents=True)
    weights = Path(__file__).resolve().parents[2] / "trainer/shapes/weights/lora.safetensors"
    lora.write_bytes(weights.read_bytes())
    collection = store.create(output / "dancegrpo" / "votes", "mine")
    names = collection.add((Image.new("RGB", (8, 8), (60 * i, 9, 9)), "a fox", "a test") for i in range(3)).names
    collection.record([Vote(names[0], names[1], "winner", "vote-1")])
    yield host.start()
    host.stop()


@pytest.fixture(scope="module")
def nodes(server: Server) -> dict[str, dict]:
    return {name: node for name, node in server.get("/object_info").items() if name.startswith("DanceGRPO_")}


def mine(base: Path) -> dict[Path, bytes]:
    """What the user made."""
    return {path: path.read_bytes() for path in (base / "output").rglob("*") if "mine" in str(path) and path.is_file()}


def lost(before: dict[Path, bytes], after: dict[Path, bytes]) -> list[Path]:
    """Files of the user that have gone or changed; images and votes may be added to a collection."""
    return [path for path, content in before.items() if not after.get(path, b"").startswith(content)]


def default(name: str, entry: list) -> object:
    """A value with which a node works; None where it needs none."""
    kind, options = entry[0], entry[1] if len(entry) > 1 else {}
    if name in GIVEN:
        return GIVEN[name]
    if kind in SOURCES:
        return list(SOURCES[kind])
    if name == "scores":
        return ["scores", 0]
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, list) else options.get("options", [])
    if choices:
        return choices[0]["key"] if isinstance(choices[0], dict) else choices[0]
    return {"INT": options.get("min", 1), "FLOAT": options.get("min", 0.0), "STRING": "", "BOOLEAN": False}.get(kind)


def inputs_of(node: dict, rng: random.Random) -> dict[str, list]:
    """A node's inputs, those of one choice of a dynamic combo included."""
    found = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    for name, entry in list(found.items()):
        if entry[0] == "COMFY_DYNAMICCOMBO_V3":
            choice = rng.choice(entry[1]["options"])
            found[name] = ["COMBO", {"options": [choice["key"]]}]
            parts = [*choice["inputs"].get("required", {}).items(), *choice["inputs"].get("optional", {}).items()]
            found |= {f"{name}.{part}": inner for part, inner in parts}
    return found


def prompt_for(kind: str, values: dict) -> dict:
    graph = {name: {"class_type": other, "inputs": dict(given)} for name, (other, given) in OTHERS.items()}
    graph["tested"] = {"class_type": kind, "inputs": values}
    graph["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["tested", 0]}}
    needed, pending = {"shown"}, ["shown"]
    while pending:
        links = [value[0] for value in graph[pending.pop()]["inputs"].values() if _is_link(value)]
        pending += [name for name in links if name in graph and name not in needed]
        needed |= set(links)
    return {name: node for name, node in graph.items() if name in needed}


def _is_link(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def assert_sentences(server: Server, prompt: dict, what: str) -> None:
    """A prompt runs, or is refused in words that are no traceback."""
    try:
        server.run(prompt, 60)
    except PromptFailed as failed:
        assert failed.faults or "error" in failed.details, what
        for fault in failed.faults:
            assert not hostile.traceback_in(fault.text), f"{what}: {fault.text[:500]}"
            assert not fault.kind.startswith("exception"), f"{what}: {fault}"  # in a node's own validation
            if fault.kind in CORES_OWN:  # core quotes the whole value
                continue
            assert len(fault.text) < 3_000, f"{what}: {fault.text[:500]}"
            if fault.input is None and fault.node == "tested" and isinstance(failed.details, list):
                assert fault.kind.rpartition(".")[2] in ("BadInput", "RunFailed"), f"{what}: {fault}"


def test_hostile_values_in_every_widget(server: Server, nodes: dict[str, dict]) -> None:
    rng, before, tried = random.Random(11), mine(server.base), set()
    order = sorted(nodes)
    for number in range(WIDGETS):
        kind = order[number % len(order)]
        entries = inputs_of(nodes[kind], rng)
        values = {name: default(name, entry) for name, entry in entries.items()}
        values = {name: value for name, value in values.items() if value is not None}
        if entries:
            name = rng.choice(sorted(entries))
            values[name] = hostile.value(rng)
            tried.add((kind, name))
        assert_sentences(server, prompt_for(kind, values), f"{kind} {name} = {str(values.get(name))[:60]!r}")
    assert {kind for kind, _ in tried} == {kind for kind in order if inputs_of(nodes[kind], rng)}
    assert lost(before, mine(server.base)) == []
    server.get("/system_stats")


def override_names() -> list[str]:
    found = []
    for section, field in RunConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        found += [f"{section}.{name}" for name in inner] if inner else [section]
    return [*found, *(f"objective.{name}" for name in ("name", "updates", "batch_size", "clip_range"))]


def test_hostile_values_in_every_override(server: Server, nodes: dict[str, dict]) -> None:
    rng, names = random.Random(12), override_names()
    assert len(names) > 50
    for number in range(OVERRIDES):
        value = hostile.value(rng)
        text = value if isinstance(value, str) else json.dumps(value)
        lines = f"{names[number % len(names)]}={text}"
        kind = rng.choice(["DanceGRPO_Settings", "DanceGRPO_Preset"])
        entries = inputs_of(nodes[kind], rng)
        values = {name: default(name, entry) for name, entry in entries.items()} | {"overrides": lines}
        assert_sentences(server, prompt_for(kind, values), lines[:100])
    server.get("/system_stats")


PATHS = [
    "/runs/{}",
    "/runs/{}/events",
    "/runs/{}/log",
    "/runs/{}/samples",
    "/runs/{}/samples/{}",
    "/votes/{}",
    "/votes/{}/pair",
    "/votes/{}/images/{}",
]
ACTIONS = [
    "/runs/{}/stop",
    "/runs/{}/publish",
    "/runs/{}/delete",
    "/deleted/{}/restore",
    "/votes/{}/create",
    "/votes/{}/undo",
    "/votes/mine/vote",
    "/votes/mine/import",
    "/votes/mine/undo",
    "/votes/{}/restore",
]


def ask(server: Server, path: str, body: bytes | None) -> tuple[int, bytes]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/dancegrpo{path}", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_hostile_requests_of_every_route(server: Server) -> None:
    rng, before = random.Random(13), mine(server.base)
    for number in range(REQUESTS):
        words = [str(hostile.value(rng))[:2_000].encode("utf-8", "replace") for _ in range(2)]
        is_change = number % 2
        path = rng.choice(ACTIONS if is_change else PATHS).format(
            *(urllib.parse.quote(word, safe="") for word in words)
        )
        if not is_change and rng.random() < 0.5:
            path += f"?after={urllib.parse.quote(words[0][:100])}&generation={rng.choice(['-1', 'x', '9' * 30])}"
        fields = ("left", "right", "choice", "id", "vote", "folder", "base", "better", "worse", "prompt")
        body = {field: hostile.value(rng, finite=True) for field in rng.sample(fields, 3)}
        status, content = ask(server, path, hostile.dump(body) if is_change else None)
        assert status < 500, f"{path} {str(body)[:300]}: {status} {content[:300]}"
        assert not hostile.traceback_in(content.decode(errors="replace"))
    assert lost(before, mine(server.base)) == []
    server.get("/system_stats")


def test_nothing_that_was_tried_left_a_traceback_of_the_pack_in_the_log(server: Server) -> None:
    assert "DanceGRPO: " not in server.output or " failed\n" not in server.output
    plain = re.sub(r"\x1b\[[0-9;]*m", "", server.output)
    for block in plain.split("Traceback (most recent call last)")[1:]:
        if "direct cause of the following exception" in block:
            continue  # the block after it is the exception that is raised
        last = [line for line in block.splitlines()[1:] if line and not line.startswith(" ")]
        kind = last[0].partition(":")[0] if last else ""
        own = f"custom_nodes/{Path(__file__).parents[2].name}/" in block or "/nodes/" in block
        assert not own or kind.rpartition(".")[2] in ("BadInput", "RunFailed"), block[:3_000]
