"""Deltas on nnx modules: the module is changed in place, and is what it was when they are off."""

import concurrent.futures
import copy
import dataclasses
import gc
import pickle
import sys
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from nnx_models import IDS, Block, Mixed, Model, Tied, train_deltas

import jdelta
from jdelta.hosts.nnx.adapter import NnxAdapter
from jdelta.methods.lora_rules import LoraRule
from jdelta.trees import surgery

X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)


def model(mode="eval"):
    made = Model(nnx.Rngs(0))
    getattr(made, mode)()
    return made


def bits(tree):
    plain = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return [np.asarray(leaf).tobytes() for leaf in plain]


def lora(backbone, **options):
    return jdelta.LoraModel(backbone, **{"modified_modules": ["up", "down"], "lora_r": 2, **options})


def test_lora_changes_the_module_in_place_and_comes_off_bit_for_bit():
    m = model()
    before, bare, base = nnx.graphdef(m), m(IDS), bits(nnx.state(m))
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(m))]
    delta = lora(m)
    assert delta.targets == ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "stack.up", "stack.down"]
    assert (type(m).__name__, type(m).__doc__) == ("Model", Model.__doc__)
    assert isinstance(m, Model)
    assert {p for p, _ in nnx.to_flat_state(nnx.state(m))} - set(paths) == {
        (*path, "lora", leaf)
        for path in [*(("layers", i, k) for i in (0, 1) for k in ("up", "down")), ("stack", "up"), ("stack", "down")]
        for leaf in ("a", "b")
    }
    assert m.stack.up.lora.a.shape == (3, 4, 2)
    chex.assert_trees_all_equal(m(IDS), bare)
    train_deltas(m)
    changed = m(IDS)
    assert jnp.abs(changed - bare).max() > 0.1
    with delta.disabled():
        chex.assert_trees_all_equal(m(IDS), bare)
    delta.detach()
    chex.assert_trees_all_equal(m(IDS), bare)
    assert nnx.graphdef(m) == before
    assert bits(nnx.state(m)) == base
    delta.attach()
    chex.assert_trees_all_equal(m(IDS), changed)
    delta.merge()
    assert nnx.graphdef(m) == before
    chex.assert_trees_all_close(m(IDS), changed, atol=1e-5)
    delta.unmerge()
    chex.assert_trees_all_equal(m(IDS), changed)
    delta.remove()
    assert nnx.graphdef(m) == before
    assert type(m) is Model
    assert bits(nnx.state(m)) == base


def test_equal_modules_with_equal_deltas_have_equal_graphs_and_compile_once():
    one, other = model(), model()
    for m in (one, other):
        lora(m)
        jdelta.AdapterModel(m, modified_modules=["layers.0", "stack"], bottleneck_dim=2)
    assert nnx.graphdef(one) == nnx.graphdef(other)
    assert hash(nnx.graphdef(one)) == hash(nnx.graphdef(other))
    traced = []
    run = nnx.jit(lambda m, ids: traced.append(1) or m(ids))
    run(one, IDS)
    run(other, IDS)
    assert len(traced) == 1
    with_other_rank = model()
    lora(with_other_rank, lora_alpha=1)
    plain = model()
    lora(plain)
    assert nnx.graphdef(with_other_rank) != nnx.graphdef(plain)


def test_equal_layers_have_equal_graphs():
    m = model()
    lora(m, modified_modules=["up"])
    assert nnx.graphdef(m.layers[0]) == nnx.graphdef(m.layers[1])


