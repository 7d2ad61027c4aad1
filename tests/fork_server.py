"""Real processes of the program without the seconds of imports: this one imports everything, each run is a fork of it.

Reads a JSON object per line from stdin and answers each with one. It computes nothing itself.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path


def preload() -> None:
    import torch

    torch.set_num_threads(1)
    import peft  # noqa: F401
    from diffusers import AutoencoderTiny, SD3Transformer2DModel, StableDiffusion3Pipeline  # noqa: F401
    from matplotlib.figure import Figure  # noqa: F401
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401

    import trainer.loop  # noqa: F401


def start(arguments: list[str], output: str, die: list | None, file_size: int | None) -> int:
    """Fork a child that runs the command line; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if file_size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        if die:
            arm(*die)
        from trainer.cli import main

        code = main(arguments)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 - what Python itself does at the end of a program
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def arm(place: str, count: int) -> None:
    """Let this process kill itself at the `count`-th call of a function, just before it does its work."""
    import torch

    from trainer.models.diffusers.sd3 import SD3Model

    owner, name = {
        "predict": (SD3Model, "predict"),
        "backward": (torch.Tensor, "backward"),
        "optimizer": (torch.optim.AdamW, "step"),
        "flush": (os, "fsync"),
        "move": (os, "replace"),
    }[place]
    original, calls = getattr(owner, name), iter(range(1, count + 1))

    def counted(*args: object, **options: object) -> object:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(owner, name, counted)


def wait(pid: int, timeout: float) -> int | None:
    """Exit code, negative for a signal; None when it still runs."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def serve() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    preload()
    for line in sys.stdin:
        request = json.loads(line)
        answer = wait(**request) if "pid" in request else start(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
