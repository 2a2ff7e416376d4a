"""Linen modules in a form that pickles.

Flax's layers have initialisers by default that are functions without a name, which pickle cannot write. Here a module
is its class and what differs from the class's defaults. Of some of JAX's functions, such as `relu`, pickle does not
find the name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from flax.ids import uuid

# What flax gives to each instance anew; a test of flax's own caches and scopes notices if it becomes more.
OF_EACH = ("_id", "_state", "_parent_ref")


@dataclasses.dataclass(frozen=True)
class Packed:
    """A module, by its class, the names of the fields that have the class's defaults, and what else is set on it."""

    cls: type[nn.Module]
    defaults: tuple[str, ...]
    values: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Named:
    """A function by a name of flax or JAX that means it."""

    file: str
    name: str


_FILES = {file.__name__: file for file in (nn, jax.nn, jnp)}


def packed(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """A module, or what holds modules, in a form that pickles; anything else as it is. What is shared stays so."""
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module) and value.scope is None and _pickles_by_default(type(value)):
        defaults, own = _defaults(type(value)), {k: v for k, v in vars(value).items() if k not in OF_EACH}
        usual = tuple(key for key, v in own.items() if key in defaults and v is defaults[key])
        values = {key: packed(v, memo) for key, v in own.items() if key not in usual}
        memo[id(value)] = found = Packed(type(value), usual, values)
        return found
    for file, module in _FILES.items():
        if isinstance(name := getattr(value, "__name__", None), str) and vars(module).get(name) is value:
            return Named(file, name)
    return _mapped(value, lambda part: packed(part, memo))


def unpacked(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """The inverse of `packed`."""
    memo = {} if memo is None else memo
    if isinstance(value, Named):
        return getattr(_FILES[value.file], value.name)
    if not isinstance(value, Packed):
        return _mapped(value, lambda part: unpacked(part, memo))
    if id(value) not in memo:
        defaults = _defaults(value.cls)
        usual = {key: defaults[key] for key in value.defaults}
        memo[id(value)] = with_class(value.cls, usual | {key: unpacked(v, memo) for key, v in value.values.items()})
    return memo[id(value)]


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if type(value) in (dict, FrozenDict):
        return type(value)({key: change(part) for key, part in value.items()})
    return type(value)(map(change, value)) if type(value) in (list, tuple) else value


def _defaults(cls: type[nn.Module]) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(cls)}


def _pickles_by_default(cls: type) -> bool:
    names = ("__reduce__", "__reduce_ex__", "__getstate__")
    return all(getattr(cls, name, None) is getattr(object, name, None) for name in names)


def with_class(cls: type[nn.Module], values: Mapping[str, Any]) -> nn.Module:
    """An unbound instance of a class that is not constructed: no `__init__` runs."""
    instance = object.__new__(cls)
    vars(instance).update(values)
    vars(instance).update(_id=uuid(), _state=nn.module._ModuleInternalState(), _parent_ref=None)
    return instance
