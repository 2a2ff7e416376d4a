"""Leaves that are no floats are never merged into, cast or trained in silence."""

import dataclasses
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import fresh, train_deltas
from flax import linen as nn
from tiers import breadth

import jdelta

X = jax.random.normal(jax.random.key(0), (2, 3, 6))


class Quantised(nn.Module):
    """A kernel of codes, with scales and a bias."""

    dtype: object = jnp.int8
    bias_dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x):
        codes = self.param("kernel", lambda _: jnp.arange(30).reshape(6, 5).astype(self.dtype))
        scale = self.param("scale", nn.initializers.constant(0.1), (5,))
        bias = self.param("bias", lambda _: jnp.zeros(5, self.bias_dtype))
        return x @ (codes.astype(x.dtype) * scale) + bias.astype(x.dtype)


def of(module, x=X):
    root = nn.Sequential([module])
    return jdelta.Backbone(root, root.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))


@pytest.mark.parametrize("dtype", breadth(["int8", "uint8", "int4", "bool"], "int8"))
def test_nothing_is_merged_into_weights_that_are_no_floats(dtype):
    backbone = of(Quantised(jnp.dtype(dtype)))
    delta = jdelta.LoraModel(backbone, ["layers_0"], lora_r=2)
    train_deltas(delta)
    params, module, y = backbone.params, backbone.module, backbone(X)
    for given in (None, params):
        with pytest.raises(ValueError, match=rf"cannot be merged at layers_0: its kernel holds {dtype}"):
            delta.merge(given)
    with pytest.raises(ValueError, match=rf"its kernel holds {dtype}"):
        delta.movement()
    assert backbone.params is params
    assert backbone.module is module
    assert delta.attached
    np.testing.assert_array_equal(backbone(X), y)


def test_nothing_is_merged_into_float8_where_small_changes_are_lost():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", lambda _: jnp.ones((6, 5), jnp.float8_e4m3fn)).astype(x.dtype)

    delta = jdelta.LoraModel(of(Half()), ["layers_0"], lora_r=2)
    with pytest.raises(ValueError, match="its kernel holds float8_e4m3fn"):
        delta.merge()


def test_one_kernel_among_others_stops_the_whole_merge():
    root = nn.Sequential([nn.Dense(6), Quantised()])
    backbone = jdelta.Backbone(root, root.init(jax.random.key(0), X)["params"], dummy_inputs=(X,))
    delta = jdelta.LoraModel(backbone, ["layers_0", "layers_1"], lora_r=2)
    train_deltas(delta)
    before = backbone.params
    with pytest.raises(ValueError, match="cannot be merged at layers_1"):
        delta.merge()
    assert backbone.params is before
    delta.remove()
    jdelta.LoraModel(backbone, ["layers_0"], lora_r=2).merge()


def test_a_backbone_that_was_quantised_after_it_was_traced():
    backbone = of(nn.Dense(5))
    dense = backbone.params["layers_0"]
    backbone.params = {"layers_0": {**dense, "kernel": (100 * dense["kernel"]).astype(jnp.int8)}}
    delta = jdelta.LoraModel(backbone, ["layers_0"], lora_r=2)
    with pytest.raises(ValueError, match="its kernel holds int8"):
        delta.merge()
    with pytest.raises(ValueError, match=r"'layers_0.kernel', which holds int8"):
        delta.freeze_module(["deltas", "layers_0.kernel"])


def test_bitfit_trains_no_bias_of_whole_numbers():
    backbone = of(Quantised(bias_dtype=jnp.int32))
    before = backbone.params
    with pytest.raises(TypeError, match=r"layers_0\.bias holds int32, and only floats of 16 bits and more train"):
        jdelta.BitFitModel(backbone, ["layers_0"])
    assert backbone.params is before
    assert set(jdelta.BitFitModel(of(Quantised()), ["layers_0"]).partition()[0]["layers_0"]) == {"bias"}


def test_what_cannot_train_is_named_and_a_pattern_for_more_trains_the_rest():
    backbone = of(Quantised())
    delta = jdelta.LoraModel(backbone, ["layers_0"], lora_r=2)
    delta.freeze_module(["layers_0.scale"])
    mask = delta.trainable_mask()
    with pytest.raises(ValueError, match=r"'kernel' means 'layers_0.kernel', which holds int8"):
        delta.freeze_module(["deltas", "kernel"])
    assert delta.trainable_mask() == mask
    with pytest.raises(ValueError, match=r"'layers_0.kernel', which holds int8"):
        jdelta.LoraModel(of(Quantised()), ["layers_0"], lora_r=2, unfrozen_modules=["kernel"])
    with pytest.warns(UserWarning, match="freeze_module: layers_0.kernel stay frozen"):
        delta.freeze_module(["layers_0"])
    assert delta.trainable_mask()["layers_0"] == {
        "kernel": False,
        "scale": True,
        "bias": True,
        "lora": {"a": True, "b": True},
    }
    with pytest.warns(UserWarning, match="unfrozen_modules: layers_0.kernel stay frozen"):
        jdelta.LoraModel(of(Quantised()), ["layers_0"], lora_r=2, unfrozen_modules=["layers_0"])
    # for trees that know no dtype, it is the model's that counts
    specs = jax.tree.map(lambda _: "spec", backbone.params)
    assert delta.trainable_mask(specs) == delta.trainable_mask()


