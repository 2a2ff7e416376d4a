"""HRA against its formula in float64, how it starts, what it costs, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy
from flax import linen as nn

import jdelta

D_IN, D_OUT = 10, 6
X = jax.random.normal(jax.random.key(5), (3, 4, D_IN))


def dense(x=X, d_out=D_OUT):
    module = nn.Sequential([nn.Dense(d_out)])
    params = module.init(jax.random.key(0), x)["params"]
    params["layers_0"]["bias"] += 0.5
    return jdelta.Backbone(module, params, dummy_inputs=(x,))


def orthogonal(u):
    """Gram-Schmidt."""
    found = []
    for column in u.T:
        rest = column - sum((q * (q @ column) for q in found), np.zeros(D_IN))
        found.append(rest / np.sqrt(rest @ rest))
    return np.stack(found, 1)


def rotation(u, apply_GS):
    """`H_r ⋯ H_1`, by which rows are multiplied."""
    product = np.eye(D_IN)
    for column in (orthogonal(u) if apply_GS else u).T:
        product = (np.eye(D_IN) - 2 * np.outer(column, column) / (column @ column)) @ product
    return product


@pytest.mark.parametrize(("r", "apply_GS"), [(1, False), (2, False), (5, False), (12, False), (3, True), (10, True)])
def test_it_is_its_formula_in_float64(r, apply_GS):
    backbone = dense()
    bare = backbone(X)
    delta = jdelta.HRAModel(backbone, ["layers_0"], r=r, apply_GS=apply_GS)
    assert (np.abs(backbone(X) - bare).max() < 1e-5) == (r % 2 == 0 and not apply_GS)
    trains, frozen = delta.partition()
    backbone.params = jdelta.combine(noisy(trains), frozen)
    host = {k: np.asarray(leaf, np.float64) for k, leaf in backbone.params["layers_0"].items() if k != "hra"}
    u = np.asarray(backbone.params["layers_0"]["hra"]["u"], np.float64)
    assert u.shape == (D_IN, r)
    changed = rotation(u, apply_GS)
    np.testing.assert_allclose(changed @ changed.T, np.eye(D_IN), atol=1e-12)
    want = np.asarray(X, np.float64) @ changed @ host["kernel"] + host["bias"]
    assert np.abs(want - bare).max() > 0.05
    np.testing.assert_allclose(backbone(X), want, rtol=1e-5, atol=1e-5)
    delta.merge()
    np.testing.assert_allclose(backbone.params["layers_0"]["kernel"], changed @ host["kernel"], rtol=1e-5, atol=1e-5)


def test_it_starts_in_equal_pairs_of_the_size_that_peft_draws():
    backbone = dense(jnp.ones((1, 512)))
    jdelta.HRAModel(backbone, ["layers_0"], r=8)
    u = np.asarray(backbone.params["layers_0"]["hra"]["u"])
    np.testing.assert_array_equal(u[:, ::2], u[:, 1::2])
    assert 0.99 / 2 < np.abs(u).max() <= 1 / 2  # U(±1/√(r/2))
    np.testing.assert_allclose(np.abs(u).mean(), 1 / 4, rtol=0.05)


def test_it_costs_as_much_as_lora_of_its_rank():
    def flops(model, **arguments):
        x = jnp.ones((64, 128))
        backbone = dense(x, 128)
        delta = model(backbone, ["layers_0"], **arguments)
        trains, frozen = delta.partition()

        def loss(trains, x):
            return jnp.sum(backbone(x, params=jdelta.combine(trains, frozen)) ** 2)

        return jax.jit(loss).lower(trains, x).compile().cost_analysis()["flops"]

    bare = flops(jdelta.BitFitModel)
    of_lora = flops(jdelta.LoraModel, lora_r=8) - bare
    assert flops(jdelta.HRAModel, r=8) - bare < 1.5 * of_lora  # a part that does not grow with the batch comes on top


@pytest.mark.parametrize(
    ("layer", "x", "arguments", "message"),
    [
        (nn.Dense(3), X, {"r": 0}, "r is at least 1"),
        (nn.Dense(3), X, {"r": 11, "apply_GS": True}, r"HRARule at layers_0\.kernel: apply_GS makes r=11 vectors"),
        (nn.Conv(3, (3,)), X, {}, r"HRAModel at layers_0 \(Conv\): HRARule changes features that go in, .* last axes"),
        (nn.Embed(9, 3), jnp.array([[1, 2]]), {}, r"HRAModel at layers_0 \(Embed\): .* features that go in"),
        (nn.DenseGeneral(3, axis=1), X, {}, r"HRAModel at layers_0 \(DenseGeneral\): .* have to be in the last axes"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_says_why(layer, x, arguments, message):
    backbone = jdelta.Backbone(nn.Sequential([layer]), dummy_inputs=(x,))
    before = backbone.params
    with pytest.raises((TypeError, ValueError), match=message):
        jdelta.HRAModel(backbone, ["layers_0"], **arguments)
    assert backbone.params is before
