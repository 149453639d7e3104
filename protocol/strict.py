"""Plain data to frozen structs, strictly: an unknown key or a wrong value is a ``ConfigError`` that names its path and,
for a key, the nearest one that exists."""

from __future__ import annotations

import difflib
import re
import types
import typing
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from .errors import ConfigError

T = TypeVar("T")


def convert_to(kind: type[T], raw: object, origin: str) -> T:
    """``raw`` as a ``kind``; ``origin`` names the file in errors."""
    _check_keys(raw, kind, origin, "")
    return _convert(kind, raw, origin, "")


def _convert(kind: type[T], raw: object, origin: str, path: str) -> T:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        match = re.search(r"^(.*?) - at (`key` in )?`\$\.?(.*)`$", text)
        what, where = (match[1], match[3]) if match else (text, "")
        what = _explained(kind, where, of_key=bool(match and match[2])) or what
        raise ConfigError(f"{origin}: {path}{where or 'the file'}: {what}", hint="Change that value.") from None
    except ConfigError as error:
        raise ConfigError(f"{origin}: {path.rstrip('.')}{': ' if path else ''}{error}", hint=error.hint) from None


def _explained(kind: Any, path: str, *, of_key: bool = False) -> str:
    """What the value at ``path``, or its keys, must be, where its type says more than its name."""
    for key in [*re.split(r"\.|(?=\[)", path), *(["[key]"] if of_key else [])]:
        kind = _without_none(kind)
        while typing.get_origin(kind) is Annotated:
            kind = typing.get_args(kind)[0]
        if key.startswith("["):  # what a mapping or a list holds
            inner = typing.get_args(kind) or (None,)
            kind = inner[1 if typing.get_origin(kind) is dict and key != "[key]" else 0]
            continue
        hints = typing.get_type_hints(kind, include_extras=True) if isinstance(kind, type) else {}
        if key not in hints:
            return ""
        kind = hints[key]
    for part in (kind, *typing.get_args(kind)):
        if isinstance(part, Meta) and part.description:
            return part.description
        if typing.get_origin(part) is Literal:
            return "must be one of " + ", ".join(map(str, typing.get_args(part)))
    return ""


def _without_none(kind: Any) -> Any:
    """X of X | None."""
    inner = [one for one in typing.get_args(kind) if one is not type(None)]
    return inner[0] if typing.get_origin(kind) in (typing.Union, types.UnionType) and len(inner) == 1 else kind


def _check_keys(raw: object, kind: Any, origin: str, path: str) -> None:
    if raw is not None:
        kind = _without_none(kind)
    base, inner = typing.get_origin(kind), typing.get_args(kind)
    if base is dict and isinstance(raw, dict):
        for key, value in raw.items():
            _check_keys(value, inner[1], origin, f"{path}{key}.")
            if isinstance(inner[1], type) and issubclass(inner[1], Struct):
                _convert(inner[1], value, origin, f"{path}{key}.")  # whose own error would not say in which
        return
    if base is tuple and isinstance(raw, list):
        for number, value in enumerate(raw):
            _check_keys(value, inner[0], origin, f"{path.rstrip('.')}[{number}].")
        return
    if isinstance(kind, types.UnionType) or not (isinstance(kind, type) and issubclass(kind, Struct)):
        return
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{origin}: {path.rstrip('.') or 'the file'} must be a mapping of keys to values, not {raw!r}",
            hint="Indent its keys below it.",
        )
    hints = typing.get_type_hints(kind)
    for key, value in raw.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)
            raise ConfigError(
                f"{origin}: unknown key `{path}{key}`",
                hint=f"Did you mean `{path}{near[0]}`?" if near else "",
            )
        _check_keys(value, hints[key], origin, f"{path}{key}.")
