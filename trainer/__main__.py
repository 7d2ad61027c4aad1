"""Start file of the program, run as `python -m trainer` or by its absolute path."""

import sys
from pathlib import Path

if not __package__:
    # Started by path: Python's own first search folder is this file's, or none at all in portable builds.
    root = Path(__file__).resolve().parent
    sys.path[:] = [str(root.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != root)]

from trainer.runs.lifeline import is_rank, tie_to_parent

if is_rank():
    tie_to_parent()

from trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
