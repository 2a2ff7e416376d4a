"""Compacter against np.kron in float64, and what is shared, fixed and counted."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from tiers import breadth

import jdelta
from jdelta.methods.compacter import Compacter, CompacterConfig, SharedLeaves
from jdelta.models import CompacterModel
from jdelta.trees import surgery

D, N, FACTOR, RANK = 16, 2, 4, 3  # hidden size, hypercomplex_division, reduction_factor, phm_rank
K = D // FACTOR
X = jax.random.normal(jax.random.key(5), (2, 6, D))


class Hosts(nn.Module):
    """Hosts in a row."""

    widths: tuple[int, ...] = (D, D)

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = jnp.tanh(nn.Dense(width, name=f"host_{i}")(x))
        return x


def attach(module=None, x=X, **arguments):
    module = Hosts() if module is None else module
    backbone = jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    before = backbone(x)
    small = {"hypercomplex_division": N, "reduction_factor": FACTOR, "phm_rank": RANK}
    hosts = arguments.pop("modified_modules", [r"[r]host_\d"])
    return backbone, CompacterModel(backbone, modified_modules=hosts, **{**small, **arguments}), before


def at_scale_one(tree):
    """Random leaves under which every value inside the adapter is of order 1."""
    draw = np.random.default_rng(0)

    def new(path, leaf):
        scale = 1 if path[-1].key == "bias" else np.sqrt(leaf.shape[-2])
        return (draw.normal(size=leaf.shape) / scale).astype(np.float32)

    return jax.tree_util.tree_map_with_path(new, tree)


def f64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def products(p, name):
    return p[name] if name in p else [a @ b for a, b in zip(p[name + "_left"], p[name + "_right"], strict=True)]


def weight(p):
    """Σ_i phm_rule_i ⊗ W_i."""
    return sum(np.kron(a, b) for a, b in zip(products(p, "phm_rule"), products(p, "W"), strict=True))


def compacter(y, p):
    z = gelu_new(y @ weight(p["down"]) + p["down"].get("bias", 0))
    return y + z @ weight(p["up"]) + p["up"].get("bias", 0)


def with_shared(p, root):
    """A host's leaves, together with those at the root (of hosts that all have one width)."""
    full = {side: dict(p.get(side, {})) for side in ("down", "up")}
    for name, leaf in root.items():
        if name.startswith("phm_rule"):
            full["down"][name] = full["up"][name] = leaf
        else:
            side, rest = name.split("_", 1)
            full[side][rest.rpartition("_")[0]] = leaf
    return full


def hosts_in_float64(params, x=X):
    """What `Hosts` computes with compacters of these leaves."""
    params, x = f64(params), np.asarray(x, np.float64)
    for name in sorted(key for key in params if key.startswith("host")):
        p = params[name]
        y = x @ p["kernel"] + p["bias"]
        x = np.tanh(compacter(y, with_shared(p["compacter"], params.get("compacter", {}))))
    return x


def count(config, hosts, d=D):
    """How many numbers train, by the closed formula: n³ for a rule (n² + n² factorised) and din·dout/n for a W
    ((din + dout)·rank factorised)."""
    n, k = config.hypercomplex_division, d // config.reduction_factor
    rule = 2 * n**2 if config.factorized_phm_rule else n**3
    w = (d + k) * config.phm_rank if config.factorized_phm else d * k // n
    total = (1 if config.shared_phm_rule else 2 * hosts) * rule * config.learn_phm
    return total + (2 if config.shared_W_phm else 2 * hosts) * w + hosts * (d + k)


SWITCHES = ("factorized_phm", "factorized_phm_rule", "learn_phm", "shared_phm_rule", "shared_W_phm")


