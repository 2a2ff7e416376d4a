"""OFT against its formula in float64, its blocks and limits, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import noisy
from flax import linen as nn

import jdelta

D_IN, D_OUT = 12, 6
X = jax.random.normal(jax.random.key(5), (3, 4, D_IN))


def dense(x=X):
    module = nn.Sequential([nn.Dense(D_OUT)])
    params = module.init(jax.random.key(0), x)["params"]
    params["layers_0"]["bias"] += 0.5
    return jdelta.Backbone(module, params, dummy_inputs=(x,))


def moved(backbone, delta):
    trains, frozen = delta.partition()
    backbone.params = jdelta.combine(noisy(trains), frozen)
    return np.asarray(backbone.params["layers_0"]["oft"]["oft_R"], np.float64)


def skew(entries, size):
    """Row by row above the diagonal."""
    q, at = np.zeros((size, size)), iter(entries)
    for i in range(size):
        for j in range(i + 1, size):
            q[i, j] = next(at)
            q[j, i] = -q[i, j]
    return q


def series(*factors):
    return lambda q: sum(factor * np.linalg.matrix_power(q, i) for i, factor in enumerate(factors))


def cayley(q):
    one = np.eye(len(q))
    return (one - q) @ np.linalg.inv(one + q)


@pytest.mark.parametrize(
    ("arguments", "size", "blocks", "rotation"),
    [
        ({"oft_block_size": 4}, 4, 3, series(1, 2, 2, 2, 1)),
        ({"oft_block_size": 0, "r": 6}, 2, 6, series(1, 2, 2, 2, 1)),
        ({"oft_block_size": 12, "num_cayley_neumann_terms": 2}, 12, 1, series(1, 2)),
        ({"oft_block_size": 3, "num_cayley_neumann_terms": 3}, 3, 4, series(1, 2, 2, 1)),
        ({"oft_block_size": 3, "num_cayley_neumann_terms": 4}, 3, 4, series(1, 2, 2, 1)),
        ({"oft_block_size": 3, "num_cayley_neumann_terms": 7}, 3, 4, series(1, 2, 2, 2, 2, 2, 1)),
        ({"oft_block_size": 6, "use_cayley_neumann": False}, 6, 2, cayley),
        ({"oft_block_size": 4, "block_share": True}, 4, 1, series(1, 2, 2, 2, 1)),
        ({"oft_block_size": 6, "coft": True, "eps": 0.3, "use_cayley_neumann": False}, 6, 2, cayley),
    ],
)
def test_it_is_its_formula_in_float64(arguments, size, blocks, rotation):
    backbone = dense()
    bare = backbone(X)
    delta = jdelta.OFTModel(backbone, ["layers_0"], **arguments)
    np.testing.assert_array_equal(backbone(X), bare)
    own = moved(backbone, delta)
    assert own.shape == (blocks, size * (size - 1) // 2)
    matrix = np.zeros((D_IN, D_IN))
    for i in range(D_IN // size):
        q = skew(own[i % blocks], size)
        if arguments.get("coft"):
            assert np.linalg.norm(q) > 0.3 / np.sqrt(blocks)
            q *= 0.3 / np.sqrt(blocks) / np.linalg.norm(q)
        matrix[i * size : (i + 1) * size, i * size : (i + 1) * size] = rotation(q)
    kernel, bias = (np.asarray(backbone.params["layers_0"][key], np.float64) for key in ("kernel", "bias"))
    want = np.asarray(X, np.float64) @ matrix @ kernel + bias
    assert np.abs(want - bare).max() > 0.05
    np.testing.assert_allclose(backbone(X), want, rtol=1e-5, atol=1e-5)
    delta.merge()
    np.testing.assert_allclose(backbone.params["layers_0"]["kernel"], matrix @ kernel, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "blocks", "size"),
    [
        ({"oft_block_size": 5}, 3, 4),  # 4 is nearer than 6 and as near
        ({"oft_block_size": 11}, 1, 12),
        ({"oft_block_size": 32}, 1, 12),
        ({"oft_block_size": 0, "r": 5}, 4, 3),
    ],
)
def test_blocks_that_do_not_fit_are_the_nearest_that_do(arguments, blocks, size):
    backbone = dense()
    jdelta.OFTModel(backbone, ["layers_0"], **arguments)
    assert backbone.params["layers_0"]["oft"]["oft_R"].shape == (blocks, size * (size - 1) // 2)


def test_its_optimizer_keeps_the_matrices_of_coft_as_short_as_they_are_computed_with():
    backbone = dense()
    delta = jdelta.OFTModel(backbone, ["layers_0"], oft_block_size=4, coft=True, eps=0.1, unfrozen_modules=["layers_0"])
    tx = delta.optimizer(optax.sgd(1.0))
    state = tx.init(backbone.params)
    grads = jax.tree.map(jnp.ones_like, backbone.params)
    updates, _ = jax.jit(tx.update)(grads, state, backbone.params)
    new = optax.apply_updates(backbone.params, updates)["layers_0"]
    for entries in np.asarray(new["oft"]["oft_R"]):
        np.testing.assert_allclose(np.linalg.norm(skew(entries, 4)), 0.1 / np.sqrt(3), rtol=1e-5)
    np.testing.assert_allclose(new["bias"], backbone.params["layers_0"]["bias"] - 1)
    backbone.params = {"layers_0": new}
    out = backbone(X)
    far = {"oft_R": 7 * new["oft"]["oft_R"]}
    np.testing.assert_allclose(backbone(X, params={"layers_0": {**new, "oft": far}}), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "x", "arguments", "message"),
    [
        (nn.Dense(3), X, {"r": 4}, "got r=4 and oft_block_size=32"),
        (nn.Dense(3), X, {"oft_block_size": 0}, "got r=0 and oft_block_size=0"),
        (nn.Dense(3), X, {"eps": 0.0}, "eps is above 0"),
        (nn.Dense(3), X, {"num_cayley_neumann_terms": 1}, "it is at least 2"),
        (nn.Dense(3), X, {"module_dropout": 0.1}, "OFTModel has no argument 'module_dropout'"),
        (nn.Dense(3), X, {"r": 12, "oft_block_size": 0}, r"OFTRule at layers_0\.kernel: blocks of one .* r=12 makes"),
        (nn.Conv(3, (3,)), X, {}, r"OFTModel at layers_0 \(Conv\): OFTRule changes features that go in, .* last axes"),
        (nn.Embed(9, 3), jnp.array([[1, 2]]), {}, r"OFTModel at layers_0 \(Embed\): .* features that go in"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_says_why(layer, x, arguments, message):
    backbone = jdelta.Backbone(nn.Sequential([layer]), dummy_inputs=(x,))
    before = backbone.params
    with pytest.raises((TypeError, ValueError), match=message):
        jdelta.OFTModel(backbone, ["layers_0"], **arguments)
    assert backbone.params is before


def test_files_of_peft_that_mean_something_else_are_refused_by_the_field(bert, tmp_path):
    delta = jdelta.OFTModel(bert, ["query"], oft_block_size=4)
    trains, frozen = delta.partition()
    bert.params = jdelta.combine(noisy(trains), frozen)
    delta.to_peft(tmp_path)
    delta.remove()
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    assert jdelta.from_peft(tmp_path, bert).config.oft_block_size == 4
    for change, message in (
        ({"module_dropout": 0.1}, "module_dropout=0.1 is an unsupported option of OFT"),
        ({"peft_version": "0.17.1"}, "peft_version='0.17.1'"),
        ({"peft_version": None}, "PEFT before 0.18"),
    ):
        file.write_text(json.dumps(fields | change))
        with pytest.raises(ValueError, match=message):
            jdelta.from_peft(tmp_path, bert, name="again")
