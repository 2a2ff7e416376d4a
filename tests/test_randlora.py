"""RandLoRA against its formula in float64, its shared matrices, and what it refuses."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh, noisy
from flax import linen as nn
from safetensors.numpy import load_file, save_file

import jdelta
from jdelta.methods.randlora import RandLoraConfig

X = jax.random.normal(jax.random.key(5), (3, 4, 10))


def network(widths=(6, 9)):
    module = nn.Sequential([nn.Dense(width) for width in widths])
    return jdelta.Backbone(module, module.init(jax.random.key(0), X)["params"], dummy_inputs=(X,))


def change_of(a, b, own, scale, d_in, d_out):
    """The sum over pairs, as PEFT pairs them: the j-th of (i, k) with the j-th of (k, i)."""
    small, large = min(d_in, d_out), max(d_in, d_out)
    r, n = own["lambda"].shape
    left = [own["lambda"][i, k] * a[i, :small] * own["gamma"][k] for i in range(r) for k in range(n)]
    right = [b[:large, k, i] for k in range(n) for i in range(r)]
    change = sum(np.outer(one, other) for one, other in zip(left, right, strict=True))
    return scale * (change if d_in <= d_out else change.T)


@pytest.mark.parametrize("arguments", [{}, {"sparse": True}, {"save_projection": True, "very_sparse": True}])
@pytest.mark.parametrize("widths", [(6, 9), (12, 5)])
def test_it_is_its_formula_in_float64(widths, arguments):
    backbone = network(widths)
    bare = backbone(X)
    delta = jdelta.RandLoraModel(backbone, ["layers_0", "layers_1"], r=4, randlora_alpha=3, **arguments)
    np.testing.assert_array_equal(backbone(X), bare)
    trains, frozen = delta.partition()
    for name, (d_in, d_out) in zip(trains, ((10, widths[0]), widths), strict=True):
        small = min(d_in, d_out)
        n = math.ceil(small / 4)
        own = trains[name]["randlora"]
        assert jax.tree.map(jnp.shape, own) == {"lambda": (4, n), "gamma": (n, small)}
        assert not own["lambda"].any()
        np.testing.assert_allclose(own["gamma"], 1 / small, rtol=1e-6)
    backbone.params = jdelta.combine(noisy(trains), frozen)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), backbone.params)
    a, b = params["randlora"]["a"], params["randlora"]["b"]
    small, large = sorted((max(10, widths[0]), max(widths)))
    assert (a.shape, b.shape) == ((4, small), (large, math.ceil(small / 4), 4))
    want = np.asarray(X, np.float64)
    for name in ("layers_0", "layers_1"):
        layer = params[name]
        change = change_of(a, b, layer["randlora"], 3 / 4, *layer["kernel"].shape)
        assert arguments or np.linalg.matrix_rank(change) == min(change.shape)
        want = want @ (layer["kernel"] + change) + layer["bias"]
    assert np.abs(want - bare).max() > 0.05
    np.testing.assert_allclose(backbone(X), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_matrices_depend_on_their_seed_alone_and_are_of_deviation_1():
    drawn = RandLoraConfig(r=32).projections(200, 300)
    np.testing.assert_allclose([np.std(leaf) for leaf in drawn.values()], 1, rtol=0.01)
    other = RandLoraConfig(r=32, projection_prng_key=1).projections(200, 300)
    assert not np.array_equal(drawn["a"], other["a"])
    for arguments, share in (({"sparse": True}, 1 / 3), ({"very_sparse": True}, 1 / math.sqrt(200))):
        b = np.asarray(RandLoraConfig(r=32, **arguments).projections(200, 300)["b"])
        values = np.unique(b)
        assert len(values) == 3
        assert values[0] == -values[2]
        np.testing.assert_allclose(np.mean(b != 0), share, rtol=0.02)
        np.testing.assert_allclose(np.std(b), 1, rtol=0.001)


@pytest.mark.parity
@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"very_sparse": True}])
@pytest.mark.parametrize("shapes", [((40, 30), (20, 50)), ((64, 64),), ((70, 20),)])
def test_the_matrices_are_those_of_peft(shapes, options):
    from parity import peft, torch

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(*shape) for shape in shapes])
            self.config = {}

    config = peft.RandLoraConfig(r=7, target_modules=r"layers\.\d", projection_prng_key=3, **options)
    theirs = peft.get_peft_model(Network(), config).base_model
    d_in, d_out = map(max, *shapes) if len(shapes) > 1 else shapes[0]
    ours = jax.jit(lambda: RandLoraConfig(r=7, projection_prng_key=3, **options).projections(d_in, d_out))()
    a, b = (getattr(theirs, f"randlora_{side}")["default"].float().numpy() for side in "AB")
    close = np.testing.assert_array_equal if not options else lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-7)
    close(ours["a"], a[:, 0])
    close(ours["b"], b)


def test_a_folder_of_peft_has_its_matrices_at_the_root_and_at_each_module(tmp_path):
    model = fresh("bert", "FlaxBertForSequenceClassification")
    delta = jdelta.RandLoraModel(model, r=16, save_projection=True)
    trains, frozen = delta.partition()
    model.params = jdelta.combine(noisy(trains), frozen)
    delta.to_peft(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    copies = {key for key in tensors if key.endswith(("randlora_A", "randlora_B"))}
    assert len(copies) == 2 * (1 + len(delta.targets))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["save_projection"] is True

    def read(tensors):
        save_file(tensors, file)
        return jdelta.from_peft(tmp_path, fresh("bert", "FlaxBertForSequenceClassification"))

    roots = {"base_model.randlora_A", "base_model.randlora_B"}
    again = read({key: value for key, value in tensors.items() if key not in copies - roots})
    assert jax.tree.all(jax.tree.map(np.array_equal, again.backbone_model.params, model.params))
    with pytest.raises(ValueError, match="the file lacks randlora_A"):
        read({key: value for key, value in tensors.items() if key != "base_model.randlora_A"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r is at least 1"),
        ({"randlora_dropout": 1.0}, "randlora_dropout is at least 0 and below 1"),
        ({"sparse": "very"}, "sparse"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_says_why(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        jdelta.RandLoraModel(network(), ["layers_0"], **arguments)
