"""Each mistake is an error that names the thing and the remedy, and leaves the model as it was."""

import chex
import jax
import jax.numpy as jnp
import pytest
from conftest import fresh
from flax import linen as nn

import jdelta

IDS = jnp.array([[5, 6, 7], [9, 10, 11]])


@pytest.fixture(scope="module")
def attached():
    model = fresh("bert", "FlaxBertForSequenceClassification")
    first = jdelta.LoraModel(model, lora_r=2, name="first")
    return model, first, model(IDS).logits


@pytest.fixture
def model(attached):
    """A model with one delta on it; whatever the test does wrong, both have to survive."""
    model, first, before = attached
    module, params = model.module, model.params
    yield model
    assert model.module is module
    assert model.params is params
    assert (model(IDS).logits == before).all()
    assert first.attached


WRONG = {
    "a pattern that matches nothing": (
        jdelta.LoraModel,
        {"modified_modules": ["qeury"]},
        ValueError,
        r"no module ends with 'qeury'\. Closest: ….query \(2 modules\)",
    ),
    "an excluded pattern that matches nothing": (
        jdelta.LoraModel,
        {"modified_modules": ["query"], "exclude_modules": ["layer.7"]},
        ValueError,
        r"exclude: no module ends with 'layer\.7'",
    ),
    "an unfrozen pattern that matches nothing": (
        jdelta.LoraModel,
        {"unfrozen_modules": ["clasifier"]},
        ValueError,
        r"no module ends with 'clasifier'\. Closest: ….classifier",
    ),
    "an invalid regex": (
        jdelta.LoraModel,
        {"modified_modules": ["[r](query"]},
        ValueError,
        r"is not a valid regular expression: .*unterminated",
    ),
    "a bare string": (jdelta.LoraModel, {"modified_modules": "query"}, TypeError, r"Write \['query'\]"),
    "a rank of 0": (jdelta.LoraModel, {"lora_r": 0}, ValueError, "lora_r is at least 1, got 0"),
    "a rank that is no number": (jdelta.LoraModel, {"lora_r": "8"}, TypeError, "lora_r is a whole number, got '8'"),
    "a dropout of 1": (jdelta.LoraModel, {"lora_dropout": 1.0}, ValueError, "lora_dropout is at least 0 and below 1"),
    "an unknown argument": (
        jdelta.LoraModel,
        {"lora_rank": 4},
        TypeError,
        "no argument 'lora_rank'. Did you mean 'lora_r'",
    ),
    "a bottleneck of 0": (jdelta.AdapterModel, {"bottleneck_dim": 0}, ValueError, "bottleneck_dim is at least 1"),
    "a negative bottleneck": (
        jdelta.ParallelAdapterModel,
        {"bottleneck_dim": -1},
        ValueError,
        "bottleneck_dim is at least 1",
    ),
    "an unknown non-linearity": (
        jdelta.AdapterModel,
        {"non_linearity": "gleu"},
        ValueError,
        "non_linearity='gleu' is unknown. There are: gelu, gelu_new",
    ),
    "LoRA on a module without a kernel": (
        jdelta.LoraModel,
        {"modified_modules": ["attention"]},
        TypeError,
        r"LoraModel at bert\.encoder\.layer\.0\.attention \(FlaxBertAttention\): LoRA needs a linear module",
    ),
    "a name that is taken by a delta": (
        jdelta.LoraModel,
        {"name": "first"},
        ValueError,
        "has a delta named 'first' already",
    ),
    "a name that is taken by the backbone": (
        jdelta.LoraModel,
        {"name": "query"},
        ValueError,
        "'query' is the name of a part",
    ),
    "a name with a dot": (jdelta.LoraModel, {"name": "a.b"}, ValueError, "a word without dots"),
    "patterns that do not pair": (
        jdelta.ParallelAdapterModel,
        {"modified_modules": ["attention"]},
        ValueError,
        "takes pairs of patterns, from and to",
    ),
    "a span that runs backwards": (
        jdelta.ParallelAdapterModel,
        {"modified_modules": ["pooler", "embeddings"]},
        ValueError,
        r"no module of \['bert\.pooler'\] runs before bert\.embeddings",
    ),
    "modules and interaction": (
        jdelta.LoraModel,
        {"modified_modules": ["query"], "interactive_modify": True},
        ValueError,
        "either modified_modules or interactive_modify",
    ),
    "an unknown common name": (
        jdelta.LoraModel,
        {"modified_modules": ["attn.query"], "common_structure": True},
        ValueError,
        r"'attn.query' is no common name\. Did you mean 'attn.q'\? There are: attn, attn.q",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_constructor(model, mistake):
    cls, arguments, error, message = WRONG[mistake]
    with pytest.raises(error, match=message):
        cls(model, **arguments)


def test_a_target_that_is_a_tied_head():
    model = fresh("gpt2", "FlaxGPT2LMHeadModel")
    params, module = model.params, model.module
    with pytest.raises(
        ValueError, match=r"'lm_head' means 'lm_head', which cannot be a target: Dense .*tied head.*untie"
    ):
        jdelta.LoraModel(model, modified_modules=["lm_head"])
    assert model.params is params
    assert model.module is module


class Odd(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(9, 4, name="embed")(x)
        Hidden(name="hidden")(mask=None)
        ids = Argmax(name="argmax")(x)
        return nn.Dense(2, name="dense")(x), ids


class Argmax(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x.argmax(-1)


class Hidden(nn.Module):
    @nn.compact
    def __call__(self, mask):
        return {"none": mask}


def test_hosts_whose_input_or_output_is_no_floating_array():
    backbone = jdelta.Backbone(Odd(), Odd().init(jax.random.key(0), IDS)["params"], dummy_inputs=(IDS,))
    delta = jdelta.DeltaModel(backbone, name="d")
    module, params = backbone.module, backbone.params
    with pytest.raises(TypeError, match=r"embed \(Embed\) takes an array of int32; a layer needs floats"):
        delta.insert_sequential_module("embed", nn.Dense(4), where="before")
    with pytest.raises(TypeError, match=r"argmax \(Argmax\) returns an array of int32"):
        delta.insert_sequential_module("argmax", nn.Dense(4))
    with pytest.raises(TypeError, match=r"hidden \(Hidden\) cannot be a target: expected an array"):
        delta.insert_sequential_module("hidden", nn.Dense(4))
    with pytest.raises(TypeError, match=r"hidden \(Hidden\) cannot be a target: Hidden was called without an array"):
        delta.insert_sequential_module("hidden", nn.Dense(4), where="before")
    with pytest.raises(
        ValueError, match=r"parallel layer Dense at dense \(Dense\) returned shape .*3.* output has shape"
    ):
        delta.insert_parallel_module("dense", nn.Dense(3))
    with pytest.raises(TypeError, match=r"the layer is a flax\.linen module"):
        delta.insert_sequential_module("dense", lambda y: y)
    with pytest.raises(ValueError, match="where is 'after' or 'before', got 'beside'"):
        delta.insert_sequential_module("dense", nn.Dense(2), where="beside")
    with pytest.raises(ValueError, match="the span starts at dense, which runs after embed"):
        delta.insert_parallel_module("embed", nn.Dense(4), start="dense")
    assert backbone.module is module
    assert backbone.params is params


def test_trees_that_do_not_fit_what_is_attached(bert):
    before = bert.params
    delta = jdelta.LoraModel(bert)
    grafted = bert.params
    missing = (
        r"delta 'lora' is attached, but the parameters lack 'bert\.encoder\.layer\.0\.attention\.self\.query\.lora\.a'"
    )
    with pytest.raises(ValueError, match=missing + r".*jdelta\.graft"):
        bert(IDS, params=before)
    delta.detach()
    surplus = (
        r"delta 'lora' is detached, but the parameters hold 'bert\.encoder.*lora\.a'.*jdelta\.prune\(params, delta\)"
    )
    with pytest.raises(ValueError, match=surplus):
        bert(IDS, params=grafted)
    assert bert(IDS, params=before).logits.shape == (2, 2)


def test_detaching_or_attaching_twice(bert):
    delta = jdelta.LoraModel(bert)
    with pytest.raises(RuntimeError, match="delta 'lora' is attached already"):
        delta.attach()
    delta.detach()
    with pytest.raises(RuntimeError, match="delta 'lora' is detached already"):
        delta.detach()
    with pytest.raises(RuntimeError, match=r"delta 'lora' is detached; call attach\(\)"):
        delta.insert_sequential_module("classifier", nn.Dense(2))


def test_detaching_from_a_model_whose_parameters_were_replaced(bert):
    base = bert.params
    delta = jdelta.LoraModel(bert)
    bert.params = base
    with pytest.raises(ValueError, match=r"detach: the model lacks 'bert\.encoder"):
        delta.detach()
    assert delta.attached


def test_backbones_that_are_none():
    torch_like = type("Linear", (), {})()
    with pytest.raises(TypeError, match=r"a jdelta\.Backbone or an nnx module, got .*Linear"):
        jdelta.LoraModel(torch_like)
    with pytest.raises(TypeError, match=r"Wrap it: jdelta\.Backbone\(Dense\(…\), params"):
        jdelta.LoraModel(nn.Dense(3))
    with pytest.raises(TypeError, match="got the class Dense"):
        jdelta.Backbone(nn.Dense, {})
    with pytest.raises(TypeError, match="expected a tree of parameters"):
        jdelta.Backbone(nn.Dense(3), [1])


@pytest.mark.parity
def test_a_pytorch_model_is_told_of_from_pt():
    import torch

    with pytest.raises(
        TypeError, match=r"It is a PyTorch model: load its Flax class, with from_pretrained\(…, from_pt=True\)"
    ):
        jdelta.LoraModel(torch.nn.Linear(2, 2))


def test_dummy_inputs_that_do_not_fit():
    class Images(nn.Module):
        @nn.compact
        def __call__(self, x):
            _, _, _, _ = x.shape
            return nn.Dense(2)(x)

    with pytest.raises(
        ValueError, match=r"Images takes neither the pseudo input \[\[0, 0, 0\]\] nor \[0, 0, 0\].*dummy_inputs="
    ):
        jdelta.Backbone(Images())
    with pytest.raises(ValueError, match=r"dummy inputs of shapes \(\(2, 3\),\) do not fit Images: not enough values"):
        jdelta.Backbone(Images(), dummy_inputs=(jnp.ones((2, 3)),))
    with pytest.raises(TypeError, match=r"dummy_inputs is a tuple of arguments, got .*: write \(x,\)"):
        jdelta.Backbone(Images(), dummy_inputs=jnp.ones((2, 3, 3, 1)))


def test_parameters_that_do_not_fit_the_module():
    x = jnp.ones((1, 4))
    params = nn.Dense(3).init(jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match=r"the parameters lack 'bias', which Dense needs"):
        jdelta.Backbone(nn.Dense(3), {"kernel": params["kernel"]}, dummy_inputs=(x,))
    with pytest.raises(ValueError, match=r"'bias' has shape \(3,\), but Dense needs \(5,\)"):
        jdelta.Backbone(nn.Dense(5), params, dummy_inputs=(x,))


def test_a_model_of_an_unknown_family_has_no_default_positions():
    x = jnp.ones((1, 4))
    backbone = jdelta.Backbone(nn.Sequential([nn.Dense(3)]), dummy_inputs=(x,))
    with pytest.raises(ValueError, match=r"(?s)no block of a known family.*modified_modules=\['layers_0'\]"):
        jdelta.LoraModel(backbone)


def test_a_layer_with_which_the_model_does_not_run_is_named(bert):
    delta = jdelta.DeltaModel(bert, name="own")
    at = r"does not run with these layers, at bert\.encoder\.layer\.0\.attention\.self\.query: "
    with pytest.raises(TypeError, match=at + ".*reshape"):
        delta.replace_module("0.attention.self.query", nn.Dense(7))
    with pytest.raises(ValueError, match=at):
        delta.insert_parallel_module("0.attention.self.query", nn.Conv(16, (3, 3, 3, 3)))
    assert not delta.targets


def test_the_model_is_usable_after_a_mistake(bert):
    with pytest.raises(ValueError, match="Closest"):
        jdelta.LoraModel(bert, modified_modules=["qeury"])
    before = bert(IDS).logits
    jdelta.LoraModel(bert, modified_modules=["query"])
    chex.assert_trees_all_equal(bert(IDS).logits, before)


def test_no_modules_at_all(bert):
    with pytest.raises(ValueError, match=r"LoraModel was given no modules\. Name some"):
        jdelta.LoraModel(bert, modified_modules=[])
    with pytest.raises(ValueError, match=r"BitFitModel: none of the modules that \['dropout'\] mean gets a change"):
        jdelta.BitFitModel(bert, modified_modules=["dropout"])


class Halves(nn.Module):
    def setup(self):
        self.first, self.second = nn.Dense(4), nn.Dense(4)

    def __call__(self, x):
        return self.second(self.first(x))

    def only_second(self, x):
        return self.second(x)


def test_a_span_whose_start_is_not_called_in_this_run():
    x = jnp.ones((2, 4))
    backbone = jdelta.Backbone(Halves(), Halves().init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    jdelta.ParallelAdapterModel(backbone, modified_modules=["first", "second"])
    assert backbone(x).shape == (2, 4)
    with pytest.raises(
        ValueError, match=r"the span to second \(Dense\) starts at first, which was not called before it"
    ):
        backbone(x, method="only_second")


def test_a_masked_convolution_is_no_host_for_lora():
    conv = nn.Conv(4, (2,), mask=jnp.ones((2, 4, 4)))
    backbone = jdelta.Backbone(nn.Sequential([conv]), dummy_inputs=(jnp.ones((1, 5, 4)),))
    with pytest.raises(TypeError, match="does not take masked"):
        jdelta.LoraModel(backbone, modified_modules=["layers_0"], lora_r=2)
