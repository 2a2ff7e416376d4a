"""GraLoRA against its formula in float64, what it costs, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy
from flax import linen as nn

import jdelta

D_IN, D_OUT = 12, 8
X = jax.random.normal(jax.random.key(5), (3, 5, D_IN))


def dense(x=X, d_out=D_OUT):
    module = nn.Sequential([nn.Dense(d_out)])
    params = module.init(jax.random.key(0), x)["params"]
    return jdelta.Backbone(module, params, dummy_inputs=(x,))


def change_of(own, k):
    """A LoRA for each block: row `p` of blocks has its own factor for each column `q`, and the other way round."""
    change = np.zeros((D_IN, D_OUT))
    rows, columns = D_IN // k, D_OUT // k
    for p in range(k):
        for q in range(k):
            a = own["a"][p * rows : (p + 1) * rows, q]
            b = own["b"][p, :, q * columns : (q + 1) * columns]
            change[p * rows : (p + 1) * rows, q * columns : (q + 1) * columns] = a @ b
    if "a_general" in own:
        change += own["a_general"] @ own["b_general"]
    return change


@pytest.mark.parametrize(
    ("arguments", "scale", "rank"),
    [
        ({"r": 2, "alpha": 3}, 1.5, 4),
        ({"r": 4, "gralora_k": 4, "alpha": 3}, 0.75, 8),
        ({"r": 3, "gralora_k": 1, "alpha": 3}, 1.0, 3),
        ({"r": 2, "hybrid_r": 1, "alpha": 3}, 1.0, 5),
    ],
)
def test_it_is_its_formula_in_float64(arguments, scale, rank):
    backbone = dense()
    bare = backbone(X)
    delta = jdelta.GraLoraModel(backbone, ["layers_0"], **arguments)
    np.testing.assert_array_equal(backbone(X), bare)
    trains, frozen = delta.partition()
    backbone.params = jdelta.combine(noisy(trains), frozen)
    layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), backbone.params["layers_0"])
    k, r, hybrid = arguments.get("gralora_k", 2), arguments["r"], arguments.get("hybrid_r", 0)
    own = layer["gralora"]
    assert sum(leaf.size for leaf in own.values()) == (r + hybrid) * (D_IN + D_OUT)  # as LoRA of that rank
    change = change_of(own, k)
    assert np.linalg.matrix_rank(change) == rank
    want = np.asarray(X, np.float64) @ (layer["kernel"] + scale * change) + layer["bias"]
    assert np.abs(want - bare).max() > 0.05
    np.testing.assert_allclose(backbone(X), want, rtol=1e-5, atol=1e-5)


def test_it_starts_as_peft_does():
    backbone = dense(jnp.ones((1, 64)), 32)
    jdelta.GraLoraModel(backbone, ["layers_0"], r=16, gralora_k=4, hybrid_r=8)
    own = backbone.params["layers_0"]["gralora"]
    assert {name: leaf.shape for name, leaf in own.items()} == {
        "a": (64, 4, 4),
        "b": (4, 4, 32),
        "a_general": (64, 8),
        "b_general": (8, 32),
    }
    assert not own["b"].any()
    assert not own["b_general"].any()
    for name, bound in (("a", 1 / 4), ("a_general", 1 / 8)):  # U(±1/√(d_in / k)), U(±1/√d_in)
        largest = abs(own[name]).max()
        assert 0.95 * bound < largest <= bound
        np.testing.assert_allclose(abs(own[name]).mean(), bound / 2, rtol=0.1)


@pytest.mark.parametrize("tokens", [8, 512])  # with many, the CPU takes another form
def test_it_costs_what_lora_of_its_rank_costs(tokens):
    def flops(model, **arguments):
        x = jnp.ones((tokens, 128))
        backbone = dense(x, 128)
        trains, frozen = model(backbone, ["layers_0"], **arguments).partition()

        def loss(trains, x):
            return jnp.sum(backbone(x, params=jdelta.combine(trains, frozen)) ** 2)

        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(trains, x).compile().cost_analysis()["flops"]

    assert flops(jdelta.GraLoraModel, r=8, gralora_k=4) < 1.05 * flops(jdelta.LoraModel, lora_r=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r is at least 1"),
        ({"gralora_k": 0}, "gralora_k is at least 1"),
        ({"hybrid_r": -1}, "hybrid_r is at least 0, got -1"),
        ({"r": 5}, "gralora_k=2 does not divide r=5"),
        ({"r": 3, "gralora_k": 3}, "cuts the weight into k × k blocks, and it has 12 rows, 8 columns"),
        ({"gralora_dropout": 1.0}, "gralora_dropout is at least 0 and below 1"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_says_why(arguments, message):
    backbone = dense()
    before = backbone.params
    with pytest.raises(ValueError, match=message):
        jdelta.GraLoraModel(backbone, ["layers_0"], **arguments)
    assert backbone.params is before
