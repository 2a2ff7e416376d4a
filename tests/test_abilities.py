"""What layers, rules and methods may ask for: the context of a call, an optimizer, a penalty, a batch of data."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jdelta

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4)), jnp.float32)
MASK = jnp.array([[1, 1, 0], [1, 0, 0]])


class Inner(nn.Module):
    def setup(self):
        self.dense = nn.Dense(4)

    def __call__(self, x):
        return self.dense(x)

    def encode(self, x):
        return 2 * self.dense(x)


class Net(nn.Module):
    def setup(self):
        self.inner, self.coder = Inner(), Inner()

    def __call__(self, x, attention_mask=None, deterministic=True):
        return self.coder.encode(self.inner(x))


@pytest.fixture
def net():
    module = Net()
    return jdelta.Backbone(module, jax.jit(module.init)(jax.random.key(0), X, MASK)["params"], dummy_inputs=(X, MASK))


class ByContext(nn.Module):
    @nn.compact
    def __call__(self, y, context):
        assert context.positions is None
        step = 0 if context.step is None else context.step
        return y * context.mask[..., None] + step * (not context.deterministic)


def test_a_layer_is_told_mask_mode_and_step_of_the_nearest_call(net):
    before = net(X, MASK)
    delta = jdelta.DeltaModel(net)
    delta.insert_sequential_module("inner", ByContext())
    bias = 2 * net.params["coder"]["dense"]["bias"]
    np.testing.assert_allclose(net(X, MASK)[MASK == 1], before[MASK == 1], rtol=1e-6)
    np.testing.assert_allclose(net(X, MASK)[MASK == 0], jnp.broadcast_to(bias, (3, 4)), rtol=1e-6)

    @jax.jit
    def run(step):
        with jdelta.training_step(step):
            return net(X, MASK, deterministic=False)

    kernel = net.params["coder"]["dense"]["kernel"]
    np.testing.assert_allclose(run(5.0) - net(X, MASK), jnp.broadcast_to(10 * kernel.sum(0), X.shape), rtol=1e-4)
    assert not jnp.array_equal(run(5.0), run(6.0))


@dataclasses.dataclass(frozen=True)
class MaskedRule:
    uses_context = True

    def init(self, key, weight):
        return {"d": jnp.ones(weight.shape)}

    def update(self, weight, own):
        return own["d"]

    def product(self, x, y, own, linear, context):
        return linear.product(x, own["d"]) * context.mask[..., None]


def test_a_rule_that_uses_the_context_is_told_it(net):
    class Masked(jdelta.Method):
        def rule(self, name):
            return MaskedRule()

    before = net(X, MASK)
    jdelta.DeltaModel(net, ["inner.dense"], method=Masked())
    after = net(X, MASK)
    np.testing.assert_array_equal(after[MASK == 0], before[MASK == 0])
    assert (after[MASK == 1] != before[MASK == 1]).any()


def test_an_edit_goes_around_a_method_that_it_names(net):
    before, inner = net(X, MASK), net.params["inner"]["dense"]["kernel"]
    delta = jdelta.DeltaModel(net)
    delta.insert_sequential_module("coder", nn.Dense(4, kernel_init=nn.initializers.zeros), method="encode")
    assert delta.targets == ["coder"]
    assert delta.shapes()["coder"].keys() == {delta.name}
    np.testing.assert_array_equal(net(X, MASK), 0 * before)
    assert net.params["inner"]["dense"]["kernel"] is inner
    delta.detach()
    np.testing.assert_array_equal(net(X, MASK), before)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("coder", "decode", "no module of this model is run by a method 'decode'"),
        ("inner", "encode", "no module ends with 'inner'"),
    ],
)
def test_a_method_by_which_nothing_is_run_is_an_error(net, name, method, message):
    delta = jdelta.DeltaModel(net)
    with pytest.raises(ValueError, match=message):
        delta.insert_sequential_module(name, nn.LayerNorm(), method=method)


@dataclasses.dataclass(frozen=True)
class FromDataRule:
    axes: ClassVar = {"s": ("in",)}

    def init(self, key, weight):
        return {"s": jnp.zeros(weight.shape[0])}

    def update(self, weight, own):
        return own["s"][:, None] * weight


class Rich(jdelta.Method):
    """Asks for everything."""

    def rule(self, name):
        return FromDataRule()

    def optimizer(self, tx, leaves):
        return optax.chain(tx, optax.scale(3.0))

    def penalty(self, own):
        return sum(jnp.sum(value**2) for value in own.values())

    def data_start(self):
        return MeanStart()


@dataclasses.dataclass(frozen=True)
class MeanStart(jdelta.DataStart):
    sums = "inputs"

    def of_inputs(self, x):
        return {"total": jnp.sum(x, axis=0, keepdims=True)}

    def init(self, edit, key, weight, own, sums):
        return {"s": sums["total"][0] / sums["count"]}


def test_a_method_brings_an_optimizer_a_penalty_and_values_from_a_batch(net):
    delta = jdelta.DeltaModel(net, ["inner.dense"], method=Rich(), name="rich")
    module = net.module
    delta.init_from_data([(X, MASK)])
    assert net.module is module
    own = net.params["inner"]["dense"]["rich"]["s"]
    np.testing.assert_allclose(own, X[MASK == 1].mean(0), rtol=1e-6)
    np.testing.assert_allclose(delta.penalty(), jnp.sum(own**2), rtol=1e-6)
    tx = delta.optimizer(optax.sgd(1.0))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, net.params), tx.init(net.params), net.params)
    assert (updates["inner"]["dense"]["rich"]["s"] == -3).all()
    assert not jax.tree.leaves(jax.tree.map(lambda u: u.any(), updates["coder"]))[0]


def test_what_starts_from_no_data_and_what_has_no_penalty_says_so(net):
    delta = jdelta.LoraModel(net, ["inner.dense"], lora_r=2)
    assert delta.penalty() == 0
    with pytest.raises(ValueError, match="LoRA with init_lora_weights=True does not start from data"):
        delta.init_from_data([(X, MASK)])


class AddsStep(nn.Module):
    @nn.compact
    def __call__(self, y, context):
        return y + context.step


def test_the_step_is_not_that_of_an_earlier_trace_inside_nn_jit():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="dense")(x)

    module = nn.Sequential([nn.jit(Block)()])
    net = jdelta.Backbone(module, module.init(jax.random.key(0), X)["params"], dummy_inputs=(X,))
    before = net(X)
    delta = jdelta.DeltaModel(net)
    with jdelta.training_step(0):
        delta.insert_sequential_module("layers_0.dense", AddsStep())
    for step in (1.0, 2.0, jnp.float32(3.0)):
        with jdelta.training_step(step):
            np.testing.assert_allclose(net(X), before + step, rtol=1e-6)
    run = jax.jit(lambda step: with_step(net, step))
    np.testing.assert_allclose([run(4.0), run(5.0)], [before + 4, before + 5], rtol=1e-6)


def with_step(net, step):
    with jdelta.training_step(step):
        return net(X)
