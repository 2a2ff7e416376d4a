"""`save_pretrained` of transformers writes a delta's leaves where its `from_pretrained` drops them: it says so."""

import warnings

import jax
import numpy as np
import pytest
from conftest import fresh, train_deltas

import jdelta

BERT = "FlaxBertForSequenceClassification"


def lora(model, **options):
    delta = jdelta.LoraModel(model, modified_modules=["query"], lora_r=2, **options)
    train_deltas(delta)
    return delta


def test_it_names_the_delta_and_the_ways_out(tmp_path):
    model = fresh("bert", BERT)
    delta = lora(model)
    with pytest.warns(UserWarning, match=r"'lora'.*save_finetuned.*from_finetuned.*merge"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "flax_model.msgpack").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, params=jdelta.prune(model.params, delta))


@pytest.mark.slow
def test_a_bare_or_merged_model_or_biases_in_their_place_are_saved_in_silence(tmp_path, ids):
    model = fresh("bert", BERT)
    delta, biases = lora(model), jdelta.BitFitModel(model, modified_modules=["key"])
    train_deltas(biases)
    delta.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        fresh("bert", BERT).save_pretrained(tmp_path / "bare")
        loaded = type(fresh("bert", BERT)).from_pretrained(tmp_path)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, dict(loaded.params), dict(model.params))))
    delta.remove()
    biases.remove()
    assert type(model) is type(fresh("bert", BERT))


def test_a_model_with_deltas_is_of_its_class_in_name_documentation_and_instances():
    model, bare = fresh("bert", BERT), fresh("bert", BERT)
    delta = lora(model)
    assert isinstance(model, type(bare))
    assert type(model).__name__ == BERT
    assert type(model).__doc__ == type(bare).__doc__
    assert type(model).save_pretrained.__doc__ == type(bare).save_pretrained.__doc__
    delta.remove()
    assert type(model) is type(bare)
