"""Fused attention against the models' own: equal results, really used, undone without a trace.

Tolerance 1e-5 of the largest entry, in float32. Whether cuDNN is chosen is tested, and that JAX takes what it is asked
for and lowers it; its run is not.
"""

import functools
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from conftest import fresh, train_deltas
from flax import linen as nn
from flax.linen import dot_product_attention_weights
from tiers import breadth

import jdelta
from jdelta.trees import surgery

own = sys.modules["jdelta.speedups.fused_attention"]

IDS = jnp.array([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
MASK = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
BERT, GPT2, LLAMA, T5, BART = (
    "FlaxBertForSequenceClassification",
    "FlaxGPT2LMHeadModel",
    "FlaxLlamaForCausalLM",
    "FlaxT5ForConditionalGeneration",
    "FlaxBartForConditionalGeneration",
)
# What differs: head masks, shared layers, images with a learned bias, alibi, rotary and shared keys, blocks of local
# attention, T5's biases, cross-attention.
NUMBERS = [BERT, GPT2, LLAMA, BART, "FlaxBloomForCausalLM", "FlaxBeitForImageClassification"]
NUMBERS += ["FlaxLongT5ForConditionalGeneration"]
OWN_SOFTMAX = "it computes a softmax of its own"
# How often a model of one layer computes attention, if not once.
ENCODER_DECODER = "bart blenderbot blenderbot-small encoder-decoder longt5 marian mbart mt5 pegasus t5 whisper"
ENCODER_DECODER += " speech-encoder-decoder vision-encoder-decoder"
CALLS = {"clip": 2, "vision-text-dual-encoder": 2, "gpt_neo": 2, **dict.fromkeys(ENCODER_DECODER.split(), 3)}
WITHOUT = {"distilbert": OWN_SOFTMAX, "resnet": "no module calls", "regnet": "no module calls"}


def random(shapes, seed=0):
    """Weights under which what comes out depends on everything."""
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(treedef, [jnp.asarray(0.4 * rng.standard_normal(leaf.shape), "f4") for leaf in leaves])


def small(class_name, changes=None, **kwargs):
    """A model of one layer that holds no parameters, and random ones."""
    model = zoo.build(
        class_name, {**zoo.one_layer(zoo.family_of(class_name)), **(changes or {})}, _do_init=False, **kwargs
    )
    return model, random(model.params_shape_tree)


def padded(model):
    """Inputs with padding, where the model takes masks."""
    batch = zoo.inputs(model)
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if ids in batch:
            batch[mask] = jnp.ones_like(batch[ids]).at[1, -3:].set(0)
    return batch


def close(found, expected, tolerance=1e-5):
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, atol=tolerance * scale, rtol=0)


def gradients(model, params, **batch):
    """The outputs and the gradients of something that depends on all of them."""

    def loss(params):
        leaves = jax.tree.leaves(dict(model(**batch, params=params)))
        floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum((jnp.tanh(leaf) ** 2).mean() for leaf in floats), floats

    return jax.jit(jax.grad(loss, has_aux=True))(params)


@pytest.fixture
def uses(monkeypatch):
    """Notes the shapes of the queries that fused attention was computed for."""
    seen, attend = [], own.attend

    def noting(query, *args):
        seen.append(query.shape)
        return attend(query, *args)

    monkeypatch.setattr(own, "attend", noting)
    return seen


# --- equal numbers


@pytest.mark.parametrize("class_name", breadth(NUMBERS, BERT, LLAMA))
def test_outputs_and_gradients_are_the_models_own(class_name):
    model, params = small(class_name)
    batch = padded(model)
    expected = gradients(model, params, **batch)
    jdelta.fused_attention(model)
    found = gradients(model, params, **batch)
    for f, e in zip(found, expected, strict=True):
        close(f, e)


@pytest.mark.slow
def test_they_are_so_with_the_attention_of_jax_nn(monkeypatch):
    """What runs elsewhere than on a CPU, without cuDNN: here with biases and local blocks."""
    monkeypatch.setattr(own, "_backend", lambda: "tpu")
    called, attend = [], jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: (called.append(k), attend(*a, **k))[1])
    model, params = small("FlaxLongT5ForConditionalGeneration")
    batch = padded(model)
    expected = gradients(model, params, **batch)
    assert not called
    fused = jdelta.fused_attention(model)
    called.clear()
    found = gradients(model, params, **batch)
    assert called == [{"implementation": "xla"}] * len(fused.targets)
    for f, e in zip(found, expected, strict=True):
        close(f, e)


