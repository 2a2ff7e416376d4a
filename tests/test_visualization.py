import io

import jax
import jax.numpy as jnp
import pytest
from conftest import build
from flax import linen as nn
from rich.console import Console

import jdelta


def shown(model, color=False, **kwargs):
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=color, color_system="truecolor" if color else None)
    jdelta.Visualization(model).structure_graph(console=console, **kwargs)
    return out.getvalue()


@pytest.fixture(scope="module")
def model():
    model = build("bert", "FlaxBertForSequenceClassification", {"num_hidden_layers": 12})
    model.delta = jdelta.LoraModel(model, lora_r=2, unfrozen_modules=["classifier"])
    return model


def test_repeated_layers_are_folded_into_one_line_with_their_count(model):
    text = shown(model)
    assert "0-11 (12 layers) FlaxBertLayer 1×1×16 → 1×1×16" in text
    assert text.count("query Dense") == 1


def test_layers_that_differ_are_not_folded_together():
    model = build("bert", "FlaxBertForSequenceClassification", {"num_hidden_layers": 5}, _do_init=False)
    jdelta.LoraModel(model, modified_modules=["2.attention.self.query"], lora_r=2)
    text = shown(model)
    assert "0-1 (2 layers)" in text
    assert "3-4 (2 layers)" in text
    assert text.count("lora") == 1


def test_kinds_of_parameters_are_told_apart_without_colour(model):
    text = shown(model, mask=model.delta.trainable_mask(model.params))
    lines = [line.strip("│├└─ ") for line in text.splitlines()]
    assert "Δ+ a 16×2 float32" in lines
    assert "+ kernel 16×2 float32" in lines  # the classifier
    assert "- kernel 16×16 float32" in lines
    assert "+ trainable   - frozen   Δ of a delta" in text


def test_colours_are_those_of_opendelta(model):
    text = shown(model, color=True, mask=model.delta.trainable_mask(model.params))
    assert "\x1b[38;2;175;0;255mΔ+ a 16×2 float32" in text  # purple
    assert "\x1b[31m0-11" in text  # red
    assert "\x1b[32m FlaxBertLayer" in text  # green
    assert "\x1b[37mbert" in text  # white
    assert "\x1b[94m+ kernel 16×2" in text  # blue
    assert "\x1b[90m- kernel 16×16" in text  # grey


def test_the_counts(model):
    text = shown(model, mask=model.delta.trainable_mask(model.params))
    delta = 12 * 2 * 2 * 16 * 2
    head = 16 * 2 + 2
    total = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert f"parameters {total:,}" in text
    assert f"trainable  {delta + head:,} ({(delta + head) / total:.4%})" in text
    assert f"delta      {delta:,} ({delta / total:.4%})" in text
    assert (
        f"{total * 4 / 1000:.1f} kB of parameters, {((delta + head) * 8 + 4) / 1000:.1f} kB of optimizer state" in text
    )


def test_log_prints_the_tree_of_the_delta(model, capsys):
    model.delta.log()
    assert "Δ+ b 2×16 float32" in capsys.readouterr().out


def test_a_detached_delta_is_not_shown():
    model = build("bert", "FlaxBertForSequenceClassification")
    delta = jdelta.LoraModel(model, lora_r=2)
    delta.detach()
    assert "lora" not in shown(model)


def test_calls_and_scans():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, name="shared")
            return layer(layer(x))

    text = shown(jdelta.Backbone(Model(), dummy_inputs=(jnp.ones((2, 4)),)))
    assert "shared Dense 2×4 → 2×4 called 2 times" in text


def test_something_that_is_no_backbone():
    with pytest.raises(TypeError, match="expected a Flax model of transformers"):
        jdelta.Visualization("bert")
