"""LoRA+: `b` has another learning rate, whatever the optimizer is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from nnx_networks import X as X_NNX
from nnx_networks import attached, moved

import jdelta
from jdelta.trees import surgery

X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)


@pytest.fixture
def backbone():
    module = nn.Sequential([nn.Dense(6), jnp.tanh, nn.Dense(3)])
    return jdelta.Backbone(module, module.init(jax.random.key(0), X)["params"], dummy_inputs=(X,))


def lora(backbone):
    delta = jdelta.LoraModel(backbone, ["layers_0", "layers_2"], lora_r=2, unfrozen_modules=["layers_2.bias"])
    trains, frozen = delta.partition()
    backbone.params = delta.combine(jax.tree.map(lambda leaf: leaf + 0.1, trains), frozen)
    return delta


def trained(tx, backbone, steps=4):
    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: jnp.sum(jnp.sin(backbone(X, params=p)) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (backbone.params, tx.init(backbone.params))
    return jax.jit(lambda start: jax.lax.scan(step, start, length=steps))(start)[0][0]


def same(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), one, other)


def test_it_is_an_optimizer_with_two_learning_rates(backbone):
    delta = lora(backbone)

    def labels(params):
        names = {path: "b" if path[-1] == "b" else "other" for path in surgery.flatten(params)}
        return surgery.unflatten(names)

    by_hand = optax.multi_transform({"b": optax.adamw(0.16), "other": optax.adamw(0.01)}, labels)
    same(
        trained(delta.optimizer(optax.adamw(0.01), lora_plus_ratio=16), backbone),
        trained(delta.optimizer(by_hand), backbone),
    )


def test_micro_batches_are_summed_before(backbone):
    delta = lora(backbone)
    tx = optax.MultiSteps(optax.sgd(0.01), every_k_schedule=2)
    whole = trained(delta.optimizer(optax.sgd(0.01), lora_plus_ratio=3), backbone, steps=1)
    same(trained(delta.optimizer(tx, lora_plus_ratio=3), backbone, steps=2), whole)


def test_one_step_moves_b_by_the_ratio_and_all_else_as_before(backbone):
    delta = lora(backbone)
    one, three = (
        surgery.flatten(trained(delta.optimizer(optax.sgd(0.01), lora_plus_ratio=ratio), backbone, steps=1))
        for ratio in (1, 3)
    )
    for path, before in surgery.flatten(backbone.params).items():
        factor = 3 if path[-1] == "b" else 1
        np.testing.assert_allclose(three[path] - before, factor * (one[path] - before), rtol=1e-4, atol=1e-7)


def test_states_of_nnx_modules_too():
    model, delta = attached()
    state = moved(nnx.state(model, nnx.Param))
    grads = jax.tree.map(jnp.ones_like, state)
    tx = delta.optimizer(optax.sgd(1.0), lora_plus_ratio=5)
    updates, _ = tx.update(grads, tx.init(state), state)
    for path, update in surgery.flatten(updates).items():
        wanted = 0 if path not in delta.paths and path[0] != "heads" else -5 if path[-1] == "b" else -1
        assert (np.asarray(update) == wanted).all()
    assert model(X_NNX).shape == (4, 3)


def test_what_is_no_option_is_refused(backbone, bert):
    delta = lora(backbone)
    with pytest.raises(ValueError, match="lora_plus_ratio is above 0, got -1"):
        delta.optimizer(optax.sgd(0.1), lora_plus_ratio=-1)
    with pytest.raises(TypeError, match="lora_plus_ratio"):
        delta.optimizer(optax.sgd(0.1), lora_plus_ratio="16")
    with pytest.raises(TypeError, match=r"no option 'ratio'\. It has lora_plus_ratio\."):
        delta.optimizer(optax.sgd(0.1), ratio=16)
    with pytest.raises(TypeError, match=r"no option 'lora_plus_ratio'\. It has none\."):
        jdelta.BitFitModel(bert).optimizer(optax.sgd(0.1), lora_plus_ratio=16)