@pytest.mark.parametrize(
    ("bias", "mask"),
    [
        ((), None),
        ((5, 7), None),
        ((4, 5, 7), None),
        ((1, 4, 5, 7), None),
        ((3, 1, 1, 7), (5, 7)),
        ((2, 1, 1, 5, 7), None),
        ((1, 3, 4, 1, 7), (2, 1, 1, 1, 7)),
        (None, (2, 3, 4, 5, 7)),
        (None, None),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_biases_and_masks_of_all_shapes_mean_what_they_mean_in_flax(bias, mask, backend, monkeypatch):
    monkeypatch.setattr(own, "_backend", lambda: backend)
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 3, n, 4, 8)), jnp.float32) for n in (5, 7, 7))
    bias = None if bias is None else jnp.asarray(rng.normal(size=bias), jnp.float32)
    mask = None if mask is None else jnp.asarray(rng.random(mask) < 0.5).at[..., :2, :].set(False)  # whole rows too
    expected = nn.dot_product_attention(query, key, value, bias, mask, deterministic=True)
    close(own.attend(query, key, value, bias, mask), expected)


@pytest.mark.parametrize("class_name", breadth([GPT2, LLAMA, BART, T5], LLAMA, T5))
def test_generation_with_a_cache_gives_the_same_tokens(class_name, uses):
    model, params = small(class_name, {"eos_token_id": 999})
    # Greedily, random encoder-decoders say one word over and over.
    how = {"do_sample": model.config.is_encoder_decoder, "prng_key": jax.random.key(0), "max_length": 12}

    def generate():
        return jax.jit(lambda p: model.generate(IDS, attention_mask=MASK, params=p, **how).sequences)(params)

    expected = generate()
    jdelta.fused_attention(model)
    uses.clear()
    assert (generate() == expected).all()
    assert (2, 1, 2, 8) in uses  # one token at a time
    assert len(np.unique(expected)) > 4


@pytest.mark.parametrize(
    "class_name", breadth(["FlaxBertModel", "FlaxLlamaModel", "FlaxT5EncoderModel"], "FlaxLlamaModel")
)
def test_half_precision_stays_and_is_as_exact_as_it_was(class_name, uses):
    model, params = small(class_name, dtype=jnp.bfloat16)
    batch = zoo.inputs(model, 4, 16)

    def run(model):
        return jax.jit(lambda p: model(**batch, params=p).last_hidden_state)(params)

    exact, own_error = run(small(class_name)[0]), run(model)
    jdelta.fused_attention(model)
    uses.clear()
    found = run(model)
    assert len(uses) == 1
    assert found.dtype == own_error.dtype
    theirs, ours = (float(((states - exact) ** 2).mean()) ** 0.5 for states in (own_error, found))
    assert 1e-4 < ours < 1.1 * theirs


# --- where it is used


@pytest.mark.parametrize("family", breadth(zoo.REPRESENTATIVE, "bert", "gpt2", "whisper", "resnet"))
def test_every_attention_of_every_family_is_computed_so(family, uses):
    class_name = zoo.REPRESENTATIVE[family]
    model = zoo.build(class_name, zoo.one_layer(family), _do_init=False)
    if family in WITHOUT:
        with pytest.raises(ValueError, match=f"nothing in {class_name} can be changed.*{WITHOUT[family]}"):
            jdelta.fused_attention(model)
        return
    fused = jdelta.fused_attention(model)
    assert not fused.left
    uses.clear()
    batch = zoo.inputs(model)
    jax.eval_shape(lambda p: jax.tree.leaves(dict(model(**batch, params=p))), model.params_shape_tree)
    assert len(uses) == CALLS.get(family, 1)


def test_only_the_innermost_module_is_changed_and_the_text_folds_the_names():
    model = zoo.build("FlaxEncoderDecoderModel", _do_init=False)
    fused = jdelta.fused_attention(model)
    assert fused.targets[:2] == [f"encoder.encoder.layer.{i}.attention.self" for i in range(2)]
    assert repr(fused) == (
        "6 attention modules: encoder.encoder.layer.[0-1].attention.self, "
        "decoder.bert.encoder.layer.[0-1].attention.self, decoder.bert.encoder.layer.[0-1].crossattention.self"
    )


