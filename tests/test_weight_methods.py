"""What holds for each method that changes weights: a row of `weight_methods`.

At default positions of a BERT, on a network in nnx, on layers of `nn.scan`, in bfloat16. Merging adds the change to the
weight in float32, and running adds it to the output: they agree to 1e-5 of the largest entry.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from conftest import fresh, noisy
from flax import linen as nn
from flax import nnx
from nnx_networks import X, network
from weight_methods import rows

import jdelta
from jdelta.trees import surgery

IDS = jnp.array([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def close(found, want, tolerance=1e-5):
    assert jnp.abs(jnp.asarray(found, jnp.float32) - want).max() <= tolerance * jnp.abs(want).max()


def pretrained():
    """A BERT whose weights are not as small as those that are initialised."""
    model = fresh("bert", "FlaxBertForSequenceClassification")
    model.params = jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, model.params)
    return model


def moved(delta, params):
    """The tree with noise on all that the delta trains."""
    trains, frozen = delta.partition(params)
    return jdelta.combine(noisy(trains), frozen)


@rows("lora", "vera", "shira")
def test_on_a_pretrained_model(row, tmp_path):
    model = pretrained()
    run, before = jax.jit(lambda params: model(IDS, params=params).logits), model.params
    bare = run(before)
    delta = row.model(model, **row.arguments)
    assert delta.targets
    assert (jnp.abs(run(model.params) - bare).max() < 1e-6) == row.starts_at_identity

    params = model.params = moved(delta, model.params)
    out = run(params)
    assert jnp.abs(out - bare).max() > 1e-4
    trains, frozen = delta.partition(params)
    grads = jax.jit(jax.grad(lambda t: jnp.sum(model(IDS, params=jdelta.combine(t, frozen)).logits ** 2)))(trains)
    assert [path for path, leaf in surgery.flatten(grads).items() if not leaf.any()] == []
    assert (delta.movement().values > 0).all()

    delta.save_finetuned(tmp_path / "saved")
    other = pretrained()
    again = jdelta.AutoDeltaModel.from_finetuned(tmp_path / "saved", other)
    assert again.config == delta.config
    np.testing.assert_array_equal(other(IDS).logits, model(IDS).logits)

    delta.merge()
    close(model(IDS).logits, out)
    delta.unmerge()
    close(model(IDS).logits, out)
    delta.remove()
    assert jax.tree.structure(model.params) == jax.tree.structure(before)
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, before))


@rows("lora", "dora", "hra", "vera", "shira", "road-2", "loha")
def test_on_an_nnx_module(row):
    model = network()
    bare, graphdef = model(X), nnx.graphdef(model)
    arguments = {**row.arguments, "modified_modules": [*row.nnx_modules]}
    delta = row.model(model, **arguments, dummy_inputs=(X,))
    assert (jnp.abs(model(X) - bare).max() < 1e-6) == row.starts_at_identity
    nnx.update(model, moved(delta, nnx.state(model)))
    out = nnx.jit(lambda model: model(X))(model)
    close(model(X), out)
    assert jnp.abs(out - bare).max() > 1e-4
    delta.merge()
    close(model(X), out)
    delta.unmerge()
    close(model(X), out)
    delta.remove()
    np.testing.assert_array_equal(model(X), bare)
    assert nnx.graphdef(model) == graphdef


class Layer(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, _=None):
        return x + jnp.tanh(nn.Dense(6, dtype=self.dtype, name="dense")(x)), None


class Stack(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned(dtype=self.dtype, name="layers")(x, None)[0]


def of_dense(row):
    return {**row.arguments, "modified_modules": ["dense"]}


def stack(row, dtype=jnp.float32):
    module = Stack(dtype)
    x = X.astype(dtype)
    backbone = jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    delta = row.model(backbone, **of_dense(row))
    backbone.params = moved(delta, backbone.params)
    return x, backbone, delta


@rows("lora", "hra")
def test_layers_of_a_scan_have_leaves_of_their_own(row):
    x, backbone, delta = stack(row)
    out = backbone(x)
    alone = jdelta.Backbone(Layer(), Layer().init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    row.model(alone, **of_dense(row))
    shared = {name: leaf for name, leaf in backbone.params.items() if name != "layers"}
    found = x
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], backbone.params["layers"])
        found = alone(found, params={**layer, **shared})[0]
    close(out, found)
    delta.merge()
    close(backbone(x), out)


@rows("lora", "hra")
def test_each_row_of_a_batch_has_a_delta_of_its_own(row):
    x, backbone, delta = stack(row)
    trains, frozen = delta.partition()
    both = [trains, noisy(trains, seed=1)]
    rows = jdelta.select(jdelta.stack(both), [0, 1, 1, 0])
    found = jdelta.rowwise(backbone, frozen)(x, params=rows)
    for i, which in enumerate([0, 1, 1, 0]):
        close(found[i], backbone(x, params=jdelta.combine(both[which], frozen))[i])


@rows("lora", "hra")
def test_in_bfloat16_it_computes_in_bfloat16_and_its_leaves_are_float32(row):
    x, backbone, delta = stack(row, jnp.bfloat16)
    out = backbone(x)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(delta.partition()[0])} == {jnp.dtype("float32")}
    _, wide, _ = stack(row)
    close(out, wide(X), tolerance=0.03)


@rows("lora", "hra")
def test_its_leaves_are_placed_on_the_mesh_of_the_backbone(row):
    _, backbone, delta = stack(row)
    bare = jdelta.prune(backbone.params, delta)
    specs = jax.tree.map(lambda leaf: jax.P(*(None,) * (leaf.ndim - 1), "model"), bare)
    placed = jax.device_put(backbone.params, delta.shardings(specs, jax.make_mesh((1,), ("model",))))
    assert jax.tree.all(jax.tree.map(np.array_equal, placed, backbone.params))
