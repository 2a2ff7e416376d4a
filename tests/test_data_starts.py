"""Starts of LoRA from data: EVA, CorDA and LoRA-GA against NumPy in float64, on all hosts, and what is refused."""

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from rich.console import Console

import jdelta
from jdelta.core import data_sums, progress

RNG = np.random.default_rng(0)
BATCHES = [RNG.standard_normal((4, 5, 8)).astype(np.float32) * np.linspace(0.5, 3, 8, dtype="f4") for _ in range(3)]
MASKS = [(RNG.random((4, 5)) < 0.7).astype(np.int32) for _ in range(3)]
BOTH = [{"x": x, "attention_mask": mask} for x, mask in zip(BATCHES, MASKS, strict=True)]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, attention_mask=None):
        x = nn.tanh(nn.Dense(6, name="first")(x))
        return nn.DenseGeneral((3, 4), name="second")(x)


def net():
    module = Net()
    return jdelta.Backbone(module, module.init(jax.random.key(0), BATCHES[0])["params"], (BATCHES[0],))


def attach(start, modules=("first", "second"), **arguments):
    backbone = net()
    arguments = {"lora_r": 2, "lora_alpha": 3, "init_lora_weights": start, **arguments}
    return backbone, jdelta.LoraModel(backbone, list(modules), **arguments)


def loss_of(backbone):
    return lambda params, batch: (backbone(**batch, params=params) ** 2).mean()


def options_of(start, backbone):
    return {"loss": loss_of(backbone)} if start == "lora_ga" else {"rho": 1} if start == "eva" else {}


def inputs(params, counted):
    """What goes into both modules, `(n, d_in)`, in float64, where the masks count it."""
    pairs = zip(BATCHES, MASKS, strict=True)
    first = np.concatenate([x[mask > 0] if counted else x.reshape(-1, 8) for x, mask in pairs])
    first, params = first.astype(np.float64), jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    return {"first": first, "second": np.tanh(first @ params["first"]["kernel"] + params["first"]["bias"])}


def matrix(params, name):
    kernel = np.asarray(params[name]["kernel"], np.float64)
    return kernel.reshape(len(kernel), -1)


def own_of(params, name):
    own = {key: np.asarray(leaf, np.float64) for key, leaf in params[name]["lora"].items()}
    return {key: leaf.reshape(len(leaf), -1) for key, leaf in own.items()}


def principal(x):
    """The shares of variance, and the components, of NumPy's SVD."""
    _, s, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return s**2 / (s**2).sum(), v


def assert_same_directions(a, v):
    """Column by column, up to the sign."""
    np.testing.assert_allclose(np.abs(np.sum(a.T * v[: a.shape[1]], axis=1)), 1, atol=1e-5)


# --- each method


@pytest.mark.parametrize("counted", [False, True])
def test_eva_has_the_principal_components_of_the_inputs_that_count(counted):
    backbone, delta = attach("eva")
    before = backbone(BATCHES[0])
    delta.init_from_data(BOTH if counted else BATCHES, rho=1)
    np.testing.assert_array_equal(backbone(BATCHES[0]), before)
    for name, x in inputs(backbone.params, counted).items():
        own = own_of(backbone.params, name)
        assert_same_directions(own["a"], principal(x)[1])
        assert not own["b"].any()


UNEVEN = {"rank_pattern": {"first": 4}}


def test_eva_shares_out_ranks_by_explained_variance():
    backbone, delta = attach("eva", **UNEVEN)
    before = backbone(BATCHES[0])
    of = {name: principal(x)[0] for name, x in inputs(backbone.params, True).items()}
    best = max(range(2, 7), key=lambda k: of["first"][:k].sum() + of["second"][: 6 - k].sum())  # of the ways to share 6
    assert best == 3
    delta.init_from_data(BOTH, rho=2)
    config = delta.config
    assert {name: config.rank_of(name) for name in of} == {"first": best, "second": 6 - best}
    assert (config.scale_of("first"), config.scale_of("second")) == (3 / 4, 3 / 2)
    np.testing.assert_array_equal(backbone(BATCHES[0]), before)
    for name, x in inputs(backbone.params, True).items():
        own = own_of(backbone.params, name)
        assert own["a"].shape[1] == config.rank_of(name)
        assert_same_directions(own["a"], principal(x)[1])


