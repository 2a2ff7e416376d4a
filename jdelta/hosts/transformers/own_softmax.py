"""Prefixes in models of transformers that compute a softmax of their own: DistilBERT, and BigBird where it is
block-sparse."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdelta.hosts.attention_parts import innermost_prefix, take, tell_kernel
from jdelta.hosts.patches import Namespace, in_namespace

# --- DistilBERT: softmax(matmul(query, key) - mask), then matmul(weights, value), all (batch, heads, length, …)


def distilbert_matmul(matmul: Callable, a: jax.Array, b: jax.Array) -> jax.Array:
    """`matmul` in DistilBERT's file."""
    prefix = innermost_prefix()
    if prefix is not None:
        if prefix.scratch is None:
            prefix.scratch = a  # the query, for the softmax
        else:
            values = jnp.broadcast_to(prefix.scratch.swapaxes(0, 1), (*b.shape[:2], *prefix.scratch.shape[::2]))
            b = jnp.concatenate([values, b], axis=2)
            prefix.scratch = None
    return matmul(a, b)


def distilbert_softmax(softmax: Callable, scores: jax.Array, axis: int = -1) -> jax.Array:
    """`softmax` in DistilBERT's file."""
    tell_kernel("it computes a softmax of its own")
    prefix = innermost_prefix()
    if prefix is not None:
        query = prefix.scratch
        keys, prefix.scratch = take(query.shape[1], query.shape[-1], query.dtype)
        scores = jnp.concatenate([jnp.einsum("bhqd,nhd->bhqn", query, keys), scores], axis=-1)
    return softmax(scores, axis=axis)


# --- BigBird: one softmax for each of five groups of consecutive queries, (batch, heads, …, keys)


class _BigBirdCall:
    def __init__(self, query: jax.Array):
        self.query = query
        self.keys, self.values = take(query.shape[1], query.shape[-1], query.dtype)
        self.parts: list[jax.Array] = []

    def softmax(self, softmax: Callable, scores: jax.Array, axis: int) -> jax.Array:
        n, done = len(self.keys), sum(part.shape[2] for part in self.parts)
        rows = math.prod(scores.shape[2:-1])
        query = self.query[:, :, done : done + rows].reshape(*scores.shape[:-1], -1) / math.sqrt(self.query.shape[-1])
        weights = softmax(jnp.concatenate([jnp.einsum("bh...d,nhd->bh...n", query, self.keys), scores], -1), axis=axis)
        part = jnp.einsum("bh...n,nhd->bh...d", weights[..., :n], self.values)
        self.parts.append(part.reshape(*self.query.shape[:2], rows, -1))
        return weights[..., n:]


def big_bird_attention(attend: Callable) -> Callable:
    """BigBird's block-sparse attention with the active prefixes."""

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
        tell_kernel("its attention is block-sparse, with softmaxes of its own")
        prefix = innermost_prefix()
        if prefix is None:
            return attend(self, query, key, value, band_mask, from_mask, *args, **kwargs)
        prefix.scratch = call = _BigBirdCall(query)
        output = attend(self, query, key, value, band_mask, from_mask, *args, **kwargs)
        part = jnp.concatenate(call.parts, axis=2) * from_mask
        prefix.leave(part.swapaxes(1, 2), masked=False)
        return output

    return bigbird_block_sparse_attention


def big_bird_jax(module: Any) -> Any:
    """`jax` in BigBird's file."""
    return Namespace(module, nn=in_namespace("softmax", _big_bird_softmax))


def _big_bird_softmax(softmax: Callable, scores: jax.Array, axis: int = -1) -> jax.Array:
    prefix = innermost_prefix()
    if prefix is not None and prefix.scratch is not None:
        return prefix.scratch.softmax(softmax, scores, axis)
    return softmax(scores, axis=axis)
