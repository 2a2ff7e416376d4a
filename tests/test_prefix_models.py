"""Prefixes in whole models: generation, folding, placement, precision, dropout."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from tiers import breadth

import jdelta
from jdelta.trees import surgery

IDS = jnp.array([[5, 6, 7, 8], [9, 10, 11, 12]])
SMALL = {"prefix_token_num": 3, "embed_dim": 5, "mid_dim": 4}
BERT = "FlaxBertForSequenceClassification"
ENDLESS = {"eos_token_id": 999}  # generates up to max_length
GENERATING = {
    "FlaxGPT2LMHeadModel": {"n_layer": 1},
    "FlaxLlamaForCausalLM": {"num_hidden_layers": 1},  # one key head for two heads
    "FlaxOPTForCausalLM": {"num_hidden_layers": 1},
    "FlaxBloomForCausalLM": {"n_layer": 1},
    "FlaxGPTJForCausalLM": {"n_layer": 1},
    "FlaxT5ForConditionalGeneration": {"tie_word_embeddings": False},  # else it repeats itself
    "FlaxBartForConditionalGeneration": {"encoder_layers": 1, "decoder_layers": 1},
}


def prefixed(class_name, changes=None, reparameterize=False, **kwargs):
    """A model that holds no parameters, its delta, and random parameters, for which nothing was compiled."""
    model = zoo.build(class_name, changes, _do_init=False)
    delta = jdelta.PrefixModel(model, reparameterize=reparameterize, **SMALL, **kwargs)
    return model, delta, jdelta.graft(random(model.params_shape_tree), random(delta.shapes(), 1))


def random(shapes, seed=0):
    """Weights under which what comes out depends on everything."""
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(treedef, [jnp.asarray(0.4 * rng.standard_normal(leaf.shape), "f4") for leaf in leaves])


def generate(model, params, ids, **kwargs):
    """Without sampling; compiled as a whole, which is faster than transformers' first step outside the loop."""
    return jax.jit(lambda params: model.generate(ids, params=params, do_sample=False, **kwargs))(params)


@pytest.mark.parametrize("class_name", breadth(GENERATING, "FlaxGPT2LMHeadModel", "FlaxT5ForConditionalGeneration"))
def test_greedy_generation_with_a_cache_agrees_with_the_uncached_forward(class_name):
    seq2seq, length = class_name.endswith("ForConditionalGeneration"), 9
    hosts = ["attn", "crossattn"] if seq2seq else ["attn"]
    changes = {**ENDLESS, **GENERATING[class_name]}
    model, _, params = prefixed(class_name, changes, modified_modules=hosts, common_structure=True)
    found = generate(model, params, IDS, max_length=length).sequences

    @jax.jit
    def logits(params, text):
        kwargs = {"decoder_input_ids": text} if seq2seq else {}
        return model(IDS if seq2seq else text, params=params, **kwargs).logits

    start = 1 if seq2seq else IDS.shape[1]
    text = np.zeros((2, length), int)
    text[:, :start] = model.config.decoder_start_token_id if seq2seq else IDS
    for i in range(start, length):  # what comes later is not seen by what comes before
        text[:, i] = np.asarray(logits(params, jnp.asarray(text)))[:, i - 1].argmax(-1)
    assert (np.asarray(found) == text).all()
    assert len(np.unique(text)) > 2  # not one word over and over


@pytest.mark.parametrize(
    "class_name",
    breadth(
        [
            "FlaxGPT2LMHeadModel",
            "FlaxBertForSequenceClassification",
            "FlaxLlamaForCausalLM",
            "FlaxBartForConditionalGeneration",
        ],
        "FlaxGPT2LMHeadModel",
    ),
)
def test_shifted_positions_are_those_that_begin_after_the_prefix(class_name):
    model, _, params = prefixed(class_name)
    shifting, _, _ = prefixed(class_name, shift_positions=True)
    n = SMALL["prefix_token_num"]
    places = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    names, more = ["position_ids"], {}
    if model.config.is_encoder_decoder:
        names, more = ["position_ids", "decoder_position_ids"], {"decoder_input_ids": IDS}
    for given in (places, places[:, ::-1]):
        expected = model(IDS, params=params, **more, **dict.fromkeys(names, given + n)).logits
        assert (shifting(IDS, params=params, **more, **dict.fromkeys(names, given)).logits == expected).all()
        assert (model(IDS, params=params, **more, **dict.fromkeys(names, given)).logits != expected).any()
    assert (shifting(IDS, params=params, **more).logits != expected).any()


