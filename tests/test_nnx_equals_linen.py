"""The same delta on the same network, written in linen and in nnx, is the same: outputs, gradients, merging, files."""

import functools
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy
from flax import linen as nn
from flax import nnx
from flax.linen.attention import dot_product_attention_weights
from tiers import breadth

import jdelta

WIDTH, HEADS, INNER, WORDS, EXPERTS = 8, 2, 12, 20, 2
IDS = jnp.array([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
INPUTS = (IDS, (IDS > 0).astype(jnp.int32))

# --- in linen


class Projections(nn.Module):
    """Attention that is written out."""

    @nn.compact
    def __call__(self, x, mask):
        split = (*x.shape[:-1], HEADS, WIDTH // HEADS)
        q, k, v = (nn.Dense(WIDTH, name=f"{letter}_proj")(x).reshape(split) for letter in "qkv")
        weights = dot_product_attention_weights(q, k, mask=mask)
        return nn.Dense(WIDTH, name="o_proj")(jnp.einsum("...hqk,...khd->...qhd", weights, v).reshape(x.shape))


class Experts(nn.Module):
    """Two feed-forwards, whose weights belong to no module."""

    @nn.compact
    def __call__(self, x):
        wi = self.param("wi", nn.initializers.normal(), (EXPERTS, WIDTH, INNER))
        wo = self.param("wo", nn.initializers.normal(), (EXPERTS, INNER, WIDTH))
        return jnp.einsum("...ef,efd->...d", jnp.tanh(jnp.einsum("...d,edf->...ef", x, wi)), wo)


class FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH, use_bias=False, name="down")(nn.gelu(nn.Dense(INNER, name="up")(x)))


class Block(nn.Module):
    flax_attention: bool

    @nn.compact
    def __call__(self, x, mask):
        y = nn.LayerNorm(name="norm1")(x)
        if self.flax_attention:
            x = x + nn.MultiHeadDotProductAttention(HEADS, name="attn")(y, mask=mask)
        else:
            x = x + Projections(name="attn")(y, mask)
        y = nn.RMSNorm(name="norm2")(x)
        return x + FeedForward(name="ff")(y) + Experts(name="experts")(y)


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        for i in range(2):
            x = Block(flax_attention=i == 0, name=str(i))(x, mask)
        return x


def scanned(block, x, mask):
    scan = nn.scan(
        lambda block, x, mask: (block(x, mask), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=2,
    )
    return scan(block, x, mask)[0]


class LinenNetwork(nn.Module):
    stacked: bool = False

    @nn.compact
    def __call__(self, input_ids, attention_mask):
        positions = jnp.arange(input_ids.shape[-1])
        x = nn.Embed(WORDS, WIDTH, name="word")(input_ids) + nn.Embed(32, WIDTH, name="position")(positions)
        x = x + nn.Conv(WIDTH, (3,), name="conv")(x)
        mask = attention_mask[:, None, None, :] > 0
        x = scanned(Block(True, name="layers"), x, mask) if self.stacked else Blocks(name="layers")(x, mask)
        return nn.Dense(3, name="head")(x)


# --- in nnx


class NnxProjections(nnx.Module):
    def __init__(self, rngs):
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4))

    def __call__(self, x, mask):
        split = (*x.shape[:-1], HEADS, WIDTH // HEADS)
        q, k, v = (layer(x).reshape(split) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(nnx.dot_product_attention(q, k, v, mask=mask).reshape(x.shape))


class NnxExperts(nnx.Module):
    def __init__(self, rngs):
        self.wi = nnx.Param(jax.random.normal(rngs.params(), (EXPERTS, WIDTH, INNER)))
        self.wo = nnx.Param(jax.random.normal(rngs.params(), (EXPERTS, INNER, WIDTH)))

    def __call__(self, x):
        return jnp.einsum("...ef,efd->...d", jnp.tanh(jnp.einsum("...d,edf->...ef", x, self.wi[...])), self.wo[...])


class NnxFeedForward(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, INNER, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


class NnxBlock(nnx.Module):
    def __init__(self, flax_attention, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs) if flax_attention else None
        self.attn = attention or NnxProjections(rngs)
        self.ff, self.experts = NnxFeedForward(rngs), NnxExperts(rngs)

    def __call__(self, x, mask):
        x = x + self.attn(self.norm1(x), mask=mask)
        y = self.norm2(x)
        return x + self.ff(y) + self.experts(y)


@nnx.split_rngs(splits=2)
@nnx.vmap
def stack_of_blocks(rngs):
    return NnxBlock(True, rngs)


@nnx.scan(in_axes=(0, nnx.Carry, None), out_axes=nnx.Carry)
def run_blocks(block, x, mask):
    return block(x, mask)


class NnxNetwork(nnx.Module):
    def __init__(self, rngs, stacked=False):
        self.stacked = stacked
        self.word, self.position = nnx.Embed(WORDS, WIDTH, rngs=rngs), nnx.Embed(32, WIDTH, rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs)
        self.layers = stack_of_blocks(rngs) if stacked else nnx.List([NnxBlock(i == 0, rngs) for i in range(2)])
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, input_ids, attention_mask):
        x = self.word(input_ids) + self.position(jnp.arange(input_ids.shape[-1]))
        x = x + self.conv(x)
        mask = attention_mask[:, None, None, :] > 0
        if self.stacked:
            return self.head(run_blocks(self.layers, x, mask))
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


# --- the two, with the same weights


@functools.cache
def weights(stacked=False):
    shapes = jax.eval_shape(LinenNetwork(stacked).init, jax.random.key(0), *INPUTS)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.4, leaf.shape), leaf.dtype), shapes)


