"""Soft prompts, on every family that takes tokens.

The main oracle is Flax without jdelta: a backbone whose vocabulary has the prompt as further rows at its end, called
with their ids before the caller's. Where both run the same operations, they agree bit for bit; the tolerance is 1e-6 of
the largest entry, for what XLA may fuse differently.
"""

import copy
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
import zoo
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from tiers import breadth

import jdelta

N = 3
WORDS = 60
LENGTH = 7
TOLERANCE = 1e-6
PART = {"clip": "text_config", "vision-text-dual-encoder": "text_config", "encoder-decoder": "encoder"}
TOKENLESS = ("beit", "dinov2", "vit", "resnet", "regnet", "wav2vec2")
DECODER_ONLY_TOKENS = ("vision-encoder-decoder", "speech-encoder-decoder", "whisper")
FAMILIES = [family for family in zoo.REPRESENTATIVE if family not in TOKENLESS + DECODER_ONLY_TOKENS]
# pooled or classified from the caller's first or last position: checked by formulas below
POOLED = ("logits", "pooler_output", "text_embeds", "logits_per_text", "logits_per_image")
IDS = np.random.default_rng(1).integers(3, WORDS, (2, LENGTH))
MASK = np.array([[1] * LENGTH, [0, 0, *[1] * (LENGTH - 2)]])  # padded on the left
LEFT = {"input_ids": jnp.asarray(np.where(MASK, IDS, 0)), "attention_mask": jnp.asarray(MASK)}


def words(family, number):
    """What changes the number of words in a tiny configuration."""
    sizes = {"vocab_size": number}
    return {PART[family]: sizes} if family in PART else sizes


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = flatten_dict(dict(model.params_shape_tree))
    scale = {path: 0.3 if path[-1] != "scale" else 1 for path in shapes}
    made = {k: jnp.asarray(scale[k] * rng.normal(size=s.shape), jnp.float32) for k, s in shapes.items()}
    return unflatten_dict(made)


@functools.cache
def _bare(name):
    # FlaxEncoderDecoderModel.encode hands BERT the positions as token types, so there must be as many of these
    changes = {"encoder": {"type_vocab_size": 32}} if name == "FlaxEncoderDecoderModel" else {}
    model = zoo.build(name, changes, _do_init=False)
    return model, random_params(model)


def bare(name):
    """A tiny model with random weights."""
    model, params = _bare(name)
    model = copy.copy(model)
    model._is_initialized = True
    model.params = params
    return model


def attached(name, seed=2, **arguments):
    """A model with a random prompt, and its delta."""
    model = bare(name)
    return model, put_on(model, seed, **arguments)


def put_on(model, seed=2, **arguments):
    delta = jdelta.SoftPromptModel(model, **{"soft_token_num": N, **arguments})
    flat = flatten_dict(model.params)
    for i, path in enumerate(leaves_of(delta)):
        flat[path] = jnp.asarray(np.random.default_rng(seed + i).normal(size=flat[path].shape), jnp.float32)
    model.params = unflatten_dict(flat)
    return delta


FAST = {"xla_backend_optimization_level": 0}  # quick to compile


def run(model, params=None, **inputs):
    """One call, compiled as a whole."""
    return jax.jit(lambda p: model(**inputs, params=p), compiler_options=FAST)(params or model.params)


def generated(model, params=None, **asked):
    """What `generate` returns, compiled as a whole."""
    return jax.jit(lambda p: model.generate(**asked, params=p), compiler_options=FAST)(params or model.params)


def leaves_of(delta):
    return list(flatten_dict(delta.shapes()))


def close(found, expected, tolerance=TOLERANCE):
    assert found.shape == expected.shape
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() <= tolerance * scale, np.abs(found - expected).max() / scale


# --- against a larger vocabulary


# Built of the same parts as another: the matrix has them by shapes.
TWINS = ("blenderbot-small", "mbart", "marian", "mt5", "xlm-roberta", "mistral")


