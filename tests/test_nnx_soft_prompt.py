"""Soft prompts on nnx models: what the model computes with more tokens in its vocabulary, before the others."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tunix_models
from flax import nnx

import jdelta

TOKENS = 3


def close(got, wanted, tolerance=4e-6):
    assert got.shape == wanted.shape
    assert jnp.abs(got - wanted).max() <= tolerance * jnp.abs(wanted).max()


def prompted(model, *inputs, **options):
    """A delta whose vectors are no rows of the embedding."""
    delta = jdelta.SoftPromptModel(model, soft_token_num=TOKENS, token_init=False, dummy_inputs=inputs, **options)
    return delta, jax.tree.leaves(nnx.state(model, delta.filter))[0]


class Decoder(nnx.Module):
    """A decoder of one layer that makes its own causal mask, and adds embeddings of positions."""

    def __init__(self, rngs, vocabulary=11):
        self.embed = nnx.Embed(vocabulary, 8, rngs=rngs)
        self.places = nnx.Embed(16, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    def __call__(self, ids, attention_mask=None, position_ids=None, extra=None):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape) if position_ids is None else position_ids
        x = self.embed(ids) + self.places(positions)
        seen = None if attention_mask is None else attention_mask[:, None, None].astype(bool)
        return x + self.attention(x, mask=seen, is_causal=True)


IDS = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])
VOCABULARY = 11


def with_larger_vocabulary(model, prompt):
    """The bare model whose vocabulary has the prompt's vectors at its end."""
    larger = Decoder(nnx.Rngs(0), VOCABULARY + TOKENS)
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state["embed"]["embedding"] = jnp.concatenate([state["embed"]["embedding"], prompt])
    nnx.update(larger, state)
    return larger


def before(array, new):
    return jnp.concatenate([jnp.broadcast_to(new, (len(array), TOKENS)), array], axis=1)


@pytest.mark.parametrize("mask", [None, jnp.array([[1, 1, 1, 1], [0, 0, 1, 1]])], ids=["", "mask"])
def test_a_prompt_is_tokens_of_a_larger_vocabulary(mask):
    bare = Decoder(nnx.Rngs(0))
    model = nnx.clone(bare)
    delta, prompt = prompted(model, IDS, modified_modules=["embed"])
    larger = with_larger_vocabulary(bare, prompt)
    longer = before(IDS, jnp.arange(VOCABULARY, VOCABULARY + TOKENS))
    wanted = larger(longer, None if mask is None else before(mask, 1))[:, TOKENS:]
    close(model(IDS, mask), wanted)
    assert jnp.abs(wanted - bare(IDS, mask)).max() > 0.1
    delta.detach()
    assert (model(IDS, mask) == bare(IDS, mask)).all()


def test_positions_that_are_given_are_shifted():
    model = Decoder(nnx.Rngs(0))
    _, prompt = prompted(model, IDS, modified_modules=["embed"])
    larger = with_larger_vocabulary(Decoder(nnx.Rngs(0)), prompt)
    longer = before(IDS, jnp.arange(VOCABULARY, VOCABULARY + TOKENS))
    given = jnp.array([[2, 3, 4, 5], [0, 1, 2, 3]])
    positions = jnp.concatenate([given[:, :1] + jnp.arange(TOKENS), given + TOKENS], axis=1)
    close(model(IDS, None, given), larger(longer, None, positions)[:, TOKENS:])


def test_it_starts_from_the_vocabulary_and_trains():
    model = Decoder(nnx.Rngs(0))
    delta = jdelta.SoftPromptModel(model, soft_token_num=TOKENS, modified_modules=["embed"], dummy_inputs=(IDS,))
    (prompt,) = jax.tree.leaves(nnx.state(model, delta.filter))
    assert (prompt == model.embed.embedding[...][:TOKENS]).all()
    (gradient,) = jax.tree.leaves(
        nnx.grad(lambda m: m(IDS).sum(), argnums=nnx.DiffState(0, delta.filter))(model),
    )
    assert jnp.abs(gradient).max() > 0


