"""JSON for nouns: frozen dataclasses (or named tuples) of tuples, numbers, strings and other nouns, to plain
data and back."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from typing import Any, TypeVar

from autopar.core.errors import BadInput

T = TypeVar("T")


def to_data(noun: Any) -> Any:
    """Returns plain JSON data: a dataclass becomes an object that carries its class name, a tuple a list."""
    if isinstance(noun, enum.Enum):
        return noun.value
    kind: type = noun.__class__
    if _is_noun(kind):
        data = {name: to_data(getattr(noun, name)) for name in _fields(kind)}
        return {"is": noun.__class__.__name__, **data}
    if isinstance(noun, tuple | list):
        return [to_data(x) for x in typing.cast("tuple[Any, ...]", noun)]
    if noun is None or isinstance(noun, bool | int | float | str):
        return noun
    raise TypeError(f"expected a noun, tuple, number, string or None, got {type(noun).__name__}")


def from_data(kind: type[T], data: Any, where: str = "") -> T:
    """Returns the noun of class `kind` that `to_data` turned into `data`.

    Raises:
        BadInput: data that does not have that shape; the message names the path inside the file.
    """
    return typing.cast(T, _read(kind, data, where or kind.__name__))


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _read(kind: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(args, data, where)
    if origin is tuple:
        return _tuple(args, data, where)
    if isinstance(kind, type) and _is_noun(kind):
        return _noun(kind, data, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        _expect(data in [member.value for member in kind], kind.__name__, data, where)
        return kind(data)
    if kind is float:
        _expect(isinstance(data, int | float) and not isinstance(data, bool), "a number", data, where)
        return float(data)
    _expect(type(data) is kind, _name(kind), data, where)
    return data


def _expect(ok: bool, what: str, data: Any, where: str) -> None:
    if not ok:
        raise BadInput(f"{where}: expected {what}, got {str(data)[:60]!r}")


def _union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    rest = [k for k in kinds if k is not type(None)]
    named = [k for k in rest if _name(k) == _label(data)]
    for kind in named or rest:
        if named or len(rest) == 1 or type(data) is kind:
            return _read(kind, data, where)
    raise BadInput(f"{where}: expected one of {', '.join(map(_name, rest))}, got {str(data)[:60]!r}")


def _name(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind))


def _label(data: Any) -> str:
    """The class name an object carries, "" for other data."""
    return str(typing.cast("dict[str, Any]", data).get("is", "")) if isinstance(data, dict) else ""


def _tuple(args: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(data, list), "a list", data, where)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_read(args[0], x, f"{where}[{i}]") for i, x in enumerate(data))
    _expect(len(data) == len(args), f"a list of {len(args)}", data, where)
    return tuple(_read(kind, x, f"{where}[{i}]") for i, (kind, x) in enumerate(zip(args, data)))


def _noun(kind: type, data: Any, where: str) -> Any:
    _expect(
        _label(data) == kind.__name__,
        f"a {kind.__name__}",
        data,
        where,
    )
    hints, fields = _hints(kind), {}
    for name, needed in _fields(kind).items():
        if name in data:
            fields[name] = _read(hints[name], data[name], f"{where}.{name}")
        elif needed:
            raise BadInput(f"{where}: {kind.__name__} needs {name!r}, which is missing")
    return kind(**fields)


def _is_noun(kind: Any) -> bool:
    """Whether a class is a dataclass or a named tuple."""
    return dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")


def _fields(kind: Any) -> dict[str, bool]:
    """The fields of a noun's class, and whether each has to be given."""
    if not dataclasses.is_dataclass(kind):
        return {name: name not in kind._field_defaults for name in kind._fields}
    missing = dataclasses.MISSING
    return {f.name: f.default is missing and f.default_factory is missing for f in dataclasses.fields(kind)}
