"""Runs a run description, in this process or in several processes that it starts and waits for."""

import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .config import RunConfig
from .runs import launch
from .runs.capacity import check_iteration
from .runs.directory import RunDirectory, description_hash
from .runs.failures import Failure, Failures, cause
from .runs.launch import Ranks
from .runs.lifeline import PARENT, FailureWatch, is_rank
from .runs.progress import Progress, closing
from .runs.trackers import check_trackers
from .utils.console import quiet_libraries
from .utils.errors import BadInput, RunFailed

if TYPE_CHECKING:
    from .utils.distributed import Processes

FINISHED, FAILED, BAD_INPUT = 0, 1, 2
"""Exit codes: finished or stopped on request; failed, with a one-line message; invalid input."""


def run_description(config: RunConfig, output: Path, arguments: list[str], processes: int) -> int:
    """Train in this process, or in several that are started here; returns the exit code.

    Args:
        output: run directory.
        arguments: the command line, which is stored in run.yaml.

    Raises:
        BadInput: an input of the user is invalid.
        RunFailed: the run failed; with several processes, the message names the rank.
    """
    check_trackers(config)
    world_size = int(os.environ["WORLD_SIZE"]) if is_rank() else processes
    check_iteration(config, world_size)
    _check(config, output, world_size)
    if processes > 1:
        return _run_ranks(config, output, arguments, processes)
    if is_rank():
        return _run_as_rank(config, output, arguments)
    return _run_alone(config, RunDirectory(output), arguments)


def _check(config: RunConfig, output: Path, world_size: int) -> None:
    """Check a description before its run directory is created. An existing run was checked when it was created.

    Raises:
        BadInput: the description cannot be run.
    """
    run = RunDirectory(output)
    if ((output / "run.yaml").exists() and not run.never_began()) or (is_rank() and os.environ["RANK"] != "0"):
        return
    from .adapters.start import check_start
    from .check import check_run

    check_run(config, world_size)
    check_start(config.lora)


# ---------------------------------------------------------------------------------------------------- several processes


def _run_ranks(config: RunConfig, output: Path, arguments: list[str], processes: int) -> int:
    run = RunDirectory(output).open(config, arguments)
    try:
        if run.is_finished():
            print(closing(run.summary(), run))
            return FINISHED
        _say_starting(run, config, os.getpid())
    finally:
        run.release()
    ranks, codes = launch.run_ranks(["resume", str(output)], processes, run)
    return _verdict(run, ranks, codes)


class _Crash(RunFailed):
    """An unexpected error, which is its `__cause__`.

    Args:
        details: file with the traceback; empty if it could not be written.
    """

    def __init__(self, error: BaseException, details: str) -> None:
        where = f" (details in {details})" if details else ""
        super().__init__(f"{type(error).__name__}: {_sentence(error)}{where}")
        self.details = details


def _verdict(run: RunDirectory, ranks: Ranks, codes: list[int]) -> int:
    """The exit code of a run whose ranks have all ended.

    Raises:
        BadInput, RunFailed: the first failure, with its rank.
    """
    asked, status, failure = run.stop_requested(), run.status(), _failure(ranks, codes)
    if status.get("state") in ("finished", "stopped"):
        return FINISHED
    if asked and failure is None:
        _set_status(run, "stopped")
        return FINISHED
    failure = failure or Failure(0, "the training processes exited unexpectedly; see their output above")
    if (status.get("state"), status.get("error")) != ("failed", failure.sentence):
        _set_status(run, "failed", error=failure.sentence, bad_input=failure.bad_input)
    where = f" (details in {failure.details})" if failure.details else ""
    raise BadInput(failure.sentence) if failure.bad_input else RunFailed(f"{failure.sentence}{where}")


def _failure(ranks: Ranks, codes: list[int]) -> Failure | None:
    """The first failure: what a rank reported, or the signal that killed it."""
    reported = cause(ranks.failures.reports())
    if reported is not None and not reported.lost_peer:
        return reported
    for rank, number in ranks.killed_by.items():
        name = signal.Signals(number).name
        hint = "; the system does this when memory runs out" if name == "SIGKILL" else ""
        return Failure(rank, f"rank {rank} was killed by {name}{hint}")
    if reported is not None:
        return reported
    for rank, code in enumerate(codes):
        if code > 0:
            return Failure(rank, f"rank {rank} exited with code {code}; see the output above")
    return None


def _set_status(run: RunDirectory, state: str, **fields: object) -> None:
    """Replace the status of a run whose processes have ended, unless another process has resumed it."""
    if not (run.path / "run.yaml").is_file():
        return
    with suppress(BadInput, OSError):
        run.acquire(timeout=5)
        try:
            run.write_status(state, progress=None, **fields)
        finally:
            run.release()


