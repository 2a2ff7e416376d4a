"""Deltas of every method on the same modules: together they compute the sum of their definitions, in any order."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh
from tiers import breadth

import jdelta
from jdelta.trees import surgery

VOCABULARY, WIDTH, HEADS = 11, 8, 2


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.SelfAttention(HEADS, name="attention")(x, mask=nn.make_causal_mask(x[..., 0]))
        return x + nn.Dense(WIDTH, use_bias=False, name="dense")(x)


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = Block(name="block")(nn.Embed(VOCABULARY, WIDTH, name="embed")(ids))
        return nn.Dense(VOCABULARY, name="head")(x)


class Shift(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.param("shift", nn.initializers.normal(), x.shape[-1:])


class Scale(nn.Module):
    @nn.compact
    def __call__(self, y):
        return y * self.param("scale", nn.initializers.ones, y.shape[-1:])


class MineConfig(jdelta.Method):
    """A method of the user's own, on both sides of a module."""

    delta_type = "mine"

    def edits(self, host, structure):
        yield jdelta.CallEdit(host.path, "before", Shift(), leaf=("before",))
        yield jdelta.CallEdit(host.path, "after", Scale(), leaf=("after",))


class MineModel(jdelta.DeltaModel):
    method_class = MineConfig


IDS = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (3, 24)))  # so many that LoRA's product is fused
SMALL = {"non_linearity": "tanh"}
METHODS = {
    "lora": lambda model, **kw: jdelta.LoraModel(model, modified_modules=["block.dense"], lora_r=2, **kw),
    "adapter": lambda model, **kw: jdelta.AdapterModel(
        model, modified_modules=["block.dense"], bottleneck_dim=4, **SMALL, **kw
    ),
    "low_rank": lambda model, **kw: jdelta.LowRankAdapterModel(
        model, modified_modules=["block.dense"], reduction_factor=2, **SMALL, **kw
    ),
    "compacter": lambda model, **kw: jdelta.CompacterModel(
        model, modified_modules=["block.dense"], reduction_factor=2, hypercomplex_division=2, **SMALL, **kw
    ),
    "bitfit": lambda model, **kw: jdelta.BitFitModel(model, modified_modules=["block.dense"], **kw),
    "parallel": lambda model, **kw: jdelta.ParallelAdapterModel(
        model, modified_modules=["block.dense"] * 2, bottleneck_dim=4, **SMALL, **kw
    ),
    "prefix": lambda model, **kw: jdelta.PrefixModel(
        model, modified_modules=["attention"], prefix_token_num=2, reparameterize=False, **kw
    ),
    "prompt": lambda model, **kw: jdelta.SoftPromptModel(model, modified_modules=["embed"], soft_token_num=2, **kw),
    "mine": lambda model, **kw: MineModel(model, modified_modules=["block.dense"], **kw),
    "lora_embed": lambda model, **kw: jdelta.LoraModel(model, modified_modules=["embed"], lora_r=2, **kw),
    "adapter_embed": lambda model, **kw: jdelta.AdapterModel(
        model, modified_modules=["embed"], bottleneck_dim=4, **SMALL, **kw
    ),
}


def backbone():
    params = Tiny().init(jax.random.key(0), IDS)["params"]
    return jdelta.Backbone(Tiny(), params, dummy_inputs=(IDS,))


def attach(model, names):
    """Deltas of these methods, in this order, with random values that depend on the path alone."""
    deltas = {name: METHODS[name](model, name=name) for name in names}
    leaves = dict(surgery.flatten(model.params))
    for path in sorted(path for delta in deltas.values() for path in surgery.flatten(delta.shapes())):
        seed = sum(".".join(path).encode())
        leaves[path] = jnp.asarray(np.random.default_rng(seed).normal(0, 0.5, leaves[path].shape), jnp.float32)
    model.params = surgery.unflatten(leaves)
    return deltas


def leave(deltas, names):
    """Detaches all but these."""
    for name, delta in deltas.items():
        if delta.attached != (name in names):
            (delta.attach if name in names else delta.detach)()


# --- the definitions, written out