@pytest.mark.parametrize("copied", [nnx.clone, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_carry_the_deltas(copied):
    m = model()
    lora(m)
    train_deltas(m)
    other = copied(m)
    chex.assert_trees_all_equal(other(IDS), m(IDS))
    assert nnx.graphdef(other) == nnx.graphdef(m)
    with pytest.warns(UserWarning, match="'lora' of the same arguments"):
        second = lora(other, dummy_inputs=(IDS,))
    assert second.name == "lora_2"
    assert m(IDS).shape == (*IDS.shape, 10)


def test_training_with_the_tools_of_nnx():
    m = model()
    delta = lora(m, lora_dropout=0.1)
    assert hash(delta.filter) == hash(delta.filter)
    frozen = nnx.All(nnx.Param, nnx.Not(delta.filter))
    before = bits(nnx.state(m, frozen))
    optimizer = nnx.Optimizer(m, delta.optimizer(optax.adam(1e-2)), wrt=delta.filter)
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
    traced = []

    @nnx.jit
    def step(m, optimizer, metrics, ids):
        traced.append(1)

        def loss(m):
            return optax.softmax_cross_entropy_with_integer_labels(m(ids), ids + 1).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, delta.filter))(m)
        metrics.update(loss=value)
        optimizer.update(m, grads)
        return grads

    m.eval()
    first = optax.softmax_cross_entropy_with_integer_labels(m(IDS), IDS + 1).mean()
    m.train()
    assert not m.layers[0].up.lora.deterministic
    for _ in range(20):
        grads = step(m, optimizer, metrics, IDS)
    assert len(traced) == 1
    assert {tuple(map(str, path)) for path, _ in nnx.to_flat_state(grads)} == set(delta.paths)
    assert bits(nnx.state(m, frozen)) == before
    m.eval()
    assert m.layers[0].up.lora.deterministic
    chex.assert_trees_all_equal(m(IDS), m(IDS))
    assert optax.softmax_cross_entropy_with_integer_labels(m(IDS), IDS + 1).mean() < first
    assert np.isfinite(metrics.compute()["loss"])


def test_dropout_draws_anew_in_training_and_in_each_layer_of_a_scan():
    m = model()
    lora(m, lora_dropout=0.5)
    train_deltas(m)
    m.eval()
    still = m(IDS)
    m.train()
    m.set_attributes(nnx.Dropout, deterministic=True)
    assert jnp.abs(m(IDS) - m(IDS)).max() > 0
    assert m.stack.up.lora.rngs.key.shape == (3,)
    assert len({int(count) for count in m.stack.up.lora.rngs.count[...]}) == 1
    assert int(m.layers[0].up.lora.rngs.count[...]) == 2
    nnx.reseed(m, policy="match_shape", dropout=1)
    one = m(IDS)
    nnx.reseed(m, policy="match_shape", dropout=1)
    chex.assert_trees_all_equal(m(IDS), one)
    m.eval()
    chex.assert_trees_all_equal(m(IDS), still)


@pytest.mark.parametrize("off", ["disabled", "detached", "merged"])
def test_dropout_goes_on_in_its_mode_with_its_stream_after_a_delta_was_off(off):
    m = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))  # nothing else in it has a mode
    delta = jdelta.LoraModel(m, modified_modules=["layers.0"], lora_r=2, lora_dropout=0.5, dummy_inputs=(X,))
    nnx.reseed(m, dropout=7)
    m(X)
    m.eval()
    state, graphdef = bits(nnx.state(m)), nnx.graphdef(m)
    key = jax.random.key_data(m.layers[0].lora.rngs.key[...])
    if off == "disabled":
        with delta.disabled():
            pass
    else:
        getattr(delta, {"detached": "detach", "merged": "merge"}[off])()
        getattr(delta, {"detached": "attach", "merged": "unmerge"}[off])()
    assert bits(nnx.state(m)) == state
    assert nnx.graphdef(m) == graphdef
    chex.assert_trees_all_equal(jax.random.key_data(m.layers[0].lora.rngs.key[...]), key)


@pytest.mark.parametrize("make", [nnx.view, nnx.with_attributes])
def test_a_view_in_another_mode_is_so_in_the_deltas(make):
    m = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    jdelta.LoraModel(m, modified_modules=["layers.0"], lora_r=2, lora_dropout=0.5, dummy_inputs=(X,))
    train_deltas(m)
    view = make(m, deterministic=True)
    chex.assert_trees_all_equal(view(X), view(X))
    assert not m.layers[0].lora.deterministic
    assert make(view, deterministic=False).layers[0].lora.deterministic is False


def test_dropout_is_in_the_mode_of_what_has_one():
    m = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    m.eval()
    for name in ("one", "other"):
        where = {"modified_modules": ["layers.0"], "dummy_inputs": (X,), "name": name}
        jdelta.LoraModel(m, lora_r=2, lora_dropout=0.5, **where)
        assert getattr(m.layers[0], name).deterministic


