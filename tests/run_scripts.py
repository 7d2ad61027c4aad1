"""Runs several scripts as `python SCRIPT ARGUMENTS` would, each in a fork of this process, which has imported torch.

`python run_scripts.py FOLDER` reads FOLDER/commands.json, a list of `[script, *arguments]` or
`["-m", module, *arguments]`, and writes, for each by its number, its output to FOLDER/<number>.txt; their exit codes go
to FOLDER/codes.json.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path


def run(command: list[str], output: Path) -> None:
    """Be the script from here on."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if as_module := command[0] == "-m":
        command = command[1:]
    sys.argv, sys.path[0] = command, str(Path.cwd() if as_module else Path(command[0]).parent.resolve())
    code = 1
    try:
        if as_module:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - what Python itself does at the end of a program
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    import diffusers  # noqa: F401
    import open_clip  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    codes = []
    for number, command in enumerate(json.loads((folder / "commands.json").read_text())):
        pid = os.fork()
        if not pid:
            run(command, folder / f"{number}.txt")
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
