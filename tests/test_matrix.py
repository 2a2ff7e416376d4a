"""Every method on every Flax class of transformers, by shapes alone.

The rows are printed at the end of the run: how many modules a method changed at its default positions, or why it does
not fit.
"""

import functools
import re
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import pytest
import zoo
from jax.interpreters.partial_eval import dce_jaxpr
from matrix import METHODS, POSITIONS, UNREACHED, WITHOUT_ATTENTION, attach, reason
from tiers import breadth

import jdelta
from jdelta.names import common_names
from jdelta.trees import surgery

QUICK = (
    "FlaxBertForSequenceClassification",
    "FlaxGPT2LMHeadModel",
    "FlaxResNetForImageClassification",
)


def reach(function, tree, *rest):
    """The shapes that a function returns, and the names of the first argument's leaves that none of it depends on."""
    closed, out = jax.make_jaxpr(function, return_shape=True)(tree, *rest)
    floats = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(out)]
    _, used = dce_jaxpr(closed.jaxpr, floats)
    paths = [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return out, [path for path, is_used in zip(paths, used[: len(paths)], strict=True) if not is_used]


def folded(names) -> Counter:
    return Counter(re.sub(r"\b\d+\b", "*", name) for name in names)


def positions(structure, name: str, method: str) -> list[str]:
    """The names of the modules that a method is to change."""
    table = WITHOUT_ATTENTION if zoo.family_of(name) in ("resnet", "regnet") else POSITIONS
    found = common_names.known(structure, table[method])
    if method == "bitfit":
        below = {info.path for host in found for info in structure.below(host.path)}
        weights = {"bias", "kernel", "scale", "weight"}
        found = [info for info in structure if info.path in below and weights & info.params.keys()]
    if method == "soft_prompt":
        found = [info for info in found if jnp.issubdtype(info.x.dtype, jnp.integer)][:1]
    return [info.name for info in found]


@pytest.mark.parametrize("name", breadth(zoo.classes(), *QUICK))
def test_every_method_on_every_class_by_shapes(name, record_property):
    # Two layers in one class of each family; the others differ in what is around the layers.
    family = zoo.family_of(name)
    model = zoo.build(name, {} if name == zoo.REPRESENTATIVE[family] else zoo.one_layer(family), _do_init=False)
    x = zoo.inputs(model)
    shapes = model.params_shape_tree
    bare, before = jax.make_jaxpr(lambda p: model(**x, params=p), return_shape=True)(shapes)

    row, deltas = {}, []
    for method in METHODS:
        delta = attach(model, name, method)
        if delta is None:
            row[method] = reason(name, method)
            continue
        assert delta.targets == positions(delta.structure, name, method)
        every = folded(info.name for info in delta.structure)
        assert all(every[target] == n for target, n in folded(delta.targets).items()), "a layer is left out"
        row[method] = len(delta.targets)
        deltas.append(delta)
        delta.detach()

    # All of them at once: one trace of the model in place of eight.
    for delta in deltas:
        delta.attach()
    # A model that holds its parameters need not be traced to know their names.
    model._is_initialized, model.params = True, functools.reduce(jdelta.graft, (d.shapes() for d in deltas), shapes)
    deltas[-1].freeze_module()
    trainable, frozen = deltas[-1].partition()
    after, missed = reach(lambda t, f: model(**x, params=jdelta.combine(t, f)), trainable, frozen)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    assert [path for path in missed if not re.search(UNREACHED.get(name, r"$^"), path)] == []
    for delta in deltas:
        assert surgery.flatten(delta.own(trainable)).keys() == surgery.flatten(delta.shapes()).keys()
        delta.detach()
    assert str(jax.make_jaxpr(lambda p: model(**x, params=p))(shapes)) == str(bare)
    record_property("matrix", (name, row))
