"""LoHa against its formula in float64, how it starts, which form runs, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy
from flax import linen as nn

import jdelta
from jdelta.methods.loha import LohaRule

D_IN, D_OUT = 10, 6
X = jax.random.normal(jax.random.key(5), (3, 4, D_IN))


def dense(x=X, width=D_OUT):
    module = nn.Sequential([nn.Dense(width), nn.Dense(width)])
    return jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))


def formula(own, scale):
    """`ΔW[i, o] = scale · (Σ_j a1[i, j] b1[j, o]) (Σ_k a2[i, k] b2[k, o])`."""
    own = {leaf: np.asarray(value, np.float64) for leaf, value in own.items()}
    rank = own["a1"].shape[1]
    change = np.zeros((len(own["a1"]), own["b1"].shape[1]))
    for i, o in np.ndindex(change.shape):
        first, second = (sum(own[f"a{n}"][i, j] * own[f"b{n}"][j, o] for j in range(rank)) for n in (1, 2))
        change[i, o] = scale * first * second
    return change


@pytest.mark.parametrize("rank", [1, 3])  # by thin factors, and by the change
def test_it_is_its_formula_in_float64(rank):
    backbone = dense()
    bare = backbone(X)
    delta = jdelta.LohaModel(backbone, ["layers_0"], r=rank, alpha=5)
    np.testing.assert_array_equal(backbone(X), bare)
    trains, frozen = delta.partition()
    params = backbone.params = jdelta.combine(noisy(trains), frozen)
    first, second = (jax.tree.map(np.float64, params[f"layers_{i}"]) for i in (0, 1))
    kernel = first["kernel"] + formula(params["layers_0"]["loha"], 5 / rank)
    want = (np.asarray(X, np.float64) @ kernel + first["bias"]) @ second["kernel"] + second["bias"]
    assert np.abs(want - bare).max() > 0.05
    np.testing.assert_allclose(backbone(X), want, rtol=1e-5, atol=1e-5)


def test_starts():
    weight = jax.ShapeDtypeStruct((400, 200), jnp.float32)
    own = LohaRule(25, 1.0).init(jax.random.key(0), weight)
    assert not own["a2"].any()
    own = LohaRule(25, 1.0, random=True).init(jax.random.key(0), weight)
    for leaf, bound in {"a1": 0.05, "a2": 0.05, "b1": 0.2, "b2": 0.2}.items():
        assert 0.95 * bound < jnp.abs(own[leaf]).max() <= bound
    backbone = dense()
    bare = backbone(X)
    jdelta.LohaModel(backbone, ["layers_0"], r=3, init_weights=False)
    assert jnp.abs(backbone(X) - bare).max() > 1e-3


def test_patterns_give_modules_their_own_rank_and_scale():
    config = jdelta.LohaConfig(r=4, alpha=8, rank_pattern={"layers_1": 2}, alpha_pattern={"layers_0": 6})
    assert config.rule("layers_0") == LohaRule(4, 1.5)
    assert config.rule("layers_1") == LohaRule(2, 4.0)
    assert config.rule("other") == LohaRule(4, 2.0)


@pytest.mark.parametrize("rank", [2, 20])
def test_the_change_is_formed_only_where_that_is_cheaper(rank):
    x = jnp.zeros((4, 64))
    backbone = dense(x, 64)
    jdelta.LohaModel(backbone, ["layers_0"], r=rank)
    text = str(jax.make_jaxpr(lambda params: backbone(x, params=params))(backbone.params))
    assert (f"f32[64,{rank**2}]" in text) == (rank == 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"r": 0}, "r is at least 1"), ({"rank_pattern": {"layers_0": 0}}, "rank_pattern"), ({"alpha": "8"}, "alpha")],
)
def test_what_it_cannot_do_is_an_error_that_says_why(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        jdelta.LohaModel(dense(), ["layers_0"], **arguments)


@pytest.mark.parametrize("field", ["rank_dropout", "module_dropout", "use_effective_conv2d"])
def test_options_of_peft_that_it_lacks_are_refused_by_name(field, tmp_path):
    backbone = dense()
    delta = jdelta.LohaModel(backbone, ["layers_0"], r=2)
    delta.to_peft(tmp_path, allow_untrained=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: 0.1}))
    with pytest.raises(ValueError, match=f"{field}=0.1 is an unsupported option of LOHA"):
        jdelta.from_peft(tmp_path, dense())


def test_convolutions_are_not_exchanged_with_peft(tmp_path):
    x = jnp.zeros((1, 9, 4))
    module = nn.Sequential([nn.Conv(6, (3,))])
    backbone = jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    delta = jdelta.LohaModel(backbone, ["layers_0"], r=2)
    with pytest.raises(ValueError, match=r"LOHA at 'layers_0', Conv: that is not exchanged with PEFT"):
        delta.to_peft(tmp_path, allow_untrained=True)
