import functools

import jax
import jax.numpy as jnp
import pytest
from conftest import build
from flax import linen as nn

import jdelta
from jdelta.hosts.adapting import adapt


def structure_of(model):
    return adapt(model).structure()


def test_modules_come_as_the_tensors_flow():
    names = list(structure_of(build("bert", "FlaxBertModel", _do_init=False)).modules)
    one = [name.removeprefix("encoder.layer.0.") for name in names if name.startswith("encoder.layer.0.")]
    assert one[:3] == ["attention", "attention.self", "attention.self.query"]
    assert one.index("attention.output.dense") < one.index("intermediate.dense") < one.index("output.dense")
    assert names.index("embeddings.word_embeddings") < names.index("encoder") < names.index("pooler.dense")


def test_a_module_shows_type_shapes_and_parameters():
    info = structure_of(build("bert", "FlaxBertModel", _do_init=False))["encoder.layer.1.intermediate.dense"]
    assert info.type is nn.Dense
    assert (info.x.shape, info.y.shape, info.y.dtype) == ((1, 1, 16), (1, 1, 32), jnp.float32)
    assert info.params["kernel"].shape == (16, 32)
    assert info.fields["features"] == 32
    assert info.calls == 1


def test_a_shared_layer_counts_its_calls():
    structure = structure_of(build("albert", "FlaxAlbertModel", _do_init=False))
    calls = {info.name: info.calls for info in structure}
    assert calls["encoder.albert_layer_groups.0.albert_layers.0.ffn"] == 3


def test_the_trace_allocates_nothing():
    model = build(
        "llama",
        "FlaxLlamaForCausalLM",
        {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 256},
        _do_init=False,
    )
    before = len(jax.live_arrays())
    structure = structure_of(model)
    assert len(structure) > 30
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(structure.params))
    assert sum(a.size for a in jax.live_arrays()[before:]) < 100


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(4, name="dense")(x), None


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_show_the_shapes_inside_and_the_tree_the_layer_axis(remat):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner = nn.remat(Block) if remat else Block
            layers = nn.scan(inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return layers(name="layers")(x, None)[0]

    structure = structure_of(jdelta.Backbone(Model(), dummy_inputs=(jnp.ones((2, 4)),)))
    assert structure["layers.dense"].params["kernel"].shape == (4, 4)
    assert structure["layers.dense"].calls == 3
    assert structure.params["layers"]["dense"]["kernel"].shape == (3, 4, 4)


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_a_lifted_module_in_a_scanned_one_counts_its_layers_once(lift):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            scan = functools.partial(nn.scan, variable_axes={"params": 0}, split_rngs={"params": True})
            return scan(lift(Block), length=3)(name="inner")(nn.Dense(4, name="own")(x), None)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(Outer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return lift(Block)(name="last")(layers(name="layers")(x, None)[0], None)[0]

    structure = structure_of(jdelta.Backbone(Model(), dummy_inputs=(jnp.ones((2, 4)),)))
    assert {name: structure[name].calls for name in ("layers.own", "layers.inner.dense", "last.dense")} == {
        "layers.own": 2,
        "layers.inner.dense": 6,
        "last.dense": 1,
    }


def test_a_rematted_layer_called_twice_counts_two():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.remat(Block)(name="layer")
            return layer(layer(x)[0])[0]

    assert structure_of(jdelta.Backbone(Model(), dummy_inputs=(jnp.ones((2, 4)),)))["layer.dense"].calls == 2


def test_a_tied_head_is_no_module_of_the_tree():
    structure = structure_of(build("gpt2", "FlaxGPT2LMHeadModel", _do_init=False))
    assert "lm_head" not in structure.modules
    assert "tied head" in structure.uncalled["lm_head"]
    assert "" in structure.modules


def test_an_untied_head_is_a_module():
    structure = structure_of(build("gpt2", "FlaxGPT2LMHeadModel", {"tie_word_embeddings": False}, _do_init=False))
    assert structure["lm_head"].params["kernel"].shape == (16, 60)


def test_the_pseudo_inputs_of_a_linen_module_are_token_ids():
    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, ids):
            _, _ = ids.shape
            return nn.Embed(5, 4)(ids)

    class Flat(nn.Module):
        @nn.compact
        def __call__(self, ids):
            (_,) = ids.shape
            return nn.Embed(5, 4)(ids)

    assert structure_of(jdelta.Backbone(Tokens()))["Embed_0"].x.shape == (1, 3)
    assert structure_of(jdelta.Backbone(Flat()))["Embed_0"].x.shape == (3,)
