"""Prefixes in attention of nnx modules, against attention written out here in float64 and against linen."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tunix_models
from flax import linen as nn
from flax import nnx
from flax.nnx.nn import attention as flax_attention
from jax.nn import dot_product_attention
from tiers import breadth

import jdelta

TOLERANCE = 2e-6  # of the largest entry: some roundings of float32
BATCH, LENGTH, KEYS, HEADS, WIDTH, TOKENS = 2, 5, 7, 4, 4, 3
DIM = HEADS * WIDTH
SOURCES = (jax.nn, nnx, flax_attention)


def states(length, heads=HEADS, seed=0):
    return jax.random.normal(jax.random.key(seed), (BATCH, length, heads, WIDTH))


def attended(query, key, value, prefix, seen=True, bias=0.0, scale=None, cap=None):
    """Attention in which the first keys and values are the prefix's, whatever is masked; `seen` and `bias` are
    `(batch, heads, queries, keys)` of the module's own, or broadcast to that."""
    query, key, value, *prefix = (np.asarray(a, np.float64) for a in (query, key, value, *prefix))
    groups, n = query.shape[-2] // key.shape[-2], len(prefix[0])
    key, value = (
        np.concatenate([np.broadcast_to(new, (len(own), *new.shape)), own], axis=1).repeat(groups, axis=2)
        for new, own in zip(prefix, (key, value), strict=True)
    )
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    own = scores[..., n:]
    own += np.asarray(bias, np.float64)
    own[~np.broadcast_to(np.asarray(seen, bool), own.shape)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(axis=-1, keepdims=True), value)


def close(got, wanted, tolerance=TOLERANCE):
    wanted = np.asarray(wanted)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


def prefix_of(module, name="prefix"):
    leaves = getattr(module, name)
    return leaves.keys[...], leaves.values[...]


def with_prefix(module, *inputs, name="attn", **options):
    """A model that holds a module, with a prefix at it."""
    model = Holder(module)
    options = {"prefix_token_num": TOKENS, "reparameterize": False, "dummy_inputs": inputs, **options}
    return model, jdelta.PrefixModel(model, modified_modules=[name], **options)


