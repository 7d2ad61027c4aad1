"""The sidebar panel and its routes, on the real server and in a real browser."""

import json
import math
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Server, panels
from PIL import Image
from safetensors.torch import save_file

from trainer.config import parse_config, preset
from trainer.runs.directory import RunDirectory
from trainer.runs.events import add_evaluation
from trainer.runs.sample_grids import Sample, write_samples

LONG = 20_000
LORAS = ("panel a_6_high", "panel a_6_low", "panel a_12_high", "panel a_12_low", "panel a_b_12", "panel b_5")
"""Of "panel a", which has trained two networks, of "panel a_b" and of "panel b"; the last are the newest."""
MARKUP = "<img src=x onerror=window.hacked=1>"


def event(iteration: int, total: int) -> dict:
    """An iteration's event as the trainer writes it."""
    done = iteration / total
    return {
        "iteration": iteration,
        "rewards": {"shapes": {"mean": 0.6 + 0.2 * done, "std": 0.2, "group_std": 0.1}},
        "objective": {"ratio": {"mean_deviation": 1e-5 * done}, "clip_fraction": 0.2 + math.sin(iteration) / 10},
        "grad_norm": 0.5 + math.cos(iteration) / 10,
        "seconds": {"rollout": 1.0, "update": 1.0 + done, "total": 2.0 + done},
        "memory_mb": 1500.0,
    }


def make_run(folder: Path, name: str, iterations: int, state: str = "finished") -> RunDirectory:
    """A run directory as a run of the demo preset leaves it, without its weights."""
    config = parse_config(preset("demo"), [f"runtime.iterations={iterations}"])
    run = RunDirectory(folder / name).open(config, ["test"])
    lines = (json.dumps(event(i + 1, iterations)) + "\n" for i in range(iterations))
    (run.path / "events.jsonl").write_text("".join(lines))
    for at in (0, iterations):
        add_evaluation(
            run.path / "evaluations.jsonl", {"iteration": at, "rewards": {"shapes": 0.6 + at / iterations / 5}}
        )
    run.write_status(state, iteration=iterations, iterations=iterations, error=MARKUP if state == "failed" else None)
    (run.path / "log.txt").write_text(f"first line {MARKUP}\n")
    run.release()
    return run


@pytest.fixture(scope="module")
def runs(comfy: Server) -> Iterator[Path]:
    folder = comfy.base / "output" / "dancegrpo" / "runs"
    made = [make_run(folder, "panel a", 12), make_run(folder, "panel b", 5, "failed")]
    loras = comfy.base / "output" / "loras" / "dancegrpo"
    loras.mkdir(parents=True, exist_ok=True)
    files = [loras / f"{name}.safetensors" for name in LORAS]
    for number, file in enumerate(files):
        file.touch()
        os.utime(file, (1e9 + number, 1e9 + number))
    yield folder
    for run in made:
        shutil.rmtree(run.path, ignore_errors=True)
    for file in files:
        file.unlink()


def lora_names(*stems: str) -> list[str]:
    """As ComfyUI lists them."""
    return [os.path.join("dancegrpo", f"{stem}.safetensors") for stem in stems]  # noqa: PTH118


