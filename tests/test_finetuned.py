"""What training leaves behind, in folders: every bit comes back, a crash loses nothing, and damage is told."""

import contextlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, fresh, noisy, train_deltas
from flax import linen as nn
from matrix import METHODS
from safetensors.numpy import load_file, save_file
from tiers import breadth

import jdelta
from jdelta.hosts.linen.instrument import attachments_of
from jdelta.saved import folder
from jdelta.saved.finetuned import _checksum
from jdelta.trees import fingerprint, surgery

IDS = jnp.array([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def bert(**kwargs):
    return fresh("bert", "FlaxBertForSequenceClassification", **kwargs)


def trained_lora(model, seed: int = 0, **kwargs):
    """A LoRA with values that training might leave, and a classifier head that trained with it."""
    delta = jdelta.LoraModel(model, **kwargs)
    delta.freeze_module(["deltas", "classifier"])
    train_deltas(delta, seed)
    return delta


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a trained LoRA, and the logits of its model."""
    model = bert()
    path = tmp_path_factory.mktemp("saved") / "lora"
    trained_lora(model).save_finetuned(path)
    return path, model(IDS).logits


def untouched(model, before):
    """Whether a model carries no delta and has the leaves that it had."""
    chex.assert_trees_all_equal(model.params, before)
    return not attachments_of(model.module)


# --- every bit comes back


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", breadth(METHODS, "lora", "bitfit"))
def test_every_method_comes_back_bit_for_bit(method, dtype, tmp_path):
    cls, arguments = METHODS[method]
    model = bert()
    delta = cls(model, **arguments)
    train_deltas(delta)
    if method == "prefix":
        delta.materialise()  # as it is saved
    trainable, frozen = delta.partition()
    trainable = jax.tree.map(lambda a: a.astype(dtype), trainable)
    model.params = jdelta.combine(trainable, frozen)
    delta.save_finetuned(tmp_path / "out")

    again = bert()
    told = pytest.warns(UserWarning, match="narrower dtype") if dtype == jnp.bfloat16 else contextlib.nullcontext()
    with told:
        loaded = jdelta.AutoDeltaModel.from_finetuned(tmp_path / "out", backbone_model=again, check_hash=True)
    assert type(loaded) is cls
    assert loaded.config == delta.config
    assert loaded.targets == delta.targets
    chex.assert_trees_all_equal(again.params, model.params)
    chex.assert_trees_all_equal_dtypes(again.params, model.params)
    np.testing.assert_array_equal(again(IDS).logits, model(IDS).logits)


def test_a_prefix_is_saved_as_what_its_network_made_and_the_live_one_stays(tmp_path):
    model = bert()
    delta = jdelta.PrefixModel(model, embed_dim=3, mid_dim=4)
    train_deltas(delta)
    before, expected = model.params, model(IDS).logits
    delta.save_finetuned(tmp_path)
    chex.assert_trees_all_equal(model.params, before)
    assert delta.config.reparameterize
    again = bert()
    loaded = jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=again)
    assert not loaded.config.reparameterize
    np.testing.assert_allclose(again(IDS).logits, expected, rtol=1e-5, atol=1e-6)  # two programs: but for rounding


AXIS = {nn.PARTITION_NAME: "layers"}


class Scanned(nn.Module):
    """Three layers in one scan, their kernels in boxes that name the axes."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3, metadata_params=AXIS
        )
        return layers(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return x + nn.Dense(4, kernel_init=init, name="dense")(x), None


def scanned():
    module, x = Scanned(), jnp.ones((2, 4))
    return jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))


def test_a_scanned_model_with_boxed_leaves(tmp_path):
    model = scanned()
    delta = jdelta.LoraModel(model, modified_modules=["dense"], unfrozen_modules=["kernel"], lora_r=2)
    model.params = noisy(model.params)
    delta.save_finetuned(tmp_path)
    again = scanned()
    jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=again, check_hash=False)
    own = again.params["layers"]["dense"]
    assert own["lora"]["a"].shape == (3, 4, 2)
    assert isinstance(own["kernel"], nn.Partitioned)
    np.testing.assert_array_equal(own["kernel"].value, model.params["layers"]["dense"]["kernel"].value)
    np.testing.assert_array_equal(own["lora"]["a"], model.params["layers"]["dense"]["lora"]["a"])


