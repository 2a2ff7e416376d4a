"""Parameters by name, and which of them a run reads."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.core import freeze

import jdelta
from jdelta.core.parameters import find_parameters, unread
from jdelta.hosts.adapting import adapt


class Experts(nn.Module):
    """A choice of experts: two stacked weights, a table of whole numbers, and a leaf that nothing reads."""

    @nn.compact
    def __call__(self, x):
        wi = self.param("wi", nn.initializers.lecun_normal(), (3, x.shape[-1], 5))
        wo = self.param("wo", nn.initializers.lecun_normal(), (3, 5, x.shape[-1]))
        order = self.param("order", lambda key: jnp.arange(3))
        self.param("spare", nn.initializers.zeros, (2, 2))
        h = jnp.einsum("bi,eio->beo", x, wi[order])
        return jnp.einsum("beo,eoi->bi", nn.relu(h), wo)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(4, name="router")(x) + Experts(name="moe")(x), None


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(11):
            x, _ = Layer(name=f"layer_{i}")(x)
        return x


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return layers(name="layers")(x, None)[0]


X = jnp.ones((2, 4))


def structure_of(module):
    return adapt(jdelta.Backbone(module, None, (X,))).structure()


@pytest.fixture(scope="module")
def network():
    return structure_of(Network())


def names(paths):
    return [".".join(path) for path in paths]


def test_an_end_match_names_leaves_at_a_dot_boundary_in_order_of_execution(network):
    assert names(find_parameters(network, ["moe.wi"])) == [f"layer_{i}.moe.wi" for i in range(11)]
    assert names(find_parameters(network, ["layer_1.moe.wi"])) == ["layer_1.moe.wi"]
    with pytest.raises(ValueError, match="no parameter ends with 'i'"):
        find_parameters(network, ["i"])


def test_a_regex_names_leaves(network):
    assert names(find_parameters(network, [r"[r]layer_[02]\.moe\.w[io]"])) == [
        f"layer_{i}.moe.{leaf}" for i in (0, 2) for leaf in ("wi", "wo")
    ]


def test_a_leaf_that_two_patterns_mean_is_given_once(network):
    assert names(find_parameters(network, ["layer_3.moe.wi", "[r]layer_3.moe.wi"])) == ["layer_3.moe.wi"]


def test_exclusion_takes_out_modules_with_their_leaves_and_single_leaves(network):
    only = find_parameters(network, ["wi", "wo"], exclude=[r"[r]layer_[1-9]0?", "layer_0.moe.wo"])
    assert names(only) == ["layer_0.moe.wi"]


def test_an_exclusion_that_leaves_nothing_or_means_nothing_is_an_error(network):
    with pytest.raises(ValueError, match=r"'wi'.*exclude_modules=\['moe'\] leaves none"):
        find_parameters(network, ["wi"], exclude=["moe"])
    with pytest.raises(ValueError, match="exclude_modules: no module ends with 'meo'"):
        find_parameters(network, ["wi"], exclude=["meo"])


def test_a_pattern_that_means_modules_says_which_leaves_there_are(network):
    with pytest.raises(
        ValueError, match=r"means the module 'layer_4.router'.*layer_4\.router\.kernel.*modified_modules"
    ):
        find_parameters(network, ["layer_4.router"])


def test_a_pattern_that_means_nothing_shows_the_closest(network):
    with pytest.raises(ValueError, match=r"no parameter ends with 'router.kernal'\. Closest: ….router.kernel \(11 par"):
        find_parameters(network, ["router.kernal"])


def test_a_bare_string_is_an_error(network):
    with pytest.raises(TypeError, match=r"Write \['wi'\]"):
        find_parameters(network, "wi")


def test_whole_numbers_are_an_error(network):
    with pytest.raises(TypeError, match=r"'layer_0\.moe\.order' holds int32"):
        find_parameters(network, ["order"])


def test_leaves_in_a_module_that_takes_none_of_a_delta_are_an_error(network):
    closed = dataclasses.replace(network["layer_2"], closed="it is something else inside.")
    structure = dataclasses.replace(network, modules={**network.modules, "layer_2": closed})
    with pytest.raises(ValueError, match=r"'layer_2' cannot be a target: it is something else inside"):
        find_parameters(structure, ["moe.wi"])
    assert len(find_parameters(structure, ["moe.wi"], exclude=["layer_2"])) == 10


@pytest.mark.parametrize("module", [Network(), Scanned()], ids=["modules", "scan and remat"])
def test_leaves_that_no_output_depends_on_are_unread(module):
    params = module.init(jax.random.key(0), X)["params"]
    found = unread(lambda params: module.apply({"params": params}, X), params)
    assert {path[-1] for path in found} == {"spare"}
    assert len(found) == (11 if isinstance(module, Network) else 1)


def test_a_head_whose_result_is_not_returned_is_unread():
    params = {"used": jnp.ones(2), "inner": {"head": jnp.ones(2)}}

    def run(params):
        _ = X[0, :2] @ params["inner"]["head"]
        return jax.lax.cond(True, lambda p: p["used"] * 2, lambda p: p["used"], params)

    assert unread(run, params) == [("inner", "head")]


def test_unread_takes_frozen_trees_and_boxed_leaves():
    boxed = nn.Partitioned(jnp.ones(2), names=(None,))
    params = freeze({"used": boxed, "spare": boxed})
    assert unread(lambda params: params["used"].value * 2, params) == [("spare",)]


def test_unread_takes_shapes():
    params = {"used": jax.ShapeDtypeStruct((2,), jnp.float32), "spare": jax.ShapeDtypeStruct((2,), jnp.float32)}
    assert unread(lambda params: params["used"] * 2, params) == [("spare",)]


def test_the_structure_lists_parameters_by_the_names_that_patterns_mean():
    module = nn.Sequential([nn.Dense(3), nn.Dense(2)])
    structure = adapt(jdelta.Backbone(module, dummy_inputs=(jnp.ones((1, 4)),))).structure()
    listed = {parameter.name: (parameter.shape, parameter.dtype) for parameter in structure.parameters}
    assert listed["layers_1.kernel"] == ((3, 2), jnp.float32)
    assert [name for name in listed if jdelta.match([name], [name])] == list(listed)
    assert len(listed) == 4
