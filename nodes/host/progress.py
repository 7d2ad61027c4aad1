"""Text, progress bar and errors on a node, and waiting for a run."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import comfy.model_management
from comfy.model_management import InterruptProcessingException
from comfy.utils import ProgressBar
from server import PromptServer

from ...trainer.runs import launch
from ...trainer.runs.directory import RunDirectory
from ...trainer.runs.progress import duration, number, table
from ...trainer.utils.errors import BadInput, RunFailed
from .folders import publish_loras
from .live_preview import WIDTH, previews

if TYPE_CHECKING:
    from PIL.Image import Image

GRACE = 6.0
"""Seconds a run has to stop by itself when the user cancels; after that its processes are killed."""
POLL = 0.5
"""Seconds between two checks of a run."""
EXIT = 10.0
"""Seconds to wait for the processes of an ended run to release their memory."""
LOG_LINES = 30
RECENT = 20
"""Number of iterations over which the time per iteration is averaged to estimate the time left."""


# ------------------------------------------------------------------------------------------------------------ the node


def check_interrupt() -> None:
    """Raise ComfyUI's own exception (a BaseException) when the user cancels."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def say(text: str, node_id: str | None) -> None:
    """Show text on a node, in the browser that queued the running prompt.

    Nothing is sent for a prompt that was queued without a browser: sent to all clients, the text would appear on nodes
    with the same id in other graphs.
    """
    server = getattr(PromptServer, "instance", None)  # there is none outside a running ComfyUI
    client = getattr(server, "client_id", None)
    if node_id is not None and client is not None:
        server.send_progress_text(text.encode("utf-8", "replace"), node_id, sid=client)


@contextmanager
def errors_on_node(node_id: str | None) -> Iterator[None]:
    """Also show the message of a BadInput or RunFailed as text on the node."""
    try:
        yield
    except (BadInput, RunFailed) as error:
        say(str(error), node_id)
        raise


class NodeProgress:
    """A node's progress bar, preview image and text; only changes are sent.

    Args:
        node_id: the running node.
        iterations: of the whole run.
    """

    def __init__(self, node_id: str, iterations: int) -> None:
        self.node_id, self.iterations = node_id, iterations
        self.bar = ProgressBar(iterations, node_id=node_id)
        self.text, self.iteration, self.image = "", -1, None

    def show(self, iteration: int, text: str, image: "Image | None") -> None:
        """
        Args:
            image: of the curve and the newest samples, if there is one.
        """
        if iteration != self.iteration or image is not self.image:
            preview = ("JPEG", image, WIDTH) if image is not self.image and image is not None else None
            self.bar.update_absolute(iteration, self.iterations, preview)
            self.iteration, self.image = iteration, image
        self.say(text)

    def say(self, text: str) -> None:
        if text != self.text:
            say(text, self.node_id)
            self.text = text


# ------------------------------------------------------------------------------------------------------------- waiting


class RunView:
    """The state of a run as text."""

    def __init__(self, run: RunDirectory) -> None:
        self.run, self.seen = run, 0
        self.first: dict | None = None
        self.recent: deque[dict] = deque(maxlen=RECENT)

    def text(self, running: bool) -> str:
        """State, rewards and time left, in a few lines."""
        self._read_events()
        status = self.run.status()
        done, total = status.get("iteration", 0), status.get("iterations", 0)
        lines = [f"run {self.run.path.name!r}: {_state(status, running)}"]
        if total:
            lines.append(f"iteration {done} of {total}")
        if self.recent:
            lines += _rewards(self.first["rewards"], self.recent[-1]["rewards"])
        if running and self.recent and status.get("state") == "running":
            seconds = sum(event["seconds"]["total"] for event in self.recent) / len(self.recent)
            lines.append(f"{duration(seconds * (total - done))} left")
        elif running and isinstance(estimate := status.get("estimate"), dict) and "left" in estimate:
            lines.append(f"about {duration(estimate['left'])} in all (estimate)")
        if status.get("state") == "failed":
            lines.append(str(status.get("error")))
        if not running and (summary := self.run.summary()):
            lines.append(table(summary))
        return "\n".join(line for line in lines if line)

    def _read_events(self) -> None:
        events = self.run.events()
        if len(events) < self.seen:  # a resumed run dropped the events after its checkpoint
            self.first, self.seen = None, 0
            self.recent.clear()
        self.recent.extend(events[self.seen :])
        self.first, self.seen = self.first or next(iter(events), None), len(events)


def _state(status: dict, running: bool) -> str:
    state = status.get("state", "starting")
    if running:
        return state
    if state in ("starting", "running", "stopping"):
        return "its processes exited unexpectedly; it can be resumed"
    return "stopped; it can be resumed" if state == "stopped" else state


def _rewards(first: dict[str, dict], last: dict[str, dict]) -> list[str]:
    started = {name: number(value.get("mean")) for name, value in first.items()}
    return [f"{name} {number(value.get('mean'))} (was {started.get(name, '-')})" for name, value in last.items()]


def wait(run: RunDirectory, progress: NodeProgress) -> None:
    """Wait until the run has ended, and show its progress.

    Raises:
        RunFailed: it failed or its processes died; with the last lines of its log.
        InterruptProcessingException: the user cancelled.
    """
    seen, view = None, RunView(run)
    while True:
        check_interrupt()
        running = launch.is_running(run)  # checked before the files are read, so that the last read is complete
        stamp = _stamp(run)
        if stamp != seen or not running:
            seen = stamp
            progress.show(run.status().get("iteration", 0), view.text(running), previews.of(run))
        if not running:
            break
        time.sleep(POLL)
    launch.wait_for_exit(run, EXIT)
    raise_failure(run)


def raise_failure(run: RunDirectory) -> None:
    """
    Raises:
        RunFailed: the run, which has ended, neither finished nor was stopped.
    """
    state = run.status().get("state")
    if state in ("finished", "stopped"):
        return
    reason = run.status().get("error") if state == "failed" else "its processes exited unexpectedly; see the log below"
    raise RunFailed(f"run {run.path.name!r} failed: {reason}\n{log_tail(run)}")


def cancel(run: RunDirectory, name: str) -> None:
    """Stop a run, and copy its newest LoRA to where ComfyUI lists it."""
    launch.stop(run, grace=GRACE)
    if run.lora_file.exists():
        publish_loras(run.lora_file, name)


def wait_or_cancel(run: RunDirectory, name: str, progress: NodeProgress) -> None:
    """`wait`, but stop the run if the user cancels the prompt."""
    try:
        wait(run, progress)
    except InterruptProcessingException:
        progress.say(f"run {name!r}: stopping")
        cancel(run, name)
        progress.say(RunView(run).text(running=False))
        raise


def _stamp(run: RunDirectory) -> tuple:
    files = (run.path / "status.json", run.path / "events.jsonl")
    return tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)


def log_tail(run: RunDirectory) -> str:
    """The last lines of the run's log."""
    if not run.log_file.exists():
        return ""
    with run.log_file.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 20_000))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return "\n".join(lines[-LOG_LINES:])
