"""How large the weights of a diffusers folder are, read from file headers alone."""

import json
import struct
from pathlib import Path

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 4}
"""Of a number of a type; of "auto" at most."""
_LARGEST_HEADER = 100_000_000


def parameter_count(component: Path) -> int:
    """Numbers in the `.safetensors` files of a folder; 0 where there are none.

    A folder that holds the weights twice (a `fp16` variant beside them) is counted once.
    """
    counts: dict[str, int] = {}
    for file in sorted(component.glob("*.safetensors")):
        counts.update(_tensors(file))
    return sum(counts.values())


def _tensors(file: Path) -> dict[str, int]:
    """Numbers per tensor name."""
    with file.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length < _LARGEST_HEADER:
            return {}
        try:
            header = json.loads(handle.read(length))
        except ValueError:
            return {}
    result = {}
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1
            for size in entry["shape"]:
                count *= size
            result[name] = count
    return result
