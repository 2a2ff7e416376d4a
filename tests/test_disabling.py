"""The model without a delta, as a reference: with `disabled` or `without` it is the bare backbone, bit for bit."""

import contextlib
import copy
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import fresh, noisy, train_deltas
from flax import linen as nn
from flax.core import freeze
from tiers import breadth

import jdelta
from jdelta.trees import surgery


class Net(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 8, name="embed")(ids)
        x = x + nn.SelfAttention(2, name="attention")(x, mask=nn.make_causal_mask(ids))
        return nn.Dense(11, name="head")(nn.tanh(nn.Dense(8, name="dense")(x)))


IDS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 5)))
DENSE = {"modified_modules": ["dense"]}
METHODS = {
    "lora": (jdelta.LoraModel, {**DENSE, "lora_r": 2}),
    "adapter": (jdelta.AdapterModel, {**DENSE, "bottleneck_dim": 4}),
    "parallel adapter": (jdelta.ParallelAdapterModel, {"modified_modules": ["dense", "dense"], "bottleneck_dim": 4}),
    "low-rank adapter": (jdelta.LowRankAdapterModel, {**DENSE, "reduction_factor": 2}),
    "compacter": (jdelta.CompacterModel, {**DENSE, "reduction_factor": 2, "hypercomplex_division": 2}),
    "bitfit": (jdelta.BitFitModel, {"modified_modules": ["dense", "attention"]}),
    "prefix": (jdelta.PrefixModel, {"modified_modules": ["attention"], "prefix_token_num": 2, "mid_dim": 4}),
    "lora on a leaf": (jdelta.LoraModel, {"modified_parameters": ["embed.embedding"], "lora_r": 2}),
    "soft prompt": (jdelta.SoftPromptModel, {"modified_modules": ["embed"], "soft_token_num": 2}),
}


def linen():
    params = noisy(Net().init(jax.random.key(0), IDS)["params"])
    return jdelta.Backbone(Net(), params, dummy_inputs=(IDS,))


def attached(model, method, **more):
    """A delta of a method that changes what the model computes."""
    cls, arguments = METHODS[method]
    if not isinstance(model, jdelta.Backbone):  # at the default positions
        arguments = {key: value for key, value in arguments.items() if key != "modified_modules"}
    delta = cls(model, **{**arguments, **more})
    train_deltas(delta)
    return delta


def another(model):
    """A delta of one more method at other modules."""
    places = ["head"] if isinstance(model, jdelta.Backbone) else ["classifier"]
    delta = jdelta.LoraModel(model, places, lora_r=2, name="another", rng=1)
    train_deltas(delta)
    return delta


def outputs(model, params=None):
    found = model(IDS, params=params)
    return found if isinstance(model, jdelta.Backbone) else found.logits


def output(model, params=None):
    return np.asarray(outputs(model, params))


def bits(tree):
    return {path: (leaf.dtype, np.asarray(leaf).tobytes()) for path, leaf in surgery.flatten(tree).items()}


def same(one, other):
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def on_bert():
    return fresh("bert", "FlaxBertForSequenceClassification")


BESIDE = ("alone", "after another", "before another")
MODELS = {"linen": linen, "transformers": on_bert}
CASES = {", ".join(case): case for case in itertools.product(MODELS, METHODS, BESIDE)}
CASES = {name: case for name, case in CASES.items() if case[:2] != ("transformers", "lora on a leaf")}
JITTED = [case for case in CASES if case.endswith("after another")]
COMPILED = [
    f"linen, {method}, after another" for method in ("lora", "bitfit", "prefix", "lora on a leaf", "soft prompt")
]
QUICK = [f"linen, {method}, after another" for method in METHODS]
QUICK += ["linen, prefix, before another"]


