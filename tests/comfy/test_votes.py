"""Votes in ComfyUI: collected by a graph, cast by keyboard in a real browser and by programs over the routes."""

import concurrent.futures
import json
import math
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import PromptFailed, Server, open_panel, panels
from PIL import Image

from trainer.config import parse_config, preset
from trainer.runs.directory import RunDirectory
from trainer.runs.sample_grids import Sample, boxes, plain_grid, write_samples
from trainer.utils.media import read_image, save_image, to_pil_image
from trainer.votes import store
from trainer.votes.records import Vote

MARKUP = "<img src=x onerror=window.hacked=1>"
IMAGES = 12


def send(comfy: Server, path: str, body: dict | None = None, **headers: str) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(f"http://127.0.0.1:{comfy.port}/dancegrpo{path}", data=data, headers=headers)
    return urllib.request.urlopen(request, timeout=60).read()


def refused(comfy: Server, path: str, body: dict | None = None) -> str:
    with pytest.raises(urllib.error.HTTPError) as error:
        send(comfy, path, body)
    assert error.value.code == 400
    return json.loads(error.value.read())["error"]


def make_image(blue: float) -> torch.Tensor:
    """A light image with a square that is more or less blue."""
    image = torch.full((3, 64, 64), 0.9)
    image[:, 20:44, 20:44] = torch.tensor([1 - blue, 0.2, blue])[:, None, None]
    return image


def blueness(path: Path) -> float:
    red, _, blue = read_image(path)[:, 30, 30].tolist()
    return blue - red


@pytest.fixture(scope="module")
def root(comfy: Server) -> Path:
    return comfy.base / "output" / "dancegrpo" / "votes"


@pytest.fixture
def collection(root: Path) -> Iterator[store.Collection]:
    made = store.create(root, "by rule")
    made.add((to_pil_image(make_image(i / (IMAGES - 1))), MARKUP, "test") for i in range(IMAGES))
    yield made
    shutil.rmtree(made.folder)


def choice(collection: store.Collection, pair: dict) -> str:
    left, right = (blueness(collection.image_file(pair[side]["image"])) for side in ("left", "right"))
    return "left" if left > right else "right"


def vote(comfy: Server, collection: store.Collection, pair: dict) -> dict:
    body = {"id": pair["id"], "left": pair["left"]["image"], "right": pair["right"]["image"]}
    return comfy.post("/dancegrpo/votes/by%20rule/vote", {**body, "choice": choice(collection, pair)})


def test_a_graph_collects_images_once(comfy: Server, root: Path) -> None:
    graph = {
        "images": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 24, "batch_size": 1, "color": 255}},
        "collect": {
            "class_type": "DanceGRPO_CollectForVoting",
            "inputs": {"images": ["images", 0], "prompt": "a blue card", "name": "from a graph"},
        },
    }
    assert "1 of 1 images added" in comfy.run(graph)["collect"]["text"][0]
    graph["images"]["inputs"]["height"] = 32
    assert "1 of 1 images added" in comfy.run(graph)["collect"]["text"][0]
    items, complaints = store.find(root, "from a graph").items()
    assert [item.prompt for item in items] == ["a blue card"] * 2
    assert complaints == []
    graph["collect"]["inputs"]["name"] = "../elsewhere"
    with pytest.raises(PromptFailed, match="cannot be used"):
        comfy.run(graph)
    shutil.rmtree(root / "from a graph")


