"""Sums, differences and means of deltas: closed formulas, PyTorch PEFT's `add_weighted_adapter`, and properties."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh, train_deltas
from flax import linen as nn
from parity import peft, torch

import jdelta
from jdelta.saved.arithmetic.merge_rules import COMBINATIONS
from jdelta.saved.finetuned import BackboneInfo, Finetuned

WEIGHTS = [0.7, -0.4, 0.5]
ALPHA = 6.0


def arrays(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def bitfit(seed, **values):
    """One bias of 40 changes, and what else trained."""
    own = {"dense.bitfit.bias": arrays(seed, bias=(40,))["bias"]}
    return Finetuned("bitfit", jdelta.BitFitConfig(modified_modules=("dense",)), own | values, ("dense",))


def lora(seed, r=2, alpha=ALPHA, *, d_in=(12,), d_out=(10,), layers=(), **values):
    """A pair of leaves, at `dense`, and what else trained."""
    own = arrays(seed, a=(*layers, *d_in, r), b=(*layers, r, *d_out))
    config = jdelta.LoraConfig(modified_modules=("dense",), lora_r=r, lora_alpha=alpha)
    return Finetuned("lora", config, {f"dense.lora.{k}": v for k, v in own.items()} | values, ("dense",))


def adapter(seed):
    values = {f"dense.adapter.{k}": v for k, v in arrays(seed, down=(4, 2), up=(2, 4)).items()}
    return Finetuned("adapter", jdelta.AdapterConfig(modified_modules=("dense",)), values, ("dense",))


def factors(found):
    a, b = (np.asarray(found.values[f"dense.lora.{leaf}"], np.float64) for leaf in "ab")
    return a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)


def update(found):
    """What LoRA adds to the weights, one matrix."""
    a, b = factors(found)
    return found.config.lora_alpha / found.config.lora_r * a @ b


def head(seed, width=3):
    return {"classifier.kernel": arrays(seed, kernel=(4, width))["kernel"]}


def with_backbone(found, **leaves):
    return dataclasses.replace(found, backbone=BackboneInfo("Toy", "toy", leaves))


def assert_same(found, expected):
    assert found.config == expected.config
    assert found.values.keys() == expected.values.keys()
    for key, value in found.values.items():
        assert value.dtype == expected.values[key].dtype
        np.testing.assert_array_equal(value, expected.values[key], err_msg=key)


def assert_near(found, expected, tolerance=1e-6):
    scale = np.abs(expected).max()
    assert scale > 0
    assert np.abs(found - expected).max() < tolerance * scale


# --- the formulas, entry by entry


def largest(x, density):
    limit = sorted(np.abs(x).ravel())[-int(density * x.size)]
    return np.where(np.abs(x) >= limit, x, 0)


def entrywise(xs, weights, elect=None):
    """The weighted sum; with `elect`, the mean over those of the elected sign."""
    out = np.zeros(xs[0].shape)
    for index in np.ndindex(out.shape):
        column = [float(x[index]) for x in xs]
        if elect is None:
            out[index] = sum(w * c for w, c in zip(weights, column, strict=True))
            continue
        votes = column if elect == "total" else [(c > 0) - (c < 0) for c in column]
        sign = 1 if sum(votes) >= 0 else -1
        agree = [w * c for w, c in zip(weights, column, strict=True) if c * sign > 0]
        out[index] = sum(agree) / max(1, len(agree))
    return out


def best_of_rank(matrix, rank):
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    top = vectors[:, np.argsort(values)[-rank:]]
    return matrix @ top @ top.T


LEAFWISE = {
    "linear": (None, None, None),
    "magnitude_prune": (0.4, None, None),
    "ties": (0.4, "total", "total"),
    "ties by frequency": (0.4, "frequency", "frequency"),
}


@pytest.mark.parametrize("case", LEAFWISE)
def test_changes_are_combined_entry_by_entry(case):
    density, elect, method = LEAFWISE[case]
    deltas = [bitfit(seed) for seed in range(3)]
    options = {"density": density} if density else {}
    if method:
        options["majority_sign_method"] = method
    found = jdelta.weighted_sum(deltas, WEIGHTS, case.split()[0], **options)
    biases = [delta.values["dense.bitfit.bias"] for delta in deltas]
    cut = [largest(bias, density) if density else bias for bias in biases]
    assert_near(found.values["dense.bitfit.bias"], entrywise(cut, WEIGHTS, elect))


@pytest.mark.parametrize("case", LEAFWISE)
def test_factors_of_lora_are_combined_with_the_roots_of_weight_times_scale(case):
    density, elect, method = LEAFWISE[case]
    deltas = [lora(0, alpha=3), lora(1, alpha=4), lora(2, alpha=5)]
    options = {"density": density, "majority_sign_method": method or "total"} if density else {}
    found = jdelta.weighted_sum(deltas, WEIGHTS, case.split()[0], **options)
    assert found.config == dataclasses.replace(deltas[0].config, lora_r=2, lora_alpha=2)
    scaled = [w * alpha / 2 for w, alpha in zip(WEIGHTS, (3, 4, 5), strict=True)]
    roots = {"a": [math.copysign(math.sqrt(abs(c)), c) for c in scaled], "b": [math.sqrt(abs(c)) for c in scaled]}
    for leaf, weights in roots.items():
        leaves = [delta.values[f"dense.lora.{leaf}"] for delta in deltas]
        cut = [largest(x, density) if density else x for x in leaves]
        assert_near(found.values[f"dense.lora.{leaf}"], entrywise(cut, weights, elect))


@pytest.mark.parametrize(
    "shape", [((12,), (10,)), ((3, 4), (10,)), ((12,), (2, 5)), ((3, 4), (2, 5)), ((2, 2, 3), (10,))]
)
def test_cat_is_the_exact_sum_and_svd_its_best_approximation(shape):
    deltas = [lora(i, r, alpha=r + 1, d_in=shape[0], d_out=shape[1]) for i, r in enumerate((2, 3, 1))]
    total = sum(w * update(delta) for w, delta in zip(WEIGHTS, deltas, strict=True))
    exact = jdelta.weighted_sum(deltas, WEIGHTS)
    assert (exact.config.lora_r, exact.config.lora_alpha) == (6, 6)
    assert exact.values["dense.lora.a"].shape == (*shape[0], 6)
    assert exact.values["dense.lora.b"].shape == (6, *shape[1])
    assert_near(update(exact), total)
    for rank in (None, 1, 4, 6):
        found = jdelta.weighted_sum(deltas, WEIGHTS, "svd", rank=rank)
        assert found.config.lora_r == (rank or 3)
        assert found.values["dense.lora.b"].shape == (rank or 3, *shape[1])
        assert_near(update(found), best_of_rank(total, rank or 3))


def test_each_module_may_have_its_own_rank_and_scale():
    targets = ("dense", "deep.dense", "proj")
    ranks = [{"deep.dense": 3, "dense": 2}, {"proj": 1}]
    deltas = []
    for i, pattern in enumerate(ranks):
        config = jdelta.LoraConfig(
            modified_modules=targets, lora_r=2, lora_alpha=5, rank_pattern=pattern, use_rslora=i == 1
        )
        values = {}
        for j, target in enumerate(targets):
            pair = arrays(10 * i + j, a=(12, config.rank_of(target)), b=(config.rank_of(target), 10))
            values |= {f"{target}.lora.{leaf}": value for leaf, value in pair.items()}
        deltas.append(Finetuned("lora", config, values, targets))

    def product(found, target):
        a, b = (np.float64(found.values[f"{target}.lora.{leaf}"]) for leaf in "ab")
        assert found.config.rank_of(target) == a.shape[-1]
        return found.config.scale_of(target) * a @ b

    scales = [deltas[i].config.scale_of(target) for i, target in enumerate(("deep.dense", "proj"))]
    assert scales == [5 / 3, 5]
    both = jdelta.weighted_sum(deltas, [1, -2])
    short = jdelta.weighted_sum(deltas, [1, -2], "svd")
    for target, rank in (("dense", 4), ("deep.dense", 5), ("proj", 3)):
        total = product(deltas[0], target) - 2 * product(deltas[1], target)
        assert both.config.rank_of(target) == rank
        assert_near(product(both, target), total)
        assert_near(product(short, target), best_of_rank(total, {5: 3}.get(rank, 2)))
    assert jdelta.weighted_sum(deltas, [1, 1], "svd", rank=2).config.rank_pattern is None


@pytest.mark.parametrize(("name", "elect"), [("magnitude_prune_svd", None), ("ties_svd", "total")])
@pytest.mark.parametrize("rank", [2, 10])
def test_products_are_combined_and_approximated(name, elect, rank):
    deltas = [lora(i, r) for i, r in enumerate((2, 3, 1))]
    found = jdelta.weighted_sum(deltas, WEIGHTS, name, rank=rank, density=0.5)
    total = entrywise([largest(update(delta), 0.5) for delta in deltas], WEIGHTS, elect)
    assert_near(update(found), best_of_rank(total, rank))


def masks(seed, density):
    """Each delta's part in the result: entries that stay are divided by the density."""
    deltas = [bitfit(0), bitfit(1)]
    return [
        jdelta.weighted_sum(deltas, weights, "dare_linear", density=density, rng=seed).values["dense.bitfit.bias"]
        for weights in ([1, 0], [0, 1])
    ]


