"""Every method on one class of each family of transformers, with numbers.

That detaching gives back the very same program is in `test_matrix`.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax.interpreters.partial_eval import dce_jaxpr
from matrix import METHODS, attach

import jdelta
from jdelta.trees import surgery

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LOUD = ("prefix", "soft_prompt")  # these change the output at once
QUIET = tuple(method for method in METHODS if method not in LOUD)


def random_weights(shapes, seed: int = 0):
    """Weights of a size at which every part of a model matters."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        name = path[-1].key
        values = rng.normal(0.0, 0.2, shape.shape)
        if name in ("var", "bias"):  # of a positive bias, no ReLU of a tiny model dies
            values = np.abs(values) + 1
        elif name in ("scale", "weight"):
            values += 1
        return jnp.asarray(values, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def new_leaves(tree, known):
    """The part of a tree that another lacks."""
    have = surgery.flatten(known)
    return surgery.unflatten({path: leaf for path, leaf in surgery.flatten(tree).items() if path not in have})


def initialised(function, key):
    """What a function of a key returns, computed step by step, since the steps are alike in all families."""
    closed, out = jax.make_jaxpr(function, return_shape=True)(key)
    needed, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    leaves = jax.core.eval_jaxpr(needed, closed.consts, key)
    return jax.tree.unflatten(jax.tree.structure(out), leaves)


@pytest.mark.parametrize("family", sorted(zoo.REPRESENTATIVE))
@pytest.mark.slow
def test_every_method_on_a_class_of_each_family_with_numbers(family):
    name = zoo.REPRESENTATIVE[family]
    model = zoo.build(name, zoo.one_layer(family), _do_init=False)
    x, base = zoo.inputs(model), random_weights(model.params_shape_tree)

    def run(function, *arguments):
        return jax.jit(function, compiler_options=FAST)(*arguments)

    before = run(lambda p: model(**x, params=p), base)

    deltas = []
    for methods in (QUIET, LOUD):
        deltas += [delta for method in methods if (delta := attach(model, name, method)) is not None]
        if methods is QUIET:
            key = jax.random.key(0, impl="rbg")  # quick to compile
            own = initialised(lambda key: new_leaves(model.init_weights(key, model.input_shape), base), key)
            at_first = run(lambda p: model(**x, params=p), jdelta.graft(base, own))
            # Two programs of some hundred steps each, so but for rounding.
            chex.assert_trees_all_close(at_first, before, rtol=1e-5, atol=1e-5)
    deltas[-1].freeze_module()
    trainable = random_weights(deltas[-1].partition()[0], seed=1)
    frozen = new_leaves(base, trainable)

    def loss(t):
        outputs = jax.tree.leaves(model(**x, params=jdelta.combine(t, frozen)))
        return sum(jnp.sum(jnp.sin(o)) for o in outputs if jnp.issubdtype(o.dtype, jnp.floating))

    gradients = surgery.flatten(run(jax.grad(loss), trainable))
    still = [surgery.name_of(path) for path, g in gradients.items() if not (g != 0).any()]
    assert still == []
