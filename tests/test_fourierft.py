"""FourierFT against its formula in float64, its initial values, and what it refuses."""

import itertools

import jax
import numpy as np
import pytest
from flax import linen as nn

import jdelta
from jdelta.methods.fourierft import LARGEST, permuted
from jdelta.saved.peft.tuners import TUNERS


def dense(d_in, d_out):
    module = nn.Sequential([nn.Dense(d_out), nn.Dense(d_out)])
    x = jax.random.normal(jax.random.key(5), (3, 4, d_in))
    return x, jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))


def formula(spectrum, d_in, d_out, scaling, seed):
    """`scaling / (d_in d_out) Σ_k c_k cos 2π(i u_k / d_in + o v_k / d_out)`."""
    change = np.zeros((d_in, d_out))
    for value, place in zip(spectrum, permuted(d_in * d_out, len(spectrum), seed), strict=True):
        v, u = divmod(int(place), d_in)
        for i, o in itertools.product(range(d_in), range(d_out)):
            change[i, o] += value * np.cos(2 * np.pi * (i * u / d_in + o * v / d_out))
    return scaling * change / (d_in * d_out)


@pytest.mark.parametrize(("d_in", "d_out", "count"), [(10, 6, 7), (9, 5, 45), (4, 8, 32), (1, 6, 3)])
def test_it_is_its_formula_in_float64(d_in, d_out, count):
    x, backbone = dense(d_in, d_out)
    bare = backbone(x)
    jdelta.FourierFTModel(backbone, ["layers_0"], n_frequency=count, scaling=30.0, random_loc_seed=3)
    spectrum = np.asarray(backbone.params["layers_0"]["fourierft"]["spectrum"], np.float64)
    first, second = (
        {key: np.asarray(backbone.params[name][key], np.float64) for key in ("kernel", "bias")}
        for name in ("layers_0", "layers_1")
    )
    change = formula(spectrum, d_in, d_out, 30.0, 3)
    hidden = np.asarray(x, np.float64) @ (first["kernel"] + change) + first["bias"]
    want = hidden @ second["kernel"] + second["bias"]
    assert np.abs(want - bare).max() > 0.05
    np.testing.assert_allclose(backbone(x), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_by_default_it_starts_at_a_normal_distribution_and_at_0_if_asked():
    x, backbone = dense(50, 40)
    bare = backbone(x)
    delta = jdelta.FourierFTModel(backbone, ["layers_0"])
    spectrum = backbone.params["layers_0"]["fourierft"]["spectrum"]
    assert spectrum.shape == (1000,)
    np.testing.assert_allclose([spectrum.mean(), spectrum.std()], [0, 1], atol=0.1)
    delta.remove()
    jdelta.FourierFTModel(backbone, ["layers_0"], init_weights=True)
    np.testing.assert_allclose(backbone(x), bare, atol=1e-6)


def test_patterns_give_modules_their_own_number():
    _, backbone = dense(10, 6)
    names = ["layers_0", "layers_1"]
    jdelta.FourierFTModel(backbone, names, n_frequency=5, n_frequency_pattern={"layers_1": 8})
    assert [backbone.params[name]["fourierft"]["spectrum"].size for name in names] == [5, 8]


@pytest.mark.parametrize("size", [1, 20, 1000])
def test_the_places_are_a_permutation(size):
    whole = permuted(size, size, 0)
    assert sorted(whole) == list(range(size))
    np.testing.assert_array_equal(permuted(size, size // 2, 0), whole[: size // 2])


@pytest.mark.parity
@pytest.mark.parametrize(
    ("size", "count", "seed"),
    [(1024, 1024, 777), (1, 1, 0), (1_000_003, 1000, 2**40 + 5), (999, 7, -3), (4096 * 1024, 1000, 777)],
)
def test_the_places_are_those_that_torch_draws(size, count, seed):
    import torch

    want = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
    np.testing.assert_array_equal(permuted(size, count, seed), want.numpy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_frequency": 0}, "n_frequency is at least 1"),
        ({"n_frequency_pattern": {"layers_0": 0}}, "n_frequency_pattern"),
        (
            {},
            r"FourierFTRule at layers_0\.kernel: n_frequency=1000 is above the number of entries of the weight, 10 · 6",
        ),
        ({"random_loc_seed": None}, "random_loc_seed"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_says_why(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        jdelta.FourierFTModel(dense(10, 6)[1], ["layers_0"], **arguments)


def test_patterns_of_peft_are_read_as_peft_reads_them_and_written_so():
    tuner = TUNERS["FOURIERFT"]
    hosts = {"enc.0.q": "a", "enc.1.q": "b", "q": "c"}
    fields = {"n_frequency": 5, "n_frequency_pattern": {"1.q": 6, "q": 7}}
    assert tuner.arguments(fields, hosts) == {"n_frequency_pattern": {"a": 7, "b": 6, "c": 7}}
    fields = {"n_frequency": 5, "n_frequency_pattern": {"^enc.0.q": 6, "0|1": 8}}
    assert tuner.arguments(fields, hosts) == {"n_frequency_pattern": {"a": 8}}  # `re.match` of `.*\.0|1$`
    config = jdelta.FourierFTConfig(n_frequency=5, n_frequency_pattern={"a": 6})
    assert tuner.written_fields(config, hosts) == {"n_frequency_pattern": {"enc.0.q": 6}}
    config = jdelta.FourierFTConfig(n_frequency=5, n_frequency_pattern={"c": 6})
    with pytest.raises(ValueError, match=r"PEFT would take that of another module for 'enc\.0\.q'"):
        tuner.written_fields(config, hosts)


def test_a_weight_whose_places_depend_on_the_release_of_torch_is_not_exchanged():
    tuner = TUNERS["FOURIERFT"]
    tuner.require_fit({}, 1, LARGEST - 1)
    with pytest.raises(ValueError, match="depends on the release of PyTorch"):
        tuner.require_fit({}, 1, LARGEST)