def refusal(comfy: Server, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    """Status and sentence of a refused request; a POST where there is a body."""
    data = None if body is None else (body if isinstance(body, bytes) else json.dumps(body).encode())
    given = {"Content-Type": "application/json"} if data is not None else {}
    request = urllib.request.Request(f"http://127.0.0.1:{comfy.port}{path}", data=data, headers=given | headers)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    text = error.value.read()
    return error.value.code, json.loads(text)["error"] if text else ""


def test_runs_their_events_and_their_log_are_data(comfy: Server, runs: Path) -> None:
    listed = {run["name"]: run for run in comfy.get("/dancegrpo/runs")["runs"]}
    assert listed["panel a"]["state"] == "finished"
    assert listed["panel a"]["iteration"] == listed["panel a"]["iterations"] == 12
    assert listed["panel b"]["error"] == MARKUP
    detail = comfy.get("/dancegrpo/runs/panel%20a")
    assert [one["iteration"] for one in detail["evaluations"]] == [0, 12]
    assert detail["memory_mb"] == 1500.0
    assert detail["lora_names"] == lora_names("panel a_12_high", "panel a_12_low")
    whole = comfy.get("/dancegrpo/runs/panel%20a/events")
    assert [one["iteration"] for one in whole["events"]] == list(range(1, 13))
    later = comfy.get(f"/dancegrpo/runs/panel%20a/events?after=10&generation={whole['generation']}")
    assert [one["iteration"] for one in later["events"]] == [11, 12]
    assert comfy.get("/dancegrpo/runs/panel%20a/log?offset=6")["text"] == f"line {MARKUP}\n"
    assert "preset" not in comfy.get("/dancegrpo/runs/panel%20a/description")["text"]


def test_a_rewritten_log_is_sent_anew(comfy: Server, runs: Path) -> None:
    run = make_run(runs, "panel c", 8)
    first = comfy.get("/dancegrpo/runs/panel%20c/events")
    (run.path / "events.jsonl").write_text("".join(json.dumps(event(i + 1, 8)) + "\n" for i in range(3)))
    again = comfy.get(f"/dancegrpo/runs/panel%20c/events?after=8&generation={first['generation']}")
    assert again["generation"] != first["generation"]
    assert [one["iteration"] for one in again["events"]] == [1, 2, 3]
    shutil.rmtree(run.path)


def test_a_long_run_is_thinned_and_followed(comfy: Server, runs: Path) -> None:
    run = make_run(runs, "panel long", LONG)
    answer = comfy.get("/dancegrpo/runs/panel%20long/events")
    numbers = [one["iteration"] for one in answer["events"]]
    assert (numbers[0], numbers[-1], len(numbers)) == (1, LONG, 1000)
    with (run.path / "events.jsonl").open("a") as log:
        log.write(json.dumps(event(LONG + 1, LONG)) + "\n")
    later = comfy.get(f"/dancegrpo/runs/panel%20long/events?after={LONG}&generation={answer['generation']}")
    assert [one["iteration"] for one in later["events"]] == [LONG + 1]
    shutil.rmtree(run.path)


def test_the_lora_of_a_run_that_nobody_waited_for_is_put_into_the_list(comfy: Server, runs: Path) -> None:
    run = make_run(runs, "panel e", 3)
    path = "/dancegrpo/runs/panel%20e"
    assert not comfy.get(path)["can_publish"]
    assert "has no LoRA" in refusal(comfy, f"{path}/publish", {})[1]
    metadata = {"dancegrpo": json.dumps({"iteration": 3})}
    save_file({"x": torch.zeros(1)}, run.lora_file, metadata)
    assert comfy.get(path)["can_publish"]
    answer = comfy.post(f"{path}/publish", {})
    assert answer["lora_names"] == comfy.get(path)["lora_names"] == lora_names("panel e_3")
    assert not comfy.get(path)["can_publish"]
    file = comfy.base / "output" / "loras" / answer["lora_names"][0]
    assert file.read_bytes() == run.lora_file.read_bytes()
    file.unlink(), shutil.rmtree(run.path)


def test_a_deleted_run_lies_in_the_bin_and_comes_back(comfy: Server, runs: Path) -> None:
    run = make_run(runs, "panel d", 3)
    comfy.post("/dancegrpo/runs/panel%20d/delete", {})
    assert not run.path.exists()
    assert "panel d" in comfy.get("/dancegrpo/runs")["deleted"]
    assert "no run named" in refusal(comfy, "/dancegrpo/runs/panel%20d")[1]
    comfy.post("/dancegrpo/deleted/panel%20d/restore", {})
    assert len(comfy.get("/dancegrpo/runs/panel%20d/events")["events"]) == 3
    shutil.rmtree(run.path)


@pytest.mark.parametrize("name", ["..", "..%2F..", "%2Fetc", "a%2Fb", "CON", "x%00", "%E2%80%AE", "a" * 300])
def test_names_lead_nowhere_else(comfy: Server, name: str) -> None:
    for path in (f"/dancegrpo/runs/{name}/log", f"/dancegrpo/runs/panel%20a/samples/{name}"):
        try:
            code, sentence = refusal(comfy, path)
        except json.JSONDecodeError:  # aiohttp itself knows no such route
            continue
        assert code == 400
        assert "\n" not in sentence
    assert refusal(comfy, f"/dancegrpo/deleted/{name}/restore", {})[0] in (400, 404) if "%2F" not in name else True


def test_links_out_of_the_folder_are_no_images(comfy: Server, runs: Path) -> None:
    (runs / "panel a" / "samples").mkdir(exist_ok=True)
    secret = runs.parent / "secret.png"
    secret.write_bytes(b"secret")
    (runs / "panel a" / "samples" / "rollout_000001.png").symlink_to(secret)
    assert "no sample image" in refusal(comfy, "/dancegrpo/runs/panel%20a/samples/rollout_000001.png")[1]


def test_changes_need_a_request_of_this_server(comfy: Server, runs: Path) -> None:
    stop = "/dancegrpo/runs/panel%20a/stop"
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://example.com"}):
        assert refusal(comfy, stop, {}, **headers)[0] in (400, 403)
    assert "Content-Type application/json" in refusal(comfy, stop, {}, **{"Content-Type": "text/plain"})[1]
    assert "not a JSON object" in refusal(comfy, stop, [1])[1]
    assert "not JSON" in refusal(comfy, stop, b"{")[1]
    assert "larger than" in refusal(comfy, stop, {"text": "a" * 1_000_001})[1]
    assert "not running" in comfy.post(stop, {})["message"]
    assert "not running" in comfy.post(stop, {"text": "a" * 900_000})["message"], "a body that arrives in pieces"


# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def page(comfy: Server, runs: Path) -> Iterator[Any]:
    with panels(comfy) as (page,):
        yield page


def test_the_panel_lists_runs_and_opens_one(page: Any) -> None:
    page.locator("[data-run='panel a']").click()
    page.wait_for_selector(".dg-chart svg polyline")
    titles = page.locator(".dg-chart-title").all_inner_texts()
    assert titles[0] == "shapes"
    assert {"ratio mean deviation", "clip fraction", "gradient norm", "seconds per iteration"} <= set(titles)
    assert page.locator(".dg-run-head h3").inner_text() == "panel a"
    page.get_by_role("tab", name="Log").click()
    page.wait_for_function("document.querySelector('.dg-log')?.textContent.includes('first line')")
    page.get_by_role("button", name="‹ All runs").click()
    page.wait_for_selector("[data-run='panel b']")


def test_both_loras_of_two_networks_are_named_and_copied(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("[data-run='panel a']").click()
    page.wait_for_selector(".dg-lora")
    names = lora_names("panel a_12_high", "panel a_12_low")
    assert page.locator(".dg-lora span").all_inner_texts() == names
    for name in names:
        page.get_by_role("button", name=f"Copy the name of {name}").click()
        page.wait_for_function("async (name) => await navigator.clipboard.readText() === name", arg=name)
    page.get_by_role("button", name="‹ All runs").click()
    page.locator("[data-run='panel b']").click()
    page.get_by_role("button", name="Copy the name of the LoRA").click()
    (name,) = lora_names("panel b_5")
    page.wait_for_function("async (name) => await navigator.clipboard.readText() === name", arg=name)
    page.get_by_role("button", name="‹ All runs").click()


def test_a_button_stays_while_the_state_is_read_again(page: Any) -> None:
    page.locator("[data-run='panel a']").click()
    button = page.get_by_role("button", name="Delete")
    button.focus()
    with page.expect_response(lambda response: response.url.endswith("/runs/panel%20a"), timeout=60_000):
        """It is read every few seconds."""
    page.wait_for_function("document.activeElement.textContent === 'Delete'")
    page.get_by_role("button", name="‹ All runs").click()


def test_lines_of_the_log_are_apart_and_one_that_comes_in_two_parts_is_one(page: Any, runs: Path) -> None:
    log = runs / "panel a" / "log.txt"
    page.locator("[data-run='panel a']").click()
    page.get_by_role("tab", name="Log").click()
    lines = "[...document.querySelectorAll('.dg-log > div')].map((line) => line.textContent)"
    page.wait_for_function(f"{lines}.length === 2")
    before = log.read_text()
    for part in ("second ", "line\nthird"):
        with log.open("a") as file:
            file.write(part)
        page.wait_for_function(f"{lines}.join('|').endsWith({json.dumps(part.replace(chr(10), '|'))})")
    assert page.evaluate(lines) == [f"first line {MARKUP}", "second line", "third"]
    log.write_text(before)
    page.get_by_role("button", name="‹ All runs").click()


def test_what_a_checker_says_is_right_or_wrong_in_the_panel(page: Any, comfy: Server, runs: Path) -> None:
    folder = runs / "panel b" / "samples"
    folder.mkdir()
    for iteration, scores in ((0, (0.0, 0.25)), (5, (1.0, 0.75))):
        file = folder / f"evaluation_{iteration:06d}.png"
        Image.new("RGB", (72, 72)).save(file)
        scored = {"checked": scores[0], "light": scores[1]}
        write_samples(file, [Sample("a red circle", "1", scored, (4, 4, 68, 68))])
    page.locator("[data-run='panel b']").click()
    page.get_by_role("tab", name="Samples").click()
    page.wait_for_selector(".dg-cell .dg-right")
    page.get_by_label("beside the first").check()
    page.wait_for_selector(".dg-cell .dg-wrong")
    shown = page.locator(".dg-cell figcaption > .dg-muted").all_inner_texts()
    assert [text.replace("\u00a0", " ") for text in shown] == ["checked ✗ wrong → ✓ right", "light 0.25 → 0.75"]
    page.get_by_role("button", name="‹ All runs").click()


def test_what_runs_say_is_text_in_the_panel(page: Any) -> None:
    page.locator("[data-run='panel b']").click()
    page.wait_for_selector(".dg-error")
    assert page.locator(".dg-error").first.inner_text() == MARKUP
    page.get_by_role("tab", name="Log").click()
    page.wait_for_function("document.querySelector('.dg-log')?.textContent.includes('onerror')")
    assert page.evaluate("window.hacked") is None
    assert page.locator(".dg-panel img[src='x']").count() == 0
    page.get_by_role("button", name="‹ All runs").click()


def test_the_panel_compares_two_runs(page: Any) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.wait_for_selector(".dg-table")
    page.get_by_label("first run").select_option("panel a")
    page.get_by_label("second run").select_option("panel b")
    page.wait_for_function("document.querySelectorAll('.dg-table th').length === 3")
    assert "0.6 → 0.8" in page.locator(".dg-table").inner_text()
