"""GraLoRA: a LoRA of its own for each of k × k blocks of the weight (Jung et al. 2025, arXiv 2505.20355).

A block's rank is `r / k`, so that there are as many parameters as in LoRA of rank `r`, and the change has rank `k r`.
Numbers agree with PyTorch PEFT's for the same weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from jdelta.core.config import require_positive_int, require_probability
from jdelta.core.linear_maps import BoundLinear
from jdelta.core.method import Method
from jdelta.core.rules import Leaves, Side
from jdelta.methods.parameter import kaiming_uniform


@dataclasses.dataclass(frozen=True)
class GraLoraRule:
    """`ΔW[i, o] = scale · Σ_s a[i, q, s] b[p, s, o]`, for the block `(p, q)` of the weight in which `(i, o)` is.

    With a LoRA of the whole weight, `a_general b_general`, besides it is called hybrid.

    Attributes:
      rank: of all blocks in a row together, `r`.
      blocks: how many there are in a row and in a column, `k`.
      scale: factor of the change.
      hybrid_rank: of the LoRA of the whole weight; 0: there is none.
      dropout: rate of dropout on the input of the change.
    """

    axes: ClassVar[Mapping[str, tuple[Side | None, ...]]] = {
        "a": ("in", None, None),
        "b": (None, None, "out"),
        "a_general": ("in", None),
        "b_general": (None, "out"),
    }

    rank: int
    blocks: int
    scale: float
    hybrid_rank: int = 0
    dropout: float = 0.0

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        (d_in, d_out), k, r = weight.shape, self.blocks, self.rank
        if d_in % k or d_out % k:
            raise ValueError(
                f"gralora_k={k} cuts the weight into k × k blocks, and it has {d_in} rows, {d_out} columns."
            )
        of_blocks, of_all = jax.random.split(key)
        bound = 1 / math.sqrt(d_in // k)
        a = jax.random.uniform(of_blocks, (d_in, k, r // k), jnp.float32, -bound, bound)
        own = {"a": a, "b": jnp.zeros((k, r // k, d_out))}
        if self.hybrid_rank:
            own["a_general"] = kaiming_uniform(of_all, (d_in, self.hybrid_rank), jnp.float32)
            own["b_general"] = jnp.zeros((self.hybrid_rank, d_out))
        return own

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        a, b = self._by_blocks(own)
        change = jnp.einsum("piqs,psqo->piqo", a, b).reshape(weight.shape)
        return self.scale * (change + own["a_general"] @ own["b_general"] if self.hybrid_rank else change)

    def product(self, x: jax.Array, y: jax.Array, own: Leaves, linear: BoundLinear) -> jax.Array:
        features = linear.features(x)
        if features is None:
            return linear.low_rank(x, *self._thin(own))
        a, b = (leaf.astype(x.dtype) for leaf in self._by_blocks(own))
        z = jnp.einsum("...pi,piqs->...psq", features.reshape(*features.shape[:-1], *a.shape[:2]), a)
        change = self.scale * jnp.einsum("...psq,psqo->...qo", z, b).reshape(*z.shape[:-3], -1)
        if self.hybrid_rank:
            change = change + linear.low_rank(x, own["a_general"], self.scale * own["b_general"])
        return change

    def _by_blocks(self, own: Leaves) -> tuple[jax.Array, jax.Array]:
        """`(…, k, d_in / k, k, r / k)` and `(…, k, r / k, k, d_out / k)`: rows of blocks, columns of blocks."""
        a, b, k = own["a"], own["b"], self.blocks
        a = a.reshape(*a.shape[:-3], k, -1, *a.shape[-2:])
        return a, b.reshape(*b.shape[:-1], k, -1)

    def _thin(self, own: Leaves) -> tuple[jax.Array, jax.Array]:
        """The change as one product of rank `k r`, and `hybrid_rank` besides: `(…, d_in, rank)`, `(…, rank, d_out)`."""
        a, b = self._by_blocks(own)
        one = jnp.eye(self.blocks)
        first = jnp.einsum("...piqs,pt->...pitqs", a, one).reshape(*own["a"].shape[:-2], -1)
        second = self.scale * jnp.einsum("...tsqo,qu->...tusqo", b, one)
        second = second.reshape(*b.shape[:-4], -1, own["b"].shape[-1])
        if self.hybrid_rank:
            first = jnp.concatenate([first, own["a_general"]], -1)
            second = jnp.concatenate([second, self.scale * own["b_general"]], -2)
        return first, second


@dataclasses.dataclass(frozen=True)
class GraLoraConfig(Method):
    """Arguments of GraLoRA.

        config = jdelta.GraLoraConfig(r=32, gralora_k=2, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      r: the rank of all blocks in a row together.
      hybrid_r: the rank of a LoRA of the whole weight besides; 0: none.
      alpha: the update is scaled by `alpha / (r + hybrid_r)`.
      gralora_dropout: rate of dropout on the input of the change.
      gralora_k: the weight is cut into `gralora_k` rows of as many blocks; divides `r` and the module's features. The
        authors take 2 up to rank 32, and 4 from rank 64 on.
    """

    delta_type = "gralora"
    default_modified_modules = ("attn.q", "attn.v", "conv")

    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("r", self.r)
        require_positive_int("gralora_k", self.gralora_k)
        require_probability("gralora_dropout", self.gralora_dropout)
        if self.hybrid_r < 0:
            raise ValueError(f"hybrid_r is at least 0, got {self.hybrid_r}.")
        if self.r % self.gralora_k:
            raise ValueError(f"gralora_k={self.gralora_k} does not divide r={self.r}.")

    def rule(self, name: str) -> GraLoraRule:
        scale = self.alpha / (self.r + self.hybrid_r)
        return GraLoraRule(self.r, self.gralora_k, scale, self.hybrid_r, self.gralora_dropout)
