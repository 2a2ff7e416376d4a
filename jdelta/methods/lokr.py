"""LoKr: a change that is the Kronecker product of two small matrices (Yeh et al., ICLR 2024, arXiv 2309.14859).

`W + (alpha / r) w1 ⊗ w2`, where a factor that `r` is small for is a product of rank `r` itself. Numbers agree with
PyTorch PEFT's for the same weights.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jdelta.core.config import require_positive_int, require_positive_ints
from jdelta.core.linear_maps import BoundLinear, LookupMap
from jdelta.core.method import Method
from jdelta.core.rules import Leaves
from jdelta.methods.parameter import kaiming_uniform
from jdelta.trees import addressing

SQUARE = -1  # a decompose_factor: as near to the square root as can be

Start = bool | Literal["lycoris"]


def split(size: int, factor: int) -> tuple[int, int]:
    """Two numbers with the product `size`: `factor` first if it divides it.

    Otherwise the first is the largest divisor up to `factor`, or at all, that is not above the second.
    """
    if factor != SQUARE and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == SQUARE else min(factor, math.isqrt(size))
    first = next(m for m in range(limit, 0, -1) if size % m == 0)
    return first, size // first


@dataclasses.dataclass(frozen=True)
class LokrRule:
    """`ΔW[i n + j, o m + p] = scale · w1[i, o] w2[j, p]`, for `w2` of `n` rows and `m` columns.

    `w1` is a leaf, or `a1 b1` of leaves; `w2` likewise.

    Attributes:
      rank: of the factors that are products, `r`.
      scale: factor of the change.
      factor: by which the widths of the weight are split, see `split`.
      both: whether `w1` is a product too, where `r` is below half its larger width; `w2` always is.
      start: what starts at 0: `w1` or `b1` (`True`), nothing (`False`), `w2` or `a2` (`"lycoris"`).
    """

    rank: int
    scale: float
    factor: int = SQUARE
    both: bool = False
    start: Start = True

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        (m_in, n_in), (m_out, n_out) = (split(size, self.factor) for size in weight.shape)
        shapes: dict[str, tuple[int, int]] = {}
        for number, d_in, d_out, may_be_thin in (("1", m_in, m_out, self.both), ("2", n_in, n_out, True)):
            if may_be_thin and 2 * self.rank < max(d_in, d_out):
                shapes |= {f"a{number}": (d_in, self.rank), f"b{number}": (self.rank, d_out)}
            else:
                shapes[f"w{number}"] = (d_in, d_out)
        of = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        still = {True: ("w1", "b1"), False: (), "lycoris": ("w2", "a2")}[self.start]
        return {
            leaf: jnp.zeros(shape) if leaf in still else kaiming_uniform(of[leaf], shape, jnp.float32)
            for leaf, shape in shapes.items()
        }

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        w1, w2 = (own[f"w{i}"] if f"w{i}" in own else own[f"a{i}"] @ own[f"b{i}"] for i in (1, 2))
        return self.scale * jnp.einsum("io,jp->ijop", w1, w2).reshape(weight.shape)

    def product(self, x: jax.Array, y: jax.Array, own: Leaves, linear: BoundLinear) -> jax.Array | None:
        """By the factors one after the other, in the cheapest order; the input is a matrix for that."""
        first, second = _chain(own, 1), _chain(own, 2)
        rows = len(second[0])
        if isinstance(linear.linear, LookupMap):
            left, right = jnp.take(first[0], x // rows, 0), jnp.take(second[0], x % rows, 0)
            left, right = _through(left, first[1:]), _through(right, second[1:])
            out = jnp.einsum("...o,...p->...op", left, right)
        else:
            features = linear.features(x)
            if features is None:
                return None
            blocks = features.reshape(*features.shape[:-1], features.shape[-1] // rows, rows)
            factors = [leaf.astype(x.dtype) for leaf in (*first, *second)]
            out = jnp.einsum(f"...ij,{_EQUATION[len(first)][0]},{_EQUATION[len(second)][1]}->...op", blocks, *factors)
        return self.scale * out.reshape(*out.shape[:-2], y.shape[-1])


_EQUATION = {1: ("io", "jp"), 2: ("ir,ro", "js,sp")}  # of `w1` and `w2`, by the number of their leaves


def _chain(own: Leaves, number: int) -> tuple[jax.Array, ...]:
    """The leaves whose product is a factor."""
    names = (f"w{number}",) if f"w{number}" in own else (f"a{number}", f"b{number}")
    return tuple(own[name] for name in names)


def _through(z: jax.Array, leaves: tuple[jax.Array, ...]) -> jax.Array:
    for leaf in leaves:
        z = z @ leaf
    return z


@dataclasses.dataclass(frozen=True)
class LokrConfig(Method):
    """Arguments of LoKr.

        config = jdelta.LokrConfig(r=8, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    PEFT's `rank_dropout`, `module_dropout` and `use_effective_conv2d` are not there: a convolution's kernel is one
    matrix.

    Attributes:
      r: the rank of the factors that are products of two matrices: where it is below half their larger width. The
        others are full.
      alpha: the update is scaled by `alpha / r`, that of full factors too.
      decompose_factor: the widths of the first factor, where it divides those of the weight; else the largest divisor
        below. -1: as near to their square roots as can be, which takes the fewest parameters.
      decompose_both: whether the first factor is a product too, and not the second alone.
      init_weights: what starts at 0: the first factor (`True`), or the second (`"lycoris"`, as in the authors' code);
        with `False` nothing, so that the output changes at once.
      rank_pattern: patterns of modules to their own rank, in place of `r`; the first that matches counts.
      alpha_pattern: likewise, in place of `alpha`.
    """

    delta_type = "lokr"
    default_modified_modules = ("attn.q", "attn.v", "conv")

    pattern_fields: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")

    r: int = 8
    alpha: float = 8
    decompose_factor: int = SQUARE
    decompose_both: bool = False
    init_weights: bool | Literal["lycoris"] = True
    rank_pattern: dict[str, int] | None = dataclasses.field(default=None, hash=False)
    alpha_pattern: dict[str, float] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("r", self.r)
        if self.decompose_factor != SQUARE and self.decompose_factor < 1:
            raise ValueError(f"decompose_factor is -1 or at least 1, got {self.decompose_factor}.")
        require_positive_ints("rank_pattern", self.rank_pattern)

    def rule(self, name: str) -> LokrRule:
        rank = addressing.first_match(self.rank_pattern, name, self.r)
        alpha = addressing.first_match(self.alpha_pattern, name, self.alpha)
        return LokrRule(rank, alpha / rank, self.decompose_factor, self.decompose_both, self.init_weights)
