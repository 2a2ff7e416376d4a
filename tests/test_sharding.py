"""Shardings of deltas are derived from the backbone's; losses, bytes and collectives on 8 virtual devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import build, fresh
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jdelta
from jdelta.trees import surgery

MESH = AbstractMesh((2, 2, 2), ("data", "fsdp", "model"))
RULES = [
    (r"[r](query|key|value|intermediate\.dense)\.kernel", P("fsdp", "model")),
    ("output.dense.kernel", P("model", "fsdp")),
    ("word_embeddings.embedding", P("model", "fsdp")),
]
SEQUENCE = "FlaxBertForSequenceClassification"


def specs_of(model, rules=RULES):
    return jdelta.match_partition_rules(rules, model.params_shape_tree, default=P())


@pytest.fixture
def bert():
    """Shapes only: most of this needs no values."""
    return build("bert", SEQUENCE, _do_init=False)


def by_name(tree):
    return {surgery.name_of(path): leaf for path, leaf in surgery.flatten(tree).items()}


def own_specs(delta, specs, mesh=MESH):
    """The specs of the delta's leaves, without what comes before the layer's number."""
    return by_name(delta.own(delta.partition_specs(specs, mesh)))


# --- rules


def test_the_first_rule_that_matches_the_end_of_a_name_counts():
    shapes = {"a": {"0": {"kernel": np.zeros((2, 3))}, "10": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}}}
    rules = [("0.kernel", P("x")), (r"[r]a\.\d+\.kernel", P(None, "x")), ("bias", P("y"))]
    assert jdelta.match_partition_rules(rules, shapes) == {
        "a": {"0": {"kernel": P("x")}, "10": {"kernel": P(None, "x"), "bias": P("y")}}
    }


def test_scalars_need_no_rule_and_states_keep_their_structure():
    state = optax.adam(1e-3).init({"w": jnp.ones((2, 2))})
    found = jdelta.match_partition_rules([("w", P("x"))], state)
    assert found[0].mu == {"w": P("x")}
    assert found[0].count == P()


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ([("kernel", P())], ValueError, r"no rule matches 'a\.bias'. Add one, or give a default"),
        ([("bias", P("x", "y"))], ValueError, r"'bias' gives P\('x', 'y'\) to 'a\.bias', which has 1 axes"),
        ([("bias", "x")], TypeError, r"a rule is a pair \(pattern, PartitionSpec\)"),
        (["bias"], TypeError, "a rule is a pair"),
        ([("[r](", P())], ValueError, "not a valid regular expression"),
    ],
)
def test_bad_rules_say_what_is_wrong(rules, error, message):
    with pytest.raises(error, match=message):
        jdelta.match_partition_rules(rules, {"a": {"bias": np.zeros(3)}})


# --- what follows what


def test_lora_follows_the_input_and_the_output_of_its_kernel(bert):
    specs = specs_of(bert)
    found = own_specs(jdelta.LoraModel(bert, modified_modules=["query", "output.dense", "word_embeddings"]), specs)
    layer = "bert.encoder.layer.1"
    assert found[f"{layer}.attention.self.query.lora.a"] == P("fsdp", None)
    assert found[f"{layer}.attention.self.query.lora.b"] == P(None, "model")
    assert found[f"{layer}.output.dense.lora.a"] == P("model", None)
    assert found[f"{layer}.output.dense.lora.b"] == P(None, "fsdp")
    assert found["bert.embeddings.word_embeddings.lora.a"] == P("model", None)
    assert found["bert.embeddings.word_embeddings.lora.b"] == P(None, "fsdp")


def test_lora_follows_kernels_that_store_the_output_first_square_ones_too():
    model = build("gpt2", "FlaxGPT2LMHeadModel", _do_init=False)
    specs = specs_of(model, [(r"[r](c_attn|c_proj)\.kernel", P("model", "fsdp"))])
    found = own_specs(jdelta.LoraModel(model, modified_modules=["c_attn", "attn.c_proj"]), specs)
    for name in ("c_attn", "c_proj"):
        assert found[f"transformer.h.0.attn.{name}.lora.a"] == P("fsdp", None)
        assert found[f"transformer.h.0.attn.{name}.lora.b"] == P(None, "model")


class Shapes(nn.Module):
    """Linear modules of all kinds."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(8, (3,), name="conv")(x)
        y = nn.DenseGeneral((2, 6), name="heads")(y)
        y = nn.DenseGeneral(8, axis=(-2, -1), name="joined")(y)
        return nn.Einsum((2, 8, 6), "bsd,ndh->bsnh", name="einsum")(y)


