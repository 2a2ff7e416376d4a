"""Training steps of nnx modules on 8 virtual devices, for `test_nnx_sharding`.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python nnx_on_meshes.py
"""

import math
from collections import Counter

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from on_meshes import RANK, collectives

import jdelta

WIDTH, LAYERS = 16, 4
UNNAMED = {nnx.PARTITION_NAME: None}


class Block(nnx.Module):
    def __init__(self, rngs, by_hand=False, eager=True):
        def init(*axes, values=None):
            values = values or nnx.initializers.lecun_normal()
            return nnx.with_partitioning(values, axes, eager_sharding=eager)

        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, kernel_init=init("fsdp", "model"), rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, kernel_init=init("model", "fsdp"), rngs=rngs)
        if by_hand:
            a, b = init("fsdp", None), init(None, "model", values=nnx.initializers.zeros)
            self.lora = nnx.LoRA(WIDTH, RANK, 4 * WIDTH, a_initializer=a, b_initializer=b, rngs=rngs)

    def __call__(self, x):
        y = self.up(x) + self.lora(x) if hasattr(self, "lora") else self.up(x)
        return x + self.down(nnx.relu(y))


class Listed(nnx.Module):
    def __init__(self, rngs, **options):
        self.layers = nnx.List([Block(rngs, **options) for _ in range(LAYERS)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Scanned(nnx.Module):
    """Layers that are stacked along an axis of their own, whose name is in the metadata."""

    axis, names = 0, UNNAMED

    def __init__(self, rngs, **options):
        made = nnx.vmap(
            lambda rngs: Block(rngs, **options), in_axes=0, out_axes=self._axes(), transform_metadata=self.names
        )
        self.layers = nnx.split_rngs(splits=LAYERS)(made)(rngs)

    def __call__(self, x):
        run = nnx.scan(
            lambda x, layer: layer(x),
            in_axes=(nnx.Carry, self._axes()),
            out_axes=nnx.Carry,
            transform_metadata=self.names,
        )
        return run(x, self.layers)

    def _axes(self):
        return nnx.StateAxes({nnx.Param: self.axis, ...: 0})


class ScannedInside(Scanned):
    """The layers are axis 1 of each parameter."""

    axis = 1


def mesh_of(*sizes):
    return jax.make_mesh(sizes, ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)


def x_of(rows=8):
    return jax.random.normal(jax.random.key(0), (rows, 3, WIDTH))


def with_lora(model):
    return jdelta.LoraModel(model, ["up"], lora_r=RANK, lora_alpha=RANK, dummy_inputs=(x_of(),))


def arrays(model):
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: leaf.get_raw_value() for path, leaf in leaves if not isinstance(leaf, nnx.LoRAParam)}


def train(model, trains, x, steps=4):
    """The losses, and the compiled step."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=trains)

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean(), argnums=nnx.DiffState(0, trains))(model)
        optimizer.update(model, grads)
        return loss

    compiled = step.lower(model, optimizer, x).compile()
    return [float(step(model, optimizer, x)) for _ in range(steps)], getattr(compiled, "compiled", compiled)


def check(stack):
    model = stack(nnx.Rngs(0), eager=False)
    want, _ = train(model, with_lora(model).filter, x_of())
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(x_of(), NamedSharding(mesh, P(("data", "fsdp"))))
        model = stack(nnx.Rngs(0))
        before = arrays(model)
        values = jax.tree.map(np.asarray, before)
        delta = with_lora(model)
        assert all(leaf is before[path] for path, leaf in arrays(model).items())
        placed = nnx.to_flat_state(delta.partition_specs(nnx.get_partition_spec(nnx.state(model))))
        wanted = {path: NamedSharding(mesh, leaf.get_value()) for path, leaf in placed}
        for path, leaf in nnx.to_flat_state(nnx.state(model, delta.filter)):
            assert leaf.get_raw_value().sharding.is_equivalent_to(wanted[path], leaf.ndim), path
            assert not leaf.get_raw_value().sharding.is_fully_replicated, path
        losses, step = train(model, delta.filter, x)
        np.testing.assert_allclose(losses, want, rtol=1e-4)
        for path, leaf in arrays(model).items():
            np.testing.assert_array_equal(leaf, values[path])
            assert leaf.sharding.is_equivalent_to(before[path].sharding, leaf.ndim)
        by_hand = train(stack(nnx.Rngs(0), by_hand=True), nnx.LoRAParam, x)[1]
    found, wanted = sizes(step), sizes(by_hand)
    print(f"{stack.__name__}: {found.total()} collectives, as of LoRA by hand")
    assert found == wanted, (found - wanted, wanted - found)


def sizes(step):
    """How often a program has each collective operation of each number of elements."""
    found = Counter()
    for (operation, shape), n in collectives(step).items():
        found[operation, math.prod(shape)] += n
    return found


def main():
    for stack in (Listed, Scanned, ScannedInside):
        check(stack)
    print("done")


if __name__ == "__main__":
    main()
