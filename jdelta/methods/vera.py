"""VeRA: two trained vectors beside random matrices that all modules share (Kopiczko et al. 2023, arXiv 2310.11454).

`W + A diag(λ_d) B diag(λ_b)`, as `y + ((x A) ⊙ λ_d) B ⊙ λ_b`. Numbers agree with PyTorch PEFT's for the same weights,
and those of `A` and `B` for the same seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdelta.core import products
from jdelta.core.config import require_positive_int, require_probability
from jdelta.core.linear_maps import BoundLinear
from jdelta.core.method import Method
from jdelta.core.rules import Leaves, Side
from jdelta.methods import torch_random
from jdelta.methods.projections import Projections
from jdelta.trees.surgery import Path


@dataclasses.dataclass(frozen=True)
class VeraRule:
    """`ΔW = a diag(lambda_d) b diag(lambda_b)`.

    Attributes:
      rank: of the change, `r`.
      dropout: rate of dropout on the input of `a`.
      d_initial: where `lambda_d` starts; `lambda_b` starts at 0.
    """

    axes: ClassVar[Mapping[str, tuple[Side | None, ...]]] = {"lambda_b": ("out",)}

    rank: int
    dropout: float = 0.0
    d_initial: float = 0.1

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        d_in, d_out = weight.shape
        vectors = {"lambda_d": jnp.full(self.rank, self.d_initial, jnp.float32), "lambda_b": jnp.zeros(d_out)}
        return {"a": jnp.zeros((d_in, self.rank)), "b": jnp.zeros((self.rank, d_out)), **vectors}

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        return (own["a"] * own["lambda_d"]) @ (own["b"] * own["lambda_b"])

    def product(self, x: jax.Array, y: jax.Array, own: Leaves, linear: BoundLinear) -> jax.Array:
        features = linear.features(x)
        if features is None:
            return linear.low_rank(x, own["a"], own["lambda_d"][..., None] * own["b"] * own["lambda_b"][..., None, :])
        z = products.down(features, own["a"].astype(x.dtype)) * own["lambda_d"].astype(x.dtype)
        return products.up(z, own["b"].astype(z.dtype)) * own["lambda_b"].astype(z.dtype)


@dataclasses.dataclass(frozen=True)
class VeraConfig(Method):
    """Arguments of VeRA.

        config = jdelta.VeraConfig(r=256, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      r: the rank of the random matrices.
      vera_dropout: rate of dropout on the input of the change.
      d_initial: where `lambda_d` starts.
      projection_prng_key: the seed of the random matrices, which are those that PEFT draws from it.
      save_projection: whether the matrices are saved with the delta, and written by `to_peft`. They need not be, since
        they can be drawn again; PEFT saves them by default.
    """

    delta_type = "vera"
    default_modified_modules = ("attn.q", "attn.v", "conv")

    r: int = 256
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    projection_prng_key: int = 0
    save_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("r", self.r)
        require_probability("vera_dropout", self.vera_dropout)

    def rule(self, name: str) -> VeraRule:
        return VeraRule(self.r, self.vera_dropout, self.d_initial)

    def projections(self, d_in: int, d_out: int) -> dict[str, jax.Array]:
        """The random matrices `a`, `(d_in, r)`, and `b`, `(r, d_out)`: uniform, of variances 2 / d_in and 2 / r."""
        shapes = (self.r, d_in), (d_out, self.r)  # as they lie in PyTorch, which draws row by row
        bits = torch_random.split(self.projection_prng_key, shapes)
        drawn = (
            torch_random.uniform(these, shape, math.sqrt(6 / shape[1]))
            for these, shape in zip(bits, shapes, strict=True)
        )
        return {name: matrix.T for name, matrix in zip("ab", drawn, strict=True)}

    def generator(self, shapes: Mapping[Path, jax.ShapeDtypeStruct]) -> nn.Module | None:
        parts = tuple((path, path[-1], leaf.shape) for path, leaf in shapes.items() if path[-1] in ("a", "b"))
        if not parts:
            return None
        d_in = max(shape[-2] for _, name, shape in parts if name == "a")
        d_out = max(shape[-1] for _, name, shape in parts if name == "b")
        if any(shape[-2] != self.r for _, name, shape in parts if name == "b"):
            raise ValueError("VeRA takes layers of nn.scan whose axis is the first of their leaves.")
        return Projections(self, d_in, d_out, parts)

    def frozen(self, leaf: Path) -> bool:
        return self.save_projection and leaf[-1] in ("a", "b")

    def regenerated(self, leaf: Path) -> bool:
        return not self.save_projection and leaf[-1] in ("a", "b")
