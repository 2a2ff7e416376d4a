"""Prefix tuning against attention written out here, in float64 and without jax.

One attention module at a time runs inside a `Backbone`, with random weights and a random prefix; tolerance 1e-6 of the
largest entry, a few roundings of float32. PEFT's numbers for whole models are in test_prefix_peft_parity.py.
"""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
import zoo
from flax import linen as nn
from transformers import AlbertConfig, BartConfig, BertConfig, BigBirdConfig, DistilBertConfig, LongT5Config, T5Config
from transformers.models.bart.modeling_flax_bart import FlaxBartAttention
from transformers.models.bert.modeling_flax_bert import FlaxBertAttention
from transformers.models.big_bird.modeling_flax_big_bird import FlaxBigBirdAttention, FlaxBigBirdBlockSparseAttention
from transformers.models.distilbert.modeling_flax_distilbert import FlaxMultiHeadSelfAttention
from transformers.models.longt5.modeling_flax_longt5 import (
    FlaxLongT5LocalAttention,
    FlaxLongT5TransientGlobalAttention,
)
from transformers.models.t5.modeling_flax_t5 import FlaxT5Attention

import jdelta
from jdelta.trees import surgery

TOLERANCE = 4e-6  # of the largest entry: some thirty roundings of float32, on any processor
BATCH, LENGTH, HEADS, WIDTH = 2, 6, 2, 8
DIM = HEADS * WIDTH
MASK = np.ones((BATCH, LENGTH), np.int32)
MASK[1, 4:] = 0
IDS = jnp.array([[5, 6, 7, 8], [9, 10, 11, 12]])

BERT = BertConfig(hidden_size=DIM, num_attention_heads=HEADS, intermediate_size=24)
T5 = T5Config(d_model=DIM, d_kv=WIDTH, num_heads=HEADS, relative_attention_num_buckets=8)


# --- one attention module, and its formula


