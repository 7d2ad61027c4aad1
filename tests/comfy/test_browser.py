"""The pack's scripts in ComfyUI's own interface; skipped, with the reason, where there is no browser."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from comfy_host import ROOT, Server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def page(comfy: Server) -> Iterator[Any]:
    """ComfyUI's page with its interface loaded; `page.complaints` are errors in its console."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    comfy.post("/settings/Comfy.TutorialCompleted", True)  # else a dialog lies over the page
    with playwright.sync_playwright() as driver:
        window = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = window.new_page(viewport={"width": 1600, "height": 1000})
        page.complaints = []
        page.on("console", lambda entry: page.complaints.append(entry.text) if entry.type == "error" else None)
        page.goto(f"http://127.0.0.1:{comfy.port}/")
        page.wait_for_function("window.app?.extensionManager && window.app.graph", timeout=120_000)
        yield page
        window.close()


def queue(page: Any, prompt: dict) -> None:
    """Queue a prompt in API format as this page's own."""
    page.evaluate(
        """async (prompt) => {
            const {api} = await import('/scripts/api.js');
            const body = {prompt, client_id: api.clientId};
            await fetch('/api/prompt', {method: 'POST', body: JSON.stringify(body)});
        }""",
        prompt,
    )


def test_the_reason_of_an_error_is_a_toast_and_is_text(page: Any) -> None:
    queue(page, {"1": {"class_type": "DanceGRPO_Run", "inputs": {"name": "nobody", "action": "look"}}})
    toast = page.locator(".p-toast-message", has_text="there is no run named 'nobody' in").first
    toast.wait_for(timeout=30_000)
    assert [text for text in page.complaints if "DanceGRPO" in text] == []


def test_the_reason_lies_below_comfyui_s_own_box(page: Any) -> None:
    """Both are in the same corner; when the box is closed, the toast takes its place."""
    page.reload()
    page.wait_for_function("window.app?.extensionManager && window.app.graph", timeout=120_000)
    queue(page, {"1": {"class_type": "DanceGRPO_Run", "inputs": {"name": "nobody", "action": "look"}}})
    toast, box = ".p-toast-message.dancegrpo-reason", "[data-testid='error-overlay']"
    page.locator(box).wait_for(timeout=30_000)
    page.locator(toast).wait_for(timeout=30_000)
    is_below = """([toast, box]) => document.querySelector(toast).getBoundingClientRect().top
        > document.querySelector(box).getBoundingClientRect().bottom"""
    page.wait_for_function(is_below, arg=[toast, box], timeout=30_000)
    bottom = page.locator(box).evaluate("(box) => box.getBoundingClientRect().bottom")
    page.get_by_test_id("error-overlay-dismiss").click()
    page.wait_for_function(
        "([toast, bottom]) => document.querySelector(toast).getBoundingClientRect().top < bottom",
        arg=[toast, bottom],
        timeout=30_000,
    )


def test_the_reason_of_a_refusal_is_a_toast(page: Any) -> None:
    """The page's own way to queue; the server refuses the name before anything runs."""
    outcome = page.evaluate("""async () => {
        const {api} = await import('/scripts/api.js');
        const node = {class_type: 'DanceGRPO_Run', inputs: {name: '../<b>x</b>', action: 'look'}};
        try {
            await api.queuePrompt(0, {output: {1: node}, workflow: {}});
            return 'accepted';
        } catch (error) {
            return Object.keys(error.response?.node_errors ?? {}).join();
        }
    }""")
    assert outcome == "1", "the refusal reaches whoever queued as before"
    toast = page.locator(".p-toast-message", has_text="name '../<b>x</b>'")
    toast.first.wait_for(timeout=30_000)
    assert toast.count() == 1, "said once"
    assert "name - " not in toast.first.inner_text()


def test_markup_in_an_error_stays_text(page: Any) -> None:
    page.evaluate("""async () => {
        const {errorToast} = await import('/extensions/ComfyUI-DanceGRPO/js/errors.js');
        const said = '<img src=x onerror=window.hit=1>\\nlog';
        const toast = errorToast({node_type: 'DanceGRPO_Run', exception_message: said});
        window.app.extensionManager.toast.add(toast);
    }""")
    page.locator(".p-toast-message", has_text="<img src=x onerror=window.hit=1>").first.wait_for(timeout=10_000)
    assert page.evaluate("window.hit") is None


def test_the_end_of_a_run_is_a_toast_of_the_page_itself(page: Any, comfy: Server) -> None:
    toasts = page.evaluate("""async () => {
        const {endToasts} = await import('/extensions/ComfyUI-DanceGRPO/js/ends.js');
        const before = new Map([['a', 'running'], ['b', 'running'], ['c', 'finished'], ['e', 'running']]);
        const now = [['a', 'finished'], ['b', 'failed'], ['c', 'finished'], ['d', 'stopped'], ['e', 'running']];
        return endToasts(before, now.map(([name, state]) => ({name, state, error: state === 'failed' ? 'why' : null})));
    }""")
    assert [(toast["severity"], toast["summary"], toast["detail"]) for toast in toasts] == [
        ("success", "run a", "finished"),
        ("error", "run b", "failed: why"),
    ]
    with page.expect_request(lambda request: request.url.endswith("/dancegrpo/runs"), timeout=60_000):
        """The page asks by itself, without the panel."""