def test_the_codes_stay_bit_for_bit_in_a_training_step_of_the_whole_tree():
    backbone = of(Quantised())
    delta = jdelta.LoraModel(backbone, ["layers_0"], lora_r=2)
    tx = delta.optimizer(optax.adamw(0.1))
    params, state = backbone.params, tx.init(backbone.params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.sum(backbone(X, params=p) ** 2), allow_int=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    after, state = step(params, state)
    after, _ = step(after, state)
    for key in ("kernel", "scale", "bias"):
        chex.assert_trees_all_equal(after["layers_0"][key], params["layers_0"][key])
        assert after["layers_0"][key].dtype == params["layers_0"][key].dtype
    assert (after["layers_0"]["lora"]["a"] != params["layers_0"]["lora"]["a"]).any()


def test_floats_are_not_loaded_in_the_place_of_codes_nor_codes_for_floats(tmp_path):
    plain = of(nn.Dense(5))
    trained = jdelta.LoraModel(plain, ["layers_0"], lora_r=2, unfrozen_modules=["layers_0.kernel"])
    trained.save_finetuned(tmp_path / "floats", allow_untrained=True)
    backbone = of(nn.Dense(5))
    dense = backbone.params["layers_0"]
    backbone.params = {"layers_0": {**dense, "kernel": dense["kernel"].astype(jnp.int8)}}
    delta = jdelta.LoraModel(backbone, ["layers_0"], lora_r=2)
    before = backbone.params
    with pytest.raises(ValueError, match=r"layers_0\.kernel holds float32, here int8"):
        delta.load_finetuned(tmp_path / "floats", check_hash=False)
    assert backbone.params is before


def test_leaves_that_are_no_floats_are_not_added_up():
    backbone = of(nn.Dense(5))
    found = jdelta.LoraModel(backbone, ["layers_0"], lora_r=2, unfrozen_modules=["layers_0.bias"]).finetuned()
    codes = {**found.values, "layers_0.bias": np.arange(5, dtype=np.int8)}
    found = dataclasses.replace(found, values=codes)
    for add in (
        lambda **k: jdelta.weighted_sum([found, found], [0.5, 0.5], **k),
        lambda **k: jdelta.interpolate(found, found, 0.5, **k),
        lambda **k: jdelta.negate(found, base=found, **k),
    ):
        with pytest.raises(
            ValueError, match=r"layers_0\.bias holds int8 in delta 1, and only floats add up. Pass keep"
        ):
            add()
        assert add(keep=["layers_0"]).values["layers_0.bias"].dtype == np.int8


def test_a_prompt_does_not_start_from_codes():
    model = fresh("bert", "FlaxBertForSequenceClassification")
    words = model.params["bert"]["embeddings"]["word_embeddings"]
    model.params = jax.tree.map(
        lambda leaf: leaf.astype(jnp.int8) if leaf is words["embedding"] else leaf, model.params
    )
    before = model.params
    with pytest.raises(ValueError, match=r"starts from rows of .*word_embeddings, which holds int8.*token_init=False"):
        jdelta.SoftPromptModel(model, soft_token_num=2)
    assert model.params is before


def test_a_layer_is_not_cut_off_to_what_the_model_has():
    class Imaginary(nn.Module):
        @nn.compact
        def __call__(self, y):
            return y * 1j

    delta = jdelta.DeltaModel(of(nn.Dense(5)), name="mine")
    with pytest.raises(TypeError, match="a layer gives complex64 where the model has float32"):
        delta.insert_sequential_module("layers_0", Imaginary())


def test_complex_weights_are_merged_and_their_movement_has_both_parts():
    class Complex(nn.Module):
        @nn.compact
        def __call__(self, x):
            return (x @ self.param("kernel", lambda _: jnp.full((6, 5), 1 + 1j, jnp.complex64))).real

    backbone = of(Complex())
    delta = jdelta.LoraModel(backbone, ["layers_0"], lora_r=2)
    train_deltas(delta)
    own, y = backbone.params["layers_0"]["lora"], backbone(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = float(delta.movement().values[0, 0])
    np.testing.assert_allclose(moved, jnp.linalg.norm(8 * own["a"] @ own["b"]) / np.sqrt(60), rtol=1e-5)
    assert delta.merge()["layers_0"]["kernel"].dtype == jnp.complex64
    np.testing.assert_allclose(backbone(X), y, rtol=1e-5, atol=1e-5)
