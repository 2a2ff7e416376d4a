"""RoAd against its formula in float64, and what it refuses."""

import jax
import numpy as np
import pytest
from conftest import noisy
from flax import linen as nn

import jdelta

D_IN, D_OUT = 5, 12
X = jax.random.normal(jax.random.key(5), (3, 4, D_IN))


def backbone_of(layer, x=X):
    module = nn.Sequential([layer])
    params = module.init(jax.random.key(0), x)["params"]
    return jdelta.Backbone(module, jax.tree.map(lambda leaf: leaf + 0.1, params), dummy_inputs=(x,))


def rotation(variant, group_size, theta, alpha):
    """`R`, by which rows are multiplied, entry by entry."""
    matrix, half = np.zeros((D_OUT, D_OUT)), group_size // 2
    for i in range(D_OUT):
        group, place = divmod(i, group_size)
        if place >= half:
            continue
        j = i + half
        if variant == "road_1":  # one of each for a pair
            of_cosine = of_sine = [group * half + place] * 2
        elif variant == "road_2":
            of_cosine = of_sine = [i, j]
        else:
            of_cosine = [2 * group * group_size + place, 2 * group * group_size + place + half]
            of_sine = [(2 * group + 1) * group_size + place, (2 * group + 1) * group_size + place + half]
        matrix[i, i] = alpha[of_cosine[0]] * np.cos(theta[of_cosine[0]])
        matrix[j, j] = alpha[of_cosine[1]] * np.cos(theta[of_cosine[1]])
        matrix[j, i] = -alpha[of_sine[0]] * np.sin(theta[of_sine[0]])
        matrix[i, j] = alpha[of_sine[1]] * np.sin(theta[of_sine[1]])
    return matrix


@pytest.mark.parametrize("group_size", [2, 4, 12])
@pytest.mark.parametrize(("variant", "size"), [("road_1", 6), ("road_2", 12), ("road_4", 24)])
def test_it_is_its_formula_in_float64(variant, size, group_size):
    backbone = backbone_of(nn.Dense(D_OUT))
    bare = backbone(X)
    delta = jdelta.RoadModel(backbone, ["layers_0"], variant=variant, group_size=group_size)
    np.testing.assert_array_equal(backbone(X), bare)
    trains, frozen = delta.partition()
    backbone.params = jdelta.combine(noisy(trains), frozen)
    own = {key: np.asarray(leaf, np.float64) for key, leaf in backbone.params["layers_0"]["road"].items()}
    host = {key: np.asarray(backbone.params["layers_0"][key], np.float64) for key in ("kernel", "bias")}
    assert own["theta"].shape == own["alpha"].shape == (size,)
    turned = rotation(variant, group_size, own["theta"], own["alpha"])
    want = (np.asarray(X, np.float64) @ host["kernel"] + host["bias"]) @ turned
    assert np.abs(want - bare).max() > 0.05
    np.testing.assert_allclose(backbone(X), want, rtol=1e-5, atol=1e-5)
    delta.merge()
    np.testing.assert_allclose(backbone.params["layers_0"]["bias"], host["bias"] @ turned, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(backbone(X), want, rtol=1e-5, atol=1e-5)


def test_channels_of_a_grouped_convolution_are_rotated_within_their_group():
    x = jax.random.normal(jax.random.key(1), (2, 7, 4))
    backbone = backbone_of(nn.Conv(8, (3,), feature_group_count=2), x)
    delta = jdelta.RoadModel(backbone, ["layers_0"], group_size=4)
    trains, frozen = delta.partition()
    backbone.params = jdelta.combine(noisy(trains), frozen)
    out = backbone(x)
    delta.merge()
    np.testing.assert_allclose(backbone(x), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "arguments", "message"),
    [
        (nn.Dense(12), {"group_size": 0}, "group_size is at least 1"),
        (nn.Dense(12), {"group_size": 3}, "group_size is even"),
        (
            nn.Dense(12),
            {"group_size": 8},
            r"RoadRule at layers_0\.kernel: group_size=8 does not .* features, 12",
        ),
        (nn.Dense(12), {"variant": "road_3"}, "There are: road_1, road_2, road_4"),
        (nn.Conv(10, (3,), feature_group_count=5), {"group_size": 10}, "different groups of this convolution"),
        (
            nn.Einsum((5, 6), "abi,io->oab"),
            {"group_size": 2},
            "features that go out, which have to be in the last",
        ),
    ],
)
def test_what_it_cannot_do_is_an_error_that_says_why(layer, arguments, message):
    backbone = backbone_of(layer)
    before = backbone.params
    with pytest.raises((TypeError, ValueError), match=message):
        jdelta.RoadModel(backbone, ["layers_0"], **arguments)
    assert backbone.params is before