def test_eva_gives_no_module_more_than_rho_times_its_rank_and_leaves_alphas_alone_if_asked():
    _, delta = attach("eva", **UNEVEN)
    delta.init_from_data(BOTH, rho=1.4, adjust_alpha=False)  # of 2, round(2.8) = 3
    assert (delta.config.rank_of("first"), delta.config.rank_of("second")) == (3, 3)
    assert delta.config.alpha_pattern is None
    _, delta = attach("eva", **UNEVEN)
    delta.init_from_data(BOTH, rho=1.2)  # round(2.4) = 2
    assert (delta.config.rank_of("first"), delta.config.rank_of("second")) == (4, 2)


def test_a_module_that_explains_less_gets_no_rank_and_is_no_target():
    backbone, angles = net(), np.arange(6) * np.pi / 6
    kernel = np.zeros((8, 6), "f4")
    kernel[:2] = 100 * np.cos(angles), 100 * np.sin(angles)
    backbone.params = {**backbone.params, "first": {**backbone.params["first"], "kernel": jnp.asarray(kernel)}}
    delta = jdelta.LoraModel(backbone, ["first", "second"], lora_r=1, init_lora_weights="eva")
    around = np.arange(0.01, 2 * np.pi, np.pi / 50)
    circle = np.zeros((len(around), 8), "f4")  # two directions explain half of the variance each
    circle[:, 0], circle[:, 1] = np.cos(around), np.sin(around)
    before = backbone(circle)
    delta.init_from_data([circle])
    assert delta.targets == ["first"]
    assert delta.config.rank_of("first") == 2
    assert "lora" not in backbone.params["second"]
    np.testing.assert_array_equal(backbone(circle), before)


def test_eva_whitens():
    backbone, delta = attach("eva")
    delta.init_from_data(BATCHES, rho=1, whiten=True)
    x = inputs(backbone.params, False)["first"]
    _, s, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
    a = own_of(backbone.params, "first")["a"]
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), 1 / np.sqrt(s[:2]), rtol=1e-5)
    assert_same_directions(a / np.linalg.norm(a, axis=0), v)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_its_formula(mode):
    backbone, delta = attach("corda")
    before = backbone(BATCHES[0])
    delta.init_from_data(BATCHES, mode=mode)
    np.testing.assert_allclose(backbone(BATCHES[0]), before, atol=1e-6)
    params = backbone.params
    for name, x in inputs(params, False).items():
        calls = [call / abs(call.max()) for call in np.split(x, 3)]
        covariance = sum(call.T @ call for call in calls) / 3
        covariance += 0.01 * np.diag(covariance).mean() * np.eye(len(covariance))
        u, s, v = np.linalg.svd(covariance @ matrix(params, name), full_matrices=False)
        part = slice(0, 2) if mode == "ipm" else slice(-2, None)
        want = np.linalg.inv(covariance) @ (u[:, part] * s[part]) @ v[part]
        own = own_of(params, name)
        np.testing.assert_allclose(1.5 * own["a"] @ own["b"], want, atol=2e-4 * np.abs(want).max())
        np.testing.assert_array_equal(own["a"], own["a0"])
        np.testing.assert_array_equal(own["b"], own["b0"])
        np.testing.assert_allclose(1.5 * (own["b"] ** 2).sum(1), s[part], rtol=1e-4)


