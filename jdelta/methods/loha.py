"""LoHa: a change that is the product of two low-rank matrices entry by entry (Hyeon-Woo et al., ICLR 2022).

`W + (alpha / r) (a1 b1) ⊙ (a2 b2)`, of rank up to `r²`; FedPara, arXiv 2108.06098. Numbers agree with PyTorch PEFT's
for the same weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from jdelta.core.config import require_positive_int, require_positive_ints
from jdelta.core.linear_maps import BoundLinear
from jdelta.core.method import Method
from jdelta.core.rules import Leaves, Side
from jdelta.methods.parameter import kaiming_uniform
from jdelta.trees import addressing


@dataclasses.dataclass(frozen=True)
class LohaRule:
    """`ΔW = scale · (a1 b1) ⊙ (a2 b2)`.

    Attributes:
      rank: of each of the two matrices, `r`.
      scale: factor of the change.
      random: whether `a2` starts at random values too, and not at 0.
    """

    axes: ClassVar[Mapping[str, tuple[Side | None, ...]]] = {
        "a1": ("in", None),
        "b1": (None, "out"),
        "a2": ("in", None),
        "b2": (None, "out"),
    }

    rank: int
    scale: float
    random: bool = False

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        (d_in, d_out), r = weight.shape, self.rank
        shapes = {"a1": (d_in, r), "b1": (r, d_out), "a2": (d_in, r), "b2": (r, d_out)}
        keys = jax.random.split(key, len(shapes))
        own = {leaf: kaiming_uniform(of, shapes[leaf], jnp.float32) for leaf, of in zip(shapes, keys, strict=True)}
        return own if self.random else own | {"a2": jnp.zeros((d_in, r))}

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        return self.scale * (own["a1"] @ own["b1"]) * (own["a2"] @ own["b2"])

    def product(self, x: jax.Array, y: jax.Array, own: Leaves, linear: BoundLinear) -> jax.Array | None:
        """By factors of rank `r²`, `a[i, (j, k)] = a1[i, j] a2[i, k]`, unless forming the change is cheaper."""
        (d_in, _), d_out = own["a1"].shape, y.shape[-1]
        rank, rows = self.rank**2, y.size // d_out
        if rows * rank * (d_in + d_out) >= (rows + 2 * self.rank) * d_in * d_out:
            return None
        a = (own["a1"][:, :, None] * own["a2"][:, None]).reshape(d_in, rank)
        b = (own["b1"][:, None] * own["b2"]).reshape(rank, d_out)
        return linear.low_rank(x, a, self.scale * b)


@dataclasses.dataclass(frozen=True)
class LohaConfig(Method):
    """Arguments of LoHa.

        config = jdelta.LohaConfig(r=8, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    PEFT's `rank_dropout`, `module_dropout` and `use_effective_conv2d` are not there: a convolution's kernel is one
    matrix.

    Attributes:
      r: the rank of each of the two matrices.
      alpha: the update is scaled by `alpha / r`.
      init_weights: whether `a2` starts at 0; if not, all four factors start at random values, so that the output
        changes at once.
      rank_pattern: patterns of modules to their own rank, in place of `r`; the first that matches counts.
      alpha_pattern: likewise, in place of `alpha`.
    """

    delta_type = "loha"
    default_modified_modules = ("attn.q", "attn.v", "conv")

    pattern_fields: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")

    r: int = 8
    alpha: float = 8
    init_weights: bool = True
    rank_pattern: dict[str, int] | None = dataclasses.field(default=None, hash=False)
    alpha_pattern: dict[str, float] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("r", self.r)
        require_positive_ints("rank_pattern", self.rank_pattern)

    def rule(self, name: str) -> LohaRule:
        rank = addressing.first_match(self.rank_pattern, name, self.r)
        alpha = addressing.first_match(self.alpha_pattern, name, self.alpha)
        return LohaRule(rank, alpha / rank, random=not self.init_weights)
