"""Models with deltas, and the deltas, pickle: here and in another process they compute the same bits."""

import copy
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, fresh, noisy, train_deltas
from flax import linen as nn
from test_composition import IDS, METHODS, attach, backbone
from tiers import breadth

import jdelta
from jdelta.core.pickling import packed, unpacked

X = np.linspace(-1.0, 1.0, 8, dtype=np.float32).reshape(2, 4)


def again(value, how="pickle"):
    return pickle.loads(pytest.importorskip(how).dumps(value))


def logits(model):
    return np.asarray(model(IDS))


@pytest.mark.parametrize("name", breadth(METHODS, "lora"))
@pytest.mark.parametrize("how", breadth(["pickle", "cloudpickle"], "pickle"))
def test_every_method_attached_and_detached_on_a_linen_module(name, how):
    model = backbone()
    base = logits(model)
    delta = attach(model, [name])[name]
    attached = logits(model)
    loaded_model, loaded = again((model, delta), how)
    assert loaded.backbone_model is loaded_model
    assert np.array_equal(logits(loaded_model), attached)
    alone = again(delta, how)
    assert np.array_equal(logits(alone.backbone_model), attached)
    module = again(model.module, how)
    assert np.array_equal(module.apply({"params": model.params}, IDS), attached)
    for one in (loaded, alone):
        one.detach()
        assert np.array_equal(logits(one.backbone_model), base)
        detached = again(one, how)
        assert not detached.attached
        assert np.array_equal(logits(detached.backbone_model), base)
        detached.attach()
        assert np.array_equal(logits(detached.backbone_model), attached)
    assert repr(loaded.structure["block.dense"]) == repr(delta.structure["block.dense"])
    assert again(delta.config) == delta.config
    assert delta.attached


def test_all_at_once_with_what_was_put_in_and_computes_otherwise():
    model = backbone()
    deltas = attach(model, ["lora", "bitfit", "prefix"])
    extra = jdelta.DeltaModel(model, name="extra")
    extra.insert_sequential_module("block.dense", nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(8)]))
    fused = jdelta.fused_attention(model)
    before = logits(model)
    loaded, undo, one = again((model, fused, deltas["prefix"]))
    assert np.array_equal(logits(loaded), before)
    undo.undo(), fused.undo()
    assert np.array_equal(logits(loaded), logits(model))
    one.detach(), deltas["prefix"].detach()
    assert np.array_equal(logits(loaded), logits(model))
    assert set(jdelta.prune(loaded.params, "bitfit")["block"]["dense"]) == {"kernel", "lora", "extra"}


def test_merged_and_back():
    model = backbone()
    delta = attach(model, ["lora"])["lora"]
    attached = logits(model)
    delta.merge()
    merged = logits(model)
    loaded = again(delta)
    assert loaded.merged
    assert np.array_equal(logits(loaded.backbone_model), merged)
    loaded.unmerge()
    assert np.array_equal(logits(loaded.backbone_model), attached)


def test_what_trains_and_what_is_known_of_a_delta_comes_with_it(tmp_path):
    model = backbone()
    delta = jdelta.LoraModel(model, modified_modules=["block.dense"], lora_r=2, unfrozen_modules=["head"])
    with pytest.raises(ValueError, match="has moved"):
        again(delta).save_finetuned(tmp_path)
    delta.freeze_module(exclude=["deltas", "embed"])
    train_deltas(delta)
    loaded = again(delta)
    assert loaded.trainable_mask() == delta.trainable_mask()
    saved, expected = loaded.finetuned(), delta.finetuned()
    assert saved.values.keys() == expected.values.keys()
    assert all(np.array_equal(saved.values[name], expected.values[name]) for name in saved.values)
    loaded.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        again(loaded).attach()


class Scale(nn.Module):
    @nn.compact
    def __call__(self, y):
        return y * self.param("scale", nn.initializers.ones, (y.shape[-1],))


class PickledScaleConfig(jdelta.Method):
    delta_type = "pickled_scale"

    def edits(self, host, structure):
        yield jdelta.CallEdit(host.path, "after", Scale())


class PickledScaleModel(jdelta.DeltaModel):
    method_class = PickledScaleConfig


def test_a_method_of_the_users_own():
    model = backbone()
    delta = PickledScaleModel(model, modified_modules=["block.dense"])
    train_deltas(delta)
    loaded = again(delta)
    assert type(loaded) is PickledScaleModel
    assert loaded.config == delta.config
    assert np.array_equal(logits(loaded.backbone_model), logits(model))


def test_a_backbone_of_flax_layers_whose_initialisers_do_not_pickle():
    dense = nn.Dense(4)
    net = nn.Sequential([dense, nn.relu, dense, nn.Dense(3, kernel_init=nn.initializers.zeros)])
    model = jdelta.Backbone(net, noisy(net.init(jax.random.key(0), X)["params"]), dummy_inputs=(X,))
    bare = again(model)
    assert np.array_equal(bare(X), model(X))
    assert set(bare.params) == {"layers_0", "layers_3"}  # one layer runs twice
    delta = jdelta.LoraModel(model, modified_modules=["layers_3"], lora_r=2)
    train_deltas(delta)
    loaded = again(model)
    assert np.array_equal(loaded(X), model(X))
    assert loaded.module.layers[0] is loaded.module.layers[2]


