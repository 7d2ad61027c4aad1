"""Carrying out a run description: in this process, or in several that this one starts and waits for."""

import os
import signal
import sys
import traceback
from pathlib import Path

from .config import RunConfig
from .runs import launch
from .runs.directory import RunDirectory
from .runs.progress import Progress, closing
from .utils.errors import BadInput, RunFailed

FINISHED, FAILED, BAD_INPUT = 0, 1, 2
"""Exit codes: finished or stopped on request, failed with one clear line, bad input."""


def run_description(config: RunConfig, output: Path, arguments: list[str], processes: int) -> int:
    """Train in this process, or in several started for it; returns the exit code.

    Args:
        output: run directory.
        arguments: the command line that each started process is given.
    """
    if processes > 1:
        _check(config, output, processes)
        if launch.CHILD_MARK in os.environ:
            os.environ[launch.LAUNCHER] = str(os.getpid())
        run = RunDirectory.open(output, config, arguments)
        if not _is_finished(run):
            _say_starting(run, config, os.getpid())
        run.release()
        launch.run_and_wait(arguments, processes, run)
        return _verdict(run)
    try:
        return _run_here(config, output, arguments)
    except (BadInput, RunFailed):
        # A launcher turns any code but 0 into its own report; the one who called it reads the status instead.
        if launch.CHILD_MARK in os.environ and _is_worker():
            return FINISHED
        raise


def _check(config: RunConfig, output: Path, processes: int) -> None:
    """Refuse a description that cannot run before it gets a run directory; one that has a directory was checked then.

    Raises:
        BadInput: it cannot run.
    """
    if not (output / "run.yaml").exists():
        from .check import check_run

        check_run(config, processes)


def _is_worker() -> bool:
    """Whether a launcher of several processes started this one."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _launcher() -> int:
    """The process whose end ends the whole run."""
    return int(os.environ.get(launch.LAUNCHER) or (os.getppid() if _is_worker() else os.getpid()))


def _is_finished(run: RunDirectory) -> bool:
    return (run.summary() or {}).get("state") == "finished"


def _say_starting(run: RunDirectory, config: RunConfig, launcher: int) -> None:
    """Replace what the status said of an earlier start.

    Args:
        launcher: the process whose end ends the whole run.
    """
    run.write_status(
        "starting",
        iteration=run.status().get("iteration", 0),
        iterations=config.runtime.iterations,
        error=None,
        bad_input=False,
        launcher=launch.identity(launcher),
    )


def _verdict(run: RunDirectory) -> int:
    """What became of a run whose processes have ended."""
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
    # The lock of a run that exists comes before the seconds of imports: whoever asks sees a run that is starting.
    run, fault = RunDirectory(output), None
    if not _is_worker() or os.environ["RANK"] == "0":
        try:
            _check(config, output, int(os.environ["WORLD_SIZE"]) if _is_worker() else 1)
            run = RunDirectory.open(output, config, arguments)
            if not _is_finished(run):
                _say_starting(run, config, _launcher())
        except BadInput as error:
            fault = str(error)
    from .utils.distributed import Processes

    processes = Processes(config.runtime.device)
    try:
        if fault := processes.broadcast(fault):
            raise BadInput(fault)
        code = _train_in(config, run, processes)
    finally:
        run.release()
    processes.close()  # only when all went well: others may still wait in a sum
    return code


def _train_in(config: RunConfig, run: RunDirectory, processes: "Processes") -> int:  # noqa: F821 - imported late
    if _is_finished(run):
        if processes.is_main:
            print(closing(run.summary(), run))
        return FINISHED
    _quiet()
    try:
        from .loop import Trainer
        from .objectives import make_objective

        progress = Progress(config.runtime.iterations, make_objective(config)) if processes.is_main else None
        trainer = Trainer(config, run, processes, progress or (lambda event: None))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(trainer, "interrupted", True))
        summary = trainer.train()
    except KeyboardInterrupt:
        if processes.is_main:
            run.write_status("stopped")
        return FINISHED
    except Exception as error:
        if processes.is_main:
            run.write_status("failed", error=_sentence(error), bad_input=isinstance(error, BadInput))
        if isinstance(error, (BadInput, RunFailed, OSError)):
            raise
        report = run.path / f"error-{processes.rank}.txt"
        report.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        raise RunFailed(f"{type(error).__name__}: {_sentence(error)} (details in {report})") from error
    if processes.is_main:
        progress.close()
        print(closing(summary, run))
    return FINISHED


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "the device ran out of memory: turn on model.gradient_checkpointing, lower objective.batch_size and "
            f"rollout.batch_size, or raise reserve_gb of a connected model ({text})"
        )
    return text
