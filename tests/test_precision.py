"""A bfloat16 backbone with float32 deltas: what is computed in which precision.

XLA:CPU turns products of bfloat16 into float32 in its own text, so the program is read as jax hands it over, in
StableHLO. Tensors of the batch are told from weights by their sizes: 2 rows of 7 tokens, and nothing else has 7.
"""

import copy
import functools
import re
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import build, noisy, train_deltas
from flax import linen as nn
from matrix import METHODS
from tiers import breadth

import jdelta
from jdelta.trees import surgery

FAMILIES = {
    "bert": ("FlaxBertForSequenceClassification", {"num_hidden_layers": 1}),
    "gpt2": ("FlaxGPT2LMHeadModel", {"n_layer": 1}),
    "t5": ("FlaxT5ForConditionalGeneration", {"num_layers": 1}),
    "llama": ("FlaxLlamaForCausalLM", {"num_hidden_layers": 1}),
}
IDS = jnp.arange(14).reshape(2, 7) + 20
ROUNDING = 2.0**-8  # relative, of bfloat16

# Operations that compute nothing.
MOVES = {"broadcast_in_dim", "concatenate", "convert", "gather", "pad", "reshape", "slice", "transpose"}
# The products in float32 that a method has of its own, all of them of weights: two compacters' are made of Kronecker
# products, 6 for each of down and up, forward and backward; the network that makes prefixes has two layers.
OWN = {method: {} for method in METHODS} | {"compacter": {"dot_general": 2 * 12}, "prefix": {"dot_general": 6}}
# And with all methods on one model.
OWN_OF_ALL = {
    "gpt2": {"dot_general": 2 * 12 + 6},
    # Its norms return float32: there BitFit's biases are added, and the gradients of all that reads them.
    "t5": {"dot_general": 4 * 12 + 6, "add": 15},
    # It has attention weights in float32: so the values of the prefix are weighted, forward and twice backward.
    "llama": {"dot_general": 2 * 12 + 6 + 3, "add": 1},
}


@functools.cache
def _half(family):
    cls, sizes = FAMILIES[family]
    model = build(family, cls, sizes, dtype=jnp.bfloat16)
    model.params = model.to_bf16(noisy(model.params))
    return model


def half(family):
    """A model in bfloat16 that a test may change."""
    return copy.copy(_half(family))


def attach_all(model):
    """All methods at once; the last says that all train."""
    for cls, arguments in METHODS.values():
        delta = cls(model, **arguments)
    delta.freeze_module(["deltas"])
    return delta


def logits_of(model, params):
    given = {"decoder_input_ids": IDS} if "T5" in type(model).__name__ else {}
    return model(IDS, params=params, **given).logits


def loss_of(model, params):
    return -jax.nn.log_softmax(logits_of(model, params).astype(jnp.float32))[..., 1].mean()


def dtypes(tree):
    """Those of all that is no counter."""
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree) if leaf.ndim}


def in_float32(step, *args):
    """The operations of a step with a result in float32: all products, and what is of the batch's size."""
    found = Counter()
    for line in jax.jit(step).lower(*args).as_text().splitlines():
        operation = re.search(r'= "?stablehlo\.(\w+)', line)
        tensors = re.findall(r"tensor<([\dx]*?)x?(f32|bf16|i32|i1|ui32)>", line)
        if operation is None or operation[1] in MOVES or not tensors or tensors[-1][1] != "f32":
            continue
        # A prefix of 2 tokens or a prompt of 4 makes some tensors longer than the bare backbone's.
        longer = {"9": "7", "11": "7", "13": "7", "22": "14"}
        shapes = [tuple(longer.get(n, n) for n in shape.split("x")) for shape, _ in tensors]
        if operation[1] == "dot_general" or {"2", "7"} <= {*shapes[-1]} or "14" in shapes[-1]:
            found[operation[1], *shapes] += 1
    return found


def by_operation(found):
    total = Counter()
    for (operation, *_), n in found.items():
        total[operation] += n
    return total


def dtypes_between_modules(run, params):
    """What each module takes and returns, by its path and method."""
    found = {}

    def watch(call, args, kwargs, context):
        output = call(*args, **kwargs)
        arrays = [a for a in jax.tree.leaves((args, kwargs, output)) if hasattr(a, "dtype")]
        found[context.module.scope.path, context.method_name] = [str(a.dtype) for a in arrays]
        return output

    def watched(params):
        with nn.intercept_methods(watch):
            return run(params)

    found["output"] = str(jax.eval_shape(watched, params).dtype)
    return found


@functools.cache
def bare(family):
    """Of the bare backbone: its operations in float32, and the dtypes between its modules."""
    model = half(family)
    operations = in_float32(jax.value_and_grad(functools.partial(loss_of, model)), model.params)
    return operations, dtypes_between_modules(functools.partial(logits_of, model), model.params)


def check_no_more_float32(family, model, delta, own):
    operations, between = bare(family)
    after = dtypes_between_modules(functools.partial(logits_of, model), model.params)
    assert after["output"] == "bfloat16"
    assert {key: after[key] for key in between} == between
    trainable, frozen = delta.partition()
    own_leaves = {path: leaf for path, leaf in surgery.flatten(trainable).items() if {*path} & METHODS.keys()}
    assert dtypes(own_leaves) <= {"float32"}
    assert dtypes(frozen) == {"bfloat16"}
    step = jax.value_and_grad(lambda t, f: loss_of(model, jdelta.combine(t, f)))
    chex.assert_trees_all_equal_dtypes(jax.eval_shape(step, trainable, frozen)[1], trainable)
    found = in_float32(step, trainable, frozen) - operations
    assert by_operation(found) == own, found