def test_what_is_left_alone_is_said_with_the_reason():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.MultiHeadDotProductAttention(2, precision="highest", name="precise")(x)
            return nn.MultiHeadDotProductAttention(2, name="plain")(x)

    x = jnp.ones((1, 3, 4))
    model = jdelta.Backbone(Two(), dummy_inputs=(x,))
    fused = jdelta.fused_attention(model)
    reason = "it asks for products of a special precision or kind"
    assert (fused.targets, fused.left) == (["plain"], {"precise": reason})
    assert repr(fused) == f"1 attention modules: plain; left: precise ({reason})"


def test_block_sparse_big_bird_is_left_alone():
    model = zoo.build("FlaxBigBirdForSequenceClassification", {"attention_type": "block_sparse"}, _do_init=False,
                      input_shape=(1, 64))  # fmt: skip
    with pytest.raises(ValueError, match=r"layer\.\[0-1\]\.attention\.self \(its attention is block-sparse"):
        jdelta.fused_attention(model)


class OfOnesOwn(nn.Module):
    """Attention by Flax's functions, one of them imported by name, with letters of its own in the products."""

    @nn.compact
    def __call__(self, x):
        query, key, value = (nn.DenseGeneral((2, 4), name=name)(x) for name in ("query", "key", "value"))
        weights = dot_product_attention_weights(query, key, deterministic=True)
        query = query + jnp.einsum("bnij, bjnw -> binw", weights, value)
        return nn.dot_product_attention(query, key, value, deterministic=True)


@pytest.mark.parametrize("module", [OfOnesOwn(), nn.MultiHeadDotProductAttention(2, dropout_rate=0.1)])
def test_linen_modules_of_ones_own_are_served(module, uses):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    kwargs = {"deterministic": True} if isinstance(module, nn.MultiHeadDotProductAttention) else {}
    params = random(jax.eval_shape(lambda: module.init(jax.random.key(0), x, **kwargs))["params"])
    model = jdelta.Backbone(module, params, (x,), kwargs)
    if kwargs:
        kwargs["mask"] = nn.make_causal_mask(jnp.ones((2, 5)))
    expected = model(x, **kwargs)
    assert repr(jdelta.fused_attention(model)) == "1 attention modules: the root module"
    uses.clear()
    close(model(x, **kwargs), expected)
    assert uses == [(2, 5, 2, 4)] * (1 if kwargs else 2)


