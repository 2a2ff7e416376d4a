"""Small nnx models."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdelta.trees.variables import DeltaParam

IDS = jnp.array([[1, 2, 3], [4, 5, 6]])


class Block(nnx.Module):
    """A feed-forward block."""

    def __init__(self, width, rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return x + self.drop(self.down(nnx.relu(self.up(self.norm(x)))))


class Model(nnx.Module):
    """Blocks in an `nnx.List`, run in `nnx.remat`, one of them at two paths; blocks run in `nnx.scan`; a tied head."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 4, rngs=rngs)
        self.layers = nnx.List([Block(4, rngs), Block(4, rngs)])
        self.same = self.layers[0]

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs):
            return Block(4, rngs)

        self.stack = stacked(rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = nnx.remat(lambda layer, x: layer(x))(layer, x)
        x = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.stack, x)
        return self.embed.attend(x)


class Mixed(nnx.Module):
    """Modules in a dict, a tuple and a Sequential; experts and a list of weights; attention."""

    def __init__(self, rngs):
        def linear():
            return nnx.Linear(4, 4, rngs=rngs)

        self.boxed = nnx.Dict(a=linear())
        self.pair = nnx.data((linear(), linear()))
        self.plain = nnx.data({"x": linear()})
        self.seq = nnx.Sequential(linear(), nnx.relu, linear())
        self.experts = nnx.Param(jax.random.normal(rngs.params(), (2, 4, 4)))
        self.weights = nnx.List([nnx.Param(jax.random.normal(rngs.params(), (4, 4)))])
        self.attn = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)

    def __call__(self, x):
        x = self.plain["x"](self.pair[1](self.pair[0](self.boxed["a"](x))))
        x = jnp.einsum("bd,edf->bf", self.seq(x), self.experts[...]) @ self.weights[0][...]
        return self.attn(x[None])


class Tied(nnx.Module):
    """A table that two modules share, and that a method reads too."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.block = nnx.Linear(4, 4, rngs=rngs)
        self.out = self.embed.embedding

    def encode(self, ids):
        return self.block(self.embed(ids))

    def __call__(self, ids):
        return self.encode(ids) @ self.out[...].T


def train_deltas(model, seed=0):
    """Stands for training: gives random values to all leaves of deltas."""
    draw = np.random.default_rng(seed)
    for _, value in sorted(nnx.iter_graph(model), key=lambda item: str(item[0])):
        if isinstance(value, DeltaParam):
            value[...] = jnp.asarray(0.3 * draw.normal(size=value[...].shape), jnp.float32)
