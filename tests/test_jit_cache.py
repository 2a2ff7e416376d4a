"""`nn.jit` keeps traces and never asks again; with deltas, each set of them has traces of its own."""

import functools
import threading

import chex
import jax
import jax.numpy as jnp
import pytest
from conftest import noisy, train_deltas
from flax import linen as nn
from flax.linen import transforms
from tiers import breadth
from transformers import BertConfig
from transformers.models.bert.modeling_flax_bert import FlaxBertAttention, FlaxBertSelfAttention, FlaxBertSelfOutput

import jdelta

X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
FLAX = vars(transforms._HashableProxy)["from_module"]
traced: list[str] = []  # one entry for each trace of a jitted method


@pytest.fixture(autouse=True)
def _flax_is_as_it_was():
    traced.clear()
    yield
    assert vars(transforms._HashableProxy)["from_module"] is FLAX


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, *, twice=False):
        traced.append("root")
        for i in range(2):
            x = x + jnp.tanh(nn.Dense(4, name=f"d{i}")(x))
        return 2 * x if twice else x


class RootMethod(Plain):
    @functools.partial(nn.jit, static_argnames=("self", "twice"))
    @nn.compact
    def __call__(self, x, *, twice=False):
        traced.append("root")
        for i in range(2):
            x = x + jnp.tanh(nn.Dense(4, name=f"d{i}")(x))
        return 2 * x if twice else x


