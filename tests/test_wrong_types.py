"""Every public verb, each of its arguments replaced by what it is not: an error of a documented kind, raised by jdelta.

What is checked is not which message it is, but that it comes from a check, and not from deep inside, as
`'NoneType' object is not iterable` does.
"""

import inspect
import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import noisy
from flax import linen as nn
from jax.sharding import PartitionSpec
from tiers import breadth

import jdelta
from jdelta.saved.finetuned import Finetuned


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="out")(nn.relu(nn.Dense(6, name="up")(x)))


class Nothing:
    """An object of no type that anything takes."""

    def __repr__(self):
        return "<nothing>"


X = jnp.ones((2, 4))
DOCUMENTED = (TypeError, ValueError, OSError, RuntimeError, IndexError, ModuleNotFoundError)
NEVER_JDELTA = {  # what is said better by those who say it: there is no such file
    FileNotFoundError,
    IsADirectoryError,
}


@pytest.fixture(scope="module")
def params():
    return Net().init(jax.random.key(0), X)


def attached(params, **kwargs):
    model = jdelta.Backbone(Net(), params, (X,))
    delta = jdelta.LoraModel(model, ["up"], lora_r=2, **kwargs)
    model.params = noisy(model.params)
    return model, delta


def verbs(params, folder):
    """Name to function and right arguments."""
    model, delta = attached(params)
    by_hand = jdelta.DeltaModel(model, name="by_hand")
    found = delta.finetuned()
    delta.save_finetuned(folder / "saved")
    trainable, frozen = delta.partition()
    specs = jax.tree.map(lambda _: PartitionSpec(), model.params)
    config = jdelta.LoraConfig(modified_modules=("up",), lora_r=2)
    picture = delta.visualization()
    read, write = str(folder / "none.json"), str(folder / "out")
    stacked = jdelta.stack([trainable, trainable])
    tree = {"params": None}
    yield "match", jdelta.match, {"names": ["a"], "patterns": ["a"], "exclude": []}
    yield "interpolate", jdelta.interpolate, {"a": found, "b": found, "t": 0.5}
    yield "negate", jdelta.negate, {"delta": found}
    sums = {"deltas": [found], "weights": [1.0], "combination": "linear", "rank": None, "density": None, "name": None}
    yield "weighted_sum", jdelta.weighted_sum, sums
    yield "graft", jdelta.graft, {"params": params, "delta_params": delta.init(0)}
    yield "partition", jdelta.partition, {"params": model.params, "mask": delta.trainable_mask()}
    yield "combine", lambda one, other: jdelta.combine(one, other), {"one": trainable, "other": frozen}
    yield "prune", lambda params, delta: jdelta.prune(params, delta), {"params": model.params, "delta": delta}
    peft = {"source": folder, "backbone_model": model, "name": None, "revision": None, "keep_dtype": False}
    yield "from_peft", jdelta.from_peft, peft
    yield "stack", jdelta.stack, {"deltas": [found, found], "check_hash": False}
    yield "unstack", jdelta.unstack, {"stacked": stacked}
    yield "select", jdelta.select, {"stacked": stacked, "indices": [0, 1]}
    yield "rowwise", jdelta.rowwise, {"call": model, "frozen": frozen}
    rules = {"rules": [("kernel", PartitionSpec())], "tree": params, "default": PartitionSpec()}
    yield "match_partition_rules", jdelta.match_partition_rules, rules
    yield "state_shardings", lambda s: jdelta.state_shardings(params, s), {"s": specs}
    yield "register_common_names", jdelta.register_common_names, {"block": "Block_", "names": {"attn.q": "q"}}
    yield "register_linear", jdelta.register_linear, {"module_type": 0, "weights": "kernel", "equation": None}
    yield "fused_attention", jdelta.fused_attention, {"model": model, "implementation": None}
    yield "lean_activations", jdelta.lean_activations, {"model": model}
    yield "select_modules", lambda m: jdelta.select_modules(model, m, port="x"), {"m": jdelta.LoraModel}
    backbone = {"module": Net(), "params": params, "dummy_inputs": (X,), "dummy_kwargs": {}, "rngs": None}
    yield "Backbone", jdelta.Backbone, backbone
    yield "Visualization", jdelta.Visualization, {"backbone_model": model, "mask": None}
    auto = {"config": config, "backbone_model": model, "name": None, "rng": 0}
    yield "AutoDeltaModel.from_config", jdelta.AutoDeltaModel.from_config, auto
    yield "LoraModel.from_config", jdelta.LoraModel.from_config, auto
    saved = {"source": folder / "saved", "backbone_model": model, "name": None, "check_hash": False, "revision": None}
    yield "AutoDeltaModel.from_finetuned", jdelta.AutoDeltaModel.from_finetuned, saved
    yield "AutoDeltaConfig.from_dict", jdelta.AutoDeltaConfig.from_dict, {"values": {"delta_type": "lora"}}
    yield "AutoDeltaConfig.from_json_string", jdelta.AutoDeltaConfig.from_json_string, {"text": "{}"}
    yield "AutoDeltaConfig.from_json_file", jdelta.AutoDeltaConfig.from_json_file, {"path": read}
    yield "LoraConfig.from_dict", jdelta.LoraConfig.from_dict, {"values": {}}
    yield "LoraConfig.from_json_file", jdelta.LoraConfig.from_json_file, {"path": read}
    yield "LoraConfig.to_json_file", config.to_json_file, {"path": write}
    yield "Finetuned.read", Finetuned.read, {"path": folder / "saved"}
    yield "Finetuned.save", found.save, {"path": write}
    yield "Finetuned.renamed", found.renamed, {"name": "other"}
    layer = {"name": "up", "layer": nn.Dense(6)}
    yield "insert_sequential_module", by_hand.insert_sequential_module, {**layer, "where": "after"}
    yield "insert_parallel_module", by_hand.insert_parallel_module, {**layer, "start": None}
    yield "replace_module", by_hand.replace_module, layer
    yield "freeze_module", delta.freeze_module, {"exclude": ["deltas"]}
    yield "init", delta.init, {"rng": 0, "params": None}
    yield "partition_specs", delta.partition_specs, {"specs": specs, "mesh": None}
    yield "own", delta.own, {"tree": model.params}
    yield "delta.combine", lambda one, other: delta.combine(one, other), {"one": trainable, "other": frozen}
    yield "optimizer", delta.optimizer, {"tx": optax.sgd(0.1)}
    for verb in (delta.trainable_mask, delta.partition, delta.log, delta.movement, delta.finetuned):
        yield verb.__name__, verb, tree
    yield "merge", delta.merge, {"params": model.params}
    yield "plot", delta.plot, {"params": None, "path": None}
    written = {"path": write, "params": None, "allow_untrained": False}
    yield "save_finetuned", delta.save_finetuned, written
    yield "to_peft", delta.to_peft, written
    yield "push_to_hub", delta.push_to_hub, {"repo_id": "", "params": model.params}
    yield "load_finetuned", delta.load_finetuned, {"source": found, "params": None, "check_hash": False}
    yield "to_html", picture.to_html, {"path": None, "params": None, "mask": None}
    yield "to_svg", picture.to_svg, {"path": None, "params": None, "mask": None}
    yield "to_png", picture.to_png, {"path": f"{write}.png", "params": None, "mask": None}
    methods = [method for method in vars(jdelta).values() if inspect.isclass(method) and hasattr(method, "delta_type")]
    for method in methods:
        signature = inspect.signature(method).parameters.values()
        arguments = {p.name: p.default for p in signature if p.kind is not p.VAR_KEYWORD}
        if issubclass(method, jdelta.DeltaModel):
            arguments |= {"backbone_model": model, "modified_modules": ["up"]}
            del arguments["interactive_modify"]
        yield method.__name__, method, arguments