IN_A_SCAN = {
    "lora": (jdelta.LoraModel, {"lora_r": 2}),
    "adapter": (jdelta.AdapterModel, {"bottleneck_dim": 3}),
    "parallel_adapter": (jdelta.ParallelAdapterModel, {"modified_modules": ["dense", "dense"], "bottleneck_dim": 3}),
    "low_rank_adapter": (jdelta.LowRankAdapterModel, {"reduction_factor": 2}),
    "compacter": (jdelta.CompacterModel, {"reduction_factor": 2, "hypercomplex_division": 2, "shared_phm_rule": True}),
    "bitfit": (jdelta.BitFitModel, {}),
}


@pytest.mark.parametrize("method", breadth(IN_A_SCAN, "lora"))
def test_every_method_that_fits_into_a_scan(method, tmp_path):
    cls, arguments = IN_A_SCAN[method]
    model = scanned()
    delta = cls(model, **{"modified_modules": ["dense"], **arguments})
    train_deltas(delta)
    delta.save_finetuned(tmp_path)
    again = scanned()
    jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=again, check_hash=True)
    chex.assert_trees_all_equal(again.params, model.params)


def test_a_head_and_what_trains_come_back(saved):
    path, logits = saved
    model = bert()
    delta = jdelta.AutoDeltaModel.from_finetuned(path, backbone_model=model)
    np.testing.assert_array_equal(model(IDS).logits, logits)
    trains = {surgery.name_of(p) for p in surgery.flatten(delta.partition()[0])}
    assert {"classifier.kernel", "classifier.bias"} < trains
    assert len(trains) == 2 + 2 * 4


def test_a_head_alone(tmp_path):
    model = bert()
    delta = jdelta.DeltaModel(model)
    delta.freeze_module(["classifier"])
    train_deltas(delta)
    delta.save_finetuned(tmp_path)
    again = bert()
    loaded = jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=again, check_hash=True)
    np.testing.assert_array_equal(again(IDS).logits, model(IDS).logits)
    assert set(loaded.partition()[0]) == {"classifier"}


def test_a_delta_beside_others_is_saved_alone(tmp_path):
    model = bert()
    first, second = jdelta.LoraModel(model), jdelta.AdapterModel(model, bottleneck_dim=3)
    second.freeze_module(["deltas"])
    train_deltas(second)
    first.save_finetuned(tmp_path)
    assert all("adapter" not in name for name in load_file(tmp_path / folder.TENSORS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = bert()
        jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=again)
    second.detach()
    np.testing.assert_array_equal(again(IDS).logits, model(IDS).logits)


def test_two_saved_deltas_of_one_name_on_one_model(saved, tmp_path):
    model = bert()
    one = jdelta.AutoDeltaModel.from_finetuned(saved[0], backbone_model=model)
    two = jdelta.AutoDeltaModel.from_finetuned(saved[0], backbone_model=model)
    three = jdelta.AutoDeltaModel.from_finetuned(saved[0], backbone_model=model, name="extra")
    assert [one.name, two.name, three.name] == ["lora", "lora_2", "extra"]
    one.detach()
    three.detach()
    np.testing.assert_array_equal(model(IDS).logits, saved[1])


def test_a_method_of_ones_own_and_layers_put_in_by_hand(tmp_path):
    class Scale(nn.Module):
        @nn.compact
        def __call__(self, y):
            return y * self.param("scale", nn.initializers.ones, (y.shape[-1],))

    model = bert()
    delta = jdelta.DeltaModel(model, name="extra")
    delta.insert_sequential_module("pooler", Scale())
    train_deltas(delta)
    delta.save_finetuned(tmp_path)

    again = bert()
    before = again.params
    with pytest.raises(ValueError, match=r"put in by hand, at bert\.pooler\. Put them into this model"):
        jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=again)
    assert untouched(again, before)
    other = jdelta.DeltaModel(again, name="mine")
    with pytest.raises(
        ValueError, match=r"inserted at 0 modules, the saved one has layers inserted at 1|is attached at 0 modules"
    ):
        other.load_finetuned(tmp_path)
    other.insert_sequential_module("pooler", Scale())
    other.load_finetuned(tmp_path)
    np.testing.assert_array_equal(again(IDS).logits, model(IDS).logits)


