"""Carrying out a run description: in this process, or in several that this one starts and waits for."""

import os
import signal
import sys
from pathlib import Path

from . import launch
from .config import RunConfig
from .errors import BadInput
from .progress import Progress, closing
from .run import RunDirectory

FINISHED, FAILED, BAD_INPUT = 0, 1, 2
"""Exit codes: finished or stopped on request, failed with one clear line, bad input."""


def run_description(config: RunConfig, output: Path, arguments: list[str], processes: int) -> int:
    """Train in this process, or in several started for it; returns the exit code.

    Args:
        output: run directory.
        arguments: the command line that each started process is given.
    """
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        RunDirectory.open(output, config, arguments).release()
        launch.run_and_wait(arguments, processes)
        return _verdict(output)
    code = _run_here(config, output, arguments)
    # A launcher turns any code but 0 into its own error report; the one who called it reads the status instead.
    return FINISHED if "WORLD_SIZE" in os.environ and launch.CHILD_MARK in os.environ else code


def _verdict(output: Path) -> int:
    """What became of a run whose processes have ended."""
    run = RunDirectory.attach(output)
    # In this order: who ends a run by force writes "stopped" before the request is taken back.
    asked, status = run.stop_requested(), run.status()
    if status.get("state") in ("finished", "stopped"):
        return FINISHED
    if asked and status.get("state") != "failed":
        run.write_status("stopped")
        return FINISHED
    if status.get("state") != "failed":
        run.write_status("failed", error="the processes of the run ended without a word; see the output above")
    print(f"failed: {run.status().get('error')}", file=sys.stderr)
    return BAD_INPUT if status.get("bad_input") else FAILED


def _quiet() -> None:
    """Keep the libraries' loading bars out of the run's own output."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _run_here(config: RunConfig, output: Path, arguments: list[str]) -> int:
    # The lock comes before the seconds of imports, so that who asks sees a run that is starting.
    run, fault = RunDirectory(output), None
    if os.environ.get("RANK", "0") == "0":
        try:
            run = RunDirectory.open(output, config, arguments)
        except BadInput as error:
            fault = str(error)
    from .distributed import Processes

    processes = Processes(config.runtime.device)
    try:
        if fault := processes.broadcast(fault):
            raise BadInput(fault)
        _quiet()
        return _train_in(config, run, processes)
    finally:
        run.release()
        processes.close()


def _train_in(config: RunConfig, run: RunDirectory, processes: "Processes") -> int:  # noqa: F821 - imported late
    summary = run.summary()
    if summary and summary["state"] == "finished":
        if processes.is_main:
            print(closing(summary, run))
        return FINISHED
    if processes.is_main:
        run.write_status(
            "starting",
            iteration=run.status().get("iteration", 0),
            iterations=config.runtime.iterations,
            error=None,
            bad_input=False,
            launcher=_launcher(),
        )
    try:
        from .loop import Trainer

        progress = Progress(config.runtime.iterations) if processes.is_main else None
        trainer = Trainer(config, run, processes, progress or (lambda event: None))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(trainer, "interrupted", True))
        summary = trainer.train()
    except BaseException as error:
        if processes.is_main:
            run.write_status("failed", error=_sentence(error), bad_input=isinstance(error, BadInput))
        raise
    if processes.is_main:
        progress.close()
        print(closing(summary, run))
    return FINISHED


def _launcher() -> int:
    """The process whose end ends the whole run: the launcher of several processes, else this one."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
