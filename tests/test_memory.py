"""What a training step keeps and copies: checkpoints of activations, accumulated gradients, donated buffers.

The figures of `memory_analysis` are those of XLA's buffer assignment, which the flags in `conftest` do not change.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import fresh, train_deltas
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

import jdelta

IDS = jnp.arange(8 * 6).reshape(8, 6) % 50 + 3
LABELS = jnp.arange(8) % 2
POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("wide"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
}


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def kept_for_backward(loss, trainable, frozen):
    """Bytes that the forward pass leaves for the backward pass."""
    return size(jax.eval_shape(lambda t, f: jax.vjp(lambda t: loss(t, f), t)[1], trainable, frozen))


def classify(model, params, ids=IDS, labels=LABELS):
    logits = model(ids, params=params).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def bert():
    return fresh("bert", "FlaxBertForSequenceClassification", num_hidden_layers=1)


# --- jax.checkpoint


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = checkpoint_name(nn.Dense(4 * x.shape[-1], name="up")(nn.LayerNorm()(x)), "wide")
        return x + nn.Dense(x.shape[-1], name="down")(nn.gelu(h)), None


class Deep(nn.Module):
    """8 layers in a scan, since XLA:CPU computes nothing twice outside of one, whatever `nn.remat` says."""

    policy: str | None = None

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, policy=POLICIES[self.policy], prevent_cse=False) if self.policy else Block
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=8)
        return layers(name="layers")(x, None)[0]


X = jax.random.normal(jax.random.key(0), (256, 16))


@functools.cache
def deep(policy=None):
    module = Deep(policy)
    backbone = jdelta.Backbone(module, module.init(jax.random.key(1), X)["params"], dummy_inputs=(X,))
    jdelta.LoraModel(backbone, modified_modules=["up"], lora_r=2)
    delta = jdelta.AdapterModel(backbone, modified_modules=["down"], bottleneck_dim=2)
    delta.freeze_module(["deltas"])
    train_deltas(delta)
    return backbone, delta


def gradient(loss, delta):
    run = jax.jit(jax.grad(loss)).lower(*delta.partition()).compile()
    return run(*delta.partition()), run.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_remat_with_every_policy_gives_the_same_gradients_in_less_memory():
    grads, temporary = {}, {}
    for policy in (None, *POLICIES):
        backbone, delta = deep(policy)
        loss = lambda t, f, b=backbone: (b(X, params=jdelta.combine(t, f)) ** 2).mean()  # noqa: E731
        grads[policy], temporary[policy] = gradient(loss, delta)
        chex.assert_trees_all_close(grads[policy], grads[None], rtol=1e-5, atol=1e-6)
    for policy in ("names", "dots"):
        assert temporary["nothing"] < temporary[policy] < temporary[None]
    assert temporary["nothing"] < temporary[None] / 5
    assert temporary["everything"] > 0.95 * temporary[None]


@pytest.mark.slow
def test_a_checkpoint_around_the_whole_loss_keeps_what_its_policy_says():
    backbone, delta = deep()

    def loss(t, f):
        return (backbone(X, params=jdelta.combine(t, f)) ** 2).mean()

    checkpointed = {name: jax.checkpoint(loss, policy=policy) for name, policy in POLICIES.items()}
    plain = kept_for_backward(loss, *delta.partition())
    kept = {name: kept_for_backward(f, *delta.partition()) for name, f in checkpointed.items()}
    assert kept["nothing"] == size(backbone.params) + X.nbytes
    assert kept["nothing"] < min(kept["names"], kept["dots"]) < max(kept["names"], kept["dots"]) < plain
    assert kept["everything"] > 0.95 * plain
    grads = [gradient(f, delta)[0] for f in (loss, checkpointed["dots"])]
    chex.assert_trees_all_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_gradient_checkpointing_of_transformers_works_before_and_after_attaching():
    plain, before, after = (fresh("bert", "FlaxBertForSequenceClassification") for _ in range(3))
    before.enable_gradient_checkpointing()
    deltas = [jdelta.LoraModel(model, lora_r=2) for model in (plain, before, after)]
    after.enable_gradient_checkpointing()
    train_deltas(deltas[0])
    losses = [lambda t, f, m=m: classify(m, jdelta.combine(t, f)) for m in (plain, before, after)]
    kept = [kept_for_backward(loss, *deltas[0].partition()) for loss in losses]
    assert kept[1] == kept[2] < kept[0] / 3
    chex.assert_trees_all_close(*(gradient(losses[i], deltas[0])[0] for i in (0, 2)), atol=1e-6)


@pytest.mark.slow
def test_deltas_stay_on_a_model_whose_module_is_made_anew():
    model = bert()
    run = jax.jit(lambda p: model(IDS, params=p).logits)
    pretrained, bare = model.params, run(model.params)
    delta, prompt = jdelta.LoraModel(model, lora_r=2), jdelta.SoftPromptModel(model, soft_token_num=2)
    train_deltas(delta)
    logits = run(model.params)
    model.enable_gradient_checkpointing()
    assert model.module.gradient_checkpointing
    jax.clear_caches()
    np.testing.assert_allclose(run(model.params), logits, atol=1e-6)
    with pytest.raises(ValueError, match="delta 'lora' is attached, but the parameters lack"):
        model(IDS, params=pretrained)
    prompt.detach()
    delta.detach()
    assert model.module.gradient_checkpointing
    jax.clear_caches()
    np.testing.assert_allclose(run(model.params), bare, atol=1e-6)


# --- optax.MultiSteps


@pytest.mark.slow
def test_accumulated_gradients_are_held_only_for_what_trains():
    model = bert()
    delta = jdelta.LoraModel(model, unfrozen_modules=["classifier"])
    trainable = size(delta.partition()[0])
    state = delta.optimizer(optax.MultiSteps(optax.adamw(1e-3), every_k_schedule=4)).init(model.params)
    assert 3 * trainable <= size(state) <= 3 * trainable + 16  # two moments and the sum; three counters
    outside = optax.MultiSteps(delta.optimizer(optax.adamw(1e-3)), every_k_schedule=4).init(model.params)
    assert size(outside) > size(model.params)


@pytest.mark.slow
def test_micro_batches_give_the_update_of_one_large_batch_and_frozen_leaves_never_move():
    model = bert()
    delta = jdelta.LoraModel(model)
    adamw = optax.adamw(1e-2, weight_decay=0.1)
    whole, parts = delta.optimizer(adamw), delta.optimizer(optax.MultiSteps(adamw, every_k_schedule=4))

    def step(tx):
        @jax.jit
        def run(params, state, ids, labels):
            grads = jax.grad(lambda p: classify(model, p, ids, labels))(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, updates

        return run

    step_of_whole, step_of_parts = step(whole), step(parts)
    params, state = model.params, whole.init(model.params)
    other, accumulated = model.params, parts.init(model.params)
    frozen = delta.partition()[1]
    for _ in range(2):
        before = other
        params, state, _ = step_of_whole(params, state, IDS, LABELS)
        for i in range(4):
            if i:
                chex.assert_trees_all_equal(other, before)  # no update yet
            part = slice(2 * i, 2 * i + 2)
            other, accumulated, updates = step_of_parts(other, accumulated, IDS[part], LABELS[part])
            assert bits(delta.partition(other)[1]) == bits(frozen)
            for update in jax.tree.leaves(delta.partition(updates)[1]):  # -0.0: where it is added, not one bit moves
                assert not update.any()
                assert jnp.signbit(update).all()
    chex.assert_trees_all_close(other, params, atol=1e-6)
    assert bits(delta.partition(other)[0]) != bits(delta.partition()[0])


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# --- donation


def owned(model):
    """The model with arrays of its own, which may be donated."""
    model.params = jax.tree.map(jnp.copy, model.params)
    return model


def test_a_step_that_is_donated_its_tree_copies_no_frozen_leaf():
    model = owned(bert())
    delta = jdelta.LoraModel(model, lora_r=2)
    tx = delta.optimizer(optax.adamw(1e-2))

    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: classify(model, p))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, state = model.params, tx.init(model.params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == size(params) + size(state)
    text = compiled.as_text()
    header, entry = text.splitlines()[0], text[text.index("\nENTRY ") :]
    aliased = re.findall(r"\{(\d+)\}: \((\d+), \{\}", header)
    assert aliased == [(str(i), str(i)) for i in range(len(jax.tree.leaves((params, state))))]
    names = dict(re.findall(r"(%\S+) = .* parameter\((\d+)\)", entry))
    (result,) = re.findall(r"ROOT .* tuple\((.*)\)", entry)
    returned = [names.get(name) for name in re.findall(r"%[\w.-]+", result)]
    for i, trains in enumerate(jax.tree.leaves(delta.trainable_mask())):
        assert returned[i] == (None if trains else str(i))  # a frozen leaf is handed through
    copied = [names.get(name) for name in re.findall(r" copy(?:-start)?\(([^)]*)\)", text)]
    frozen = {str(i) for i, trains in enumerate(jax.tree.leaves(delta.trainable_mask())) if not trains}
    assert not frozen & {*copied}

    expected, expected_state = jax.tree.map(jnp.copy, (params, state))
    undonated = jax.jit(step)
    first = params
    for _ in range(3):
        params, state, loss = compiled(params, state)
        expected, expected_state, want = undonated(expected, expected_state)
        np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    chex.assert_trees_all_close(params, expected, atol=1e-6)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_a_step_on_the_partition_returns_and_copies_nothing_of_the_backbone():
    model = owned(bert())
    delta = jdelta.LoraModel(model, lora_r=2)
    tx = optax.adamw(1e-2)

    def step(trainable, state, frozen):
        loss, grads = jax.value_and_grad(lambda t: classify(model, jdelta.combine(t, frozen)))(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    trainable, frozen = delta.partition()
    state = tx.init(trainable)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(trainable, state, frozen).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == size(trainable) + size(state)
    assert memory.output_size_in_bytes < memory.alias_size_in_bytes + size(frozen) / 8
    for _ in range(3):
        trainable, state, _ = compiled(trainable, state, frozen)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((trainable, frozen)))
    model.params = jdelta.combine(trainable, frozen)
    delta.finetuned()


def test_what_was_donated_is_an_error_that_says_what_to_do(tmp_path):
    model = owned(bert())
    delta = jdelta.LoraModel(model, lora_r=2)
    logits = model(IDS).logits
    params = jax.jit(lambda p: jax.tree.map(lambda a: a + 0, p), donate_argnums=0)(model.params)
    for read in (lambda: model(IDS), delta.merge, delta.movement, lambda: delta.save_finetuned(tmp_path)):
        with pytest.raises(RuntimeError, match=r"were donated to a jitted function.*set model\.params"):
            read()
    delta.log()  # shapes will do
    assert (model(IDS, params=params).logits == logits).all()
    model.params = params
    delta.save_finetuned(tmp_path, allow_untrained=True)
    delta.detach()
    assert model(IDS).logits.shape == logits.shape