class Holder(nn.Module):
    """Puts a module below a name."""

    module: nn.Module

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Held:
    """A module with random weights and prefixes.

    Args:
      module: one that computes attention.
      *args, **kwargs: of its call.
      prefixes: number of tokens of each prefix.
    """

    def __init__(self, module: nn.Module, *args: Any, prefixes: tuple[int, ...] = (3,), **kwargs: Any):
        self.args, self.kwargs = args, kwargs
        holder = Holder(module)
        shapes = jax.eval_shape(lambda: holder.init(jax.random.key(0), *args, **kwargs))["params"]
        self.backbone = jdelta.Backbone(holder, random(shapes, 0), dummy_inputs=args, dummy_kwargs=kwargs)
        for tokens in prefixes:
            jdelta.PrefixModel(
                self.backbone, modified_modules=["module"], prefix_token_num=tokens, reparameterize=False
            )

    def __call__(self, params: Any = None) -> np.ndarray:
        """The output, without what else the module returns."""
        run = jax.jit(lambda params: jax.tree.leaves(self.backbone(*self.args, params=params, **self.kwargs))[0])
        return np.asarray(run(self.backbone.params if params is None else params))

    @property
    def weights(self) -> Any:
        return float64(self.backbone.params["module"])

    @property
    def prefix(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of all prefixes, `(tokens, heads, width)`."""
        own = [leaves for name, leaves in self.weights.items() if name.startswith("prefix")]
        return tuple(np.concatenate([leaves[name] for leaves in own]) for name in ("keys", "values"))


def random(shapes: Any, seed: int) -> Any:
    """A tree of normal numbers, of a size with which softmax has something to choose."""
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(treedef, [jnp.asarray(0.4 * rng.standard_normal(leaf.shape), "f4") for leaf in leaves])


def float64(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def walk(tree: Any, path: tuple[str, ...] = ()):
    """The sub-trees with their paths."""
    if isinstance(tree, dict):
        yield path, tree
        for key, below in tree.items():
            yield from walk(below, (*path, key))


def numbers(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def dense(weights: Any, x: np.ndarray) -> np.ndarray:
    return x @ weights["kernel"] + weights.get("bias", 0.0)


def in_heads(weights: Any, x: np.ndarray) -> np.ndarray:
    """`(batch, length, heads, width)`."""
    return dense(weights, x.astype(np.float64)).reshape(*x.shape[:-1], HEADS, WIDTH)


def layer_norm(weights: Any, x: np.ndarray, epsilon: float = 1e-12) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return weights["scale"] * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) + weights["bias"]


def attend(query, key, value, prefix, bias=0.0, scale=WIDTH**-0.5, factors=None):
    """Attention to `[prefix | key]`, all `(batch, length, heads, width)`; the prefix gets no bias and no mask.

    Args:
      bias: broadcasts to `(batch, heads, queries, keys)`; -inf where masked.
      factors: of each head.
    """
    keys, values = (np.broadcast_to(p, (len(key), *p.shape)) for p in prefix)
    front, behind = np.concatenate([keys, key], axis=1), np.concatenate([values, value], axis=1)
    scores = np.einsum("bqhd,bkhd->bhqk", query, front) * scale
    scores[..., len(prefix[0]) :] += bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    if factors is not None:
        weights *= factors[:, None, None]
    return np.einsum("bhqk,bkhd->bqhd", weights, behind).reshape(*query.shape[:2], -1)


def masked(mask: np.ndarray) -> np.ndarray:
    """The bias that keeps all queries from the padding, `(batch, 1, 1, keys)`."""
    return np.where(mask > 0, 0.0, -np.inf)[:, None, None]


def causal(length: int) -> np.ndarray:
    return np.where(np.tri(length) > 0, 0.0, -np.inf)


def bucket(distance: int, bidirectional: bool, buckets: int = 8, far: int = 128) -> int:
    """T5's bucket of a key that is `distance` after the query (arXiv 1910.10683, and its reference code)."""
    if bidirectional:
        half = buckets // 2
        return half * (distance > 0) + bucket(-abs(distance), False, half, far)
    back, exact = max(-distance, 0), buckets // 2
    if back < exact:
        return back
    return min(exact + int(math.log(back / exact) / math.log(far / exact) * (buckets - exact)), buckets - 1)


def t5_bias(table: np.ndarray, rows: range, columns: range, bidirectional: bool) -> np.ndarray:
    """`(heads, rows, columns)` from the embedding of the buckets."""
    found = [[bucket(column - row, bidirectional, len(table)) for column in columns] for row in rows]
    return table[np.array(found)].transpose(2, 0, 1)


def bert_attention(held: Held, x: np.ndarray, bias: np.ndarray, factors=None) -> np.ndarray:
    own, output = held.weights["self"], held.weights["output"]
    query, key, value = (in_heads(own[name], x) for name in ("query", "key", "value"))
    context = attend(query, key, value, held.prefix, bias, factors=factors)
    return layer_norm(output["LayerNorm"], dense(output["dense"], context) + x)


def check(found: Any, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    difference = np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()
    print(f"{difference:.1e}")
    assert difference < tolerance, f"differs by {difference:.1e} of the largest entry"


@pytest.mark.parametrize("factors", [None, np.array([0.5, 0.0], np.float32)], ids=["", "head_mask"])
def test_an_encoder_with_padding_is_the_formula(factors):
    x = numbers(BATCH, LENGTH, DIM)
    held = Held(FlaxBertAttention(BERT), x, MASK, factors)
    check(held(), bert_attention(held, x, masked(MASK), factors))


def test_crossattention_with_padding_in_the_encoder_is_the_formula():
    x, encoded = numbers(BATCH, 4, DIM), numbers(BATCH, LENGTH, DIM, seed=2)
    module = FlaxBartAttention(BartConfig(), embed_dim=DIM, num_heads=HEADS)
    held = Held(module, x, key_value_states=encoded, attention_mask=MASK)
    own = held.weights
    query, key, value = (
        in_heads(own[name], y) for name, y in zip(("q_proj", "k_proj", "v_proj"), (x, encoded, encoded), strict=True)
    )
    check(held(), dense(own["out_proj"], attend(query, key, value, held.prefix, masked(MASK))))


def test_a_causal_decoder_is_the_formula():
    x = numbers(BATCH, LENGTH, DIM)
    module = FlaxBartAttention(BartConfig(max_position_embeddings=16), embed_dim=DIM, num_heads=HEADS, causal=True)
    held = Held(module, x, attention_mask=MASK)
    own = held.weights
    query, key, value = (in_heads(own[name], x) for name in ("q_proj", "k_proj", "v_proj"))
    bias = masked(MASK) + causal(LENGTH)
    check(held(), dense(own["out_proj"], attend(query, key, value, held.prefix, bias)))


@pytest.mark.parametrize("is_decoder", [False, True], ids=["encoder", "decoder"])
def test_t5_with_its_relative_positions_is_the_formula(is_decoder):
    x = numbers(BATCH, LENGTH, DIM)
    module = FlaxT5Attention(T5, has_relative_attention_bias=True, causal=is_decoder)
    held = Held(module, x, attention_mask=MASK)
    own = held.weights
    query, key, value = (in_heads(own[name], x) for name in "qkv")
    bias = masked(MASK) + t5_bias(own["relative_attention_bias"]["embedding"], range(6), range(6), not is_decoder)
    if is_decoder:
        bias = bias + causal(LENGTH)
    check(held(), dense(own["o"], attend(query, key, value, held.prefix, bias, scale=1.0)))


def test_distilbert_is_the_formula():
    x = numbers(BATCH, LENGTH, DIM)
    config = DistilBertConfig(dim=DIM, n_heads=HEADS)
    held = Held(FlaxMultiHeadSelfAttention(config), x, x, x, MASK, prefixes=(3, 2))
    own = held.weights
    query, key, value = (in_heads(own[name], x) for name in ("q_lin", "k_lin", "v_lin"))
    check(held(), dense(own["out_lin"], attend(query, key, value, held.prefix, masked(MASK))))


def test_flax_own_attention_is_the_formula():
    x, other = numbers(BATCH, LENGTH, DIM), numbers(BATCH, 4, DIM, seed=2)
    mask = np.random.default_rng(0).random((BATCH, 1, LENGTH, 4)) < 0.5
    held = Held(nn.MultiHeadDotProductAttention(HEADS), x, other, mask=mask)
    own = held.weights
    query, key, value = (
        np.einsum("bld,dhw->blhw", y, own[name]["kernel"]) + own[name]["bias"]
        for name, y in zip(("query", "key", "value"), (x, other, other), strict=True)
    )
    # Flax masks with the smallest float32, so that a query that sees no key attends to the prefix alone.
    context = attend(query, key, value, held.prefix, np.where(mask, 0.0, -np.inf))
    check(held(), context @ own["out"]["kernel"].reshape(DIM, DIM) + own["out"]["bias"])


def test_albert_shares_one_prefix_over_its_layers():
    config = AlbertConfig(
        vocab_size=60,
        hidden_size=DIM,
        embedding_size=8,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        max_position_embeddings=16,
    )
    model = transformers.FlaxAlbertModel(config, _do_init=False)
    params = random(model.params_shape_tree, 0)
    delta = jdelta.PrefixModel(model, prefix_token_num=3, reparameterize=False)
    assert len(delta.targets) == 1
    ids = np.arange(5, 5 + BATCH * LENGTH).reshape(BATCH, LENGTH)
    params = jdelta.graft(params, random(delta.shapes(), 1))
    run = jax.jit(lambda params: model(ids, MASK, params=params, output_hidden_states=True).hidden_states)
    outputs = run(params)
    (layer,) = [tree for _, tree in walk(float64(params)) if "full_layer_layer_norm" in tree]
    own = layer["attention"]
    x = np.asarray(outputs[0], np.float64)
    for found in outputs[1:]:
        query, key, value = (in_heads(own[name], x) for name in ("query", "key", "value"))
        prefix = own["prefix"]["keys"], own["prefix"]["values"]
        y = dense(own["dense"], attend(query, key, value, prefix, masked(MASK)))
        y = layer_norm(own["LayerNorm"], y + x)
        z = dense(layer["ffn"], y)
        z = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        x = layer_norm(layer["full_layer_layer_norm"], dense(layer["ffn_output"], z) + y)
        check(found, x, 3e-6)  # grows with the layers


def test_fewer_key_heads_are_the_model_with_repeated_keys():
    """Llama with one key head for two heads is Llama with that head's projections, and prefix, twice."""
    grouped, whole = (
        zoo.build("FlaxLlamaForCausalLM", {"num_hidden_layers": 1, "num_key_value_heads": heads}, _do_init=False)
        for heads in (1, 2)
    )
    delta, other = (jdelta.PrefixModel(model, prefix_token_num=3, reparameterize=False) for model in (grouped, whole))
    params = jdelta.graft(random(grouped.params_shape_tree, 0), random(delta.shapes(), 1))
    repeated = surgery.flatten(params)
    for path, leaf in repeated.items():
        if "prefix" in path:
            assert leaf.shape == (3, 1, WIDTH)
            repeated[path] = jnp.repeat(leaf, 2, axis=1)
        if {"k_proj", "v_proj"} & set(path):
            repeated[path] = jnp.tile(leaf, (1, 2))
    repeated = surgery.unflatten(repeated)
    chex.assert_trees_all_equal_shapes(repeated, jdelta.graft(whole.params_shape_tree, other.shapes()))
    found, expected = (
        jax.jit(lambda p, model=model: model(IDS, params=p).logits)(tree)
        for model, tree in ((grouped, params), (whole, repeated))
    )
    check(found, np.asarray(expected, np.float64))


def test_two_prefixes_are_one_with_the_tokens_of_both():
    x = numbers(BATCH, LENGTH, DIM)
    two, one = (Held(FlaxBertAttention(BERT), x, MASK, None, prefixes=prefixes) for prefixes in ((2, 3), (5,)))
    flat = surgery.flatten(one.backbone.params)
    for name, part in zip(("keys", "values"), two.prefix, strict=True):
        flat[("module", "prefix", name)] = jnp.asarray(part, jnp.float32)
    check(two(), np.asarray(one(surgery.unflatten(flat)), np.float64))


@pytest.mark.parametrize("lora_first", [False, True])
def test_lora_on_the_output_projection_sees_the_part_of_the_prefix(lora_first):
    x = numbers(BATCH, LENGTH, DIM)
    held = Held(FlaxBertAttention(BERT), x, MASK, None, prefixes=())
    attach = [
        lambda: jdelta.PrefixModel(held.backbone, modified_modules=["module"], reparameterize=False),
        lambda: jdelta.LoraModel(held.backbone, modified_modules=["output.dense"], lora_r=2, lora_alpha=6),
    ]
    for one in reversed(attach) if lora_first else attach:
        one()
    held.backbone.params = random(held.backbone.params, 0)
    own, output = held.weights["self"], held.weights["output"]
    query, key, value = (in_heads(own[name], x) for name in ("query", "key", "value"))
    context = attend(query, key, value, held.prefix, masked(MASK))
    lora = output["dense"]["lora"]
    projected = dense(output["dense"], context) + (6 / 2) * context @ lora["a"] @ lora["b"]
    check(held(), layer_norm(output["LayerNorm"], projected + x))


# --- under flax's lifted transforms


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.MultiHeadDotProductAttention(HEADS, name="attn")(x), None


class Stack(nn.Module):
    """Blocks in a scan, recomputed in the backward pass."""

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return blocks(name="blocks")(x, None)[0]


@pytest.mark.parametrize("reparameterize", [False, True])
@pytest.mark.slow
def test_each_layer_of_a_scan_has_a_prefix_of_its_own(reparameterize):
    x = numbers(BATCH, LENGTH, DIM)
    backbone = jdelta.Backbone(Stack(), random(jax.eval_shape(Stack().init, jax.random.key(0), x), 0)["params"], (x,))
    delta = jdelta.PrefixModel(
        backbone,
        modified_modules=["attn"],
        prefix_token_num=3,
        reparameterize=reparameterize,
        embed_dim=5,
        mid_dim=4,
    )
    trainable, frozen = delta.partition()

    @jax.jit
    def run(trainable):
        def loss(trainable):
            y = backbone(x, params=jdelta.combine(trainable, frozen))
            return y.std(), y

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    (_, found), grads = run(trainable)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(grads))
    written = delta.materialise(backbone.params) if reparameterize else backbone.params
    assert written["blocks"]["attn"]["prefix"]["keys"].shape == (3, 3, HEADS, WIDTH)
    y = x.astype(np.float64)
    for layer in range(3):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], float64(written["blocks"]["attn"]))
        query, key, value = (
            np.einsum("bld,dhw->blhw", y, own[name]["kernel"]) + own[name]["bias"] for name in ("query", "key", "value")
        )
        context = attend(query, key, value, (own["prefix"]["keys"], own["prefix"]["values"]))
        y = y + context @ own["out"]["kernel"].reshape(DIM, DIM) + own["out"]["bias"]
    check(found, y)