@pytest.mark.parametrize(
    "family", breadth([family for family in FAMILIES if family not in TWINS], "bert", "gpt2", "t5")
)
def test_a_prompt_is_tokens_of_a_larger_vocabulary(family):
    name = zoo.REPRESENTATIVE[family]
    larger = zoo.build(name, words(family, WORDS + N), _do_init=False)
    model = zoo.build(name, words(family, WORDS), _do_init=False)
    params = random_params(larger)
    flat = flatten_dict(params)
    cut = {path: flat[path][tuple(map(slice, s.shape))] for path, s in flatten_dict(model.params_shape_tree).items()}
    delta = jdelta.SoftPromptModel(model, soft_token_num=N)
    (leaf,) = leaves_of(delta)
    cut[leaf] = flat[(*leaf[:-2], "embedding")][WORDS:]

    inputs = zoo.inputs(name, length=LENGTH)
    mask = MASK
    ids = jnp.where(mask, inputs["input_ids"], 0)
    inputs |= {"input_ids": ids, "attention_mask": jnp.asarray(mask)}
    if family == "electra":  # whose default token type is 1; a prompt's is 0, as in PEFT
        inputs["token_type_ids"] = jnp.zeros_like(ids)
    prompt = jnp.broadcast_to(jnp.arange(WORDS, WORDS + N), (2, N))
    longer = {**inputs, "input_ids": jnp.concatenate([prompt, ids], 1)}
    longer["attention_mask"] = jnp.concatenate([jnp.ones_like(prompt), inputs["attention_mask"]], 1)
    if family == "electra":
        longer["token_type_ids"] = jnp.zeros_like(longer["input_ids"])
    more = {"output_hidden_states": True, "output_attentions": family != "longt5"}
    expected = run(larger, params, **longer, **more)
    found = run(model, unflatten_dict(cut), **inputs, **more)
    decodes = model.config.is_encoder_decoder or family in CAUSAL
    compared = compare(expected, found, mask, () if decodes else POOLED)
    assert compared >= 4


@pytest.mark.parametrize(
    "case",
    breadth(
        [
            ("bert", "FlaxBertForSequenceClassification"),
            ("bert", "FlaxBertModel"),
            ("roberta", "FlaxRobertaForSequenceClassification"),
            ("electra", "FlaxElectraForSequenceClassification"),
        ],
        ("bert", "FlaxBertForSequenceClassification"),
    ),
)
def test_a_pooler_reads_the_first_token_of_the_larger_vocabulary(case):
    family, name = case
    larger, model = (zoo.build(name, words(family, size), _do_init=False) for size in (WORDS + N, WORDS))
    params = random_params(larger)
    flat = flatten_dict(params)
    cut = {path: flat[path][tuple(map(slice, s.shape))] for path, s in flatten_dict(model.params_shape_tree).items()}
    (leaf,) = leaves_of(jdelta.SoftPromptModel(model, soft_token_num=N, pool_prompt=True))
    cut[leaf] = flat[(*leaf[:-2], "embedding")][WORDS:]
    ids = jnp.where(MASK, zoo.inputs(name, length=LENGTH)["input_ids"], 0)
    mask, types = jnp.asarray(MASK), jnp.zeros_like(ids)
    prompt = jnp.broadcast_to(jnp.arange(WORDS, WORDS + N), (*ids.shape[:-1], N))
    whole = [jnp.concatenate(pair, -1) for pair in ((prompt, ids), (jnp.ones_like(prompt), mask))]
    expected = run(larger, params, input_ids=whole[0], attention_mask=whole[1], token_type_ids=jnp.zeros_like(whole[0]))
    found = run(model, unflatten_dict(cut), input_ids=ids, attention_mask=mask, token_type_ids=types)
    for output in ("logits", "pooler_output"):
        if output in found:
            close(found[output], expected[output])
    if "last_hidden_state" in found:
        assert found.last_hidden_state.shape[1] == LENGTH
        close(found.last_hidden_state * mask[..., None], expected.last_hidden_state[:, N:] * mask[..., None])


def test_a_model_without_a_pooler_cannot_pool():
    for name in ("FlaxBertForTokenClassification", "FlaxDistilBertForSequenceClassification", "FlaxGPT2LMHeadModel"):
        with pytest.raises(TypeError, match="pool_prompt needs a pooler"):
            jdelta.SoftPromptModel(zoo.build(name, _do_init=False), soft_token_num=N, pool_prompt=True)


