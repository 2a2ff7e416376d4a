"""A composition computes what its methods attached one by one do, and is one delta: one name, one folder."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import fresh, noisy
from flax import nnx
from test_table_of_methods import EVERY, IDS, Net, arguments_of
from tiers import breadth

import jdelta
from jdelta.trees import surgery

MAM = (
    jdelta.PrefixConfig(prefix_token_num=3, embed_dim=4, mid_dim=4),
    jdelta.ParallelAdapterConfig(
        modified_modules=("ff.w1", "ff.w2"), common_structure=True, bottleneck_dim=4, scaled=4.0
    ),
)


def bert():
    return fresh("bert", "FlaxBertForSequenceClassification")


def config_of(kind):
    cls, arguments = arguments_of(kind)
    return cls.method_class(**{**arguments, **({"token_indices": [5, 12]} if kind == "trainable_tokens" else {})})


def composed_leaf(path, name, kind):
    """Where a leaf of a delta, that is named like its method, is in a composition."""
    i = path.index(kind)
    return (*path[:i], name, kind, *path[i + 1 :])


def logits(model):
    return jax.jit(lambda params: model(IDS, params=params).logits)


@pytest.mark.parametrize("kind", breadth(EVERY, "lora", "vera", "soft_prompt"))
def test_it_computes_what_its_methods_do_that_are_attached_one_by_one(kind, tmp_path):
    kinds = (kind, "hira" if kind == "lora" else "lora")
    one, both = bert(), bert()
    deltas = [jdelta.AutoDeltaModel.from_config(config_of(each), one) for each in kinds]
    delta = jdelta.compose(both, [config_of(each) for each in kinds])
    assert delta.name == "composed"
    assert {*delta.targets} == {name for each in deltas for name in each.targets}
    deltas[0].freeze_module(exclude=["deltas"])
    trains, frozen = deltas[0].partition()
    one.params = jdelta.combine(noisy(trains), frozen)
    values, moved = surgery.flatten(one.params), {}
    for each in deltas:
        moved |= {composed_leaf(path, "composed", each.delta_type): values[path] for path in each.paths}
    assert {*delta.paths} == moved.keys()
    for each in deltas:
        moved |= {path: values[path] for path in each._state.attachment.unfrozen_backbone}
    both.params = surgery.replaced(both.params, moved)

    out = logits(one)(one.params)
    np.testing.assert_allclose(logits(both)(both.params), out, rtol=0, atol=1e-5 * float(jnp.abs(out).max()))
    mine, rest = delta.partition()
    assert sum(leaf.size for leaf in jax.tree.leaves(mine)) == sum(leaf.size for leaf in jax.tree.leaves(trains))
    grads = jax.jit(jax.grad(lambda t: jnp.sum(both(IDS, params=jdelta.combine(t, rest)).logits ** 2)))(mine)
    assert [path for path, leaf in surgery.flatten(grads).items() if not leaf.any()] == []

    delta.save_finetuned(tmp_path / "both")
    again = bert()
    loaded = jdelta.AutoDeltaModel.from_finetuned(tmp_path / "both", again)
    assert loaded.config == (delta.config.materialised() or delta.config)
    np.testing.assert_allclose(again(IDS).logits, both(IDS).logits, rtol=0, atol=1e-6 * float(jnp.abs(out).max()))
    delta.detach()
    bare = surgery.flatten(bert().params)
    assert all(np.array_equal(leaf, bare[path]) for path, leaf in surgery.flatten(both.params).items() if path in bare)
    delta.remove()
    assert jax.tree.structure(both.params) == jax.tree.structure(bert().params)


def test_mix_and_match_is_one_delta_that_is_materialised_and_saved(tmp_path):
    model = bert()
    mam = jdelta.compose(model, MAM, unfrozen_modules=["classifier"], name="mam")
    assert {path[path.index("mam") + 1] for path in mam.paths} == {"prefix", "parallel_adapter"}
    trains, frozen = mam.partition()
    tx = mam.optimizer(optax.adam(1e-2))
    grads = jax.grad(lambda t: jnp.mean(model(IDS, params=jdelta.combine(t, frozen)).logits ** 2))(trains)
    updates, _ = tx.update(grads, tx.init(trains), trains)
    model.params = jdelta.combine(optax.apply_updates(trains, updates), frozen)
    out = model(IDS).logits
    mam.materialise()
    np.testing.assert_allclose(model(IDS).logits, out, rtol=0, atol=1e-6)
    mam.save_finetuned(tmp_path / "mam")
    other = bert()
    jdelta.AutoDeltaModel.from_finetuned(tmp_path / "mam", other)
    np.testing.assert_allclose(other(IDS).logits, out, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="cannot be merged"):
        mam.merge()
    with pytest.raises(ValueError, match="has no method for"):
        mam.to_peft(tmp_path / "peft")


def test_changes_of_weights_merge_together():
    model = bert()
    delta = jdelta.compose(model, [jdelta.LoraConfig(lora_r=2), jdelta.HiraConfig(modified_modules=["key"], r=2)])
    trains, frozen = delta.partition()
    model.params = jdelta.combine(noisy(trains), frozen)
    out = model(IDS).logits
    delta.merge()
    np.testing.assert_allclose(model(IDS).logits, out, rtol=0, atol=1e-5 * float(jnp.abs(out).max()))
    delta.unmerge()
    assert (delta.movement().values > 0).all()


def test_twice_the_same_method_with_penalties_and_budgets():
    model = bert()
    parts = [
        jdelta.AdaLoraConfig(init_r=2, target_r=1, modified_modules=["query"], total_step=4),
        jdelta.AdaLoraConfig(init_r=2, target_r=1, modified_modules=["query", "value"], total_step=4),
    ]
    delta = jdelta.compose(model, parts)
    assert {path[path.index("composed") + 1] for path in delta.paths} == {"adalora", "adalora_2"}
    alone = [jdelta.AutoDeltaModel.from_config(each, bert()).penalty() for each in parts]
    assert float(delta.penalty()) == pytest.approx(float(sum(alone)), rel=0.1)  # of other random values
    state = delta.optimizer(optax.sgd(0.1)).init(model.params)
    kept = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == bool]
    assert sorted(leaf.shape for leaf in kept) == [(2,)] * 6


def test_in_a_scan_and_on_nnx():
    params = jax.jit(Net().init)(jax.random.key(0), IDS)["params"]
    backbone = jdelta.Backbone(Net(), params, dummy_inputs=(IDS,))
    parts = [
        jdelta.PrefixConfig(modified_modules=["attn"], prefix_token_num=2, reparameterize=False),
        jdelta.LoraConfig(lora_r=2, modified_modules=["query", "up"]),
    ]
    delta = jdelta.compose(backbone, parts)
    leaves = surgery.flatten(delta.own(backbone.params))
    assert leaves["layers", "up", "composed", "lora", "a"].shape == (2, 8, 2)
    assert jnp.isfinite(backbone(IDS)).all()

    x = jnp.ones((2, 8))
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 6, rngs=nnx.Rngs(1)))
    bare, graphdef = model(x), nnx.graphdef(model)
    parts = [
        jdelta.LoraConfig(lora_r=2, modified_modules=["0"]),
        jdelta.AdapterConfig(bottleneck_dim=2, modified_modules=["1"], zero_up=True),
    ]
    delta = jdelta.compose(model, parts, dummy_inputs=(x,))
    np.testing.assert_allclose(model(x), bare, atol=1e-6)
    assert len(nnx.to_flat_state(nnx.state(model, delta.filter))) == 6
    delta.remove()
    assert nnx.graphdef(model) == graphdef


@pytest.mark.parametrize(
    ("methods", "kind", "message"),
    [
        ([], ValueError, "two methods or more"),
        ([jdelta.LoraConfig()], ValueError, "two methods or more"),
        ([jdelta.LoraConfig(), "adapter"], TypeError, "got 'adapter'"),
        ([jdelta.LoraConfig(), jdelta.ComposedConfig(methods=MAM)], ValueError, "no ComposedConfig"),
        ([jdelta.LoraConfig(), jdelta.LoraConfig(init_lora_weights="eva")], ValueError, "starts from data"),
        ([jdelta.LoraConfig(), jdelta.AdapterConfig(modified_modules=["qeury"])], ValueError, "qeury"),
        ([jdelta.LoraConfig(rank_pattern={"key": 2}), jdelta.AdapterConfig()], ValueError, "rank_pattern has 'key'"),
        ([{"delta_type": "lorra"}, jdelta.LoraConfig()], ValueError, "Did you mean 'lora'"),
    ],
)
def test_what_cannot_be_composed_is_refused_and_nothing_is_attached(methods, kind, message):
    model = bert()
    before = jax.tree.structure(model.params)
    with pytest.raises(kind, match=message):
        jdelta.compose(model, methods)
    assert jax.tree.structure(model.params) == before


def test_modules_are_named_in_the_methods():
    with pytest.raises(ValueError, match=r"modified_modules belongs to the methods"):
        jdelta.ComposedConfig(methods=MAM, modified_modules=["query"])
    delta = jdelta.compose(bert(), [jdelta.LoraConfig(), jdelta.HiraConfig()], exclude_modules=["layer.0"])
    assert all("layer.1" in name for name in delta.targets)
    with pytest.raises(TypeError, match="attached already"):
        jdelta.compose(bert(), [delta, jdelta.LoraConfig()])


def test_its_configuration_is_json_and_back():
    made = jdelta.ComposedConfig(methods=MAM, unfrozen_modules=["classifier"])
    assert jdelta.AutoDeltaConfig.from_json_string(made.to_json_string()) == made
    assert {*made.parts} == {"prefix", "parallel_adapter"}
