"""Starts, waits for and stops the processes of a run. All subprocesses are started here, without a shell."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from ..utils.errors import BadInput
from .directory import RunDirectory
from .failures import Failures
from .lifeline import PARENT

START_FILE = Path(__file__).resolve().parents[1] / "__main__.py"
ENDED = ("finished", "stopped", "failed")
PATIENCE = 5.0
"""Seconds that the ranks of a run have to stop after a request; then they are killed."""
GRACE = 3.0
"""Seconds that the other ranks have to exit by themselves after one has failed; then they are killed."""
POLL = 0.1
_started: dict[int, subprocess.Popen] = {}
"""Child processes by id. They stay in the process table as zombies until they are polled."""
_NOT_INHERITED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_USE_AGENT_STORE",
    "GROUP_RANK",
    "ROLE_RANK",
    "PYTORCH_CUDA_ALLOC_CONF",
    PARENT,
)
_OWN_GROUP: dict[str, object] = (
    {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
)


def command(arguments: list[str]) -> list[str]:
    """The argument list that runs this program."""
    return [sys.executable, str(START_FILE), *arguments]


def environment(gpus: list[int] | None = None) -> dict[str, str]:
    """The child's environment: without another launcher's variables, unbuffered UTF-8 output, only these GPUs."""
    variables = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    variables |= {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    if gpus is not None:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in gpus)
    return variables


# ------------------------------------------------------------------------------------------ the ranks of one host's run


class Ranks:
    """The processes of a distributed run on this host. Their rendezvous store is in this process.

    They exit when this process ends for any reason (`lifeline`).

    Args:
        arguments: the command line of each process.
        count: number of processes.

    Attributes:
        failures: their failure reports.
        killed_by: signal numbers, by rank, of ranks that were killed by another process or the system.
    """

    def __init__(self, arguments: list[str], count: int) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.failures, self.killed_by = Failures(self._store), {}
        shared = environment() | {
            PARENT: str(os.getpid()),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, not in rank 0
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        self._children = [
            subprocess.Popen(
                command(arguments),
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                **_OWN_GROUP,
            )
            for rank in range(count)
        ]

    def wait(self, stop_requested: Callable[[], bool]) -> list[int]:
        """Wait until all have ended; returns their exit codes.

        After one has failed, or after a stop request, those that do not exit in time are killed.
        """
        deadline = None
        while None in (codes := [child.poll() for child in self._children]):
            if deadline is None and any(codes):
                deadline = time.monotonic() + GRACE
                self.killed_by = {rank: -code for rank, code in enumerate(codes) if code is not None and code < 0}
            if deadline is None and stop_requested():
                deadline = time.monotonic() + PATIENCE
            if deadline is not None and time.monotonic() > deadline:
                self.kill()
            time.sleep(POLL)
        if deadline is None:
            self.killed_by = {rank: -code for rank, code in enumerate(codes) if code < 0}
        return codes

    def kill(self) -> None:
        """Kill all of them."""
        for child in self._children:
            child.kill()


def run_ranks(arguments: list[str], count: int, run: RunDirectory) -> tuple[Ranks, list[int]]:
    """Run ranks in the foreground. SIGINT and SIGTERM request a stop; a second signal kills the ranks.

    Returns:
        the ranks, all of which have ended, and their exit codes.
    """
    signals: list[int] = []
    ranks = Ranks(arguments, count)

    def ask(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if len(signals) > 1:
            ranks.kill()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop_requested() -> bool:
        if signals and run.path.is_dir():
            run.request_stop()  # again, in case a starting rank removed it as an old request
        return bool(signals) or run.stop_requested()

    try:
        return ranks, ranks.wait(stop_requested)
    finally:
        ranks.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------- runs in background


def start(arguments: list[str], log: Path, gpus: list[int] | None = None) -> int:
    """Start this program detached, with output to a log file; returns the process id.

    The child outlives this process: it has its own session (process group on Windows) and no pipe to this process.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            command(arguments),
            env=environment(gpus),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            **_OWN_GROUP,
        )
    _started[child.pid] = child
    return child.pid


