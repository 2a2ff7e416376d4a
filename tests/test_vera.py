"""VeRA against its formula in float64, its shared matrices, what it costs, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh, noisy
from flax import linen as nn
from safetensors.numpy import load_file, save_file

import jdelta
from jdelta.methods.vera import VeraConfig

X = jax.random.normal(jax.random.key(5), (3, 4, 10))


def network(widths=(6, 9)):
    module = nn.Sequential([nn.Dense(width) for width in widths])
    return jdelta.Backbone(module, module.init(jax.random.key(0), X)["params"], dummy_inputs=(X,))


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize("save_projection", [False, True])
def test_it_is_its_formula_in_float64(save_projection):
    backbone = network()
    bare = backbone(X)
    delta = jdelta.VeraModel(backbone, ["layers_0", "layers_1"], r=4, d_initial=0.3, save_projection=save_projection)
    np.testing.assert_array_equal(backbone(X), bare)
    start = backbone.params["layers_0"]["vera"]
    assert start.keys() == {"lambda_d", "lambda_b"}
    np.testing.assert_array_equal(start["lambda_d"], np.full(4, 0.3, np.float32))
    assert not start["lambda_b"].any()

    trains, frozen = delta.partition()
    assert jax.tree.map(jnp.shape, trains) == {
        "layers_0": {"vera": {"lambda_d": (4,), "lambda_b": (6,)}},
        "layers_1": {"vera": {"lambda_d": (4,), "lambda_b": (9,)}},
    }
    backbone.params = jdelta.combine(noisy(trains), frozen)
    params = wide(backbone.params)
    a, b = params["vera"]["a"], params["vera"]["b"]
    assert a.shape == (10, 4)
    assert b.shape == (4, 9)
    want = np.asarray(X, np.float64)
    for name in ("layers_0", "layers_1"):
        layer, (d_in, d_out) = params[name], params[name]["kernel"].shape
        change = a[:d_in] @ np.diag(layer["vera"]["lambda_d"]) @ b[:, :d_out] @ np.diag(layer["vera"]["lambda_b"])
        want = want @ (layer["kernel"] + change) + layer["bias"]
    assert np.abs(want - bare).max() > 0.05
    np.testing.assert_allclose(backbone(X), want, rtol=1e-5, atol=1e-5)


def test_the_matrices_depend_on_their_seed_alone_and_are_saved_only_if_asked(tmp_path):
    def of(**arguments):
        backbone = network()
        delta = jdelta.VeraModel(backbone, ["layers_0"], r=4, **arguments)
        return backbone, delta, backbone.params["vera"]

    _, _, one = of(rng=1)
    _, _, same = of(rng=2, save_projection=True)
    _, _, other = of(projection_prng_key=1)
    for name in "ab":
        np.testing.assert_array_equal(one[name], same[name])
        assert not np.array_equal(one[name], other[name])
    drawn = VeraConfig(r=400).projections(200, 300)
    np.testing.assert_allclose([drawn["a"].std(), drawn["b"].std()], [(2 / 200) ** 0.5, (2 / 400) ** 0.5], rtol=0.01)
    assert abs(drawn["a"]).max() <= (6 / 200) ** 0.5

    for save, keys in (False, set()), (True, {"vera.a", "vera.b"}):
        backbone, delta, _ = of(save_projection=save)
        trains, frozen = delta.partition()
        backbone.params = jdelta.combine(noisy(trains), frozen)
        assert {key for key in delta.finetuned().values if not key.startswith("layers")} == keys


def test_saved_matrices_come_back_whatever_they_are(tmp_path):
    backbone = network()
    delta = jdelta.VeraModel(backbone, ["layers_0"], r=4, save_projection=True)
    own = jax.tree.map(lambda leaf: leaf + 1, {name: backbone.params[name] for name in ("vera",)})
    trains, frozen = delta.partition()
    backbone.params = {**jdelta.combine(noisy(trains), frozen), **own}
    delta.save_finetuned(tmp_path)
    again = network()
    jdelta.AutoDeltaModel.from_finetuned(tmp_path, again)
    np.testing.assert_array_equal(again(X), backbone(X))


def test_a_folder_of_peft_without_its_matrices_is_refused_and_larger_ones_are_cut(tmp_path):
    model = fresh("bert", "FlaxBertForSequenceClassification")
    delta = jdelta.VeraModel(model, r=4, save_projection=True)
    trains, frozen = delta.partition()
    model.params = jdelta.combine(noisy(trains), frozen)
    delta.to_peft(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    matrices = {"base_model.vera_A", "base_model.vera_B"}
    assert matrices <= tensors.keys()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["save_projection"] is True

    def read(tensors):
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, file)
        return jdelta.from_peft(tmp_path, fresh("bert", "FlaxBertForSequenceClassification"))

    a = tensors["base_model.vera_A"]
    larger = read({**tensors, "base_model.vera_A": np.concatenate([a, a], 1)})
    np.testing.assert_array_equal(larger.backbone_model.params["vera"]["a"], a.T)
    with pytest.raises(ValueError, match=r"vera_A has shape \(4, 3\), and the modules need \(4, \d+\)"):
        read({**tensors, "base_model.vera_A": a[:, :3]})
    with pytest.raises(ValueError, match="save_projection is true, and the file lacks vera_A and vera_B"):
        read({key: value for key, value in tensors.items() if key not in matrices})
    named = {f"{key}.default": value for key, value in tensors.items()}
    np.testing.assert_array_equal(read(named).backbone_model.params["vera"]["a"], a.T)


def test_layers_of_a_scan_along_another_axis_are_refused():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(10, name="dense")(x), None

    module = nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)()
    backbone = jdelta.Backbone(module, dummy_inputs=(X, None))
    with pytest.raises(ValueError, match=r"nn\.scan whose axis is the first"):
        jdelta.VeraModel(backbone, ["dense"], r=4)


def test_a_training_step_costs_two_thirds_of_that_of_lora():
    def flops(model, **arguments):
        x = jnp.ones((8, 128))
        module = nn.Sequential([nn.Dense(128)])
        backbone = jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
        step = jax.value_and_grad(lambda t, x: jnp.sum(backbone(x, params=jdelta.combine(t, frozen)) ** 2), (0, 1))

        def cost(trains):
            return jax.jit(step).lower(trains, x).compile().cost_analysis()["flops"]

        frozen = backbone.params
        bare = cost({})
        trains, frozen = model(backbone, ["layers_0"], **arguments).partition()
        return cost(trains) - bare

    # the gradients of a and b, a third of LoRA's products, are not computed
    assert flops(jdelta.VeraModel, r=32) < 0.75 * flops(jdelta.LoraModel, lora_r=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r is at least 1"),
        ({"vera_dropout": 1.0}, "vera_dropout is at least 0 and below 1"),
        ({"d_initial": "small"}, "d_initial"),
        ({"save_projection": 1}, "save_projection"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_says_why(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        jdelta.VeraModel(network(), ["layers_0"], **arguments)
