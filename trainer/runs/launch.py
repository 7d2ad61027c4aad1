"""Starting, waiting for and stopping the processes of a run. The only file that starts any; never through a shell."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from ..utils.errors import BadInput
from .directory import RunDirectory

START_FILE = Path(__file__).resolve().parents[1] / "__main__.py"
CHILD_MARK = "DANCEGRPO_LAUNCHED"
LAUNCHER = "DANCEGRPO_LAUNCHER"
"""In the processes of a run in the background: which process is at their root."""
ENDED = ("finished", "stopped", "failed")
_started: dict[int, subprocess.Popen] = {}
"""Processes of this one's own, which stay in the process table until they are asked after."""
_NOT_INHERITED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "GROUP_RANK",
    "ROLE_RANK",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def command(arguments: list[str], processes: int) -> list[str]:
    """The argument list that runs this program in one process or several on this host."""
    if processes == 1:
        return [sys.executable, str(START_FILE), *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, str(START_FILE), *arguments]


def environment(gpus: list[int] | None = None) -> dict[str, str]:
    """The child's environment: nothing of another launcher's, unbuffered UTF-8 output, only the named GPUs."""
    variables = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    variables |= {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", CHILD_MARK: "1"}
    if gpus is not None:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in gpus)
    return variables


def run_and_wait(arguments: list[str], processes: int, run: RunDirectory) -> int:
    """Run in the foreground; an interrupt asks the run to stop, and its end is waited for here."""
    child = subprocess.Popen(command(arguments, processes), env=environment(), stdin=subprocess.DEVNULL)

    def ask(number: int, frame: object) -> None:
        run.request_stop()
        if number == signal.SIGTERM:  # a terminal sends SIGINT to the whole foreground group by itself
            child.send_signal(number)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def start(arguments: list[str], processes: int, log: Path, gpus: list[int] | None = None) -> int:
    """Start detached, output going to a log file; returns the process id.

    The child outlives this process: it has its own session (or process group on Windows) and no pipe to us.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    own_session = (
        {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
    )
    with log.open("ab") as output:
        child = subprocess.Popen(
            command(arguments, processes),
            env=environment(gpus),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            **own_session,
        )
    _started[child.pid] = child
    return child.pid


def start_run(run: RunDirectory, processes: int = 1, gpus: list[int] | None = None) -> None:
    """Start or resume a run in the background. The caller holds its lock, and gives it back right after.

    Args:
        processes: how many share the run.
        gpus: the GPUs they see; None leaves it to the environment.
    """
    pid = start(["resume", str(run.path), "--processes", str(processes)], 1, run.log_file, gpus)
    # Until the new process has imported what it needs and holds the lock, this is what tells that the run is on.
    run.write_status(
        "starting", error=None, bad_input=False, launcher=identity(pid), processes=processes, gpus=gpus or []
    )


def is_running(run: RunDirectory) -> bool:
    """Whether a process works on the run, from the moment it was started."""
    return run.is_live() or is_started(run)


def is_started(run: RunDirectory) -> bool:
    """Whether the process that was started last for the run is at work, though it may not hold its lock yet."""
    status = run.status()
    # A process may live on after its run has ended, and do other work.
    return status.get("state") not in ENDED and _lives(status.get("launcher"))


def _lives(process: dict[str, object] | None) -> bool:
    """Whether a process of this host is there and is still the same one."""
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


def wait_for_exit(run: RunDirectory, patience: float) -> bool:
    """Whether the processes of a run that has ended are gone, and with them the memory they held, within seconds."""
    launcher = run.status().get("launcher")
    deadline = time.monotonic() + patience
    while _lives(launcher) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not _lives(launcher)


def stop(run: RunDirectory, grace: float = 8.0) -> bool:
    """Ask a run to stop, and end its processes when it has not within `grace` seconds.

    Returns:
        whether it was running. Its newest checkpoint and LoRA stay; it can be resumed.
    """
    if not is_running(run):
        return False
    launcher = run.status().get("launcher")
    if run.is_live():  # one that is only starting would take the request for an old one, and has nothing to lose
        run.request_stop()
        deadline = time.monotonic() + grace
        while (run.is_live() or _lives(launcher)) and time.monotonic() < deadline:
            time.sleep(0.1)
    if run.is_live() or _lives(launcher):
        _end(run)
    run.stop_file.unlink(missing_ok=True)
    return True


def identity(pid: int) -> dict[str, object]:
    """What tells a process from every other, also from a later one of the same number and one on another host."""
    import psutil

    return {"pid": pid, "host": socket.gethostname(), "created": psutil.Process(pid).create_time()}


def _end(run: RunDirectory) -> None:
    """End a run that did not stop when asked."""
    launcher = run.status().get("launcher") or {}
    if launcher.get("host") not in (None, socket.gethostname()):
        raise BadInput(f"the run is on host {launcher['host']} and has not stopped yet; end it there")
    if _lives(launcher):
        kill_tree(launcher["pid"])
    run.acquire(timeout=10)
    if run.status().get("state") not in ENDED:
        run.write_status("stopped")
    run.release()


def kill_tree(pid: int) -> None:
    """End a process and all its descendants, collected first because launchers re-parent them."""
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