def exit_code(pid: int) -> int | None:
    """The exit code of a process that `start` began here, asked for once; None while it goes on."""
    code = _started[pid].poll()
    if code is not None:
        del _started[pid]
    return code


def start_run(run: RunDirectory, processes: int = 1, gpus: list[int] | None = None) -> None:
    """Start or resume a run in the background. The caller holds its lock, and releases it afterwards.

    Args:
        processes: number of processes of the run.
        gpus: the GPUs that they see; None for those of the environment.
    """
    pid = start(["resume", str(run.path), "--processes", str(processes)], run.log_file, gpus)
    # `is_running` uses this status until the new process has finished its imports and holds the lock.
    run.write_status(
        "starting",
        error=None,
        bad_input=False,
        progress=None,
        launcher=identity(pid),
        processes=processes,
        gpus=gpus or [],
    )


def is_running(run: RunDirectory) -> bool:
    """Whether the run has a process, from the moment it was started.

    If the caller holds the run's lock itself, only other processes count.
    """
    status = run.status()
    # The process that started a run may continue with other work after the run has ended.
    started = status.get("state") not in ENDED and _is_alive(status.get("launcher"))
    return started or bool(run.is_locked_elsewhere())


def _is_alive(process: dict[str, object] | None) -> bool:
    """Whether a process exists on this host, and its id has not been reused."""
    import psutil

    if not process or process.get("host") != socket.gethostname():
        return False
    child = _started.get(process["pid"])
    if child is not None and child.poll() is not None:
        del _started[child.pid]
        return False
    try:
        alive = psutil.Process(process["pid"]).status() != psutil.STATUS_ZOMBIE
        return alive and identity(process["pid"]) == process
    except psutil.NoSuchProcess:
        return False


def identity(pid: int) -> dict[str, object]:
    """Identifies a process uniquely, even if its id is reused or exists on another host too."""
    import psutil

    return {"pid": pid, "host": socket.gethostname(), "created": psutil.Process(pid).create_time()}


def wait_for_exit(run: RunDirectory, patience: float) -> bool:
    """Wait up to `patience` seconds for the processes of an ended run to exit; returns whether they did."""
    launcher = run.status().get("launcher")
    deadline = time.monotonic() + patience
    while _is_alive(launcher) and time.monotonic() < deadline:
        time.sleep(POLL)
    return not _is_alive(launcher)


# ------------------------------------------------------------------------------------------------------------ stopping


def stop(run: RunDirectory, grace: float = 8.0) -> bool:
    """Request a run to stop, and kill its processes if it has not stopped within `grace` seconds.

    Returns:
        whether it was running. Its newest checkpoint and LoRA are kept; it can be resumed.

    Raises:
        BadInput: the run directory cannot be written, or the run is on another host and has not stopped.
    """
    if not is_running(run):
        return False
    launcher = run.status().get("launcher")
    if run.is_locked_elsewhere() is not False:  # else it is still starting: it does not check yet
        run.request_stop()
        deadline = time.monotonic() + grace
        while (run.is_locked_elsewhere() or _is_alive(launcher)) and time.monotonic() < deadline:
            time.sleep(POLL)
    if run.is_locked_elsewhere() or _is_alive(launcher):
        _end(run)
    run.stop_file.unlink(missing_ok=True)
    return True


def _end(run: RunDirectory) -> None:
    """Kill a run that did not stop."""
    launcher = run.status().get("launcher") or {}
    if launcher.get("host") not in (None, socket.gethostname()):
        raise BadInput(f"the run is on host {launcher['host']} and has not stopped: stop it on that host")
    if _is_alive(launcher):
        kill_tree(launcher["pid"])
    run.acquire(timeout=10)
    if run.status().get("state") not in ENDED:
        run.write_status("stopped", progress=None)
    run.release()


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants, which are collected first because orphans get another parent."""
    import psutil

    try:
        root = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    family = [*root.children(recursive=True), root]
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=5)