def test_dare_drops_entries_at_random_and_rescales_the_others():
    biases = [bitfit(i).values["dense.bitfit.bias"] for i in (0, 1)]
    left = masks(3, 0.5)
    for part, bias in zip(left, biases, strict=True):
        np.testing.assert_allclose(part, np.where(part == 0, 0, bias / 0.5), rtol=1e-6)
        assert 10 < np.count_nonzero(part) < 30
    assert ((left[0] == 0) != (left[1] == 0)).any()
    for name, elect in (("dare_linear", None), ("dare_ties", "total")):
        found = jdelta.weighted_sum([bitfit(0), bitfit(1)], [0.7, 0.6], name, density=0.5, rng=3)
        assert_near(found.values["dense.bitfit.bias"], entrywise(left, [0.7, 0.6], elect))


def test_dare_keeps_the_mean_and_depends_on_the_seed_alone():
    mean = np.mean([masks(seed, 0.5)[0] for seed in range(400)], axis=0)
    bias = bitfit(0).values["dense.bitfit.bias"]
    assert (np.abs(mean - bias) < 5 * np.abs(bias) / math.sqrt(400)).all()  # five standard deviations
    for rng in (7, jax.random.key(7)):
        np.testing.assert_array_equal(masks(rng, 0.5)[0], masks(7, 0.5)[0])
    assert (masks(7, 0.5)[0] != masks(8, 0.5)[0]).any()


