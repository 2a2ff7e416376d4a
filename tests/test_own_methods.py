"""The methods that the docs write as a user would: short, merged exactly, saved, inside nn.scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from own_methods import defined, source
from tiers import breadth

import jdelta
from jdelta.core.config import METHODS
from jdelta.trees import surgery

X = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3, 8)), jnp.float32)
LINES = {"ia3": 25, "dora": 25, "vera": 35}
CLASSES = {"ia3": "MyIa3", "dora": "MyDora", "vera": "MyVera"}
SHARED = {"A", "B"}  # of VeRA: neither trained nor saved


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(8, name="dense")(nn.relu(nn.Dense(12, name="wide")(x)))
        return x + y, None


class Net(nn.Module):
    scan: bool = False

    @nn.compact
    def __call__(self, x):
        if self.scan:
            lifted = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return lifted(name="blocks")(x, None)[0]
        for i in range(2):
            x = Block(name=f"block_{i}")(x)[0]
        return nn.Dense(4, name="head")(x)


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    for name in CLASSES.values():
        monkeypatch.setitem(METHODS, defined()[name].delta_type, defined()[name])


def of(kind, scan):
    net = Net(scan)
    variables = jax.jit(net.init)(jax.random.key(1), X)["params"]
    backbone = jdelta.Backbone(net, variables, dummy_inputs=(X,))
    before = backbone(X)
    method = defined()[CLASSES[kind]]()
    if kind == "ia3":
        method = defined()["MyIa3"](feedforward_modules=("dense",))
    return backbone, jdelta.DeltaModel(backbone, ["dense", "wide"], method=method), before


def moved(delta, params):
    """Parameters in which everything of the delta that trains has moved."""
    trains, key = surgery.flatten(delta.trainable_mask(params)), jax.random.key(3)
    flat = surgery.flatten(params)
    for i, (path, leaf) in enumerate(flat.items()):
        if trains[path]:
            flat[path] = leaf + 0.1 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
    return surgery.unflatten(flat)


@pytest.mark.parametrize("kind", LINES)
def test_it_is_short(kind):
    code = source(kind)
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("import")]
    assert len(lines) + 4 * (kind == "dora") <= LINES[kind]  # its Method is in a block of its own


ALL = [(kind, scan) for kind in LINES for scan in (False, True)]
CASES = breadth(ALL, ("dora", True), ("ia3", False), ("vera", True))


@pytest.mark.parametrize("case", CASES)
def test_it_starts_at_the_identity_merges_and_comes_back_from_a_folder(case, tmp_path):
    kind, scan = case
    backbone, delta, before = of(kind, scan)
    np.testing.assert_allclose(backbone(X), before, rtol=1e-6, atol=1e-6)
    backbone.params = moved(delta, backbone.params)
    changed = backbone(X)
    assert np.abs(changed - before).max() > 0.01
    delta.save_finetuned(tmp_path)
    bare = surgery.flatten(delta.merge(backbone.params))
    assert bare.keys() == surgery.flatten(delta.structure.params).keys()
    # Sums in another order: 1e-5 of outputs of size 1.
    np.testing.assert_allclose(Net(scan).apply({"params": surgery.unflatten(bare)}, X), changed, rtol=1e-5, atol=1e-5)
    delta.detach()
    np.testing.assert_array_equal(backbone(X), before)

    other = jdelta.Backbone(Net(scan), backbone.params, dummy_inputs=(X,))
    loaded = jdelta.AutoDeltaModel.from_finetuned(tmp_path, other, check_hash=False)
    np.testing.assert_array_equal(other(X), changed)
    assert loaded.config == delta.config


@pytest.mark.parametrize("scan", breadth([False, True], True))
def test_what_comes_from_a_seed_is_neither_trained_nor_saved_and_lies_once_in_the_tree(scan):
    backbone, delta, _ = of("vera", scan)
    own = {path: leaf for path, leaf in surgery.flatten(backbone.params).items() if path in delta.paths}
    assert {path for path in own if path[-1] in SHARED} == {("my_vera", "A"), ("my_vera", "B")}
    trains = {path for path, flag in surgery.flatten(delta.trainable_mask()).items() if flag}
    assert trains == {path for path in own if path[-1].startswith("lambda")}
    with pytest.warns(UserWarning, match="nothing of delta 'my_vera' has moved"):
        saved = delta.finetuned()
    assert not [name for name in saved.values if name.rpartition(".")[2] in SHARED]


def test_merging_below_a_change_that_depends_on_the_weight_is_refused():
    backbone, dora, _ = of("dora", False)
    lora = jdelta.LoraModel(backbone, ["block_0.dense"], lora_r=2)
    backbone.params = jax.tree.map(lambda leaf: leaf + 0.1, backbone.params)
    changed, params = backbone(X), backbone.params
    with pytest.raises(
        ValueError, match=r"'lora' cannot be merged at block_0\.dense: the change of delta 'my_dora' depends"
    ):
        lora.merge()
    assert backbone.params is params
    dora.merge()
    lora.merge()
    np.testing.assert_allclose(backbone(X), changed, rtol=1e-5, atol=1e-5)
