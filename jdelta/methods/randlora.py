"""RandLoRA: a change of full rank, of random matrices that all modules share (Albert et al. 2025, arXiv 2502.00987).

`W + (alpha / r) Σ_k (diag(λ_k) A diag(γ_k))ᵀ B_kᵀ`, transposed where the module has fewer outputs than inputs. Numbers
agree with PyTorch PEFT's for the same weights, and those of `A` and `B` for the same seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdelta.core.config import require_positive_int, require_probability
from jdelta.core.linear_maps import BoundLinear
from jdelta.core.method import Method
from jdelta.core.rules import Leaves
from jdelta.methods import torch_random
from jdelta.methods.projections import Projections
from jdelta.trees.surgery import Path


@dataclasses.dataclass(frozen=True)
class RandLoraRule:
    """`ΔW = scale · Lᵀ Mᵀ`, with `L`, `(r n, min)`, and `M`, `(max, r n)`; or `M L`, where `d_in` is above `d_out`.

    `L[i n + k] = lambda[i, k] a[i] gamma[k]` and `M[:, k r + i] = b[:, k, i]`: the pairs are in two orders, as in PEFT,
    so that rows of `a` meet columns of `b` of other bases, which are as random.

    The leaves `a_in` and `b_out` have the features of the input and of the output; or `b_in` and `a_out`.

    Attributes:
      rank: of a basis, `r`; there are `n = ⌈min(d_in, d_out) / r⌉`.
      scale: factor of the change.
      dropout: rate of dropout on the input of the change.
    """

    rank: int
    scale: float
    dropout: float = 0.0

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        d_in, d_out = weight.shape
        small, large = sorted(weight.shape)
        a, b = ("a_in", "b_out") if d_in <= d_out else ("a_out", "b_in")
        bases = -(-small // self.rank)
        return {
            a: jnp.zeros((self.rank, small)),
            b: jnp.zeros((large, bases, self.rank)),
            "lambda": jnp.zeros((self.rank, bases)),
            "gamma": jnp.full((bases, small), 1 / max(bases, small), jnp.float32),
        }

    def factors(self, own: Leaves) -> tuple[jax.Array, jax.Array]:
        """`(d_in, r n)` and `(r n, d_out)`, whose product is the change; axes that all share come first."""
        wide = "a_in" in own
        a, b = (own["a_in"], own["b_out"]) if wide else (own["a_out"], own["b_in"])
        scaled = self.scale * own["lambda"][..., None] * a[..., :, None, :] * own["gamma"][..., None, :, :]
        scaled = scaled.reshape(*scaled.shape[:-3], -1, scaled.shape[-1])
        basis = b.reshape(*b.shape[:-2], -1)
        return (jnp.swapaxes(scaled, -1, -2), jnp.swapaxes(basis, -1, -2)) if wide else (basis, scaled)

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        first, second = self.factors(own)
        return first @ second

    def product(self, x: jax.Array, y: jax.Array, own: Leaves, linear: BoundLinear) -> jax.Array:
        return linear.low_rank(x, *self.factors(own))


@dataclasses.dataclass(frozen=True)
class RandLoraConfig(Method):
    """Arguments of RandLoRA.

        config = jdelta.RandLoraConfig(r=32, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      r: the rank of each random basis. The lower, the more is trained: `(r + min(d_in, d_out)) · min(d_in, d_out) / r`.
      randlora_alpha: the update is scaled by `randlora_alpha / r`.
      randlora_dropout: rate of dropout on the input of the change.
      projection_prng_key: the seed of the random matrices, which are those that PEFT draws from it.
      save_projection: whether the matrices are saved with the delta, and written by `to_peft`. They need not be, since
        they can be drawn again; PEFT saves them by default.
      sparse: random matrices of 0, 1 and -1, of which two thirds are 0.
      very_sparse: likewise, with all but `1 / √min(d_in, d_out)` of them 0.
    """

    delta_type = "randlora"
    default_modified_modules = ("attn.q", "attn.v", "conv")

    r: int = 32
    randlora_alpha: float = 640
    randlora_dropout: float = 0.0
    projection_prng_key: int = 0
    save_projection: bool = False
    sparse: bool = False
    very_sparse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("r", self.r)
        require_probability("randlora_dropout", self.randlora_dropout)

    def rule(self, name: str) -> RandLoraRule:
        return RandLoraRule(self.r, self.randlora_alpha / self.r, self.randlora_dropout)

    def projections(self, d_in: int, d_out: int) -> dict[str, jax.Array]:
        """The random matrices `a`, `(r, min)`, and `b`, `(max, n, r)`, of standard deviation 1."""
        small, large = sorted((d_in, d_out))
        bases = -(-small // self.r)
        if self.sparse or self.very_sparse:
            sparsity = math.sqrt(small) if self.very_sparse else 3
            shapes = [(self.r, small), (large, bases, self.r)]
            bits = torch_random.split(self.projection_prng_key, shapes)
            a, b = (_sparse(these, shape, 1 / (2 * sparsity)) for these, shape in zip(bits, shapes, strict=True))
            return {"a": a, "b": b}
        shapes = [(self.r, small), *[(large, self.r)] * bases]
        bits = torch_random.split(self.projection_prng_key, shapes)
        a, *of_bases = (  # PEFT draws them in bfloat16, on machines that have it
            torch_random.uniform(these, shape, 1 / math.sqrt(shape[1]), jnp.bfloat16)
            for these, shape in zip(bits, shapes, strict=True)
        )
        return {"a": _normalised(a), "b": _normalised(jnp.stack(of_bases, 1))}

    def generator(self, shapes: Mapping[Path, jax.ShapeDtypeStruct]) -> nn.Module | None:
        shared = {"a_in": -1, "a_out": -1, "b_in": -3, "b_out": -3}  # and which axis is of features
        own = {path: leaf.shape for path, leaf in shapes.items() if path[-1] in shared}
        if not own:
            return None
        if any(shape[-2] != self.r for path, shape in own.items() if path[-1].startswith("a")):
            raise ValueError("RandLoRA takes layers of nn.scan whose axis is the first of their leaves.")
        d_in, d_out = (
            max(shape[shared[path[-1]]] for path, shape in own.items() if path[-1].endswith(side))
            for side in ("in", "out")
        )
        return Projections(self, d_in, d_out, tuple((path, path[-1][0], shape) for path, shape in own.items()))

    def frozen(self, leaf: Path) -> bool:
        return self.save_projection and leaf[-1] in ("a", "b")

    def regenerated(self, leaf: Path) -> bool:
        return not self.save_projection and leaf[-1] in ("a", "b")


def _sparse(bits: jax.Array, shape: tuple[int, ...], share: float) -> jax.Array:
    """Two opposite numbers, each at this share of the places, and 0 elsewhere, of standard deviation 1."""
    drawn = torch_random.unit(bits, shape)
    signs = (drawn > 1 - share).astype(jnp.int32) - (drawn < share)
    count, total = jnp.abs(signs).sum(), signs.sum().astype(jnp.float32)  # exact: sums of floats are not
    deviation = jnp.sqrt((count - total * (total / signs.size)) / (signs.size - 1))
    return signs / deviation


def _normalised(matrix: jax.Array) -> jax.Array:
    """Divided by its standard deviation, in bfloat16, which values and result are rounded to."""
    deviation = jnp.std(matrix, ddof=1).astype(jnp.bfloat16).astype(jnp.float32)
    return (matrix / deviation).astype(jnp.bfloat16).astype(jnp.float32)