def load(page: Any, name: str) -> None:
    graph = json.loads((ROOT / "workflows" / f"{name}.json").read_text())
    page.evaluate("async (graph) => { await window.app.loadGraphData(graph, true, true, 'x'); }", graph)


TOASTS = "[...document.querySelectorAll('.p-toast-message')]"


def test_files_that_a_graph_lacks_are_named_when_it_is_opened(page: Any) -> None:
    toast = page.locator(".p-toast-message", has_text="Files of reward models are missing")
    load(page, "12 Train Wan 2.1 I2V")
    toast.wait_for(timeout=30_000)
    text = toast.inner_text()
    for path in ("videoreward/checkpoint-11352/model.pth", "videoreward/tokenizer.json", "videoreward/template.txt"):
        assert text.count(f"models/rewards/{path}") == 1
    assert "KwaiVGI/VideoReward" in text and "(4.5 GB)" in text
    load(page, "06 Train SD3.5")
    page.locator(".p-toast-message", has_text="HPS_v2.1_compressed.pt of xswu/HPSv2").wait_for(timeout=30_000)
    page.wait_for_function(f"{TOASTS}.filter((t) => t.textContent.includes('Files of reward')).length === 1")
    text = toast.inner_text()
    assert "models/rewards/clip/DFN5B-CLIP-ViT-H-14-378" in text, "a folder is named, too"
    assert "(1.97 GB)" in text and "(3.9 GB)" in text
    assert "videoreward" not in text
    load(page, "01 Train a LoRA from rewards")
    toast.wait_for(state="detached", timeout=30_000)


def test_the_page_lists_what_core_s_loaders_lack_without_leaving_the_machine(page: Any, comfy: Server) -> None:
    """ComfyUI finds those files by the widgets; a url in the graph would make the page ask for its size."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    load(page, "12 Train Wan 2.1 I2V")
    page.get_by_text("View details").first.evaluate("(button) => button.click()")  # a toast may lie over it
    for file in ("wan2.1_i2v_480p_14B_fp16", "umt5_xxl_fp8_e4m3fn_scaled", "wan_2.1_vae", "clip_vision_h"):
        page.get_by_text(f"{file}.safetensors").first.wait_for()
    assert [url for url in asked if "huggingface" in url or "/resolve/" in url] == []
    assert "http" not in (ROOT / "workflows" / "12 Train Wan 2.1 I2V.json").read_text()


def test_which_files_are_missing_is_read_from_the_widgets(page: Any) -> None:
    found = page.evaluate("""async () => {
        const {missingRewardFiles, missingToast} = await import('/extensions/ComfyUI-DanceGRPO/js/missing.js');
        const widget = (value, there) => ({value, tooltip: `${value} (1 GB)`,
            options: {values: there ? [value] : [`(missing: put it at models/rewards/${value})`]}});
        const node = (mode, ...widgets) => ({type: 'DanceGRPO_LoadReward', mode, widgets});
        const inner = {type: 'sub', mode: 0, subgraph: {nodes: [node(0, widget('d', false))]}};
        const nodes = [node(0, widget('a', false), widget('b', true)), node(0, widget('a', false)),
            node(4, widget('c', false)), inner, {type: 'KSampler', mode: 0}];
        return [missingRewardFiles(nodes), missingToast([])];
    }""")
    assert [file["path"] for file in found[0]] == ["models/rewards/a", "models/rewards/d"]
    assert found[0][0]["says"] == "a (1 GB)"
    assert found[1] is None


def test_ticks_of_a_narrow_range_differ(page: Any) -> None:
    texts = page.evaluate("""async () => {
        const {ticks, tickText} = await import('/extensions/ComfyUI-DanceGRPO/js/chart.js');
        const ranges = [[1.9652, 1.9664], [0, 1], [0, 16], [4e-4, 1.6e-3], [0, 3e-7], [0, 4e6]];
        return ranges.map((range) => ticks(range, 4)).map((levels) => levels.map((value) => tickText(value, levels)));
    }""")
    assert texts[0] == ["1.9655", "1.9660"]
    assert texts[1] == ["0.0", "0.5", "1.0"]
    assert texts[2] == ["0", "5", "10", "15"]
    assert texts[3] == ["0.0005", "0.0010", "0.0015"]
    for levels in texts:
        assert len(set(levels)) == len(levels) > 1


def test_nodes_whose_runs_are_live_are_found_by_name(page: Any) -> None:
    found = page.evaluate("""async () => {
        const {liveNodes} = await import('/extensions/ComfyUI-DanceGRPO/js/live.js');
        const node = (id, type, name) => ({id, type, widgets: [{name: 'seed', value: 1}, {name: 'name', value: name}]});
        const nodes = [node(1, 'DanceGRPO_TrainLoRA', 'a'), node(2, 'DanceGRPO_TrainLoRA', 'b'),
            node(3, 'DanceGRPO_Run', 'a'), node(4, 'SaveImage', 'a'), {id: 5, type: 'DanceGRPO_Run'}];
        return liveNodes(nodes, [{name: 'a', live: true}, {name: 'b', live: false}]);
    }""")
    assert found == [{"id": 1, "name": "a"}, {"id": 3, "name": "a"}]