@pytest.mark.parametrize("case", breadth(CASES, *QUICK))
def test_a_disabled_delta_leaves_the_backbone_bit_for_bit_and_comes_back_so(case):
    name, method, beside = CASES[case]
    make = MODELS[name]
    model = make()
    if beside == "after another":
        another(model)
    if beside != "before another":
        bare = output(model)
        delta = attached(model, method)
    else:
        alone = make()
        other = another(alone)
        bare = output(alone)
        delta = attached(model, method)
        other = another(model)
        assert other.attached
    params, before = model.params, bits(model.params)
    with_delta = output(model)
    assert not same(with_delta, bare)
    with delta.disabled():
        assert same(output(model), bare)
        assert not delta.attached
    assert delta.attached
    assert bits(model.params) == before
    assert same(output(model), with_delta)
    assert same(output(model, jdelta.without(params, delta)), bare)
    assert same(output(model), with_delta)
    assert bits(model.params) == before


@pytest.mark.parametrize("case", breadth(JITTED, *COMPILED))
def test_the_program_without_a_delta_is_that_of_the_bare_backbone(case):
    name, method, _ = CASES[case]
    model = MODELS[name]()
    run = jax.jit(lambda params: outputs(model, params))
    bare, expected = str(jax.make_jaxpr(functools.partial(outputs, model))(model.params)), np.asarray(run(model.params))
    other, delta = another(model), attached(model, method)
    other.detach()
    tree = jdelta.without(model.params, delta)
    assert str(jax.make_jaxpr(functools.partial(outputs, model))(tree)) == bare
    within = jax.jit(lambda params: outputs(model, jdelta.without(params, delta)))
    assert same(np.asarray(within(model.params)), expected)
    with delta.disabled():
        assert same(np.asarray(run(model.params)), expected)
    assert not same(np.asarray(run(model.params)), expected)


