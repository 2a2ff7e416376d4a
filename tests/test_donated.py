"""What was donated to a jitted function is deleted: whatever reads or moves it says so, and changes nothing."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import noisy, train_deltas
from flax import linen as nn
from tiers import breadth

import jdelta

X = np.linspace(-1.0, 1.0, 8, dtype=np.float32).reshape(2, 4)
SAYS = r"were donated to a jitted function.*params=….*set model\.params"


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="two")(jnp.tanh(nn.Dense(6, name="one")(x)))


def backbone():
    shapes = jax.eval_shape(Net().init, jax.random.key(0), X)["params"]
    params = noisy(jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes))
    return jdelta.Backbone(Net(), params, dummy_inputs=(X,))


def donate(tree):
    """What `donate_argnums` does to the arrays that are passed."""
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


def lora(model, **options):
    return jdelta.LoraModel(model, modified_modules=["one", "two"], lora_r=2, **options)


VERBS = {
    "call": lambda delta, params: delta.backbone_model(X, **params),
    "finetuned": lambda delta, params: delta.finetuned(**params),
    "merge": lambda delta, params: delta.merge(**params),
    "movement": lambda delta, params: delta.movement(**params),
    "partition": lambda delta, params: delta.partition(**params),
    "save": lambda delta, params: delta.save_finetuned("never", **params),
    "to_peft": lambda delta, params: delta.to_peft("never", **params),
    "push": lambda delta, params: delta.push_to_hub("some/name", **params),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("given", breadth(["model.params", "params="], "params="))
def test_every_verb_that_reads_a_donated_tree_says_so(verb, given):
    model = backbone()
    delta = lora(model)
    tree = jax.tree.map(jnp.copy, model.params)
    donate(tree if given == "params=" else model.params)
    before = model.module, model.params
    with pytest.raises(RuntimeError, match=SAYS):
        VERBS[verb](delta, {"params": tree} if given == "params=" else {})
    assert (model.module, model.params) == before
    assert delta.attached


SWITCHES = {
    "detach": lambda delta: delta.detach(),
    "remove": lambda delta: delta.remove(),
    "insert": lambda delta: delta.insert_sequential_module("one", nn.Dense(6)),
    "attach another": lambda delta: lora(delta.backbone_model, name="other"),
    "load": lambda delta: delta.load_finetuned(delta.saved),
    "load anew": lambda delta: jdelta.AutoDeltaModel.from_finetuned(delta.saved, delta.backbone_model, name="other"),
}


@pytest.mark.parametrize("verb", SWITCHES)
def test_what_would_write_into_a_donated_tree_changes_nothing(verb):
    model = backbone()
    delta = lora(model)
    train_deltas(delta)
    delta.saved = delta.finetuned()
    donate(model.params)
    before = model.module, model.params
    with pytest.raises(RuntimeError, match=SAYS):
        SWITCHES[verb](delta)
    assert model.module is before[0]
    assert model.params is before[1]
    assert delta.attached


def test_attaching_again_needs_a_live_tree_too():
    model = backbone()
    delta = lora(model)
    train_deltas(delta)
    logits = model(X)
    delta.detach()
    alive = jax.tree.map(jnp.copy, model.params)
    donate(model.params)
    with pytest.raises(RuntimeError, match=SAYS):
        delta.attach()
    assert not delta.attached
    model.params = alive
    delta.attach()
    assert np.array_equal(model(X), logits)


@pytest.mark.parametrize("attach", [lora, lambda model: jdelta.BitFitModel(model, modified_modules=["one", "two"])])
def test_what_detaching_keeps_outlives_the_donation_of_the_tree(attach):
    model = backbone()
    base = model(X)
    delta = attach(model)
    train_deltas(delta)
    logits, tree = model(X), model.params
    delta.detach()
    assert np.array_equal(model(X), base)
    model.params = jax.tree.map(jnp.copy, model.params)
    donate(tree)
    delta.attach()
    assert np.array_equal(model(X), logits)
    delta.detach()
    assert np.array_equal(model(X), base)


def test_unmerging_says_so_if_the_weights_of_before_or_of_now_were_donated():
    for donated in ("before", "now"):
        model = backbone()
        before = model.params
        delta = lora(model)
        train_deltas(delta)
        merged = delta.merge()
        donate(before if donated == "before" else merged)
        with pytest.raises(RuntimeError, match="donated to a jitted function"):
            delta.unmerge()
        assert delta.merged
    model.params = noisy(backbone().params)
    with pytest.raises(ValueError, match="was changed after"):
        delta.unmerge()


def test_functions_on_trees_say_so():
    model = backbone()
    delta = lora(model)
    mask, own = delta.trainable_mask(), delta.init(1)
    trainable, frozen = (jax.tree.map(jnp.copy, part) for part in delta.partition())
    donate(model.params)
    donate(trainable)
    for run in (
        lambda: jdelta.partition(model.params, mask),
        lambda: jdelta.prune(model.params, delta),
        lambda: jdelta.graft(jdelta.prune(jax.eval_shape(lambda: model.params), delta), trainable),
        lambda: jdelta.combine(trainable, frozen),
        lambda: delta.own(model.params),
        lambda: jdelta.stack([trainable, own]),
        lambda: jdelta.unstack(trainable),
        lambda: jdelta.Backbone(Net(), model.params, dummy_inputs=(X,)),
    ):
        with pytest.raises(RuntimeError, match=SAYS):
            run()
    delta.log()  # shapes will do
    delta.optimizer(optax.sgd(0.1))


@pytest.mark.slow
def test_what_starts_from_donated_values_or_writes_out_a_prefix_says_so(bert):
    model = copy.copy(bert)
    prompt = jdelta.SoftPromptModel(model, soft_token_num=2)
    prefix = jdelta.PrefixModel(model, prefix_token_num=2, embed_dim=2, mid_dim=2)
    model.params = jax.tree.map(jnp.copy, model.params)
    donate(model.params)
    for run in (lambda: prompt.init(0), prefix.materialise, lambda: model.save_pretrained("never")):
        with pytest.raises(RuntimeError, match=SAYS):
            run()
