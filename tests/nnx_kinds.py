"""A small nnx model around a module of each kind, and what is given to it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from nnx_models import Block


class Around(nnx.Module):
    """A module between two linear ones, as in a model; of tokens, it comes first."""

    def __init__(self, make, width, rngs, first=None):
        self.first = nnx.Linear(width, width, rngs=rngs) if first is None else None
        self.host = make(rngs)
        self.last = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.host(x if self.first is None else self.first(x)))


class Einsum(nnx.Module):
    """An einsum as tunix writes it."""

    def __init__(self, einsum_str, shape, *, rngs):
        self.einsum_str = einsum_str
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class Experts(nnx.Module):
    """Experts in one array, for rows that are sorted by expert."""

    def __init__(self, *, rngs):
        self.wi = nnx.Param(jax.random.normal(rngs.params(), (2, 4, 4)))

    def __call__(self, x):
        flat = x.reshape(-1, 4)
        sizes = jnp.array([len(flat) // 2, len(flat) - len(flat) // 2])
        return jax.lax.ragged_dot(flat, self.wi[...], sizes).reshape(x.shape)


class Stack(nnx.Module):
    """Blocks that `nnx.vmap` makes and `nnx.scan` runs."""

    def __init__(self, *, rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: Block(4, rngs), in_axes=0, out_axes=0))
        self.blocks = make(rngs)
        self.blocks.eval()

    def __call__(self, x):
        return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model, what it takes, and where deltas go.

    Attributes:
      make: makes the module from random numbers.
      x: the input.
      names: of the modules that deltas are put at.
      parameter: name of the parameter, if LoRA goes there.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    x: Any
    names: tuple[str, ...] = ("host",)
    parameter: str | None = None

    def build(self) -> nnx.Module:
        is_tokens = jnp.issubdtype(self.x.dtype, jnp.integer)
        return Around(self.make, self.x.shape[-1], nnx.Rngs(0), first=False if is_tokens else None)


ROWS = jnp.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)
KINDS = {
    "Linear": Kind(lambda rngs: nnx.Linear(4, 4, rngs=rngs), ROWS),
    "LinearGeneral": Kind(lambda rngs: nnx.LinearGeneral(4, (4,), rngs=rngs), ROWS),
    "Einsum": Kind(lambda rngs: nnx.Einsum("btd,de->bte", (4, 4), (4,), rngs=rngs), ROWS),
    "Conv": Kind(lambda rngs: nnx.Conv(4, 4, (3,), rngs=rngs), ROWS),
    "ConvTranspose": Kind(lambda rngs: nnx.ConvTranspose(4, 4, (3,), rngs=rngs), ROWS),
    "Embed": Kind(lambda rngs: nnx.Embed(7, 4, rngs=rngs), jnp.array([[0, 3, 3], [6, 1, 2]])),
    "MultiHeadAttention": Kind(lambda rngs: nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs), ROWS),
    "LayerNorm": Kind(lambda rngs: nnx.LayerNorm(4, rngs=rngs), ROWS),
    "RMSNorm": Kind(lambda rngs: nnx.RMSNorm(4, rngs=rngs), ROWS),
    "GroupNorm": Kind(lambda rngs: nnx.GroupNorm(4, num_groups=2, rngs=rngs), ROWS),
    "einsum of the user's": Kind(lambda rngs: Einsum("BTD,DF->BTF", (4, 4), rngs=rngs), ROWS),
    "experts": Kind(lambda rngs: Experts(rngs=rngs), ROWS, parameter="wi"),
    "scan stack": Kind(lambda rngs: Stack(rngs=rngs), ROWS, names=("host.blocks.up", "host.blocks.down")),
}
