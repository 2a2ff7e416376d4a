from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
import zoo
from conftest import fresh
from flax import linen as nn
from flax.core import freeze
from flax.training.train_state import TrainState

import jdelta
from jdelta.trees import surgery

IDS = jnp.array([[5, 6, 7, 8], [9, 10, 11, 12]])
LABELS = jnp.array([0, 1])


def names(tree):
    return {surgery.name_of(path) for path in surgery.flatten(tree)}


def bits(tree):
    return jax.tree.map(lambda a: np.asarray(a).tobytes(), tree)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="two")(jnp.tanh(nn.Dense(6, name="one")(x)))


X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)


def small(kind=dict):
    params = MLP().init(jax.random.key(0), X)["params"]
    params["one"]["bias"] = params["one"]["bias"].at[0].set(-0.0).at[1].set(jnp.nan).at[2].set(1e-40)
    return jdelta.Backbone(MLP(), kind(params), dummy_inputs=(X,))


def test_a_fresh_delta_trains_its_own_leaves_and_nothing_else(bert):
    delta = jdelta.LoraModel(bert)
    assert names(delta.partition()[0]) == {n for n in names(bert.params) if ".lora." in n}


def test_unfrozen_modules_train_besides_the_delta(bert):
    delta = jdelta.LoraModel(bert, unfrozen_modules=["classifier"])
    expected = {n for n in names(bert.params) if ".lora." in n} | {"classifier.kernel", "classifier.bias"}
    assert names(delta.partition()[0]) == expected


def test_freeze_module_takes_the_naming_rules_and_replaces_the_first_choice(bert):
    delta = jdelta.LoraModel(bert)
    delta.freeze_module(exclude=["deltas", "classifier"])
    assert "classifier.kernel" in names(delta.partition()[0])
    delta.freeze_module(exclude=["0.attention.output", r"[r]encoder\.layer\.1\.output\.dense"])
    assert names(delta.partition()[0]) == {
        "bert.encoder.layer.0.attention.output.dense.kernel",
        "bert.encoder.layer.0.attention.output.dense.bias",
        "bert.encoder.layer.0.attention.output.LayerNorm.scale",
        "bert.encoder.layer.0.attention.output.LayerNorm.bias",
        "bert.encoder.layer.1.output.dense.kernel",
        "bert.encoder.layer.1.output.dense.bias",
    }
    delta.freeze_module()
    assert names(delta.partition()[0]) == {n for n in names(bert.params) if ".lora." in n}


def test_bitfit_comes_out_of_the_same_mask(bert):
    delta = jdelta.DeltaModel(bert)
    delta.freeze_module(exclude=["bias"])
    assert names(delta.partition()[0]) == {n for n in names(bert.params) if n.endswith(".bias")}


def test_deltas_means_all_attached_deltas(bert):
    lora = jdelta.LoraModel(bert)
    bitfit = jdelta.BitFitModel(bert, modified_modules=["intermediate.dense"])
    lora.freeze_module(exclude=["deltas"])
    trained = names(lora.partition()[0])
    assert {n.rsplit(".", 1)[-1] for n in trained} == {"a", "b", "bias"}
    bitfit.detach()
    assert all(".lora." in n for n in names(lora.partition()[0]))


def test_a_wrong_pattern_leaves_the_earlier_choice(bert):
    delta = jdelta.LoraModel(bert)
    with pytest.raises(ValueError, match=r"'clasifier'\. Closest: ….classifier"):
        delta.freeze_module(exclude=["deltas", "clasifier"])
    assert all(".lora." in n for n in names(delta.partition()[0]))
    with pytest.raises(TypeError, match=r"Write \['deltas'\]"):
        delta.freeze_module(exclude="deltas")


@pytest.mark.parametrize("kind", [dict, freeze])
def test_frozen_leaves_do_not_move_by_one_bit_in_100_steps_with_weight_decay(kind):
    backbone = small(kind)
    delta = jdelta.LoraModel(backbone, modified_modules=["two"], lora_r=2)
    before = backbone.params
    tx = delta.optimizer(optax.adamw(1e-2, weight_decay=0.1))
    state = TrainState.create(apply_fn=backbone, params=before, tx=tx)

    @jax.jit
    def step(state):
        def loss(params):  # the bias holds a NaN, so leave the first layer's output out of it
            return ((state.apply_fn(jnp.nan_to_num(X), params=params) - 1) ** 2).mean()

        return state.apply_gradients(grads=jax.tree.map(jnp.nan_to_num, jax.grad(loss)(state.params)))

    for _ in range(100):
        state = step(state)
    frozen_before, frozen_after = delta.partition(before)[1], delta.partition(state.params)[1]
    assert bits(frozen_before) == bits(frozen_after)
    trained_before, trained_after = delta.partition(before)[0], delta.partition(state.params)[0]
    assert bits(trained_before) != bits(trained_after)