def compare(expected, found, mask, passed_over, key=""):
    """Compares what two calls return; of the first, without the prompt and its words. Returns how many arrays."""
    if hasattr(found, "keys"):
        assert list(expected) == list(found)
        return sum(compare(expected[k], found[k], mask, passed_over, k) for k in found if k not in passed_over)
    if isinstance(found, tuple):
        return sum(compare(e, f, mask, passed_over, key) for e, f in zip(expected, found, strict=True))
    expected, found = np.asarray(expected), np.asarray(found)
    if expected.ndim == 4:  # attention weights
        expected = expected[..., -found.shape[2] :, -found.shape[3] :]
    elif expected.ndim == 3:
        expected = expected[:, -found.shape[1] :, : found.shape[2]]
    if found.ndim > 2 and not key.startswith(("decoder", "cross")) and found.shape[-2] == LENGTH:
        real = np.where(mask, 1, 0)[:, :, None] if found.ndim == 3 else np.where(mask, 1, 0)[:, None, :, None]
        expected, found = expected * real, found * real  # padding attends to whatever
    close(found, expected)
    return 1


CAUSAL = ("bloom", "gemma", "gpt2", "gpt_neo", "gptj", "llama", "mistral", "opt", "xglm")


# --- heads see the caller's sequence


def test_an_encoder_pools_at_the_callers_first_token():
    model, _ = attached("FlaxBertForSequenceClassification")
    out = run(model, **LEFT, output_hidden_states=True)
    p = model.params
    dense = lambda layer, x: x @ layer["kernel"] + layer["bias"]  # noqa: E731
    pooled = jnp.tanh(dense(p["bert"]["pooler"]["dense"], out.hidden_states[-1][:, 0]))
    close(out.logits, dense(p["classifier"], pooled), 1e-5)  # sums in another order


@pytest.mark.slow
def test_clip_pools_at_the_callers_last_token():
    model, _ = attached("FlaxCLIPModel")
    inputs = zoo.inputs(model, length=LENGTH)
    text = model(**inputs).text_model_output
    assert text.last_hidden_state.shape[1] == LENGTH
    at = jnp.argmax(inputs["input_ids"], axis=1)  # as transformers finds the end with eos_token_id=2
    close(text.pooler_output, text.last_hidden_state[jnp.arange(2), at])
    features = model.get_text_features(inputs["input_ids"])
    close(model(**inputs).text_embeds, features / jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-5)


@pytest.mark.slow
def test_every_choice_gets_the_prompt():
    model, _ = attached("FlaxBertForMultipleChoice")
    ids = jnp.asarray(np.random.default_rng(0).integers(3, WORDS, (2, 4, LENGTH)))
    together = model(ids).logits
    apart = [model(ids[:, i : i + 1]).logits for i in range(4)]
    close(together, jnp.concatenate(apart, axis=1), 1e-5)


@pytest.mark.slow
def test_bart_classifies_at_the_callers_end():
    model, _ = attached("FlaxBartForSequenceClassification")
    inputs = zoo.inputs(model, length=LENGTH)
    out = run(model, **inputs, output_hidden_states=True)
    head, x = model.params["classification_head"], out.decoder_hidden_states[-1][:, -1]
    x = jnp.tanh(x @ head["dense"]["kernel"] + head["dense"]["bias"])
    close(out.logits, x @ head["out_proj"]["kernel"] + head["out_proj"]["bias"], 1e-5)


def test_question_answering_answers_for_the_callers_tokens():
    model, _ = attached("FlaxRobertaForQuestionAnswering")
    out = run(model, input_ids=IDS, output_hidden_states=True)
    head = model.params["qa_outputs"]
    start = (out.hidden_states[-1] @ head["kernel"] + head["bias"])[..., 0]
    close(out.start_logits, start, 1e-5)


@pytest.mark.parametrize(
    "name", breadth(["FlaxGPT2LMHeadModel", "FlaxBartForConditionalGeneration"], "FlaxGPT2LMHeadModel")
)
def test_a_tuple_holds_what_the_output_object_holds(name):
    model, _ = attached(name)
    inputs = {**zoo.inputs(model, length=LENGTH), "output_hidden_states": True, "output_attentions": True}
    named, plain = model(**inputs), model(**inputs, return_dict=False)
    chex.assert_trees_all_equal(tuple(jax.tree.leaves(plain)), tuple(jax.tree.leaves(named.to_tuple())))


