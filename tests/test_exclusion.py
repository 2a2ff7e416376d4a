"""`exclude_modules` takes out whatever a method would edit at or below a module, and nothing that is named is passed
over in silence."""

import jax
import jax.numpy as jnp
import pytest
from conftest import fresh
from flax import linen as nn

import jdelta
from jdelta.core.state import new_state
from jdelta.display.interactive.cost import costs
from jdelta.hosts.adapting import adapt
from jdelta.trees import surgery


def trained(delta):
    return {surgery.name_of(path) for path in surgery.flatten(delta.partition()[0])}


class Scale(nn.Module):
    @nn.compact
    def __call__(self, y):
        return y * self.param("scale", nn.initializers.ones, (y.shape[-1],))


class ScaleBelowConfig(jdelta.Method):
    """A method of one's own that walks below the modules that it was pointed at, without `find`."""

    delta_type = "scale_below"

    def place(self, site, patterns):
        for info in site.structure.below(()):
            if any(info.name.endswith(pattern) for pattern in patterns):
                yield from (
                    jdelta.CallEdit(below.path, "after", Scale())
                    for below in site.structure.below(info.path)
                    if below.type is nn.Dense
                )


class ScaleBelow(jdelta.DeltaModel):
    method_class = ScaleBelowConfig


def test_the_bias_of_an_excluded_module_does_not_train_with_default_positions(bert):
    everything = trained(jdelta.BitFitModel(fresh("bert", "FlaxBertForSequenceClassification")))
    delta = jdelta.BitFitModel(bert, exclude_modules=["attention.self.query", "0.output"])
    out = {name for name in everything if ".self.query." in name or ".layer.0.output." in name}
    assert len(out) == 4
    assert trained(delta) == everything - out
    assert not any("query" in name for name in delta.targets)


def test_everything_below_an_excluded_module_is_left_out_for_a_method_of_ones_own(bert):
    delta = ScaleBelow(bert, modified_modules=["layer.0", "layer.1"], exclude_modules=["attention", "1.intermediate"])
    assert [name.partition("layer.")[2] for name in delta.targets] == [
        "0.intermediate.dense",
        "0.output.dense",
        "1.output.dense",
    ]


@pytest.mark.parametrize("method", [jdelta.BitFitModel, ScaleBelow])
def test_a_delta_of_which_nothing_remains(bert, method):
    module = bert.module
    with pytest.raises(ValueError, match=r"exclude_modules=\['query', 'key', 'value'\] leaves nothing"):
        method(bert, modified_modules=["attention.self"], exclude_modules=["query", "key", "value"])
    with pytest.raises(ValueError, match=r"exclude: no module ends with 'qeury'"):
        method(bert, modified_modules=["attention.self"], exclude_modules=["qeury"])
    assert bert.module is module


def test_the_page_leaves_out_what_is_excluded_below_a_module(bert):
    method = jdelta.BitFitConfig(exclude_modules=("query", "pooler.dense"))
    found = costs(new_state(adapt(bert), bert, method, "BitFitModel", None, 0), method.exclude_modules)
    assert found.of(["bert.encoder.layer.0.attention.self"])[0] == 2 * 16
    assert found.reasons["bert.pooler"] == "All that would change in it is left out by exclude_modules."


class Holder(nn.Module):
    @nn.compact
    def __call__(self, x):
        table = self.param("w", nn.initializers.ones, (4, 4))
        return x @ table


class WithHolder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(name="norm")(Holder(name="q")(x))


def test_a_named_module_that_a_method_passes_over_is_named():
    x = jnp.ones((1, 4))
    model = jdelta.Backbone(WithHolder(), WithHolder().init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    module = model.module
    with pytest.raises(ValueError, match=r"BitFitModel has nothing to change at q \(Holder\)\. Leave them out"):
        jdelta.BitFitModel(model, modified_modules=["q", "norm"])
    assert model.module is module
    assert jdelta.BitFitModel(model, modified_modules=["q", "norm"], exclude_modules=["q"]).targets == ["norm"]


def test_every_module_that_is_passed_over_is_counted(bert):
    with pytest.raises(ValueError, match=r"at bert\.embeddings\.dropout \(Dropout\), .* and \d more"):
        jdelta.BitFitModel(bert, modified_modules=["dropout", "query"])
    with pytest.raises(ValueError, match=r"SoftPromptModel has nothing to change at bert\.pooler"):
        jdelta.SoftPromptModel(bert, modified_modules=["word_embeddings", "pooler"], soft_token_num=2)


def test_a_prompt_keeps_what_helps_it_in_excluded_modules():
    model = fresh("t5", "FlaxT5ForConditionalGeneration")
    whole = jdelta.SoftPromptModel(model, soft_token_num=2)
    edits = len(whole._state.attachment.edits)
    whole.remove()
    assert (
        len(jdelta.SoftPromptModel(model, soft_token_num=2, exclude_modules=["decoder"])._state.attachment.edits)
        == edits
    )
