"""How far a delta moved its modules, against closed formulas in numpy float64."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, fresh, noisy, train_deltas
from flax import linen as nn
from matplotlib.figure import Figure

import jdelta
from jdelta.display.movement import tabulated


def norm(*arrays):
    return np.sqrt(sum(np.square(np.asarray(a, np.float64)).sum() for a in arrays))


def lora_movement(module, scale, key="kernel"):
    """‖scale · a b‖ / ‖weight‖ of a module's leaves."""
    a, b = (np.asarray(module["lora"][name], np.float64) for name in "ab")
    return scale * norm(a.reshape(-1, a.shape[-1]) @ b.reshape(len(b), -1)) / norm(module[key])


def of(module, x):
    return jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))


def test_lora_by_layer_and_kind_of_module():
    model = fresh("bert", "FlaxBertForSequenceClassification")
    delta = jdelta.LoraModel(model, ["query", "intermediate.dense", "pooler.dense"], lora_r=2, lora_alpha=6)
    assert np.nanmax(delta.movement().values) == 0
    train_deltas(delta)
    found = delta.movement()
    assert found.rows == ("attention.self.query", "intermediate.dense", "bert.pooler.dense")
    assert found.columns == ("0", "1", "–")
    bert = model.params["bert"]
    layers = [bert["encoder"]["layer"][i] for i in "01"]
    want = [
        [*(lora_movement(layer["attention"]["self"]["query"], 3) for layer in layers), np.nan],
        [*(lora_movement(layer["intermediate"]["dense"], 3) for layer in layers), np.nan],
        [np.nan, np.nan, lora_movement(bert["pooler"]["dense"], 3)],
    ]
    np.testing.assert_allclose(found.values, want, rtol=1e-6)


def test_parameters_that_are_given_are_measured():
    model = fresh("bert", "FlaxBertForSequenceClassification")
    delta = jdelta.LoraModel(model, ["0.attention.self.query"], lora_r=2)
    params = noisy(model.params)
    want = lora_movement(params["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"], 8)
    np.testing.assert_allclose(delta.movement(params).values, [[want]], rtol=1e-6)
    assert delta.movement().values == 0


