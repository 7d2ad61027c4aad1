"""Failures of the ranks of a distributed run, exchanged through the rendezvous store (TCPStore)."""

import json
import os
import re
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from ..utils.errors import BadInput, RunFailed, StoppedByWatchdog

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_PREFIX = "dancegrpo/failure"
_LOST_PEER = re.compile(r"gloo|nccl|connection (closed|reset)|peer|socket timeout|broken pipe", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """Why a rank ended.

    Attributes:
        sentence: the message for the user.
        bad_input: whether an input of the user is invalid.
        lost_peer: whether the rank only lost the connection to another rank.
        shared: whether every rank ends for this reason.
        details: file with the traceback; may be empty.
    """

    rank: int
    sentence: str
    bad_input: bool = False
    lost_peer: bool = False
    shared: bool = False
    details: str = ""

    @classmethod
    def of(cls, rank: int, error: BaseException, sentence: str, details: str = "") -> "Failure":
        """The failure that an error means.

        Args:
            sentence: the error in one line.
        """
        lost = type(error) is not RunFailed and isinstance(error, RuntimeError) and _LOST_PEER.search(str(error))
        bad_input, shared = isinstance(error, BadInput), isinstance(error, StoppedByWatchdog)
        return cls(rank, sentence, bad_input, bool(lost), shared, details)


class Failures:
    """Failure reports of the ranks of a run, kept in the rendezvous store.

    Reports can be sent while other ranks wait in a collective operation, and across hosts.

    Args:
        store: this process's connection to the store.
    """

    def __init__(self, store: "TCPStore") -> None:
        self.store = store
        self._prefix = f"{_PREFIX}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    @classmethod
    def join(cls) -> "Failures":
        """Connect to the store of the run that this process is a rank of."""
        from torch.distributed import TCPStore

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return cls(TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)))

    def report(self, failure: Failure) -> None:
        """Report a failure to all processes of the run."""
        index = self.store.add(f"{self._prefix}/reported", 1)
        self.store.set(f"{self._prefix}/{index}", json.dumps(asdict(failure)))

    def exist(self) -> bool:
        """Whether any rank has failed."""
        return self.store.add(f"{self._prefix}/reported", 0) > 0

    def reports(self) -> list[Failure]:
        """All failures, oldest first."""
        keys = [f"{self._prefix}/{i + 1}" for i in range(self.store.add(f"{self._prefix}/reported", 0))]
        return [Failure(**json.loads(self.store.get(key))) for key in keys if self.store.check([key])]


def cause(failures: list[Failure]) -> Failure | None:
    """The original failure; its sentence names the rank, unless several ranks report the same.

    Args:
        failures: oldest first.
    """
    if not failures:
        return None
    first = next((failure for failure in failures if not failure.lost_peer), failures[0])
    same = [failure for failure in failures if failure.sentence == first.sentence]
    if len(same) > 1 or first.shared:
        return first
    return replace(first, sentence=f"rank {first.rank}: {first.sentence}")