def test_what_a_prompt_has_no_place_in_is_named():
    model = Decoder(nnx.Rngs(0))
    prompted(model, IDS, modified_modules=["embed"])
    with pytest.raises(TypeError, match=r"given extra of shape \(2, 4\).*Leave extra out"):
        model(IDS, extra=IDS)
    model.attention.init_cache((2, 8, 8))
    model(IDS)
    model.set_attributes(decode=True)
    with pytest.raises(ValueError, match="with a cache"):
        model(IDS[:, :1])
    with pytest.raises(TypeError, match=r"attention \(MultiHeadAttention\).*word embedding|take no token ids"):
        prompted(Decoder(nnx.Rngs(0)), IDS, modified_modules=["attention"])


# --- tunix's models, which take (tokens, positions, cache, attention_mask)

TABLE = "input_embedding"
FAMILIES = ["llama3", "qwen2", "qwen3", "gemma", "gemma3"]


def inputs(padding=0):
    """Causal; of the second row, the first tokens are padding."""
    tokens, positions, cache, mask = tunix_models.inputs()
    mask = mask.at[1, :, :padding].set(False) | jnp.eye(mask.shape[1], dtype=bool)
    return tokens, jnp.maximum(positions - jnp.array([[0], [padding]]), 0), cache, mask


@pytest.mark.tunix
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_tunix_a_prompt_is_tokens_of_a_larger_vocabulary(family, padding):
    vocabulary = "num_embed" if family.startswith("gemma") else "vocab_size"
    changes = {"sliding_window_size": 16} if family.startswith("gemma") else {}
    model = tunix_models.build(family, **changes)
    given = inputs(padding)
    tokens, positions, _, mask = given
    bare = model(*given)[0]
    delta, prompt = prompted(model, *given)
    assert delta.targets == ["embedder"]
    larger = tunix_models.build(family, **{vocabulary: tunix_models.VOCAB + TOKENS}, **changes)
    state = nnx.to_pure_dict(nnx.state(model, nnx.Not(delta.filter)))
    # Gemma scales what it looks up; the prompt is what comes out of that.
    rows = prompt / math.sqrt(prompt.shape[1]) if family.startswith("gemma") else prompt
    state["embedder"][TABLE] = jnp.concatenate([state["embedder"][TABLE], rows])
    if "lm_head" in state:
        state["lm_head"]["w"] = jnp.pad(state["lm_head"]["w"], ((0, 0), (0, TOKENS)))
    nnx.update(larger, state)
    n = tokens.shape[1] + TOKENS
    seen = np.tril(np.ones((len(tokens), n, n), bool))
    seen[:, TOKENS:, TOKENS:] = mask
    longer = before(tokens, jnp.arange(tunix_models.VOCAB, tunix_models.VOCAB + TOKENS))
    places = before(positions + TOKENS, jnp.arange(TOKENS))
    wanted = larger(longer, places, None, jnp.asarray(seen))[0][:, TOKENS:, : tunix_models.VOCAB]
    close(model(*given)[0], wanted, 2e-5)
    assert jnp.abs(wanted - bare).max() > 0.01 * jnp.abs(bare).max()


@pytest.mark.tunix
def test_on_tunix_what_is_not_exact_is_refused():
    model = tunix_models.build("llama3")
    given = inputs()
    prompted(model, *given)
    tokens, positions, _, mask = given
    shape = (2, 8, 2, 8)
    layer = {"k": jnp.zeros(shape), "v": jnp.zeros(shape), "end_index": jnp.zeros(2, jnp.int32)}
    with pytest.raises(ValueError, match="cache"):
        model(tokens, positions, {"layer_0": layer, "layer_1": layer}, jnp.pad(mask, ((0, 0), (0, 0), (0, 2))))
    with pytest.raises(ValueError, match=r"\(2, 6, 8\).*6 tokens"):
        model(tokens, positions, None, jnp.pad(mask, ((0, 0), (0, 0), (0, 2))))
    with pytest.raises(TypeError, match="booleans or integers, got float32"):
        model(tokens, positions, None, mask.astype(jnp.float32))
    with pytest.raises(TypeError, match=r"embedder.*encode, encode_per_layer_input"):
        prompted(tunix_models.build("gemma4"), *given)
