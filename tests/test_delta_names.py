"""Own leaves are known by their paths, and never by a name that a backbone or another delta may have too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh, noisy, train_deltas
from flax import linen as nn
from tiers import breadth

import jdelta
from jdelta.saved.finetuned import Finetuned


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="out")(nn.LayerNorm(name="norm", use_scale=False)(nn.Dense(8, name="up_first")(x)))


class Scale(nn.Module):
    @nn.compact
    def __call__(self, y):
        return y * self.param("scale", nn.initializers.ones, (y.shape[-1],))


class Down(nn.Module):
    @nn.compact
    def __call__(self, y):
        return nn.Dense(8, name="down")(y)


class ScaleConfig(jdelta.Method):
    delta_type = "scale_of_a_test"

    def edits(self, host, structure):
        yield jdelta.CallEdit(host.path, "after", Scale())


class ScaleModel(jdelta.DeltaModel):
    method_class = ScaleConfig


X = jnp.ones((2, 3))


def own(found):
    return {name for name in found.values if found.is_own(name)}


@pytest.fixture
def net():
    return jdelta.Backbone(Net(), Net().init(jax.random.key(0), X)["params"], dummy_inputs=(X,))


METHODS = {
    "lora": {},
    "adapter": {},
    "parallel_adapter": {},
    "low_rank_adapter": {"reduction_factor": 2},
    "compacter": {"reduction_factor": 2, "hypercomplex_division": 2},
    "compacter, shared": {
        "reduction_factor": 2,
        "hypercomplex_division": 2,
        "shared_W_phm": True,
        "shared_phm_rule": True,
    },
    "bitfit": {},
    "prefix": {"embed_dim": 4, "mid_dim": 4},
    "prefix, plain": {"reparameterize": False},
    "soft_prompt": {"soft_token_num": 2},
}


@pytest.mark.parametrize("method", breadth(METHODS, "lora"))
def test_every_method_is_pruned_by_itself_by_its_paths_and_by_the_name_that_it_gives_itself(method):
    model = fresh("t5", "FlaxT5ForConditionalGeneration")  # has no biases
    config = jdelta.AutoDeltaConfig.from_dict({"delta_type": method.partition(",")[0], **METHODS[method]})
    before = jax.tree.structure(model.params)
    delta = jdelta.AutoDeltaModel.from_config(config, model)
    for by in (delta, delta.paths, map(".".join, delta.paths), delta.shapes(), delta.name):
        assert jax.tree.structure(jdelta.prune(model.params, by)) == before


def test_the_second_of_two_deltas_is_pruned_alone_and_both_at_once(bert):
    bare = jax.tree.structure(bert.params)
    first = jdelta.LoraModel(bert, modified_modules=["query"])
    one = jax.tree.structure(bert.params)
    second = jdelta.LoraModel(bert, modified_modules=["query", "value"])
    assert jax.tree.structure(jdelta.prune(bert.params, second)) == one
    assert jax.tree.structure(jdelta.prune(bert.params, second.name)) == one
    assert jax.tree.structure(jdelta.prune(bert.params, second, first)) == bare
    second.detach()
    whole = {"params": bert.params, "batch_stats": {}}
    assert jax.tree.structure(jdelta.prune(whole, first)["params"]) == bare


def test_a_tree_of_collections_keeps_the_others():
    params = {"params": {"d": {"kernel": 1, "lora": {"a": 2, "b": 3}}}, "batch_stats": {"lora": 4}}
    with pytest.raises(ValueError, match="batch_stats"):
        jdelta.prune(params, "lora")
    pruned = {"params": {"d": {"kernel": 1}}, "batch_stats": {"lora": 4}}
    assert jdelta.prune(params, [("d", "lora", "a"), "d.lora.b"]) == pruned


@pytest.mark.parametrize(
    "name",
    breadth(
        ["a", "b", "bias", "kernel", "query", "classifier", "dense", "layer", "0", "embeddings"], "a", "bias", "layer"
    ),
)
def test_a_name_that_parts_of_the_backbone_or_of_deltas_have_prunes_nothing(bert, name):
    bare = bert.params
    jdelta.LoraModel(bert)
    with pytest.raises(ValueError, match=rf"'{name}' may name a part of the backbone.*Pass the delta"):
        jdelta.prune(bert.params, name)
    if name not in ("a", "b"):
        with pytest.raises(ValueError, match=rf"'{name}' may name a part of the backbone"):
            jdelta.prune(bare, name)


@pytest.mark.slow
def test_another_name_prunes_what_is_lora_beyond_doubt_and_nothing_else(bert):
    bare = jax.tree.structure(bert.params)
    movies = jdelta.LoraModel(bert, name="movies")
    assert jax.tree.structure(jdelta.prune(bert.params, "movies")) == bare
    movies.detach()
    by_hand = jdelta.AdapterModel(bert, name="tweets")
    with pytest.raises(ValueError, match="Pass the delta"):
        jdelta.prune(bert.params, "tweets")
    assert jax.tree.structure(jdelta.prune(bert.params, by_hand)) == bare


@pytest.mark.parametrize("wrong", [3, None, [3], [("a", 3.5)], []])
def test_prune_takes_deltas_and_paths(wrong):
    with pytest.raises(TypeError, match="expected a delta, its name, or the paths"):
        jdelta.prune({"d": {"kernel": 1}}, wrong)


def test_prune_of_paths_that_are_not_there_is_an_error():
    with pytest.raises(ValueError, match="no leaf of this delta"):
        jdelta.prune({"d": {"kernel": 1}}, [("d", "lora", "a")])


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_name_of_another_deltas_leaf_is_refused_and_so_is_one_of_its_own(bert, name):
    before = bert.params
    with pytest.raises(ValueError, match=rf"cannot be named '{name}'.*query\.{name}\.{name}"):
        jdelta.LoraModel(bert, modified_modules=["query"], name=name)
    assert bert.params is before
    jdelta.LoraModel(bert)
    with pytest.raises(ValueError, match=f"'{name}' is the name of a part of delta 'lora'"):
        jdelta.LoraModel(bert, name=name)
    with pytest.raises(ValueError, match=f"'{name}' is the name of a part of delta 'lora'"):
        jdelta.AdapterModel(bert, name=name)


def test_names_inside_layers_that_were_put_in_by_hand_and_inside_generators_are_refused(net, bert):
    extra = jdelta.DeltaModel(net, name="extra")
    extra.insert_sequential_module("out", nn.Sequential([nn.Dense(8), nn.Dense(8)]))
    for name in ("layers_1", "bias"):
        with pytest.raises(ValueError, match=f"'{name}' is the name of a part of"):
            jdelta.LoraModel(net, modified_modules=["out"], name=name)
    jdelta.PrefixModel(bert, embed_dim=4, mid_dim=4)
    for name in ("keys", "embed", "down"):
        with pytest.raises(ValueError, match=f"'{name}' is the name of a part of delta 'prefix'"):
            jdelta.LoraModel(bert, name=name)


def test_leaves_that_bear_the_name_of_an_earlier_delta_are_refused(net):
    jdelta.LoraModel(net, modified_modules=["out"], name="down")
    extra = jdelta.DeltaModel(net, name="extra")
    before = net.module, net.params
    with pytest.raises(ValueError, match=r"up_first\.adapter\.down.* named 'down'"):
        jdelta.AdapterModel(net, modified_modules=["up_first"])
    with pytest.raises(ValueError, match=r"named 'down'"):
        extra.insert_sequential_module("out", Down())
    assert (net.module, net.params) == before


def test_a_method_called_like_its_own_leaf_takes_the_next_name(net, monkeypatch):
    monkeypatch.setattr(ScaleConfig, "delta_type", "scale")
    first, second = (ScaleModel(net, modified_modules=["out"]) for _ in range(2))
    assert (first.name, second.name) == ("scale_2", "scale_3")
    assert first.paths == (("out", "scale_2", "scale"),)
    with pytest.raises(ValueError, match="'scale' is the name of a part of delta 'scale_2'"):
        ScaleModel(net, modified_modules=["up_first"], name="scale")


def test_only_own_leaves_are_renamed(tmp_path, net):
    """The name of the delta is that of a part of the other backbone."""

    class Other(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="head")(Net(name="task")(x))

    other = Other()
    backbone = jdelta.Backbone(other, other.init(jax.random.key(1), X)["params"], dummy_inputs=(X,))
    delta = jdelta.LoraModel(backbone, modified_modules=["out"], unfrozen_modules=["task.up_first"])
    train_deltas(delta)
    found = delta.finetuned()
    renamed = found.renamed("movies").renamed("task").renamed("task_2")
    assert {*renamed.values} == {*found.renamed("task_2").values}
    assert own(renamed) == {"task.out.task_2.a", "task.out.task_2.b"}
    assert {name for name in renamed.values if not renamed.is_own(name)} == {
        "task.up_first.kernel",
        "task.up_first.bias",
    }
    twice = found.renamed("task")  # a name that the backbone has
    twice.save(tmp_path)
    read = Finetuned.read(tmp_path)
    assert own(read) == own(twice) == {"task.out.task.a", "task.out.task.b"}
    bare = jdelta.Backbone(other, other.init(jax.random.key(1), X)["params"], dummy_inputs=(X,))
    again = jdelta.AutoDeltaModel.from_finetuned(tmp_path, bare)
    assert again.name == "lora"
    assert jnp.array_equal(bare(X), backbone(X))


def test_what_an_earlier_version_named_like_a_leaf_loads_under_another_name(net):
    values = {"out.a.a": np.ones((8, 8), np.float32), "out.a.b": np.ones((8, 8), np.float32)}
    config = jdelta.LoraConfig(modified_modules=("out",))
    old = Finetuned("a", config, values, ("out",))
    delta = jdelta.AutoDeltaModel.from_finetuned(old, net)
    assert delta.paths == (("out", "lora", "a"), ("out", "lora", "b"))
    assert (net.params["out"]["lora"]["b"] == 1).all()
    assert own(old.renamed("b")) == {"out.b.a", "out.b.b"}


def test_own_leaves_that_the_name_does_not_tell_are_saved_as_such(tmp_path):
    values = {"out.mine.a": np.ones(2), "out.bias": np.ones(2)}
    found = Finetuned("lora", jdelta.LoraConfig(), values, ("out",), own=frozenset({"out.mine.a"}))
    found.renamed("task").save(tmp_path)
    assert own(Finetuned.read(tmp_path)) == {"out.mine.a"}


@pytest.mark.slow
def test_shared_leaves_at_the_root_are_own_and_are_renamed(bert):
    shared = METHODS["compacter, shared"]
    delta = jdelta.CompacterModel(bert, **shared)
    bert.params = noisy(bert.params)
    found = delta.finetuned()
    assert {*map(".".join, delta.paths)} == own(found)
    assert own(Finetuned(found.name, found.config, found.values, found.targets)) == own(found)
    again = fresh("bert", "FlaxBertForSequenceClassification")
    other = jdelta.AutoDeltaModel.from_finetuned(found, again, name="other", check_hash=False)
    assert {path[0] for path in other.paths if len(path) == 2} == {"other"}