# --- errors


@pytest.mark.parametrize(
    ("class_name", "host", "message"),
    [
        ("FlaxBertModel", "0.intermediate", r"0\.intermediate.*computes no attention"),
        ("FlaxBertModel", "pooler.dense", r"pooler\.dense.*computes no attention"),
        ("FlaxBertModel", "encoder", r"encoder.*computes attention more than once\. Name the attention modules inside"),
        ("FlaxDistilBertModel", "transformer", r"transformer.*computes attention more than once"),
        ("FlaxBartModel", "decoder.layers.0", r"decoder\.layers\.0.*computes attention more than once"),
        ("FlaxResNetModel", "embedder", r"embedder.*computes no attention"),
    ],
)
def test_a_host_computes_one_attention(class_name, host, message):
    model = zoo.build(class_name, _do_init=False)
    module = model.module
    with pytest.raises(TypeError, match=message):
        jdelta.PrefixModel(model, modified_modules=[host])
    assert model.module is module


@pytest.mark.parametrize(
    "arguments",
    [
        {"prefix_token_num": 0},
        {"prefix_token_num": -1},
        {"prefix_token_num": 2.5},
        {"prefix_token_num": "6"},
        {"prefix_token_num": True},
        {"reparameterize": "yes"},
        {"embed_dim": 0},
        {"mid_dim": None},
    ],
    ids=str,
)
def test_arguments_are_checked(arguments):
    (name,) = arguments
    with pytest.raises((ValueError, TypeError), match=name):
        jdelta.PrefixModel(zoo.build("FlaxBertModel", _do_init=False), **arguments)