@pytest.mark.parametrize("space", ["", "_svd"])
def test_at_density_1_nothing_is_dropped(space):
    deltas = [lora(0), lora(1)]
    whole = jdelta.weighted_sum(deltas, [0.7, 0.3], "svd" if space else "linear")
    for name in ("dare_linear", "magnitude_prune"):
        assert_near(update(jdelta.weighted_sum(deltas, [0.7, 0.3], name + space, density=1.0)), update(whole))
    ties, dare = (jdelta.weighted_sum(deltas, [0.7, 0.3], f"{n}{space}", density=1) for n in ("ties", "dare_ties"))
    assert_near(update(ties), update(dare))


# --- PyTorch PEFT


RANKS = {"equal ranks": (3, 3, 3), "different ranks": (2, 3, 1)}
PEFT_CASES = [
    (name, ranks) for name, how in COMBINATIONS.items() for ranks in RANKS
    if how.keep != "random" and (how.lora != "factors" or ranks == "equal ranks")
]  # fmt: skip


def peft_model(ranks):
    """A torch model with a random adapter of each rank, and jdelta's deltas of the same numbers."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(11, 12)
            self.dense = torch.nn.Linear(12, 10)
            self.conv = torch.nn.Conv2d(3, 9, 3)

    targets = ["embed", "dense", "conv"]
    torch.manual_seed(0)
    configs = [peft.LoraConfig(r=r, lora_alpha=i + 3, target_modules=targets) for i, r in enumerate(ranks)]
    model = peft.PeftModel(Model(), configs[0], adapter_name="0")
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(str(i), config)
    deltas = []
    for i, r in enumerate(ranks):
        values = {}
        for target in targets:
            layer = model.base_model.model.get_submodule(target)
            kind = "embedding_" if target == "embed" else ""
            a, b = (getattr(layer, f"lora_{kind}{leaf}")[str(i)] for leaf in "AB")
            a, b = (a, b) if kind else (a.weight, b.weight)
            for leaf in (a, b):
                torch.nn.init.normal_(leaf)
            values[f"{target}.lora.a"] = np.moveaxis(a.detach().numpy(), (0, 1), (-1, -2))
            values[f"{target}.lora.b"] = b.detach().numpy().reshape(b.shape[0], -1).T
        config = jdelta.LoraConfig(modified_modules=tuple(targets), lora_r=r, lora_alpha=i + 3)
        deltas.append(Finetuned("lora", config, values, targets))
    return model, deltas


@pytest.mark.parity
@pytest.mark.parametrize(("name", "ranks"), PEFT_CASES)
def test_agrees_with_peft(name, ranks):
    model, deltas = peft_model(RANKS[ranks])
    how = COMBINATIONS[name]
    options = {} if how.keep == "all" else {"density": 0.6}
    svd = how.lora == "product"
    more = {"svd_rank": 4} if svd else {}
    model.base_model.add_weighted_adapter(["0", "1", "2"], WEIGHTS, "sum", name, **options, **more)
    found = jdelta.weighted_sum(deltas, WEIGHTS, name, **options, **({"rank": 4} if svd else {}))
    for target in found.targets:
        layer = model.base_model.model.get_submodule(target)
        expected = layer.get_delta_weight("sum").detach().numpy()
        a, b = (found.values[f"{target}.lora.{leaf}"] for leaf in "ab")
        mine = found.config.lora_alpha / found.config.lora_r * np.tensordot(a, b, 1)
        if target == "dense":
            mine = mine.T
        if target == "conv":
            mine = mine.transpose(3, 2, 0, 1)
        assert_near(mine, expected, 1e-5)


# --- values and changes


def test_values_are_averaged_and_no_more_without_a_base():
    one, other = bitfit(0, **head(0)), bitfit(1, **head(1))
    mean = jdelta.weighted_sum([one, other], [0.25, 0.75])
    for key in one.values:
        assert_near(mean.values[key], 0.25 * one.values[key] + 0.75 * other.values[key])
    with pytest.raises(ValueError, match=r"weights 1, 1: classifier.kernel holds a value .* keep=\['classifier'\]"):
        jdelta.weighted_sum([one, other], [1, 1])
    with pytest.raises(ValueError, match=r"classifier.kernel holds a value and no change"):
        jdelta.weighted_sum([one, other], [0.5, 0.5], "ties", density=0.5)
    with pytest.raises(ValueError, match=r"adapter.down holds a value .* base; method 'adapter' has no zero"):
        jdelta.weighted_sum([adapter(0), adapter(1)], [1, 1])
    assert_same(
        jdelta.weighted_sum([adapter(0), adapter(1)], [0.5, 0.5]), jdelta.interpolate(adapter(0), adapter(1), 0.5)
    )


@pytest.mark.parametrize("name", ["linear", "ties"])
def test_with_a_base_every_leaf_is_a_change_from_there(name):
    start, one, other = adapter(0), adapter(1), adapter(2)
    options = {} if name == "linear" else {"density": 0.5}
    found = jdelta.weighted_sum([one, other], [1, -0.5], name, base=start, **options)
    for key, before in start.values.items():
        changes = [np.float64(delta.values[key]) - before for delta in (one, other)]
        if options:
            changes = [largest(change, 0.5) for change in changes]
        assert_near(found.values[key], before + entrywise(changes, [1, -0.5], "total" if options else None))


def test_the_base_of_a_head_and_of_biases_is_the_backbones_tree():
    params = {"classifier": {"kernel": jnp.ones((4, 3))}}
    one, other = bitfit(0, **head(0)), bitfit(1, **head(1))
    found = jdelta.weighted_sum([one, other], [1, 1], base=params)
    kernels = [np.float64(delta.values["classifier.kernel"]) for delta in (one, other)]
    assert_near(found.values["classifier.kernel"], kernels[0] + kernels[1] - 1)
    assert_near(jdelta.negate(one, base={"params": params}).values["classifier.kernel"], 2 - kernels[0])
    with pytest.raises(ValueError, match=r"classifier.kernel has shape \[4, 3\], in base \[4, 2\]"):
        jdelta.negate(one, base={"classifier": {"kernel": jnp.ones((4, 2))}})


def test_keep_takes_the_first_deltas_head():
    movies, tweets, none = lora(0, **head(0, 2)), lora(1, **head(1, 5)), lora(2)
    for others in ([tweets], [none], [tweets, none]):
        found = jdelta.weighted_sum([movies, *others], [1] * (1 + len(others)), keep=["classifier"])
        np.testing.assert_array_equal(found.values["classifier.kernel"], movies.values["classifier.kernel"])
        assert_near(update(found), update(movies) + sum(map(update, others)))
    assert "classifier.kernel" not in jdelta.weighted_sum([none, tweets], [1, 1], keep=["classifier"]).values
    kept = jdelta.interpolate(movies, tweets, 0.5, keep=["classifier"])
    np.testing.assert_array_equal(kept.values["classifier.kernel"], movies.values["classifier.kernel"])
    with pytest.raises(ValueError, match=r"keep takes .* no module ends with 'clasifier'"):
        jdelta.weighted_sum([movies, none], [1, 1], keep=["clasifier"])


# --- interpolation and negation


@pytest.mark.parametrize("make", [bitfit, lora, adapter])
def test_interpolation_ends_at_its_ends_and_rests_between_equals(make):
    a, b = make(0), make(1)
    assert_same(jdelta.interpolate(a, b, 0), a)
    assert_same(jdelta.interpolate(a, b, 1), b)
    for t in (0.1, 0.3, 0.5, 0.9):
        assert_same(jdelta.interpolate(a, a, t), a)
        found = jdelta.interpolate(a, b, t)
        for key in a.values:
            assert_near(found.values[key], (1 - t) * np.float64(a.values[key]) + t * np.float64(b.values[key]))


def test_negation_is_exact_and_undone_by_itself():
    for found in (lora(0, **head(0)), bitfit(0, **head(0))):
        negated = jdelta.negate(found, keep=["classifier"])
        assert_same(jdelta.negate(negated, keep=["classifier"]), found)
        np.testing.assert_array_equal(negated.values["classifier.kernel"], found.values["classifier.kernel"])
    np.testing.assert_array_equal(update(jdelta.negate(lora(0))), -update(lora(0)))
    np.testing.assert_array_equal(
        jdelta.negate(bitfit(0)).values["dense.bitfit.bias"], -bitfit(0).values["dense.bitfit.bias"]
    )
    with pytest.raises(ValueError, match=r"negate: classifier.kernel holds a value .* keep=\['classifier'\]"):
        jdelta.negate(lora(0, **head(0)))
    with pytest.raises(ValueError, match=r"negate: dense.adapter.down holds a value"):
        jdelta.negate(adapter(0))


def test_the_dtype_is_that_of_the_first_delta():
    half = dataclasses.replace(lora(0), values={k: v.astype(jnp.bfloat16) for k, v in lora(0).values.items()})
    for found in (jdelta.weighted_sum([half, lora(1)], [1, 1]), jdelta.interpolate(half, lora(1), 0.3)):
        assert {value.dtype for value in found.values.values()} == {np.dtype(jnp.bfloat16)}


# --- on models


@pytest.fixture
def trained(bert):
    delta = jdelta.LoraModel(bert, modified_modules=["query", "value"], lora_r=2)
    train_deltas(delta)
    return delta


@pytest.mark.slow
def test_the_sum_of_a_delta_and_its_negative_does_nothing(trained, ids):
    plain = fresh("bert", "FlaxBertForSequenceClassification")
    model = trained.backbone_model
    expected = plain(ids).logits
    assert np.abs(model(ids).logits - expected).max() > 1e-4
    nothing = jdelta.weighted_sum([trained, jdelta.negate(trained)], [1, 1])
    jdelta.AutoDeltaModel.from_finetuned(nothing, backbone_model=plain)
    np.testing.assert_allclose(plain(ids).logits, expected, atol=1e-6)


def test_a_sum_is_saved_read_attached_and_loaded(trained, tmp_path):
    one = trained.finetuned()
    trained.save_finetuned(tmp_path / "one")
    train_deltas(trained, seed=1)
    weights = [0.6, 0.4]
    both = jdelta.weighted_sum([str(tmp_path / "one"), trained], weights, name="both")
    assert_same(both, jdelta.weighted_sum([one, trained.finetuned()], weights, name="both"))
    jdelta.weighted_sum([tmp_path / "one", trained], weights, "svd").save(tmp_path / "svd")
    both.save(tmp_path / "both")
    model = fresh("bert", "FlaxBertForSequenceClassification")
    attached = jdelta.AutoDeltaModel.from_finetuned(tmp_path / "both", backbone_model=model)
    assert (attached.name, attached.config.lora_r) == ("both", 4)
    assert_same(attached.finetuned(), both)
    assert Finetuned.read(tmp_path / "svd").config.lora_r == 2
    middle = jdelta.interpolate(one, trained, 0.5)
    trained.load_finetuned(middle)
    assert_same(trained.finetuned(), middle)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(6, name="dense")(x), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Residual, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return layers(name="layers")(x, None)[0]


@pytest.mark.parametrize("name", ["cat", "svd", "ties_svd"])
def test_as_many_scanned_layers_as_ranks_are_told_apart_by_the_kernel(name):
    """`a` is (2, 6, 2) and `b` (2, 2, 6): two layers, or two input axes?"""
    x = jnp.ones((1, 6))
    module = Stack()
    model = jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    delta = jdelta.LoraModel(model, modified_modules=["dense"], lora_r=2)
    found = []
    for seed in range(2):
        train_deltas(delta, seed)
        found.append(delta.finetuned())
    options = {} if name == "cat" else {"rank": 4} if name == "svd" else {"rank": 6, "density": 1}
    both = jdelta.weighted_sum(found, [0.5, 0.5], name, **options)
    for layer in range(2):
        scaled = [
            16 / 2 * np.float64(f.values["layers.dense.lora.a"][layer]) @ f.values["layers.dense.lora.b"][layer]
            for f in found
        ]
        a, b = (both.values[f"layers.dense.lora.{leaf}"][layer] for leaf in "ab")
        assert_near(a @ b, entrywise(scaled, [0.5, 0.5], "total" if "ties" in name else None), 1e-5)
    unknown = [dataclasses.replace(f, backbone=None) for f in found]
    with pytest.raises(ValueError, match=r"which axes of a, \[2, 6, 2\], and b, \[2, 2, 6\], are ranks"):
        jdelta.weighted_sum(unknown, [0.5, 0.5], name, **options)
    jdelta.weighted_sum(unknown, [0.5, 0.5], "linear")


def test_layers_on_another_axis_are_an_error():
    a, b = np.ones((6, 3, 2), np.float32), np.ones((2, 3, 6), np.float32)
    found = dataclasses.replace(lora(0), values={"dense.lora.a": a, "dense.lora.b": b})
    with pytest.raises(ValueError, match="which axes"):
        jdelta.weighted_sum([with_backbone(found, **{"dense.kernel": "float32[6, 3, 6] 0"})], [1], "cat")


def test_biases_of_bitfit_need_the_backbones(bert):
    before = bert.params
    delta = jdelta.BitFitModel(bert, modified_modules=["query"])
    train_deltas(delta)
    name = "bert.encoder.layer.0.attention.self.query.bias"
    with pytest.raises(ValueError, match=r"query.bias holds a value"):
        jdelta.negate(delta)
    back = jdelta.negate(delta, base=before)
    start = np.asarray(before["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["bias"])
    trained = delta.finetuned().values[name]
    assert_near(back.values[name] - start, start - trained)
    undone = jdelta.weighted_sum([delta, back], [1, 1], base=before)
    np.testing.assert_allclose(undone.values[name], start, atol=1e-6)


# --- errors


@pytest.mark.parametrize(
    ("deltas", "weights", "options", "error", "message"),
    [
        ([], [], {}, ValueError, "there are no deltas"),
        (lora(0), [1], {}, TypeError, r"Write \[delta\]"),
        ([3], [1], {}, TypeError, "a delta is .* got int"),
        ([lora(0)], [1, 2], {}, ValueError, "1 deltas and 2 weights"),
        ([lora(0)], [math.nan], {}, ValueError, "finite"),
        ([lora(0), adapter(0)], [1, 1], {}, ValueError, "of method 'lora', delta 2 of 'adapter'"),
        ([lora(0)], [1], {"combination": "lineer"}, ValueError, "'lineer' is unknown. Did you mean 'linear'"),
        ([adapter(0)], [1], {"combination": "cat"}, ValueError, "'cat' is for LoRA; method 'adapter' has linear, ties"),
        ([lora(0)], [1], {"rank": 2}, ValueError, "'cat' takes no rank"),
        ([lora(0)], [1], {"combination": "svd", "rank": 0}, ValueError, "rank is at least 1"),
        ([lora(0)], [1], {"combination": "svd", "rank": 3}, ValueError, "rank=3 .* Take at most 2"),
        (
            [lora(0)],
            [1],
            {"combination": "ties_svd", "rank": 11, "density": 0.5},
            ValueError,
            "rank=11 is more than the sum has at dense. Take at most 10",
        ),
        ([lora(0, 6), lora(1, 6)], [1, 1], {}, ValueError, "add up to 12, above the width of dense, 10.*'svd'"),
        ([lora(0)], [1], {"combination": "ties"}, ValueError, "needs a density above 0 and at most 1, got None"),
        ([lora(0)], [1], {"combination": "ties", "density": 0.0}, ValueError, "got 0.0"),
        ([lora(0)], [1], {"combination": "dare_ties", "density": 1.5}, ValueError, "got 1.5"),
        ([lora(0)], [1], {"density": 0.5}, ValueError, "takes no density"),
        ([lora(0)], [1], {"majority_sign_method": "most"}, ValueError, "'total' or 'frequency', got 'most'"),
        (
            [lora(0, 2), lora(1, 3)],
            [1, 1],
            {"combination": "linear"},
            ValueError,
            r"dense.lora.a has shape \[12, 2\], in delta 2 \[12, 3\].*'cat' or 'svd'",
        ),
        ([lora(0), lora(1, d_out=(9,))], [1, 1], {}, ValueError, "dense.lora is that of another module in delta 2"),
        ([lora(0), lora(1, **head(0))], [1, 1], {}, ValueError, r"delta 1 has no leaf classifier.kernel.*keep="),
        (
            [lora(0, **head(0, 2)), lora(1, **head(1, 5))],
            [0.5, 0.5],
            {},
            ValueError,
            r"classifier.kernel has shape \[4, 2\], in delta 2 \[4, 5\]. keep=\['classifier'\]",
        ),
        ([lora(0)], [1], {"keep": "classifier"}, TypeError, r"Write \['classifier'\]"),
    ],
)
def test_what_does_not_go_together_is_refused(deltas, weights, options, error, message):
    with pytest.raises(error, match=message):
        jdelta.weighted_sum(deltas, weights, **options)


def test_deltas_of_other_modules_or_arguments_are_refused():
    other = dataclasses.replace(adapter(1), targets=("dense", "proj"))
    with pytest.raises(ValueError, match="delta 1 has no module proj, which delta 2 has"):
        jdelta.weighted_sum([adapter(0), other], [0.5, 0.5])
    wider = dataclasses.replace(adapter(1), config=jdelta.AdapterConfig(bottleneck_dim=5))
    with pytest.raises(ValueError, match="delta 1 has bottleneck_dim=24, delta 2 has bottleneck_dim=5"):
        jdelta.interpolate(adapter(0), wider, 0.5)
    with pytest.raises(ValueError, match=r"does not have the leaves of LoRA at dense.lora.m"):
        jdelta.negate(dataclasses.replace(lora(0), values={**lora(0).values, "dense.lora.m": np.ones(2)}))


def test_layers_put_in_by_hand_are_values():
    by_hand = [dataclasses.replace(lora(i), inserted=("dense",)) for i in range(2)]
    with pytest.raises(ValueError, match="method 'lora' with layers put in by hand has linear"):
        jdelta.weighted_sum(by_hand, [1, 1], "cat")
    assert_same(jdelta.weighted_sum(by_hand, [0.5, 0.5]), jdelta.interpolate(*by_hand, 0.5))
    with pytest.raises(ValueError, match="holds a value"):
        jdelta.negate(by_hand[0])


def test_another_backbone_warns_or_is_refused():
    kernel, text = "dense.kernel", "float32[12, 10] {}"
    one, other = (with_backbone(lora(i), **{kernel: text.format(i)}) for i in range(2))
    with pytest.warns(
        UserWarning, match="the backbone of delta 2 is not that of delta 1: other values in dense.kernel"
    ):
        jdelta.weighted_sum([one, other], [1, 1])
    with pytest.raises(ValueError, match="is not that of delta 1"):
        jdelta.interpolate(one, other, 0.5, check_hash=True)
    jdelta.weighted_sum([one, other], [1, 1], check_hash=False)
    with pytest.raises(ValueError, match="more is new"):
        jdelta.weighted_sum(
            [one, with_backbone(other, **{kernel: text.format(0), "more": "float32[2] 0"})], [1, 1], check_hash=True
        )
    trained = with_backbone(lora(1, **head(0)), **{kernel: text.format(0)})
    head_too = with_backbone(lora(0), **{kernel: text.format(0), "classifier.kernel": "float32[4, 3] 0"})
    jdelta.weighted_sum([trained, head_too], [1, 1], keep=["classifier"], check_hash=True)


def test_deltas_are_not_changed():
    a, b = lora(0), lora(1)
    copies = [{key: value.copy() for key, value in found.values.items()} for found in (a, b)]
    for name, how in COMBINATIONS.items():
        jdelta.weighted_sum([a, b], [1, -1], name, density=None if how.keep == "all" else 0.5)
    jdelta.negate(a), jdelta.interpolate(a, b, 0.5)
    for found, copy in zip((a, b), copies, strict=True):
        chex.assert_trees_all_equal(dict(found.values), copy)
