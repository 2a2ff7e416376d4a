"""DeLoRA: a low-rank change whose directions are normalised, and whose strength trains (Bini et al., ICLR 2025).

`W + ‖w‖ ⊙ (λ/r) Σᵢ aᵢ bᵢ / (‖aᵢ‖ ‖bᵢ‖)`, arXiv 2503.18225, where `‖w‖` are the norms of the initial weight's rows.
Numbers agree with PyTorch PEFT's for the same weights.
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
from jdelta.trees.surgery import Path

SMALLEST_NORM = 1e-4  # by which a column of `a` or a row of `b` is divided, as in PEFT


@dataclasses.dataclass(frozen=True)
class DeloraRule:
    """`ΔW = diag(w_norm) a diag(λ / r ‖aᵢ‖ ‖bᵢ‖) b`.

    Attributes:
      rank: of the change, `r`.
      strength: where `λ` starts: at most so large is the norm of the change, in norms of the rows of the weight.
      dropout: rate of dropout on the input of the change.
    """

    axes: ClassVar[Mapping[str, tuple[Side | None, ...]]] = {
        "a": ("in", None),
        "b": (None, "out"),
        "lambda": (None,),
        "w_norm": ("in",),
    }
    starts_from_weight: ClassVar[bool] = True

    rank: int
    strength: float = 15.0
    dropout: float = 0.0

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        assert isinstance(weight, jax.Array)  # since it starts from it
        d_in, d_out = weight.shape
        return {
            "a": kaiming_uniform(key, (d_in, self.rank), jnp.float32),
            "b": jnp.zeros((self.rank, d_out)),
            "lambda": jnp.full((1,), self.strength, jnp.float32),
            "w_norm": jnp.linalg.norm(weight, axis=1),
        }

    def factors(self, own: Leaves) -> tuple[jax.Array, jax.Array]:
        """`a` and `b` with all that they are multiplied by."""
        a, b = own["a"], own["b"]
        squares = jnp.sum(a**2, 0), jnp.sum(b**2, 1)
        # the root of the larger number, and not the larger of roots: that of 0, where `b` starts, has no derivative
        norm_a, norm_b = (jnp.sqrt(jnp.maximum(square, SMALLEST_NORM**2)) for square in squares)
        scale = own["lambda"] / self.rank / (norm_a * norm_b)
        return own["w_norm"][:, None] * a, scale[:, None] * b

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        a, b = self.factors(own)
        return a @ b

    def product(self, x: jax.Array, y: jax.Array, own: Leaves, linear: BoundLinear) -> jax.Array:
        return linear.low_rank(x, *self.factors(own))


@dataclasses.dataclass(frozen=True)
class DeloraConfig(Method):
    """Arguments of DeLoRA.

        config = jdelta.DeloraConfig(r=8, delora_lambda=15, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      r: the rank.
      delora_lambda: where the strength of the change starts, which trains.
      module_dropout: rate of dropout on the input of the change.
      rank_pattern: patterns of modules to their own rank, in place of `r`; the first that matches counts.
      lambda_pattern: likewise, in place of `delora_lambda`.
    """

    delta_type = "delora"
    default_modified_modules = ("attn.q", "attn.v", "conv")

    pattern_fields: ClassVar[tuple[str, ...]] = ("rank_pattern", "lambda_pattern")

    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = dataclasses.field(default=None, hash=False)
    lambda_pattern: dict[str, float] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("r", self.r)
        require_probability("module_dropout", self.module_dropout)
        require_positive_ints("rank_pattern", self.rank_pattern)

    def rule(self, name: str) -> DeloraRule:
        strength = addressing.first_match(self.lambda_pattern, name, self.delora_lambda)
        return DeloraRule(addressing.first_match(self.rank_pattern, name, self.r), strength, self.module_dropout)

    def frozen(self, leaf: Path) -> bool:
        """Whether it is the norms of the initial weight."""
        return leaf[-1] == "w_norm"