class Block(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        traced.append("block")
        return x + jnp.tanh(nn.Dense(4, name="dense")(x))


class Blocks(nn.Module):
    block: type = Block

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = self.block(name=f"b{i}")(x)
        return x


class ByMethod(nn.Module):
    def setup(self):
        self.dense = nn.Dense(4)

    @nn.jit
    def helped(self, x):
        traced.append("helped")
        return self.dense(x)

    def __call__(self, x):
        return x + self.helped(self.helped(x))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            lambda block, x, _: (block(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return body(Block(name="block"), x, None)[0]


class Dense(nn.Module):
    layer: type = nn.jit(nn.Dense)

    @nn.compact
    def __call__(self, x):
        return self.layer(3, name="last")(jnp.tanh(self.layer(6, name="first")(x)))


KINDS = {
    "a method of the root": (RootMethod(), ["d0", "d1"], 1),
    "the root's class": (nn.jit(Plain, static_argnames=("twice",))(), ["d0", "d1"], 1),
    "blocks that are alike": (Blocks(), ["dense"], 3),
    "layers of a jitted class": (Dense(), ["first", "last"], 0),
    "a helper called twice": (ByMethod(), ["dense"], 2),
    "a body of nn.scan": (Scanned(), ["block.dense"], None),
    "within nn.remat": (Blocks(nn.remat(Block)), ["dense"], 3),
}


def backbone_of(module, seed=0):
    params = noisy(module.init(jax.random.key(0), X)["params"], seed)
    return jdelta.Backbone(module, params, dummy_inputs=(X,))


def unjitted(backbone):
    """The backbone's output without any cache."""
    with jax.disable_jit():
        return backbone.module.apply({"params": backbone.params}, X)


@pytest.mark.parametrize("kind", breadth(KINDS, "a method of the root", "within nn.remat"))
def test_such_a_model_attaches_runs_detaches_and_merges_like_any_other(kind):
    module, targets, _ = KINDS[kind]
    backbone = backbone_of(module)
    base = backbone(X)  # in flax's cache
    lora = jdelta.LoraModel(backbone, modified_modules=targets, lora_r=2)
    assert lora.targets == [info.name for info in lora.structure if "kernel" in info.params]
    chex.assert_trees_all_close(backbone(X), base, atol=1e-6)
    train_deltas(lora)
    changed = backbone(X)
    assert jnp.abs(changed - base).max() > 1e-3
    chex.assert_trees_all_close(changed, unjitted(backbone), atol=1e-5)
    chex.assert_trees_all_close(jax.jit(lambda p: backbone(X, params=p))(backbone.params), changed, atol=1e-5)
    lora.detach()
    chex.assert_trees_all_equal(backbone(X), base)
    adapter = jdelta.AdapterModel(backbone, modified_modules=targets, bottleneck_dim=2)
    chex.assert_trees_all_close(backbone(X), unjitted(backbone), atol=1e-5)
    lora.attach()
    both = backbone(X)
    chex.assert_trees_all_close(both, unjitted(backbone), atol=1e-5)
    assert jnp.abs(both - changed).max() > 1e-6
    adapter.remove()
    chex.assert_trees_all_equal(backbone(X), changed)
    lora.merge()
    chex.assert_trees_all_close(backbone(X), changed, atol=1e-5)
    lora.unmerge()
    chex.assert_trees_all_equal(backbone(X), changed)
    lora.remove()
    chex.assert_trees_all_equal(backbone(X), base)


@pytest.mark.parametrize("kind", breadth([kind for kind in KINDS if KINDS[kind][2]], "a method of the root"))
def test_a_call_is_traced_once_for_each_set_of_deltas(kind):
    module, targets, number = KINDS[kind]
    backbone = backbone_of(module)
    delta = jdelta.LoraModel(backbone, modified_modules=targets, lora_r=2)
    for _ in range(2):
        traced.clear()
        for _ in range(3):
            backbone(X)
        assert 0 < len(traced) <= number
        delta.detach()
        delta.attach()


def test_layers_that_are_alike_do_not_share_a_trace_with_other_edits():
    backbone = backbone_of(Blocks())
    params = backbone.params
    delta = jdelta.LoraModel(
        backbone, modified_modules=["dense"], lora_r=2, alpha_pattern={"b1.dense": 2, "b2.dense": 9}
    )
    train_deltas(delta)

    def dense(x, i):
        host = backbone.params[f"b{i}"]["dense"]
        scale = (16, 2, 9)[i] / 2
        return x @ (host["kernel"] + scale * host["lora"]["a"] @ host["lora"]["b"]) + host["bias"]

    x = X
    for i in range(3):
        x = x + jnp.tanh(dense(x, i))
    chex.assert_trees_all_close(backbone(X), x, atol=1e-5)
    delta.remove()
    extra = jdelta.DeltaModel(backbone, name="extra")
    extra.insert_sequential_module("b1.dense", nn.Sequential([jnp.abs]))  # no leaf tells the layers apart
    x = X
    for i in range(3):
        y = x @ params[f"b{i}"]["dense"]["kernel"] + params[f"b{i}"]["dense"]["bias"]
        x = x + jnp.tanh(jnp.abs(y) if i == 1 else y)
    chex.assert_trees_all_close(backbone(X), x, atol=1e-5)


def test_deltas_that_differ_in_settings_alone_never_get_each_others_trace():
    backbone = backbone_of(RootMethod())
    base = backbone(X)
    for alpha in (1, 8, 1, 64) * 2:  # a class that is gone leaves its address to the next one
        delta = jdelta.LoraModel(backbone, modified_modules=["d1"], lora_r=2, lora_alpha=alpha)
        train_deltas(delta)
        chex.assert_trees_all_close(backbone(X), unjitted(backbone), atol=1e-4)
        delta.remove()
    chex.assert_trees_all_equal(backbone(X), base)


class Moded(nn.Module):
    """Says `deterministic`, of which its jitted inside has no argument."""

    @nn.compact
    def __call__(self, x, deterministic: bool = True):
        return Block(name="b")(x)


def test_dropout_inside_follows_the_call_around():
    backbone = backbone_of(Moded())
    delta = jdelta.LoraModel(backbone, modified_modules=["dense"], lora_r=2, lora_dropout=0.5)
    train_deltas(delta)

    def run(deterministic, seed):
        return backbone(X, deterministic, rngs={"dropout": jax.random.key(seed)})

    for _ in range(2):
        chex.assert_trees_all_equal(run(True, 1), run(True, 2))
        assert jnp.abs(run(False, 1) - run(False, 2)).max() > 1e-4


def test_default_positions_in_a_jitted_model_say_what_any_unknown_model_does():
    with pytest.raises(ValueError, match=r"RootMethod has no block of a known family") as caught:
        jdelta.LoraModel(backbone_of(RootMethod()))
    assert "d0-1 (2 layers) Dense 2×4 → 2×4" in str(caught.value)


def test_the_structure_counts_calls_that_flax_would_have_taken_from_its_cache():
    structure = backbone_of(ByMethod()).structure()
    assert structure["dense"].calls == 2
    structure = backbone_of(Scanned()).structure()
    assert structure["block.dense"].calls == 3


class InsideAndOut(nn.Module):
    """`out` runs after a jitted block, on what was there before it."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        return nn.Dense(4, name="last")(Block(name="b")(x))


@pytest.mark.parametrize("jitted", [False, True])
def test_a_span_into_a_jitted_block_takes_the_input_of_each_call(jitted):
    backbone = backbone_of(InsideAndOut())
    delta = jdelta.ParallelAdapterModel(backbone, modified_modules=["first", "b.dense"], bottleneck_dim=2)
    train_deltas(delta)
    run = jax.jit(lambda p, x: backbone(x, params=p)) if jitted else lambda p, x: backbone(x, params=p)
    for x in (X, -3 * X, X**2):
        with jax.disable_jit():
            expected = backbone.module.apply({"params": backbone.params}, x)
        chex.assert_trees_all_close(run(backbone.params, x), expected, atol=1e-5)


@pytest.mark.parametrize("block", [Block, nn.remat(Block)])
def test_a_span_out_of_a_transformed_block_is_refused(block):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="last")(block(name="b")(x))

    backbone = backbone_of(Model())
    module = backbone.module
    with pytest.raises(ValueError, match=r"from b\.dense to last .* leads out of .*nn\.jit"):
        jdelta.ParallelAdapterModel(backbone, modified_modules=["b.dense", "last"], bottleneck_dim=2)
    assert backbone.module is module


JittedOutput = nn.jit(FlaxBertSelfOutput, static_argnames=("deterministic",))


class Attention(FlaxBertAttention):
    """BERT's, whose output projection is jitted."""

    def setup(self):
        self.self = FlaxBertSelfAttention(self.config)
        self.output = JittedOutput(self.config)


CONFIG = BertConfig(hidden_size=4, num_attention_heads=2)


class Attending(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Attention(CONFIG, name="attn")(x, jnp.ones(x.shape[:2]), None)[0]


@pytest.mark.slow
def test_what_a_prefix_adds_within_a_jitted_projection_is_no_constant_of_its_trace():
    module, x = Attending(), jnp.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)
    backbone = jdelta.Backbone(module, noisy(module.init(jax.random.key(0), x)["params"]), dummy_inputs=(x,))
    jdelta.PrefixModel(backbone, modified_modules=["attn"], prefix_token_num=2, reparameterize=False)
    for seed in range(3):
        params = noisy(backbone.params, seed)
        with jax.disable_jit():
            expected = backbone.module.apply({"params": params}, x)
        chex.assert_trees_all_close(backbone(x, params=params), expected, atol=1e-5)


def test_threads_leave_flax_as_it_was():
    errors = []

    def work(seed):
        try:
            backbone = backbone_of(Blocks(), seed)
            for _ in range(3):
                delta = jdelta.LoraModel(backbone, modified_modules=["dense"], lora_r=2)
                train_deltas(delta, seed)
                chex.assert_trees_all_close(backbone(X), unjitted(backbone), atol=1e-5)
                delta.remove()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_static_arguments_of_nn_remat_and_nn_jit_reach_the_deltas():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic):
            return nn.Dropout(0.5)(nn.Dense(4, name="dense")(x), deterministic=deterministic)

    class Model(nn.Module):
        lift: object

        @nn.compact
        def __call__(self, x, deterministic=True):
            return self.lift(Inner)(name="inner")(x, deterministic)

    for lift in (functools.partial(nn.remat, static_argnums=(2,)), functools.partial(nn.jit, static_argnums=(2,))):
        backbone = backbone_of(Model(lift))
        delta = jdelta.LoraModel(backbone, modified_modules=["dense"], lora_r=2, lora_dropout=0.5)
        train_deltas(delta)
        runs = [backbone(X, False, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1)]
        assert jnp.abs(runs[0] - runs[1]).max() > 1e-3
        host = backbone.params["inner"]["dense"]
        kernel = host["kernel"] + 8 * host["lora"]["a"] @ host["lora"]["b"]
        chex.assert_trees_all_close(backbone(X, True), X @ kernel + host["bias"], atol=1e-5)


def test_a_backbone_of_shapes_says_that_it_has_no_values():
    backbone = jdelta.Backbone(RootMethod(), dummy_inputs=(X,))
    delta = jdelta.LoraModel(backbone, modified_modules=["d0"], lora_r=2)
    message = r"RootMethod holds the shapes of its parameters and no values.*params="
    with pytest.raises(ValueError, match=message):
        backbone(X)
    delta.detach()
    with pytest.raises(ValueError, match=message):
        backbone(X)
