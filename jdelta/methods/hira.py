"""HiRA: a change of high rank, the weight times a low-rank matrix entry by entry (Huang et al., ICLR 2025).

`W ⊙ (1 + a b)`. Numbers agree with PyTorch PEFT's for the same weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from jdelta.core.config import require_positive_int, require_positive_ints, require_probability
from jdelta.core.linear_maps import BoundLinear
from jdelta.core.method import Method
from jdelta.core.rules import Leaves, Side
from jdelta.methods.parameter import kaiming_uniform
from jdelta.trees import addressing


@dataclasses.dataclass(frozen=True)
class HiraRule:
    """`ΔW = W ⊙ (a b)`.

    Attributes:
      rank: of the factor, `r`.
      dropout: rate of dropout on the input of the change.
    """

    axes: ClassVar[Mapping[str, tuple[Side | None, ...]]] = {"a": ("in", None), "b": (None, "out")}

    rank: int
    dropout: float = 0.0

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        d_in, d_out = weight.shape
        return {"a": kaiming_uniform(key, (d_in, self.rank), jnp.float32), "b": jnp.zeros((self.rank, d_out))}

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        return weight * (own["a"] @ own["b"])

    def product(self, x: jax.Array, y: jax.Array, own: Leaves, linear: BoundLinear) -> jax.Array | None:
        """None but with dropout on `x`: there is no thin form."""
        return linear.product(x, self.update(linear.weight, own)) if self.dropout else None


@dataclasses.dataclass(frozen=True)
class HiraConfig(Method):
    """Arguments of HiRA.

        config = jdelta.HiraConfig(r=32, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      r: the rank of the factor.
      hira_dropout: rate of dropout on the input of the change.
      rank_pattern: patterns of modules to their own rank, in place of `r`; the first that matches counts.
    """

    delta_type = "hira"
    default_modified_modules = ("attn.q", "attn.v", "conv")

    pattern_fields: ClassVar[tuple[str, ...]] = ("rank_pattern",)

    r: int = 32
    hira_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("r", self.r)
        require_probability("hira_dropout", self.hira_dropout)
        require_positive_ints("rank_pattern", self.rank_pattern)

    def rule(self, name: str) -> HiraRule:
        return HiraRule(addressing.first_match(self.rank_pattern, name, self.r), self.hira_dropout)
