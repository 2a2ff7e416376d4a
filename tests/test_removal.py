"""Deltas that come and go: remove, a second one of the same kind, and what stays of those that nobody holds."""

import copy
import gc
import pickle
import warnings

import jax
import jax.numpy as jnp
import pytest
from conftest import fresh, noisy, train_deltas
from flax import linen as nn
from tiers import breadth

import jdelta
from jdelta.hosts.linen.instrument import attachments_of


class Net(nn.Module):
    biased: bool = True

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(8, name="first", use_bias=self.biased)(x))
        return nn.Dense(8, name="second", use_bias=self.biased)(hidden)


X = jnp.ones((2, 3))


def backbone(biased=True):
    module = Net(biased)
    return jdelta.Backbone(module, noisy(module.init(jax.random.key(0), X)["params"]), dummy_inputs=(X,))


@pytest.fixture
def net():
    return backbone()


def lora(net, **arguments):
    return jdelta.LoraModel(net, **{"modified_modules": ["first", "second"], "lora_r": 2, **arguments})


# --- remove


@pytest.mark.parametrize("state", ["attached", "detached"])
def test_remove_leaves_the_model_as_it_was_and_its_name_free(net, state):
    module, params = net.module, net.params
    delta = lora(net)
    train_deltas(delta)
    if state == "detached":
        delta.detach()
    delta.remove()
    assert net.module is module
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, net.params, params))
    assert "removed" in repr(delta)
    assert not delta.attached
    assert not delta.merged
    assert lora(net).name == delta.name


def test_deltas_are_removed_in_any_order_and_lent_biases_get_their_values_back(bert, ids):
    before, plain = bert.params, bert(ids).logits
    bias, one, other = jdelta.BitFitModel(bert), jdelta.LoraModel(bert), jdelta.AdapterModel(bert)
    for delta in (bias, one, other):
        train_deltas(delta)
    one.remove()
    bias.remove()
    assert other.attached
    other.remove()
    assert attachments_of(bert.module) == ()
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), bert.params, before))
    assert (bert(ids).logits == plain).all()


VERBS = {
    "attach": lambda d: d.attach(),
    "detach": lambda d: d.detach(),
    "remove": lambda d: d.remove(),
    "merge": lambda d: d.merge(),
    "save_finetuned": lambda d: d.save_finetuned("x"),
    "finetuned": lambda d: d.finetuned(),
    "load_finetuned": lambda d: d.load_finetuned("x"),
    "to_peft": lambda d: d.to_peft("x"),
    "freeze_module": lambda d: d.freeze_module(),
    "trainable_mask": lambda d: d.trainable_mask(),
    "partition": lambda d: d.partition(),
    "optimizer": lambda d: d.optimizer(None),
    "init": lambda d: d.init(0),
    "own": lambda d: d.own({}),
    "insert": lambda d: d.insert_sequential_module("first", nn.Dense(8)),
    "movement": lambda d: d.movement(),
    "log": lambda d: d.log(),
    "status": lambda d: d.status(),
    "disabled": lambda d: d.disabled().__enter__(),
    "without": lambda d: jdelta.without(d.backbone_model.params, d),
}


@pytest.mark.parametrize("verb", breadth(VERBS, *list(VERBS)[::4]))
def test_a_removed_delta_says_so_even_if_another_has_its_name(net, verb):
    delta = lora(net)
    delta.remove()
    again = lora(net)
    before = net.module, net.params
    with pytest.raises(RuntimeError, match="'lora' was removed"):
        VERBS[verb](delta)
    assert (net.module, net.params) == before
    assert again.attached


def test_a_tree_of_ones_own_can_be_pruned_after_the_delta_was_removed(net):
    bare = jax.tree.structure(net.params)
    delta = lora(net, name="x")
    params = net.params
    delta.remove()
    assert jax.tree.structure(jdelta.prune(params, delta)) == bare


@pytest.mark.parametrize("biased", [True, False])
def test_what_was_merged_stays_when_the_delta_is_removed(biased):
    net = backbone(biased)
    delta = jdelta.BitFitModel(net, modified_modules=["first", "second"])
    one = lora(net)
    train_deltas(delta)
    train_deltas(one)
    y = net(X)
    delta.merge()
    one.merge()
    for gone in (one, delta):
        assert jnp.allclose(net(X), y, atol=1e-5)
        gone.remove()
    assert jnp.allclose(net(X), y, atol=1e-5)
    if biased:
        assert attachments_of(net.module) == ()


def test_a_bias_that_merging_left_behind_is_added_once_however_many_deltas_went():
    net = backbone(biased=False)
    held = []
    for _ in range(3):
        delta = jdelta.BitFitModel(net, modified_modules=["first", "second"])
        train_deltas(delta)
        y = net(X)
        delta.merge()
        assert jnp.allclose(net(X), y, atol=1e-6)
        held.append(delta)
    del delta, held[1:]  # one of them is held
    lora(net)
    assert jnp.allclose(net(X), y, atol=1e-6)


