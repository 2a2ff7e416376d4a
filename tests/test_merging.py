"""Merging: the same outputs at the bare backbone's cost, and the original bits afterwards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, fresh, noisy, train_deltas
from flax import linen as nn
from tiers import breadth

import jdelta

IDS = jnp.array([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
# family, class, modules: each kind of kernel that transformers has
MODELS = {
    "Dense": ("bert", "FlaxBertForSequenceClassification", {}, ["query", "dense"]),
    "Conv1D, square and not": ("gpt2", "FlaxGPT2LMHeadModel", {}, ["c_attn", "c_proj"]),
    "an embedding that is not tied": ("opt", "FlaxOPTForCausalLM", {"tie_word_embeddings": False}, ["embed_tokens"]),
    "layers that share weights": ("albert", "FlaxAlbertModel", {}, ["query", "ffn"]),
}


def call(model, params=None):
    return model(IDS, params=params)[0]


@pytest.mark.parametrize("kind", breadth(MODELS, "Dense"))
def test_merged_is_attached_and_unmerged_has_the_original_bits(kind):
    family, cls, config, modules = MODELS[kind]
    model = fresh(family, cls, **config)
    base = model.params
    delta = jdelta.LoraModel(model, modified_modules=modules, lora_r=2)
    train_deltas(delta)
    grafted, attached = model.params, call(model)
    assert jnp.abs(attached - call(fresh(family, cls, **config))).max() > 1e-3

    pure = delta.merge(grafted)
    assert delta.attached
    chex.assert_trees_all_equal(model.params, grafted)
    merged = delta.merge()
    assert delta.merged
    assert not delta.attached
    chex.assert_trees_all_equal_structs(merged, base)
    chex.assert_trees_all_equal(merged, pure, model.params)
    np.testing.assert_allclose(call(model), attached, rtol=1e-5, atol=1e-6)  # float32: another order of sums
    np.testing.assert_array_equal(call(fresh(family, cls, **config), merged), call(model))

    delta.unmerge()
    chex.assert_trees_all_equal(model.params, grafted)
    np.testing.assert_array_equal(call(model), attached)
    delta.detach()
    chex.assert_trees_all_equal(model.params, base)


def test_merged_inference_has_the_flops_of_the_bare_backbone():
    def flops(model):
        run = jax.jit(lambda params: call(model, params))
        return run.lower(model.params).compile().cost_analysis()["flops"]

    bare = flops(fresh("bert", "FlaxBertForSequenceClassification"))
    model = fresh("bert", "FlaxBertForSequenceClassification")
    delta = jdelta.LoraModel(model, modified_modules=["dense", "query"], lora_r=2)
    assert flops(model) > bare
    delta.merge()
    assert flops(model) == bare


def of(module, x, rngs=0):
    return jdelta.Backbone(module, module.init(jax.random.key(rngs), x)["params"], dummy_inputs=(x,))


class Attend(nn.Module):
    """An embedding that is the head as well."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(20, 4, name="embed")
        return embed.attend(nn.Dense(4, name="dense")(embed(ids)))


