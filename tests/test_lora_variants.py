"""DoRA, and the ways in which LoRA starts: their formulas in float64, what they cost, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jdelta
from jdelta.core import products

X = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
KERNEL = np.random.default_rng(1).standard_normal((8, 6)).astype(np.float32)
FROM_WEIGHT = ["pissa", "pissa_niter_8", "olora"]


def attach(**arguments):
    backbone = jdelta.Backbone(nn.Sequential([nn.Dense(6)]), {"layers_0": {"kernel": KERNEL, "bias": np.ones(6)}}, (X,))
    return backbone, jdelta.LoraModel(backbone, ["layers_0"], **{"lora_r": 2, "lora_alpha": 3, **arguments})


def own_of(backbone):
    return {key: np.asarray(leaf, np.float64) for key, leaf in backbone.params["layers_0"]["lora"].items()}


def moved(backbone, delta, seed=2):
    rng = np.random.default_rng(seed)
    trains, frozen = delta.partition()
    backbone.params = delta.combine(jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape), trains), frozen)


def test_dora_is_its_formula_in_float64():
    backbone, delta = attach(use_dora=True)
    own = own_of(backbone)
    np.testing.assert_allclose(own["m"], np.linalg.norm(KERNEL.astype(np.float64), axis=0), rtol=1e-6)
    moved(backbone, delta)
    own = own_of(backbone)
    direction = KERNEL + 1.5 * own["a"] @ own["b"]
    want = X @ (own["m"] * direction / np.sqrt((direction**2).sum(0))) + 1
    np.testing.assert_allclose(backbone(X), want, rtol=1e-5, atol=1e-5)


def test_the_norm_of_dora_has_no_gradient():
    backbone, delta = attach(use_dora=True)
    moved(backbone, delta)
    own = backbone.params["layers_0"]["lora"]
    gradient = jax.grad(lambda params: backbone(X, params=params).sum())(backbone.params)["layers_0"]["lora"]
    norm = np.linalg.norm(KERNEL + 1.5 * own["a"] @ own["b"], axis=0)
    by_hand = jax.grad(lambda a: (X @ (own["m"] / norm * (KERNEL + 1.5 * a @ own["b"]))).sum())(own["a"])
    np.testing.assert_allclose(gradient["a"], by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_dora_in_one_product_is_the_sum_forward_and_backward(bias, monkeypatch):
    x = jax.random.normal(jax.random.key(0), (64, 8))  # many rows: the weight is changed in the call
    module = nn.Sequential([nn.DenseGeneral((2, 3), use_bias=bias)])
    backbone = jdelta.Backbone(module, module.init(jax.random.key(1), x)["params"], (x,))
    delta = jdelta.LoraModel(backbone, ["layers_0"], lora_r=2, use_dora=True)
    moved(backbone, delta)

    def run(params, x):
        return jnp.sum(jnp.sin(backbone(x, params=params)))

    calls, fused = [], products.fused
    monkeypatch.setattr("jdelta.core.products.fused", lambda *a: calls.append(1) or fused(*a))
    found = jax.value_and_grad(run, argnums=(0, 1))(backbone.params, x)
    monkeypatch.setattr("jdelta.core.products.fusing_is_cheaper", lambda *_: False)
    want = jax.value_and_grad(run, argnums=(0, 1))(backbone.params, x)
    assert calls == [1]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("rows", [5, 64])
def test_a_column_of_zeros_has_no_direction_and_starts_unchanged(rows):
    x = jax.random.normal(jax.random.key(0), (rows, 8))
    backbone = jdelta.Backbone(nn.Sequential([nn.Dense(6)]), {"layers_0": {"kernel": KERNEL, "bias": np.ones(6)}}, (x,))
    backbone.params["layers_0"]["kernel"] = KERNEL * (np.arange(6) > 0)
    delta = jdelta.LoraModel(backbone, ["layers_0"], lora_r=2, use_dora=True)
    np.testing.assert_allclose(backbone(x)[:, 0], 1)
    grads = jax.grad(lambda params: jnp.sum(backbone(x, params=params) ** 2))(backbone.params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    delta.merge()
    np.testing.assert_allclose(backbone(x)[:, 0], 1)


@pytest.mark.parametrize("start", FROM_WEIGHT)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_start_with_a_part_of_the_weight_changes_nothing_and_comes_off_bit_for_bit(start, use_dora):
    backbone, delta = attach(init_lora_weights=start, use_dora=use_dora)
    bare = nn.Sequential([nn.Dense(6)]).apply({"params": {"layers_0": {"kernel": KERNEL, "bias": np.ones(6)}}}, X)
    np.testing.assert_allclose(backbone(X), bare, rtol=0, atol=1e-6 if use_dora else 0)
    moved(backbone, delta)
    own = own_of(backbone)
    changed = KERNEL + 1.5 * (own["a"] @ own["b"] - own["a0"] @ own["b0"])
    if use_dora:
        changed = own["m"] * changed / np.linalg.norm(changed, axis=0)
    np.testing.assert_allclose(backbone(X), X @ changed + 1, rtol=1e-5, atol=1e-5)
    delta.detach()
    np.testing.assert_array_equal(backbone(X), bare)


def test_what_trains_is_not_the_start():
    backbone, delta = attach(init_lora_weights="pissa")
    assert {*delta.partition()[0]["layers_0"]["lora"]} == {"a", "b"}
    before = own_of(backbone)
    np.testing.assert_array_equal(before["a"], before["a0"])


def test_pissa_starts_with_the_best_approximation_of_its_rank():
    u, s, v = np.linalg.svd(KERNEL.astype(np.float64))
    best = (u[:, :2] * s[:2]) @ v[:2]
    for start in ("pissa", "pissa_niter_20"):
        own = own_of(attach(init_lora_weights=start)[0])
        np.testing.assert_allclose(1.5 * own["a"] @ own["b"], best, atol=1e-4)
        np.testing.assert_allclose((own["a"] ** 2).sum(0), (own["b"] ** 2).sum(1), rtol=1e-4)


def test_olora_starts_with_rows_of_r_and_columns_of_q():
    q, r = np.linalg.qr(KERNEL.T.astype(np.float64))
    own = own_of(attach(init_lora_weights="olora")[0])
    np.testing.assert_allclose(own["a"] @ own["b"], (q[:, :2] @ r[:2]).T, atol=1e-5)
    np.testing.assert_allclose(own["b"] @ own["b"].T, np.eye(2), atol=1e-6)


def test_random_starts():
    wide = nn.Sequential([nn.Dense(500)])
    x = np.ones((1, 400), np.float32)
    backbone = jdelta.Backbone(wide, wide.init(jax.random.key(0), x)["params"], (x,))

    def start(value, rank=8):
        delta = jdelta.LoraModel(backbone, ["layers_0"], lora_r=rank, init_lora_weights=value)
        own = own_of(backbone)
        delta.remove()
        return own["a"], own["b"]

    a, b = start("gaussian")
    assert abs(a.std() - 1 / 8) < 0.01
    assert not b.any()
    a, b = start("orthogonal")
    np.testing.assert_allclose(a @ b, 0, atol=1e-6)
    assert abs(a.std() - 0.1 / np.sqrt(2)) < 0.01
    a, b = start(False)
    assert abs(b).max() <= 8**-0.5
    assert b.std() > 0.15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_lora_weights": "best"}, r"init_lora_weights is one of True, False, 'gaussian'.*got 'best'"),
        ({"init_lora_weights": "orthogonal", "lora_r": 3}, "needs even ranks, got 3"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q": 5}}, "needs even ranks, got 5"),
    ],
)
def test_what_is_no_start(arguments, message):
    with pytest.raises(ValueError, match=message):
        jdelta.LoraConfig(**arguments)


def test_shapes_alone_have_no_start_in_the_weight():
    module = nn.Sequential([nn.Dense(6)])
    backbone = jdelta.Backbone(module, jax.eval_shape(module.init, jax.random.key(0), X)["params"], (X,))
    delta = jdelta.LoraModel(backbone, ["layers_0"], lora_r=2, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="starts from the backbone's values"):
        delta.init(jax.random.key(0))


def test_dora_costs_at_most_a_twentieth_more_than_lora():
    """FLOPs of a compiled step, in a network whose gradient goes through all layers."""
    x = jax.ShapeDtypeStruct((2048, 384), jnp.float32)  # 32 sentences of 64 tokens, as wide as MiniLM
    module = nn.Sequential([nn.Dense(384), nn.tanh, nn.Dense(384), nn.tanh, nn.Dense(384), nn.tanh])
    flops = []
    for use_dora in (False, True):
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
        backbone = jdelta.Backbone(module, shapes, (x,))
        delta = jdelta.LoraModel(backbone, ["[r]layers_\\d"], lora_r=8, use_dora=use_dora)
        trains, frozen = delta.partition()

        def loss(own, frozen, x, run=backbone):
            return jnp.sum(run(x, params=jdelta.combine(own, frozen)) ** 2)

        flops.append(jax.jit(jax.value_and_grad(loss)).lower(trains, frozen, x).compile().cost_analysis()["flops"])
    print("DoRA / LoRA:", flops[1] / flops[0])
    assert flops[1] <= 1.05 * flops[0]
