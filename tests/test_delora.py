"""DeLoRA against its formula in float64, its frozen norms, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import noisy
from flax import linen as nn

import jdelta

D_IN, D_OUT = 10, 6
X = jax.random.normal(jax.random.key(5), (3, 4, D_IN))


def dense():
    module = nn.Sequential([nn.Dense(D_OUT), nn.Dense(D_OUT)])
    return jdelta.Backbone(module, module.init(jax.random.key(0), X)["params"], dummy_inputs=(X,))


def formula(own, kernel, rank):
    """`ΔW[j, o] = ‖w_j‖ λ/r Σ_i a[j, i] b[i, o] / (‖a_i‖ ‖b_i‖)`, with norms of at least 1e-4."""
    change = np.zeros(kernel.shape)
    for i in range(rank):
        a, b = own["a"][:, i], own["b"][i]
        norms = max(np.sqrt(np.sum(a**2)), 1e-4) * max(np.sqrt(np.sum(b**2)), 1e-4)
        change += own["lambda"] / rank * np.outer(a, b) / norms
    for j in range(len(kernel)):
        change[j] *= np.sqrt(np.sum(kernel[j] ** 2))
    return change


def f64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize("short", [False, True])
def test_it_is_its_formula_in_float64(short):
    backbone = dense()
    bare, kernel = backbone(X), f64(backbone.params["layers_0"]["kernel"])
    delta = jdelta.DeloraModel(backbone, ["layers_0"], r=3, delora_lambda=2.5)
    np.testing.assert_array_equal(backbone(X), bare)
    trains, frozen = delta.partition()
    trains = noisy(trains)
    if short:  # one column of a and one row of b are below the smallest norm
        own = trains["layers_0"]["delora"]
        own["a"] = own["a"].at[:, 1].multiply(1e-6)
        own["b"] = own["b"].at[2].multiply(1e-5)
    params = backbone.params = jdelta.combine(trains, frozen)
    own = f64(params["layers_0"]["delora"])
    assert own["lambda"] != 2.5
    first, second = f64(params["layers_0"]), f64(params["layers_1"])
    hidden = np.asarray(X, np.float64) @ (kernel + formula(own, kernel, 3)) + first["bias"]
    want = hidden @ second["kernel"] + second["bias"]
    assert np.abs(want - bare).max() > 0.05
    np.testing.assert_allclose(backbone(X), want, rtol=1e-5, atol=1e-5)


def test_gradients_are_finite_at_the_start_where_b_is_0():
    backbone = dense()
    delta = jdelta.DeloraModel(backbone, ["layers_0"], r=3)
    trains, frozen = delta.partition()
    grads = jax.grad(lambda t: jnp.sum(backbone(X, params=jdelta.combine(t, frozen)) ** 2))(trains)
    own = grads["layers_0"]["delora"]
    assert {key: bool(jnp.isfinite(leaf).all()) for key, leaf in own.items()} == dict.fromkeys(own, True)
    assert jnp.abs(own["b"]).max() > 0


def test_the_norms_are_those_of_the_weight_before_training_and_are_saved(tmp_path):
    backbone = dense()
    delta = jdelta.DeloraModel(backbone, ["layers_0"], r=3)
    norms = backbone.params["layers_0"]["delora"]["w_norm"]
    np.testing.assert_allclose(norms, np.linalg.norm(backbone.params["layers_0"]["kernel"], axis=1), rtol=1e-6)
    trains, _ = delta.partition()
    assert set(trains["layers_0"]["delora"]) == {"a", "b", "lambda"}
    tx = delta.optimizer(optax.sgd(0.1))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, backbone.params), tx.init(backbone.params), backbone.params)
    backbone.params = optax.apply_updates(backbone.params, updates)
    np.testing.assert_array_equal(backbone.params["layers_0"]["delora"]["w_norm"], norms)
    delta.save_finetuned(tmp_path)

    other = dense()
    other.params["layers_0"]["kernel"] = 2 * other.params["layers_0"]["kernel"]
    jdelta.AutoDeltaModel.from_finetuned(tmp_path, other, check_hash=False)
    np.testing.assert_array_equal(other.params["layers_0"]["delora"]["w_norm"], norms)


def test_patterns_give_modules_their_own_rank_and_strength():
    backbone = dense()
    jdelta.DeloraModel(
        backbone, ["layers_0", "layers_1"], r=3, rank_pattern={"layers_1": 2}, lambda_pattern={"layers_0": 4}
    )
    first, second = (backbone.params[key]["delora"] for key in ("layers_0", "layers_1"))
    assert (first["a"].shape, second["a"].shape) == ((D_IN, 3), (D_OUT, 2))
    assert (first["lambda"], second["lambda"]) == (4, 15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r is at least 1"),
        ({"rank_pattern": {"layers_0": 0}}, "rank_pattern"),
        ({"module_dropout": 1.0}, "module_dropout is at least 0 and below 1"),
        ({"delora_lambda": "much"}, "delora_lambda"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_says_why(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        jdelta.DeloraModel(dense(), ["layers_0"], **arguments)
