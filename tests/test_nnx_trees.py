"""Deltas on nnx modules and the states of nnx: they go into every verb, and what comes out fits the module."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_networks import (
    METHODS,
    SEQUENCES,
    Network,
    X,
    assert_same,
    attached,
    attending,
    bits,
    moved,
    network,
    run,
    split,
    trained,
)
from tiers import breadth

import jdelta
from jdelta.trees import surgery

# --- states and the module


@pytest.mark.parametrize("method", breadth(METHODS, "lora"))
def test_a_state_comes_apart_and_together_and_fits_the_module(method):
    model, delta = trained(method)
    graphdef, state = nnx.split(model)
    trainable, frozen = delta.partition(state)
    assert_same(delta.combine(trainable, frozen), state)
    assert_same(jdelta.combine(frozen, trainable), state)
    own, rest = nnx.state(model, delta.filter, ...)
    assert_same(trainable, own)
    assert_same(frozen, rest)
    assert bits(delta.own(state)).keys() == {*delta.paths}
    bare = jdelta.prune(state, delta)
    assert_same(jdelta.graft(bare, delta.own(state)), state)
    fresh = jdelta.graft(bare, delta.init(1))
    assert jax.tree.structure(fresh) == jax.tree.structure(state)
    assert_same(delta.init(1, state), delta.own(fresh))
    assert np.all(run(graphdef, fresh) != run(graphdef, state))
    delta.detach()
    assert jax.tree.structure(bare) == jax.tree.structure(nnx.state(model))


def test_without_a_tree_verbs_give_states_of_the_module():
    model, delta = trained()
    _, state = split(model)
    for mine, its in zip(delta.partition(), delta.partition(state), strict=True):
        assert_same(mine, its)
    assert surgery.flatten(delta.trainable_mask()) == surgery.flatten(delta.trainable_mask(state))
    trainable, frozen = delta.partition()
    nnx.update(model, delta.combine(jax.tree.map(jnp.zeros_like, trainable), frozen))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(delta.partition()[0]))
    assert_same(delta.load_finetuned(delta.finetuned(state)), state)
    assert_same(delta.merge(), nnx.state(model))


# --- verbs


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_merged_state_runs_on_the_bare_module(method):
    """Also where a bias is merged into a linear module that has none, or into a module that knows of none."""
    model, delta = trained(method, modules=["dense", "plain", "product"])
    before = nnx.graphdef(model)
    state, expected = split(model)[1], model(X)
    merged = jax.jit(delta.merge)(state)
    assert_same(delta.own(nnx.state(model)), delta.own(state))  # nothing else changed
    delta.merge()
    graphdef, held = nnx.split(model)
    assert bits(held).keys() == bits(merged).keys()
    for given in (merged, held):
        np.testing.assert_allclose(run(graphdef, given), expected, rtol=1e-5, atol=1e-5)
    delta.unmerge()
    assert nnx.graphdef(model) == before
    assert_same(nnx.state(model), state)


@pytest.mark.parametrize("method", breadth(METHODS, "lora"))
def test_what_is_saved_of_a_state_is_loaded_into_another(method, tmp_path):
    model, delta = trained(method)
    state = nnx.state(model)
    delta.save_finetuned(tmp_path, state)
    other, fresh = attached(method)
    loaded = fresh.load_finetuned(tmp_path, nnx.state(other))
    assert_same(loaded, state)
    assert_same(fresh.load_finetuned(tmp_path, jdelta.prune(nnx.state(other), fresh)), state)
    restored = network()
    again = jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=restored, dummy_inputs=(X,))
    assert_same(nnx.state(restored), state)
    assert again.finetuned(state).values.keys() == delta.finetuned().values.keys()


def test_values_are_read_from_a_state_as_from_the_model():
    model, delta = trained()
    state = split(model)[1]
    trainable, frozen = delta.partition(state)
    other = jdelta.combine(moved(trainable, 9), frozen)
    for tree, changed in ((state, other), (other, state)):
        nnx.update(model, tree)
        np.testing.assert_array_equal(delta.movement().values, delta.movement(tree).values)
        assert np.any(delta.movement(changed).values != delta.movement(tree).values)
        assert delta.status().to_dict() == delta.status(tree).to_dict()
        assert delta.visualization().to_html(params=tree) == delta.visualization().to_html()


@pytest.mark.parametrize("method", breadth(METHODS, "lora", "bitfit"))
def test_a_state_without_a_delta_runs_as_the_backbone_does(method):
    model, delta = trained(method)
    graphdef, state = split(model)
    with delta.disabled():
        expected = model(X)

    @jax.jit
    def both(state):
        return run(graphdef, state), run(graphdef, jdelta.without(state, delta))

    policy, reference = both(state)
    np.testing.assert_allclose(reference, expected, rtol=1e-6, atol=1e-6)
    assert np.abs(policy - expected).max() > 1e-2
    nnx.update(model, jdelta.without(state, delta))
    np.testing.assert_allclose(model(X), expected, rtol=1e-6, atol=1e-6)
    nnx.update(model, state)
    np.testing.assert_allclose(model(X), policy, rtol=1e-6, atol=1e-6)


def test_shardings_of_a_state():
    model, delta = attached()
    state = nnx.state(model)
    rules = [("dense.kernel", jax.P(None, "model"))]
    specs = jdelta.match_partition_rules(rules, state, default=jax.P())
    found = delta.partition_specs(specs)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    sharded = {path for path, spec in surgery.flatten(found).items() if spec != jax.P()}
    ends = [("dense", "kernel"), ("dense", "lora", "b")]
    assert sharded == {("layers", i, *end) for i in "01" for end in ends}
    shardings = delta.shardings(specs, jax.make_mesh((1,), ("model",)))
    placed = jax.jit(lambda state: state, out_shardings=shardings)(state)
    assert_same(placed, state)
    opt = jax.eval_shape(delta.optimizer(optax.adam(0.1)).init, nnx.filter_state(state, nnx.Param))
    of_state = jax.tree.leaves(jdelta.state_shardings(opt, shardings))
    assert sum(s.spec != jax.P() for s in of_state) == 2 * 2


def test_a_generated_prefix_is_left_out_and_materialised_in_a_state():
    model, delta = attending()
    graphdef, state = split(model)
    trainable, frozen = delta.partition(state)
    state = delta.combine(moved(trainable), frozen)
    policy = run(graphdef, state, SEQUENCES)
    with delta.disabled():
        expected = model(SEQUENCES)
    np.testing.assert_allclose(run(graphdef, jdelta.without(state, delta), SEQUENCES), expected, atol=1e-6)
    assert np.abs(policy - expected).max() > 1e-2

    before = model(SEQUENCES)
    made = delta.materialise(state)
    assert_same(delta.combine(*delta.partition(made)), made)  # with its statistics
    np.testing.assert_allclose(run(nnx.graphdef(model), made, SEQUENCES), policy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model(SEQUENCES), before, rtol=1e-5, atol=1e-5)  # of its own values


# --- shapes


def test_a_module_of_shapes_takes_a_delta_and_its_states_go_into_the_verbs():
    model = nnx.eval_shape(lambda: Network(nnx.Rngs(0, dropout=1)))  # in training, with statistics and keys
    delta = jdelta.LoraModel(model, ["dense"], lora_r=2, dummy_inputs=(X,))
    state = nnx.state(model)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
    trainable, frozen = delta.partition(state)
    assert jax.tree.structure(delta.combine(trainable, frozen)) == jax.tree.structure(state)
    assert delta.partition_specs(nnx.get_partition_spec(state))["layers"][0]["dense"]["kernel"].get_value() == jax.P()
    with pytest.raises(ValueError, match="the model holds shapes only"):
        delta.merge(state)
    values = jdelta.graft(nnx.state(network()), delta.init(0))
    assert run(nnx.graphdef(model), values).shape == (4, 3)
    assert delta.finetuned(values).values["layers.0.dense.lora.a"].shape == (6, 2)