@pytest.mark.slow
def test_generation_with_shifted_positions_agrees_with_the_uncached_forward():
    model, _, params = prefixed("FlaxGPT2LMHeadModel", {**ENDLESS, "n_layer": 1}, shift_positions=True)
    plain, _, _ = prefixed("FlaxGPT2LMHeadModel", {**ENDLESS, "n_layer": 1})
    padded = jnp.concatenate([jnp.zeros((2, 2), int), IDS], axis=1)
    found = generate(model, params, IDS, max_length=9).sequences
    beside = generate(model, params, padded, max_length=11, attention_mask=(padded != 0).astype(int)).sequences
    assert (beside[:, 2:] == found).all()
    places = jnp.broadcast_to(jnp.arange(9), (2, 9)) + SMALL["prefix_token_num"]
    logits = plain(found, params=params, position_ids=places).logits
    length = IDS.shape[1]
    assert (logits[:, length - 1 : -1].argmax(-1) == found[:, length:]).all()


@pytest.mark.slow
def test_positions_that_are_none_or_too_few_cannot_be_shifted():
    with pytest.raises(TypeError, match="shift_positions needs a model that takes position_ids"):
        prefixed("FlaxT5ForConditionalGeneration", shift_positions=True)
    model, _, params = prefixed("FlaxGPT2LMHeadModel", {"n_positions": 8}, shift_positions=True)
    n = SMALL["prefix_token_num"]
    with pytest.raises(ValueError, match=f"{n} tokens of it and {9 - n} of the sequence make 9 positions, .* has 8"):
        model(jnp.ones((1, 9 - n), "i4"), params=params)
    assert model(jnp.ones((1, 8 - n), "i4"), params=params).logits.shape == (1, 8 - n, model.config.vocab_size)


def test_a_padded_prompt_generates_what_the_bare_prompt_does():
    """The mask of the cache, which knows nothing of the prefix, hides the padding and not the prefix."""
    model, _, params = prefixed("FlaxGPT2LMHeadModel", {**ENDLESS, "n_layer": 1})
    padded = jnp.concatenate([jnp.zeros((2, 2), int), IDS], axis=1)
    mask = (padded != 0).astype(int)
    found = generate(model, params, padded, attention_mask=mask, max_length=10).sequences
    expected = generate(model, params, IDS, max_length=8).sequences
    assert (found[:, 2:] == expected).all()


@pytest.mark.slow
def test_beams_with_a_prefix_score_what_the_uncached_forward_says():
    changes = {**ENDLESS, "length_penalty": 0.0, "encoder_layers": 1, "decoder_layers": 1}
    hosts = {"modified_modules": ["attn", "crossattn"], "common_structure": True}
    model, _, params = prefixed("FlaxBartForConditionalGeneration", changes, **hosts)
    found = generate(model, params, IDS, max_length=5, num_beams=2)
    logits = jax.jit(lambda p: model(IDS, decoder_input_ids=found.sequences[:, :-1], params=p).logits)(params)
    steps = jnp.take_along_axis(jax.nn.log_softmax(logits), found.sequences[:, 1:, None], axis=-1)[..., 0]
    chex.assert_trees_all_close(found.scores, steps.sum(1), atol=1e-4)


def test_on_some_layers_only_the_others_are_the_backbones():
    bare = zoo.build("FlaxGPT2LMHeadModel", _do_init=False)
    model, delta, params = prefixed("FlaxGPT2LMHeadModel", modified_modules=["1.attn"])
    assert delta.targets == ["transformer.h.1.attn"]
    before, after = (
        jax.jit(lambda p, m=m: m(IDS, params=p, output_hidden_states=True).hidden_states)(tree)
        for m, tree in ((bare, jdelta.prune(params, "prefix")), (model, params))
    )
    chex.assert_trees_all_close(after[:2], before[:2], rtol=1e-6, atol=1e-6)  # two programs: but for rounding
    assert np.abs(after[2] - before[2]).max() > 1e-4


