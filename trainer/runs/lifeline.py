"""Ties a rank of a distributed run to its launcher and to the other ranks: it ends when they do.

Imported before anything heavy, so that a rank whose launcher ends while it imports ends as well.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

PARENT = "DANCEGRPO_PARENT"
"""Environment variable: the process that a rank belongs to, where this program started it."""
POLL = 0.5
"""Seconds between two looks at the launcher and at the other ranks."""
GRACE = 2.0
"""Seconds a rank has to end by itself after another has failed."""
_PR_SET_PDEATHSIG = 1


def is_rank() -> bool:
    """Whether this process is one of several that share a run, however they were started."""
    return "RANK" in os.environ and "LOCAL_RANK" in os.environ


def tie_to_parent(use_signal: bool = True) -> None:
    """End this process when its parent ends: by a signal from the kernel on Linux, by a watching thread everywhere.

    Args:
        use_signal: whether to ask the kernel; the thread alone is slower by half a second.
    """
    parent = os.getppid()
    if sys.platform == "linux" and use_signal:
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(parent) != os.environ.get(PARENT, str(parent)) or parent != os.getppid():  # it had ended before
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
    """Ends this process soon after another rank has failed, also while it waits in a collective operation.

    Args:
        reported: whether a rank has failed; asked again and again, in a thread.
        last_words: called before the end.
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
        if self._stopped.wait(GRACE):  # it may be ending by itself, for the same reason
            return
        try:
            self.last_words()
        finally:
            end()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        self._thread.join()


def end() -> None:
    """End this process now, without waiting for anybody; a file that it was writing stays a temporary one."""
    os._exit(1)