DIRECTIONS = {"ArB2r": ([0, 1], [2, 3]), "A2rBr": ([2, 3], [0, 1]), "ArBr": ([1, 3], [0, 2])}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lora_ga_has_singular_vectors_of_the_mean_gradient(direction):
    backbone, delta = attach("lora_ga")
    before, loss = backbone(BATCHES[0]), loss_of(backbone)
    delta.init_from_data(BOTH, loss, direction=direction)
    np.testing.assert_allclose(backbone(BATCHES[0]), before, atol=1e-6)
    bare = net()
    gradients = [jax.grad(loss_of(bare))(bare.params, batch) for batch in BOTH]
    for name in ("first", "second"):
        u, s, v = np.linalg.svd(np.mean([matrix(gradient, name) for gradient in gradients], axis=0))
        of_a, of_b = DIRECTIONS[direction]
        own = own_of(backbone.params, name)
        assert_same_directions(own["a"], u.T[of_a])
        b = s[of_b, None] * v[of_b] * v.shape[0] ** 0.25 / 4
        np.testing.assert_allclose(np.abs(own["b"]), np.abs(b), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "factor_a", "factor_b"), [("unit", 1, 1), ("gd_scale", 1.5, 1.5), ("stable", 1, 6**-0.25 * 3)]
)
def test_lora_ga_scales(scale, factor_a, factor_b):
    backbone, delta = attach("lora_ga", ["first"])
    delta.init_from_data(BOTH, loss_of(backbone), scale=scale, gamma=9)
    gradients = [jax.grad(loss_of(net()))(net().params, batch) for batch in BOTH]
    s = np.linalg.svd(np.mean([matrix(gradient, "first") for gradient in gradients], axis=0))[1]
    own = own_of(backbone.params, "first")
    np.testing.assert_allclose(np.linalg.norm(own["a"], axis=0) * factor_a, 1, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(own["b"], axis=1) * factor_b, s[2:4], rtol=1e-3)


def test_lora_ga_begins_with_the_weights_largest_singular_value_if_asked():
    backbone, delta = attach("lora_ga", ["first"])
    delta.init_from_data(BOTH, loss_of(backbone), scale="weight_svd", direction="random")
    own, largest = own_of(backbone.params, "first"), np.linalg.svd(matrix(backbone.params, "first"))[1][0]
    np.testing.assert_allclose(np.linalg.norm(own["b"], axis=1)[0], largest, rtol=1e-4)


# --- what holds for all


STARTS = ["eva", "corda", "lora_ga"]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_a_started_delta_trains_merges_detaches_and_is_saved(start, use_dora, tmp_path):
    backbone, delta = attach(start, use_dora=use_dora)
    bare = net()(BATCHES[0])
    delta.init_from_data(BOTH, **(options_of(start, backbone) | ({"rho": 2} if start == "eva" else {})))
    np.testing.assert_allclose(backbone(BATCHES[0]), bare, atol=2e-6)
    trains, frozen = delta.partition()
    assert {path[-1] for path in map(tuple, delta.paths)} >= {"a", "b"}
    moved = jax.tree.map(lambda leaf: leaf + 0.1, trains)
    assert not {"a0", "b0"} & {key for own in trains.values() for key in own["lora"]}
    backbone.params = delta.combine(moved, frozen)
    want = backbone(BATCHES[0])
    assert np.abs(want - bare).max() > 0.01
    delta.merge()
    np.testing.assert_allclose(backbone(BATCHES[0]), want, atol=1e-5)
    delta.unmerge()
    delta.save_finetuned(tmp_path / "saved")
    other = net()
    loaded = jdelta.AutoDeltaModel.from_finetuned(tmp_path / "saved", backbone_model=other)
    assert loaded.config == delta.config
    np.testing.assert_array_equal(other(BATCHES[0]), want)
    delta.detach()
    np.testing.assert_array_equal(backbone(BATCHES[0]), bare)


@pytest.mark.parametrize("start", STARTS)
def test_a_tree_of_the_users_own_and_jit_give_the_same_start(start):
    backbone, delta = attach(start)
    options = options_of(start, backbone)
    before = backbone.params
    made = delta.init_from_data(BOTH, params=backbone.params, **options)
    assert backbone.params is before
    jitted = jax.jit(lambda params, batches: delta.init_from_data(batches, params=params, **options))(before, BOTH)
    delta.init_from_data(iter(BOTH), **options)
    for tree in (made, jitted):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), tree, backbone.params)


