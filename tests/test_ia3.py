"""IA3 against its formula in float64, the modules whose input it scales, and what it refuses."""

import json
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh, noisy
from flax import linen as nn
from flax import nnx
from parity import assert_close, peft, torch
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


@pytest.mark.parametrize("feedforward", [["layers_0"], []])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("in_nnx", [False, True])
def test_it_scales_the_channels_of_a_convolution(feedforward, groups, in_nnx):
    x = jax.random.normal(jax.random.key(6), (2, 5, 5, 4))
    fields = {"kernel_size": (3, 3), "strides": 2, "feature_group_count": groups}
    if in_nnx:
        backbone = nnx.Sequential(nnx.Conv(4, 6, **fields, rngs=nnx.Rngs(0)))
        backbone.layers[0].bias[...] += 0.1
    else:
        backbone = backbone_of(nn.Conv(6, **fields), x)
    bare = backbone(x)
    marks = [f"[r].*{name[-1]}" for name in feedforward]
    delta = jdelta.IA3Model(backbone, ["[r].*0"], feedforward_modules=marks, dummy_inputs=(x,) if in_nnx else None)
    np.testing.assert_array_equal(backbone(x), bare)
    trains, frozen = delta.partition()
    params = jdelta.combine(noisy(trains), frozen)
    (scale,) = jax.tree.leaves(delta.partition(params)[0])
    delta.detach()
    want = backbone(x * scale) if feedforward else bare * scale
    delta.attach()
    if in_nnx:
        nnx.update(backbone, params)
    else:
        backbone.params = params
    assert np.abs(want - bare).max() > 0.01
    np.testing.assert_allclose(backbone(x), want, rtol=1e-5, atol=1e-5)
    delta.merge()
    np.testing.assert_allclose(backbone(x), want, rtol=1e-5, atol=1e-5)


class Torch:
    """A convolution in groups, and one over its output, in PyTorch and in Flax."""

    @staticmethod
    def model():
        first = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        return torch.nn.Sequential(OrderedDict(first=first, act=torch.nn.Tanh(), last=torch.nn.Conv2d(6, 5, 2)))

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (3, 3), strides=2, padding=1, feature_group_count=2, name="first")(x)
            return nn.Conv(5, (2, 2), padding="VALID", name="last")(jnp.tanh(x))


@pytest.mark.parity
def test_the_numbers_of_convolutions_are_those_of_peft(tmp_path):
    torch.manual_seed(0)
    base = Torch.model()
    x = torch.randn(2, 4, 9, 9)
    params = {
        name: {"kernel": module.weight.detach().numpy().transpose(2, 3, 1, 0), "bias": module.bias.detach().numpy()}
        for name, module in base.named_children()
        if name != "act"
    }
    config = peft.IA3Config(target_modules=["first", "last"], feedforward_modules=["first"])
    wrapped = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            parameter.add_(0.5 * torch.randn_like(parameter) * ("ia3_l" in name))
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = wrapped.double()(x.double()).detach().numpy().transpose(0, 2, 3, 1)
    inputs = jnp.asarray(x.numpy().transpose(0, 2, 3, 1))
    backbone = jdelta.Backbone(Torch.Flax(), params, dummy_inputs=(inputs,))
    delta = jdelta.from_peft(tmp_path / "adapter", backbone)
    assert delta.config.feedforward_modules == ("first",)
    assert_close(backbone(inputs), expected, "output")
    delta.to_peft(tmp_path / "back", allow_untrained=True)
    ours, theirs = (load_file(tmp_path / part / "adapter_model.safetensors") for part in ("back", "adapter"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    delta.merge()
    assert_close(backbone(inputs), expected, "merged")


def test_a_convolution_over_one_axis_is_not_exchanged(tmp_path):
    delta = jdelta.IA3Model(backbone_of(nn.Conv(6, (3,)), X[:, None]), ["layers_0"])
    with pytest.raises(ValueError, match="convolutions over two or three axes; this one is over 1"):
        delta.to_peft(tmp_path, allow_untrained=True)


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
        (nn.Embed(7, 6), X.astype("i4"), {"feedforward_modules": ["layers_0"]}, "features that go in, .* last axes"),
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
    refuses(ValueError, r"ia3_l has shape \(1, 3\), and by feedforward_modules and the module's widths it has")
