"""The methods on real transformers classes: default positions, outputs, generation, detachment."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, fresh, noisy
from tiers import breadth

import jdelta
from jdelta.trees import surgery

METHODS = {
    "lora": (jdelta.LoraModel, {"lora_r": 2}),
    "adapter": (jdelta.AdapterModel, {"bottleneck_dim": 3, "zero_up": True}),
    "parallel_adapter": (jdelta.ParallelAdapterModel, {"bottleneck_dim": 3, "zero_up": True}),
    "bitfit": (jdelta.BitFitModel, {}),
}
CLASSES = {
    "bert": "FlaxBertForSequenceClassification",
    "roberta": "FlaxRobertaForSequenceClassification",
    "distilbert": "FlaxDistilBertForSequenceClassification",
    "gpt2": "FlaxGPT2LMHeadModel",
    "opt": "FlaxOPTForCausalLM",
    "t5": "FlaxT5ForConditionalGeneration",
    "bart": "FlaxBartForConditionalGeneration",
    "llama": "FlaxLlamaForCausalLM",
}
SEQ2SEQ = ("t5", "bart")
IDS = jnp.array([[5, 6, 7, 8], [9, 10, 11, 12]])

# method -> family -> what each layer's targets end with, written down by hand
POSITIONS = {
    "lora": {
        "bert": ["attention.self.query", "attention.self.value"],
        "roberta": ["attention.self.query", "attention.self.value"],
        "distilbert": ["attention.q_lin", "attention.v_lin"],
        "gpt2": ["attn.c_attn"],
        "opt": ["self_attn.q_proj", "self_attn.v_proj"],
        "t5": ["SelfAttention.q", "SelfAttention.v"],
        "bart": ["self_attn.q_proj", "self_attn.v_proj"],
        "llama": ["self_attn.q_proj", "self_attn.v_proj"],
    },
    "adapter": {
        "bert": ["attention.output.dense", "[r][0-9].output.dense"],
        "roberta": ["attention.output.dense", "[r][0-9].output.dense"],
        "distilbert": ["attention.out_lin", "ffn.lin2"],
        "gpt2": ["attn.c_proj", "mlp.c_proj"],
        "opt": ["self_attn.out_proj", "fc2"],
        "t5": ["SelfAttention.o", "DenseReluDense.wo"],
        "bart": ["self_attn.out_proj", "fc2"],
        "llama": ["self_attn.o_proj", "mlp.down_proj"],
    },
    "parallel_adapter": {
        "bert": ["[r][0-9].attention", "[r][0-9].output.dense"],
        "roberta": ["[r][0-9].attention", "[r][0-9].output.dense"],
        "distilbert": ["[r][0-9].attention", "ffn.lin2"],
        "gpt2": ["attn", "mlp.c_proj"],
        "opt": ["self_attn", "fc2"],
        "t5": ["SelfAttention", "DenseReluDense.wo"],
        "bart": ["self_attn", "fc2"],
        "llama": ["self_attn", "mlp.down_proj"],
    },
}


def call(model, family, params=None, **kwargs):
    if family in SEQ2SEQ:
        kwargs["decoder_input_ids"] = IDS[:, :3]
    return model(IDS, params=params, **kwargs)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("method", breadth(POSITIONS, "lora"))
def test_default_positions_are_those_of_the_table_on_every_layer(method, family):
    model = build(family, CLASSES[family], _do_init=False)
    cls, arguments = METHODS[method]
    delta = cls(model, **arguments)
    names = [info.name for info in delta.structure if info.name]
    assert delta.targets == jdelta.match(names, POSITIONS[method][family])
    layers = 4 if family in SEQ2SEQ else 2
    assert len(delta.targets) == layers * len(POSITIONS[method][family])


def test_bitfit_adds_biases_where_there_are_none():
    model = fresh("llama", "FlaxLlamaForCausalLM")
    delta = jdelta.BitFitModel(model)
    layer = model.params["model"]["layers"]["0"]
    assert layer["self_attn"]["q_proj"]["bitfit"]["bias"].shape == (16,)
    assert layer["input_layernorm"]["bitfit"]["bias"].shape == (16,)
    assert "bitfit" not in model.params["model"]["embed_tokens"]
    assert model.params["model"]["norm"]["bitfit"]["bias"].shape == (16,)
    assert all(path[-1] == "bias" for path in surgery.flatten(delta.partition()[0]))


def test_bitfit_trains_the_biases_that_are_there_and_nothing_else():
    delta = jdelta.BitFitModel(fresh("bert", "FlaxBertForSequenceClassification"))
    trained = {surgery.name_of(path) for path in surgery.flatten(delta.partition()[0])}
    every = {surgery.name_of(path) for path in surgery.flatten(delta.backbone_model.params) if path[-1] == "bias"}
    outside = {"bert.embeddings.LayerNorm.bias", "bert.pooler.dense.bias", "classifier.bias"}
    assert trained == every - outside


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.slow
def test_greedy_generation_with_a_cache_agrees_with_the_uncached_forward(family):
    model = fresh(family, CLASSES[family])
    jdelta.LoraModel(model, lora_r=4, lora_alpha=64)
    model.params = noisy(model.params, seed=3)
    length = 7
    found = model.generate(IDS, max_length=length, do_sample=False).sequences

    @jax.jit
    def logits(params, text):
        kwargs = {"decoder_input_ids": text} if family in SEQ2SEQ else {}
        return model(IDS if family in SEQ2SEQ else text, params=params, **kwargs).logits

    start = 1 if family in SEQ2SEQ else IDS.shape[1]
    text = np.zeros((2, length), int)
    text[:, :start] = model.config.decoder_start_token_id if family in SEQ2SEQ else IDS
    ended = np.zeros(2, bool)
    for i in range(start, length):  # what comes later is not seen by what comes before
        best = np.asarray(logits(model.params, jnp.asarray(text)))[:, i - 1].argmax(-1)
        text[:, i] = np.where(ended, model.config.pad_token_id, best)
        ended |= text[:, i] == model.config.eos_token_id
    assert (np.asarray(found) == text).all()


@pytest.mark.slow
def test_beams_and_samples_with_a_delta_are_those_of_the_merged_weights():
    model, merged = (fresh("gpt2", "FlaxGPT2LMHeadModel") for _ in range(2))
    jdelta.LoraModel(model, lora_r=4, lora_alpha=64)
    model.params = noisy(model.params, seed=3)
    flat = surgery.flatten(model.params)
    for path in [p for p in flat if p[-2:] == ("lora", "a")]:
        change = (64 / 4) * flat.pop(path) @ flat.pop((*path[:-1], "b"))
        flat[(*path[:-2], "kernel")] += change.T  # FlaxConv1D keeps (out, in)
    merged.params = surgery.unflatten(flat)
    for how in ({"num_beams": 2, "do_sample": False}, {"do_sample": True, "prng_key": jax.random.key(0)}):
        one, other = (
            jax.jit(lambda p, m=m, how=how: m.generate(IDS, params=p, max_length=6, **how).sequences)(m.params)
            for m in (model, merged)
        )
        assert (one == other).all()


@pytest.mark.slow
def test_encode_decode_and_the_cache_go_through_the_delta():
    model = fresh("bart", "FlaxBartForConditionalGeneration")
    hidden = model.encode(IDS).last_hidden_state
    jdelta.AdapterModel(model, bottleneck_dim=4)
    model.params = noisy(model.params)
    decode = jax.jit(model.decode)
    encoded = model.encode(IDS)
    assert np.abs(encoded.last_hidden_state - hidden).max() > 1e-3
    target = IDS[:, :3]
    whole = decode(target, encoded).logits
    chex.assert_trees_all_close(whole, model(IDS, decoder_input_ids=target).logits, atol=1e-5)
    cache = model.init_cache(2, 3, encoded)
    for i in range(3):
        position = jnp.full((2, 1), i)
        step = decode(target[:, i : i + 1], encoded, decoder_position_ids=position, past_key_values=cache)
        cache = step.past_key_values
        chex.assert_trees_all_close(step.logits[:, 0], whole[:, i], atol=1e-5)


def test_help_and_signature_of_the_model_are_unchanged():
    model = fresh("bert", "FlaxBertForSequenceClassification")
    before = (inspect.signature(model.__call__), model.__call__.__doc__, type(model.module).__name__)
    module_before = (inspect.signature(model.module.__call__), inspect.getdoc(model.module))
    jdelta.LoraModel(model)
    assert (inspect.signature(model.__call__), model.__call__.__doc__, type(model.module).__name__) == before
    assert (inspect.signature(model.module.__call__), inspect.getdoc(model.module)) == module_before


def test_albert_shares_one_delta_over_its_layers():
    model = fresh("albert", "FlaxAlbertModel")
    before = model(IDS).last_hidden_state
    delta = jdelta.LoraModel(model, modified_modules=["query"], lora_r=2)
    assert len(delta.targets) == 1
    chex.assert_trees_all_equal(model(IDS).last_hidden_state, before)
    # The same as the change folded into the one shared kernel.
    model.params = noisy(model.params)
    flat = surgery.flatten(model.params)
    (host,) = {path[:-2] for path in flat if "lora" in path}
    kernel = flat[(*host, "kernel")] + (16 / 2) * flat[(*host, "lora", "a")] @ flat[(*host, "lora", "b")]
    with_delta = model(IDS).last_hidden_state
    merged = surgery.unflatten({**flat, (*host, "kernel"): kernel})
    delta.detach()
    chex.assert_trees_all_close(
        model(IDS, params=jdelta.prune(merged, "lora")).last_hidden_state, with_delta, atol=2e-5
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(method):
    plain, checkpointed = (fresh("bert", "FlaxBertForSequenceClassification") for _ in range(2))
    checkpointed.enable_gradient_checkpointing()
    cls, arguments = METHODS[method]
    deltas = [cls(model, **arguments) for model in (plain, checkpointed)]
    assert deltas[0].targets == deltas[1].targets
    params = noisy(plain.params)

    def loss(model):
        return lambda p: model(IDS, params=p).logits.std()

    chex.assert_trees_all_close(jax.grad(loss(plain))(params), jax.grad(loss(checkpointed))(params), atol=1e-5)


@pytest.mark.slow
def test_half_precision_models_stay_in_half_precision():
    model = build("bert", "FlaxBertForSequenceClassification", dtype=jnp.bfloat16)
    model.params = model.to_bf16(model.params)
    for cls, arguments in METHODS.values():
        cls(model, **arguments)
    assert model.params["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["lora"]["a"].dtype == jnp.float32
    text = jax.jit(lambda p: model(IDS, params=p).logits).lower(model.params).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("bf16" in line and "f32" not in line for line in products)
    assert model(IDS).logits.dtype == jnp.bfloat16


@pytest.mark.slow
def test_models_without_parameters_of_their_own():
    held = fresh("bert", "FlaxBertForSequenceClassification")
    model = build("bert", "FlaxBertForSequenceClassification", _do_init=False)
    deltas = [jdelta.LoraModel(m, lora_r=2, rng=7) for m in (held, model)]
    chex.assert_trees_all_equal_shapes_and_dtypes(deltas[1].shapes(), deltas[1].init(7))
    compiled = jax.jit(deltas[1].init)(jax.random.key(7))
    chex.assert_trees_all_close(compiled, deltas[0].init(7), rtol=1e-6)  # step by step, so but for rounding
    params = jdelta.graft(jdelta.prune(held.params, "lora"), deltas[1].init(7))
    chex.assert_trees_all_equal(params, held.params)
    assert (model(IDS, params=params).logits == held(IDS).logits).all()
    deltas[1].detach()
    assert (model(IDS, params=jdelta.prune(params, "lora")).logits == held(IDS).logits).all()


def test_initialising_a_delta_compiles_nothing_of_the_backbone():
    model = build("bart", "FlaxBartForConditionalGeneration", _do_init=False)
    delta = jdelta.LoraModel(model)
    lowered = jax.jit(delta.init).lower(jax.random.key(0)).compile()
    leaves = jax.tree.leaves(delta.shapes())
    assert lowered.memory_analysis().output_size_in_bytes < 2 * sum(leaf.size * 4 for leaf in leaves)
    assert "dot" not in lowered.as_text()


@pytest.mark.slow
def test_a_model_with_batch_statistics():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    model = transformers.FlaxResNetForImageClassification(config, input_shape=(1, 32, 32, 3))
    pixels = jax.random.normal(jax.random.key(0), (2, 3, 32, 32))
    base, before = model.params, model(pixels).logits
    delta = jdelta.LoraModel(model, modified_modules=["convolution"], lora_r=1)
    assert set(model.params) == {"params", "batch_stats"}
    assert (model(pixels).logits == before).all()
    trainable, frozen = delta.partition()
    assert set(trainable) == {"params"}
    assert "batch_stats" in frozen
    model.params = jdelta.combine(noisy(trainable), frozen)
    assert np.abs(model(pixels).logits - before).max() > 1e-5
    delta.detach()
    chex.assert_trees_all_equal(model.params, base)
    assert (model(pixels).logits == before).all()
