"""Random matrices that all modules of a delta share: they are at the root of the tree, and never train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from jdelta.trees.surgery import Path


class Projecting(Protocol):
    """The configuration of a method with such matrices."""

    def projections(self, d_in: int, d_out: int) -> Mapping[str, jax.Array]:
        """The matrices, for modules of at most so many input and output features."""
        ...


class Projections(nn.Module):
    """Makes what each module has of the shared matrices: their first entries along each axis.

    Attributes:
      config: of the method.
      d_in: the largest number of input features.
      d_out: the largest number of output features.
      parts: path of each leaf, name of its matrix, and shape; axes of layers and of experts come first in that.
    """

    config: Projecting
    d_in: int
    d_out: int
    parts: tuple[tuple[Path, str, tuple[int, ...]], ...]

    @nn.compact
    def __call__(self) -> dict[Path, jax.Array]:
        made = {}
        if self.has_variable("params", "a"):
            for name in ("a", "b"):
                made[name] = meta.unbox(self.get_variable("params", name))
        else:
            for name, matrix in self.config.projections(self.d_in, self.d_out).items():
                made[name] = self.param(name, lambda _, matrix=matrix: matrix)
        found = {}
        for path, name, shape in self.parts:
            whole = made[name]
            part = whole[tuple(slice(size) for size in shape[-whole.ndim :])]
            found[path] = jnp.broadcast_to(part, shape)
        return found
