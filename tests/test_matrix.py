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
from matrix import ALL, FROZEN, POSITIONS, UNREACHED, WITHOUT_ATTENTION, attach, reason
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
    if method == "ln_tuning":
        norms = {"scale", "scale bias", "weight", "weight bias"}
        return [info.name for info in structure if " ".join(sorted(info.params, reverse=True)) in norms]
    table = WITHOUT_ATTENTION if zoo.family_of(name) in ("resnet", "regnet") else POSITIONS
    found = common_names.known(structure, table[method])
    if method == "bitfit":
        below = {info.path for host in found for info in structure.below(host.path)}
        weights = {"bias", "kernel", "scale", "weight"}
        found = [info for info in structure if info.path in below and weights & info.params.keys()]
    if method in ("soft_prompt", "trainable_tokens"):
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

    row, deltas = {}, {}
    for method in sorted(ALL, key=lambda method: method != "ln_tuning"):
        delta = attach(model, name, method)
        if delta is None:
            row[method] = reason(name, method)
            continue
        targets = [target.removesuffix(".embedding") for target in delta.targets]  # a tied one is changed by parameter
        assert targets == positions(delta.structure, name, method)
        every = folded(info.name for info in delta.structure)
        assert all(every[target] == n for target, n in folded(targets).items()), "a layer is left out"
        row[method] = len(targets)
        if method == "ln_tuning":  # of no leaves of its own; and bitfit trains the biases of norms too
            trains = surgery.flatten(surgery.parameters(delta.trainable_mask(shapes)))
            norms = [info for info in delta.structure if info.name in delta.targets]
            assert {p for p in trains if trains[p]} == {(*info.path, leaf) for info in norms for leaf in info.params}
            delta.remove()
            continue
        deltas[method] = delta
        delta.detach()

    # All of them at once: one trace of the model in place of one for each.
    for delta in deltas.values():
        delta.attach()
    # A model that holds its parameters need not be traced to know their names.
    grafted = functools.reduce(jdelta.graft, (delta.shapes() for delta in deltas.values()), shapes)
    model._is_initialized, model.params = True, grafted
    last = [*deltas.values()][-1]
    last.freeze_module()
    trainable, frozen = last.partition()
    after, missed = reach(lambda t, f: model(**x, params=jdelta.combine(t, f)), trainable, frozen)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    assert [path for path in missed if not re.search(UNREACHED.get(name, r"$^"), path)] == []
    trains = surgery.parameters_of(trainable)
    for method, delta in deltas.items():
        assert all((path in trains) == (path[-1] not in FROZEN.get(method, ())) for path in delta.paths), method
        delta.detach()
    assert str(jax.make_jaxpr(lambda p: model(**x, params=p))(shapes)) == str(bare)
    record_property("matrix", (name, row))
