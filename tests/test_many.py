"""Many deltas at once: what each row of a batch computes, and what each training run learns, is that of one alone.

Float32, so 1e-6 where the same products are summed in another order, and 1e-5 after five steps of Adam.
"""

import copy
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import fresh
from flax import linen as nn
from matrix import METHODS
from tiers import breadth
from transformers import BertConfig, FlaxBertForSequenceClassification

import jdelta


class Normed(nn.Module):
    """Two linear modules, and a norm that has statistics."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6, name="first")(x))
        return nn.Dense(3, name="head")(nn.Dropout(0.5, deterministic=not train)(nn.tanh(x)))


@functools.cache
def normed():
    return jax.jit(Normed().init)(jax.random.key(0), jnp.ones((2, 5)))


def on(cls, modules=("first", "head"), **arguments):
    """A delta on a small module, whose collections beside the parameters are part of the tree."""
    backbone = jdelta.Backbone(Normed(), copy.deepcopy(normed()), dummy_inputs=(jnp.ones((2, 5)),))
    return cls(backbone, modules, **arguments)


def lora(seed=0, **arguments):
    delta = on(jdelta.LoraModel, **{"lora_r": 2, **arguments})
    trainable, frozen = delta.partition()
    delta.backbone_model.params = jdelta.combine(moved(trainable, seed), frozen)
    return delta


def moved(tree, seed=0):
    """Stands for training."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: np.asarray(a) + rng.normal(0, 0.3, a.shape).astype(a.dtype), tree)


def leaves(*shapes):
    return {"dense": {"lora": {str(i): jnp.ones(shape) for i, shape in enumerate(shapes)}}}


