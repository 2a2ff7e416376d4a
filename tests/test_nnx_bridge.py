"""Linen modules in `nnx.bridge.ToNNX`, inside an nnx model: deltas reach them by name."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from nnx_models import train_deltas
from tiers import breadth

import jdelta

X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)


class Encoder(nn.Module):
    """A dense layer, layers in a scan, and batch statistics."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="dense")(x)

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.tanh(nn.Dense(4, name="inner")(x)), None

        scanned = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = scanned(name="layers")(x, None)
        return nn.BatchNorm(use_running_average=True, name="norm")(x)


class Outer(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.lin = nnx.bridge.ToNNX(nn.Dense(4), rngs=rngs).lazy_init(X)
        self.encoder = nnx.bridge.ToNNX(Encoder(), rngs=rngs).lazy_init(X)

    def __call__(self, x):
        return self.encoder(self.lin(self.first(x)))


PUT = {
    "lora": lambda m: jdelta.LoraModel(
        m, modified_modules=["first", "lin", "encoder.dense", "inner"], lora_r=2, dummy_inputs=(X,)
    ),
    "parameters": lambda m: jdelta.LoraModel(
        m, modified_parameters=["lin.kernel", "dense.kernel", "inner.kernel"], lora_r=2, dummy_inputs=(X,)
    ),
    "adapter": lambda m: jdelta.AdapterModel(
        m, modified_modules=["first", "lin", "encoder.layers", "encoder"], bottleneck_dim=2, dummy_inputs=(X,)
    ),
    "bitfit": lambda m: jdelta.BitFitModel(m, modified_modules=["first", "encoder"], dummy_inputs=(X,)),
}


@pytest.mark.parametrize("put", breadth(PUT, "lora", "bitfit"))
def test_deltas_reach_linen_modules_inside_nnx(put, tmp_path):
    m = Outer(nnx.Rngs(0))
    bare, before = m(X), nnx.graphdef(m)
    delta = PUT[put](m)
    near = {"adapter": 1e-2}.get(put, 1e-6)
    chex.assert_trees_all_close(m(X), bare, atol=near)
    train_deltas(m)
    for path, value in nnx.iter_graph(m):
        if tuple(map(str, path)) in set(delta.filter.paths) and put == "bitfit":
            value[...] = value[...] + 0.3
    changed = m(X)
    assert jnp.abs(changed - bare).max() > 1e-2
    chex.assert_trees_all_close(nnx.jit(lambda m, x: m(x))(m, X), changed, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(nnx.clone(m)(X), changed, rtol=1e-6)
    grads = nnx.grad(lambda m: (m(X) ** 2).sum(), argnums=nnx.DiffState(0, delta.filter))(m)
    assert len(jax.tree.leaves(grads)) == len(delta.filter.paths)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    delta.save_finetuned(tmp_path)
    other = Outer(nnx.Rngs(0))
    jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=other, dummy_inputs=(X,))
    chex.assert_trees_all_close(other(X), changed, rtol=1e-6)
    with delta.disabled():
        chex.assert_trees_all_equal(m(X), bare)
    if put != "adapter":
        delta.merge()
        chex.assert_trees_all_close(m(X), changed, rtol=1e-4, atol=1e-5)
        delta.unmerge()
    delta.remove()
    assert nnx.graphdef(m) == before
    chex.assert_trees_all_equal(m(X), bare)


def test_a_whole_linen_model_can_be_wrapped():
    m = nnx.bridge.ToNNX(Encoder(), rngs=nnx.Rngs(0)).lazy_init(X)
    bare = m(X)
    delta = jdelta.LoraModel(m, modified_modules=["dense", "inner"], lora_r=2, dummy_inputs=(X,))
    assert delta.targets == ["dense", "layers.inner"]
    assert m.layers["inner"]["lora"]["a"].shape == (2, 4, 2)
    train_deltas(m)
    assert jnp.abs(m(X) - bare).max() > 1e-2
    delta.remove()
    chex.assert_trees_all_equal(m(X), bare)


def test_the_structure_names_what_is_inside():
    structure = jdelta.DeltaModel(Outer(nnx.Rngs(0)), dummy_inputs=(X,)).structure
    names = ["", "first", "lin", "encoder", "encoder.dense", "encoder.layers", "encoder.layers.inner", "encoder.norm"]
    assert list(structure.modules) == names
    assert structure["lin"].type is nn.Dense
    assert structure["encoder.layers.inner"].calls == 2


def test_a_span_into_a_linen_module_is_refused():
    m = Outer(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"span from first to encoder\.dense leads into a linen module"):
        jdelta.ParallelAdapterModel(m, modified_modules=["first", "encoder.dense"], dummy_inputs=(X,))
