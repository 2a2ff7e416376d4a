"""Which leaves can be trained and added to: those of numbers that change by small steps."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax.core import meta


def takes_steps(dtype: Any) -> bool:
    """Whether what has this dtype can be trained and added to.

    Whole numbers and bools cannot, as codes of quantised weights are, nor floats of 8 bits and less, in which small
    changes are lost. Complex numbers can.
    """
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize > 1


def is_fixed(leaf: Any) -> bool:
    """Whether a leaf, or the shape of one, is of a dtype that takes no steps; what has no dtype is not."""
    dtype = getattr(meta.unbox(leaf), "dtype", None)
    return dtype is not None and not takes_steps(dtype)
