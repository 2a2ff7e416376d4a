"""SHiRA against its formula in float64, its places, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import fresh, noisy
from flax import linen as nn
from test_weight_methods import IDS

import jdelta
from jdelta.methods.shira import ShiraRule, random_places
from jdelta.saved.peft.tuners import TUNERS

D_IN, D_OUT = 10, 6
X = jax.random.normal(jax.random.key(5), (3, 4, D_IN))


def dense():
    module = nn.Sequential([nn.Dense(D_OUT)])
    return jdelta.Backbone(module, module.init(jax.random.key(0), X)["params"], dummy_inputs=(X,))


def test_it_is_its_formula_in_float64():
    backbone = dense()
    bare = backbone(X)
    delta = jdelta.ShiraModel(backbone, ["layers_0"], r=2)
    np.testing.assert_array_equal(backbone(X), bare)
    trains, frozen = delta.partition()
    params = backbone.params = jdelta.combine(noisy(trains), frozen)
    own, host = params["layers_0"]["shira"], params["layers_0"]
    assert own["values"].shape == (2 * (D_IN + D_OUT),)
    assert own["indices"].shape == (2, 2 * (D_IN + D_OUT))
    assert own["indices"].dtype == jnp.int32
    kernel = np.array(host["kernel"], np.float64)
    for value, row, column in zip(own["values"], *own["indices"], strict=True):
        kernel[int(row), int(column)] += float(value)
    assert (kernel != np.asarray(host["kernel"])).sum() == 32
    want = np.asarray(X, np.float64) @ kernel + np.asarray(host["bias"], np.float64)
    np.testing.assert_allclose(backbone(X), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns", "count"), [(10, 6, 60), (300, 7, 900), (5, 1000, 3000)])
def test_places_are_different_and_inside(rows, columns, count):
    places = np.asarray(random_places(jax.random.key(3), rows, columns, count))
    assert (places >= 0).all()
    assert (places < [[rows], [columns]]).all()
    assert len({*map(tuple, places.T)}) == count


def test_places_are_spread_evenly():
    """Of uniform places, the counts in 64 parts of the matrix have a chi-square of 63 ± 11, and so over many keys."""
    rows, columns, count, found = 96, 160, 3000, []
    for seed in range(20):
        i, j = np.asarray(random_places(jax.random.key(seed), rows, columns, count))
        counts = np.bincount(i * 8 // rows * 8 + j * 8 // columns, minlength=64)
        found.append(((counts - count / 64) ** 2 / (count / 64)).sum())
    assert 40 < np.mean(found) < 63 + 4 * 11 / np.sqrt(20)  # without replacement, a fifth less
    assert np.max(found) < 63 + 5 * 11


def test_places_depend_on_the_seed_and_the_module_and_are_saved(tmp_path):
    def places(**arguments):
        model = fresh("bert", "FlaxBertForSequenceClassification")
        delta = jdelta.ShiraModel(model, r=1, **arguments)
        layers = model.params["bert"]["encoder"]["layer"]
        return model, delta, [layers[i]["attention"]["self"]["query"]["shira"]["indices"] for i in "01"]

    model, delta, (first, second) = places(rng=0)
    assert (first != second).any()
    np.testing.assert_array_equal(places(rng=0)[2][0], first)
    assert (places(rng=1)[2][0] != first).any()
    trains, frozen = delta.partition()
    model.params = jdelta.combine(noisy(trains), frozen)
    delta.save_finetuned(tmp_path)
    other, loaded, _ = places(rng=1)
    loaded.load_finetuned(tmp_path)
    np.testing.assert_array_equal(other(IDS).logits, model(IDS).logits)


def test_an_optimizer_of_the_whole_tree_leaves_the_places_alone():
    backbone = dense()
    delta = jdelta.ShiraModel(backbone, ["layers_0"], r=1)
    before = backbone.params["layers_0"]["shira"]["indices"]
    tx = delta.optimizer(optax.adam(0.1))
    loss = lambda params: jnp.sum(backbone(X, params=params) ** 2)  # noqa: E731
    grads = jax.grad(loss, allow_int=True)(backbone.params)
    updates, _ = tx.update(grads, tx.init(backbone.params), backbone.params)
    params = optax.apply_updates(backbone.params, updates)
    np.testing.assert_array_equal(params["layers_0"]["shira"]["indices"], before)
    assert params["layers_0"]["shira"]["indices"].dtype == jnp.int32
    assert (params["layers_0"]["shira"]["values"] != 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r is at least 1"),
        ({}, r"ShiraRule at layers_0\.kernel: r=32 asks for 32 · \(10 \+ 6\) = 512 entries of a weight that has 60"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        jdelta.ShiraModel(dense(), ["layers_0"], **arguments)


@dataclasses.dataclass(frozen=True)
class WithProduct(ShiraRule):
    """SHiRA as a user might write it who has a product."""

    def product(self, x, y, own, linear):
        return linear.product(x, self.update(linear.weight, own))


@dataclasses.dataclass(frozen=True)
class ShiraWithProduct(jdelta.Method):
    def rule(self, name):
        return WithProduct(1)


@pytest.mark.parametrize("fused", [False, True])
def test_a_rule_with_whole_numbers_may_have_a_product(fused, monkeypatch):
    monkeypatch.setattr("jdelta.core.products.fusing_is_cheaper", lambda *_: fused)
    backbone = dense()
    jdelta.ShiraModel(backbone, ["layers_0"], r=1, name="d")
    want = jax.grad(lambda v: run(backbone, v))(value := jnp.arange(16.0))
    backbone = dense()
    with jdelta.checking_products():
        jdelta.DeltaModel(backbone, ["layers_0"], method=ShiraWithProduct(), name="d")
    found = jax.grad(lambda v: run(backbone, v))(value)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def run(backbone, values):
    host = backbone.params["layers_0"]
    params = {"layers_0": {**host, "d": {**host["d"], "values": values}}}
    return jnp.sum(jnp.sin(backbone(X, params=params)))


def test_deltas_with_other_places_do_not_add_up():
    found = []
    for seed in (0, 1):
        backbone = dense()
        delta = jdelta.ShiraModel(backbone, ["layers_0"], r=1, rng=seed)
        trains, frozen = delta.partition()
        found.append(delta.finetuned(jdelta.combine(noisy(trains), frozen)))
    with pytest.raises(ValueError, match=r"indices holds int32"):
        jdelta.weighted_sum(found, [0.5, 0.5])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])  # PEFT saves floats on Windows
def test_places_of_peft_are_those_of_the_transposed_weight(dtype):
    tuner = TUNERS["SHIRA"]
    tensors = {"indices": np.array([[5, 0], [9, 3]], dtype), "values": np.ones(2, np.float32)}
    leaves = tuner.leaves(tensors)
    assert leaves["indices"].dtype == np.int32
    np.testing.assert_array_equal(leaves["indices"], [[9, 3], [5, 0]])
    np.testing.assert_array_equal(tuner.written(leaves)["indices"], tensors["indices"])
    tuner.require_fit(leaves, D_IN, D_OUT)
    for widths in ((9, 6), (10, 5)):
        with pytest.raises(ValueError, match="shira_indices has places outside a weight of"):
            tuner.require_fit(leaves, *widths)
    with pytest.raises(ValueError, match="without shira_indices"):
        tuner.require_fit({"values": leaves["values"]}, D_IN, D_OUT)
    with pytest.raises(ValueError, match="outside"):
        tuner.require_fit({"indices": -leaves["indices"]}, D_IN, D_OUT)
