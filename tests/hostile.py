"""Hostile values and damaged files, the same for the same seed: for fuzz tests."""

import copy
import json
import random
from typing import Any

TEXTS = [
    "",
    " \t\n",
    "../../../etc/passwd",
    "/etc/passwd",
    "C:\\Windows\\win.ini",
    "a\0b",
    "\ud83e",
    "\u202e\u2028\x85\x1b[2J\x07",
    "nan",
    "1e999",
    "!!python/object/apply:os.system ['true']",
    "&a [*a]",
    "{{x}} %s %n ${HOME} $(true) `true` ; rm -rf x",
    "<script>alert(1)</script>",
    "<|im_end|>" * 50,
    "\N{FOX FACE}" * 2_000,
    "(" * 3_000,
    "x" * 100_000,
    "[" * 20_000,
    "CON",
    "embedded",
    "http://[::1",
]
NUMBERS = [0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**40, 10**400, 0.0, -0.0, 1e-320, 1e308, -1e308, 0.1, 3.5]
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]
OTHERS = [None, True, False, [], {}, [[]], [None], {"": None}, ["0", 0], {"__value__": [1]}, {"name": ["x"]}]


def value(rng: random.Random, finite: bool = False) -> Any:
    """Any of them; a fresh copy.

    Args:
        finite: without NaN and infinities, which are no JSON.
    """
    kinds = [TEXTS, NUMBERS, OTHERS] + ([] if finite else [NOT_FINITE])
    return copy.deepcopy(rng.choice(rng.choice(kinds)))


def mutated(data: Any, rng: random.Random) -> Any:
    """Plain data with one place in it replaced, removed or moved to another key."""
    data = copy.deepcopy(data)
    places = list(_places(data))
    if not places:
        return value(rng, finite=True)
    owner, key = rng.choice(places)
    action = rng.random()
    if action < 0.75:
        owner[key] = value(rng, finite=True)
    elif action < 0.9 or isinstance(owner, list):
        del owner[key]
    else:
        owner[f"{key}_"] = owner.pop(key)
    return data


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in plain data."""
    keys = data.keys() if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    return [(data, key) for key in keys] + [place for key in keys for place in _places(data[key])]


def dump(data: Any) -> bytes:
    """JSON, also of what is no text: a lone surrogate is escaped, so that it gets past the file and into the reader."""
    return json.dumps(data).encode()


WHOLE = [b"", b"null", b"[]", b"[1]", b"{}", b"5", b"true", b'"text"', b"{", b"\n\n", b"[" * 100_000]
WHOLE += [b"\0" * 512, b"\xff\xfe\x00", b"\xef\xbb\xbf{}"]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file that was cut, overwritten in places, or replaced as a whole."""
    action = rng.choice(["cut", "flip", "insert", "replace", "replace", "twice"])
    if action == "replace" or not content:
        return rng.choice(WHOLE)
    if action == "cut":
        return content[: rng.randrange(len(content))]
    if action == "twice":
        return content + content
    place = rng.randrange(len(content))
    if action == "insert":
        return content[:place] + rng.randbytes(rng.randint(1, 64)) + content[place:]
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 4, 64])):
        changed[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(changed)


def traceback_in(text: str) -> bool:
    """Whether a user is shown Python's own words for a failure."""
    return any(mark in text for mark in ("Traceback (most recent call last)", 'File "', "Error: ("))
