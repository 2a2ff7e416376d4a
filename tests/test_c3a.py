"""C3A: its formula in float64, entry by entry, what it costs, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jdelta
from jdelta.methods.c3a import C3ARule

X = np.random.default_rng(0).standard_normal((3, 12)).astype(np.float32)
KERNEL = np.random.default_rng(1).standard_normal((12, 8)).astype(np.float32)


def attach(**arguments):
    backbone = jdelta.Backbone(nn.Sequential([nn.Dense(8)]), {"layers_0": {"kernel": KERNEL, "bias": np.ones(8)}}, (X,))
    return backbone, jdelta.C3AModel(backbone, ["layers_0"], **{"block_size": 4, **arguments})


@pytest.mark.parametrize("size", [1, 2, 4])
def test_it_is_its_formula_in_float64(size):
    backbone, _ = attach(block_size=size, init_weights="gaussian")
    kernel = np.asarray(backbone.params["layers_0"]["c3a"]["kernel"], np.float64)
    want = np.asarray(X @ KERNEL + 1, np.float64)
    for row in range(3):
        for i in range(12):
            for o in range(8):
                want[row, o] += X[row, i] * kernel[o // size, i // size, (i % size - o % size) % size] / 12
    np.testing.assert_allclose(backbone(X), want, rtol=1e-5, atol=1e-5)


def test_starts():
    weight = jax.ShapeDtypeStruct((400, 200), jnp.float32)
    made = {start: C3ARule(10, start).init(jax.random.key(0), weight)["kernel"] for start in (True, False, "gaussian")}
    made |= {start: C3ARule(10, start).init(jax.random.key(0), weight)["kernel"] for start in ("kaiming_uniform",)}
    assert not made[True].any()
    assert abs(made["gaussian"].std() - 1) < 0.02
    assert 0.095 < jnp.abs(made[False]).max() <= 0.1
    assert 0.045 < jnp.abs(made["kaiming_uniform"]).max() <= 0.05


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"layers_0.*block_size=5 has to divide the numbers .*12 and 8"):
        attach(block_size=5)
    with pytest.raises(ValueError, match="block_size is at least 1"):
        attach(block_size=0)
    with pytest.raises((TypeError, ValueError), match="init_weights"):
        attach(init_weights="ones")


def test_in_a_step_no_change_of_the_whole_weight_is_formed():
    """Beyond the frozen layer, a step costs far less than the products with a matrix."""
    x = jax.ShapeDtypeStruct((512, 256), jnp.float32)
    module = nn.Sequential([nn.Dense(256), nn.tanh])
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    backbone = jdelta.Backbone(module, shapes, (x,))
    delta = jdelta.C3AModel(backbone, ["layers_0"], block_size=64)
    trains, frozen = delta.partition()

    def loss(own, frozen, x):
        return jnp.sum(backbone(x, params=jdelta.combine(own, frozen)) ** 2)

    step = jax.jit(jax.grad(loss)).lower(trains, frozen, x).as_text()
    assert "512x256xf32>, tensor<256x256xf32>" in step  # the frozen layer's
    assert "256x512xf32>, tensor<512x256xf32>" not in step
    assert "fft" in step
