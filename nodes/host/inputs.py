"""Checks of input types: in API format any literal can replace a link, and a link of type * can carry any value."""

import math
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from ...trainer.utils.errors import BadInput, shorten

T = TypeVar("T")
NO_PROMPTS = "prompts is empty: enter one prompt per line (lines that begin with # are comments)"
LITERALS = (str, bytes, bool, int, float, dict, list, tuple)


def linked(value: T, field: str, socket: str) -> T:
    """Check for a MODEL, CLIP, VAE or other object of ComfyUI, and return it.

    Raises:
        BadInput: the workflow has a literal value instead of a link.
    """
    if value is None or isinstance(value, LITERALS):
        raise _not_linked(value, field, socket)
    return value


def image_batch(value: object, field: str) -> Tensor:
    """Check for an IMAGE, `[B, H, W, C]` with 1, 3 or 4 channels and at least one image, and return it.

    Raises:
        BadInput: it is something else.
    """
    if not isinstance(value, Tensor):
        raise _not_linked(value, field, "IMAGE")
    if value.ndim != 4 or value.shape[-1] not in (1, 3, 4) or 0 in value.shape:
        raise BadInput(
            f"{field} has shape {tuple(value.shape)}: it must be [batch, height, width, channels], not empty, with 1, "
            "3 or 4 channels"
        )
    return value


def lora_tensors(value: object, field: str) -> dict[str, Tensor]:
    """Check for a LORA_MODEL, and return it.

    Raises:
        BadInput: it is something else.
    """
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise _not_linked(value, field, "LORA_MODEL")
    return value


def conditioning(value: object, field: str) -> list:
    """Check for a CONDITIONING, and return it.

    Raises:
        BadInput: it is something else.
    """
    parts = value if isinstance(value, list) else [None]
    if not all(isinstance(part, list | tuple) and len(part) == 2 and isinstance(part[1], dict) for part in parts):
        raise _not_linked(value, field, "CONDITIONING")
    return value


def noise_levels(value: object, field: str) -> Tensor:
    """Check for SIGMAS, `[T + 1]`, and return them.

    Raises:
        BadInput: they are something else.
    """
    if not isinstance(value, Tensor) or value.ndim != 1:
        raise _not_linked(value, field, "SIGMAS")
    return value


def finite(value: float, field: str) -> float:
    """Check for a finite number, and return it: Python's JSON parser accepts NaN and Infinity.

    Raises:
        BadInput: it is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise BadInput(f"{field} is {shorten(value)}: give a finite number")
    return value


def text(value: object, field: str) -> str:
    """Check for a string, and return it.

    Raises:
        BadInput: it is something else.
    """
    if not isinstance(value, str):
        raise BadInput(f"{field} is {shorten(value)}, which is not text")
    return value


def accepted(value: object, field: str, check: Callable[[str], object]) -> bool | str:
    """The answer of `validate_inputs` for a text widget, whose value may be any literal.

    Args:
        value: None if it comes through a link and is not known yet.
        check: raises BadInput for a text that is refused.
    """
    if value is None:
        return True
    try:
        check(text(value, field))
    except BadInput as error:
        return str(error)
    return True


def whole_number(value: object, field: str, low: int, high: int) -> int:
    """Check for an integer in a range, and return it.

    Raises:
        BadInput: it is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadInput(f"{field} is {shorten(value)}: give a whole number from {low} to {high}")
    return value


def single(values: list, field: str) -> object:
    """The value of an input that must not be a list, on a node with `is_input_list`.

    Raises:
        BadInput: a list of several values, or an empty list, is connected.
    """
    if len(values) != 1:
        raise BadInput(f"{field} is connected to a list of {len(values)} values: connect a single value")
    return values[0]


def _not_linked(value: object, field: str, socket: str) -> BadInput:
    return BadInput(f"{field} must be connected to an output of type {socket}; it is a {type(value).__name__} instead")
