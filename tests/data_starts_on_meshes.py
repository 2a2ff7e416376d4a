"""Starts from data on 8 virtual devices are those on one, for `test_data_starts`.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python data_starts_on_meshes.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jdelta

RNG = np.random.default_rng(0)
BATCHES = [RNG.standard_normal((8, 6, 8)).astype(np.float32) for _ in range(2)]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="second")(nn.tanh(nn.Dense(16, name="first")(x)))


class NnxNet(nnx.Module):
    def __init__(self):
        self.first, self.second = nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.Linear(16, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


def compare(found, want, what):
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4, err_msg=f"{what} {jax.tree_util.keystr(path)}")


def of_linen(start, sharded, mesh):
    module = Net()
    backbone = jdelta.Backbone(module, module.init(jax.random.key(0), BATCHES[0])["params"], (BATCHES[0],))
    delta = jdelta.LoraModel(backbone, ["first", "second"], lora_r=2, init_lora_weights=start)
    batches = BATCHES
    if sharded:
        specs = {"first": {"kernel": P(None, "model"), "bias": P()}, "second": {"kernel": P("model"), "bias": P()}}
        split = delta.shardings(specs, mesh)
        backbone.params = jax.device_put(backbone.params, split)
        batches = jax.device_put(BATCHES, NamedSharding(mesh, P("data")))
        for batch in batches:
            assert len(batch.sharding.device_set) == 8
    loss = (lambda params, x: (backbone(x, params=params) ** 2).mean()) if start == "lora_ga" else None
    delta.init_from_data(batches, loss, **({"rho": 1} if start == "eva" else {}))
    if sharded:
        jax.tree.map(lambda leaf, like: None if leaf.sharding == like else 1 / 0, backbone.params, split)
    return backbone.params


def of_nnx(start, sharded, mesh):
    model = NnxNet()
    delta = jdelta.LoraModel(
        model, ["first", "second"], lora_r=2, init_lora_weights=start, dummy_inputs=(jnp.ones((1, 6, 8)),)
    )
    batches = jax.device_put(BATCHES, NamedSharding(mesh, P("data"))) if sharded else BATCHES
    if sharded:
        nnx.update(model, jax.device_put(nnx.state(model), NamedSharding(mesh, P())))
    loss = (lambda model, x: (model(x) ** 2).mean()) if start == "lora_ga" else None
    delta.init_from_data(batches, loss, **({"rho": 1} if start == "eva" else {}))
    return nnx.to_pure_dict(nnx.state(model))


mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
for start in ("eva", "corda", "lora_ga"):
    compare(of_linen(start, True, mesh), of_linen(start, False, mesh), f"linen {start}")
    compare(of_nnx(start, True, mesh), of_nnx(start, False, mesh), f"nnx {start}")
print("done")