# --- parameters that live elsewhere


def test_a_backbone_given_as_shapes(saved):
    full = bert()
    shapes = build("bert", "FlaxBertForSequenceClassification", _do_init=False)
    delta = jdelta.AutoDeltaModel.from_finetuned(saved[0], backbone_model=shapes, check_hash=True)
    params = delta.load_finetuned(saved[0], full.params, check_hash=True)
    np.testing.assert_array_equal(shapes(IDS, params=params).logits, saved[1])
    assert "lora" not in full.params["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]


def test_a_tree_of_shapes_gets_the_saved_values(tmp_path):
    module, x = Scanned(), jnp.ones((2, 4))
    model = scanned()
    jdelta.LoraModel(model, modified_modules=["dense"], lora_r=2).save_finetuned(tmp_path, allow_untrained=True)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    backbone = jdelta.Backbone(module, shapes, dummy_inputs=(x,))
    delta = jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=backbone)
    loaded = delta.partition()[0]["layers"]["dense"]["lora"]
    np.testing.assert_array_equal(loaded["a"], model.params["layers"]["dense"]["lora"]["a"])
    assert isinstance(backbone.params["layers"]["dense"]["bias"], jax.ShapeDtypeStruct)


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[1])
from conftest import fresh, train_deltas
from matrix import METHODS
import jdelta
from jdelta.trees import fingerprint

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
ids = jnp.array([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])

def place(tree):
    spec = lambda a: NamedSharding(mesh, P(*[None] * (a.ndim - 1), "model") if a.ndim and a.shape[-1] % 2 == 0 else P())
    return jax.tree.map(lambda a: jax.device_put(a, spec(a)), tree)

model = fresh("bert", "FlaxBertForSequenceClassification")
plain = jdelta.LoraModel(model)
train_deltas(plain)
plain.save_finetuned(sys.argv[2])
want, wanted = model(ids).logits, plain.finetuned()

sharded = fresh("bert", "FlaxBertForSequenceClassification")
sharded.params = place(sharded.params)
delta = jdelta.AutoDeltaModel.from_finetuned(sys.argv[2], backbone_model=sharded, check_hash=True)
sharded.params = place(sharded.params)
compiled = jax.jit(lambda params: sharded(ids, params=params).logits)
got = compiled(sharded.params)
np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
again = delta.finetuned()
assert again.backbone == wanted.backbone
for name, value in wanted.values.items():
    np.testing.assert_array_equal(again.values[name], value)
shardings = jax.tree.map(lambda a: a.sharding, sharded.params)
delta.load_finetuned(sys.argv[2])
assert shardings == jax.tree.map(lambda a: a.sharding, sharded.params)
compiled(sharded.params)
assert compiled._cache_size() == 1
delta.merge()
assert jdelta.prune(shardings, "lora") == jax.tree.map(lambda a: a.sharding, sharded.params)
np.testing.assert_allclose(sharded(ids).logits, want, rtol=1e-5, atol=1e-6)
delta.unmerge()
np.testing.assert_allclose(sharded(ids).logits, want, rtol=1e-5, atol=1e-6)