def test_state_that_is_split_runs_in_jit_with_donation_and_under_jax_grad():
    m = model()
    delta = lora(m)
    train_deltas(m)
    want = m(IDS)
    graphdef, own, rest = nnx.split(m, delta.filter, ...)

    def run(own, rest):
        return nnx.merge(graphdef, own, rest, copy=True)(IDS)

    grads = jax.grad(lambda own: run(own, rest).sum())(own)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    donated = jax.tree.map(jnp.array, own)
    chex.assert_trees_all_close(jax.jit(run, donate_argnums=0)(donated, rest), want, atol=1e-5)
    trainable, others = delta.partition(nnx.state(m, nnx.Param))
    assert isinstance(trainable, nnx.State)
    assert len(jax.tree.leaves(trainable)) == len(delta.paths)
    chex.assert_trees_all_equal(jdelta.combine(trainable, others), nnx.state(m, nnx.Param))


@pytest.mark.parametrize(
    "where",
    [
        {"modified_modules": ["boxed.a", "pair.0", "pair.1", "plain.x", "seq.layers.0"]},
        {"modified_modules": ["attn.query", "attn.value"]},
        {"modified_parameters": ["experts"]},
        {"modified_parameters": ["weights.0"]},
        {"modified_parameters": ["pair.1.kernel", "plain.x.kernel"]},
    ],
)
def test_wherever_modules_and_parameters_are_merging_computes_the_same(where):
    m = Mixed(nnx.Rngs(0))
    bare, before = m(X), nnx.graphdef(m)
    delta = jdelta.LoraModel(m, lora_r=2, dummy_inputs=(X,), **where)
    chex.assert_trees_all_equal(m(X), bare)
    train_deltas(m)
    changed = m(X)
    assert jnp.abs(changed - bare).max() > 1e-2
    chex.assert_trees_all_close(nnx.jit(lambda m, x: m(x))(m, X), changed, rtol=1e-4, atol=1e-5)
    delta.merge()
    chex.assert_trees_all_close(m(X), changed, rtol=1e-4, atol=1e-5)
    delta.unmerge()
    delta.remove()
    assert nnx.graphdef(m) == before
    chex.assert_trees_all_equal(m(X), bare)


def test_a_table_that_others_share_is_changed_wherever_it_is_read():
    m = Tied(nnx.Rngs(0))
    ids = jnp.array([[1, 2, 3]])
    delta = jdelta.LoraModel(m, modified_parameters=["embed.embedding"], lora_r=2)
    train_deltas(m)
    changed, encoded = m(ids), m.encode(ids)
    stored = m.embed.embedding[...]
    delta.merge()
    assert jnp.abs(m.embed.embedding[...] - stored).max() > 0.1
    chex.assert_trees_all_close((m(ids), m.encode(ids)), (changed, encoded), atol=1e-5)
    delta.unmerge()
    chex.assert_trees_all_equal(m.embed.embedding[...], stored)
    grads = nnx.grad(lambda m: m(ids).sum(), argnums=nnx.DiffState(0, delta.filter))(m)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_saving_and_loading(tmp_path):
    m = model()
    delta = lora(m, unfrozen_modules=["embed"])
    train_deltas(m)
    m.embed.embedding[...] = m.embed.embedding[...] + 0.1
    delta.save_finetuned(tmp_path)
    other = model()
    loaded = jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=other, dummy_inputs=(IDS,))
    chex.assert_trees_all_equal(other(IDS), m(IDS))
    assert loaded.filter == delta.filter
    assert nnx.graphdef(other) == nnx.graphdef(m)


def test_the_structure_is_in_the_order_of_execution():
    structure = jdelta.DeltaModel(model(), dummy_inputs=(IDS,)).structure
    names = ["", "embed", *(f"layers.{i}{part}" for i in (0, 1) for part in ("", ".norm", ".up", ".down", ".drop"))]
    assert list(structure.modules) == [*names, "stack", "stack.norm", "stack.up", "stack.down", "stack.drop"]
    assert structure["stack.up"].calls == 3
    assert structure["layers.1.up"].y.shape == (2, 3, 8)
    assert structure["layers.1.up"].type is nnx.Linear
    assert structure.tied == {"embed"}
    assert structure.callers(structure["layers.0.up"])[0].name == "layers.0"