# --- generation


CAUSAL_CLASSES = [zoo.REPRESENTATIVE[f] for f in ("gpt2", "llama", "opt", "gptj", "bloom", "gpt_neo")]
SEQ2SEQ_CLASSES = [zoo.REPRESENTATIVE[f] for f in ("t5", "bart", "encoder-decoder")]
OPEN_END = {"eos_token_id": 1000, "pad_token_id": 0}  # no word ends it


@pytest.mark.parametrize("name", breadth(CAUSAL_CLASSES, "FlaxGPT2LMHeadModel"))
def test_greedy_generation_is_that_of_the_uncached_forward(name):
    model, _ = attached(name)
    padded = name != "FlaxGPTJForCausalLM"  # whose own cache is wrong under padding, without jdelta too
    inputs = LEFT if padded else {"input_ids": jnp.asarray(IDS)}
    sequences = np.asarray(generated(model, **inputs, max_new_tokens=5, **OPEN_END).sequences)
    assert sequences.shape == (2, LENGTH + 5)
    assert (sequences[:, :LENGTH] == inputs["input_ids"]).all()
    assert (sequences < WORDS).all()
    mask = np.pad(MASK if padded else np.ones_like(MASK), ((0, 0), (0, 5)), constant_values=1)
    places = {} if name in ("FlaxOPTForCausalLM", "FlaxBloomForCausalLM") else {"position_ids": mask.cumsum(1) - 1}
    places = {key: jnp.asarray(np.maximum(value, 0)) for key, value in places.items()}
    logits = run(model, input_ids=jnp.asarray(sequences), attention_mask=jnp.asarray(mask), **places).logits
    assert (logits.argmax(-1)[:, LENGTH - 1 : -1] == sequences[:, LENGTH:]).all()


@pytest.mark.parametrize("name", SEQ2SEQ_CLASSES)
@pytest.mark.slow
def test_greedy_generation_of_an_encoder_decoder_is_that_of_the_uncached_forward(name):
    model, _ = attached(name)
    start = {"decoder_start_token_id": 2, "forced_bos_token_id": None}
    sequences = generated(model, **LEFT, max_length=6, **start, **OPEN_END).sequences
    assert sequences.shape == (2, 6)
    encoded = model.encode(**LEFT)
    logits = model.decode(sequences, encoded, encoder_attention_mask=LEFT["attention_mask"]).logits
    assert (logits.argmax(-1)[:, :-1] == sequences[:, 1:]).all()


@pytest.mark.slow
def test_generation_without_the_delta_is_the_backbones():
    model, delta = attached("FlaxGPT2LMHeadModel")
    lone = {"max_new_tokens": 5, **OPEN_END}
    one = LEFT["input_ids"][:1, :1]
    prompted = generated(model, input_ids=one, **lone).sequences
    cls = type(model)
    assert cls.__name__ == "FlaxGPT2LMHeadModel"
    assert isinstance(model, transformers.FlaxGPT2LMHeadModel)
    same = copy.copy(model).generate(one, **lone).sequences  # not compiled as a whole
    assert (same == prompted).all()
    delta.detach()
    assert type(model) is transformers.FlaxGPT2LMHeadModel
    expected = generated(bare("FlaxGPT2LMHeadModel"), input_ids=one, **lone).sequences
    assert (generated(model, input_ids=one, **lone).sequences == expected).all()
    assert (prompted != expected).any()
    delta.attach()
    assert (generated(model, input_ids=one, **lone).sequences == prompted).all()


@pytest.mark.parametrize("asked", [{"max_length": 17}, {"max_length": 12}, {"max_new_tokens": 4}, {}])
def test_lengths_do_not_count_the_prompt(asked, monkeypatch):
    """Observed where transformers hands them to its search; 17 + 3 is transformers' default, which it treats apart."""
    seen = {}

    def search(self, input_ids, max_length, *args, logits_processor, **kwargs):
        seen["lengths"] = (input_ids.shape[1], max_length, [p.min_length for p in logits_processor])
        return transformers.generation.flax_utils.FlaxGreedySearchOutput(sequences=jnp.zeros((2, max_length), int))

    monkeypatch.setattr(transformers.generation.flax_utils.FlaxGenerationMixin, "_greedy_search", search)
    model, _ = attached("FlaxGPT2LMHeadModel")
    assert bare("FlaxGPT2LMHeadModel").generate(IDS, **asked, min_length=9).sequences.ndim == 2
    length, longest, shortest = seen["lengths"]
    assert model.generate(IDS, **asked, min_length=9).sequences.shape == (2, longest)
    assert seen["lengths"] == (length + N, longest + N, [shortest[0] + N])