def test_inside_scan_and_remat(uses):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.MultiHeadDotProductAttention(2)(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scanned(name="layers")(x, None)[0]

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    params = random(jax.eval_shape(lambda: Stack().init(jax.random.key(0), x))["params"])
    model = jdelta.Backbone(Stack(), params, (x,))
    run = [jax.jit(jax.value_and_grad(lambda p: (model(x, params=p) ** 2).mean())) for _ in range(2)]
    expected = run[0](params)
    jdelta.fused_attention(model)
    uses.clear()
    close(run[1](params), expected)
    assert uses


def test_gradient_checkpointing_changes_nothing():
    plain, params = small(BERT)
    expected = gradients(plain, params, **padded(plain))
    model, _ = small(BERT)
    model.enable_gradient_checkpointing()
    jdelta.fused_attention(model)
    for f, e in zip(gradients(model, params, **padded(model)), expected, strict=True):
        close(f, e)


# --- the weights themselves


@pytest.mark.parametrize(
    ("class_name", "compiled"),
    [(BERT, True), (BART, False), (LLAMA, True), (T5, True)],
)
@pytest.mark.slow
def test_attentions_are_given_when_asked_for(class_name, compiled):
    model, params = small(class_name)
    batch = padded(model)

    def run(p):
        return dict(model(**batch, params=p, output_attentions=True))

    expected = (jax.jit(run) if compiled else run)(params)
    jdelta.fused_attention(model)
    found = (jax.jit(lambda p: run(p)) if compiled else run)(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
    close(found, expected)
    assert [key for key in found if "attentions" in key]


def test_a_mask_of_heads_keeps_them_fused(uses):
    model, params = small(BERT)
    factors = jnp.array([[0.0, 0.7]])

    def run(params, factors):
        return model(IDS, MASK, params=params, head_mask=factors).logits.std()

    expected = jax.jit(jax.grad(run, (0, 1)))(params, factors)
    jdelta.fused_attention(model)
    uses.clear()
    close(jax.jit(jax.grad(lambda *a: run(*a), (0, 1)))(params, factors), expected)
    assert len(uses) == 1


# --- dropout


@pytest.mark.parametrize(("class_name", "field"), [(BERT, "attention_probs_dropout_prob"), (T5, "dropout_rate")])
@pytest.mark.slow
def test_dropout_of_attention_runs_the_models_own_and_says_so_once(class_name, field):
    model, params = small(class_name, {field: 0.3})
    batch = padded(model)

    def train():
        return jax.jit(lambda p: model(**batch, params=p, train=True, dropout_rng=jax.random.key(1)).logits)(params)

    expected = train()
    jdelta.fused_attention(model)
    with pytest.warns(UserWarning, match=rf"dropout of the attention weights is on \({field} = 0.3\)") as caught:
        found = [train(), train()]
    assert len(caught) == 1
    for logits in found:
        if class_name == T5:  # whose cross-attention has no dropout, and is fused
            close(logits, expected)
        else:
            chex.assert_trees_all_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_other_dropout_leaves_it_fused(uses):
    model, params = small(BERT, {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.3})

    def train():
        run = jax.jit(lambda p: model(IDS, MASK, params=p, train=True, dropout_rng=jax.random.key(1)).logits)
        return run(params)

    expected = train()
    jdelta.fused_attention(model)
    uses.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(train(), expected)
    assert len(uses) == 1


# --- with deltas


@pytest.mark.parametrize(
    ("class_name", "first"),
    [
        (BERT, "prefix"),
        (T5, "fused"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(BERT, "fused"), (LLAMA, "prefix"), (T5, "prefix"), (BART, "fused")]
        ),
    ],
)
@pytest.mark.slow
def test_with_a_prefix_it_is_what_the_prefix_is_without(class_name, first, uses):
    def prefixed(model):
        modules = (
            {"modified_modules": ["attn", "crossattn"], "common_structure": True} if class_name in (T5, BART) else {}
        )
        return jdelta.PrefixModel(model, prefix_token_num=3, reparameterize=False, **modules)

    plain, params = small(class_name)
    params = jdelta.graft(params, random(prefixed(plain).shapes(), 1))
    batch = padded(plain)
    expected = gradients(plain, params, **batch)
    model, _ = small(class_name)
    if first == "prefix":
        prefixed(model)
    fused = jdelta.fused_attention(model)
    if first == "fused":
        prefixed(model)
    uses.clear()
    found = gradients(model, params, **batch)
    assert len(uses) == len(fused.targets)
    for f, e in zip(found, expected, strict=True):
        close(f, e)


@pytest.mark.slow
def test_with_a_prefix_and_attentions_or_dropout_too(uses):
    model, params = small(BERT, {"attention_probs_dropout_prob": 0.3})
    delta = jdelta.PrefixModel(model, prefix_token_num=3, reparameterize=False)
    params = jdelta.graft(params, random(delta.shapes(), 1))

    def run():
        asked = dict(model(IDS, MASK, params=params, output_attentions=True, head_mask=jnp.array([[0.5, 2.0]])))
        return asked, model(IDS, MASK, params=params, train=True, dropout_rng=jax.random.key(1)).logits

    expected = run()
    jdelta.fused_attention(model)
    with pytest.warns(UserWarning, match="dropout"):
        found = run()
    close(found[0], expected[0])
    assert (found[1] == expected[1]).all()


@pytest.mark.slow
def test_deltas_come_and_go_in_any_order():
    model, plain = (fresh("bert", BERT) for _ in range(2))

    def logits(model):
        return jax.jit(lambda p: model(IDS, MASK, params=p).logits)(model.params)

    def deltas(model):
        kwargs = {"prefix_token_num": 2, "reparameterize": False}
        return jdelta.LoraModel(model, lora_r=2), *(jdelta.PrefixModel(model, **kwargs, rng=i) for i in range(2))

    before = logits(model)
    fused = jdelta.fused_attention(model)
    both = list(zip(deltas(model), deltas(plain), strict=True))
    close(logits(model), logits(plain))
    for delta in both[1]:
        delta.detach()
    fused.undo()
    chex.assert_trees_all_equal(logits(model), logits(plain))
    again = jdelta.fused_attention(model)
    for delta in both[1]:
        delta.attach()
    close(logits(model), logits(plain))
    for delta, _ in both:
        delta.detach()
    close(logits(model), before)
    again.undo()
    chex.assert_trees_all_equal(logits(model), before)


@pytest.mark.slow
def test_a_delta_trains_shards_logs_and_saves_as_without_it(tmp_path, capsys):
    model, plain = (fresh("bert", BERT) for _ in range(2))
    fused = jdelta.fused_attention(model)
    delta, other = (jdelta.LoraModel(m, lora_r=2) for m in (model, plain))
    for d in (delta, other):
        d.freeze_module(exclude=["deltas", "classifier"])
    chex.assert_trees_all_equal(delta.partition(), other.partition())
    texts = [(d.log(), capsys.readouterr().out)[1] for d in (delta, other)]
    assert texts[0] == texts[1] != ""
    specs = jax.tree.map(lambda _: jax.sharding.PartitionSpec(), model.params)
    assert delta.partition_specs(specs) == other.partition_specs(specs)
    for d in (delta, other):
        train_deltas(d)
    delta.save_finetuned(tmp_path)
    copy = fresh("bert", BERT)
    jdelta.fused_attention(copy)
    jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=copy)
    chex.assert_trees_all_equal(copy.params, model.params)
    assert (copy(IDS, MASK).logits == model(IDS, MASK).logits).all()
    delta.merge()
    close(model(IDS, MASK).logits, plain(IDS, MASK).logits)
    delta.unmerge()
    fused.undo()