@pytest.mark.slow
def test_folding_leaves_the_output_and_a_plain_prefix_that_trains_on():
    model = zoo.build(BERT)
    delta = jdelta.PrefixModel(model, **SMALL)
    names = {surgery.name_of(path) for path in surgery.flatten(delta.partition()[0])}
    assert {name.split(".")[1] for name in names} == {"embed", "down", "up"}
    base = jdelta.prune(model.params, "prefix")
    made = model(IDS).logits
    written = delta.materialise()
    assert not delta.config.reparameterize
    assert "prefix" not in model.params
    chex.assert_trees_all_equal(model.params, written)
    chex.assert_trees_all_close(model(IDS).logits, made, atol=1e-6)

    trainable, frozen = delta.partition()
    paths = surgery.flatten(trainable)
    assert {path[-2:] for path in paths} == {("prefix", "keys"), ("prefix", "values")}
    tx = delta.optimizer(optax.sgd(1.0))
    grads = jax.jit(jax.grad(lambda p: model(IDS, params=p).logits.std()))(model.params)
    updates, _ = tx.update(grads, tx.init(model.params), model.params)
    model.params = optax.apply_updates(model.params, updates)
    moved = delta.partition()
    chex.assert_trees_all_equal(moved[1], frozen)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(moved[0]), jax.tree.leaves(trainable), strict=True))

    trained, after = model.params, model(IDS).logits
    delta.detach()
    chex.assert_trees_all_equal(model.params, base)
    delta.attach()
    chex.assert_trees_all_equal(model.params, trained)
    assert (model(IDS).logits == after).all()
    with pytest.raises(ValueError, match="has nothing to materialise"):
        delta.materialise()


@pytest.mark.slow
def test_folding_where_the_user_holds_the_parameters():
    held, model = zoo.build(BERT), zoo.build(BERT, _do_init=False)
    deltas = [jdelta.PrefixModel(m, **SMALL, rng=7) for m in (held, model)]
    params = jdelta.graft(jdelta.prune(held.params, "prefix"), deltas[1].init(7))
    chex.assert_trees_all_equal(params, held.params)
    made = model(IDS, params=params).logits
    folded = deltas[1].materialise(params)
    chex.assert_trees_all_close(model(IDS, params=folded).logits, made, atol=1e-6)
    chex.assert_trees_all_equal_shapes(deltas[1].shapes(), deltas[1].partition(folded)[0])
    deltas[1].detach()
    chex.assert_trees_all_equal(jdelta.prune(folded, "prefix"), jdelta.prune(params, "prefix"))
    model(IDS, params=jdelta.prune(folded, "prefix"))


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing():
    plain, delta, params = prefixed(BERT, reparameterize=True)
    checkpointed = zoo.build(BERT, _do_init=False)
    checkpointed.enable_gradient_checkpointing()
    assert jdelta.PrefixModel(checkpointed, **SMALL).targets == delta.targets
    grads = [
        jax.jit(jax.grad(lambda p, model=model: model(IDS, params=p).logits.std()))(params)
        for model in (plain, checkpointed)
    ]
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads[0]))
    chex.assert_trees_all_close(*grads, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("class_name", "dtype"),
    [
        (BERT, "bfloat16"),
        ("FlaxDistilBertForSequenceClassification", "bfloat16"),
        ("FlaxT5ForConditionalGeneration", "bfloat16"),
        ("FlaxGPT2LMHeadModel", "float16"),
    ],
)
def test_half_precision_models_stay_in_half_precision(class_name, dtype):
    model = zoo.build(class_name, dtype=jnp.dtype(dtype), _do_init=False)
    delta = jdelta.PrefixModel(model, reparameterize=False)
    shapes = jdelta.graft(
        jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), model.params_shape_tree), delta.shapes()
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(delta.shapes())} == {jnp.dtype("float32")}
    kwargs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    run = jax.jit(lambda p: model(IDS, params=p, **kwargs).logits)
    assert run.eval_shape(shapes).dtype == dtype
    products = [line for line in run.lower(shapes).as_text().splitlines() if "dot_general" in line]
    assert products
    assert not [line for line in products if "f32" in line]


@pytest.mark.parametrize(
    "class_name", breadth([BERT, "FlaxDistilBertForSequenceClassification", "FlaxT5ForConditionalGeneration"], BERT)
)
def test_dropout_of_the_attention_reaches_the_prefix_and_gradients_are_finite(class_name):
    rate = {"attention_probs_dropout_prob": 0.5, "attention_dropout": 0.5, "dropout_rate": 0.5}
    others = {"hidden_dropout_prob": 0.0, "dropout": 0.0, "seq_classif_dropout": 0.0, "classifier_dropout": 0.0}
    model, delta, params = prefixed(class_name, {**others, **rate})
    trainable, frozen = delta.partition(params)
    kwargs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}

    @jax.jit
    def run(trainable, key):
        def loss(t):
            logits = model(IDS, params=jdelta.combine(t, frozen), train=True, dropout_rng=key, **kwargs).logits
            return logits.std()

        return jax.value_and_grad(loss)(trainable)

    one, again, other = (run(trainable, jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(one, again)
    assert one[0] != other[0]
    chex.assert_tree_all_finite(one)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(one[1]))