@pytest.mark.slow
def test_sampling_gives_words():
    model, _ = attached("FlaxGPT2LMHeadModel")
    asked = {"do_sample": True, "prng_key": jax.random.key(0), **OPEN_END}
    sampled = generated(model, **LEFT, max_new_tokens=4, **asked).sequences
    assert sampled.shape == (2, LENGTH + 4)
    assert (sampled < WORDS).all()


@pytest.mark.parametrize("name", ["FlaxGPT2LMHeadModel", "FlaxBartForConditionalGeneration"])
@pytest.mark.slow
def test_beams_are_those_of_a_larger_vocabulary(name):
    model, delta = attached(name)
    larger = zoo.build(name, {"vocab_size": WORDS + N}, _do_init=False)
    (leaf,) = leaves_of(delta)
    flat = flatten_dict(model.params)
    prompt = flat.pop(leaf)
    table = (*leaf[:-2], "embedding")
    flat[table] = jnp.concatenate([flat[table], prompt])
    if "final_logits_bias" in {path[-1] for path in flat}:
        flat[("final_logits_bias",)] = jnp.pad(flat[("final_logits_bias",)], ((0, 0), (0, N)))
    larger._adapt_logits_for_beam_search = lambda logits: logits.at[..., WORDS:].set(-jnp.inf)
    ids = jnp.concatenate([jnp.broadcast_to(jnp.arange(WORDS, WORDS + N), (2, N)), LEFT["input_ids"]], 1)
    mask = jnp.pad(LEFT["attention_mask"], ((0, 0), (N, 0)), constant_values=1)
    asked = {"max_new_tokens": 4, "num_beams": 3, "eos_token_id": 2, "pad_token_id": 0}
    found = generated(model, **LEFT, **asked)
    expected = generated(larger, unflatten_dict(flat), input_ids=ids, attention_mask=mask, **asked)
    sequences = expected.sequences if model.config.is_encoder_decoder else expected.sequences[:, N:]
    assert (found.sequences == sequences).all()
    close(found.scores, expected.scores, 1e-5)  # log-softmax over words or words and prompt


def test_generation_with_parameters_held_elsewhere():
    model, _ = attached("FlaxLlamaForCausalLM")
    outside, _ = _bare("FlaxLlamaForCausalLM")
    outside = copy.copy(outside)
    jdelta.SoftPromptModel(outside, soft_token_num=N)
    asked = {"max_new_tokens": 3, **OPEN_END}
    found = generated(outside, model.params, **LEFT, **asked).sequences
    assert (found == generated(model, **LEFT, **asked).sequences).all()


# --- encode and decode by hand


@pytest.mark.parametrize("name", SEQ2SEQ_CLASSES[:2])
@pytest.mark.slow
def test_encode_and_decode_are_the_whole_call(name):
    model, _ = attached(name)
    decoder_ids = jnp.asarray(IDS[:, :4])
    expected = run(model, **LEFT, decoder_input_ids=decoder_ids).logits
    encode, decode = jax.jit(model.encode), jax.jit(model.decode)
    encoded = encode(**LEFT)
    assert encoded.last_hidden_state.shape[1] == N + LENGTH
    found = decode(decoder_ids, encoded, encoder_attention_mask=LEFT["attention_mask"])
    close(found.logits, expected, 1e-5)  # compiled and not
    full = decode(decoder_ids, encode(LEFT["input_ids"])).logits
    close(full, run(model, input_ids=LEFT["input_ids"], decoder_input_ids=decoder_ids).logits, 1e-5)

    cache = model.init_cache(2, 4, encoded)
    steps = []
    for i in range(4):
        places = {} if "T5" in name else {"decoder_position_ids": jnp.full((2, 1), i)}
        step = decode(
            decoder_ids[:, i : i + 1],
            encoded,
            encoder_attention_mask=LEFT["attention_mask"],
            past_key_values=cache,
            decoder_attention_mask=jnp.ones((2, 4), int),
            **places,
        )
        cache = step.past_key_values
        steps.append(step.logits)
    close(jnp.concatenate(steps, 1), expected, 1e-5)


