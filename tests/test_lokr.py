"""LoKr against its formula in float64, its factors, how it starts, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy
from flax import linen as nn

import jdelta
from jdelta.methods.lokr import LokrRule, split

D_IN, D_OUT = 12, 8
X = jax.random.normal(jax.random.key(5), (3, 4, D_IN))


def dense(x=X, width=D_OUT):
    module = nn.Sequential([nn.Dense(width), nn.Dense(width)])
    return jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))


def formula(own, scale):
    """`scale · w1 ⊗ w2`."""
    own = {leaf: np.asarray(value, np.float64) for leaf, value in own.items()}
    w1, w2 = (own[f"w{i}"] if f"w{i}" in own else own[f"a{i}"] @ own[f"b{i}"] for i in (1, 2))
    return scale * np.kron(w1, w2)


@pytest.mark.parametrize(
    ("arguments", "shapes"),
    [
        ({"r": 1}, {"w1": (3, 2), "a2": (4, 1), "b2": (1, 4)}),
        ({"r": 2}, {"w1": (3, 2), "w2": (4, 4)}),  # 2 is half of 4
        ({"r": 1, "decompose_both": True}, {"a1": (3, 1), "b1": (1, 2), "a2": (4, 1), "b2": (1, 4)}),
        ({"r": 2, "decompose_factor": 6}, {"w1": (6, 2), "w2": (2, 4)}),
        ({"r": 2, "decompose_factor": 1}, {"w1": (1, 1), "a2": (12, 2), "b2": (2, 8)}),
    ],
    ids=str,
)
def test_it_is_its_formula_in_float64(arguments, shapes):
    backbone = dense()
    bare = backbone(X)
    delta = jdelta.LokrModel(backbone, ["layers_0"], alpha=5, **arguments)
    np.testing.assert_array_equal(backbone(X), bare)
    assert {leaf: value.shape for leaf, value in backbone.params["layers_0"]["lokr"].items()} == shapes
    trains, frozen = delta.partition()
    params = backbone.params = jdelta.combine(noisy(trains), frozen)
    first, second = (jax.tree.map(np.float64, params[f"layers_{i}"]) for i in (0, 1))
    kernel = first["kernel"] + formula(params["layers_0"]["lokr"], 5 / arguments["r"])
    want = (np.asarray(X, np.float64) @ kernel + first["bias"]) @ second["kernel"] + second["bias"]
    assert np.abs(want - bare).max() > 0.05
    np.testing.assert_allclose(backbone(X), want, rtol=1e-5, atol=1e-5)


def test_widths_are_split_at_the_factor_or_the_largest_divisor_below_and_below_the_root():
    for size in range(1, 60):
        divisors = [m for m in range(1, size + 1) if size % m == 0]
        below_root = [m for m in divisors if m * m <= size]
        assert split(size, -1) == (max(below_root), size // max(below_root))
        for factor in range(1, 70):
            first = factor if factor in divisors else max(m for m in below_root if m <= factor)
            assert split(size, factor) == (first, size // first)


@pytest.mark.parity
def test_widths_are_split_as_in_peft():
    from parity import peft

    theirs = peft.tuners.lokr.layer.factorization
    for size in range(1, 200):
        for factor in (-1, *range(1, 210)):
            assert split(size, factor) == theirs(size, factor)


@pytest.mark.parametrize(("both", "start"), [(b, s) for b in (False, True) for s in (True, False, "lycoris")])
def test_starts(both, start):
    weight = jax.ShapeDtypeStruct((400, 400), jnp.float32)
    own = LokrRule(4, 1.0, 4 if not both else -1, both, start).init(jax.random.key(0), weight)
    assert set(own) == ({"a1", "b1", "a2", "b2"} if both else {"w1", "a2", "b2"})
    zero = {True: {"w1", "b1"}, False: set(), "lycoris": {"a2"}}[start]
    assert {leaf for leaf, value in own.items() if not value.any()} == zero & set(own)
    for leaf in own.keys() - zero:
        bound = own[leaf].shape[0] ** -0.5
        assert 0.8 * bound < jnp.abs(own[leaf]).max() <= bound


@pytest.mark.parametrize("kind", ["Dense", "Embed"])
def test_the_whole_change_is_not_formed(kind):
    """The rows of an embedding are products of rows."""
    module = nn.Sequential([nn.Dense(64) if kind == "Dense" else nn.Embed(64, 64)])
    x = jnp.zeros((4, 64)) if kind == "Dense" else jnp.array([3, 63, 0])
    backbone = jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    jdelta.LokrModel(backbone, ["layers_0"], r=2, decompose_both=True)
    text = str(jax.make_jaxpr(lambda params: backbone(x, params=params))(backbone.params))
    assert "f32[8,8,8,8]" not in text
    assert "f32[8,2]" in text


def test_patterns_give_modules_their_own_rank_and_scale():
    config = jdelta.LokrConfig(r=4, alpha=8, rank_pattern={"layers_1": 2}, alpha_pattern={"layers_0": 6})
    assert config.rule("layers_0") == LokrRule(4, 1.5)
    assert config.rule("layers_1") == LokrRule(2, 4.0)
    assert config.rule("other") == LokrRule(4, 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r is at least 1"),
        ({"rank_pattern": {"layers_0": 0}}, "rank_pattern"),
        ({"alpha": "8"}, "alpha"),
        ({"decompose_factor": 0}, "decompose_factor is -1 or at least 1, got 0"),
        ({"init_weights": "zeros"}, "init_weights"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_says_why(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        jdelta.LokrModel(dense(), ["layers_0"], **arguments)


@pytest.mark.parametrize("field", ["rank_dropout", "module_dropout", "use_effective_conv2d"])
def test_options_of_peft_that_it_lacks_are_refused_by_name(field, tmp_path):
    delta = jdelta.LokrModel(dense(), ["layers_0"], r=2)
    delta.to_peft(tmp_path, allow_untrained=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: 0.1}))
    with pytest.raises(ValueError, match=f"{field}=0.1 is an unsupported option of LOKR"):
        jdelta.from_peft(tmp_path, dense())


def test_convolutions_are_not_exchanged_with_peft(tmp_path):
    x = jnp.zeros((1, 9, 4))
    module = nn.Sequential([nn.Conv(6, (3,))])
    backbone = jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    delta = jdelta.LokrModel(backbone, ["layers_0"], r=2)
    with pytest.raises(ValueError, match=r"LOKR at 'layers_0', Conv: that is not exchanged with PEFT"):
        delta.to_peft(tmp_path, allow_untrained=True)
