"""Deltas of any method as LoRA: the best approximation of their change, wherever it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy
from flax import linen as nn
from flax import nnx
from nnx_networks import X, network
from test_weight_methods import stack
from weight_methods import rows

import jdelta


@rows("lora", "hra", "dora")
def test_at_full_rank_it_computes_the_same_in_layers_of_a_scan(row):
    x, backbone, delta = stack(row)
    out = backbone(x)
    if any(edit.is_bias for edit in delta._state.attachment.weight_edits):  # the biases are 0, and so is their change
        biased = jax.tree.map(lambda leaf: leaf + 0.1, backbone.params)
        with pytest.raises(ValueError, match=r"does more than change matrices, at .*bias"):
            jdelta.convert_to_lora(delta, rank=6, params=biased)
    converted = jdelta.convert_to_lora(delta, rank=6)
    assert converted.error < 1e-6
    delta.remove()
    jdelta.AutoDeltaModel.from_finetuned(converted.delta, backbone)
    np.testing.assert_allclose(backbone(x), out, rtol=1e-4, atol=1e-5)


def hira(r=4):
    model = network()
    delta = jdelta.HiraModel(model, ["dense", "plain"], r=r, unfrozen_modules=["heads"], dummy_inputs=(X,))
    trains, frozen = delta.partition(nnx.state(model))
    nnx.update(model, delta.combine(noisy(trains), frozen))
    return model, delta


def test_a_rank_is_the_best_of_its_kind_and_the_error_says_what_is_left_out(tmp_path):
    model, delta = hira()
    converted = jdelta.convert_to_lora(delta, rank=2)
    for name, error in converted.errors.items():
        layer, kind = name.split(".")[1:]
        dense = getattr(model.layers[int(layer)], kind)
        change = np.asarray(dense.kernel[...] * (dense.hira.a[...] @ dense.hira.b[...]), np.float64)
        u, s, v = np.linalg.svd(change)
        best = (u[:, :2] * s[:2]) @ v[:2]
        found = converted.delta.values[f"{name}.lora.a"] @ converted.delta.values[f"{name}.lora.b"]
        np.testing.assert_allclose(found, best, atol=1e-6)
        np.testing.assert_allclose(error, np.linalg.norm(change - best) / np.linalg.norm(change), rtol=1e-5)
    assert converted.error == max(converted.errors.values())
    assert len(converted.errors) == 4
    assert {key for key in converted.delta.values if key.startswith("heads")}  # what else trained
    converted.delta.save(tmp_path / "lora")
    other = network()
    again = jdelta.AutoDeltaModel.from_finetuned(tmp_path / "lora", other, dummy_inputs=(X,))
    assert isinstance(again, jdelta.LoraModel)
    assert again.config.lora_r == 2


def test_a_share_of_the_variance_gives_each_module_its_rank():
    _, delta = hira()
    converted = jdelta.convert_to_lora(delta, rank=0.9)
    ranks = {name: converted.delta.values[f"{name}.lora.a"].shape[1] for name in converted.errors}
    assert all(error**2 <= 0.1 for error in converted.errors.values())
    for name, rank in ranks.items():
        less = jdelta.convert_to_lora(delta, rank=rank - 1) if rank > 1 else None
        assert less is None or less.errors[name] ** 2 > 0.1
        assert converted.delta.config.rank_of(name) == rank
        assert converted.delta.config.scale_of(name) == 1


def test_experts_by_the_name_of_their_parameter():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.einsum("bed,edf->bef", x, self.param("wi", nn.initializers.normal(), (2, 5, 4)))

    x = np.random.default_rng(0).standard_normal((3, 2, 5)).astype(np.float32)
    backbone = jdelta.Backbone(Experts(), Experts().init(jax.random.key(0), x)["params"], (x,))
    delta = jdelta.LoraModel(backbone, modified_parameters=["wi"], lora_r=3, init_lora_weights=False)
    out = backbone(x)
    converted = jdelta.convert_to_lora(delta, rank=3)
    delta.remove()
    jdelta.AutoDeltaModel.from_finetuned(converted.delta, backbone)
    np.testing.assert_allclose(backbone(x), out, rtol=1e-5, atol=1e-6)


def test_what_is_no_change_of_a_matrix_is_refused(bert):
    with pytest.raises(ValueError, match=r"AdapterModel.*does more than change matrices, at .*output"):
        jdelta.convert_to_lora(jdelta.AdapterModel(bert, name="a"))
    with pytest.raises(TypeError, match="takes an attached delta, got 'folder'"):
        jdelta.convert_to_lora("folder")
    _, delta = hira()
    for rank, error in ((0, ValueError), (1.5, ValueError), ("8", TypeError)):
        with pytest.raises(error, match="rank"):
            jdelta.convert_to_lora(delta, rank=rank)
    delta.detach()
    with pytest.raises(RuntimeError, match="detached"):
        jdelta.convert_to_lora(delta)