# --- on and off


def test_undoing_gives_the_models_own_outputs_bit_for_bit_and_its_own_class():
    model = fresh("bert", BERT)
    module, params, expected = model.module, surgery.flatten(model.params), model(IDS, MASK).logits
    fused = jdelta.fused_attention(model)
    assert all(surgery.flatten(model.params)[path] is leaf for path, leaf in params.items())
    assert surgery.flatten(model.params).keys() == params.keys()
    fused.undo()
    assert model.module is module
    assert (model(IDS, MASK).logits == expected).all()
    with pytest.raises(RuntimeError, match="undone already"):
        fused.undo()


def test_twice_is_an_error_that_names_the_way_back():
    model = zoo.build(BERT, _do_init=False)
    first = jdelta.fused_attention(model)
    with pytest.raises(RuntimeError, match=r"fused already. Call undo\(\) first"):
        jdelta.fused_attention(model)
    first.undo()
    second = jdelta.fused_attention(model)
    with pytest.raises(RuntimeError, match="undone already"):
        first.undo()
    assert second.targets == first.targets


def test_other_models_are_not_changed(uses):
    jdelta.fused_attention(zoo.build(BERT, _do_init=False))
    uses.clear()
    other, params = small(BERT)
    jax.eval_shape(lambda p: other(IDS, params=p).logits, params)
    assert not uses


def test_what_is_no_model_is_an_error():
    with pytest.raises(TypeError, match=r"expected a Flax model of transformers, a jdelta\.Backbone or an nnx module"):
        jdelta.fused_attention(3)


# --- which computation


@pytest.mark.parametrize(
    ("backend", "dtype", "width", "lengths", "kind"),
    [
        ("cpu", "bfloat16", 64, (8, 8), "cpu"),
        ("cuda", "bfloat16", 64, (8, 8), "cudnn"),
        ("cuda", "float16", 128, (4, 8), "cudnn"),
        ("cuda", "float32", 64, (8, 8), "xla"),
        ("cuda", "bfloat16", 60, (8, 8), "xla"),
        ("cuda", "bfloat16", 136, (8, 8), "xla"),
        ("cuda", "bfloat16", 64, (1, 8), "xla"),
        ("cuda", "bfloat16", 64, (8, 9), "xla"),
        ("gpu", "bfloat16", 64, (8, 8), "xla"),
        ("tpu", "bfloat16", 64, (8, 8), "xla"),
    ],
)
def test_cudnn_is_for_half_precision_on_gpus_that_have_it(backend, dtype, width, lengths, kind):
    assert own.chosen(backend, jnp.dtype(dtype), width, lengths) == kind


