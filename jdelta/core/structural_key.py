"""Which modules are alike, so that what was found for one need not be found again for the others."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from jdelta.core.structure import ModuleInfo


@dataclasses.dataclass(frozen=True, eq=False)
class Same:
    """A value in a key that has no hash: equal to itself alone, and not to a copy.

    Unlike an id, it keeps the value alive, so that no other one can take its place.
    """

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def structural_key(value: Any) -> Any:
    """A key that is equal for values which make the same layers: functions are compared by code and closure.

    Args:
      value: a module, a field of one, what a trace saw of a module.
    """
    if isinstance(value, ModuleInfo):
        inside = None if value.standalone is None else value.standalone.key
        return (value.type, structural_key(value.fields), structural_key((value.args, value.kwargs)), inside)
    if isinstance(value, nn.Module) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        skip = ("parent", "name") if isinstance(value, nn.Module) else ()
        own = [f.name for f in dataclasses.fields(value) if f.name not in skip]
        return (type(value), *(structural_key(getattr(value, name, None)) for name in own))
    if isinstance(value, functools.partial):
        return (structural_key(value.func), structural_key(value.args), structural_key(value.keywords))
    if isinstance(value, types.FunctionType):
        cells = tuple(structural_key(cell.cell_contents) for cell in value.__closure__ or ())
        return (value.__code__, structural_key(value.__defaults__), cells)
    if isinstance(value, (list, tuple)):
        return (type(value), *(structural_key(item) for item in value))
    if isinstance(value, Mapping):
        return tuple((key, structural_key(item)) for key, item in value.items())
    if isinstance(value, jax.ShapeDtypeStruct):
        return (value.shape, value.dtype)
    try:
        hash(value)
    except TypeError:
        return Same(value)
    return (type(value), value)
