"""IA3 against its formula in float64, the modules whose input it scales, and what it refuses."""

import json

import jax
import numpy as np
import pytest
from conftest import fresh, noisy
from flax import linen as nn
from safetensors.numpy import load_file, save_file

import jdelta

D_IN, D_OUT = 5, 6
X = jax.random.normal(jax.random.key(5), (3, D_IN))


def backbone_of(layer, x=X):
    module = nn.Sequential([layer])
    params = module.init(jax.random.key(0), x)["params"]
    return jdelta.Backbone(module, jax.tree.map(lambda leaf: leaf + 0.1, params), dummy_inputs=(x,))


@pytest.mark.parametrize(("side", "feedforward"), [("in", ["layers_0"]), ("out", []), ("out", None)])
def test_it_is_its_formula_in_float64(side, feedforward):
    backbone = backbone_of(nn.Dense(D_OUT))
    bare = backbone(X)
    delta = jdelta.IA3Model(backbone, ["layers_0"], feedforward_modules=feedforward)
    np.testing.assert_array_equal(backbone(X), bare)
    trains, frozen = delta.partition()
    backbone.params = jdelta.combine(noisy(trains), frozen)
    layer = backbone.params["layers_0"]
    x, kernel, bias, scale = (
        np.asarray(array, np.float64) for array in (X, layer["kernel"], layer["bias"], layer["ia3"]["l"])
    )
    assert scale.shape == (D_IN if side == "in" else D_OUT,)
    want = np.zeros((3, D_OUT))
    for row, o in np.ndindex(3, D_OUT):
        terms = [x[row, i] * (scale[i] if side == "in" else 1) * kernel[i, o] for i in range(D_IN)]
        want[row, o] = (sum(terms) + bias[o]) * (scale[o] if side == "out" else 1)
    assert np.abs(want - bare).max() > 0.01
    np.testing.assert_allclose(backbone(X), want, rtol=1e-5, atol=1e-5)
    delta.merge()
    np.testing.assert_allclose(backbone(X), want, rtol=1e-5, atol=1e-5)


def test_it_may_start_at_random_scales():
    backbone = backbone_of(nn.Dense(500))
    jdelta.IA3Model(backbone, ["layers_0"], init_ia3_weights=False)
    scale = backbone.params["layers_0"]["ia3"]["l"]
    assert abs(scale.mean()) < 0.2
    assert abs(scale.std() - 1) < 0.2


@pytest.mark.parametrize(
    ("feedforward", "inputs"),
    [(None, {"output.dense"}), ([], set()), (["value", "[r].*(key|value)"], {"self.key", "self.value"})],
)
def test_the_modules_whose_input_it_scales(feedforward, inputs):
    delta = jdelta.IA3Model(fresh("bert", "FlaxBertForSequenceClassification"), feedforward_modules=feedforward)
    sides = {}
    for name in delta.targets:
        edit, *_ = delta.config.edits(delta.structure[name], delta.structure)
        sides.setdefault(edit.rule.side, set()).add(".".join(name.split(".")[-2:]))
    assert sides.get("in", set()) == inputs
    assert set.union(*sides.values()) == {"self.key", "self.value", "output.dense"}


@pytest.mark.parametrize(
    ("layer", "x", "arguments", "message"),
    [
        (nn.Dense(6), X, {"feedforward_modules": ["dense"]}, "feedforward_modules has 'dense', which means none"),
        (nn.Conv(6, (3,)), X[:, None], {"feedforward_modules": ["layers_0"]}, "features that go in, .* last axes"),
        (nn.Einsum((5, 6), "ai,io->oa"), X, {}, "features that go out, which have to be in the last axes"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_says_why(layer, x, arguments, message):
    backbone = backbone_of(layer, x)
    before = backbone.params
    with pytest.raises((TypeError, ValueError), match=message):
        jdelta.IA3Model(backbone, ["layers_0"], **arguments)
    assert backbone.params is before


def test_files_that_do_not_fit_are_refused(tmp_path):
    jdelta.IA3Model(fresh("bert", "FlaxBertForSequenceClassification")).to_peft(tmp_path, allow_untrained=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name.split(".")[-2]: tensor.shape.index(1) for name, tensor in tensors.items()} == {
        "key": 1,
        "value": 1,
        "dense": 0,
    }

    def refuses(error, message):
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        with pytest.raises(error, match=message):
            jdelta.from_peft(tmp_path, fresh("bert", "FlaxBertForSequenceClassification"))

    fields["feedforward_modules"] = []
    refuses(ValueError, r"ia3_l has shape \(1, \d+\), and by feedforward_modules and the module's widths")
    fields["feedforward_modules"] = 3
    refuses(ValueError, "IA3: feedforward_modules is a list of strings, or a string, got 3")
    fields["feedforward_modules"] = ["output.dense"]
    save_file({name: tensor[:, :3] for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    refuses(ValueError, "ia3_l has 3 entries at a module of widths")