@functools.cache
def template(stacked=False):
    return nnx.split(nnx.jit(NnxNetwork, static_argnums=1)(nnx.Rngs(0), stacked))


def linen_network(stacked=False):
    return jdelta.Backbone(LinenNetwork(stacked), weights(stacked), dummy_inputs=INPUTS)


def nnx_network(stacked=False):
    model = nnx.merge(*template(stacked), copy=True)
    give(model, weights(stacked))
    return model


def variables(model):
    """Path, of strings, to the parameters of an nnx module."""
    return {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def leaves(tree):
    """Path, of strings, to the leaves of any tree."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in flat}


def give(model, tree):
    """Gives an nnx module the values that a tree has at the same paths. There are no others in either."""
    given, own = leaves(tree), variables(model)
    assert given.keys() == own.keys()
    for path, variable in own.items():
        assert given[path].shape == variable.shape, path
        variable.set_value(given[path])


def values(model):
    return {path: variable[...] for path, variable in variables(model).items()}


@nnx.jit
def outputs_of(model):
    return model(*INPUTS)


def close(ours, theirs, tolerance=1e-6):
    """Equal to 1e-6 of the largest value."""
    assert ours.keys() == theirs.keys()
    for path, want in theirs.items():
        scale = max(1.0, float(jnp.abs(want).max(initial=0.0)))
        np.testing.assert_allclose(ours[path], want, rtol=0, atol=tolerance * scale, err_msg=str(path))


# --- the deltas


@dataclass(frozen=True)
class Kind:
    """A delta: its class and arguments, or what puts it in; whether it can be merged; and where layers are stacked."""

    cls: str
    arguments: dict
    put: object = None
    merges: bool = False
    stacked: bool = False

    def on(self, model):
        inputs = {} if isinstance(model, jdelta.Backbone) else {"dummy_inputs": INPUTS}
        delta = getattr(jdelta, self.cls)(model, **self.arguments, **inputs)
        if self.put:
            self.put(delta)
        return delta


class Own(nn.Module):
    """A layer of a user's own."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="dense")(jnp.tanh(x))


KEY_BIASES = [("key", "bias"), ("k_proj", "bias")]  # move all scores of a softmax alike: their gradient is zero
OUTPUTS = ["attn.out", "o_proj", "down"]
LINEAR = ["query", "attn.value", "attn.out", "q_proj", "v_proj", "up", "down", "conv", "word", "head"]
KINDS = {
    "lora": Kind("LoraModel", {"modified_modules": LINEAR, "lora_r": 2}, merges=True),
    "lora on parameters": Kind(
        "LoraModel",
        {"modified_parameters": ["experts.wi", "1.experts.wo", "up.kernel", "word.embedding"], "lora_r": 2},
        merges=True,
    ),
    "adapter": Kind("AdapterModel", {"modified_modules": [*OUTPUTS, "conv"], "bottleneck_dim": 3}),
    "parallel adapter": Kind(
        "ParallelAdapterModel",
        {"modified_modules": ["attn", "attn", "ff.up", "ff.down", "norm1", "norm1"], "bottleneck_dim": 3},
    ),
    "low-rank adapter": Kind("LowRankAdapterModel", {"modified_modules": OUTPUTS, "reduction_factor": 2}),
    "compacter": Kind("CompacterModel", {"modified_modules": OUTPUTS, "reduction_factor": 2}),
    "bitfit": Kind("BitFitModel", {"modified_modules": ["layers.0", "layers.1", "conv", "head"]}, merges=True),
    "prefix": Kind("PrefixModel", {"modified_modules": ["attn"], "prefix_token_num": 3, "reparameterize": False}),
    "prefix from a network": Kind(
        "PrefixModel", {"modified_modules": ["attn"], "prefix_token_num": 3, "embed_dim": 4, "mid_dim": 4}
    ),
    "soft prompt": Kind("SoftPromptModel", {"modified_modules": ["word"], "soft_token_num": 3}),
    "a layer after": Kind("DeltaModel", {}, lambda delta: delta.insert_sequential_module("ff", Own())),
    "a layer before": Kind("DeltaModel", {}, lambda delta: delta.insert_sequential_module("norm1", Own(), "before")),
    "a layer beside": Kind("DeltaModel", {}, lambda delta: delta.insert_parallel_module("experts", Own())),
    "a layer beside a span": Kind(
        "DeltaModel", {}, lambda delta: delta.insert_parallel_module("0.ff", Own(), start="0.norm2")
    ),
    "a layer in place": Kind("DeltaModel", {}, lambda delta: delta.replace_module("0.ff", Own())),
    "lora in a stack": Kind(
        "LoraModel", {"modified_modules": ["query", "attn.out", "up", "conv"], "lora_r": 2}, merges=True, stacked=True
    ),
    "lora on parameters in a stack": Kind(
        "LoraModel", {"modified_parameters": ["experts.wi", "up.kernel"], "lora_r": 2}, merges=True, stacked=True
    ),
    "adapter in a stack": Kind("AdapterModel", {"modified_modules": OUTPUTS[::2], "bottleneck_dim": 3}, stacked=True),
    "bitfit in a stack": Kind("BitFitModel", {"modified_modules": ["layers", "head"]}, merges=True, stacked=True),
    "prefix in a stack": Kind(
        "PrefixModel", {"modified_modules": ["attn"], "prefix_token_num": 3, "reparameterize": False}, stacked=True
    ),
}


def bare(kind):
    """The network in linen and in nnx, with the same weights."""
    return linen_network(KINDS[kind].stacked), nnx_network(KINDS[kind].stacked)


def moved(kind, linen, network):
    """The delta on both, with the same leaves, which are not those at initialisation."""
    ours, theirs = KINDS[kind].on(network), KINDS[kind].on(linen)
    for delta in (ours, theirs):
        delta.freeze_module(exclude=["deltas", "head"])
    assert ours.targets == theirs.targets
    assert leaves(ours.shapes()) == leaves(theirs.shapes())
    trainable, frozen = theirs.partition()
    linen.params = jdelta.combine(noisy(trainable), frozen)
    give(network, linen.params)
    return ours, theirs


def in_dtype(linen, network, dtype):
    """Casts the weights of both."""
    linen.params = jax.tree.map(lambda leaf: leaf.astype(dtype), linen.params)
    give(network, linen.params)


def gradients_of(ours, theirs):
    linen, network = theirs.backbone_model, ours.backbone_model
    trainable, frozen = theirs.partition()

    def loss(outputs):
        return jnp.mean(jnp.sin(outputs) ** 2) * 100

    @jax.jit
    def of_linen(trainable, frozen):
        return jax.grad(lambda t: loss(linen(*INPUTS, params=jdelta.combine(t, frozen))))(trainable)

    @nnx.jit
    def of_network(model):
        return nnx.grad(lambda model: loss(model(*INPUTS)), argnums=nnx.DiffState(0, ours.filter))(model)

    found = {tuple(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(of_network(network))}
    return found, leaves(of_linen(trainable, frozen))


@pytest.mark.parametrize("stacked", [False, True])
def test_the_bare_networks_are_equal(stacked):
    linen, network = linen_network(stacked), nnx_network(stacked)
    close({(): outputs_of(network)}, {(): jax.jit(linen)(*INPUTS)})


@pytest.mark.parametrize("kind", breadth(KINDS, "lora"))
def test_outputs_and_gradients_are_equal(kind):
    linen, network = bare(kind)
    before = outputs_of(network)
    ours, theirs = moved(kind, linen, network)
    outputs = outputs_of(network)
    assert jnp.abs(outputs - before).max() > 1e-2
    close({(): outputs}, {(): jax.jit(linen)(*INPUTS)})
    with jax.enable_x64(True):  # in float32, sums of many terms in another order differ by up to 2e-6
        in_dtype(linen, network, jnp.float64)
        found, want = gradients_of(ours, theirs)
        assert all(gradient.dtype == jnp.float64 for gradient in want.values())
        in_dtype(linen, network, jnp.float32)
    for path in [path for path in want if path[-2:] in KEY_BIASES]:  # jax.nn's softmax rounds to float32
        assert jnp.abs(jnp.stack([found.pop(path), want.pop(path)])).max() < 1e-5
    close(found, want)
    assert all(jnp.abs(gradient).max() > 0 for gradient in want.values())
    ours.detach()
    theirs.detach()  # the head, which trained too, stays
    close({(): outputs_of(network)}, {(): jax.jit(lambda *inputs: linen(*inputs))(*INPUTS)})


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].merges])
def test_merged_weights_are_equal(kind):
    linen, network = bare(kind)
    ours, theirs = moved(kind, linen, network)
    attached, grafted = outputs_of(network), values(network)
    theirs.merge()
    ours.merge()
    close(values(network), leaves(linen.params))
    np.testing.assert_allclose(outputs_of(network), attached, atol=1e-5)
    ours.unmerge()
    chex.assert_trees_all_equal(values(network), grafted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not KINDS[kind].put])
def test_a_delta_saved_from_one_is_loaded_into_the_other(kind, tmp_path):
    linen, network = bare(kind)
    ours, theirs = moved(kind, linen, network)
    ours.save_finetuned(tmp_path / "nnx")
    theirs.save_finetuned(tmp_path / "linen")
    files = [(tmp_path / side / "delta.safetensors").read_bytes() for side in ("nnx", "linen")]
    assert files[0] == files[1]
    outputs = outputs_of(network)

    other, network = bare(kind)
    jdelta.AutoDeltaModel.from_finetuned(tmp_path / "nnx", backbone_model=other, check_hash=True)
    if not theirs.config.to_dict().get("reparameterize"):  # else what the network makes is saved
        chex.assert_trees_all_equal(other.params, linen.params)
    jdelta.AutoDeltaModel.from_finetuned(
        tmp_path / "linen", backbone_model=network, dummy_inputs=INPUTS, check_hash=True
    )
    np.testing.assert_allclose(outputs_of(network), outputs, rtol=0, atol=1e-6 * float(jnp.abs(outputs).max()))
