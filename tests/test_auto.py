"""Configurations: types, JSON and back, and the delta that each one means."""

import dataclasses
import inspect
import json
from typing import Any, Literal

import chex
import jax
import pytest
import weight_methods
from conftest import build, fresh
from flax import linen as nn
from tiers import breadth

import jdelta
import jdelta.methods.compacter
import jdelta.methods.low_rank_adapter
from jdelta.auto import AutoDeltaConfig, AutoDeltaModel
from jdelta.core.config import METHODS
from jdelta.delta import MODELS

OWN = [name for name, method in METHODS.items() if method.__module__.startswith("jdelta.methods.")]

# Of each method, arguments that are not the defaults.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adapter": {"bottleneck_dim": 3, "non_linearity": "relu", "zero_up": True},
    "bitfit": {},
    "composed": {"methods": [jdelta.LoraConfig(lora_r=4).to_dict(), jdelta.AdapterConfig().to_dict()]},
    "compacter": {"reduction_factor": 4, "hypercomplex_division": 2, "phm_c_init": "uniform", "shared_phm_rule": True},
    "ln_tuning": {},
    "lora": {"lora_r": 4, "lora_alpha": 32, "lora_dropout": 0.1},
    "low_rank_adapter": {"reduction_factor": 4, "low_rank_w_init": "glorot-normal"},
    "parallel_adapter": {"bottleneck_dim": 3, "scaled": 4},
    "prefix": {"prefix_token_num": 3},
    "soft_prompt": {"soft_token_num": 3},
    "trainable_tokens": {"token_indices": [5, 2]},
}
for _row in weight_methods.METHODS.values():
    ARGUMENTS.setdefault(_row.model.method_class.delta_type, dict(_row.arguments))


@pytest.mark.parametrize("delta_type", OWN)
def test_a_configuration_goes_to_json_and_back(delta_type, tmp_path):
    values = {"delta_type": delta_type, "unfrozen_modules": ["classifier"], **ARGUMENTS[delta_type]}
    config = AutoDeltaConfig.from_dict(values)
    assert type(config) is METHODS[delta_type]
    assert config.delta_type == delta_type
    assert config != type(config)()
    for key, value in values.items():
        assert json.loads(config.to_json_string())[key] == value
    config.to_json_file(tmp_path / "config.json")
    for back in (
        AutoDeltaConfig.from_dict(config.to_dict()),
        AutoDeltaConfig.from_json_string(config.to_json_string()),
        AutoDeltaConfig.from_json_file(tmp_path / "config.json"),
        type(config).from_dict(config.to_dict()),
        type(config).from_json_file(str(tmp_path / "config.json")),
    ):
        assert back == config
        assert hash(back) == hash(config)
        assert back.unfrozen_modules == ("classifier",)
    assert type(config).from_dict({}) == type(config)()


@pytest.mark.parametrize("delta_type", OWN)
def test_every_field_of_every_method_refuses_a_wrong_type_by_name(delta_type):
    config_class = METHODS[delta_type]
    for field in dataclasses.fields(config_class):
        wrong: Any = 3 if "str" in field.type or "Literal" in field.type else "3"
        with pytest.raises(TypeError, match=rf"^{field.name} is (a|one of|True)\b.*, got {wrong!r}\."):
            config_class(**{field.name: wrong})
        if field.type in ("int", "float"):
            with pytest.raises(TypeError, match=rf"^{field.name} is a (whole )?number, got True\."):
                config_class(**{field.name: True})
        if field.type == "bool":
            with pytest.raises(TypeError, match=rf"^{field.name} is True or False, got 1\."):
                config_class(**{field.name: 1})


@pytest.mark.parametrize("delta_type", breadth(OWN, "lora", "bitfit"))
def test_the_delta_of_a_configuration_is_that_of_its_arguments(delta_type):
    config = AutoDeltaConfig.from_dict({"delta_type": delta_type, **ARGUMENTS[delta_type]})
    one, two, three = (build("bert", "FlaxBertForSequenceClassification", _do_init=False) for _ in range(3))
    method = MODELS[delta_type]
    delta = AutoDeltaModel.from_config(config, backbone_model=one)
    same = method(two, **ARGUMENTS[delta_type])
    again = method.from_config(config, three)
    assert type(delta) is type(again) is method
    assert delta.config == same.config == again.config == config
    assert delta.targets == same.targets == again.targets
    assert delta.shapes() == same.shapes() == again.shapes()


def test_the_name_and_the_seed_are_given_beside_the_configuration():
    models = [fresh("bert", "FlaxBertForSequenceClassification") for _ in range(2)]
    delta = AutoDeltaModel.from_config(jdelta.LoraConfig(lora_r=2), models[0], name="first", rng=3)
    jdelta.LoraModel(models[1], lora_r=2, name="first", rng=jax.random.key(3))
    assert delta.name == "first"
    chex.assert_trees_all_equal(*(model.params for model in models))


