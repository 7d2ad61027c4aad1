"""Ends a rank of a distributed run when its launcher ends or another rank fails.

Imported before large libraries, so that it also works while they are being imported.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

PARENT = "DANCEGRPO_PARENT"
"""Environment variable with the id of the process that started a rank."""
POLL = 0.5
"""Seconds between two checks of the launcher and the other ranks."""
GRACE = 2.0
"""Seconds that a rank has to exit by itself after another rank has failed."""
_PR_SET_PDEATHSIG = 1


def is_rank() -> bool:
    """Whether this process is a rank of a distributed run, started by this program or by torchrun."""
    return "RANK" in os.environ and "LOCAL_RANK" in os.environ


def tie_to_parent(use_signal: bool = True) -> None:
    """End this process when its parent ends: on Linux by a kernel signal, on all systems by a polling thread.

    Args:
        use_signal: whether to use the kernel signal; the thread takes up to half a second longer.
    """
    parent = os.getppid()
    if sys.platform == "linux" and use_signal:
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(parent) != os.environ.get(PARENT, str(parent)) or parent != os.getppid():  # the parent has already ended
        end()
    threading.Thread(target=_follow_parent, args=(parent,), daemon=True, name="parent watch").start()


def _follow_parent(parent: int) -> None:
    is_alive = _parent_check(parent)
    while is_alive():
        time.sleep(POLL)
    end()


def _parent_check(parent: int) -> Callable[[], bool]:
    if os.name == "posix":  # an orphan gets another parent
        return lambda: os.getppid() == parent
    import psutil

    try:
        process = psutil.Process(parent)
    except psutil.NoSuchProcess:
        return lambda: False
    return process.is_running


class FailureWatch:
    """Ends this process soon after another rank has failed, even while it waits in a collective operation.

    Args:
        reported: returns whether a rank has failed; polled in a thread.
        last_words: called before this process exits.
    """

    def __init__(self, reported: Callable[[], bool], last_words: Callable[[], None]) -> None:
        self.reported, self.last_words = reported, last_words
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="failure watch")
        self._thread.start()

    def _follow(self) -> None:
        try:
            while not self.reported():
                if self._stopped.wait(POLL):
                    return
        except RuntimeError:  # the store has closed, because the run is over
            return
        if self._stopped.wait(GRACE):  # this rank may be exiting for the same reason
            return
        try:
            self.last_words()
        finally:
            end()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        self._thread.join()


def end() -> None:
    """Exit at once, without cleaning up; a file that is being written remains a temporary file."""
    os._exit(1)
