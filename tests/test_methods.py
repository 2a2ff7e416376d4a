"""The methods' formulas in float64 numpy, on every kind of host."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from conftest import noisy
from flax import linen as nn
from flax.errors import ScopeParamShapeError

import jdelta

X = jax.random.normal(jax.random.key(5), (2, 6, 4))
IDS = jnp.array([[1, 2, 3], [4, 4, 0]])


class Host(nn.Module):
    """One host, alone in a model."""

    host: nn.Module

    def __call__(self, x):
        return self.host(x)


def attach(layer, x, method, **arguments):
    module = Host(layer)
    backbone = jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    before = backbone(x)
    delta = method(backbone, modified_modules=arguments.pop("modified_modules", ["host"]), **arguments)
    return backbone, delta, before


def f64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def lora_change(backbone, x, name="lora"):
    """Output with noise on the delta's leaves, less the output without; the leaves; all in float64."""
    leaves = noisy(backbone.params["host"][name])
    params = {"host": {**backbone.params["host"], name: leaves}}
    zero = {"host": {**backbone.params["host"], name: jax.tree.map(jnp.zeros_like, leaves)}}
    return np.asarray(backbone(x, params=params), np.float64) - backbone(x, params=zero), f64(leaves)


HOSTS = {
    "Dense": (nn.Dense(5), (4, 2), (2, 5), "bsi,ir,ro->bso"),
    "DenseGeneral to heads": (nn.DenseGeneral((3, 2)), (4, 2), (2, 3, 2), "bsi,ir,rho->bsho"),
    "DenseGeneral from two axes": (nn.DenseGeneral(5, axis=(-2, -1)), (6, 4, 2), (2, 5), "bsi,sir,ro->bo"),
    "DenseGeneral of an inner axis": (nn.DenseGeneral(5, axis=1), (6, 2), (2, 5), "bsi,sr,ro->bio"),
}


@pytest.mark.parametrize("kind", HOSTS)
def test_lora_on_linear_hosts_is_its_formula(kind):
    layer, shape_a, shape_b, formula = HOSTS[kind]
    backbone, _, before = attach(layer, X, jdelta.LoraModel, lora_r=2, lora_alpha=6)
    assert (backbone(X) == before).all()  # b is zero
    leaves = backbone.params["host"]["lora"]
    assert (leaves["a"].shape, leaves["b"].shape) == (shape_a, shape_b)
    bound = 1 / np.sqrt(np.prod(shape_a[:-1]))
    assert bound * 0.5 < np.abs(leaves["a"]).max() <= bound
    change, p = lora_change(backbone, X)
    expected = (6 / 2) * np.einsum(formula, np.asarray(X, np.float64), p["a"], p["b"])
    # float32 rounding of sums of up to 24 products of size 1
    np.testing.assert_allclose(change, expected, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (3,)},
        {"kernel_size": (3,), "strides": 2, "padding": "VALID"},
        {"kernel_size": (3,), "kernel_dilation": 2, "padding": "CAUSAL"},
        {"kernel_size": (3,), "padding": "CIRCULAR"},
        {"kernel_size": (2,), "padding": 1, "use_bias": False},
        {"kernel_size": (3,), "feature_group_count": 2, "features": 6},
        {"kernel_size": (3,), "feature_group_count": 4, "features": 8, "strides": 2},
    ],
)
def test_lora_on_a_convolution_is_the_convolution_with_the_product_kernel(options):
    layer = nn.Conv(**{"features": 5, **options})
    backbone, _, before = attach(layer, X, jdelta.LoraModel, lora_r=2)
    assert (backbone(X) == before).all()
    change, p = lora_change(backbone, X)
    kernel = (16 / 2) * np.einsum("wir,ro->wio", p["a"], p["b"])
    expected = layer.clone(use_bias=False).apply({"params": {"kernel": jnp.asarray(kernel, jnp.float32)}}, X)
    np.testing.assert_allclose(change, expected, atol=2e-6)


def test_lora_on_a_valid_convolution_is_that_of_scipy():
    backbone, _, _ = attach(nn.Conv(1, (3,), padding="VALID"), X[:, :, :1], jdelta.LoraModel, lora_r=1, lora_alpha=1)
    change, p = lora_change(backbone, X[:, :, :1])
    kernel = p["a"][:, 0, 0] * p["b"][0, 0]
    expected = [scipy.signal.correlate(row, kernel, mode="valid") for row in np.asarray(X[:, :, 0], np.float64)]
    np.testing.assert_allclose(change[:, :, 0], expected, atol=2e-6)


