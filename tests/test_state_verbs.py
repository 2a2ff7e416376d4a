"""The verbs of a delta take an `nnx.State` wherever they take a tree, and compute of it what they compute of a dict."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jdelta
from jdelta.trees import left_out, states, surgery
from jdelta.trees.variables import DeltaParam

STATISTICS = {
    ("norm", "mean"): nnx.BatchStat(jnp.ones(3)),
    ("rngs", "key"): nnx.RngKey(jax.random.key(0), tag="dropout"),
}


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(3, name="body")(x)))


@functools.cache
def trained():
    """A delta whose leaves have moved, and the tree that has them."""
    params = Network().init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    backbone = jdelta.Backbone(Network(), params, dummy_inputs=(jnp.ones((1, 3)),))
    delta = jdelta.LoraModel(backbone, ["body"], unfrozen_modules=["head"], lora_r=2)
    mask = delta.trainable_mask(backbone.params)
    moved = jax.tree.map(lambda leaf, trains: leaf + 0.5 if trains else leaf, backbone.params, mask)
    return delta, moved


def as_state(tree):
    """The state that a module with these leaves would have, with other variables besides."""
    kinds = {path: DeltaParam if "lora" in path else nnx.Param for path in surgery.flatten(tree)}
    leaves = {path: kinds[path](leaf) for path, leaf in surgery.flatten(tree).items()}
    return nnx.from_flat_state(leaves | STATISTICS)


def assert_is(state, expected, statistics=True):
    """A state of the same values as a dict, in variables of the right types, with the other variables as they were."""
    assert type(state) is nnx.State
    reference = as_state(expected)
    if not statistics:
        reference = nnx.filter_state(reference, nnx.Param)
    assert jax.tree.structure(state) == jax.tree.structure(reference)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(reference), strict=True):
        np.testing.assert_array_equal(
            *(jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a for a in (one, other))
        )


def test_what_trains_is_marked_and_nothing_but_parameters():
    delta, params = trained()
    mask = delta.trainable_mask(as_state(params))
    assert type(mask) is nnx.State
    assert surgery.flatten(mask) == surgery.flatten(delta.trainable_mask(params)) | dict.fromkeys(STATISTICS, False)


def test_a_partition_is_two_states_that_combine_to_the_whole():
    delta, params = trained()
    trainable, frozen = delta.partition(as_state(params))
    expected = delta.partition(params)
    assert_is(trainable, expected[0], statistics=False)
    assert_is(frozen, expected[1])
    assert_is(delta.combine(trainable, frozen), params)
    with pytest.raises(ValueError, match=r"lora"):
        delta.combine(frozen)
    with pytest.raises(ValueError, match=r"'other'"):
        delta.combine(trainable, frozen, nnx.State({"other": nnx.Param(jnp.ones(1))}))


def test_own_leaves_are_a_state():
    delta, params = trained()
    assert_is(delta.own(as_state(params)), delta.own(params), statistics=False)


def test_a_merged_state_is_that_of_the_bare_backbone():
    delta, params = trained()
    assert_is(delta.merge(as_state(params)), delta.merge(params))
    assert_is(jax.jit(delta.merge)(as_state(params)), jax.jit(delta.merge)(params))


def test_values_are_read_from_a_state():
    delta, params = trained()
    state = as_state(params)
    np.testing.assert_array_equal(delta.movement(state).values, delta.movement(params).values)
    assert delta.penalty(state) == delta.penalty(params)
    assert delta.status(state).to_dict() == delta.status(params).to_dict()
    assert delta.visualization().to_html(params=state) == delta.visualization().to_html(params=params)


def test_what_is_saved_of_a_state_is_what_is_saved_of_a_dict():
    delta, params = trained()
    one, other = delta.finetuned(as_state(params)), delta.finetuned(params)
    assert one.values.keys() == other.values.keys()
    for name in one.values:
        np.testing.assert_array_equal(one.values[name], other.values[name])
    assert one.backbone == other.backbone  # with the fingerprint of what is frozen


def test_saved_values_are_loaded_into_a_state(tmp_path):
    delta, params = trained()
    delta.save_finetuned(tmp_path, as_state(params))
    untrained = delta.backbone_model.params
    assert_is(delta.load_finetuned(tmp_path, as_state(untrained)), params)
    bare = jdelta.prune(as_state(untrained), delta)
    assert_is(delta.load_finetuned(tmp_path, bare), params)


def test_a_state_from_before_training_is_untrained():
    delta, _ = trained.__wrapped__()
    with pytest.warns(UserWarning, match="nothing of delta 'lora' has moved"):
        delta.finetuned(as_state(delta.backbone_model.params))


def test_initial_values_start_from_a_state():
    delta, params = trained()
    assert_is(delta.init(0, as_state(params)), delta.init(0, params), statistics=False)


def test_a_state_without_the_delta_keeps_its_leaves_and_marks_them():
    delta, params = trained()
    state = jdelta.without(as_state(params), delta)
    unmarked = jax.tree.map(
        lambda v: v.copy() if left_out.MARK not in v.get_metadata() else type(v)(v.get_value()),
        state,
        is_leaf=states.is_variable,
    )
    assert_is(unmarked, params)
    marked = {path for path, v in nnx.to_flat_state(state) if left_out.is_marked(v)}
    assert marked == {("body", "lora", "a"), ("body", "lora", "b")}
    with pytest.raises(ValueError, match=r"'body\.lora\.a' is in no variable"):
        jdelta.without(nnx.as_pure(as_state(params)), delta)


def test_an_optimizer_takes_states_whole_and_in_part():
    delta, params = trained()
    tx = delta.optimizer(optax.adamw(0.1, weight_decay=0.5))
    whole = nnx.filter_state(as_state(params), nnx.Param)
    part = delta.partition(whole)[0]
    for tree in (whole, part, nnx.as_pure(whole)):
        opt_state = tx.init(tree)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, tree), opt_state, tree)
        after = optax.apply_updates(tree, updates)
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), nnx.as_pure(tree), nnx.as_pure(after))
        assert surgery.flatten(moved) == surgery.flatten(delta.trainable_mask(tree))
    sizes = [sum(np.size(leaf) for leaf in jax.tree.leaves(tx.init(tree))) for tree in (whole, params)]
    assert operator.eq(*sizes)


def test_specs_of_a_state_are_in_its_variables():
    delta, params = trained()
    rules = [("body.kernel", jax.P(None, "model"))]
    specs = jdelta.match_partition_rules(rules, jdelta.prune(as_state(params), delta), default=jax.P())
    found = delta.partition_specs(specs)
    assert type(found) is nnx.State
    assert type(found["body"]["lora"]["b"]) is DeltaParam
    assert type(found["norm"]["mean"]) is nnx.BatchStat
    expected = delta.partition_specs({**surgery.unflatten(surgery.flatten(nnx.filter_state(specs, nnx.Param)))})
    assert surgery.flatten(found) == surgery.flatten(expected) | dict.fromkeys(STATISTICS, jax.P())
    assert found["body"]["lora"]["b"].get_value() == jax.P(None, "model")
    mesh = jax.make_mesh((1,), ("model",))
    shardings = delta.shardings(specs, mesh)
    placed = jax.device_put(as_state(params), shardings)
    assert_is(placed, params)
    assert surgery.flatten(delta.partition_specs(placed)) == surgery.flatten(found)
    assert delta.shardings(placed)["body"]["lora"]["b"].get_value() == jax.NamedSharding(mesh, jax.P(None, "model"))


def test_metadata_of_variables_say_how_they_are_sharded():
    delta, params = trained()
    state = as_state(params)
    state["body"]["kernel"] = nnx.Param(params["body"]["kernel"], out_sharding=("in", "out"), eager_sharding=False)
    with nnx.logical_axis_rules([("out", "model")]):
        found = delta.partition_specs(state)
        assert found["body"]["kernel"].get_value() == nnx.get_partition_spec(state)["body"]["kernel"].get_value()
    assert found["body"]["lora"]["b"].get_value() == jax.P(None, "model")


def test_arithmetic_takes_a_state_as_its_base():
    delta, params = trained()
    found, before = delta.finetuned(params), delta.backbone_model.params
    one, other = (jdelta.negate(found, base=base) for base in (as_state(before), before))
    assert one.values.keys() == other.values.keys()
    for name in one.values:
        np.testing.assert_array_equal(one.values[name], other.values[name])