def test_ranks_are_shared_out_in_a_tree_of_the_users_own():
    backbone, delta = attach("eva", **UNEVEN)
    tree = delta.init_from_data(BOTH, params=backbone.params)
    assert tree["first"]["lora"]["a"].shape[1] == delta.config.rank_of("first") == 3
    other, same = attach("eva", **UNEVEN)
    same.init_from_data(BOTH)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), tree, other.params)
    np.testing.assert_allclose(backbone(BATCHES[0], params=tree), other(BATCHES[0]), atol=1e-6)


def test_the_model_runs_with_other_deltas_and_their_places_stay():
    backbone = net()
    first = jdelta.LoraModel(backbone, ["second"], lora_r=3, init_lora_weights="eva")
    jdelta.AdapterModel(backbone, ["first"], bottleneck_dim=2, name="after")
    params = jax.tree.map(lambda leaf: leaf + 0.1, backbone.params)
    backbone.params = params
    first.init_from_data(BATCHES, rho=1)
    flat = [x.reshape(-1, 8) for x in BATCHES]
    x = np.concatenate(flat) @ params["first"]["kernel"] + params["first"]["bias"]
    adapter = params["first"]["after"]
    z = nn.gelu(x @ adapter["down"]["kernel"] + adapter["down"]["bias"])
    x = np.tanh(x + z @ adapter["up"]["kernel"] + adapter["up"]["bias"])
    assert_same_directions(own_of(backbone.params, "second")["a"], principal(np.asarray(x, np.float64))[1])
    assert [a.name for a in first._state.host.attachments] == ["lora", "after"]


def test_training_without_the_start_warns_and_with_it_does_not(recwarn):
    _, delta = attach("eva")
    with pytest.warns(UserWarning, match="is to start from data"):
        delta.optimizer(optax.sgd(0.1))
    delta.init_from_data(BATCHES)
    recwarn.clear()
    delta.optimizer(optax.sgd(0.1))
    assert not recwarn.list


# --- transformations and hosts


class Layer(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(8, name="dense")(x)), None


class Stack(nn.Module):
    scanned: bool = True
    remat: bool = False
    width: int = 8
    depth: int = 3

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer) if self.remat else Layer
        if self.scanned:
            scanned = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
            return scanned(name="layers")(x, None)[0]
        for i in range(self.depth):
            x, _ = layer(name=f"layers_{i}")(x, None)
        return x


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_layers_in_a_scan_start_as_those_without(start, remat):
    scanned, unrolled = Stack(remat=remat), Stack(scanned=False)
    params = scanned.init(jax.random.key(0), BATCHES[0])["params"]
    flat = {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(3)}
    found = []
    for module, tree in ((scanned, params), (unrolled, flat)):
        backbone = jdelta.Backbone(module, tree, (BATCHES[0],))
        delta = jdelta.LoraModel(backbone, ["dense"], lora_r=2, init_lora_weights=start)
        loss = lambda params, x, backbone=backbone: (backbone(x, params=params) ** 2).mean()  # noqa: E731
        delta.init_from_data(
            BATCHES, **({"loss": loss} if start == "lora_ga" else {"rho": 1} if start == "eva" else {})
        )
        found.append(backbone.params)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], found[0]["layers"]["dense"]["lora"])
        other = found[1][f"layers_{i}"]["dense"]["lora"]
        for key in one:
            scale = np.abs(other[key]).max() + 1e-9
            np.testing.assert_allclose(np.abs(one[key]), np.abs(other[key]), atol=2e-3 * scale)


def test_layers_in_a_scan_share_a_rank():
    module = Stack()
    backbone = jdelta.Backbone(module, module.init(jax.random.key(0), BATCHES[0])["params"], (BATCHES[0],))
    delta = jdelta.LoraModel(backbone, ["dense"], lora_r=2, init_lora_weights="eva")
    delta.init_from_data(BATCHES)
    assert delta.config.rank_pattern is None
    assert backbone.params["layers"]["dense"]["lora"]["a"].shape == (3, 8, 2)