def _run_as_rank(config: RunConfig, output: Path, arguments: list[str]) -> int:
    """Run one rank of a distributed run; a failure is reported to the other ranks, which then exit as well."""
    run, rank, failures = RunDirectory(output), int(os.environ["RANK"]), Failures.join()

    def last_words() -> None:
        if rank == 0:
            failure = cause(failures.reports())
            _write_failure(run, failure.sentence, failure.bad_input)
            if PARENT not in os.environ:  # else the parent process prints it
                print(f"failed: {failure.sentence}", file=sys.stderr, flush=True)

    watch = FailureWatch(failures.exist, last_words)
    try:
        code = _run_here(config, run, arguments)
    except Exception as error:  # noqa: BLE001 - the other ranks must be told of any error
        origin = error.__cause__ if isinstance(error, _Crash) else error
        failures.report(Failure.of(rank, origin, _sentence(origin), getattr(error, "details", "")))
        failure = cause(failures.reports())
        if rank == 0:
            _write_failure(run, failure.sentence, failure.bad_input)
        if PARENT not in os.environ:
            print(f"failed: {failure.sentence}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(BAD_INPUT if failure.bad_input else FAILED)  # a normal exit could wait for the other ranks
    watch.stop()
    run.release()
    return code


# ---------------------------------------------------------------------------------------------------------- one process


def _run_alone(config: RunConfig, run: RunDirectory, arguments: list[str]) -> int:
    try:
        return _run_here(config, run, arguments)
    except Exception as error:
        origin = error.__cause__ if isinstance(error, _Crash) else error
        _write_failure(run, _sentence(origin), isinstance(origin, BadInput))
        raise
    finally:
        run.release()


def _run_here(config: RunConfig, run: RunDirectory, arguments: list[str]) -> int:
    # Take the lock before the imports, which take seconds, so that other processes see that the run is starting.
    fault = None
    if not is_rank() or os.environ["RANK"] == "0":
        try:
            run.open(config, arguments)
            if not run.is_finished():
                _say_starting(run, config, _launcher())
        except BadInput as error:
            fault = str(error)
    from .utils.distributed import Processes

    processes = Processes(config.runtime.device)
    if fault := processes.broadcast(fault):
        raise BadInput(fault)
    code = _train_in(config, run, processes)
    processes.close()  # only without an error: else other ranks may still wait in a collective operation
    return code


def _launcher() -> int:
    """Id of the process whose end ends the whole run."""
    return int(os.environ.get(PARENT) or (os.getppid() if is_rank() else os.getpid()))


def _say_starting(run: RunDirectory, config: RunConfig, launcher: int) -> None:
    """Write the status `starting`, and print a message if the run is extended.

    Args:
        launcher: id of the process whose end ends the whole run.
    """
    run.write_status(
        "starting",
        iteration=run.status().get("iteration", 0),
        iterations=config.runtime.iterations,
        error=None,
        bad_input=False,
        progress=None,
        launcher=launch.identity(launcher),
        description=description_hash(config),
    )
    if run.extended_from is not None:
        print(f"the run is extended from {run.extended_from} to {config.runtime.iterations} iterations")
        if config.optimizer.schedule == "linear":
            print("optimizer.schedule: the learning rate now follows the longer run and reaches 0 at its new end")


def _train_in(config: RunConfig, run: RunDirectory, processes: "Processes") -> int:
    if processes.broadcast(run.is_finished()):
        if processes.is_main:
            print(closing(run.summary(), run))
        return FINISHED
    quiet_libraries()
    from .objectives import make_objective

    objective = make_objective(config)
    line = lambda event: objective.line(event["objective"])  # noqa: E731
    progress = Progress(config.runtime.iterations, line) if processes.is_main else None
    try:
        from .loop import Trainer

        trainer = Trainer(config, run, processes, progress or (lambda event: None))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(trainer, "interrupted", True))
        summary = trainer.train()
    except KeyboardInterrupt:
        if processes.is_main:
            run.write_status("stopped", progress=None)
        return FINISHED
    except Exception as error:
        if isinstance(error, (BadInput, RunFailed, OSError)):
            raise
        raise _Crash(error, _write_details(run, processes.rank, error)) from error
    finally:
        if progress is not None:
            progress.close()
    if processes.is_main:
        print(closing(summary, run, lambda events: objective.closing([event["objective"] for event in events])))
    return FINISHED


def _write_failure(run: RunDirectory, sentence: str, bad_input: bool) -> None:
    """Write the error to the status, if this process holds the run's lock and the disk is writable."""
    with suppress(RunFailed, OSError):
        if not run.holds_lock:
            return
        run.write_status("failed", error=sentence, bad_input=bad_input, progress=None)


def _write_details(run: RunDirectory, rank: int, error: BaseException) -> str:
    """Write the traceback into the run directory; returns the path of the file."""
    report = run.path / f"error-{rank}.txt"
    with suppress(RunFailed, OSError):
        run.require_ownership()
        report.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        return str(report)
    return ""


def _sentence(error: BaseException) -> str:
    """The error message in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "the device ran out of memory: turn on model.gradient_checkpointing, lower objective.batch_size and "
            f"rollout.batch_size, or raise reserve_gb of a connected model ({text})"
        )
    return text
