"""The picture at the top of the README: the first example graph in ComfyUI's interface, when it has been run.

COMFYUI_PATH=~/ComfyUI python tools/readme_screenshot.py
"""

import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from comfy_host import Server, panels  # noqa: E402

GRAPH = ROOT / "workflows/01 Train a LoRA from rewards.json"
FILE = ROOT / "docs/images/workflow_train.jpg"
SIZE, SCALE = (1900, 1080), 0.65
LEFT, TOP = 90, 60
"""Of the graph in the window, in pixels."""
PATIENCE = 3600


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder)).start()
        try:
            server.post("/settings/Comfy.Minimap.Visible", False)
            server.post("/settings/LiteGraph.Canvas.MinFontSizeForLOD", 0)
            with panels(server, 1, *SIZE) as (page,):
                shot = screenshot(page, server, json.loads(GRAPH.read_text()))
        finally:
            server.stop()
    shot.convert("RGB").save(FILE, quality=88)
    print(FILE.relative_to(ROOT))


def screenshot(page: Any, server: Server, graph: dict) -> Image.Image:
    """Run the graph, and photograph it without panel and messages."""
    page.get_by_role("button", name="DanceGRPO").or_(page.locator(".dancegrpo-tab-button")).first.click()
    page.evaluate("(graph) => app.loadGraphData(graph, true, true, 'Train a LoRA from rewards')", graph)
    page.evaluate("() => app.queuePrompt(0)")
    end = time.monotonic() + PATIENCE
    while not server.get("/history") and time.monotonic() < end:
        time.sleep(1)
    page.wait_for_timeout(3000)  # for the images on the nodes
    place = """([scale, left, top]) => {
        const nodes = app.graph.nodes.map((node) => node.pos), { ds } = app.canvas;
        const [x, y] = [0, 1].map((axis) => Math.min(...nodes.map((pos) => pos[axis])));
        ds.scale = scale;
        ds.offset = [left / scale - x, (top + 80) / scale - y];
        app.canvas.setDirty(true, true);
        document.querySelectorAll(".p-toast").forEach((toast) => toast.remove());
    }"""
    page.evaluate(place, [SCALE, LEFT, TOP])
    page.wait_for_timeout(2000)
    return Image.open(io.BytesIO(page.screenshot()))


if __name__ == "__main__":
    main()
