"""How the layers of the methods get their parameters."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.errors import ScopeParamShapeError


def param(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> jax.Array:
    """`module.param(name, init, shape, float32)`, traced in a fraction of the time.

    For a parameter that is there, flax runs the initialiser abstractly to learn its shape; with LoRA on every Dense of
    BERT that was a fifth of the time that tracing took. Here the shape is known.

    Raises:
      flax.errors.ScopeParamShapeError: the tree holds another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, in_float32(init), shape, jnp.float32)
    value: Any = meta.unbox(module.get_variable("params", name))
    if value.shape != shape:
        scope: Any = module.scope
        raise ScopeParamShapeError(name, scope.path_text, value.shape, shape)
    return value


def in_float32(init: nn.initializers.Initializer) -> nn.initializers.Initializer:
    """The initialiser, in float32 whatever it is asked for: Google's gemma asks for its own dtype in every module."""
    return lambda key, shape, dtype=None: init(key, shape, jnp.float32)


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """U(±1/√fan_in), which PyTorch calls Kaiming-uniform with a=√5; fan_in is all but the last axis."""
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)
