"""What LoRA does to a weight: the plain form, DoRA, and the ways in which they start.

Sources: LoRA, Hu et al. 2021, arXiv 2106.09685; DoRA, Liu et al. 2024, arXiv 2402.09353; PiSSA, Meng et al. 2024, arXiv
2404.02948; OLoRA, Büyükakyüz 2024, arXiv 2406.01775. Numbers agree with PyTorch PEFT's for the same weights.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from jdelta.core.linear_maps import BoundLinear
from jdelta.core.rules import Leaves, Side
from jdelta.methods.parameter import kaiming_uniform

Factors = tuple[jax.Array, jax.Array]

_PISSA = re.compile(r"pissa(?:_niter_(\d+))?")
FROM_DATA = ("eva", "corda", "lora_ga")  # by `delta.init_from_data`; until then they start as with True
STARTS = (
    "True, False, 'gaussian', 'orthogonal', 'olora', 'pissa', 'pissa_niter_16' (or another number), 'eva', 'corda', "
    "'lora_ga'"
)


def is_start(start: bool | str) -> bool:
    """Whether a value of `init_lora_weights` is known."""
    known = ("gaussian", "orthogonal", "olora", *FROM_DATA)
    return isinstance(start, bool) or start in known or bool(_PISSA.fullmatch(start))


def takes_from_weight(start: bool | str) -> bool:
    """Whether the factors start as a part of the weight, of which that then is taken off."""
    return isinstance(start, str) and (start in ("olora", "corda", "lora_ga") or bool(_PISSA.fullmatch(start)))


@dataclasses.dataclass(frozen=True)
class LoraRule:
    """`ΔW = scale · a b`, or from a start with a part of the weight, `scale · (a b − a₀ b₀)`.

    Attributes:
      rank: of the change, `r`.
      scale: factor of the change.
      dropout: rate of dropout on the input of `a`.
      of_rows: whether the weight is a table of rows that are looked up. As in PEFT, `a` starts at 0 there and `b` at
        N(0, 1), whatever `start` says.
      start: how `a` and `b` start, as PEFT's `init_lora_weights`.
    """

    axes: ClassVar[Mapping[str, tuple[Side | None, ...]]] = {
        **{"a": ("in", None), "b": (None, "out")},
        **{"a0": ("in", None), "b0": (None, "out")},
    }

    rank: int
    scale: float
    dropout: float = 0.0
    of_rows: bool = False
    start: bool | str = True

    @property
    def starts_from_weight(self) -> bool:
        """Whether the weight's value counts."""
        return not self.of_rows and takes_from_weight(self.start) and self.start not in FROM_DATA

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        d_in, d_out = weight.shape
        if self.of_rows:
            return {"a": jnp.zeros((d_in, self.rank)), "b": jax.random.normal(key, (self.rank, d_out))}
        if not self.starts_from_weight:
            a, b = _random(self.start, key, d_in, self.rank, d_out)
            return {"a": a, "b": b, **({"a0": a, "b0": b} if takes_from_weight(self.start) else {})}
        assert isinstance(weight, jax.Array)
        a, b = _of_weight(self.start, key, weight, self.rank, self.scale)
        return {"a": a, "b": b, "a0": a, "b0": b}

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        change = own["a"] @ own["b"]
        return self.scale * (change - own["a0"] @ own["b0"] if "a0" in own else change)

    def product(self, x: jax.Array, y: jax.Array, own: Leaves, linear: BoundLinear) -> jax.Array:
        change = linear.low_rank(x, own["a"], self.scale * own["b"])
        return change - linear.low_rank(x, own["a0"], self.scale * own["b0"]) if "a0" in own else change