def in_float64(backbone, params):
    """The output, computed in float64: float32 rounds these sums by up to 1e-6."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        return np.asarray(backbone(np.asarray(X, np.float64), params=params))


@pytest.mark.parametrize(
    "values",
    breadth(itertools.product([True, False], repeat=5), (True, False, True, False, True)),
)
def test_every_combination_is_its_formula_trains_and_counts(values):
    options = dict(zip(SWITCHES, values, strict=True))
    backbone, delta, _ = attach(**options)
    trainable, frozen = delta.partition()
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == count(delta.config, hosts=2)
    rules = {path for path in surgery.flatten(delta.shapes()) if path[-1].startswith("phm_rule")}
    assert rules
    assert all((path in surgery.flatten(trainable)) == delta.config.learn_phm for path in rules)

    own = at_scale_one(delta.shapes())
    params = jdelta.graft(jdelta.prune(backbone.params, "compacter"), own)
    expected = hosts_in_float64(params)
    assert 0.5 < np.abs(expected).max() <= 1  # tanh
    np.testing.assert_allclose(in_float64(backbone, params), expected, rtol=0, atol=1e-6)

    trainable, frozen = delta.partition(params)
    gradients = jax.grad(lambda t: jnp.sum(backbone(X, params=jdelta.combine(t, frozen)) ** 2))(trainable)
    for path, gradient in surgery.flatten(gradients).items():
        assert np.abs(gradient).max() > 1e-5, path


@pytest.mark.parametrize("biases", breadth(itertools.product([True, False], repeat=2), (False, True)))
def test_either_bias_can_be_left_out(biases):
    up, down = biases
    backbone, delta, _ = attach(use_bias_up_sampler=up, use_bias_down_sampler=down)
    assert ("bias" in backbone.params["host_0"]["compacter"]["up"]) == up
    assert ("bias" in backbone.params["host_0"]["compacter"]["down"]) == down
    params = jdelta.graft(jdelta.prune(backbone.params, "compacter"), at_scale_one(delta.shapes()))
    np.testing.assert_allclose(in_float64(backbone, params), hosts_in_float64(params), rtol=0, atol=1e-6)


class Scanned(nn.Module):
    """Three hosts in a scan."""

    @nn.compact
    def __call__(self, x):
        def body(host, x, _):
            return jnp.tanh(host(x)), None

        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(nn.Dense(D, name="host"), x, None)[0]


@pytest.mark.slow
def test_hosts_in_a_scan_share_one_rule_and_one_w():
    backbone, delta, _ = attach(
        Scanned(), modified_modules=["host"], shared_phm_rule=True, shared_W_phm=True, factorized_phm=False
    )
    own = at_scale_one(delta.shapes())
    assert own["compacter"]["phm_rule"].shape == (N, N, N)
    assert own["compacter"]["down_W_8x2"].shape == (N, D // N, K // N)
    assert own["host"]["compacter"]["down"]["bias"].shape == (3, K)
    params = jdelta.graft(jdelta.prune(backbone.params, "compacter"), own)
    layers = {f"host_{i}": jax.tree.map(lambda a, i=i: a[i], params["host"]) for i in range(3)}
    expected = hosts_in_float64({**layers, "compacter": params["compacter"]})
    np.testing.assert_allclose(in_float64(backbone, params), expected, rtol=0, atol=1e-6)


def test_hosts_of_different_widths_share_what_has_the_same_shape():
    backbone, *_ = attach(Hosts((D, 2 * D, D)), shared_phm_rule=True, shared_W_phm=True)
    assert set(backbone.params["compacter"]) == {
        "phm_rule",
        "down_W_left_8x3",
        "down_W_right_3x2",
        "down_W_left_16x3",
        "down_W_right_3x4",
        "up_W_left_2x3",
        "up_W_right_3x8",
        "up_W_left_4x3",
        "up_W_right_3x16",
    }
    assert set(backbone.params["host_1"]["compacter"]["down"]) == {"bias"}


def test_what_is_shared_comes_off_and_back():
    backbone, delta, before = attach(shared_phm_rule=True, shared_W_phm=True)
    after = backbone(X)
    assert (after != before).any()
    delta.detach()
    assert "compacter" not in backbone.params
    assert (backbone(X) == before).all()
    delta.attach()
    assert (backbone(X) == after).all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.slow
def test_a_rule_that_is_not_learnt_stays_as_it_was_drawn(shared):
    backbone, delta, _ = attach(learn_phm=False, shared_phm_rule=shared, rng=3)
    again, *_ = attach(learn_phm=False, shared_phm_rule=shared, rng=3)
    chex.assert_trees_all_equal(backbone.params, again.params)
    tx = delta.optimizer(optax.adamw(0.1, weight_decay=0.1))
    state, params = tx.init(backbone.params), backbone.params
    for _ in range(2):
        gradients = jax.grad(lambda p: jnp.sum(backbone(X, params=p) ** 2))(params)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    host, old = params["host_0"]["compacter"], backbone.params["host_0"]["compacter"]
    assert (host["down"]["W_left"] != old["down"]["W_left"]).any()
    holders = (params, backbone.params) if shared else (params["host_0"], backbone.params["host_0"])
    rule, drawn = (tree["compacter"] if shared else tree["compacter"]["down"] for tree in holders)
    assert drawn["phm_rule"].any()
    assert (rule["phm_rule"] == drawn["phm_rule"]).all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.slow
def test_initial_values(shared):
    def leaves(**more):
        config = CompacterConfig(hypercomplex_division=8, phm_rank=4, **more)
        own = jax.eval_shape(Compacter(48, config).init, jax.random.key(0), jnp.ones((2, 768)))["params"]
        if not shared:
            return jax.jit(Compacter(48, config).init)(jax.random.key(0), jnp.ones((2, 768)))["params"]
        shapes = tuple((path, leaf.shape) for path, leaf in surgery.flatten(own).items() if path[-1] != "bias")
        made, _ = SharedLeaves(config, shapes).init_with_output(jax.random.key(0))
        zeros = {path: jnp.zeros(leaf.shape) for path, leaf in surgery.flatten(own).items()}
        return surgery.unflatten({**zeros, **made})

    p = leaves()
    assert np.std(p["down"]["phm_rule"]) == pytest.approx(0.01, rel=0.15)
    bound = np.sqrt(2 * 6 / (96 + 4))  # of each of the n matrices: gain √2 times √(6 / (fan_in + fan_out))
    assert np.abs(p["down"]["W_left"]).max() == pytest.approx(bound, rel=0.01)
    assert np.std(p["down"]["W_left"]) == pytest.approx(bound / np.sqrt(3), rel=0.1)
    assert not p["down"]["bias"].any()
    assert not p["up"]["bias"].any()
    p = leaves(phm_c_init="uniform", hypercomplex_nonlinearity="glorot-normal")
    assert 0.0095 < np.abs(p["down"]["phm_rule"]).max() <= 0.01
    assert np.std(p["up"]["W_right"]) == pytest.approx(np.sqrt(2 * 2 / (96 + 4)), rel=0.1)
    p = leaves(hypercomplex_nonlinearity="normal", phm_init_range=0.02, factorized_phm=False)
    assert np.std(p["down"]["W"]) == pytest.approx(0.02, rel=0.1)
    p = leaves(hypercomplex_nonlinearity="normal")
    assert np.std(p["down"]["W_left"]) == pytest.approx(1e-4, rel=0.1)


@pytest.mark.parametrize("values", breadth(itertools.product([True, False], repeat=3), (False, True, False)))
def test_with_zero_up_the_output_is_unchanged_and_the_second_gradient_reaches_every_leaf(values):
    options = dict(zip(("factorized_phm", "shared_phm_rule", "shared_W_phm"), values, strict=True))
    backbone, delta, before = attach(zero_up=True, **options)
    assert (backbone(X) == before).all()
    trainable, frozen = delta.partition()
    gradient = jax.grad(lambda t: jnp.sum(backbone(X, params=jdelta.combine(t, frozen)) ** 2))
    moved = jax.tree.map(lambda p, g: p - 0.1 * jnp.sign(g), trainable, gradient(trainable))
    for path, leaf in surgery.flatten(gradient(moved)).items():
        assert leaf.any(), path


def test_it_is_near_the_identity_at_first():
    backbone, _, before = attach()
    chex.assert_trees_all_close(backbone(X), before, atol=1e-2)
    assert (backbone(X) != before).any()


def test_the_number_of_parameters_on_bert_base_is_the_papers():
    """Per layer, two adapters; paper: 4(k + d) for the W of rank 1, and n³ for the one rule."""
    d, n, k = 768, 4, 48
    module = Hosts((d,) * 24)
    x = jax.ShapeDtypeStruct((1, d), jnp.float32)
    backbone = jdelta.Backbone(module, jax.eval_shape(module.init, jax.random.key(0), x)["params"], dummy_inputs=(x,))
    delta = CompacterModel(backbone, modified_modules=[r"[r]host_\d+"], shared_phm_rule=True)
    leaves = surgery.flatten(delta.shapes())
    weights = sum(int(np.prod(leaf.shape)) for path, leaf in leaves.items() if path[-1] != "bias")
    assert weights == 12 * 4 * (k + d) + n**3


WRONG = {
    "no dimension is left": (
        {"reduction_factor": 17},
        ValueError,
        r"CompacterModel at host_0 \(Dense\): reduction_factor=17 leaves nothing of 16 dimensions: take at most 16",
    ),
    "a bottleneck that is not divided": (
        {"hypercomplex_division": 4, "reduction_factor": 8},
        ValueError,
        r"host_0 .*hypercomplex_division=4 has to divide the hidden size 16 and the bottleneck 2 = 16 // "
        r"reduction_factor 8\. Take one of 1, 2, or another reduction_factor",
    ),
    "a hidden size that is not divided": (
        {"hypercomplex_division": 3, "reduction_factor": 5},
        ValueError,
        r"hypercomplex_division=3 has to divide the hidden size 16 and the bottleneck 3",
    ),
    "a division of 0": ({"hypercomplex_division": 0}, ValueError, "hypercomplex_division is at least 1, got 0"),
    "a rank of 0": ({"phm_rank": 0}, ValueError, "phm_rank is at least 1, got 0"),
    "a factor of 0": ({"reduction_factor": 0}, ValueError, "reduction_factor is at least 1, got 0"),
    "a switch that is a number": ({"shared_phm_rule": 1}, TypeError, "shared_phm_rule is True or False, got 1"),
    "an unknown distribution": (
        {"hypercomplex_nonlinearity": "phm"},
        ValueError,
        "hypercomplex_nonlinearity='phm' is unknown. There are: glorot-uniform, glorot-normal, normal",
    ),
    "an unknown distribution of the rule": ({"phm_c_init": "x"}, ValueError, "There are: normal, uniform"),
    "an argument that OpenDelta has": ({"kronecker_prod": True}, TypeError, "has no argument 'kronecker_prod'"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_named(mistake):
    arguments, error, message = WRONG[mistake]
    with pytest.raises(error, match=message):
        attach(**arguments)