@pytest.mark.parametrize("method", breadth(METHODS, "lora", "adapter"))
def test_a_delta_brings_no_float32_into_the_step_of_a_bfloat16_backbone(method):
    model = half("bert")
    cls, arguments = METHODS[method]
    check_no_more_float32("bert", model, cls(model, **arguments), OWN[method])


@pytest.mark.parametrize("family", OWN_OF_ALL)
@pytest.mark.slow
def test_all_deltas_together_bring_no_float32_into_other_families(family):
    model = half(family)
    check_no_more_float32(family, model, attach_all(model), OWN_OF_ALL[family])


@pytest.mark.slow
def test_float32_leaves_train_on_a_bfloat16_backbone_and_stay_float32():
    model = half("bert")
    delta = attach_all(model)
    assert dtypes(delta.partition()[0]) == {"float32", "bfloat16"}  # BitFit's biases are the backbone's own
    model.params = model.to_fp32(model.params, delta.trainable_mask())
    tx = delta.optimizer(optax.adamw(1e-2))
    params, state = model.params, tx.init(model.params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(functools.partial(loss_of, model))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, grads

    losses = []
    for _ in range(5):
        params, state, loss, grads = step(params, state)
        losses.append(float(loss))
    trainable, frozen = delta.partition(params)
    before, frozen_before = delta.partition()
    assert dtypes(trainable) == dtypes(state) == dtypes(delta.partition(grads)[0]) == {"float32"}
    assert dtypes(frozen) == {"bfloat16"}
    assert losses[-1] < 0.9 * losses[0]
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before, trainable)), strict=True))
    chex.assert_trees_all_equal(frozen_before, frozen)


def test_biases_that_train_in_place_are_bfloat16_unless_they_are_cast():
    model = half("bert")
    pretrained = model.params
    delta = jdelta.BitFitModel(model)
    trainable, frozen = delta.partition()
    assert dtypes(trainable) == dtypes(optax.adamw(1e-3).init(trainable)) == {"bfloat16"}
    before = jax.jit(functools.partial(logits_of, model))(model.params)
    model.params = model.to_fp32(model.params, delta.trainable_mask())
    assert dtypes(delta.partition()[0]) == {"float32"}
    assert dtypes(delta.partition()[1]) == {"bfloat16"}
    assert (jax.jit(functools.partial(logits_of, model))(model.params) == before).all()
    step = jax.value_and_grad(lambda t, f: loss_of(model, jdelta.combine(t, f)))
    assert not in_float32(step, delta.partition()[0], frozen) - bare("bert")[0]
    train_deltas(delta)
    trained = model.params
    delta.detach()
    chex.assert_trees_all_equal_dtypes(model.params, pretrained)
    chex.assert_trees_all_equal(model.params, pretrained)
    delta.attach()
    chex.assert_trees_all_equal_dtypes(model.params, trained)
    chex.assert_trees_all_equal(model.params, trained)


@pytest.mark.parametrize("family", breadth(["bert", "t5", "llama"], "llama"))
def test_a_bfloat16_backbone_computes_what_float32_does_up_to_its_resolution(family):
    model = half(family)
    train_deltas(attach_all(model) if family == "bert" else jdelta.LoraModel(model))
    full = copy.copy(model)
    full._module = model.module.clone(dtype=jnp.float32)
    full.params = full.to_fp32(model.params)
    low, high = (jax.jit(functools.partial(logits_of, m))(m.params) for m in (model, full))
    assert (low.dtype, high.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(low.astype(jnp.float32), high, atol=4 * ROUNDING * np.abs(high).max())


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        h = nn.tanh(nn.Dense(16, name="up", **half)(nn.LayerNorm(dtype=jnp.float32)(x)))
        return x + nn.Dense(8, name="down", **half)(h), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


@pytest.mark.parametrize("method", breadth(["lora", "compacter", "bitfit"], "lora"))
@pytest.mark.slow
def test_layers_in_a_scan_that_take_float32_from_a_norm_keep_bfloat16(method):
    module, x = Scanned(), jnp.ones((2, 7, 8), jnp.bfloat16)
    base = jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    backbone = copy.copy(base)
    cls, arguments = METHODS[method]
    delta = cls(backbone, modified_modules=["up", "down"], **arguments)
    before, after = (dtypes_between_modules(lambda p, b=b: b(x, params=p), b.params) for b in (base, backbone))
    assert {key: after[key] for key in before} == before
    trainable, frozen = delta.partition()
    operations = in_float32(jax.grad(lambda p: base(x, params=p).astype(jnp.float32).sum()), base.params)
    step = jax.grad(lambda t, f: backbone(x, params=jdelta.combine(t, f)).astype(jnp.float32).sum())
    found = in_float32(step, trainable, frozen) - operations
    own = {"compacter": {"dot_general": 2 * 16}, "lora": {"add": 1}}  # it reads the norm too: its gradient is added
    assert by_operation(found) == own.get(method, {}), found
    assert dtypes(step(trainable, frozen)) == dtypes(trainable) == ({"bfloat16"} if method == "bitfit" else {"float32"})
