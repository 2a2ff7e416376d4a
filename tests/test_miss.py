"""MiSS against its formula in float64, what it costs, and what it refuses."""

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
    return jdelta.Backbone(module, params, dummy_inputs=(x,))


def attach(**arguments):
    backbone = dense()
    bare = backbone(X)
    delta = jdelta.MissModel(backbone, ["layers_0"], **arguments)
    start = backbone(X)
    trains, frozen = delta.partition()
    backbone.params = jdelta.combine(noisy(trains), frozen)
    leaves = {key: np.asarray(leaf, np.float64) for key, leaf in backbone.params["layers_0"].items() if key != "miss"}
    return backbone, bare, start, np.asarray(backbone.params["layers_0"]["miss"]["d"], np.float64), leaves


def of_blocks(d, host, rank):
    """`ΔW[i, o] = d[i mod r, o mod columns]`."""
    change = np.zeros((D_IN, D_OUT))
    for i in range(D_IN):
        for o in range(D_OUT):
            change[i, o] = d[i % rank, o % d.shape[1]]
    return change


def of_bat(d, host, rank):
    """Each block of `Wᵀ`, `B`, becomes `B + B D + D`."""
    new = host["kernel"].T.copy()
    for o in range(0, D_OUT, rank):
        for i in range(0, D_IN, rank):
            block = new[o : o + rank, i : i + rank]
            new[o : o + rank, i : i + rank] = block + block @ d[o // rank] + d[o // rank]
    return new.T - host["kernel"]


@pytest.mark.parametrize(
    ("arguments", "shape", "formula"),
    [
        ({"r": 5}, (5, D_OUT), of_blocks),
        ({"r": 4}, (4, D_OUT), of_blocks),  # a last block of two
        ({"r": 10}, (10, D_OUT), of_blocks),
        ({"r": 4, "init_weights": False}, (4, D_OUT), of_blocks),
        ({"r": 3, "mini_r": 2, "init_weights": "mini"}, (3, 2), of_blocks),
        ({"r": 2, "init_weights": "bat"}, (3, 2, 2), of_bat),
    ],
)
def test_it_is_its_formula_in_float64(arguments, shape, formula):
    backbone, bare, start, d, host = attach(**arguments)
    assert d.shape == shape
    assert np.array_equal(start, bare) == (arguments.get("init_weights") is not False)
    x = np.asarray(X, np.float64)
    want = x @ (host["kernel"] + formula(d, host, arguments["r"])) + host["bias"]
    assert np.abs(want - bare).max() > 0.05
    np.testing.assert_allclose(backbone(X), want, rtol=1e-5, atol=1e-5)


def test_random_values_are_of_the_size_that_peft_draws():
    backbone = dense(jnp.ones((1, 64)), 256)
    jdelta.MissModel(backbone, ["layers_0"], init_weights=False)
    d = np.abs(backbone.params["layers_0"]["miss"]["d"])
    assert 0.95 / 16 < d.max() <= 1 / 16  # U(±1/√d_out)
    np.testing.assert_allclose(d.mean(), 1 / 32, rtol=0.05)


@pytest.mark.parametrize("tokens", [8, 512])  # with many, the CPU takes another form
def test_it_costs_no_more_than_lora_of_its_rank(tokens):
    def flops(model):
        x = jnp.ones((tokens, 128))
        backbone = dense(x, 128)
        delta = model(backbone, ["layers_0"])
        trains, frozen = delta.partition()

        def loss(trains, x):
            return jnp.sum(backbone(x, params=jdelta.combine(trains, frozen)) ** 2)

        forward = jax.jit(loss).lower(trains, x).compile().cost_analysis()["flops"]
        step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(trains, x).compile().cost_analysis()["flops"]
        return np.array([forward, step])

    of_miss = flops(lambda *args: jdelta.MissModel(*args, r=8))
    of_mini = flops(lambda *args: jdelta.MissModel(*args, r=8, init_weights="mini"))
    of_lora = flops(lambda *args: jdelta.LoraModel(*args, lora_r=8))
    assert (of_mini <= of_miss).all()
    assert (of_miss <= of_lora).all()


@pytest.mark.parametrize("rank", [3, 6])
def test_dropout_is_on_the_input_of_the_change_and_only_in_training(rank):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(rank, name="host")(x)

    x = jax.random.normal(jax.random.key(1), (50, 6))
    backbone = jdelta.Backbone(Model(), Model().init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    bare = backbone(x)
    jdelta.MissModel(backbone, ["host"], r=rank, miss_dropout=0.5)
    backbone.params = {"host": {**backbone.params["host"], "miss": {"d": jnp.eye(rank)}}}
    np.testing.assert_allclose(backbone(x) - bare, x.reshape(50, -1, rank).sum(1), atol=1e-5)
    found = backbone(x, train=True, rngs={"dropout": jax.random.key(2)}) - bare
    if rank == 6:
        assert set(np.unique(np.asarray(found / x).round(3))) == {0.0, 2.0}
    else:
        pairs = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
        ways = [2 * (k * x[:, :3] + m * x[:, 3:]) for k, m in pairs]
        assert (np.min([np.abs(found - way) for way in ways], 0) < 1e-5).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r is at least 1"),
        ({"r": 11}, r"MissRule at layers_0\.kernel: r=11 is above the number of input features, 10"),
        ({"r": 2, "mini_r": 4, "init_weights": "mini"}, "mini_r=4 does not divide the number of output features, 6"),
        ({"r": 4, "init_weights": "bat"}, "blocks of r=4 rows and columns, and it has 10 rows and 6 columns"),
        ({"r": 2, "init_weights": "bat", "miss_dropout": 0.1}, "without dropout"),
        ({"r": 2, "miss_dropout": 1.0}, "miss_dropout is at least 0 and below 1"),
        ({"r": 2, "mini_r": 0}, "mini_r is at least 1"),
        ({"r": 2, "init_weights": "other"}, "init_weights"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_says_why(arguments, message):
    backbone = dense()
    before = backbone.params
    with pytest.raises((TypeError, ValueError), match=message):
        jdelta.MissModel(backbone, ["layers_0"], **arguments)
    assert backbone.params is before
