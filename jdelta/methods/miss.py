"""MiSS: one small matrix for all blocks of the input's features (Kang and Yin 2024, arXiv 2409.15371).

`W + (D, D, …)`, with `D` below itself, as `y + (the sum of x over its blocks of r features) · D`. Numbers agree with
PyTorch PEFT's for the same weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from jdelta.core import products
from jdelta.core.config import require_positive_int, require_probability
from jdelta.core.linear_maps import BoundLinear
from jdelta.core.method import Method
from jdelta.core.rules import Leaves, Side
from jdelta.methods.parameter import kaiming_uniform


@dataclasses.dataclass(frozen=True)
class MissRule:
    """`ΔW[i, o] = d[i mod r, o mod columns]`.

    Attributes:
      rank: rows of `d`, `r`.
      columns: of `d`; `None`: as many as the weight has.
      dropout: rate of dropout on the input of the change.
      random: whether `d` starts at U(±1/√columns), and not at 0.
    """

    rank: int
    columns: int | None = None
    dropout: float = 0.0
    random: bool = False

    @property
    def axes(self) -> Mapping[str, tuple[Side | None, ...]]:
        """Of `d`: its columns are those of the weight, or its own."""
        return {"d": (None, "out" if self.columns is None else None)}

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        d_in, d_out = weight.shape
        columns = self.columns or d_out
        if self.rank > d_in:
            raise ValueError(f"r={self.rank} is above the number of input features, {d_in}.")
        if d_out % columns:
            raise ValueError(f"mini_r={columns} does not divide the number of output features, {d_out}.")
        if self.random:
            return {"d": kaiming_uniform(key, (columns, self.rank), jnp.float32).T}
        return {"d": jnp.zeros((self.rank, columns))}

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        d_in, d_out = weight.shape
        rows = jnp.tile(own["d"], (-(-d_in // self.rank), 1))[:d_in]
        return jnp.tile(rows, (1, d_out // rows.shape[1]))

    def product(self, x: jax.Array, y: jax.Array, own: Leaves, linear: BoundLinear) -> jax.Array:
        d = own["d"]
        features, repeats = linear.features(x), y.shape[-1] // d.shape[1]
        if features is None:
            d_in = len(linear.weight)
            blocks = jnp.tile(jnp.eye(self.rank), (-(-d_in // self.rank), 1))[:d_in]
            return linear.low_rank(x, blocks, jnp.tile(d, (1, repeats)))
        padded = jnp.pad(features, [(0, 0)] * (features.ndim - 1) + [(0, -features.shape[-1] % self.rank)])
        sums = jnp.sum(padded.reshape(*padded.shape[:-1], padded.shape[-1] // self.rank, self.rank), -2)
        z = products.up(sums, d.astype(sums.dtype))
        return jnp.tile(z, (*(1,) * (z.ndim - 1), repeats))


@dataclasses.dataclass(frozen=True)
class BatRule:
    """`ΔW[i, o] = Σ_b W[i, o] d[o, b, i] + d[o, o, i]`, see `update`: blocks of the weight times small matrices.

    Attributes:
      rank: width of the blocks, `r`.
    """

    rank: int

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        d_in, d_out = weight.shape
        if d_in % self.rank or d_out % self.rank:
            raise ValueError(
                f"init_weights='bat' cuts the weight into blocks of r={self.rank} rows and columns, and it has "
                f"{d_in} rows and {d_out} columns."
            )
        return {"d": jnp.zeros((d_out // self.rank, self.rank, self.rank))}

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        """`B @ D + D` for each block of the transposed weight, with the matrix `D` of its output features."""
        d_in, d_out = weight.shape
        r = self.rank
        blocks = weight.reshape(d_in // r, r, d_out // r, r)
        change = jnp.einsum("iboa,obc->icoa", blocks, own["d"]) + own["d"].transpose(2, 0, 1)
        return change.reshape(d_in, d_out)


@dataclasses.dataclass(frozen=True)
class MissConfig(Method):
    """Arguments of MiSS.

        config = jdelta.MissConfig(r=64, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      r: the width of the blocks, and the number of rows of the trained matrix; at most the module's input features.
      miss_dropout: rate of dropout on the input of the change.
      mini_r: with `init_weights="mini"`, the number of columns of the trained matrix, which divides the module's output
        features: it is repeated over them.
      init_weights: what is trained. `True`: a matrix `(r, d_out)` that starts at 0; `False`: the same that starts at
        random values, so that the output changes at once; `"mini"`: a matrix `(r, mini_r)` of zeros; `"bat"`: matrices
        `(r, r)` of zeros that the blocks of the weight are multiplied with, which costs a product with the weight in
        each step. `r` divides the module's input and output features then.
    """

    delta_type = "miss"
    default_modified_modules = ("attn.q", "attn.v", "conv")

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | Literal["bat", "mini"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("r", self.r)
        require_positive_int("mini_r", self.mini_r)
        require_probability("miss_dropout", self.miss_dropout)
        if self.init_weights == "bat" and self.miss_dropout:  # PEFT 0.21 takes it, and drops nothing
            raise ValueError(f"init_weights='bat' changes the weight, without dropout; got {self.miss_dropout=}.")

    def rule(self, name: str) -> MissRule | BatRule:
        if self.init_weights == "bat":
            return BatRule(self.r)
        columns = self.mini_r if self.init_weights == "mini" else None
        return MissRule(self.r, columns, self.miss_dropout, random=self.init_weights is False)