def test_a_reward_runs_in_an_api_graph_that_names_no_option(comfy: Server, info: dict, root: Path) -> None:
    """`preference` has a collection, a backbone and a dtype; all have defaults."""
    choices = info["DanceGRPO_LoadReward"]["input"]["required"]["reward"][1]["options"]
    assert {key for choice in choices for key in choice["inputs"].get("required", {})} == set()
    size = {"width": 64, "height": 64, "batch_size": 2, "color": 255}
    score = {"reward": ["reward", 0], "images": ["image", 0], "prompt": "a card", "batch": "images"}
    graph = {
        "reward": {"class_type": "DanceGRPO_LoadReward", "inputs": {"reward": "preference"}},
        "image": {"class_type": "EmptyImage", "inputs": size},
        "score": {"class_type": "DanceGRPO_ScoreImages", "inputs": score},
    }
    made = store.create(root, "my_votes")
    made.add((to_pil_image(make_image(i / (IMAGES - 1))), "a card", "test") for i in range(IMAGES))
    try:
        left, right, third, *_ = sorted(made.files())
        made.record([Vote(left, right, id="1"), Vote(right, third, id="2")])
        first, second = comfy.run(graph)["score"]["dancegrpo"][0]["scores"]
        assert math.isfinite(first) and first == pytest.approx(second)
        graph["reward"]["inputs"]["reward"] = "pickscore"
        with pytest.raises(PromptFailed, match=r"path 'pickscore/model.safetensors' is not in .* \(3.9 GB\)"):
            comfy.run(graph)
    finally:
        shutil.rmtree(made.folder)


def test_votes_over_the_routes_are_understood_and_can_be_taken_back(
    comfy: Server, collection: store.Collection
) -> None:
    pair = comfy.get("/dancegrpo/votes/by%20rule/pair")["pair"]
    for _ in range(30):
        answer = vote(comfy, collection, pair)
        pair = answer["pair"]
    assert answer["state"]["votes"] == {"winners": 30, "ties": 0, "skips": 0}
    assert answer["state"]["agreement"]["share"] > 0.8
    assert len({frozenset((one.better, one.worse)) for one in collection.vote_log().votes}) == 30, "no pair comes twice"
    again = vote(comfy, collection, pair)
    assert vote(comfy, collection, pair)["state"]["votes"] == again["state"]["votes"], "a repeated id counts once"
    assert comfy.post("/dancegrpo/votes/by%20rule/undo", {"id": "u1"})["undone"] == pair["id"]
    assert comfy.get("/dancegrpo/votes/by%20rule")["votes"]["winners"] == 30


def test_two_clients_vote_at_once_and_nothing_is_lost(comfy: Server, collection: store.Collection) -> None:
    names = sorted(collection.files())
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]][:40]

    def cast(number: int) -> None:
        left, right = pairs[number]
        body = {"id": f"v{number}", "left": left, "right": right, "choice": "tie"}
        comfy.post("/dancegrpo/votes/by%20rule/vote", body)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(cast, [*range(40), *range(40)]))
    assert collection.vote_log().counts() == {"winners": 0, "ties": 40, "skips": 0}
    assert collection.vote_log().complaints == []


def test_what_cannot_be_a_vote_is_refused(comfy: Server, collection: store.Collection) -> None:
    left, right, *_ = sorted(collection.files())
    good = {"id": "x", "left": left, "right": right, "choice": "left"}
    for change, says in [
        ({"choice": "up"}, "choose one of left, right, tie, skip"),
        ({"left": "../votes.csv"}, "not in the collection"),
        ({"right": left}, "two different images"),
        ({"id": "a b"}, "id"),
        ({"id": None}, "id"),
    ]:
        assert says in refused(comfy, "/votes/by%20rule/vote", {**good, **change})
    assert collection.vote_log().votes == []
    assert "no collection named" in refused(comfy, "/votes/nowhere/vote", good)
    assert "not inside ComfyUI's output folder" in refused(comfy, "/votes/new/import", {"folder": "../models"})
    assert "choose output or input" in refused(comfy, "/votes/new/import", {"base": "/", "folder": "etc"})


def dpo(collection: str, by: str = "node", **inputs: object) -> dict:
    """A training graph that takes its objective from the node, or from the overrides of a preset."""
    given = {"objective": "dpo", "objective.collection": collection}
    overrides = f"objective={json.dumps({'name': 'dpo', 'collection': collection})}" if by == "overrides" else ""
    graph = {
        "model": ("DemoModel", {}),
        "objective": ("Objective", given),
        "settings": ("Preset", {"preset": "demo", "overrides": overrides}),
        "reward": ("LoadReward", {"reward": "brightness"}),
        "train": (
            "TrainLoRA",
            {"grpo_model": ["model", 3], "settings": ["settings", 0], "name": "pairs", "prompts": "", "wait": True}
            | {"processes": 1}
            | ({"objective": ["objective", 0]} if by == "node" else {})
            | inputs,
        ),
    }
    return {key: {"class_type": f"DanceGRPO_{kind}", "inputs": values} for key, (kind, values) in graph.items()}


