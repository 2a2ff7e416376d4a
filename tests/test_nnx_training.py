"""Training deltas on nnx modules, with `nnx.Optimizer`, with trees, and from checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_networks import (
    X,
    assert_same,
    attached,
    bits,
    trained,
)

from jdelta.trees import surgery


def test_gradients_and_steps_of_the_trainable_state_are_those_of_nnx():
    model, delta = trained()
    graphdef, state = nnx.split(model)
    trainable, frozen = delta.partition(state)

    def loss(model):
        return jnp.sum(model(X) ** 2)

    grads = jax.grad(lambda t: loss(nnx.merge(graphdef, delta.combine(t, frozen), copy=True)))(trainable)
    assert_same(grads, nnx.grad(loss, argnums=nnx.DiffState(0, delta.filter))(model))

    tx = delta.optimizer(optax.adamw(0.1, weight_decay=0.5))
    whole = nnx.filter_state(state, nnx.Param)
    others = nnx.filter_state(state, nnx.Not(nnx.Param))
    everything = jax.grad(lambda params: loss(nnx.merge(graphdef, params, others, copy=True)))(whole)
    updates, _ = tx.update(everything, tx.init(whole), whole)
    by_tree = optax.apply_updates(whole, updates)
    for wrt in (delta.filter, nnx.Param):
        copy = nnx.clone(model)
        optimizer = nnx.Optimizer(copy, tx, wrt=wrt)
        optimizer.update(copy, nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(copy))
        after = nnx.state(copy)
        assert_same(nnx.filter_state(after, nnx.Param), by_tree)
        before = bits(state)
        assert {path for path, value in bits(after).items() if value != before[path]} == {
            path for path, trains in surgery.flatten(delta.trainable_mask(state)).items() if trains
        }
        sizes = [np.size(leaf) for leaf in jax.tree.leaves(nnx.state(optimizer)["opt_state"])]
        assert sum(sizes) == 1 + 2 * sum(np.size(leaf) for leaf in jax.tree.leaves(trainable))


OPTIMIZERS = {
    "accumulated": optax.MultiSteps(optax.adamw(0.1), every_k_schedule=2),
    "masked": optax.adamw(0.1, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
    "adafactor": optax.adafactor(0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("chosen", ["filter", "Param"])
def test_optimizers_with_states_of_other_forms_move_what_trains_in_nnx_jit(name, chosen):
    model, delta = attached()
    wrt = delta.filter if chosen == "filter" else nnx.Param
    optimizer = nnx.Optimizer(model, delta.optimizer(OPTIMIZERS[name]), wrt=wrt)
    before = bits(nnx.state(nnx.clone(model)))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.sum(model(X) ** 2), argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    after = bits(nnx.state(model))
    trains = surgery.flatten(delta.trainable_mask(nnx.state(model)))
    assert {path for path in after if after[path] != before[path]} == {path for path in trains if trains[path]}


def test_an_optimizer_of_what_trained_before_is_refused():
    model, delta = attached()
    optimizer = nnx.Optimizer(model, delta.optimizer(optax.sgd(0.1)), wrt=nnx.Param)
    delta.freeze_module(exclude=["heads"])
    with pytest.raises(RuntimeError, match="changed after this optimizer was made"):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(X)))(model))


# --- checkpoints


@pytest.mark.slow
def test_training_goes_on_from_an_orbax_checkpoint_bit_for_bit(tmp_path):
    import orbax.checkpoint as ocp

    def started():
        model, delta = attached()
        model.train()
        return model, nnx.Optimizer(model, delta.optimizer(optax.adam(0.1)), wrt=delta.filter), delta.filter

    def step(model, optimizer, trains):
        grads = nnx.grad(lambda model: jnp.sum(model(X) ** 2), argnums=nnx.DiffState(0, trains))(model)
        optimizer.update(model, grads)

    def states(model, optimizer):
        return {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}

    model, optimizer, trains = started()
    step(model, optimizer, trains)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "1", states(model, optimizer))
        checkpointer.wait_until_finished()
        step(model, optimizer, trains)
        again, its_optimizer, _ = started()
        restored = checkpointer.restore(tmp_path / "1", states(again, its_optimizer))
    nnx.update(again, restored["model"])
    nnx.update(its_optimizer, restored["optimizer"])
    step(again, its_optimizer, trains)
    assert_same(nnx.state(again), nnx.state(model))
    assert_same(nnx.state(its_optimizer), nnx.state(optimizer))