def test_lora_follows_convolutions_and_kernels_of_many_axes():
    shapes = jax.eval_shape(Shapes().init, jax.random.key(0), x := jnp.ones((1, 4, 8)))["params"]
    backbone = jdelta.Backbone(Shapes(), shapes, dummy_inputs=(x,))
    rules = [
        ("conv.kernel", P(None, "fsdp", "model")),
        ("heads.kernel", P("fsdp", "model")),
        ("joined.kernel", P("model", None, "fsdp")),
        ("einsum.kernel", P("model", "fsdp")),
    ]
    delta = jdelta.LoraModel(backbone, modified_modules=["conv", "heads", "joined", "einsum"], lora_r=2)
    found = own_specs(delta, jdelta.match_partition_rules(rules, shapes, P()))
    assert found == {
        "conv.lora.a": P(None, "fsdp", None),
        "conv.lora.b": P(None, "model"),
        "heads.lora.a": P("fsdp", None),
        "heads.lora.b": P(None, "model", None),
        "joined.lora.a": P("model", None, None),
        "joined.lora.b": P(None, "fsdp"),
        "einsum.lora.a": P("fsdp", None),
        "einsum.lora.b": P(None, "model", None),
    }


def test_adapters_and_biases_follow_the_output_of_their_host_and_their_middle_is_whole():
    model = build("t5", "FlaxT5ForConditionalGeneration", _do_init=False)
    specs = specs_of(model, [("o.kernel", P("model", "fsdp")), ("q.kernel", P("fsdp", "model"))])
    o, q = (f"encoder.block.0.layer.0.SelfAttention.{name}" for name in "oq")
    adapter = jdelta.AdapterModel(model, modified_modules=["o"])
    parallel = jdelta.ParallelAdapterModel(model, modified_modules=["SelfAttention", "SelfAttention"])
    bias = jdelta.BitFitModel(model, modified_modules=["SelfAttention"])
    found = own_specs(adapter, specs)
    assert found[f"{o}.adapter.down.kernel"] == P("fsdp", None)
    assert found[f"{o}.adapter.up.kernel"] == P(None, "fsdp")
    assert found[f"{o}.adapter.up.bias"] == P("fsdp")
    assert found[f"{o}.adapter.down.bias"] == P()
    found = own_specs(parallel, specs)
    assert found[f"{o[:-2]}.parallel_adapter.down.kernel"] == P("fsdp", None)  # q is the first module in it
    assert found[f"{o[:-2]}.parallel_adapter.up.kernel"] == P(None, "fsdp")  # o is the last
    found = own_specs(bias, specs)
    assert (found[f"{q}.bitfit.bias"], found[f"{o}.bitfit.bias"]) == (P("model"), P("fsdp"))


def test_prefixes_are_split_by_heads_where_the_mesh_divides_them(bert):
    specs = specs_of(bert)
    delta = jdelta.PrefixModel(bert, prefix_token_num=3, reparameterize=False)
    keys = "bert.encoder.layer.0.attention.prefix.keys"  # 2 heads
    assert own_specs(delta, specs)[keys] == P(None, "model", None)
    assert own_specs(delta, specs, AbstractMesh((1, 1, 4), MESH.axis_names))[keys] == P()
    assert own_specs(delta, specs, None)[keys] == P()  # unknown whether it is divided
    delta.detach()
    found = own_specs(jdelta.SoftPromptModel(bert, soft_token_num=3), specs)
    assert found == {"bert.embeddings.word_embeddings.soft_prompt.embedding": P(None, "fsdp")}


class Scanned(nn.Module):
    """Blocks in a scan whose layer axis is the second one."""

    axis: int = 1

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Block, {"params": self.axis}, split_rngs={"params": True}, length=4)
        return scan(name="blocks")(x, None)[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="two")(nn.relu(nn.Dense(16, name="one")(x))), None


@pytest.mark.parametrize("axis", [0, 1])
def test_leaves_in_a_scan_have_the_layer_axis_too(axis):
    x = jnp.ones((2, 8))
    params = Scanned(axis).init(jax.random.key(0), x)["params"]
    backbone = jdelta.Backbone(Scanned(axis), params, dummy_inputs=(x,))

    def stored(*spec):
        return P(*spec[:axis], "data", *spec[axis:])

    rules = [("one.kernel", stored("fsdp", "model")), ("two.kernel", stored("model", "fsdp"))]
    specs = jdelta.match_partition_rules(rules, params, P())
    lora = jdelta.LoraModel(backbone, modified_modules=["one"], lora_r=2)
    adapter = jdelta.AdapterModel(backbone, modified_modules=["blocks"], bottleneck_dim=2)
    found = own_specs(lora, specs)
    assert found["blocks.one.lora.a"] == stored("fsdp", None)
    assert found["blocks.one.lora.b"] == stored(None, "model")
    found = own_specs(adapter, specs)
    assert found["blocks.adapter.down.kernel"] == stored("fsdp", None)
    assert found["blocks.adapter.down.bias"] == stored(None)


