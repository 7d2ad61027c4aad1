"""A real ComfyUI on the CPU, in a process and a base directory of its own."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
PACK = "ComfyUI-DanceGRPO"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


def absence() -> str | None:
    """Why ComfyUI cannot be started here, or None."""
    if not (COMFYUI / "main.py").is_file():
        return f"no ComfyUI at {COMFYUI} (set COMFYUI_PATH)"
    missing = [name for name in ("aiohttp", "sqlalchemy", "torchaudio", "av") if not importlib.util.find_spec(name)]
    if missing:
        return f"{', '.join(missing)} not installed: pip install -r {COMFYUI / 'requirements.txt'}"
    return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Fault(NamedTuple):
    """One refusal or error as ComfyUI reports it.

    Attributes:
        node: id of the node.
        input: the widget or socket that it is shown at; None for an error while the node ran.
        text: what is said.
        kind: type of a refusal, or of the exception.
    """

    node: str
    input: str | None
    text: str
    kind: str


class PromptFailed(AssertionError):
    """A prompt ended in an error.

    Attributes:
        details: the answer to a refused prompt, or the messages in the history of one that failed.
    """

    def __init__(self, details: object) -> None:
        super().__init__(json.dumps(details, indent=1, default=str)[:4000])
        self.details = details

    @property
    def faults(self) -> list[Fault]:
        """Every report a user gets, repeated ones too."""
        if isinstance(self.details, dict):
            return [
                Fault(node, fault["extra_info"].get("input_name"), fault["details"], fault["type"])
                for node, report in self.details.get("node_errors", {}).items()
                for fault in report["errors"]
            ]
        return [
            Fault(body["node_id"], None, body["exception_message"].strip(), body["exception_type"])
            for kind, body in self.details
            if kind == "execution_error"
        ]


def warnings_of_pack(output: str) -> list[str]:
    """Warnings that code of this pack has caused, in what a server and its trainers printed.

    A clone has the pack's name and often holds a virtual environment, whose packages are not the pack.
    """
    own = (
        rf"(?:{re.escape(str(ROOT))}|\S*/custom_nodes/{PACK})/(?:__init__\.py|nodes/\S*|trainer/\S*):\d+: \w*Warning.*"
    )
    return re.findall(own, output)


class Server:
    """One ComfyUI with this pack as its only one. May be started again on the same base directory.

    Attributes:
        base: its base directory: `output`, `models`, `user` are below it.
        log: everything it printed, over all its starts.
    """

    def __init__(self, base: Path, *arguments: str) -> None:
        self.base, self.arguments = base, arguments
        self.log = base / "server.log"
        self.process: subprocess.Popen | None = None
        packs = base / "custom_nodes"
        packs.mkdir(parents=True, exist_ok=True)
        if not (packs / PACK).exists():
            (packs / PACK).symlink_to(ROOT, target_is_directory=True)

    def start(self, patience: float = 600, port: int | None = None) -> "Server":
        self.port = free_port() if port is None else port
        command = [sys.executable, str(COMFYUI / "main.py"), "--cpu", "--disable-api-nodes", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:", *self.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.base, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        self.kill()
        raise AssertionError(f"ComfyUI did not start:\n{self.output[-4000:]}")

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(timeout=20)

    # ------------------------------------------------------------------------------------------------ the HTTP API

    def fetch(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> object:
        return json.loads(self.fetch(path))

    def post(self, path: str, body: object) -> object:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def queue(self, prompt: dict, client: str | None = None) -> str:
        """Queue a prompt in API format; its id.

        Args:
            client: id of the websocket that the prompt belongs to.

        Raises:
            PromptFailed: it was refused.
        """
        try:
            return self.post("/prompt", {"prompt": prompt} | ({"client_id": client} if client else {}))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise PromptFailed(json.loads(error.read())) from error

    def wait(self, prompt_id: str, patience: float = 900) -> dict:
        """The history entry of a prompt, once it has ended in whatever way."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return entry
            assert self.process.poll() is None, f"ComfyUI died:\n{self.output[-4000:]}"
            time.sleep(0.1)
        raise AssertionError(f"prompt {prompt_id} still runs after {patience} s:\n{self.output[-4000:]}")

    def run(self, prompt: dict, patience: float = 900) -> dict[str, dict]:
        """Outputs of a prompt by node id.

        Raises:
            PromptFailed: it was refused, interrupted, or a node failed.
        """
        entry = self.wait(self.queue(prompt), patience)
        if entry["status"]["status_str"] != "success":
            raise PromptFailed(entry["status"]["messages"])
        return entry["outputs"]

    def cached_nodes(self, prompt_id: str) -> list[str]:
        """Nodes of a prompt that has ended whose results came from ComfyUI's cache."""
        messages = self.get(f"/history/{prompt_id}")[prompt_id]["status"]["messages"]
        return [node for kind, body in messages if kind == "execution_cached" for node in body["nodes"]]

    def images(self, output: dict) -> list[Path]:
        """The files of a node's saved or previewed images."""
        return [self.base / item["type"] / item["subfolder"] / item["filename"] for item in output["images"]]


# ---------------------------------------------------------------------------------------------------------- a browser


@contextmanager
def panels(comfy: Server, count: int = 1, width: int = 1600, height: int = 1000, **options: object) -> Iterator[list]:
    """Pages of ComfyUI with the pack's panel open, each in a browser context of its own, without common storage.

    A test is skipped where there is no Chromium or playwright is not installed.

    Args:
        width, height: of the window.
        options: further ones of playwright's `new_context`.
    """
    import pytest

    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    comfy.post("/settings/Comfy.TutorialCompleted", True)
    with playwright.sync_playwright() as driver:
        window = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        size = {"width": width, "height": height}
        pages = [window.new_context(viewport=size, **options).new_page() for _ in range(count)]
        for page in pages:
            page.set_default_timeout(120_000)
            open_panel(page, comfy)
        try:
            yield pages
        finally:
            window.close()


def open_panel(page: Any, comfy: Server) -> None:
    """Load ComfyUI's page, also once more, and open the panel."""
    page.goto(f"http://127.0.0.1:{comfy.port}/")
    page.get_by_role("button", name="DanceGRPO").or_(page.locator(".dancegrpo-tab-button")).first.click()
    page.wait_for_selector(".dg-panel")
