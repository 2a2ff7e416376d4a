"""nnx modules inside a linen model: nothing goes into them, and all else works beside them."""

import chex
import jax
import jax.numpy as jnp
import pytest
from conftest import noisy, train_deltas
from flax import linen as nn
from flax import nnx
from tiers import breadth

import jdelta

X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)


class Inner(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.two(jnp.tanh(self.one(x))))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="dense")(x)
        x = nnx.bridge.ToLinen(nnx.Linear, args=(4, 4), name="linear")(x)
        return x + nnx.bridge.to_linen(Inner, name="mlp")(x)


class Model(nn.Module):
    lift: object = staticmethod(lambda block: block)

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = self.lift(Block)(name=f"b{i}")(x)
        return nn.Dense(3, name="head")(x)


def backbone_of(module=None):
    module = module or Model()
    variables = module.init(jax.random.key(0), X)
    return jdelta.Backbone(module, {**variables, "params": noisy(variables["params"])}, dummy_inputs=(X,))


def layer(delta, name):
    delta.insert_sequential_module(name, nn.Dense(4))


PUT = {
    "lora": lambda backbone, name: jdelta.LoraModel(backbone, modified_modules=[name], lora_r=2),
    "adapter": lambda backbone, name: jdelta.AdapterModel(backbone, modified_modules=[name], bottleneck_dim=2),
    "parallel": lambda backbone, name: jdelta.ParallelAdapterModel(backbone, modified_modules=[name, name]),
    "bitfit": lambda backbone, name: jdelta.BitFitModel(backbone, modified_modules=[name]),
    "by hand": lambda backbone, name: layer(jdelta.DeltaModel(backbone, name="extra"), name),
}


@pytest.mark.parametrize("name", breadth(["linear", "mlp", "mlp.one"], "linear"))
@pytest.mark.parametrize("put", PUT)
def test_naming_one_is_refused_with_the_reason(put, name):
    backbone = backbone_of()
    params, base = backbone.params, backbone(X)
    with pytest.raises(
        ValueError, match=rf"b0\.{name}'.*cannot .*Name a linen module around it, or make .* an nnx module"
    ):
        PUT[put](backbone, name)
    assert backbone.params is params
    chex.assert_trees_all_equal(backbone(X), base)


def test_what_walks_into_one_is_refused_with_the_way_out():
    message = r"'b0\.linear' cannot be a target: it is an nnx module .*exclude_modules=.*unfrozen_modules="
    with pytest.raises(ValueError, match=message):
        jdelta.BitFitModel(backbone_of(), modified_modules=["b0"])


@pytest.mark.parametrize("lift", breadth([lambda block: block, nn.remat, nn.jit], nn.jit))
def test_deltas_beside_and_around_them_work(lift, tmp_path):
    backbone = backbone_of(Model(lift))
    base = backbone(X)
    lora = jdelta.LoraModel(backbone, modified_modules=["dense", "head"], lora_r=2)
    adapter = jdelta.AdapterModel(backbone, modified_modules=["b0", "b1.dense"], bottleneck_dim=2)
    train_deltas(lora)
    train_deltas(adapter)
    changed = backbone(X)
    assert jnp.abs(changed - base).max() > 1e-3
    chex.assert_trees_all_close(jax.jit(lambda p: backbone(X, params=p))(backbone.params), changed, atol=1e-5)
    for name in ("linear", "mlp"):
        want = backbone_of(Model(lift)).params["params"]["b0"][name]
        chex.assert_trees_all_equal_structs(backbone.params["params"]["b0"][name], want)
    adapter.detach()
    lora.save_finetuned(tmp_path)
    other = backbone_of(Model(lift))
    jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=other)
    chex.assert_trees_all_equal(other(X), backbone(X))
    lora.detach()
    chex.assert_trees_all_equal(backbone(X), base)


def test_their_own_parameters_train_when_they_are_unfrozen():
    backbone = backbone_of()
    base = backbone(X)
    delta = jdelta.LoraModel(
        backbone, modified_modules=["dense"], lora_r=2, unfrozen_modules=["b0.linear", "b1.mlp.one.bias"]
    )
    trainable, frozen = delta.partition()
    assert trainable["params"]["b0"]["linear"].keys() == {"kernel", "bias"}
    assert trainable["params"]["b1"]["mlp"] == {"one": {"bias": backbone.params["params"]["b1"]["mlp"]["one"]["bias"]}}
    grads = jax.grad(lambda t: backbone(X, params=jdelta.combine(t, frozen)).sum())(trainable)
    assert jnp.abs(grads["params"]["b1"]["mlp"]["one"]["bias"]).max() > 0
    chex.assert_trees_all_close(backbone(X), base, atol=1e-6)


def test_they_are_in_the_structure_and_so_is_why_their_parts_are_not():
    structure = backbone_of().structure()
    assert structure["b1.mlp"].y.shape == (2, 4)
    assert "part of 'b1.mlp'" in structure.uncalled["b1.mlp.two"]
    assert not structure["b1.dense"].closed
