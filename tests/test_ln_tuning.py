"""LN tuning: which leaves train, on which models, and what goes to PEFT and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh, noisy
from flax import linen as nn
from flax import nnx
from safetensors.numpy import load_file, save_file

import jdelta
from jdelta.trees import surgery

IDS = jnp.array([[5, 6, 7, 8, 9]])


def bert():
    return fresh("bert", "FlaxBertForSequenceClassification")


def trained(delta):
    return set(surgery.flatten(delta.partition()[0]))


@pytest.mark.parametrize(
    ("family", "cls", "part", "number"),
    [
        ("bert", "FlaxBertForSequenceClassification", "LayerNorm", 10),
        ("gpt2", "FlaxGPT2LMHeadModel", "ln_", 10),
        ("llama", "FlaxLlamaForCausalLM", "norm", 5),
    ],
)
def test_by_default_all_norms_train_and_nothing_else(family, cls, part, number):
    model = fresh(family, cls)
    before, bare = model.params, model(IDS).logits
    delta = jdelta.LNTuningModel(model)
    wanted = {path for path in surgery.flatten(before) if part in path[-2]}
    assert trained(delta) == wanted
    assert len(wanted) == number
    trains, frozen = delta.partition()
    model.params = jdelta.combine(noisy(trains), frozen)
    assert jnp.abs(model(IDS).logits - bare).max() > 1e-4
    delta.remove()
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, before))


def test_the_norms_inside_a_module_train():
    delta = jdelta.LNTuningModel(bert(), ["layer.1.attention"])
    assert {path[-4:] for path in trained(delta)} == {
        ("attention", "output", "LayerNorm", leaf) for leaf in ("scale", "bias")
    }


def test_a_model_of_no_known_family():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 4, rngs=rngs)
            self.norm = nnx.RMSNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    delta = jdelta.LNTuningModel(Net(nnx.Rngs(0)), dummy_inputs=(jnp.ones((1, 4)),))
    assert trained(delta) == {("norm", "scale")}


def test_a_module_without_a_norm_is_an_error():
    model = bert()
    with pytest.raises(ValueError, match=r"LNTuningModel: none of the modules that .*query.* mean gets a change"):
        jdelta.LNTuningModel(model, ["query"])
    module = nn.Sequential([nn.Dense(3)])
    x = jnp.ones((1, 2))
    backbone = jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    with pytest.raises(ValueError, match="LNTuningModel: none of the modules"):
        jdelta.LNTuningModel(backbone)


def test_with_a_head_it_goes_to_peft_and_back(tmp_path):
    model = bert()
    delta = jdelta.LNTuningModel(model, exclude_modules=["embeddings"], unfrozen_modules=["classifier"])
    trains, frozen = delta.partition()
    params = model.params = jdelta.combine(noisy(trains), frozen)
    delta.to_peft(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {key.rpartition("output.")[2] for key in keys if "LayerNorm" in key} == {
        "LayerNorm.ln_tuning_layers.weight",
        "LayerNorm.ln_tuning_layers.bias",
    }
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["modules_to_save"] == ["classifier"]
    other = bert()
    again = jdelta.from_peft(tmp_path, other)
    assert again.targets == delta.targets
    assert trained(again) == trained(delta)
    assert jax.tree.all(jax.tree.map(np.array_equal, other.params, params))


def test_a_file_with_other_modules_is_refused(tmp_path):
    jdelta.LNTuningModel(bert()).to_peft(tmp_path, allow_untrained=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    file, model = tmp_path / "adapter_model.safetensors", bert()
    named = {key.replace("_layers.", "_layers.default."): tensor for key, tensor in tensors.items()}
    save_file(named, file)
    assert trained(jdelta.from_peft(tmp_path, bert())) == trained(jdelta.LNTuningModel(bert()))
    save_file({"base_model.model.classifier.ln_tuning_layers.bias": np.zeros(2, np.float32)}, file)
    with pytest.raises(ValueError, match="LN_TUNING at 'classifier': that is no norm"):
        jdelta.from_peft(tmp_path, model)
    save_file({"base_model.model.classifier.bias": np.zeros(2, np.float32)}, file)
    with pytest.raises(ValueError, match="holds no ln_tuning_layers"):
        jdelta.from_peft(tmp_path, model)