# --- sparse attention


def test_the_local_attention_of_longt5_is_the_formula():
    radius, length = 2, 8  # not a multiple of the block, which is 3
    x = numbers(BATCH, length, DIM)
    mask = np.ones((BATCH, length), np.int32)
    mask[1, 6:] = 0
    held = Held(FlaxLongT5LocalAttention(longt5(radius), has_relative_attention_bias=True), x, attention_mask=mask)
    own = held.weights
    query, key, value = (in_heads(own[name], x) for name in "qkv")
    expected = dense(own["o"], attend(query, key, value, held.prefix, local_bias(own, mask, radius), scale=1.0))
    check(held()[mask > 0], expected[mask > 0])  # a padded query of LongT5 sees something else


def test_the_transient_global_attention_of_longt5_is_the_formula():
    radius, length, block = 2, 8, 4
    x = numbers(BATCH, length, DIM)
    mask = np.ones((BATCH, length), np.int32)
    module = FlaxLongT5TransientGlobalAttention(longt5(radius), has_relative_attention_bias=True)
    held = Held(module, x, attention_mask=mask)
    own = held.weights
    blocks = x.astype(np.float64).reshape(BATCH, -1, block, DIM).sum(2)
    blocks /= np.sqrt((blocks**2).mean(-1, keepdims=True) + longt5(radius).layer_norm_epsilon)
    blocks *= own["global_input_layer_norm"]["weight"]
    table = own["global_relative_attention_bias"]["embedding"]
    side = np.array([[table[bucket(g - i // block, True)] for g in range(length // block)] for i in range(length)])
    side = np.broadcast_to(side.transpose(2, 0, 1), (BATCH, HEADS, length, length // block))
    query = in_heads(own["q"], x)
    key, value = (in_heads(own[name], np.concatenate([x, blocks], axis=1)) for name in "kv")
    bias = np.concatenate([local_bias(own, mask, radius), side], axis=-1)
    check(held(), dense(own["o"], attend(query, key, value, held.prefix, bias, scale=1.0)))


def longt5(radius: int) -> LongT5Config:
    return LongT5Config(
        d_model=DIM,
        d_kv=WIDTH,
        num_heads=HEADS,
        local_radius=radius,
        global_block_size=4,
        relative_attention_num_buckets=8,
    )


def local_bias(own: Any, mask: np.ndarray, radius: int) -> np.ndarray:
    """Keys within the radius, with the bias of their distance."""
    length = mask.shape[1]
    near = np.abs(np.subtract.outer(np.arange(length), np.arange(length))) <= radius
    table = own["relative_attention_bias"]["embedding"]
    bias = np.where(near, t5_bias(table, range(length), range(length), True), -np.inf)
    return bias + masked(mask)


@pytest.mark.parametrize("prefixes", [(3,), (1, 2)])
@pytest.mark.slow
def test_the_block_sparse_attention_of_big_bird_is_the_formula(prefixes):
    """Which keys a query sees is read from the model's own function: with the identity as values, it returns weights.

    They are `count · exp(score) / total`, for a key that is seen `count` times, so that 1/total is the smallest of
    their quotients with exp(score).
    """
    length = 2 * 9
    config = BigBirdConfig(hidden_size=DIM, num_attention_heads=HEADS, block_size=2, num_random_blocks=1)
    x = numbers(BATCH, length, DIM)
    mask = np.ones((BATCH, length), np.int32)
    mask[1, 15:] = 0
    factors = np.array([0.5, 0.0], np.float32)  # which the model takes no notice of
    held = Held(FlaxBigBirdAttention(config), x, mask, factors, prefixes=prefixes)
    own, output = held.weights["self"], held.weights["output"]
    query, key, value = (in_heads(own[name], x).swapaxes(1, 2) for name in ("query", "key", "value"))

    sparse = FlaxBigBirdBlockSparseAttention(config, block_sparse_seed=None)
    masks = sparse.create_masks_for_block_sparse_attn(mask, config.block_size)
    identity = jnp.broadcast_to(jnp.eye(length), (BATCH, HEADS, length, length))
    arguments = (identity, *masks[1:], masks[0], masks[0], HEADS, WIDTH)
    weights, _ = sparse.apply(
        {},
        *(jnp.asarray(a, jnp.float32) for a in (query, key)),
        *arguments,
        deterministic=True,
        method="bigbird_block_sparse_attention",
    )
    weights = np.asarray(weights, np.float64).reshape(BATCH, length, HEADS, length).swapaxes(1, 2)
    real = np.broadcast_to(mask[:, None, :, None] > 0, weights.shape)
    assert (weights[real] == 0).any()  # sparse
    exponentials = np.exp(np.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(WIDTH))
    quotients = weights / exponentials
    seen = weights > 1e-12
    total = 1 / np.where(seen, quotients, np.inf).min(-1)
    counts = quotients * total[..., None]
    np.testing.assert_allclose(counts[real], np.round(counts[real]), atol=1e-4)  # the reading is right

    keys, values = held.prefix
    scores = np.exp(np.einsum("bhqd,nhd->bhqn", query, keys) / math.sqrt(WIDTH))
    context = np.einsum("bhqn,nhd->bhqd", scores, values)
    context += np.einsum("bhqk,bhkd->bhqd", exponentials * np.where(seen, np.round(counts), 0), value)
    context /= scores.sum(-1, keepdims=True) + total[..., None]
    context = context.swapaxes(1, 2).reshape(BATCH, length, DIM)
    expected = layer_norm(output["LayerNorm"], dense(output["dense"], context) + x)
    check(held()[mask > 0], expected[mask > 0], 2e-6)  # the total is itself read from float32