class Scale(nn.Module):
    """A user's own layer, which says what its leaf follows."""

    @nn.compact
    def __call__(self, y):
        return y * self.param("scale", nn.initializers.ones, (y.shape[-1],))

    def sharding_axes(self, host, x, y):
        return {"scale": y}


def test_a_layer_of_ones_own_says_what_its_leaves_follow_and_they_are_whole_if_it_does_not(bert):
    specs = specs_of(bert)
    delta = jdelta.DeltaModel(bert, name="extra")
    delta.insert_sequential_module("0.attention.self.query", nn.Dense(16))
    delta.insert_sequential_module("0.attention.self.key", Scale())
    delta.insert_sequential_module("0.attention.output.dense", Scale(), where="before")
    found = own_specs(delta, specs)
    attention = "bert.encoder.layer.0.attention"
    assert found[f"{attention}.self.query.extra.kernel"] == P()
    assert found[f"{attention}.self.key.extra.scale"] == P("model")
    assert found[f"{attention}.output.dense.extra.scale"] == P("model")


# --- what may be given


def test_specs_shardings_placed_arrays_and_boxes_give_the_same():
    model = fresh("bert", SEQUENCE)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), MESH.axis_names)
    specs, bare = specs_of(model), model.params
    split = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))
    placed = jax.device_put(bare, split)

    def box(leaf, spec):
        return nn.Partitioned(leaf, (*spec, *[None] * (leaf.ndim - len(spec))))

    delta = jdelta.LoraModel(model)
    want, layer = delta.partition_specs(specs, mesh), "bert.encoder.layer.0.attention.self.query.lora"
    assert by_name(want)[f"{layer}.b"] == P(None, "model")
    grafted = delta.partition_specs(want)
    none = jax.tree.map(lambda spec: spec if any(spec) else None, specs, is_leaf=lambda leaf: isinstance(leaf, P))
    boxed = delta.partition_specs(jax.tree.map(box, bare, specs))
    for got in (delta.partition_specs(split), delta.partition_specs(placed), grafted, delta.partition_specs(none)):
        assert got == want
    assert delta.own(boxed) == delta.own(want)
    shardings = delta.shardings(placed)
    assert by_name(shardings)[f"{layer}.b"] == NamedSharding(mesh, P(None, "model"))
    assert shardings == delta.shardings(split) == delta.shardings(specs, mesh)
    elsewhere = NamedSharding(Mesh(mesh.devices.ravel(), "x"), P())  # where the delta's leaves are does not count
    assert shardings == delta.shardings(jdelta.graft(placed, jax.device_put(delta.own(model.params), elsewhere)))
    trainable, frozen = delta.partition(shardings)
    assert jax.tree.structure(trainable) == jax.tree.structure(delta.own(model.params))
    assert jdelta.combine(trainable, frozen) == shardings
    assert jdelta.prune(shardings, "lora") == split


def test_a_model_with_two_deltas_gets_the_specs_of_both(bert):
    specs = specs_of(bert)
    one, two = jdelta.LoraModel(bert), jdelta.AdapterModel(bert)
    whole = one.partition_specs(specs)
    assert whole == two.partition_specs(specs)
    shapes = jdelta.graft(jdelta.graft(bert.params_shape_tree, one.shapes()), two.shapes())
    assert by_name(whole).keys() == by_name(shapes).keys()
    one.detach()
    assert jdelta.prune(whole, "lora") == two.partition_specs(specs)
    with pytest.raises(ValueError, match=r"own: the tree lacks '.*lora\.a' of delta 'lora'"):
        one.own(two.partition_specs(specs))


def test_a_training_state_is_split_like_its_parameters(bert):
    specs = specs_of(bert)
    delta = jdelta.LoraModel(bert, unfrozen_modules=["classifier"])
    split = delta.partition_specs(specs)
    tx = delta.optimizer(optax.adamw(1e-3))
    params = jdelta.graft(bert.params_shape_tree, delta.shapes())
    state = jax.eval_shape(lambda p: TrainState.create(apply_fn=bert.__call__, params=p, tx=tx), params)
    found = jdelta.state_shardings(state, split)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert found.params == split
    moments = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(found.opt_state)
    }
    assert {
        leaf for name, leaf in moments.items() if name.endswith("mu.bert.encoder.layer.0.attention.self.query.lora.b")
    } == {P(None, "model")}
    assert len(moments) == 2 * 10 + 1