def test_lora_on_an_embedding_is_rows_of_the_product():
    backbone, _, before = attach(nn.Embed(7, 5), IDS, jdelta.LoraModel, lora_r=2)
    assert (backbone(IDS) == before).all()  # here a is zero
    change, p = lora_change(backbone, IDS)
    assert (p["a"].shape, p["b"].shape) == ((7, 2), (2, 5))
    np.testing.assert_allclose(change, (16 / 2) * (p["a"] @ p["b"])[np.asarray(IDS)], atol=2e-6)


def test_lora_on_the_attention_of_flax():
    module = nn.MultiHeadDotProductAttention(num_heads=2)
    params = module.init(jax.random.key(0), X, X)["params"]
    backbone = jdelta.Backbone(module, params, dummy_inputs=(X, X))
    before = backbone(X, X)
    delta = jdelta.LoraModel(backbone, modified_modules=["query", "out"], lora_r=2)
    assert delta.targets == ["query", "out"]
    assert backbone.params["out"]["lora"]["a"].shape == (2, 2, 2)
    assert (backbone(X, X) == before).all()


def test_lora_dropout_acts_on_the_input_and_only_in_training():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(4, name="host")(x)

    params = Model().init(jax.random.key(0), X)["params"]
    backbone = jdelta.Backbone(Model(), params, dummy_inputs=(X,))
    jdelta.LoraModel(backbone, modified_modules=["host"], lora_r=4, lora_dropout=0.5, lora_alpha=4)
    host = backbone.params["host"]
    tree = {"host": {**host, "lora": {"a": jnp.eye(4), "b": jnp.eye(4)}}}
    base = X @ host["kernel"] + host["bias"]
    chex.assert_trees_all_close(backbone(X, params=tree), base + X, atol=1e-6)
    noisy_x = backbone(X, params=tree, train=True, rngs={"dropout": jax.random.key(1)}) - base
    ratio = np.asarray(noisy_x / X).round(4)
    assert set(np.unique(ratio)) == {0.0, 2.0}


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def bottleneck(x, p, act=gelu_new):
    return act(x @ p["down"]["kernel"] + p["down"]["bias"]) @ p["up"]["kernel"] + p["up"]["bias"]


@pytest.mark.parametrize(
    ("name", "act"), [("gelu_new", gelu_new), ("relu", lambda x: np.maximum(x, 0)), ("tanh", np.tanh)]
)
def test_adapter_is_its_formula(name, act):
    backbone, _, before = attach(nn.Dense(4), X, jdelta.AdapterModel, bottleneck_dim=3, non_linearity=name)
    leaves = backbone.params["host"]["adapter"]
    assert 0.005 < np.std(leaves["down"]["kernel"]) < 0.02
    assert not leaves["up"]["bias"].any()
    chex.assert_trees_all_close(backbone(X), before, atol=1e-3)  # near the identity at first
    p = jax.tree.map(lambda a: 10 * a, noisy(leaves))
    y = backbone(X, params={"host": {**backbone.params["host"], "adapter": p}})
    before = np.asarray(before, np.float64)
    np.testing.assert_allclose(y, before + bottleneck(before, f64(p), act), atol=5e-6)


def test_adapter_with_zero_up_leaves_the_output():
    backbone, _, before = attach(nn.Dense(4), X, jdelta.AdapterModel, bottleneck_dim=3, zero_up=True)
    assert (backbone(X) == before).all()


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="w2")(jnp.tanh(nn.Dense(8, name="w1")(x)))


@pytest.mark.parametrize("scaled", [1.0, 4.0])
def test_parallel_adapter_is_its_formula_over_a_span(scaled):
    backbone = jdelta.Backbone(Pair(), Pair().init(jax.random.key(0), X)["params"], dummy_inputs=(X,))
    before = backbone(X)
    delta = jdelta.ParallelAdapterModel(backbone, modified_modules=["w1", "w2"], bottleneck_dim=3, scaled=scaled)
    assert delta.targets == ["w2"]
    p = jax.tree.map(lambda a: 10 * a, noisy(backbone.params["w2"]["parallel_adapter"]))
    assert p["up"]["kernel"].shape == (3, 5)
    y = backbone(X, params={**backbone.params, "w2": {**backbone.params["w2"], "parallel_adapter": p}})
    expected = np.asarray(before, np.float64) + scaled * bottleneck(np.asarray(X, np.float64), f64(p))
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_parallel_adapter_on_single_modules_takes_each_pattern_twice():
    backbone = jdelta.Backbone(Pair(), Pair().init(jax.random.key(0), X)["params"], dummy_inputs=(X,))
    delta = jdelta.ParallelAdapterModel(backbone, modified_modules=["w1", "w1", "w2", "w2"], bottleneck_dim=3)
    assert delta.targets == ["w1", "w2"]
    assert backbone.params["w2"]["parallel_adapter"]["down"]["kernel"].shape == (8, 3)


