"""Sums of what goes into modules, as gradients by leaves that are zero.

A module's input is passed on as it is, and its derivative by the zero leaf is defined to be what is summed. So sums
over all calls, also of layers inside `nn.scan` or `nn.remat`, come out of `jax.grad`, as gradients do. What is summed
is formed where the input is, which is not kept; and of the backward pass, on which no sum depends, the compiler leaves
nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdelta.core.context import Context
from jdelta.core.data_starts import DataStart

COUNT = "count"
Sums = dict[str, jax.Array]


class InputSums(nn.Module):
    """A layer `x -> x` before a module. The gradients of its leaves are sums of `x`.

    Attributes:
      start: says what is summed.
      linear: how the module is linear; `None` where that is unknown.
      shape: of its weight.
    """

    start: DataStart
    linear: Any = None
    shape: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """The input."""
        rows = x if self.linear is None else self.linear.features(x, self.shape)
        sums = _sums(self.start, jax.lax.stop_gradient(rows), context.mask)
        zeros = {name: self.param(name, nn.initializers.zeros, value.shape) for name, value in sums.items()}
        passed: jax.Array = _with_sums(zeros, sums, x)
        return passed


def _sums(start: DataStart, rows: jax.Array, mask: jax.Array | None) -> Sums:
    """What is summed of one call, without what an attention mask of the same positions leaves out."""
    counts = jnp.ones(rows.shape[:-1], jnp.float32)
    if mask is not None and mask.shape == rows.shape[:2] and rows.ndim > 2:
        counts = counts * (mask != 0).reshape(*mask.shape, *(1,) * (rows.ndim - 3))
    rows = jnp.where(counts[..., None] != 0, rows.astype(jnp.float32), 0)
    return {**start.of_inputs(rows.reshape(-1, rows.shape[-1])), COUNT: jnp.sum(counts).reshape(1, 1)}


@jax.custom_vjp
def _with_sums(zeros: Sums, sums: Sums, x: jax.Array) -> jax.Array:
    return x


def _forward(zeros: Sums, sums: Sums, x: jax.Array) -> tuple[jax.Array, Sums]:
    return x, sums


def _backward(sums: Sums, cotangent: jax.Array) -> tuple[Sums, Sums, jax.Array]:
    return sums, jax.tree.map(jnp.zeros_like, sums), cotangent


_with_sums.defvjp(_forward, _backward)
