"""The random numbers that PyTorch draws from a seed on the CPU: methods share matrices that a file names by that alone.

A Mersenne Twister (Matsumoto and Nishimura 1998), on any device and in jitted functions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

_N, _M = 624, 397  # size of the state, and the distance at which it is mixed


def bits(seed: int, count: int) -> jax.Array:
    """The first numbers that `torch.Generator().manual_seed(seed)` gives, `(count,)`, 32 bits each."""
    state = _seeded(jnp.uint32(seed % 2**32))
    _, blocks = jax.lax.scan(lambda state, _: (_twisted(state),) * 2, state, length=max(1, -(-count // _N)))
    y = blocks.reshape(-1)[:count]
    y = y ^ (y >> 11)
    y = y ^ ((y << 7) & jnp.uint32(0x9D2C5680))
    y = y ^ ((y << 15) & jnp.uint32(0xEFC60000))
    return y ^ (y >> 18)


def uniform(drawn: jax.Array, shape: tuple[int, ...], bound: float, dtype: Any = jnp.float32) -> jax.Array:
    """What `torch.empty(shape, dtype=dtype).uniform_(-bound, bound)` makes of these bits, in float32.

    Up to the last bit.

    Args:
      drawn: as many numbers of `bits` as the array has entries.
      shape: of the array.
      bound: the largest absolute value.
      dtype: of the tensor in PyTorch, float32 or bfloat16.
    """
    k = (drawn & jnp.uint32(2**24 - 1)).astype(jnp.int32) - 2**23
    made = (k.astype(jnp.float32) / 2**23 * bound).astype(dtype)  # only the product is rounded
    end = jnp.asarray(bound, dtype)  # of the half-open interval: what is rounded to it becomes its start
    return jnp.where(made >= end, -end, made).astype(jnp.float32).reshape(shape)


def unit(drawn: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What `torch.rand(shape)` makes of these bits.

    Args:
      drawn: as many numbers of `bits` as the array has entries.
      shape: of the array.
    """
    return ((drawn & jnp.uint32(2**24 - 1)).astype(jnp.float32) / 2**24).reshape(shape)


def split(seed: int, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """The bits of arrays of these shapes that are drawn one after the other."""
    ends = list(itertools.accumulate(map(math.prod, shapes)))
    return jnp.split(bits(seed, ends[-1]), ends[:-1])


def _seeded(seed: jax.Array) -> jax.Array:
    def step(last: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        following = jnp.uint32(1812433253) * (last ^ (last >> 30)) + i
        return following, following

    _, rest = jax.lax.scan(step, seed, jnp.arange(1, _N, dtype=jnp.uint32))
    return jnp.concatenate([seed[None], rest])


def _twisted(state: jax.Array) -> jax.Array:
    """The state after all of its numbers were drawn. Each entry depends on ones that lie up to 397 ahead, in a ring."""

    def mixed(these: jax.Array, following: jax.Array, far: jax.Array) -> jax.Array:
        y = (these & jnp.uint32(0x80000000)) | (following & jnp.uint32(0x7FFFFFFF))
        return far ^ (y >> 1) ^ jnp.where(y & 1, jnp.uint32(0x9908B0DF), jnp.uint32(0))

    gap = _N - _M
    one = mixed(state[:gap], state[1 : gap + 1], state[_M:])
    two = mixed(state[gap : 2 * gap], state[gap + 1 : 2 * gap + 1], one)
    three = mixed(state[2 * gap : -1], state[2 * gap + 1 :], two[: _N - 1 - 2 * gap])
    last = mixed(state[-1:], one[:1], two[_M - 1 - gap : _M - gap])
    return jnp.concatenate([one, two, three, last])