def test_modules_keep_what_differs_from_defaults():
    module = nn.Dense(4, dtype=jnp.bfloat16, name="mine")
    module.note = {"by": ["hand"]}
    loaded = unpacked(again(packed({"a": [module, 1], "b": (module,)})))
    assert loaded["a"][0] is loaded["b"][0]
    copied = loaded["a"][0]
    assert (copied.features, copied.dtype, copied.name, copied.note) == (4, jnp.bfloat16, "mine", {"by": ["hand"]})
    assert copied.kernel_init is nn.Dense.kernel_init
    assert copied == module
    assert copied.clone() == module


def test_a_clone_with_other_fields_keeps_them_whatever_is_attached_later():
    class Net(nn.Module):
        factor: float = 1.0

        @nn.compact
        def __call__(self, x):
            return self.factor * nn.Dense(3, name="one")(x)

    model = jdelta.Backbone(Net(), noisy(Net().init(jax.random.key(0), X)["params"]), dummy_inputs=(X,))
    delta = jdelta.LoraModel(model, modified_modules=["one"], lora_r=2)
    base = model(X)
    model.module = model.module.clone(factor=2.0)
    assert np.array_equal(model(X), 2 * base)
    jdelta.LoraModel(model, modified_modules=["one"], lora_r=2, name="another")
    assert np.array_equal(model(X), 2 * base)
    delta.detach()
    assert model.module.factor == 2


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_are_as_before(copied):
    model = backbone()
    delta = attach(model, ["lora"])["lora"]
    other = copied(model)
    assert type(copied(model.module)) is type(model.module)
    assert np.array_equal(logits(other), logits(model))
    delta.detach()
    assert jdelta.hosts.linen.instrument.attachments_of(other.module)[0].active


FAMILIES = {
    "FlaxBertForSequenceClassification": ("bert", {"lora": jdelta.LoraModel, "prefix": jdelta.PrefixModel}),
    "FlaxGPT2LMHeadModel": ("gpt2", {"prompt": jdelta.SoftPromptModel, "adapter": jdelta.AdapterModel}),
    "FlaxT5ForConditionalGeneration": ("t5", {"lora": jdelta.LoraModel, "prompt": jdelta.SoftPromptModel}),
}


def of_transformers(cls):
    family, methods = FAMILIES[cls]
    model = build(family, cls)
    options = {"lora": {"lora_r": 2}, "prefix": {"embed_dim": 2, "mid_dim": 2}, "prompt": {"soft_token_num": 2}}
    deltas = [method(model, name=f"the_{name}", **options.get(name, {})) for name, method in methods.items()]
    for delta in deltas:
        train_deltas(delta)
    return model, deltas


def inputs(model):
    ids = jnp.asarray([[5, 6, 7, 8]])
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


@pytest.mark.slow
@pytest.mark.parametrize("cls", FAMILIES)
def test_models_of_transformers(cls):
    model, deltas = of_transformers(cls)
    expected = model(**inputs(model)).logits
    loaded, (first, _) = again((model, deltas))
    assert np.array_equal(loaded(**inputs(model)).logits, expected)
    assert type(loaded).__name__ == cls
    first.detach(), deltas[0].detach()
    assert np.array_equal(loaded(**inputs(model)).logits, model(**inputs(model)).logits)
    assert isinstance(loaded, type(fresh(FAMILIES[cls][0], cls)))
    if isinstance(deltas[0], jdelta.LoraModel):
        deltas[0].attach()
        deltas[0].merge()
        merged = again(model)
        assert np.array_equal(merged(**inputs(model)).logits, model(**inputs(model)).logits)
        loaded = merged
    if cls == "FlaxBertForSequenceClassification":
        for one in (model, loaded):
            one.enable_gradient_checkpointing()
        assert np.array_equal(loaded(**inputs(model)).logits, model(**inputs(model)).logits)


@pytest.mark.slow
def test_generation_goes_on_after_loading():
    model, _ = of_transformers("FlaxGPT2LMHeadModel")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = jnp.asarray([[5, 6, 7, 8]])
    assert np.array_equal(model.generate(ids, **options).sequences, again(model).generate(ids, **options).sequences)


SEEN = """
import pickle, sys
import numpy as np
with open(sys.argv[1], "rb") as file:
    cases = pickle.load(file)
for name, model, delta, inputs, expected in cases:
    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    assert np.array_equal(getattr(found, "logits", found), expected), name
    delta.detach()
    delta.attach()
    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    assert np.array_equal(getattr(found, "logits", found), expected), name
"""


def in_another_process(tmp_path, cases):
    (tmp_path / "cases.pkl").write_bytes(pickle.dumps(cases))
    command = [sys.executable, "-c", SEEN, str(tmp_path / "cases.pkl")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]


def test_in_another_process(tmp_path):
    net = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8)])
    cases = []
    for name, options in {"Lora": {"lora_r": 2}, "Adapter": {}, "BitFit": {}}.items():
        model = jdelta.Backbone(net, noisy(net.init(jax.random.key(0), X)["params"]), dummy_inputs=(X,))
        delta = getattr(jdelta, f"{name}Model")(model, modified_modules=["layers_2"], **options)
        train_deltas(delta)
        cases.append((name, model, delta, {}, None))
    cases = [(*case[:3], X, np.asarray(case[1](X))) for case in cases]
    in_another_process(tmp_path, cases)


@pytest.mark.slow
def test_models_of_transformers_in_another_process(tmp_path):
    cases = []
    for cls in FAMILIES:
        model, deltas = of_transformers(cls)
        if cls == "FlaxBertForSequenceClassification":  # what replaces names for a call does so there too
            jdelta.fused_attention(model)
            jdelta.lean_activations(model)
        cases.append((cls, model, deltas[0], inputs(model), np.asarray(model(**inputs(model)).logits)))
    in_another_process(tmp_path, cases)
