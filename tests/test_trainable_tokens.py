"""Trainable tokens: the rows that train take the places of theirs wherever the embedding is read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from conftest import fresh, noisy
from flax import linen as nn
from flax import nnx
from parity import assert_close, peft, torch
from safetensors.numpy import load_file, save_file

import jdelta
from jdelta.trees import surgery

IDS = jnp.array([[5, 6, 7, 8, 5], [1, 2, 9, 7, 1]])
TOKENS = [7, 1, 6]
TABLES = {
    "bert": ("FlaxBertForMaskedLM", ("bert", "embeddings", "word_embeddings", "embedding")),
    "gpt2": ("FlaxGPT2LMHeadModel", ("transformer", "wte", "embedding")),
    "llama": ("FlaxLlamaForCausalLM", ("model", "embed_tokens", "embedding")),
    "t5": ("FlaxT5ForConditionalGeneration", ("shared", "embedding")),
}


def run(model, params):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(IDS, params=params, **more).logits


def moved(delta, params):
    trains, frozen = delta.partition(params)
    return jdelta.combine(noisy(trains), frozen)


class Net(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids):
        return nn.Dense(3, dtype=self.dtype, name="dense")(nn.Embed(11, 4, dtype=self.dtype, name="embed")(ids))


def net(dtype=jnp.float32):
    params = Net().init(jax.random.key(0), IDS)["params"]
    return jdelta.Backbone(Net(dtype), params, dummy_inputs=(IDS,))


def test_it_is_its_formula_in_float64():
    model = net()
    bare = model(IDS)
    delta = jdelta.TrainableTokensModel(model, ["embed"], token_indices=TOKENS)
    np.testing.assert_array_equal(model(IDS), bare)
    model.params = moved(delta, model.params)
    table, rows, kernel = (
        np.asarray(leaf, np.float64)
        for leaf in (
            model.params["embed"]["embedding"],
            model.params["embed"]["trainable_tokens"]["tokens"],
            model.params["dense"]["kernel"],
        )
    )
    assert rows.shape == (3, 4)
    want = np.zeros((*IDS.shape, 3))
    for i, j in np.ndindex(IDS.shape):
        token = int(IDS[i, j])
        want[i, j] = (rows[TOKENS.index(token)] if token in TOKENS else table[token]) @ kernel
    assert np.abs(want - bare).max() > 0.01
    np.testing.assert_allclose(model(IDS), want, rtol=1e-5, atol=1e-6)
    delta.merge()
    np.testing.assert_allclose(model(IDS), want, rtol=1e-5, atol=1e-6)
    merged = model.params["embed"]["embedding"]
    others = np.setdiff1d(np.arange(11), TOKENS)
    np.testing.assert_array_equal(merged[others], np.float32(table[others]))
    np.testing.assert_allclose(merged[np.array(TOKENS)], rows, rtol=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_the_model_and_its_tied_head_compute_as_with_the_rows_in_the_table(family):
    cls, path = TABLES[family]
    model = fresh(family, cls)
    before, bare = model.params, run(model, model.params)
    delta = jdelta.TrainableTokensModel(model, token_indices=TOKENS)
    np.testing.assert_array_equal(run(model, model.params), bare)
    params = model.params = moved(delta, model.params)
    leaves = surgery.flatten(before)
    (rows,) = jax.tree.leaves(delta.partition(params)[0])
    leaves[path] = leaves[path].at[np.array(TOKENS)].set(rows)
    want = run(fresh(family, cls), surgery.unflatten(leaves))
    assert jnp.abs(want - bare).max() > 1e-4
    np.testing.assert_allclose(run(model, params), want, rtol=1e-5, atol=1e-6)
    delta.merge()
    np.testing.assert_allclose(run(model, model.params), want, rtol=1e-5, atol=1e-6)
    delta.unmerge()
    delta.remove()
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, before))


class Tied(nnx.Module):
    """Its table is looked up and multiplied with by methods of its own."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 4, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(jnp.tanh(self.embed(ids)))