for method, (cls, arguments) in METHODS.items():
    one, two = (fresh("bert", "FlaxBertForSequenceClassification", num_hidden_layers=1) for _ in range(2))
    one.params, two.params = place(one.params), place(two.params)
    first = cls(one, **arguments)
    train_deltas(first)
    one.params = place(one.params)
    saved = first.finetuned()
    saved.save(f"{sys.argv[2]}/{method}")
    second = jdelta.AutoDeltaModel.from_finetuned(f"{sys.argv[2]}/{method}", backbone_model=two, check_hash=True)
    two.params = place(two.params)
    again = second.finetuned()
    assert again.backbone == saved.backbone
    assert again.values.keys() == saved.values.keys()
    for name, value in saved.values.items():
        np.testing.assert_array_equal(again.values[name], value)
print("done")
"""


@pytest.mark.slow
def test_a_backbone_sharded_over_a_mesh(tmp_path):
    env = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", SHARDED, str(Path(__file__).parent), str(tmp_path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.stdout.endswith("done\n"), result.stderr


def test_loading_onto_an_attached_delta_compiles_nothing(saved, tmp_path):
    model = bert()
    delta = jdelta.LoraModel(model)
    other = bert()
    trained_lora(other, seed=5).save_finetuned(tmp_path)
    run = jax.jit(lambda params: model(IDS, params=params).logits)
    run(model.params)
    for path, want in ((saved[0], saved[1]), (tmp_path, other(IDS).logits), (saved[0], saved[1])):
        delta.load_finetuned(path)
        np.testing.assert_allclose(run(model.params), want, rtol=1e-5, atol=1e-6)
    assert run._cache_size() == 1


# --- which backbone it was


def test_the_fingerprint_tells_values_from_structure():
    model = bert()
    leaves = {surgery.name_of(path): leaf for path, leaf in surgery.flatten(model.params).items()}
    print_of = fingerprint.fingerprint(leaves)
    assert fingerprint.differences(print_of, fingerprint.fingerprint(leaves)) == ([], [])
    moved = {**leaves, "classifier.bias": leaves["classifier.bias"] + 1}
    assert fingerprint.differences(fingerprint.fingerprint(moved), print_of) == ([], ["classifier.bias"])
    shorter = {**leaves, "classifier.bias": leaves["classifier.bias"][:1]}
    structure, values = fingerprint.differences(fingerprint.fingerprint(shorter), print_of)
    assert structure == ["classifier.bias is float32[1], not float32[2]"]
    assert values == []
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    assert fingerprint.differences(fingerprint.fingerprint(shapes), print_of) == ([], [])
    del shapes["classifier.bias"]
    assert fingerprint.differences(fingerprint.fingerprint(shapes), print_of)[0] == ["classifier.bias is missing"]


def test_another_backbone_warns_or_is_refused(saved):
    other = bert()
    other.params = noisy(other.params)
    before = other.params
    with pytest.raises(ValueError, match=r"structure is the same, but \d+ of \d+ leaves have other values: bert\."):
        jdelta.AutoDeltaModel.from_finetuned(saved[0], backbone_model=other, check_hash=True)
    assert untouched(other, before)
    with pytest.warns(UserWarning, match=r"this backbone is not the one that delta 'lora' was trained on"):
        jdelta.AutoDeltaModel.from_finetuned(saved[0], backbone_model=other)
    wider = build("bert", "FlaxBertForSequenceClassification", {"vocab_size": 70})
    with pytest.raises(ValueError, match=r"its structure is another: .*word_embeddings.embedding is float32\[70, 16\]"):
        jdelta.AutoDeltaModel.from_finetuned(saved[0], backbone_model=wider, check_hash=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jdelta.AutoDeltaModel.from_finetuned(saved[0], backbone_model=wider, check_hash=False)


def test_a_head_that_was_left_random_is_told(tmp_path):
    model = bert()
    jdelta.LoraModel(model).save_finetuned(tmp_path, allow_untrained=True)
    again = bert()
    again.params["classifier"]["kernel"] = again.params["classifier"]["kernel"] + 1
    with pytest.warns(UserWarning, match=r"1 of \d+ leaves have other values: classifier\.kernel"):
        jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=again)


# --- damage, and what does not fit


def rewrite(path, change):
    """Changes a description as somebody might who then computes its checksum anew."""
    description = json.loads((path / folder.CONFIG).read_text())
    change(description)
    if "description_sha256" in description:
        description["description_sha256"] = _checksum(description)
    (path / folder.CONFIG).write_text(json.dumps(description))


def without(key):
    return lambda path: rewrite(path, lambda d: d.pop(key))


def setting(**values):
    return lambda path: rewrite(path, lambda d: d.update(values))


def tensors(change):
    def apply(path):
        values = load_file(path / folder.TENSORS)
        change(values)
        save_file(values, path / folder.TENSORS)

    return apply


def argument(path, **values):
    rewrite(path, lambda d: d["arguments"].update(values))


A = "bert.encoder.layer.0.attention.self.query.lora.a"
DAMAGE = {
    "no folder": (lambda p: os.rename(p, f"{p}.away"), FileNotFoundError, "no saved delta|there is no folder"),
    "no description": (
        lambda p: (p / folder.CONFIG).unlink(),
        FileNotFoundError,
        "delta_config.json is missing; it holds",
    ),
    "no tensors": (lambda p: (p / folder.TENSORS).unlink(), FileNotFoundError, "delta.safetensors is missing"),
    "truncated": (
        lambda p: (p / folder.TENSORS).write_bytes((p / folder.TENSORS).read_bytes()[:-9]),
        ValueError,
        "no whole safetensors file",
    ),
    "truncated in the header": (
        lambda p: (p / folder.TENSORS).write_bytes((p / folder.TENSORS).read_bytes()[:20]),
        ValueError,
        "no whole safetensors file",
    ),
    "an empty file": (lambda p: (p / folder.TENSORS).write_bytes(b""), ValueError, "no whole safetensors file"),
    "a pickle": (
        lambda p: (p / folder.TENSORS).write_bytes(b"\x80\x04}q\x00." * 9),
        ValueError,
        "no whole safetensors",
    ),
    "one bit": (
        lambda p: (p / folder.TENSORS).write_bytes((p / folder.TENSORS).read_bytes()[:-1] + b"\x01"),
        ValueError,
        "changed after it was saved",
    ),
    "foreign tensors": (
        lambda p: save_file({"x": np.ones(3)}, p / folder.TENSORS),
        ValueError,
        "x does not belong there",
    ),
    "a missing leaf": (tensors(lambda t: t.pop(A)), ValueError, f"{A} is missing"),
    "a surplus leaf": (tensors(lambda t: t.update({"../evil": t[A]})), ValueError, r"\.\./evil does not belong there"),
    "another shape": (
        tensors(lambda t: t.update({A: t[A][:2]})),
        ValueError,
        rf"{A} is float32\[2, 8\], not float32\[16, 8\]",
    ),
    "no JSON": (lambda p: (p / folder.CONFIG).write_text("{"), ValueError, "no JSON file"),
    "an argument that somebody edited": (
        lambda p: (p / folder.CONFIG).write_text(
            (p / folder.CONFIG).read_text().replace('"lora_alpha": 16', '"lora_alpha": 96')
        ),
        ValueError,
        r"delta_config\.json was changed after it was saved",
    ),
    "a list": (lambda p: (p / folder.CONFIG).write_text("[]"), ValueError, "no JSON object, but list"),
    "a newer version": (setting(jdelta_format=3, new=1), ValueError, "in format 3; this jdelta, .* Upgrade jdelta"),
    "an unknown key": (setting(target=[]), ValueError, "'target' is unknown. Did you mean 'targets'"),
    "a missing key": (without("targets"), ValueError, "'targets' is missing"),
    "a missing checksum": (without("sha256"), ValueError, "'sha256' is missing"),
    "a key of another type": (setting(targets="query"), ValueError, "targets is a list of strings, got 'query'"),
    "an unknown method": (
        setting(delta_type="lorra"),
        ValueError,
        "no method has delta_type 'lorra'. Did you mean 'lora'",
    ),
    "an unknown argument": (
        lambda p: argument(p, lora_rr=1),
        ValueError,
        "no argument 'lora_rr'. Did you mean 'lora_r'",
    ),
    "a missing argument": (
        lambda p: rewrite(p, lambda d: d["arguments"].pop("lora_r")),
        ValueError,
        "'lora_r' is missing",
    ),
    "an argument of another type": (lambda p: argument(p, lora_r="8"), ValueError, "lora_r is a whole number, got '8'"),
    "another rank": (lambda p: argument(p, lora_r=4), ValueError, r"lora.a has shape \(16, 8\), here \(16, 4\)"),
    "other targets": (
        setting(targets=["bert.pooler"]),
        ValueError,
        "is attached at 4 modules, the saved one is attached at 1",
    ),
    "a backbone that is none": (setting(backbone={"what": 1}), ValueError, "'backbone.kind' is missing"),
    "a name that is a path": (setting(name="../x"), ValueError, "a delta's name is a word without dots"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_attaches_nothing(saved, tmp_path, damage):
    change, error, message = DAMAGE[damage]
    path = tmp_path / "lora"
    path.mkdir()
    for file in saved[0].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    change(path)
    model = bert()
    before = model.params
    with pytest.raises(error, match=message):
        jdelta.AutoDeltaModel.from_finetuned(path, backbone_model=model)
    assert untouched(model, before)


def test_folders_of_earlier_versions_lack_the_arguments_that_came_since(saved, tmp_path):
    for file in saved[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rewrite(tmp_path, lambda d: (d["arguments"].pop("lora_dropout"), d["versions"].update(jdelta="0.0.1")))
    delta = jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=bert())
    assert delta.config.lora_dropout == 0


def test_what_does_not_fit_an_attached_delta_changes_nothing(saved):
    path = saved[0]
    cases = [
        (jdelta.AdapterModel, {}, r"is of method 'adapter'; saved is 'lora'"),
        (jdelta.LoraModel, {"lora_r": 4}, r"lora_r=4; saved is lora_r=8"),
        (jdelta.LoraModel, {"lora_alpha": 4}, r"lora_alpha=4.0; saved is lora_alpha=16.0"),
        (
            jdelta.LoraModel,
            {"modified_modules": ["query"]},
            r"is attached at 2 modules, the saved one is attached at 4; at bert",
        ),
    ]
    for cls, arguments, message in cases:
        model = bert()
        delta = cls(model, **arguments)
        before = model.params
        with pytest.raises(ValueError, match=message):
            delta.load_finetuned(path)
        assert model.params is before
    delta.detach()
    with pytest.raises(RuntimeError, match=r"detached and cannot be loaded. Call attach\(\) first"):
        delta.load_finetuned(path)
    with pytest.raises(RuntimeError, match=r"detached and cannot be saved. Call attach\(\) first"):
        delta.save_finetuned(path)


def test_a_head_of_another_size_is_named(saved):
    model = build("bert", "FlaxBertForSequenceClassification", {"num_labels": 3})
    before = model.params
    with pytest.raises(ValueError, match=r"classifier\.bias has shape \(2,\), here \(3,\)"):
        jdelta.AutoDeltaModel.from_finetuned(saved[0], backbone_model=model)
    assert untouched(model, before)


def test_values_that_are_elsewhere_cannot_be_saved(tmp_path):
    delta = jdelta.LoraModel(build("bert", "FlaxBertForSequenceClassification", _do_init=False))
    with pytest.raises(ValueError, match=r"holds no value of .*lora\.a'. Pass one that does: params="):
        delta.save_finetuned(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_it_is(saved):
    text = (saved[0] / folder.CARD).read_text()
    assert text.startswith("---\nlibrary_name: jdelta\n")
    assert "for `FlaxBertForSequenceClassification`" in text
    assert "`lora_r`: `8`" in text
    assert "1,058 parameters" in text
