"""Tells apart the traces that `nn.jit` keeps, where they depend on more than flax knows.

`nn.jit` traces a method once for all modules that look alike, and an interceptor is only heard while that happens. So
what was traced without a delta would be served with it, what was traced for one layer to the next, and so on. Here
each trace gets a mark besides; only what has the same mark is shared.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from flax import linen as nn
from flax.linen import transforms

from jdelta.hosts import patches

Mark = Callable[[nn.Module], Hashable]

_marks: contextvars.ContextVar[tuple[Mark, ...]] = contextvars.ContextVar("marks", default=())  # in this thread
_numbers = itertools.count()

# Private API of flax: the key by which `nn.jit` finds its traces. If its name or its maker changes, `marked` raises
# AttributeError; if `nn.jit` no longer asks it, the tests of `nn.jit` fail.
_Key: Any = transforms._HashableProxy


def unique() -> int:
    """A number that never comes again."""
    return next(_numbers)


@contextlib.contextmanager
def marked(mark: Mark) -> Iterator[None]:
    """While this lasts, in this thread, `nn.jit` shares a trace only among bound modules of the same mark.

    Contexts add up.

    Args:
      mark: what a trace of a bound module's method depends on; `unique()`, if it is not to be shared at all.
    """
    token = _marks.set((*_marks.get(), mark))
    try:
        with patches.patched(_Key, "from_module", _marking):
            yield
    finally:
        _marks.reset(token)


def _marking(original: Any) -> Any:
    return functools.partial(_marked_key, original)


def _marked_key(original: Any, module: nn.Module) -> Any:
    key = original.__get__(None, _Key)(module)
    marks = tuple(mark(module) for mark in _marks.get())
    return _Key(key.module_ref, hash((key.hash_key, marks))) if marks else key
