"""Training steps of tunix's Llama 3 on 8 virtual devices, for `test_nnx_sharding`.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tunix_on_meshes.py
"""

from collections import Counter

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from nnx_on_meshes import arrays
from on_meshes import RANK, collectives
from tunix_models import build, inputs

import jdelta

ARGUMENTS = inputs(batch=8)


def loss_of(model, tokens, positions, mask):
    logits, _ = model(tokens, positions, None, mask)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def train(model, trains, batch, steps=3):
    """The losses, and the compiled step."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=trains)

    @nnx.jit
    def step(model, optimizer, *batch):
        loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, trains))(model, *batch)
        optimizer.update(model, grads)
        return loss

    compiled = step.lower(model, optimizer, *batch).compile()
    return [float(step(model, optimizer, *batch)) for _ in range(steps)], getattr(compiled, "compiled", compiled)


def with_lora(model):
    return jdelta.LoraModel(model, ["q_proj", "v_proj", "down_proj"], lora_r=RANK, dummy_inputs=ARGUMENTS)


def placed(mesh):
    model = build("llama3")
    state = nnx.state(model)
    nnx.update(model, jax.device_put(state, nnx.get_named_sharding(state, mesh)))
    return model


def main():
    tokens, positions, _, mask = ARGUMENTS
    model = build("llama3")
    want, _ = train(model, with_lora(model).filter, (tokens, positions, mask))
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    with mesh:
        batch = jax.device_put((tokens, positions, mask), NamedSharding(mesh, P("fsdp")))
        whole = collectives(train(placed(mesh), nnx.Param, batch, steps=0)[1])
        model = placed(mesh)
        before = arrays(model)
        values = jax.tree.map(np.asarray, before)
        delta = with_lora(model)
        assert all(leaf is before[path] for path, leaf in arrays(model).items())
        specs = {}
        for path, leaf in nnx.to_flat_state(nnx.state(model, delta.filter)):
            named = leaf.get_metadata()["out_sharding"]
            assert leaf.get_raw_value().sharding.is_equivalent_to(NamedSharding(mesh, P(*named)), leaf.ndim), path
            specs[".".join(map(str, path))] = named
        assert specs["layers.0.attn.q_proj.lora.a"] == ("fsdp", None)
        assert specs["layers.0.attn.q_proj.lora.b"] == (None, "tp", None)
        assert specs["layers.0.mlp.down_proj.lora.a"] == ("tp", None)
        losses, step = train(model, delta.filter, batch)
        np.testing.assert_allclose(losses, want, rtol=1e-4)
        for path, leaf in arrays(model).items():
            np.testing.assert_array_equal(leaf, values[path])
            assert leaf.sharding.is_equivalent_to(before[path].sharding, leaf.ndim)
    found = collectives(step)
    own = Counter({key: n for key, n in found.items() if RANK in key[1]})
    print(f"{found.total()} collectives, of which {own.total()} are LoRA's; of full fine-tuning {whole.total()}")
    assert not found - own - whole, found - own - whole
    print("done")


if __name__ == "__main__":
    main()
