"""The program with a trainer that does nothing but what BEHAVIOUR says: real ranks without a model.

    python rank_stub.py train|resume ...      a process of the program, as its start file would be
    python rank_stub.py launch ...            the same, and its ranks are stubs too

BEHAVIOUR is `ACTION` or `ACTION,OTHER`: what rank 1 (and a process that is alone) does, and what the others do.
"""

import os
import signal
import sys
import time
import types
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from trainer.runs.lifeline import is_rank, tie_to_parent  # noqa: E402

if is_rank():
    tie_to_parent()

from trainer import cli, train  # noqa: E402
from trainer.runs import launch  # noqa: E402
from trainer.utils.errors import BadInput  # noqa: E402


class Trainer:
    """Stands for `trainer.loop.Trainer`."""

    def __init__(self, config: object, run: object, processes: object, listener: object) -> None:
        self.run, self.processes, self.interrupted = run, processes, False

    def train(self) -> dict:
        first, *rest = os.environ["BEHAVIOUR"].split(",")
        action = first if not rest or self.processes.rank == 1 else rest[0]
        if self.processes.is_main:
            self.run.write_status("running")
        self.processes.wait()
        print(f"rank {self.processes.rank} is {os.getpid()}", flush=True)
        return getattr(self, action)()

    def fail(self) -> dict:
        raise RuntimeError("the judge\nanswers 400")

    def refuse(self) -> dict:
        raise BadInput("lora.targets: 'x' matches no linear layer")

    def die(self) -> dict:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def hang(self) -> dict:
        """Like a collective operation that waits for a rank which is gone: neither signals nor requests are seen."""
        time.sleep(1000)
        return {}

    def collective(self) -> dict:
        self.processes.wait()
        return self.hang()


def quiet() -> None:
    """Load none of the libraries whose messages the program would turn off."""


def main() -> int:
    sys.modules["trainer.loop"] = types.SimpleNamespace(Trainer=Trainer)
    train._quiet = quiet
    launch.START_FILE = Path(__file__)
    launch.PATIENCE = 1.0
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