class Scanned(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(4, name="dense")(x), None

        layers = nn.scan(Layer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


class Einsum(nn.Module):
    """As in Gemma: the equation is an argument, and the weights are called w."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(), self.shape))


class Gemma(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = Einsum((2, 4, 3), name="layers_0")("BTD,NDH->BTNH", x)
        return Einsum((2, 3, 4), name="layers_1")("BTNH,NHD->BTD", heads)


IMAGE = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
FLAT = jax.random.normal(jax.random.key(0), (2, 3, 4))
LAYERS = {
    "Dense": (nn.Dense(6), FLAT),
    "DenseGeneral over two axes": (nn.DenseGeneral((2, 5), axis=(-2, -1)), FLAT),
    "DenseGeneral over axes in another order": (nn.DenseGeneral(5, axis=(-1, 1)), FLAT),
    "Conv": (nn.Conv(6, (3, 3), strides=2, padding="SAME"), IMAGE),
    "Conv with a dilated kernel": (nn.Conv(6, (2, 2), kernel_dilation=2), IMAGE),
    "grouped Conv": (nn.Conv(6, (3, 3), feature_group_count=2), IMAGE),
    "Conv over one axis": (nn.Conv(6, (3,)), FLAT),
    "Einsum": (nn.Einsum((4, 2, 5), "btd,dnh->btnh"), FLAT),
    "Einsum that sums over two axes": (nn.Einsum((3, 5, 4), "...ab,acb->...c"), FLAT),
    "Einsum with weights of its own for each row": (nn.Einsum((3, 4, 5), "bed,edf->bef", use_bias=False), FLAT),
    "an einsum of one's own": (Gemma(), FLAT),
    "inside a scan": (Scanned(), FLAT),
    "inside a scan with layers in the second axis": (Scanned(1), FLAT),
}


@pytest.mark.parametrize("kind", breadth(LAYERS, "Conv", "inside a scan"))
def test_every_linear_layer_of_flax(kind):
    module, x = LAYERS[kind]
    model = of(nn.Sequential([module]), x)
    inner = {Scanned: ["dense"], Gemma: ["layers_0.layers_0", "layers_1"]}
    delta = jdelta.LoraModel(model, inner.get(type(module), ["layers_0"]), lora_r=2)
    unchanged = model(x)
    train_deltas(delta)
    assert jnp.abs(model(x) - unchanged).max() > 1e-3
    grafted, attached = model.params, model(x)
    merged = jax.jit(delta.merge)(grafted)
    delta.merge()
    np.testing.assert_allclose(model(x), attached, rtol=2e-5, atol=2e-6)
    chex.assert_trees_all_close(merged, model.params, rtol=1e-6)
    delta.unmerge()
    chex.assert_trees_all_equal(model.params, grafted)


def test_half_precision_weights_keep_their_dtype():
    model = of(nn.Sequential([nn.Dense(6, param_dtype=jnp.bfloat16)]), FLAT)
    before = model.params["layers_0"]["kernel"]
    delta = jdelta.LoraModel(model, modified_modules=["layers_0"], lora_r=2)
    train_deltas(delta)
    own = model.params["layers_0"]["lora"]
    delta.merge()
    kernel = model.params["layers_0"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    want = before.astype(jnp.float32) + 8 * own["a"].astype(jnp.float32) @ own["b"].astype(jnp.float32)
    np.testing.assert_allclose(kernel.astype(jnp.float32), want, rtol=2**-8)  # bfloat16's resolution


def test_biases_that_train_are_merged_where_they_are():
    model = fresh("bert", "FlaxBertForSequenceClassification")
    base = model.params
    delta = jdelta.BitFitModel(model)
    train_deltas(delta)
    trained, attached = model.params, call(model)
    delta.merge()
    np.testing.assert_array_equal(call(model), attached)
    chex.assert_trees_all_equal(model.params, trained)
    delta.unmerge()
    delta.detach()
    chex.assert_trees_all_equal(model.params, base)


def test_two_deltas_are_merged_and_unmerged_in_order():
    model = fresh("bert", "FlaxBertForSequenceClassification")
    one, two = jdelta.LoraModel(model, lora_r=2), jdelta.LoraModel(model, lora_r=2, rng=1)
    two.freeze_module()
    train_deltas(two)
    grafted, attached = model.params, call(model)
    one.merge()
    two.merge()
    np.testing.assert_allclose(call(model), attached, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"'bert.*kernel' was changed after delta 'lora' was merged. If another delta"):
        one.unmerge()
    two.unmerge()
    one.unmerge()
    chex.assert_trees_all_equal(model.params, grafted)


def test_weights_that_were_trained_after_merging_are_not_lost():
    model = fresh("bert", "FlaxBertForSequenceClassification")
    delta = jdelta.LoraModel(model)
    train_deltas(delta)
    delta.merge()
    model.params = trained = noisy(model.params)
    with pytest.raises(ValueError, match="was changed after delta 'lora' was merged"):
        delta.unmerge()
    chex.assert_trees_all_equal(model.params, trained)


CANNOT = {
    "a layer with a non-linearity": (
        lambda model: jdelta.AdapterModel(model, bottleneck_dim=2),
        r"at bert\.encoder\.layer\.0\.attention\.output\.dense, .* and 1 more: what Adapter computes is no change",
    ),
    "a prefix": (jdelta.PrefixModel, "what PrefixLayer computes is no change of the module's weights"),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_cannot_be_merged_is_named_and_nothing_changes(what):
    make, message = CANNOT[what]
    model = fresh("bert", "FlaxBertForSequenceClassification")
    delta = make(model)
    before, module = model.params, model.module
    with pytest.raises(ValueError, match=message):
        delta.merge()
    assert model.params is before
    assert model.module is module


@pytest.mark.parametrize("first", ["lora", "adapter"])
def test_a_lora_is_inside_of_an_adapter_and_can_be_merged(first):
    model = fresh("bert", "FlaxBertForSequenceClassification")
    makes = {
        "lora": lambda: jdelta.LoraModel(model, ["output.dense"], lora_r=2),
        "adapter": lambda: jdelta.AdapterModel(model, ["output.dense"], bottleneck_dim=2),
    }
    deltas = {kind: makes[kind]() for kind in (first, *makes.keys() - {first})}
    lora, adapter = deltas["lora"], deltas["adapter"]
    adapter.freeze_module()
    train_deltas(adapter)
    attached = call(model)
    lora.merge()
    np.testing.assert_allclose(call(model), attached, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "attend"])
def test_an_embedding_that_is_tied_to_the_head_is_refused(family):
    model = fresh("gpt2", "FlaxGPT2LMHeadModel") if family == "gpt2" else of(Attend(), IDS)
    delta = jdelta.LoraModel(model, modified_modules=["wte" if family == "gpt2" else "embed"], lora_r=2)
    with pytest.raises(ValueError, match="its weights are those of a tied head or another method too"):
        delta.merge()


class WithBias(nn.Module):
    """What `Scanned` is, with biases: it runs the merged tree of the one without."""

    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        use_bias = self.use_bias

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(4, use_bias=use_bias, name="dense")(x), None

        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


def test_added_biases_become_leaves_that_the_module_with_biases_has():
    backbone = of(WithBias(use_bias=False), FLAT)
    base = backbone.params
    delta = jdelta.BitFitModel(backbone, modified_modules=["dense"])
    train_deltas(delta)
    grafted, attached = backbone.params, backbone(FLAT)
    pure = delta.merge(grafted)
    chex.assert_trees_all_equal_shapes(pure, of(WithBias(), FLAT).params)
    np.testing.assert_allclose(WithBias().apply({"params": pure}, FLAT), attached, rtol=1e-6)
    merged = delta.merge()
    chex.assert_trees_all_equal(merged, pure, backbone.params)
    np.testing.assert_array_equal(backbone(FLAT), attached)
    delta.unmerge()
    chex.assert_trees_all_equal(backbone.params, grafted)
    np.testing.assert_array_equal(backbone(FLAT), attached)
    delta.detach()
    chex.assert_trees_all_equal(backbone.params, base)
    np.testing.assert_array_equal(backbone(FLAT), of(WithBias(use_bias=False), FLAT)(FLAT))
    np.testing.assert_array_equal(backbone(FLAT, params=pure), attached)  # what was merged apart


@pytest.mark.slow
def test_added_biases_are_merged_in_a_model_with_norms_of_its_own_and_generate_the_same():
    model = fresh("t5", "FlaxT5ForConditionalGeneration")
    base, before = model.params, model.generate(IDS, max_new_tokens=4, do_sample=False).sequences
    delta = jdelta.BitFitModel(model)
    train_deltas(delta)
    added = delta.own(model.params)
    attached = model(IDS, decoder_input_ids=IDS).logits
    sequences = model.generate(IDS, max_new_tokens=4, do_sample=False).sequences
    delta.merge()
    assert len(jax.tree.leaves(model.params)) == len(jax.tree.leaves(base)) + len(jax.tree.leaves(added))
    assert "bitfit" not in str(jax.tree_util.tree_structure(model.params))
    np.testing.assert_allclose(model(IDS, decoder_input_ids=IDS).logits, attached, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(model.generate(IDS, max_new_tokens=4, do_sample=False).sequences, sequences)
    delta.unmerge()
    delta.detach()
    chex.assert_trees_all_equal(model.params, base)
    np.testing.assert_array_equal(model.generate(IDS, max_new_tokens=4, do_sample=False).sequences, before)


def test_the_verbs_in_the_wrong_order():
    delta = jdelta.LoraModel(fresh("bert", "FlaxBertForSequenceClassification"))
    with pytest.raises(RuntimeError, match="'lora' is not merged"):
        delta.unmerge()
    delta.merge()
    for verb in (delta.merge, delta.finetuned):
        with pytest.raises(RuntimeError, match=r"delta 'lora' is merged and cannot be .* Call unmerge\(\) first"):
            verb()
    for verb in (delta.attach, delta.detach):
        with pytest.raises(RuntimeError, match=r"'lora' is merged into the weights. Call unmerge\(\) first"):
            verb()


def test_values_that_are_elsewhere_are_asked_for():
    shapes = build("bert", "FlaxBertForSequenceClassification", _do_init=False)
    delta = jdelta.LoraModel(shapes)
    with pytest.raises(ValueError, match=r"the model holds shapes only. .*delta.merge\(params\)"):
        delta.merge()
    full = fresh("bert", "FlaxBertForSequenceClassification")
    grafted = jdelta.graft(full.params, noisy(delta.init(0)))
    attached = call(shapes, grafted)
    merged = delta.merge(grafted)
    delta.detach()
    np.testing.assert_allclose(call(shapes, merged), attached, rtol=1e-5, atol=1e-6)