FLAT, IMAGE = jnp.ones((2, 3, 4)), jnp.ones((2, 8, 8, 4))
LAYERS = {
    "DenseGeneral": (nn.DenseGeneral((2, 5), axis=(-2, -1)), FLAT, "kernel"),
    "grouped Conv": (nn.Conv(6, (3, 3), feature_group_count=2), IMAGE, "kernel"),
    "Embed": (nn.Embed(7, 4), jnp.ones((2, 3), int), "embedding"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_lora_on_other_layers_of_flax(kind):
    module, x, key = LAYERS[kind]
    model = of(nn.Sequential([module]), x)
    delta = jdelta.LoraModel(model, ["layers_0"], lora_r=2)
    train_deltas(delta)
    np.testing.assert_allclose(delta.movement().values, [[lora_movement(model.params["layers_0"], 8, key)]], rtol=1e-6)


def test_a_change_below_the_resolution_of_half_precision_is_seen():
    model = of(nn.Sequential([nn.Dense(6, param_dtype=jnp.bfloat16)]), FLAT)
    delta = jdelta.LoraModel(model, ["layers_0"], lora_r=2)
    train_deltas(delta)
    own = model.params["layers_0"]["lora"]
    own["b"] = 1e-4 * own["b"]
    np.testing.assert_allclose(delta.movement().values, [[lora_movement(model.params["layers_0"], 8)]], rtol=1e-4)
    assert 0 < delta.movement().values < 2**-9


class Scanned(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(4, name="dense", use_bias=False)(x), None

        layers = nn.scan(Layer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_layers_in_a_scan_have_a_column_each(axis):
    model = of(Scanned(axis), FLAT)
    delta = jdelta.LoraModel(model, ["dense"], lora_r=2)
    train_deltas(delta)
    dense = jax.tree.map(lambda leaf: np.moveaxis(leaf, axis, 0), model.params["layers"]["dense"])
    found = delta.movement()
    assert (found.rows, found.columns) == (("layers.dense",), ("0", "1", "2"))
    want = [lora_movement(jax.tree.map(lambda leaf, i=i: leaf[i], dense), 8) for i in range(3)]
    np.testing.assert_allclose(found.values, [want], rtol=1e-6)


def test_a_scan_of_one_layer_is_a_layer():
    movement = tabulated({"layers.dense": np.array([0.5]), "head": np.array(0.25)})
    assert movement.columns == ("0", "–")


@pytest.mark.parametrize("axis", [0, 1])
def test_added_biases_in_a_scan(axis):
    model = of(Scanned(axis), FLAT)
    delta = jdelta.BitFitModel(model, ["dense"])
    train_deltas(delta)
    dense = jax.tree.map(lambda leaf: np.moveaxis(leaf, axis, 0), model.params["layers"]["dense"])
    want = [norm(dense["bitfit"]["bias"][i]) / norm(dense["kernel"][i]) for i in range(3)]
    np.testing.assert_allclose(delta.movement().values, [want], rtol=1e-6)


def test_trained_biases_are_measured_from_their_pretrained_values():
    model = fresh("bert", "FlaxBertForSequenceClassification")
    model.params = before = noisy(model.params, seed=1)
    delta = jdelta.BitFitModel(model, ["0.attention.self.query", "0.attention.output"])
    assert np.nanmax(delta.movement().values) == 0
    train_deltas(delta)
    found = delta.movement()
    assert found.rows == ("attention.self.query", "attention.output.dense", "attention.output.LayerNorm")
    old, new = (tree["bert"]["encoder"]["layer"]["0"]["attention"] for tree in (before, model.params))
    modules = [(old["self"]["query"], new["self"]["query"], "kernel")]
    modules += [(old["output"][k], new["output"][k], w) for k, w in (("dense", "kernel"), ("LayerNorm", "scale"))]
    want = [[norm(np.float64(b["bias"]) - np.float64(a["bias"])) / norm(a[weight])] for a, b, weight in modules]
    np.testing.assert_allclose(found.values, want, rtol=1e-6)
    delta.detach()
    delta.attach()
    np.testing.assert_allclose(delta.movement().values, want, rtol=1e-6)


def test_added_biases_moved_from_zero_and_stacks_are_told_apart():
    model = fresh("t5", "FlaxT5ForConditionalGeneration")
    delta = jdelta.BitFitModel(model, ["SelfAttention.q", "encoder.final_layer_norm"])
    train_deltas(delta)
    found = delta.movement()
    assert found.columns == ("0", "1", "–")
    assert found.rows == (
        "encoder.layer.0.SelfAttention.q",
        "encoder.final_layer_norm",
        "decoder.layer.0.SelfAttention.q",
    )
    q = model.params["decoder"]["block"]["1"]["layer"]["0"]["SelfAttention"]["q"]
    np.testing.assert_allclose(found.values[2, 1], norm(q["bitfit"]["bias"]) / norm(q["kernel"]), rtol=1e-6)
    last = model.params["encoder"]["final_layer_norm"]
    np.testing.assert_allclose(found.values[1, 2], norm(last["bitfit"]["bias"]) / norm(last["weight"]), rtol=1e-6)


def test_layers_that_share_weights_are_one_column():
    delta = jdelta.LoraModel(fresh("albert", "FlaxAlbertModel"), lora_r=2)
    found = delta.movement()
    assert (found.columns, len(found.rows)) == (("0",), 2)


def test_a_weight_of_zero_has_no_movement():
    class Shift(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + self.param("bias", nn.initializers.zeros, (4,))

    model = of(nn.Sequential([Shift(), nn.Dense(4)]), FLAT)
    delta = jdelta.BitFitModel(model, ["layers_0", "layers_1"])
    train_deltas(delta)
    np.testing.assert_array_equal(np.isnan(delta.movement().values), [[True, False]])


NAMES = {
    "words with numbers": (
        ["Block_0.Dense_0", "Block_0.Dense_1", "Block_1.Dense_0", "head.Dense_0"],
        ("Dense_0", "Dense_1", "head.Dense_0"),
        ("0", "1", "–"),
    ),
    "one stack": (["m.layer.0.fc1", "m.layer.10.fc1", "m.layer.2.fc1"], ("fc1",), ("0", "2", "10")),
    "a layer is the module": (["conv.0", "conv.1"], ("conv",), ("0", "1")),
    "nothing numbered": (["a.fc1", "a.fc2"], ("a.fc1", "a.fc2"), ("–",)),
    "wrappers": (
        ["encoder.encoder.layer.0.q", "decoder.roberta.encoder.layer.0.q"],
        ("encoder.q", "decoder.roberta.q"),
        ("0",),
    ),
}


@pytest.mark.parametrize("kind", NAMES)
def test_rows_and_columns_come_from_the_names(kind):
    names, rows, columns = NAMES[kind]
    found = tabulated({name: np.array(float(i)) for i, name in enumerate(names)})
    assert (found.rows, found.columns) == (rows, columns)
    assert sorted(found.values[~np.isnan(found.values)]) == list(range(len(names)))


def test_parameters_of_the_root_module_have_a_row():
    table = tabulated({"": np.array(0.5), "blocks.0.up": np.array(1.0), "blocks.1.up": np.array(2.0)})
    assert table.rows == ("the root module", "up")
    assert table.values[0, -1] == 0.5


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (jdelta.AdapterModel, r"delta 'adapter' moves no weights at bert\..*: what Adapter computes is no change"),
        (jdelta.PrefixModel, "delta 'prefix' moves no weights .*: what PrefixLayer computes"),
        (jdelta.SoftPromptModel, "delta 'soft_prompt' moves no weights .*: what PromptTable computes"),
    ],
)
def test_methods_that_change_no_weights_say_so(method, message):
    delta = method(fresh("bert", "FlaxBertForSequenceClassification"))
    with pytest.raises(ValueError, match=message):
        delta.plot()


def test_what_cannot_be_known_is_asked_for():
    shapes = build("bert", "FlaxBertForSequenceClassification", _do_init=False)
    params = fresh("bert", "FlaxBertForSequenceClassification").params
    delta = jdelta.BitFitModel(shapes, ["query"])
    with pytest.raises(ValueError, match=r"the model holds shapes only\. Pass the tree"):
        delta.movement()
    with pytest.raises(ValueError, match=r"the pretrained value of 'bert.*query\.bias' is unknown"):
        delta.movement(params)


def test_a_delta_without_layers_has_no_movement():
    with pytest.raises(ValueError, match="delta 'delta' changes nothing yet"):
        jdelta.DeltaModel(fresh("bert", "FlaxBertForSequenceClassification")).movement()


def test_a_delta_that_is_off_cannot_be_measured():
    delta = jdelta.LoraModel(fresh("bert", "FlaxBertForSequenceClassification"), lora_r=2)
    delta.merge()
    with pytest.raises(RuntimeError, match=r"'lora' is merged and cannot be measured. Call unmerge\(\) first"):
        delta.plot()


@pytest.mark.slow
def test_the_heat_map_shows_rows_layers_and_the_scale(tmp_path):
    model = fresh("bert", "FlaxBertForSequenceClassification")
    delta = jdelta.LoraModel(model, ["query", "value", "pooler.dense"], lora_r=2)
    train_deltas(delta)
    figure = delta.plot(path=tmp_path / "moved.svg")
    assert isinstance(figure, Figure)
    assert figure._repr_png_().startswith(b"\x89PNG")
    text = (tmp_path / "moved.svg").read_text()
    for label in ("attention.self.query", "bert.pooler.dense", "–", "‖change‖ / ‖weight‖"):
        assert f">{label}</text>" in text
    heat = figure.axes[0]
    np.testing.assert_array_equal(heat.images[0].get_array().filled(np.nan), delta.movement().values)
    delta.plot(model.params, tmp_path / "moved.png")
    assert (tmp_path / "moved.png").read_bytes().startswith(b"\x89PNG")


def labels_of(figure):
    figure.canvas.draw()
    return [
        label.get_window_extent()
        for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis)
        for label in axis.get_ticklabels()
    ]


@pytest.mark.slow
def test_labels_of_many_layers_do_not_overlap():
    from jdelta.display.plotting import heatmap

    for layers in (12, 24, 25, 48, 128):
        names = [f"layer.{i}.{kind}" for i in range(layers) for kind in ("query", "value")]
        boxes = labels_of(heatmap(tabulated({name: np.array(1.0) for name in names})))
        assert len(boxes) == layers + 2
        assert not any(one.overlaps(two) for one, two in itertools.pairwise(boxes))


def test_before_training_the_picture_is_of_zeros():
    delta = jdelta.LoraModel(fresh("bert", "FlaxBertForSequenceClassification"), lora_r=2)
    assert delta.plot().axes[0].images[0].get_clim() == (0, 1)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    delta = jdelta.LoraModel(fresh("bert", "FlaxBertForSequenceClassification"), lora_r=2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "jdelta.display.plotting", raising=False)
    monkeypatch.delattr(jdelta.display, "plotting", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jdelta\[plot\]'"):
        delta.plot()