BAD = {
    "no inputs": (lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {}, ValueError, "dummy_inputs="),
    "inputs that do not fit": (
        lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
        {"dummy_inputs": (jnp.ones((2, 5)),)},
        ValueError,
        r"\(\(2, 5\),\) do not fit Linear",
    ),
    "inputs that are no tuple": (model, {"dummy_inputs": IDS}, TypeError, r"write \(x,\)"),
    "a List": (model, {"modified_modules": ["layers"]}, ValueError, r"a List of modules.*layers\.0, layers\.1"),
    "another name": (model, {"modified_modules": ["same.up"]}, ValueError, r"same object as 'layers\.0\.up'"),
    "a name that is taken": (model, {"name": "drop", "modified_modules": ["up"]}, ValueError, "'drop' is the name"),
    "an attribute's name": (model, {"name": "eval", "modified_modules": ["up"]}, ValueError, "attribute 'eval'"),
    "a norm": (model, {"modified_modules": ["norm"]}, TypeError, r"layers\.0\.norm"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_what_is_wrong_and_changes_nothing(case):
    make, options, error, message = BAD[case]
    m = make()
    before, base = nnx.graphdef(m), bits(nnx.state(m))
    with pytest.raises(error, match=message):
        jdelta.LoraModel(m, lora_r=2, **options)
    assert nnx.graphdef(m) == before
    assert bits(nnx.state(m)) == base


def test_a_tree_that_lacks_a_parameter_changes_nothing():
    m = Block(4, nnx.Rngs(0))
    lora(m, modified_modules=["down"], dummy_inputs=(X,))
    adapter, before = NnxAdapter(m), bits(nnx.state(m))
    lacking = {key: part for key, part in adapter.params.items() if key not in ("down", "up")}
    with pytest.raises(ValueError, match=r"lacks 'down\.bias'"):
        adapter.params = lacking
    assert bits(nnx.state(m)) == before
    with pytest.raises(ValueError, match=r"lacks 'norm\.bias'"):
        adapter.params = jdelta.prune({**adapter.params, "norm": {}}, "lora")
    assert bits(nnx.state(m)) == before


def test_dummy_inputs_belong_to_nnx_modules(bert):
    with pytest.raises(TypeError, match="dummy_inputs belong to an nnx module"):
        jdelta.LoraModel(bert, dummy_inputs=(IDS,))


def test_a_model_with_other_lora_is_refused():
    class WithLora(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    with pytest.raises(ValueError, match=r"WithLora carries LoRA already.*'linear\.lora\.lora_a'"):
        jdelta.AdapterModel(WithLora(nnx.Rngs(0)), modified_modules=["linear"], dummy_inputs=(X,))


def test_parts_and_wholes_cannot_both_carry_deltas():
    m = model()
    delta = lora(m)
    with pytest.raises(ValueError, match="Block is a part of a model that carries deltas"):
        lora(m.layers[0], dummy_inputs=(X,))
    delta.remove()
    lora(m.layers[0], dummy_inputs=(X,))
    with pytest.raises(ValueError, match=r"'layers\.0' of this Model carries deltas"):
        lora(m)


def test_changing_what_is_attached_inside_a_traced_function_is_refused():
    m = model()
    delta = lora(m)
    train_deltas(m)
    want = m(IDS)
    for change in (
        lambda: nnx.jit(lambda m: jdelta.AdapterModel(m, modified_modules=["up"]).name)(m),
        lambda: nnx.jit(lambda m: delta.detach())(m),
        lambda: jax.jit(lambda x: delta.detach())(1.0),
        lambda: nnx.grad(lambda m: delta.disabled().__enter__())(m),
    ):
        with pytest.raises(RuntimeError, match="Model is changed while a function is traced"):
            change()
    chex.assert_trees_all_equal(m(IDS), want)


def test_a_state_without_the_delta_is_an_error_that_names_the_leaf():
    m = model()
    lora(m)
    graphdef, state = nnx.split(m.layers[0].up)
    lacking = jdelta.prune(state, [("lora", "a"), ("lora", "b")])
    with pytest.raises(ValueError, match=r"lora|leaves"):
        nnx.merge(graphdef, lacking)(X)
    del m.layers[0].up.lora
    with pytest.raises(ValueError, match=r"delta 'lora' is attached.*lora\.a"):
        m(IDS)


def test_edits_by_hand_before_after_beside_and_in_place_of_modules():
    m = model()
    bare = m(IDS)
    delta = jdelta.DeltaModel(m)
    delta.insert_sequential_module("layers.0.up", nn.Dense(8))
    delta.insert_sequential_module("layers.1.up", nn.Dense(4), where="before")
    delta.insert_parallel_module("layers.1.down", nn.Dense(4), start="layers.1.up")
    delta.replace_module("layers.0.norm", nn.LayerNorm())
    own = surgery.flatten(delta.shapes())
    assert own[("layers", "1", "down", "delta", "kernel")].shape == (4, 4)
    changed = m(IDS)
    assert jnp.abs(changed - bare).max() > 1e-3
    grads = nnx.grad(lambda m: m(IDS).sum(), argnums=nnx.DiffState(0, delta.filter))(m)
    assert len(jax.tree.leaves(grads)) == len(delta.paths) == 8
    delta.remove()
    chex.assert_trees_all_equal(m(IDS), bare)


def test_a_span_out_of_a_transformation_is_refused():
    m = model()
    with pytest.raises(ValueError, match=r"span from layers\.0\.up to layers\.1\.down"):
        jdelta.ParallelAdapterModel(m, modified_modules=["layers.0.up", "layers.1.down"], bottleneck_dim=2)
    assert type(m) is Model
    assert isinstance(m.layers[0], Block)


def test_shapes_suffice():
    m = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    delta = lora(m, dummy_inputs=(IDS,))
    assert isinstance(m.stack.up.lora.a.get_raw_value(), jax.ShapeDtypeStruct)
    assert len(delta.paths) == 12


class WithoutBias(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.norm = nnx.RMSNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


def test_merged_biases_of_bitfit_are_the_modules_own():
    m = WithoutBias(nnx.Rngs(0))
    before = nnx.graphdef(m)
    delta = jdelta.BitFitModel(m, modified_modules=["linear", "norm"], dummy_inputs=(X,))
    train_deltas(m)
    changed = m(X)
    delta.merge()
    chex.assert_trees_all_close(m(X), changed, atol=1e-6)
    assert m.linear.use_bias
    delta.unmerge()
    chex.assert_trees_all_equal(m(X), changed)
    delta.detach()
    assert nnx.graphdef(m) == before
    delta.attach()
    delta.merge()
    delta.remove()
    chex.assert_trees_all_close((m(X), nnx.clone(m)(X)), (changed, changed), atol=1e-6)


def test_what_a_delta_generates_for_many_modules_is_made_in_each_run():
    m = model()
    bare = m(IDS)
    delta = jdelta.CompacterModel(
        m,
        modified_modules=["layers.0", "stack"],
        reduction_factor=1,
        hypercomplex_division=2,
        shared_phm_rule=True,
        shared_W_phm=True,
    )
    assert ("compacter", "phm_rule") in delta.paths
    train_deltas(m)
    changed = m(IDS)
    assert jnp.abs(changed - bare).max() > 1e-2
    chex.assert_trees_all_close(nnx.jit(lambda m: m(IDS))(m), changed, rtol=1e-4, atol=1e-4)
    grads = nnx.grad(lambda m: m(IDS).sum(), argnums=nnx.DiffState(0, delta.filter))(m)
    assert len(jax.tree.leaves(grads)) == len(delta.paths)
    delta.remove()
    chex.assert_trees_all_equal(m(IDS), bare)


class _InLinen(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.bridge.ToNNX(nn.Dense(4), rngs=rngs).lazy_init(X)

    def __call__(self, x):
        return self.up(x)


@pytest.mark.parametrize(
    ("made", "put"),
    [
        (lambda: _InLinen(nnx.Rngs(0)), jdelta.LoraModel),
        (
            lambda: nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0))),
            lambda m, **options: jdelta.CompacterModel(
                m, reduction_factor=2, hypercomplex_division=2, shared_phm_rule=True, **options
            ),
        ),
    ],
    ids=["in linen", "generated"],
)
def test_threads_can_share_a_model_whose_runs_change_attributes(made, put):
    m = made()
    put(m, modified_modules=["up" if isinstance(m, _InLinen) else "layers.0"], dummy_inputs=(X,))
    train_deltas(m)
    want, before = m(X), [dict(vars(module)) for _, module in nnx.iter_modules(m)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            outputs = list(threads.map(m, [X] * 40))
    finally:
        sys.setswitchinterval(interval)
    for output in outputs:
        chex.assert_trees_all_close(output, want)
    assert [dict(vars(module)) for _, module in nnx.iter_modules(m)] == before


def test_inputs_of_modules_are_seen_in_batches():
    @dataclasses.dataclass(frozen=True)
    class Total(jdelta.DataStart):
        sums = "inputs"

        def of_inputs(self, x):
            return {"total": jnp.sum(x, axis=0, keepdims=True)}

        def init(self, edit, key, weight, own, sums):
            return {"a": jnp.broadcast_to(sums["total"].T / sums["count"], own["a"].shape)}

    class FromInputs(jdelta.Method):
        def rule(self, name):
            return LoraRule(2, 1.0)

        def data_start(self):
            return Total()

    m = Mixed(nnx.Rngs(0))
    made = dataclasses.dataclass(frozen=True)(FromInputs)()
    delta = jdelta.DeltaModel(m, method=made, modified_modules=["boxed.a"], dummy_inputs=(X,))
    delta.init_from_data([X, X + 2])
    np.testing.assert_allclose(m.boxed["a"].delta.a[...], jnp.broadcast_to(X.mean(0)[:, None] + 1, (4, 2)), rtol=1e-6)


def test_a_module_that_is_no_longer_referenced_is_freed():
    m = model()
    delta = lora(m)
    delta.detach()
    delta.attach()
    gone = weakref.ref(m)
    del m, delta
    gc.collect()
    assert gone() is None


def test_a_module_whose_attributes_refer_to_itself_is_freed_too():
    class Refers(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.activation = nnx.Linear(4, 4, rngs=rngs), self.relu

        def relu(self, x):
            return nnx.relu(x)

        def __call__(self, x):
            return self.activation(self.linear(x))

    m = Refers(nnx.Rngs(0))
    delta = lora(m, modified_modules=["linear"], dummy_inputs=(X,))
    gone = weakref.ref(m)
    del m, delta
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda delta: pickle.loads(pickle.dumps(delta))])
def test_copies_of_a_delta_share_their_model_with_deltas_that_come_later(copied):
    m = Block(4, nnx.Rngs(0))
    m.eval()
    delta = lora(m, modified_modules=["up"], dummy_inputs=(X,))
    train_deltas(m)
    want = m(X)
    delta.detach()
    other = copied(delta)
    second = lora(other.backbone_model, modified_modules=["down"])  # it knows the inputs
    other.attach()
    chex.assert_trees_all_close(other.backbone_model(X), want)
    second.remove()
    other.detach()
    assert other.backbone_model is not m


def test_layers_that_are_alike_share_a_trace_and_each_has_its_own_leaves():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            run = nnx.remat(lambda layer, x: layer(x))  # one function for all: jax traces it once
            for layer in self.layers:
                x = run(layer, x)
            return x

    m = Twice(nnx.Rngs(0))
    lora(m, modified_modules=["0", "1"], dummy_inputs=(X,))
    jdelta.AdapterModel(m, modified_modules=["0", "1"], bottleneck_dim=2)
    train_deltas(m)
    changed = m(X)
    for layer in m.layers:
        layer.lora.a[...] *= 0
        assert jnp.abs(m(X) - changed).max() > 1e-3
        changed = m(X)
        layer.adapter.up.kernel[...] *= 0
        assert jnp.abs(m(X) - changed).max() > 1e-3
        changed = m(X)


class Encoding(nnx.Module):
    """A table that is read by another method than `__call__`."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)

    def encode(self, ids):
        return self.embed(ids)


class OfEncoding(nnx.Module):
    def __init__(self, rngs):
        self.table = Encoding(rngs)

    def __call__(self, ids):
        return self.table.encode(ids)


def test_a_layer_at_another_method_of_a_module():
    m = OfEncoding(nnx.Rngs(0))
    ids = jnp.array([[1, 2, 3]])
    bare = m(ids)
    delta = jdelta.DeltaModel(m)
    delta.insert_sequential_module("table", BottleneckLike(), method="encode")
    assert delta.paths == (("table", "delta", "w"),)
    chex.assert_trees_all_close(m(ids), 2 * bare)
    delta.detach()
    chex.assert_trees_all_equal(m(ids), bare)


class BottleneckLike(nn.Module):
    """Twice its input, with a leaf that says where it is sharded."""

    @nn.compact
    def __call__(self, y):
        return y + y * self.param("w", nn.initializers.ones, y.shape[-1:])

    def sharding_axes(self, host, x, y):
        return {"w": y[-1:]}


class Scanned(nnx.Module):
    """A stack that a function of the file runs, whose traces jax keeps."""

    def __init__(self, rngs):
        make = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: Block(4, rngs), in_axes=0, out_axes=0))
        self.blocks = make(rngs)

    def __call__(self, x):
        return run_blocks(self.blocks, x)


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def run_blocks(block, x):
    return block(x)


def test_what_was_traced_for_an_earlier_delta_does_not_serve_the_check_of_the_next():
    for _ in range(2):
        m = Scanned(nnx.Rngs(0))
        delta = jdelta.LoraModel(m, modified_parameters=["up.kernel"], lora_r=2, dummy_inputs=(X,))
        assert delta.targets == ["blocks.up.kernel"]


def test_dropout_in_another_trace_than_the_model_s_says_what_to_do():
    m = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    delta = lora(m, modified_modules=["layers.0"], lora_dropout=0.1, dummy_inputs=(X,))
    graphdef, own, rest = nnx.split(m, delta.filter, ...)
    with pytest.raises(RuntimeError, match=r"(?s)'lora' at layers\.0.*model\.eval\(\).*copy=True"):
        jax.grad(lambda own: nnx.merge(graphdef, own, rest)(X).sum())(own)
    m.eval()
    graphdef, own, rest = nnx.split(m, delta.filter, ...)
    jax.grad(lambda own: nnx.merge(graphdef, own, rest)(X).sum())(own)


def test_a_list_that_is_called_is_a_module_like_any_other():
    class Stack(nnx.List):
        def __call__(self, x):
            for layer in self:
                x = layer(x)
            return x

    class Around(nnx.Module):
        def __init__(self, rngs):
            self.layers = Stack([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            return self.layers(x)

    m = Around(nnx.Rngs(0))
    bare = m(X)
    delta = jdelta.AdapterModel(m, modified_modules=["layers"], bottleneck_dim=2, dummy_inputs=(X,))
    train_deltas(m)
    assert {path[:2] for path in delta.paths} == {("layers", "adapter")}
    assert jnp.abs(m(X) - bare).max() > 1e-3
    delta.remove()
    chex.assert_trees_all_equal(m(X), bare)
    assert lora(m.layers, modified_modules=["0"], dummy_inputs=(X,)).targets == ["0"]


def test_modules_without_the_tree_of_nnx_carry_deltas_too():
    class Plain(nnx.Module, pytree=False):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    m = Plain(nnx.Rngs(0))
    before, bare = nnx.graphdef(m), m(X)
    delta = lora(m, modified_modules=["linear"], dummy_inputs=(X,))
    train_deltas(m)
    assert jnp.abs(m(X) - bare).max() > 1e-3
    delta.remove()
    assert nnx.graphdef(m) == before
    chex.assert_trees_all_equal(m(X), bare)


def test_messages_do_not_send_users_of_a_module_to_parameters_that_it_has_not(tmp_path):
    m = model()
    delta = lora(m, modified_modules=["layers.0.up"])
    with pytest.raises(ValueError, match=r"the model itself holds the values from before training"):
        delta.save_finetuned(tmp_path / "out")
    del m.layers[0].up.lora
    with pytest.raises(ValueError, match=r"the model lacks 'layers\.0\.up\.lora\.a'"):
        delta.detach()


@dataclasses.dataclass(frozen=True)
class TableRule:
    """A rule that has no hash."""

    table: list

    def init(self, key, weight):
        return {"a": jnp.ones(weight.shape)}

    def update(self, weight, own):
        return self.table[0] * own["a"]


@dataclasses.dataclass(frozen=True)
class TableMethod(jdelta.Method):
    def rule(self, name):
        return TableRule([2.0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_with_a_rule_that_has_no_hash_is_no_equal_of_the_model_that_it_is_of(copied):
    """A key with the id of the rule would be equal, and of another rule once that is gone."""
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    jdelta.DeltaModel(model, ["layers.0"], method=TableMethod(), dummy_inputs=(X,))
    other = copied(model)
    assert nnx.graphdef(model) == nnx.graphdef(nnx.clone(model))
    assert nnx.graphdef(model) != nnx.graphdef(other)
    np.testing.assert_array_equal(model(X), other(X))


class NnxLayer(jdelta.Method):
    def edits(self, host, structure):
        yield jdelta.CallEdit(host.path, "after", nnx.Linear(4, 4, rngs=nnx.Rngs(0)))


def test_a_layer_that_is_an_nnx_module_is_refused():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"at layers\.0 \(Linear\): the layer of a CallEdit .*got Linear"):
        jdelta.DeltaModel(model, ["layers.0"], method=NnxLayer(), dummy_inputs=(X,))
    assert nnx.graphdef(model) == nnx.graphdef(nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0))))