def test_on_an_nnx_module_whose_head_is_tied():
    model = Tied(nnx.Rngs(0))
    bare, table = model(IDS), model.embed.embedding[...]
    delta = jdelta.TrainableTokensModel(model, ["embed"], token_indices=TOKENS, dummy_inputs=(IDS,))
    np.testing.assert_array_equal(model(IDS), bare)
    nnx.update(model, moved(delta, nnx.state(model)))
    (rows,) = jax.tree.leaves(delta.partition()[0])
    new = table.at[np.array(TOKENS)].set(rows)
    want = jnp.tanh(new[IDS]) @ new.T
    np.testing.assert_allclose(model(IDS), want, rtol=1e-5, atol=1e-5)
    delta.merge()
    np.testing.assert_allclose(model(IDS), want, rtol=1e-5, atol=1e-5)


class Embedder(nn.Module):
    def setup(self):
        self.table = self.param("table", nn.initializers.normal(1.0), (11, 4))

    def encode(self, ids):
        return self.table[ids]

    def decode(self, x):
        return x @ self.table.T


class RunByMethods(nn.Module):
    def setup(self):
        self.embedder = Embedder()

    def __call__(self, ids):
        return self.embedder.decode(jnp.tanh(self.embedder.encode(ids)))


@pytest.mark.parametrize("by_default", [True, False])
def test_an_embedding_that_is_run_by_methods(by_default, monkeypatch):
    monkeypatch.setattr("jdelta.names.common_names.TABLE", {"RunByMethods": {"embeddings": "embedder"}})
    params = RunByMethods().init(jax.random.key(0), IDS)["params"]
    model = jdelta.Backbone(RunByMethods(), params, dummy_inputs=(IDS,))
    named = {} if by_default else {"modified_parameters": ["table"]}
    delta = jdelta.TrainableTokensModel(model, token_indices=TOKENS, **named)
    assert delta.targets == ["embedder.table"]
    model.params = moved(delta, model.params)
    (rows,) = jax.tree.leaves(delta.partition()[0])
    table = params["embedder"]["table"].at[np.array(TOKENS)].set(rows)
    np.testing.assert_allclose(model(IDS), jnp.tanh(table[IDS]) @ table.T, rtol=1e-5, atol=1e-5)


def test_it_may_start_at_random_rows():
    model = net()
    bare = model(IDS)
    jdelta.TrainableTokensModel(model, ["embed"], token_indices=TOKENS, init_weights=False)
    changed = np.isin(IDS, TOKENS)
    np.testing.assert_array_equal(model(IDS)[~changed], bare[~changed])
    assert jnp.abs(model(IDS) - bare)[changed].min() > 0


def test_in_bfloat16_its_rows_are_float32():
    model = net(jnp.bfloat16)
    delta = jdelta.TrainableTokensModel(model, ["embed"], token_indices=TOKENS)
    model.params = moved(delta, model.params)
    assert model(IDS).dtype == jnp.bfloat16
    assert [leaf.dtype for leaf in jax.tree.leaves(delta.partition()[0])] == [jnp.float32]
    wide = net()
    jdelta.TrainableTokensModel(wide, ["embed"], token_indices=TOKENS)
    want = wide(IDS, params=model.params)
    assert jnp.abs(model(IDS).astype(jnp.float32) - want).max() < 0.03 * jnp.abs(want).max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "TrainableTokensModel at embed .*: token_indices is empty"),
        ({"token_indices": [3, 11]}, r"embed\.embedding: token_indices has 11, and the embedding has 11 rows"),
        ({"token_indices": [3, -1]}, "token_indices are ids of tokens, at least 0 and below .*; got -1"),
        ({"token_indices": [3, 4, 3]}, "token_indices has 3 more than once"),
        ({"token_indices": [1], "modified_modules": ["dense"]}, r"at dense \(Dense\): it is no embedding"),
        (
            {"token_indices": [1], "modified_modules": None, "modified_parameters": ["dense.kernel"]},
            r"at dense\.kernel: it is no embedding, .* shape \(4, 3\)",
        ),
    ],
)
def test_what_it_cannot_do_is_an_error_that_says_why(arguments, message):
    model = net()
    before = model.params
    with pytest.raises((TypeError, ValueError), match=message):
        jdelta.TrainableTokensModel(model, **{"modified_modules": ["embed"], **arguments})
    assert model.params is before


