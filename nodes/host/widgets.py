"""The widget of a field with a number, a choice or a flag, with the field's default, range and description."""

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from comfy_api.latest import io
from pydantic.fields import FieldInfo

from ...trainer.utils.fields import choices, rules

LARGEST = 2**31 - 1


def field_widget(
    name: str,
    field: FieldInfo,
    limits: tuple[float, float] = (-LARGEST, LARGEST),
    step: float = 0.01,
    margin: float = 0.0,
    **shown: Any,
) -> io.Input | None:
    """The widget; None for fields of other types.

    Args:
        limits: range of a number whose field has no bounds.
        step: step of a fraction.
        margin: distance from a bound that is excluded itself; any margin is 1 for a whole number.
        shown: further arguments of the widget, which replace the field's own default and description.
    """
    common = {"id": name, "default": field.get_default(call_default_factory=True), "tooltip": field.description} | shown
    if (options := choices(field)) is not None:
        return io.Combo.Input(options=options, **common)
    if field.annotation is bool:
        return io.Boolean.Input(**common)
    if field.annotation is int:
        return io.Int.Input(**_range(field, limits, 1 if margin else 0), **common)
    if float in _types(field.annotation):
        return io.Float.Input(**_range(field, limits, margin), step=step, round=False, **common)
    return None


def _types(annotation: Any) -> set[Any]:
    """A type, or the types of a union, without `Annotated`."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return {get_args(part)[0] if get_origin(part) is Annotated else part for part in parts}


def _range(field: FieldInfo, limits: tuple[float, float], margin: float) -> dict[str, float]:
    """Range of the widget; the value is validated later."""
    low, high = limits
    for rule in rules(field):
        low = rule.ge if isinstance(rule, Ge) else rule.gt + margin if isinstance(rule, Gt) else low
        high = rule.le if isinstance(rule, Le) else rule.lt - margin if isinstance(rule, Lt) else high
    return {"min": low, "max": high}
