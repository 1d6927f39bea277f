"""What a study is asked: a frozen, typed spec, set from the command line field by field."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from jambascope.errors import ConfigError


class _Files:
    """Marks a field."""


Files = Annotated[tuple[str, ...], _Files()]
"""A field of paths: of which the study reads what is in them, so that a run is of the contents too."""


def models_of(*names: str) -> Any:
    """The field of a study's models: those that its question compares, unless told otherwise."""
    return Field(
        names,
        description="Packaged names, checkpoint directories or hub ids. Directories of one recipe that differ in their "
        "training seed are pooled, and intervals are then over trainings, too.",
    )


class Spec(BaseModel):
    """What every study is asked; a study adds fields of its own, each with a default and a description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    models: tuple[str, ...] = models_of("jamba-micro")
    seeds: tuple[int, ...] = Field((0,), description="Of the prompts; each draws its own.")

    @field_validator("*")
    @classmethod
    def _some_each_once(cls, value: Any, info: ValidationInfo) -> Any:
        """Of every field of several values; none only where that is the default."""
        if isinstance(value, tuple):
            missing = not value and cls.model_fields[info.field_name].default != ()
            if missing or len(set(value)) < len(value):
                raise ValueError("give at least one, each once")
        return value

    @field_validator("seeds")
    @classmethod
    def _usable(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if min(values) < 0:
            raise ValueError("seeds are whole numbers from 0 on")
        return values


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """``["shots=4", ...]`` as fields and texts.

    Raises:
        ConfigError: one that is not KEY=VALUE, or a key that comes twice.
    """
    found: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise ConfigError(f"--set {setting!r} must be KEY=VALUE, such as --set seeds=0,1")
        if key in found:
            raise ConfigError(f"--set {key} is given twice; leave one out")
        found[key] = value.strip()
    return found


def make_spec(study: str, kind: type[Spec], values: Mapping[str, Any]) -> Spec:
    """A spec from values, or from their texts as ``--set`` takes them: several values of a field with commas.

    Raises:
        ConfigError: names the field, its value and what it takes; for an unknown field the nearest that exists.
    """
    for name in values:
        if name not in kind.model_fields:
            near = difflib.get_close_matches(name, kind.model_fields, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"{name!r} is no setting of {study}; {hint}there are {', '.join(kind.model_fields)}")
    try:
        return kind.model_validate({name: _untexted(kind, name, value) for name, value in values.items()})
    except ValidationError as e:
        first = e.errors()[0]
        where = str(first["loc"][0]) if first["loc"] else ""
        value = f"{where}={values.get(where)!r}" if where else "the settings"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{study}: {value}: {message[:1].lower()}{message[1:]} ({_described(kind, where)})") from None


def _untexted(kind: type[Spec], name: str, value: Any) -> Any:
    """The text of a field of several values, taken apart; pydantic reads single values from their texts."""
    if isinstance(value, str) and typing.get_origin(kind.model_fields[name].annotation) is tuple:
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def files_of(spec: Spec) -> tuple[str, ...]:
    """The paths that fields of type ``Files`` name, each once."""
    fields = type(spec).model_fields.items()
    named = [name for name, field in fields if any(isinstance(mark, _Files) for mark in field.metadata)]
    return tuple(dict.fromkeys(path for name in named for path in getattr(spec, name)))


def as_text(value: Any) -> str:
    """A value as ``--set`` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(as_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def changed(spec: Spec) -> dict[str, str]:
    """The fields that differ from their defaults, as texts."""
    fields = type(spec).model_fields
    return {name: as_text(getattr(spec, name)) for name in fields if getattr(spec, name) != fields[name].default}


def describe(kind: type[Spec]) -> list[tuple[str, str, str]]:
    """Name, default and description of every field."""
    return [(name, as_text(field.default), field.description or "") for name, field in kind.model_fields.items()]


def _described(kind: type[Spec], name: str) -> str:
    field = kind.model_fields.get(name)
    return f"default {as_text(field.default)}: {field.description}" if field else "see: jambascope study list NAME"
