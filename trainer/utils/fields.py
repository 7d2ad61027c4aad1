"""Constraints of a settings field, for widgets and the reference pages."""

import typing

from pydantic.fields import FieldInfo


def rules(field: FieldInfo) -> list:
    """Constraint objects (annotated_types) of a field's value, those inside a union included."""
    return [*field.metadata, *_inner_rules(field.annotation)]


def _inner_rules(annotation: object) -> list:
    """Bounds inside a union such as `Annotated[int, ge=1] | None`."""
    rules = []
    for option in typing.get_args(annotation):
        for extra in getattr(option, "__metadata__", ()):
            rules += extra.metadata if isinstance(extra, FieldInfo) else [extra]
    return rules
