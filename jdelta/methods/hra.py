"""HRA: a product of Householder reflections of the input (Yuan et al. 2024, arXiv 2405.17484).

`y = x H_r ⋯ H_1 W + bias` with `H_i = I − 2 u_i u_iᵀ / ‖u_i‖²`, which is orthogonal. Numbers agree with PyTorch PEFT's
for the same weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from jdelta.core import products
from jdelta.core.config import require_positive_int
from jdelta.core.method import Method
from jdelta.core.rules import Leaves, Side
from jdelta.methods.parameter import kaiming_uniform


@dataclasses.dataclass(frozen=True)
class HRARule:
    """`x H_r ⋯ H_1` for the columns of `u`, in two thin products.

    Attributes:
      rank: the number of reflections, `r`.
      orthogonal: whether the columns are made orthogonal before.
    """

    side: ClassVar[Side] = "in"
    axes: ClassVar[Mapping[str, tuple[Side | None, ...]]] = {"u": ("in", None)}

    rank: int
    orthogonal: bool = False

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        """Pairs of equal columns, which undo each other; columns of their own, if the rank is odd or `orthogonal`."""
        d_in, r = weight.shape[0], self.rank
        if self.orthogonal and r > d_in:
            raise ValueError(f"apply_GS makes r={r} vectors orthogonal, and there are {d_in} input features.")
        if r % 2 or self.orthogonal:
            return {"u": kaiming_uniform(key, (r, d_in), jnp.float32).T}
        return {"u": jnp.repeat(kaiming_uniform(key, (r // 2, d_in), jnp.float32).T, 2, axis=1)}

    def transform(self, z: jax.Array, own: Leaves) -> jax.Array:
        """`z − (z V) T Vᵀ`, with `T = 2 I` for orthogonal columns `V`, and else the inverse of `I / 2 + tril(VᵀV, −1)`.

        That is the product of reflections in the form of Joffrain et al. (2006), "Accumulating Householder
        transformations, revisited": what depends on the order of the reflections is a matrix `(r, r)`.
        """
        u = own["u"]
        if self.orthogonal:
            v = jnp.linalg.qr(u)[0]
            down = 2 * v.T
        else:
            v = u / jnp.linalg.norm(u, axis=0)
            inverse = jnp.eye(self.rank) / 2 + jnp.tril(jnp.matmul(v.T, v, precision="highest"), -1)
            down = jax.scipy.linalg.solve_triangular(inverse, v.T, lower=True)
        return z - products.up(products.down(z, v.astype(z.dtype)), down.astype(z.dtype))


@dataclasses.dataclass(frozen=True)
class HRAConfig(Method):
    """Arguments of HRA.

        config = jdelta.HRAConfig(r=8, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      r: the number of reflections. With an even number they start in equal pairs, so that the output is unchanged. An
        odd number of reflections is never the identity: the output changes at once, as in PEFT.
      apply_GS: orthogonalise the vectors by Gram-Schmidt, so that the features are multiplied with `I − 2 U Uᵀ`, which
        is never the identity: the output changes at once.
    """

    delta_type = "hra"
    default_modified_modules = ("attn.q", "attn.v")

    r: int = 8
    apply_GS: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("r", self.r)

    def rule(self, name: str) -> HRARule:
        return HRARule(self.r, self.apply_GS)