def test_all_calls_of_a_module_count():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(8, name="dense")
            return dense(nn.tanh(dense(x)))

    module = Twice()
    params = module.init(jax.random.key(0), BATCHES[0])["params"]
    backbone = jdelta.Backbone(module, params, (BATCHES[0],))
    delta = jdelta.LoraModel(backbone, ["dense"], lora_r=2, init_lora_weights="eva")
    delta.init_from_data(BATCHES, rho=1)
    x = np.concatenate(BATCHES).reshape(-1, 8)
    second = np.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"])
    assert_same_directions(own_of(backbone.params, "dense")["a"], principal(np.concatenate([x, second]))[1])


@pytest.mark.parametrize("equation", ["btd,dnh->btnh", "...d,dnh->...nh"])
def test_an_einsum_starts_by_its_own_equation_and_experts_are_refused(equation):
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Einsum((8, 3, 2), equation, use_bias=False, name="heads")(x)
            return nn.Einsum((3, 2, 2), "btnh,nhk->btnk", use_bias=False, name="experts")(y)

    module = Heads()
    backbone = jdelta.Backbone(module, module.init(jax.random.key(0), BATCHES[0])["params"], (BATCHES[0],))
    delta = jdelta.LoraModel(backbone, ["heads"], lora_r=2, init_lora_weights="eva")
    delta.init_from_data(BATCHES, rho=1)
    x = np.concatenate(BATCHES).reshape(-1, 8).astype(np.float64)
    assert_same_directions(own_of(backbone.params, "heads")["a"], principal(x)[1])
    experts = jdelta.LoraModel(backbone, ["experts"], lora_r=1, init_lora_weights="eva")
    with pytest.raises(ValueError, match="at experts: what meets the weight there cannot be seen"):
        experts.init_from_data(BATCHES)


class NnxNet(nnx.Module):
    def __init__(self, params):
        self.first = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
        self.second = nnx.LinearGeneral(6, (3, 4), rngs=nnx.Rngs(0))
        for name in ("first", "second"):
            getattr(self, name).kernel[...] = params[name]["kernel"]
            getattr(self, name).bias[...] = params[name]["bias"]

    def __call__(self, x, attention_mask=None):
        return self.second(nnx.tanh(self.first(x)))


@pytest.mark.parametrize("start", STARTS)
def test_an_nnx_module_starts_as_a_linen_module(start):
    backbone, delta = attach(start, **(UNEVEN if start == "eva" else {}))
    model = NnxNet(net().params)
    same = jdelta.LoraModel(
        model,
        ["first", "second"],
        lora_r=2,
        lora_alpha=3,
        rank_pattern=delta.config.rank_pattern,
        init_lora_weights=start,
        dummy_inputs=(BATCHES[0],),
    )
    delta.init_from_data(BOTH, **({"loss": loss_of(backbone)} if start == "lora_ga" else {}))
    before = model(BATCHES[0])
    nnx_loss = lambda model, batch: (model(**batch) ** 2).mean()  # noqa: E731
    same.init_from_data(BOTH, **({"loss": nnx_loss} if start == "lora_ga" else {}))
    np.testing.assert_allclose(model(BATCHES[0]), before, atol=1e-6)
    assert same.config == delta.config
    for name in ("first", "second"):
        for key, leaf in backbone.params[name]["lora"].items():
            other = getattr(model, name).lora
            np.testing.assert_allclose(getattr(other, key)[...], leaf, atol=1e-4)