def test_policy_and_reference_are_one_compiled_function():
    model = linen()
    bare = output(model)
    delta = attached(model, "lora")
    traces = []

    @jax.jit
    def both(params):
        traces.append(1)
        return model(IDS, params=params), model(IDS, params=jdelta.without(params, delta))

    for seed in range(3):
        params = jdelta.combine(noisy(delta.partition()[0], seed), delta.partition()[1])
        policy, reference = both(params)
        np.testing.assert_allclose(policy, output(model, params), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(reference, bare, rtol=1e-6, atol=1e-6)
    assert len(traces) == 1


def test_the_reference_gets_no_gradient_of_the_delta():
    model = linen()
    delta = attached(model, "bitfit")
    trainable, frozen = delta.partition()
    grads = jax.grad(
        lambda t: model(IDS, params=jdelta.without(jdelta.combine(t, frozen), delta)).sum(),
    )(trainable)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_deltas_are_disabled_in_any_order_and_more_than_once():
    model, names = linen(), ["lora", "bitfit", "adapter"]
    outputs = {(): output(model)}
    for number in range(1, 4):
        for some in itertools.combinations(names, number):
            built = linen()
            for name in some:
                attached(built, name)
            outputs[some] = output(built)
    deltas = {name: attached(model, name) for name in names}
    before = bits(model.params)
    for order in list(itertools.permutations([*names, "bitfit"]))[::9]:
        contexts, on = [(name, deltas[name].disabled()) for name in order], list(names)
        for name, context in contexts:
            context.__enter__()
            on = [other for other in on if other != name]
            assert same(output(model), outputs[tuple(on)])
        for _, context in contexts[1:] + contexts[:1]:
            context.__exit__(None, None, None)
        assert bits(model.params) == before
        assert all(delta.attached for delta in deltas.values())
        assert same(output(model), outputs[tuple(names)])


def test_an_exception_inside_brings_the_delta_back():
    model = linen()
    delta = attached(model, "bitfit")
    before, with_delta = bits(model.params), output(model)
    with pytest.raises(ZeroDivisionError), delta.disabled(), delta.disabled():
        _ = 1 / 0
    assert delta.attached
    assert bits(model.params) == before
    assert same(output(model), with_delta)


def test_a_detached_delta_stays_detached():
    model = linen()
    bare = output(model)
    delta = attached(model, "bitfit")
    held = model.params
    delta.detach()
    with delta.disabled():
        assert same(output(model), bare)
    assert not delta.attached
    assert same(output(model, jdelta.without(held, delta)), bare)
    assert same(output(model, jdelta.without(model.params, delta)), bare)


def test_a_merged_delta_is_merged_again_with_the_same_bits():
    model = linen()
    bare = output(model)
    deltas = [attached(model, "lora"), attached(model, "lora", name="second")]
    for delta in deltas:
        delta.merge()
    before, merged = bits(model.params), output(model)
    with deltas[1].disabled(), deltas[0].disabled():
        assert same(output(model), bare)
        assert not deltas[0].merged
    assert all(delta.merged for delta in deltas)
    assert bits(model.params) == before
    assert same(output(model), merged)
    with pytest.raises(ValueError, match=r"dense\.kernel' was changed after delta 'lora'"), deltas[0].disabled():
        pass
    with pytest.raises(RuntimeError, match=r"'second' is merged.*unmerge\(\) first.*disabled\(\)"):
        jdelta.without(model.params, deltas[1])
    assert bits(model.params) == before


@pytest.mark.parametrize("verb", ["attach", "remove"])
def test_what_is_done_inside_stays_done(verb):
    model = linen()
    delta = attached(model, "lora")
    with delta.disabled():
        getattr(delta, verb)()
        before = bits(model.params)
    assert bits(model.params) == before
    assert delta.attached == (verb == "attach")


def test_optimizers_and_partitions_are_as_before():
    model = linen()
    delta = attached(model, "bitfit")
    params, tx = model.params, delta.optimizer(optax.sgd(0.1))
    state, mask, parts = tx.init(params), delta.trainable_mask(), [bits(part) for part in delta.partition()]
    with delta.disabled():
        model(IDS)
        with pytest.raises(RuntimeError, match="what trains with delta 'bitfit' changed"):
            tx.update(params, state, params)
    assert delta.trainable_mask() == mask
    assert [bits(part) for part in delta.partition()] == parts
    updates, _ = tx.update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_a_tree_that_merely_lacks_the_leaves_is_still_refused():
    model = linen()
    delta = attached(model, "lora")
    with pytest.raises(ValueError, match=r"'lora' is attached, but the parameters lack 'dense\.lora\.a'"):
        model(IDS, params=jdelta.prune(model.params, delta))
    full = model.params
    with (
        delta.disabled(),
        pytest.raises(ValueError, match=r"'lora' is detached, but the parameters hold 'dense\.lora\."),
    ):
        model(IDS, params=full)


def test_several_deltas_are_left_out_of_one_tree_and_of_trees_of_collections():
    net = linen()
    bare = output(net)
    whole = jdelta.Backbone(Net(), {"params": net.params}, dummy_inputs=(IDS,))
    deltas = [attached(whole, name) for name in ("lora", "bitfit", "prefix")]
    tree = jdelta.without(whole.params, *deltas)
    assert same(output(whole, tree), bare)
    assert same(output(whole, jdelta.without(jdelta.without(whole.params, deltas[2]), *deltas[:2])), bare)
    assert jax.tree.structure(jax.tree.leaves(tree)) == jax.tree.structure(jax.tree.leaves(net.params))


def test_a_copy_of_the_model_with_another_dtype_runs_without_it_too():
    model = linen()
    delta = attached(model, "lora")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    bare = output(linen(), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), linen().params))
    assert same(output(model, jdelta.without(half, delta)), bare)
    clone = copy.copy(model)
    assert same(output(clone, jdelta.without(half, delta)), bare)


def test_earlier_values_are_of_the_dtype_that_the_tree_has():
    model = linen()
    delta = attached(model, "bitfit")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    bare = output(linen(), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), linen().params))
    assert same(output(model, jdelta.without(half, delta)), bare)