# --- nobody holds it


@pytest.mark.slow
def test_a_detached_delta_that_nobody_holds_does_not_stay(net):
    for _ in range(3):
        delta = lora(net)
        assert delta.name == "lora"
        delta.detach()
        del delta
        gc.collect()
    last = lora(net, name="last")
    assert [a.name for a in attachments_of(net.module)] == ["last"]
    last.remove()
    assert attachments_of(net.module) == ()


@pytest.mark.slow
def test_an_attached_delta_that_nobody_holds_stays_and_computes(net):
    train_deltas(lora(net))
    gc.collect()
    y = net(X)
    other = lora(net, name="other")
    assert (net(X) == y).all()
    other.remove()
    assert (net(X) == y).all()
    assert [a.name for a in attachments_of(net.module)] == ["lora"]


def test_a_detached_delta_that_somebody_holds_stays_also_as_a_copy(net):
    delta = lora(net)
    train_deltas(delta)
    y = net(X)
    delta.detach()
    mine = copy.deepcopy(delta)
    for held in (delta, mine):
        other = lora(held.backbone_model)
        assert other.name == "lora_2"
        other.remove()
        held.attach()
        assert (held.backbone_model(X) == y).all()


@pytest.mark.slow
def test_cycles_of_attaching_and_detaching_leave_nothing(net):
    """A few stand for many: what grew, grew with each."""
    counts = []
    for i in range(9):
        delta = lora(net)
        net(X)
        delta.detach()
        if i % 2:
            delta.attach()
            delta.remove()
        del delta
        if i in (4, 8):
            gc.collect()
            counts.append((len(Net.__subclasses__()), len(attachments_of(net.module)), len(net.cache)))
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_the_ids_of_prompts_do_not_count_up():
    model = fresh("gpt2", "FlaxGPT2LMHeadModel")
    ranges = []
    for _ in range(3):
        delta = jdelta.SoftPromptModel(model, soft_token_num=2)
        ranges.append(delta._state.attachment.edits[0].layer.prompt_ids)
        delta.detach()
        del delta
        gc.collect()
    assert ranges[1:] == ranges[:-1]
    assert "_jdelta_original" not in vars(type(model))


# --- the same again


@pytest.mark.parametrize(
    "make",
    [
        jdelta.LoraModel,
        lambda model: jdelta.AutoDeltaModel.from_config(jdelta.LoraConfig(lora_r=2), model),
        *(
            pytest.param(make, marks=pytest.mark.slow)
            for make in (
                lambda model: jdelta.LoraModel(model, modified_modules=["query"] * 2),
                jdelta.AdapterModel,
                lambda model: jdelta.PrefixModel(model, embed_dim=4, mid_dim=4),
            )
        ),
    ],
)
def test_the_same_delta_a_second_time_is_a_warning_that_names_the_first(bert, make):
    first = make(bert)
    with pytest.warns(UserWarning, match=rf"delta '{first.name}'.*'{first.name}_2'.*remove\(\).*detach\(\).*name="):
        make(bert)


@pytest.mark.parametrize(
    "second",
    [
        {"name": "meant"},
        {"lora_r": 3},
        {"modified_modules": ["first"]},
        {"lora_alpha": 4},
    ],
)
def test_another_name_and_another_delta_are_no_cause_for_a_warning(net, second):
    lora(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora(net, **second)


def test_after_the_ways_out_there_is_no_warning(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = lora(net)
        first.remove()
        second = lora(net)
        second.detach()
        third = lora(net)
        assert third.name == "lora_2"
        jdelta.DeltaModel(net)
        jdelta.DeltaModel(net)


def test_patterns_that_mean_the_same_modules_are_the_same(net):
    lora(net)
    with pytest.warns(UserWarning, match="of the same arguments is attached to the same modules"):
        lora(net, modified_modules=["[r](first|second)"])


def test_a_delta_that_was_loaded_twice_is_a_warning(net, tmp_path):
    delta = lora(net)
    train_deltas(delta)
    delta.save_finetuned(tmp_path)
    delta.remove()
    jdelta.AutoDeltaModel.from_finetuned(tmp_path, net)
    with pytest.warns(UserWarning, match="delta 'lora' of the same arguments"):
        jdelta.AutoDeltaModel.from_finetuned(tmp_path, net)


def test_configurations_of_attachments_pickle(net):
    lora(net)
    assert pickle.loads(pickle.dumps(attachments_of(net.module)[0].config)) == attachments_of(net.module)[0].config
