"""Random keys, from what users give: a seed or a key, of the new kind or the old."""

from __future__ import annotations

import numbers
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jdelta.core.config import as_int


def as_key(rng: Any) -> chex.PRNGKey:
    """A typed key, `()`, from a seed or a key; also while `jax.jit` traces.

    Args:
      rng: a whole number; `jax.random.key(seed)`; or `jax.random.PRNGKey(seed)`, uint32 `(2,)`.

    Raises:
      TypeError: it is something else.
      ValueError: it is several keys, or a seed of more than 64 bits.
    """
    if isinstance(rng, numbers.Integral) and not isinstance(rng, bool):
        return jax.random.key(as_int("rng", rng))
    if isinstance(rng, np.ndarray) and rng.dtype.kind in "iu":
        rng = jnp.asarray(rng)
    if isinstance(rng, jax.Array):
        if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
            return _single(rng, rng)
        if rng.dtype == jnp.uint32 and rng.ndim:
            try:
                return _single(jax.random.wrap_key_data(rng), rng)
            except TypeError:  # the last axis is that of no key
                pass
        elif jnp.issubdtype(rng.dtype, jnp.integer) and not rng.ndim:
            return jax.random.key(rng)
    what = f"{rng.dtype}{list(rng.shape)}" if isinstance(rng, (jax.Array, np.ndarray)) else repr(rng)
    raise TypeError(f"rng is a seed, such as 0, or a key, such as jax.random.key(0), got {what}.")


def _single(key: jax.Array, given: Any) -> jax.Array:
    if key.ndim:
        raise ValueError(f"rng is one key, got {key.size} of them, of shape {list(given.shape)}. Take one: rng[0].")
    return key