def same(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


# --- every method


@pytest.fixture(scope="module", params=breadth(METHODS, "lora"))
def wide(request):
    """A method on one layer of BERT base: the model, and the shapes of what trains and of what is frozen."""
    model = FlaxBertForSequenceClassification(BertConfig(num_hidden_layers=1, vocab_size=200), _do_init=False)
    arguments = {"soft_token_num": 20, "token_init": False} if request.param == "soft_prompt" else {}
    delta = METHODS[request.param][0](model, unfrozen_modules=["classifier"], **arguments)
    return model, *delta.partition(jdelta.graft(model.params_shape_tree, delta.shapes()))


def test_each_row_computes_what_its_delta_computes_alone(wide):
    model, *shapes = wide
    rng = np.random.default_rng(0)
    trees = [jax.tree.map(lambda s: rng.normal(0, 0.05, s.shape).astype(s.dtype), shapes[0]) for _ in range(3)]
    frozen = jax.tree.map(lambda s: rng.normal(0, 0.05, s.shape).astype(s.dtype), shapes[1])
    stacked = jdelta.stack(trees)
    assert all(map(same, jdelta.unstack(stacked), trees))

    mask = jnp.ones((4, 5), int).at[1, 3:].set(0)
    batch, indices = {"input_ids": rng.integers(0, 200, (4, 5)), "attention_mask": mask}, jnp.array([2, 0, 2, 1])

    @jax.jit
    def many(stacked, frozen, indices, batch):
        return jdelta.rowwise(model, frozen)(**batch, params=jdelta.select(stacked, indices)).logits

    @jax.jit
    def one(tree, frozen, batch):
        return model(**batch, params=jdelta.combine(tree, frozen)).logits

    alone = jnp.stack([one(tree, frozen, batch) for tree in trees])  # (deltas, rows, labels)
    np.testing.assert_allclose(
        many(stacked, frozen, indices, batch), alone[indices, jnp.arange(4)], rtol=1e-5, atol=1e-6
    )
    assert np.ptp(np.asarray(alone), axis=0).min() > 1e-3  # the deltas differ


def test_64_deltas_in_64_rows_cost_the_products_of_one(wide):
    model, trainable, frozen = wide
    rows = jax.tree.map(lambda s: jax.ShapeDtypeStruct((64, *s.shape), s.dtype), trainable)
    ids = jax.ShapeDtypeStruct((64, 128), jnp.int32)

    def one(trainable, frozen, ids):
        return model(ids, params=jdelta.combine(trainable, frozen)).logits

    def many(rows, frozen, ids):
        return jdelta.rowwise(model, frozen)(ids, params=rows).logits

    compiled = [jax.jit(f).lower(own, frozen, ids).compile() for f, own in ((one, trainable), (many, rows))]
    flops = [program.cost_analysis()["flops"] for program in compiled]
    assert flops[1] <= 1.05 * flops[0]
    # The feed-forward is one matrix product for all rows, of 128 tokens, or 148 with a prompt.
    assert re.search(rf"f32\[({64 * 128}|{64 * 148}),3072\]\S* dot\(", compiled[1].as_text())


# --- calls


@pytest.mark.parametrize(
    "options", breadth([{}, {"num_beams": 2}, {"do_sample": True}], {}), ids=["greedy", "beam", "sampled"]
)
def test_generate_gives_each_row_what_its_delta_gives_alone(options):
    model = fresh("gpt2", "FlaxGPT2LMHeadModel", n_layer=1)
    trainable, frozen = jdelta.LoraModel(model, lora_r=2).partition()
    trees = [moved(moved(trainable, seed), seed) for seed in range(2)]
    ids, keys = jnp.array([[5, 6, 7], [8, 9, 10]]), jax.random.split(jax.random.key(1), 2)
    generate = jax.jit(
        lambda params, ids, key: model.generate(ids, params=params, prng_key=key, max_new_tokens=6, **options).sequences
    )
    many = jdelta.rowwise(lambda ids, key, params: generate(params, ids, key), frozen)
    tokens = many(ids, jax.random.key(1), params=jdelta.stack(trees))
    alone = [generate(jdelta.combine(t, frozen), ids[i : i + 1], keys[i])[0] for i, t in enumerate(trees)]
    np.testing.assert_array_equal(tokens, jnp.stack(alone))


@pytest.mark.slow
def test_keys_are_split_and_scalars_and_words_go_to_every_row():
    delta = lora(lora_dropout=0.5)
    trainable, frozen = delta.partition()
    rows, x = jdelta.stack([trainable] * 4), jnp.broadcast_to(jnp.eye(2, 5), (4, 2, 5))
    call = jdelta.rowwise(delta.backbone_model, frozen)

    train = functools.partial(call, train=True, mutable=["batch_stats"])
    y, state = jax.jit(lambda key: train(x, rngs={"dropout": key}, params=rows))(jax.random.key(1))
    assert y.shape == (4, 2, 3)
    assert len({row.tobytes() for row in np.asarray(y)}) == 4
    assert jax.tree.leaves(state)[0].shape == (4, 6)  # what has no batch axis gets one
    bits, keys = jdelta.rowwise(lambda key, params: jax.random.bits(key), {}), jax.random.split(jax.random.key(1), 4)
    np.testing.assert_array_equal(bits(jax.random.key(1), params=rows), bits(keys, params=rows))
    np.testing.assert_array_equal(bits(keys, params=rows), [jax.random.bits(key) for key in keys])
    scaled = jdelta.rowwise(lambda x, factor, word, params: {"y": factor * x, "word": jnp.ones(len(word))}, {})
    out = scaled(x, jnp.float32(2), "abc", params=rows)
    assert (out["y"].shape, out["word"].shape) == (x.shape, (4, 3))


def test_rows_can_be_differentiated():
    delta = lora()
    trainable, frozen = delta.partition()
    trees, x = [trainable, moved(trainable, 3)], np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    rows = jdelta.stack(trees)

    def square(call):
        return jax.jit(jax.grad(lambda own, x: jnp.sum(call(own, x) ** 2)))

    grads = square(lambda rows, x: jdelta.rowwise(delta.backbone_model, frozen)(x, params=rows))(rows, x)
    alone = square(lambda own, x: delta.backbone_model(x, params=jdelta.combine(own, frozen)))
    wanted = jdelta.stack([alone(tree, x[i : i + 1]) for i, tree in enumerate(trees)])
    # Sums of squares in two programs: numbers up to ten, so a millionth of them is rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), grads, wanted)


# --- saved deltas


@pytest.mark.slow
def test_saved_loras_of_other_ranks_and_scales_are_brought_to_the_form_of_the_first(tmp_path):
    deltas = [lora(1, lora_r=3, lora_alpha=6), lora(2, lora_r=2, lora_alpha=7), lora(3, lora_r=1, use_rslora=True)]
    for delta in deltas:
        delta.save_finetuned(tmp_path / str(delta.config.lora_r))
    stacked = jdelta.stack([deltas[0], tmp_path / "2", deltas[2].finetuned()])
    x, indices = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32), np.array([1, 0, 2, 2, 0])
    model, frozen = deltas[0].backbone_model, deltas[0].partition()[1]
    y = jax.jit(lambda rows: jdelta.rowwise(model, frozen)(x, params=rows))(jdelta.select(stacked, indices))
    alone = np.stack([jax.jit(delta.backbone_model)(x) for delta in deltas])
    np.testing.assert_allclose(y, alone[indices, np.arange(5)], rtol=1e-5, atol=1e-6)
    assert same(jdelta.unstack(stacked)[0], deltas[0].partition()[0]["params"])  # bit for bit


