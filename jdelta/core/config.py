"""The arguments of a delta method: a frozen dataclass that checks its fields and converts to JSON and back."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import numbers
import os
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from jdelta.core import parsing


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """The arguments that every method has. A method's own configuration adds fields with defaults:

        @dataclasses.dataclass(frozen=True)
        class ScaleConfig(jdelta.Method):
            init: float = 1.0

            def __post_init__(self):
                super().__post_init__()  # checks the types
                if self.init <= 0:
                    raise ValueError(f"init is above 0, got {self.init}.")

    Every value must have the type of its field, and every number must be finite in float32 or fit into 64 bits. Lists
    become tuples, and `to_dict` makes them lists again; dicts are copied.

    Attributes:
      modified_modules: patterns of the modules to change; without them, the method's default positions.
      modified_parameters: patterns of parameters to change, by name: experts that no module owns alone, for example.
      exclude_modules: patterns of modules to exclude, with everything below them, also where a method edits modules
        below those that are named.
      unfrozen_modules: patterns of what trains besides the delta.
      common_structure: whether `modified_modules` are common names.

    Raises:
      TypeError: a value has the wrong type.
      ValueError: a value is outside its limits.
    """

    delta_type: ClassVar[str] = "delta"  # the method's name in files
    pattern_fields: ClassVar[tuple[str, ...]] = ()  # with patterns of the modified modules; each must mean some

    modified_modules: tuple[str, ...] | None = None
    modified_parameters: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] | None = None
    unfrozen_modules: tuple[str, ...] | None = None
    common_structure: bool | None = None

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, as_type(field.name, getattr(self, field.name), hints[field.name]))

    @classmethod
    def from_arguments(cls, owner: str, arguments: Mapping[str, Any]) -> Self:
        """Builds the configuration from keyword arguments.

        Args:
          owner: the name that an error message gives to the method.
          arguments: name to value.

        Raises:
          TypeError: the method does not have an argument; the message suggests the closest.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        common = [field.name for field in dataclasses.fields(DeltaConfig)]
        for key in arguments:
            if key not in names:
                own = ", ".join(name for name in names if name not in common) or "none"
                raise TypeError(
                    f"{owner} has no argument {shown(key)}.{did_you_mean(str(key)[:200], names)} Its own are: {own}; "
                    f"every method has {', '.join(common)}."
                )
        return cls(**arguments)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the configuration that `to_dict` described.

            config = jdelta.LoraConfig.from_dict({"lora_r": 4})

        Args:
          values: name to value; a field that is not given has its default.

        Raises:
          TypeError: a key is unknown, or a value has the wrong type.
          ValueError: `delta_type` is that of another method, or a value is outside its limits.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{cls.__name__}.from_dict takes a dict of arguments, got {shown(values)}.")
        values = dict(values)
        if values.pop("delta_type", cls.delta_type) != cls.delta_type:
            raise ValueError(f"{cls.__name__} is of delta_type {cls.delta_type!r}; AutoDeltaConfig takes every type.")
        return cls.from_arguments(cls.__name__, values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the `delta_type` and all fields, with the types of JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        listed = {key: _plain(value) for key, value in values.items()}
        return {"delta_type": self.delta_type, **listed}

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `to_json_file` wrote.

        Args:
          path: the file.

        Raises:
          OSError: the file does not exist or cannot be read.
          TypeError, ValueError: as `from_dict`; `ValueError` also if the file does not hold a JSON object.
        """
        return cls.from_dict(parsing.json_object(as_path("from_json_file", path)))

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json_string` to a file.

        Args:
          path: the file; one that exists is replaced.
        """
        as_path("to_json_file", path).write_text(self.to_json_string(), "utf-8")

    def to_json_string(self) -> str:
        """Returns `to_dict` as JSON, which `AutoDeltaConfig.from_json_string` reads."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


METHODS: dict[str, type[Any]] = {}  # by delta_type; see `core.method`


def config_from_dict(values: Any) -> Any:
    """Returns the configuration, of any method, that `DeltaConfig.to_dict` described.

    Raises:
      TypeError: no mapping, an unknown key or a value of a wrong type.
      ValueError: `delta_type` is missing or unknown, or a value is beyond its limits.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"a configuration is a dict with a 'delta_type', got {shown(values)}.")
    if "delta_type" not in values:
        raise ValueError(f"the configuration has no 'delta_type'. There are: {', '.join(sorted(METHODS))}.")
    require_known(values["delta_type"])
    return METHODS[values["delta_type"]].from_dict(values)


def require_known(delta_type: Any) -> None:
    """Raises `ValueError` unless some method has this `delta_type`."""
    if not isinstance(delta_type, str) or delta_type not in METHODS:
        near = did_you_mean(shown(delta_type).strip("'"), METHODS)
        raise ValueError(
            f"no method has delta_type {shown(delta_type)}.{near} There are: {', '.join(sorted(METHODS))}."
        )


