"""On nnx modules, leaves of deltas are sharded as the backbone's arrays and the metadata of its parameters say."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from nnx_on_meshes import Listed, Scanned, ScannedInside, mesh_of, x_of

import jdelta


class Named(ScannedInside):
    """The axis of the layers has a logical name."""

    names = {nnx.PARTITION_NAME: "layers"}  # noqa: RUF012


def out_shardings(state):
    found = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    return {path: leaf.get_metadata().get("out_sharding") for path, leaf in found.items()}


def specs(state):
    return {path: leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def test_new_leaves_have_the_metadata_that_follow_from_the_parameters():
    model = Named(nnx.Rngs(0), eager=False)
    delta = jdelta.LoraModel(model, ["up"], lora_r=2, dummy_inputs=(x_of(),))
    jdelta.AdapterModel(model, modified_modules=["layers"], bottleneck_dim=2)
    expected = {
        "layers.up.lora.a": ("fsdp", "layers", None),
        "layers.up.lora.b": (None, "layers", "model"),
        "layers.adapter.down.kernel": ("fsdp", "layers", None),
        "layers.adapter.down.bias": (None, "layers"),
        "layers.adapter.up.kernel": (None, "layers", "fsdp"),
        "layers.adapter.up.bias": ("fsdp", "layers"),
    }
    assert out_shardings(nnx.state(model, nnx.LoRAParam)) == expected
    given = nnx.get_partition_spec(nnx.state(model))
    assert specs(given) == specs(delta.partition_specs(given))
    graphdef = nnx.graphdef(model)
    nnx.jit(lambda model, x: model(x))(model, x_of())
    delta.detach()
    delta.attach()
    assert nnx.graphdef(model) == graphdef
    assert out_shardings(nnx.state(model, nnx.LoRAParam)) == expected
    moments = nnx.Optimizer(model, optax.adam(0.1), wrt=delta.filter).opt_state[0].mu
    assert specs(nnx.get_partition_spec(nnx.state(moments)))["layers", "up", "lora", "a"] == P("fsdp", "layers", None)


def test_a_backbone_without_metadata_gives_none():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    jdelta.LoraModel(model, ["layers.0"], lora_r=2, dummy_inputs=(jnp.ones((1, 4)),))
    assert set(out_shardings(nnx.state(model, nnx.LoRAParam)).values()) == {None}


def placed(model):
    mesh = mesh_of(1, 1, 1)
    state = nnx.state(model)
    nnx.update(model, jax.device_put(state, nnx.get_named_sharding(state, mesh)))
    return model, mesh


def test_new_leaves_are_where_the_arrays_of_the_backbone_say(tmp_path):
    model, mesh = placed(Scanned(nnx.Rngs(0), eager=False))
    for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        leaf.set_metadata(out_sharding=None)  # what is there is the arrays
    before = nnx.state(model, nnx.Param)
    delta = jdelta.LoraModel(model, ["up"], lora_r=2, dummy_inputs=(x_of(),))
    wanted = NamedSharding(mesh, P(None, "fsdp", None)), NamedSharding(mesh, P(None, None, "model"))
    assert (model.layers.up.lora.a.sharding, model.layers.up.lora.b.sharding) == wanted
    assert model.layers.up.kernel.get_raw_value() is before["layers"]["up"]["kernel"].get_raw_value()
    delta.save_finetuned(tmp_path, allow_untrained=True)
    delta.remove()
    jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=model)
    assert (model.layers.up.lora.a.sharding, model.layers.up.lora.b.sharding) == wanted


def test_shapes_of_new_leaves_say_where_they_are_to_be():
    mesh = mesh_of(1, 1, 1)
    graphdef, state = nnx.get_abstract_model(lambda: Listed(nnx.Rngs(0), eager=False), mesh)
    model = nnx.merge(graphdef, state)
    jdelta.LoraModel(model, ["up"], lora_r=2, dummy_inputs=(x_of(),))
    assert model.layers[0].up.lora.a.get_raw_value().sharding == NamedSharding(mesh, P("fsdp", None))


class Experts(nnx.Module):
    """Weights that are read with their change, since no linear module has them."""

    def __init__(self, rngs):
        values = jax.random.normal(rngs.params(), (2, 4, 4))
        self.weights = nnx.Param(values, out_sharding=(None, "fsdp", None), mesh=jax.make_mesh((1,), ("fsdp",)))

    def __call__(self, x):
        return jnp.einsum("bd,edf->bf", x, self.weights[...])


def test_parameters_with_metadata_are_read_with_their_changes():
    model = Experts(nnx.Rngs(0))
    x = jnp.ones((2, 4))
    bare = model(x)
    jdelta.LoraModel(model, modified_parameters=["weights"], lora_r=2, dummy_inputs=(x,))
    np.testing.assert_array_equal(model(x), bare)
    found = model.lora.weights.a.get_metadata()
    assert found["mesh"] == model.weights.get_metadata()["mesh"]
    assert "fsdp" in found["out_sharding"]


def test_a_rank_is_compared_with_the_matrix_of_one_layer():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ScannedInside(nnx.Rngs(0), eager=False)
        jdelta.LoraModel(model, modified_parameters=["up.kernel"], lora_r=8, dummy_inputs=(x_of(),))
    with pytest.warns(UserWarning, match="16 -> 64"):
        jdelta.LoraModel(model, modified_parameters=["up.kernel"], lora_r=17, dummy_inputs=(x_of(),))


def run_on_eight_devices(name):
    program = Path(__file__).with_name(name)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]


@pytest.mark.slow
def test_on_a_mesh_of_eight_devices():
    """Losses are those of one device, the backbone's arrays the same and where they were, collectives those of LoRA
    that is written into the modules by hand and sharded alike."""
    run_on_eight_devices("nnx_on_meshes.py")


@pytest.mark.tunix
def test_llama_of_tunix_on_a_mesh_of_eight_devices():
    """Losses are those of one device, the backbone's arrays the same and where they were, collectives those of full
    fine-tuning and of LoRA's own leaves."""
    run_on_eight_devices("tunix_on_meshes.py")
