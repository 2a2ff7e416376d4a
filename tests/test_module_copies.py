"""A module with deltas is a copy: whatever its class does when it is constructed, hashed or derived from stays so."""

import abc
import copy
import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest
from conftest import noisy, train_deltas
from flax import linen as nn

import jdelta

X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)


def registering(cls):
    """As diffusers does: the constructor notes its arguments in an attribute that is no field."""
    original = cls.__init__

    def init(self, *args, **kwargs):
        fields = {f.name: f.default for f in dataclasses.fields(cls) if f.name not in ("parent", "name")}
        given = {key: value for key, value in kwargs.items() if key in fields}
        object.__setattr__(self, "_config", {**fields, **given})
        original(self, *args, **kwargs)

    cls.__init__ = init
    return cls


@registering
class Registered(nn.Module):
    features: int = 6
    use_bias: bool = True

    def setup(self):
        self.one = nn.Dense(self._config["features"], use_bias=self.config["use_bias"])
        self.two = nn.Dense(3)

    def __call__(self, x):
        return self.two(jnp.tanh(self.one(x))) * len(self.config)

    @property
    def config(self):
        return dict(self._config)


def backbone_of(module):
    return jdelta.Backbone(module, noisy(module.init(jax.random.key(0), X)["params"]), dummy_inputs=(X,))


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (jdelta.LoraModel, {"modified_modules": ["one", "two"], "lora_r": 2}),
        pytest.param(jdelta.AdapterModel, {"modified_modules": ["one"], "bottleneck_dim": 2}, marks=pytest.mark.slow),
        pytest.param(jdelta.BitFitModel, {"modified_modules": ["one", "two"]}, marks=pytest.mark.slow),
    ],
)
def test_what_a_constructor_sets_is_there_with_a_delta(method, arguments, tmp_path):
    backbone = backbone_of(Registered(features=5, use_bias=False))
    bare, base = copy.copy(backbone), backbone(X)
    delta = method(backbone, **arguments)
    assert backbone.module.config == {"features": 5, "use_bias": False}
    train_deltas(delta)
    changed = backbone(X)
    assert jnp.abs(changed - base).max() > 1e-3
    chex.assert_trees_all_close(jax.jit(lambda p: backbone(X, params=p))(backbone.params), changed, atol=1e-6)
    delta.save_finetuned(tmp_path)
    jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=bare)
    chex.assert_trees_all_equal(bare(X), changed)
    if method is not jdelta.AdapterModel:
        delta.merge()
        chex.assert_trees_all_close(backbone(X), changed, atol=1e-5)
        delta.unmerge()
    delta.detach()
    chex.assert_trees_all_equal(backbone(X), base)


def test_what_was_set_on_the_instance_is_copied_and_not_shared_with_flax():
    module = Registered()
    module.note = ["set by hand"]
    delta = jdelta.LoraModel(backbone_of(module), modified_modules=["one"], lora_r=2)
    with_delta = delta.backbone_model.module
    assert with_delta.note is module.note
    assert (with_delta._id, with_delta._state) != (module._id, module._state)
    assert with_delta.parent is None
    assert with_delta.scope is None


class Hashed(nn.Module):
    widths: list  # flax's own hash would fail on it
    calls: int = dataclasses.field(default=0, init=False)

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, name=f"d{i}")(x)
        return x

    def __hash__(self):
        return hash(tuple(self.widths))

    def __eq__(self, other):
        return isinstance(other, Hashed) and self.widths == other.widths


def test_own_hash_and_equality_and_fields_that_are_not_arguments_stay():
    module = Hashed([4, 3])
    backbone = backbone_of(module)
    jdelta.LoraModel(backbone, modified_modules=["d0"], lora_r=2)
    assert hash(backbone.module) == hash(module)
    assert backbone.module == module
    assert backbone.module.calls == 0
    run = jax.jit(lambda module, params: module.apply({"params": params}, X), static_argnums=0)
    chex.assert_trees_all_close(run(backbone.module, backbone.params), backbone(X), atol=1e-6)


def test_classes_with_rules_for_their_subclasses():
    derived = []

    class Ruled(nn.Module, abc.ABC, kw_only=True):
        width: int

        def __init_subclass__(cls, registered_as, **kwargs):
            super().__init_subclass__(**kwargs)
            derived.append(registered_as)

        @abc.abstractmethod
        def __call__(self, x): ...

    class Net(Ruled, registered_as="net", kw_only=True):
        depth: int = 2

        @nn.compact
        def __call__(self, x):
            for _ in range(self.depth):
                x = nn.Dense(self.width)(x)
            return x

    backbone = backbone_of(Net(width=4))
    base = backbone(X)
    delta = jdelta.LoraModel(backbone, modified_modules=["Dense_1"], lora_r=2)
    train_deltas(delta)
    assert jnp.abs(backbone(X) - base).max() > 1e-3
    assert isinstance(backbone.module, Net)
    assert type(backbone.module).__name__ == "Net"
    assert derived == ["net"]


def test_a_bound_module_is_taken_by_its_fields():
    module = Registered(features=5)
    params = module.init(jax.random.key(0), X)["params"]
    backbone = jdelta.Backbone(module.bind({"params": params}), params, dummy_inputs=(X,))
    delta = jdelta.LoraModel(backbone, modified_modules=["one"], lora_r=2)
    assert backbone.module.scope is None
    chex.assert_trees_all_equal(backbone(X), module.apply({"params": params}, X))
    delta.detach()