def test_the_common_arguments_are_in_the_configuration():
    values = {
        "delta_type": "lora",
        "modified_modules": ["attn.q"],
        "exclude_modules": ["layer.0"],
        "unfrozen_modules": ["classifier"],
        "common_structure": True,
        "lora_r": 4,
    }
    model = fresh("bert", "FlaxBertForSequenceClassification")
    delta = AutoDeltaModel.from_config(AutoDeltaConfig.from_dict(values), backbone_model=model, name="first")
    assert delta.name == "first"
    assert delta.targets == ["bert.encoder.layer.1.attention.self.query"]
    assert "kernel" in delta.partition()[0]["classifier"]
    assert {key: delta.config.to_dict()[key] for key in values} == values


def test_a_configuration_is_frozen_and_hashable():
    config = jdelta.LoraConfig(lora_r=4, modified_modules=["query"])
    assert {config: 1}[jdelta.LoraConfig(4, modified_modules=("query",))] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lora_r = 8
    assert config != jdelta.AdapterConfig(modified_modules=["query"])


WRONG = {
    "an unknown method": (
        {"delta_type": "lorra"},
        ValueError,
        r"no method has delta_type 'lorra'\. Did you mean 'lora'\? There are: adalora, adapter",
    ),
    "a method that is no word": ({"delta_type": ["lora"]}, ValueError, r"no method has delta_type \['lora'\]"),
    "no method": ({"lora_r": 4}, ValueError, r"has no 'delta_type'\. There are: adalora, adapter"),
    "no dict": ("lora", TypeError, "a configuration is a dict with a 'delta_type', got 'lora'"),
    "an unknown key": (
        {"delta_type": "lora", "lora_rank": 4},
        TypeError,
        r"LoraConfig has no argument 'lora_rank'\. Did you mean 'lora_r'\? Its own are: lora_r, lora_alpha",
    ),
    "an unknown common key": (
        {"delta_type": "bitfit", "modifed_modules": ["query"]},
        TypeError,
        r"BitFitConfig has no argument 'modifed_modules'\. Did you mean 'modified_modules'\? Its own are: none",
    ),
    "a bare string": (
        {"delta_type": "lora", "modified_modules": "query"},
        TypeError,
        r"a list of strings.*\['query'\]",
    ),
    "a pattern that is none": (
        {"delta_type": "lora", "modified_modules": ["query", 3]},
        TypeError,
        r"modified_modules is a list of strings, or None, got \['query', 3\]",
    ),
    "a value beyond its limit": ({"delta_type": "lora", "lora_r": 0}, ValueError, "lora_r is at least 1, got 0"),
    "a word that is none of the choices": (
        {"delta_type": "compacter", "phm_c_init": "zeros"},
        ValueError,
        r"phm_c_init='zeros' is unknown\. There are: normal, uniform",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_in_a_configuration(mistake):
    values, error, message = WRONG[mistake]
    with pytest.raises(error, match=message):
        AutoDeltaConfig.from_dict(values)


def test_the_configuration_of_another_method():
    with pytest.raises(ValueError, match=r"LoraConfig is of delta_type 'lora'; AutoDeltaConfig takes every type"):
        jdelta.LoraConfig.from_dict({"delta_type": "adapter"})
    model = fresh("bert", "FlaxBertForSequenceClassification")
    params = model.params
    with pytest.raises(
        TypeError, match=r"LoraModel\.from_config takes a LoraConfig, got AdapterConfig\(.*AutoDeltaModel"
    ):
        jdelta.LoraModel.from_config(jdelta.AdapterConfig(), model)
    with pytest.raises(TypeError, match=r"takes a configuration such as LoraConfig.*got \{'delta_type': 'lora'\}"):
        AutoDeltaModel.from_config({"delta_type": "lora"}, model)
    assert model.params is params


def test_a_configuration_on_what_is_no_model():
    with pytest.raises(TypeError, match="Backbone"):
        AutoDeltaModel.from_config(jdelta.LoraConfig(), backbone_model={"params": {}})


# --- methods of one's own


class Scale(nn.Module):
    """`init · y`, trained."""

    init: float

    @nn.compact
    def __call__(self, y):
        return y * self.param("scale", nn.initializers.constant(self.init), (y.shape[-1],))


@pytest.fixture
def define():
    """Defines a method of a `delta_type`, as a notebook's cell does each time that it runs."""
    before = dict(METHODS), dict(MODELS)

    def cell(kind, base=jdelta.Method):
        @dataclasses.dataclass(frozen=True)
        class ScaleConfig(base):
            delta_type = kind
            default_modified_modules = ("ff.w2",)

            start: float = 1.0
            sizes: tuple[int, ...] = (1, 2)
            mode: Literal["a", "b"] | None = None
            anything: Any = None

            def edits(self, host, structure):
                yield jdelta.CallEdit(host.path, "after", Scale(self.start))

        return ScaleConfig

    yield cell
    for registry, entries in zip((METHODS, MODELS), before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def model():
    return fresh("bert", "FlaxBertForSequenceClassification")


def test_a_method_of_ones_own_is_found_by_its_delta_type(define, model):
    scale = define("scale")
    config = AutoDeltaConfig.from_dict({"delta_type": "scale", "start": 2, "sizes": [3], "mode": "b"})
    assert config == scale(start=2.0, sizes=(3,), mode="b")
    assert AutoDeltaConfig.from_json_string(config.to_json_string()) == config
    delta = AutoDeltaModel.from_config(config, model)
    assert type(delta) is jdelta.DeltaModel
    assert delta.config is config
    assert all((leaf == 2).all() for leaf in jax.tree.leaves(delta.partition()[0]))


def test_a_method_is_given_to_the_constructor(define, model):
    scale = define("scale")
    delta = jdelta.DeltaModel(model, ["pooler.dense"], method=scale(start=3.0))
    assert delta.targets == ["bert.pooler.dense"]
    assert all((leaf == 3).all() for leaf in jax.tree.leaves(delta.partition()[0]))
    with pytest.raises(TypeError, match=r"start belong to the method: ScaleConfig"):
        jdelta.DeltaModel(model, method=scale(), start=2.0)
    with pytest.raises(TypeError, match="LoraModel: method is an instance of a LoraConfig"):
        jdelta.LoraModel(model, method=scale())


def test_a_constructor_of_ones_own_is_named_after_its_class(define, model):
    class ScaleModel(jdelta.DeltaModel):
        method_class = define("scale")

    delta = AutoDeltaModel.from_config(ScaleModel.method_class(start=2.0), model)
    assert type(delta) is ScaleModel
    assert "start" in inspect.signature(ScaleModel).parameters


def test_a_method_without_edits_is_an_error(model):
    class Nothing(jdelta.Method):
        pass

    with pytest.raises(ValueError, match="Nothing does nothing to modules of itself"):
        jdelta.DeltaModel(model, ["pooler.dense"], method=Nothing())


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"start": "2"}, TypeError, r"start is a number, got '2'"),
        ({"sizes": [1.5]}, TypeError, r"sizes is a list of whole numbers, got \[1\.5\]"),
        ({"mode": "c"}, ValueError, r"mode='c' is unknown\. There are: a, b\."),
        ({"mode": 1}, TypeError, r"mode is one of 'a', 'b', or None, got 1"),
    ],
)
def test_its_fields_are_checked_by_their_annotations(define, wrong, error, message):
    with pytest.raises(error, match=message):
        define("scale")(**wrong)