# --- bad input


def changed(tree, name, leaf):
    path = tuple(name.split("."))
    return surgery.unflatten({**surgery.flatten(tree), path: leaf})


def without(tree, name):
    return surgery.unflatten({p: leaf for p, leaf in surgery.flatten(tree).items() if surgery.name_of(p) != name})


KERNEL = "classifier.kernel"  # (16, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t: without(t, KERNEL),
            ValueError,
            r"1 of the backbone's \d+ leaves have no spec, first 'classifier\.k",
        ),
        (
            lambda t: changed(t, "head.kernel", P()),
            ValueError,
            r"1 specs are for leaves that the model lacks, first 'h",
        ),
        (lambda t: changed(t, KERNEL, P(1, 2, 3)), ValueError, r"'classifier\.kernel' of shape \(16, 2\) has 2 axes"),
        (lambda t: changed(t, KERNEL, P("modle")), ValueError, "the mesh no axis 'modle': it has data, fsdp, model"),
        (
            lambda t: changed(t, KERNEL, P(None, ("data", "model"))),
            ValueError,
            r"2 is not divided by the 4 .*data × model",
        ),
        (
            lambda t: changed(t, KERNEL, np.zeros((16, 2))),
            TypeError,
            r"given as a PartitionSpec and 'clas.*' as an array",
        ),
        (
            lambda t: changed(t, KERNEL, "model"),
            TypeError,
            r"'classifier\.kernel' is given as 'model'; expected a Part",
        ),
        (lambda t: P("model"), TypeError, r"expected a tree of specs like the backbone's, got P\."),
    ],
)
def test_specs_that_do_not_fit_name_the_leaf(bert, change, error, message):
    specs = specs_of(bert)
    delta = jdelta.LoraModel(bert)
    with pytest.raises(error, match=message):
        delta.partition_specs(change(specs), MESH)


def test_shardings_need_one_mesh(bert):
    specs = specs_of(bert)
    delta = jdelta.LoraModel(bert)
    with pytest.raises(ValueError, match=r"PartitionSpecs are on no mesh. Pass one: mesh="):
        delta.shardings(specs)
    with pytest.raises(TypeError, match=r"mesh is a jax.sharding.Mesh, got 'model'"):
        delta.shardings(specs, "model")
    one, two = (Mesh(np.array(jax.devices()[:1]), (name,)) for name in ("data", "model"))
    split = jax.tree.map(lambda _: NamedSharding(one, P()), bert.params_shape_tree)
    with pytest.raises(ValueError, match="is on another mesh, data 1, than model 1"):
        delta.shardings(split, two)


# --- on 8 virtual devices


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "llama", "nnx"])
@pytest.mark.slow
def test_on_meshes_losses_agree_bytes_are_as_promised_and_nothing_of_the_backbone_is_sent_more(family):
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = env.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    script = Path(__file__).parent / "on_meshes.py"
    result = subprocess.run([sys.executable, str(script), family], env=env, capture_output=True, text=True, timeout=600)
    assert result.stdout.endswith("done\n"), result.stderr


@pytest.mark.slow
def test_the_figures_of_large_models_are_those_that_the_mesh_promises(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "large_models.py"
    words = ["--config", "llama-tiny", "--mesh", "fsdp=2,model=2", "--layers", "1", "--tokens", "16", "--without-full"]
    command = [sys.executable, str(script), *words, "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (lora,) = json.loads((tmp_path / "figures.json").read_text())
    d, inner, vocabulary, layers, rank = 64, 128, 32000, 6, 8
    kernels = layers * (4 * d * d + 3 * d * inner) + 2 * vocabulary * d
    norms = (2 * layers + 1) * d
    assert lora["backbone of all devices"] == 4 * (kernels + norms)
    assert lora["backbone"] == kernels + 4 * norms  # 4 bytes, 4 devices
    assert lora["delta of all devices"] == 4 * layers * 2 * 2 * rank * d
    assert lora["delta"] == lora["gradients"] == 4 * layers * 2 * 2 * rank * d // 2  # a over fsdp, b over model
    assert lora["optimizer"] == 2 * lora["gradients"] + 4  # two moments, and Adam's count
    assert lora["layers compiled"] == [1, 2, 3]
    assert not {"all-reduce", "all-gather"} & {*lora["of fewer layers"]}
