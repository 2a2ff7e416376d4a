"""OFT: blocks of the input's features are rotated (Qiu et al. 2023, arXiv 2306.07280, and 2025, arXiv 2506.19847).

`y = x diag(R_1, …, R_n) W + bias`, where `R_i` is made of a skew-symmetric matrix `Q_i` by the Cayley transform, or by
the first terms of its Neumann series. Numbers agree with PyTorch PEFT's for the same weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdelta.core.config import require_positive, require_positive_int
from jdelta.core.method import Method
from jdelta.core.rules import Leaves, Side
from jdelta.trees.surgery import Path

LEAF = "oft_R"  # the entries above the diagonals of the skew-symmetric matrices, `(blocks, size (size − 1) / 2)`


@dataclasses.dataclass(frozen=True)
class OFTRule:
    """`z diag(R_1, …, R_n)`.

    Attributes:
      block_size: features in a block; 0: of `blocks`.
      blocks: their number; 0: of `block_size`. Where it does not divide the features, the nearest number that does.
      shared: whether all blocks have the same rotation.
      terms: of the Neumann series; `None`: the Cayley transform itself.
      radius: the Frobenius norm of each `Q_i` is at most `radius / √n`; `None`: any.
    """

    side: ClassVar[Side] = "in"

    block_size: int = 32
    blocks: int = 0
    shared: bool = False
    terms: int | None = 5
    radius: float | None = None

    def size(self, d_in: int) -> int:
        """How many features a block has, of so many."""
        return _divisor(d_in, self.block_size) if self.block_size else d_in // _divisor(d_in, self.blocks)

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        d_in = weight.shape[0]
        if (size := self.size(d_in)) == 1:
            raise ValueError(
                f"blocks of one feature cannot be rotated, and of {d_in} input features "
                f"{'oft_block_size' if self.block_size else 'r'}={self.block_size or self.blocks} makes such."
            )
        return {LEAF: jnp.zeros((1 if self.shared else d_in // size, size * (size - 1) // 2))}

    def transform(self, z: jax.Array, own: Leaves) -> jax.Array:
        size, entries = self.size(z.shape[-1]), own[LEAF]
        if self.radius is not None:  # PEFT sets the parameter to that, so that no gradient goes through it
            entries = entries + jax.lax.stop_gradient(_projected(entries, self.radius) - entries)
        change = self.rotation(entries, size).astype(z.dtype)
        pieces = z.reshape(*z.shape[:-1], z.shape[-1] // size, size)
        if self.shared:
            return z + jnp.einsum("...nk,kc->...nc", pieces, change[0]).reshape(z.shape)
        return z + jnp.einsum("...nk,nkc->...nc", pieces, change).reshape(z.shape)

    def rotation(self, entries: jax.Array, size: int) -> jax.Array:
        """`R − I`, `(blocks, size, size)`: in half precision little would be left of a small rotation next to `I`.

        PEFT's two ways turn in opposite directions: `(I − Q) (I + Q)⁻¹`, and terms of `(I + Q) (I − Q)⁻¹`. The last
        term counts once, and three terms are four.
        """
        rows, columns = np.triu_indices(size, 1)
        upper = jnp.zeros((len(entries), size, size)).at[:, rows, columns].set(entries, unique_indices=True)
        q = upper - upper.mT
        if self.terms is None:
            return -2 * jnp.linalg.solve(jnp.eye(size) + q, q)
        total, power, last = 2 * q, q, max(self.terms - 1, 3)
        for exponent in range(2, last + 1) if self.terms > 2 else ():
            power = jnp.matmul(power, q, precision="highest")
            total = total + (power if exponent == last else 2 * power)
        return total


def _divisor(number: int, wanted: int) -> int:
    """The divisor of a number that is nearest to the wanted one; the lower of two that are."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return min(divisors, key=lambda n: (abs(n - wanted), n))


def _projected(entries: jax.Array, radius: float) -> jax.Array:
    """The entries, shortened where a skew-symmetric matrix is longer than its share of the radius."""
    norm = jnp.sqrt(2 * jnp.sum(entries**2, -1, keepdims=True))
    return entries * jnp.minimum(1, radius / entries.shape[-2] ** 0.5 / jnp.maximum(norm, 1e-30))


@dataclasses.dataclass(frozen=True)
class OFTConfig(Method):
    """Arguments of OFT.

        config = jdelta.OFTConfig(oft_block_size=32, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Where `r` or `oft_block_size` does not divide a module's input features, the nearest number that does counts, as in
    PEFT: the lower of two.

    Attributes:
      r: the number of blocks of a module's input features; 0: of `oft_block_size`. One of the two is 0.
      oft_block_size: the number of features in a block; 0: of `r`.
      coft: keep the rotations small: the skew-symmetric matrix of a block is not longer than `eps / √blocks` in its
        Frobenius norm. As in PEFT, longer ones are computed with as if they were of that length, and set to it: by the
        optimizer, `delta.optimizer(tx)`.
      eps: the control strength of `coft`.
      block_share: all blocks have the same rotation.
      use_cayley_neumann: compute the Cayley transform by the first terms of a series, for less; then the rotation is
        not exactly orthogonal.
      num_cayley_neumann_terms: how many terms, at least 2.
    """

    delta_type = "oft"
    default_modified_modules = ("attn.q", "attn.v")

    r: int = 0
    oft_block_size: int = 32
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.r, self.oft_block_size) < 0 or (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(
                f"one of r and oft_block_size is above 0 and the other is 0, since r · oft_block_size is the number of "
                f"input features; got r={self.r} and oft_block_size={self.oft_block_size}."
            )
        require_positive("eps", self.eps)
        require_positive_int("num_cayley_neumann_terms", self.num_cayley_neumann_terms)
        if self.use_cayley_neumann and self.num_cayley_neumann_terms < 2:  # PEFT 0.21 takes it, and trains nothing
            raise ValueError("num_cayley_neumann_terms=1 is the identity, whatever is trained; it is at least 2.")

    def rule(self, name: str) -> OFTRule:
        terms = self.num_cayley_neumann_terms if self.use_cayley_neumann else None
        return OFTRule(self.oft_block_size, self.r, self.block_share, terms, self.eps if self.coft else None)

    def optimizer(self, tx: Any, leaves: Iterable[Path] = ()) -> Any:
        """The optimizer; of `coft`, one that sets matrices which become too long to the length that they may have."""
        if not self.coft:
            return tx

        def update(updates: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, Any]:
            updates, state = tx.update(updates, state, params, **more)

            def bounded(path: tuple[Any, ...], step: jax.Array, value: jax.Array) -> jax.Array:
                if LEAF not in {getattr(key, "key", getattr(key, "name", None)) for key in path}:
                    return step
                return _projected(value + step, self.eps) - value

            return jax.tree_util.tree_map_with_path(bounded, updates, params), state

        return optax.GradientTransformationExtraArgs(tx.init, update)