def test_running_its_cell_again_replaces_it_and_keeps_older_configurations(define, model):
    define("scale")
    old = AutoDeltaConfig.from_dict({"delta_type": "scale", "modified_modules": ["query"]})
    second = define("scale")
    assert METHODS["scale"] is second
    assert AutoDeltaModel.from_config(old, model).config.delta_type == "scale"


def test_a_variant_of_a_method_leaves_the_method_alone(define):
    class LouderConfig(jdelta.LoraConfig):
        delta_type = "louder_lora"

    assert jdelta.LoraConfig.delta_type == "lora"
    assert AutoDeltaConfig.from_dict({"delta_type": "louder_lora", "lora_r": 3}).lora_r == 3
    assert METHODS["lora"] is jdelta.LoraConfig

    class Preset(jdelta.LoraModel):
        default_modified_modules = ("ff.w1",)

    assert METHODS["lora"] is jdelta.LoraConfig
    assert MODELS["lora"] is jdelta.LoraModel
    assert Preset.method_class is jdelta.LoraConfig


@pytest.mark.parametrize("kind", ["lora", "taken"])
def test_two_methods_of_one_delta_type_are_an_error(define, kind):
    if kind == "taken":

        class First(jdelta.Method):
            delta_type = "taken"

    before = METHODS[kind]
    with pytest.raises(ValueError, match=rf"ScaleConfig: delta_type '{kind}' is that of .*{before.__name__} already"):
        define(kind)
    assert METHODS[kind] is before


def test_the_configuration_of_no_method_is_that_of_an_empty_delta(model):
    delta = AutoDeltaModel.from_config(jdelta.Method(unfrozen_modules=["classifier"]), model)
    assert type(delta) is jdelta.DeltaModel
    assert delta.targets == []
    assert set(delta.partition()[0]) == {"classifier"}
