"""Tells apart the traces that `nn.jit` keeps, where they depend on more than flax knows.

`nn.jit` traces a method once for all modules that look alike, and an interceptor is only heard while that happens. So
what was traced without a delta would be served with it, what was traced for one layer to the next, and so on. Here
each trace gets a mark besides; only what has the same mark is shared.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from flax import linen as nn
from flax.linen import transforms

Mark = Callable[[nn.Module], Hashable]

_marks: contextvars.ContextVar[tuple[Mark, ...]] = contextvars.ContextVar("marks", default=())  # in this thread
_numbers = itertools.count()
_lock = threading.Lock()
_lasting = 0  # contexts in all threads
_original: Any = None

# Private API of flax: the key by which `nn.jit` finds its traces. If its name or its maker changes, `marked` raises
# AttributeError; if `nn.jit` no longer asks it, the tests of `nn.jit` fail.
_Key: Any = transforms._HashableProxy


def unique() -> int:
    """A number that never comes again."""
    return next(_numbers)


@contextlib.contextmanager
def marked(mark: Mark) -> Iterator[None]:
    """While this lasts, in this thread, `nn.jit` shares a trace only among bound modules of the same mark.

    Contexts add up. The function of flax that is replaced is flax's own again when the last one ends.

    Args:
      mark: what a trace of a bound module's method depends on; `unique()`, if it is not to be shared at all.
    """
    global _lasting, _original
    with _lock:
        if _lasting == 0:
            _original = vars(_Key)["from_module"]
            _Key.from_module = _marked_key
        _lasting += 1
    token = _marks.set((*_marks.get(), mark))
    try:
        yield
    finally:
        _marks.reset(token)
        with _lock:
            _lasting -= 1
            if _lasting == 0:
                _Key.from_module = _original


def _marked_key(module: nn.Module) -> Any:
    key = _original.__get__(None, _Key)(module)
    marks = tuple(mark(module) for mark in _marks.get())
    return _Key(key.module_ref, hash((key.hash_key, marks))) if marks else key
