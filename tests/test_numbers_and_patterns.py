"""Every pattern that means nothing and every number that is none is an error, wherever it is given."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh
from flax import linen as nn

import jdelta
from jdelta.core.config import METHODS

NO_NUMBERS = [math.nan, math.inf, -math.inf, 10**400, 10**5000, 1e300]


def fields(*types):
    return [
        (config, field.name)
        for config in METHODS.values()
        if config.__module__.startswith("jdelta.")
        for field in dataclasses.fields(config)
        if field.type in types
    ]


@pytest.mark.parametrize(("config", "field"), fields("float"))
def test_no_method_takes_a_number_that_is_none(config, field):
    for value in NO_NUMBERS:
        with pytest.raises(ValueError, match=f"{field}="):
            config(**{field: value})
    for value in ("1", True, None, 1j):
        with pytest.raises(TypeError, match=f"{field} is a number"):
            config(**{field: value})


# Where 0 counts too, and the seeds, which may be below it.
FROM_0 = {
    *(("AdaLoraConfig", "tinit"), ("AdaLoraConfig", "tfinal")),
    *(("GraLoraConfig", "hybrid_r"), ("OFTConfig", "r"), ("OFTConfig", "oft_block_size")),
}
SEEDS = {"random_loc_seed", "projection_prng_key"}
LOW = {("LokrConfig", "decompose_factor"): [0, -2]}  # where -1 stands for something else


@pytest.mark.parametrize(("config", "field"), fields("int"))
def test_no_method_takes_a_whole_number_that_is_none(config, field):
    low = [] if field in SEEDS else [-1] if (config.__name__, field) in FROM_0 else [0, -1]
    for value in (*LOW.get((config.__name__, field), low), 10**400, 10**5000):
        with pytest.raises(ValueError, match=field):
            config(**{field: value})
    for value in ("1", True, None, 1.5, math.nan):
        with pytest.raises(TypeError, match=f"{field} is a whole number"):
            config(**{field: value})


def test_numbers_of_numpy_are_numbers():
    config = jdelta.LoraConfig(lora_r=np.int64(4), lora_alpha=np.float32(8), rank_pattern={"query": np.int32(2)})
    assert (config.lora_r, config.lora_alpha, config.rank_pattern) == (4, 8.0, {"query": 2})
    assert type(config.lora_r) is int


def test_no_pattern_stands_for_a_number_that_is_none():
    for alpha in NO_NUMBERS:
        with pytest.raises(ValueError, match="alpha_pattern="):
            jdelta.LoraConfig(alpha_pattern={"query": alpha})


def backbone():
    x = jnp.ones((1, 4))
    module = nn.Sequential([nn.Dense(6), nn.Dense(6), nn.Dense(6)])
    return jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))


PATTERNS = {
    "no module": ({"layers_7": 2}, r"has 'layers_7', which means none of the 2 modules.*Closest: ….layers_"),
    "no module that is changed": ({"layers_2": 2}, r"has 'layers_2', which means none of the 2 modules"),
    "one that an earlier pattern has": (
        {"[r]layers_.": 2, "layers_0": 1},
        r"has 'layers_0', and .* earlier pattern counts",
    ),
}


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("case", PATTERNS)
def test_a_pattern_of_ranks_or_alphas_that_means_nothing(field, case):
    model = backbone()
    module, params, (pattern, message) = model.module, model.params, PATTERNS[case]
    with pytest.raises(ValueError, match=f"LoraModel: {field} {message}"):
        jdelta.LoraModel(model, modified_modules=["layers_0", "layers_1"], lora_r=2, **{field: pattern})
    assert model.module is module
    assert model.params is params


def test_a_pattern_of_one_module_goes_before_that_of_all():
    delta = jdelta.LoraModel(
        backbone(), modified_modules=["[r]layers_."], rank_pattern={"layers_0": 1, "[r]layers_.": 2}
    )
    assert [leaf.shape for leaf in jax.tree.leaves(delta.shapes())] == [(4, 1), (1, 6), (6, 2), (2, 6), (6, 2), (2, 6)]


ODD_KEYS = {
    "nothing": (None, TypeError),
    "a bool": (True, TypeError),
    "a float": (0.0, TypeError),
    "a string": ("0", TypeError),
    "an array of floats": (jnp.zeros(2), TypeError),
    "half a key": (jnp.zeros(1, jnp.uint32), TypeError),
    "several keys": (jax.random.split(jax.random.key(0), 3), ValueError),
    "several old keys": (jnp.zeros((3, 2), jnp.uint32), ValueError),
    "a seed too large": (2**80, ValueError),
}


@pytest.mark.parametrize("case", ODD_KEYS)
def test_what_is_no_key(case):
    rng, error = ODD_KEYS[case]
    model = backbone()
    module = model.module
    with pytest.raises(error, match="rng"):
        jdelta.LoraModel(model, modified_modules=["layers_0"], lora_r=2, rng=rng)
    assert model.module is module
    delta = jdelta.LoraModel(model, modified_modules=["layers_0"], lora_r=2)
    with pytest.raises(error, match="rng"):
        delta.init(rng)
    with pytest.raises(error, match="rng"):
        jdelta.weighted_sum([delta.finetuned()], [1.0], "dare_linear", density=0.5, rng=rng)


def test_seeds_and_keys_of_both_kinds_give_the_same_values():
    delta = jdelta.LoraModel(backbone(), modified_modules=["layers_0"], lora_r=2)
    wanted = delta.init(7)
    for rng in (np.int64(7), jax.random.key(7), jax.random.PRNGKey(7), np.asarray(jax.random.PRNGKey(7)), jnp.int32(7)):
        for init in (delta.init, jax.jit(delta.init)):
            assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), init(rng), wanted))


@pytest.mark.parametrize("name", ["a.b", "", " ", "params", "deltas", "a\n", "\ud800", 3])
def test_no_verb_gives_a_delta_a_name_that_it_cannot_have(name):
    model = backbone()
    found = jdelta.LoraModel(model, modified_modules=["layers_0"], lora_r=2).finetuned()
    for verb in (
        lambda: jdelta.LoraModel(model, modified_modules=["layers_1"], lora_r=2, name=name),
        lambda: jdelta.weighted_sum([found], [1.0], name=name),
        lambda: jdelta.interpolate(found, found, 0.5, name=name),
        lambda: jdelta.negate(found, name=name),
        lambda: found.renamed(name),
        lambda: dataclasses.replace(found, name=name),
        lambda: jdelta.AutoDeltaModel.from_finetuned(found, model, name=name),
    ):
        with pytest.raises(ValueError, match="a delta's name is a word without dots"):
            verb()


def test_arithmetic_with_what_is_no_number():
    found = jdelta.LoraModel(fresh("bert", "FlaxBertModel"), lora_r=2).finetuned()
    for weight in NO_NUMBERS:
        with pytest.raises(ValueError, match="weight 2="):
            jdelta.weighted_sum([found, found], [1.0, weight])
        with pytest.raises(ValueError, match="t="):
            jdelta.interpolate(found, found, weight)
    for weight in ("0.5", True, None):
        with pytest.raises(TypeError, match="weight 2 is a number"):
            jdelta.weighted_sum([found, found], [1.0, weight])
        with pytest.raises(TypeError, match="t is a number"):
            jdelta.interpolate(found, found, weight)
    with pytest.raises(TypeError, match="rank is a whole number"):
        jdelta.weighted_sum([found], [1.0], "svd", rank=2.0)
    with pytest.raises(TypeError, match="density is a number"):
        jdelta.weighted_sum([found], [1.0], "ties", density="0.5")