@pytest.mark.parametrize("by", ["node", "overrides"])
@pytest.mark.parametrize("name", ["/etc", "../votes", "..", "a/b", "C:\\x", "nowhere"])
def test_a_graph_names_a_collection_and_never_a_path(comfy: Server, by: str, name: str) -> None:
    with pytest.raises(PromptFailed, match="collection.* cannot be used|no collection named"):
        comfy.run(dpo(name, by))
    assert not (comfy.base / "output" / "dancegrpo" / "runs" / "pairs").exists()


def test_what_does_not_go_with_pairs_is_one_sentence_on_the_node(comfy: Server, collection: store.Collection) -> None:
    left, right, third, *_ = sorted(collection.files())
    for graph, says in [
        (dpo("by rule"), "there are 0 pairs of by rule: at least 2 are needed"),
        (dpo("by rule", prompts="a circle"), "the objective trains on the prompts of its collection: clear prompts"),
        (dpo("by rule", reward=["reward", 0]), "disconnect it, or connect it to evaluation_rewards"),
        (dpo("", prompts="a circle"), "reward is not connected: only objective dpo with a collection trains without"),
    ]:
        if "0 pairs" not in says:
            collection.record([Vote(left, right, id="1"), Vote(right, third, id="2")])
        with pytest.raises(PromptFailed) as failed:
            comfy.run(graph)
        (fault,) = failed.value.faults
        assert fault.node == "train"
        assert says in fault.text


@pytest.mark.parametrize("name", ["..", "..%2Fx", "%2Fetc", "a%2Fb", "C:%5Cx", "x%00", "a%E2%80%AEb", "CON", "a" * 300])
def test_collection_names_lead_nowhere_else(comfy: Server, name: str) -> None:
    before = sorted(comfy.base.rglob("*"))
    for path, body in [("", None), ("/create", {}), ("/import", {"folder": "x"}), ("/export", {}), ("/delete", {})]:
        with pytest.raises(urllib.error.HTTPError) as error:
            send(comfy, f"/votes/{name}{path}", body)
        assert error.value.code in (400, 404, 405)
        error.value.read()
    assert sorted(comfy.base.rglob("*")) == before


def test_votes_of_another_site_s_page_are_refused(comfy: Server, collection: store.Collection) -> None:
    left, right, *_ = sorted(collection.files())
    body = {"id": "x", "left": left, "right": right, "choice": "left"}
    for headers in ({"Origin": "http://example.com"}, {"Sec-Fetch-Site": "cross-site"}, {"Content-Type": "text/plain"}):
        with pytest.raises(urllib.error.HTTPError) as error:
            send(comfy, "/votes/by%20rule/vote", body, **headers)
        assert error.value.code in (400, 403)
    assert collection.vote_log().votes == []


def test_an_image_of_a_hundred_megapixels_is_left_out_with_a_sentence(comfy: Server, root: Path) -> None:
    folder = comfy.base / "input" / "large"
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("1", (12_000, 9_000)).save(folder / "large.png")
    save_image(folder / "small.png", to_pil_image(make_image(0.5)))
    answer = comfy.post("/dancegrpo/votes/sizes/import", {"base": "input", "folder": "large"})
    assert answer["message"] == "1 images added, 0 already in the collection, 1 files skipped"
    assert "large.png has 12000 x 9000 pixels: at most 67 million" in answer["warnings"][0]
    shutil.rmtree(root / "sizes")


def test_a_corrupt_line_costs_that_line_alone(comfy: Server, collection: store.Collection) -> None:
    left, right, *_ = sorted(collection.files())
    comfy.post("/dancegrpo/votes/by%20rule/vote", {"id": "a", "left": left, "right": right, "choice": "left"})
    with collection.votes_file.open("ab") as file:
        file.write(b"\xff\xfe,broken\n")
    comfy.post("/dancegrpo/votes/by%20rule/vote", {"id": "b", "left": right, "right": left, "choice": "tie"})
    state = comfy.get("/dancegrpo/votes/by%20rule")
    assert (state["votes"]["winners"], state["votes"]["ties"]) == (1, 1)
    assert len(state["warnings"]) == 1


