"""Small nnx modules with deltas, whose states have variables of all kinds, and how states are compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jdelta
from jdelta.trees import surgery

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
SEQUENCES = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 6)), jnp.float32)


class Product(nnx.Module):
    """A module that knows nothing of biases."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (6, 6)) / 2)

    def __call__(self, x):
        return x @ self.kernel[...]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 6, rngs=rngs)
        self.plain = nnx.Linear(6, 6, use_bias=False, rngs=rngs)
        self.product = Product(rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.norm(self.product(self.plain(jnp.tanh(self.dense(x))))))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.heads = nnx.Dict({"0": nnx.Linear(6, 3, rngs=rngs)})

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.heads["0"](x)


@functools.cache
def initial():
    return nnx.split(Network(nnx.Rngs(0, dropout=1)))


def network():
    model = nnx.merge(*initial(), copy=True)
    model.eval()
    return model


METHODS = {
    "lora": (jdelta.LoraModel, {"lora_r": 2}),
    "adapter": (jdelta.AdapterModel, {"bottleneck_dim": 2}),
    "bitfit": (jdelta.BitFitModel, {}),
    "low_rank_adapter": (jdelta.LowRankAdapterModel, {"reduction_factor": 3}),
    "compacter": (jdelta.CompacterModel, {"reduction_factor": 3, "hypercomplex_division": 2}),
    "parallel_adapter": (jdelta.ParallelAdapterModel, {"bottleneck_dim": 2}),
}


def attached(method="lora", **arguments):
    cls, own = METHODS[method]
    model = network()
    modules = arguments.pop("modules", ["dense", "plain"])
    return model, cls(model, modules, unfrozen_modules=["heads"], dummy_inputs=(X,), **own, **arguments)


def moved(tree, seed=0):
    """Stands for training."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + rng.normal(0, 0.3, a.shape).astype(a.dtype), tree)


def trained(method="lora", seed=0, **arguments):
    """A model with a delta that has moved, which its state says too."""
    model, delta = attached(method, **arguments)
    trainable, frozen = delta.partition(nnx.state(model))
    nnx.update(model, delta.combine(moved(trainable, seed), frozen))
    return model, delta


def split(model):
    """What `nnx.split` gives, with variables of its own: those of `nnx.split` are the module's."""
    return nnx.split(nnx.clone(model))


def run(graphdef, state, x=X):
    return nnx.merge(graphdef, state, copy=True)(x)


def bits(tree):
    leaves = surgery.flatten(tree)
    keys = {p: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for p, leaf in leaves.items()}
    return {p: np.asarray(jax.random.key_data(leaf) if keys[p] else leaf).tobytes() for p, leaf in leaves.items()}


def assert_same(one, other):
    """The same structure, with types and metadata of variables, and the same bits."""
    assert type(one) is type(other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert bits(one) == bits(other)


class Attending(nnx.Module):
    """A module with attention."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)


def attending(**arguments):
    """A module with a prefix, which a network generates unless an argument says otherwise."""
    model = Attending(nnx.Rngs(0))
    model.eval()
    modules = ["layers.0", "layers.1"]
    return model, jdelta.PrefixModel(model, modules, prefix_token_num=3, dummy_inputs=(SEQUENCES,), **arguments)
