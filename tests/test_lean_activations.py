"""Lean activations against the models' own: equal results, less kept, undone without a trace."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from conftest import fresh
from flax import linen as nn
from tiers import breadth

import jdelta

IDS = jnp.array([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
BERT, GPT2 = "FlaxBertForSequenceClassification", "FlaxGPT2LMHeadModel"
# Theirs are ReLU, which keeps one array anyway, or written out in the file.
WITHOUT = {"bloom", "longt5", "opt", "regnet", "resnet", "t5"}


def kept(model, params):
    """The float arrays that the backward pass keeps of a forward pass, by shape and number."""
    _, pull = jax.vjp(lambda params: jax.tree.leaves(dict(model(**zoo.inputs(model), params=params)))[0], params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.float32]
    return {shape: shapes.count(shape) for shape in shapes}


@pytest.fixture(scope="module")
def models():
    """A small BERT without and with lean activations, and its parameters."""
    plain, lean = (zoo.build(BERT, zoo.one_layer("bert"), _do_init=False) for _ in range(2))
    jdelta.lean_activations(lean)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(0.4 * rng.standard_normal(s.shape), "f4"), plain.params_shape_tree)
    return plain, lean, params


def test_outputs_and_gradients_are_the_models_own(models):
    """To 1e-6 of the largest entry: erf and erfc differ by a unit in the last place."""
    found, expected = [], []
    for model, results in zip(models[:2], (expected, found), strict=True):
        loss = jax.jit(jax.value_and_grad(lambda p, model=model: (model(IDS, params=p).logits ** 2).sum()))
        results.append(loss(models[2]))
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, atol=1e-6 * scale, rtol=0)


@pytest.mark.slow
def test_the_input_alone_is_kept(models):
    plain, lean, params = models
    config = plain.config
    wide = (*zoo.inputs(plain)["input_ids"].shape, config.intermediate_size)
    # The kernel that the activation goes into trains here, so its output is kept too.
    assert kept(plain, params)[wide] > kept(lean, params)[wide] == 2


def test_of_a_frozen_backbone_memory_is_saved_in_the_compiled_step():
    """Two of the three arrays of an activation's size that the trace keeps.

    XLA finds some of them by itself, others in each release: a whole one a layer or more is what it does not.
    """
    sizes = {"num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 512, "num_attention_heads": 2}
    temporaries, traced = [], []
    for alter in (lambda model: None, jdelta.lean_activations):
        model = zoo.build(BERT, sizes, _do_init=False)
        alter(model)
        delta = jdelta.LoraModel(model, modified_modules=["query"], lora_r=2)
        trainable, frozen = delta.partition(jdelta.graft(model.params_shape_tree, delta.shapes()))
        ids = jax.ShapeDtypeStruct((4, 32), jnp.int32)

        def loss(trainable, frozen, ids, model=model):
            return model(ids, params=jdelta.combine(trainable, frozen)).logits.sum()

        pull = jax.eval_shape(lambda t, *rest: jax.vjp(lambda t: loss(t, *rest), t)[1], trainable, frozen, ids)
        traced.append(sum(leaf.shape == (4, 32, 512) for leaf in jax.tree.leaves(pull)))
        step = jax.jit(jax.grad(loss)).lower(trainable, frozen, ids).compile()
        temporaries.append(step.memory_analysis().temp_size_in_bytes)
    wide = 4 * 32 * 512 * 4
    assert traced[0] > traced[1] == 3  # the input alone, in each layer
    assert temporaries[0] - temporaries[1] > (3 - 0.5) * wide


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "silu", "swish"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_activation_by_name(name, dtype):
    """The same formula in another program, so to eight roundings, for as many steps it has: 1e-6 in float32.

    The exact GELU in float32 is computed by another formula, and compared with float64.
    """
    from transformers.modeling_flax_utils import ACT2FN

    class Plain(nn.Module):
        def setup(self):
            self.act = ACT2FN[name]

        def __call__(self, x):
            return self.act(x)

    x = jnp.linspace(-6, 6, 1001).astype(dtype)
    model = jdelta.Backbone(Plain(), {}, (x,))
    run = [jax.jit(jax.vmap(jax.value_and_grad(lambda x: model(x[None])[0]))) for _ in range(2)]
    expected = run[0](x)
    assert repr(jdelta.lean_activations(model)) == "1 modules: the root module"
    found = run[1](x)
    if (name, dtype) == ("gelu", "float32"):
        from scipy.special import erf

        exact = np.asarray(x, "f8")
        half, density = 0.5 * (1 + erf(exact / 2**0.5)), np.exp(-(exact**2) / 2) / (2 * np.pi) ** 0.5
        expected = exact * half, half + exact * density
    tolerance = 8 * float(jnp.finfo(dtype).eps)  # of a number up to one, and relative for larger ones
    for value, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(value, "f8"), np.asarray(want, "f8"), atol=tolerance, rtol=tolerance)


def test_elsewhere_than_on_a_cpu_the_exact_gelu_is_the_models_own_too(models, monkeypatch):
    plain, lean, params = models
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    run = [jax.jit(lambda p, model=model: model(IDS, params=p).logits)(params) for model in (plain, lean)]
    chex.assert_trees_all_close(*run, rtol=1e-6, atol=1e-6)  # other programs, so but for rounding
    texts = [str(jax.make_jaxpr(lambda p, m=m: m(IDS, params=p).logits)(params)) for m in (plain, lean)]
    assert ["erfc" in text for text in texts] == [True, True]


@pytest.mark.parametrize("family", breadth(zoo.REPRESENTATIVE, "bert", "gpt2", "llama", "vit", "resnet"))
def test_every_family_is_served(family):
    model = zoo.build(zoo.REPRESENTATIVE[family], zoo.one_layer(family), _do_init=False)
    if family in WITHOUT:
        with pytest.raises(ValueError, match=r"nothing in .* can be changed; no module takes gelu, gelu_new"):
            jdelta.lean_activations(model)
        return
    lean = jdelta.lean_activations(model)
    assert lean.targets


@pytest.mark.slow
def test_with_deltas_attention_and_remat_in_any_order_and_undone_bit_for_bit():
    model, plain = fresh("bert", BERT), fresh("bert", BERT)
    plain.enable_gradient_checkpointing()

    def logits(model):
        return jax.jit(lambda p: model(IDS, params=p).logits)(model.params)

    expected = logits(model)
    lean = jdelta.lean_activations(model)
    assert repr(lean) == "2 modules: bert.encoder.layer.[0-1].intermediate"
    delta = jdelta.AdapterModel(model, modified_modules=["intermediate", "output.dense"], zero_up=True)
    fused = jdelta.fused_attention(model)
    with pytest.raises(RuntimeError, match=r"lean already. Call undo\(\) first"):
        jdelta.lean_activations(model)
    model.enable_gradient_checkpointing()
    chex.assert_trees_all_close(logits(model), expected, atol=1e-6)
    fused.undo()
    lean.undo()
    delta.detach()
    chex.assert_trees_all_equal(logits(model), logits(plain))
    with pytest.raises(RuntimeError, match="undone already"):
        lean.undo()


def test_other_models_and_other_modules_are_not_changed(models):
    """Another model computes as ever; as does a linen module which calls its activation itself."""
    plain, lean, params = models
    texts = [str(jax.make_jaxpr(lambda p, m=m: m(IDS, params=p).logits)(params)) for m in (plain, lean)]
    assert ["erfc" in text for text in texts] == [True, jax.default_backend() != "cpu"]
    x = jnp.ones((1, 3))
    own = jdelta.Backbone(nn.Sequential([nn.Dense(2), functools.partial(nn.gelu, approximate=False)]), None, (x,))
    with pytest.raises(ValueError, match=r"write jax\.checkpoint\(nn\.gelu\)"):
        jdelta.lean_activations(own)
    with pytest.raises(TypeError, match=r"expected a Flax model of transformers, a jdelta\.Backbone or an nnx module"):
        jdelta.lean_activations(3)