def test_unknown_earlier_values_are_an_error_that_names_the_leaf():
    shapes = jdelta.Backbone(Net(), surgery.shapes(linen().params), dummy_inputs=(IDS,))
    delta = jdelta.BitFitModel(shapes, ["dense"])
    with pytest.raises(ValueError, match=r"the pretrained value of 'dense\.bias'.*delta 'bitfit'"):
        jdelta.without(linen().params, delta)


def test_what_is_no_delta_or_was_removed_is_refused():
    model = linen()
    delta = attached(model, "lora")
    with pytest.raises(TypeError, match=r"without: expected deltas.*got 'lora'"):
        jdelta.without(model.params, "lora")
    delta.remove()
    with pytest.raises(RuntimeError, match="'lora' was removed"):
        jdelta.without(model.params, delta)
    with pytest.raises(RuntimeError, match="'lora' was removed"), delta.disabled():
        pass


@pytest.mark.slow
@pytest.mark.parametrize("params", ["in the model", "given"])
def test_a_soft_prompt_is_left_out_of_generation(params):
    model = fresh("gpt2", "FlaxGPT2LMHeadModel")
    options = {"max_new_tokens": 4, "do_sample": False}
    bare = model.generate(IDS, **options).sequences
    delta = jdelta.SoftPromptModel(model, soft_token_num=2)
    train_deltas(delta)
    with delta.disabled() if params == "in the model" else contextlib.nullcontext():
        given = {} if params == "in the model" else {"params": jdelta.without(model.params, delta)}
        assert np.array_equal(model.generate(IDS, **options, **given).sequences, bare)
    assert delta.attached


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4, name="dense")(x))


def test_other_collections_change_as_without_the_delta():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    model = jdelta.Backbone(Normed(), Normed().init(jax.random.key(0), x), (x,))
    bare = model(x, train=True, mutable=["batch_stats"])
    delta = attached(model, "lora")
    found = model(x, train=True, mutable=["batch_stats"], params=jdelta.without(model.params, delta))
    assert jax.tree.structure(found) == jax.tree.structure(bare)
    assert bits({"y": found[0], **found[1]}) == bits({"y": bare[0], **bare[1]})


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(4, name="dense")(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


@pytest.mark.parametrize("method", breadth(["lora", "bitfit", "adapter"], "bitfit"))
def test_inside_a_scan(method):
    x = jnp.ones((3, 4))
    model = jdelta.Backbone(Scanned(), noisy(Scanned().init(jax.random.key(0), x)["params"]), (x,))
    bare = np.asarray(model(x))
    delta = attached(model, method, modified_modules=["dense"])
    assert not same(np.asarray(model(x)), bare)
    assert same(np.asarray(model(x, params=jdelta.without(model.params, delta))), bare)
    with delta.disabled():
        assert same(np.asarray(model(x)), bare)


@pytest.mark.slow
def test_encoders_are_run_and_sequences_generated_without_prefixes():
    model = fresh("t5", "FlaxT5ForConditionalGeneration")
    options = {"max_length": 6, "do_sample": False}
    states, sequences = model.encode(IDS).last_hidden_state, model.generate(IDS, **options).sequences
    deltas = [attached(model, "prefix"), attached(model, "lora")]
    for params in (model.params, freeze(model.params)):
        tree = jdelta.without(params, *deltas)
        assert type(tree) is type(params)
        assert same(np.asarray(model.encode(IDS, params=tree).last_hidden_state), np.asarray(states))
        assert np.array_equal(model.generate(IDS, params=tree, **options).sequences, sequences)
    assert not (model.encode(IDS).last_hidden_state == states).all()


def test_threads_run_policy_and_reference_on_one_model():
    model = linen()
    bare = output(model)
    delta = attached(model, "lora")
    trees = {"policy": model.params, "reference": jdelta.without(model.params, delta)}
    expected = {"policy": output(model), "reference": bare}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: (name, output(model, trees[name])), ["policy", "reference"] * 10))
    assert all(same(value, expected[name]) for name, value in found)