@pytest.fixture
def a_gpu(monkeypatch):
    """One as far as JAX asks about it before a program runs."""
    checks = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(checks, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(checks, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(own, "_backend", lambda: "cuda")


def lowered(function, *args):
    """The program for a GPU."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("class_name", "calls"),
    [
        (BERT, 1),
        (T5, 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(GPT2, 1), (LLAMA, 1), (BART, 3), ("FlaxWhisperForConditionalGeneration", 3)]
        ),
    ],
)
def test_what_cudnn_is_asked_for_passes_the_checks_of_jax_and_lowers(class_name, calls, a_gpu):
    """Forward and backward, of all attentions: with and without masks and biases, their own or of other lengths."""
    model = zoo.build(class_name, zoo.one_layer(zoo.family_of(class_name)), _do_init=False, dtype=jnp.bfloat16)
    delta = jdelta.LoraModel(model)
    trainable, frozen = delta.partition(jdelta.graft(model.params_shape_tree, delta.shapes()))
    batch = {key: jnp.concatenate([x] * 2, -1) if "ids" in key else x for key, x in zoo.inputs(model).items()}
    assert len(jdelta.fused_attention(model).targets) == calls

    def loss(trainable, frozen):
        return model(**batch, params=jdelta.combine(trainable, frozen))[0].astype(jnp.float32).sum()

    program = lowered(jax.grad(loss), trainable, frozen)
    assert program.count("@__cudnn$") == 2 * calls


def test_odd_lengths_are_not_cudnns(a_gpu):
    """JAX takes every attention in training for one with a bias, which has to have even lengths."""
    query = jax.ShapeDtypeStruct((2, 5, 2, 8), jnp.bfloat16)
    even = jax.ShapeDtypeStruct((2, 6, 2, 8), jnp.bfloat16)
    gradient = jax.grad(lambda *states: own.attend(*states).astype(jnp.float32).sum())
    assert "@__cudnn$" not in lowered(gradient, query, query, query)
    assert "@__cudnn$" in lowered(gradient, even, even, even)
    with pytest.raises(NotImplementedError, match="Unsupported sequence length"):
        lowered(jax.grad(lambda *s: own.attend(*s, kind="cudnn").astype(jnp.float32).sum()), query, query, query)


@pytest.mark.slow
def test_mapped_deltas_ask_for_another_implementation(a_gpu):
    """With JAX's batching rule for cuDNN, which does not take a mask that all heads share."""
    texts = []
    for implementation in (None, "xla"):
        model = zoo.build(BERT, zoo.one_layer("bert"), dtype=jnp.bfloat16)
        jdelta.fused_attention(model, implementation)
        delta = jdelta.LoraModel(model)
        trainable, frozen = delta.partition()
        rows = jdelta.select(jdelta.stack([trainable] * 2), [0, 1])
        call = jdelta.rowwise(model, frozen)
        run = functools.partial(lowered, lambda rows, call=call: call(IDS, MASK, params=rows).logits, rows)
        if implementation is None:
            with pytest.raises(TypeError, match="cannot reshape"):
                run()
        else:
            texts.append(run())
    assert "@__cudnn$" not in texts[0]


def test_an_implementation_that_is_asked_for_is_taken(uses):
    """What runs elsewhere than on a CPU, and what cannot run on one."""
    model, params = small(BERT)
    expected = model(IDS, MASK, params=params).logits
    jdelta.fused_attention(model, "xla")
    close(model(IDS, MASK, params=params).logits, expected)
    other, _ = small(BERT)
    module = other.module
    with pytest.raises((RuntimeError, NotImplementedError)):
        jdelta.fused_attention(other, "cudnn")
    with pytest.raises(ValueError, match="implementation is 'cudnn', 'xla' or None, got 'flash'"):
        jdelta.fused_attention(other, "flash")
    assert other.module is module


def test_cudnn_gets_the_masks_in_its_shape_and_range(monkeypatch):
    monkeypatch.setattr(own, "_backend", lambda: "cuda")
    given = {}

    def cudnn(query, key, value, bias, mask, implementation):
        given.update(bias=bias, mask=mask, implementation=implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    query = jnp.ones((2, 4, 2, 8), jnp.bfloat16)
    own.attend(query, query, query, jnp.full((2, 1, 1, 4), jnp.finfo(jnp.float32).min), jnp.ones((1, 1, 4, 4), bool))
    assert (given["implementation"], given["mask"]) == ("cudnn", None)
    assert (given["bias"].shape, given["bias"].dtype) == ((2, 1, 4, 4), jnp.bfloat16)
    assert (given["bias"] == -(2.0**41)).all()  # as low as JAX goes itself, for cuDNN fails below
