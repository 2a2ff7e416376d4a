"""What takes part in attention that was written without it: prefixes, and a kernel in place of its computation."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jdelta.core.arguments import main_input, main_output, with_main_input, with_main_output

_prefixes: contextvars.ContextVar[tuple[Prefix, ...]] = contextvars.ContextVar("prefixes", default=())
_kernel: contextvars.ContextVar[Kernel | None] = contextvars.ContextVar("kernel", default=None)


class Prefix:
    """A prefix during one call of an attention module.

    Args:
      where: name and class of the module, for messages.
      make: from the number of heads and their width to the keys and the values, `(tokens, heads, width)` each.
      head_mask: factors of the heads, `(heads,)`, if the model was given some.
    """

    def __init__(
        self,
        where: str,
        make: Callable[[int, int], tuple[jax.Array, jax.Array]],
        head_mask: jax.Array | None = None,
    ):
        self._where = where
        self._make = make
        self._head_mask = head_mask
        self._waiting: jax.Array | None = None
        self._used = False
        self.scratch: Any = None

    def take(self, heads: int, width: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The keys and the values, for the one attention that is computed in this call."""
        if self._used:
            raise TypeError(
                f"prefix at {self._where}: it computes attention more than once. Name the attention modules inside it."
            )
        self._used = True
        keys, values = self._make(heads, width)
        return keys.astype(dtype), values.astype(dtype)

    def leave(self, result: jax.Array, masked: bool = True) -> None:
        """Leaves the prefix's part of the result, `(batch, …, heads, width)`, to be added where it belongs.

        Args:
          result: that part.
          masked: whether the model masks the heads of its own part.
        """
        self._waiting = result * self._head_mask[:, None] if masked and self._head_mask is not None else result

    def add_to_input(self, module_type: type, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a call, with what is waiting added to the main one if the shape says that the module takes
        the attention's result."""
        if self._waiting is not None:
            with contextlib.suppress(TypeError):  # a call without an array
                key, x = main_input(module_type, args, kwargs)
                part = self._fitting(x)
                if part is not None:
                    self._waiting = None
                    return with_main_input(args, kwargs, key, x + part)
        return args, kwargs

    def finish(self, output: Any) -> Any:
        """What the attention module returns; where no output projection is inside it, with what is waiting."""
        if not self._used:
            raise TypeError(f"prefix at {self._where}: it computes no attention that a prefix could join.")
        if self._waiting is None:
            return output
        part = self._fitting(main_output(output))
        if part is None:
            raise TypeError(
                f"prefix at {self._where}: nothing inside it takes its attention's result. Name a module further out."
            )
        return with_main_output(output, main_output(output) + part)

    def _fitting(self, x: Any) -> jax.Array | None:
        """What is waiting, in the shape of `x`: `(…, heads, width)`, or `(batch, length, heads · width)`."""
        assert self._waiting is not None
        part = self._waiting
        if x.shape != part.shape:
            blocks = part.ndim > 4  # the length was rounded up to whole blocks
            part = part.reshape(part.shape[0], -1, math.prod(part.shape[-2:]))
            if x.ndim == 3 and blocks:
                part = part[:, : x.shape[1]]
        return part.astype(x.dtype) if part.shape == x.shape else None


class Kernel(Protocol):
    """What computes attention in one go, without the weights, while it is active."""

    def accepts(self, call: Any) -> bool:
        """Whether the weights of an `AttentionCall` may be deferred."""
        ...

    def attend(self, call: Any, value: jax.Array, dtype: Any) -> jax.Array | None:
        """The weights, in this dtype, contracted with the values; `None` if it cannot."""
        ...

    def refuse(self, reason: str) -> None:
        """Told why attention was computed without it."""
        ...


@contextlib.contextmanager
def taking_part(part: Prefix | Kernel) -> Iterator[None]:
    """While this lasts, a prefix or a kernel is active in this thread."""
    if isinstance(part, Prefix):
        token: Any = _prefixes.set((*_prefixes.get(), part))
        reset: Callable[[Any], None] = _prefixes.reset
    else:
        token, reset = _kernel.set(part), _kernel.reset
    try:
        yield
    finally:
        reset(token)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While this lasts, no prefix is active in this thread: those that were have taken part."""
    token = _prefixes.set(())
    try:
        yield
    finally:
        _prefixes.reset(token)


def innermost_prefix() -> Prefix | None:
    """The active prefix that takes part for all of them; `None` if none is active."""
    return _prefixes.get()[-1] if _prefixes.get() else None


def active_kernel() -> Kernel | None:
    """The active kernel."""
    return _kernel.get()


def take(heads: int, width: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The keys and the values of all active prefixes, `(tokens, heads, width)` each."""
    pairs = [prefix.take(heads, width, dtype) for prefix in _prefixes.get()]
    keys, values = zip(*pairs, strict=True)
    return jnp.concatenate(keys), jnp.concatenate(values)


def tell_kernel(reason: str) -> None:
    """Tells the active kernel why attention is computed without it."""
    kernel = _kernel.get()
    if kernel is not None:
        kernel.refuse(reason)


def preceded(states: jax.Array, others: jax.Array) -> jax.Array:
    """Keys or values, `(…, length, heads, width)`, after others, `(tokens, heads, width)`."""
    before = jnp.broadcast_to(others.astype(states.dtype), (*states.shape[:-3], *others.shape))
    return jnp.concatenate([before, states], axis=-3)


def widened(scores: Any, n: int, length: int, fill: Any) -> Any:
    """A bias or mask over keys that are preceded by `n` others, about which it says nothing."""
    if scores is None:
        return None
    rest = jnp.broadcast_to(scores, (*jnp.shape(scores)[:-1], length - n))
    return jnp.concatenate([jnp.full((*rest.shape[:-1], n), fill, rest.dtype), rest], axis=-1)
