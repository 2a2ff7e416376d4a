"""Lets the keys and values of a prefix take part in attention that was written without them.

Flax models compute `weights = dot_product_attention_weights(query, key, bias=…)` and contract the weights with the
values themselves. No interception reaches that place, so in the file of such a model the name is made to mean a
function that delegates, unless a prefix is active: then the softmax runs over the prefix and the keys together, the
weights of the keys are returned, and what the prefix adds to the result waits to be added to the input of the next
module, the attention's output projection. Masks, caches, rotary and relative positions stay as they are.

Two models of transformers compute a softmax of their own: DistilBERT, and BigBird where it is block-sparse.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdelta.interception import Frame, main_input, main_output, with_main_input, with_main_output

_WEIGHTS = "dot_product_attention_weights"
_active: contextvars.ContextVar[tuple[Prefix, ...]] = contextvars.ContextVar("prefixes", default=())


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

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While this lasts, the prefix takes part in the attention that is computed."""
        token = _active.set((*_active.get(), self))
        try:
            yield
        finally:
            _active.reset(token)

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

    def join(self, frame: Frame, call: Callable) -> Callable:
        """A call which adds what is waiting to its input, if the shape says that it takes the attention's result."""
        return functools.partial(self._joined, frame, call)

    def _joined(self, frame: Frame, call: Callable, /, *args: Any, **kwargs: Any) -> Any:
        if self._waiting is not None:
            with contextlib.suppress(TypeError):  # a call without an array
                key, x = main_input(type(frame.module), args, kwargs)
                part = self._fitting(x)
                if part is not None:
                    self._waiting = None
                    args, kwargs = with_main_input(args, kwargs, key, x + part)
        return call(*args, **kwargs)

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


def prepare(module_type: type[nn.Module]) -> bool:
    """Lets prefixes into the file that a module's class is from; `False` if no attention is computed there."""
    files = [sys.modules[cls.__module__] for cls in module_type.__mro__ if cls is not nn.Module]
    return any([_prepare(file) for file in files if file.__name__ != "builtins"])


def _prepare(file: ModuleType) -> bool:
    if file.__name__.endswith("modeling_flax_distilbert"):
        if not isinstance(file.nn, _Namespace):
            file.nn = _Namespace(file.nn, softmax=_distilbert_softmax)  # type: ignore[attr-defined]
            file.jnp = _Namespace(file.jnp, matmul=_distilbert_matmul)  # type: ignore[attr-defined]
        return True
    weights = getattr(file, _WEIGHTS, None)
    if weights is not None and not hasattr(weights, "_jdelta"):
        setattr(file, _WEIGHTS, _with_prefix(weights))
        if file.__name__.endswith("modeling_flax_big_bird"):
            _prepare_big_bird(file)
    return weights is not None


def _with_prefix(weights_of: Callable) -> Callable:
    @functools.wraps(weights_of)
    def dot_product_attention_weights(
        query: jax.Array, key: jax.Array, bias: Any = None, mask: Any = None, *args: Any, **kwargs: Any
    ) -> jax.Array:
        if not _active.get():
            return weights_of(query, key, bias, mask, *args, **kwargs)
        heads, width = key.shape[-2:]
        keys, values = _take(heads, width, key.dtype)
        n = len(keys)
        key = jnp.concatenate([jnp.broadcast_to(keys, (*key.shape[:-3], *keys.shape)), key], axis=-3)
        bias, mask = _widened(bias, n, key.shape[-3], 0), _widened(mask, n, key.shape[-3], True)
        weights = weights_of(query, key, bias, mask, *args, **kwargs)
        precision = kwargs.get("precision")
        part = jnp.einsum("...hqn,nhd->...qhd", weights[..., :n], values.astype(weights.dtype), precision=precision)
        _active.get()[-1].leave(part)
        return weights[..., n:]

    dot_product_attention_weights._jdelta = True  # type: ignore[attr-defined]
    return dot_product_attention_weights


