"""`delta.optimizer` is bound to what trains when it is made; a later change is an error that says so."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import jdelta


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="two")(jnp.tanh(nn.Dense(6, name="one")(x)))


X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)


@pytest.fixture
def backbone():
    return jdelta.Backbone(MLP(), MLP().init(jax.random.key(0), X)["params"], dummy_inputs=(X,))


def lora(backbone, **arguments):
    return jdelta.LoraModel(backbone, modified_modules=["two"], lora_r=2, **arguments)


def freeze_other(delta):
    delta.freeze_module(exclude=["one"])


def insert(delta):
    delta.insert_sequential_module("one", nn.Dense(6))


def detach(delta):
    delta.detach()


def merge(delta):
    delta.merge()


CHANGES = {
    "freeze_module": (freeze_other, r"'one\.bias' and 1 more trains now; 'two\.lora\.a' and 1 more trains no more"),
    "insert_sequential_module": (insert, r"'one\.lora\.bias' and 1 more trains now"),
    "detach": (detach, r"'two\.lora\.a' and 1 more trains no more"),
    "merge": (merge, r"'two\.lora\.a' and 1 more trains no more"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_named_in_init_and_update_and_when_a_step_is_traced(backbone, change):
    delta = lora(backbone)
    tx = delta.optimizer(optax.adam(1e-2))
    params, state = backbone.params, tx.init(backbone.params)
    do, message = CHANGES[change]
    do(delta)
    for use in (
        lambda: tx.init(params),
        lambda: tx.update(params, state, params),
        lambda: jax.jit(tx.update)(params, state, params),
    ):
        with pytest.raises(RuntimeError, match=rf"{message}\. Make it and its state anew"):
            use()


def test_another_delta_changes_what_trains_if_deltas_means_it_too(backbone):
    delta = lora(backbone)
    delta.freeze_module(exclude=["deltas"])
    tx = delta.optimizer(optax.sgd(1e-2))
    other = jdelta.AdapterModel(backbone, modified_modules=["one"], bottleneck_dim=2)
    with pytest.raises(RuntimeError, match=r"'one\.adapter\.down\.bias' and 3 more trains now"):
        tx.init(backbone.params)
    other.detach()
    tx.init(backbone.params)


def test_a_train_state_notices_in_its_next_step(backbone):
    delta = lora(backbone)
    state = TrainState.create(apply_fn=backbone, params=backbone.params, tx=delta.optimizer(optax.adam(1e-2)))
    state = state.apply_gradients(grads=state.params)
    delta.freeze_module(exclude=["deltas", "one.bias"])
    with pytest.raises(RuntimeError, match=r"'one\.bias' trains now"):
        state.apply_gradients(grads=state.params)


def test_what_is_as_it_was_when_it_is_used_is_no_error(backbone):
    delta = lora(backbone)
    tx = delta.optimizer(optax.adam(1e-2))
    params, state = backbone.params, tx.init(backbone.params)
    delta.freeze_module(exclude=["one"])
    delta.freeze_module()
    delta.detach()
    delta.attach()
    delta.merge(params)
    backbone.params = jax.tree.map(lambda leaf: leaf + 1, params)
    tx.update(params, state, params)


def test_a_state_for_other_leaves_says_so(backbone):
    delta = lora(backbone)
    state = delta.optimizer(optax.adam(1e-2)).init(backbone.params)
    delta.freeze_module(exclude=["one"])
    tx = delta.optimizer(optax.adam(1e-2))
    with pytest.raises(RuntimeError, match=r"state was made for other leaves.*tx\.init\(params\)"):
        tx.update(backbone.params, state, backbone.params)


def test_a_detached_delta_trains_nothing_of_the_backbone(backbone):
    delta = jdelta.BitFitModel(backbone, modified_modules=["one", "two"])
    delta.detach()
    assert not any(jax.tree.leaves(delta.trainable_mask()))


@pytest.mark.parametrize("tx", ["adam", None, optax.adam])
def test_something_else_than_an_optimizer(backbone, tx):
    with pytest.raises(TypeError, match=r"takes one of optax's, such as optax\.adamw"):
        lora(backbone).optimizer(tx)
