"""The reference of all settings, written from the run description's own fields: `python -m trainer.reference`."""

import types
import typing

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .config import RunConfig

HEAD = """# Settings of a run

Every setting of a run description (YAML or JSON), with its default. Unknown keys are errors. Any setting can be given
on the command line: `python -m trainer train run.yaml --set rollout.eta=0.5`. This page is made by `make docs`.
"""
_SIGNS = {Ge: ("at least", "ge"), Gt: ("above", "gt"), Le: ("at most", "le"), Lt: ("below", "lt")}


def markdown() -> str:
    """The page docs/configuration.md."""
    parts = [HEAD]
    for name, field in RunConfig.model_fields.items():
        section, many = _section(field.annotation)
        parts.append(_table(f"{name}{'[]' if many else ''}", section))
    return "\n".join(parts)


def _table(title: str, section: type[BaseModel]) -> str:
    rows = [
        f"## {title}",
        "",
        (section.__doc__ or "").strip(),
        "",
        "| setting | default | accepted | meaning |",
        "|---|---|---|---|",
    ]
    nested = []
    for name, field in section.model_fields.items():
        inner, many = _section(field.annotation)
        if inner:
            nested.append(_table(f"{title}.{name}{'[]' if many else ''}", inner))
        rows.append(
            f"| `{name}` | {_default(field)} | {_accepted(field)} | {field.description or _link(title, name)} |"
        )
    return "\n".join([*rows, "", *nested])


def _link(title: str, name: str) -> str:
    return f"see `{title}.{name}` below"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return ""
    return f"`{'null' if value is None else list(value) if isinstance(value, tuple) else value}`"


def _accepted(field: FieldInfo) -> str:
    words = [_type(field.annotation)]
    for rule in rules(field):
        for kind, (word, attribute) in _SIGNS.items():
            if isinstance(rule, kind):
                words.append(f"{word} {getattr(rule, attribute):g}")
        if isinstance(rule, MultipleOf):
            words.append(f"multiple of {rule.multiple_of}")
        if isinstance(rule, MinLen):
            words.append("not empty")
    return ", ".join(words)


def rules(field: FieldInfo) -> list:
    """Bounds of a setting's value."""
    return [*field.metadata, *_inner_rules(field.annotation)]


def _inner_rules(annotation: object) -> list:
    """Bounds inside a union such as `Annotated[int, ge=1] | None`."""
    rules = []
    for option in typing.get_args(annotation):
        for extra in getattr(option, "__metadata__", ()):
            rules += extra.metadata if isinstance(extra, FieldInfo) else [extra]
    return rules


def _type(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type(a) for a in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} numbers"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {int: "whole number", float: "number", str: "text", bool: "true, false"}.get(annotation, str(annotation))


def _section(annotation: object) -> tuple[type[BaseModel] | None, bool]:
    """The section an annotation holds, if any, and whether in a list."""
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option, typing.get_origin(annotation) is list
        for inner in typing.get_args(option):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                return inner, typing.get_origin(option) is list
    return None, False


if __name__ == "__main__":
    print(markdown(), end="")
