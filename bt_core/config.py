"""Strict settings: YAML in, a validated pydantic model or one message with every fault out."""

import difflib
from collections.abc import Mapping
from typing import Any, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from bt_core import storage
from bt_core.errors import ConfigError


class StrictModel(BaseModel):
    """A setting group: immutable, unknown keys refused, fields documented by their docstrings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
    )


class OneOf(StrictModel):
    """A setting group of which exactly one field is given."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"give exactly one of {names}; got {', '.join(given) or 'none'}")
        return self


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], content: object, where: str) -> Model:
    """Validate `content` as `model`.

    Args:
        model: the expected pydantic model.
        content: what was read, normally a dict.
        where: the file or argument it came from, for the message.

    Raises:
        ConfigError: lists every fault with its dotted path; an unknown key is answered with the
            valid keys and the nearest one.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        faults = [_fault_text(model, dict(fault)) for fault in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(faults)) from error


def load_yaml(location: str) -> dict[str, Any]:
    """Return a YAML file's mapping.

    Raises:
        ConfigError: if the file is missing, is not YAML, or is not a mapping.
    """
    try:
        content = yaml.safe_load(storage.read_bytes(location))
    except FileNotFoundError as error:
        raise ConfigError(f"{location} does not exist") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{location} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{location} must hold a mapping of settings, not {type(content).__name__}"
        )
    return content


def apply_overrides(content: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return `content` with dotted overrides such as `train.epochs=3` applied (values are YAML).

    Raises:
        ConfigError: if an override has no `=` or is not YAML, and as `with_values`.
    """
    result = content
    for override in overrides:
        path, separator, value = override.partition("=")
        if not separator or not path:
            raise ConfigError(f"--set {override!r}: write it as section.key=value")
        try:
            result = with_values(result, {path: yaml.safe_load(value)})
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: the value is not valid YAML") from error
        except ConfigError as error:
            raise ConfigError(f"--set {override!r}: {error}") from error
    return result


def with_values(content: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` with values set at dotted keys such as `train.epochs`.

    Entries of a list are named by their number from 0, as in `train.stages.1.epochs`.

    Raises:
        ConfigError: if a key runs through a plain value, or names an entry that a list has not.
    """
    result = content
    for path, value in values.items():
        result = _with_value(result, path.split("."), value)
    return result


def _with_value(node: Any, path: list[str], value: Any) -> Any:
    """Return a copy of nested mappings and lists with one value replaced."""
    if not path:
        return value
    key, *rest = path
    if isinstance(node, dict):
        return {**node, key: _with_value(node.get(key, {}), rest, value)}
    if not isinstance(node, list):
        raise ConfigError(f"{key!r} is below a value, not a section")
    if not key.isdecimal() or int(key) >= len(node):
        raise ConfigError(f"{key!r} is none of the list's entries, which are 0 to {len(node) - 1}")
    copy = [*node]
    copy[int(key)] = _with_value(node[int(key)], rest, value)
    return copy


def _fault_text(model: type[BaseModel], fault: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] != "extra_forbidden":
        given = fault.get("input")
        shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
        return f"{path}: {fault['msg']}{shown}"
    valid = _valid_keys(model, list(fault["loc"][:-1]))
    near = difflib.get_close_matches(str(fault["loc"][-1]), valid, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    return f"unknown key {path!r}{hint} (valid here: {', '.join(valid)})"


def _valid_keys(model: type[BaseModel], path: list[Any]) -> list[str]:
    """Return the field names of the model that a path of field names leads to."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # a list index or a union tag
        nested = [field.annotation, *get_args(field.annotation)]
        models = [t for t in nested if isinstance(t, type) and issubclass(t, BaseModel)]
        if not models:
            return []
        model = models[0]
    return sorted(model.model_fields)