def test_links_and_folders_elsewhere_stay_outside(comfy: Server, collection: store.Collection, root: Path) -> None:
    secret = root.parent / "secret.png"
    save_image(secret, to_pil_image(make_image(0.5)))
    (collection.images / "link.png").symlink_to(secret)
    assert "link.png" not in {item.image for item in collection.items()[0]}
    assert "not in the collection" in refused(comfy, "/votes/by%20rule/images/link.png")
    folder = comfy.base / "output" / "shown"
    folder.mkdir(exist_ok=True)
    save_image(folder / "one.png", to_pil_image(make_image(0.3)))
    assert "1 images added" in comfy.post("/dancegrpo/votes/imported/import", {"folder": "shown"})["message"]
    comfy.post("/dancegrpo/votes/imported/delete", {})
    assert "imported" not in store.names(root)
    comfy.post("/dancegrpo/votes/imported/restore", {})
    assert len(store.find(root, "imported").files()) == 1


# ------------------------------------------------------------------------------------------------------- in a browser


def test_forty_votes_are_cast_by_keyboard(comfy: Server, collection: store.Collection) -> None:
    with panels(comfy) as (page,):
        open_votes(page)
        assert page.get_by_label("collection", exact=True).input_value() == "by rule"
        cast_by_keyboard(page, collection, 40)
        assert "predicts" in page.locator(".dg-vote-state").inner_text(), "agreement with votes left out"
        page.keyboard.press("u")
        page.wait_for_function("document.querySelector('.dg-vote-state').textContent.startsWith('39 votes')")
        page.wait_for_function(f"document.querySelectorAll('.dg-choice img').length === 2 && {IDLE}")
        page.keyboard.press("s")
        page.wait_for_function("document.querySelector('.dg-vote-state').textContent.includes('1 skipped')")
        assert page.evaluate("window.hacked") is None
        assert MARKUP in page.locator(".dg-stage").inner_text()
    assert collection.vote_log().counts() == {"winners": 39, "ties": 0, "skips": 1}
    assert comfy.get("/dancegrpo/votes/by%20rule")["agreement"]["share"] > 0.8


def test_two_browsers_vote_at_once_and_a_reload_in_the_middle_loses_nothing(
    comfy: Server, collection: store.Collection
) -> None:
    with panels(comfy, count=2) as pages:
        for page in pages:
            open_votes(page)
        for number in range(10):
            page, other = pages[number % 2], pages[1 - number % 2]
            page.keyboard.press("ArrowLeft")
            other.keyboard.press("ArrowRight")  # while the first vote is on its way
            wait_for(lambda: len(collection.vote_log().votes) == 2 * number + 2)  # noqa: B023
            for one in pages:
                one.wait_for_function(f"document.querySelectorAll('.dg-choice img').length === 2 && {IDLE}")
            if number == 4:
                pages[0].keyboard.press("ArrowDown")
                open_panel(pages[0], comfy)  # before the answer came
                wait_for(lambda: len(collection.vote_log().votes) in (10, 11))
                collection.undo("reload") if len(collection.vote_log().votes) == 11 else None
                open_votes(pages[0])
    vote_log = collection.vote_log()
    assert len(vote_log.votes) == 20
    assert vote_log.complaints == []
    assert len({one.id for one in vote_log.votes}) == 20, "nothing counts twice"


def test_a_server_that_is_killed_between_two_votes_has_lost_none(tmp_path: Path) -> None:
    """In a server of its own: killed without warning, started again, and voted on."""
    server = Server(tmp_path).start()
    try:
        made = store.create(tmp_path / "output" / "dancegrpo" / "votes", "by rule")
        made.add((to_pil_image(make_image(i / (IMAGES - 1))), "a card", "test") for i in range(IMAGES))
        pair = server.get("/dancegrpo/votes/by%20rule/pair")["pair"]
        for _ in range(3):
            last, pair = pair, vote(server, made, pair)["pair"]
        server.kill()
        assert made.vote_log().counts()["winners"] == 3
        server.start()
        assert server.get("/dancegrpo/votes/by%20rule")["votes"]["winners"] == 3
        assert vote(server, made, last)["state"]["votes"]["winners"] == 3, "sent again, since no answer came: once"
        assert vote(server, made, pair)["state"]["votes"]["winners"] == 4
    finally:
        server.kill()