WRONG = [3, Nothing()]
MORE = [
    "x",
    [1],
    {},
    True,
    -1,
    2.5,
    float("nan"),
    10**30,
    "",
    b"x",
    [],
    [None],
    {"x": 1},
    (1, 2),
    Nothing,
    len,
    np.ones(3),
    X,
    Net(),
]


def raw(error):
    """Where an error comes from that no check of jdelta raised, else `""`."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    checked = "/jdelta/" in last.filename and (last.line or "").startswith("raise")
    if isinstance(error, DOCUMENTED) and (checked or type(error) in NEVER_JDELTA):
        return ""
    return f"{type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})"


@pytest.mark.parametrize("wrong", breadth([WRONG, [*WRONG, *MORE]], WRONG), ids=["some", "more"])
def test_a_wrong_type_is_an_error_of_a_documented_kind(params, tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")
    odd, raised = [], 0
    for name, verb, arguments in verbs(params, tmp_path):
        models = [value for value in arguments.values() if isinstance(value, jdelta.Backbone)]
        before = [(model, model.module, model.params) for model in models]
        for key in arguments:
            for value in wrong:
                if key == "mask" and callable(value):  # functions of the user's may raise what they like
                    continue
                try:
                    verb(**{**arguments, key: value})
                except Exception as error:
                    raised += 1
                    if where := raw(error):
                        odd.append(f"{name}({key}={value!r}): {where}")
                for model, module, held in before:
                    model.module, model.params = module, held
    assert not odd, "\n".join(odd)
    assert raised > 10 * len(wrong)


WIDTHS = {"wider": nn.Dense(7), "a convolution": nn.Conv(3, (3,))}


@pytest.mark.parametrize("layer", WIDTHS)
@pytest.mark.parametrize("verb", ["replace_module", "insert_sequential_module"])
def test_a_layer_of_another_width_names_the_leaf_that_it_would_change(params, verb, layer):
    model = jdelta.Backbone(Net(), params, (X,))
    delta = jdelta.DeltaModel(model)
    module, before = model.module, model.params
    with pytest.raises(ValueError, match=r"out\.kernel would have shape \(\d, 4\), and it has \(6, 4\)"):
        getattr(delta, verb)("up", WIDTHS[layer])
    assert model.module is module
    assert model.params is before


class Text(nn.Module):
    def __call__(self, x):
        return "text"


def test_a_layer_with_which_the_model_does_not_run_is_an_error(params):
    model = jdelta.Backbone(Net(), params, (X,))
    delta = jdelta.DeltaModel(model)
    with pytest.raises(ValueError, match="the model does not run with these layers"):
        delta.insert_sequential_module("up", Text())
    assert model.params is params


def test_a_delta_where_a_folder_belongs_says_what_to_call(params):
    _, delta = attached(params)
    with pytest.raises(TypeError, match=r"got an attached LoraModel: call its finetuned\(\)"):
        delta.load_finetuned(delta)
    with pytest.raises(TypeError, match=r"call its finetuned\(\)"):
        jdelta.AutoDeltaModel.from_finetuned(delta, jdelta.Backbone(Net(), params, (X,)))


def test_what_is_no_json_says_so():
    with pytest.raises(ValueError, match=r"from_json_string: '\{' is no JSON"):
        jdelta.AutoDeltaConfig.from_json_string("{")
    with pytest.raises(TypeError, match="from_json_string takes a string, got None"):
        jdelta.AutoDeltaConfig.from_json_string(None)
    with pytest.raises(TypeError, match="optimizer takes one of optax's"):
        jdelta.LoraModel(jdelta.Backbone(Net(), None, (X,)), ["up"], lora_r=2).optimizer("adam")
