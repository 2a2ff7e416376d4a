"""The bottleneck methods of OpenDelta agree with their formulas in float64 numpy to 1e-6, and with its own layers.

The values inside are of order 1, and jax computes in float32. Compacter's formula, in all forms, is in test_compacter.
"""

import importlib
import importlib.util
import itertools
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiers import breadth

import jdelta
from jdelta.methods.compacter import CompacterConfig, HypercomplexDense
from jdelta.methods.low_rank_adapter import LowRankDense
from jdelta.models import LowRankAdapterModel

X = jax.random.normal(jax.random.key(5), (2, 6, 16))


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTS = {
    "gelu_new": gelu_new,
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


class Pair(nn.Module):
    """Two hosts; the output is kept at order 1."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="w2")(jnp.tanh(nn.Dense(8, name="w1")(x)))


def at_scale_one(shapes):
    draw = np.random.default_rng(0)

    def new(path, leaf):
        scale = 1 if path[-1].key == "bias" else np.sqrt(leaf.shape[-2])
        return (draw.normal(size=leaf.shape) / scale / 2).astype(np.float32)

    return jax.tree_util.tree_map_with_path(new, shapes)


def attach(method, **arguments):
    backbone = jdelta.Backbone(Pair(), Pair().init(jax.random.key(0), X)["params"], dummy_inputs=(X,))
    delta = method(backbone, **arguments)
    params = jdelta.graft(jdelta.prune(backbone.params, delta.name), at_scale_one(delta.shapes()))
    return backbone(X, params=params), jax.tree.map(lambda a: np.asarray(a, np.float64), params)


def dense(x, p):
    kernel = p["kernel"] if "kernel" in p else p["left"] @ p["right"]
    return x @ kernel + p["bias"]


def bottleneck(x, p, act):
    return dense(act(dense(x, p["down"])), p["up"])


def close(output, expected):
    assert 0.1 < np.abs(expected).max() < 10
    np.testing.assert_allclose(output, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("act", breadth(ACTS, "gelu_new"))
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (jdelta.AdapterModel, {"bottleneck_dim": 3}),
        (LowRankAdapterModel, {"reduction_factor": 4}),
        (LowRankAdapterModel, {"reduction_factor": 2, "low_rank_rank": 3}),
    ],
)
def test_an_adapter_after_two_modules_is_its_formula(method, arguments, act):
    output, p = attach(method, modified_modules=["w1", "w2"], non_linearity=act, **arguments)
    x, name = np.asarray(X, np.float64), method.delta_type
    y = dense(x, p["w1"])
    h = np.tanh(y + bottleneck(y, p["w1"][name], ACTS[act]))
    z = dense(h, p["w2"])
    close(output, z + bottleneck(z, p["w2"][name], ACTS[act]))


@pytest.mark.parametrize("act", breadth(ACTS, "gelu_new"))
@pytest.mark.parametrize("scaled", [1.0, 0.5, 2.0])
def test_a_parallel_adapter_over_a_span_is_its_formula(scaled, act):
    output, p = attach(
        jdelta.ParallelAdapterModel, modified_modules=["w1", "w2"], bottleneck_dim=3, scaled=scaled, non_linearity=act
    )
    x = np.asarray(X, np.float64)
    y = dense(np.tanh(dense(x, p["w1"])), p["w2"])
    close(output, y + scaled * bottleneck(x, p["w2"]["parallel_adapter"], ACTS[act]))


@pytest.fixture(scope="module")
def opendelta_layers():
    """OpenDelta's layers by themselves: its package as a whole needs the client of its model hub."""
    spec = importlib.util.find_spec("opendelta")
    if spec is None:
        pytest.skip("opendelta is not installed")
    root = os.path.dirname(spec.origin)
    for name, folder in (("opendelta", root), ("opendelta.delta_models", os.path.join(root, "delta_models"))):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [folder]
    yield lambda name: importlib.import_module(f"opendelta.delta_models.layers.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "opendelta"]:
        del sys.modules[name]


def in_float64(theirs, params, names):
    """Output of a torch layer that was given our leaves, on `X`."""
    import torch

    theirs.load_state_dict({names.get(key, key): torch.tensor(leaf) for key, leaf in params.items()})
    return theirs.double()(torch.tensor(np.asarray(X, np.float64))).detach().numpy()


@pytest.mark.parity
@pytest.mark.parametrize(("factorized", "factorized_rule"), itertools.product([True, False], repeat=2))
def test_the_layer_of_compacter_is_that_of_opendelta(opendelta_layers, factorized, factorized_rule):
    options = {"factorized_phm": factorized, "factorized_phm_rule": factorized_rule, "phm_rank": 3}
    layer = opendelta_layers("hypercomplex_linear").PHMLinear
    theirs = layer(16, 4, phm_dim=2, w_init="glorot-uniform", c_init="normal", **options)
    ours = HypercomplexDense(4, CompacterConfig(hypercomplex_division=2, **options))
    params = at_scale_one(jax.eval_shape(ours.init, jax.random.key(0), X)["params"])
    close(ours.apply({"params": params}, X), in_float64(theirs, params, {"bias": "b"}))


@pytest.mark.parity
def test_the_layer_of_the_low_rank_adapter_is_that_of_opendelta(opendelta_layers):
    """Of rank one: of any other, OpenDelta's `W_left * W_right`, an elementwise product, does not fit."""
    theirs = opendelta_layers("low_rank_linear").LowRankLinear(16, 4, rank=1)
    init = nn.initializers.normal(1.0)
    ours = LowRankDense(4, 1, init, init)
    params = at_scale_one(jax.eval_shape(ours.init, jax.random.key(0), X)["params"])
    names = {"left": "W_left", "right": "W_right", "bias": "b"}
    close(ours.apply({"params": params}, X), in_float64(theirs, params, names))