def did_you_mean(word: str, known: Collection[str]) -> str:
    """` Did you mean 'lora_r'?`, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def require_positive_int(name: str, value: int) -> None:
    """Raises `ValueError` unless `value` is at least 1."""
    if value < 1:
        raise ValueError(f"{name} is at least 1, got {value}.")


def require_positive_ints(name: str, patterns: Mapping[str, int] | None) -> None:
    """Raises `ValueError` unless each value of a dict of patterns is at least 1."""
    for pattern, value in (patterns or {}).items():
        require_positive_int(f"{name}[{pattern!r}]", value)


def require_count(name: str, value: int) -> None:
    """Raises `ValueError` unless `value` is a number of tokens, for which positions of 32 bits do."""
    require_positive_int(name, value)
    if value >= 2**30:
        raise ValueError(f"{name} is below 2**30, since positions have 32 bits, got {value}.")


def require_positive(name: str, value: float) -> None:
    """Raises `ValueError` unless `value` is above 0."""
    if not value > 0:
        raise ValueError(f"{name} is above 0, got {value!r}.")


def require_probability(name: str, value: float) -> None:
    """Raises `ValueError` unless `0 <= value < 1`."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} is at least 0 and below 1, got {value!r}.")


def as_path(verb: str, path: Any) -> Path:
    """A path. Raises `TypeError` if it is something else, `ValueError` if it is empty; `verb` is who asks."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{verb}: a path is a string or a pathlib.Path, got {shown(path)}.")
    if path == "":
        raise ValueError(f"{verb}: the path is empty. The current folder is '.'.")
    return Path(path)


def as_number(name: str, value: Any) -> float:
    """A finite number as a `float`; bools and strings are none.

    Raises:
      TypeError: it is no number.
      ValueError: it is NaN, or infinite in float32.
    """
    return float(as_type(name, value, float))


def as_int(name: str, value: Any) -> int:
    """A whole number as an `int`; bools, strings and floats are none.

    Raises:
      TypeError: it is no whole number.
      ValueError: it has more than 64 bits.
    """
    return int(as_type(name, value, int))


def require_name(name: Any) -> None:
    """Raises `ValueError` unless a delta can have this name."""
    word = isinstance(name, str) and name.strip() and name.isprintable() and "." not in name
    if not word or name in ("params", "deltas"):
        raise ValueError(f"a delta's name is a word without dots, and not 'params' or 'deltas'; got {shown(name)}.")


# --- values and the types of their fields

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", type(None): "None"}


_LARGEST = 3.4028235e38  # in float32, in which deltas are computed


def as_type(name: str, value: Any, expected: Any) -> Any:
    """A value as a field of this type holds it: lists become tuples, whole numbers floats where these are asked for.

    Raises:
      TypeError: it is of another type.
      ValueError: it is none of a `Literal`'s, or no number that can be computed with.
    """
    try:
        return _as(expected, value)
    except TypeError:
        hint = f" Write [{shown(value)}]." if isinstance(value, str) and "a list" in _words(expected) else ""
        raise TypeError(f"{name} is {_words(expected)}, got {shown(value)}.{hint}") from None
    except ValueError as error:
        raise ValueError(f"{name}={shown(value)} {error}.") from None


def shown(value: Any) -> str:
    """A value in a message: its start, if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than some thousand digits
        return "a number of thousands of digits"
    return text if len(text) < 300 else f"{text[:200]}… ({len(text):,} characters)"


def _as(expected: Any, value: Any) -> Any:
    """The value as a field of this type holds it.

    Raises:
      TypeError: it is of another type.
      ValueError: it is none of a `Literal`'s, or no number that can be computed with. The message goes on after the
        value.
    """
    origin, parts = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        for part in parts:
            try:
                return _as(part, value)
            except TypeError:
                continue
        raise TypeError
    if origin is typing.Literal:
        if type(value) not in {type(part) for part in parts}:
            raise TypeError
        if value not in parts:
            raise ValueError(f"is unknown. There are: {', '.join(map(str, parts))}")
        return value
    if origin is tuple and parts[1:] == (...,):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError
        return tuple(_as(parts[0], item) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError
        return {_as(parts[0], key): _as(parts[1], item) for key, item in value.items()}
    if expected is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        if int(value).bit_length() > 63:
            raise ValueError("is no number of 64 bits")
        return int(value)
    if expected is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not abs(number) <= _LARGEST:
            raise ValueError("is no finite number in float32")
        return number
    kind = origin or expected
    if isinstance(kind, type) and kind is not Any and (kind in (int, float) or not isinstance(value, kind)):
        raise TypeError
    return value


def _plain(value: Any) -> Any:
    """A value as JSON has it, and a copy if it can change."""
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, dict) else value


def _words(expected: Any) -> str:
    origin, parts = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(map(_words, parts))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, parts))
    if origin is tuple and parts[1:] == (...,):
        return f"a list of {_words(parts[0]).removeprefix('a ')}s"
    if origin is dict:
        return f"a dict from {_words(parts[0]).removeprefix('a ')}s to {_words(parts[1]).removeprefix('a ')}s"
    return _WORDS[expected] if expected in _WORDS else getattr(expected, "__name__", str(expected))