def test_one_compiled_step_serves_all_batches_and_keeps_no_activations(monkeypatch):
    rows, temporary, jit = 4096, [], jax.jit

    def spied(function, **options):
        compiled = jit(function, **options)

        def call(*args):
            temporary.append(compiled.lower(*args).compile().memory_analysis().temp_size_in_bytes)
            return compiled(*args)

        return call if function.__name__ == "step" else compiled

    for depth in (2, 12):
        module, x = Stack(depth=depth), jnp.ones((rows, 8))
        backbone = jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], (x,))
        delta = jdelta.LoraModel(backbone, ["dense"], lora_r=2, init_lora_weights="eva")
        with monkeypatch.context() as patch:
            patch.setattr(data_sums.jax, "jit", spied)
            delta.init_from_data([x + i for i in range(3)])
    assert len(set(temporary[:3])) == len(set(temporary[3:])) == 1
    assert temporary[3] - temporary[0] < rows * 8 * 4  # less than the input of one of the ten layers that it has more


@pytest.mark.slow
def test_sharded_batches_and_parameters_give_the_same_start():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).parent / "data_starts_on_meshes.py"
    result = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=600)
    assert result.stdout.endswith("done\n"), result.stderr


def test_a_bar_is_shown_in_a_terminal_if_it_takes_long(monkeypatch):
    def printed(patience, on=True, terminal=True):
        monkeypatch.setattr(progress, "_PATIENCE", patience)
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=80)
        assert list(progress.shown(range(3), "batches", on, console)) == [0, 1, 2]
        return out.getvalue()

    assert "batches" in printed(0)
    assert "3" in printed(0)
    assert not printed(60)
    assert not printed(0, on=False)
    assert not printed(0, terminal=False)


# --- a method of one's own


@dataclasses.dataclass(frozen=True)
class AbsStart(jdelta.DataStart):
    sums = "inputs"
    power: int = 1

    def of_inputs(self, x):
        return {"total": jnp.sum(jnp.abs(x) ** self.power, axis=0, keepdims=True)}

    def init(self, edit, key, weight, own, sums):
        return {"scale": sums["total"][0] / sums["count"]}


class ScaleInput(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("scale", nn.initializers.ones, (x.shape[-1],))


class FromAbs(jdelta.Method):
    def edits(self, host, structure):
        yield jdelta.CallEdit(host.path, "before", ScaleInput())

    def data_start(self, power=1):
        return AbsStart(power)


def test_a_layer_of_ones_own_starts_from_data():
    backbone = net()
    delta = jdelta.DeltaModel(backbone, ["second"], method=FromAbs(), name="scaled")
    delta.init_from_data(BOTH, power=2)
    want = np.mean(inputs(backbone.params, True)["second"] ** 2, axis=0)
    np.testing.assert_allclose(backbone.params["second"]["scaled"]["scale"], want, rtol=1e-5)
    with pytest.raises(TypeError, match=r"no option 'rho'\. It has power"):
        delta.init_from_data(BOTH, rho=1)


# --- what is refused


def refused(kind, match, start, batches=BOTH, modules=("first", "second"), arguments=(), **options):
    backbone, delta = attach(start, modules, **dict(arguments))
    before = backbone.params
    with pytest.raises(kind, match=match):
        delta.init_from_data(batches, **options)
    assert backbone.params is before
    assert delta.targets == list(modules)
    backbone(BATCHES[0])


def test_what_does_not_start_from_data_and_options_that_are_unknown_are_refused():
    refused(ValueError, "init_lora_weights='pissa' does not start from data", "pissa")
    refused(ValueError, "init_lora_weights=True does not", True)
    refused(TypeError, "'corda' has no option 'rho'. It has mode", "corda", rho=2)
    refused(ValueError, "rho is 1 or more, got 0.5", "eva", rho=0.5)
    refused(ValueError, "mode is one of 'ipm', 'kpm', got 'kp'", "corda", mode="kp")
    refused(ValueError, "direction is one of", "lora_ga", loss=lambda *_: 0.0, direction="AB")
    refused(ValueError, "gamma is above 0", "lora_ga", loss=lambda *_: 0.0, gamma=0)
    with pytest.raises(ValueError, match="AdapterModel does not start from data"):
        jdelta.AdapterModel(net(), ["first"], bottleneck_dim=2).init_from_data(BATCHES)


def test_batches_that_do_not_fit_are_refused():
    refused(
        TypeError, "batch 0, which has the keywords attention_mask, is not one that Net", "eva", [{"attention_mask": 1}]
    )
    refused(
        TypeError,
        "batch 1, which has the keywords labels, x, .* 'labels'",
        "eva",
        [*BATCHES[:1], {"x": BATCHES[0], "labels": 1}],
    )
    refused(TypeError, "batches are an iterable, as \\[batch\\], got one dict", "eva", BOTH[0])
    refused(TypeError, "got one ndarray", "eva", BATCHES[0])
    refused(ValueError, "there are no batches", "eva", [])
    refused(ValueError, "LoraModel starts from the gradients of a loss here. Pass it", "lora_ga")
    refused(TypeError, "loss gives a number, and this one gives shape \\(4, 5", "lora_ga", loss=lambda p, b: b["x"])
    masked = [{"x": BATCHES[0], "attention_mask": np.zeros((4, 5))}]
    refused(ValueError, "at first: no input of it was seen.*all positions are masked", "eva", masked)
    refused(ValueError, "at first: the sum of .* over the batches is not finite", "eva", [BATCHES[0] * np.nan])


def test_shapes_without_values_are_refused_and_the_way_to_start_later_is_the_one_that_is_named():
    backbone, whole = net(), net()
    backbone.params = jax.eval_shape(lambda: backbone.params)
    delta = jdelta.LoraModel(backbone, ["first"], lora_r=2, init_lora_weights="corda")
    with pytest.raises(ValueError, match=r"LoraModel: .* holds shapes only.*init_from_data\(batches, params=params\)"):
        delta.init_from_data(BATCHES)
    params = delta.init_from_data(BATCHES, params=jdelta.graft(whole.params, delta.init(0)))
    other = jdelta.LoraModel(whole, ["first"], lora_r=2, init_lora_weights="corda")
    other.init_from_data(BATCHES)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), params, whole.params)


