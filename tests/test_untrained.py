"""Verbs that read values notice when nothing of a delta has moved since it was initialised."""

import warnings

import jax
import nnx_models
import numpy as np
import pytest
from conftest import fresh, noisy, train_deltas
from flax import nnx

import jdelta
from jdelta.trees import surgery

METHODS = {
    "LoraModel": {"lora_r": 2},
    "AdapterModel": {"bottleneck_dim": 2},
    "BitFitModel": {"modified_modules": ["query"]},
    "PrefixModel": {"prefix_token_num": 2, "embed_dim": 2, "mid_dim": 2},
    "SoftPromptModel": {"soft_token_num": 2},
}


@pytest.fixture
def delta(bert):
    return jdelta.LoraModel(bert, lora_r=2, modified_modules=["query"])


def moved(params, leaf):
    """The tree with one leaf in another last bit."""
    flat = dict(surgery.flatten(params))
    path = next(path for path in flat if surgery.name_of(path).endswith(leaf))
    flat[path] = flat[path].at[(0,) * flat[path].ndim].add(1e-6)
    return surgery.unflatten(flat)


@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_delta_is_not_saved_in_silence(bert, method, tmp_path):
    delta = getattr(jdelta, method)(bert, **METHODS[method])
    for save in (delta.save_finetuned, delta.to_peft, delta.push_to_hub):
        with pytest.raises(ValueError, match=rf"nothing of delta '{delta.name}' has moved.*pass params=….*allow_untr"):
            save(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match=rf"finetuned: nothing of delta '{delta.name}' has moved"):
        delta.finetuned()
    delta.save_finetuned(tmp_path / "out", allow_untrained=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_deltas(delta)
        delta.finetuned()
        delta.save_finetuned(tmp_path / "out")


def test_a_tree_of_ones_own_is_what_counts(delta, tmp_path):
    params = delta.backbone_model.params
    with pytest.raises(ValueError, match="the tree that was passed holds the values from before"):
        delta.save_finetuned(tmp_path / "out", params=params)
    delta.save_finetuned(tmp_path / "out", params=moved(params, "query.lora.b"))
    with pytest.warns(UserWarning, match="merge: nothing of delta 'lora' has moved"):
        delta.merge(params)


def test_an_nnx_module_holds_its_own_values(tmp_path):
    model = nnx_models.Tied(nnx.Rngs(0))
    delta = jdelta.LoraModel(model, modified_modules=["block"], lora_r=2, dummy_inputs=(nnx_models.IDS,))
    with pytest.raises(ValueError, match="the model itself holds the values from before"):
        delta.save_finetuned(tmp_path / "out")
    with pytest.raises(ValueError, match="the tree that was passed holds the values from before"):
        delta.save_finetuned(tmp_path / "out", nnx.state(model))
    nnx_models.train_deltas(model)
    delta.save_finetuned(tmp_path / "out")


def test_merging_a_trained_delta_or_under_jit_does_not_warn(delta):
    params = delta.backbone_model.params
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta.merge(moved(params, "query.lora.b"))
        jax.eval_shape(delta.merge, params)


def test_one_leaf_that_moved_is_enough(delta):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta.finetuned(moved(delta.backbone_model.params, "lora.a"))


def test_it_is_noticed_after_donation_and_after_the_delta_was_off(delta, tmp_path):
    trainable, frozen = delta.partition()
    trainable = jax.jit(lambda tree: jax.tree.map(lambda a: a + 0, tree), donate_argnums=0)(trainable)
    delta.backbone_model.params = jdelta.combine(trainable, frozen)
    delta.detach()
    delta.attach()
    with pytest.raises(ValueError, match="has moved"):
        delta.save_finetuned(tmp_path / "out")


def test_values_that_were_loaded_count_as_trained(delta, tmp_path):
    delta.save_finetuned(tmp_path / "out", allow_untrained=True)
    loaded = jdelta.AutoDeltaModel.from_finetuned(
        tmp_path / "out", fresh("bert", "FlaxBertForSequenceClassification"), check_hash=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.finetuned()
        loaded.save_finetuned(tmp_path / "again")


def test_a_prefix_is_as_untrained_after_fold_as_before(bert, tmp_path):
    delta = jdelta.PrefixModel(bert, prefix_token_num=2, embed_dim=2, mid_dim=2)
    delta.materialise()
    with pytest.raises(ValueError, match="has moved"):
        delta.save_finetuned(tmp_path / "out")
    bert.params = noisy(bert.params)
    delta.save_finetuned(tmp_path / "out")


def test_what_does_not_train_is_not_asked_to_move(delta, tmp_path):
    delta.freeze_module(exclude=["classifier"])
    delta.save_finetuned(tmp_path / "out")
    assert np.isfinite(jdelta.Finetuned.read(tmp_path / "out").values["classifier.bias"]).all()