# --- wrapped models


class Wrapped(nn.Module):
    """A user's model around BERT."""

    config: transformers.BertConfig

    @nn.compact
    def __call__(self, ids, mask):
        from transformers.models.bert.modeling_flax_bert import FlaxBertModule

        bert = FlaxBertModule(self.config, add_pooling_layer=False, name="bert")
        places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return nn.Dense(4)(bert(ids, mask, token_type_ids=jnp.zeros_like(ids), position_ids=places)[0])


class Own(nn.Module):
    """A transformer that the common names do not know; its root takes the ids."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(WORDS, 8, name="embed")(ids)
        x = x + nn.Embed(32, 8, name="places")(jnp.arange(ids.shape[1]))
        for i in range(2):
            x = x + nn.MultiHeadDotProductAttention(2, name=f"attend_{i}")(x)
            x = x + nn.Dense(8, name=f"mix_{i}")(nn.gelu(x))
        return nn.Dense(WORDS, name="head")(x)


def test_a_prompt_inside_a_users_module():
    config = zoo.config("bert")
    ids, mask = LEFT["input_ids"], LEFT["attention_mask"]
    model = jdelta.Backbone(Wrapped(config), Wrapped(config).init(jax.random.key(0), ids, mask)["params"], (ids, mask))
    put_on(model)
    found = model(ids, mask)
    assert found.shape == (2, LENGTH, 4)
    inner, _ = attached("FlaxBertModel")
    inner.params = {**bare("FlaxBertModel").params, **model.params["bert"]}
    states = inner(ids, mask).last_hidden_state
    head = model.params["Dense_0"]
    close(found, states @ head["kernel"] + head["bias"], 1e-5)


@pytest.mark.slow
def test_a_prompt_in_a_model_of_ones_own():
    module = Own()
    params = module.init(jax.random.key(0), IDS)["params"]
    backbone = jdelta.Backbone(module, params, dummy_inputs=(IDS,))
    delta = put_on(backbone, modified_modules=["embed"])
    assert delta.targets == ["embed"]
    prompt = flatten_dict(backbone.params)[leaves_of(delta)[0]]
    table = jnp.concatenate([params["embed"]["embedding"], prompt])

    class Larger(Own):
        @nn.compact
        def __call__(self, ids):
            x = table[ids] + nn.Embed(32, 8, name="places")(jnp.arange(ids.shape[1]))
            for i in range(2):
                x = x + nn.MultiHeadDotProductAttention(2, name=f"attend_{i}")(x)
                x = x + nn.Dense(8, name=f"mix_{i}")(nn.gelu(x))
            return nn.Dense(WORDS, name="head")(x)

    longer = np.concatenate([np.broadcast_to(np.arange(WORDS, WORDS + N), (2, N)), IDS], 1)
    close(backbone(IDS), Larger().apply({"params": params}, longer)[:, N:])


# --- initial values


def test_a_prompt_starts_at_the_first_words():
    for n in (N, WORDS + 5):  # and again from the beginning
        model = bare("FlaxT5EncoderModel")
        delta = jdelta.SoftPromptModel(model, soft_token_num=n)
        table = model.params["shared"]["embedding"]
        prompt = flatten_dict(model.params)[leaves_of(delta)[0]]
        assert (prompt == table[jnp.arange(n) % WORDS]).all()


def test_a_prompt_starts_at_random():
    model = bare("FlaxBertModel")
    delta = jdelta.SoftPromptModel(model, soft_token_num=20, token_init=False, init_range=0.25)
    prompt = flatten_dict(model.params)[leaves_of(delta)[0]]
    assert 0.23 < jnp.abs(prompt).max() <= 0.25
    assert jnp.abs(prompt.mean()) < 0.03  # 320 numbers: four standard errors


@pytest.mark.slow
def test_values_for_parameters_held_elsewhere():
    model, params = _bare("FlaxBertModel")
    model = copy.copy(model)
    delta = jdelta.SoftPromptModel(model, soft_token_num=N)
    with pytest.raises(ValueError, match=r"delta.init\(rng, params\)"):
        delta.init(0)
    made = jax.jit(delta.init)(jax.random.key(0), params)
    (prompt,) = jax.tree.leaves(made)
    assert (prompt == params["embeddings"]["word_embeddings"]["embedding"][:N]).all()
    assert model(IDS, params=jdelta.graft(params, made)).last_hidden_state.shape == (2, LENGTH, 16)
    shapes = jax.eval_shape(lambda: Own().init(jax.random.key(0), IDS)["params"])
    own = jdelta.SoftPromptModel(jdelta.Backbone(Own(), shapes), modified_modules=["embed"], soft_token_num=N)
    assert own.shapes() == {"embed": {"soft_prompt": {"embedding": jax.ShapeDtypeStruct((N, 8), jnp.float32)}}}


# --- together with others, and training


@pytest.mark.parametrize("name", ["FlaxGPT2LMHeadModel", "FlaxBartForConditionalGeneration", "FlaxBertModel"])
@pytest.mark.slow
def test_two_prompts_are_one_with_the_later_in_front(name):
    model = bare(name)
    first, second = put_on(model, seed=5), put_on(model, seed=6, soft_token_num=2)
    flat = flatten_dict(model.params)
    one, two = (flat[leaves_of(delta)[0]] for delta in (first, second))
    joint, delta = attached(name, soft_token_num=N + 2)
    flat = flatten_dict(joint.params)
    flat[leaves_of(delta)[0]] = jnp.concatenate([two, one])
    joint.params = unflatten_dict(flat)
    inputs = {**zoo.inputs(model, length=LENGTH), "attention_mask": jnp.asarray(MASK)}
    inputs |= {"output_hidden_states": True, "output_attentions": True}
    expected, found = run(joint, **inputs), run(model, **inputs)
    chex.assert_trees_all_equal_shapes(tuple(found.values()), tuple(expected.values()))
    for e, f in zip(jax.tree.leaves(tuple(expected.values())), jax.tree.leaves(tuple(found.values())), strict=True):
        close(f, e, 1e-5)
    if name == "FlaxGPT2LMHeadModel":
        asked = {"max_new_tokens": 3, **OPEN_END}
        assert (generated(model, **LEFT, **asked).sequences == generated(joint, **LEFT, **asked).sequences).all()
    if name != "FlaxBertModel":
        return
    first.detach()
    alone = bare(name)
    put_on(alone, seed=6, soft_token_num=2)
    close(run(model, **inputs)[0], run(alone, **inputs)[0])
    second.detach()
    close(run(model, **inputs)[0], run(bare(name), **inputs)[0])


@pytest.mark.slow
def test_a_prompt_beside_other_deltas_comes_off_in_any_order():
    model = bare("FlaxGPT2LMHeadModel")
    before = model(**LEFT).logits
    base = model.params
    lora = jdelta.LoraModel(model, lora_r=2)
    prompt = put_on(model)
    prefix = jdelta.PrefixModel(model, prefix_token_num=2, embed_dim=4, mid_dim=4)
    together = model(**LEFT).logits
    assert together.shape == before.shape
    assert jnp.abs(together - before).max() > 1e-2
    for delta in (prompt, lora, prefix):
        delta.detach()
    chex.assert_trees_all_equal(model.params, base)
    assert (model(**LEFT).logits == before).all()
    for delta in (prefix, prompt, lora):
        delta.attach()
    assert (model(**LEFT).logits == together).all()


@pytest.mark.parametrize("name", ["FlaxBertForSequenceClassification", "FlaxT5ForConditionalGeneration"])
@pytest.mark.slow
def test_only_the_prompt_trains_and_every_vector_of_it_gets_a_gradient(name):
    model, delta = attached(name)
    trainable, frozen = delta.partition()
    assert list(flatten_dict(trainable)) == leaves_of(delta)
    inputs = zoo.inputs(model, length=LENGTH)

    @jax.jit
    def grads(trainable):
        return jax.grad(lambda t: (model(**inputs, params=delta.combine(t, frozen))[0] ** 2).mean())(trainable)

    (gradient,) = jax.tree.leaves(grads(trainable))
    assert (jnp.abs(gradient).max(axis=1) > 0).all()


@pytest.mark.slow
def test_a_prompt_in_half_precision_and_with_checkpointing():
    model, _ = attached("FlaxBertForSequenceClassification")
    expected = run(model, **LEFT)[0]
    name = "FlaxBertForSequenceClassification"
    half = zoo.build(name, _do_init=False, dtype=jnp.bfloat16)
    jdelta.SoftPromptModel(half, soft_token_num=N)
    found = run(half, model.params, **LEFT)[0]
    assert found.dtype == jnp.bfloat16
    close(found.astype(jnp.float32), expected, 0.1)  # bfloat16 has 8 bits, and two layers add up
    remat = zoo.build(name, _do_init=False, gradient_checkpointing=True)
    jdelta.SoftPromptModel(remat, soft_token_num=N)
    close(run(remat, model.params, **LEFT)[0], expected, 1e-5)


# --- errors


@pytest.mark.parametrize("family", TOKENLESS)
def test_a_model_without_tokens_is_refused(family):
    model = zoo.build(zoo.REPRESENTATIVE[family], _do_init=False)
    with pytest.raises((TypeError, ValueError), match=r"token|none of the common names"):
        jdelta.SoftPromptModel(model)


@pytest.mark.parametrize("family", DECODER_ONLY_TOKENS)
def test_a_model_with_tokens_in_the_decoder_alone_is_refused(family):
    model = zoo.build(zoo.REPRESENTATIVE[family], _do_init=False)
    with pytest.raises(TypeError, match="tokens of a decoder"):
        jdelta.SoftPromptModel(model)


@pytest.mark.parametrize("number", [0, -1])
def test_a_prompt_has_at_least_one_token(number):
    with pytest.raises(ValueError, match="soft_token_num"):
        jdelta.SoftPromptModel(bare("FlaxBertModel"), soft_token_num=number)


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("FlaxRobertaModel", 31),  # its first position is pad_token_id + 1
        *(
            pytest.param(name, 32, marks=pytest.mark.slow)
            for name in ("FlaxBertModel", "FlaxGPT2LMHeadModel", "FlaxBartForConditionalGeneration")
        ),
    ],
)
def test_a_sequence_beyond_the_position_table_is_an_error(name, positions):
    model, _ = attached(name)
    fits = jax.ShapeDtypeStruct((1, positions - N), jnp.int32)
    more = {"decoder_input_ids": jnp.ones((1, 2), int)} if model.config.is_encoder_decoder else {}
    jax.eval_shape(lambda ids: model(ids, **more)[0], fits)
    with pytest.raises(ValueError, match=rf"{positions + 2} positions.* {positions}: 2 too many"):
        model(jnp.ones((1, positions + 2 - N), int), **more)


@pytest.mark.slow
def test_generation_beyond_the_position_table_is_an_error():
    model, _ = attached("FlaxGPT2LMHeadModel")
    with pytest.raises(ValueError, match="2 too many"):
        model.generate(**LEFT, max_length=32 - N + 2)
    second = put_on(model)
    with pytest.raises(ValueError, match="1 too many"):
        model(jnp.ones((1, 32 - 2 * N + 1), int))
    second.detach()
    assert model(jnp.ones((1, 32 - 2 * N + 1), int)).logits.shape[1] == 32 - 2 * N + 1


@pytest.mark.slow
def test_a_cache_outside_generate_is_an_error():
    model, _ = attached("FlaxGPT2LMHeadModel")
    cache = model.init_cache(2, 16)
    with pytest.raises(ValueError, match=r"model.generate"):
        model(IDS, past_key_values=cache, position_ids=jnp.zeros((2, LENGTH), int))


def test_what_is_no_word_embedding_is_refused():
    for wrong in ("bert.encoder.layer.0.attention.self.query", "bert.embeddings"):
        with pytest.raises(TypeError, match=r"SoftPromptModel.*(token ids|no word embedding)"):
            jdelta.SoftPromptModel(bare("FlaxBertForSequenceClassification"), modified_modules=[wrong])
    with pytest.raises(ValueError, match="Name one"):
        jdelta.SoftPromptModel(bare("FlaxBertModel"), modified_modules=["word_embeddings", "token_type_embeddings"])