def test_optimizer_state_is_held_only_for_what_trains():
    backbone = small()
    delta = jdelta.LoraModel(backbone, modified_modules=["two"], lora_r=2)
    state = delta.optimizer(optax.adam(1e-3)).init(backbone.params)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert sizes == sorted([6 * 2, 2 * 3] * 2)  # first and second moments of a and b


def test_the_whole_tree_and_the_partition_train_alike():
    backbone = small()
    backbone.params["one"]["bias"] = jnp.zeros(6)
    delta = jdelta.LoraModel(backbone, modified_modules=["one", "two"], lora_r=2)

    def loss(params):
        return ((backbone(X, params=params) - 1) ** 2).mean()

    tx = delta.optimizer(optax.adamw(1e-2))
    params, state = backbone.params, tx.init(backbone.params)
    trainable, frozen = delta.partition()
    tx2 = optax.adamw(1e-2)
    state2 = tx2.init(trainable)
    for _ in range(5):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        grads = jax.grad(lambda t: loss(jdelta.combine(t, frozen)))(trainable)
        updates, state2 = tx2.update(grads, state2, trainable)
        trainable = optax.apply_updates(trainable, updates)
    chex.assert_trees_all_equal(params, delta.combine(trainable, frozen))


def test_the_mask_fits_any_optax_wrapper(bert):
    delta = jdelta.LoraModel(bert)
    mask = delta.trainable_mask(bert.params)
    chex.assert_trees_all_equal_structs(mask, bert.params)
    tx = optax.transforms.selective_transform(optax.sgd(1.0), freeze_mask=jax.tree.map(lambda m: not m, mask))
    grads = jax.tree.map(jnp.ones_like, bert.params)
    updates, _ = tx.update(grads, tx.init(bert.params), bert.params)
    moved = jax.tree.map(lambda u: bool((u != 0).any()), updates)
    chex.assert_trees_all_equal(moved, mask)


def test_combine_of_a_delta_checks_that_nothing_is_missing(bert):
    delta = jdelta.LoraModel(bert)
    trainable, frozen = delta.partition()
    chex.assert_trees_all_equal(delta.combine(trainable, frozen), bert.params)
    with pytest.raises(ValueError, match="leaves are missing, first"):
        delta.combine(frozen)


def test_xla_computes_no_gradient_of_the_frozen_backbone():
    model = fresh("bert", "FlaxBertForSequenceClassification")
    delta = jdelta.LoraModel(model)
    tx = delta.optimizer(optax.adamw(1e-3))

    def whole(params, state):
        def loss(p):
            logits = model(IDS, params=p).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def part(trainable, frozen, state):
        def loss(t):
            logits = model(IDS, params=jdelta.combine(t, frozen)).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

        updates, state = optax.adamw(1e-3).update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    trainable, frozen = delta.partition()
    states = jax.eval_shape(tx.init, model.params), jax.eval_shape(optax.adamw(1e-3).init, trainable)
    products = [
        jax.jit(f).lower(*args).compile().as_text().count(" dot(")
        for f, args in ((whole, (model.params, states[0])), (part, (trainable, frozen, states[1])))
    ]
    assert products[0] == products[1]


def test_names_of_a_model_without_parameters_are_traced_once():
    """Attaching knows them; after `attach` and `detach` one abstract run finds them again."""
    model, runs = zoo.build("FlaxBertModel", _do_init=False), []
    delta = jdelta.LoraModel(model)
    cls = transformers.FlaxBertModel
    init = cls.init_weights
    with mock.patch.object(cls, "init_weights", lambda *a, **k: (runs.append(1), init(*a, **k))[1]):
        mask, (trainable, _) = delta.trainable_mask(), delta.partition()
        assert not runs
        delta.detach()
        assert not any(jax.tree.leaves(delta.trainable_mask()))
        delta.log()
        assert len(runs) == 1
        delta.attach()
        assert delta.trainable_mask() == mask
    assert names(trainable) == names(delta.shapes())