@dataclasses.dataclass(frozen=True)
class DoraRule(LoraRule):
    """`W + ΔW = m ⊙ (W + s a b) / ‖W + s a b‖`, with the norm of each output's column, which has no gradient."""

    axes: ClassVar[Mapping[str, tuple[Side | None, ...]]] = {**LoraRule.axes, "m": ("out",)}

    @property
    def starts_from_weight(self) -> bool:
        """Always: `m` starts at the norm of each column."""
        return True

    @property
    def inner(self) -> LoraRule:
        """The change of the direction."""
        return LoraRule(self.rank, self.scale, self.dropout, self.of_rows, self.start)

    def factor(self, changed: jax.Array, own: Leaves) -> jax.Array:
        """`f = m / ‖W + s a b‖`."""
        return _over(own["m"], jnp.linalg.norm(changed, axis=0))

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        assert isinstance(weight, jax.Array)
        own = self.inner.init(key, weight)
        return {**own, "m": jnp.linalg.norm(weight + self.inner.update(weight, own), axis=0)}

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        changed = weight + self.inner.update(weight, own)
        return self.factor(changed, own) * changed - weight

    def product(self, x: jax.Array, y: jax.Array, own: Leaves, linear: BoundLinear) -> jax.Array:
        """`(f − 1) x W + f x (s a b)`."""
        factor, change = _over(own["m"], self._norm(linear.weight, own)), self.inner.product(x, y, own, linear)
        return (factor - 1).astype(y.dtype) * y + factor.astype(y.dtype) * change

    def _norm(self, weight: jax.Array, own: Leaves) -> jax.Array:
        """The norms of the columns by thin products: `‖W‖² + 2 ⟨W, s a b⟩ + ‖s a b‖²`."""
        a, b = (own[leaf].astype(jnp.float32) for leaf in "ab")
        if "a0" in own:
            a, b = jnp.concatenate([a, own["a0"]], axis=1), jnp.concatenate([b, -own["b0"]])
        b = self.scale * b
        across = jnp.sum((a.T @ weight) * b, axis=0)
        squared = jnp.sum(weight**2, axis=0) + 2 * across + jnp.sum((a.T @ a @ b) * b, axis=0)
        return jnp.sqrt(jnp.maximum(squared, 0))  # the terms cancel where nothing is left


def _over(length: jax.Array, norm: jax.Array) -> jax.Array:
    """The factor that gives columns a length, without a gradient of the norm; 1 for zeros, which have no direction."""
    norm = jax.lax.stop_gradient(norm)
    return jnp.where(norm > 0, length.astype(jnp.float32) / jnp.where(norm > 0, norm, 1), 1)


def _random(start: bool | str, key: jax.Array, d_in: int, rank: int, d_out: int) -> Factors:
    """Factors that do not depend on the weight."""
    of_a, of_b, of_q = jax.random.split(key, 3) if start in (False, "orthogonal") else (key, key, key)
    if start == "orthogonal":  # halves of one orthogonal basis, so that `a b` is 0
        basis = jnp.linalg.qr(jax.random.normal(of_q, (rank, rank)))[0]
        a = jax.random.normal(of_a, (d_in, rank // 2)) @ basis[0::2] / 10
        return a, basis[1::2].T @ jax.random.normal(of_b, (rank // 2, d_out)) / 10
    if start == "gaussian":
        return jax.random.normal(of_a, (d_in, rank)) / rank, jnp.zeros((rank, d_out))
    a = kaiming_uniform(of_a, (d_in, rank), jnp.float32)
    return a, jnp.zeros((rank, d_out)) if start else kaiming_uniform(of_b, (rank, d_out), jnp.float32)


def _of_weight(start: bool | str, key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
    """Factors whose product, times the scale, is a part of the weight."""
    if start == "olora":
        q, r = jnp.linalg.qr(weight.T)
        return padded(r[:rank].T, q[:, :rank].T, rank)
    iterations = match[1] if (match := _PISSA.fullmatch(str(start))) else None
    if iterations is None:
        u, s, v = jnp.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = _leading(weight, key, min(rank, *weight.shape), int(iterations))
    root = jnp.sqrt(s[:rank] / scale)
    return padded(u[:, :rank] * root, root[:, None] * v[:rank], rank)


def _leading(weight: jax.Array, key: jax.Array, rank: int, iterations: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The leading singular vectors and values, by power iterations (Halko et al. 2009, arXiv 0909.4061)."""
    q = jnp.linalg.qr(weight @ jax.random.normal(key, (weight.shape[1], rank)))[0]
    for _ in range(iterations):
        q = jnp.linalg.qr(weight @ jnp.linalg.qr(weight.T @ q)[0])[0]
    u, s, v = jnp.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ u, s, v


def padded(a: jax.Array, b: jax.Array, rank: int) -> Factors:
    """With zeros where the weight has a lower rank."""
    return jnp.pad(a, ((0, 0), (0, rank - a.shape[1]))), jnp.pad(b, ((0, rank - len(b)), (0, 0)))