def _take(heads: int, width: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The keys and the values of all active prefixes, `(tokens, heads, width)` each."""
    pairs = [prefix.take(heads, width, dtype) for prefix in _active.get()]
    keys, values = zip(*pairs, strict=True)
    return jnp.concatenate(keys), jnp.concatenate(values)


def _widened(scores: Any, n: int, length: int, fill: Any) -> Any:
    """A bias or mask over keys that are preceded by `n` others, about which it says nothing."""
    if scores is None:
        return None
    rest = jnp.broadcast_to(scores, (*jnp.shape(scores)[:-1], length - n))
    return jnp.concatenate([jnp.full((*rest.shape[:-1], n), fill, rest.dtype), rest], axis=-1)


class _Namespace:
    """A module in which some names mean something else."""

    def __init__(self, module: Any, **replaced: Callable):
        self._module = module
        for name, function in replaced.items():
            setattr(self, name, functools.partial(function, getattr(module, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


# --- DistilBERT: softmax(matmul(query, key) - mask), then matmul(weights, value), all (batch, heads, length, …)


def _distilbert_matmul(matmul: Callable, a: jax.Array, b: jax.Array) -> jax.Array:
    if _active.get():
        prefix = _active.get()[-1]
        if prefix.scratch is None:
            prefix.scratch = a  # the query, for the softmax
        else:
            values = jnp.broadcast_to(prefix.scratch.swapaxes(0, 1), (*b.shape[:2], *prefix.scratch.shape[::2]))
            b = jnp.concatenate([values, b], axis=2)
            prefix.scratch = None
    return matmul(a, b)


def _distilbert_softmax(softmax: Callable, scores: jax.Array, axis: int = -1) -> jax.Array:
    if _active.get():
        prefix = _active.get()[-1]
        query = prefix.scratch
        keys, prefix.scratch = _take(query.shape[1], query.shape[-1], query.dtype)
        scores = jnp.concatenate([jnp.einsum("bhqd,nhd->bhqn", query, keys), scores], axis=-1)
    return softmax(scores, axis=axis)


# --- BigBird: one softmax for each of five groups of consecutive queries, (batch, heads, …, keys)


class _BigBirdCall:
    def __init__(self, query: jax.Array):
        self.query = query
        self.keys, self.values = _take(query.shape[1], query.shape[-1], query.dtype)
        self.parts: list[jax.Array] = []

    def softmax(self, softmax: Callable, scores: jax.Array, axis: int) -> jax.Array:
        n, done = len(self.keys), sum(part.shape[2] for part in self.parts)
        rows = math.prod(scores.shape[2:-1])
        query = self.query[:, :, done : done + rows].reshape(*scores.shape[:-1], -1) / math.sqrt(self.query.shape[-1])
        weights = softmax(jnp.concatenate([jnp.einsum("bh...d,nhd->bh...n", query, self.keys), scores], -1), axis=axis)
        part = jnp.einsum("bh...n,nhd->bh...d", weights[..., :n], self.values)
        self.parts.append(part.reshape(*self.query.shape[:2], rows, -1))
        return weights[..., n:]


def _prepare_big_bird(file: Any) -> None:
    cls = file.FlaxBigBirdBlockSparseAttention
    attend = cls.bigbird_block_sparse_attention

    @functools.wraps(attend)
    def bigbird_block_sparse_attention(
        self: Any,
        query: jax.Array,
        key: Any,
        value: Any,
        band_mask: Any,
        from_mask: jax.Array,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not _active.get():
            return attend(self, query, key, value, band_mask, from_mask, *args, **kwargs)
        prefix = _active.get()[-1]
        prefix.scratch = call = _BigBirdCall(query)
        output = attend(self, query, key, value, band_mask, from_mask, *args, **kwargs)
        part = jnp.concatenate(call.parts, axis=2) * from_mask
        prefix.leave(part.swapaxes(1, 2), masked=False)
        return output

    def softmax(softmax: Callable, scores: jax.Array, axis: int = -1) -> jax.Array:
        if _active.get() and _active.get()[-1].scratch is not None:
            return _active.get()[-1].scratch.softmax(softmax, scores, axis)
        return softmax(scores, axis=axis)

    cls.bigbird_block_sparse_attention = bigbird_block_sparse_attention
    file.jax = _Namespace(file.jax)
    file.jax.nn = _Namespace(jax.nn, softmax=softmax)