def expected(leaves, order):
    """The model with the deltas named, in the order of attaching."""
    w = {".".join(path): np.asarray(leaf, np.float64) for path, leaf in leaves.items()}

    def bottleneck(y, at):
        return np.tanh(y @ w[f"{at}.down.kernel"] + w[f"{at}.down.bias"]) @ w[f"{at}.up.kernel"] + w[f"{at}.up.bias"]

    def changed(name, at, run):
        """What the delta makes of a module, `run`."""
        at = f"{at}.{name}"
        if name == "lora":
            return lambda x: run(x) + 8 * x @ w[f"{at}.a"] @ w[f"{at}.b"]
        if name == "lora_embed":
            return lambda ids: run(ids) + 8 * w[f"{at}.a"][ids] @ w[f"{at}.b"]
        if name in ("adapter", "adapter_embed"):
            return lambda x: (y := run(x)) + bottleneck(y, at)
        if name == "parallel":
            return lambda x: run(x) + bottleneck(x, at)
        if name == "bitfit":
            return lambda x: run(x) + w[f"{at}.bias"]
        if name == "mine":
            return lambda x: run(x + w[f"{at}.before.shift"]) * w[f"{at}.after.scale"]
        kernels = {}
        for side in ("down", "up"):
            if name == "low_rank":
                kernels[side] = w[f"{at}.{side}.left"] @ w[f"{at}.{side}.right"]
            else:
                rules, left, right = (w[f"{at}.{side}.{leaf}"] for leaf in ("phm_rule", "W_left", "W_right"))
                kernels[side] = sum(np.kron(a, b @ c) for a, b, c in zip(rules, left, right, strict=True))

        def adapted(x):
            y = run(x)
            z = np.tanh(y @ kernels["down"] + w[f"{at}.down.bias"])
            return y + z @ kernels["up"] + w[f"{at}.up.bias"]

        return adapted

    def attention(x):
        at = "block.attention"
        q, k, v = (
            np.einsum("bld,dhw->bhlw", x, w[f"{at}.{n}.kernel"]) + w[f"{at}.{n}.bias"][:, None]
            for n in ("query", "key", "value")
        )
        scores = np.where(np.tri(x.shape[1], dtype=bool), np.einsum("bhqw,bhkw->bhqk", q, k), -np.inf)
        if "prefix" in order:
            keys, values = (w[f"{at}.prefix.{n}"] for n in ("keys", "values"))
            scores = np.concatenate([np.einsum("bhqw,nhw->bhqn", q, keys), scores], axis=-1)
            v = np.concatenate([np.broadcast_to(values.swapaxes(0, 1), (len(x), *values.swapaxes(0, 1).shape)), v], 2)
        weights = np.exp(scores / np.sqrt(WIDTH // HEADS))
        out = np.einsum("bhqk,bhkw->bqhw", weights / weights.sum(-1, keepdims=True), v)
        return np.einsum("bqhw,hwd->bqd", out, w[f"{at}.out.kernel"]) + w[f"{at}.out.bias"]

    def embed(ids):
        return w["embed.embedding"][ids]

    def dense(x):
        return x @ w["block.dense.kernel"]

    # Changes of weights are closest to the module, whenever they were attached.
    for name in sorted(order, key=lambda name: not name.startswith("lora")):
        if name.endswith("_embed"):
            embed = changed(name, "embed", embed)
        elif name not in ("prefix", "prompt"):
            dense = changed(name, "block.dense", dense)
    x = embed(np.asarray(IDS))
    if "prompt" in order:
        prompt = w["embed.prompt.embedding"]
        x = np.concatenate([np.broadcast_to(prompt, (len(x), *prompt.shape)), x], axis=1)
    x = x + attention(x)
    x = (x + dense(x)) @ w["head.kernel"] + w["head.bias"]
    return x[:, 2:] if "prompt" in order else x


# --- the tests


@pytest.fixture(scope="module", params=breadth(["in order", "reversed"], "in order"))
def all_attached(request):
    model = backbone()
    names = list(METHODS) if request.param == "in order" else list(METHODS)[::-1]
    deltas = attach(model, names)
    yield model, deltas
    leave(deltas, names)


def require_definitions(model, deltas, subsets):
    for names in subsets:
        leave(deltas, names)
        y = np.asarray(model(IDS))
        assert np.isfinite(y).all(), names
        want = expected(surgery.flatten(model.params), names)
        np.testing.assert_allclose(y, want, rtol=2e-4, atol=2e-4, err_msg=" + ".join(names))


def test_every_ordered_pair_computes_the_sum_of_its_definitions(all_attached):
    model, deltas = all_attached
    require_definitions(model, deltas, itertools.combinations(deltas, 2))


def test_triples_compute_the_sum_of_their_definitions(all_attached):
    model, deltas = all_attached
    require_definitions(model, deltas, list(itertools.combinations(deltas, 3))[::7])


def orders_of_triples():
    """Orders of attaching, and with each the triples that no earlier one has in this order: together all of them."""
    rng, left = np.random.default_rng(0), set(itertools.permutations(METHODS, 3))
    while left:
        order = [str(name) for name in rng.permutation(list(METHODS))]
        mine = [triple for triple in itertools.combinations(order, 3) if triple in left]
        left -= {*mine}
        if mine:
            yield order, mine


@functools.cache
def alone(*names):
    """What the model computes to which these were attached, in this order, and nothing else ever was."""
    model = backbone()
    attach(model, names)
    return np.asarray(model(IDS))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_ordered_triple_computes_the_sum_and_comes_off_in_any_order_bit_for_bit(part):
    rng = np.random.default_rng(part)
    for order, triples in list(orders_of_triples())[part::8]:
        model = backbone()
        bare = surgery.flatten(model.params)
        deltas = attach(model, order)
        for names in triples:
            require_definitions(model, deltas, [names])
            together = np.asarray(model(IDS))
            left = list(names)
            for name in rng.permutation(names):
                deltas[name].detach()
                left.remove(name)
                assert np.array_equal(model(IDS), alone(*left)), (order, names, left)
            now = surgery.flatten(model.params)
            assert now.keys() == bare.keys()
            assert all(now[path] is bare[path] for path in bare), names
            for name in rng.permutation(names):
                deltas[name].attach()
            assert np.array_equal(model(IDS), together), (order, names)


@pytest.mark.slow
def test_every_triple_and_quadruple_computes_the_sum_of_its_definitions(all_attached):
    model, deltas = all_attached
    subsets = [list(itertools.combinations(deltas, n)) for n in (3, 4)]
    require_definitions(model, deltas, [*subsets[0], *subsets[1], tuple(deltas)])


ALONE = [
    ("prompt", "lora_embed", "adapter_embed"),
    ("bitfit", "lora", "prompt"),
    ("adapter", "lora", "parallel"),
    ("prefix", "compacter", "mine"),
]


@pytest.mark.parametrize("names", breadth(ALONE, ALONE[0]))
def test_without_any_one_the_others_compute_bit_for_bit_what_they_do_alone(names):
    model = backbone()
    deltas = attach(model, names)
    for name in names:
        rest = [other for other in names if other != name]
        leave(deltas, rest)
        assert np.array_equal(model(IDS), alone(*rest)), name
        leave(deltas, names)


@pytest.mark.parametrize("names", [("prompt", "lora_embed"), ("lora_embed", "prompt"), ("prompt", "adapter_embed")])
@pytest.mark.slow
def test_gradients_of_what_shares_a_word_embedding_with_a_prompt_are_finite(names):
    model = backbone()
    attach(model, names)
    grads = jax.grad(lambda params: (model(IDS, params=params) ** 2).mean())(model.params)
    for path, leaf in surgery.flatten(grads).items():
        assert np.isfinite(leaf).all(), path


@pytest.mark.slow
def test_two_prompts_and_lora_on_their_word_embedding():
    model = backbone()
    first = jdelta.SoftPromptModel(model, modified_modules=["embed"], soft_token_num=2, name="first")
    jdelta.LoraModel(model, modified_modules=["embed"], lora_r=2, name="lora_embed")
    jdelta.SoftPromptModel(model, modified_modules=["embed"], soft_token_num=1, name="second")
    assert np.isfinite(model(IDS)).all()
    first.detach()
    assert np.isfinite(model(IDS)).all()


def test_a_replaced_word_embedding_does_not_see_the_ids_of_a_prompt():
    model = backbone()
    prompt = jdelta.SoftPromptModel(model, modified_modules=["embed"], soft_token_num=2)
    prompt.replace_module("embed", nn.Embed(VOCABULARY, WIDTH))
    assert np.isfinite(model(IDS)).all()


@pytest.mark.slow
def test_generation_with_a_prompt_and_lora_on_its_word_embedding():
    model = fresh("gpt2", "FlaxGPT2LMHeadModel")
    ids = jnp.ones((1, 3), jnp.int32)
    jdelta.SoftPromptModel(model, soft_token_num=2, token_init=False)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = model.generate(ids, **options).sequences
    lora = jdelta.LoraModel(model, modified_modules=["wte"], lora_r=2)  # changes nothing at first
    assert np.array_equal(before, model.generate(ids, **options).sequences)
    model.params = surgery.unflatten(
        {p: leaf + 1 if "lora" in p else leaf for p, leaf in surgery.flatten(model.params).items()}
    )
    assert not np.array_equal(before, model.generate(ids, **options).sequences)
    assert np.isfinite(model(ids).logits).all()
    lora.detach()
    assert np.array_equal(before, model.generate(ids, **options).sequences)
