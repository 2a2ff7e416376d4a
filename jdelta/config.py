"""The arguments of a delta method, as a frozen dataclass that checks itself."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
from collections.abc import Mapping
from typing import Any, TypeVar

C = TypeVar("C", bound="DeltaConfig")


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """Base of all configurations. A subclass adds fields with defaults, and checks them in `__post_init__`."""

    @classmethod
    def from_arguments(cls: type[C], owner: str, arguments: Mapping[str, Any]) -> C:
        """Builds the configuration from keyword arguments.

        Raises:
          TypeError: an argument that the method does not have; the message suggests the closest.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in arguments:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{owner} has no argument {key!r}.{hint} Its own are: {', '.join(names) or 'none'}.")
        return cls(**arguments)


def require_positive_int(name: str, value: Any) -> None:
    """Raises `TypeError` or `ValueError` unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is a whole number, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} is at least 1, got {value}.")


def require_probability(name: str, value: Any) -> None:
    """Raises `ValueError` unless `0 <= value < 1`."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name} is at least 0 and below 1, got {value!r}.")
