"""Modules whose functions are heard: an instance gets a subclass of its class, which asks what to do.

An nnx module has no hook around its calls. So its class is swapped for a subclass of the same name, documentation and
signatures, one for each class, and an attribute of the instance, its role, says what happens in its functions. A
role is static: it is a part of the graph's definition, so it is in every copy that `nnx.split` and `nnx.merge`, `jit`,
`remat` and `scan` make, and what was compiled for one role does not serve another.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

from flax import nnx

# Held by a run for as long as attributes are on the model that belong to that run alone: threads share the model.
one_at_a_time = threading.RLock()

ROLE = "_pytree__jdelta"  # nnx shows no attribute that begins so, and takes none for a part of a linen module
_OF_ALL = {*nnx.Module.__mro__, *nnx.List.__mro__, *nnx.Dict.__mro__}  # classes whose functions are not the model's


class Role(Protocol, Hashable):
    """What happens in the functions of a module. Equal roles do the same."""

    @property
    def reads(self) -> bool:
        """Whether the role is asked about variables that are read."""
        ...

    def run(self, module: nnx.Module, name: str, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs a function of the module.

        Args:
          module: the module.
          name: of the function.
          call: the function.
          args, kwargs: its arguments.
        """
        ...

    def read(self, module: nnx.Module, name: str, variable: nnx.Variable) -> Any:
        """What an attribute of the module that holds a variable is."""
        ...


def role_of(module: nnx.Module) -> Any:
    """The role of a module; `None` if it has none."""
    return vars(module).get(ROLE)


def class_of(module: Any) -> type:
    """The class of a module, as the user wrote it."""
    cls = type(module)
    return vars(cls).get("_jdelta_original", cls)


def give(module: nnx.Module, role: Role | None) -> None:
    """Gives a role to a module, in place of that which it has; `None`: makes it what it was."""
    cls = class_of(module)
    if role is None:
        vars(module).pop(ROLE, None)
        wanted = cls
    else:
        vars(module)[ROLE] = role
        wanted = _heard(cls, role.reads)
    if type(module) is not wanted:
        object.__setattr__(module, "__class__", wanted)


@functools.cache
def _heard(cls: Any, reads: bool) -> type:
    """The subclass of a class whose functions ask the role of their module. There is one, so that copies are equal."""
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce__": _reduced,
        "_jdelta_original": cls,
        **{name: _heard_function(name, function) for name, function in _functions(cls).items()},
    }
    if reads:
        namespace["__getattribute__"] = _reading(cls)
    with _unheard(cls):
        subclass: type = type(cls)(cls.__name__, (cls,), namespace, pytree=cls._pytree__is_pytree)
    return subclass


@contextlib.contextmanager
def _unheard(cls: Any) -> Iterator[None]:
    """While this lasts, of the `__init_subclass__` in the bases of a class only that of nnx hears of a subclass."""
    hooks = [base for base in cls.__mro__ if base not in nnx.Module.__mro__ and "__init_subclass__" in vars(base)]
    before, of_nnx = vars(cls).get("__init_subclass__"), vars(nnx.Pytree)["__init_subclass__"]
    if hooks:
        type.__setattr__(cls, "__init_subclass__", of_nnx)
    try:
        yield
    finally:
        if before is not None:
            type.__setattr__(cls, "__init_subclass__", before)
        elif hooks:
            type.__delattr__(cls, "__init_subclass__")


def _functions(cls: type) -> dict[str, Any]:
    """The functions of a module's class, by name, without those that all modules or all containers have."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base not in _OF_ALL:
            found = {**vars(base), **found}
    return {name: value for name, value in found.items() if _is_function(name, value)}


def _is_function(name: str, value: Any) -> bool:
    if isinstance(value, (type, staticmethod, classmethod, property)) or not hasattr(value, "__get__"):
        return False
    return callable(value) and (name == "__call__" or not name.startswith("__"))


def _heard_function(name: str, function: Any) -> Callable:
    @functools.wraps(function)
    def heard(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        role, call = role_of(self), function.__get__(self, type(self))
        return call(*args, **kwargs) if role is None else role.run(self, name, call, args, kwargs)

    return heard


def _reading(cls: Any) -> Callable[[Any, str], Any]:
    def __getattribute__(self: Any, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        if isinstance(value, nnx.Variable) and (role := role_of(self)) is not None:
            return role.read(self, name, value)
        return value

    return __getattribute__


def _reduced(self: nnx.Module) -> tuple[Any, ...]:
    """For pickles: the class by its name."""
    return _unpickled, (class_of(self), vars(self).copy())


def _unpickled(cls: type, values: dict[str, Any]) -> Any:
    module: Any = object.__new__(cls)
    module.__setstate__(values)
    give(module, role_of(module))
    return module


__all__ = ["ROLE", "Role", "class_of", "give", "one_at_a_time", "role_of"]