def test_deltas_of_other_backbones_are_told():
    one, other = lora(1), lora(2)
    tree = other.backbone_model.params
    tree["params"]["head"]["kernel"] = tree["params"]["head"]["kernel"] + 1
    with pytest.warns(UserWarning, match=r"the backbone of delta 2 is not that of delta 1.*head\.kernel"):
        jdelta.stack([one, other])
    with pytest.raises(ValueError, match="the backbone of delta 2"):
        jdelta.stack([one, other], check_hash=True)
    jdelta.stack([one, other], check_hash=False)


# --- training


@pytest.mark.slow
def test_training_many_in_one_program_equals_training_each_alone():
    """Other initial values, ranks, learning rates and tasks; each with its own Adam."""
    steps, ranks, rates = 5, [4, 2, 4], np.array([1e-2, 3e-3, 1e-3], np.float32)
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(3, 60, (3, steps, 2, 6)), rng.integers(0, 2, (3, steps, 2))

    def attached(rank):
        model = fresh("bert", "FlaxBertForSequenceClassification", num_hidden_layers=1)
        return jdelta.LoraModel(model, lora_r=rank, lora_alpha=2 * rank, unfrozen_modules=["classifier"])

    def make_step(delta, frozen):
        def step(trainable, state, rate, ids, labels):
            def loss(trainable):
                logits = delta.backbone_model(ids, params=jdelta.combine(trainable, frozen)).logits
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            value, grads = jax.value_and_grad(loss)(trainable)
            updates, state = optax.adam(rate).update(grads, state)
            return optax.apply_updates(trainable, updates), state, value

        return step

    deltas = {rank: attached(rank) for rank in ranks}
    frozen = deltas[4].partition()[1]
    starts = [moved(deltas[rank].partition()[0], seed) for seed, rank in enumerate(ranks)]

    def side_by_side(trees):
        return jdelta.stack([deltas[r].finetuned(jdelta.combine(t, frozen)) for t, r in zip(trees, ranks, strict=True)])

    stacked, losses = side_by_side(starts), []
    states = jax.jit(jax.vmap(optax.adam(1.0).init))(stacked)
    many = jax.jit(jax.vmap(make_step(deltas[4], frozen)))
    for i in range(steps):
        stacked, states, loss = many(stacked, states, rates, ids[:, i], labels[:, i])
        losses.append(loss)

    alone, single = [], {rank: jax.jit(make_step(delta, frozen)) for rank, delta in deltas.items()}
    for k, trainable in enumerate(starts):
        state = jax.jit(optax.adam(1.0).init)(trainable)
        for i in range(steps):
            trainable, state, loss = single[ranks[k]](trainable, state, rates[k], ids[k, i], labels[k, i])
            np.testing.assert_allclose(np.asarray(losses[i])[k], loss, atol=1e-5)
        alone.append(trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stacked, side_by_side(alone))
    a = stacked["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["lora"]["a"]
    assert np.all(np.asarray(a)[1, :, :2] != 0)
    assert np.all(np.asarray(a)[1, :, 2:] == 0)  # what was filled up stays as it was


# --- bad input


def test_what_cannot_be_stacked_is_refused():
    one = lora(1)
    with pytest.raises(ValueError, match="there are no deltas"):
        jdelta.stack([])
    for bare in (one, one.finetuned(), one.partition()[0], "folder"):
        with pytest.raises(TypeError, match=r"expected a list of deltas, got one"):
            jdelta.stack(bare)
    with pytest.raises(TypeError, match="got int"):
        jdelta.stack([one, 3])
    with pytest.raises(FileNotFoundError):
        jdelta.stack([one, "./nowhere"])
    with pytest.raises(ValueError, match=r"delta 2 has no leaf 'dense\.lora\.1', which delta 1 has"):
        jdelta.stack([leaves((2,), (3,)), leaves((2,))])
    with pytest.raises(ValueError, match=r"dense\.lora\.0 is float32\[2\] in delta 1, float32\[3\] in delta 3"):
        jdelta.stack([leaves((2,)), leaves((2,)), leaves((3,))])
    with pytest.raises(ValueError, match=r"is float32\[2\] in delta 1, bfloat16\[2\] in delta 2"):
        jdelta.stack([leaves((2,)), jax.tree.map(lambda a: a.astype(jnp.bfloat16), leaves((2,)))])


def test_deltas_of_other_methods_arguments_modules_or_ranks_are_refused():
    one, other = lora(1).finetuned(), functools.partial(dataclasses.replace, lora(1).finetuned())
    with pytest.raises(ValueError, match=r"delta 1 is of method 'lora', delta 2 of 'adapter'"):
        jdelta.stack([one, other(config=jdelta.AdapterConfig())])
    with pytest.raises(ValueError, match=r"delta 2 has no module head, which delta 1 has"):
        jdelta.stack([one, other(targets=("first",))])
    with pytest.raises(ValueError, match=r"delta 1 has no inserted layer at head, which delta 3 has"):
        jdelta.stack([one, one, other(inserted=("head",))])
    with pytest.raises(ValueError, match=r"delta 1 has no leaf head\.bias, which delta 2 has"):
        jdelta.stack([one, other(values=one.values | {"head.bias": np.zeros(3)})])
    wider = {"first.lora.a": np.zeros((5, 4), np.float32), "first.lora.b": np.zeros((4, 6), np.float32)}
    with pytest.raises(ValueError, match=r"first\.lora has rank 4 in delta 2, and 2 in delta 1.*highest rank first"):
        jdelta.stack([one, other(values=one.values | wider)])
    with pytest.raises(ValueError, match=r"first\.lora is that of another module in delta 2.*widths differ"):
        jdelta.stack([one, other(values=one.values | {"first.lora.a": np.zeros((7, 2), np.float32)})])
    adapters = [other(config=jdelta.AdapterConfig(bottleneck_dim=d)) for d in (2, 3)]
    with pytest.raises(ValueError, match=r"delta 1 has bottleneck_dim=2, delta 2 has bottleneck_dim=3"):
        jdelta.stack(adapters)


def test_an_index_without_a_delta_is_an_error_and_under_jit_nan():
    stacked = jdelta.stack([leaves((2,))] * 4)
    for indices in ([0, 4], [-1], np.array([7]), jnp.array([0, -4])):
        with pytest.raises(IndexError, match=r"there are 4 deltas, 0 to 3; index (4|-1|7|-4) is none of them"):
            jdelta.select(stacked, indices)
    with pytest.raises(TypeError, match="indices are integers, got float"):
        jdelta.select(stacked, [0.0])
    with pytest.raises(ValueError, match=r"got shape \(1, 2\)"):
        jdelta.select(stacked, [[0, 1]])
    rows = jax.jit(jdelta.select)(stacked, jnp.array([3, 4, -1]))["dense"]["lora"]["0"]
    assert np.isnan(rows).all(-1).tolist() == [False, True, True]
    assert same(jdelta.select(stacked, 3), leaves((2,)))


def test_rows_that_do_not_fit_the_batch_are_refused():
    delta = lora()
    trainable, frozen = delta.partition()
    call, rows = jdelta.rowwise(delta.backbone_model, frozen), jdelta.stack([trainable] * 3)
    with pytest.raises(ValueError, match=r"argument '0' has shape \(2, 5\), and params are those of 3 rows"):
        call(jnp.ones((2, 5)), params=rows)
    with pytest.raises(ValueError, match=r"argument 'rngs\.dropout' has shape \(2,\)"):
        call(jnp.ones((3, 5)), rngs={"dropout": jax.random.PRNGKey(0)}, params=rows)
    with pytest.raises(ValueError, match="this is no stack"):
        call(jnp.ones((3, 5)), params=trainable)
    with pytest.raises(ValueError, match="no leaves"):
        jdelta.select({}, [0])
    with pytest.raises(ValueError, match="more than one of the trees"):
        jdelta.rowwise(delta.backbone_model, delta.backbone_model.params)(jnp.ones((3, 5)), params=rows)
