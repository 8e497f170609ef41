"""Strict frozen configs <-> JSON <-> `--set a.b=c`.

A config is a frozen dataclass whose fields are bool, int, float, str, None-able versions of these, Literals, tuples,
string-keyed dicts, or further configs. Reading is strict: an unknown key, a missing key or a wrong type stops before
any work and names the path, the value and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fledge.errors import ConfigError, nearest

ConfigT = TypeVar("ConfigT")


def to_json(config: Any) -> Any:
    """The config as JSON values: dicts, lists, strings, numbers, booleans, None."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_json(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_json(value) for value in config]
    return config


def from_json(cls: type[ConfigT], data: object, *, path: str = "") -> ConfigT:
    """Build `cls` from what `to_json` wrote; `ConfigError` names the path of the first thing that does not fit."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path or cls.__name__}: expected an object with the fields of {cls.__name__}, got {data!r}")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cast(Any, cls))}
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown key '{_join(path, str(key))}'; {nearest(str(key), fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _read(hints[name], data[name], _join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing key '{_join(path, name)}'")
    return _construct(cls, values, path)


def override(config: ConfigT, assignments: Sequence[str]) -> ConfigT:
    """A copy of `config` with leaves replaced: each assignment reads `a.b=value`, the value in JSON or bare text.

    All of them hold before anything is checked, so settings that belong together may come in any order.
    """
    given: dict[tuple[str, ...], str] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set wants key=value, got '{assignment}'")
        given[tuple(path.split("."))] = text
    changed: ConfigT = _replace(config, given, ()) if given else config
    return changed


def check_range(config: object, names: str, least: float, most: float = math.inf) -> None:
    """`ValueError` for the first of these fields (their names, in words) that lies outside; None lies nowhere.

    What a config's own `__post_init__` calls: `_construct` puts the path before it.
    """
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            expected = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
            raise ValueError(f"{name} is {value}: expected {expected}")


def config_hash(config: Any) -> str:
    """sha256 of the canonical JSON of a config or of plain JSON values."""
    canonical = json.dumps(to_json(config), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _replace(config: Any, given: Mapping[tuple[str, ...], str], above: tuple[str, ...]) -> Any:
    """`config`, which stands at `above`, with the leaves that `given` names from here on."""
    places = [".".join((*above, *keys)) for keys in given]
    if isinstance(config, Mapping):
        for keys, place in zip(given, places, strict=True):
            if len(keys) != 1:
                raise ConfigError(f"'{place}' goes deeper than '{keys[0]}', which is a plain value")
        return {**config, **{key: _parse(text) for (key,), text in given.items()}}
    if not dataclasses.is_dataclass(config):
        raise ConfigError(f"'{places[0]}' goes deeper than a plain value")
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name in dict.fromkeys(keys[0] for keys in given):
        place = ".".join((*above, name))
        if name not in values:
            whole = next(told for told, keys in zip(places, given, strict=True) if keys[0] == name)
            raise ConfigError(f"unknown key '{whole}': no '{name}' here; {nearest(name, values)}")
        if (name,) in given:
            values[name] = _leaf(config, name, given[(name,)], place)
        deeper = {keys[1:]: text for keys, text in given.items() if keys[0] == name and len(keys) > 1}
        if deeper:
            values[name] = _replace(values[name], deeper, (*above, name))
    return _construct(type(config), values, ", ".join(places))


def _leaf(config: Any, name: str, text: str, place: str) -> Any:
    """`text` as the value of a field of `config`."""
    current = getattr(config, name)
    if dataclasses.is_dataclass(current):
        raise ConfigError(f"'{place}' is a group; set one of {', '.join(f.name for f in dataclasses.fields(current))}")
    hint = get_type_hints(type(config))[name]
    return _read(hint, _parse(text) if hint is not str else text, place)


def _construct(cls: type[ConfigT], values: dict[str, Any], path: str) -> ConfigT:
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path or cls.__name__}: {error}") from error


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError:
        return text


def _refuse_constant(name: str) -> Any:
    raise ConfigError(f"{name} is not a value that a setting can take")


def _read(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type that `hint` names, or a ConfigError."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _read_union(get_args(hint), value, path)
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(f"{path}: {value!r} is not one of {', '.join(map(repr, get_args(hint)))}")
    if origin is tuple:
        return _read_tuple(get_args(hint), value, path)
    if origin in (dict, Mapping) or origin is typing.get_origin(Mapping[str, int]):
        return _read_mapping(get_args(hint)[1], value, path)
    if dataclasses.is_dataclass(hint):
        return from_json(cast(type[Any], hint), value, path=path)
    if hint is Any:
        return value
    return _read_scalar(hint, value, path)


def _read_scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:  # nor is NaN
            raise ConfigError(f"{path}: expected a finite number, got {str(value)[:20]}")
        return float(value)
    if hint is type(None) and value is None:
        return None
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{path}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


def _read_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    complaints = []
    for option in options:
        try:
            return _read(option, value, path)
        except ConfigError as complaint:
            complaints.append(str(complaint))
    raise ConfigError(complaints[0])


def _read_tuple(items: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{path}: expected a list, got {value!r}")
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_read(items[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if len(items) != len(value):
        raise ConfigError(f"{path}: expected {len(items)} items, got {len(value)}")
    return tuple(_read(hint, item, f"{path}[{i}]") for i, (hint, item) in enumerate(zip(items, value, strict=True)))


def _read_mapping(hint: Any, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected an object, got {value!r}")
    return {str(key): _read(hint, item, _join(path, str(key))) for key, item in value.items()}


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