# --- PyTorch PEFT


def test_files_hold_the_rows_of_what_is_tied_too(tmp_path):
    cls, _ = TABLES["gpt2"]
    jdelta.TrainableTokensModel(fresh("gpt2", cls), token_indices=TOKENS).to_peft(tmp_path, allow_untrained=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    end = "trainable_tokens_delta"
    assert tensors.keys() == {f"base_model.model.{name}.{end}" for name in ("transformer.wte", "lm_head")}
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["token_indices"] == TOKENS
    assert fields["target_modules"] == ["transformer.wte"]
    assert jdelta.from_peft(tmp_path, fresh("gpt2", cls)).config.token_indices == tuple(TOKENS)

    def refuses(message, tensors):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            jdelta.from_peft(tmp_path, fresh("gpt2", cls))

    wte, head = sorted(tensors, reverse=True)
    refuses(r"'lm_head' is tied to 'transformer\.wte', and the file has no equal", {wte: tensors[wte]})
    refuses("'lm_head' is tied", {wte: tensors[wte], head: tensors[head] + 1})
    refuses("'lm_head', a module that this model lacks", {head: tensors[head]})
    refuses(
        r"at 'transformer\.h\.0\.attn\.c_attn', FlaxConv1D: that is no embedding",
        {f"base_model.model.transformer.h.0.attn.c_attn.{end}": tensors[wte]},
    )
    refuses("holds no trainable_tokens_delta", {})


@pytest.mark.parametrize(
    ("family", "cls", "config", "more", "message"),
    [
        ("bert", "FlaxBertForMaskedLM", {}, {}, r"the tied head 'cls\.predictions\.decoder' without its bias"),
        ("t5", "FlaxT5ForConditionalGeneration", {"tie_word_embeddings": False}, {}, "only where the head is tied"),
        ("gpt2", "FlaxGPT2LMHeadModel", {}, {"unfrozen_modules": ["ln_f"]}, r"nothing besides .* transformer\.ln_f"),
    ],
)
def test_what_peft_computes_otherwise_is_not_written(family, cls, config, more, message, tmp_path):
    delta = jdelta.TrainableTokensModel(fresh(family, cls, **config), token_indices=TOKENS, **more)
    with pytest.raises(ValueError, match=message):
        delta.to_peft(tmp_path, allow_untrained=True)


WIDTHS = {"vocab_size": 99, "d_model": 32, "num_layers": 2, "num_heads": 2}
BART = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("attention_heads", 2), ("ffn_dim", 48))}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("T5ForConditionalGeneration", lambda: transformers.T5Config(**WIDTHS, d_kv=8, d_ff=48, dropout_rate=0)),
        ("BartForConditionalGeneration", lambda: transformers.BartConfig(**WIDTHS, **BART, scale_embedding=True)),
    ],
)
def test_the_numbers_of_peft_where_encoder_decoder_and_head_share_a_table(name, config, tmp_path):
    torch.manual_seed(0)
    base = getattr(transformers, name)(config()).eval()
    base.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(base, peft.TrainableTokensConfig(token_indices=TOKENS)).eval()
    ids = torch.tensor(np.asarray(IDS))
    bare = wrapped(input_ids=ids, decoder_input_ids=ids).logits.detach().numpy()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter) * parameter.requires_grad)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = wrapped.double()(input_ids=ids, decoder_input_ids=ids).logits.detach().numpy()
    assert np.abs(expected - bare).max() > 0.01
    model = getattr(transformers, f"Flax{name}").from_pretrained(tmp_path / "base", from_pt=True)
    delta = jdelta.from_peft(tmp_path / "adapter", model)
    assert_close(run(model, model.params), expected, "logits")
    delta.to_peft(tmp_path / "back", allow_untrained=True)
    ours, theirs = (load_file(tmp_path / part / "adapter_model.safetensors") for part in ("back", "adapter"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)
