"""Names that mean something else while contexts last, in the globals of a file, another dict, or a class."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

from flax import linen as nn
from flax import nnx

_MARK = "_jdelta_patch"
_lock = threading.RLock()


@dataclasses.dataclass
class _Patch:
    original: Any
    replacement: Any
    contexts: int = 0


_patches: dict[tuple[int, str], _Patch] = {}  # by the identity of the namespace, which its contexts hold


@contextlib.contextmanager
def patched(namespace: dict[str, Any] | type, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """While this lasts, in all threads, a name means `make(original)`.

    Contexts of a name add up, in any order and of any threads; when the last one ends, the name means the object that
    it meant before. What was bound to it meanwhile, as by `importlib.reload`, stays, and is replaced in turn by the
    next context. So what `make` gives has to do as the original where nobody has asked for anything else.

    Args:
      namespace: the globals of a file, another dict, or a class.
      name: one that it has.
      make: what makes the replacement, which takes attributes.
    """
    key = (id(namespace), name)
    with _lock:
        patch, current = _patches.get(key), _get(namespace, name)
        if patch is None or patch.replacement is not current:
            original = original_of(current)  # else, what was imported from a file while its name was replaced
            replacement = make(original)
            patch = _Patch(original, replacement, 0 if patch is None else patch.contexts)
            setattr(replacement, _MARK, patch)
            _set(namespace, name, replacement)
        _patches[key] = patch
        patch.contexts += 1
    try:
        yield
    finally:
        with _lock:
            patch = _patches[key]
            patch.contexts -= 1
            if patch.contexts == 0:
                del _patches[key]
                if _get(namespace, name) is patch.replacement:
                    _set(namespace, name, patch.original)


def original_of(value: Any) -> Any:
    """What was replaced by this; anything else as it is."""
    patch = getattr(value, "__dict__", {}).get(_MARK)
    return patch.original if patch is not None and patch.replacement is value else value


def globals_of(module_type: type) -> list[dict[str, Any]]:
    """The globals of the functions of a module's class; `sys.modules` may have other ones, if a file was imported anew.

    One and the same may be there several times.
    """
    own = [cls for cls in module_type.__mro__ if cls not in (*nn.Module.__mro__, *nnx.Module.__mro__)]
    functions = [inspect.unwrap(f) for cls in own for f in vars(cls).values() if callable(f)]
    return [f.__globals__ for f in functions if hasattr(f, "__globals__")]


class Namespace:
    """A module in which some names mean something else: what is made of what they meant."""

    def __init__(self, module: Any, **replaced: Callable):
        self._module = module
        for name, make in replaced.items():
            setattr(self, name, make(getattr(module, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def in_namespace(name: str, function: Callable) -> Callable:
    """What makes a module in which a function, with the original as its first argument, has this name."""
    return lambda module: Namespace(module, **{name: lambda original: functools.partial(function, original)})


def _get(namespace: dict[str, Any] | type, name: str) -> Any:
    return (namespace if isinstance(namespace, dict) else vars(namespace)).get(name)


def _set(namespace: dict[str, Any] | type, name: str, value: Any) -> None:
    if isinstance(namespace, dict):
        namespace[name] = value
    else:
        setattr(namespace, name, value)
