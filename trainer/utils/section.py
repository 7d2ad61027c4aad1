"""The base class of the sections of a run description."""

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(ge=1, le=1_000_000)]


class Section(BaseModel):
    """A section of a run description: immutable; unknown keys, NaN, infinity and booleans for numbers
    are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` where a number belongs, which pydantic would take for 1."""
        if any(isinstance(part, bool) for part in (value if isinstance(value, list | tuple) else (value,))):
            types = _types(cls.model_fields[info.field_name].annotation)
            if bool not in types and (int in types or float in types):
                raise PydanticCustomError("bool_for_number", "a number is needed")
        return value


def _types(annotation: Any) -> list[Any]:
    """The plain types in an annotation, such as int and None in `Annotated[int, ...] | None`."""
    inner = get_args(annotation)
    return [part for argument in inner for part in _types(argument)] if inner else [annotation]
