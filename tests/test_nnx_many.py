"""Many deltas on one nnx module: each row of a batch, and each training run, computes what one alone does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_networks import (
    METHODS,
    SEQUENCES,
    X,
    assert_same,
    attached,
    attending,
    moved,
    network,
    run,
)
from tiers import breadth

import jdelta
from jdelta.trees import surgery
from jdelta.trees.variables import DeltaParam


def stacked_and_alone(method="lora", n=3):
    model, delta = attached(method)
    trainable, frozen = delta.partition(nnx.state(model))
    trees = [moved(trainable, seed) for seed in range(n)]
    alone = []
    for tree in trees:
        nnx.update(model, tree)
        alone.append(np.asarray(model(X)))
    return model, delta, trees, frozen, np.stack(alone)


@pytest.mark.parametrize("method", breadth(METHODS, "lora"))
def test_each_row_computes_what_its_delta_computes_alone(method):
    model, _, trees, frozen, alone = stacked_and_alone(method)
    stacked, indices = jdelta.stack(trees), np.array([2, 0, 2, 1])
    for one, other in zip(jdelta.unstack(stacked), trees, strict=True):
        assert_same(one, other)
    graphdef = nnx.graphdef(model)

    def of_function(x, params):
        return nnx.merge(graphdef, params, copy=True)(x)

    expected = alone[indices, np.arange(4)]
    held = surgery.unflatten(surgery.parameters_of(frozen))  # of parameters alone, as folders and trees of linen
    for call, shared in ((model, frozen), (of_function, frozen), (model, held)):
        many = jax.jit(lambda s, f, i, call=call: jdelta.rowwise(call, f)(X, params=jdelta.select(s, i)))
        np.testing.assert_allclose(many(stacked, shared, indices), expected, rtol=1e-5, atol=1e-5)
    assert np.ptp(alone, axis=0).min() > 1e-3


@pytest.mark.slow
def test_each_row_has_the_prefix_that_is_generated_for_it():
    model, delta = attending()
    trainable, frozen = delta.partition(nnx.state(model))
    trees = [moved(trainable, seed) for seed in range(2)]
    outputs = jdelta.rowwise(model, frozen)(SEQUENCES, params=jdelta.stack(trees))
    for i, tree in enumerate(trees):
        alone = run(nnx.graphdef(model), jdelta.combine(tree, frozen), SEQUENCES[i : i + 1])
        np.testing.assert_allclose(outputs[i], alone[0], rtol=1e-5, atol=1e-5)


def test_saved_deltas_of_other_ranks_and_scales_run_in_rows(tmp_path):
    arguments = [{"lora_r": 3, "lora_alpha": 6}, {"lora_r": 2, "lora_alpha": 7}]
    alone = []
    for i, own in enumerate(arguments):
        model = network()
        delta = jdelta.LoraModel(model, ["dense"], unfrozen_modules=["heads"], dummy_inputs=(X,), **own)
        trainable, _ = delta.partition(nnx.state(model))
        nnx.update(model, moved(trainable, i))
        delta.save_finetuned(tmp_path / str(i))
        alone.append(model(X))
        if not i:
            first, frozen = model, delta.partition(nnx.state(model))[1]
    stacked = jdelta.stack([tmp_path / "0", tmp_path / "1"])
    rows = jdelta.rowwise(first, frozen)(X, params=jdelta.select(stacked, [1, 0, 1, 1]))
    np.testing.assert_allclose(rows, jnp.stack(alone)[jnp.array([1, 0, 1, 1]), jnp.arange(4)], rtol=1e-5, atol=1e-5)


def test_training_many_in_one_program_equals_training_each_alone():
    model, _, trees, frozen, _ = stacked_and_alone()
    graphdef, rates = nnx.graphdef(model), jnp.array([1e-2, 3e-3, 1e-3])
    targets = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 3)), jnp.float32)

    def step(trainable, state, rate, y):
        def loss(trainable):
            return jnp.mean((run(graphdef, jdelta.combine(trainable, frozen)) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = optax.adam(rate).update(grads, state)
        return optax.apply_updates(trainable, updates), state, value

    stacked = jdelta.stack(trees)
    states = jax.vmap(optax.adam(1.0).init)(stacked)
    many, one = jax.jit(jax.vmap(step)), jax.jit(step)
    losses = []
    for _ in range(3):
        stacked, states, loss = many(stacked, states, rates, targets)
        losses.append(loss)
    for k, (tree, together) in enumerate(zip(trees, jdelta.unstack(stacked), strict=True)):
        state = optax.adam(1.0).init(tree)
        for i in range(3):
            tree, state, loss = one(tree, state, rates[k], targets[k])
            np.testing.assert_allclose(losses[i][k], loss, atol=1e-5)
        assert jax.tree.structure(tree) == jax.tree.structure(together)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), tree, together)
    nnx.update(model, together)  # each is a state of the module
    assert type(model.layers[0].dense.lora.a) is DeltaParam