def test_modules_whose_inputs_are_no_vectors_are_refused():
    class Other(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(10, 8, name="embed")(ids)
            return nn.Conv(8, (3,), name="conv")(x)

    ids = jnp.arange(10).reshape(2, 5)
    module = Other()
    backbone = jdelta.Backbone(module, module.init(jax.random.key(0), ids)["params"], (ids,))
    for name, start, match in [
        ("embed", "eva", "at embed: an embedding"),
        ("conv", "eva", "at conv: what meets the weight there cannot be seen"),
        ("embed", "lora_ga", "at embed: an embedding"),
    ]:
        delta = jdelta.LoraModel(backbone, [name], lora_r=2, init_lora_weights=start)
        with pytest.raises(ValueError, match=match):
            delta.init_from_data([ids], loss=lambda params, batch: backbone(batch, params=params).sum())
        delta.remove()
    delta = jdelta.LoraModel(backbone, ["conv"], lora_r=2, init_lora_weights="lora_ga")
    before = backbone(ids)
    delta.init_from_data([ids], loss=lambda params, batch: (backbone(batch, params=params) ** 2).sum())
    assert backbone.params["conv"]["lora"]["b"].any()
    np.testing.assert_allclose(backbone(ids), before, atol=1e-5)


def test_a_rank_beyond_half_the_gradients_is_refused_before_a_batch_is_read():
    def never():
        raise AssertionError
        yield

    refused(
        ValueError,
        r"LoraModel at first: LoRA-GA takes 2 · 4 singular vectors .* 8 by 6: take lora_r=3 or less",
        "lora_ga",
        never(),
        arguments={"lora_r": 4},
        loss=lambda *_: 0.0,
    )


def test_ranks_by_variance_inside_jit_and_a_detached_delta_are_refused():
    backbone, delta = attach("eva")
    with pytest.raises(ValueError, match="Pass rho=1"):
        jax.jit(lambda params: delta.init_from_data(BATCHES, params=params))(backbone.params)
    delta.detach()
    with pytest.raises(RuntimeError, match="is detached and cannot be initialised"):
        delta.init_from_data(BATCHES)