class Holder(nnx.Module):
    """Puts a module below a name."""

    def __init__(self, module):
        self.attn = module

    def __call__(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


# --- the functions, wherever a module has them from


class OfJax(nnx.Module):
    def __call__(self, *args, **kwargs):
        return jax.nn.dot_product_attention(*args, **kwargs)


class OfNnx(nnx.Module):
    def __call__(self, *args, **kwargs):
        return nnx.dot_product_attention(*args, **kwargs)


class ByName(nnx.Module):
    def __call__(self, *args, **kwargs):
        return dot_product_attention(*args, **kwargs)


class ByAttribute(nnx.Module):
    def __init__(self, attend):
        self.attend = attend

    def __call__(self, *args, **kwargs):
        return self.attend(*args, **kwargs)


class Inside(nnx.Module):
    """Attention in a module inside that which has the prefix."""

    def __init__(self):
        self.core = OfJax()

    def __call__(self, *args, **kwargs):
        return self.core(*args, **kwargs)


def helper(*args, **kwargs):
    return jax.nn.dot_product_attention(*args, **kwargs)


WAYS = {
    "jax.nn.…": OfJax,
    "nnx.…": OfNnx,
    "a name of the file": ByName,
    "a module inside": Inside,
    "an attribute": lambda: ByAttribute(jax.nn.dot_product_attention),
    "nnx's in an attribute": lambda: ByAttribute(nnx.dot_product_attention),
    "a partial": lambda: ByAttribute(functools.partial(dot_product_attention, implementation="xla")),
    "nnx's in a partial": lambda: ByAttribute(functools.partial(nnx.dot_product_attention, dtype=jnp.float32)),
    "a function of the file": lambda: ByAttribute(helper),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_prefix_is_before_the_keys_wherever_the_function_is_looked_up(way):
    query, key, value = states(LENGTH), states(KEYS, seed=1), states(KEYS, seed=2)
    originals = [source.dot_product_attention for source in SOURCES]
    model, delta = with_prefix(WAYS[way](), query, key, value)
    bare = dict(vars(model.attn))
    close(model(query, key, value), attended(query, key, value, prefix_of(model.attn)))
    seen = jnp.arange(KEYS) < 4
    got = model(query, key, value, mask=jnp.broadcast_to(seen, (BATCH, 1, LENGTH, KEYS)))
    close(got, attended(query, key, value, prefix_of(model.attn), seen))
    delta.detach()
    close(model(query, key, value), attended(query, key, value, (np.zeros((0, HEADS, WIDTH)),) * 2))
    assert [source.dot_product_attention for source in SOURCES] == originals
    assert {name: bare[name] for name in ("attend",) if name in bare} == {
        name: value for name, value in vars(model.attn).items() if name == "attend"
    }


def of_distance(queries=LENGTH, keys=KEYS):
    return np.arange(keys) - np.arange(queries)[:, None]


def lengths_of(*numbers):
    return jnp.array(numbers, jnp.int32)


BIAS = jax.random.normal(jax.random.key(5), (1, HEADS, LENGTH, KEYS))
SEEN = jax.random.bernoulli(jax.random.key(6), 0.6, (BATCH, 1, LENGTH, KEYS))
UP_TO = np.arange(KEYS) < np.array([7, 3])[:, None, None, None]
# the arguments of jax.nn's function -> those of the formula
ARGUMENTS = {
    "bias": ({"bias": BIAS}, {"bias": BIAS}),
    "bias of all keys": ({"bias": BIAS[..., :1]}, {"bias": BIAS[..., :1]}),
    "mask": ({"mask": SEEN}, {"seen": SEEN}),
    "mask of all keys": ({"mask": SEEN[:1, :, :, :1]}, {"seen": SEEN[:1, :, :, :1]}),
    "causal": ({"is_causal": True}, {"seen": of_distance() <= 0}),
    "causal mask": ({"mask": SEEN, "is_causal": True}, {"seen": SEEN & (of_distance() <= 0)}),
    "window": ({"local_window_size": 1}, {"seen": abs(of_distance()) <= 1}),
    "window to the left": (
        {"local_window_size": (2, 0), "bias": BIAS},
        {"seen": (of_distance() <= 0) & (of_distance() >= -2), "bias": BIAS},
    ),
    "causal window": (
        {"local_window_size": (1, 1), "is_causal": True},
        {"seen": (of_distance() <= 0) & (of_distance() >= -1)},
    ),
    "lengths of keys": ({"key_value_seq_lengths": lengths_of(7, 3)}, {"seen": UP_TO}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
}


@pytest.fixture(scope="module")
def whole():
    """Attention by jax.nn's function, with a prefix."""
    return with_prefix(OfJax(), *(states(LENGTH),) * 3)[0]


@pytest.mark.parametrize("case", ARGUMENTS)
def test_masks_biases_windows_and_lengths_are_of_the_own_keys_alone(case, whole):
    given, formula = ARGUMENTS[case]
    query, key, value = states(LENGTH), states(KEYS, seed=1), states(KEYS, seed=2)
    close(whole(query, key, value, **given), attended(query, key, value, prefix_of(whole.attn), **formula))


@pytest.mark.parametrize("case", breadth(ARGUMENTS, "causal window"))
def test_inside_jit_as_outside(case, whole):
    given = ARGUMENTS[case][0]
    arrays = {key: value for key, value in given.items() if isinstance(value, jax.Array)}
    rest = {key: value for key, value in given.items() if key not in arrays}
    query, key, value = states(LENGTH), states(KEYS, seed=1), states(KEYS, seed=2)
    call = nnx.jit(lambda model, arrays, *states: model(*states, **arrays, **rest))
    close(call(whole, arrays, query, key, value), whole(query, key, value, **given))


def test_queries_beyond_their_length_give_zero_as_without_a_prefix(whole):
    query, key, value = states(LENGTH), states(KEYS, seed=1), states(KEYS, seed=2)
    got = whole(query, key, value, query_seq_lengths=lengths_of(5, 2), key_value_seq_lengths=lengths_of(7, 3))
    wanted = attended(query, key, value, prefix_of(whole.attn), UP_TO)
    wanted[1, 2:] = 0
    close(got, wanted)


def test_without_a_batch_and_with_the_logarithm_of_the_sum(whole):
    query, key, value = states(LENGTH), states(KEYS, seed=1), states(KEYS, seed=2)
    got, residual = whole(query[0], key[0], value[0], return_residual=True, is_causal=True)
    wanted = attended(query[:1], key[:1], value[:1], prefix_of(whole.attn), of_distance() <= 0)
    close(got, wanted[0])
    keys = np.concatenate([prefix_of(whole.attn)[0], key[0]])
    scores = np.einsum("qhd,khd->qhk", query[0], keys) / math.sqrt(WIDTH)
    scores[:, :, TOKENS:][(of_distance() > 0)[:, None].repeat(HEADS, axis=1)] = -np.inf
    close(residual, np.log(np.exp(scores).sum(axis=-1)))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("make", [OfJax, OfNnx])
def test_of_keys_that_queries_share_the_prefix_has_as_many_heads(make, heads):
    query, key, value = states(LENGTH), states(KEYS, heads, seed=1), states(KEYS, heads, seed=2)
    model, _ = with_prefix(make(), query, key, value)
    assert prefix_of(model.attn)[0].shape == (TOKENS, heads, WIDTH)
    got = model(query, key, value, is_causal=True)
    close(got, attended(query, key, value, prefix_of(model.attn), of_distance() <= 0))


def test_a_batch_of_two_axes():
    query, key, value = (a[None] for a in (states(LENGTH), states(LENGTH, seed=1), states(LENGTH, seed=2)))
    model, _ = with_prefix(OfNnx(), query, key, value)
    got = model(query, key, value, is_causal=True)
    seen = of_distance(LENGTH, LENGTH) <= 0
    close(got[0], attended(query[0], key[0], value[0], prefix_of(model.attn), seen))


def test_the_implementation_is_passed_on(monkeypatch, whole):
    """A program with cuDNN's attention, as far as JAX asks about a GPU before it runs."""
    checks = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(checks, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(checks, "check_compute_capability", lambda *_: True)
    query, key, value = (jax.ShapeDtypeStruct((BATCH, length, HEADS, 64), jnp.bfloat16) for length in (8, 5, 5))
    model, _ = with_prefix(OfJax(), query, key, value)
    run = nnx.jit(lambda model, *states: model(*states, implementation="cudnn", is_causal=True))
    graphdef, state = nnx.split(model)
    program = jax.jit(lambda state, *s: run(nnx.merge(graphdef, state), *s)).trace(state, query, key, value)
    assert "@__cudnn$" in program.lower(lowering_platforms=("cuda",)).as_text()


# --- attention weights, and nnx.MultiHeadAttention


class ByWeights(nnx.Module):
    """Sums values with flax.nnx's weights, and projects the sums."""

    def __init__(self, rngs):
        self.out = nnx.LinearGeneral((HEADS, WIDTH), DIM, axis=(-2, -1), rngs=rngs)

    def __call__(self, query, key, value, **kwargs):
        weights = flax_attention.dot_product_attention_weights(query, key, **kwargs)
        value = jnp.repeat(value, HEADS // value.shape[-2], axis=-2)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, value)), weights


@pytest.mark.parametrize("heads", [HEADS, 2])
def test_of_weights_the_own_are_returned_and_the_rest_comes_to_the_projection(heads):
    query, key, value = states(LENGTH), states(KEYS, heads, seed=1), states(KEYS, heads, seed=2)
    model, _ = with_prefix(ByWeights(nnx.Rngs(0)), query, key, value)
    got, weights = model(query, key, value, bias=BIAS, is_causal=True)
    wanted = attended(query, key, value, prefix_of(model.attn), of_distance() <= 0, BIAS)
    close(got, model.attn.out(jnp.asarray(wanted, jnp.float32)))
    assert weights.shape == (BATCH, HEADS, LENGTH, KEYS)
    assert weights.sum(axis=-1).max() < 1


X = jax.random.normal(jax.random.key(9), (BATCH, LENGTH, DIM))
CAUSAL = of_distance(LENGTH, LENGTH) <= 0
OWN = jnp.broadcast_to(jnp.arange(LENGTH) < 3, (BATCH, 1, LENGTH, LENGTH))


def multi_head(**options):
    return nnx.MultiHeadAttention(HEADS, DIM, decode=False, rngs=nnx.Rngs(0), **options)


def projected(module, x=X):
    query, key, value = module.query(x), module.key(x), module.value(x)
    return (query, key, value) if module.query_ln is None else (module.query_ln(query), module.key_ln(key), value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2},
        {"normalize_qk": True},
        {"dropout_rate": 0.5, "deterministic": True},  # then flax computes the weights
        {"dropout_rate": 0.5, "deterministic": True, "num_kv_heads": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(("given", "seen"), [({}, True), ({"mask": OWN, "is_causal": True}, CAUSAL & OWN)])
def test_multi_head_attention_is_that_with_longer_keys(options, given, seen):
    module = multi_head(**options)
    model, _ = with_prefix(module, X)
    wanted = attended(*projected(module), prefix_of(module), seen)
    close(model(X, **given), module.out(jnp.asarray(wanted, jnp.float32)))


def test_a_cache_is_of_the_own_keys_and_each_step_sees_the_prefix():
    module = multi_head(num_kv_heads=2)
    model, _ = with_prefix(module, X)
    at_once = model(X, is_causal=True)
    module.init_cache((BATCH, LENGTH, DIM))
    steps = [model(X[:, i : i + 1], decode=True) for i in range(LENGTH)]
    close(jnp.concatenate(steps, axis=1), at_once, 4e-6)
    assert module.cached_key.shape == (BATCH, LENGTH, 2, WIDTH)
    close(module.cached_key[...], module.key(X))


def test_weights_that_are_sown_are_of_prefix_and_own_keys():
    module = multi_head()
    model, _ = with_prefix(module, X)
    got = model(X, sow_weights=True)
    close(got, model(X))
    (weights,) = nnx.pop(model, nnx.Intermediate)["attn"]["attention_weights"].get_value()
    assert weights.shape == (BATCH, HEADS, LENGTH, TOKENS + LENGTH)
    close(weights.sum(axis=-1), np.ones(weights.shape[:-1]))


def test_two_prefixes_of_one_module_are_both_before_the_keys():
    module = multi_head()
    model, _ = with_prefix(module, X)
    jdelta.PrefixModel(
        model, modified_modules=["attn"], name="more", prefix_token_num=2, reparameterize=False, dummy_inputs=(X,)
    )
    both = [np.concatenate(pair) for pair in zip(prefix_of(module), prefix_of(module, "more"), strict=True)]
    wanted = attended(*projected(module), both, CAUSAL)
    close(model(X, is_causal=True), module.out(jnp.asarray(wanted, jnp.float32)))


def test_as_in_linen_outputs_and_gradients():
    """The same weights and the same prefix."""
    linen = nn.MultiHeadDotProductAttention(HEADS)
    module = multi_head()
    model, delta = with_prefix(module, X)
    params = {
        name: {key: getattr(getattr(module, name), key)[...] for key in ("kernel", "bias")}
        for name in ("query", "key", "value", "out")
    }
    backbone = jdelta.Backbone(LinenHolder(linen), {"attn": params}, (X,))
    jdelta.PrefixModel(backbone, modified_modules=["attn"], prefix_token_num=TOKENS, reparameterize=False)
    prefix = dict(zip(("keys", "values"), prefix_of(module), strict=True))
    tree = {"attn": {**params, "prefix": prefix}}

    def loss(tree):
        return jnp.square(backbone(X, params=tree)).sum()

    chex.assert_trees_all_equal_shapes(backbone.params, tree)
    close(model(X), backbone(X, params=tree))
    gradients = nnx.grad(lambda model: jnp.square(model(X)).sum(), argnums=nnx.DiffState(0, delta.filter))(model)
    wanted = jax.grad(loss)(tree)["attn"]["prefix"]
    for name in ("keys", "values"):
        close(gradients["attn"]["prefix"][name][...], wanted[name])


class LinenHolder(nn.Module):
    """Puts a module below a name."""

    attn: nn.Module

    def __call__(self, *args):
        return self.attn(*args)


def test_a_reparameterised_prefix_trains_and_is_materialised():
    model, delta = with_prefix(multi_head(), X, reparameterize=True, embed_dim=3, mid_dim=5)
    before = model(X)
    loss = nnx.jit(nnx.value_and_grad(lambda m: jnp.square(m(X)).sum(), argnums=nnx.DiffState(0, delta.filter)))
    value, gradients = loss(model)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
    np.testing.assert_allclose(value, jnp.square(before).sum(), rtol=1e-5)


# --- what is refused


class NoAttention(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(DIM, DIM, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


class Twice(nnx.Module):
    def __call__(self, query, key, value):
        return nnx.dot_product_attention(nnx.dot_product_attention(query, key, value), key, value)


def test_a_module_without_attention_is_named_and_is_as_it_was():
    model = Holder(NoAttention(nnx.Rngs(0)))
    before = nnx.graphdef(model)
    with pytest.raises(TypeError, match=r"attn \(NoAttention\).*computes no attention"):
        jdelta.PrefixModel(model, modified_modules=["attn"], dummy_inputs=(X,))
    assert nnx.graphdef(model) == before


def test_a_module_that_attends_twice_is_named():
    with pytest.raises(TypeError, match=r"attn \(Twice\).*more than once"):
        with_prefix(Twice(), *(states(LENGTH),) * 3)


def test_values_of_another_width_are_refused():
    class Wide(nnx.Module):
        def __call__(self, query, key, value):
            return nnx.dot_product_attention(query, key, value, dropout_rate=0.5, deterministic=True)

    with pytest.raises(TypeError, match=r"keys and values of one shape.*\(4, 4\).*\(4, 8\)"):
        with_prefix(Wide(), states(LENGTH), states(LENGTH), jnp.zeros((BATCH, LENGTH, HEADS, 2 * WIDTH)))


# --- attention that tunix's models write out


def rotated(family, attention, states, positions):
    library = tunix_models.library(family)
    if family == "qwen2":
        return library.apply_rotary_embedding(states, *angles(positions))
    if family == "gemma3":
        options = {"base_frequency": attention.rope_base_frequency, "scale_factor": attention.rope_scale_factor}
        return library.apply_rope(states, positions, head_dim=attention.head_dim, **options)
    return library.apply_rope(states, positions, head_dim=attention.head_dim)


def angles(positions, width=8):
    return tunix_models.library("qwen2")._generate_pos_embeddings(positions, width, rope_theta=1_000_000)


def written_out(family, attention, x, positions, mask, prefix):
    """What an attention module of tunix computes, with a prefix."""
    cap, seen, scale = None, mask[:, None], None
    if family.startswith("gemma"):
        query = attention.q_einsum(x)
        key, value = attention.kv_einsum(x)
        if family == "gemma3":
            query, key = attention._query_norm(query), attention._key_norm(key)
            scale = attention.query_pre_attn_scalar
        cap = getattr(attention, "attn_logits_soft_cap", None)
        if attention.attn_type.name == "LOCAL_SLIDING":
            seen = seen & (abs(of_distance(mask.shape[1], mask.shape[2])) < attention.sliding_window_size)
        project = attention.attn_vec_einsum
    else:
        query, key, value = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        if family == "qwen2":
            biases = (attention.q_bias, attention.k_bias, attention.v_bias)
            query, key, value = (
                a + bias[...].reshape(a.shape[2:]) for a, bias in zip((query, key, value), biases, strict=True)
            )
        if family == "qwen3":
            query, key = attention.q_norm(query), attention.k_norm(key)
        project = attention.o_proj
    query, key = (rotated(family, attention, a, positions) for a in (query, key))
    return project(jnp.asarray(attended(query, key, value, prefix, seen, scale=scale, cap=cap), jnp.float32))


WRITTEN_OUT = ["llama3", "qwen2", "qwen3", "gemma", "gemma3"]
LONGER = 8  # than Gemma's windows


@pytest.mark.tunix
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_written_out_attention_is_that_with_longer_keys(family, layer):
    model = tunix_models.build(family)
    attention = model.layers[layer].attn
    _, positions, cache, mask = tunix_models.inputs(length=LONGER)
    mask = mask.at[1, :, :2].set(False)  # padding at the left
    mask = mask | jnp.eye(LONGER, dtype=bool)
    x = jax.random.normal(jax.random.key(3), (BATCH, LONGER, 16))
    given = (cache, mask, *angles(positions)) if family == "qwen2" else (positions, cache, mask)
    held, delta = with_prefix(attention, x, *given)
    new, got = held(x, *given)
    assert new is None
    wanted = written_out(family, attention, x, positions, mask, prefix_of(attention))
    close(got, wanted, 4e-6)
    delta.detach()
    close(held(x, *given)[1], written_out(family, attention, x, positions, mask, (np.zeros((0, 2, 8)),) * 2), 4e-6)


def caches(layers, length, heads=2, width=8):
    shape = (BATCH, length, heads, width)
    return {
        f"layer_{i}": {"k": jnp.zeros(shape), "v": jnp.zeros(shape), "end_index": jnp.zeros(BATCH, jnp.int32)}
        for i in range(layers)
    }


@pytest.mark.tunix
@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_tokens_one_by_one_with_a_cache_give_what_all_give_at_once(family, remat):
    changes = {"remat_config": tunix_models.library(family).RematConfig.BLOCK} if remat else {}
    model = tunix_models.build(family, **changes)
    inputs = tunix_models.inputs(length=LONGER)
    bare = model(*inputs)[0]
    jdelta.PrefixModel(model, prefix_token_num=TOKENS, reparameterize=False, dummy_inputs=inputs)
    tokens, positions, _, mask = inputs
    at_once = model(*inputs)[0]
    assert jnp.abs(at_once - bare).max() > 0.1 * jnp.abs(bare).max()
    size, first = LONGER + 3, 4  # a cache of more places, and a prompt of four tokens
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 3)))
    logits, cache = model(tokens[:, :first], positions[:, :first], caches(2, size), mask[:, :first])
    steps = [logits]
    for i in range(first, LONGER):
        logits, cache = model(tokens[:, i : i + 1], positions[:, i : i + 1], cache, mask[:, i : i + 1])
        steps.append(logits)
    close(jnp.concatenate(steps, axis=1), at_once, 2e-5)
    assert {name: leaf.shape for name, leaf in cache["layer_1"].items()} == {
        "k": (BATCH, size, 2, 8),
        "v": (BATCH, size, 2, 8),
        "end_index": (BATCH,),
    }
    assert (cache["layer_0"]["end_index"] == LONGER).all()


@pytest.mark.tunix
@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3"])
def test_shifted_positions_are_those_after_the_prefix(family):
    model = tunix_models.build(family)
    tokens, positions, cache, mask = tunix_models.inputs()
    delta = jdelta.PrefixModel(
        model, prefix_token_num=TOKENS, reparameterize=False, dummy_inputs=(tokens, positions, cache, mask)
    )
    wanted = model(tokens, positions + TOKENS, cache, mask)[0]
    leaves = nnx.state(model, delta.filter)
    delta.remove()
    jdelta.PrefixModel(
        model,
        prefix_token_num=TOKENS,
        reparameterize=False,
        shift_positions=True,
        dummy_inputs=(tokens, positions, cache, mask),
    )
    nnx.update(model, leaves)
    close(model(tokens, positions, cache, mask)[0], wanted)


@pytest.mark.tunix
def test_positions_that_a_window_may_count_are_not_shifted():
    model = tunix_models.build("gemma")
    with pytest.raises(TypeError, match=r"layers\.0\.attn has a sliding window.*shift_positions"):
        jdelta.PrefixModel(model, shift_positions=True, dummy_inputs=tunix_models.inputs())


@pytest.mark.tunix
def test_a_prefix_trains_in_bfloat16_under_jit():
    model = tunix_models.build("gemma3", param_dtype=jnp.bfloat16)
    inputs = tunix_models.inputs()
    delta = jdelta.PrefixModel(model, prefix_token_num=TOKENS, dummy_inputs=inputs, embed_dim=4, mid_dim=4)
    loss = nnx.jit(nnx.grad(lambda m: m(*inputs)[0].astype(jnp.float32).sum(), argnums=nnx.DiffState(0, delta.filter)))
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(loss(model)))


@pytest.mark.tunix
def test_attention_without_a_way_in_is_named():
    model = tunix_models.build("gemma4")
    with pytest.raises(TypeError, match=r"layers\.0\.attn \(Attention\).*computes no attention"):
        jdelta.PrefixModel(model, dummy_inputs=tunix_models.inputs())
    model = tunix_models.build("qwen3", use_flash_attention=True)
    jdelta.PrefixModel(model, dummy_inputs=tunix_models.inputs(length=1))  # which computes it otherwise
    with pytest.raises(NotImplementedError, match=r"layers\.0\.attn.*use_flash_attention=False"):
        model(*tunix_models.inputs())
