import chex
import jax
import jax.numpy as jnp
import pytest
from conftest import fresh
from flax.core import FrozenDict, freeze

import jdelta

BASE = {"a": {"kernel": jnp.arange(4.0), "bias": jnp.array([-0.0])}, "b": {"c": {"kernel": jnp.ones(2, jnp.bfloat16)}}}
DELTA = {
    "a": {"lora": {"a": jnp.ones(3)}},
    "b": {"c": {"lora": {"a": jnp.zeros(1)}}},
    "free": {"lora": {"a": jnp.ones(1)}},
}
MASK = {"a": {"kernel": True, "bias": False}, "b": {"c": {"kernel": True}}}


@pytest.mark.parametrize("kind", [dict, freeze])
def test_graft_then_prune_is_the_identity_bit_for_bit(kind):
    base = kind(BASE)
    grafted = jdelta.graft(base, DELTA)
    assert len(jax.tree.leaves(grafted)) == 6
    back = jdelta.prune(grafted, "lora")
    assert type(back) is type(base)
    chex.assert_trees_all_equal_structs(back, base)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(base), strict=True):
        assert one is other


@pytest.mark.parametrize("kind", [dict, freeze])
def test_partition_then_combine_is_the_identity_and_leaves_no_holes(kind):
    base = kind(BASE)
    chosen, rest = jdelta.partition(base, MASK)
    assert isinstance(chosen, FrozenDict) == (kind is freeze)
    assert set(chosen) == {"a", "b"}
    assert set(rest) == {"a"}
    chex.assert_trees_all_equal_structs(jdelta.combine(chosen, rest), base)
    chex.assert_trees_all_equal(jdelta.combine(rest, chosen), base)


def test_empty_nodes_survive_partition_and_combine():
    base = {"a": {}, "b": {"x": jnp.ones(1)}}
    chosen, rest = jdelta.partition(base, {"a": {}, "b": {"x": True}})
    assert jax.tree.structure(jdelta.combine(chosen, rest)) == jax.tree.structure(base)


def test_nothing_chosen_and_everything_chosen():
    none, everything = jdelta.partition(BASE, jax.tree.map(lambda _: False, BASE))
    assert none == {}
    chex.assert_trees_all_equal(jdelta.combine(none, everything), BASE)


def test_the_four_run_under_jit():
    def there_and_back(base, delta):
        grafted = jdelta.graft(base, delta)
        chosen, rest = jdelta.partition(jdelta.prune(grafted, "lora"), MASK)
        return jdelta.combine(chosen, rest)

    chex.assert_trees_all_equal(jax.jit(there_and_back)(BASE, DELTA), BASE)


def test_the_inputs_are_not_changed():
    base = {"a": {"kernel": 1}}
    jdelta.graft(base, {"a": {"lora": {"a": 2}}})
    assert base == {"a": {"kernel": 1}}


def test_graft_onto_a_taken_path_is_an_error():
    with pytest.raises(ValueError, match=r"'a\.lora\.a' is in the tree already"):
        jdelta.graft(jdelta.graft(BASE, DELTA), DELTA)
    with pytest.raises(ValueError, match="is in the tree already"):
        jdelta.graft(BASE, {"a": {"kernel": {"lora": 1}}})


def test_prune_of_an_absent_delta_is_an_error():
    with pytest.raises(ValueError, match="no delta named 'lora'"):
        jdelta.prune(BASE, "lora")


def test_combine_of_overlapping_trees_is_an_error():
    with pytest.raises(ValueError, match=r"'a\.kernel' is in more than one"):
        jdelta.combine(BASE, {"a": {"kernel": 1}})


def test_combine_of_incomplete_trees_is_an_error():
    chosen, rest = jdelta.partition(BASE, MASK)
    with pytest.raises(ValueError, match=r"1 of 3 leaves are missing, first 'a\.bias'"):
        jdelta.combine(chosen, like=BASE)
    with pytest.raises(ValueError, match=r"do not belong to the tree, first 'z'"):
        jdelta.combine(chosen, rest, {"z": 1}, like=BASE)


def test_partition_with_a_foreign_mask_names_the_leaf():
    with pytest.raises(ValueError, match=r"'b\.c\.kernel' is missing from the mask"):
        jdelta.partition(BASE, {"a": {"kernel": True, "bias": True}})


def test_a_tree_that_is_none_is_a_type_error():
    with pytest.raises(TypeError, match="expected a parameter tree"):
        jdelta.partition([1, 2], [True, False])


def test_a_delta_that_has_no_leaves_of_its_own_leaves_the_tree_as_it_is():
    model = fresh("bert", "FlaxBertForSequenceClassification")
    delta = jdelta.LNTuningModel(model)
    assert delta.paths == ()
    chex.assert_trees_all_equal(jdelta.prune(model.params, delta), model.params)