def test_bitfit_trains_a_bias_or_adds_one():
    backbone, delta, _ = attach(nn.Dense(4), X, jdelta.BitFitModel)
    assert set(backbone.params["host"]) == {"kernel", "bias"}
    assert set(delta.partition()[0]["host"]) == {"bias"}
    for layer in (nn.Dense(4, use_bias=False), nn.LayerNorm(use_bias=False), nn.Conv(4, (2,), use_bias=False)):
        backbone, delta, before = attach(layer, X, jdelta.BitFitModel)
        assert (backbone(X) == before).all()
        params = {"host": {**backbone.params["host"], "bitfit": {"bias": jnp.arange(4.0)}}}
        chex.assert_trees_all_close(backbone(X, params=params), before + jnp.arange(4.0), atol=1e-6)


def test_bitfit_comes_off_with_the_pretrained_bias_and_back_with_the_trained_one():
    backbone, delta, before = attach(nn.Dense(4), X, jdelta.BitFitModel)
    backbone.params = {"host": {**backbone.params["host"], "bias": jnp.ones(4)}}
    delta.detach()
    assert (backbone(X) == before).all()
    delta.attach()
    assert (backbone.params["host"]["bias"] == 1).all()


def test_bitfit_comes_off_after_its_tree_was_donated():
    backbone, delta, _ = attach(nn.Dense(4), X, jdelta.BitFitModel)
    step = jax.jit(lambda p: jax.tree.map(lambda a: a + 1, p), donate_argnums=0)
    original = jax.tree.map(jnp.copy, backbone.params)
    backbone.params = step(backbone.params)
    delta.detach()
    assert (backbone.params["host"]["bias"] == original["host"]["bias"]).all()


def test_a_delta_method_of_the_users_own_is_a_short_class():
    class Scale(nn.Module):
        @nn.compact
        def __call__(self, y):
            return y * self.param("scale", nn.initializers.ones, (y.shape[-1],))

    class ScaleConfig(jdelta.Method):
        delta_type = "scale"

        def edits(self, host, structure):
            yield jdelta.CallEdit(host.path, "after", Scale())

    class ScaleModel(jdelta.DeltaModel):
        method_class = ScaleConfig

    backbone, delta, before = attach(nn.Dense(4), X, ScaleModel)
    assert (backbone(X) == before).all()
    assert delta.shapes()["host"][delta.name]["scale"].shape == (4,)


def test_the_initial_values_depend_on_the_seed_and_not_on_other_deltas():
    one, *_ = attach(nn.Dense(4), X, jdelta.LoraModel, lora_r=2, rng=1)
    same, *_ = attach(nn.Dense(4), X, jdelta.AdapterModel, bottleneck_dim=2)
    jdelta.LoraModel(same, modified_modules=["host"], lora_r=2, rng=jax.random.key(1))
    other, *_ = attach(nn.Dense(4), X, jdelta.LoraModel, lora_r=2, rng=2)
    assert (one.params["host"]["lora"]["a"] == same.params["host"]["lora"]["a"]).all()
    assert (one.params["host"]["lora"]["a"] != other.params["host"]["lora"]["a"]).any()


def test_a_later_insertion_does_not_forget_the_pretrained_bias():
    backbone, delta, before = attach(nn.Dense(4), X, jdelta.BitFitModel)
    backbone.params = {"host": {**backbone.params["host"], "bias": jnp.ones(4)}}
    delta.insert_sequential_module("host", nn.LayerNorm())
    delta.detach()
    assert (backbone(X) == before).all()


def test_leaves_of_a_wrong_shape_are_an_error_that_names_them():
    backbone, *_ = attach(nn.Dense(4), X, jdelta.LoraModel, lora_r=2)
    other, *_ = attach(nn.Dense(4), X, jdelta.LoraModel, lora_r=3)
    with pytest.raises(ScopeParamShapeError, match=r'"a" in "/host/lora".*\(4, 2\).*\(4, 3\)'):
        backbone(X, params=other.params)
