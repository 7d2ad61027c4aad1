"""What the panel costs ComfyUI's server: opening a run of 20,000 events, and watching it while it goes on.

    COMFYUI_PATH=~/ComfyUI python benchmarks/panel.py [--screenshots FOLDER]

A real server, Chromium, and 49 other runs in the list. The run's log grows by an event per second, and its status is
written as often, as a live run's is; the share of a core is the server's CPU time over a minute of watching, less that
of a minute with no page open.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "comfy"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comfy_host import Server, panels
from test_panel import event, make_run

from trainer.runs import launch
from trainer.runs.directory import RunDirectory

EVENTS, OTHERS, MINUTE = 20_000, 49, 60.0
NAME = "long"


def cpu_share(process: psutil.Process, seconds: float) -> float:
    """Share of a core that a process takes in the coming seconds."""
    before = process.cpu_times()
    time.sleep(seconds)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / seconds


def go_on(run: RunDirectory, stop: threading.Event) -> None:
    """Write as a live run does, once per second."""
    iteration = EVENTS
    while not stop.wait(1.0):
        iteration += 1
        run.append_event(event(iteration, 2 * EVENTS))
        run.write_status("running", iteration=iteration, iterations=2 * EVENTS, progress=None)


def opened(page: Any) -> float:
    """Seconds from the click until the curves are there."""
    started = time.perf_counter()
    page.locator(f"[data-run='{NAME}']").click()
    page.wait_for_selector(".dg-chart svg polyline")
    return time.perf_counter() - started


def measure(comfy: Server, screenshots: Path | None) -> None:
    folder = comfy.base / "output" / "dancegrpo" / "runs"
    for number in range(OTHERS):
        make_run(folder, f"other {number}", 100)
    run = make_run(folder, NAME, EVENTS)
    run.acquire()  # as a live run: this process holds it
    run.write_status("running", iteration=EVENTS, iterations=2 * EVENTS, launcher=launch.identity(os.getpid()))
    server, stop = psutil.Process(comfy.process.pid), threading.Event()
    threading.Thread(target=go_on, args=(run, stop), daemon=True).start()
    idle = cpu_share(server, MINUTE)
    with panels(comfy) as (page,):
        first = opened(page)
        page.get_by_role("button", name="‹ All runs").click()
        again = opened(page)
        time.sleep(5)
        watched = cpu_share(server, MINUTE)
        if screenshots is not None:
            _photograph(page, screenshots)
    stop.set()
    figures = {"opened_s": first, "opened_again_s": again, "idle": idle, "watched": watched, "cost": watched - idle}
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def _photograph(page: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for theme in ("dark", "light"):
        page.evaluate("(id) => window.app.ui.settings.setSettingValueAsync('Comfy.ColorPalette', id)", theme)
        for width, height in ((1600, 1000), (800, 1000)):
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(1000)
            page.screenshot(path=folder / f"panel-{theme}-{width}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screenshots", type=Path, help="folder for screenshots of the panel")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        comfy = Server(Path(folder)).start()
        try:
            measure(comfy, args.screenshots)
        finally:
            comfy.stop()


if __name__ == "__main__":
    main()