def test_the_votes_view_works_on_a_window_of_a_phone(comfy: Server, collection: store.Collection) -> None:
    with panels(comfy, width=400, height=800, has_touch=True) as (page,):
        open_votes(page)
        page.get_by_role("button", name="Large").click()
        page.wait_for_selector(".dg-overlay .dg-choice img")
        width = page.evaluate("document.querySelector('.dg-overlay').scrollWidth")
        assert width <= 400, "nothing is cut off at the side"
        page.locator(".dg-overlay .dg-choice").first.tap()
        wait_for(lambda: collection.vote_log().counts()["winners"] == 1)


def test_a_run_s_samples_are_sent_to_votes_from_the_panel(comfy: Server, root: Path) -> None:
    run = make_run(comfy.base / "output" / "dancegrpo" / "runs", "to vote on")
    try:
        with panels(comfy) as (page,):
            page.locator("[data-run='to vote on']").click()
            page.get_by_role("tab", name="Samples").click()
            page.get_by_label("collection name").fill("next round")
            page.get_by_role("button", name="Add to votes").click()
            wait_for(lambda: "next round" in store.names(root))
            wait_for(lambda: len(store.find(root, "next round").items()[0]) == 4)
        made = store.find(root, "next round")
        assert {item.prompt for item in made.items()[0]} == {"a red circle"}
        answer = comfy.post("/dancegrpo/votes/next%20round/import", {"run": "to vote on", "iteration": 3})
        assert answer["message"] == "0 images of run to vote on added to next round, 4 already in it"
        for body, says in [
            ({"run": "../x"}, "cannot be used"),
            ({"run": "nobody"}, "no run named"),
            ({"run": 5}, "not text"),
            ({"run": "to vote on", "kind": "../x"}, "choose one of rollout, evaluation"),
            ({"run": "to vote on", "iteration": -1}, "it must be a whole number, 0 or more"),
            ({"run": "to vote on", "iteration": 9}, "no rollout samples at iteration 9: choose one of 3"),
        ]:
            assert says in refused(comfy, "/votes/next%20round/import", body)
    finally:
        shutil.rmtree(run.path)
        shutil.rmtree(root / "next round", ignore_errors=True)


def make_run(folder: Path, name: str) -> RunDirectory:
    """A run directory with an image of four samples."""
    config = parse_config(preset("demo"))
    run = RunDirectory(folder / name).open(config, ["test"])
    run.write_status("finished", iteration=4, iterations=4)
    run.release()
    images = torch.stack([make_image(i / 3) for i in range(4)])
    file = run.path / "samples" / "rollout_000003.png"
    save_image(file, plain_grid(images, 4, 96))
    places = boxes(4, 4, 64, 64)
    write_samples(file, [Sample("a red circle", str(i), {}, box) for i, box in enumerate(places)])
    return run


def open_votes(page: Any) -> None:
    page.get_by_role("tab", name="Votes").click()
    page.wait_for_selector(".dg-choice img")


def wait_for(condition: Callable[[], bool], patience: float = 60) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def cast_by_keyboard(page: Any, collection: store.Collection, count: int) -> None:
    """Vote by the rule with the arrow keys; each vote is on disk when the next pair is shown."""
    shown = ""
    for number in range(1, count + 1):
        page.wait_for_function(f"{SHOWN} && {SHOWN} !== {json.dumps(shown)}")
        shown = page.evaluate(SHOWN)
        left, right = (blueness(collection.image_file(name)) for name in shown.split())
        page.keyboard.press("ArrowLeft" if left > right else "ArrowRight")
        page.wait_for_function(f"document.querySelector('.dg-vote-state').textContent.startsWith('{number} vote')")
        assert collection.vote_log().counts()["winners"] == number


SHOWN = "[...document.querySelectorAll('.dg-choice img')].map((i) => i.src.split('/').pop()).join(' ')"
IDLE = "document.querySelector('.dg-stage').getAttribute('aria-busy') !== 'true'"
"""No request is on its way, so keys are taken."""
