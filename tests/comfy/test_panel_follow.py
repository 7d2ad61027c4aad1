"""The panel follows a run that goes on, over a reload of the page and a restart of the server."""

from pathlib import Path
from typing import Any

import psutil
from comfy_host import Server, open_panel, panels

OVERRIDES = """rollout.steps=4
rollout.group_size=2
rollout.prompts_per_iteration=2
evaluation.every=1000
optimizer.learning_rate=1e-7
runtime.watchdog.reward_drop=1e9
runtime.watchdog.gradient_factor=1e12
runtime.iterations=1000000"""
"""Nothing ends the run but Stop: with four images an iteration, the watchdog would soon see a collapse in the noise."""


def training(name: str) -> dict:
    """A graph that starts a run and does not wait for it."""
    settings = {"preset": "demo", "overrides": OVERRIDES}
    train = {"grpo_model": ["model", 3], "reward": ["reward", 0], "settings": ["settings", 0], "name": name}
    train |= {"prompts": "a red circle\na blue square", "held_out_prompts": "", "wait": False, "processes": 1}
    return {
        "model": {"class_type": "DanceGRPO_DemoModel", "inputs": {}},
        "reward": {"class_type": "DanceGRPO_LoadReward", "inputs": {"reward": "colorfulness"}},
        "settings": {"class_type": "DanceGRPO_Preset", "inputs": settings},
        "train": {"class_type": "DanceGRPO_TrainLoRA", "inputs": train},
    }


def iteration(page: Any) -> int:
    """The iteration that the head of the open run says."""
    text = page.locator(".dg-run-head .dg-muted").first.inner_text().replace("\u00a0", " ")
    return int(text.split("iteration ")[1].split(" of")[0])


def goes_on(page: Any, after: int) -> None:
    """Wait until a later iteration is shown, in the head and in the curves."""
    page.wait_for_function(
        """(after) => {
            const found = /iteration\\s(\\d+)/.exec(document.querySelector('.dg-run-head')?.textContent ?? '');
            return found && Number(found[1]) > after && document.querySelector('.dg-chart svg polyline');
        }""",
        arg=after,
    )


def preview_on_a_node(page: Any, name: str) -> list[int]:
    """Width and height of what is shown on a node of this page, which has not queued it, for the run of that name."""
    return page.evaluate(
        """async (name) => {
            const node = window.LiteGraph.createNode('DanceGRPO_TrainLoRA');
            window.app.graph.add(node);
            node.widgets.find((widget) => widget.name === 'name').value = name;
            const end = Date.now() + 100_000;
            while (!window.app.nodePreviewImages[node.id]?.length) {
                if (Date.now() > end) throw new Error('no preview on the node');
                await new Promise((done) => setTimeout(done, 100));
            }
            const image = new Image();
            image.src = window.app.nodePreviewImages[node.id][0];
            await image.decode();
            return [image.naturalWidth, image.naturalHeight];
        }""",
        name,
    )


def end(folder: Path) -> None:
    """End what is left of a run's processes."""
    for process in psutil.process_iter(["cmdline"]):
        if str(folder) in (process.info["cmdline"] or []):
            process.kill()


def test_a_reload_and_a_restart_of_the_server_find_the_run_again(tmp_path: Path) -> None:
    server = Server(tmp_path).start()
    try:
        server.run(training("followed"))
        with panels(server) as (page,):
            page.locator("[data-run='followed']").click()
            goes_on(page, 0)
            seen = iteration(page)
            open_panel(page, server)  # loads the page again
            page.wait_for_selector(".dg-run-head h3")
            assert page.locator(".dg-run-head h3").inner_text() == "followed", "the run that was open is open again"
            goes_on(page, seen)
            width, height = preview_on_a_node(page, "followed")
            assert 400 < width <= 1024 and height > 300
            server.kill()
            page.wait_for_selector(".dg-run-head .dg-error")
            assert page.locator(".dg-run-head .dg-error").inner_text() == "ComfyUI does not answer"
            server.start(port=server.port)
            seen = iteration_now(server)
            goes_on(page, seen)
            assert page.locator(".dg-run-head .dg-error").count() == 0
            page.get_by_role("button", name="Stop").click()
            page.wait_for_selector(".dg-run-head .dg-stopped")
            page.get_by_role("button", name="‹ All runs").click()
            page.wait_for_selector("[data-run='followed'] .dg-stopped")
            open_panel(page, server)
            page.wait_for_selector("[data-run='followed']")
            assert page.locator(".dg-run-head").count() == 0, "the list that was open is open again"
    finally:
        end(tmp_path / "output" / "dancegrpo" / "runs" / "followed")
        server.kill()


def iteration_now(server: Server) -> int:
    return server.get("/dancegrpo/runs/followed")["iteration"]
