"""SHiRA: some entries of the weight train, at random places that are fixed (Bhardwaj et al. 2024, arXiv 2406.13175).

`W + S`, where `S` is sparse. Numbers agree with PyTorch PEFT's for the same values and places.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jdelta.core.config import require_positive_int
from jdelta.core.method import Method
from jdelta.core.rules import Leaves
from jdelta.trees.surgery import Path

_ROUNDS = 4


@dataclasses.dataclass(frozen=True)
class ShiraRule:
    """`ΔW[indices] = values`.

    Attributes:
      rank: of a LoRA with as many parameters: `r (d_in + d_out)`.
    """

    rank: int

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        d_in, d_out = weight.shape
        count = self.rank * (d_in + d_out)
        if count > d_in * d_out:
            raise ValueError(
                f"r={self.rank} asks for {self.rank} · ({d_in} + {d_out}) = {count} entries of a weight that has "
                f"{d_in * d_out}."
            )
        return {"values": jnp.zeros(count), "indices": random_places(key, d_in, d_out, count)}

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        rows, columns = own["indices"]
        return jnp.zeros(weight.shape).at[rows, columns].add(own["values"])


def random_places(key: jax.Array, rows: int, columns: int, count: int) -> jax.Array:
    """Different random places in a matrix: `(2, count)`, their rows and their columns.

    They are the first of a random permutation, which is computed for these alone: sorting all places of a large weight
    would take seconds and gigabytes. It is a Feistel cipher: each round adds a random function of the column to the
    row, modulo the number of rows, and the other way round. Each can be undone, so that places stay different.

    Args:
      key: of the random numbers.
      rows, columns: of the matrix.
      count: at most `rows * columns`.
    """
    numbers = jnp.arange(count, dtype=jnp.int32)
    i, j = numbers // columns, numbers % columns
    for of_row, of_column in jax.random.split(key, (_ROUNDS, 2)):
        i = (i + jax.random.randint(of_row, (columns,), 0, rows, jnp.int32)[j]) % rows
        j = (j + jax.random.randint(of_column, (rows,), 0, columns, jnp.int32)[i]) % columns
    return jnp.stack([i, j])


@dataclasses.dataclass(frozen=True)
class ShiraConfig(Method):
    """Arguments of SHiRA.

        config = jdelta.ShiraConfig(r=32, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      r: the number of entries that train, as the rank of a LoRA with as many parameters: `r (d_in + d_out)` of
        `d_in d_out`.
    """

    delta_type = "shira"
    default_modified_modules = ("attn.q", "attn.v", "conv")

    r: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("r", self.r)

    def rule(self, name: str) -> ShiraRule:
        return ShiraRule(self.r)

    def frozen(self, leaf: Path) -> bool:
        """Whether it is the places."""
        return leaf[-1] == "indices"
