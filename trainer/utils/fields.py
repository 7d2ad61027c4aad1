"""Constraints of a settings field, for widgets and the reference pages."""

import typing
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, core_schema


@dataclass(frozen=True)
class OneOf:
    """For `Annotated[str, OneOf(names)]`: the string must be a name of a registry, which is looked up on validation.

    Attributes:
        names: returns the names.
    """

    names: Callable[[], list[str]]

    def check(self, value: str) -> str:
        if value not in self.names():
            raise PydanticCustomError("one_of", "choose one of {names}", {"names": ", ".join(map(repr, self.names()))})
        return value

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))


def choices(field: FieldInfo) -> list[str] | None:
    """The allowed values of a field with `Literal` or `OneOf`, else None."""
    if typing.get_origin(field.annotation) is typing.Literal:
        return list(typing.get_args(field.annotation))
    return next((rule.names() for rule in rules(field) if isinstance(rule, OneOf)), None)


def rules(field: FieldInfo) -> list:
    """Constraints (annotated_types) of a field's value, including those inside a union."""
    return [*field.metadata, *_inner_rules(field.annotation)]


def _inner_rules(annotation: object) -> list:
    """Bounds inside a union such as `Annotated[int, ge=1] | None`."""
    rules = []
    for option in typing.get_args(annotation):
        for extra in getattr(option, "__metadata__", ()):
            rules += extra.metadata if isinstance(extra, FieldInfo) else [extra]
    return rules
